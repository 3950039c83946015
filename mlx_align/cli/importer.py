"""Commands that take a model from elsewhere: import, convert."""

import click

from mlx_align.cli import export
from mlx_align.cli.console import open_console
from mlx_align.cli.options import SettingsCommand, base_option, option

SOURCES = (
    "SOURCE is a GGUF file, a model on this machine (ollama:llama3.2:1b, lmstudio:publisher/model), a "
    "folder of safetensors, an adapter of PEFT, or a Hub id."
)


def commands() -> list[click.Command]:
    """The commands of this file."""
    return [_import(), _convert()]


def _import() -> click.Command:
    def run(**values):
        from mlx_align import api

        open_console()
        path = api.import_model(
            values["source"],
            output=values["output"],
            dtype=values["dtype"],
            base=values["model"],
        )
        click.echo(f"written: {path}")
        if (path / "config.json").exists():
            click.echo(f"  train it: mlx-align dpo --model {path} --data FILE")

    return SettingsCommand(
        "import",
        callback=run,
        params=[
            click.Argument(["source"]),
            option("--output", help="Folder to write. Default: models/NAME."),
            option(
                "--dtype",
                type=click.Choice(["float32", "float16", "bfloat16"]),
                help="Make all weights floats of this type. Default: quantised weights stay quantised.",
            ),
            base_option(),
        ],
        help=f"Make a folder for MLX of a model or adapter in another form.\n\n{SOURCES}",
    )


def _convert() -> click.Command:
    (exporter,) = export.commands()

    def run(**values):
        from mlx_align import api

        open_console()
        path = api.convert_model(values["source"], values["to"], **export.form(values))
        click.echo(f"written: {path}")

    return SettingsCommand(
        "convert",
        callback=run,
        params=[
            click.Argument(["source"]),
            option("--output", required=True, help="Where to write."),
            *(param for param in exporter.params if param.name not in ("source", "output")),
        ],
        help=f"Write a model in one form in another, without a run.\n\n{SOURCES}",
    )
