"""Commands that look at data."""

import re
import sys
from pathlib import Path

import click

from mlx_align.cli.console import open_console
from mlx_align.cli.options import (
    Comma,
    SettingsCommand,
    given,
    option,
    settings_options,
)
from mlx_align.data.dataset import DataSettings
from mlx_align.demo import DEMO

# The settings of training that change what rows hold or what becomes of them.
_SETTINGS = (
    "valid_data", "field", "split", "max_length", "chat_template", "prompt_format", "thinking",
)  # fmt: skip
_COLOURS = {"warning": "yellow", "note": "cyan", "advice": "green"}


def commands() -> list[click.Command]:
    """The commands of this file."""
    group = click.Group("data", help="Look at data before training on it.")
    group.add_command(_check())
    return [group]


def _check() -> click.Command:
    def run(**values):
        from mlx_align import api
        from mlx_align.files import write_json

        open_console()
        names = ("model", "annotators", "examples", *_SETTINGS)
        check = api.check_data(values["source"], **given(values, names))
        text = "\n".join(check.lines())
        click.echo(colour(text) if sys.stdout.isatty() else text)
        if values["output"]:
            write_json(Path(values["output"]).expanduser(), check.as_dict())
        return 0 if check.understood else 1

    return SettingsCommand(
        "check",
        callback=run,
        params=[
            click.Argument(["source"], metavar="FILE_OR_FOLDER_OR_HUB", default=DEMO),
            option(
                "--model",
                help="Model folder or Hub id whose tokenizer and chat template are used; its weights "
                f"are not needed.  [default: {DEMO}]",
            ),
            option(
                "--annotators",
                type=Comma(),
                help="Columns with the labels of several annotators, where their names do not tell.",
            ),
            option(
                "--examples", type=click.IntRange(min=0), help="Examples to render.  [default: 1]"
            ),
            option("--output", help="JSON file to write the report to."),
            *(o for o in settings_options(DataSettings, "As in training") if o.name in _SETTINGS),
        ],
        help="What kind of data this is, which rows will not work and why, how an example looks to the "
        "model, lengths, repetitions, contradictions, leakage, bias, agreement of annotators, and which "
        "method fits. Ends with status 1 where no row is of a known kind.",
    )


def colour(text: str) -> str:
    """A report for a terminal: what is scored stands out, and so do warnings and advice."""
    text = re.sub("⟦.*?⟧", lambda m: click.style(m[0], fg="green", bold=True), text, flags=re.S)
    levels = rf"^({'|'.join(_COLOURS)}):"
    return re.sub(
        levels, lambda m: click.style(m[0], fg=_COLOURS[m[1]], bold=True), text, flags=re.M
    )
