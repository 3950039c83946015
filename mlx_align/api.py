"""What the command line calls and what a notebook calls."""

import dataclasses
import datetime
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mlx_align import demo
from mlx_align.data.inspect import DataCheck
from mlx_align.data.records import Text
from mlx_align.demo import DEMO
from mlx_align.errors import DataError, ExportError, ModelError, SettingsError
from mlx_align.evaluate.compare import Answers, Comparison, Evaluation
from mlx_align.evaluate.sweep import Sweep, run_sweep
from mlx_align.files import write_atomically, write_json
from mlx_align.kernels.doctor import Diagnosis, diagnose
from mlx_align.losses import METHODS
from mlx_align.rollout.iterate import Iteration
from mlx_align.rollout.rewards import with_absolute_path
from mlx_align.rollout.sampler import Completion
from mlx_align.settings import coerce, nearest, read_file, value_type
from mlx_align.train.config import RunSettings, find_method, setting_names
from mlx_align.train.loop import Events, Result, resume_settings, train
from mlx_align.train.runlog import RUN, read_run

# Settings that name something on disk or on the Hub.
_PATHS = ("model", "data", "valid_data", "chat_template", "start", "reference")
# Their values that are no paths, whatever folders may be called so.
_KEYWORDS = (DEMO, "start", "none", "chatml")


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
        return _train(run, folder, resume=True, events=events, should_stop=should_stop)
    values = {**_read_config(config, method), **_canonical(settings, method)}
    values = _resolve(values, method)
    run = RunSettings.from_flat(method, values, "settings")
    folder = Path(run.train.output or _default_folder(method)).expanduser()
    return _train(run, folder, events=events, should_stop=should_stop)


def _train(run: RunSettings, folder: Path, **options) -> Result:
    """The loop, with the source that the method learns from."""
    if run.method.data != "prompts":
        return train(run, folder, **options)
    from mlx_align.rollout.batches import OnlineSource

    return train(run, folder, make_source=OnlineSource, **options)


def sweep(
    method: str,
    *,
    events: Events | None = None,
    on_trial: Callable[[int, int, dict], None] = lambda number, count, values: None,
    **settings,
) -> Sweep:
    """Train a method with every combination of the settings that have several values, and pick one.

    `settings` are those of `train_model`; the ones given as lists vary. `output` is the folder of the
    sweep. Every run is compared with its base, but reward models, which write nothing.

    >>> sweep("dpo", beta=[0.03, 0.1, 0.3], data="prefs.jsonl").pick.folder
    """
    known, given = setting_names(method), _canonical(settings, method)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise SettingsError(f"unknown setting {unknown[0]!r}{nearest(unknown[0], known)}")
    grid, fixed = {}, {}
    for name, value in given.items():
        many = value_type(known[name])[2]
        values = [value] if many or not isinstance(value, list | tuple) else list(value)
        values = [coerce(known[name], v) for v in values]
        (fixed if len(values) == 1 else grid)[name] = values if len(values) > 1 else values[0]
    folder = Path(fixed.pop("output", None) or _default_folder(f"sweep-{method}")).expanduser()
    tokens = METHODS[method].reads == "tokens"
    return run_sweep(
        method,
        grid,
        lambda values: _resolve({**fixed, **values}, method),
        folder,
        train=_train,
        judge=compare if tokens else None,
        events=events,
        on_trial=on_trial,
    )


def iterate(
    plan: str | Path | Mapping | None = None,
    *,
    events: Events | None = None,
    on_round: Callable[[str, int, int], None] = lambda what, number, count: None,
) -> Iteration:
    """Rounds of sampling from the model, scoring the samples and training on them.

    `plan` is a YAML or JSON file, or what one would hold (`rollout.iterate.Rounds`, with the settings
    of `online-dpo` under `sample` and those of a method under `train`); without one, two rounds on the
    demo. What was done before is not done again. With `label: true` the result may be waiting for
    labels.

    >>> iterate({"model": "runs/sft", "prompts": "prompts.jsonl", "sample": {"reward": ["runs/rm"]}})
    """
    from mlx_align.rollout.iterate import iterate as run_plan
    from mlx_align.rollout.iterate import read_plan

    chosen = read_plan(demo.PLAN if plan is None else plan)
    return run_plan(
        chosen,
        lambda method, values: _resolve(values, method),
        _train,
        events=events,
        on_round=on_round,
    )


