"""Weights as the blocks of a few bits that llama.cpp computes with, made as its own quantiser makes them.

Layouts and searches are those of llama.cpp's ggml-quants.c. A search works on groups of 16 or 32
weights, each with a scale of its own, and looks for the scale with the least weighted squared error.
Groups are the columns of [group, N] arrays: in numpy, reductions then add in the reference's order, in
float32 as there, so that the same codes come out. The same functions take MLX arrays, for a GPU, whose
sums differ in the last bit.
"""

import functools
import logging
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Type

from mlx_align.errors import ExportError
from mlx_align.export.fuse import Packed

log = logging.getLogger("mlx_align")

# Weights that are worked on at once: few enough for their arrays to stay near a core, but so many that
# cores seldom wait for each other's turn in Python; and many enough to keep a GPU busy.
CHUNK, GPU_CHUNK = 1 << 18, 1 << 23
# glibc hands arrays of this size back to the system again and again, until a larger one was freed once.
np.empty(64 * CHUNK, np.uint8)
# A GPU's blocks are taken where so many of their bytes are those of the CPU.
GPU_AGREEMENT = 0.99
SUPER_BLOCK = 256
# Codes of so many bits in MLX's affine quantisation fit those of these types.
EXACT_BITS = {Type.Q4_1: (2, 3, 4), Type.Q5_1: (2, 3, 4, 5)}
# A group whose largest weight is below this counts as zero.
_ZERO = 1e-15
# More than any block can hold; the squares in the searches stay far from overflow.
_LARGEST = 32 * 127 * 65504
# Where the half-precision scales lie in a block.
_SCALES = {
    Type.Q8_0: slice(0, 2), Type.Q4_0: slice(0, 2), Type.Q5_0: slice(0, 2),
    Type.Q4_1: slice(0, 4), Type.Q5_1: slice(0, 4), Type.Q4_K: slice(0, 4), Type.Q5_K: slice(0, 4),
    Type.Q2_K: slice(80, 84), Type.Q3_K: slice(108, 110), Type.Q6_K: slice(208, 210),
}  # fmt: skip


