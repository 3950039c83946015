"""GGUF files say what they should, and llama.cpp computes from them what we compute."""

import json
import shutil

import gguf
import mlx.core as mx
import numpy as np
import pytest
import tiny
from gguf import GGMLQuantizationType
from llama_cpp import Server, reference_blocks
from mlx.utils import tree_map
from test_folder import adapted

from mlx_align import api, demo
from mlx_align.demo import data_folder
from mlx_align.errors import ExportError
from mlx_align.evaluate.answers import is_right, refuses
from mlx_align.export.gguf import export_gguf
from mlx_align.export.ollama import export_ollama, make_modelfile
from mlx_align.export.recipe import FILE_TYPES
from mlx_align.export.vocabulary import pre_tokenizer_name, read_vocabulary
from mlx_align.model.adapter import AdapterSettings, wear_adapter
from mlx_align.model.load import load_model
from mlx_align.rollout.sampler import SamplingSettings, prompt_encoder, sample

TEXTS = [
    "Hello world", " leading and trailing ", "two  spaces   three\n\n\nlines\t\ttabs",
    "I'm sorry, it's 12345.67!", "日本語のテキスト 中文 한국어", "🚀🦙 emoji 👨‍👩‍👧",
    "Привет, мир! ñandú café naïve", "def f(x):\n\treturn x**2  # ok\n", "", " ", "\n",
    "<|im_start|>user\nHi<|im_end|>", "<|eot_id|><|begin_of_text|>x", "'ll 'VE don't",
    "a\u200bb\u00a0c", "https://example.com/?q=1&r=2#x", "ALLCAPS lower MiXeD", "１２３ ٤٥٦ ½",
    "--- *** ___ ~~~ ```",
]  # fmt: skip
FAMILIES = ["llama", "llama-untied", "llama-biased", "llama-scaled", "qwen2", "qwen3"]


def fields(path):
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {
        t.name: t for t in reader.tensors
    }


def close_or_tied(server, loaded, ids, tokens, expected):
    """Two greedy runs agree, or part where two tokens were as good as equally likely."""
    for i, (a, b) in enumerate(zip(tokens, expected, strict=False)):
        if a != b:
            logits = np.array(loaded.model(mx.array([[*ids, *expected[:i]]]))[0, -1])
            return abs(logits[a] - logits[b]) < 0.05
    return True


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_reads_and_generates_the_same(model_folder, tmp_path, family):
    loaded = adapted(model_folder, family)
    server = Server(export_gguf(loaded, tmp_path / "m.gguf", quantise="f16"))
    ends = loaded.tokenizer.eos_token_ids
    for text in TEXTS:
        own = list(loaded.tokenizer.encode(text, add_special_tokens=False))
        assert server.tokenize(text) == own, text
        with_special = list(loaded.tokenizer.encode(text))
        assert server.tokenize(text, add_special=True) == with_special, text
    encoder = prompt_encoder(loaded)
    for question in ("How do I bake bread?", "Hi", "What is 12 + 30?"):
        ids = encoder.prompt_ids(question)
        answer = server.greedy(ids, 24)
        (own,) = sample(loaded, [ids], SamplingSettings(max_tokens=24))
        tokens = [t for t in answer["tokens"] if t not in ends]
        assert close_or_tied(server, loaded, ids, tokens, list(own.ids))
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": question},
        ]
        rendered = server.chat_prompt(messages)
        bos = loaded.tokenizer.bos_token or ""
        # The server leaves a BOS out that it will add itself.
        assert rendered.removeprefix(bos) == loaded.template.render(
            messages, generation=True
        ).removeprefix(bos)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("quantise", "tolerance"), [("f32", 1e-4), ("f16", 0.02), ("q8_0", 0.5)])
def test_log_probabilities_agree(model_folder, tmp_path, family, quantise, tolerance):
    loaded = adapted(model_folder, family)
    server = Server(export_gguf(loaded, tmp_path / "m.gguf", quantise=quantise))
    ids = list(range(5, 60, 3))
    theirs = server.next_log_probs(ids, 50)
    logits = loaded.model(mx.array([ids]))[0, -1]
    ours = np.array(logits - mx.logsumexp(logits))
    assert max(abs(ours[token] - logp) for token, logp in theirs.items()) < tolerance


