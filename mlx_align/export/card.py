"""The model card of an export: what it is, how it was made, what that changed, how to use it.

Names of files stay in it, places on this machine do not.
"""

import json
import logging
import re
from dataclasses import dataclass, fields
from importlib.metadata import version
from inspect import getdoc
from pathlib import Path

import yaml

from mlx_align.evaluate.changes import Change
from mlx_align.evaluate.heldout import is_run
from mlx_align.model.load import LoadedModel
from mlx_align.train.config import RunSettings, find_method
from mlx_align.train.runlog import read_run

log = logging.getLogger("mlx_align")

CARD, COMPARISON = "README.md", "comparison.json"


@dataclass(frozen=True)
class Form:
    """A form that models are exported in: the library that reads it, and how.

    The snippet names `{repo}`, `{name}`, `{file}` and `{base}`; `adapter` forms go on a base.
    """

    library: str
    language: str
    snippet: str
    adapter: bool = False


_TRANSFORMERS = """from transformers import pipeline

write = pipeline("text-generation", "{repo}")
print(write([{{"role": "user", "content": "Hello!"}}])[0]["generated_text"][-1]["content"])"""
_REWARD = """from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForSequenceClassification.from_pretrained("{repo}")
talk = [{{"role": "user", "content": "Hi"}}, {{"role": "assistant", "content": "Hello!"}}]
ids = tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=True)
print(model(**ids).logits)"""
_PEFT = """from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{repo}")"""
_PEFT_REWARD = """from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

pad = AutoTokenizer.from_pretrained("{repo}").pad_token_id
base = AutoModelForSequenceClassification.from_pretrained("{base}", num_labels=1, pad_token_id=pad)
model = PeftModel.from_pretrained(base, "{repo}")"""
_OLLAMA = "ollama create {name} -f Modelfile\nollama run {name}"
_MLX_ADAPTER = 'mlx_lm.generate --model {base} --adapter-path {repo} --prompt "Hello!"'
FORMS = {
    "mlx": Form("mlx", "sh", 'mlx_lm.generate --model {repo} --prompt "Hello!"'),
    "hf": Form("transformers", "python", _TRANSFORMERS),
    "reward": Form("transformers", "python", _REWARD),
    "gguf": Form("gguf", "sh", "llama-cli -m {file}"),
    "ollama": Form("gguf", "sh", _OLLAMA),
    "peft": Form("peft", "python", _PEFT, adapter=True),
    "peft-reward": Form("peft", "python", _PEFT_REWARD, adapter=True),
    "mlx-adapter": Form("mlx", "sh", _MLX_ADAPTER, adapter=True),
    "gguf-adapter": Form("gguf", "sh", "llama-cli -m BASE.gguf --lora {file}", adapter=True),
    "ollama-adapter": Form("gguf", "sh", _OLLAMA, adapter=True),
}


def make_card(
    loaded: LoadedModel,
    source: str | Path,
    form: str,
    path: Path,
    *,
    name: str,
    repo: str | None = None,
    base_name: str | None = None,
) -> str:
    """The card, in Markdown, of what is at `path` in one of `FORMS`.

    `repo` is where it goes on the Hub; `base_name` what the base is called there.
    """
    folder = Path(source).expanduser()
    record = read_run(folder) if is_run(folder) else None
    base = _shown(base_name or loaded.name)
    chosen, licence = FORMS[form], _licence(loaded.path)
    snippet = chosen.snippet.format(
        repo=repo or f"path/to/{path.name}", name=name, file=path.name, base=base
    )
    sections = [
        _front_matter(loaded, chosen, record, base, licence),
        f"# {repo.rpartition('/')[2] if repo else name}",
        _opening(chosen, record, base),
        *(_made(record) if record else []),
        *(_changed(folder, record) if record else []),
        f"## How to use it\n\n```{chosen.language}\n{snippet}\n```",
        f"## Licence\n\nThe base's licence holds{_named(licence)}.",
    ]
    return "\n\n".join(sections) + f"\n\nMade with mlx-align {version('mlx-align')}.\n"