def generate(
    source: str | Path,
    prompts: Sequence[Text],
    *,
    base: str | None = None,
    dtype: str = "auto",
    prompt_format: str = "auto",
    best_of: int = 1,
    scorer: str = "implicit",
    **sampling,
) -> list[Completion]:
    """One completion of each prompt by a run, an adapter, or a model.

    Prompts are text or lists of messages; `sampling` are the fields of `SamplingSettings`
    (max_tokens, temperature, top_p, seed). With `best_of` above 1 that many are sampled and the one
    is returned that `scorer` likes best: "implicit" (the run's own reward), or a reward model's run.
    """
    from mlx_align.model.open import open_model
    from mlx_align.rollout.best_of import best_of as rank
    from mlx_align.rollout.best_of import implicit_scorer, reward_scorer
    from mlx_align.rollout.sampler import SamplingSettings, prompt_encoder, sample

    loaded, adapter = open_model(source, dtype, base)
    if "score" in loaded.model:
        raise ModelError(f"{source}: is a reward model; it scores, it does not write")
    encoder = prompt_encoder(loaded, prompt_format)
    ids = [encoder.prompt_ids(prompt) for prompt in prompts]
    if best_of == 1:
        return sample(loaded, ids, SamplingSettings(**sampling))
    sampling.setdefault("temperature", 1.0)
    if scorer == "implicit":
        if adapter is None or adapter.kind == "full":
            raise ModelError(
                f"{source}: has no adapter to compare with its base; name a reward model"
            )
        judge = implicit_scorer(loaded, adapter, _start_of(source))
    else:
        from mlx_align.model.reward import open_reward_model

        judge = reward_scorer(open_reward_model(scorer, dtype), prompts)
    settings = SamplingSettings(**sampling)
    return [r.completions[0] for r in rank(loaded, ids, best_of, judge, settings)]


def score(
    source: str | Path, data: str | Path, *, raw: bool = False, field: Sequence[str] = ()
) -> list[dict]:
    """A reward model's reward of every completion in a file: its rows, with the rewards added.

    A pair gets `chosen_reward` and `rejected_reward`, any other row `reward`; one that cannot be
    scored gets `problem` instead. Rewards are (score - mean) / deviation of the training data, or the
    plain scores with `raw`.
    """
    from mlx_align.data.jsonl import find_files, read_rows
    from mlx_align.data.records import Unfit, parse_record
    from mlx_align.data.spellings import parse_fields, rename
    from mlx_align.model.reward import open_reward_model

    model = open_reward_model(source)
    if raw:
        model = dataclasses.replace(model, mean=0.0, std=1.0)
    encoder, fields = model.encoder(), parse_fields(field)
    rows, examples, places = [], [], []
    for file in find_files(str(data))["train"]:
        for origin, row in read_rows(file):
            try:
                found = encoder.examples(parse_record(rename(row, fields, origin), origin).whole())
                places += [len(rows)] * len(found)
                examples += found
            except Unfit as unfit:
                row = {**row, "problem": unfit.kind}
            rows.append(row)
    for place, rewards in zip(places, model.score_examples(examples), strict=True):
        names = ("chosen_reward", "rejected_reward") if len(rewards) == 2 else ("reward",)
        rows[place] = {**rows[place], **dict(zip(names, rewards.tolist(), strict=True))}
    return rows


