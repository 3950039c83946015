"""The weights of a model with its adapter merged in, tensor by tensor."""

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from mlx_align.errors import ExportError
from mlx_align.model.load import LoadedModel


def fused_tensors(model: nn.Module) -> Iterator[tuple[str, mx.array]]:
    """(name, array) of every weight as the base model names it.

    Layers with an update are merged in float32, quantised ones dequantised first, so that an update
    smaller than a quantisation step is not lost. Other arrays come as they are stored.
    """
    merged = []
    for path, module in model.named_modules():
        if any(path.startswith(parent + ".") for parent in merged):
            continue
        if hasattr(module, "lora_a"):
            merged.append(path)
            base = module.linear if "linear" in module else module.embedding
            yield f"{path}.weight", _merge(module, base)
            if "bias" in base:
                yield f"{path}.bias", base.bias
        elif _is_quantised(module):
            yield f"{path}.weight", _dense(module)
            if "bias" in module:
                yield f"{path}.bias", module.bias
        else:
            for name, value in module.items():
                if isinstance(value, mx.array) and not name.startswith("_"):
                    yield f"{path}.{name}" if path else name, value


def _is_quantised(module) -> bool:
    return "scales" in module and "weight" in module


def _dense(base) -> mx.array:
    """The base layer's matrix, float32 where it was quantised."""
    if not _is_quantised(base):
        return base.weight
    return mx.dequantize(
        base.weight.astype(mx.uint32),
        base.scales if base.mode != "affine" else base.scales.astype(mx.float32),
        None if base.get("biases") is None else base.biases.astype(mx.float32),
        group_size=base.group_size,
        bits=base.bits,
        mode=base.mode,
    ).astype(mx.float32)


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


def check_exportable(loaded: LoadedModel, supported: dict, what: str) -> str:
    """The model type, if it is among `supported`; else `ExportError` that lists those."""
    kind = (loaded.config.get("text_config") or loaded.config)["model_type"]
    if kind not in supported:
        raise ExportError(
            f"{loaded.name}: models of type {kind!r} cannot be written as {what} yet; "
            f"supported: {', '.join(sorted(supported))}"
        )
    return kind
