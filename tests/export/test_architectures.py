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
