"""Measures from scores and answers that are written down by hand."""

import numpy as np
import pytest

from mlx_align.data.records import PairRecord
from mlx_align.data.template import make_example
from mlx_align.evaluate.cases import CaseSet, Choice, Prompt, Question, Request
from mlx_align.evaluate.measures import Findings, answer_measures, measure
from mlx_align.rollout.sampler import Completion


def example(*lengths):
    completions = [list(range(n)) for n in lengths]
    return make_example([1], completions, [[True] * n for n in lengths], "f:1")


def said(*texts):
    return [Completion(tuple(range(len(t.split()))), t, True) for t in texts]


def by_key(measures):
    return {m.key: m for m in measures}


def pairs(logps, lengths):
    cases = tuple(PairRecord(f"prompt {i}", "a", "b", "f") for i in range(len(logps)))
    scores = [
        [(example(*n), np.array(s, float))] for s, n in zip(logps, lengths, strict=True)
    ]  # fmt: skip
    return CaseSet("set", "pairs", cases), Findings({}, {("set", "pairs"): scores})


def test_pairs_by_hand():
    """Chosen and rejected: -4 in 4 tokens against -6 in 2; -9 in 3 against -2 in 1; a tie."""
    lengths = [(4, 2), (3, 1), (2, 2)]
    cases, found = pairs([(-4, -6), (-9, -2), (-5, -5)], lengths)
    _, reference = pairs([(-5, -5), (-10, -1), (-5, -5)], lengths)
    measures = by_key(measure(None, cases, found, reference, beta=0.5))
    assert measures["pairs/accuracy"].value == pytest.approx((1 + 0 + 0.5) / 3)
    # Per token -1 against -3, -3 against -2, a tie.
    assert measures["pairs/accuracy_per_token"].value == pytest.approx((1 + 0 + 0.5) / 3)
    assert measures["pairs/margin"].value == pytest.approx((2 - 7 + 0) / 3)
    # Log-ratios: 1 and -1, 1 and -1, 0 and 0; times beta: margins 1, 1, 0.
    assert measures["pairs/reward_accuracy"].value == pytest.approx(2.5 / 3)
    assert measures["pairs/reward_margin"].value == pytest.approx(2 / 3)
    # sigmoid(1) = 0.731 twice right, 0.5 once half right.
    assert measures["pairs/reward_calibration"].value == pytest.approx(2 / 3 * (1 - 0.7310586))
    odds = [1 / (1 + np.exp(-2)), 1 / (1 + np.exp(-7))]
    expected = (abs(odds[0] - 1) + abs(odds[1] - 0)) / 3
    # 0.88 and 0.999 lie in different bins.
    assert measures["pairs/calibration"].value == pytest.approx(expected, abs=1e-6)


def test_length_decides_between_summed_and_per_token():
    cases, found = pairs([(-10, -6)], [(10, 2)])
    measures = by_key(measure(None, cases, found))
    assert measures["pairs/accuracy"].value == 0
    assert measures["pairs/accuracy_per_token"].value == 1
    assert "pairs/reward_accuracy" not in measures


def test_the_reference_against_itself_has_no_calibration():
    cases, found = pairs([(-4, -6), (-9, -2)], [(1, 1), (1, 1)])
    measures = by_key(measure(None, cases, found, found))
    assert measures["pairs/reward_accuracy"].value == 0.5
    assert "pairs/reward_calibration" not in measures


def test_pairs_of_one_prompt_are_one_row():
    cases, found = pairs([(-1, -2)] * 4, [(1, 1)] * 4)
    cases = CaseSet("set", "pairs", tuple(PairRecord("same", "a", "b", "f") for _ in range(4)))
    assert by_key(measure(None, cases, found))["pairs/accuracy"].sums.tolist() == [[4, 4]]


def test_refusals_by_harm_and_type():
    cases = CaseSet(
        "set",
        "requests",
        (
            Request("a", True, "contrast_x"),
            Request("b", True, "contrast_x"),
            Request("c", False, "x"),
            Request("d", False, "y"),
        ),
    )
    answers = said("I can't help with that.", "Sure.", "I won't do that.", "Of course.")
    found = Findings({("set", "requests"): answers}, {})
    values = {m.key: (m.value, m.cases, m.better) for m in measure(None, cases, found)}
    assert values == {
        "refuses/harmful": (0.5, 2, "higher"),
        "refuses/harmless": (0.5, 2, "lower"),
        "refuses/type/harmful/contrast_x": (0.5, 2, "higher"),
        "refuses/type/harmless/x": (1.0, 1, "lower"),
        "refuses/type/harmless/y": (0.0, 1, "lower"),
    }


def test_questions_and_choices():
    questions = CaseSet(
        "q", "questions", (Question("a", ("4", "four")), Question("b", ("#### 9",)))
    )
    found = Findings({("q", "questions"): said("It is four.", "3 * 3 = 8")}, {})
    (right,) = measure(None, questions, found)
    assert right.value == 0.5
    choices = CaseSet(
        "c", "choices", (Choice("a", ("x", "long one"), 1), Choice("b", ("x", "y"), 0))
    )
    scores = [
        [(example(1), np.array([-3.0])), (example(4), np.array([-8.0]))],  # -3 and -2 per token
        [(example(2), np.array([-4.0])), (example(2), np.array([-3.0]))],
    ]
    (picked,) = measure(None, choices, Findings({}, {("c", "choices"): scores}))
    assert picked.value == 0.5


def test_length_endings_and_repetition_of_answers():
    cases = CaseSet("p", "prompts", tuple(Prompt(str(i)) for i in range(3)))
    completions = [
        Completion((1, 2, 3, 4, 5), "a b c d e", True),  # 4-grams: 2 of 2 distinct
        Completion((7,) * 8, "ha " * 8, False),  # 1 of 5 distinct
        Completion((1,), "a", True),
    ]
    measures = by_key(answer_measures([cases], Findings({("p", "prompts"): completions}, {})))
    assert measures["answers/length"].value == pytest.approx(14 / 3)
    assert measures["answers/ended"].value == pytest.approx(2 / 3)
    assert measures["answers/repeated"].value == pytest.approx((0 + 0.8 + 0) / 3)
    assert measures["answers/distinct"].value == pytest.approx((1 + 1 / 7 + 1) / 3)
    assert answer_measures([], Findings({}, {})) == []
