"""Loading: configs of both spellings, clear words for what is missing."""

import json
import os
import shutil

import mlx.core as mx
import numpy as np
import pytest

from mlx_align import api
from mlx_align.errors import AlignError, ModelError
from mlx_align.model.config import normalise_config
from mlx_align.model.load import load_model
from mlx_align.model.open import open_model

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def test_nested_rope_settings_are_hoisted():
    config = normalise_config({"rope_parameters": {"rope_theta": 5e5, **LLAMA3}})
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {**LLAMA3, "type": "llama3"}
    config = normalise_config({"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}})
    assert config["rope_theta"] == 1e6 and "rope_scaling" not in config


def test_rope_settings_by_layer_type():
    rope = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = normalise_config({"rope_parameters": rope, "layer_types": kinds * 2})
    assert config["rope_theta"] == 1e6 and config["rope_local_base_freq"] == 1e4
    assert config["rope_scaling"]["factor"] == 8.0
    assert config["sliding_window_pattern"] == 6


def test_old_settings_by_layer_type_get_the_new_spelling():
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
    old["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
    assert normalise_config(old)["rope_parameters"] == {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }


def test_a_language_model_inside_says_how_many_tokens_there_are():
    assert normalise_config({"text_config": {"vocab_size": 300}})["vocab_size"] == 300
    given = {"vocab_size": 320, "text_config": {"vocab_size": 300}}
    assert normalise_config(given)["vocab_size"] == 320


def test_old_spelling_gets_the_new_one_beside_it():
    config = normalise_config({"rope_theta": 5e5, "rope_scaling": LLAMA3, "num_experts": 4})
    assert config["rope_parameters"] == {"rope_theta": 5e5, **LLAMA3}
    assert config["num_local_experts"] == 4
    assert normalise_config({"num_local_experts": 4})["num_experts"] == 4
    again = normalise_config(config)
    assert again["rope_parameters"] == config["rope_parameters"]
    assert again["rope_theta"] == 5e5 and again["rope_scaling"]["factor"] == 8.0


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_models_of_transformers_5_compute_with_their_own_frequencies(
    model_folder, tmp_path, family
):
    """The same model, once with the old keys, once with only the new ones."""
    changes = {"rope_theta": 3e5}
    if family == "llama":
        changes["rope_scaling"] = LLAMA3
    old = model_folder(family, **changes)
    new = tmp_path / "new"
    shutil.copytree(old, new)
    config = json.loads((new / "config.json").read_text())
    scaling = config.pop("rope_scaling", {})
    config["rope_parameters"] = {
        "rope_theta": config.pop("rope_theta"),
        "rope_type": "default",
        **scaling,
    }
    if "num_experts" in config:
        config["num_local_experts"] = config.pop("num_experts")
    (new / "config.json").write_text(json.dumps(config))
    tokens = mx.array(np.arange(60))[None]
    a, b = (load_model(str(folder)).model(tokens) for folder in (old, new))
    assert mx.array_equal(a, b)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "it has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "config.json").write_text("{}"), "has no model_type"),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "damaged safetensors"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer cannot be loaded"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "unheard_of"}'),
            "Model type unheard_of not supported",
        ),
    ],
)
def test_broken_folders_say_what_is_missing(model_folder, tmp_path, spoil, words):
    folder = tmp_path / "broken"
    shutil.copytree(model_folder(), folder)
    spoil(folder)
    with pytest.raises(ModelError) as caught:
        load_model(str(folder))
    assert words in str(caught.value) and str(folder) in str(caught.value)


def test_names_that_are_nothing():
    with pytest.raises(ModelError, match="no such model folder"):
        load_model("no/such/folder/here")
    with pytest.raises(ModelError, match="the Hub could not be asked"):
        load_model("nobody/nothing")


def test_float32_on_the_cpu_and_stored_types_elsewhere(model_folder):
    folder = str(model_folder("llama", dtype=mx.bfloat16))
    assert load_model(folder).dtype == mx.float32
    loaded = load_model(folder, "stored")
    assert loaded.dtype == mx.bfloat16
    assert load_model(folder, "float16").model.model.norm.weight.dtype == mx.float16


