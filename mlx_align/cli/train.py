"""One training command for every registered method."""

import inspect
import signal

import click

from mlx_align.cli.console import Console, open_console, table
from mlx_align.cli.options import SettingOption, SettingsCommand, given, settings_options
from mlx_align.errors import AlignError, SettingsError
from mlx_align.losses import METHODS
from mlx_align.train.config import GROUPS, setting_names

HEADINGS = dict(zip(GROUPS, ("Model", "Data", "Adapter", "Training"), strict=True))
# What the table at the end shows, where the method has it.
SHOWN_BEFORE_AFTER = (
    "reward", "watch", "loss", "accuracy", "margin", "rewards/accuracies", "logps/accuracies",
    "rewards/margins", "logps/chosen", "logps/rejected", "kl", "mean_token_accuracy",
    "completions/mean_length",
)  # fmt: skip


def commands() -> list[click.Command]:
    """The commands of all methods."""
    return [_command(name) for name in METHODS]


def _command(name: str) -> click.Command:
    method = METHODS[name]
    summary, _, rest = inspect.getdoc(method).partition("\n")
    learning_rate = f"Default learning rate {method.learning_rate:g}. Source: {method.source}."
    params = [
        SettingOption(
            ["config", "-c", "--config"],
            heading="Run",
            help="YAML or JSON file of settings; flags come first. A run.json repeats that run.",
        ),
        SettingOption(
            ["resume", "--resume"],
            heading="Run",
            metavar="RUN",
            help="Go on with an interrupted run; its settings are used.",
        ),
        *settings_options(method, "Method"),
    ]
    for cls, heading in HEADINGS.items():
        params += settings_options(cls, heading)
    return SettingsCommand(
        name,
        params=params,
        callback=click.pass_context(lambda context, **values: _train(context, name, values)),
        help=f"{summary}\n{rest}\n\n{learning_rate}",
        short_help=summary,
    )


def _train(context: click.Context, method: str, values: dict) -> int:
    from mlx_align import api

    console = open_console(context.obj["debug"])
    flags = given(values, setting_names(method))
    if values["resume"] and (values["config"] or flags):
        extra = ["-c"] * bool(values["config"]) + ["--" + f.replace("_", "-") for f in flags]
        raise SettingsError(
            f"--resume goes on with the settings of the run; leave out {', '.join(extra)}, or "
            f"start a new run with -c {values['resume']}/run.json and these flags"
        )
    with _StopOnInterrupt(console) as stop:
        try:
            result = api.train_model(
                method,
                config=values["config"],
                resume=values["resume"],
                events=console,
                should_stop=stop.asked,
                **flags,
            )
        except KeyboardInterrupt:
            console.end_line()
            if console.folder is None:
                raise
            click.echo(f"stopped. Go on with:\n  mlx-align {method} --resume {console.folder}")
            return 130
        except AlignError as error:
            console.end_line()
            if console.folder is None or not any(console.folder.glob("checkpoints/step-*")):
                raise
            raise type(error)(
                f"{error}\nWhat was learnt so far is kept. When that is mended, go on with:\n"
                f"  mlx-align {method} --resume {console.folder}"
            ) from error
    console.end_line()
    if result.stopped:
        click.echo(
            f"stopped after step {result.steps} by --stop-on-hacking ({result.stopped}); a checkpoint was "
            f"written. The best one so far is {result.folder}/checkpoints/best, of step "
            f"{result.best_step}. To go on all the same:\n  mlx-align {method} --resume {result.folder}"
        )
        return 0
    if not result.finished:
        click.echo(f"stopped after step {result.steps}; a checkpoint was written. Go on with:")
        click.echo(f"  mlx-align {method} --resume {result.folder}")
        return 130
    _show_result(method, result)
    return 0


def _show_result(method: str, result) -> None:
    if result.after:
        rows = []
        for name in SHOWN_BEFORE_AFTER:
            if name in result.after and name in result.before:
                before, after = result.before[name], result.after[name]
                cells = [f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"]
                if name.startswith("rewards/") and before == 0:
                    # Where the policy still is the reference, rewards are zero and say nothing.
                    cells[0] = cells[2] = "-"
                rows.append([name, *cells])
        click.echo("\n" + table(["held-out data", "before", "after", "change"], rows))
        if result.best_step != result.steps:
            name, rising = result.monitor
            best = f"{'highest' if rising else 'lowest'} held-out {name}"
            click.echo(f"{best} was at step {result.best_step}: {result.folder}/checkpoints/best")
    click.echo(f"\nrun folder: {result.folder}")
    if METHODS[method].reads == "rewards":
        _show_accuracy(result)
        click.echo(f"  use it:   mlx-align score {result.folder} --data FILE")
        click.echo(f"  export:   mlx-align export {result.folder} --to hf")
        return
    click.echo(f"  try it:   mlx-align chat {result.folder}")
    click.echo(f"  compare:  mlx-align compare {result.folder}")
    click.echo(f"  export:   mlx-align export {result.folder} --to ollama")


def _show_accuracy(result) -> None:
    """How sure the accuracy on held-out pairs is."""
    from mlx_align.data.agreement import wilson_share
    from mlx_align.train.runlog import read_run

    if not result.after:
        return
    record = read_run(result.folder)
    count = min(record["valid_examples"], record["settings"]["eval_examples"])
    share = wilson_share(round(result.after["accuracy"] * count), count)
    click.echo(
        f"  right on {share.share:.1%} of {count} held-out pairs (95 % interval {share.low:.1%} to "
        f"{share.high:.1%})"
    )


class _StopOnInterrupt:
    """Turns the first Ctrl-C into a wish to stop after the step; the second stops at once."""

    def __init__(self, console: Console):
        self._console = console
        self._asked = False

    def asked(self) -> bool:
        return self._asked

    def __enter__(self):
        self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, *_):
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        self._console.say("stopping after this step (Ctrl-C again stops at once) ...")