def is_hub_id(name: str) -> bool:
    """Whether a name is one of the Hub's, OWNER/NAME, and of no folder here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _front_matter(loaded, form, record, base, licence) -> str:
    values = {"library_name": form.library, "pipeline_tag": "text-generation"}
    if is_hub_id(base):
        values["base_model"] = base
        values["base_model_relation"] = "adapter" if form.adapter else "finetune"
    values |= licence
    tags = ["mlx-align"]
    if record is not None:
        tags.append(record["method"])
        data = record["settings"]["data"]
        if is_hub_id(data):
            values["datasets"] = [data]
    if "score" in loaded.model:
        values["pipeline_tag"] = "text-classification"
        tags.append("reward-model")
    text = yaml.safe_dump({**values, "tags": tags}, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---"


def _opening(form, record, base) -> str:
    what = "An adapter for" if form.adapter else "A model made from"
    how = f", trained by `{record['method']}`" if record else ""
    return f"{what} {base}{how}."


def _made(record) -> list[str]:
    """Method, data and the settings that are not the defaults."""
    method = find_method(record["method"])
    summary = getdoc(method).partition("\n")[0].rstrip(".")
    rows = [
        ("Method", f"`{method.name}`: {summary}"),
        ("Formula", method.source),
        ("Data", _shown(record["settings"]["data"])),
    ]
    if "train_examples" in record:
        held_out = record["valid_examples"]
        rows.append(("Examples", f"{record['train_examples']:,}, and {held_out:,} held out"))
    settings = record["settings"]
    defaults = RunSettings.from_flat(method.name, {}, "settings").flat()
    for key, value in {**settings, "learning_rate": record.get("learning_rate")}.items():
        if key not in ("model", "data", "output") and value not in (None, defaults.get(key)):
            rows.append((f"`{key}`", _shown(value)))
    return [f"## How it was made\n\n{_table(('', ''), rows)}"]


def _changed(folder: Path, record) -> list[str]:
    """What training changed on held-out rows, and what a stored comparison found."""
    before, after = (record.get(when) or {} for when in ("before", "after"))
    sections = []
    if shared := [key for key in after if key in before]:
        rows = [(f"`{key}`", f"{before[key]:.4g}", f"{after[key]:.4g}") for key in shared]
        table = _table(("On held-out rows", "before", "after"), rows)
        sections.append(f"## What training changed\n\n{table}")
    if (folder / COMPARISON).is_file():
        sections += _compared(folder / COMPARISON)
    return sections


def _compared(path: Path) -> list[str]:
    names = [field.name for field in fields(Change)]
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        changes = [Change(**{name: row[name] for name in names}) for row in found["changes"]]
        verdict = found["verdict"]["text"]
    except (ValueError, KeyError, TypeError):
        log.warning("%s: cannot be read, so the model card is without it", path)
        return []
    rows = [
        (f"{c.what} (of {c.count})" if c.count else c.what, c.written(c.before), c.written(c.after))
        + (c.written_change, "" if c.before is None else c.interval)
        for c in changes
        if not c.key.startswith("refuses/type/")
    ]
    table = _table(("Compared with its base", "before", "after", "change", "95 % interval"), rows)
    return [f"## How it compares with its base\n\n{verdict}\n\n{table}"]


def _table(headers, rows) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    cells = ([" ".join(str(cell).split()).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _shown(value) -> str:
    """A setting without the folders of this machine; a name may have something before or behind it, as
    in judge:MODEL and REWARD:0.5."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return _FOLDERS.sub(r"\1", str(value))


_FOLDERS = re.compile(r"(^|[:=])(?!//)(?:~[^/]*|\.\.?)?/(?:[^:=]*/)?(?=[^/])")


def _licence(folder: Path) -> dict:
    """What the base's own card says of its licence."""
    card = folder / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|\Z)", text, re.DOTALL)
    try:
        values = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        values = {}
    values = values if isinstance(values, dict) else {}
    return {
        key: values[key] for key in ("license", "license_name", "license_link") if key in values
    }


def _named(licence) -> str:
    name = licence.get("license_name") or licence.get("license")
    return f": {name}" if name else "; its own card names none"