def export_model(
    source: str | Path,
    to: str,
    *,
    output: str | Path | None = None,
    quantize: str | None = None,
    imatrix: str | Path | None = None,
    calibrate: str | Path | None = None,
    dtype: str | None = None,
    name: str | None = None,
    base: str | None = None,
    adapter_only: bool = False,
    base_name: str | None = None,
    format: str | None = None,
    system: str | None = None,
    push: str | None = None,
) -> Path:
    """Merge a run's adapter into its model and write it for other programs; returns the path.

    `to` is "mlx", "hf", "gguf", "ollama" or "lmstudio"; `quantize` the type of the weights in GGUF
    ("q4_k_m") or MLX ("4bit"), `dtype` that of floats in folders, `name` the model's name in Ollama or
    LM Studio. What rounding costs each weight comes from the file `imatrix` of llama-imatrix, or is
    measured over the text file `calibrate`. With `adapter_only` the adapter is written without its base,
    which is called `base_name` there; `to` "peft" is that for "hf". `format` is what LM Studio is given
    ("mlx" or "gguf"), `system` the system prompt in Ollama. `push` names the repository on the Hub that
    the result is uploaded to.
    """
    from mlx_align.export.folder import export_folder
    from mlx_align.export.gguf import export_gguf
    from mlx_align.export.hub import upload
    from mlx_align.export.importance import measure_importance, read_imatrix
    from mlx_align.export.kept import EXACT, report_kept
    from mlx_align.export.lm_studio import default_format, export_lm_studio, model_folder
    from mlx_align.export.mlx_quants import BITS
    from mlx_align.export.ollama import create_in_ollama, export_ollama, make_modelfile
    from mlx_align.export.recipe import UNWEIGHTED
    from mlx_align.model.load import STORED
    from mlx_align.model.open import open_model

    adapter_only = adapter_only or to == "peft"
    folder = Path(source).expanduser()
    name = name or folder.resolve().name
    _check_export(to, name, adapter_only, base_name, format, system, push)
    if to == "lmstudio" and format is None:
        # Each form has types of its own, so a type says which is meant.
        format = default_format() if quantize is None else "mlx" if quantize in BITS else "gguf"
    quantize = _choose_type(quantize, dtype, to, format, adapter_only)
    if imatrix or calibrate:
        if imatrix and calibrate:
            raise SettingsError("imatrix and calibrate: give one importance matrix, not two")
        if quantize is None or quantize in BITS or adapter_only or quantize in UNWEIGHTED:
            raise SettingsError(
                f"{'imatrix' if imatrix else 'calibrate'}: only matters to GGUF of other types than "
                f"{', '.join(UNWEIGHTED)}; choose one with quantize"
            )
    if output is not None:
        path = _new_path(output)
    elif to == "lmstudio":
        path = model_folder(name)
    elif folder.is_dir() and (folder / "adapter_config.json").exists():
        path = folder / "export" / _export_name(to, name, quantize, adapter_only)
    else:
        raise ExportError("--output is needed to export a model that is no run")
    importance = read_imatrix(Path(imatrix).expanduser()) if imatrix else None
    loaded, adapter = open_model(source, STORED, base)
    if "score" in loaded.model and to not in ("hf", "peft"):
        raise ExportError(
            f"{source}: is a reward model, which only transformers can run; use --to hf"
        )
    if calibrate:
        importance = measure_importance(loaded, Path(calibrate).expanduser())
    modelfile = None
    if to == "ollama":
        modelfile = make_modelfile(loaded, system=system, base_name=base_name)
    if adapter_only:
        _export_adapter(
            loaded, adapter, source, to, path,
            quantize=quantize, dtype=dtype, base_name=base_name, modelfile=modelfile, push=push,
        )  # fmt: skip
    elif to == "gguf":
        export_gguf(loaded, path, quantise=quantize, importance=importance)
    elif to == "ollama":
        export_ollama(loaded, path, modelfile, quantise=quantize, importance=importance)
    elif to == "lmstudio":
        export_lm_studio(
            loaded, path, format=format, quantise=quantize, dtype=dtype, importance=importance
        )
    else:
        export_folder(loaded, path, flavour=to, dtype=dtype, bits=BITS.get(quantize))
    card = _card(loaded, source, format or to, path, adapter_only, name, base_name, push)
    rounded = (quantize or str(dtype or loaded.dtype)).removeprefix("mlx.core.")
    if adapter and not adapter_only and rounded not in EXACT and "score" not in loaded.model:
        report_kept(loaded, adapter, source, path)
    if to == "ollama":
        create_in_ollama(path, modelfile, name)
    if push:
        upload(path, push, card)
    return path


