"""The command that checks what this machine computes, and how fast."""

import click

from mlx_align.cli.options import SettingsCommand


def commands() -> list[click.Command]:
    """The commands of this file."""
    return [_doctor()]


def _doctor() -> click.Command:
    def run():
        from mlx_align import api

        found = api.check_kernels(lambda line: click.echo(line, err=True))
        click.echo("\n".join(found.lines()))
        return 0 if found.healthy else 1

    return SettingsCommand(
        "doctor",
        callback=run,
        help="Check attention and log-probabilities against their definitions, and on a Mac the Metal "
        "kernels, too: whether each compiles, is right, and is faster than MLX's own operations. What "
        "is found is kept for this machine and decides which kernels are used. Ends with status 1 "
        "where something is wrong.",
    )
