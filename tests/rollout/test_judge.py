"""A judge is asked in both orders, and a win is only what both orders say."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_align.rollout.judge import QUESTION, Duel, Judge, JudgeReward, spoken
from mlx_align.rollout.rewards import Request

DUELS = [
    Duel("q1", "good", "bad"),
    Duel("q2", "bad", "good"),
    Duel("q3", "good", "good "),
    Duel("q4", "fine", "good"),
]


class Stub(Judge):
    """A judge that says whether it prefers the first of two answers."""

    def __init__(self, prefers):
        self.prefers, self.asked = prefers, []

    def _prefers_a(self, rows, progress):
        self.asked.extend(rows)
        return np.array([self.prefers(a, b) for _, a, b in rows], bool)


def test_a_judge_that_knows():
    judge = Stub(lambda a, b: a == "good")
    results, disagreed = judge.results(DUELS)
    assert results.tolist() == [1.0, 0.0, 0.5, 0.0] and disagreed == 0
    assert ("q1", "good", "bad") in judge.asked and ("q1", "bad", "good") in judge.asked
    assert not [row for row in judge.asked if row[0] == "q3"]  # equal answers are not asked for


@pytest.mark.parametrize("first", [True, False])
def test_a_judge_that_only_sees_the_position_decides_nothing(first):
    results, disagreed = Stub(lambda a, b: first).results(DUELS)
    assert results.tolist() == [0.5] * 4 and disagreed == 1.0


def test_no_duel_is_no_question():
    results, disagreed = Stub(lambda a, b: True).results([])
    assert len(results) == 0 and disagreed == 0


def test_the_letter_that_is_likelier_next_wins(model_folder):
    judge = Judge(str(model_folder("llama")))
    loaded = judge._loaded
    rows = [(f"question {i}", f"one {i}" * i, "two {curly}") for i in range(4)]
    found = judge._prefers_a(rows, lambda what, done, total: None)
    encode = loaded.tokenizer.encode
    a, b = (
        [encode(s, add_special_tokens=False) for s in (letter, f" {letter}")] for letter in "AB"
    )
    a, b = ([ids[0] for ids in spellings if len(ids) == 1] for spellings in (a, b))
    assert a and b
    for (prompt, one, two), said in zip(rows, found, strict=True):
        ids = judge._encoder.prompt_ids(QUESTION.format(prompt=prompt, a=one, b=two))
        logits = np.array(loaded.model(mx.array([ids]))[0, -1], np.float64)
        probability = np.exp(logits - logits.max())
        assert said == (probability[a].sum() > probability[b].sum())


def test_as_a_reward_it_gives_the_share_of_comparisons_won():
    def asked(prompt, completion):
        return Request(prompt, completion, {}, True, 3, f"file:{prompt}")

    reward = JudgeReward("judge", Stub(lambda a, b: len(a) > len(b)))
    three = [asked("p", text) for text in ("aaa", "a", "aa")]
    pair = [asked("q", "x"), asked("q", "x")]
    assert reward([*three, *pair, asked("r", "alone")]) == [1.0, 0.0, 0.5, 0.5, 0.5, None]


def test_prompts_as_a_judge_reads_them():
    assert spoken(" hi ") == "hi"
    assert spoken(({"role": "user", "content": "hi"},)) == "hi"
    turns = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"})
    assert spoken(turns) == "system: be brief\n\nuser: hi"