def _check_export(to, name, adapter_only, base_name, format, system, push) -> None:
    """Raise what speaks against an export before any work is done."""
    from mlx_align.export.hub import check_access
    from mlx_align.export.lm_studio import FORMATS
    from mlx_align.export.ollama import check_name
    from mlx_align.export.ollama_server import OllamaServer

    targets = ("mlx", "hf", "peft", "gguf", "ollama", "lmstudio")
    if to not in targets:
        raise SettingsError(f"to: {to!r} is not one of {', '.join(targets)}")
    if base_name and not adapter_only:
        raise SettingsError("base_name: only an adapter has a base there; give adapter_only, too")
    if to == "lmstudio" and adapter_only:
        raise SettingsError("adapter_only: LM Studio puts no adapters on; export the merged model")
    if format is not None and (to != "lmstudio" or format not in FORMATS):
        raise SettingsError(f"format: says what LM Studio is given, {' or '.join(FORMATS)}")
    if system and to != "ollama":
        raise SettingsError("system: only a model in Ollama brings its system prompt along")
    if to == "ollama":
        # A bad address shows before the work is done.
        OllamaServer()
        check_name(name, "name")
        if adapter_only:
            check_name(base_name, "base_name")
    if push:
        if to in ("ollama", "lmstudio"):
            raise SettingsError(f"push: goes with hf, mlx, gguf and peft, not with {to}")
        check_access(push)


def _choose_type(
    quantize: str | None, dtype: str | None, to: str, format: str | None, adapter_only: bool
) -> str | None:
    """The type of the weights, by default a fine one; None where they are floats of any type."""
    from mlx_align.export.mlx_quants import BITS
    from mlx_align.export.recipe import FILE_TYPES

    if to in ("gguf", "ollama") or format == "gguf":
        if dtype is not None:
            raise SettingsError(
                "dtype: is for folders; quantize says the type of a GGUF (bf16, ...)"
            )
        default = "f32" if adapter_only else "f16" if to == "gguf" else "q8_0"
        types, quantize = tuple(FILE_TYPES), quantize or default
    else:
        types = tuple(BITS) if "mlx" in (to, format) and not adapter_only else ()
    if quantize is None or quantize in types:
        return quantize
    if not types:
        raise SettingsError(
            "quantize: is for GGUF and for merged models for MLX; here dtype says the type of floats"
        )
    raise SettingsError(f"quantize: {quantize!r} is not one of {', '.join(types)}")


def _export_name(to: str, name: str, quantize: str | None, adapter_only: bool) -> str:
    """What an export is called in the folder of its run."""
    if to == "gguf":
        return f"{name}-{'adapter' if adapter_only else quantize}.gguf"
    if not adapter_only:
        return f"mlx-{quantize}" if to == "mlx" and quantize else to
    return "peft" if to in ("hf", "peft") else f"{to}-adapter"


def _export_adapter(
    loaded, adapter, source, to, path, *, quantize, dtype, base_name, modelfile, push
) -> None:
    """What `export_model` does with `adapter_only`."""
    from mlx_align.export.adapter import export_gguf_adapter, export_mlx_adapter, export_peft
    from mlx_align.export.card import is_hub_id
    from mlx_align.export.ollama import export_ollama_adapter
    from mlx_align.model.open import find_adapter

    if adapter is None:
        raise ExportError(f"{source}: has no adapter that could be written without its base")
    if push and not is_hub_id(base_name or loaded.name):
        raise SettingsError(
            f"push: the base {loaded.name} is not on the Hub; give its id as base_name"
        )
    made = find_adapter(source)
    if to == "gguf":
        export_gguf_adapter(loaded, adapter, path, quantise=quantize)
    elif to == "ollama":
        export_ollama_adapter(loaded, adapter, path, modelfile, quantise=quantize)
    elif to == "mlx":
        export_mlx_adapter(loaded, adapter, made, path, base_name=base_name, dtype=dtype)
    else:
        export_peft(loaded, adapter, made, path, base_name=base_name, dtype=dtype)


