"""Every method: golden numbers, gradients against float64, sums that do not mind how they are split."""

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from golden import make_golden

from mlx_align.errors import SettingsError
from mlx_align.losses import METHODS, Scores
from mlx_align.losses.labels import BCO, KTO
from mlx_align.losses.likelihood import ORPO, log1mexp
from mlx_align.losses.preference import DPO, MPO
from mlx_align.losses.reward import Reward
from mlx_align.losses.sft import SFT

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "golden.json").read_text())
PAIRS, LABELS, REWARDS = GOLDEN["pairs"], GOLDEN["labels"], GOLDEN["rewards"]
CASES = [pytest.param(case, id=f"{case['method']}-{i}") for i, case in enumerate(GOLDEN["cases"])]
PAIR_METHODS = [n for n, m in METHODS.items() if m.data == "pairs" and m.reads == "tokens"]
LABEL_METHODS = [n for n, m in METHODS.items() if m.data == "labels"]
SIDES = ("chosen", "rejected")
# Without ties, at which sorting has no derivative.
SMOOTH = {**PAIRS, "rejected": [-14.0, -18.0, -9.1]}


def scores_of(pairs, **extra) -> Scores:
    """Scores whose sums are given: each completion's log-probability spread over its tokens."""
    token, ref, owner, value = [], [], [], []
    for i in range(len(pairs["chosen"])):
        for k, side in enumerate(SIDES):
            count = pairs[f"{side}_length"][i]
            token += [pairs[side][i] / count] * count
            ref += [pairs[f"ref_{side}"][i] / count] * count
            owner += [2 * i + k] * count
            value.append(pairs["margin"][i] if side == "chosen" else 0.0)
    ones = mx.ones((len(token),))
    return Scores.of(
        mx.array(token),
        ones > 2,
        mx.array(owner),
        ones,
        2 * len(pairs["chosen"]),
        mx.array(ref),
        value=mx.array(value),
        mean_length=sum(PAIRS["chosen_length"]) / len(PAIRS["chosen_length"]),
        collision=-2.0 * ones,
        **extra,
    )


def labelled(labels=LABELS, logp=None) -> Scores:
    """Scores of judged completions of one token each."""
    logp = mx.array(labels["logp"]) if logp is None else logp
    count = len(labels["logp"])
    return Scores.of(
        logp,
        logp > 0,
        mx.arange(count),
        mx.ones((count,)),
        count,
        mx.array(labels["ref_logp"]),
        value=mx.array(labels["label"]).astype(mx.float32),
    )


def other_scores() -> Scores:
    return labelled({**LABELS, "logp": LABELS["other"], "ref_logp": LABELS["ref_other"]})


def run(method, parts) -> tuple[float, list]:
    """The loss of several parts of one step, as the step computes it."""
    contexts = method.couple([p.stopped() for p in parts], {})[0]
    losses = [method(part, context) for part, context in zip(parts, contexts, strict=True)]
    total, weight = (sum(float(x[i]) for x in losses) for i in (0, 1))
    return total / weight, losses


def one(pairs, index):
    return {key: values[index : index + 1] for key, values in pairs.items()}


def test_the_golden_file_is_what_its_script_makes():
    assert json.loads(json.dumps(make_golden.make())) == GOLDEN


@pytest.mark.parametrize("case", CASES)
def test_our_restatement_is_the_shared_one(case, shared):
    other = json.loads(shared("golden/golden_numbers.json").read_text())
    if case["shared"] is None:
        pytest.skip("the shared collection has no number for this one")
    assert case["per_pair"] == pytest.approx(other[case["shared"]]["per_pair"], rel=1e-7, abs=1e-8)


def test_our_other_restatements_are_the_shared_ones(shared):
    other = json.loads(shared("golden/golden_numbers.json").read_text())
    kto, bco = other["kto(wd=1,wu=1.33)"], other["bco(first step, delta=batch mean)"]
    assert GOLDEN["kto"] == pytest.approx([kto["mean"], kto["kl"]], rel=1e-7)
    assert GOLDEN["bco"] == pytest.approx([bco["mean"], bco["delta"]], rel=1e-7)
    assert GOLDEN["reward"]["plain"] == pytest.approx(other["rm/bt"], rel=1e-7)
    assert GOLDEN["reward"]["margin"] == pytest.approx(other["rm/bt_margin"], rel=1e-7)
    centring = GOLDEN["reward"]["centred"] - GOLDEN["reward"]["plain"]
    assert centring == pytest.approx(other["rm/center_term(0.01*mean((rc+rr)^2))"], rel=1e-6)


