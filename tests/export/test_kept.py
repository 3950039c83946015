"""The share of an adapter's changes that a quantised file keeps."""

import shutil

import gguf
import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten, tree_map

from mlx_align import api
from mlx_align.data.template import make_example
from mlx_align.export.folder import export_folder
from mlx_align.export.gguf import export_gguf, written_matrices
from mlx_align.export.kept import choose_completions, fit_share, kept_share
from mlx_align.model.load import load_model
from mlx_align.model.open import open_model

HEAD, EMBEDDING, Q = "lm_head", "model.embed_tokens", "self_attn.q_proj"
EXAMPLES = [
    make_example(
        list(range(5, 15)), [[20 + i, 33, 7, 90 + i], [8, 9, i]], [[True] * 4, [True] * 3], ""
    )
    for i in range(6)
]


def adapted(model_folder, tmp_path, family="llama", changes=None, scale=1.0, **settings):
    """A model that wears an adapter whose changes are `scale` times the usual."""
    base = model_folder(family, **(changes or {}))
    loaded, adapter = open_model(tiny.make_adapter(tmp_path / "run", base, **settings))
    weights = adapter.weights()
    small = {name: scale * array for name, array in weights.items() if name.endswith("lora_b")}
    adapter.load({**weights, **small}, "test")
    return loaded, adapter


@pytest.mark.parametrize(
    ("family", "changes", "settings"),
    [
        ("llama", {}, {}),
        ("llama-biased", {}, {}),
        ("llama-untied", {}, {"lora_keys": (Q, HEAD)}),
        ("llama-untied", {}, {"lora_keys": (Q, EMBEDDING)}),
        ("qwen2", {}, {"fine_tune": "dora"}),
        ("qwen3", {"quantise": (4, 32)}, {}),
    ],
)
def test_an_exact_file_keeps_all_and_the_base_nothing(
    model_folder, tmp_path, family, changes, settings
):
    loaded, adapter = adapted(model_folder, tmp_path, family, changes, **settings)
    whole = export_gguf(loaded, tmp_path / "whole.gguf", quantise="f32")
    with adapter.off():
        bare = export_gguf(loaded, tmp_path / "bare.gguf", quantise="f32")
    before = adapter.weights()
    assert kept_share(loaded, adapter, whole, EXAMPLES) == pytest.approx((1, 0), abs=1e-3)
    assert kept_share(loaded, adapter, bare, EXAMPLES) == pytest.approx((0, 0), abs=1e-3)
    # The model wears its adapter as before.
    assert all(mx.array_equal(before[name], a) for name, a in adapter.weights().items())
    assert kept_share(loaded, adapter, whole, EXAMPLES) == pytest.approx((1, 0), abs=1e-3)


@pytest.mark.parametrize("flavour", ["mlx", "hf"])
@pytest.mark.parametrize(
    ("family", "settings", "tolerance"),
    # Only matrices are taken from the folder, and all weights are more than that.
    [
        ("llama-untied", {}, 1e-3),
        ("qwen3_moe", {}, 1e-3),
        ("llama", {"fine_tune": "full"}, 0.2),
        ("gpt_oss", {}, 1e-3),
        ("gemma4_text", {}, 1e-3),
        ("mamba", {}, 1e-3),
        ("lfm2", {}, 1e-3),
        ("deepseek_v3", {}, 1e-3),
    ],
)
def test_folders_are_measured_too(model_folder, tmp_path, flavour, family, settings, tolerance):
    if flavour == "hf" and family not in ("llama-untied", "qwen3_moe", "llama"):
        pytest.skip("of a type that is not written for transformers")
    loaded, adapter = adapted(model_folder, tmp_path, family, **settings)
    whole = export_folder(loaded, tmp_path / "whole", flavour=flavour, dtype=None)
    bare = export_folder(
        load_model(loaded.name), tmp_path / "bare", flavour=flavour, dtype="float32"
    )
    assert kept_share(loaded, adapter, whole, EXAMPLES) == pytest.approx((1, 0), abs=1e-3)
    nothing = kept_share(loaded, adapter, bare, EXAMPLES)
    assert nothing == pytest.approx((0, 0), abs=tolerance)


def test_half_an_adapter_is_half_kept(model_folder, tmp_path):
    loaded, adapter = adapted(model_folder, tmp_path, scale=1e-3)
    whole = adapter.weights()
    half = {n: 0.5 * a if n.endswith("lora_b") else a for n, a in whole.items()}
    with adapter.wearing(half):
        path = export_gguf(loaded, tmp_path / "half.gguf", quantise="f32")
    assert kept_share(loaded, adapter, path, EXAMPLES) == pytest.approx((0.5, 0), abs=0.02)


