"""Adapters without their base compute in PEFT, mlx-lm and llama.cpp what they compute here."""

import json
import shutil

import gguf
import mlx.core as mx
import numpy as np
import pytest
import tiny
from llama_cpp import Server
from safetensors.numpy import load_file

from mlx_align import api
from mlx_align.errors import ExportError, SettingsError
from mlx_align.export.folder import export_folder
from mlx_align.export.gguf import export_gguf
from mlx_align.model.load import load_model
from mlx_align.model.open import open_model

TOKENS = np.arange(3, 43)[None] * 7 % 390
Q, UP = "self_attn.q_proj", "mlp.up_proj"
EMBEDDING = "model.embed_tokens"
# (base, changes of the base, settings of the adapter)
CASES = {
    "llama": ("llama", {}, {}),
    "mistral": ("mistral", {"sliding_window": None}, {}),
    "qwen2": ("qwen2", {}, {"lora_rank": 3, "lora_scale": 0.7}),
    "qwen3": ("qwen3", {}, {}),
    "biases": ("llama-biased", {}, {}),
    "last block": ("llama", {}, {"lora_layers": 1, "lora_keys": (Q, UP)}),
    "blocks that differ": (
        "llama", {}, {"lora_keys": (f"model.layers.0.{Q}", f"model.layers.1.{UP}")}
    ),
    "head": ("llama-untied", {}, {"lora_keys": (Q, "lm_head"), "lora_layers": 1}),
    "embedding": ("llama-untied", {}, {"lora_keys": (Q, EMBEDDING)}),
    "quantised": ("llama", {"quantise": (4, 32)}, {}),
    "tied embedding": ("qwen3", {}, {"lora_keys": (EMBEDDING, Q)}),
    "mixtral": ("mixtral", {}, {"lora_keys": (Q, "self_attn.k_proj")}),
    "qwen3_moe": ("qwen3_moe", {}, {"lora_keys": (Q, "self_attn.o_proj")}),
    "gemma2": ("gemma2", {}, {}),
    "gemma3": ("gemma3_text", {}, {}),
    "phi3": ("phi3", {}, {}),
    "smollm3": ("smollm3", {}, {}),
    "olmo2": ("olmo2", {}, {}),
    "tied embedding, scaled": ("gemma2", {}, {"lora_keys": (EMBEDDING, Q)}),
    "tied embedding, scaled, windows": ("gemma3_text", {}, {"lora_keys": (EMBEDDING, Q)}),
    "dora": ("llama", {}, {"fine_tune": "dora"}),
    "dora, quantised": ("qwen2", {"quantise": (8, 32)}, {"fine_tune": "dora"}),
}  # fmt: skip
LORA = [case for case in CASES if "dora" not in case and "tied" not in case]


@pytest.fixture
def made(model_folder, tmp_path):
    """made(case) -> (base folder, adapter folder)"""

    def make(case):
        family, changes, settings = CASES[case]
        base = model_folder(family, **changes)
        return base, tiny.make_adapter(tmp_path / "run", base, **settings)

    return make


def worn_logits(source):
    loaded, _ = open_model(source)
    return np.array(loaded.model(mx.array(TOKENS)))


