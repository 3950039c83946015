"""Opening what a user names: a run folder, an adapter folder, a model folder, or a Hub id."""

import logging
from pathlib import Path

from mlx_align.data.template import ChatTemplate
from mlx_align.errors import ModelError
from mlx_align.model.adapter import CONFIG, WEIGHTS, Adapter, load_adapter, read_adapter_config
from mlx_align.model.files import read_json
from mlx_align.model.heads import attach_reward_head
from mlx_align.model.load import LoadedModel, load_model

log = logging.getLogger("mlx_align")

# A chat template that stands in for the tokenizer's, in a run folder.
TEMPLATE = "chat_template.jinja"


def open_model(
    source: str | Path, dtype: str = "auto", base: str | None = None
) -> tuple[LoadedModel, Adapter | None]:
    """The model that `source` names, wearing its adapter where it is a run or an adapter.

    Its chat template thinks, or does not, as in training. `base` names the base model where the
    adapter's config does not. Of an unfinished run the newest checkpoint is taken.
    """
    folder = find_adapter(source)
    if folder is None:
        return load_model(str(source), dtype), None
    config = read_adapter_config(folder)
    base = base or config.get("model")
    if not base:
        raise ModelError(
            f"{folder}: its {CONFIG} does not name the base model; give it with --model"
        )
    template = find_template_file(folder)
    loaded = load_model(base, dtype, None if template is None else str(template))
    if config.get("thinking") is not None and isinstance(loaded.template, ChatTemplate):
        loaded.template = loaded.template.with_thinking(config["thinking"])
    if config.get("head") == "reward":
        attach_reward_head(loaded.model, loaded.head)
    return loaded, load_adapter(loaded.model, folder)


def find_template_file(folder: Path) -> Path | None:
    """The chat template that the run of an adapter was given, if it was given one."""
    own = [parent / TEMPLATE for parent in (folder, folder.parent.parent)]
    return next((file for file in own if file.is_file()), None)


def find_adapter(source: str | Path) -> Path | None:
    """The adapter folder that a run or adapter folder stands for; None for anything else."""
    folder = Path(source).expanduser()
    complete = (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()
    record = folder / "run.json"
    if not record.is_file():
        return folder if complete else None
    checkpoints = sorted((folder / "checkpoints").glob("step-*"))
    # What an unfinished run has in its folder is from when it was stopped, perhaps long before.
    if complete and (read_json(record).get("finished") or not checkpoints):
        return folder
    if not checkpoints:
        raise ModelError(f"{folder}: this run has no checkpoint yet; go on with it by --resume")
    log.warning("%s is not finished; its checkpoint %s is used", folder, checkpoints[-1].name)
    return checkpoints[-1]
