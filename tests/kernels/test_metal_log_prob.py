"""The kernels of log-probabilities equal the definition in float64, through every door they have."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from harness import WAYS, close, exact, use_kernels

from mlx_align.kernels import reference, token_log_prob
from mlx_align.kernels.metal_log_prob import Chunk, chunk_gradient, chunk_scores, scores_of_logits
from mlx_align.kernels.token_log_prob import (
    Projection,
    frozen_log_probs,
    full_log_probs,
    log_ratios,
    trained_log_probs,
)

# Relative to the greatest value: sums are float32, gradients are rounded to the dtype.
TOLERANCE = {mx.float32: 3e-6, mx.float16: 6e-4, mx.bfloat16: 5e-3}


def problem(rows, words, dtype=mx.float32, seed=0):
    """Logits with a large one here and there, targets at both edges, upstream."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, words)).astype(np.float32) * 3
    logits[:, rng.integers(0, words, 3)] += 20
    targets = rng.integers(0, words, rows)
    targets[0], targets[-1] = 0, words - 1
    upstream = rng.normal(size=rows).astype(np.float32)
    return mx.array(logits).astype(dtype), mx.array(targets), mx.array(upstream)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "words"), [(1, 9), (5, 507), (9, 1024), (3, 32_003)])
def test_full_logits(kernels, dtype, rows, words):
    logits, targets, upstream = problem(rows, words, dtype)
    expected = reference.token_log_probs(exact(logits), np.array(targets), np.array(upstream))

    def loss(z):
        return (full_log_probs(z, targets).logp * upstream).sum()

    found = full_log_probs(logits, targets, moments=True)
    for name in ("logp", "entropy", "collision"):
        assert close(getattr(found, name), expected[name], 1e-5), name
    assert np.array_equal(found.hit, exact(logits).argmax(1) == np.array(targets))
    assert close(mx.grad(loss)(logits), expected["logits"], TOLERANCE[dtype])


@pytest.mark.parametrize(("softcap", "temperature"), [(4.0, 1.0), (None, 0.7), (30.0, 2.0)])
def test_soft_cap_and_temperature(kernels, softcap, temperature):
    logits, targets, upstream = problem(9, 1503)
    chunk = {"softcap": softcap, "temperature": temperature}
    expected = reference.token_log_probs(
        exact(logits), np.array(targets), np.array(upstream), **chunk
    )

    def loss(z):
        return (scores_of_logits(z, targets, Chunk(**chunk))[0] * upstream).sum()

    value, gradient = mx.value_and_grad(loss)(logits)
    assert close(value, (expected["logp"] * np.array(upstream)).sum(), 1e-5)
    assert close(gradient, expected["logits"], TOLERANCE[mx.float32])


def test_parts_of_the_vocabulary_join_to_the_whole(kernels):
    logits, _, upstream = problem(9, 1503)
    cuts = [0, 8, 700, 1503]
    targets = mx.array([0, 7, 8, 9, 699, 700, 701, 1501, 1502])
    whole = chunk_scores(logits, targets)
    parts = [chunk_scores(logits[:, a:b], targets, Chunk(a)) for a, b in itertools.pairwise(cuts)]
    joined = parts[0].joined(parts[1]).joined(parts[2])
    for name in whole._fields:
        assert close(getattr(joined, name), exact(getattr(whole, name)), 1e-6), name

    def gradient(a, b):
        about = targets, whole.log_sum, upstream, -upstream, Chunk(a)
        return chunk_gradient(logits[:, a:b], *about)

    parts = mx.concatenate([gradient(a, b) for a, b in itertools.pairwise(cuts)], axis=1)
    assert np.array_equal(parts, gradient(0, 1503))


def test_logits_far_below_zero(kernels):
    logits, targets, _ = problem(9, 1503)
    found = full_log_probs(logits - 1e6, targets, moments=True)
    expected = reference.token_log_probs(exact(logits - 1e6), np.array(targets), np.ones(9))
    assert close(found.logp, expected["logp"], 0.07)  # a float32 near 1e6 has steps of 1 / 16


