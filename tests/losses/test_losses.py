"""Every method: golden numbers, gradients against float64, sums that do not mind how they are split."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_align.losses import METHODS, Scores
from mlx_align.losses.preference import DPO
from mlx_align.losses.sft import SFT

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "golden.json").read_text())
PAIRS = GOLDEN["pairs"]


def scores_of(pairs) -> Scores:
    """Scores whose sums are given: each completion's log-probability spread over its tokens."""
    token, ref, owner = [], [], []
    for i in range(len(pairs["chosen"])):
        for k, side in enumerate(("chosen", "rejected")):
            count = pairs[f"{side}_length"][i]
            token += [pairs[side][i] / count] * count
            ref += [pairs[f"ref_{side}"][i] / count] * count
            owner += [2 * i + k] * count
    ones = mx.ones((len(token),))
    return Scores.of(
        mx.array(token), ones > 2, mx.array(owner), ones, 2 * len(pairs["chosen"]), mx.array(ref)
    )


def test_the_golden_file_is_what_its_script_makes():
    from golden import make_golden

    assert make_golden.make() == GOLDEN


def test_our_numbers_are_the_shared_ones(shared):
    other = json.loads(shared("golden/golden_numbers.json").read_text())
    assert GOLDEN["dpo"]["per_pair"] == pytest.approx(other["dpo/sigmoid"]["per_pair"], rel=1e-7)
    assert GOLDEN["dpo"]["mean"] == pytest.approx(other["dpo/sigmoid"]["mean"], rel=1e-7)
    assert GOLDEN["dpo"]["metrics"]["rewards/accuracies"] == pytest.approx(
        other["dpo/rewards"]["accuracy"]
    )


@pytest.mark.parametrize("name", [n for n in METHODS if n in GOLDEN])
def test_golden_numbers(name):
    golden = GOLDEN[name]
    loss = METHODS[name](**golden["settings"])(scores_of(PAIRS))
    assert float(loss.total / loss.weight) == pytest.approx(golden["mean"], rel=1e-5)
    for metric, expected in golden["metrics"].items():
        total, count = loss.metrics[metric]
        assert float(total) / float(count) == pytest.approx(expected, rel=1e-5, abs=1e-6), metric


def test_dpo_gradient_is_the_papers():
    """Rafailov et al. 2023, equation 8: beta * sigmoid(-beta * difference) on every token."""
    beta = 0.3
    base = scores_of(PAIRS)

    def total(token):
        made = Scores.of(token, base.hit, base.owner, base.weight, 6, base.ref_token)
        return DPO(beta=beta)(made).total

    grad = np.array(mx.grad(total)(base.token), np.float64)
    p = {k: np.array(v, np.float64) for k, v in PAIRS.items()}
    difference = (p["chosen"] - p["ref_chosen"]) - (p["rejected"] - p["ref_rejected"])
    pull = beta / (1 + np.exp(beta * difference))
    signs = np.where(np.array(base.owner) % 2 == 0, -1.0, 1.0)
    assert np.allclose(grad, signs * pull[np.array(base.owner) // 2], rtol=1e-5)


def test_dpo_is_log_2_where_policy_and_reference_agree():
    same = {**PAIRS, "ref_chosen": PAIRS["chosen"], "ref_rejected": PAIRS["rejected"]}
    loss = DPO()(scores_of(same))
    assert float(loss.total / loss.weight) == pytest.approx(np.log(2), rel=1e-6)
    assert all(
        float(loss.metrics[f"rewards/{m}"][0]) == 0 for m in ("chosen", "margins", "accuracies")
    )


def test_dpo_stays_finite_far_out():
    far = {**PAIRS, "chosen": [-1e4, -1.0, -500.0], "rejected": [-1.0, -1e4, -500.0]}

    def total(shift):
        base = scores_of(far)
        moved = Scores.of(base.token + shift, base.hit, base.owner, base.weight, 6, base.ref_token)
        return DPO(beta=5.0)(moved).total

    value, grad = mx.value_and_grad(total)(mx.array(0.0))
    assert np.isfinite(value.item()) and np.isfinite(grad.item())


def test_sft_is_the_mean_over_tokens_not_over_examples():
    token = mx.array([-1.0, -2.0, -3.0, -0.5, -99.0])
    weight = mx.array([1.0, 1.0, 1.0, 1.0, 0.0])  # the last one is padding
    hit = mx.array([True, False, True, True, True])
    loss = SFT()(Scores.of(token, hit, mx.array([0, 0, 0, 1, 0]), weight, 2))
    assert float(loss.total) / float(loss.weight) == pytest.approx(6.5 / 4)
    total, count = loss.metrics["mean_token_accuracy"]
    assert float(total) / float(count) == pytest.approx(0.75)


@pytest.mark.parametrize("name", METHODS)
def test_totals_add_up_over_any_split(name):
    method = METHODS[name]()
    whole = method(scores_of(PAIRS))
    parts = [method(scores_of({k: v[i : i + 1] for k, v in PAIRS.items()})) for i in range(3)]
    assert float(whole.total) == pytest.approx(sum(float(p.total) for p in parts), rel=1e-5)
    assert float(whole.weight) == sum(float(p.weight) for p in parts)
    for metric, (total, count) in whole.metrics.items():
        assert float(total) == pytest.approx(
            sum(float(p.metrics[metric][0]) for p in parts), rel=1e-4
        )
        assert float(count) == sum(float(p.metrics[metric][1]) for p in parts)


def test_padding_counts_for_nothing():
    base = scores_of(PAIRS)
    extra = mx.array([-7.0, -7.0])
    padded = Scores.of(
        mx.concatenate([base.token, extra]),
        mx.concatenate([base.hit, extra < 0]),
        mx.concatenate([base.owner, mx.zeros((2,), base.owner.dtype)]),
        mx.concatenate([base.weight, mx.zeros((2,))]),
        6,
        mx.concatenate([base.ref_token, extra]),
    )
    for name, method in METHODS.items():
        a, b = method()(base), method()(padded)
        assert float(a.total) == pytest.approx(float(b.total), rel=1e-6), name
        assert float(a.weight) == float(b.weight), name


@pytest.mark.parametrize("name", METHODS)
def test_methods_explain_themselves(name):
    method = METHODS[name]
    assert method.__doc__ and "loss =" in method.__doc__ and method.source
    assert method.data in ("pairs", "completions")
