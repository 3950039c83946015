"""The command that tries several settings of a method and picks one."""

import click

from mlx_align.cli.console import open_console, table
from mlx_align.cli.options import Comma, SettingOption, SettingsCommand
from mlx_align.losses import METHODS
from mlx_align.train.config import setting_names


def commands() -> list[click.Command]:
    """The commands of this file."""
    return [_Sweeps("sweep", help=_HELP, short_help="Try several settings of a method, pick one.")]


_HELP = """Try several settings of a method, and pick one.

    mlx-align sweep dpo --beta 0.03,0.1,0.3 --learning-rate 5e-6,2e-5 --data prefs.jsonl

Every setting of the method may have several values, with commas. All combinations are trained, each in
a folder of its own, on one prepared data set and one cache of the reference, and judged on held-out data
and on what they did to general ability. A sweep that was interrupted goes on with the same command.
"""


class _Sweeps(click.Group):
    """One sub-command for each method, with the method's own flags."""

    def list_commands(self, ctx):
        return list(METHODS)

    def get_command(self, ctx, name):
        return _sweep(name) if name in METHODS else None


def _sweep(method: str) -> click.Command:
    def run(**values):
        from mlx_align import api

        console = open_console()
        given = {name: value for name, value in values.items() if value is not None}

        def on_trial(number, count, combination):
            words = ", ".join(f"{name} {value}" for name, value in combination.items())
            console.say(f"trial {number} of {count}: {words}")

        sweep = api.sweep(method, events=console, on_trial=on_trial, **given)
        console.end_line()
        _show(sweep)

    params = []
    for name, field in setting_names(method).items():
        flags = ["--" + n.replace("_", "-") for n in (name, *field.metadata["aliases"])]
        params.append(
            SettingOption(
                [name, *flags], type=Comma(), help=field.metadata["help"], heading="Settings"
            )
        )
    return SettingsCommand(method, params=params, callback=run, help=METHODS[method].__doc__)


def _show(sweep) -> None:
    rows = []
    for trial in sweep.trials:
        verdict = trial.comparison.verdict if trial.comparison else None
        rows.append(
            [
                ("* " if trial is sweep.pick else "  ") + trial.name,
                f"{trial.after[sweep.metric]:.4f}",
                f"{trial.after['loss']:.4f}",
                str(verdict.aligned) if verdict else "",
                str(verdict.ability) if verdict else "",
            ]
        )
    head = ["  settings", sweep.metric, "loss", "aligned", "ability"]
    click.echo("\n" + table(head, rows))
    click.echo(f"\npick: {sweep.pick.name}: {sweep.reason}")
    click.echo(f"  {sweep.pick.folder}")
