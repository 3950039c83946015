"""What is trained, and that taking it off gives the base bit for bit."""

import json

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten, tree_map

from mlx_align.errors import ModelError, SettingsError
from mlx_align.model.adapter import AdapterSettings, load_adapter, wear_adapter
from mlx_align.model.load import load_model
from mlx_align.model.open import open_model

TOKENS = mx.array([[5, 9, 30, 7, 2, 11]])


def nudge(adapter, seed=0):
    keys = iter(mx.random.split(mx.random.key(seed), 1000))
    adapter.model.update(
        tree_map(
            lambda x: x + 0.05 * mx.random.normal(x.shape, key=next(keys)), adapter.parameters()
        )
    )


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("quantise", [None, (4, 32), (8, 32)])
def test_off_is_the_base_bit_for_bit(loaded_model, kind, family, quantise):
    changes = {"quantise": quantise} if quantise else {}
    loaded = loaded_model(family, **changes)
    base = loaded.model(TOKENS)
    adapter = wear_adapter(loaded.model, AdapterSettings(fine_tune=kind), seed=0)
    if kind == "lora":
        assert mx.array_equal(loaded.model(TOKENS), base)  # B is zero
    nudge(adapter)
    worn = loaded.model(TOKENS)
    assert mx.abs(worn - base).max() > 1e-3
    with adapter.off():
        assert mx.array_equal(loaded.model(TOKENS), base)
    assert mx.array_equal(loaded.model(TOKENS), worn)
    with pytest.raises(RuntimeError), adapter.off():
        raise RuntimeError
    assert mx.array_equal(loaded.model(TOKENS), worn)


def test_all_linear_layers_of_all_blocks_and_nothing_else(loaded_model):
    loaded = loaded_model("llama-untied")
    adapter = wear_adapter(loaded.model, AdapterSettings(lora_rank=3), seed=0)
    names = {name.rsplit(".", 1)[0] for name in adapter.weights()}
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert names == {f"model.layers.{i}.{part}" for i in range(2) for part in parts}
    assert adapter.size == sum(x.size for x in adapter.weights().values())


def test_some_layers_and_some_keys(loaded_model):
    loaded = loaded_model()
    settings = AdapterSettings(lora_layers=1, lora_keys=("self_attn.q_proj", "mlp.up_proj"))
    adapter = wear_adapter(loaded.model, settings, seed=0)
    assert {n.rsplit(".", 1)[0] for n in adapter.weights()} == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }


@pytest.mark.parametrize("settings", [{"lora_layers": 0}, {"lora_keys": ("q_proj",)}])
def test_training_nothing_is_an_error_that_lists_the_layers(loaded_model, settings):
    with pytest.raises(SettingsError, match=r"nothing would be trained.*self_attn\.q_proj"):
        wear_adapter(loaded_model().model, AdapterSettings(**settings), seed=0)


def test_quantised_weights_cannot_be_trained_whole(loaded_model):
    loaded = loaded_model("llama", quantise=(4, 32))
    with pytest.raises(SettingsError, match="quantised"):
        wear_adapter(loaded.model, AdapterSettings(fine_tune="full"), seed=0)


def test_dora_refuses_experts_by_name(loaded_model):
    with pytest.raises(SettingsError, match="dora does not support layers of type SwitchLinear"):
        wear_adapter(loaded_model("qwen3_moe").model, AdapterSettings(fine_tune="dora"), seed=0)


def test_the_seed_decides_the_start(loaded_model):
    starts = [
        wear_adapter(loaded_model().model, AdapterSettings(), seed=seed).weights()
        for seed in (1, 1, 2)
    ]
    name = "model.layers.0.self_attn.q_proj.lora_a"
    assert mx.array_equal(starts[0][name], starts[1][name])
    assert not mx.array_equal(starts[0][name], starts[2][name])


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_mlx_lm_reads_what_is_saved(model_folder, tmp_path, kind, family):
    from mlx_lm.utils import load_adapters
    from mlx_lm.utils import load_model as load_plain

    if kind == "dora" and family == "qwen3_moe":
        pytest.skip("neither mlx-lm nor we have DoRA for experts")
    loaded = load_model(str(model_folder(family)))
    settings = AdapterSettings(fine_tune=kind, lora_scale=3.0)
    adapter = wear_adapter(loaded.model, settings, seed=0)
    nudge(adapter)
    adapter.save(tmp_path, settings, {"model": loaded.name})
    other, _ = load_plain(model_folder(family))
    load_adapters(other, str(tmp_path))
    other.eval()
    assert np.allclose(other(TOKENS), loaded.model(TOKENS), atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("lora", ["self_attn.v_proj"]),
        ("dora", ["self_attn.v_proj"]),
        ("lora", ["mlp.up_proj", "model.embed_tokens", "model.layers.0.self_attn.q_proj"]),
    ],
)
def test_we_read_what_mlx_lm_saves(model_folder, tmp_path, kind, keys):
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model as load_plain

    other, _ = load_plain(model_folder())
    lora = {"rank": 4, "scale": 5.0, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(other, 1, lora, use_dora=kind == "dora")
    weights = {
        n: x
        for n, x in tree_flatten(other.parameters())
        if n.split(".")[-1] in ("lora_a", "lora_b", "m")
    }
    weights = {n: x + 0.1 * mx.random.normal(x.shape) for n, x in weights.items()}
    other.load_weights(list(weights.items()), strict=False)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    config = {"fine_tune_type": kind, "num_layers": 1, "lora_parameters": lora}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loaded = load_model(str(model_folder()))
    load_adapter(loaded.model, tmp_path)
    other.eval()
    assert np.allclose(other(TOKENS), loaded.model(TOKENS), atol=2e-5)


def test_misfits_are_all_listed(loaded_model, tmp_path):
    settings = AdapterSettings(lora_keys=("self_attn.q_proj",))
    adapter = wear_adapter(loaded_model().model, settings, seed=0)
    weights = adapter.weights()
    name = "model.layers.0.self_attn.q_proj.lora_a"
    weights[name] = mx.zeros((3, 3))
    weights["model.layers.9.x.lora_a"] = mx.zeros((1,))
    del weights["model.layers.1.self_attn.q_proj.lora_b"]
    with pytest.raises(ModelError) as caught:
        adapter.load(weights, "there")
    for words in (
        "there:",
        "shape (3, 3)",
        "layers.9.x.lora_a: not in this model",
        "lora_b: missing",
    ):
        assert words in str(caught.value)


def test_folders_that_are_no_adapter(loaded_model, tmp_path):
    with pytest.raises(ModelError, match="not an adapter"):
        load_adapter(loaded_model().model, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="not valid JSON"):
        load_adapter(loaded_model().model, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="not a complete adapter"):
        load_adapter(loaded_model().model, tmp_path)


def test_a_run_whose_record_is_broken_is_named(model_folder, tmp_path):
    run = tiny.make_adapter(tmp_path / "run", model_folder())
    for broken in ("{", "[]"):
        (run / "run.json").write_text(broken)
        with pytest.raises(ModelError, match=r"run\.json: not"):
            open_model(run)
