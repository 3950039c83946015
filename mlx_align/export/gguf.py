"""GGUF files that llama.cpp, Ollama and LM Studio run."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from mlx_align.errors import ExportError
from mlx_align.export.fuse import Packed, check_exportable, fused_tensors
from mlx_align.export.importance import match_importance
from mlx_align.export.quants import EXACT_BITS, is_exact, quantise_tensor, repack
from mlx_align.export.recipe import FILE_TYPES, tensor_types
from mlx_align.export.vocabulary import Vocabulary, read_vocabulary, write_vocabulary
from mlx_align.files import sync_folder
from mlx_align.model.load import LoadedModel

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
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
    kind = check_exportable(loaded, ARCHITECTURES, "GGUF")
    config = loaded.config.get("text_config") or loaded.config
    _check_config(config, kind, loaded.name)
    vocabulary = vocabulary or read_vocabulary(loaded)
    architecture = ARCHITECTURES[kind]
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    temporary = output.with_name(f".{output.name}.tmp")
    output.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(str(temporary), gguf.MODEL_ARCH_NAMES[architecture])
    _write_keys(writer, config, loaded.name, quantise)
    write_vocabulary(writer, vocabulary)
    plan = _plan(loaded, config, names, quantise, importance)
    try:
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
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, output)
        sync_folder(output.parent)
    except ExportError:
        temporary.unlink(missing_ok=True)
        raise
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ExportError(f"{output}: cannot be written: {error.strerror or error}") from None
    return output


_PLAIN = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}


def _row_bytes(width: int, tensor_type) -> int:
    block, size = gguf.GGML_QUANT_SIZES[tensor_type]
    return width // block * size


def _encode(name: str, array: mx.array | Packed, tensor_type, weights) -> np.ndarray:
    if isinstance(array, Packed):
        return repack(array, tensor_type)
    return quantise_tensor(name, np.asarray(array.astype(mx.float32)), tensor_type, weights)


def _plan(loaded, config, names, quantise, importance) -> list[tuple]:
    """(GGUF name, shape, type, array, importance) of every tensor; merged arrays are not computed yet."""
    rotated, arrays, own_names = rotated_heads(config), {}, {}
    for name, array in fused_tensors(loaded.model, packed=FILE_TYPES[quantise][1] in EXACT_BITS):
        if name.endswith("rotary_emb.inv_freq"):
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ExportError(f"{loaded.name}: GGUF has no place for the weight {name}")
        layer = name.rsplit(".", 2)[-2]
        if layer in rotated:
            array = interleave(array, rotated[layer])
        arrays[target], own_names[target] = array, name
    factors = llama3_factors(config)
    if factors is not None:
        arrays["rope_freqs.weight"] = mx.array(factors)
    types = _choose_types(config, arrays, quantise, importance)
    weights = {}
    if importance is not None:
        weights = match_importance(importance, arrays, own_names, types)
    return [(n, a.shape, types[n], a, weights.get(n)) for n, a in arrays.items()]


def _choose_types(config, arrays: dict, quantise, importance) -> dict:
    """The type of each tensor; packed arrays that it cannot hold exactly are replaced by dense ones."""
    heads = config["num_attention_heads"]
    types = tensor_types(
        quantise,
        {name: array.shape for name, array in arrays.items()},
        architecture=gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config["model_type"]]],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        experts=config.get("num_local_experts") or config.get("num_experts") or 0,
        importance=importance is not None,
    )
    packed = {name: array for name, array in arrays.items() if isinstance(array, Packed)}
    base = FILE_TYPES[quantise][1]
    exact = [name for name, array in packed.items() if is_exact(array, base)]
    types |= dict.fromkeys(exact, base)
    arrays |= {name: array.dense() for name, array in packed.items() if name not in exact}
    if packed:
        log.info(
            "%d layers keep the weights of the quantised base, %d are rounded a second time",
            len(exact),
            len(packed) - len(exact),
        )
    return types


def rotated_heads(config: dict) -> dict[str, int]:
    """The layers whose rows are in another order in llama.cpp, with the number of their heads."""
    if ARCHITECTURES[config["model_type"]] != gguf.MODEL_ARCH.LLAMA:
        return {}
    heads = config["num_attention_heads"]
    return {"q_proj": heads, "k_proj": config.get("num_key_value_heads") or heads}


def interleave(weight: mx.array | Packed, heads: int) -> mx.array | Packed:
    """Rows from "all first halves, all second halves" of a head to pairs, as llama.cpp rotates them."""
    if isinstance(weight, Packed):
        return weight.reordered(lambda part: interleave(part, heads))
    rest = weight.shape[1:]
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *rest).swapaxes(1, 2).reshape(weight.shape)


def _head_dim(config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _rope(config) -> tuple[str, dict]:
    scaling = config.get("rope_scaling") or {}
    return scaling.get("rope_type", scaling.get("type", "default")), scaling


def llama3_factors(config: dict) -> np.ndarray | None:
    """Llama 3's frequency divisors, float32[head_dim / 2]; None for models without that scaling.

    1 for wavelengths below the high-frequency bound, `factor` above the low-frequency one, between
    them blended by the wavelength (as in Meta's reference code for Llama 3.1).
    """
    kind, scaling = _rope(config)
    if kind != "llama3":
        return None
    dim = _head_dim(config)
    factor = scaling["factor"]
    low, high = scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 4.0)
    context = scaling.get("original_max_position_embeddings", 8192)
    wavelength = 2 * np.pi * config["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    smooth = (context / wavelength - low) / (high - low)
    blended = 1 / ((1 - smooth) / factor + smooth)
    divisors = np.where(wavelength > context / low, factor, blended)
    return np.where(wavelength < context / high, 1.0, divisors).astype(np.float32)


def _check_config(config: dict, kind: str, name: str) -> None:
    """Refuse what llama.cpp computes differently from the model."""

    def refuse(what):
        raise ExportError(
            f"{name}: {what}; llama.cpp would compute something else, so no GGUF is written"
        )

    rope, _ = _rope(config)
    if rope not in ("default", "linear", "yarn", "llama3"):
        refuse(f"rope scaling of type {rope!r}")
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        refuse("partial rotary embeddings")
    dim = _head_dim(config)
    if kind == "qwen2" and dim * config["num_attention_heads"] != config["hidden_size"]:
        refuse(f"a head dimension of {dim} that is not hidden size / heads")
    window, context = config.get("sliding_window"), config.get("max_position_embeddings") or 0
    windowed = kind != "qwen2" or config.get("use_sliding_window")
    mixed = "sliding_attention" in (config.get("layer_types") or [])
    if (window and window < context and windowed and kind in ("mistral", "qwen2")) or mixed:
        refuse(f"a sliding window of {window} in a context of {context}")
    if kind == "qwen3" and config.get("use_sliding_window"):
        refuse("a sliding window")


def _write_keys(writer: GGUFWriter, config: dict, name: str, quantise: str) -> None:
    heads, dim = config["num_attention_heads"], _head_dim(config)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(safe_name(name))
    writer.add_file_type(FILE_TYPES[quantise][0])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config.get("max_position_embeddings") or 2048)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    rope, scaling = _rope(config)
    if rope == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    elif rope == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        original = scaling.get("original_max_position_embeddings")
        writer.add_rope_scaling_orig_ctx_len(original or config["max_position_embeddings"])


def safe_name(name: str) -> str:
    """A name without the letters that switch llama.cpp's loader to another vocabulary rule."""
    plain = Path(name).name
    return plain.replace("phi-3", "phi 3").replace("Phi-3", "Phi 3").replace("phi3", "phi 3")
