"""Metal kernels from their sources: find a file, read the kernels in it, hand one to MLX and start it.

The files in `metal/` are complete; `xcrun metal` compiles them. MLX writes the signature of a kernel
itself, so it is given what stands in front of the first kernel of a file as header, and the body of
one kernel. Names of arguments and of thread attributes are the same in both.

Knows nothing of what kernels compute, nor of whether they should be used.
"""

import functools
import hashlib
import importlib.resources
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

# What the kernels take.
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
# MLX passes smaller arrays in another address space than the kernels declare.
MIN_ELEMENTS = 8

_KERNEL = re.compile(
    r"^template <[^\n]*>\n\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n(.*?)^\}\n",
    re.MULTILINE | re.DOTALL,
)
_ARRAY = re.compile(r"(const )?device \w+\* (\w+) \[\[buffer\(\d+\)\]\]")


class Kernel(NamedTuple):
    """One kernel of a file: the names of its arrays, and its text."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    header: str
    body: str


def metal_folder() -> Path:
    """Where the sources are: in the package, or beside it in a checkout."""
    inside = Path(str(importlib.resources.files("mlx_align"))) / "metal"
    return inside if inside.is_dir() else inside.parents[1] / "metal"


@functools.cache
def read_source(file: str) -> str:
    """The text of `metal/<file>.metal`."""
    return (metal_folder() / f"{file}.metal").read_text(encoding="utf-8")


def read_kernels(text: str) -> dict[str, Kernel]:
    """The kernels of a source by name."""
    matches = list(_KERNEL.finditer(text))
    header = text[: matches[0].start()]
    kernels = {}
    for match in matches:
        name, parameters, body = match.groups()
        arrays = _ARRAY.findall(parameters)
        kernels[name] = Kernel(
            tuple(array for const, array in arrays if const),
            tuple(array for const, array in arrays if not const),
            header,
            body,
        )
    return kernels


def kernel_maker():
    """What makes a kernel of its text; tests put an emulator in its place."""
    return mx.fast.metal_kernel


@functools.cache
def _made(maker, text: str, name: str, template: tuple):
    kernel = read_kernels(text)[name]
    # MLX takes kernels of one name for the same one, whatever their source.
    digest = hashlib.sha256(f"{text}{template}".encode()).hexdigest()[:12]
    return maker(
        name=f"mlx_align_{name}_{digest}",
        input_names=list(kernel.inputs),
        output_names=list(kernel.outputs),
        header=kernel.header,
        source=kernel.body,
    )


def launch(
    file: str,
    name: str,
    inputs: Sequence[mx.array],
    template: dict,
    *,
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
) -> list[mx.array]:
    """Start kernel `name` of `metal/<file>.metal`; `grid` counts threads, as MLX does.

    `outputs` are shapes and dtypes. Raises `ValueError` for inputs of fewer than 8 elements, which MLX
    would pass in another address space.
    """
    if small := [x.shape for x in inputs if x.size < MIN_ELEMENTS]:
        raise ValueError(f"{name}: inputs of fewer than {MIN_ELEMENTS} elements: {small}")
    template = tuple(template.items())
    kernel = _made(kernel_maker(), read_source(file), name, template)
    return kernel(
        inputs=list(inputs),
        template=list(template),
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
    )
