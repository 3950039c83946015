"""GGUF files that llama.cpp, Ollama and LM Studio run."""

import os
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

from mlx_align.errors import ExportError
from mlx_align.export.fuse import check_exportable, fused_tensors
from mlx_align.export.vocabulary import Vocabulary, read_vocabulary, write_vocabulary
from mlx_align.files import sync_folder
from mlx_align.model.load import LoadedModel

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


def export_gguf(
    loaded: LoadedModel,
    output: Path,
    *,
    quantise: str = "f16",
    vocabulary: Vocabulary | None = None,
) -> Path:
    """Write the model with its adapter merged in as one GGUF file.

    `quantise` is one of `TYPES`; vectors and norms stay float32. Everything that llama.cpp could not
    run is refused before anything is written. `vocabulary` stands in for the model's own.
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
    plan = _plan(loaded, config, names, TYPES[quantise][0])
    try:
        for name, shape, tensor_type, _ in plan:
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
            _, _, tensor_type, array = plan.pop(0)
            writer.write_tensor_data(_encode(array, tensor_type))
        writer.close()
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, output)
        sync_folder(output.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ExportError(f"{output}: cannot be written: {error.strerror or error}") from None
    return output


_PLAIN = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}


def _row_bytes(width: int, tensor_type) -> int:
    block, size = gguf.GGML_QUANT_SIZES[tensor_type]
    return width // block * size


def _encode(array: mx.array, tensor_type) -> np.ndarray:
    values = np.array(array.astype(mx.float32))
    if tensor_type == GGMLQuantizationType.F32:
        return values
    if tensor_type == GGMLQuantizationType.F16:
        return values.astype(np.float16)
    return gguf.quants.quantize(values, tensor_type)


def _plan(loaded, config, names, tensor_type) -> list[tuple]:
    """(GGUF name, shape, type, array) of every tensor; merged arrays are not computed yet."""
    heads = config["num_attention_heads"]
    permuted = {"q_proj": heads, "k_proj": config.get("num_key_value_heads") or heads}
    permutes = ARCHITECTURES[config["model_type"]] == gguf.MODEL_ARCH.LLAMA
    plan = []
    for name, array in fused_tensors(loaded.model):
        if name.endswith("rotary_emb.inv_freq"):
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ExportError(f"{loaded.name}: GGUF has no place for the weight {name}")
        layer = name.rsplit(".", 2)[-2]
        if permutes and layer in permuted:
            array = _interleave(array, permuted[layer])
        keep = array.ndim == 1 or target.endswith("_norm.weight")
        own = GGMLQuantizationType.F32 if keep else tensor_type
        block = gguf.GGML_QUANT_SIZES[own][0]
        if array.shape[-1] % block:
            own = GGMLQuantizationType.F16
        plan.append((target, tuple(array.shape), own, array))
    factors = llama3_factors(config)
    if factors is not None:
        own = GGMLQuantizationType.F32
        plan.append(("rope_freqs.weight", factors.shape, own, mx.array(factors)))
    return plan


def _interleave(weight: mx.array, heads: int) -> mx.array:
    """Rows from "all first halves, all second halves" of a head to pairs, as llama.cpp rotates them."""
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
    writer.add_name(_safe_name(name))
    writer.add_file_type(TYPES[quantise][1])
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


def _safe_name(name: str) -> str:
    """A name without the letters that switch llama.cpp's loader to another vocabulary rule."""
    plain = Path(name).name
    return plain.replace("phi-3", "phi 3").replace("Phi-3", "Phi 3").replace("phi3", "phi 3")
