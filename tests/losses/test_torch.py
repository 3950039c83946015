"""Losses and their gradients through the chunked head, against torch with full logits and autograd."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_align.kernels.token_log_prob import Projection, frozen_log_probs
from mlx_align.losses import METHODS, Scores

torch = pytest.importorskip("torch", reason="the losses are compared with torch's autograd")

VOCABULARY, WIDTH, PAIRS = 3000, 24, 5


@pytest.fixture(scope="module")
def case():
    """Random hidden states, a head, targets, owners, reference log-probabilities."""
    rng = np.random.default_rng(5)
    lengths = rng.integers(2, 9, 2 * PAIRS)
    owner = np.repeat(np.arange(2 * PAIRS), lengths)
    count = len(owner)
    return {
        "hidden": rng.normal(size=(count, WIDTH)).astype(np.float32),
        "weight": (rng.normal(size=(VOCABULARY, WIDTH)) * 0.3).astype(np.float32),
        "targets": rng.integers(0, VOCABULARY, count),
        "owner": owner,
        "lengths": lengths,
        "reference": rng.normal(-8, 1, count).astype(np.float32),
        "margin": rng.uniform(0, 2, PAIRS).astype(np.float32),
    }


def ours(case, method, context=None):
    head = Projection(mx.array(case["weight"]))
    value = np.stack([case["margin"], np.zeros(PAIRS, np.float32)], 1).reshape(-1)
    owner, targets = mx.array(case["owner"]), mx.array(case["targets"])

    def loss(hidden):
        found = frozen_log_probs(hidden, targets, head, moments=method.needs_collision)
        scores = Scores.of(
            found.logp,
            found.hit,
            owner,
            mx.ones(owner.shape),
            2 * PAIRS,
            mx.array(case["reference"]),
            value=mx.array(value),
            mean_length=float(case["lengths"][0::2].mean()),
            collision=found.collision,
        )
        (here,), _ = method.couple([scores.stopped()], {})
        result = method(scores, here if context is None else context)
        return result.total / result.weight

    value, gradient = mx.value_and_grad(loss)(mx.array(case["hidden"]))
    return value.item(), np.array(gradient)


def theirs(case, formula):
    hidden = torch.tensor(case["hidden"], dtype=torch.float64, requires_grad=True)
    logits = hidden @ torch.tensor(case["weight"], dtype=torch.float64).T
    logs = torch.log_softmax(logits, -1)
    token = logs[torch.arange(len(hidden)), torch.tensor(case["targets"])]
    zeros = torch.zeros(2 * PAIRS, dtype=torch.float64)
    owner = torch.tensor(case["owner"])
    logp = zeros.index_add(0, owner, token)
    reference = zeros.index_add(0, owner, torch.tensor(case["reference"], dtype=torch.float64))
    lengths = torch.tensor(case["lengths"], dtype=torch.float64)
    value = formula(logp, reference, lengths, token, logs, owner)
    value.backward()
    return value.item(), hidden.grad.numpy()


def logistic(x):
    return torch.nn.functional.logsigmoid(x)


def dpo(logp, ref, n, *_):
    r = logp - ref
    return -logistic(0.1 * (r[0::2] - r[1::2])).mean()


def ipo(logp, ref, n, *_):
    r = (logp - ref) / n
    return ((r[0::2] - r[1::2] - 5.0) ** 2).mean()


def simpo(logp, ref, n, *_):
    a = logp / n
    return -logistic(2.5 * (a[0::2] - a[1::2]) - 1.375).mean()


def orpo(logp, ref, n, *_):
    a = logp / n
    odds = a - torch.log1p(-torch.exp(a))
    nll = -logp[0::2].sum() / n[0::2].sum()
    return nll - 0.1 * logistic(odds[0::2] - odds[1::2]).mean()


def cpo(logp, ref, n, *_):
    nll = -logp[0::2].sum() / n[0::2].sum()
    return nll - logistic(0.1 * (logp[0::2] - logp[1::2])).mean()


def kto(logp, ref, n, *_):
    r, z = logp - ref, 0.7
    good = torch.arange(2 * PAIRS) % 2 == 0
    return (1 - torch.sigmoid(0.1 * torch.where(good, r - z, z - r))).mean()


def wpo(logp, ref, n, token, logs, owner):
    aligned = (token - torch.logsumexp(2 * logs, -1)).detach()
    sums = torch.zeros(2 * PAIRS, dtype=torch.float64)
    sums = sums.index_add(0, owner, aligned) / n
    weights = torch.exp(sums[0::2]) * torch.exp(sums[1::2])
    r = logp - ref
    return -(weights * logistic(0.1 * (r[0::2] - r[1::2]))).mean()


@pytest.mark.parametrize(
    ("name", "settings", "formula"),
    [
        ("dpo", {}, dpo),
        ("ipo", {}, ipo),
        ("simpo", {}, simpo),
        ("orpo", {}, orpo),
        ("cpo", {}, cpo),
        ("dpo", {"wpo": True}, wpo),
    ],
)
def test_pair_losses(case, name, settings, formula):
    value, gradient = ours(case, METHODS[name](**settings))
    expected, expected_gradient = theirs(case, formula)
    assert value == pytest.approx(expected, rel=1e-5)
    scale = np.abs(expected_gradient).max()
    assert np.allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-5 * scale)


def test_kto(case):
    # Chosen completions are the good ones: their value is the label.
    labelled = {**case, "margin": np.ones(PAIRS, np.float32)}
    value, gradient = ours(labelled, METHODS["kto"](), context=mx.array(0.7))
    expected, expected_gradient = theirs(labelled, kto)
    assert value == pytest.approx(expected, rel=1e-5)
    scale = np.abs(expected_gradient).max()
    assert np.allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-5 * scale)


def test_reward(case):
    hidden = case["hidden"][: 2 * PAIRS]
    weight = case["weight"][:1]
    method = METHODS["reward"](center=0.01)
    value = np.stack([case["margin"], np.zeros(PAIRS, np.float32)], 1).reshape(-1)

    def loss(weight, hidden):
        reward = (hidden @ weight.T)[:, 0]
        scores = Scores.of_rewards(reward, mx.array(value), mx.ones((2 * PAIRS,)))
        result = method(scores)
        return result.total / result.weight

    found, gradients = mx.value_and_grad(loss, argnums=(0, 1))(mx.array(weight), mx.array(hidden))
    w = torch.tensor(weight, dtype=torch.float64, requires_grad=True)
    h = torch.tensor(hidden, dtype=torch.float64, requires_grad=True)
    s = (h @ w.T)[:, 0]
    margin = torch.tensor(case["margin"], dtype=torch.float64)
    expected = (
        -logistic(s[0::2] - s[1::2] - margin).mean() + 0.01 * ((s[0::2] + s[1::2]) ** 2).mean()
    )
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours_, theirs_ in zip(gradients, (w.grad, h.grad), strict=True):
        assert np.allclose(np.array(ours_), theirs_.numpy(), rtol=1e-4, atol=1e-6)
