"""Models of GGUF files compute in MLX what they computed before, and what llama.cpp computes."""

import json
import shutil

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from llama_cpp import Server
from make_gguf import random_model, write_gguf
from mlx.utils import tree_flatten

from mlx_align import api
from mlx_align.errors import ModelError, SettingsError
from mlx_align.export.gguf import export_gguf
from mlx_align.importer.blocks import to_floats, to_packed
from mlx_align.importer.gguf_file import GGUFFile
from mlx_align.importer.source import find_source
from mlx_align.model.load import STORED, load_model

IDS = list(range(5, 60, 3))
# Family, and what its config has besides.
FAMILIES = [
    ("llama", {}),
    ("llama-untied", {}),
    ("llama-biased", {}),
    ("llama-scaled", {}),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    (
        "qwen2",
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("qwen3_moe", {}),
    ("gemma2", {"sliding_window": 4096}),
    ("gemma3_text", {}),
    ("phi3", {}),
    ("phi3", {"partial_rotary_factor": 0.5}),
    ("smollm3", {"num_hidden_layers": 4}),
    ("olmo2", {"tie_word_embeddings": False}),
    ("mixtral", {}),
]
NAMES = [
    "-".join([f, *(str(v["rope_type"] if isinstance(v, dict) else k) for k, v in c.items())])
    for f, c in FAMILIES
]


def weights(loaded):
    return dict(tree_flatten(loaded.model.parameters()))


def check_weights(before, after):
    gemma = before.config["model_type"].startswith("gemma")
    before, after = weights(before), weights(after)
    assert before.keys() == after.keys()
    for name, array in before.items():
        # Gemma's norms went through 1 + w, which rounds.
        atol = 3e-7 if gemma and name.endswith("norm.weight") else 0
        assert mx.allclose(array, after[name], rtol=0, atol=atol).item(), name


def log_probs(loaded):
    logits = loaded.model(mx.array([IDS]))[0, -1].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits))


@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=NAMES)
def test_a_model_comes_back_as_it_was(model_folder, tmp_path, family, changes):
    loaded = random_model(model_folder, family, **changes)
    out = api.import_model(write_gguf(loaded, tmp_path / "m.gguf"), output=tmp_path / "out")
    back = load_model(str(out), STORED)
    check_weights(loaded, back)
    assert np.abs(log_probs(loaded) - log_probs(back)).max() < 1e-5
    assert back.template.source == loaded.template.source
    assert back.tokenizer.eos_token_ids == loaded.tokenizer.eos_token_ids
    text = "Hello, I'm 12345 日本語 <|eot_id|><|im_end|> x"
    assert back.tokenizer.encode(text) == loaded.tokenizer.encode(text)


@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=NAMES)
def test_llama_cpp_computes_the_same(model_folder, tmp_path, family, changes):
    path = write_gguf(random_model(model_folder, family, **changes), tmp_path / "m.gguf")
    back = load_model(str(api.import_model(path, output=tmp_path / "out")))
    ours, theirs = log_probs(back), Server(path).next_log_probs(IDS, 50)
    # llama.cpp looks Gemma's activation up in a table of half precision.
    tolerance = 1e-2 if family.startswith("gemma") else 1e-3
    assert max(abs(ours[token] - logp) for token, logp in theirs.items()) < tolerance


@pytest.mark.parametrize(("family", "changes"), FAMILIES, ids=NAMES)
def test_our_own_export_comes_back(model_folder, tmp_path, family, changes):
    loaded = random_model(model_folder, family, **changes)
    path = export_gguf(loaded, tmp_path / "m.gguf", quantise="f32")
    back = load_model(str(api.import_model(path, output=tmp_path / "out")), STORED)
    check_weights(loaded, back)
    for key in (
        "rope_theta",
        "rope_scaling",
        "head_dim",
        "rms_norm_eps",
        "max_position_embeddings",
    ):
        expected = loaded.config.get(key)
        found = back.config.get(key)
        if isinstance(expected, dict):
            found = {k: v for k, v in found.items() if k in expected}
        assert found == expected, key


WIDE = {
    "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 1,
    "max_position_embeddings": 512,
}  # fmt: skip
PACKED = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "Q4_K": 4, "Q5_K": 5}
OTHERS = ["Q2_K", "Q3_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ2_XXS", "TQ1_0", "TQ2_0", "MXFP4"]