def peft_model(base, folder, tmp_path, kind="AutoModelForCausalLM", **options):
    """The PEFT model on the base in the Hugging Face format."""
    torch = pytest.importorskip("torch", reason="compared where torch is installed (extra: parity)")
    peft = pytest.importorskip("peft", reason="compared where peft is installed (extra: parity)")
    import transformers

    plain = export_folder(load_model(str(base)), tmp_path / "base", flavour="hf", dtype="float32")
    model = getattr(transformers, kind).from_pretrained(plain, dtype=torch.float32, **options)
    return torch, peft.PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same_logits(made, tmp_path, case):
    base, adapter = made(case)
    out = api.export_model(adapter, "peft")
    assert out == adapter / "export" / "peft"
    torch, theirs = peft_model(base, out, tmp_path)
    # Its patterns find the modules that have arrays, and no others.
    found = {name.replace("vector.default.weight", "vector") for name in theirs.state_dict()}
    found = {name.replace(".default", "") for name in found if "lora_" in name}
    assert found == load_file(out / "adapter_model.safetensors").keys()
    with torch.no_grad():
        logits = theirs(torch.tensor(TOKENS)).logits.numpy()
        with theirs.disable_adapter():
            plain = theirs(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(logits - worn_logits(adapter)).max() < 1e-4
    assert np.abs(logits - plain).max() > 0.01


def test_a_reward_model_in_peft(model_folder, tmp_path):
    base = model_folder("qwen2")
    adapter = tiny.make_adapter(tmp_path / "run", base, reward=True)
    out = api.export_model(adapter, "hf", adapter_only=True)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["score"]
    torch, theirs = peft_model(
        base, out, tmp_path, "AutoModelForSequenceClassification", num_labels=1, pad_token_id=0
    )
    with torch.no_grad():
        score = float(theirs(torch.tensor(TOKENS)).logits)
    loaded, _ = open_model(adapter)
    with loaded.head.tapped() as tap:
        loaded.model(mx.array(TOKENS))
    assert score == pytest.approx(float(loaded.model.score(tap.hidden)[0, -1]), abs=1e-4)


def test_the_folder_for_peft(model_folder, tmp_path, caplog):
    base = model_folder("llama", quantise=(4, 32))
    keys = ("mlp.up_proj", "self_attn.q_proj")
    settings = {"lora_rank": 4, "lora_scale": 1.5, "lora_layers": 1, "lora_keys": keys}
    adapter = tiny.make_adapter(tmp_path / "run", base, **settings)
    out = api.export_model(adapter, "peft", dtype="float16")
    assert "quantised for MLX" in caplog.text and "--base-name" in caplog.text
    assert {p.name for p in out.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    weights = load_file(out / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    assert weights[name].shape == (4, 64) and weights[name].dtype == np.float16
    config = json.loads((out / "adapter_config.json").read_text())
    expected = {
        "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1],
        "layers_pattern": "layers", "base_model_name_or_path": str(base), "task_type": "CAUSAL_LM",
    }  # fmt: skip
    assert {key: config[key] for key in expected} == expected
    caplog.clear()
    out = api.export_model(adapter, "peft", base_name="meta-llama/Llama-3.2-1B")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "meta-llama/Llama-3.2-1B" and not caplog.text


@pytest.mark.parametrize("case", ["llama", "dora", "tied embedding", "blocks that differ", "full"])
def test_mlx_lm_puts_it_on(model_folder, made, tmp_path, case):
    import mlx_lm

    if case == "full":
        base = model_folder()
        adapter = tiny.make_adapter(tmp_path / "run", base, fine_tune="full")
    else:
        base, adapter = made(case)
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    out = api.export_model(adapter, "mlx", adapter_only=True)
    model, _ = mlx_lm.load(str(base), adapter_path=str(out))
    assert np.abs(np.array(model(mx.array(TOKENS))) - worn_logits(adapter)).max() < 1e-4
    names = {"README.md", "adapter_config.json", "adapters.safetensors", "chat_template.jinja"}
    assert {p.name for p in out.iterdir()} == names


@pytest.mark.parametrize(
    ("case", "quantise", "tolerance"),
    [*((case, "f32", 1e-3) for case in LORA), ("llama", "f16", 0.01), ("embedding", "bf16", 0.1)],
)
def test_llama_cpp_computes_the_same(made, tmp_path, case, quantise, tolerance):
    base, adapter = made(case)
    out = api.export_model(adapter, "gguf", adapter_only=True, quantize=quantise)
    assert out == adapter / "export" / "run-adapter.gguf"
    plain = export_gguf(load_model(str(base)), tmp_path / "base.gguf", quantise="f32")
    ids = TOKENS[0].tolist()
    theirs = Server(plain, out).next_log_probs(ids, 50)
    logits = worn_logits(adapter)[0, -1].astype(np.float64)
    ours = logits - np.log(np.exp(logits).sum())
    if case.startswith("gemma"):
        # llama.cpp looks its activation up in a table of half precision.
        tolerance = 1e-2
    assert max(abs(ours[token] - logp) for token, logp in theirs.items()) < tolerance
    without = Server(plain).next_log_probs(ids, 50)
    assert max(abs(ours[token] - logp) for token, logp in without.items()) > 2 * tolerance


def test_what_a_gguf_adapter_says(made):
    _, adapter = made("llama")
    reader = gguf.GGUFReader(api.export_model(adapter, "gguf", adapter_only=True))
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.type"] == "adapter" and keys["adapter.type"] == "lora"
    assert keys["general.architecture"] == "llama"
    assert keys["adapter.lora.alpha"] == 16.0  # scale 2, rank 8
    assert {t.tensor_type.name for t in reader.tensors} == {"F32"}


def test_a_modelfile_for_a_base_in_ollama(made, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    _, adapter = made("llama")
    out = api.export_model(adapter, "ollama", adapter_only=True, base_name="llama3.2:1b")
    assert {p.name for p in out.iterdir()} == {"Modelfile", "README.md", "adapter.gguf"}
    text = (out / "Modelfile").read_text()
    assert text.startswith("FROM llama3.2:1b\nADAPTER ./adapter.gguf\nTEMPLATE ")
    assert 'PARAMETER stop "<|eot_id|>"\n' in text


@pytest.mark.parametrize(
    ("to", "family", "settings", "words"),
    [
        ("peft", "llama", {"fine_tune": "full"}, "fine_tune: full, so it is no low-rank update"),
        ("peft", "llama", {"fine_tune": "head", "reward": True}, "fine_tune: head"),
        ("peft", "cohere", {}, "'cohere' cannot be written as a PEFT adapter"),
        ("gguf", "llama", {"fine_tune": "full"}, "the merged model instead"),
        ("gguf", "llama", {"fine_tune": "dora"}, "DoRA magnitudes, which llama.cpp does not know"),
        ("gguf", "llama", {"lora_keys": (EMBEDDING,)}, "its embedding, which is its head too"),
        ("gguf", "llama", {"reward": True}, "use --to hf"),
        ("gguf", "mamba", {}, "'mamba' cannot be written as a GGUF adapter"),
        ("mlx", "llama", {"reward": True}, "use --to hf"),
    ],
)
def test_what_cannot_be_written_is_refused(model_folder, tmp_path, to, family, settings, words):
    adapter = tiny.make_adapter(tmp_path / "run", model_folder(family), **settings)
    with pytest.raises(ExportError) as caught:
        api.export_model(adapter, to, adapter_only=True, output=tmp_path / "out")
    assert words in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_options_that_make_no_sense(made, model_folder, tmp_path):
    _, adapter = made("llama")
    with pytest.raises(SettingsError, match=r"such as llama3\.2:1b"):
        api.export_model(adapter, "ollama", adapter_only=True)
    with pytest.raises(SettingsError, match="no name of a model in Ollama"):
        api.export_model(adapter, "ollama", adapter_only=True, base_name="x\nADAPTER /etc/passwd")
    with pytest.raises(SettingsError, match="as f32, f16, bf16, not as q8_0"):
        api.export_model(adapter, "gguf", adapter_only=True, quantize="q8_0")
    with pytest.raises(SettingsError, match="only an adapter has a base there"):
        api.export_model(adapter, "hf", base_name="llama3.2:1b")
    with pytest.raises(ExportError, match="has no adapter"):
        api.export_model(model_folder(), "peft", output=tmp_path / "out")


def test_experts_are_refused_by_name(model_folder, tmp_path):
    adapter = tiny.make_adapter(tmp_path / "run", model_folder("qwen3_moe"))
    with pytest.raises(ExportError, match=r"stacked experts \(model\.layers\.0\.mlp\.switch_mlp"):
        api.export_model(adapter, "peft")


def test_a_full_disk_leaves_nothing(made, monkeypatch):
    _, adapter = made("llama")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    for to in ("peft", "gguf"):
        with pytest.raises(ExportError, match="No space left"):
            api.export_model(adapter, to, adapter_only=True)
    assert list((adapter / "export").iterdir()) == []
