"""`python -m mlx_align` is `mlx-align`."""

from mlx_align.cli import main

main()
