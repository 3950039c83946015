"""Folders in MLX's own quantisation load in mlx-lm, and what no adapter changed is what it was."""

import json

import mlx.core as mx
import numpy as np
import pytest
import tiny

from mlx_align import api
from mlx_align.errors import SettingsError
from mlx_align.export.mlx_quants import BITS
from mlx_align.model.open import open_model

TOKENS = mx.array(np.arange(3, 43)[None] * 7 % 390)
Q = "self_attn.q_proj"


def logits(model):
    return np.array(model(TOKENS).astype(mx.float32))


def by_mlx_lm(folder):
    from mlx_lm.utils import load

    model, _ = load(str(folder))
    return model


@pytest.mark.parametrize("quantize", BITS)
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama-untied", {}),
        ("qwen3_moe", {}),
        ("gemma2", {"hidden_size": 96, "intermediate_size": 72}),
    ],
)
def test_every_matrix_is_rounded_once(model_folder, tmp_path, family, changes, quantize):
    run = tiny.make_adapter(tmp_path / "run", model_folder(family, **changes))
    floats = api.export_model(run, "mlx", output=tmp_path / "floats", dtype="float32")
    exact = mx.load(str(floats / "model.safetensors"))
    model = by_mlx_lm(api.export_model(run, "mlx", quantize=quantize))
    layers = {name: layer for name, layer in model.named_modules() if "scales" in layer}
    assert layers
    for name, layer in layers.items():
        expected = mx.quantize(exact[f"{name}.weight"], layer.group_size, layer.bits)
        assert mx.array_equal(layer.weight, expected[0])
        # mlx-lm gives routers more bits.
        assert layer.bits == (8 if name.endswith("mlp.gate") else BITS[quantize])
    fitting = {n for n, array in exact.items() if array.ndim > 1 and array.shape[-1] % 32 == 0}
    assert fitting == {f"{name}.weight" for name in layers}


def test_a_base_of_more_bits_is_rounded_again(model_folder, tmp_path):
    run = tiny.make_adapter(
        tmp_path / "run", model_folder("qwen3", quantise=(8, 32)), lora_keys=(Q,)
    )
    model = by_mlx_lm(api.export_model(run, "mlx", quantize="4bit"))
    assert {layer.bits for _, layer in model.named_modules() if "scales" in layer} == {4}


def test_what_no_adapter_changed_stays_exactly(model_folder, tmp_path):
    base = model_folder("llama", quantise=(4, 32))
    run = tiny.make_adapter(tmp_path / "run", base, lora_keys=(Q,))
    before, after = (
        mx.load(str(folder / "model.safetensors"))
        for folder in (base, api.export_model(run, "mlx", quantize="4bit"))
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    assert changed and all(Q in name for name in changed)
    finer = mx.load(str(api.export_model(run, "mlx", quantize="8bit") / "model.safetensors"))
    same = {name for name in before if Q not in name}
    assert all(mx.array_equal(before[name], finer[name]) for name in same)
    loaded, _ = open_model(run)
    error = {
        quantize: np.abs(
            logits(by_mlx_lm(run / "export" / f"mlx-{quantize}")) - logits(loaded.model)
        ).max()
        for quantize in ("4bit", "8bit")
    }
    assert error["8bit"] < 0.1 * error["4bit"]


def test_coarse_folders_say_what_they_keep(model_folder, tmp_path, caplog):
    run = tiny.make_adapter(tmp_path / "run", model_folder(), lora_scale=0.02)
    with caplog.at_level("INFO", logger="mlx_align"):
        folder = api.export_model(run, "mlx", quantize="3bit")
    assert "of what the adapter changed" in caplog.text
    assert f"in {folder.name} much of what the adapter changed may be lost" in caplog.text
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"]["bits"] == 3
    assert config["quantization_config"] == config["quantization"]


@pytest.mark.parametrize(
    ("to", "quantize", "why"),
    [
        ("hf", "4bit", "for GGUF and for merged models for MLX"),
        ("peft", "q8_0", "for GGUF and for merged models for MLX"),
        ("mlx", "q4_k_m", "'q4_k_m' is not one of 3bit, 4bit"),
        ("gguf", "4bit", "'4bit' is not one of f32, f16"),
    ],
)
def test_types_that_a_form_does_not_have(model_folder, tmp_path, to, quantize, why):
    run = tiny.make_adapter(tmp_path / "run", model_folder())
    with pytest.raises(SettingsError, match=why):
        api.export_model(run, to, quantize=quantize)
    with pytest.raises(SettingsError, match="dtype: is for folders"):
        api.export_model(run, "gguf", dtype="bfloat16")
    assert not (run / "export").exists()
