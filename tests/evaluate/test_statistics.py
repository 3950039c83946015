"""Intervals against brute force, and against the formulas they stand for."""

import itertools
import math

import numpy as np
import pytest

from mlx_align.evaluate.statistics import (
    BINS,
    RESAMPLES,
    Measure,
    calibration_columns,
    calibration_error,
    exp_ratio,
    per_prompt,
    ratio,
)


def share(values, prompts=None):
    prompts = range(len(values)) if prompts is None else prompts
    sums = per_prompt(list(prompts), values, np.ones(len(values)))
    return Measure("k", "s", "w", sums, len(values), "higher", "share", yes_or_no=True)


def mean(values, weights=None, statistic=ratio):
    weights = np.ones(len(values)) if weights is None else weights
    sums = per_prompt(range(len(values)), values, weights)
    return Measure("k", "s", "w", sums, len(values), statistic=statistic)


def brute_force(draw, count, resamples=8000, seed=9):
    """Quantiles of draw(indices) over resamples drawn one by one."""
    rng = np.random.default_rng(seed)
    values = [draw(rng.integers(0, count, count)) for _ in range(resamples)]
    return np.quantile(values, [0.025, 0.975])


def test_prompts_are_added_up_in_order():
    sums = per_prompt(["b", "a", "b"], [1, 2, 3], [10, 20, 30])
    assert sums.tolist() == [[4, 40], [2, 20]]


@pytest.mark.parametrize(("statistic", "wrap"), [(ratio, float), (exp_ratio, math.exp)])
def test_a_weighted_mean_against_brute_force(statistic, wrap):
    rng = np.random.default_rng(0)
    nats, tokens = rng.gamma(2, 30, 50), rng.integers(5, 60, 50).astype(float)
    found = mean(nats, tokens, statistic).estimate()
    assert found.value == pytest.approx(wrap(nats.sum() / tokens.sum()))
    low, high = brute_force(lambda i: wrap(nats[i].sum() / tokens[i].sum()), 50)
    width = high - low
    assert abs(found.low - low) < 0.06 * width and abs(found.high - high) < 0.06 * width


def test_a_change_is_paired_by_prompt():
    rng = np.random.default_rng(1)
    before = rng.normal(0, 10, 80)
    after = before + rng.normal(0.5, 0.3, 80)
    found = mean(after).change(mean(before))
    low, high = brute_force(lambda i: after[i].mean() - before[i].mean(), 80)
    width = high - low
    assert abs(found.low - low) < 0.06 * width and abs(found.high - high) < 0.06 * width
    # Unpaired, the spread of the prompts would hide the change altogether.
    assert found.low > 0 and mean(after).estimate().low < mean(before).estimate().high


def test_shares_have_the_intervals_of_agresti_and_coull():
    for right, count in ((24, 24), (0, 40), (57, 60), (120, 200)):
        found = share([1.0] * right + [0.0] * (count - right)).estimate()
        centre = (right + 2) / (count + 4)
        spread = 1.96 * math.sqrt(centre * (1 - centre) / (count + 4))
        low, high = max(0, centre - spread), min(1, centre + spread)
        assert found.low == pytest.approx(min(low, found.value), abs=0.04)
        assert found.high == pytest.approx(max(high, found.value), abs=0.04)
        assert found.low < found.high


@pytest.mark.parametrize(
    ("up", "down", "count"), [(0, 0, 60), (4, 0, 24), (9, 1, 60), (30, 5, 200)]
)
def test_changes_of_shares_have_the_intervals_of_bonett_and_price(up, down, count):
    before = [0.0] * up + [1.0] * down + [1.0] * (count - up - down)
    after = [1.0] * up + [0.0] * down + [1.0] * (count - up - down)
    found = share(after).change(share(before))
    p, q = (up + 1) / (count + 2), (down + 1) / (count + 2)
    spread = 1.96 * math.sqrt((p + q - (p - q) ** 2) / (count + 2))
    assert found.value == pytest.approx((up - down) / count)
    assert found.low == pytest.approx(p - q - spread, abs=0.035)
    assert found.high == pytest.approx(p - q + spread, abs=0.035)


def test_nothing_changed_is_not_certainty():
    same = share([1.0] * 20)
    found = same.change(same)
    assert found.value == 0 and found.low < -0.05 and found.high > 0.05
    assert 0.05 < found.half_width < 0.2


def test_four_of_four_that_rose_are_no_proof():
    """McNemar's exact test gives p = 0.125; a plain bootstrap would leave out zero."""
    before, after = [0.0] * 4 + [1.0] * 20, [1.0] * 24
    assert share(after).change(share(before)).low <= 0
    before, after = [0.0] * 8 + [1.0] * 16, [1.0] * 24
    assert share(after).change(share(before)).low > 0


def test_cases_of_one_prompt_are_one_piece_of_evidence():
    values = np.random.default_rng(2).integers(0, 2, 30).astype(float)
    alone = share(values).estimate()
    copied = share(np.repeat(values, 10), np.repeat(np.arange(30), 10)).estimate()
    assert copied.value == pytest.approx(alone.value)
    assert copied.high - copied.low == pytest.approx(alone.high - alone.low)


def test_too_few_prompts_have_no_interval():
    assert mean([1.0, 2.0, 3.0, 4.0]).estimate().low is None
    assert mean([1.0] * 5).estimate().low is not None
    assert mean([1.0]).estimate().half_width is None


def test_intervals_are_the_same_every_time():
    values = np.random.default_rng(3).normal(size=37)
    assert mean(values).estimate() == mean(values.copy()).estimate()
    assert RESAMPLES == 2000


def test_calibration_error_against_its_definition():
    rng = np.random.default_rng(4)
    probability = rng.uniform(0, 1, 400)
    sums = per_prompt(range(400), *calibration_columns(probability))
    measure = Measure("k", "s", "w", sums, 400, statistic=calibration_error)
    expected = 0.0
    confidence = np.maximum(probability, 1 - probability)
    edges = np.linspace(0.5, 1, BINS + 1)
    for low, high in itertools.pairwise(edges):
        inside = (confidence >= low) & (confidence < high)
        if inside.any():
            right = (probability[inside] > 0.5).mean()
            expected += inside.mean() * abs(confidence[inside].mean() - right)
    assert measure.value == pytest.approx(expected)

    def draw(indices):
        return calibration_error(sums[indices].sum(axis=0))

    low, high = brute_force(draw, 400, resamples=3000)
    found = measure.estimate()
    assert found.low == pytest.approx(low, abs=0.006) and found.high == pytest.approx(
        high, abs=0.006
    )


def test_perfect_and_worst_calibration():
    def error(probability):
        return calibration_error(np.sum(np.array(calibration_columns(probability)), axis=1))

    # 70 % sure, and right in 70 of 100.
    assert error(np.array([0.7] * 70 + [0.3] * 30)) == pytest.approx(0, abs=1e-12)
    assert error(np.array([0.0] * 10)) == pytest.approx(1)
    assert error(np.array([0.5] * 10)) == pytest.approx(0)


def test_the_interval_covers_what_it_should():
    """Of 200 samples of 40 prompts, about 95 % have an interval that holds the true share."""
    rng = np.random.default_rng(5)
    inside = 0
    for _ in range(200):
        found = share((rng.random(40) < 0.9).astype(float)).estimate()
        inside += found.low <= 0.9 <= found.high
    assert inside >= 182
