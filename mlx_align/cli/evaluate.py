"""Commands that measure: evaluate one model, compare two."""

from pathlib import Path

import click

from mlx_align.cli.console import Console, open_console, table
from mlx_align.cli.options import (
    Comma,
    SettingsCommand,
    base_option,
    dtype_option,
    given,
    option,
    prompt_format_option,
    settings_options,
)
from mlx_align.cli.use import read_prompts
from mlx_align.errors import SettingsError
from mlx_align.rollout.sampler import SamplingSettings

# In the file, but not in the table that is shown.
UNSHOWN = ("texts/word_perplexity", "answers/distinct")
_TYPES = "refuses/type/"
_SAMPLING = ("max_tokens", "temperature", "top_p", "seed")
_MEASURING = ("judge", "reward", "tasks", "limit", "beta", "thinking")


def commands() -> list[click.Command]:
    """The commands of this file."""
    return [_evaluate(), _compare()]


def _options() -> list[click.Option]:
    """What both commands take."""
    return [
        option(
            "--data",
            multiple=True,
            help="File, folder or Hub data set to measure on; may be given several times. Its rows say "
            "what it is: preference pairs, requests (harmful or not, XSTest), questions with an answer "
            "(GSM8K's too) or choices, texts, prompts.",
        ),
        option(
            "--own-sets/--no-own-sets",
            default=True,
            help="Add a run's held-out rows, and the small sets that come along for what --data has "
            "none of.",
        ),
        option("--limit", type=click.IntRange(min=1), help="Most cases of a set, spread over it."),
        option("--output", help="JSON file for all numbers and answers. Default: in the run folder."),
        option("--judge", help="Model that judges answers, asked in both orders; ties are kept."),
        option("--reward", help="Run of a reward model that scores answers."),
        option("--tasks", type=Comma(), help="Tasks of lm-evaluation-harness, where it is installed."),
        option("--beta", type=float, help="Scale of the implicit reward. Default: the run's, or 0.1."),
        base_option(),
        dtype_option(),
        prompt_format_option(),
        option(
            "--thinking/--no-thinking",
            default=None,
            help="Let models that can think do so before they answer. Default: their template's own.",
        ),
        *settings_options(SamplingSettings, "Sampling"),
    ]  # fmt: skip


def _keywords(values, output: Path | None, console: Console) -> dict:
    """The arguments of `api.evaluate_model` and `api.compare` that the flags stand for."""

    def progress(what, done, total):
        # Without a terminal only what takes long is worth a line.
        console.line(f"{what}: {done} of {total}", final=console.live and done == total)

    return {
        "data": values["data"],
        "own_sets": values["own_sets"],
        "output": output,
        "base": values["model"],
        "dtype": values["dtype"],
        "prompt_format": values["prompt_format"],
        "progress": progress,
        **given(values, (*_SAMPLING, *_MEASURING)),
    }


def _output(values, source, name: str) -> Path | None:
    from mlx_align.evaluate.heldout import is_run

    if values["output"]:
        return Path(values["output"])
    return Path(source).expanduser() / name if is_run(source) else None


def _evaluate() -> click.Command:
    def run(**values):
        from mlx_align import api

        console = open_console()
        output = _output(values, values["source"], "evaluation.json")
        found = api.evaluate_model(values["source"], **_keywords(values, output, console))
        rows = [row for row in found.measures if row.key not in UNSHOWN]
        for chosen in _main_and_types(rows):
            lines = [[_label(r), r.written(r.after), _interval(r)] for r in chosen]
            click.echo(table(["", "value", "95 % interval"], lines) + "\n")
        _finish(found.notes, output)

    return SettingsCommand(
        "evaluate",
        callback=run,
        params=[click.Argument(["source"], metavar="RUN_OR_MODEL"), *_options()],
        help="Measure a run, an adapter, or a model: preference accuracy and calibration, refusals, "
        "right answers, perplexity, length and repetition, each with its interval.",
    )


def _compare() -> click.Command:
    def run(**values):
        from mlx_align import api

        console = open_console()
        before, after = values["before"], values["after"]
        if values["prompt"] or values["prompts"]:
            if values["data"]:
                raise SettingsError(
                    "--prompt and --prompts show answers; --data measures. Give one"
                )
            prompts = read_prompts(values["prompt"], values["prompts"])
            answers = api.compare_answers(
                before, prompts, after=after, base=values["model"], **given(values, _SAMPLING)
            )
            for row in answers:
                _show_answers(row, _names(after))
            return
        output = _output(values, after or before, "comparison.json")
        found = api.compare(before, after, **_keywords(values, output, console))
        rows = [row for row in found.changes if row.key not in UNSHOWN]
        headers = ["", *_names(after), "change", "95 % interval"]
        for chosen in _main_and_types(rows):
            lines = [
                [
                    _label(r),
                    r.written(r.before),
                    r.written(r.after),
                    r.written_change,
                    "" if r.before is None else r.interval,
                ]
                for r in chosen
            ]
            click.echo(table(headers, lines) + "\n")
        click.echo(click.style(str(found.verdict), bold=True))
        for reason in found.verdict.reasons:
            click.echo(f"  {reason}")
        for warning in found.verdict.warnings:
            click.echo(f"  {click.style('note:', fg='yellow')} {warning}")
        for row in found.answers:
            _show_answers(row, _names(after))
        click.echo()
        _finish(found.notes, output)

    return SettingsCommand(
        "compare",
        callback=run,
        params=[
            click.Argument(["before"], metavar="RUN_OR_BEFORE"),
            click.Argument(["after"], metavar="[AFTER]", required=False),
            option("--prompt", "-p", help="One prompt: show both answers, measure nothing."),
            option("--prompts", help="File of prompts (.txt or .jsonl): the same."),
            *_options(),
        ],
        help="A run's base and the run side by side, or any two models, adapters and runs: the numbers "
        "of `evaluate` before and after, the change with its interval, and a verdict in words.",
    )


def _names(after) -> tuple[str, str]:
    return ("base", "aligned") if after is None else ("before", "after")


def _main_and_types(rows):
    """The rows of the table, and those by type of request, where there are any."""
    for chosen in (
        [row for row in rows if not row.key.startswith(_TYPES)],
        [row for row in rows if row.key.startswith(_TYPES)],
    ):
        if chosen:
            yield chosen


def _label(row) -> str:
    return f"{row.what} (of {row.count})" if row.count else row.what


def _interval(row) -> str:
    if row.after_interval is None:
        return "too few cases"
    return " to ".join(row.written(bound) for bound in row.after_interval)


def _finish(notes, output) -> None:
    for note in notes:
        click.echo(note)
    if output is not None:
        click.echo(f"written: {output}")


def _show_answers(row, names) -> None:
    prompt = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
    click.echo(click.style(f"\n> {prompt.strip()}", bold=True))
    for name, text in zip(names, (row.base, row.aligned), strict=True):
        click.echo(f"  {name:8} {text.strip()}")
