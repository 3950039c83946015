"""Settings dataclasses as command-line flags: the only place that knows click's types.

A flag that is not given stays out of the result, so that a value from a file or the dataclass's own
default can take its place.
"""

import dataclasses
from collections.abc import Iterable

import click

from mlx_align.settings import value_type


class Comma(click.ParamType):
    """A list written with commas."""

    name = "name,name"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        return tuple(part.strip() for part in value.split(",") if part.strip())


class SettingOption(click.Option):
    """An option made from a settings field, with the heading it is listed under."""

    def __init__(self, *args, heading: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.heading = heading


class SettingsCommand(click.Command):
    """A command whose help lists options under headings."""

    def format_options(self, ctx, formatter):
        sections: dict[str, list] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(param, "heading", "Options"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def option(*flags: str, **kwargs) -> SettingOption:
    """An option of a command's own, listed under "Options"."""
    return SettingOption(flags, heading="Options", **kwargs)


def base_option() -> SettingOption:
    """Of every command that opens an adapter."""
    return option("--model", help="Base model of an adapter that does not name it.")


def dtype_option() -> SettingOption:
    """Of every command that runs a model."""
    return option(
        "--dtype",
        type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
        default="auto",
        help="Type to compute in.",
    )


def prompt_format_option() -> SettingOption:
    """Of every command that takes prompts as text."""
    return option(
        "--prompt-format",
        type=click.Choice(["auto", "chat", "text"]),
        default="auto",
        help="Whether a prompt is a user's turn or text to go on with.",
    )


def settings_options(cls: type, heading: str) -> list[click.Option]:
    """One option for every field of a settings class."""
    return [_option(f, heading) for f in dataclasses.fields(cls) if not f.metadata["hidden"]]


def _option(field: dataclasses.Field, heading: str) -> click.Option:
    kind, _, many = value_type(field)
    names = [field.name, *field.metadata["aliases"]]
    flags = ["--" + name.replace("_", "-") for name in names]
    help_text = field.metadata["help"]
    if field.default is not None and kind is not bool:
        default = ",".join(field.default) if many else field.default
        help_text += f"  [default: {default}]"
    arguments = {"default": None, "help": help_text, "heading": heading}
    if kind is bool:
        flags = [f"{flag}/--no-{flag[2:]}" for flag in flags]
    elif many:
        arguments["type"] = Comma()
    elif field.metadata["choices"]:
        arguments["type"] = click.Choice(field.metadata["choices"])
    else:
        arguments["type"] = {int: click.INT, float: click.FLOAT, str: click.STRING}[kind]
    return SettingOption([field.name, *flags], **arguments)


def given(values: dict, names: Iterable[str]) -> dict:
    """The values among `names` that were given on the command line."""
    return {name: values[name] for name in names if values.get(name) is not None}
