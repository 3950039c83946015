"""Losses on samples: golden numbers, gradients against float64, and what must cancel."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_align.errors import SettingsError
from mlx_align.losses import METHODS, Scores
from mlx_align.losses.policy import GRPO, RLOO, Critic

# Two completions of four and three tokens; the shared collection's PPO and GRPO example.
OLD = [-1.0, -0.5, -2.0, -0.7, -0.3, -1.2, -0.9]
STEP = [0.05, -0.3, 0.25, 0.0, -0.1, 0.4, 0.0]
REFERENCE = [-1.1, -0.6, -1.5, -0.9, -0.4, -1.0, -1.1]
ADVANTAGE = [1.0] * 4 + [-0.5] * 3
OWNER = [0, 0, 0, 0, 1, 1, 1]
NEW = np.add(OLD, STEP)


def scores(token=None, advantage=None, old=None, weight=None):
    token = mx.array(NEW.astype(np.float32)) if token is None else token
    made = Scores.of(
        token,
        token > 0,
        mx.array(OWNER),
        mx.ones((7,)) if weight is None else mx.array(weight),
        2,
        mx.array(REFERENCE),
    )
    return made._replace(
        old_token=mx.array(OLD if old is None else old),
        advantage=mx.array(ADVANTAGE if advantage is None else advantage),
    )


def value(method, made=None) -> float:
    loss = method(made or scores())
    return float(loss.total) / float(loss.weight)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"aggregation": "grpo", "beta": 0.04}, -0.21528191),
        ({"aggregation": "dapo", "beta": 0.04}, -0.32698073),
        ({"aggregation": "bnpo", "beta": 0.04}, -0.32698073),
        ({"aggregation": "dr-grpo", "beta": 0.04, "max_tokens": 8}, -0.14305407),
        ({"aggregation": "grpo", "objective": "gspo"}, -0.22370727),
        ({"aggregation": "dapo", "objective": "cispo", "cap": 1.2}, 0.4686278),
        ({"aggregation": "dapo", "delta": 1.25}, -0.34495294),
        ({"aggregation": "grpo", "objective": "sapo"}, -0.50109128),
    ],
)
def test_golden_numbers(settings, expected):
    assert value(GRPO(**settings)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("advantage", "old", "new", "expected"),
    [
        (2, 0.50, 0.55, -2.2), (2, 0.40, 0.60, -2.4), (-2, 0.50, 0.45, 1.8), (-2, 0.50, 0.35, 1.6),
        (-2, 0.20, 0.50, 4.0), (-2, 0.40, 0.60, 3.0),
    ],
)  # fmt: skip
def test_two_sided_clip_of_one_token(advantage, old, new, expected):
    """The numbers of TRL's own test of the two-sided clip (epsilon 0.2, delta 2)."""
    token = mx.log(mx.array([float(new)]))
    made = Scores.of(token, token > 0, mx.array([0]), mx.ones((1,)), 1)
    made = made._replace(
        old_token=mx.log(mx.array([float(old)])), advantage=mx.array([float(advantage)])
    )
    assert value(GRPO(delta=2.0), made) == pytest.approx(expected, rel=1e-5)


def test_sequence_ratio_metric_is_gspos():
    loss = GRPO(objective="gspo")(scores())
    total, count = loss.metrics["val/ratio"]
    assert float(total) / float(count) == pytest.approx((4 + 3 * 1.10517092) / 7, rel=1e-5)


def test_rloo_takes_whole_completions():
    ratio = np.exp([np.sum(STEP[:4]), np.sum(STEP[4:])])
    advantage = np.array([1.0, -0.5])
    clipped = np.clip(ratio, 0.8, 1.2)
    expected = -np.minimum(ratio * advantage, clipped * advantage).mean()
    assert value(RLOO()) == pytest.approx(expected, rel=1e-5)


