"""Every family of models: llama.cpp and transformers compute from our files what MLX computes."""

import json

import hugging_face
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from llama_cpp import Server
from test_folder import adapted
from test_gguf import close_or_tied, fields

from mlx_align.errors import ExportError
from mlx_align.export.folder import export_folder
from mlx_align.export.gguf import export_gguf
from mlx_align.model.load import load_model

IDS = [5 + 7 * i % 380 for i in range(40)]
# Written by mlx-lm's own classes, in the spelling of older configs.
OF_MLX = ["mixtral", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "phi3-long", "smollm3", "olmo2"]


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory):
    """make(name) -> folder of a tiny model saved by transformers, made once."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = hugging_face.save_model(tmp_path_factory.mktemp(name), name)
        return made[name]

    return make


@pytest.fixture
def source(request, saved_model, model_folder):
    """make(family, **changes) -> folder, of a model of transformers or of mlx-lm."""
    return saved_model if request.param == "transformers" else model_folder


SOURCES = pytest.mark.parametrize(
    ("source", "family"),
    [
        *[("transformers", name) for name in hugging_face.MODELS],
        *[("mlx-lm", name) for name in OF_MLX],
    ],
    indirect=["source"],
)


@pytest.fixture
def tabled_gelu(monkeypatch):
    """GELU as llama.cpp computes it on a CPU: from a table of half precision."""
    exact = nn.gelu_approx

    def rounded(x):
        table = exact(x.astype(mx.float16).astype(mx.float32)).astype(mx.float16)
        return mx.where(x > 10, x, mx.where(x < -10, 0, table))

    monkeypatch.setattr(nn, "gelu_approx", rounded)


def log_probs(loaded):
    logits = loaded.model(mx.array([IDS]))[0, -1]
    return np.array(logits - mx.logsumexp(logits))


@SOURCES
@pytest.mark.usefixtures("tabled_gelu")
def test_llama_cpp_computes_the_same(source, tmp_path, family):
    loaded = adapted(source, family)
    server = Server(export_gguf(loaded, tmp_path / "m.gguf", quantise="f32"))
    expected = log_probs(loaded)
    # Where an input of the GELU lies between two entries of the table, the two may choose differently.
    tolerance = 3e-3 if family.startswith("gemma") else 1e-4
    found = server.all_log_probs(IDS, len(expected))
    assert np.abs(found - expected).max() < tolerance
    prompts = IDS[:7], IDS[3:30], IDS
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(12):
            tokens.append(int(mx.argmax(loaded.model(mx.array([tokens]))[0, -1])))
        own = tokens[len(prompt) :]
        assert close_or_tied(server, loaded, prompt, server.greedy(prompt, 12)["tokens"], own)


@pytest.mark.parametrize("family", hugging_face.MODELS)
def test_half_precision_keeps_vectors_and_routers(saved_model, tmp_path, family):
    loaded = adapted(saved_model, family)
    keys, tensors = fields(export_gguf(loaded, tmp_path / "m.gguf", quantise="f16"))
    full = {name for name, t in tensors.items() if t.tensor_type.name == "F32"}
    assert {t.tensor_type.name for t in tensors.values()} == {"F32", "F16"}
    assert all(name in full for name, t in tensors.items() if len(t.shape) == 1)
    assert all(("norm" in n or "gate_inp" in n or "bias" in n or "rope" in n) for n in full)
    if "expert" not in str(keys):
        expected = log_probs(loaded)
        found = Server(tmp_path / "m.gguf").all_log_probs(IDS, len(expected))
        assert np.exp(expected) @ (expected - found) < 1e-4


@SOURCES
def test_transformers_computes_the_same(source, tmp_path, family):
    torch = pytest.importorskip("torch", reason="compared where torch is installed (extra: parity)")
    from transformers import AutoModelForCausalLM

    if family == "phi3-long":
        pytest.skip("mlx-lm takes LongRoPE's long factors for short texts too")
    loaded = adapted(source, family)
    out = export_folder(loaded, tmp_path / "fused", flavour="hf", dtype="float32")
    theirs, report = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [type(theirs).__name__]
    with torch.no_grad():
        logits = theirs(torch.tensor([IDS])).logits.numpy()
    assert np.abs(logits - np.array(loaded.model(mx.array([IDS])))).max() < 1e-4
    # What is written is understood by mlx-lm as well.
    again = load_model(str(out)).model(mx.array([IDS]))
    assert np.abs(np.array(again) - np.array(loaded.model(mx.array([IDS])))).max() < 1e-4


@pytest.mark.usefixtures("tabled_gelu")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gemma3_text", "phi3", "olmo2"])
def test_quantised_bases_are_written_dequantised(model_folder, tmp_path, family):
    loaded = adapted(model_folder, family, quantise=(4, 32))
    server = Server(export_gguf(loaded, tmp_path / "m.gguf", quantise="f32"))
    expected = log_probs(loaded)
    assert np.abs(server.all_log_probs(IDS, len(expected)) - expected).max() < 3e-3


WINDOW = {"sliding_window": 64}


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("gemma2", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar 144 (it takes 16)"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "every layer 2, 4, ..."),
        ("gemma2", {"use_bidirectional_attention": True}, "bidirectional attention"),
        ("gemma2", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "'linear'"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 4}, "every layer 2, 4, ..."),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob false"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "layers without experts"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "layers without experts"),
        ("qwen3_moe", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ("qwen2", {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "'llama3'"),
        ("qwen3", {**WINDOW, "use_sliding_window": True}, "a sliding window of 64 in a context"),
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1]}, "no_rope_layers other than every fourth"),
        ("smollm3", {"attention_bias": True}, "attention_bias"),
        ("phi3", {"head_dim": 32}, "a head dimension of 32 that is not hidden size / heads"),
        ("mixtral", WINDOW, "a sliding window of 64 in a context of 512"),
        ("mixtral", {"head_dim": 32}, "a head dimension of 32"),
        ("olmo2", {"partial_rotary_factor": 0.5}, "partial rotary embeddings"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act gelu"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8}},
            "beta_fast 8",
        ),
        (
            "mixtral",
            {**WINDOW, "hidden_act": "relu"},
            "hidden_act relu; a sliding window of 64",
        ),
    ],
)
def test_what_llama_cpp_hard_codes_is_refused(model_folder, tmp_path, family, changes, words):
    loaded = load_model(str(model_folder(family)))
    loaded.config = {**loaded.config, **changes}
    with pytest.raises(ExportError) as caught:
        export_gguf(loaded, tmp_path / "out" / "m.gguf")
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_windows_that_are_off_or_never_reached_are_no_reason_to_refuse(model_folder, tmp_path):
    for family, changes in (
        ("phi3", {"sliding_window": 512}),
        ("mixtral", {**WINDOW, "max_position_embeddings": 64}),
        ("qwen2", {**WINDOW, "use_sliding_window": False}),
        ("qwen3_moe", WINDOW),
    ):
        loaded = load_model(str(model_folder(family)))
        loaded.config = {**loaded.config, **changes}
        assert export_gguf(loaded, tmp_path / f"{family}.gguf").exists()


def test_a_window_that_llama_cpp_has_switched_off_is_written_and_told_of(
    model_folder, tmp_path, caplog
):
    loaded = load_model(str(model_folder("phi3")))
    loaded.config = {**loaded.config, **WINDOW}
    keys, _ = fields(export_gguf(loaded, tmp_path / "m.gguf"))
    assert keys["phi3.attention.sliding_window"] == 64
    assert "transformers only the last 64" in caplog.text
    expected = log_probs(loaded)
    found = Server(tmp_path / "m.gguf").all_log_probs(IDS, len(expected))
    assert np.abs(found - expected).max() < 0.02


def test_long_factors_for_short_texts_are_told_of(model_folder, tmp_path, caplog):
    export_gguf(load_model(str(model_folder("phi3-long"))), tmp_path / "m.gguf")
    assert "mlx-lm takes the long factors for short texts too" in caplog.text


def test_what_a_config_leaves_out_is_what_mlx_lm_assumes(model_folder, tmp_path):
    """As in Gemma 3's multimodal configs."""
    folder = model_folder("gemma3_text", num_attention_heads=4, head_dim=256)
    loaded = load_model(str(folder))
    for key in ("head_dim", "rope_theta", "rope_local_base_freq", "num_attention_heads"):
        loaded.config.pop(key, None)
    loaded.config["query_pre_attn_scalar"] = 256
    keys, _ = fields(export_gguf(loaded, tmp_path / "m.gguf"))
    assert keys["gemma3.attention.key_length"] == 256
    assert keys["gemma3.attention.head_count"] == 4
    assert keys["gemma3.rope.freq_base_swa"] == 10000.0


