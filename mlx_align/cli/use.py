"""Commands that let a model speak or score: chat, generate, score."""

import json
import sys
from pathlib import Path

import click

from mlx_align.cli.console import open_console
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
from mlx_align.data.agreement import wilson_share
from mlx_align.errors import ModelError, SettingsError
from mlx_align.files import write_atomically
from mlx_align.rollout.sampler import SamplingSettings


def commands() -> list[click.Command]:
    """The commands of this file."""
    return [_chat(), _generate(), _score(), _verifiers()]


def _sampling(values) -> SamplingSettings:
    names = ("max_tokens", "temperature", "top_p", "seed")
    return SamplingSettings(**given(values, names))


def _chat() -> click.Command:
    def run(**values):
        from mlx_align.model.open import open_model
        from mlx_align.rollout.sampler import Conversation

        open_console()
        loaded, _ = open_model(values["source"], values["dtype"], values["model"])
        if "score" in loaded.model:
            raise ModelError(f"{values['source']}: is a reward model; it scores, it does not write")
        if loaded.template is None:
            click.echo("note: this model has no chat template; what you type is continued as text")
        conversation = Conversation(loaded, _sampling(values), values["system"])
        live = sys.stdin.isatty()
        click.echo(
            "Type a message; /reset forgets the conversation, /quit ends it." if live else "",
            nl=live,
        )
        while True:
            try:
                text = input("> " if live else "").strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                click.echo()
                break
            if text in ("/quit", "/exit"):
                break
            if text == "/reset":
                conversation.reset()
            elif text:
                try:
                    for piece in conversation.say(text):
                        click.echo(piece, nl=False)
                except KeyboardInterrupt:
                    conversation.reset()
                    click.echo("\n(stopped; the conversation starts anew)", nl=False)
                click.echo()

    return SettingsCommand(
        "chat",
        callback=run,
        params=[
            click.Argument(["source"], metavar="RUN_OR_MODEL"),
            option("--system", help="System prompt."),
            base_option(),
            dtype_option(),
            *settings_options(SamplingSettings, "Sampling"),
        ],
        help="Talk to a run, an adapter, or a model.",
    )


def _generate() -> click.Command:
    def run(**values):
        from mlx_align import api

        open_console()
        prompts = read_prompts(values["prompt"], values["prompts"])
        completions = api.generate(
            values["source"],
            prompts,
            base=values["model"],
            dtype=values["dtype"],
            prompt_format=values["prompt_format"],
            best_of=values["best_of"],
            scorer=values["scorer"],
            **given(values, ("max_tokens", "temperature", "top_p", "seed")),
        )
        for prompt, completion in zip(prompts, completions, strict=True):
            if values["prompts"]:
                row = {"prompt": prompt, "completion": completion.text}
                click.echo(json.dumps({**row, "finished": completion.finished}, ensure_ascii=False))
            else:
                click.echo(completion.text)

    return SettingsCommand(
        "generate",
        callback=run,
        params=[
            click.Argument(["source"], metavar="RUN_OR_MODEL"),
            option("--prompt", "-p", help="One prompt; its completion is printed."),
            option(
                "--prompts",
                help="File of prompts (.txt: one a line; .jsonl: rows with a prompt or messages); "
                "one JSON row for each is printed.",
            ),
            prompt_format_option(),
            option(
                "--best-of",
                type=click.IntRange(min=1),
                default=1,
                help="Sample so many completions of a prompt and take the best (at temperature 1, "
                "unless given).",
            ),
            option(
                "--scorer",
                default="implicit",
                help="What is best: implicit (by the run's own log pi - log pi_ref), or the run of a "
                "reward model.",
            ),
            base_option(),
            dtype_option(),
            *settings_options(SamplingSettings, "Sampling"),
        ],
        help="Complete a prompt, or a file of prompts, with a run, an adapter, or a model.",
    )


def _score() -> click.Command:
    def run(**values):
        from mlx_align import api

        open_console()
        rows = api.score(values["source"], values["data"], raw=values["raw"], field=values["field"])
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        if values["output"]:
            write_atomically(Path(values["output"]), "".join(lines))
            click.echo(f"written: {values['output']}")
        else:
            click.echo("".join(lines), nl=False)
        margins = [r["chosen_reward"] - r["rejected_reward"] for r in rows if "chosen_reward" in r]
        if margins:
            share = wilson_share(sum(m > 0 for m in margins), len(margins))
            click.echo(
                f"the chosen completion has the higher reward in {share.share:.1%} of {len(margins)} "
                f"pairs (95 % interval {share.low:.1%} to {share.high:.1%})",
                err=True,
            )
        left_out = [r["problem"] for r in rows if "problem" in r]
        if left_out:
            click.echo(f"{len(left_out)} rows could not be scored: {left_out[0]}", err=True)

    return SettingsCommand(
        "score",
        callback=run,
        params=[
            click.Argument(["source"], metavar="REWARD_RUN"),
            option("--data", required=True, help="File of pairs, completions or conversations."),
            option("--output", help="File for the rows with their rewards. Default: printed."),
            option("--raw", is_flag=True, help="The head's scores, not normalised."),
            option(
                "--field",
                type=Comma(),
                default=(),
                help="Columns under other names, as NAME=COLUMN.",
            ),
        ],
        help="Rewards of all completions in a file, by a reward model.",
    )


def _verifiers() -> click.Command:
    def run():
        from mlx_align.rollout.verifiers import verifier_help

        click.echo(verifier_help())

    return SettingsCommand(
        "verifiers",
        callback=run,
        help="The built-in verifiers that --reward can name, with their options.",
    )


def read_prompts(prompt: str | None, file: str | None) -> list:
    """The prompts that the flags name, each text or a list of messages."""
    from mlx_align.api import prompts_from_file

    if (prompt is None) == (file is None):
        raise SettingsError("give one of --prompt and --prompts")
    if prompt is not None:
        return [prompt]
    return prompts_from_file(Path(file))
