"""What an error in each input of a linear layer costs: the mean of that input's squares over a text.

An importance matrix is {name of a weight: float32[in], or [experts, in] for stacked experts}.
"""

import logging
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_align.errors import DataError, ExportError
from mlx_align.export.fuse import base_layer
from mlx_align.export.recipe import EMBEDDINGS, PLAIN
from mlx_align.model.load import LoadedModel

log = logging.getLogger("mlx_align")

# Tokens in one pass of the model, as llama-imatrix takes them.
WINDOW = 512
_SUMS, _COUNTS = ".in_sum2", ".counts"


def read_imatrix(path: Path) -> dict[str, np.ndarray]:
    """The importance matrix that llama-imatrix wrote, by GGUF names, in its GGUF or older format.

    Raises `DataError` where the file is neither, or has values that are not finite or below zero.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        matrix = _read_gguf(path) if content[:4] == b"GGUF" else _read_older(content)
    except (ValueError, KeyError, IndexError, struct.error):
        raise DataError(f"{path}: is not an importance matrix as llama-imatrix writes it") from None
    if not matrix:
        raise DataError(f"{path}: is an importance matrix without entries")
    for name, values in matrix.items():
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise DataError(f"{path}: {name} has values that are not finite or below zero")
    return matrix


def _read_gguf(path: Path) -> dict[str, np.ndarray]:
    """Sums of squares and numbers of tokens; an expert that saw none counts evenly."""
    tensors = {t.name: np.array(t.data, np.float32) for t in gguf.GGUFReader(path).tensors}
    names = [name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)]
    return {name: _means(tensors[name + _SUMS], tensors[name + _COUNTS]) for name in names}


def _read_older(content: bytes) -> dict[str, np.ndarray]:
    """int32 entries; of each: int32 length, name, int32 calls, int32 values, float32 calls * means."""
    matrix, place = {}, 4
    for _ in range(*struct.unpack_from("<i", content)):
        (length,) = struct.unpack_from("<i", content, place)
        name = content[place + 4 : place + 4 + length].decode()
        calls, count = struct.unpack_from("<2i", content, place + 4 + length)
        if min(length, count) < 1:
            raise ValueError("empty entry")
        place += 12 + length
        values = np.frombuffer(content, "<f4", count, place)
        matrix[name] = values / np.float32(max(calls, 1))
        place += values.nbytes
    return matrix


def _means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[rows, in] sums over so many values each, as means; ones where there was no value."""
    counts = counts.reshape(-1, 1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1))


def match_importance(
    matrix: Mapping[str, np.ndarray], arrays: Mapping, own_names: Mapping[str, str], types: Mapping
) -> dict[str, np.ndarray]:
    """The entries for the tensors that are quantised, by their GGUF names.

    An entry goes by the tensor's GGUF name or by its `own_names`. Raises `ExportError` where one has
    another size than the tensor's rows, or where none is found.
    """
    quantised = [name for name in arrays if types[name] not in PLAIN]
    found = {}
    for name in quantised:
        values = matrix.get(name, matrix.get(own_names.get(name)))
        if values is None:
            continue
        *stack, _, width = arrays[name].shape
        if values.size == math.prod(stack) * width:
            found[name] = values
        elif name not in EMBEDDINGS:
            raise ExportError(
                f"{name}: its importance has {values.size} values, not {math.prod(stack) * width}; "
                "the importance matrix is of another model"
            )
    if quantised and not found:
        raise ExportError(
            f"the importance matrix has no entry for any tensor, such as {quantised[0]}"
        )
    log.info("importance is known of %d of %d quantised tensors", len(found), len(quantised))
    return found


def measure_importance(loaded: LoadedModel, path: Path) -> dict[str, np.ndarray]:
    """The importance matrix of the layers in a model's blocks, by the model's names, over a text file.

    The text is read in windows of `WINDOW` tokens, or of the model's context. Embedding and head have
    no entry, as in llama-imatrix.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text: {error}") from None
    # Not verbose: that a text is longer than the context is of no interest here.
    ids = loaded.tokenizer.encode(text, verbose=False)
    window = min(WINDOW, loaded.context_length or WINDOW)
    if len(ids) < window:
        raise DataError(f"{path}: has {len(ids)} tokens; at least {window} are needed")
    layers = _linear_layers(loaded.model)
    recorders = {name: _Recorder(layer) for name, layer in layers.items()}
    loaded.model.update_modules(tree_unflatten(list(recorders.items())))
    try:
        for start in range(0, len(ids) - window + 1, window):
            loaded.model(mx.array([ids[start : start + window]]))
            mx.eval([(r.sums, r.counts) for r in recorders.values()])
    finally:
        loaded.model.update_modules(tree_unflatten(list(layers.items())))
    log.info("importance measured over %d windows of %d tokens", len(ids) // window, window)
    return {f"{name}.weight": recorder.means() for name, recorder in recorders.items()}


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers in the model's blocks by name, adapted ones as a whole."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    kinds = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
    inside = {id(m) for block in model.layers for m in block.modules()}
    layers = {}
    for name, module in model.named_modules():
        linear = isinstance(module, kinds) or "lora_a" in module
        part = any(name.startswith(parent + ".") for parent in layers)
        if linear and not part and id(module) in inside:
            layers[name] = module
    return layers


class _Recorder(nn.Module):
    """Stands in for a linear layer and sums the squares of its inputs, float32 [1 or experts, in]."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.experts = getattr(base_layer(layer), "num_experts", 1)
        self.sums = self.counts = mx.zeros((self.experts, 1))

    def __call__(self, x, experts=None, **options):
        squares = mx.square(x.astype(mx.float32))
        if experts is None:
            rows = squares.reshape(-1, x.shape[-1])
            self.sums = self.sums + rows.sum(0)
            self.counts = self.counts + len(rows)
            return self.layer(x)
        # x is [..., 1, in], the same for all experts of a token or one for each.
        rows = mx.broadcast_to(squares.squeeze(-2), (*experts.shape, x.shape[-1]))
        sums = mx.zeros((self.experts, x.shape[-1]))
        chosen = experts.flatten()
        self.sums = self.sums + sums.at[chosen].add(rows.reshape(-1, x.shape[-1]))
        self.counts = self.counts.at[chosen].add(1)
        return self.layer(x, experts, **options)

    def means(self) -> np.ndarray:
        means = _means(np.array(self.sums), np.array(self.counts))
        return means if self.experts > 1 else means[0]