def test_every_pair_method_is_checked():
    assert {case["method"] for case in GOLDEN["cases"]} == set(PAIR_METHODS)


@pytest.mark.parametrize("case", CASES)
def test_golden_numbers(case):
    loss, _ = run(METHODS[case["method"]](**case["settings"]), [scores_of(PAIRS)])
    assert loss == pytest.approx(case["loss"], rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_float64_restatement(case):
    """d loss / d log-probability of every completion, by central differences in float64."""
    name, settings = case["method"], case["settings"]
    method, scores = METHODS[name](**settings), scores_of(SMOOTH)
    (context,), _ = method.couple([scores], {})

    def loss(token):
        made = scores_of(SMOOTH)
        made = Scores.of(
            token, made.hit, made.owner, made.weight, 6, made.ref_token, value=made.value,
            mean_length=made.mean_length, collision=made.collision,
        )  # fmt: skip
        result = method(made, context)
        return result.total / result.weight

    gradient = np.array(mx.grad(loss)(scores.token), np.float64)
    owner, h = np.array(scores.owner), 1e-5
    for i in range(3):
        for k, side in enumerate(SIDES):

            def moved(by, i=i, side=side):
                values = list(SMOOTH[side])
                values[i] += by
                return make_golden.pair_loss(name, settings, {**SMOOTH, side: values})

            expected = (moved(h) - moved(-h)) / (2 * h)
            # One token more or less moves the sum as much as the sum itself moves.
            ours = gradient[owner == 2 * i + k]
            assert np.allclose(ours, expected, rtol=2e-5, atol=1e-7), (side, i, ours, expected)


def test_all_methods_differ_on_one_input():
    # The reference orders the pairs otherwise than the policy, or sorting would change nothing.
    pairs, numbers = {**PAIRS, "ref_chosen": [-20.0, -13.0, -8.0]}, {}
    for name in PAIR_METHODS:
        loss, _ = run(METHODS[name](), [scores_of(pairs)])
        assert round(loss, 6) not in numbers.values(), (name, numbers)
        numbers[name] = round(loss, 6)


def test_first_step_identities():
    """Where policy and reference agree, every loss has a known value."""
    same = {**PAIRS, "ref_chosen": PAIRS["chosen"], "ref_rejected": PAIRS["rejected"]}
    b, log2 = 0.1, math.log(2)
    expected = {
        "dpo": log2, "cdpo": log2, "robust": log2, "hinge": 1.0, "ipo": (1 / (2 * b)) ** 2,
        "exo": math.log(0.5) - 0.5 * math.log(1e-3 * (1 - 1e-3)), "nca": 2 * log2,
        "bco-pair": 2 * log2, "sppo": 2 * (0.5 / b) ** 2, "aot": log2, "apo-zero": 1.0,
        "apo-down": 1.0, "dpo-norm": log2, "dpop": log2,
    }  # fmt: skip
    for name, value in expected.items():
        loss, parts = run(METHODS[name](), [scores_of(same)])
        assert loss == pytest.approx(value, rel=1e-5), name
        assert float(parts[0].metrics["rewards/margins"][0]) == 0, name


def test_dpo_metrics():
    loss = DPO(beta=0.1)(scores_of(PAIRS))
    for metric, expected in GOLDEN["dpo_metrics"].items():
        total, count = loss.metrics[metric]
        assert float(total) / float(count) == pytest.approx(expected, rel=1e-5, abs=1e-6), metric


@pytest.mark.parametrize("name", PAIR_METHODS)
def test_losses_stay_finite_far_out(name):
    """The stress inputs that overflow losses with a bare exp."""
    far = {
        **PAIRS,
        "chosen": [410.0, -1e4, -1.0],
        "rejected": [810.5, -1.0, -1e4],
        "ref_chosen": [-610.0, -0.1, -500.0],
        "ref_rejected": [110.6, 0.5, -500.0],
    }
    variants = [{}]
    if "f_divergence" in METHODS[name].__dataclass_fields__:
        variants += [{"f_divergence": kind} for kind in ("forward_kl", "js", "alpha")]
    for settings in variants:
        method = METHODS[name](**settings)
        base = scores_of(far)
        (context,), _ = method.couple([base], {})

        def total(shift, method=method, base=base, context=context):
            token = base.token + shift
            made = Scores.of(token, base.hit, base.owner, base.weight, 6, base.ref_token)
            return method(made._replace(collision=base.collision), context).total

        value, grad = mx.value_and_grad(total)(mx.array(0.0))
        assert np.isfinite(value.item()) and np.isfinite(grad.item()), (name, settings)


@pytest.mark.parametrize("name", PAIR_METHODS)
def test_totals_add_up_over_any_split(name):
    method = METHODS[name]()
    whole, (one_loss,) = run(method, [scores_of(PAIRS)])
    parts, losses = run(method, [scores_of(one(PAIRS, i)) for i in range(3)])
    assert whole == pytest.approx(parts, rel=1e-5)
    assert float(one_loss.weight) == sum(float(p.weight) for p in losses)
    for metric, (total, count) in one_loss.metrics.items():
        assert float(total) == pytest.approx(
            sum(float(p.metrics[metric][0]) for p in losses), rel=1e-4, abs=1e-5
        )
        assert float(count) == sum(float(p.metrics[metric][1]) for p in losses)


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
        value=base.value,
        mean_length=base.mean_length,
    )
    for name in ("sft", *PAIR_METHODS):
        a, b = (run(METHODS[name](), [s])[0] for s in (base, padded))
        assert a == pytest.approx(b, rel=1e-6), name


