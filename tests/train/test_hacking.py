"""Signs of a hacked reward: each rule on a run that shows it and on healthy ones."""

import numpy as np
import pytest

from mlx_align.train.diagnosis import Diagnosis
from mlx_align.train.hacking import HACKING_RULES, SAMPLING_RULES

SETTINGS = {"batch_size": 8, "max_tokens": 64, "reward_clip": 1.0, "kl_budget": None}
STEPS = 60


def course(start, end, noise, seed):
    rng = np.random.default_rng(seed)
    return np.linspace(start, end, STEPS) + rng.normal(0, noise, STEPS)


def sampled(seed=0, *, held_out=(), **courses):
    """Rows of a healthy run whose reward climbs; `courses` are (start, end, noise) of other metrics."""
    healthy = {
        "reward": (0.2, 0.9, 0.05),
        "completions/mean_length": (40, 44, 4),
        "completions/repetition": (0.05, 0.08, 0.02),
        "completions/distinct_2": (0.8, 0.7, 0.05),
        "completions/clipped_ratio": (0.1, 0.1, 0.03),
        "rewards/clipped_ratio": (0.1, 0.2, 0.05),
        "objective/kl": (0, 12, 1),
    }
    columns = {
        name: course(*values, seed + i)
        for i, (name, values) in enumerate({**healthy, **courses}.items())
    }
    rows = [
        {"step": i + 1, "split": "train", "loss": 0.0, "learning_rate": 1e-5, "grad_norm": 1.0}
        | {name: float(values[i]) for name, values in columns.items()}
        for i in range(STEPS)
    ]
    for step, reward, watch in held_out:
        row = {
            "step": step,
            "split": "valid",
            "reward": reward,
            "watch": watch,
            "watch_error": 0.03,
        }
        rows.insert(step + sum(r["split"] == "valid" for r in rows), row)
    return rows


def findings(rows, **settings):
    diagnosis = Diagnosis("grpo", {**SETTINGS, **settings}, STEPS, True)
    return {f.rule: f for row in rows for f in diagnosis.update(row)}


LONGER = {"completions/mean_length": (40, 80, 4)}
FAULTS = {
    "reward-hacking": {"held_out": [(0, 0.2, 0.3), (20, 0.5, 0.6), (40, 0.8, 0.4)]},
    "length-hacking": LONGER,
    "repetition": {"completions/repetition": (0.05, 0.5, 0.05)},
    "monotony": {"completions/distinct_2": (0.8, 0.2, 0.05)},
    "kl-budget": {"objective/kl": (0, 120, 5)},
    "length-drift": {**LONGER, "reward": (0.5, 0.5, 0.05)},
    "rewards-clipped": {"rewards/clipped_ratio": (0.6, 0.9, 0.02)},
    "unfinished": {"completions/clipped_ratio": (0.7, 0.9, 0.02)},
}


def test_every_rule_has_a_run_that_shows_it():
    rules = {rule.__name__.replace("_", "-") for rule in (*HACKING_RULES, *SAMPLING_RULES)}
    assert rules == FAULTS.keys()


@pytest.mark.parametrize("rule", FAULTS)
@pytest.mark.parametrize("seed", range(5))
def test_what_shows_is_said_and_nothing_else(rule, seed):
    found = findings(sampled(seed, **FAULTS[rule]))
    assert found.keys() == {rule}
    signs = {r.__name__.replace("_", "-") for r in HACKING_RULES}
    assert found[rule].hacking == (rule in signs)


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_is_left_alone(seed):
    climbs = [(0, 0.2, 0.3), (20, 0.5, 0.55), (40, 0.8, 0.7), (60, 0.9, 0.68)]
    assert findings(sampled(100 + seed, held_out=climbs)) == {}


def test_a_watched_reward_that_falls_with_the_other_is_no_hacking():
    both_fall = [(0, 0.8, 0.6), (20, 0.5, 0.3)]
    assert "reward-hacking" not in findings(sampled(held_out=both_fall))


def test_changes_without_a_rising_reward_are_no_signs():
    flat = {"reward": (0.5, 0.5, 0.05), "completions/repetition": (0.05, 0.5, 0.05)}
    assert findings(sampled(**flat)) == {}


def test_the_budget_is_the_one_that_was_given():
    rows = sampled(**{"objective/kl": (0, 30, 1)})
    assert "--kl-budget of 10" in findings(rows, kl_budget=10.0)["kl-budget"].text
    assert findings(rows) == {}