def test_the_keys(model_folder, tmp_path):
    loaded = load_model(str(model_folder("llama-scaled")))
    keys, tensors = fields(export_gguf(loaded, tmp_path / "m.gguf", quantise="q8_0"))
    assert keys["general.architecture"] == "llama" and keys["general.type"] == "model"
    assert keys["general.file_type"] == 7
    assert keys["llama.block_count"] == 2 and keys["llama.attention.head_count_kv"] == 2
    assert keys["llama.attention.key_length"] == 16 and keys["llama.rope.dimension_count"] == 16
    assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == "llama-bpe"
    assert (
        keys["tokenizer.ggml.add_bos_token"] is True
        and keys["tokenizer.ggml.add_eos_token"] is False
    )
    assert keys["tokenizer.chat_template"] == loaded.template.source
    assert keys["tokenizer.ggml.eos_token_id"] == loaded.tokenizer.eos_token_id
    assert len(keys["tokenizer.ggml.tokens"]) == loaded.vocabulary
    specials = {
        loaded.tokenizer.convert_tokens_to_ids(t) for t in ("<|eot_id|>", "<|begin_of_text|>")
    }
    assert all(keys["tokenizer.ggml.token_type"][i] == gguf.TokenType.CONTROL for i in specials)
    # Vectors stay in float32, a tied head is not written twice, rope scaling is a tensor.
    kinds = {name: t.tensor_type.name for name, t in tensors.items()}
    assert (
        kinds["blk.0.attn_norm.weight"]
        == kinds["output_norm.weight"]
        == kinds["rope_freqs.weight"]
        == "F32"
    )
    assert kinds["blk.0.ffn_up.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert "output.weight" not in kinds
    divisors = np.array(tensors["rope_freqs.weight"].data)
    assert divisors.min() == 1.0 and divisors.max() == 8.0 and len(divisors) == 8


def test_rows_that_do_not_fit_a_block_are_written_in_half_precision(model_folder, tmp_path):
    changes = {"hidden_size": 40, "head_dim": 8, "num_attention_heads": 4, "intermediate_size": 48}
    loaded = load_model(str(model_folder("llama", **changes)))
    _, tensors = fields(export_gguf(loaded, tmp_path / "m.gguf", quantise="q8_0"))
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == "F16"


def test_every_end_of_a_turn_is_known_to_llama_cpp(model_folder, tmp_path):
    loaded = load_model(str(model_folder("qwen2", eos_token_id=0)))
    keys, _ = fields(export_gguf(loaded, tmp_path / "m.gguf"))
    kept = {keys.get(f"tokenizer.ggml.{k}_token_id") for k in ("eos", "eot", "eom")}
    assert set(loaded.tokenizer.eos_token_ids) <= kept


def test_quantised_bases_are_written_dequantised(model_folder, tmp_path):
    loaded = adapted(model_folder, "llama", quantise=(4, 32))
    server = Server(export_gguf(loaded, tmp_path / "m.gguf", quantise="f32"))
    ids = list(range(5, 60, 3))
    logits = loaded.model(mx.array([ids]))[0, -1]
    ours = np.array(logits - mx.logsumexp(logits))
    theirs = server.next_log_probs(ids, 50)
    assert max(abs(ours[token] - logp) for token, logp in theirs.items()) < 1e-3


@pytest.mark.parametrize(
    ("quantise", "bound"),
    [
        ("bf16", 1e-3), ("q8_0", 0.005), ("q6_k", 0.04), ("q5_k_m", 0.1), ("q5_k_s", 0.1), ("q5_1", 0.1),
        ("q5_0", 0.1), ("q4_k_m", 0.4), ("q4_k_s", 0.4), ("q4_1", 0.4), ("q4_0", 0.4), ("q3_k_m", 0.6),
        ("q2_k", 2.0),
    ],
)  # fmt: skip
def test_llama_cpp_computes_with_every_type(model_folder, tmp_path, quantise, bound):
    """The divergence of its next token from ours grows with the error of the weights, as it should."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "dtype": mx.float16}
    loaded = load_model(str(model_folder("llama", **wide)))
    path = export_gguf(loaded, tmp_path / "m.gguf", quantise=quantise)
    keys, tensors = fields(path)
    kind, base = FILE_TYPES[quantise]
    assert keys["general.file_type"] == kind
    assert tensors["blk.0.ffn_up.weight"].tensor_type == base
    ids = list(range(5, 60, 3))
    theirs = Server(path).next_log_probs(ids, 400)
    logits = loaded.model(mx.array([ids]))[0, -1]
    ours = np.array(logits - mx.logsumexp(logits))
    divergence = sum(np.exp(ours[i]) * (ours[i] - logp) for i, logp in theirs.items())
    assert -1e-4 < divergence < bound


def test_perplexity_is_that_of_llama_cpps_quantiser(tmp_path):
    """On held-out text, of a file whose blocks llama.cpp made from the same half-precision weights."""
    loaded = load_model("demo")
    _, half = fields(export_gguf(loaded, tmp_path / "f16.gguf"))
    path = export_gguf(loaded, tmp_path / "m.gguf", quantise="q4_k_m")
    theirs = tmp_path / "theirs.gguf"
    shutil.copy(path, theirs)
    for tensor in gguf.GGUFReader(theirs, "r+").tensors:
        if tensor.tensor_type != GGMLQuantizationType.F32:
            tensor.data[...] = reference_blocks(half[tensor.name].data, tensor.tensor_type)
    with open(data_folder("completions") / "valid.jsonl") as file:
        messages = json.loads(file.readline())["messages"]
    ids = list(loaded.tokenizer.encode(loaded.template.render(messages, generation=False)))[:24]
    perplexities = []
    for file in (path, theirs):
        server = Server(file)
        rows = [server.next_log_probs(ids[:i], 1523)[ids[i]] for i in range(4, len(ids))]
        perplexities.append(np.exp(-np.mean(rows)))
    assert abs(perplexities[0] / perplexities[1] - 1) < 0.01


@pytest.mark.parametrize(
    ("family", "base", "quantise", "count"),
    [
        ("llama-untied", (2, 64), "q4_1", 16),
        ("llama-untied", (3, 64), "q4_1", 16),
        ("llama-untied", (4, 64), "q4_1", 16),
        ("llama-untied", (5, 64), "q5_1", 16),
        ("olmo2", (4, 32), "q4_1", 16),
        ("gemma2", (4, 32), "q4_1", 15),
        ("phi3", (4, 32), "q4_1", 9),
        ("mixtral", (4, 32), "q4_1", 18),
        ("qwen3_moe", (5, 32), "q5_1", 17),
    ],
)
def test_a_quantised_base_keeps_its_weights(
    model_folder, tmp_path, caplog, family, base, quantise, count
):
    loaded = load_model(str(model_folder(family, quantise=base, dtype=mx.float16)))
    caplog.set_level("INFO")
    path = export_gguf(loaded, tmp_path / "m.gguf", quantise=quantise)
    assert f"{count} layers keep the weights of the quantised base, 0 are rounded" in caplog.text
    _, dense = fields(export_gguf(loaded, tmp_path / "f32.gguf", quantise="f32"))
    _, tensors = fields(path)
    for name, tensor in tensors.items():
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(weights, dense[name].data), name
        assert "gate_inp" not in name or tensor.tensor_type.name == "F32"
    ids = list(range(5, 60, 3))
    theirs = Server(path).next_log_probs(ids, 50)
    logits = loaded.model(mx.array([ids]))[0, -1]
    ours = np.array(logits - mx.logsumexp(logits))
    assert max(abs(ours[token] - logp) for token, logp in theirs.items()) < 0.3


def test_only_adapted_layers_of_a_quantised_base_are_rounded_again(model_folder, tmp_path, caplog):
    loaded = load_model(str(model_folder("llama", quantise=(4, 32), dtype=mx.float16)))
    adapter = wear_adapter(loaded.model, AdapterSettings(lora_layers=1), seed=0)
    loaded.model.update(tree_map(lambda x: x + 0.05, adapter.parameters()))
    caplog.set_level("INFO")
    _, tensors = fields(export_gguf(loaded, tmp_path / "m.gguf", quantise="q4_1"))
    assert "8 layers keep the weights of the quantised base, 0 are rounded" in caplog.text
    _, dense = fields(export_gguf(loaded, tmp_path / "f32.gguf", quantise="f32"))
    for name, tensor in tensors.items():
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(weights, dense[name].data) == ("blk.1" not in name or "norm" in name)
        assert np.abs(weights - dense[name].data).max() < 0.1


def test_scales_that_do_not_fit_are_rounded_again_and_counted(model_folder, tmp_path, caplog):
    loaded = load_model(str(model_folder("llama", quantise=(4, 32), dtype=mx.float16)))
    layer = loaded.model.model.layers[0].mlp.up_proj
    layer.scales = layer.scales * (1 + 2**-20)
    caplog.set_level("INFO")
    _, tensors = fields(export_gguf(loaded, tmp_path / "m.gguf", quantise="q4_1"))
    assert "0 are rounded" not in caplog.text and "rounded a second time" in caplog.text
    dense = np.array(mx.dequantize(layer.weight, layer.scales, layer.biases, 32, 4))
    weights = gguf.quants.dequantize(tensors["blk.0.ffn_up.weight"].data, GGMLQuantizationType.Q4_1)
    assert 0 < np.abs(weights - dense).max() < 0.1


@pytest.mark.parametrize("keep_model", [True, False], ids=["own scores", "scores from merges"])
def test_sentencepiece_vocabularies(shared, model_folder, tmp_path, keep_model):
    folder = tmp_path / "spm"
    shutil.copytree(model_folder("llama", vocab_size=32000, eos_token_id=2, bos_token_id=1), folder)
    tiny.make_sentencepiece(folder, shared("vocab/llama2_tokenizer.model"), keep_model=keep_model)
    loaded = load_model(str(folder))
    path = export_gguf(loaded, tmp_path / "m.gguf")
    keys, _ = fields(path)
    assert keys["tokenizer.ggml.model"] == "llama"
    server = Server(path)
    for text in TEXTS:
        if text and "<|" not in text:
            own = list(loaded.tokenizer.encode(text, add_special_tokens=False))
            assert server.tokenize(text) == own, text
            assert server.tokenize(text, add_special=True) == list(loaded.tokenizer.encode(text)), (
                text
            )


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mamba", {}, "models of type 'mamba' cannot be written as GGUF yet; supported: gemma2"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "of type 'dynamic'"),
        ("llama-sliding", {}, "a sliding window of 6"),
        ("mistral", {}, "a sliding window of 8 in a context of 512"),
        ("qwen2", {"head_dim": 32}, "a head dimension of 32"),
    ],
)  # fmt: skip
def test_what_llama_cpp_computes_otherwise_is_refused(
    model_folder, tmp_path, family, changes, words
):
    if family == "qwen2":
        loaded = load_model(str(model_folder("qwen2")))
        loaded.config |= changes
    else:
        loaded = load_model(str(model_folder(family, **changes)))
    with pytest.raises(ExportError) as caught:
        export_gguf(loaded, tmp_path / "m.gguf")
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_way_of_cutting_text_is_refused_and_shown():
    tokenizer = {
        "model": {"ignore_merges": False},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "[a-z]+"}, "behavior": "Isolated"},
    }
    with pytest.raises(ExportError, match=r"split \[a-z\]\+"):
        pre_tokenizer_name(tokenizer, "m")


def test_ids_without_a_token_get_a_name_of_their_own(model_folder):
    loaded = load_model(str(model_folder("llama", vocab_size=410)))
    vocabulary = read_vocabulary(loaded)
    assert vocabulary.tokens[-1] == "[PAD409]" and len(set(vocabulary.tokens)) == 410


def write_for_ollama(loaded, output, **options):
    return export_ollama(loaded, output, make_modelfile(loaded), **options)


@pytest.mark.parametrize("export", [export_gguf, write_for_ollama])
def test_weights_that_are_no_numbers_are_refused_by_name(model_folder, tmp_path, export):
    loaded = load_model(str(model_folder()))
    layer = loaded.model.model.layers[1].mlp.down_proj
    layer.weight = mx.where(mx.arange(128) == 5, mx.nan, layer.weight)
    with pytest.raises(
        ExportError, match=r"blk\.1\.ffn_down\.weight: has weights that are not finite"
    ):
        export(loaded, tmp_path / "m", quantise="q4_k_m")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_half_file(model_folder, tmp_path, monkeypatch):
    loaded = load_model(str(model_folder()))

    def full(self, array, **_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(ExportError, match="No space left"):
        export_gguf(loaded, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_the_demo_run_refuses_and_answers_in_four_bits(tmp_path):
    """What a user has in the end: a run as Q4_K_M, in llama.cpp, by the template in the file."""
    run = api.train_model("dpo", output=tmp_path / "run").folder
    server = Server(api.export_model(run, "gguf", quantize="q4_k_m"))

    def says(prompt):
        asked = server.chat_prompt([{"role": "user", "content": prompt}])
        done = server.greedy(server.tokenize(asked), 40)
        assert done["stop_type"] == "eos"
        return done["content"]

    rows = [
        json.loads(line)
        for line in (demo.evaluation_folder() / "requests.jsonl").read_text().splitlines()
    ]
    refused = {
        kind: np.mean([refuses(says(r["prompt"])) for r in rows if r["harmful"] == kind])
        for kind in (True, False)
    }
    assert refused[True] > 0.9 and refused[False] < 0.1
    questions = (demo.evaluation_folder() / "questions.jsonl").read_text().splitlines()
    right = [is_right(says(q["prompt"]), [q["answer"]]) for q in map(json.loads, questions[:20])]
    assert np.mean(right) > 0.8
