"""Chunked log-probabilities equal the full softmax, in value and gradient, in bounded memory."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_align.kernels import token_log_prob
from mlx_align.kernels.token_log_prob import (
    Projection,
    frozen_log_probs,
    full_log_probs,
    trained_log_probs,
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of a few columns and blocks of a few rows, so that tiny heads have many."""
    monkeypatch.setattr(token_log_prob, "CHUNK_BYTES", {"cpu": 4 * 64 * 90, "gpu": 4 * 64 * 90})
    monkeypatch.setattr(token_log_prob, "BLOCK_ROWS", 20)


def problem(rows=33, width=24, words=507, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(rows, width)).astype(np.float32)
    weight = rng.normal(size=(words, width)).astype(np.float32) * 0.5
    bias = rng.normal(size=words).astype(np.float32)
    targets = rng.integers(0, words, rows)
    upstream = rng.normal(size=rows).astype(np.float32)
    return hidden, weight, bias, targets, upstream


def reference(hidden, weight, bias, targets, scale=1.0, softcap=None):
    """(log-probabilities, unit gradients) in float64, from the definition."""
    hidden, weight = hidden.astype(np.float64), weight.astype(np.float64)
    z = scale * (hidden @ weight.T + (0 if bias is None else bias.astype(np.float64)))
    slope = np.ones_like(z)
    if softcap:
        bent = np.tanh(z / softcap)
        z, slope = softcap * bent, 1 - bent**2
    top = z.max(-1, keepdims=True)
    log_sum = top + np.log(np.exp(z - top).sum(-1, keepdims=True))
    rows = np.arange(len(hidden))
    onehot = np.zeros_like(z)
    onehot[rows, targets] = 1
    unit = scale * ((onehot - np.exp(z - log_sum)) * slope) @ weight
    return (z - log_sum)[rows, targets], unit, z.argmax(-1) == targets