def test_words_that_are_ruled_out(kernels):
    """Logits of minus infinity count nothing."""
    logits, targets, upstream = problem(5, 507)
    logits[:, 3] = -mx.inf
    rest, shifted = np.delete(exact(logits), 3, axis=1), np.array(targets)
    expected = reference.token_log_probs(rest, shifted - (shifted > 3), np.array(upstream))
    found = full_log_probs(logits, targets, moments=True)
    for name in ("logp", "entropy", "collision"):
        assert close(getattr(found, name), expected[name], 1e-5), name
    gradient = mx.grad(lambda z: (full_log_probs(z, targets).logp * upstream).sum())(logits)
    assert close(gradient[:, mx.array([0, 1, 2, *range(4, 507)])], expected["logits"], 3e-6)
    assert not exact(gradient)[:, 3].any()


def test_what_is_not_a_number_shows(kernels):
    logits, targets, _ = problem(5, 507)
    logits[2, 300] = mx.nan
    found = full_log_probs(logits, targets, moments=True)
    for name in ("logp", "entropy", "collision"):
        assert np.isnan(exact(getattr(found, name))).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ratios_of_two_models(kernels, dtype):
    """Values, and the gradient of a mixture of all three outputs by the policy alone."""
    policy, targets, upstream = problem(9, 1503, dtype)
    # From models that agree to models that do not.
    distance = mx.array([0, 1e-3, 3e-3, 0.01, 0.02, 0.04, 0.08, 0.2, 0.6])[:, None]
    other = (policy + distance * problem(9, 1503, dtype, seed=1)[0]).astype(dtype)
    ones = np.ones(9)
    ours = reference.token_log_probs(exact(policy), np.array(targets), ones)
    theirs = reference.token_log_probs(exact(other), np.array(targets), ones)
    ratio = ours["logp"] - theirs["logp"]

    def loss(policy, other):
        logp, log_ratio, k3, _ = log_ratios(policy, other, targets)
        return ((0.5 * logp + 2 * log_ratio + 3 * k3) * upstream).sum()

    found = log_ratios(policy, other, targets)
    assert close(found.logp, ours["logp"], 1e-5)
    assert close(found.log_ratio, ratio, 1e-5)
    assert close(found.entropy, ours["entropy"], 1e-5)
    assert np.allclose(exact(found.k3), np.expm1(-ratio) + ratio, rtol=2e-4, atol=1e-6)
    by_policy, by_other = mx.grad(loss, argnums=(0, 1))(policy, other)
    factor = np.array(upstream) * (2.5 + 3 * (1 - np.exp(-ratio)))
    assert close(by_policy, factor[:, None] * ours["logits"], TOLERANCE[dtype])
    assert not np.array(by_other.astype(mx.float32)).any()


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("biased", [False, True])
def test_frozen_heads(kernels, monkeypatch, softcap, biased):
    """The walk over chunks of the vocabulary, with blocks of rows."""
    sizes = {"cpu": 4 * 64 * 90, "gpu": 4 * 64 * 90}
    monkeypatch.setattr(token_log_prob, "CHUNK_BYTES", sizes)
    monkeypatch.setattr(token_log_prob, "BLOCK_ROWS", 20)
    rng = np.random.default_rng(0)
    hidden = mx.array(rng.normal(size=(33, 24)).astype(np.float32))
    weight = mx.array(rng.normal(size=(507, 24)).astype(np.float32) * 0.5)
    bias = mx.array(rng.normal(size=507).astype(np.float32)) if biased else None
    targets, upstream = mx.array(rng.integers(0, 507, 33)), rng.normal(size=33)
    logits = 1.3 * (exact(hidden) @ exact(weight).T + (exact(bias) if biased else 0))
    limits = {"softcap": softcap, "temperature": 0.8}
    expected = reference.token_log_probs(logits, np.array(targets), upstream, **limits)
    head = Projection(weight, None, bias, 1.3, softcap, 0.8)

    def loss(h):
        logp = frozen_log_probs(h, targets, head).logp
        return (logp * mx.array(upstream.astype(np.float32))).sum()

    found = frozen_log_probs(hidden, targets, head, moments=True)
    for name in ("logp", "entropy", "collision"):
        assert close(getattr(found, name), expected[name], 1e-5), name
    assert np.array_equal(found.hit, logits.argmax(1) == np.array(targets))
    gradient = 1.3 * expected["logits"] @ exact(weight)
    assert close(mx.grad(loss)(hidden), gradient, 1e-5)
    alone = frozen_log_probs(hidden, targets, head, gradient=False)
    assert close(alone.logp, expected["logp"], 1e-5)


