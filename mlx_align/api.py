"""What the command line calls and what a notebook calls."""

import datetime
from collections.abc import Callable
from pathlib import Path

from mlx_align.errors import SettingsError
from mlx_align.settings import read_file
from mlx_align.train.config import RunSettings, setting_names
from mlx_align.train.loop import Events, Result, resume_settings
from mlx_align.train.loop import train as train_run

# Settings that name something on disk or on the Hub.
_PATHS = ("model", "data", "valid_data", "chat_template")


def train(
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

    >>> train("dpo", model="mlx-community/Llama-3.2-1B-Instruct-4bit", data="prefs.jsonl", beta=0.1)
    """
    if resume is not None:
        folder = Path(resume)
        run = resume_settings(folder)
        if run.method.name != method:
            raise SettingsError(f"{folder}: is a run of {run.method.name}, not of {method}")
        return train_run(run, folder, resume=True, events=events, should_stop=should_stop)
    values = {}
    if config is not None:
        values = read_file(config)
        values.pop("method", None)
    values = {**_canonical(values, method), **_canonical(settings, method)}
    values |= {name: _absolute(values[name]) for name in _PATHS if values.get(name)}
    run = RunSettings.from_flat(method, values, "settings")
    folder = Path(run.train.output or _default_folder(method)).expanduser()
    return train_run(run, folder, events=events, should_stop=should_stop)


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
