"""The weights of a model with its adapter merged in, tensor by tensor."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix as MLX's affine quantisation stores it: weight = scale * code + bias.

    `weight` uint32[..., out, in * bits / 32] holds the codes; `scales` and `biases` are
    [..., out, in / group_size].
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's own, [..., out, in]."""
        return (*self.scales.shape[:-1], self.scales.shape[-1] * self.group_size)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.scales.ndim

    def reordered(self, order: Callable[[mx.array], mx.array]) -> "Packed":
        """The same with its rows in another order, which `order` gives arrays of any width."""
        parts = (order(part) for part in (self.weight, self.scales, self.biases))
        return Packed(*parts, self.bits, self.group_size)

    def codes(self) -> mx.array:
        """uint8[..., out, in]."""
        ones = mx.ones(self.scales.shape)
        return self._unpacked(ones, 0 * ones).astype(mx.uint8)

    def dense(self) -> mx.array:
        """The matrix in float32."""
        return self._unpacked(self.scales.astype(mx.float32), self.biases.astype(mx.float32))

    def _unpacked(self, scales, biases):
        size = {"group_size": self.group_size, "bits": self.bits}
        return mx.dequantize(self.weight.astype(mx.uint32), scales, biases, **size)


def fused_tensors(
    model: nn.Module, *, packed: bool = False
) -> Iterator[tuple[str, mx.array | Packed]]:
    """(name, array) of every weight as the base model names it.

    Layers with an update are merged in float32, quantised ones dequantised first, so that an update
    smaller than a quantisation step is not lost. Other arrays come as they are stored; with `packed`
    also those that MLX quantised in its affine way.
    """
    merged = []
    for path, module in model.named_modules():
        if any(path.startswith(parent + ".") for parent in merged):
            continue
        if hasattr(module, "lora_a"):
            merged.append(path)
            base = base_layer(module)
            yield f"{path}.weight", _merge(module, base)
            if "bias" in base:
                yield f"{path}.bias", base.bias
        elif _is_quantised(module):
            yield f"{path}.weight", _packed(module) if packed else _dense(module)
            if "bias" in module:
                yield f"{path}.bias", module.bias
        else:
            for name, value in module.items():
                if isinstance(value, mx.array) and not name.startswith("_"):
                    yield f"{path}.{name}" if path else name, value


def base_layer(module: nn.Module) -> nn.Module:
    """The layer below an update; itself where it wears none."""
    if "lora_a" not in module:
        return module
    return module.linear if "linear" in module else module.embedding


def _is_quantised(module) -> bool:
    return "scales" in module and "weight" in module


def _packed(base) -> Packed | mx.array:
    if base.mode != "affine":
        return _dense(base)
    return Packed(base.weight, base.scales, base.biases, base.bits, base.group_size)


def _dense(base) -> mx.array:
    """The base layer's matrix, float32 where it was quantised."""
    if not _is_quantised(base):
        return base.weight
    if base.mode == "affine":
        return _packed(base).dense()
    size = {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}
    weight = base.weight.astype(mx.uint32)
    return mx.dequantize(weight, base.scales, base.get("biases"), **size).astype(mx.float32)


def _merge(layer, base) -> mx.array:
    """The matrix that does what an adapted layer does, in float32."""
    weight = _dense(base).astype(mx.float32)
    a, b = layer.lora_a.astype(mx.float32), layer.lora_b.astype(mx.float32)
    if a.ndim == 3:
        # Stacked experts: a is [E, r, in], b is [E, out, r].
        return weight + layer.scale * (b @ a)
    if "embedding" in layer:
        return weight + layer.scale * (a @ b)
    weight = weight + layer.scale * (b.T @ a.T)
    if "m" in layer:
        # DoRA (Liu et al. 2024, arXiv:2402.09353, equation 5): a direction and its own magnitude.
        weight = (layer.m.astype(mx.float32) / mx.linalg.norm(weight, axis=1))[:, None] * weight
    return weight
