"""Advantages against golden numbers, hand calculations and their defining identities."""

import json

import numpy as np
import pytest

from mlx_align.errors import NonFiniteError, SettingsError
from mlx_align.rollout.advantages import (
    AdaptiveKL,
    gae,
    group_advantages,
    kl_penalties,
    leave_one_out,
    returns_to_go,
    whiten,
    without_signal,
)

# The rollout of the golden numbers: two completions, of four and of three tokens.
LOGP = np.array([[-1.0, -0.5, -2.0, -0.7], [-0.3, -1.2, -0.9, 0.0]])
REF = np.array([[-1.1, -0.6, -1.5, -0.9], [-0.4, -1.0, -1.1, 0.0]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
VALUES = np.array([[0.1, 0.2, 0.0, 0.3], [0.5, 0.4, 0.2, 0.0]])
GROUPS = np.array([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]])

GOLDEN = {
    "kl1": [0.1, 0.1, -0.5, 0.2, 0.1, -0.2, 0.2, 0.0],
    "kl3": [
        0.00483742, 0.00483742, 0.14872127, 0.01873075, 0.00483742, 0.02140276, 0.01873075, 0.0,
    ],
    "advantages": [0.78515125, 0.726475, 0.9805, 0.69, -0.926275, -0.8645, -0.71, 0.0],
    "returns": [0.88515125, 0.926475, 0.9805, 0.99, -0.426275, -0.4645, -0.51, 0.0],
    "whiten_bessel(TRL)": [
        0.78342856, 0.71659572, 1.00593274, 0.67505034, -1.16590303, -1.09554069, -0.91956364, 0.0,
    ],
    "whiten_biased(OpenRLHF/NeMo)": [
        0.84619956, 0.77401185, 1.08653154, 0.7291377, -1.25931921, -1.18331919, -0.99324226, 0.0,
    ],
    "grpo/adv_group(std ddof=1, +1e-4)": [0.86587543, -0.86587543, -0.86587543, 0.86587543, 0, 0, 0, 0],
    "grpo/adv_drgrpo(no scale)": [0.5, -0.5, -0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
    "grpo/adv_batch_scale": [0.56401245, -0.56401245, -0.56401245, 0.56401245, 0.0, 0.0, 0.0, 0.0],
    "rloo/adv": [0.66666667, -0.66666667, -0.66666667, 0.66666667, 0.0, 0.0, 0.0, 0.0],
    "gae/nemo_hand_example": [0.5, 0.0, 0.5, -3.0],
}  # fmt: skip


def computed():
    """What the module makes of the golden rollout, under the golden names."""
    rewards = -0.05 * kl_penalties(LOGP, REF, "k1") * MASK
    rewards[0, 3] += 1.0
    rewards[1, 2] -= 0.5
    advantages, returns = gae(rewards, VALUES, MASK, 1.0, 0.95)
    return {
        "kl1": kl_penalties(LOGP, REF, "k1") * MASK,
        "kl3": kl_penalties(LOGP, REF, "k3") * MASK,
        "advantages": advantages,
        "returns": returns,
        "whiten_bessel(TRL)": whiten(advantages, MASK),
        "whiten_biased(OpenRLHF/NeMo)": whiten(advantages, MASK, bessel=False),
        "grpo/adv_group(std ddof=1, +1e-4)": group_advantages(GROUPS),
        "grpo/adv_drgrpo(no scale)": group_advantages(GROUPS, "none"),
        "grpo/adv_batch_scale": group_advantages(GROUPS, "batch"),
        "rloo/adv": leave_one_out(GROUPS),
        "gae/nemo_hand_example": gae([0, 0, 1, 0], [0, 1, 2, 3], np.ones(4), 0.5, 0.0)[0],
    }


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers(name):
    # Rounded to 8 digits; the biased whitening clamps its variance at 1e-8 where ours adds it.
    assert computed()[name].ravel() == pytest.approx(GOLDEN[name], abs=3e-8)


def test_golden_numbers_are_those_of_the_collection(shared):
    golden = json.loads(shared("golden/golden_numbers.json").read_text())
    for name, values in computed().items():
        expected = golden["ppo"].get(name) or golden.get(name)
        assert values.ravel() == pytest.approx(expected, abs=3e-8), name


def reference_gae(rewards, values, gamma, lam):
    """Sum over l of (gamma lam)^l delta_{t+l}, written out for one completion without padding."""
    count = len(rewards)
    following = [*values[1:], 0.0]
    delta = [rewards[t] + gamma * following[t] - values[t] for t in range(count)]
    return [sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, count)) for t in range(count)]


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.9, 0.8), (0.99, 0.0), (0.7, 1.0)])
def test_gae_is_the_sum_of_discounted_errors(gamma, lam):
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 3, 7))
    mask = rng.random((3, 7)) < 0.7
    # What stands where the mask is 0 is never looked at, not even a NaN.
    dirty = [np.where(mask, x, np.nan) for x in (rewards, values)]
    advantages, returns = gae(*dirty, mask, gamma, lam)
    for row in range(3):
        keep = mask[row]
        expected = reference_gae(rewards[row][keep], values[row][keep], gamma, lam)
        assert advantages[row][keep] == pytest.approx(expected, abs=1e-12)
    assert not advantages[~mask].any() and not returns[~mask].any()
    assert returns[mask] == pytest.approx((advantages + values)[mask])


