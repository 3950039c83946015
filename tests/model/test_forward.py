"""Packed or plain, every architecture scores as separate forward passes do, and generates as before."""

import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten

from mlx_align.data.packing import pack, pad
from mlx_align.data.template import make_example
from mlx_align.kernels import tree_attention
from mlx_align.model import packed
from mlx_align.model.adapter import AdapterSettings, wear_adapter
from mlx_align.model.forward import choose_layout, make_batches, token_log_probs
from mlx_align.model.load import load_model
from mlx_align.model.recompute import checkpoint_blocks

# Recurrent parts cannot run packed; latent attention computes scores of its own.
LAYOUTS = {"mamba": "plain", "lfm2": "plain", "deepseek_v3": "dense"}


def examples(seed=0, words=390):
    rng = np.random.default_rng(seed)

    def example(prompt, *completions):
        masks = [rng.random(n) < 0.8 for n in completions]
        for mask in masks:
            mask[-1] = True
        ids = [rng.integers(0, words, n) for n in completions]
        return make_example(rng.integers(0, words, prompt), ids, masks, "f:1")

    return [example(9, 12, 5), example(1, 1, 2), example(14, 3, 10, 7), example(5, 20)]


def separate(loaded, batch_examples):
    """Log-probabilities from one ordinary forward pass per completion, full logits, by hand."""
    found = []
    for example in batch_examples:
        for ids, mask in zip(example.completions, example.scored, strict=True):
            row = np.concatenate([example.prompt, ids])
            logits = loaded.model(mx.array(row[None]))[0].astype(mx.float32)
            logp = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
            start = len(example.prompt) - 1
            own = logp[np.arange(start, start + len(ids)), ids]
            found.append(own[mask])
    return np.concatenate(found)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_scores_equal_separate_passes(loaded_model, family):
    loaded = loaded_model(family)
    assert loaded.layout == LAYOUTS.get(family, "segments")
    batch_examples = examples()
    expected = separate(loaded, batch_examples)
    make = pad if loaded.layout == "plain" else pack
    for multiple in (1, 16):
        batch = make(batch_examples, multiple)
        logp, hit = token_log_probs(loaded, batch)
        real = batch.weight > 0
        assert np.allclose(np.array(logp)[real], expected, atol=2e-4)
        assert hit.dtype == mx.bool_
    shuffled = batch_examples[::-1]
    logp, _ = token_log_probs(loaded, make(shuffled))
    assert np.allclose(logp, separate(loaded, shuffled), atol=2e-4)


@pytest.mark.parametrize("quantise", [(4, 32), (8, 32)])
def test_quantised_models(loaded_model, quantise):
    loaded = loaded_model("llama", quantise=quantise)
    assert loaded.quantised and loaded.layout == "segments"
    logp, _ = token_log_probs(loaded, pack(examples()))
    assert np.allclose(logp, separate(loaded, examples()), atol=2e-4)


def test_sharing_a_prompt_changes_nothing(loaded_model):
    loaded = loaded_model()
    together = examples()
    apart = [
        make_example(e.prompt, [c], [s], "f:1")
        for e in together
        for c, s in zip(e.completions, e.scored, strict=True)
    ]
    a, _ = token_log_probs(loaded, pack(together))
    b, _ = token_log_probs(loaded, pack(apart))
    assert np.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen3", "gemma2", "gemma3_text", "gemma4_text", "gpt_oss", "deepseek_v3", "mamba"],
)
def test_gradients_equal_those_of_padded_rows(loaded_model, family):
    loaded = loaded_model(family)
    wear_adapter(loaded.model, AdapterSettings(lora_rank=2), seed=1)
    loaded.model.train()
    batch_examples = examples()

    def gradient(batch, layout):
        kept, loaded.layout = loaded.layout, layout
        parameters = loaded.model.trainable_parameters()

        def total(parameters):
            loaded.model.update(parameters)
            logp, _ = token_log_probs(loaded, batch, gradient=True)
            return (logp * mx.array(np.cos(np.arange(len(batch.target))))).sum()

        grads = mx.grad(total)(parameters)
        loaded.model.update(parameters)
        loaded.layout = kept
        return dict(tree_flatten(grads))

    # Both halves of the update, so that the gradients of A are not all zero.
    loaded.model.update({k: v for k, v in _nudged(loaded.model.trainable_parameters()).items()})
    expected = gradient(pad(batch_examples), "plain")
    make = pad if loaded.layout == "plain" else pack
    found = gradient(make(batch_examples), loaded.layout)
    scale = max(np.abs(np.array(g)).max() for g in expected.values())
    for name, grad in expected.items():
        assert np.allclose(found[name], grad, atol=2e-5 * max(scale, 1)), name


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("family", ["gemma2", "deepseek_v3"])
def test_blocks_of_queries_change_nothing(loaded_model, family, checkpoint, monkeypatch):
    """A module that computes its own scores gives the same on many blocks as on one."""
    loaded = loaded_model(family)
    loaded.layout = "dense"
    adapter = wear_adapter(loaded.model, AdapterSettings(lora_rank=2), seed=1)
    loaded.model.update(_nudged(adapter.parameters()))
    loaded.model.train()
    batch = pack(examples(), 16)
    assert len(packed._query_blocks(batch)) == 1
    weight = mx.array(np.cos(np.arange(len(batch.target))) * batch.weight)

    def scores_and_gradients():
        parameters = adapter.parameters()

        def total(parameters):
            loaded.model.update(parameters)
            logp, _ = token_log_probs(loaded, batch, gradient=True)
            return (logp * weight).sum()

        gradients = mx.grad(total)(parameters)
        loaded.model.update(parameters)
        return token_log_probs(loaded, batch)[0], dict(tree_flatten(gradients))

    expected, one = scores_and_gradients()
    monkeypatch.setattr(packed, "BLOCK_SCORES", 60)
    monkeypatch.setattr(packed, "BLOCK_QUERIES", 3)
    assert len(packed._query_blocks(batch)) > 10
    if checkpoint:
        checkpoint_blocks(loaded.model)
    found, many = scores_and_gradients()
    assert np.allclose(found, expected, atol=1e-5)
    for name, gradient in one.items():
        assert np.allclose(many[name], gradient, atol=1e-4), name
    assert np.abs(np.array(one[next(k for k in one if "self_attn" in k)])).max() > 1e-3


