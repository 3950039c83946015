"""A judge is asked in both orders, and a win is only what both orders say."""

import sys
import types

import mlx.core as mx
import numpy as np
import pytest

from mlx_align.evaluate import judge as module
from mlx_align.evaluate.contender import open_contender
from mlx_align.evaluate.judge import (
    QUESTION,
    Duel,
    counts,
    judge_duels,
    reward_answers,
    spoken,
    win_rate,
)

DUELS = [
    Duel("q1", "good", "bad"),
    Duel("q2", "bad", "good"),
    Duel("q3", "good", "good "),
    Duel("q4", "fine", "good"),
]


def silent(what, done, total):
    pass


def judging(monkeypatch, prefers):
    """A judge that says whether it prefers the first of two answers."""
    monkeypatch.setattr(module, "open_contender", lambda *a, **k: (None, None))
    asked = []

    def prefers_a(judge, rows, progress):
        asked.extend(rows)
        return np.array([prefers(a, b) for _, a, b in rows], bool)

    monkeypatch.setattr(module, "_prefers_a", prefers_a)
    return asked


def test_a_judge_that_knows(monkeypatch):
    asked = judging(monkeypatch, lambda a, b: a == "good")
    results, disagreed = judge_duels("judge", DUELS, silent)
    assert results.tolist() == [1.0, 0.0, 0.5, 0.0] and disagreed == 0
    assert ("q1", "good", "bad") in asked and ("q1", "bad", "good") in asked
    assert not [row for row in asked if row[0] == "q3"]  # equal answers are not asked for


@pytest.mark.parametrize("first", [True, False])
def test_a_judge_that_only_sees_the_position_decides_nothing(monkeypatch, first):
    judging(monkeypatch, lambda a, b: first)
    results, disagreed = judge_duels("judge", DUELS, silent)
    assert results.tolist() == [0.5] * 4 and disagreed == 1.0


def test_no_duel_is_no_question(monkeypatch):
    judging(monkeypatch, lambda a, b: True)
    results, disagreed = judge_duels("judge", [], silent)
    assert len(results) == 0 and disagreed == 0


def test_the_letter_that_is_likelier_next_wins(model_folder):
    source = str(model_folder("llama"))
    judge, _ = open_contender("judge", source, thinking=False)
    rows = [(f"question {i}", f"one {i}" * i, "two {curly}") for i in range(4)]
    found = module._prefers_a(judge, rows, silent)
    encode = judge.loaded.tokenizer.encode
    a, b = (
        [encode(s, add_special_tokens=False) for s in (letter, f" {letter}")] for letter in "AB"
    )
    a, b = ([ids[0] for ids in spellings if len(ids) == 1] for spellings in (a, b))
    assert a and b
    for (prompt, one, two), said in zip(rows, found, strict=True):
        ids = judge.prompt_ids(QUESTION.format(prompt=prompt, a=one, b=two))
        logits = np.array(judge.loaded.model(mx.array([ids]))[0, -1], np.float64)
        probability = np.exp(logits - logits.max())
        assert said == (probability[a].sum() > probability[b].sum())


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


def test_prompts_as_a_judge_reads_them():
    assert spoken(" hi ") == "hi"
    assert spoken(({"role": "user", "content": "hi"},)) == "hi"
    turns = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"})
    assert spoken(turns) == "system: be brief\n\nuser: hi"
