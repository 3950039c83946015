"""Fused folders load in mlx-lm and in transformers, and compute what the adapted model computes."""

import contextlib
import itertools
import json
import os
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from mlx_align.errors import ExportError
from mlx_align.export import folder as module
from mlx_align.export.folder import export_folder
from mlx_align.files import new_folder
from mlx_align.model.adapter import AdapterSettings, wear_adapter
from mlx_align.model.load import STORED, load_model

TOKENS = np.arange(3, 43)[None] * 7 % 390


def adapted(model_folder, family, kind="lora", dtype="float32", **changes):
    loaded = load_model(str(model_folder(family, **changes)), dtype)
    adapter = wear_adapter(loaded.model, AdapterSettings(fine_tune=kind, lora_rank=4), seed=0)
    keys = iter(mx.random.split(mx.random.key(3), 200))

    def nudge(x):
        return (x + 0.05 * mx.random.normal(x.shape, key=next(keys))).astype(x.dtype)

    loaded.model.update(tree_map(nudge, adapter.parameters()))
    loaded.model.eval()
    return loaded


def mlx_logits(folder):
    from mlx_lm.utils import load

    model, tokenizer = load(str(folder))
    model.set_dtype(mx.float32)
    return np.array(model(mx.array(TOKENS))), tokenizer


FAMILIES = ["llama", "llama-untied", "llama-biased", "llama-scaled", "qwen2", "qwen3"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_mlx_lm_loads_the_fused_folder(model_folder, tmp_path, family, kind):
    loaded = adapted(model_folder, family, kind)
    expected = np.array(loaded.model(mx.array(TOKENS)))
    out = export_folder(loaded, tmp_path / "fused", flavour="mlx", dtype=None)
    logits, tokenizer = mlx_logits(out)
    assert np.allclose(logits, expected, atol=1e-4)
    assert tokenizer.chat_template == loaded.template.source
    assert set(loaded.tokenizer.eos_token_ids) <= set(tokenizer.eos_token_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same_logits(model_folder, tmp_path, family):
    torch = pytest.importorskip("torch", reason="compared where torch is installed (extra: parity)")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = adapted(model_folder, family)
    out = export_folder(loaded, tmp_path / "fused", flavour="hf", dtype="float32")
    theirs, report = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        logits = theirs(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(logits - np.array(loaded.model(mx.array(TOKENS)))).max() < 1e-4
    text = "Hello there, 12345! 日本語\n"
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.encode(text) == list(loaded.tokenizer.encode(text))
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        loaded.template.render(messages, generation=True)
    )


@pytest.mark.parametrize("quantise", [(4, 32), (8, 64), (3, 32)])
def test_a_quantised_base_loses_nothing_of_the_adapter(model_folder, tmp_path, quantise):
    loaded = adapted(model_folder, "llama", quantise=quantise)
    expected = np.array(loaded.model(mx.array(TOKENS)))
    out = export_folder(loaded, tmp_path / "fused", flavour="mlx", dtype="float32")
    logits, _ = mlx_logits(out)
    assert np.allclose(logits, expected, atol=1e-4)
    assert "quantization" not in json.loads((out / "config.json").read_text())


def test_weights_keep_the_type_they_were_stored_in(model_folder, tmp_path):
    loaded = adapted(model_folder, "llama", dtype=STORED)
    bfloat = adapted(model_folder, "qwen3", dtype=STORED)
    bfloat.model.set_dtype(mx.bfloat16)
    bfloat.dtype = mx.bfloat16
    for model, kind in ((loaded, "float32"), (bfloat, "bfloat16")):
        out = export_folder(model, tmp_path / kind, flavour="hf", dtype=None)
        weights = mx.load(str(out / "model.safetensors"))
        assert {str(w.dtype) for w in weights.values()} == {f"mlx.core.{kind}"}
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == kind


def test_large_models_are_written_in_shards(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 60_000)
    loaded = adapted(model_folder, "llama")
    out = export_folder(loaded, tmp_path / "fused", flavour="hf", dtype=None)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {p.name for p in out.glob("*.safetensors")}
    assert len(files) > 2 and set(index["weight_map"].values()) == files
    logits, _ = mlx_logits(out)
    assert np.allclose(logits, np.array(loaded.model(mx.array(TOKENS))), atol=1e-4)


def test_unknown_types_are_refused_before_anything_is_written(model_folder, tmp_path):
    loaded = load_model(str(model_folder("mamba")))
    with pytest.raises(
        ExportError, match=r"'mamba' cannot be written as a Hugging Face folder.*llama"
    ):
        export_folder(loaded, tmp_path / "out", flavour="hf", dtype=None)
    assert not (tmp_path / "out").exists()


def test_any_type_goes_to_mlx(model_folder, tmp_path):
    loaded = adapted(model_folder, "gemma2")
    out = export_folder(loaded, tmp_path / "fused", flavour="mlx", dtype=None)
    logits, _ = mlx_logits(out)
    assert np.allclose(logits, np.array(loaded.model(mx.array(TOKENS))), atol=1e-4)


def test_the_config_has_both_spellings(model_folder, tmp_path):
    loaded = load_model(str(model_folder("llama-scaled")))
    out = export_folder(loaded, tmp_path / "fused", flavour="hf", dtype=None)
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["rope_scaling"]["factor"] == config["rope_parameters"]["factor"] == 8.0
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_the_licence_comes_along(model_folder, tmp_path):
    base = shutil.copytree(model_folder(), tmp_path / "base")
    for name in ("LICENSE", "licence.md", "NOTICE.txt", "USE_POLICY.md", "other.md"):
        (base / name).write_text(name)
    for flavour in ("mlx", "hf"):
        out = export_folder(load_model(str(base)), tmp_path / flavour, flavour=flavour, dtype=None)
        assert (out / "licence.md").read_text() == "licence.md" and not (out / "other.md").exists()
        assert {"LICENSE", "NOTICE.txt", "USE_POLICY.md"} <= {p.name for p in out.iterdir()}


@pytest.mark.parametrize("moment", range(5))
def test_a_folder_is_never_half_there(tmp_path, monkeypatch, moment):
    final, steps = tmp_path / "final", itertools.count()
    final.mkdir()
    for name in "ab":
        (final / name).write_text("old")

    def stopped(step):
        def run(path, *args, **options):
            if next(steps) == moment:
                if step is shutil.rmtree and path.is_dir():
                    next(path.iterdir()).unlink()
                raise KeyboardInterrupt
            return step(path, *args, **options)

        return run

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", stopped(shutil.rmtree))
        patch.setattr(os, "replace", stopped(os.replace))
        with new_folder(final) as folder:
            for name in "ab":
                (folder / name).write_text("new")
    found = sorted(p.read_text() for p in final.glob("*"))
    assert found in ([], ["old", "old"], ["new", "new"])
    with new_folder(final) as folder:
        (folder / "c").write_text("newer")
    assert [p.name for p in tmp_path.rglob("*")] == ["final", "c"]


def test_a_second_export_replaces_the_first(model_folder, tmp_path):
    loaded = load_model(str(model_folder()))
    out = export_folder(loaded, tmp_path / "fused", flavour="hf", dtype=None)
    (out / "stale.txt").write_text("")
    export_folder(loaded, tmp_path / "fused", flavour="hf", dtype="float16")
    assert not (out / "stale.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["fused"]