@pytest.mark.parametrize("words", [7, 507, 1024])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 4.0), (2.0, 30.0)])
def test_frozen_heads(words, biased, scale, softcap):
    hidden, weight, bias, targets, upstream = problem(words=words)
    bias = bias if biased else None
    expected, unit, hit = reference(hidden, weight, bias, targets, scale, softcap)
    head = Projection(
        mx.array(weight), None, None if bias is None else mx.array(bias), scale, softcap
    )

    def loss(h):
        return (frozen_log_probs(h, mx.array(targets), head)[0] * mx.array(upstream)).sum()

    logp, found, *_ = frozen_log_probs(mx.array(hidden), mx.array(targets), head)
    assert np.allclose(logp, expected, atol=2e-5)
    assert np.array_equal(found, hit)
    grad = mx.grad(loss)(mx.array(hidden))
    assert np.allclose(grad, upstream[:, None] * unit, atol=2e-5)
    alone, *_ = frozen_log_probs(mx.array(hidden), mx.array(targets), head, gradient=False)
    assert np.allclose(alone, expected, atol=2e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_weights_give_float32_results(dtype):
    hidden, weight, _, targets, _ = problem()
    weight = np.array(mx.array(weight).astype(dtype).astype(mx.float32))
    hidden = np.array(mx.array(hidden).astype(dtype).astype(mx.float32))
    head = Projection(mx.array(weight).astype(dtype))
    logp, *_ = frozen_log_probs(mx.array(hidden).astype(dtype), mx.array(targets), head)
    assert logp.dtype == mx.float32
    assert np.allclose(logp, reference(hidden, weight, None, targets)[0], atol=2e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_heads_equal_their_dequantised_weights(bits):
    hidden, weight, _, targets, _ = problem(width=64)
    packed, scales, biases = mx.quantize(mx.array(weight), group_size=32, bits=bits)
    dense = np.array(mx.dequantize(packed, scales, biases, group_size=32, bits=bits))
    head = Projection(packed, (scales, biases, 32, bits, "affine"))
    logp, *_ = frozen_log_probs(mx.array(hidden), mx.array(targets), head)
    assert np.allclose(logp, reference(hidden, dense, None, targets)[0], atol=2e-5)


def test_extreme_logits_stay_finite():
    hidden, weight, _, targets, _ = problem()
    head = Projection(mx.array(weight * 300))
    logp, *_ = frozen_log_probs(mx.array(hidden), mx.array(targets), head)
    expected = reference(hidden, weight * 300, None, targets)[0]
    assert np.isfinite(np.array(logp)).all()
    assert np.allclose(logp, expected, rtol=1e-4, atol=1e-3)


def test_trained_heads_get_all_gradients():
    hidden, weight, bias, targets, upstream = problem()
    parameters = {"weight": mx.array(weight), "bias": mx.array(bias)}

    def logits(p, h):
        return h @ p["weight"].T + p["bias"]

    def chunked(p, h):
        logp, *_ = trained_log_probs(h, mx.array(targets), p, logits, len(weight))
        return (logp * mx.array(upstream)).sum()

    def full(p, h):
        losses = nn.losses.cross_entropy(logits(p, h), mx.array(targets))
        return -(losses * mx.array(upstream)).sum()

    value, grads = mx.value_and_grad(chunked, argnums=(0, 1))(parameters, mx.array(hidden))
    other, others = mx.value_and_grad(full, argnums=(0, 1))(parameters, mx.array(hidden))
    assert np.allclose(value, other, rtol=1e-5)
    assert np.allclose(grads[1], others[1], atol=2e-5)
    for name in parameters:
        assert np.allclose(grads[0][name], others[0][name], atol=2e-5), name


def test_memory_does_not_grow_with_the_vocabulary(monkeypatch):
    monkeypatch.setattr(token_log_prob, "CHUNK_BYTES", {"cpu": 2**20, "gpu": 2**20})
    monkeypatch.setattr(token_log_prob, "BLOCK_ROWS", 2048)

    def peak(words):
        hidden, weight, _, targets, _ = problem(rows=512, width=16, words=words)
        hidden, targets = mx.array(hidden), mx.array(targets)
        head = Projection(mx.array(weight))
        mx.eval(hidden, targets, head.weight)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.grad(lambda h: frozen_log_probs(h, targets, head)[0].sum())(hidden))
        return mx.get_peak_memory() - before

    small, large = peak(8_000), peak(64_000)
    assert large < 512 * 64_000 * 4 / 4  # a quarter of one copy of the logits
    assert large < 1.3 * small + 2**20


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_temperature_and_moments(softcap, temperature):
    """Against float64: log-probabilities and gradients of scaled logits, entropy, log(sum p^2)."""
    rng = np.random.default_rng(11)
    hidden, weight = rng.normal(size=(7, 12)), rng.normal(size=(5000, 12)) * 0.4
    targets = rng.integers(0, 5000, 7)
    head = Projection(mx.array(weight.astype(np.float32)), None, None, 1.3, softcap, temperature)

    def loss(h):
        return frozen_log_probs(h, mx.array(targets), head)[0].sum()

    found = frozen_log_probs(
        mx.array(hidden.astype(np.float32)), mx.array(targets), head, moments=True
    )
    z = 1.3 * hidden @ weight.T
    slope = np.ones_like(z)
    if softcap:
        slope = 1 - np.tanh(z / softcap) ** 2
        z = softcap * np.tanh(z / softcap)
    z = z / temperature
    logs = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
    p = np.exp(logs)
    rows = np.arange(7)
    assert np.allclose(np.array(found.logp), logs[rows, targets], rtol=1e-5, atol=1e-5)
    assert np.allclose(np.array(found.entropy), -(p * logs).sum(1), rtol=1e-5, atol=1e-5)
    assert np.allclose(np.array(found.collision), np.log((p * p).sum(1)), rtol=1e-5, atol=1e-5)
    pull = -p.copy()
    pull[rows, targets] += 1
    expected = (pull * slope) @ weight * 1.3 / temperature
    gradient = np.array(mx.grad(loss)(mx.array(hidden.astype(np.float32))))
    assert np.allclose(gradient, expected, rtol=1e-4, atol=1e-5)
    full = full_log_probs(mx.array(z.astype(np.float32)), mx.array(targets), moments=True)
    for ours, other in zip(found, full, strict=True):
        assert np.allclose(np.array(ours), np.array(other), rtol=1e-4, atol=1e-4)