def test_the_templates_end_of_turn_ends_generation(model_folder):
    # The config knows <|endoftext|> alone; what ends a turn is <|im_end|>.
    loaded = load_model(str(model_folder("qwen2", eos_token_id=0)))
    turn = loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn in loaded.tokenizer.eos_token_ids


def test_an_adapter_without_base_needs_one(tmp_path, model_folder):
    (tmp_path / "adapter_config.json").write_text("{}")
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {"x": mx.zeros(1)})
    with pytest.raises(ModelError, match="give it with --model"):
        open_model(tmp_path)


def spoil_json(name, **changes):
    def spoil(folder):
        values = json.loads((folder / name).read_text())
        for path, value in changes.items():
            *outer, last = path.split("__")
            inside = values
            for key in outer:
                inside = inside[key]
            inside[last] = value
        (folder / name).write_text(json.dumps(values))

    return spoil


def replace_by_pipe(name):
    def spoil(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return spoil


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
HOSTILE = [
    *[
        (spoil_json("config.json", **{key: value}), words)
        for key, value, words in [
            ("num_hidden_layers", 10**9, "no model has more than 1024"),
            ("text_config", {"n_layer": 10**12}, "no model has more than 1024"),
            ("hidden_size", 0, "cannot be loaded"),
            ("hidden_size", 2**62, "cannot be loaded"),
            ("vocab_size", -1, "cannot be loaded"),
            ("num_attention_heads", 0, "cannot be loaded"),
            ("rope_scaling", 3, "rope_scaling is 3, not an object"),
            ("rope_theta", "x", "rope_theta is 'x', not a number"),
            ("rope_theta", float("nan"), "rope_theta is nan, not a number"),
            ("layer_types", {"a": 1}, "not a list"),
            ("sliding_window_pattern", [3], "not an integer or letters"),
            ("quantization_config", {"quant_method": "awq"}, "cannot be loaded"),
            ("model_type", [], "has no model_type"),
            ("model_type", "\ud800", "not valid JSON"),
            ("eos_token_id", {"a": 1}, "not the id of a token"),
            ("model_file", "evil.py", "cannot be loaded"),
            ("a", json.loads("[" * 500 + "]" * 500), "cannot be loaded"),
        ]
    ],
    (spoil_json("tokenizer.json", model={}), "its tokenizer cannot be loaded"),
    (spoil_json("tokenizer.json", model__merges=[["no", "where"]]), "tokenizer cannot be loaded"),
    (spoil_json("tokenizer.json", model__vocab__a=-1), "its tokenizer cannot be loaded"),
    (
        # Takes exponential time, if nothing stops it.
        spoil_json(
            "tokenizer.json",
            pre_tokenizer={**SPLIT, "pattern": {"Regex": "^(([a-z ,])+.)+[A-Z]([a-z])+$"}},
        ),
        "its tokenizer cannot be loaded",
    ),
    (spoil_json("tokenizer_config.json", chat_template=3), "the chat template is no text"),
    (spoil_json("tokenizer_config.json", model_max_length="x"), "its tokenizer cannot be loaded"),
    (replace_by_pipe("tokenizer.json"), "tokenizer.json: not a file"),
    (replace_by_pipe("model-2.safetensors"), "model-2.safetensors: not a file"),
    (replace_by_pipe("generation_config.json"), "generation_config.json: not a file"),
]


def test_periods_of_windows_fit_the_model(model_folder, tmp_path):
    for family, period, words in (
        ("gemma3_text", None, "is 6 for 4 layers"),
        ("gemma3_text", 5, "is 5 for 4 layers"),
        ("gemma3_text", 4, None),
        ("llama", 5, None),
        ("llama", "LLLG", None),
    ):
        folder = tmp_path / f"{family}-{period}"
        shutil.copytree(model_folder(family), folder)
        spoil_json("config.json", sliding_window_pattern=period)(folder)
        if words is None:
            load_model(str(folder))
        else:
            with pytest.raises(ModelError, match=words):
                load_model(str(folder))


@pytest.mark.parametrize(("spoil", "words"), HOSTILE)
def test_hostile_folders_are_refused(model_folder, tmp_path, spoil, words):
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama"), folder)
    spoil(folder)
    with pytest.raises(AlignError, match=words):
        load_model(str(folder))
    with pytest.raises(AlignError, match=words) as caught:
        api.import_model(folder, output=tmp_path / "out")
    assert ".out.tmp" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
