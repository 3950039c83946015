"""What the command line calls and what a notebook calls."""

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path

from mlx_align import demo
from mlx_align.data.records import Text
from mlx_align.demo import DEMO
from mlx_align.errors import DataError, ExportError, ModelError, SettingsError
from mlx_align.evaluate.compare import Answers, Comparison
from mlx_align.rollout.sampler import Completion
from mlx_align.settings import read_file
from mlx_align.train.config import RunSettings, setting_names
from mlx_align.train.loop import Events, Result, resume_settings, train
from mlx_align.train.runlog import RUN, read_run

# Settings that name something on disk or on the Hub.
_PATHS = ("model", "data", "valid_data", "chat_template")


def train_model(
    method: str,
    *,
    config: str | Path | None = None,
    resume: str | Path | None = None,
    events: Events | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    **settings,
) -> Result:
    """Train a model by a method ("sft", "dpo", ...) and return where the run is and what it reached.

    `settings` are the flags of `mlx-align METHOD` with underscores; they come before the values of
    the file `config`, those before the defaults. `resume` names a run folder to go on with.

    >>> train_model("dpo", model="mlx-community/Llama-3.2-1B-Instruct-4bit", data="prefs.jsonl", beta=0.1)
    """
    if resume is not None:
        folder = Path(resume)
        run = resume_settings(folder)
        if run.method.name != method:
            raise SettingsError(f"{folder}: is a run of {run.method.name}, not of {method}")
        return train(run, folder, resume=True, events=events, should_stop=should_stop)
    values = {**_read_config(config, method), **_canonical(settings, method)}
    if values.get("model", DEMO) == DEMO:
        values = {**demo.SETTINGS.get(method, {}), **values}
    values |= {name: _absolute(values[name]) for name in _PATHS if values.get(name)}
    run = RunSettings.from_flat(method, values, "settings")
    folder = Path(run.train.output or _default_folder(method)).expanduser()
    return train(run, folder, events=events, should_stop=should_stop)


def generate(
    source: str | Path,
    prompts: Sequence[Text],
    *,
    base: str | None = None,
    dtype: str = "auto",
    prompt_format: str = "auto",
    **sampling,
) -> list[Completion]:
    """One completion of each prompt by a run, an adapter, or a model.

    Prompts are text or lists of messages; `sampling` are the fields of `SamplingSettings`
    (max_tokens, temperature, top_p, seed).
    """
    from mlx_align.model.open import open_model
    from mlx_align.rollout.sampler import SamplingSettings, prompt_encoder, sample

    loaded, _ = open_model(source, dtype, base)
    encoder = prompt_encoder(loaded, prompt_format)
    ids = [encoder.prompt_ids(prompt) for prompt in prompts]
    return sample(loaded, ids, SamplingSettings(**sampling))


def export_model(
    source: str | Path,
    to: str,
    *,
    output: str | Path | None = None,
    quantize: str | None = None,
    dtype: str | None = None,
    name: str | None = None,
    base: str | None = None,
) -> Path:
    """Merge a run's adapter into its model and write it for other programs; returns the path.

    `to` is "mlx", "hf", "gguf" or "ollama"; `quantize` the GGUF type, `dtype` that of folders,
    `name` the model's name in Ollama.
    """
    from mlx_align.export.folder import export_folder
    from mlx_align.export.gguf import export_gguf
    from mlx_align.export.ollama import export_ollama
    from mlx_align.model.load import STORED
    from mlx_align.model.open import open_model

    if to not in ("mlx", "hf", "gguf", "ollama"):
        raise SettingsError(f"to: {to!r} is not one of mlx, hf, gguf, ollama")
    folder = Path(source).expanduser()
    name = name or folder.resolve().name
    if quantize is None:
        quantize = "q8_0" if to == "ollama" else "f16"
    if output is not None:
        path = Path(output).expanduser()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ExportError(f"{path}: exists already; choose another --output")
    elif folder.is_dir() and (folder / "adapter_config.json").exists():
        path = folder / "export" / (f"{name}-{quantize}.gguf" if to == "gguf" else to)
    else:
        raise ExportError("--output is needed to export a model that is no run")
    loaded, _ = open_model(source, STORED, base)
    if to == "gguf":
        return export_gguf(loaded, path, quantise=quantize)
    if to == "ollama":
        return export_ollama(loaded, path, quantise=quantize, name=name)
    return export_folder(loaded, path, flavour=to, dtype=dtype)


