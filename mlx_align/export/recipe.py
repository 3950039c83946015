"""Which type each tensor of a GGUF file gets: llama.cpp's mixtures, tensor by tensor.

The rules are those of llama_model_quantize (llama-quant.cpp): a file type has a base type, and the
tensors that suffer most from rounding get more bits.
"""

import re
from collections.abc import Mapping

import gguf
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType as File

# What --quantize takes: the number that the file says of itself, and the base type.
FILE_TYPES = {
    "f32": (File.ALL_F32, Type.F32),
    "f16": (File.MOSTLY_F16, Type.F16),
    "bf16": (File.MOSTLY_BF16, Type.BF16),
    "q8_0": (File.MOSTLY_Q8_0, Type.Q8_0),
    "q4_0": (File.MOSTLY_Q4_0, Type.Q4_0),
    "q4_1": (File.MOSTLY_Q4_1, Type.Q4_1),
    "q5_0": (File.MOSTLY_Q5_0, Type.Q5_0),
    "q5_1": (File.MOSTLY_Q5_1, Type.Q5_1),
    "q2_k": (File.MOSTLY_Q2_K, Type.Q2_K),
    "q3_k_m": (File.MOSTLY_Q3_K_M, Type.Q3_K),
    "q4_k_s": (File.MOSTLY_Q4_K_S, Type.Q4_K),
    "q4_k_m": (File.MOSTLY_Q4_K_M, Type.Q4_K),
    "q5_k_s": (File.MOSTLY_Q5_K_S, Type.Q5_K),
    "q5_k_m": (File.MOSTLY_Q5_K_M, Type.Q5_K),
    "q6_k": (File.MOSTLY_Q6_K, Type.Q6_K),
}
PLAIN = (Type.F32, Type.F16, Type.BF16)
# File types that round every weight by itself, whatever it costs.
UNWEIGHTED = ("f32", "f16", "bf16", "q8_0")
# Instead of types with blocks of 256, where a row's length is no multiple of that.
_NARROW = {
    Type.Q2_K: Type.Q4_0, Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0,
}  # fmt: skip
# Matrices that stay float32, by a part of their name: small, and sensitive or no factor of a product.
_KEPT = (
    "_norm.weight", "ffn_gate_inp.weight", "altup", "laurel", "per_layer_model_proj", "ssm_conv1d",
    "shortconv.conv.weight", "position_embd.weight", "token_types.weight", "attn_rel_b.weight",
)  # fmt: skip
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_VALUES = re.compile(r"attn_(v|qkv|kv_b)\.weight")


def tensor_types(
    file_type: str,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    architecture: str,
    layers: int,
    heads: int,
    kv_heads: int,
    experts: int = 0,
    importance: bool = False,
) -> dict[str, Type]:
    """The type of each tensor of a file; `shapes` are numpy's, by GGUF name, rows last.

    `file_type` is one of `FILE_TYPES`, `architecture` GGUF's name of it, `experts` their number (0 in
    a dense model), `importance` whether there is an importance matrix. Rows that fit no block are F16
    (llama.cpp has no rule for some of them and stops).
    """
    base = FILE_TYPES[file_type][1]
    grouped = heads // kv_heads >= 4
    tied = "output.weight" not in shapes
    # llama.cpp's "70B": there the values of many heads are shared, so their bits cost little.
    shared = architecture == "qwen2" or (architecture == "llama" and heads != kv_heads)
    large = layers == 80 and shared
    values = sorted((n for n in shapes if _VALUES.search(n)), key=_layer)

    def more_bits(layer: int, count: int) -> bool:
        """The first and last eighth, and every third layer between."""
        eighth = count // 8
        return layer < eighth or layer >= 7 * count // 8 or (layer - eighth) % 3 == 2

    def mixed(name: str, width: int) -> Type:
        if name == "output.weight" or (tied and name in EMBEDDINGS):
            narrow = width % gguf.GGML_QUANT_SIZES[base][0]
            return Type.Q8_0 if narrow or base == Type.Q8_0 else Type.Q6_K
        if name in EMBEDDINGS:
            return base
        if _VALUES.search(name):
            return value_type(values.index(name))
        if "attn_k.weight" in name:
            return Type.Q8_0 if experts == 8 else base
        if "attn_output.weight" in name:
            if experts == 8:
                return Type.Q5_K if file_type in ("q2_k", "q3_k_m", "q4_k_s", "q4_k_m") else base
            return {"q2_k": Type.Q3_K, "q3_k_m": Type.Q4_K}.get(file_type, base)
        if "ffn_down" in name:
            return down_type(_layer(name))
        return base

    def value_type(index: int) -> Type:
        if experts == 8:
            return Type.Q8_0
        kind = base
        if file_type == "q2_k":
            kind = Type.Q4_K if grouped else Type.Q3_K
        elif file_type == "q3_k_m":
            kind = Type.Q5_K if index < 2 else Type.Q4_K
        elif file_type == "q4_k_s" and index < 4:
            kind = Type.Q5_K
        elif file_type in ("q4_k_m", "q5_k_m") and more_bits(index, len(values)):
            kind = Type.Q6_K
        return Type.Q5_K if large and kind in (Type.Q3_K, Type.Q4_K) else kind

    def down_type(layer: int) -> Type:
        early = layer < layers // 8
        if file_type == "q2_k":
            return Type.Q3_K
        if file_type == "q3_k_m":
            return Type.Q5_K if layer < layers // 16 else Type.Q4_K
        if file_type == "q4_k_s" and early:
            return Type.Q5_K
        if file_type in ("q4_k_m", "q5_k_m") and more_bits(layer, layers):
            return Type.Q6_K
        if file_type in ("q4_0", "q5_0") and importance and early:
            return Type.Q4_1 if file_type == "q4_0" else Type.Q5_1
        return base

    def fit(kind: Type, width: int) -> Type:
        if width % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = _NARROW.get(kind, kind)
        return Type.F16 if width % gguf.GGML_QUANT_SIZES[kind][0] else kind

    types = {}
    for name, shape in shapes.items():
        kept = len(shape) < 2 or not name.endswith("weight") or any(k in name for k in _KEPT)
        if kept:
            types[name] = Type.F32
        elif base in PLAIN:
            types[name] = base
        else:
            types[name] = fit(mixed(name, shape[-1]), shape[-1])
    return types


def _layer(name: str) -> int:
    """The number of a tensor's block."""
    return int(name.split(".")[1])
