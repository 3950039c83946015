"""Win rates, by a judge or by a reward model."""

import sys
import types

import numpy as np
import pytest

from mlx_align.evaluate.judge import Duel, counts, reward_answers, win_rate


def test_ties_are_kept():
    results = np.array([1, 1, 0, 0.5, 0.5, 0.5])
    duels = [Duel(f"q{i}", "a", "b") for i in range(6)]
    assert counts(results) == (2, 3, 1)
    measure = win_rate("wins/judge", "after beats before", duels, results)
    assert measure.value == pytest.approx(3.5 / 6) and measure.cases == 6
    half = win_rate("wins/judge", "after beats before", duels, np.full(6, 0.5))
    assert half.value == 0.5 and measure.change(half).low < 0 < measure.change(half).high


def test_a_reward_model_scores_prompt_and_answer(monkeypatch):
    seen = []

    class Fake:
        def score(self, rows):
            seen.extend(rows)
            return np.array([len(text) for _, text in rows], np.float32)

    room = types.ModuleType("mlx_align.model.reward")
    room.open_reward_model = lambda source: Fake()
    monkeypatch.setitem(sys.modules, "mlx_align.model.reward", room)
    assert reward_answers("run", [("p", "abc"), ("p", "")]).tolist() == [3.0, 0.0]
    assert seen == [("p", "abc"), ("p", "")]