def test_the_keys_of_experts_windows_and_long_positions(model_folder, tmp_path):
    def written(family):
        loaded = load_model(str(model_folder(family)))
        return fields(export_gguf(loaded, tmp_path / f"{family}.gguf"))

    keys, tensors = written("qwen3_moe")
    assert keys["qwen3moe.expert_count"] == 4 and keys["qwen3moe.expert_used_count"] == 2
    assert keys["qwen3moe.expert_feed_forward_length"] == 32
    # GGUF lists the sizes of a tensor from the innermost to the outermost.
    assert list(tensors["blk.1.ffn_gate_exps.weight"].shape) == [64, 32, 4]
    keys, _ = written("gemma3_text")
    assert keys["gemma3.attention.sliding_window"] == 6
    assert keys["gemma3.attention.sliding_window_pattern"] == 2
    keys, tensors = written("phi3-long")
    assert keys["phi3.rope.dimension_count"] == 8 and keys["phi3.attention.key_length"] == 16
    assert keys["phi3.rope.scaling.original_context_length"] == 256
    assert keys["phi3.rope.scaling.attn_factor"] == pytest.approx(1.0607, abs=1e-4)
    assert list(tensors["rope_factors_long.weight"].data) == [1.0, 1.5, 2.0, 3.0]
    assert list(tensors["rope_factors_short.weight"].data) == [1.0] * 4
    assert list(tensors["blk.0.ffn_up.weight"].shape) == [64, 256]
    _, tensors = written("olmo2")
    assert np.array_equal(tensors["output.weight"].data, tensors["token_embd.weight"].data)