def test_ppo_and_its_critic_golden():
    """The shared collection's example: whitened advantages, clipped policy and value losses."""
    whitened = [
        0.78342856,
        0.71659572,
        1.00593274,
        0.67505034,
        -1.16590303,
        -1.09554069,
        -0.91956364,
    ]
    loss = METHODS["ppo"]()(scores(advantage=whitened))
    assert float(loss.total / loss.weight) == pytest.approx(0.05317691, rel=1e-5)
    total, count = loss.metrics["clip_ratio/region_mean"]
    assert float(total) / float(count) == pytest.approx(0.14285714, rel=1e-5)
    value = np.array([0.1, 0.2, 0.0, 0.3, 0.5, 0.4, 0.2])
    moved = value + [0.5, -0.1, 0.1, 0.0, -0.4, 0.0, 0.3]
    returns = [0.88515125, 0.926475, 0.9805, 0.99, -0.426275, -0.4645, -0.51]
    made = scores(mx.array(moved.astype(np.float32)), advantage=returns, old=value.tolist())
    critic = Critic(clip=0.2)(made)
    assert float(critic.total / critic.weight) == pytest.approx(0.32655563, rel=1e-5)


POLICY = [n for n, m in METHODS.items() if m.data == "prompts" and m.advantage != "pairs"]
VARIANTS = [("grpo", {"objective": o}) for o in ("clip", "gspo", "cispo", "sapo")]
VARIANTS += [("grpo", {"aggregation": a}) for a in ("grpo", "dr-grpo")]
VARIANTS += [(n, {}) for n in POLICY if n != "grpo"]


def gradient(name, settings, **changes):
    method = METHODS[name](**settings)

    def loss(token):
        made = method(scores(token, **changes))
        return made.total / made.weight

    start = changes.get("token", mx.array(np.array(OLD, np.float32)))
    return np.array(mx.grad(loss)(start), np.float64)


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_turning_the_rewards_round_turns_the_gradient_round(name, settings):
    """At the policy that sampled, before any clip."""
    settings = {**settings, "beta": 0.0}
    up = gradient(name, settings)
    down = gradient(name, settings, advantage=[-a for a in ADVANTAGE])
    assert np.abs(up).max() > 0
    # SAPO's gate is a little sharper for negative advantages: its gradient there is the same.
    assert np.allclose(up, -down, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_no_advantage_no_gradient(name, settings):
    assert not gradient(name, {**settings, "beta": 0.0}, advantage=[0.0] * 7).any()


def test_with_no_advantage_only_the_kl_pulls_towards_the_reference():
    pull = gradient("grpo", {"beta": 0.1}, advantage=[0.0] * 7)
    # d k3 / d token = 1 - exp(ref - token): down where the policy is above the reference.
    expected = 0.1 * (1 - np.exp(np.subtract(REFERENCE, OLD))) / 7
    assert np.allclose(pull, expected, rtol=1e-4)
    assert np.sign(pull).tolist() == np.sign(np.subtract(OLD, REFERENCE)).tolist()


def test_k3_keeps_its_digits_near_the_reference():
    """The naive form loses them all: k3(1e-4) = 5e-9."""
    made = scores(mx.array(REFERENCE) - 1e-4, advantage=[0.0] * 7)
    assert float(GRPO(beta=1.0)(made).metrics["kl"][0]) / 7 == pytest.approx(5e-9, rel=2e-2)


def test_gradients_agree_with_float64():
    """PPO's clip with KL at a moved policy, by central differences of a restatement."""

    def restated(token):
        ratio = np.exp(token - OLD)
        k3 = np.exp(REFERENCE - token) - (REFERENCE - token) - 1
        a = np.array(ADVANTAGE)
        return (-np.minimum(ratio * a, np.clip(ratio, 0.8, 1.28) * a) + 0.04 * k3).mean()

    method = GRPO(beta=0.04, epsilon_high=0.28)

    def loss(token):
        made = method(scores(token))
        return made.total / made.weight

    ours = np.array(mx.grad(loss)(mx.array(NEW.astype(np.float32))))
    h = 1e-6
    for i in range(7):
        step = np.eye(7)[i] * h
        expected = (restated(NEW + step) - restated(NEW - step)) / (2 * h)
        assert ours[i] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_masked_completions_count_for_nothing():
    weight = [1.0] * 4 + [0.0] * 3
    for aggregation in ("grpo", "dapo"):
        masked = value(GRPO(aggregation=aggregation), scores(weight=weight))
        ratio = np.exp(STEP[:4])
        expected = -np.minimum(ratio, np.clip(ratio, 0.8, 1.2)).mean()
        assert masked == pytest.approx(expected, rel=1e-5)


def test_a_group_of_one_is_refused():
    for cls in (GRPO, RLOO):
        with pytest.raises(SettingsError, match="every advantage is 0"):
            cls(group_size=1)
    for name in ("reinforce++", "ppo"):
        METHODS[name](group_size=1)