def _card(loaded, source, form, path, adapter_only, name, base_name, push) -> str:
    """The model card, which is also written into what is a folder."""
    from mlx_align.export.card import CARD, make_card

    if adapter_only:
        form = "peft" if form in ("hf", "peft") else f"{form}-adapter"
    if "score" in loaded.model:
        form = "peft-reward" if adapter_only else "reward"
    card = make_card(loaded, source, form, path, name=name, repo=push, base_name=base_name)
    if path.is_dir():
        write_atomically(path / CARD, card)
    return card


def import_model(
    source: str | Path,
    *,
    output: str | Path | None = None,
    dtype: str | None = None,
    base: str | None = None,
) -> Path:
    """Make a folder for MLX of a model or adapter in another form; returns it.

    `source` is a GGUF file, "ollama:llama3.2:1b" or "lmstudio:publisher/model" from the stores on this
    machine, a folder of safetensors, or an adapter of PEFT, whose base is `base` where it does not name
    it; `output` is models/NAME by default. Quantised weights stay quantised; with `dtype` ("float16",
    ...) all become floats of that type.

    >>> train_model("dpo", model=import_model("Llama-3.2-1B-Instruct-Q4_K_M.gguf"), data="prefs.jsonl")
    """
    from mlx_align.importer.source import find_source
    from mlx_align.model.load import DTYPES

    if dtype not in (None, *DTYPES):
        raise SettingsError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    found = find_source(source)
    return _import(found, _new_path(output or Path("models") / found.name), dtype, base)


def _import(found, path: Path, dtype: str | None, base: str | None) -> Path:
    """Write what `find_source` found as a folder, by its kind."""
    from mlx_align.importer.folder import import_folder, import_gguf
    from mlx_align.importer.peft import import_peft
    from mlx_align.importer.source import GGUF, PEFT

    if found.kind == PEFT:
        if dtype is not None:
            raise SettingsError("dtype: an adapter stays as it is; only a whole model takes a type")
        return import_peft(found.path, path, base)
    write = import_gguf if found.kind == GGUF else import_folder
    return write(found, path, dtype)


def convert_model(
    source: str | Path, to: str, *, output: str | Path, base: str | None = None, **options
) -> Path:
    """Write a model in any form that `import_model` takes for other programs; returns the path.

    `to`, `base` and `options` are those of `export_model`.
    """
    from mlx_align.importer.source import FOLDER, find_source

    found, path = find_source(source), _new_path(output)
    options["name"] = options.get("name") or found.name
    if found.kind == FOLDER:
        return export_model(found.path, to, output=path, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".import-", dir=path.parent) as folder:
        imported = _import(found, Path(folder) / found.name, None, base)
        return export_model(imported, to, output=path, **options)


def evaluate_model(
    source: str | Path,
    data: str | Path | Sequence[str | Path] = (),
    *,
    base: str | None = None,
    dtype: str = "auto",
    own_sets: bool = True,
    output: str | Path | None = None,
    prompt_format: str = "auto",
    thinking: bool | None = None,
    **options,
) -> Evaluation:
    """Measure a run, an adapter or a model: preferences, refusals, right answers, perplexity, answers.

    `data` are files whose rows say what they are (see `evaluate.cases`); a run's held-out rows are
    added, and the sets that come along for the kinds that are not given, unless `own_sets` is false.
    `options` are the fields of `evaluate.compare.Options` and of `SamplingSettings`. `output` is a
    JSON file to write.

    >>> for row in evaluate_model("runs/mine", "prefs.jsonl").measures:
    ...     print(row.what, row.after, row.after_interval)
    """
    from mlx_align.evaluate.compare import evaluate_contender, make_options
    from mlx_align.evaluate.contender import open_contender
    from mlx_align.evaluate.heldout import gather_sets, read_given

    chosen, given = make_options(options, source), read_given(data)
    encoding = {"prompt_format": prompt_format, "thinking": thinking}
    contender, its_base = open_contender("model", source, base=base, dtype=dtype, **encoding)
    sets, notes = gather_sets(given, source, contender, own_sets)
    evaluation = evaluate_contender(contender, its_base, sets, chosen, str(source))
    evaluation.notes.extend(notes)
    if output is not None:
        write_json(Path(output).expanduser(), evaluation.as_dict())
    return evaluation


