"""Compiles translated kernels with g++ or clang++ into libraries that hold a kernel and the runtime.

Libraries are kept in a folder of the machine's temporary ones, named by a hash of everything they are made
from.
"""

import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
HEADERS = HERE / "include"
OLDEST_GCC = {"x86_64": 12, "aarch64": 13}  # the first with _Float16 in C++

COMMON = ["-std=gnu++20", "-O2", "-fPIC", "-fno-exceptions", "-fvisibility=hidden"]
# A kernel's private variables start with a pattern, as garbage as a GPU's.
KERNEL = [
    *COMMON,
    "-w",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-ftrivial-auto-var-init=pattern",
]
CHECKED = [
    "-fsanitize=thread",
    "-fsanitize=alignment,bool,bounds,integer-divide-by-zero,object-size,shift,signed-integer-overflow",
]


class BuildError(Exception):
    """The kernel does not compile; the message is the compiler's."""


@functools.cache
def compiler() -> tuple[str, ...]:
    """The C++ compiler's command; raises BuildError where there is none that will do."""
    machine = platform.machine()
    oldest = OLDEST_GCC.get(machine, 0)
    for name in filter(None, [os.environ.get("CXX"), "g++", "clang++"]):
        if not shutil.which(name):
            continue
        version = subprocess.run([name, "--version"], capture_output=True, text=True).stdout
        options = []
        if "clang" in version:
            # Otherwise it leaves out reads right before a write there, and accesses of over 16 bytes.
            options += ["-mllvm", "-tsan-instrument-read-before-write=1"]
            options += ["-fno-vectorize", "-fno-slp-vectorize"]
        elif int(re.search(r"\) (\d+)", version)[1]) < oldest:
            continue
        if machine == "x86_64":
            # Any of the last decade has fused multiply-add and half precision.
            options.append("-march=x86-64-v3")
        return (name, *options)
    raise BuildError(f"the Metal emulator needs g++ {oldest} or newer, or clang++")


def missing() -> str | None:
    """Why the emulator cannot work here, or None."""
    try:
        compiler()
    except BuildError as error:
        return str(error)


def cache_folder() -> Path:
    """A folder that only this user can write, since what lies in it is run."""
    folder = Path(tempfile.gettempdir()) / f"mlx-align-metal-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise BuildError(f"{folder} belongs to somebody else")
    return folder


@functools.cache
def build(source: str, checked: bool) -> Path:
    """The library for C++ from `translate`; `checked` makes every access to memory call the checker."""
    flags = [*compiler(), *KERNEL, *(CHECKED if checked else [])]
    text = f'#include "metal_stdlib.h"\n{source}'
    key = hashlib.sha256(repr((flags, _runtime_text(), text)).encode()).hexdigest()[:32]
    library = cache_folder() / f"{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory() as folder:
            file, kernel = Path(folder) / "kernel.cpp", Path(folder) / "kernel.o"
            file.write_text(text)
            _run([*flags, f"-I{HEADERS}", "-c", str(file), "-o", str(kernel)])
            _make(library, [*compiler(), "-shared", str(kernel), str(_runtime())])
    return library


@functools.cache
def _runtime_text() -> str:
    return "".join(p.read_text() for p in sorted(HERE.rglob("*")) if p.suffix in (".h", ".cpp"))


def _runtime() -> Path:
    command = [*compiler(), *COMMON, "-c", str(HERE / "runtime.cpp")]
    key = hashlib.sha256(repr((command, _runtime_text())).encode()).hexdigest()[:32]
    file = cache_folder() / f"{key}.o"
    if not file.exists():
        _make(file, command)
    return file


def _make(file: Path, command: list[str]):
    """Runs a command that writes a file; others see it when it is whole."""
    partial = file.with_suffix(f".{os.getpid()}")
    _run([*command, "-o", str(partial)])
    partial.replace(file)


def _run(command: list[str]):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise BuildError("\n".join([" ".join(command), *errors[:20]]))
