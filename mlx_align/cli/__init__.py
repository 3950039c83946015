"""The command line: one group, a thin file for each kind of command."""

import os
import sys

import click

from mlx_align.errors import AlignError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="mlx-align")
def cli():
    """Align a language model to your preferences on a Mac, and take it to Ollama.

    Every training command runs on a small embedded demo when no --model and --data are given.
    """


def _register():
    from mlx_align.cli import (
        data,
        doctor,
        evaluate,
        export,
        importer,
        iterate,
        sweep,
        train,
        use,
    )

    for room in (train, sweep, iterate, use, evaluate, export, importer, data, doctor):
        for command in room.commands():
            cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run a command; a mistake of the user's ends in one line and status 1, not in a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments or bool(os.environ.get("MLX_ALIGN_DEBUG"))
    arguments = [a for a in arguments if a != "--debug"]
    _register()
    try:
        status = cli.main(
            arguments, prog_name="mlx-align", standalone_mode=False, obj={"debug": debug}
        )
    except AlignError as error:
        if debug:
            raise
        click.echo(click.style("error: ", fg="red", bold=True) + str(error), err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("\nstopped", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read the output has gone; that is no failure.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(status if isinstance(status, int) else 0)