def _nudged(tree):
    from mlx.utils import tree_map

    return tree_map(lambda x: x + 0.01 * mx.random.normal(x.shape, key=mx.random.key(0)), tree)


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "gemma3_text", "gemma4_text", "qwen3_moe", "mamba"]
)
def test_checkpointing_changes_no_gradient(loaded_model, family):
    def gradient(checkpoint):
        loaded = loaded_model(family)
        wear_adapter(loaded.model, AdapterSettings(lora_rank=2), seed=1)
        loaded.model.update(_nudged(loaded.model.trainable_parameters()))
        if checkpoint:
            checkpoint_blocks(loaded.model)
            checkpoint_blocks(loaded.model)
        loaded.model.train()
        (batch,) = make_batches(loaded, examples(), 4096)
        parameters = loaded.model.trainable_parameters()

        def total(parameters):
            loaded.model.update(parameters)
            return token_log_probs(loaded, batch, gradient=True)[0].sum()

        return dict(tree_flatten(mx.grad(total)(parameters)))

    plain, checkpointed = gradient(False), gradient(True)
    assert any(np.abs(np.array(g)).max() > 1e-3 for g in plain.values())
    for name, grad in plain.items():
        assert np.allclose(checkpointed[name], grad, atol=1e-5), name


@pytest.mark.parametrize("family", ["llama", "llama-sliding", "qwen3", "gemma3_text", "phi3"])
def test_generation_after_hooking_gives_the_same_tokens(model_folder, family):
    from mlx_lm.generate import batch_generate, generate_step

    def tokens(loaded):
        prompt = mx.array(list(range(5, 20)))
        steps = generate_step(prompt, loaded.model, max_tokens=12)
        one = [int(token) for token, _ in steps]
        many = batch_generate(
            loaded.model,
            loaded.tokenizer,
            [[3, 4, 5, 6], [9] * 9],
            max_tokens=8,
            return_token_ids=True,
        )
        return one, many.token_ids

    fresh = load_model(str(model_folder(family)))
    hooked = load_model(str(model_folder(family)))
    before = tokens(fresh)
    choose_layout(hooked)
    assert tokens(hooked) == before
    assert tokens(fresh) == before  # another model of the same module, which the hook reaches too


def test_the_gpu_path_gives_the_same_scores(loaded_model, monkeypatch):
    loaded = loaded_model()
    expected, _ = token_log_probs(loaded, pack(examples()))
    monkeypatch.setattr(tree_attention, "_fused_is_faster", lambda: True)
    found, _ = token_log_probs(loaded, pack(examples()))
    assert np.allclose(found, expected, atol=1e-5)


def test_a_model_that_ignores_the_layout_runs_plain(model_folder, monkeypatch):
    """The probe finds out by numbers, not by errors: here attention sees everything before it."""

    def careless(self, q, k, v, scale, **limits):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")

    def causal(positions, ends, window, first, start, end):
        return mx.arange(start, end)[:, None] >= mx.arange(first, end)[None, None]

    monkeypatch.setattr(packed.TreeMask, "attend", careless)
    monkeypatch.setattr(packed, "dense_mask", causal)
    loaded = load_model(str(model_folder()))
    assert choose_layout(loaded) == "plain"


def test_an_unknown_head_uses_full_logits(loaded_model):
    loaded = loaded_model()
    expected, hits = token_log_probs(loaded, pack(examples()))
    loaded.head = None
    found, others = token_log_probs(loaded, pack(examples()))
    assert np.allclose(found, expected, atol=1e-5) and np.array_equal(hits, others)


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("llama-untied", "lm_head"),
        ("qwen3", "model.embed_tokens"),
        ("gemma2", "model.embed_tokens"),
    ],
)
def test_an_adapted_head_gives_what_full_logits_give(loaded_model, family, key):
    loaded = loaded_model(family)
    batch = pack(examples())
    base, _ = token_log_probs(loaded, batch)
    settings = AdapterSettings(lora_keys=("self_attn.q_proj", key))
    adapter = wear_adapter(loaded.model, settings, seed=1)
    assert f"{key}.lora_a" in adapter.weights()
    loaded.model.update(_nudged(adapter.parameters()))

    def scores_and_gradients():
        parameters = adapter.parameters()

        def total(parameters):
            loaded.model.update(parameters)
            logp, _ = token_log_probs(loaded, batch, gradient=True)
            return (logp * mx.array(batch.weight)).sum()

        gradients = mx.grad(total)(parameters)
        loaded.model.update(parameters)
        return token_log_probs(loaded, batch)[0], dict(tree_flatten(gradients))

    found, gradients = scores_and_gradients()
    with adapter.off():
        assert np.allclose(token_log_probs(loaded, batch)[0], base, atol=1e-6)
    loaded.head = None
    expected, others = scores_and_gradients()
    assert np.allclose(found, expected, atol=1e-4)
    assert np.abs(np.array(found - base))[batch.weight > 0].max() > 1e-3
    for name, gradient in others.items():
        assert np.allclose(gradients[name], gradient, atol=1e-3), name
    assert np.abs(np.array(gradients[f"{key}.lora_a"])).max() > 0.1