@pytest.fixture(scope="module")
def tensor_of(tmp_path_factory):
    """make(kind) -> a tensor of random weights of a type."""

    def make(kind):
        from make_gguf import encode

        values = np.random.default_rng(0).standard_normal((24, 512)).astype(np.float32) * 0.05
        path = tmp_path_factory.mktemp("tensor") / "t.gguf"
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_tensor("t", encode(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return GGUFFile(path).tensors["t"]

    return make


@pytest.mark.parametrize("name", PACKED)
def test_blocks_of_mlxs_form_are_packed_exactly(tensor_of, name):
    tensor = tensor_of(Kind[name])
    packed = to_packed(tensor)
    arrays = packed.arrays
    half = mx.float32 if name.endswith("K") else mx.float16
    assert packed.bits == PACKED[name] and packed.rounding is None
    assert arrays["scales"].dtype == arrays["biases"].dtype == half
    ours = mx.dequantize(
        arrays["weight"], arrays["scales"].astype(mx.float32), arrays["biases"].astype(mx.float32),
        32, packed.bits,
    )  # fmt: skip
    theirs = gguf.quants.dequantize(tensor.data, tensor.kind)
    # Only the order of a product and a sum of float32 numbers can differ.
    assert np.allclose(np.array(ours), theirs, rtol=0, atol=1e-7 * np.abs(theirs).max())


@pytest.mark.parametrize("name", OTHERS)
def test_other_blocks_are_rounded_to_8_bits_and_it_is_said(tensor_of, name):
    tensor = tensor_of(Kind[name])
    packed = to_packed(tensor)
    theirs = gguf.quants.dequantize(tensor.data, tensor.kind)
    ours = np.array(mx.dequantize(*packed.arrays.values(), 32, packed.bits))
    error = np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2))
    changed, whole = packed.rounding
    assert packed.bits == 8 and 0 <= error < 0.01
    assert error == pytest.approx((changed / whole) ** 0.5, rel=1e-3, abs=1e-6)
    floats = np.array(to_floats(tensor, mx.float32))
    assert np.array_equal(floats, theirs)


@pytest.mark.parametrize("name", ["F16", "BF16", "Q4_0", "Q8_0", "Q5_K", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_models_of_every_type_load_and_agree_with_llama_cpp(model_folder, tmp_path, name, dtype):
    loaded = random_model(model_folder, "llama", **WIDE)
    path = write_gguf(loaded, tmp_path / "m.gguf", Kind[name])
    out = api.import_model(path, output=tmp_path / "out", dtype=dtype)
    back = load_model(str(out))
    assert back.quantised is (dtype is None and not name.endswith("F16"))
    ours, theirs = log_probs(back), Server(path).next_log_probs(IDS, 200)
    # llama.cpp rounds activations to 8 bits where weights are quantised.
    shares = [(np.exp(p), p - ours[token]) for token, p in theirs.items()]
    assert sum(share * difference for share, difference in shares) < 0.02
    assert max(abs(d) for _, d in shares) < (0.1 if name.endswith("F16") else 1.0)


def test_a_file_of_several_types(model_folder, tmp_path, caplog):
    """As Q4_K_M files are: some matrices have more bits than most."""
    loaded = random_model(model_folder, "qwen3", **{**WIDE, "num_hidden_layers": 2})
    kinds = {"token_embd.weight": Kind.Q6_K, "blk.1.ffn_down.weight": Kind.Q6_K}
    path = write_gguf(loaded, tmp_path / "m.gguf", Kind.Q4_K, kinds.get)
    with caplog.at_level("INFO", logger="mlx_align"):
        out = api.import_model(path, output=tmp_path / "out")
    assert "Q4_K: 13 tensors packed in 4 bits, exactly" in caplog.text
    assert "Q6_K: 2 tensors rounded to 8 bits (root mean square error 0." in caplog.text
    back = load_model(str(out))
    config = json.loads((out / "config.json").read_text())["quantization"]
    assert (config["bits"], config["group_size"]) == (4, 32)
    assert {k for k in config if "." in k} == {"model.embed_tokens", "model.layers.1.mlp.down_proj"}
    for name, tensor in (("q_proj", "attn_q"), ("down_proj", "ffn_down")):
        layer = back.model.model.layers[1]
        module = getattr(layer.self_attn if name == "q_proj" else layer.mlp, name)
        ours = mx.dequantize(module.weight, module.scales, module.biases, 32, module.bits)
        theirs = GGUFFile(path).tensors[f"blk.1.{tensor}.weight"]
        expected = gguf.quants.dequantize(theirs.data, theirs.kind)
        assert np.abs(np.array(ours) - expected).max() < (1e-7 if name == "q_proj" else 2e-3)


def test_norms_become_halves_only_where_that_is_exact(model_folder, tmp_path):
    loaded = load_model(str(model_folder("llama", dtype=mx.bfloat16)), STORED)
    norm = loaded.model.model.layers[0].input_layernorm
    norm.weight = mx.array(np.linspace(0.1, 1, 64), mx.float32)
    path = write_gguf(loaded, tmp_path / "m.gguf", Kind.BF16)
    layers = load_model(str(api.import_model(path, output=tmp_path / "out")), STORED).model.layers
    assert layers[0].input_layernorm.weight.dtype == mx.float32
    assert (layers[0].input_layernorm.weight == norm.weight).all()
    assert layers[1].input_layernorm.weight.dtype == mx.bfloat16
    assert layers[1].self_attn.q_proj.weight.dtype == mx.bfloat16


def test_experts_stay_packed_and_together(model_folder, tmp_path):
    loaded = random_model(model_folder, "qwen3_moe")
    path = write_gguf(loaded, tmp_path / "m.gguf", Kind.Q8_0)
    back = load_model(str(api.import_model(path, output=tmp_path / "out")))
    experts = back.model.model.layers[0].mlp.switch_mlp.gate_proj
    assert experts.bits == 8 and experts.weight.shape == (4, 32, 16)
    before = loaded.model.model.layers[0].mlp.switch_mlp.gate_proj.weight
    ours = mx.dequantize(experts.weight, experts.scales, experts.biases, 32, 8)
    assert mx.abs(ours - before).max().item() < 0.02


def test_long_rope_factors(model_folder, tmp_path):
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0]}
    scaling = {"type": "longrope", "rope_type": "longrope", **factors}
    changes = {"rope_scaling": scaling, "original_max_position_embeddings": 128}
    loaded = random_model(model_folder, "phi3", **changes)
    path = write_gguf(loaded, tmp_path / "m.gguf")
    back = load_model(str(api.import_model(path, output=tmp_path / "out")))
    assert back.config["rope_scaling"] == scaling
    assert np.abs(log_probs(loaded) - log_probs(back)).max() < 1e-5


