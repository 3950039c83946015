"""GGUF's quantised blocks as MLX's packed weights, and as floats.

MLX computes w = scale * code + bias over groups of 32 weights here. Blocks that are of that form keep
their codes, so nothing is rounded a second time; the layouts are those of ggml's `ggml-common.h`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Kind

from mlx_align.errors import ModelError
from mlx_align.importer.gguf_file import Tensor

GROUP = 32
# Blocks without such a form (scales for 16 weights, tables of values) are rounded to that many bits.
OTHER_BITS = 8
# Weights decoded at a time: 64 MB of float32.
_CHUNK = 2**24


@dataclass(eq=False)
class Packed:
    """A matrix as MLX packs it: `arrays` are weight uint32[..., in * bits / 32], scales and biases
    [..., in / 32]; `rounding` is None where that is exact, else the sums of squares of what it changed
    and of the weights, float64[2]."""

    arrays: dict[str, mx.array]
    bits: int
    rounding: np.ndarray | None = None


def is_plain(kind: Kind) -> bool:
    """Whether weights of a type are floats, one by one."""
    return kind in _PLAIN


def float_type(kind: Kind) -> mx.Dtype:
    """The smallest type that holds what a tensor's blocks hold besides codes."""
    if kind in _PLAIN:
        return _PLAIN[kind]
    return (
        mx.float16
        if kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0)
        else mx.float32
    )


def to_floats(tensor: Tensor, dtype: mx.Dtype) -> mx.array:
    """The weights as floats of a type, dequantised in float32."""
    if tensor.kind in _PLAIN and _PLAIN[tensor.kind] == dtype:
        array = _plain(tensor).reshape(tensor.shape)
        if not mx.isfinite(array).all():
            raise _not_finite(tensor)
        return array
    rows = [mx.array(values).astype(dtype) for values in _chunks(tensor)]
    return mx.concatenate(rows).reshape(tensor.shape)


def to_packed(tensor: Tensor) -> Packed:
    """The weights of a quantised tensor, packed."""
    return _repack(tensor) if tensor.kind in _LAYOUTS else _round(tensor)


_PLAIN = {Kind.F32: mx.float32, Kind.F16: mx.float16, Kind.BF16: mx.bfloat16}


def _plain(tensor: Tensor) -> mx.array:
    if tensor.kind == Kind.BF16:
        return mx.array(tensor.data.view(np.uint16)).view(mx.bfloat16)
    return mx.array(tensor.data.view(np.float32 if tensor.kind == Kind.F32 else np.float16))


