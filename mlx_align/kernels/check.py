"""Checks of attention over packs and of log-probabilities: plain paths and Metal kernels.

On small inputs everything is compared with its definition in float64. `python -m
mlx_align.kernels.check FILE DTYPE HEAD_DIM` does that for one variant's kernels, times them beside what
they would replace, and prints one line of JSON: failure, errors, timings. `dispatch` starts it so.
"""

import functools
import json
import sys
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlx_align.data.packing import Segment
from mlx_align.kernels import reference
from mlx_align.kernels.dispatch import Timing, Variant
from mlx_align.kernels.metal_attention import flash_attention, make_tables
from mlx_align.kernels.metal_log_prob import ratios_of_logits, scores_of_logits
from mlx_align.kernels.token_log_prob import (
    TokenRatios,
    of_kernel,
    plain_log_probs,
    plain_log_ratios,
)
from mlx_align.kernels.tree_attention import dense_mask, plain_attention

# Largest error allowed, relative to the largest value.
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}
# The same for MLX's own operations, which on newer GPUs multiply float32 with ten bits of it (TF32).
PLAIN_TOLERANCE = {**TOLERANCE, "float32": 4e-3}
# A shared prompt below another, tiles cut by segments, and padding.
SEGMENTS = tuple(
    Segment(0, *segment)
    for segment in ((0, 21, -1), (21, 50, 0), (50, 58, 0), (58, 59, 2), (59, 97, -1))
)
TOKENS = 100
LIMITS = ({}, {"window": 7}, {"softcap": 2.0})
# What is timed: (tokens, segments) of attention, (rows, vocabulary) of log-probabilities.
ATTENTION_SIZES = tuple((t, s) for t in (512, 2048, 8192) for s in (1, 4, 16, 64))
LOG_PROB_SIZES = ((64, 32_000), (512, 32_000), (64, 152_000), (512, 152_000))
HEADS, GROUPS = 16, 4
# Scores of all heads that the unfused path may take, in bytes.
UNFUSED_BYTES = 2 * 2**30
REPEATS = 3


def split(tokens: int, count: int) -> tuple:
    """So many segments without parents that fill a row of so many tokens, no two of one length."""
    weights = np.arange(1, count + 1) + count
    ends = np.round(np.cumsum(weights) * tokens / weights.sum()).astype(int).tolist()
    starts = [0, *ends[:-1]]
    return tuple(Segment(0, start, end, -1) for start, end in zip(starts, ends, strict=True))


def check_attention(attention: Callable, dtype: str, head_dim: int) -> dict[str, float]:
    """Largest relative error by quantity of `attention`, called as `plain_attention` is."""
    tables = make_tables(SEGMENTS, 1, TOKENS, 8)
    ends, positions = (np.array(x)[:, :TOKENS] for x in (tables.ends, tables.positions))
    rng = np.random.default_rng(0)
    shapes = [(1, n, TOKENS, head_dim) for n in (4, 2, 2, 4)]
    q, k, v, upstream = (_random(rng, shape, dtype) for shape in shapes)
    errors = {}
    for limits in LIMITS:
        window = limits.get("window")
        # Padding sees nothing here, not even itself, and is to get zeros.
        mask = np.array(dense_mask(positions, ends, window)) & (ends > 0)[:, :, None]
        rest = {"scale": head_dim**-0.5, "softcap": limits.get("softcap")}
        expected = reference.attention(*map(_exact, (q, k, v, upstream)), mask, **rest)

        def out(q, k, v, rest=rest, window=window):
            return attention(q, k, v, SEGMENTS, window=window, **rest)

        (value,), gradients = mx.vjp(out, [q, k, v], [upstream])
        found = dict(zip(("out", "q", "k", "v"), (value, *gradients), strict=True))
        _collect(errors, found, expected)
    return errors


def check_log_probs(score: Callable, ratios: Callable, dtype: str) -> dict[str, float]:
    """Largest relative error by quantity of `score` and `ratios`.

    They are called as `plain_log_probs(..., moments=True)` and `plain_log_ratios` are.
    """
    rng = np.random.default_rng(0)
    logits, other = (_random(rng, (9, 1503), dtype) * 3 for _ in range(2))
    targets, upstream = rng.integers(0, 1503, 9), rng.normal(size=9).astype(np.float32)
    expected = reference.token_log_probs(_exact(logits), targets, upstream)
    fixed = reference.token_log_probs(_exact(other), targets, upstream)
    targets, upstream = mx.array(targets), mx.array(upstream)
    scores = score(logits, targets)
    gradient = mx.grad(lambda z: (score(z, targets).logp * upstream).sum())(logits)
    errors = {}
    found = {"logp": scores.logp, "entropy": scores.entropy, "collision": scores.collision}
    _collect(errors, {**found, "logits": gradient}, expected)
    compared, ratio = ratios(logits, other, targets), expected["logp"] - fixed["logp"]
    found = {"log_ratio": compared.log_ratio, "k3": compared.k3, "entropy": compared.entropy}
    _collect(errors, found, {**expected, "log_ratio": ratio, "k3": np.expm1(-ratio) + ratio})
    return errors


