"""Losses on compared samples: against the losses of pairs, and against float64."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_align.losses import METHODS, Scores

# Two pairs: completions of three, two, two and three tokens.
OWNER = [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
TOKEN = [-1.0, -0.5, -2.0, -0.7, -0.3, -1.2, -0.9, -0.4, -1.5, -0.8]
REFERENCE = [-1.1, -0.6, -1.5, -0.9, -0.4, -1.0, -1.1, -0.5, -1.4, -1.0]
THEIRS = [0, 0, 0, 1, 1, 1, 1, 0, 0, 0]


def scores(token=None, advantage=THEIRS):
    token = mx.array(TOKEN) if token is None else token
    made = Scores.of(token, token > 0, mx.array(OWNER), mx.ones((10,)), 4, mx.array(REFERENCE))
    return made._replace(advantage=mx.array(advantage, mx.float32))


def value(method, made=None) -> float:
    loss = method(made or scores())
    return float(loss.total) / float(loss.weight)


def gradient(method, advantage):
    return np.array(mx.grad(lambda t: method(scores(t, advantage)).total)(mx.array(TOKEN)))


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_online_dpo_is_the_loss_of_a_pair(loss):
    ours = METHODS["online-dpo"](beta=0.3, pair_loss=loss)
    assert value(ours) == value(METHODS[loss](beta=0.3))


def test_xpo_lowers_what_the_reference_wrote():
    token, reference = np.array(TOKEN), np.array(REFERENCE)
    ratio = np.bincount(OWNER, token - reference)
    margins = 0.3 * (ratio[0::2] - ratio[1::2])
    theirs = (token * THEIRS).sum()
    expected = (np.logaddexp(0, -margins).sum() + 0.01 * theirs) / 2
    assert value(METHODS["xpo"](beta=0.3, alpha=0.01)) == pytest.approx(expected, rel=1e-6)
    with_bonus, without = (gradient(METHODS["xpo"](alpha=a), THEIRS) for a in (0.01, 0.0))
    assert np.allclose(with_bonus - without, 0.01 * np.array(THEIRS), atol=1e-7)


def test_nash_md_against_float64():
    edge = np.array([0.2, -0.1, 0.0, 0.5])[OWNER]
    token, reference = np.array(TOKEN), np.array(REFERENCE)
    method = METHODS["nash-md"](beta=0.3)
    expected = (0.3 * (token - reference) * token - edge * token).sum() / 4
    assert value(method, scores(advantage=edge)) == pytest.approx(expected, rel=1e-5)
    # The log-ratio is a weight that no gradient flows through.
    assert np.allclose(gradient(method, edge), 0.3 * (token - reference) - edge, atol=1e-6)
    total, count = method(scores(advantage=edge)).metrics["rewards/probabilities"]
    assert float(total / count) == pytest.approx(0.5 + 0.6 / 4)


def test_turning_the_comparisons_round_turns_nash_md_round():
    method, edge = METHODS["nash-md"](beta=1e-9), np.array([0.2, -0.1, 0.3, 0.5])[OWNER]
    assert np.allclose(gradient(method, edge), -gradient(method, -edge), atol=1e-7)


def test_where_nobody_wins_only_the_kl_pulls():
    pull = gradient(METHODS["nash-md"](beta=0.3), [0.0] * 10)
    assert np.sign(pull).tolist() == np.sign(np.subtract(TOKEN, REFERENCE)).tolist()
