"""Commands that let a model speak: chat, generate, compare."""

import json
import sys
from pathlib import Path

import click

from mlx_align.cli.console import open_console, table
from mlx_align.cli.options import SettingOption, SettingsCommand, given, settings_options
from mlx_align.errors import SettingsError
from mlx_align.rollout.sampler import SamplingSettings


def commands() -> list[click.Command]:
    """The commands of this file."""
    return [_chat(), _generate(), _compare()]


def _option(*flags, **kwargs):
    return SettingOption(flags, heading="Options", **kwargs)


_BASE = {"help": "Base model of an adapter that does not name it."}
_DTYPE = {
    "type": click.Choice(["auto", "float32", "float16", "bfloat16"]),
    "default": "auto",
    "help": "Type to compute in.",
}


def _sampling(values) -> SamplingSettings:
    names = ("max_tokens", "temperature", "top_p", "seed")
    return SamplingSettings(**given(values, names))


def _chat() -> click.Command:
    def run(**values):
        from mlx_align.model.open import open_model
        from mlx_align.rollout.sampler import Conversation

        open_console()
        loaded, _ = open_model(values["source"], values["dtype"], values["model"])
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
            _option("--system", help="System prompt."),
            _option("--model", **_BASE),
            _option("--dtype", **_DTYPE),
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
            _option("--prompt", "-p", help="One prompt; its completion is printed."),
            _option(
                "--prompts",
                help="File of prompts (.txt: one a line; .jsonl: rows with a prompt or messages); "
                "one JSON row for each is printed.",
            ),
            _option(
                "--prompt-format",
                type=click.Choice(["auto", "chat", "text"]),
                default="auto",
                help="Whether a prompt is a user's turn or text to go on with.",
            ),
            _option("--model", **_BASE),
            _option("--dtype", **_DTYPE),
            *settings_options(SamplingSettings, "Sampling"),
        ],
        help="Complete a prompt, or a file of prompts, with a run, an adapter, or a model.",
    )


def read_prompts(prompt: str | None, file: str | None) -> list:
    """The prompts that the flags name, each text or a list of messages."""
    from mlx_align.api import prompts_from_file

    if (prompt is None) == (file is None):
        raise SettingsError("give one of --prompt and --prompts")
    if prompt is not None:
        return [prompt]
    return prompts_from_file(Path(file))


def _compare() -> click.Command:
    def run(**values):
        from mlx_align import api

        open_console()
        options = given(values, ("max_tokens", "temperature", "top_p", "seed"))
        if values["prompt"] or values["prompts"]:
            prompts = read_prompts(values["prompt"], values["prompts"])
            answers = api.compare_answers(
                values["source"], prompts, base=values["model"], **options
            )
        else:
            comparison = api.compare(values["source"], base=values["model"])
            answers = comparison.answers
            rows = [
                [
                    f"{c.what} (of {c.count})",
                    f"{c.before:.0%}",
                    f"{c.after:.0%}",
                    f"{c.after - c.before:+.0%}",
                ]
                for c in comparison.changes
            ]
            click.echo(table(["", "base", "aligned", "change"], rows))
        for row in answers:
            _show_answers(row)

    return SettingsCommand(
        "compare",
        callback=run,
        params=[
            click.Argument(["source"], metavar="RUN"),
            _option("--prompt", "-p", help="One prompt."),
            _option("--prompts", help="File of prompts (.txt or .jsonl)."),
            _option("--model", **_BASE),
            *settings_options(SamplingSettings, "Sampling"),
        ],
        help="The base and the aligned model side by side. Without prompts: how often both refuse "
        "harmful requests and answer knowledge questions, on sets that come with the package.",
    )


def _show_answers(row) -> None:
    prompt = row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]
    click.echo(click.style(f"\n> {prompt.strip()}", bold=True))
    click.echo(f"  base     {row.base.strip()}")
    click.echo(f"  aligned  {row.aligned.strip()}")
