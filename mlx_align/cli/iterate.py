"""The command that samples, scores and trains in rounds."""

import click

from mlx_align.cli.console import open_console, table
from mlx_align.cli.options import SettingsCommand

_HELP = """Sample from a model, score the samples, train on them, and again with the result.

\b
    model: runs/sft
    prompts: prompts.jsonl
    rounds: 3
    prompts_per_round: 256
    sample: {reward: [runs/rm], watch: [judge:mlx-community/Qwen3-4B-4bit], group_size: 4}
    train: {method: dpo, beta: 0.1}

A plan like this is given as a YAML or JSON file; without one, two rounds run on the demo. `sample` takes
the settings of online-dpo, `train` those of a method that learns from pairs, labels or completions. With
`label: true` the samples are written for people to judge, and the same command goes on when they have.

Every round has a folder with its samples, the data made of them, its run, and a report that says how the
reward does on fresh samples. An iteration that was interrupted goes on with the same command.
"""
# What the table shows of each report.
SHOWN = {
    "samples": "samples",
    "used": "rows learnt from",
    "reward": "reward",
    "watch": "watched",
    "agreement": "agreement",
    "far": "far off",
    "by_length": "by length",
    "length": "tokens",
    "finished": "finished",
}


def commands() -> list[click.Command]:
    """The commands of this file."""
    return [
        SettingsCommand(
            "iterate",
            callback=_iterate,
            params=[click.Argument(["plan"], required=False, metavar="[PLAN]")],
            help=_HELP,
            short_help="Sample, score and train in rounds.",
        )
    ]


def _iterate(plan: str | None) -> None:
    from mlx_align import api

    console = open_console()

    def on_round(what, number, count):
        console.end_line()
        where = f"round {number} of {count}" if number <= count else f"after round {count}"
        console.say(f"{where}: {what}")

    done = api.iterate(plan, events=console, on_round=on_round)
    console.end_line()
    if done.reports:
        _show(done.reports)
    if done.waiting:
        click.echo(
            f'\nlabel these samples: write "a", "b" or "tie" into every "label" of\n  {done.waiting}\n'
            "and give the same command again"
        )
        return
    click.echo(f"\nlast run: {done.run}\n  try it:   mlx-align chat {done.run}")


def _show(reports) -> None:
    names = [n for n in SHOWN if any(getattr(r, n) is not None for r in reports)]
    rows = [[str(r.round), *(_cell(getattr(r, n)) for n in names)] for r in reports]
    click.echo("\n" + table(["before round", *(SHOWN[n] for n in names)], rows))


def _cell(value) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"