def test_matrices_are_read_as_the_model_has_them(model_folder, tmp_path):
    loaded, _ = adapted(model_folder, tmp_path, "llama-untied")
    path = export_gguf(loaded, tmp_path / "m.gguf", quantise="f32")
    folder = api.export_model(tmp_path / "run", "mlx", output=tmp_path / "mlx")
    own = mx.load(str(folder / "model.safetensors"))
    read = dict(written_matrices(loaded, path))
    assert read.keys() == {name for name, array in own.items() if array.ndim == 2}
    assert all(np.abs(np.array(read[name]() - own[name])).max() < 1e-6 for name in read)


def test_an_update_below_the_grid_of_the_base_is_lost(model_folder, tmp_path, caplog):
    """Weights that lie on the grid of their type are rounded back to where they were."""
    q4_1 = gguf.GGMLQuantizationType.Q4_1
    base = tmp_path / "base"
    shutil.copytree(model_folder("qwen3"), base)
    weights = mx.load(str(base / "model.safetensors"))
    for name, array in weights.items():
        if array.ndim == 2:
            on_grid = gguf.quants.quantize(np.array(array), q4_1)
            weights[name] = mx.array(gguf.quants.dequantize(on_grid, q4_1))
    mx.save_safetensors(str(base / "model.safetensors"), weights, {"format": "mlx"})
    run = tiny.make_adapter(tmp_path / "run", base, lora_scale=0.01)
    with caplog.at_level("INFO", logger="mlx_align"):
        file = api.export_model(run, "gguf", quantize="q4_1")
    assert "of what the adapter changed (16 completions, standard error " in caplog.text
    assert f"in {file.name} much of what the adapter changed may be lost in rounding" in caplog.text
    loaded, adapter = open_model(run)
    coarse = kept_share(loaded, adapter, file, EXAMPLES)
    assert coarse.share + 2 * coarse.error < 0.5
    fine = kept_share(loaded, adapter, api.export_model(run, "gguf", quantize="f16"), EXAMPLES)
    assert fine.share == pytest.approx(1, abs=0.05)


def test_the_share_and_its_error():
    """By drawing noise again and again, more of it where the change is large."""
    draw = np.random.default_rng(0)
    change = draw.normal(size=400)
    moved = [
        fit_share(change, 0.7 * change + 0.5 * np.abs(change) * draw.normal(size=400))
        for _ in range(500)
    ]
    shares, errors = np.array(moved).T
    assert shares.mean() == pytest.approx(0.7, abs=0.01)
    assert errors.mean() == pytest.approx(shares.std(), rel=0.1)
    assert fit_share(0 * change, change) is None


def test_what_is_said(model_folder, tmp_path, caplog):
    adapter = tiny.make_adapter(tmp_path / "run", model_folder())
    with caplog.at_level("INFO", logger="mlx_align"):
        api.export_model(adapter, "gguf", quantize="q8_0")
        assert caplog.messages == ["kept 100 % of what the adapter changed (16 completions)"]
        caplog.clear()
        api.export_model(adapter, "gguf", quantize="f16")
        api.export_model(adapter, "gguf", adapter_only=True)
        api.export_model(adapter, "mlx")
    assert "kept" not in caplog.text


def test_an_adapter_that_changes_nothing(model_folder, tmp_path, caplog):
    folder = tiny.make_adapter(tmp_path / "run", model_folder())
    weights = tree_map(mx.zeros_like, mx.load(str(folder / "adapters.safetensors")))
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    api.export_model(folder, "gguf", quantize="q8_0")
    assert "changes nothing that could be kept" in caplog.text


def test_completions_are_the_held_out_rows_of_a_run(tmp_path):
    run = api.train_model("dpo", steps=1, output=tmp_path / "run").folder
    loaded, _ = open_model(run)
    rows = choose_completions(loaded, run)
    assert len(rows) == 8 and all(len(row.completions) == 2 for row in rows)
    assert {row.origin.rpartition("/")[2].partition(":")[0] for row in rows} == {"valid.jsonl"}
    (run / "run.json").unlink()
    own = choose_completions(loaded, run)
    assert len(own) == 16 and {row.origin for row in own} == {"built in"}


def test_memory_stays_flat(model_folder, tmp_path):
    """Blocks compute with one matrix of the file at a time."""
    changes = {
        "num_hidden_layers": 24,
        "hidden_size": 256,
        "head_dim": 64,
        "intermediate_size": 1024,
    }
    loaded, adapter = adapted(model_folder, tmp_path, "llama", changes)
    path = export_gguf(loaded, tmp_path / "m.gguf", quantise="q8_0")
    whole = sum(array.nbytes for _, array in tree_flatten(loaded.model.parameters()))
    kept_share(loaded, adapter, path, EXAMPLES[:1])
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    kept_share(loaded, adapter, path, EXAMPLES[:1])
    assert mx.get_peak_memory() - before < whole / 4