@pytest.mark.parametrize("name", PAIR_METHODS)
def test_a_pair_of_weight_two_counts_like_two_pairs(name):
    if METHODS[name].coupled:
        pytest.skip("what a pair is matched with depends on the others")
    method = METHODS[name]()
    twice = {key: [*values, values[0]] for key, values in PAIRS.items()}
    length = (2 * 6 + 10 + 4) / 4
    a, _ = run(method, [scores_of(twice)._replace(mean_length=length)])
    weighted = scores_of(PAIRS, importance=mx.array([2.0, 2.0, 1.0, 1.0, 1.0, 1.0]))
    b, _ = run(method, [weighted._replace(mean_length=length)])
    assert a == pytest.approx(b, rel=1e-5)


def test_ld_alpha_counts_the_longer_ones_rest_less():
    pairs = {**one(PAIRS, 0), "chosen_length": [2], "rejected_length": [4]}
    plain = DPO(ld_alpha=1.0)(scores_of(pairs)).total
    assert float(plain) == pytest.approx(float(DPO()(scores_of(pairs)).total))
    # Half of the rejected tokens count by a quarter: 2 + 2 / 4 of 4 tokens' worth.
    share = (2 + 2 * 0.25) / 4
    d = (-12.0 + 13.0) - share * (-14.0 + 13.5)
    loss = DPO(ld_alpha=0.25)(scores_of(pairs))
    assert float(loss.total) == pytest.approx(-make_golden.log_sigmoid(0.1 * d), rel=1e-5)
    # Rewards are reported of the plain sums.
    assert float(loss.metrics["rewards/rejected"][0]) == pytest.approx(0.1 * -0.5, rel=1e-5)


def test_wpo_weights_are_the_probability_of_writing_the_pair():
    scores = scores_of(PAIRS)
    plain = [float(DPO()(scores_of(one(PAIRS, i))).total) for i in range(3)]
    weights = [
        math.exp(PAIRS["chosen"][i] / PAIRS["chosen_length"][i] + 2)
        * math.exp(PAIRS["rejected"][i] / PAIRS["rejected_length"][i] + 2)
        for i in range(3)
    ]
    expected = sum(w * x for w, x in zip(weights, plain, strict=True)) / 3
    assert run(DPO(wpo=True), [scores])[0] == pytest.approx(expected, rel=1e-5)