def compare(source: str | Path, *, base: str | None = None) -> Comparison:
    """What alignment changed: shares of refusals and right answers before and after, and examples.

    Measured on the sets that come with the package; the held-out accuracy is the run's own.
    """
    from mlx_align.evaluate.answers import demo_sets
    from mlx_align.evaluate.compare import Change, measure_changes
    from mlx_align.rollout.sampler import SamplingSettings

    requests, questions = demo_sets()
    prompts = [case.prompt for case in (*requests, *questions)]
    before, after = _both(source, prompts, base, SamplingSettings(max_tokens=64))
    changes = measure_changes(before, after, requests, questions)
    if (Path(source) / "run.json").exists():
        record = read_run(Path(source))
        held_out = [record.get(when) or {} for when in ("before", "after")]
        if all("logps/accuracies" in metrics for metrics in held_out):
            shares = [metrics["logps/accuracies"] for metrics in held_out]
            what = "prefers the chosen completion (held out)"
            changes.insert(0, Change(what, *shares, record["valid_examples"], "higher"))
    harmful = [i for i, r in enumerate(requests) if r.harmful][:1]
    harmless = [i for i, r in enumerate(requests) if not r.harmful][:1]
    shown = [*harmful, *harmless, *([len(requests)] if questions else [])]
    examples = [Answers(prompts[i], before[i], after[i]) for i in shown]
    return Comparison(changes, examples)


def compare_answers(
    source: str | Path, prompts: Sequence[Text], *, base: str | None = None, **sampling
) -> list[Answers]:
    """What the base and the aligned model say to each prompt."""
    from mlx_align.rollout.sampler import SamplingSettings

    before, after = _both(source, prompts, base, SamplingSettings(**sampling))
    return [Answers(*row) for row in zip(prompts, before, after, strict=True)]


def _both(source, prompts, base, settings) -> tuple[list[str], list[str]]:
    from mlx_align.evaluate.compare import both_answers
    from mlx_align.model.load import load_model
    from mlx_align.model.open import open_model

    loaded, adapter = open_model(source, base=base)
    if adapter is None:
        raise ModelError(f"{source}: has no adapter, so there is nothing to compare it with")
    other = load_model(loaded.name) if adapter.kind == "full" else None
    return both_answers(loaded, adapter, other, prompts, settings)


def prompts_from_file(path: Path) -> list[Text]:
    """The prompts in a .txt file (one a line) or in rows with a "prompt" or "messages"."""
    from mlx_align.data.jsonl import read_rows

    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
        return [line for line in lines if line.strip()]
    prompts = []
    for origin, row in read_rows(path):
        prompt = row if isinstance(row, str) else row.get("prompt") or row.get("messages")
        if not prompt:
            raise DataError(f'{origin}: has no "prompt" and no "messages"')
        prompts.append(prompt if isinstance(prompt, str) else tuple(prompt))
    return prompts


def _read_config(config: str | Path | None, method: str) -> dict:
    """The settings of a file, checked by themselves so that errors name the file."""
    if config is None:
        return {}
    values = read_file(config)
    made_for = values.pop("method", method)
    if made_for != method:
        raise SettingsError(f"{config}: is a run of {made_for}, not of {method}")
    RunSettings.from_flat(method, values, str(config))
    values = _canonical(values, method)
    if Path(config).name == RUN:
        # A repeated run gets a folder of its own.
        values.pop("output", None)
    return values


def _canonical(values: dict, method: str) -> dict:
    """Values under the names of their fields, where an alias was used."""
    names = {a: f.name for f in setting_names(method).values() for a in f.metadata["aliases"]}
    return {names.get(key.replace("-", "_"), key.replace("-", "_")): v for key, v in values.items()}


def _absolute(name: str) -> str:
    """A local path as an absolute one, so that the record of a run holds anywhere on this machine."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() and name != "demo" else name


def _default_folder(method: str) -> Path:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = Path("runs") / f"{method}-{stamp}"
    number = 2
    while folder.exists():
        folder = Path("runs") / f"{method}-{stamp}-{number}"
        number += 1
    return folder
