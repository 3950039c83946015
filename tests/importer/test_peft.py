"""PEFT's adapters compute in MLX what they compute in PEFT; what MLX cannot hold is refused."""

import itertools
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from mlx_align import api, cli
from mlx_align.errors import AlignError, ModelError, SettingsError
from mlx_align.export.folder import export_folder
from mlx_align.export.gguf import export_gguf
from mlx_align.importer.peft import import_peft
from mlx_align.model.adapter import settings_of_adapter
from mlx_align.model.load import load_model
from mlx_align.model.open import open_model
from mlx_align.model.reward import open_reward_model

TOKENS = np.arange(3, 43)[None] * 7 % 390
Q, UP = "self_attn.q_proj", "mlp.up_proj"


@pytest.fixture(scope="module")
def peft():
    pytest.importorskip("torch", reason="compared where torch is installed (extra: parity)")
    return pytest.importorskip("peft", reason="compared where peft is installed (extra: parity)")


def saved_by_peft(peft, base, folder, *, kind="AutoModelForCausalLM", options=None, **settings):
    """Save a random adapter that PEFT made; its logits."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, kind).from_pretrained(base, dtype=torch.float32, **options or {})
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **settings)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "magnitude" in name:
                parameter *= 1 + 0.3 * torch.rand_like(parameter)
        model.save_pretrained(folder)
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


# What transformers needs the configs of bases to say.
BASES = {"mistral": {"sliding_window": None}, "phi3": {"pad_token_id": 0}}
MADE = {
    "lora": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "biases": ("llama-biased", {"target_modules": "all-linear"}),
    "qwen3": ("qwen3", {"target_modules": "all-linear"}),
    "mistral": ("mistral", {"target_modules": "all-linear", "lora_dropout": 0.1}),
    "phi3": ("phi3", {"target_modules": "all-linear"}),
    "tied embedding, scaled": (
        "gemma3_text", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    ),
    "rslora": ("qwen2", {"target_modules": "all-linear", "use_rslora": True}),
    "dora": ("qwen2", {"target_modules": "all-linear", "use_dora": True}),
    "ranks and alphas": (
        "llama",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*_proj": 7},
            "alpha_pattern": {"q_proj": 1, "model.layers.0.mlp.up_proj": 30},
        },
    ),
    "ranks, rslora and dora": (
        "qwen3",
        {
            "target_modules": ["q_proj", "o_proj", "up_proj"],
            "rank_pattern": {"o_proj": 9},
            "use_rslora": True,
            "use_dora": True,
        },
    ),
    "no update": ("llama", {"target_modules": ["q_proj"], "alpha_pattern": {"q_proj": 0}}),
    "pattern": ("llama", {"target_modules": r".*\.0\.self_attn\.[qk]_proj|.*\.1\.mlp\.up_proj"}),
    "first block": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 0}),
    "last block": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "head": ("llama-untied", {"target_modules": ["v_proj", "lm_head"]}),
    "embedding": ("llama-untied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied embedding": (
        "llama", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    ),
    "head saved": (
        "llama-untied", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}
    ),
    "embedding and norms saved, dora": (
        "qwen2",
        {
            "target_modules": ["v_proj"],
            "use_dora": True,
            "modules_to_save": ["embed_tokens", "norm"],
            "ensure_weight_tying": True,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MADE)
def test_what_peft_made_computes_the_same(peft, model_folder, tmp_path, case):
    import mlx_lm

    family, settings = MADE[case]
    base = model_folder(family, **BASES.get(family, {}))
    expected = saved_by_peft(peft, base, tmp_path / "peft", task_type="CAUSAL_LM", **settings)
    out = import_peft(tmp_path / "peft", tmp_path / "mlx")
    loaded, adapter = open_model(out)
    loaded.model.eval()
    # A random update of the embedding makes logits of several hundred.
    tolerance = 1e-4 * max(1, np.abs(expected).max() / 100)
    assert np.abs(np.array(loaded.model(mx.array(TOKENS))) - expected).max() < tolerance
    assert adapter.kind == ("full" if "saved" in case else "dora" if "dora" in case else "lora")
    model, _ = mlx_lm.load(str(base), adapter_path=str(out))
    assert np.abs(np.array(model(mx.array(TOKENS))) - expected).max() < tolerance
    plain = np.array(mlx_lm.load(str(base))[0](mx.array(TOKENS)))
    assert (np.abs(plain - expected).max() > 0.01) == (case != "no update")


@pytest.mark.parametrize(
    ("family", "inside", "names"),
    [
        ("mixtral", "block_sparse_moe.experts", ("w1", "w2", "w3")),
        ("qwen3_moe", "mlp.experts", ("gate_proj", "down_proj", "up_proj")),
    ],
)
def test_single_experts_are_stacked(model_folder, tmp_path, family, inside, names):
    base = load_model(str(model_folder(family)))
    merged = export_folder(base, tmp_path / "merged", flavour="hf", dtype="float32")
    weights = load_file(merged / "model.safetensors")
    random, updates = np.random.default_rng(0), {}
    for expert, name in itertools.product((0, 2, 3), names):
        layer = f"model.layers.1.{inside}.{expert}.{name}"
        outputs, inputs = weights[f"{layer}.weight"].shape
        a = random.normal(size=(4, inputs)).astype(np.float32)
        b = random.normal(size=(outputs, 4)).astype(np.float32)
        updates |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
        weights[f"{layer}.weight"] += 0.5 * b @ a
    save_file(weights, merged / "model.safetensors")
    folder = tmp_path / "peft"
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 2,
        "base_model_name_or_path": str(base.path),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {f"base_model.model.{k}": x for k, x in updates.items()},
        folder / "adapter_model.safetensors",
    )
    loaded, _ = open_model(import_peft(folder, tmp_path / "out"))
    expected = np.array(load_model(str(merged)).model(mx.array(TOKENS)))
    assert np.abs(np.array(loaded.model(mx.array(TOKENS))) - expected).max() < 1e-4
    assert np.abs(np.array(base.model(mx.array(TOKENS))) - expected).max() > 0.01
    name = f"base_model.model.model.layers.1.{inside}.9.{names[0]}"
    spoil(folder, arrays={f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b})
    with pytest.raises(ModelError, match=r"switch_mlp\..*this model needs"):
        import_peft(folder, tmp_path / "more")


def test_a_reward_model_of_peft(peft, model_folder, tmp_path):
    base = model_folder("llama")
    expected = saved_by_peft(
        peft,
        base,
        tmp_path / "peft",
        kind="AutoModelForSequenceClassification",
        options={"num_labels": 1, "pad_token_id": 0},
        task_type="SEQ_CLS",
        target_modules=["q_proj", "up_proj"],
    )
    model = open_reward_model(import_peft(tmp_path / "peft", tmp_path / "mlx"))
    assert (model.mean, model.std) == (0.0, 1.0)
    with model.loaded.head.tapped() as tap:
        model.loaded.model(mx.array(TOKENS))
    score = float(model.loaded.model.score(tap.hidden)[0, -1])
    assert score == pytest.approx(expected.item(), abs=1e-4)


ROUND_TRIPS = {
    "lora": {},
    "dora": {"fine_tune": "dora", "lora_dropout": 0.25},
    "last block": {"lora_layers": 1, "lora_keys": (UP, Q), "lora_scale": 20.0},
    "blocks that differ": {"lora_keys": (f"model.layers.0.{UP}", f"model.layers.1.{Q}")},
    "embedding": {"lora_keys": (UP, "model.embed_tokens"), "lora_rank": 3, "lora_scale": 0.1},
    "reward": {"reward": True, "lora_layers": 1},
}


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_there_and_back_again(model_folder, tmp_path, case):
    base = model_folder("qwen2")
    run = tiny.make_adapter(tmp_path / "run", base, **ROUND_TRIPS[case])
    back = import_peft(api.export_model(run, "peft"), tmp_path / "back")
    before, after = (load_file(f / "adapters.safetensors") for f in (run, back))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert settings_of_adapter(back) == settings_of_adapter(run)
    configs = [json.loads((f / "adapter_config.json").read_text()) for f in (run, back)]
    assert configs[0] == configs[1]
    assert (back / "chat_template.jinja").is_file()


@pytest.fixture
def adapter(model_folder, tmp_path):
    """A small PEFT adapter on a tiny llama, to be spoilt."""
    run = tiny.make_adapter(tmp_path / "run", model_folder(), lora_keys=(Q, UP), lora_rank=4)
    folder = tmp_path / "peft"
    shutil.move(api.export_model(run, "peft"), folder)
    return folder


def spoil(folder, config=None, arrays=None):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    path = folder / "adapter_model.safetensors"
    kept = load_file(path) | (arrays or {})
    save_file({name: array for name, array in kept.items() if array is not None}, path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
        ({"bias": "all"}, "bias: 'all'); merge it in PEFT"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: True"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: 'pissa_niter_4'"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"r": "many"}, "r: 'many' is not a whole number"),
        ({"r": 0}, "r: 0 is out of range"),
        ({"r": 5}, "lora_a is (64, 4), and its rank is to be 5"),
        ({"lora_alpha": float("nan")}, "lora_alpha: nan is out of range"),
        ({"use_rslora": "yes"}, "use_rslora: 'yes' is not true or false"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern: not a pattern"),
        ({"rank_pattern": {"q_proj": 0}}, "r: 0 is out of range"),
        ({"alpha_pattern": [3]}, "alpha_pattern: [3] is not an object"),
        ({"use_dora": True}, "self_attn.q_proj.m: missing"),
        ({"base_model_name_or_path": None}, "does not name the base model; give it with --model"),
        ({"base_model_name_or_path": "../../nowhere"}, "no such model folder"),
    ],
)
def test_settings_that_cannot_be_taken(adapter, tmp_path, config, words):
    spoil(adapter, config)
    with pytest.raises(ModelError) as caught:
        import_peft(adapter, tmp_path / "out")
    assert words in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["peft", "run"]


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
OTHER = {
    "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": np.ones((4, 64), np.float32),
    "base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight": np.ones((64, 4), np.float32),
}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({A: None}, "model.layers.0.self_attn.q_proj.lora_a: missing"),
        ({A: np.ones((4, 63), np.float32)}, "shape (63, 4), this model needs (64, 4)"),
        ({A: np.ones(4, np.float32)}, "lora_a is (4,), and its rank is to be 4"),
        (OTHER, "layers.9.self_attn.q_proj.lora_a: not in this model"),
        ({"../../../etc/passwd": np.ones(3, np.float32)}, "../../../etc/passwd: not in this model"),
        ({"base_model.model.lm_head.weight": np.ones((400, 64), np.float32)}, "in different ways"),
        (
            {"base_model.model.lm_head.lora_B.weight": np.ones((400, 4), np.float32)},
            "in different ways",
        ),
        (
            {"base_model.model.model.norm.weight": np.ones(65, np.float32)},
            "model.norm.weight: shape (65,), this model needs (64,)",
        ),
        (
            {f"base_model.model.x{i}.lora_A.weight": np.ones((4, 3), np.float32) for i in range(9)},
            "... and 4 more",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_listed(adapter, tmp_path, arrays, words):
    spoil(adapter, arrays=arrays)
    with pytest.raises(ModelError) as caught:
        import_peft(adapter, tmp_path / "out")
    assert words in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["peft", "run"]


def test_half_precision_is_read_exactly(adapter, tmp_path):
    path = adapter / "adapter_model.safetensors"
    halves = {name: array.astype(mx.bfloat16) for name, array in mx.load(str(path)).items()}
    mx.save_safetensors(str(path), halves)
    weights = mx.load(str(import_peft(adapter, tmp_path / "out") / "adapters.safetensors"))
    name = "model.layers.1.mlp.up_proj.lora_b"
    theirs = halves["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    assert mx.array_equal(weights[name], theirs.T) and weights[name].dtype == mx.float32


def test_nothing_fits(adapter, model_folder, tmp_path):
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name.replace("layers", "blocks"): array for name, array in weights.items()},
        adapter / "adapter_model.safetensors",
    )
    with pytest.raises(ModelError, match=r"model\.blocks\.0.*not in this model"):
        import_peft(adapter, tmp_path / "out")
    with pytest.raises(ModelError, match="type 'cohere', whose parts have other names"):
        import_peft(adapter, tmp_path / "out", base=str(model_folder("cohere")))


def test_whole_weights_need_a_float_base(adapter, model_folder, tmp_path):
    spoil(adapter, arrays={"base_model.model.model.norm.weight": np.ones(64, np.float32)})
    with pytest.raises(ModelError, match=r"holds whole weights \(model\.norm\.weight\)"):
        import_peft(adapter, tmp_path / "out", base=str(model_folder("llama", quantise=(4, 32))))


def test_numbers_that_are_no_floats(adapter, tmp_path):
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    for kind, words in ((np.float64, "cannot be read"), (np.uint8, "floating-point")):
        array = load_file(adapter / "adapter_model.safetensors")[name].astype(kind)
        spoil(adapter, arrays={name: array})
        with pytest.raises(ModelError, match=words):
            import_peft(adapter, tmp_path / "out")


def test_import_takes_it(adapter, model_folder, tmp_path):
    spoil(adapter, {"base_model_name_or_path": None})
    with pytest.raises(ModelError, match="give it with --model"):
        api.import_model(adapter, output=tmp_path / "out")
    base, out = str(model_folder()), tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        cli.main(["import", str(adapter), "--model", base, "--output", str(out)])
    assert not ended.value.code and open_model(out)[1].kind == "lora"
    with pytest.raises(ModelError, match="an adapter of PEFT; make one of MLX: mlx-align import"):
        open_model(adapter)
    with pytest.raises(AlignError, match="exists already"):
        api.import_model(adapter, output=out, base=base)
    with pytest.raises(SettingsError, match="only a whole model takes a type"):
        api.import_model(adapter, output=tmp_path / "half", base=base, dtype="float16")
    file = api.convert_model(adapter, "gguf", output=tmp_path / "m.gguf", base=base, quantize="f32")
    assert (
        file.read_bytes()
        == export_gguf(open_model(out)[0], tmp_path / "n.gguf", quantise="f32").read_bytes()
    )


def test_a_quantised_base_may_stand_in(adapter, model_folder, tmp_path):
    base = model_folder("llama", quantise=(4, 32))
    out = import_peft(adapter, tmp_path / "out", base=str(base))
    loaded, _ = open_model(out)
    assert loaded.path == base and loaded.quantised


def test_files_that_are_not_read(adapter, tmp_path):
    weights = adapter / "adapter_model.safetensors"
    data = weights.read_bytes()
    for broken in (b"", data[:100], data[:-500], b"\xff" * 64):
        weights.write_bytes(broken)
        with pytest.raises(ModelError, match="damaged safetensors file"):
            import_peft(adapter, tmp_path / "out")
    weights.unlink()
    with pytest.raises(ModelError, match="it has no adapter_model"):
        import_peft(adapter, tmp_path / "out")
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="is a pickle"):
        import_peft(adapter, tmp_path / "out")
    for broken in ("[]", "[" * 100_000, "{", "\udcff"):
        (adapter / "adapter_config.json").write_bytes(broken.encode("utf-8", "surrogateescape"))
        with pytest.raises(ModelError, match=r"not a JSON object|not valid JSON"):
            import_peft(adapter, tmp_path / "out")
