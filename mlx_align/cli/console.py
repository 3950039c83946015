"""What a person sees while something runs: one live line, notices above it, a table at the end."""

import logging
import shutil
import sys
import time
from pathlib import Path

import click

from mlx_align.train.loop import Events

# What the live line shows of the metrics, where they are there.
SHOWN = {
    "accuracy": "accuracy",
    "margin": "margin",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "kl": "kl",
    "reward": "reward",
    "watch": "watched",
    "objective/kl": "completion kl",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "mean_token_accuracy": "token accuracy",
}
# Letters of a sample that are shown.
SAMPLE_WIDTH = 160
# Seconds between lines where there is no terminal to rewrite a line on.
QUIET_SECONDS = 10.0


class Console(Events):
    """Prints a run's events."""

    def __init__(self):
        self.live = sys.stdout.isatty()
        self._shown = ""
        self._last_print = 0.0
        self._started = None
        self._first_step = 0
        self.folder = None

    def line(self, text: str, *, final: bool = False) -> None:
        """Show `text` as the live line; without a terminal, now and then as a line of its own."""
        if self.live:
            text = text[: shutil.get_terminal_size().columns - 1]
            padding = " " * max(0, len(self._shown) - len(text))
            click.echo(f"\r{text}{padding}", nl=final)
            self._shown = "" if final else text
        elif final or time.monotonic() - self._last_print >= QUIET_SECONDS:
            self._last_print = time.monotonic()
            click.echo(text)

    def say(self, text: str) -> None:
        """A line that stays, above the live line."""
        if self._shown:
            click.echo("\r" + " " * len(self._shown) + "\r", nl=False)
        click.echo(text)
        if self._shown:
            click.echo(self._shown, nl=False)

    def end_line(self) -> None:
        """Leave the live line as it stands and go below it."""
        if self._shown:
            click.echo()
            self._shown = ""

    def on_start(self, folder: Path) -> None:
        self.folder = folder

    def on_progress(self, what: str, done: int, total: int) -> None:
        self.line(f"{what}: {done} of {total} examples", final=done == total)

    def on_step(self, row: dict, total: int) -> None:
        step, now = row["step"], time.monotonic()
        if self._started is None:
            self._started, self._first_step = now, step
        parts = [f"step {step}/{total}", f"loss {row['loss']:.4f}"]
        parts += [f"{name} {row[key]:.2f}" for key, name in SHOWN.items() if key in row]
        parts += [f"{row['tokens_per_second']:,.0f} tok/s", f"{row['peak_memory_gb']:.2f} GB"]
        if step > self._first_step:
            left = (now - self._started) / (step - self._first_step) * (total - step)
            parts.append(f"{duration(left)} left")
        self.line("  ".join(parts), final=step == total)

    def on_eval(self, row: dict) -> None:
        parts = [f"held out at step {row['step']}:"]
        if "loss" in row:
            parts.append(f"loss {row['loss']:.4f}")
        if row["step"] == 0 and row.get("rewards/margins") == 0:
            # The policy still is the reference, so its rewards are all zero and say nothing.
            parts.append(f"chosen is likelier {row['logps/accuracies']:.2f}")
        else:
            parts += [f"{name} {row[key]:.2f}" for key, name in SHOWN.items() if key in row]
        self.say("  ".join(parts))

    def on_samples(self, step: int, samples: list[dict]) -> None:
        best = samples[0]
        asked, said = (_one_line(best[name]) for name in ("prompt", "completion"))
        reward = "none" if best["reward"] is None else f"{best['reward']:.2f}"
        self.say(f"sample of step {step}, reward {reward}:\n  {asked}\n  -> {said}")


def _one_line(text) -> str:
    """A text, or the last message of a prompt, on one line that fits most screens."""
    line = " ".join((text if isinstance(text, str) else str(text[-1].get("content", ""))).split())
    return line if len(line) <= SAMPLE_WIDTH else line[: SAMPLE_WIDTH - 1] + "…"


class Handler(logging.Handler):
    """Shows the library's log in the console."""

    def __init__(self, console: Console):
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            text = click.style("note: ", fg="yellow") + text
        self.console.say(text)


def open_console(debug: bool = False) -> Console:
    """A console that also shows the library's log."""
    console = Console()
    logger = logging.getLogger("mlx_align")
    logger.handlers = [Handler(console)]
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
    return console


def duration(seconds: float) -> str:
    """ "1:05" or "2:03:04"."""
    seconds = round(seconds)
    hours, rest = divmod(seconds, 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def table(headers: list[str], rows: list[list[str]]) -> str:
    """Columns, the first aligned left and the others right."""
    widths = [max(len(str(row[i])) for row in [headers, *rows]) for i in range(len(headers))]

    def render(row):
        cells = [str(row[0]).ljust(widths[0])]
        cells += [str(cell).rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    return "\n".join([render(headers), "  ".join("-" * w for w in widths), *map(render, rows)])
