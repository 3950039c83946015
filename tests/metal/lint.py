"""Finds pointers of the wrong address space in Metal kernels, which C++ knows nothing of.

Metal refuses, say, a `constant` pointer where a function takes a `device` one. clang does the same when
address spaces are attributes of types; it only reads the translated kernel and runs nothing. Write access
to `constant` memory is refused, too. clang++ is looked for on the path, then in the package ziglang.
"""

import functools
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
from metal.emulator.build import HEADERS, KERNEL
from metal.emulator.kernel import MetalKernel, Output
from metal.emulator.source import translate


class LintError(Exception):
    """clang's errors, one a line."""


@functools.cache
def clang() -> tuple[str, ...] | None:
    """The command of a clang++, or None."""
    if shutil.which("clang++"):
        return ("clang++",)
    if importlib.util.find_spec("ziglang"):
        return (sys.executable, "-m", "ziglang", "c++")
    return None


def missing() -> str | None:
    """Why there is no lint here, or None."""
    return None if clang() else "needs clang++, for example from `pip install ziglang`"


def lint(code: str):
    """Checks C++ from `translate`; raises LintError."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.cpp"
        source.write_text(f'#include "metal_stdlib.h"\n{code}')
        # Compiled and not only parsed: ziglang cannot do without a result.
        command = [*clang(), *KERNEL, "-DMETAL_LINT", f"-I{HEADERS}", "-c", str(source)]
        done = subprocess.run(
            [*command, "-o", str(source.with_suffix(".o"))], capture_output=True, text=True
        )
    if done.returncode:
        raise LintError("\n".join(line for line in done.stderr.splitlines() if "error" in line))


class LintedKernel(MetalKernel):
    """A kernel whose calls are checked and yield zeros."""

    def _run(self, library, function, template, arguments, sizes):
        lint(translate(library.text, function, template, {})[0])
        return [mx.zeros(a.shape, a.dtype) for a in arguments.values() if isinstance(a, Output)]
