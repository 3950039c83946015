"""Writes mixtures.json: the types that llama.cpp's own llama_model_quantize gives the tensors of models.

    python tests/golden/make_mixtures.py path/to/libllama.so

The library is that of llama.cpp built with BUILD_SHARED_LIBS; parameters are those of its llama.h of
October 2026. The models are of nothing but names, shapes (tiny ones) and the keys that the rules read.
"""

import ctypes
import json
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

FILE = Path(__file__).with_name("mixtures.json")
FTYPES = {
    "q8_0": 7, "q4_0": 2, "q4_1": 3, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_m": 12, "q4_k_s": 14,
    "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18,
}  # fmt: skip


class Params(ctypes.Structure):
    _fields_ = (
        [("nthread", ctypes.c_int32)]
        + [(n, ctypes.c_int) for n in ("ftype", "output_tensor_type", "token_embedding_type")]
        + [(n, ctypes.c_bool) for n in ("allow_requantize", "quantize_output_tensor", "only_copy")]
        + [(n, ctypes.c_bool) for n in ("pure", "keep_split", "dry_run")]
        + [
            (n, ctypes.c_void_p)
            for n in ("imatrix", "kv_overrides", "tt_overrides", "prune_layers")
        ]
        + [("max_buf_size", ctypes.c_size_t)]
    )


class Imatrix(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


def model(
    architecture, layers, heads, kv_heads, *, experts=0, width=256, inner=512, tied=True, **more
):
    """A row of the table: what `tensor_types` is told, and shapes, `*` standing for every layer."""
    block = {"attn_norm": [width], "attn_output": [2, width]}
    if more.get("fused"):
        block |= {"attn_qkv": [6, width], "ffn_up": [4, width], "ffn_down": [2, inner]}
    else:
        block |= {f"attn_{x}": [2, width] for x in "qkv"}
        stack, end = ([experts], "_exps") if experts else ([], "")
        block |= {f"ffn_{x}{end}": [*stack, 2, width] for x in ("gate", "up")}
        block[f"ffn_down{end}"] = [*stack, 2, inner]
        if experts:
            block["ffn_gate_inp"] = [experts, width]
    shapes = {f"blk.*.{name}.weight": shape for name, shape in block.items()}
    shapes |= {"token_embd.weight": [4, width], "output_norm.weight": [width]}
    if not tied:
        shapes["output.weight"] = [4, width]
    return {
        "architecture": architecture, "layers": layers, "heads": heads, "kv_heads": kv_heads,
        "experts": experts, "importance": more.get("importance", False), "shapes": shapes,
    }  # fmt: skip


MODELS = {
    "grouped, tied": model("llama", 16, 32, 8),
    "not grouped, untied": model("llama", 32, 32, 32, tied=False),
    "few layers": model("qwen3", 7, 16, 8),
    "rows of 384": model("qwen2", 24, 14, 2, width=384, tied=False),
    "rows of 384, tied": model("qwen2", 24, 14, 2, width=384),
    "inner rows of 80": model("llama", 9, 4, 4, inner=80, tied=False),
    "70B": model("llama", 80, 64, 8, tied=False),
    "65B": model("llama", 80, 64, 64, tied=False),
    "72B": model("qwen2", 80, 64, 8, tied=False),
    "80 layers of another kind": model("qwen3", 80, 64, 8, tied=False),
    "8 experts": model("llama", 32, 32, 8, experts=8, tied=False),
    "16 experts": model("qwen3moe", 24, 32, 4, experts=16),
    "fused": model("phi3", 32, 32, 32, fused=True, tied=False),
    "gemma2": model("gemma2", 26, 8, 4),
    "importance": model("llama", 32, 32, 8, importance=True, tied=False),
}


def expand(row):
    """The shapes of all tensors by name."""
    return {
        name.replace("*", str(i)): tuple(shape)
        for name, shape in row["shapes"].items()
        for i in range(row["layers"] if "*" in name else 1)
    }


def write_model(path, row):
    writer = gguf.GGUFWriter(str(path), row["architecture"])
    writer.add_context_length(64)
    writer.add_embedding_length(row["shapes"]["token_embd.weight"][-1])
    writer.add_block_count(row["layers"])
    writer.add_feed_forward_length(512)
    writer.add_head_count(row["heads"])
    writer.add_head_count_kv(row["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(4)
    writer.add_sliding_window(8)
    writer.add_rope_scaling_orig_ctx_len(64)
    if row["experts"]:
        writer.add_expert_count(row["experts"])
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(512)
    rng = np.random.default_rng(0)
    for name, shape in expand(row).items():
        writer.add_tensor(name, rng.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantised_types(library, source, target, ftype, row):
    params = library.llama_model_quantize_default_params()
    params.ftype, params.nthread = FTYPES[ftype], 1
    if row["importance"]:
        ones = {n: np.ones(shape[-1], np.float32) for n, shape in expand(row).items()}
        rows = [Imatrix(n.encode(), v.ctypes.data, len(v)) for n, v in ones.items()]
        imatrix = (Imatrix * (len(rows) + 1))(*rows)
        params.imatrix = ctypes.cast(imatrix, ctypes.c_void_p)
    status = library.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    if status:
        raise SystemExit(f"llama_model_quantize: {status}")
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(target).tensors}


def fold(types, row):
    """Types by the names with `*`: one, or one of each layer."""
    folded = {}
    for name in row["shapes"]:
        own = [types[name.replace("*", str(i))] for i in range(row["layers"] if "*" in name else 1)]
        folded[name] = own[0] if len(set(own)) == 1 else " ".join(own)
    return folded


def main():
    library = ctypes.CDLL(sys.argv[1])
    library.llama_model_quantize_default_params.restype = Params
    made = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, row in MODELS.items():
            source = Path(folder) / "source.gguf"
            write_model(source, row)
            types = {}
            for ftype in FTYPES:
                found = quantised_types(library, source, Path(folder) / "target.gguf", ftype, row)
                types[ftype] = fold(found, row)
            made[name] = {**row, "types": types}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in made.items())
    FILE.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main()