def _row_slices(tensor: Tensor) -> Iterator[np.ndarray]:
    step = max(1, _CHUNK // tensor.shape[-1])
    for start in range(0, len(tensor.data), step):
        yield tensor.data[start : start + step]


def _chunks(tensor: Tensor) -> Iterator[np.ndarray]:
    """The weights, float32, some rows at a time."""
    for data in _row_slices(tensor):
        try:
            with np.errstate(all="ignore"):
                values = gguf.quants.dequantize(data, tensor.kind)
        except NotImplementedError:
            raise ModelError(
                f"the tensor {tensor.name!r} has the type {tensor.kind.name}, which cannot be read; take "
                "a file of another quantisation"
            ) from None
        if not np.isfinite(values).all():
            raise _not_finite(tensor)
        yield values


def _not_finite(tensor: Tensor) -> ModelError:
    return ModelError(
        f"the tensor {tensor.name!r} holds values that are not finite: a damaged file"
    )


def _repack(tensor: Tensor) -> Packed:
    bits, layout = _LAYOUTS[tensor.kind]
    size = gguf.GGML_QUANT_SIZES[tensor.kind][1]
    parts = []
    for data in _row_slices(tensor):
        with np.errstate(all="ignore"):
            codes, scales, biases = layout(data.reshape(-1, size))
        parts.append((_pack(codes.reshape(len(data), -1), bits), scales, biases))
    weight, scales, biases = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
        raise _not_finite(tensor)
    shape = tensor.shape[:-1]
    arrays = {"weight": weight, **_small(scales, biases)}
    return Packed({name: mx.array(a.reshape(*shape, -1)) for name, a in arrays.items()}, bits)


def _small(scales: np.ndarray, biases: np.ndarray) -> dict[str, np.ndarray]:
    """Scales and biases in half precision where they are exact in it."""
    with np.errstate(over="ignore"):
        halves = {"scales": scales.astype(np.float16), "biases": biases.astype(np.float16)}
    exact = (halves["scales"] == scales).all() and (halves["biases"] == biases).all()
    return halves if exact else {"scales": scales, "biases": biases}


def _pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8[rows, in] -> uint32[rows, in * bits / 32], a little-endian stream of bits."""
    if bits == 4:
        stream = codes[:, ::2] | codes[:, 1::2] << 4
    elif bits == 8:
        stream = codes
    else:
        eights = codes.reshape(len(codes), -1, 8).astype(np.uint64)
        words = np.bitwise_or.reduce(eights << np.arange(0, 8 * bits, bits, dtype=np.uint64), -1)
        stream = words[..., None].view(np.uint8)[..., :bits].reshape(len(codes), -1)
    return np.ascontiguousarray(stream).view(np.uint32)


def _halves(blocks: np.ndarray, start: int) -> np.ndarray:
    """The half-precision number at a place of each block, float32[blocks, 1]."""
    return blocks[:, start : start + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(data: np.ndarray) -> np.ndarray:
    """Low halves of all bytes of the last axis, then high halves."""
    return np.concatenate([data & 15, data >> 4], axis=-1)


def _fifth_bits(blocks: np.ndarray, start: int) -> np.ndarray:
    return np.unpackbits(blocks[:, start : start + 4], axis=-1, bitorder="little") << 4


def _q4_0(blocks):
    scale = _halves(blocks, 0)
    return _nibbles(blocks[:, 2:]), scale, -8 * scale


def _q4_1(blocks):
    return _nibbles(blocks[:, 4:]), _halves(blocks, 0), _halves(blocks, 2)


def _q5_0(blocks):
    scale = _halves(blocks, 0)
    return _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2), scale, -16 * scale


def _q5_1(blocks):
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return codes, _halves(blocks, 0), _halves(blocks, 2)


def _q8_0(blocks):
    scale = _halves(blocks, 0)
    return blocks[:, 2:] ^ 128, scale, -128 * scale


def _q4_k(blocks):
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, 32))
    return codes.reshape(len(blocks), -1), *_k_scales(blocks)


def _q5_k(blocks):
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    # Bit k of byte l is the fifth bit of weight 32 k + l.
    high = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return (low | high << 4).reshape(len(blocks), -1), *_k_scales(blocks)


def _k_scales(blocks) -> tuple[np.ndarray, np.ndarray]:
    """Scales and biases, float32[blocks, 8], of the K types' 6-bit scales and minima."""
    low, minima, mixed = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([low & 63, mixed & 15 | low >> 6 << 4], axis=-1)
    minima = np.concatenate([minima & 63, mixed >> 4 | minima >> 6 << 4], axis=-1)
    return _halves(blocks, 0) * scales, -_halves(blocks, 2) * minima


_LAYOUTS = {
    Kind.Q4_0: (4, _q4_0), Kind.Q4_1: (4, _q4_1), Kind.Q5_0: (5, _q5_0), Kind.Q5_1: (5, _q5_1),
    Kind.Q8_0: (8, _q8_0), Kind.Q4_K: (4, _q4_k), Kind.Q5_K: (5, _q5_k),
}  # fmt: skip


def _round(tensor: Tensor) -> Packed:
    parts, rounding = [], np.zeros(2)
    for values in _chunks(tensor):
        weights = mx.array(values)
        packed = mx.quantize(weights, GROUP, OTHER_BITS)
        back = mx.dequantize(*packed, GROUP, OTHER_BITS)
        rounding += [mx.square(x).sum().item() for x in (back - weights, weights)]
        parts.append(packed)
    shape = tensor.shape[:-1]
    names = ("weight", "scales", "biases")
    arrays = {
        name: mx.concatenate(list(arrays)).reshape(*shape, -1)
        for name, arrays in zip(names, zip(*parts, strict=True), strict=True)
    }
    return Packed(arrays, OTHER_BITS, rounding)
