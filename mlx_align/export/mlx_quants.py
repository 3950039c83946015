"""A merged model in MLX's own quantisation: rounded once, and what no adapter changed as it was."""

from collections.abc import Iterable, Iterator

import mlx.core as mx

from mlx_align.export.fuse import Packed, base_layer
from mlx_align.model.load import LoadedModel

# What --quantize takes for a folder for MLX.
BITS = {"3bit": 3, "4bit": 4, "5bit": 5, "6bit": 6, "8bit": 8}
# How many weights share a scale: the most that fit a row.
GROUP_SIZES = (64, 32)


class Quantiser:
    """Makes the arrays that MLX stores, and notes in `config` how the layers are quantised."""

    def __init__(self, loaded: LoadedModel, bits: int, dtype: mx.Dtype):
        self._layers, self._dtype = _layer_bits(loaded, bits), dtype
        self.config: dict = {"group_size": GROUP_SIZES[0], "bits": bits, "mode": "affine"}

    def arrays(
        self, tensors: Iterable[tuple[str, mx.array | Packed]]
    ) -> Iterator[tuple[str, mx.array]]:
        """(name, array) of all that is stored, for those of `fused_tensors(model, packed=True)`."""
        for name, tensor in tensors:
            layer = name.removesuffix(".weight")
            if layer in self._layers:
                tensor = self._rounded(tensor, self._layers[layer])
            if isinstance(tensor, mx.array):
                yield name, tensor
                continue
            size = {"group_size": tensor.group_size, "bits": tensor.bits, "mode": "affine"}
            if not size.items() <= self.config.items():
                self.config[layer] = size
            yield name, tensor.weight
            yield f"{layer}.scales", tensor.scales
            yield f"{layer}.biases", tensor.biases

    def _rounded(self, matrix: mx.array | Packed, bits: int) -> mx.array | Packed:
        """A matrix in groups; itself where it needs no more bits, or where groups do not fit its rows."""
        if isinstance(matrix, Packed):
            if matrix.bits <= bits:
                return matrix
            matrix = matrix.dense()
        for size in GROUP_SIZES:
            if matrix.shape[-1] % size == 0:
                weight, *heads = mx.quantize(matrix.astype(mx.float32), size, bits)
                return Packed(weight, *(h.astype(self._dtype) for h in heads), bits, size)
        return matrix


def _layer_bits(loaded: LoadedModel, bits: int) -> dict[str, int]:
    """The layers to quantise: those of a quantised base, else those that mlx-lm would.

    What either gives more bits than the rest (routers, say) keeps them.
    """
    usual = (loaded.config.get("quantization") or {}).get("bits")
    choose = getattr(loaded.model, "quant_predicate", None) or (lambda path, layer: True)
    found = {}
    for path, module in loaded.model.named_modules():
        base = base_layer(module)
        if loaded.quantised:
            if "scales" in base:
                found[path] = bits if base.bits == usual else max(bits, base.bits)
        elif hasattr(base, "to_quantized") and (choice := choose(path, base)):
            found[path] = max(bits, choice["bits"]) if isinstance(choice, dict) else bits
    return found
