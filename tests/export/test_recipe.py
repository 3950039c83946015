"""The types of tensors are those that llama.cpp's own quantiser gave them (golden/make_mixtures.py)."""

import json
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

from mlx_align.export.recipe import tensor_types

MIXTURES = json.loads((Path(__file__).parents[1] / "golden" / "mixtures.json").read_text())


def layers_of(name, row):
    return range(row["layers"]) if "*" in name else [0]


@pytest.mark.parametrize("file_type", next(iter(MIXTURES.values()))["types"])
@pytest.mark.parametrize("model", MIXTURES)
def test_mixtures(model, file_type):
    row = dict(MIXTURES[model])
    expected = {}
    for name, kinds in row.pop("types")[file_type].items():
        kinds = kinds.split()
        for i in layers_of(name, row):
            expected[name.replace("*", str(i))] = kinds[i % len(kinds)]
    shapes = {
        name.replace("*", str(i)): tuple(shape)
        for name, shape in row.pop("shapes").items()
        for i in layers_of(name, row)
    }
    types = tensor_types(file_type, shapes, **row)
    assert {name: kind.name for name, kind in types.items()} == expected


@pytest.mark.parametrize("file_type", ["f32", "f16", "bf16"])
def test_plain_types(file_type):
    shapes = {"token_embd.weight": (4, 7), "output_norm.weight": (7,), "blk.0.attn_q.bias": (7,)}
    shapes |= {"blk.0.ffn_gate_inp.weight": (4, 7), "blk.0.attn_q.weight": (7, 7)}
    row = {"architecture": "llama", "layers": 1, "heads": 1, "kv_heads": 1}
    types = tensor_types(file_type, shapes, **row)
    chosen = GGMLQuantizationType[file_type.upper()]
    assert types["token_embd.weight"] == types["blk.0.attn_q.weight"] == chosen
    assert set(types.values()) == {GGMLQuantizationType.F32, chosen}


@pytest.mark.parametrize("file_type", ["q8_0", "q4_0", "q2_k", "q4_k_m", "q6_k"])
def test_rows_that_fit_no_block_are_in_half_precision(file_type):
    """llama_model_quantize has no type for such a head, and none for such rows beside Q8_0."""
    shapes = {
        "token_embd.weight": (4, 40),
        "output.weight": (4, 40),
        "blk.0.ffn_up.weight": (4, 40),
    }
    row = {"architecture": "llama", "layers": 1, "heads": 1, "kv_heads": 1}
    types = tensor_types(file_type, shapes, **row)
    assert set(types.values()) == {GGMLQuantizationType.F16}