def quantise_tensor(
    name: str, values: np.ndarray, kind: Type, importance: np.ndarray | None = None
) -> np.ndarray:
    """float32[..., rows, width] as `kind`: uint8[..., rows, bytes], or float32 or float16 as they are.

    `importance` is what an error in each column weighs, float32[width], or [..., width] where the
    matrices of a stack have their own; F32, F16, BF16 and Q8_0 take no notice of it. Raises
    `ExportError` with the tensor's name where weights are not finite or too large for the type.
    """
    width = values.shape[-1]
    rows = np.ascontiguousarray(values).reshape(-1, width)
    if importance is not None:
        importance = importance.reshape(-1, width).astype(np.float32, copy=False)
    owner = len(rows) // (1 if importance is None else len(importance))
    encode, gpu = _encoder(kind, importance is not None)
    size = gguf.quant_shape_to_byte_shape((width,), kind)[0]
    out = np.empty((len(rows), size), np.uint8)
    step = max(1, (GPU_CHUNK if gpu else CHUNK) // width)

    def fill(start: int) -> None:
        chunk = rows[start : min(start + step, start // owner * owner + owner)]
        peak = np.abs(chunk).max()
        if not np.isfinite(peak):
            raise ExportError(f"{name}: has weights that are not finite numbers")
        blocks = encode(chunk, None if importance is None else importance[start // owner])
        if (kind in _SCALES and peak > _LARGEST) or not np.isfinite(_halves(blocks, kind)).all():
            raise ExportError(
                f"{name}: has weights too large for {kind.name}; f32 or bf16 hold them"
            )
        out[start : start + len(chunk)] = blocks.view(np.uint8).reshape(len(chunk), size)

    starts = [s for o in range(0, len(rows), owner) for s in range(o, o + owner, step)]
    # A GPU takes one chunk after the other, from the thread that MLX knows.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in map(fill, starts) if gpu else pool.map(fill, starts):
            pass
    dtype = {Type.F32: np.float32, Type.F16: np.float16}.get(kind, np.uint8)
    return out.view(dtype).reshape(*values.shape[:-1], -1)


def is_exact(packed: Packed, kind: Type) -> bool:
    """Whether blocks of `kind` can hold the very weights: its codes, and scales in half precision."""
    if packed.bits not in EXACT_BITS[kind] or packed.group_size % 32:
        return False
    parts = (part.astype(mx.float32) for part in (packed.scales, packed.biases))
    return all(mx.array_equal(p.astype(mx.float16).astype(mx.float32), p).item() for p in parts)


def repack(packed: Packed, kind: Type) -> np.ndarray:
    """The same weights as Q4_1 or Q5_1, uint8[..., out, bytes]; see `is_exact`."""
    repeats = packed.group_size // 32
    heads = mx.stack([packed.scales, packed.biases], -1).astype(mx.float16)
    heads = np.asarray(mx.repeat(heads, repeats, axis=-2)).reshape(-1, 2)
    codes = np.asarray(packed.codes()).reshape(-1, 32)
    blocks = _simple_blocks(heads, codes, 4 if kind == Type.Q4_1 else 5)
    return blocks.reshape(*packed.shape[:-1], -1)


def _halves(blocks: np.ndarray, kind: Type) -> np.ndarray:
    """The half-precision numbers among what was written."""
    if kind not in _SCALES:
        return blocks if kind == Type.F16 else np.empty(0)
    blocks = blocks.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
    return np.ascontiguousarray(blocks[:, _SCALES[kind]]).view(np.float16)


def _encoder(kind: Type, weighted: bool) -> tuple[Callable, bool]:
    """(float32[rows, width], float32[width] or None) -> blocks, and whether a GPU makes them."""
    search = _search(kind, weighted)
    if search is None:
        return _on_cpu(lambda rows, _: gguf.quants.quantize(rows, kind)), False
    if _has_gpu() and _gpu_agrees(kind, weighted):
        return _on_gpu(search), True
    return _on_cpu(search), False


def _search(kind: Type, weighted: bool) -> Callable | None:
    """How blocks are made here; None for those that `gguf` makes."""
    return _K_QUANTS.get(kind) or (_WEIGHTED.get(kind) if weighted else None)


def _on_cpu(search: Callable) -> Callable:
    def encode(rows, importance):
        # Divisions by zero are part of the search; where they matter they are masked.
        with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
            return search(rows, importance)

    return encode


@functools.cache
def _on_gpu(search: Callable) -> Callable:
    search = mx.compile(search)

    def encode(rows, importance):
        importance = None if importance is None else mx.array(importance)
        return np.array(search(mx.array(rows), importance))

    return encode


def _has_gpu() -> bool:
    return mx.default_device() == mx.gpu


@functools.cache
def _gpu_agrees(kind: Type, weighted: bool) -> bool:
    """Whether the GPU makes the blocks of some made-up weights as the CPU does."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((64, 4 * SUPER_BLOCK)).astype(np.float32)
    importance = rng.exponential(size=rows.shape[1]).astype(np.float32) if weighted else None
    search = _search(kind, weighted)
    blocks, expected = (make(search)(rows, importance) for make in (_on_gpu, _on_cpu))
    equal = np.mean(blocks == expected)
    if equal < GPU_AGREEMENT:
        log.warning(
            "%s: only %.1f %% of what the GPU makes is right, so the CPU makes the blocks",
            kind.name,
            100 * equal,
        )
    return equal >= GPU_AGREEMENT


# -- numpy and MLX ---------------------------------------------------------------------------------


def _space(x):
    """The module whose functions take x."""
    return mx if isinstance(x, mx.array) else np


def _whole(x):
    """x as one contiguous piece of memory."""
    return mx.contiguous(x) if isinstance(x, mx.array) else np.ascontiguousarray(x)


# -- Scale and minimum: w = scale * code - minimum -------------------------------------------------


@dataclass(frozen=True)
class _Sweep:
    """The scales that are tried: those that spread a group over top + first + step * i codes."""

    first: float
    step: float
    count: int
    absolute: bool = False  # errors count by their size, not by their square

    def spreads(self, top: int) -> list[float]:
        """In float32, as the reference computes them."""
        first, step = np.float32(self.first), np.float32(self.step)
        return [
            float(first + step * np.float32(i) + np.float32(top)) for i in range(self.count + 1)
        ]


_IMPORTANCE_SWEEP = _Sweep(-0.9, 0.05, 36)


def _search_range(x, w, top: int, sweep: _Sweep):
    """Codes 0..top float32[group, N], scales and minima float32[N] (both >= 0) of weighted groups.

    Every spread gives codes, these by least squares a scale and a minimum; the pair with the least
    error stays, and its minimum is where the next spread begins (make_qkx2_quants).
    """
    where = _space(x).where

    def fit(minimum, factor):
        return _round((x - minimum) * factor, 0, top)

    def error(codes, scale, minimum):
        off = codes * scale + minimum - x
        return ((abs(off) if sweep.absolute else off * off) * w).sum(0)

    low, high = _space(x).minimum(x.min(0), 0), x.max(0)
    sum_w, sum_x = w.sum(0), (w * x).sum(0)
    minimum, factor = low, top / (high - low)
    scale = 1 / factor
    least = error(fit(minimum, factor), scale, minimum)
    chosen = minimum, factor
    for spread in sweep.spreads(top):
        factor = spread / (high - minimum)
        codes = fit(minimum, factor)
        wl = w * codes
        sum_l, sum_xl, sum_ll = wl.sum(0), (wl * x).sum(0), (wl * codes).sum(0)
        determinant = sum_w * sum_ll - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_minimum = (sum_ll * sum_x - sum_l * sum_xl) / determinant
        above = new_minimum > 0
        new_minimum = where(above, 0.0, new_minimum)
        new_scale = where(above, sum_xl / sum_ll, new_scale)
        new_error = error(codes, new_scale, new_minimum)
        better = (determinant > 0) & (new_error < least)
        chosen = where(better, minimum, chosen[0]), where(better, factor, chosen[1])
        least = where(better, new_error, least)
        scale = where(better, new_scale, scale)
        minimum = where(better, new_minimum, minimum)
    flat = high == low
    return where(flat, 0.0, fit(*chosen)), where(flat, 0.0, scale), abs(minimum)


def _round(values, low: float, high: float):
    """Whole numbers from low to high; halves go to even ones."""
    return _space(values).clip(_space(values).round(values), low, high)


def _even_steps(values, top: int):
    """Values >= 0 [k, n] as codes 0..top of the unit float32[n] that makes the largest `top`."""
    peak = values.max(0)
    codes = _space(values).where(peak > 0, _round(top / peak * values, 0, top), 0.0)
    return codes, peak / top


def _weighted_steps(values, top: int, weights):
    """`_even_steps` with the unit that has the least weighted squared error (make_qp_quants)."""
    where, peak = _space(values).where, values.max(0)
    factor, least = top / peak, math.inf
    for step in (0, *range(-4, 0), *range(1, 5)):
        new_factor = _shifted(top, step) / peak
        off = values - 1 / new_factor * _round(new_factor * values, 0, top)
        error = (weights * off * off).sum(0)
        better = error < least
        factor = where(better, new_factor, factor)
        least = where(better, error, least)
    codes = _round(factor * values, 0, top)
    codes, unit = _descend(values, weights, codes, -math.inf, top)
    zero = peak < _ZERO
    return where(zero, 0.0, codes), where(zero, 0.0, unit)


def _shifted(top: int, step: int) -> float:
    """So many tenths of a step above the top, in float32."""
    return float(np.float32(top) + np.float32(0.1) * np.float32(step))


def _descend(x, w, codes, low: float, high: float):
    """Change one code after the other where that lessens the error: codes, and scales float32[N].

    Each is set to the value that fits the scale of all others; five times through the group.
    """
    where = _space(x).where
    sum_xl, sum_ll = (w * x * codes).sum(0), (w * codes * codes).sum(0)
    codes = list(codes)
    for _ in range(5):
        for i, (x_i, w_i, code) in enumerate(zip(x, w, codes, strict=True)):
            wx = w_i * x_i
            rest_xl, rest_ll = sum_xl - wx * code, sum_ll - w_i * code * code
            new = _round(x_i * rest_ll / rest_xl, low, high)
            new_xl, new_ll = rest_xl + wx * new, rest_ll + w_i * new * new
            better = new_xl * new_xl * sum_ll > sum_xl * sum_xl * new_ll
            better = better & (rest_xl > 0) & (rest_ll > 0) & (new != code)
            codes[i] = where(better, new, code)
            sum_xl = where(better, new_xl, sum_xl)
            sum_ll = where(better, new_ll, sum_ll)
    return _space(x).stack(codes), where(sum_ll > 0, sum_xl / sum_ll, 0.0)


# -- Scale alone, codes around zero: w = scale * (code - half) -------------------------------------


def _search_signed(x, w, half: int):
    """Codes -half..half-1 float32[group, N] and scales float32[N] of weighted groups.

    The weight furthest from zero gets code -half, or tenths of a step beside it (make_qx_quants).
    """
    where, peak = _space(x).where, _furthest(x)
    wx = w * x
    scale, best, chosen = 0.0, -math.inf, -half / peak
    for step in (0, *range(-9, 0), *range(1, 10)):
        factor = -_shifted(half, step) / peak
        codes = _round(x * factor, -half, half - 1)
        sum_xl, sum_ll = (wx * codes).sum(0), (w * codes * codes).sum(0)
        new_scale = sum_xl / sum_ll
        better = (sum_ll > 0) & (sum_xl * sum_xl > best * sum_ll)
        scale = where(better, new_scale, scale)
        best = where(better, new_scale * sum_xl, best)
        chosen = where(better, factor, chosen)
    return _zeroed(peak, _round(x * chosen, -half, half - 1), scale, half)


def _descend_signed(x, w, half: int):
    """`_search_signed` by changing one code after the other (make_q3_quants)."""
    peak = _furthest(x)
    codes = _round(x * (-half / peak), -half, half - 1)
    return _zeroed(peak, *_descend(x, w, codes, -half, half - 1), half)


def _zeroed(peak, codes, scale, half):
    """Groups of nothing get the lowest code and the scale 0."""
    where, zero = _space(peak).where, abs(peak) < _ZERO
    return where(zero, float(-half), codes), where(zero, 0.0, scale)


def _furthest(x):
    """The first of the values furthest from zero in each column."""
    furthest = x[0]
    for row in x[1:]:
        furthest = _space(x).where(abs(row) > abs(furthest), row, furthest)
    return furthest


def _signed_steps(values, half: int):
    """Values [k, n] as codes -half..half-1 of the unit float32[n] that makes the furthest -half."""
    peak = _furthest(values)
    factor = -half / peak
    return _zeroed(peak, _round(values * factor, -half, half - 1), 1 / factor, half)


# -- Blocks ----------------------------------------------------------------------------------------


def _columns(values, size: int):
    """Runs of so many values side by side, [size, N]: rows as groups, or groups as super-blocks."""
    return _whole(values.reshape(-1, size).T)


def _blocks(codes, width: int):
    """Codes [group, N] as uint8[n, width], one row a block."""
    return codes.astype(_space(codes).uint8).T.reshape(-1, width)


def _weigh(rows, group: int, importance, span: int, factor: float):
    """What errors weigh, [group, N]: importance times sqrt(factor * mean square + square).

    `importance` float32[width] is that of a row; the mean is over `span` weights.
    """
    space, squares = _space(rows), rows * rows
    # One after the other, as the reference adds; a plain sum goes by pairs.
    total = space.cumsum(squares.reshape(-1, span), axis=1)[:, -1]
    mean = total * factor / span
    own = space.tile(_columns(importance, group), len(rows))
    return own * space.sqrt(space.repeat(mean, span // group) + _columns(squares, group))


def _refit(x, minimum, scale, codes, low, high):
    """Codes low..high for scales and minima as they are stored, float32[N] each.

    Where a scale came to nothing its codes do not matter; the reference keeps those of the search.
    """
    return _space(x).where(scale != 0, _round((x + minimum) / scale, low, high), codes)


def _pack(codes, bits: int, run: int):
    """Codes uint8[n, width] of so many bits in bytes: those `run` apart share one, the first lowest."""
    lanes = codes.reshape(len(codes), -1, 8 // bits, run)
    packed = lanes[:, :, 0]
    for i in range(1, 8 // bits):
        packed = packed | (lanes[:, :, i] << (bits * i))
    return packed.reshape(len(codes), -1)


def _join(*parts):
    """Arrays [n, ...] as the bytes of n blocks."""
    space = _space(parts[0])
    return space.concatenate([_whole(part).view(space.uint8) for part in parts], 1)


def _half(values):
    return values.astype(_space(values).float16)


def _single(values):
    return values.astype(_space(values).float32)


def _simple_blocks(heads, codes, bits: int):
    """Blocks of 32 of the types with 4 or 5 bits: heads float16[n, 1 or 2], codes uint8[n, 32]."""
    if bits == 4:
        return _join(heads, _pack(codes, 4, 16))
    return _join(heads, _pack(codes >> 4, 1, 1), _pack(codes & 15, 4, 16))


def _simple_signed(bits: int) -> Callable:
    """Q4_0 and Q5_0 by importance."""

    def encode(rows, importance):
        x, half = _columns(rows, 32), 1 << (bits - 1)
        codes, scale = _search_signed(x, _weigh(rows, 32, importance, rows.shape[1], 1), half)
        return _simple_blocks(_half(scale)[:, None], _blocks(codes + half, 32), bits)

    return encode


def _simple_ranged(bits: int) -> Callable:
    """Q4_1 and Q5_1 by importance."""

    def encode(rows, importance):
        x, top = _columns(rows, 32), (1 << bits) - 1
        w = _weigh(rows, 32, importance, rows.shape[1], 1)
        codes, scale, minimum = _search_range(x, w, top, _IMPORTANCE_SWEEP)
        heads = _half(_space(x).stack([scale, 0 - minimum], 1))
        return _simple_blocks(heads, _blocks(codes, 32), bits)

    return encode


def _fit_ranged(x, w, weighted: bool, top: int, sweep: _Sweep, scale_top: int):
    """Codes uint8[n, 256], codes of scales and of minima uint8[n, k], their units float16[n, 2]."""
    codes, *found = _search_range(x, w, top, _IMPORTANCE_SWEEP if weighted else sweep)
    groups = SUPER_BLOCK // len(x)
    if weighted:
        weights = _columns(w.sum(0), groups)
        steps = [_weighted_steps(_columns(v, groups), scale_top, weights) for v in found]
    else:
        steps = [_even_steps(_columns(v, groups), scale_top) for v in found]
    steps = [(c, _half(unit)) for c, unit in steps]
    scale, minimum = ((c * _single(unit)).T.reshape(-1) for c, unit in steps)
    codes = _refit(x, minimum, scale, codes, 0, top)
    (scales, d), (minima, dmin) = steps
    return (
        _blocks(codes, SUPER_BLOCK),
        _blocks(scales, groups),
        _blocks(minima, groups),
        _space(x).stack([d, dmin], 1),
    )


def _q2_k(rows, importance):
    x = _columns(rows, 16)
    w = abs(x) if importance is None else _weigh(rows, 16, importance, SUPER_BLOCK, 1)
    sweep = _Sweep(-0.5, 0.1, 15, absolute=True)
    codes, scales, minima, units = _fit_ranged(x, w, importance is not None, 3, sweep, 15)
    return _join(scales | (minima << 4), _pack(codes, 2, 32), units)


def _q45_k(bits: int, sweep: _Sweep) -> Callable:
    def encode(rows, importance):
        x = _columns(rows, 32)
        if importance is None:
            w = _space(x).sqrt((x * x).sum(0) / 32) + abs(x)
        else:
            w = _weigh(rows, 32, importance, SUPER_BLOCK, 2)
        top = (1 << bits) - 1
        codes, scales, minima, units = _fit_ranged(x, w, importance is not None, top, sweep, 63)
        # Six bits each: the first four whole, with the others' high bits above them; then their low ones.
        whole = [v[:, :4] | (v[:, 4:] >> 4 << 6) for v in (scales, minima)]
        low = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
        head = _join(units, *whole, low)
        if bits == 4:
            return _join(head, _pack(codes, 4, 32))
        return _join(head, _pack(codes >> 4, 1, 32), _pack(codes & 15, 4, 32))

    return encode


def _q3_k(rows, importance):
    x = _columns(rows, 16)
    if importance is None:
        codes, scale = _descend_signed(x, x * x, 4)
        scales, unit = _signed_steps(_columns(scale, 16), 32)
    else:
        w = _weigh(rows, 16, importance, SUPER_BLOCK, 2)
        codes, scale = _search_signed(x, w, 4)
        scales, unit = _search_signed(_columns(scale, 16), _columns(w.sum(0), 16), 32)
    codes, unit = _fit_signed(x, codes, scales, unit, 4)
    scales = _blocks(scales + 32, 16)
    scales = _join(_pack(scales & 15, 4, 8), _pack(scales >> 4, 2, 4))
    return _join(_pack(codes >> 2, 1, 32), _pack(codes & 3, 2, 32), scales, unit)


def _q6_k(rows, importance):
    space, x = _space(rows), _columns(rows, 16)
    w = x * x if importance is None else space.tile(_columns(importance, 16), len(rows))
    codes, scale = _search_signed(x, w, 32)
    scale = _columns(scale, 16)
    scales, unit = _signed_steps(scale, 128)
    codes, unit = _fit_signed(x, codes, scales, unit, 32)
    codes = _join(_pack(codes & 15, 4, 64), _pack(codes >> 4, 2, 32))
    blocks = _join(codes, scales.T.astype(space.int8), unit)
    return space.where((abs(scale).max(0) < _ZERO)[:, None], space.zeros_like(blocks), blocks)


def _fit_signed(x, codes, scales, unit, half: int):
    """Codes from 0 on, uint8[n, 256], for the scales [16, n] of these units, and those float16[n, 1]."""
    unit = _half(unit)
    scale = (scales * _single(unit)).T.reshape(-1)
    codes = _refit(x, 0, scale, codes, -half, half - 1)
    return _blocks(codes + half, SUPER_BLOCK), unit[:, None]


_K_QUANTS = {
    Type.Q2_K: _q2_k,
    Type.Q3_K: _q3_k,
    Type.Q4_K: _q45_k(4, _Sweep(-1.0, 0.1, 20)),
    Type.Q5_K: _q45_k(5, _Sweep(-0.5, 0.1, 15)),
    Type.Q6_K: _q6_k,
}
_WEIGHTED = {
    Type.Q4_0: _simple_signed(4),
    Type.Q5_0: _simple_signed(5),
    Type.Q4_1: _simple_ranged(4),
    Type.Q5_1: _simple_ranged(5),
}
