"""Weights as the blocks of a few bits that llama.cpp computes with, made as its own quantiser makes them.

Layouts and searches are those of llama.cpp's ggml-quants.c. A search works on groups of 16 or 32
weights, each with a scale of its own, and looks for the scale with the least weighted squared error.
Groups are the columns of [group, N] arrays: reductions then add in the reference's order, in float32
as there, so that the same codes come out.
"""

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

# Weights that are worked on at once: few enough for their arrays to stay in a core's cache.
CHUNK = 1 << 16
SUPER_BLOCK = 256
# Codes of so many bits in MLX's affine quantisation fit those of these types.
EXACT_BITS = {Type.Q4_1: (2, 3, 4), Type.Q5_1: (2, 3, 4, 5)}
# A group whose largest weight is below this counts as zero.
_ZERO = np.float32(1e-15)
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
    encode = _encoder(kind, importance is not None)
    size = gguf.quant_shape_to_byte_shape((width,), kind)[0]
    out = np.empty((len(rows), size), np.uint8)
    step = max(1, CHUNK // width)

    def fill(start: int) -> None:
        chunk = rows[start : min(start + step, start // owner * owner + owner)]
        peak = np.abs(chunk).max()
        if not np.isfinite(peak):
            raise ExportError(f"{name}: has weights that are not finite numbers")
        # Divisions by zero are part of the search; where they matter they are masked.
        with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
            blocks = encode(chunk, None if importance is None else importance[start // owner])
        if (kind in _SCALES and peak > _LARGEST) or not np.isfinite(_halves(blocks, kind)).all():
            raise ExportError(
                f"{name}: has weights too large for {kind.name}; f32 or bf16 hold them"
            )
        out[start : start + len(chunk)] = blocks.view(np.uint8).reshape(len(chunk), size)

    starts = [s for o in range(0, len(rows), owner) for s in range(o, o + owner, step)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(fill, starts):
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


def _encoder(kind: Type, weighted: bool) -> Callable:
    """(float32[rows, width], float32[width] or None) -> blocks."""
    if kind in _K_QUANTS:
        return _K_QUANTS[kind]
    if weighted and kind in _WEIGHTED:
        return _WEIGHTED[kind]
    return lambda rows, _: gguf.quants.quantize(rows, kind)


# -- Scale and minimum: w = scale * code - minimum -------------------------------------------------


@dataclass(frozen=True)
class _Sweep:
    """The scales that are tried: those that spread a group over top + first + step * i codes."""

    first: float
    step: float
    count: int
    absolute: bool = False  # errors count by their size, not by their square

    def spreads(self, top: int) -> list[np.float32]:
        first, step = np.float32(self.first), np.float32(self.step)
        return [first + step * np.float32(i) + np.float32(top) for i in range(self.count + 1)]


_IMPORTANCE_SWEEP = _Sweep(-0.9, 0.05, 36)


def _search_range(x: np.ndarray, w: np.ndarray, top: int, sweep: _Sweep):
    """Codes 0..top float32[group, N], scales and minima float32[N] (both >= 0) of weighted groups.

    Every spread gives codes, these by least squares a scale and a minimum; the pair with the least
    error stays, and its minimum is where the next spread begins (make_qkx2_quants).
    """
    low, high = np.minimum(x.min(0), 0), x.max(0)
    sum_w, sum_x = w.sum(0), (w * x).sum(0)
    codes, work, other = np.empty_like(x), np.empty_like(x), np.empty_like(x)

    def error(scale, minimum):
        np.multiply(codes, scale, out=work)
        np.add(work, minimum, out=work)
        np.subtract(work, x, out=work)
        np.abs(work, out=work) if sweep.absolute else np.multiply(work, work, out=work)
        return np.multiply(work, w, out=work).sum(0)

    flat = high == low
    minimum, factor = low, np.float32(top) / (high - low)
    _round(np.subtract(x, minimum, out=codes), factor, 0, top)
    scale = 1 / factor
    least = error(scale, minimum)
    chosen = minimum, factor
    for spread in sweep.spreads(top):
        factor = spread / (high - minimum)
        _round(np.subtract(x, minimum, out=codes), factor, 0, top)
        sum_l = np.multiply(w, codes, out=work).sum(0)
        sum_xl = np.multiply(work, x, out=other).sum(0)
        sum_ll = np.multiply(work, codes, out=work).sum(0)
        determinant = sum_w * sum_ll - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_minimum = (sum_ll * sum_x - sum_l * sum_xl) / determinant
        above = new_minimum > 0
        new_minimum[above] = 0
        new_scale = np.where(above, sum_xl / sum_ll, new_scale)
        new_error = error(new_scale, new_minimum)
        better = (determinant > 0) & (new_error < least)
        chosen = np.where(better, minimum, chosen[0]), np.where(better, factor, chosen[1])
        least = np.where(better, new_error, least)
        scale = np.where(better, new_scale, scale)
        minimum = np.where(better, new_minimum, minimum)
    _round(np.subtract(x, chosen[0], out=codes), chosen[1], 0, top)
    codes[:, flat] = 0
    return codes, np.where(flat, np.float32(0), scale), np.abs(minimum)


def _round(values: np.ndarray, factor: np.ndarray, low: int, high: int) -> np.ndarray:
    """values * factor to whole numbers from low to high, in place; halves go to even ones."""
    np.multiply(values, factor, out=values)
    np.rint(values, out=values)
    np.minimum(values, high, out=values)
    return np.maximum(values, low, out=values)


def _even_steps(values: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Values >= 0 [k, n] as codes 0..top of the unit float32[n] that makes the largest `top`."""
    peak = values.max(0)
    codes = np.where(peak > 0, np.rint(np.float32(top) / peak * values), np.float32(0))
    return np.minimum(codes, top), peak / np.float32(top)


def _weighted_steps(values: np.ndarray, top: int, weights: np.ndarray):
    """`_even_steps` with the unit that has the least weighted squared error (make_qp_quants)."""
    peak = values.max(0)
    factor, least = np.float32(top) / peak, np.full(peak.shape, np.inf, np.float32)
    for step in (0, *range(-4, 0), *range(1, 5)):
        new_factor = (np.float32(0.1) * np.float32(step) + np.float32(top)) / peak
        off = values - 1 / new_factor * np.minimum(np.rint(new_factor * values), top)
        error = (weights * off * off).sum(0)
        better = error < least
        factor = np.where(better, new_factor, factor)
        least = np.where(better, error, least)
    codes = np.minimum(np.rint(factor * values), top)
    unit = _descend(values, weights, codes, -np.inf, top)
    zero = peak < _ZERO
    codes[:, zero], unit[zero] = 0, 0
    return codes, unit


def _descend(x: np.ndarray, w: np.ndarray, codes: np.ndarray, low: float, high: float):
    """Change one code after the other where that lessens the error; returns the scales float32[N].

    Changes `codes` [group, N]. Each is set to the value that fits the scale of all others; at most
    five times through the group.
    """
    sum_xl, sum_ll = (w * x * codes).sum(0), (w * codes * codes).sum(0)
    for _ in range(5):
        changed = False
        for x_i, w_i, code in zip(x, w, codes, strict=True):
            wx = w_i * x_i
            rest_xl, rest_ll = sum_xl - wx * code, sum_ll - w_i * code * code
            new = np.rint(x_i * rest_ll / rest_xl).clip(low, high)
            new_xl, new_ll = rest_xl + wx * new, rest_ll + w_i * new * new
            better = new_xl * new_xl * sum_ll > sum_xl * sum_xl * new_ll
            better &= (rest_xl > 0) & (rest_ll > 0) & (new != code)
            if better.any():
                changed = True
                np.copyto(code, new, where=better)
                np.copyto(sum_xl, new_xl, where=better)
                np.copyto(sum_ll, new_ll, where=better)
        if not changed:
            break
    return np.where(sum_ll > 0, sum_xl / sum_ll, np.float32(0))


# -- Scale alone, codes around zero: w = scale * (code - half) -------------------------------------


def _search_signed(x: np.ndarray, w: np.ndarray, half: int):
    """Codes -half..half-1 float32[group, N] and scales float32[N] of weighted groups.

    The weight furthest from zero gets code -half, or tenths of a step beside it (make_qx_quants).
    """
    peak = _furthest(x)
    wx = w * x
    codes, work = np.empty_like(x), np.empty_like(x)
    scale, best = np.zeros_like(peak), np.full_like(peak, -np.inf)
    chosen = np.float32(-half) / peak
    for step in (0, *range(-9, 0), *range(1, 10)):
        factor = -(np.float32(half) + np.float32(0.1) * np.float32(step)) / peak
        np.copyto(codes, x)
        _round(codes, factor, -half, half - 1)
        sum_xl = np.multiply(wx, codes, out=work).sum(0)
        np.multiply(w, codes, out=work)
        sum_ll = np.multiply(work, codes, out=work).sum(0)
        new_scale = sum_xl / sum_ll
        better = (sum_ll > 0) & (sum_xl * sum_xl > best * sum_ll)
        scale = np.where(better, new_scale, scale)
        best = np.where(better, new_scale * sum_xl, best)
        chosen = np.where(better, factor, chosen)
    np.copyto(codes, x)
    _round(codes, chosen, -half, half - 1)
    return _zeroed(peak, codes, scale, half)


def _descend_signed(x: np.ndarray, w: np.ndarray, half: int):
    """`_search_signed` by changing one code after the other (make_q3_quants)."""
    peak = _furthest(x)
    codes = _round(x.copy(), np.float32(-half) / peak, -half, half - 1)
    return _zeroed(peak, codes, _descend(x, w, codes, -half, half - 1), half)


def _zeroed(peak, codes, scale, half):
    """Groups of nothing get the lowest code and the scale 0."""
    zero = np.abs(peak) < _ZERO
    codes[:, zero], scale[zero] = -half, 0
    return codes, scale


def _furthest(x: np.ndarray) -> np.ndarray:
    """The first of the values furthest from zero in each column."""
    furthest = x[0].copy()
    for row in x[1:]:
        np.copyto(furthest, row, where=np.abs(row) > np.abs(furthest))
    return furthest


def _signed_steps(values: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray]:
    """Values [k, n] as codes -half..half-1 of the unit float32[n] that makes the furthest -half."""
    peak = _furthest(values)
    factor = np.float32(-half) / peak
    return _zeroed(peak, _round(values.copy(), factor, -half, half - 1), 1 / factor, half)


# -- Blocks ----------------------------------------------------------------------------------------


def _columns(rows: np.ndarray, group: int) -> np.ndarray:
    """float32[rows, width] as groups side by side, [group, N]."""
    return np.ascontiguousarray(rows.reshape(-1, group).T)


def _blocks(codes: np.ndarray, width: int) -> np.ndarray:
    """Codes [group, N] as uint8[n, width], one row a block."""
    return codes.astype(np.uint8).T.reshape(-1, width)


def _weigh(rows: np.ndarray, group: int, importance: np.ndarray, span: int, factor: float):
    """What errors weigh, [group, N]: importance times sqrt(factor * mean square + square).

    `importance` float32[width] is that of a row; the mean is over `span` weights.
    """
    squares = rows * rows
    # One after the other, as the reference adds; a plain sum goes by pairs.
    total = np.cumsum(squares.reshape(-1, span), axis=1)[:, -1]
    mean = total * np.float32(factor) / np.float32(span)
    own = np.tile(_columns(importance, group), len(rows))
    return own * np.sqrt(np.repeat(mean, span // group) + _columns(squares, group))


def _refit(x, minimum, scale, codes, low, high):
    """Codes low..high for scales and minima as they are stored, float32[N] each.

    Where a scale came to nothing its codes do not matter; the reference keeps those of the search.
    """
    fitted = x + minimum
    np.divide(fitted, scale, out=fitted)
    np.rint(fitted, out=fitted)
    np.clip(fitted, low, high, out=fitted)
    return np.where(scale != 0, fitted, codes)


def _pack(codes: np.ndarray, bits: int, run: int) -> np.ndarray:
    """Codes uint8[n, width] of so many bits in bytes: those `run` apart share one, the first lowest."""
    lanes = codes.reshape(len(codes), -1, 8 // bits, run)
    packed = lanes[:, :, 0].copy()
    for i in range(1, 8 // bits):
        packed |= lanes[:, :, i] << (bits * i)
    return packed.reshape(len(codes), -1)


def _join(*parts: np.ndarray) -> np.ndarray:
    """Arrays [n, ...] as the bytes of n blocks."""
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts], 1)


def _simple_blocks(heads: np.ndarray, codes: np.ndarray, bits: int) -> np.ndarray:
    """Blocks of 32 of the types with 4 or 5 bits: heads float16[n, 1 or 2], codes uint8[n, 32]."""
    if bits == 4:
        return _join(heads, _pack(codes, 4, 16))
    return _join(heads, _pack(codes >> 4, 1, 1), _pack(codes & 15, 4, 16))


def _simple_signed(bits: int) -> Callable:
    """Q4_0 and Q5_0 by importance."""

    def encode(rows, importance):
        x, half = _columns(rows, 32), 1 << (bits - 1)
        codes, scale = _search_signed(x, _weigh(rows, 32, importance, rows.shape[1], 1), half)
        return _simple_blocks(scale[:, None].astype(np.float16), _blocks(codes + half, 32), bits)

    return encode


def _simple_ranged(bits: int) -> Callable:
    """Q4_1 and Q5_1 by importance."""

    def encode(rows, importance):
        x, top = _columns(rows, 32), (1 << bits) - 1
        w = _weigh(rows, 32, importance, rows.shape[1], 1)
        codes, scale, minimum = _search_range(x, w, top, _IMPORTANCE_SWEEP)
        heads = np.stack([scale, 0 - minimum], 1).astype(np.float16)
        return _simple_blocks(heads, _blocks(codes, 32), bits)

    return encode


def _fit_ranged(x, w, weighted: bool, top: int, sweep: _Sweep, scale_top: int):
    """Codes uint8[n, 256], codes of scales and of minima uint8[n, k], their units float16[n, 2]."""
    codes, *found = _search_range(x, w, top, _IMPORTANCE_SWEEP if weighted else sweep)
    groups = SUPER_BLOCK // len(x)
    if weighted:
        weights = _super_blocks(w.sum(0), groups)
        steps = [_weighted_steps(_super_blocks(v, groups), scale_top, weights) for v in found]
    else:
        steps = [_even_steps(_super_blocks(v, groups), scale_top) for v in found]
    steps = [(c, unit.astype(np.float16)) for c, unit in steps]
    scale, minimum = ((c * unit.astype(np.float32)).T.ravel() for c, unit in steps)
    codes = _refit(x, minimum, scale, codes, 0, top)
    (scales, d), (minima, dmin) = steps
    return (
        _blocks(codes, SUPER_BLOCK),
        scales.T.astype(np.uint8),
        minima.T.astype(np.uint8),
        np.stack([d, dmin], 1),
    )


def _super_blocks(values: np.ndarray, groups: int) -> np.ndarray:
    """What groups have, [N], as [groups in a super-block, super-blocks]."""
    return np.ascontiguousarray(values.reshape(-1, groups).T)


def _q2_k(rows, importance):
    x = _columns(rows, 16)
    w = np.abs(x) if importance is None else _weigh(rows, 16, importance, SUPER_BLOCK, 1)
    sweep = _Sweep(-0.5, 0.1, 15, absolute=True)
    codes, scales, minima, units = _fit_ranged(x, w, importance is not None, 3, sweep, 15)
    return _join(scales | (minima << 4), _pack(codes, 2, 32), units)


def _q45_k(bits: int, sweep: _Sweep) -> Callable:
    def encode(rows, importance):
        x = _columns(rows, 32)
        if importance is None:
            w = np.sqrt((x * x).sum(0) / np.float32(32)) + np.abs(x)
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
        scales, unit = _signed_steps(_super_blocks(scale, 16), 32)
    else:
        w = _weigh(rows, 16, importance, SUPER_BLOCK, 2)
        codes, scale = _search_signed(x, w, 4)
        scales, unit = _search_signed(_super_blocks(scale, 16), _super_blocks(w.sum(0), 16), 32)
    codes, unit = _fit_signed(x, codes, scales, unit, 4)
    scales = _blocks(scales + 32, 16)
    scales = _join(_pack(scales & 15, 4, 8), _pack(scales >> 4, 2, 4))
    return _join(_pack(codes >> 2, 1, 32), _pack(codes & 3, 2, 32), scales, unit)


def _q6_k(rows, importance):
    x = _columns(rows, 16)
    w = x * x if importance is None else np.tile(_columns(importance, 16), len(rows))
    codes, scale = _search_signed(x, w, 32)
    scale = _super_blocks(scale, 16)
    scales, unit = _signed_steps(scale, 128)
    codes, unit = _fit_signed(x, codes, scales, unit, 32)
    codes = _join(_pack(codes & 15, 4, 64), _pack(codes >> 4, 2, 32))
    blocks = _join(codes, scales.T.astype(np.int8), unit)
    blocks[np.abs(scale).max(0) < _ZERO] = 0
    return blocks


def _fit_signed(x, codes, scales, unit, half: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes from 0 on, uint8[n, 256], for the scales [16, n] of these units, and those float16[n, 1]."""
    unit = unit.astype(np.float16)
    scale = (scales * unit.astype(np.float32)).T.ravel()
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