def test_mixtures_are_sums_and_refuse_what_they_cannot_mix():
    scores = scores_of(PAIRS)
    a, b = (run(METHODS[n](), [scores])[0] for n in ("hinge", "ipo"))
    mixed, _ = run(MPO(losses=("hinge=2", "ipo=0.5"), sft_weight=0.0), [scores])
    assert mixed == pytest.approx(2 * a + 0.5 * b, rel=1e-5)
    with pytest.raises(SettingsError, match="'aot' cannot be part of a mixture"):
        MPO(losses=("aot=1",))
    with pytest.raises(SettingsError, match="is not NAME=WEIGHT"):
        MPO(losses=("dpo=much",))


def test_orpo_on_the_full_text_counts_the_prompt():
    scores = scores_of(PAIRS)
    prompt = mx.array([-3.0, -5.0])
    made = Scores.of(
        mx.concatenate([scores.token, prompt]),
        mx.concatenate([scores.hit, prompt > 0]),
        mx.concatenate([scores.owner, mx.array([0, 2])]),
        mx.concatenate([scores.weight, mx.zeros((2,))]),
        6,
        mean_length=22 / 3,
        in_prompt=mx.concatenate([mx.zeros_like(scores.weight), mx.ones((2,))]),
    )
    loss, (part,) = run(ORPO(nll_on="full"), [made])
    bare, _ = run(ORPO(sft_weight=0.0), [scores])
    nll = -(sum(PAIRS["chosen"]) - 8.0) / 22
    assert loss == pytest.approx(bare + nll, rel=1e-5)
    assert float(part.metrics["nll_loss"][1]) == 22


def test_log1mexp_near_zero_and_far_from_it():
    x = np.array([-1e-5, -1e-3, -0.5, -math.log(2), -1.0, -30.0, -90.0])
    ours = np.array(log1mexp(mx.array(x)), np.float64)
    assert np.allclose(ours, make_golden.log1mexp(x), rtol=1e-5, atol=1e-38)
    gradient = mx.grad(lambda x: log1mexp(x).sum())(mx.array([0.0, -1e-7, -0.5, -200.0]))
    assert np.isfinite(np.array(gradient)).all()


def test_kto_golden_and_gradient():
    method = KTO(beta=0.1, undesirable_weight=1.33)
    (z,), _ = method.couple([other_scores()], {})
    expected, kl = GOLDEN["kto"]
    loss = method(labelled(), z)
    assert float(z) == pytest.approx(kl, rel=1e-5)
    assert float(loss.total / loss.weight) == pytest.approx(expected, rel=1e-5)
    assert float(loss.metrics["rewards/chosen"][0]) == pytest.approx(0.15, rel=1e-5)
    assert float(loss.metrics["rewards/rejected"][1]) == 2

    def total(logp):
        return method(labelled(logp=logp), z).total / 4

    gradient, h = np.array(mx.grad(total)(mx.array(LABELS["logp"]))), 1e-5
    for i in range(4):

        def moved(by, i=i):
            logp = list(LABELS["logp"])
            logp[i] += by
            return make_golden.kto_loss({**LABELS, "logp": logp}, 0.1, 1.0, 1.33)[0]

        assert gradient[i] == pytest.approx((moved(h) - moved(-h)) / (2 * h), rel=1e-4)


def test_kto_at_the_reference_and_without_kl():
    same = {**LABELS, "ref_logp": LABELS["logp"]}
    method = KTO()
    (z,), _ = method.couple([labelled(same)], {})
    assert float(z) == 0
    loss = method(labelled(same), z)
    assert float(loss.total / loss.weight) == pytest.approx(0.5)
    (z,), _ = KTO(kl=False).couple([other_scores()], {})
    assert float(z) == 0


def test_kto_never_takes_a_negative_kl_and_one_class_is_no_nan():
    low = {**LABELS, "logp": [-20.0] * 4, "ref_logp": [-10.0] * 4}
    (z,), _ = KTO().couple([labelled(low)], {})
    assert float(z) == 0
    loss = KTO()(labelled({**LABELS, "label": [1, 1, 1, 1]}), z)
    assert np.isfinite(float(loss.total)) and float(loss.metrics["rewards/rejected"][1]) == 0


