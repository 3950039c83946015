"""What is right and what is fast on this machine: every path that computes, against its definition."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from mlx_align.kernels import dispatch, metal_attention, metal_log_prob
from mlx_align.kernels.check import PLAIN_TOLERANCE, TOLERANCE, check_plain
from mlx_align.kernels.dispatch import Variant, Verdict
from mlx_align.kernels.source import DTYPES


class Finding(NamedTuple):
    """What was found of a variant: errors of MLX's own operations, and the verdict on the kernel.

    Without Metal there is no verdict.
    """

    variant: Variant
    plain: dict[str, float]
    verdict: Verdict | None

    @property
    def plain_right(self) -> bool:
        """Whether MLX's own operations give what they should."""
        return _worst(self.plain) <= PLAIN_TOLERANCE[self.variant.dtype]


class Diagnosis(NamedTuple):
    """What was found of everything."""

    machine: dict[str, str]
    mode: str
    metal: bool
    findings: list[Finding]

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong; a kernel that is merely slow is not used, which is right."""
        return all(f.plain_right and not (f.verdict and f.verdict.failure) for f in self.findings)

    def lines(self) -> Iterator[str]:
        """The report."""
        yield "{device}, {system}, MLX {mlx}".format(**self.machine)
        yield ""
        yield "MLX's own operations against float64 (greatest error, relative; limit):"
        for variant, plain, _ in self.findings:
            yield _line(variant, plain, PLAIN_TOLERANCE)
        yield ""
        if not self.metal:
            yield "Metal is not available here: no kernel was checked, and none is used."
            return
        yield f"Metal kernels, with ${dispatch.MODE}={self.mode}:"
        for variant, _, verdict in self.findings:
            if verdict.failure:
                yield f"  {variant!s:26s} not used: {verdict.failure}"
            else:
                yield _line(variant, verdict.errors, TOLERANCE)
        yield from self._timings(metal_attention.FILE, "T x segments")
        yield from self._timings(metal_log_prob.FILE, "rows x V")
        yield f"verdicts: {dispatch.verdicts_file()}"

    def _timings(self, file, sizes):
        found = [f for f in self.findings if f.variant.file == file]
        names = list(dict.fromkeys(n for f in found for t in f.verdict.timings for n in t.others))
        yield ""
        titles = "".join(f"{name:>15s}" for name in ("kernel", *names, "used"))
        yield f"  {'milliseconds':26s}{sizes:>16s}{titles}"
        for variant, _, verdict in found:
            for timing in verdict.timings:
                times = [timing.kernel, *(timing.others.get(name) for name in names)]
                shown = "".join(f"{1e3 * t:15.2f}" if t else f"{'-':>15s}" for t in times)
                size = " x ".join(f"{n:,}" for n in timing.size)
                used = "kernel" if timing.faster else min(timing.others, key=timing.others.get)
                yield f"  {variant!s:26s}{size:>16s}{shown}{used:>15s}"


def _worst(errors):
    return float(np.max(list(errors.values())))


def _line(variant, errors, tolerance):
    worst, limit = _worst(errors), tolerance[variant.dtype]
    state = "right" if worst <= limit else "WRONG"
    return f"  {variant!s:26s} {state}  {worst:.1e}  {limit:.0e}"


def variants() -> list[Variant]:
    """All kernels there are."""
    return [
        *(
            Variant.of(metal_attention.FILE, dtype, head_dim)
            for head_dim in metal_attention.HEAD_DIMS
            for dtype in DTYPES
        ),
        *(Variant.of(metal_log_prob.FILE, dtype) for dtype in DTYPES),
    ]


def diagnose(progress: Callable[[str], None]) -> Diagnosis:
    """Check everything, and keep the verdicts on kernels; `progress` is told what is checked."""
    # First, since a mistake in it should not show after minutes.
    mode, findings, metal = dispatch.mode(), [], dispatch.metal_available()
    for variant in variants():
        progress(f"checking {variant} ...")
        verdict = dispatch.judge(variant) if metal else None
        findings.append(Finding(variant, check_plain(variant), verdict))
    return Diagnosis(dispatch.machine(), mode, metal, findings)
