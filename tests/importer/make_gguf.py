"""GGUF files of every family and type, written with the `gguf` package and not by our own export."""

import re

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Kind
from llama_cpp import reference_blocks
from mlx.utils import tree_flatten, tree_map

from mlx_align.export.architectures import rope_factors
from mlx_align.export.vocabulary import read_vocabulary, write_vocabulary
from mlx_align.model.load import STORED, load_model

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe", "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3",
    "smollm3": "smollm3", "olmo2": "olmo2",
}  # fmt: skip
PAIRED = ("llama", "mistral", "mixtral", "smollm3")
# What the keys beyond those of all families are called: config name -> key.
KEYS = {
    "mixtral": {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
    "qwen3_moe": {
        "num_experts": "expert_count",
        "num_experts_per_tok": "expert_used_count",
        "moe_intermediate_size": "expert_feed_forward_length",
    },
    "gemma2": {
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
        "sliding_window": "attention.sliding_window",
    },
    "gemma3_text": {
        "sliding_window": "attention.sliding_window",
        "sliding_window_pattern": "attention.sliding_window_pattern",
        "rope_local_base_freq": "rope.freq_base_swa",
    },
    "phi3": {"original_max_position_embeddings": "rope.scaling.original_context_length"},
}


def random_model(model_folder, family, **changes):
    """A tiny model, with norms and biases that differ from their defaults."""
    loaded = load_model(str(model_folder(family, **changes)), STORED)
    keys = iter(mx.random.split(mx.random.key(1), 200))

    def vary(x):
        return x + 0.1 * mx.random.normal(x.shape, key=next(keys)).astype(x.dtype)

    loaded.model.update(
        tree_map(lambda x: vary(x) if x.ndim == 1 else x, loaded.model.parameters())
    )
    mx.eval(loaded.model.parameters())
    return loaded


def write_gguf(
    loaded, path, kind=Kind.F32, kinds=lambda name: None, extra=lambda writer: None, tokenizer=None,
    part=0,
):  # fmt: skip
    """Write `loaded` with matrices of a type; `kinds` may name another type for a tensor, `extra` and
    `tokenizer` (instead of the model's own) are called with the writer. With `part` it is split into
    files of that many tensors."""
    config = loaded.config
    family = config["model_type"]
    architecture = ARCHITECTURES[family]
    writer = gguf.GGUFWriter(str(path), architecture, split_max_tensors=part)
    heads, head_dim = config["num_attention_heads"], config.get("head_dim") or 16
    writer.add_type("model")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * config.get("partial_rotary_factor", 1)))
    if family == "phi3":
        writer.add_sliding_window(0)
    for name, key in KEYS.get(family, {}).items():
        value = config.get(name, 10000.0 if name.endswith("freq") else 4096)
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"{architecture}.{key}", value)
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
        if scaling["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    extra(writer)
    if tokenizer is None:
        write_vocabulary(writer, read_vocabulary(loaded))
    else:
        tokenizer(writer)
    for name, values in _tensors(loaded, family, heads):
        own = kinds(name) or (kind if values.ndim > 1 and "ffn_gate_inp" not in name else Kind.F32)
        writer.add_tensor(name, encode(values, own), raw_dtype=own)
    for name, factors in rope_factors(config).items():
        writer.add_tensor(f"{name}.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(loaded, family, heads):
    architecture = getattr(gguf.MODEL_ARCH, ARCHITECTURES[family].upper())
    names = gguf.get_tensor_name_map(architecture, loaded.config["num_hidden_layers"])
    for path, array in tree_flatten(loaded.model.parameters()):
        values = np.array(array.astype(mx.float32))
        known = re.sub(r"(block_sparse_moe|mlp)\.switch_mlp", "mlp.experts", path)
        name = names.get_name(known, try_suffixes=(".weight", ".bias"))
        assert name is not None, path
        match = re.search(r"\.([qk])_proj\.", path)
        if match and family in PAIRED:
            count = heads if match[1] == "q" else loaded.config["num_key_value_heads"]
            rest = values.shape[1:]
            pairs = values.reshape(count, 2, -1, *rest).swapaxes(1, 2)
            values = np.ascontiguousarray(pairs.reshape(values.shape))
        if family.startswith("gemma") and path.endswith("norm.weight"):
            values = values + np.float32(1)
        yield name, values


def encode(values, kind):
    """Values as the bytes of a type, by numpy or by llama.cpp's own quantiser."""
    if kind == Kind.F32:
        return values
    if kind == Kind.F16:
        return values.astype(np.float16)
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        width = values.shape[-1]
        blocks = reference_blocks(values.reshape(-1, width), kind, np.ones(width))
        return blocks.reshape(*values.shape[:-1], -1)
