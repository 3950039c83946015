"""Finds pointers of the wrong address space in Metal kernels, which C++ knows nothing of.

Metal refuses, say, a `constant` pointer where a function takes a `device` one. clang does the same when
address spaces are attributes of types; it only reads the translated kernel and runs nothing. Write access
to `constant` memory is refused, too, and so is C++ newer than Metal's, which is that of 2014. clang++ is
looked for on the path, then in the package ziglang.
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

# As in the emulator, but C++ of after 2014 is an error, except in the emulator's own headers.
OPTIONS = [
    *(option for option in KERNEL if option != "-w"),
    *("-Werror=pre-c++17-compat", "-Werror=pre-c++20-compat"),
    *("-DMETAL_LINT", "-O0", "-isystem", str(HEADERS)),
]


class LintError(Exception):
    """clang's errors, one a line."""


@functools.cache
def clang() -> tuple[str, ...] | None:
    """The command of a clang++ that knows bfloat16, or None."""
    # Distributions add the version to the name of all but one, which may be too old.
    names = ["clang++", *(f"clang++-{version}" for version in range(30, 16, -1))]
    commands = [(name,) for name in names if shutil.which(name)]
    if importlib.util.find_spec("ziglang"):
        commands.append((sys.executable, "-m", "ziglang", "c++"))
    return next(
        (c for c in commands if not _errors(c, "__bf16 sum(__bf16 x) { return x + x; }")), None
    )


def missing() -> str | None:
    """Why there is no lint here, or None."""
    return None if clang() else "needs clang++ 17 or newer, for example from `pip install ziglang`"


def lint(code: str):
    """Checks C++ from `translate`; raises LintError."""
    if errors := _errors(clang(), f'#include "metal_stdlib.h"\n{code}'):
        raise LintError(errors)


def _errors(command: tuple[str, ...], code: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.cpp"
        source.write_text(code)
        # Compiled and not only parsed: ziglang cannot do without a result.
        done = subprocess.run(
            [*command, *OPTIONS, "-c", str(source), "-o", str(source.with_suffix(".o"))],
            capture_output=True,
            text=True,
        )
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    return "\n".join(lines or ["clang failed"]) if done.returncode else ""


class LintedKernel(MetalKernel):
    """A kernel whose calls are checked and yield zeros."""

    def _run(self, library, function, template, arguments, sizes):
        lint(translate(library.text, function, template, {})[0])
        return [mx.zeros(a.shape, a.dtype) for a in arguments.values() if isinstance(a, Output)]