def test_kto_says_when_the_classes_are_out_of_balance():
    assert KTO().advice([1.0] * 8 + [0.0] * 7) == []
    (line,) = KTO().advice([1.0] * 30 + [0.0] * 10)
    assert "a ratio of 3.00" in line and "--desirable-weight 0.33 to 0.44" in line
    assert "--undesirable-weight 2.25 to 3.00" in line
    assert KTO(undesirable_weight=2.5).advice([1.0] * 30 + [0.0] * 10) == []
    assert "all 3 completions are good" in KTO().advice([1.0] * 3)[0]


def test_bco_golden_and_its_running_mean():
    expected, delta = GOLDEN["bco"]
    method = BCO(beta=0.1)
    contexts, state = method.couple([labelled()], {})
    loss = method(labelled(), contexts[0])
    assert contexts[0] == pytest.approx(delta, rel=1e-5)
    assert float(loss.total / loss.weight) == pytest.approx(expected, rel=1e-5)
    # The second step's mean is that of both.
    (second,), state = method.couple([other_scores()], state)
    ratios = np.subtract(LABELS["logp"], LABELS["ref_logp"])
    others = np.subtract(LABELS["other"], LABELS["ref_other"])
    assert second == pytest.approx(0.1 * np.concatenate([ratios, others]).mean(), rel=1e-4)
    assert state["count"] == 8


def reward_scores(reward, weight=(1.0, 1.0, 1.0)):
    value = mx.array([x for m in REWARDS["margin"] for x in (m, 0.0)])
    return Scores.of_rewards(reward, value, mx.repeat(mx.array(weight), 2))


def test_reward_golden_and_gradient():
    interleaved = [
        x for pair in zip(REWARDS["chosen"], REWARDS["rejected"], strict=True) for x in pair
    ]
    for name, settings in (
        ("plain", {"margin": False}),
        ("margin", {}),
        ("centred", {"center": 0.01, "margin": False}),
    ):
        loss = Reward(**settings)(reward_scores(mx.array(interleaved)))
        expected = GOLDEN["reward"][name]
        assert float(loss.total / loss.weight) == pytest.approx(expected, rel=1e-5), name
    # A tie is no hit.
    assert float(loss.metrics["accuracy"][0]) == 1
    method = Reward(center=0.01)
    gradient = mx.grad(lambda r: method(reward_scores(r)).total / 3)(mx.array(interleaved))
    h = 1e-5
    for i in range(3):
        for k, side in enumerate(SIDES):

            def moved(by, i=i, side=side):
                values = list(REWARDS[side])
                values[i] += by
                return make_golden.reward_loss({**REWARDS, side: values}, center=0.01)

            expected = (moved(h) - moved(-h)) / (2 * h)
            assert float(gradient[2 * i + k]) == pytest.approx(expected, rel=1e-4)


def test_sft_is_the_mean_over_tokens_not_over_examples():
    token = mx.array([-1.0, -2.0, -3.0, -0.5, -99.0])
    weight = mx.array([1.0, 1.0, 1.0, 1.0, 0.0])  # the last one is padding
    hit = mx.array([True, False, True, True, True])
    loss = SFT()(Scores.of(token, hit, mx.array([0, 0, 0, 1, 0]), weight, 2))
    assert float(loss.total) / float(loss.weight) == pytest.approx(6.5 / 4)
    total, count = loss.metrics["mean_token_accuracy"]
    assert float(total) / float(count) == pytest.approx(0.75)


def test_dft_weights_tokens_by_their_probability_without_a_gradient_through_it():
    token = mx.array([-1.0, -2.0])

    def loss(token):
        made = Scores.of(token, token > 0, mx.array([0, 0]), mx.ones((2,)), 1)
        result = SFT(loss="dft")(made)
        return result.total / result.weight

    expected = (math.exp(-1) * 1 + math.exp(-2) * 2) / 2
    value, gradient = mx.value_and_grad(loss)(token)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert np.allclose(np.array(gradient), [-math.exp(-1) / 2, -math.exp(-2) / 2], rtol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_methods_explain_themselves(name):
    method = METHODS[name]
    assert method.__doc__ and "loss =" in method.__doc__.replace("the loss =", "loss =")
    assert method.source and method.data in ("pairs", "labels", "completions", "prompts")
