"""Whether a Metal kernel is used: what $MLX_ALIGN_KERNELS says, and verdicts reached on this machine.

    off   never
    on    wherever there is Metal
    auto  where a check on this machine found that it compiles, is right, and is faster at such a size

A check runs in a process of its own, since a kernel that Metal cannot build may take its process down.
Its verdict is kept in the cache folder for the machine, the system, MLX's version and the kernel's
source. Knows nothing of what kernels compute.
"""

import functools
import hashlib
import json
import logging
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlx_align.errors import SettingsError
from mlx_align.files import cache_folder, write_atomically
from mlx_align.kernels.source import read_source
from mlx_align.settings import fingerprint

log = logging.getLogger("mlx_align")

MODE = "MLX_ALIGN_KERNELS"
# A check is stopped after so many seconds.
LIMIT = 600


class Variant(NamedTuple):
    """The kernels of one source for one dtype and, in attention, one head dimension."""

    file: str
    dtype: str
    head_dim: int = 0

    @classmethod
    def of(cls, file: str, dtype: mx.Dtype, head_dim: int = 0) -> "Variant":
        """The variant for arrays of a dtype."""
        return cls(file, str(dtype).removeprefix("mlx.core."), head_dim)

    def __str__(self):
        return " ".join(str(part) for part in self if part)


class Timing(NamedTuple):
    """Seconds at one size of the kernel and of what it would replace, by name.

    The size is (tokens, segments) of attention, and (rows, vocabulary) of log-probabilities.
    """

    size: tuple[int, int]
    kernel: float
    others: dict[str, float]

    @property
    def faster(self) -> bool:
        """Whether the kernel beats all of them."""
        return self.kernel < min(self.others.values())


class Verdict(NamedTuple):
    """What a check found: why the kernel cannot be used, or its errors and timings."""

    failure: str | None
    errors: dict[str, float]
    timings: tuple[Timing, ...]

    def nearest(self, size: tuple[int, int]) -> Timing:
        """The timing at the size that is nearest by ratio."""
        return min(self.timings, key=lambda timing: math.dist(_logs(timing.size), _logs(size)))


def _logs(size):
    return [math.log(x) for x in size]


def metal_available() -> bool:
    """Whether operations run on a GPU that has Metal."""
    return mx.metal.is_available() and mx.default_device() == mx.gpu


def mode() -> str:
    """What $MLX_ALIGN_KERNELS says; auto where it is not set."""
    chosen = os.environ.get(MODE) or "auto"
    if chosen not in ("off", "on", "auto"):
        raise SettingsError(f"${MODE}: {chosen!r} is not one of off, on, auto")
    return chosen


def use(variant: Variant, size: tuple[int, int]) -> bool:
    """Whether to take the kernel for something of this size."""
    chosen = mode()
    if chosen == "off" or not metal_available():
        return False
    if chosen == "on":
        return True
    verdict = find_verdict(variant)
    if verdict.failure:
        _say(logging.WARNING, f"{variant}: the Metal kernel is not used: {verdict.failure}")
        return False
    timing = verdict.nearest(size)
    if not timing.faster:
        rows, columns = timing.size
        _say(
            logging.INFO, f"{variant}: MLX's own operations are faster at about {rows} x {columns}"
        )
    return timing.faster


@functools.cache
def _say(level, text):
    """Log a line, once."""
    log.log(level, text)


# -- verdicts ----------------------------------------------------------------------------------------


def machine() -> dict[str, str]:
    """What a verdict holds for."""
    about = mx.device_info()
    return {
        "device": str(about.get("device_name", "")),
        "architecture": str(about.get("architecture", "")),
        "system": f"{platform.platform()} {platform.version()}",
        "mlx": mx.__version__,
    }


def verdicts_file() -> Path:
    """Where this machine's verdicts are kept."""
    return cache_folder() / "kernels" / f"{fingerprint(machine())}.json"


@functools.cache
def find_verdict(variant: Variant) -> Verdict:
    """The verdict that is kept, or that of a check made now."""
    if kept := _kept(variant):
        return kept
    log.info("checking the Metal kernel %s, once on this machine", variant)
    return judge(variant)


def judge(variant: Variant) -> Verdict:
    """Check a variant in a process of its own, and keep the verdict."""
    found = _run_check(variant)
    verdicts = _read_verdicts()
    verdicts[str(variant)] = {"source": _source_hash(variant), **found}
    file = verdicts_file()
    # A name of its own, since the processes of a distributed run may all check at once.
    temporary = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"machine": machine(), "verdicts": verdicts}, indent=2))
        write_atomically(file, temporary)
    except OSError as error:
        log.warning("%s: the verdict on the Metal kernel cannot be kept: %s", variant, error)
    find_verdict.cache_clear()
    return _parse(found)


def _run_check(variant):
    command = [sys.executable, "-m", "mlx_align.kernels.check", *map(str, variant)]
    try:
        # The operations that the kernel is compared with have to be MLX's own.
        environment = {**os.environ, MODE: "off"}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return _failed(f"its check took longer than {LIMIT} s")
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        return _failed(f"its check ended with status {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _failed(why):
    return {"failure": why, "errors": {}, "timings": []}


def _kept(variant):
    """The verdict kept on a variant's source as it is now, or None; nor is what cannot be understood."""
    try:
        found = _read_verdicts()[str(variant)]
        return _parse(found) if found["source"] == _source_hash(variant) else None
    except (KeyError, TypeError, ValueError):
        return None


def _read_verdicts():
    try:
        return dict(json.loads(verdicts_file().read_text(encoding="utf-8"))["verdicts"])
    except (OSError, KeyError, TypeError, ValueError):
        return {}


def _parse(found):
    timings = tuple(
        Timing(tuple(size), kernel, others) for size, kernel, others in found["timings"]
    )
    return Verdict(found["failure"], found["errors"], timings)


def _source_hash(variant):
    return hashlib.sha256(read_source(variant.file).encode()).hexdigest()[:16]