def compare(
    before: str | Path,
    after: str | Path | None = None,
    *,
    data: str | Path | Sequence[str | Path] = (),
    base: str | None = None,
    dtype: str = "auto",
    own_sets: bool = True,
    output: str | Path | None = None,
    prompt_format: str = "auto",
    thinking: bool | None = None,
    **options,
) -> Comparison:
    """What changed from one model to another, with intervals and a verdict; see `evaluate_model`.

    With one run, its base is compared with it. Of two models, runs or adapters the first is before.

    >>> print(compare("runs/mine").verdict)
    aligned: yes; ability: unchanged within noise
    """
    from mlx_align.evaluate.compare import compare_contenders, make_options
    from mlx_align.evaluate.contender import open_pair, same_tokens
    from mlx_align.evaluate.heldout import gather_sets, read_given

    chosen, given = make_options(options, after or before), read_given(data)
    pair = open_pair(
        before, after, base=base, dtype=dtype, prompt_format=prompt_format, thinking=thinking
    )
    run = (after or before) if same_tokens(*pair) else None
    sets, notes = gather_sets(given, run, pair[1], own_sets)
    names = (pair[0].loaded.name if after is None else str(before), str(after or before))
    comparison = compare_contenders(*pair, sets, chosen, names)
    comparison.notes.extend(notes)
    if output is not None:
        write_json(Path(output).expanduser(), comparison.as_dict())
    return comparison


def compare_answers(
    source: str | Path,
    prompts: Sequence[Text],
    *,
    after: str | Path | None = None,
    base: str | None = None,
    **sampling,
) -> list[Answers]:
    """What the base and the aligned model say to each prompt, or `source` and `after`."""
    from mlx_align.evaluate.compare import both_answers
    from mlx_align.evaluate.contender import open_pair
    from mlx_align.rollout.sampler import SamplingSettings

    pair = open_pair(source, after, base=base)
    return both_answers(*pair, prompts, SamplingSettings(**sampling))


def check_data(
    source: str | Path = DEMO,
    *,
    model: str | Path = DEMO,
    annotators: Sequence[str] = (),
    examples: int = 1,
    **settings,
) -> DataCheck:
    """What a data set is, which of its rows will not work, and which method fits it.

    Of the model only the tokenizer and the chat template are used. `annotators` are the columns with
    the labels of several annotators, `examples` is how many are rendered, `settings` are the fields of
    `DataSettings`.

    >>> print("\n".join(check_data("prefs.jsonl", max_length=512).lines()))
    """
    from mlx_align.data.advice import advise
    from mlx_align.data.dataset import DataSettings
    from mlx_align.data.inspect import UNLIMITED, inspect_data, read_split
    from mlx_align.data.jsonl import find_files
    from mlx_align.data.spellings import parse_fields
    from mlx_align.data.template import Encoder
    from mlx_align.model.load import load_tokenizer

    chosen = DataSettings(data=str(source), **settings)
    fields = parse_fields(chosen.field)
    files = find_files(str(demo.data_folder("pairs") if source == DEMO else source), chosen.split)
    if chosen.valid_data:
        files["valid"] = find_files(chosen.valid_data)["train"]
    loaded = load_tokenizer(model, chosen.chat_template)
    # Rows longer than the model's context are counted here; the tokenizer need not warn of them.
    loaded.tokenizer.model_max_length = UNLIMITED
    encoder = Encoder(
        loaded.tokenizer,
        max_length=UNLIMITED,
        template=loaded.template,
        prompt_format=chosen.prompt_format,
        thinking=chosen.thinking,
    )
    splits = {name: read_split(found, fields) for name, found in files.items()}
    check = inspect_data(
        chosen, splits, encoder, model=str(model), annotators=annotators, examples=examples
    )
    return advise(check, METHODS)


