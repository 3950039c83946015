"""Log-probabilities, perplexity and divergence against the full logits in float64."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_align.data.records import PairRecord, TextRecord, Unfit
from mlx_align.evaluate import contender as module
from mlx_align.evaluate.contender import (
    Contender,
    answer,
    divergence,
    open_contender,
    open_pair,
    same_tokens,
    score,
    scored_tokens,
)
from mlx_align.model.adapter import AdapterSettings, wear_adapter
from mlx_align.rollout.sampler import SamplingSettings, prompt_encoder

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Mix flour, water, salt and yeast; knead; wait; bake. naïve 日本語",
    "for i in range(10): print(f(i))",
)


@pytest.fixture
def contender(loaded_model):
    """make(family) -> a contender on a tiny model."""

    def make(family="llama", **changes):
        loaded = loaded_model(family, **changes)
        return Contender(family, loaded, prompt_encoder(loaded))

    return make


def reference_log_softmax(loaded, ids):
    """log p of every next token, float64[T, V], from the plain logits."""
    z = np.array(loaded.model(mx.array(np.asarray(ids)[None]))[0].astype(mx.float32), np.float64)
    z -= z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def scored_positions(example):
    """(the whole ids, the positions that predict scored tokens) of an example with one completion."""
    ids = np.concatenate([example.prompt, example.completions[0]])
    return ids, len(example.prompt) - 1 + np.flatnonzero(example.scored[0])


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "mamba"])
def test_scores_are_those_of_the_full_logits(contender, family):
    model = contender(family, template=None)
    records = [PairRecord(t, " yes, " + t[:7], " no", "f:1") for t in TEXTS]
    examples = [model.examples(record)[0] for record in records]
    for example, found in zip(examples, score(model, examples), strict=True):
        for k, completion in enumerate(example.completions):
            ids = np.concatenate([example.prompt, completion])
            logp = reference_log_softmax(model.loaded, ids)
            start = len(example.prompt) - 1
            expected = sum(logp[start + i, t] for i, t in enumerate(completion))
            assert found[k] == pytest.approx(expected, abs=2e-4)
        assert scored_tokens(example).tolist() == [len(c) for c in example.completions]


def test_equal_examples_are_scored_once_and_given_twice(contender, monkeypatch):
    model = contender()
    example = model.examples(PairRecord("a", "b", "c", "f:1"))[0]
    counted = []
    first, second = score(
        model, [example, example], lambda what, done, total: counted.append(total)
    )
    assert first.tolist() == second.tolist() and counted == [1]


@pytest.mark.parametrize("style", ["llama3", "qwen2"])
def test_a_text_is_predicted_once_without_an_end(contender, style, monkeypatch):
    """With and without a token that begins every text, whole and in windows."""
    model = contender(style=style)
    encode = model.loaded.tokenizer.encode
    for window in (1024, 8):
        monkeypatch.setattr(module, "WINDOW", window)
        for text in TEXTS:
            examples = model.examples(TextRecord(text, "f:1"))
            plain = encode(text, add_special_tokens=False)
            scored = np.concatenate([e.completions[0] for e in examples]).tolist()
            assert scored == (plain if style == "llama3" else plain[1:])
            assert all(e.lengths[0] <= window for e in examples)
            if style == "qwen2" and len(examples) > 1:
                # Without a beginning, a window goes on from the token before it.
                assert examples[1].prompt.tolist() == [plain[len(examples[0].completions[0])]]
    with pytest.raises(Unfit):
        contender(style="qwen2").examples(TextRecord("a", "f:1"))


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "mamba", "qwen3"])
def test_divergence_is_that_of_the_full_distributions(contender, family, monkeypatch):
    """Softcaps, scales, tied heads, recurrent models; in chunks of three rows."""
    before, after = contender(family), contender(family, seed=3)
    assert same_tokens(before, after)
    rows_bytes = 8 * after.loaded.vocabulary * 3
    monkeypatch.setattr(module, "DIVERGENCE_BYTES", rows_bytes)
    examples = [after.examples(TextRecord(text, "f:1"))[0] for text in TEXTS]
    found = divergence(after, before, examples)
    for example, value in zip(examples, found, strict=True):
        ids, positions = scored_positions(example)
        p, q = (reference_log_softmax(c.loaded, ids)[positions] for c in (after, before))
        assert value == pytest.approx((np.exp(p) * (p - q)).sum(), rel=1e-4)
        assert value > 0.1
    assert divergence(after, after, examples) == pytest.approx([0.0] * 3, abs=1e-5)


@pytest.mark.parametrize("keys", [None, ("model.embed_tokens", "self_attn.q_proj")])
def test_the_base_is_the_adapter_taken_off(contender, keys):
    loaded = contender().loaded
    plain = Contender("plain", loaded, prompt_encoder(loaded))
    examples = [plain.examples(TextRecord(text, "f:1"))[0] for text in TEXTS]
    expected = score(plain, examples)
    adapter = wear_adapter(loaded.model, AdapterSettings(lora_keys=keys), seed=0)
    weights = {k: mx.random.normal(v.shape) * 0.2 for k, v in adapter.weights().items()}
    adapter.load(weights, "test")
    base = Contender("base", loaded, plain.encoder, adapter.off)
    assert np.array_equal(score(base, examples), expected)
    assert not np.allclose(score(plain, examples), expected, atol=0.01)
    for example, value in zip(examples, divergence(plain, base, examples), strict=True):
        ids, positions = scored_positions(example)
        p = reference_log_softmax(loaded, ids)[positions]
        with adapter.off():
            q = reference_log_softmax(loaded, ids)[positions]
        assert value == pytest.approx((np.exp(p) * (p - q)).sum(), rel=1e-3)
    settings = SamplingSettings(max_tokens=6)
    texts = [[c.text for c in answer(c, TEXTS, settings)] for c in (base, plain)]
    assert texts[0] != texts[1]


def test_thoughts_are_no_part_of_an_answer(contender, monkeypatch):
    from mlx_align.rollout.sampler import Completion

    said = ["<think>\nlet me see</think>\n\nParis.", "<think>and on and", "a < b <think>"]
    monkeypatch.setattr(
        module, "sample", lambda *_: [Completion((1,), text, True) for text in said]
    )
    texts = [c.text for c in answer(contender(), ["a", "b", "c"], SamplingSettings())]
    assert [t.strip() for t in texts] == ["Paris.", "", "a < b <think>"]


def test_many_prompts_are_answered_in_portions(contender, monkeypatch):
    model, seen = contender(), []
    prompts = [f"prompt {i}" for i in range(5)]
    settings = SamplingSettings(max_tokens=4)
    whole = [c.text for c in answer(model, prompts, settings)]
    monkeypatch.setattr(module, "PORTION", 2)
    parts = answer(model, prompts, settings, lambda what, done, total: seen.append((done, total)))
    assert [c.text for c in parts] == whole and seen == [(2, 5), (4, 5), (5, 5)]


def test_opening_what_users_name(model_folder):
    from mlx_align.errors import ModelError

    one = str(model_folder("llama"))
    found, base = open_contender("x", one)
    assert base is None and found.loaded.layout == "segments"
    with pytest.raises(ModelError, match="has no adapter, so there is nothing to compare it with"):
        open_pair(one, None)
    before, after = open_pair(one, str(model_folder("llama", seed=3)))
    assert (before.name, after.name) == ("before", "after") and same_tokens(before, after)
    other, _ = open_contender("x", str(model_folder("qwen2")))
    assert not same_tokens(before, other)