def test_gae_with_lambda_1_is_the_return_minus_the_value():
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=(2, 2, 5))
    mask = np.ones((2, 5))
    advantages, returns = gae(rewards, values, mask, 0.9, 1.0)
    assert returns == pytest.approx(returns_to_go(rewards, mask, 0.9))
    assert advantages == pytest.approx(returns_to_go(rewards, mask, 0.9) - values)


def test_returns_to_go_by_hand():
    rewards = [[1.0, 2.0, 4.0], [1.0, 9.0, 3.0]]
    mask = [[1, 1, 1], [1, 0, 1]]
    assert returns_to_go(rewards, mask, 0.5).tolist() == [[3.0, 4.0, 4.0], [2.5, 0.0, 3.0]]
    assert returns_to_go(rewards, mask).tolist() == [[7.0, 6.0, 4.0], [4.0, 0.0, 3.0]]


def test_whitened_numbers_have_mean_0_and_deviation_1():
    rng = np.random.default_rng(2)
    x, mask = rng.normal(3, 5, (4, 6)).astype(np.float32), rng.random((4, 6)) < 0.6
    for bessel in (True, False):
        kept = whiten(x, mask, bessel)[mask]
        assert kept.mean() == pytest.approx(0, abs=1e-12)
        assert kept.std(ddof=int(bessel)) == pytest.approx(1, abs=1e-8)
    assert whiten(x, mask).dtype == np.float64
    # TRL's own example: [1, 2, 3, 4] of which 2 and 3 count has mean 2.5 and variance 0.5.
    assert whiten([1, 2, 3, 4], [0, 1, 1, 0]) == pytest.approx([0, -(0.5**0.5), 0.5**0.5, 0])


@pytest.mark.parametrize("mask", [[0, 0, 0], [0, 1, 0]])
def test_too_few_numbers_to_whiten_are_0(mask):
    assert whiten([1.0, 2.0, 3.0], mask).tolist() == [0, 0, 0]


def test_nan_rewards_are_left_out_of_everything():
    nan = np.nan
    rewards = np.array([[1.0, nan, 0.0, 2.0], [nan, nan, nan, nan], [nan, 5.0, nan, nan]])
    without = np.array([[1.0, 0.0, 2.0]])
    for scale in ("group", "none"):
        found = group_advantages(rewards, scale)
        assert found[0, [0, 2, 3]] == pytest.approx(group_advantages(without, scale)[0])
        assert found[np.isnan(rewards)].tolist() == [0] * 8
        assert not found[1:].any()
    deviation = np.std([1, 0, 2, 5], ddof=1) + 1e-4
    assert group_advantages(rewards, "batch")[0] == pytest.approx(
        [0, 0, -1 / deviation, 1 / deviation]
    )
    assert leave_one_out(rewards)[0, [0, 2, 3]] == pytest.approx(leave_one_out(without)[0])
    assert not leave_one_out(rewards)[1:].any()
    assert without_signal(rewards).tolist() == [False, True, True]


def test_equal_rewards_have_exactly_no_advantage():
    rewards = np.full((2, 3), 0.1)
    assert rewards.mean(1)[0] != 0.1  # what makes this worth a test
    rewards[1, 0] = 0.2
    for found in (
        *(group_advantages(rewards, s) for s in ("group", "batch", "none")),
        leave_one_out(rewards),
    ):
        assert found[0].tolist() == [0, 0, 0] and found[1].all()


