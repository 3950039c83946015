"""GGUF files that llama.cpp, Ollama and LM Studio run."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter

from mlx_align.export.architectures import (
    check_config,
    find_family,
    gguf_tensors,
    interleave,
    key_heads,
    language_config,
    rotated_heads,
    write_hyperparameters,
)
from mlx_align.export.fuse import Packed
from mlx_align.export.importance import match_importance
from mlx_align.export.quants import EXACT_BITS, is_exact, quantise_tensor, repack
from mlx_align.export.recipe import FILE_TYPES, tensor_types
from mlx_align.export.vocabulary import Vocabulary, read_vocabulary, write_vocabulary
from mlx_align.files import new_file
from mlx_align.model.load import LoadedModel

log = logging.getLogger("mlx_align")


def export_gguf(
    loaded: LoadedModel,
    output: Path,
    *,
    quantise: str = "f16",
    importance: Mapping[str, np.ndarray] | None = None,
    vocabulary: Vocabulary | None = None,
) -> Path:
    """Write the model with its adapter merged in as one GGUF file.

    `quantise` is one of `recipe.FILE_TYPES`; vectors and norms stay float32. `importance` is a matrix
    as `importance` reads or measures it. Layers of a quantised base without an adapter keep their
    weights exactly in q4_1 (up to 4 bits) and q5_1 (up to 5). Everything that llama.cpp could not run
    is refused before anything is written. `vocabulary` stands in for the model's own.
    """
    family, config = find_family(loaded, "GGUF"), language_config(loaded)
    check_config(loaded, family, config)
    vocabulary = vocabulary or read_vocabulary(loaded)
    plan = _plan(loaded, family, config, quantise, importance)
    with new_file(output) as temporary:
        writer = GGUFWriter(str(temporary), MODEL_ARCH_NAMES[family.architecture])
        _write_general(writer, _model_name(loaded.name, vocabulary.rstrip), quantise)
        write_hyperparameters(writer, family, config)
        write_vocabulary(writer, vocabulary)
        for name, shape, tensor_type, *_ in plan:
            size = int(np.prod(shape)) // shape[-1] * _row_bytes(shape[-1], tensor_type)
            stored = (
                shape
                if tensor_type in _PLAIN
                else (*shape[:-1], _row_bytes(shape[-1], tensor_type))
            )
            dtype = np.dtype(_PLAIN.get(tensor_type, np.uint8))
            writer.add_tensor_info(name, stored, dtype, size, raw_dtype=tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        while plan:
            # Taken out of the plan, a merged array is gone once it is written.
            name, _, tensor_type, array, weights = plan.pop(0)
            writer.write_tensor_data(_encode(name, array, tensor_type, weights))
        writer.close()
    return output


_PLAIN = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}


def _row_bytes(width: int, tensor_type) -> int:
    block, size = gguf.GGML_QUANT_SIZES[tensor_type]
    return width // block * size


def _encode(name: str, array: mx.array | Packed, tensor_type, weights) -> np.ndarray:
    if isinstance(array, Packed):
        return repack(array, tensor_type)
    return quantise_tensor(name, np.asarray(array.astype(mx.float32)), tensor_type, weights)


def _plan(loaded, family, config, quantise, importance) -> list[tuple]:
    """(GGUF name, shape, type, array, importance) of every tensor; merged arrays are not computed yet."""
    packed = FILE_TYPES[quantise][1] in EXACT_BITS
    arrays, own_names = {}, {}
    for name, own_name, array in gguf_tensors(loaded, family, config, packed=packed):
        arrays[name], own_names[name] = array, own_name
    types = _choose_types(family, config, arrays, quantise, importance)
    weights = {}
    if importance is not None:
        weights = match_importance(importance, arrays, own_names, types)
    return [(n, a.shape, types[n], a, weights.get(n)) for n, a in arrays.items()]


def _choose_types(family, config, arrays: dict, quantise, importance) -> dict:
    """The type of each tensor; packed arrays that it cannot hold exactly are replaced by dense ones."""
    types = tensor_types(
        quantise,
        {name: array.shape for name, array in arrays.items()},
        architecture=MODEL_ARCH_NAMES[family.architecture],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=key_heads(config),
        experts=config.get("num_local_experts", 0),
        importance=importance is not None,
    )
    packed = {name: array for name, array in arrays.items() if isinstance(array, Packed)}
    base = FILE_TYPES[quantise][1]
    rounded = {name for name in packed if types[name] != GGMLQuantizationType.F32}
    exact = {name for name in rounded if is_exact(packed[name], base)}
    types |= dict.fromkeys(exact, base)
    arrays |= {name: packed[name].dense() for name in packed.keys() - exact}
    if packed:
        log.info(
            "%d layers keep the weights of the quantised base, %d are rounded a second time",
            len(packed) - len(rounded - exact),
            len(rounded - exact),
        )
    return types


def written_matrices(
    loaded: LoadedModel, path: Path
) -> Iterator[tuple[str, Callable[[], mx.array]]]:
    """(name, function that reads it) of every matrix of a model in a file by `export_gguf`, in float32.

    Names, shapes and the order of rows are the model's own; those of experts are stacked.
    """
    family, config = find_family(loaded, "GGUF"), language_config(loaded)
    rotated = rotated_heads(family, config)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for target, name, array in gguf_tensors(loaded, family, config):
        if name is not None and array.ndim > 1:
            yield name, partial(_read, tensors[target], rotated.get(name.rsplit(".", 2)[-2]))


def _read(tensor: gguf.ReaderTensor, heads: int | None) -> mx.array:
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    if heads is not None:
        # Where each row went, as `interleave` says it.
        values = values[np.argsort(np.array(interleave(mx.arange(len(values)), heads)))]
    return mx.array(values)


def _write_general(writer: GGUFWriter, name: str, quantise: str) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[quantise][0])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _model_name(name: str, rstrip: bool) -> str:
    """A name with "phi-3" in it where special tokens swallow spaces, and only there.

    By that llama.cpp's loader decides; without need it asks for tokens that may not be there.
    """
    plain = re.sub(r"(phi)-?(?=3)", r"\1 ", Path(name).name, flags=re.IGNORECASE)
    return f"{plain} (phi-3 tokens)" if rstrip else plain