def check_kernels(progress: Callable[[str], None] = lambda line: None) -> Diagnosis:
    """Check attention and log-probabilities on this machine, and which Metal kernels to use on it.

    What is found of kernels is kept, and from then on decides. `progress` is told what is checked.
    """
    return diagnose(progress)


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


def _resolve(values: dict, method: str) -> dict:
    """The settings with paths that hold anywhere, the start's own settings, and the demo's."""
    values = {**values, **{n: _absolute(values[n]) for n in _PATHS if values.get(n)}}
    for name in ("reward", "watch"):
        if values.get(name):
            given = [values[name]] if isinstance(values[name], str) else values[name]
            values[name] = [with_absolute_path(reward) for reward in given]
    values = _resolve_start(values)
    if values.get("model", DEMO) == DEMO:
        own_data = values.get("data", DEMO) == DEMO
        values = {**demo.settings(method, find_method(method).data, own_data), **values}
    return values


def _resolve_start(values: dict) -> dict:
    """The settings of a run that goes on from an adapter: its base, and how it was made.

    A run given as the model is the same as its base with the run as `start`.
    """
    from mlx_align.model.adapter import read_adapter_config, settings_of_adapter
    from mlx_align.model.open import find_adapter, find_template_file

    values = dict(values)
    if "start" not in values and find_adapter(values.get("model", DEMO)):
        values["start"] = values.pop("model")
    if not values.get("start"):
        return values
    folder = find_adapter(values["start"])
    if folder is None:
        raise ModelError(
            f"{values['start']}: neither a run nor an adapter, so nothing to start from"
        )
    config = read_adapter_config(folder)
    if config.get("head"):
        raise ModelError(f"{folder}: is a reward model, which cannot be the start of another run")
    made = settings_of_adapter(folder)
    for name, value in made.items():
        if name in values and name != "lora_dropout" and values[name] not in (value, None):
            raise SettingsError(
                f"{name}: the adapter to start from has {value}, so it cannot be {values[name]}"
            )
    base = config.get("model")
    if base:
        values.setdefault("model", base)
    template = find_template_file(folder)
    if template is not None:
        values.setdefault("chat_template", str(template.resolve()))
    record = Path(values["start"]) / RUN
    if record.is_file():
        # It goes on reading prompts as it learnt to.
        earlier = read_run(record.parent).get("settings", {})
        kept = {name: earlier[name] for name in ("prompt_format", "thinking") if name in earlier}
        values = {**kept, **values}
    return {**made, **values}


def _start_of(source: str | Path) -> dict | None:
    """The arrays that the reference of a run wears; None where it is the bare base.

    Raises `ModelError` where the run was held to another model altogether.
    """
    import mlx.core as mx

    from mlx_align.model.adapter import WEIGHTS
    from mlx_align.model.open import find_adapter

    folder = Path(source).expanduser()
    if not (folder / RUN).is_file():
        return None
    settings = read_run(folder).get("settings", {})
    if settings.get("reference", "start") not in ("start", "none"):
        raise ModelError(
            f"{source}: was held to {settings['reference']}, so its own reward is not that over its "
            "base; name a reward model with --scorer"
        )
    if not settings.get("start"):
        return None
    return mx.load(str(find_adapter(settings["start"]) / WEIGHTS))


def _absolute(name: str) -> str:
    """A local path as an absolute one, so that the record of a run holds anywhere on this machine."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() and name not in _KEYWORDS else name


def _new_path(output: str | Path) -> Path:
    """Where to write something that must not take the place of anything."""
    path = Path(output).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ExportError(f"{path}: exists already; choose another --output")
    return path


def _default_folder(method: str) -> Path:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = Path("runs") / f"{method}-{stamp}"
    number = 2
    while folder.exists():
        folder = Path("runs") / f"{method}-{stamp}-{number}"
        number += 1
    return folder