def test_leave_one_out_is_each_reward_minus_the_mean_of_the_others():
    rng = np.random.default_rng(3)
    rewards = rng.normal(size=(3, 5))
    expected = [[r - np.delete(row, i).mean() for i, r in enumerate(row)] for row in rewards]
    assert leave_one_out(rewards) == pytest.approx(np.array(expected))
    # NeMo-Aligner's hand example: the baselines of prompts A and B, one reward of B masked out.
    nemo = np.array([[1.0, 0.0, -3.0, 5.0], [2.0, 7.0, -1.0, np.nan]])
    baselines = nemo - leave_one_out(nemo)
    assert baselines[0] == pytest.approx([2 / 3, 1, 2, -2 / 3])
    assert baselines[1, :3] == pytest.approx([3, 1 / 2, 9 / 2])


def test_a_group_of_one_is_refused():
    for function in (group_advantages, leave_one_out):
        with pytest.raises(SettingsError, match="at least 2"):
            function(np.ones((4, 1)))
        with pytest.raises(ValueError, match="prompts, completions"):
            function(np.ones(4))
    with pytest.raises(SettingsError, match="group, batch, none"):
        group_advantages(GROUPS, "std")


def test_kl_estimators():
    assert kl_penalties([-1.0], [-1.5], "k1") == pytest.approx([0.5])
    assert kl_penalties([-1.0], [-1.5], "k2") == pytest.approx([0.125])
    assert kl_penalties([-1.0], [-1.5], "k3") == pytest.approx([np.exp(-0.5) - 1 + 0.5])
    with pytest.raises(SettingsError, match="k1, k2, k3"):
        kl_penalties([0.0], [0.0], "k4")


@pytest.mark.parametrize("d", [1e-2, 1e-4, 1e-6, -1e-4])
def test_k3_keeps_its_digits_near_0(d):
    # Its series: d^2/2 + d^3/6 + d^4/24.
    assert kl_penalties([0.0], [d], "k3")[0] == pytest.approx(
        d * d / 2 * (1 + d / 3 + d * d / 12), rel=1e-6, abs=0
    )


def test_k1_and_k3_estimate_the_divergence():
    policy, reference = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, 0.3])
    exact = (policy * np.log(policy / reference)).sum()
    for estimator in ("k1", "k3"):
        found = kl_penalties(np.log(policy), np.log(reference), estimator)
        assert (policy * found).sum() == pytest.approx(exact)
    assert (kl_penalties(np.log(policy), np.log(reference), "k3") >= 0).all()


def test_the_kl_coefficient_moves_towards_the_target():
    kl = AdaptiveKL(0.2, target=6.0)
    # Twice the target: the error of 1 is clipped to 0.2; 0.2 * (1 + 0.2 * 256 / 10000).
    assert kl.update(12.0, 256) == pytest.approx(0.2 * 1.00512)
    assert kl.update(6.0, 256) == pytest.approx(0.2 * 1.00512)
    assert kl.update(5.4, 100) == pytest.approx(0.2 * 1.00512 * (1 - 0.1 * 100 / 10000))
    assert kl.update(-1.0, 100) < kl.update(6.0, 100) * 1.0001
    # Two half batches move it as one whole, to first order.
    one, two = AdaptiveKL(0.2, 6.0), AdaptiveKL(0.2, 6.0)
    one.update(12.0, 20)
    two.update(12.0, 10), two.update(12.0, 10)
    assert one.coefficient == pytest.approx(two.coefficient, rel=1e-6)


def test_the_kl_coefficient_stays_positive():
    kl = AdaptiveKL(0.2, target=6.0)
    assert kl.update(0.0, 10**6) > 0


def test_the_kl_coefficient_goes_on_from_its_state():
    kl = AdaptiveKL(0.2, target=6.0)
    kl.update(12.0, 256)
    again = AdaptiveKL(0.2, target=6.0)
    again.load(json.loads(json.dumps(kl.state())))
    assert again.coefficient == kl.coefficient
    assert again.update(3.0, 64) == kl.update(3.0, 64)


def test_the_kl_coefficient_refuses_nonsense():
    with pytest.raises(SettingsError, match="target"):
        AdaptiveKL(0.2, target=0.0)
    with pytest.raises(SettingsError, match="horizon"):
        AdaptiveKL(0.2, target=6.0, horizon=-1)
    with pytest.raises(NonFiniteError, match="nan"):
        AdaptiveKL(0.2, target=6.0).update(float("nan"), 8)