@pytest.mark.parametrize(
    ("family", "changes"), [f for f in FAMILIES if f[0] not in ("qwen3_moe", "mixtral")]
)
def test_transformers_computes_the_same(model_folder, tmp_path, family, changes):
    """What the config says is understood in its newer spelling, too; experts are named otherwise there."""
    torch = pytest.importorskip("torch", reason="compared where torch is installed (extra: parity)")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = random_model(model_folder, family, **changes)
    out = api.import_model(write_gguf(loaded, tmp_path / "m.gguf"), output=tmp_path / "out")
    theirs, report = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        logits = theirs(torch.tensor([IDS])).logits[0, -1].log_softmax(-1).numpy()
    assert np.abs(logits - log_probs(loaded)).max() < 1e-3
    text = "Hello, I'm 12345 日本語 <|eot_id|><|im_end|> x"
    assert AutoTokenizer.from_pretrained(out).encode(text) == loaded.tokenizer.encode(text)


def test_a_file_where_a_model_is_wanted_shows_the_way(model_folder, tmp_path):
    path = write_gguf(load_model(str(model_folder()), STORED), tmp_path / "m.gguf")
    with pytest.raises(ModelError, match="mlx-align import"):
        load_model(str(path))
    with pytest.raises(SettingsError, match="not one of float32, float16, bfloat16"):
        api.import_model(path, output=tmp_path / "out", dtype="half")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (lambda w: w.add_uint32("llama.expert_count", 4), "has no key llama.expert_used_count"),
        (lambda w: w.add_uint16("split.count", 3), "must end in -00001-of-00003.gguf"),
        (lambda w: w.add_tensor("blk.0.strange.weight", np.ones(4, np.float32)), "has no place"),
        (
            lambda w: w.add_tensor("rope_freqs.weight", np.array([1, 2, 3, 3] * 2, "f4")),
            "Llama 3's",
        ),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR), "rope.scaling.factor"),
    ],
)
def test_what_cannot_be_imported_is_refused(model_folder, tmp_path, extra, words):
    loaded = load_model(str(model_folder()), STORED)
    path = write_gguf(loaded, tmp_path / "m.gguf", extra=extra)
    with pytest.raises(ModelError, match=words):
        api.import_model(path, output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


def test_a_split_model_is_put_together(model_folder, tmp_path):
    loaded = random_model(model_folder, "llama")
    write_gguf(loaded, tmp_path / "Tiny.gguf", part=8)
    names = [f"Tiny-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    for source in (tmp_path, tmp_path / names[1]):
        assert find_source(source).name == "Tiny"
        out = api.import_model(source, output=tmp_path / "out")
        check_weights(loaded, load_model(str(out), STORED))
        shutil.rmtree(out)
    (tmp_path / names[2]).write_bytes((tmp_path / names[1]).read_bytes())
    with pytest.raises(ModelError, match="is not part 3 of 3, as its name says"):
        api.import_model(tmp_path, output=tmp_path / "out")
    (tmp_path / names[0]).unlink()
    with pytest.raises(ModelError, match=f"one of 3 files of a model; beside it is no {names[0]}"):
        api.import_model(tmp_path, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_window_pattern_longer_than_the_model_is_refused(model_folder, tmp_path):
    loaded = random_model(model_folder, "gemma3_text")
    loaded.config["sliding_window_pattern"] = 6
    path = write_gguf(loaded, tmp_path / "m.gguf")
    with pytest.raises(ModelError, match="sliding_window_pattern is 6 for 4 layers"):
        api.import_model(path, output=tmp_path / "out")