def _random(rng, shape, dtype):
    return mx.array(rng.normal(size=shape).astype(np.float32)).astype(getattr(mx, dtype))


def _exact(x):
    return np.array(x.astype(mx.float32), np.float64)


def _collect(errors, found, expected):
    for name, value in found.items():
        difference = np.abs(_exact(value) - expected[name]).max() / np.abs(expected[name]).max()
        # Unlike max, this keeps a NaN.
        errors[name] = float(np.maximum(errors.get(name, 0.0), difference))


def check_plain(variant: Variant) -> dict[str, float]:
    """Errors of what runs without the kernels."""
    if variant.head_dim:
        return check_attention(plain_attention, variant.dtype, variant.head_dim)
    score = functools.partial(plain_log_probs, moments=True)
    return check_log_probs(score, plain_log_ratios, variant.dtype)


def check_kernel(variant: Variant) -> dict[str, float]:
    """Errors of the kernels."""
    if variant.head_dim:
        return check_attention(flash_attention, variant.dtype, variant.head_dim)

    def score(logits, targets):
        logp, scores = scores_of_logits(logits, targets)
        return of_kernel(scores)._replace(logp=logp)

    def ratios(policy, other, targets):
        return TokenRatios(*ratios_of_logits(policy, other, targets))

    return check_log_probs(score, ratios, variant.dtype)


# -- timings -----------------------------------------------------------------------------------------


def time_attention(dtype: str, head_dim: int, size: tuple[int, int]) -> Timing:
    """Seconds of forward and backward of the kernel, of the segment loop, and unfused with a mask."""
    tokens, count = size
    segments, scale = split(tokens, count), head_dim**-0.5
    rng = np.random.default_rng(0)
    shapes = [(1, n, tokens, head_dim) for n in (HEADS, GROUPS, GROUPS, HEADS)]
    q, k, v, upstream = (_random(rng, shape, dtype) for shape in shapes)

    def seconds(attention):
        def step():
            return mx.vjp(attention, [q, k, v], [upstream])[1]

        return best_seconds(step)

    others = {
        "segment loop": seconds(lambda *qkv: plain_attention(*qkv, segments, scale=scale)),
    }
    if tokens * tokens * HEADS * 4 <= UNFUSED_BYTES:
        tables = make_tables(segments, 1, tokens, 8)
        ends, positions = (np.array(x)[:, :tokens] for x in (tables.ends, tables.positions))
        mask = dense_mask(positions, ends)[:, None]
        others["unfused"] = seconds(
            lambda *qkv: mx.fast.scaled_dot_product_attention(*qkv, scale=scale, mask=mask)
        )
    kernel = seconds(lambda *qkv: flash_attention(*qkv, segments, scale=scale))
    return Timing(size, kernel, others)


def time_log_probs(dtype: str, size: tuple[int, int]) -> Timing:
    """Seconds of forward and backward of the kernel and of MLX's operations."""
    rng = np.random.default_rng(0)
    logits, targets = _random(rng, size, dtype), mx.array(rng.integers(0, size[1], size[0]))

    def seconds(score):
        return best_seconds(lambda: mx.grad(lambda z: score(z, targets)[0].sum())(logits))

    return Timing(size, seconds(scores_of_logits), {"unfused": seconds(plain_log_probs)})


def best_seconds(step: Callable[[], object]) -> float:
    """The shortest of a few runs, after one that warms up."""
    mx.eval(step())
    found = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        mx.eval(step())
        found.append(time.perf_counter() - started)
    return min(found)


def check(variant: Variant) -> dict:
    """Failure, errors and timings of a variant's kernels, as `dispatch` keeps them."""
    errors = check_kernel(variant)
    limit = TOLERANCE[variant.dtype]
    # A NaN is not below the limit either.
    wrong = {name: error for name, error in errors.items() if not error <= limit}
    if wrong:
        what = ", ".join(f"{name} {error:.1e}" for name, error in wrong.items())
        return {"failure": f"it is wrong: {what} (limit {limit:.0e})", "errors": {}, "timings": []}
    if check_kernel(variant) != errors:
        return {"failure": "it gives other numbers the second time", "errors": {}, "timings": []}
    if variant.head_dim:
        time_one = functools.partial(time_attention, variant.dtype, variant.head_dim)
        timings = [time_one(size) for size in ATTENTION_SIZES]
    else:
        timings = [time_log_probs(variant.dtype, size) for size in LOG_PROB_SIZES]
    return {"failure": None, "errors": errors, "timings": timings}


if __name__ == "__main__":
    file, dtype, head_dim = sys.argv[1:]
    sys.stdout.write(json.dumps(check(Variant(file, dtype, int(head_dim)))) + "\n")