@pytest.mark.parametrize("words", [5, 9, 128, 129, 136])
def test_vocabularies_that_leave_a_column_or_two(kernels, monkeypatch, words):
    """One row: chunks of 64 columns, and what is left is too small for the kernels."""
    monkeypatch.setattr(token_log_prob, "CHUNK_BYTES", {"cpu": 1, "gpu": 1})
    rng = np.random.default_rng(0)
    hidden, weight = rng.normal(size=(1, 8)), rng.normal(size=(words, 8))
    expected = reference.token_log_probs(hidden @ weight.T, [words - 1], [1.0])
    head = Projection(mx.array(weight.astype(np.float32)))

    def logp(h):
        return frozen_log_probs(h, mx.array([words - 1]), head).logp.sum()

    value, gradient = mx.value_and_grad(logp)(mx.array(hidden.astype(np.float32)))
    assert close(value, expected["logp"], 1e-5)
    assert close(gradient, expected["logits"] @ weight, 1e-5)


def test_trained_heads(kernels, monkeypatch):
    """The gradient by the weights goes through the kernel's own."""
    monkeypatch.setattr(token_log_prob, "CHUNK_BYTES", {"cpu": 4 * 507 * 16, "gpu": 4 * 507 * 16})
    rng = np.random.default_rng(0)
    hidden = mx.array(rng.normal(size=(33, 24)).astype(np.float32))
    parameters = {"weight": mx.array(rng.normal(size=(507, 24)).astype(np.float32) * 0.5)}
    targets, upstream = mx.array(rng.integers(0, 507, 33)), rng.normal(size=33)
    logits = exact(hidden) @ exact(parameters["weight"]).T
    expected = reference.token_log_probs(logits, np.array(targets), upstream)

    def loss(parameters, h):
        scores = trained_log_probs(h, targets, parameters, lambda p, h: h @ p["weight"].T, 507)
        return (scores.logp * mx.array(upstream.astype(np.float32))).sum()

    by_parameters, by_hidden = mx.grad(loss, argnums=(0, 1))(parameters, hidden)
    assert close(by_hidden, expected["logits"] @ exact(parameters["weight"]), 1e-5)
    assert close(by_parameters["weight"], expected["logits"].T @ exact(hidden), 1e-5)


def test_traffic_is_two_readings_and_one_writing(emulator, monkeypatch):
    made = []

    def maker(**parts):
        made.append(emulator.metal_kernel(**parts))
        return made[-1]

    use_kernels(monkeypatch, maker)
    logits, targets, upstream = problem(9, 32_003, mx.float16)
    mx.eval(mx.grad(lambda z: (full_log_probs(z, targets).logp * upstream).sum())(logits))
    read = sum(kernel.statistics.read["logits"] for kernel in made)
    written = sum(kernel.statistics.written.get("dlogits", 0) for kernel in made)
    assert logits.nbytes <= read - logits.nbytes <= logits.nbytes + 2 * 9  # the targets' once more
    assert written == logits.nbytes


def operations(name, **about):
    """A maker of kernels whose kernels are MLX operations, for what an emulator cannot do: be traced."""

    def forward(logits, targets, sizes):
        z = logits.astype(mx.float32)
        top, total = z.max(axis=-1), mx.logsumexp(z, axis=-1)
        p = mx.exp(z - total[:, None])
        target = mx.take_along_axis(z, targets[: len(z), None], axis=-1)[:, 0]
        return [total, target, top, (p * z).sum(axis=-1), mx.logsumexp(2 * z, axis=-1)]

    def gradient(logits, targets, log_sums, target_factors, softmax_factors, sizes):
        n = len(logits)
        onehot = mx.arange(logits.shape[1]) == targets[:n, None]
        softmax = mx.exp(logits.astype(mx.float32) - log_sums[:n, None])
        by_logits = target_factors[:n, None] * onehot + softmax_factors[:n, None] * softmax
        return [by_logits.astype(logits.dtype)]

    function = gradient if "gradient" in name else forward
    return lambda *, inputs, **rest: function(*inputs)


@pytest.mark.parametrize("how", WAYS)
def test_transformations(monkeypatch, how):
    logits, targets, upstream = problem(9, 507)
    expected = reference.token_log_probs(exact(logits), np.array(targets), np.array(upstream))
    use_kernels(monkeypatch, operations)
    function = WAYS[how](lambda z: (full_log_probs(z, targets).logp * upstream).sum())
    for _ in range(2):
        value, gradient = function(logits)
        assert close(value, (expected["logp"] * np.array(upstream)).sum(), 1e-5)
        assert close(gradient, expected["logits"], 1e-5)
