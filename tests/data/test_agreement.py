"""Agreement of annotators: published examples, formulas written a second time, labels found in rows."""

import json
import math
import random

import numpy as np
import pytest

from mlx_align.data.agreement import (
    choose_side,
    cohen_kappa,
    collect_votes,
    estimate_noise,
    fleiss_kappa,
    majority,
    measure_agreement,
    noise_rate,
    percent_agreement,
    wilson_share,
)
from mlx_align.errors import DataError

# Fleiss 1971, table 1: six psychiatrists, thirty patients, five diagnoses; row by row.
DIAGNOSES = """
444444 222555 233335 555555 222444 113333 333355 113334 114444 555555 144444 124444 222333 144444
224445 333335 111455 111112 224444 133555 555555 244444 224555 114444 144445 222224 111155 224444
133333 555555
"""


def counts(rows, labels):
    return np.array([[row.count(label) for label in labels] for row in rows])


def test_fleiss_kappa_of_the_paper():
    assert fleiss_kappa(counts(DIAGNOSES.split(), "12345")) == pytest.approx(0.430, abs=5e-4)


def test_fleiss_kappa_of_fourteen_raters():
    table = """0 0 0 0 14  0 2 6 4 2  0 0 3 5 6  0 3 9 2 0  2 2 8 1 1
               7 7 0 0 0  3 2 6 3 0  2 5 3 2 2  6 5 2 1 0  0 2 2 3 7"""
    table = np.array(table.split(), int).reshape(10, 5)
    assert fleiss_kappa(table) == pytest.approx(0.210, abs=5e-4)


def test_cohen_kappa_by_hand():
    # 20 both yes, 15 both no, 5 and 10 split: po = 0.7, pe = 0.5 * 0.6 + 0.5 * 0.4 = 0.5.
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert percent_agreement(first, second) == (pytest.approx(0.7), 50)


def brute_cohen(first, second):
    """From the confusion matrix, with missing labels left out first."""
    both = [(a, b) for a, b in zip(first, second, strict=True) if None not in (a, b)]
    known = sorted({x for pair in both for x in pair})
    matrix = np.zeros((len(known), len(known)))
    for a, b in both:
        matrix[known.index(a), known.index(b)] += 1
    matrix /= matrix.sum()
    expected = matrix.sum(axis=1) @ matrix.sum(axis=0)
    return (np.trace(matrix) - expected) / (1 - expected)


def brute_fleiss(rows):
    """From all ordered pairs of raters of a row, and of labels drawn from the whole."""
    everything = [label for row in rows for label in row]
    agree = [
        np.mean([a == b for i, a in enumerate(row) for j, b in enumerate(row) if i != j])
        for row in rows
    ]
    expected = np.mean([[a == b for a in everything] for b in everything])
    return (np.mean(agree) - expected) / (1 - expected)


@pytest.mark.parametrize("seed", range(5))
def test_kappas_against_formulas_written_again(seed):
    draw = random.Random(seed)
    rows = [[draw.choice("aabc") for _ in range(3)] for _ in range(40)]
    for row in rows[:15]:
        row[1] = row[0]
    assert fleiss_kappa(counts(rows, "abc")) == pytest.approx(brute_fleiss(rows))
    holes = [[None if draw.random() < 0.2 else label for label in row] for row in rows]
    table = dict(zip("xyz", zip(*holes, strict=True), strict=True))
    found = measure_agreement(table)
    for pair in found.pairs:
        assert pair.kappa == pytest.approx(brute_cohen(table[pair.first], table[pair.second]))
    size = max((2, 3), key=lambda n: sum(sum(x is not None for x in row) == n for row in holes))
    full = [[x for x in row if x is not None] for row in holes]
    full = [row for row in full if len(row) == size]
    assert found.fleiss_rows == len(full)
    assert found.fleiss == pytest.approx(brute_fleiss(full))


def test_kappa_is_not_defined_with_one_label():
    assert cohen_kappa(["a", "a"], ["a", "a"]) is None
    assert cohen_kappa(["a", None], [None, "a"]) is None
    assert fleiss_kappa(np.array([[3, 0], [3, 0]])) is None
    assert fleiss_kappa(np.array([[1, 0], [1, 0]])) is None


def test_each_annotator_against_the_others():
    found = measure_agreement({"ann": "121", "bob": "111", "cat": "112"})
    ann, bob, cat = found.annotators
    # Of ann's three rows the others agree in two (11, 11, 12); she is with them in the first.
    assert (ann.rows, ann.agreement) == (2, 0.5)
    assert (bob.rows, bob.agreement, cat.rows, cat.agreement) == (1, 1, 2, 0.5)
    assert [(p.first, p.second, p.agreement) for p in found.pairs] == [
        ("ann", "bob", pytest.approx(2 / 3)),
        ("ann", "cat", pytest.approx(1 / 3)),
        ("bob", "cat", pytest.approx(2 / 3)),
    ]
    assert (found.rows, found.unanimous) == (3, 1)
    assert ann.labels == {"1": 2, "2": 1}


def test_majority_needs_more_than_half():
    assert majority("aab") == "a" and majority("ab") is None and majority([]) is None
    assert majority(["a", None, None]) == "a" and majority("aabbc") is None


# Newcombe 1998, table I, method 3.
@pytest.mark.parametrize(
    ("hits", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_as_published(hits, total, low, high):
    share = wilson_share(hits, total)
    assert (share.low, share.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    mirrored = wilson_share(total - hits, total)
    assert mirrored.low == pytest.approx(1 - share.high)


def test_noise_is_found_again():
    assert noise_rate(2 * 0.1 * 0.9) == pytest.approx(0.1)
    assert noise_rate(0) == 0 and noise_rate(0.5) == noise_rate(0.9) == 0.5
    draw = random.Random(0)
    rows = [[draw.random() < 0.15 for _ in range(3)] for _ in range(20000)]
    found = estimate_noise(rows)
    assert found.judged == 60000
    assert found.rate == pytest.approx(0.15, abs=0.005)
    assert found.low < found.rate < found.high


def test_disagreements_are_counted_by_pairs_of_labels():
    found = estimate_noise(5 * ["aab", "aa", "a", ["a", None, "b"]])
    assert (found.differing, found.judged) == (15, 25)
    assert estimate_noise(["ab"] * 19) is None


ROWS = {
    "columns": [{"annotator1": 1, "annotator2": 2.0, "annotator_3": "1"}, {"annotator1": 2}],
    "letters": [{"rater_a": "x", "rater_b": "y"}],
    "list": [{"votes": ["1", 2, None]}, {"votes": ["1"]}],
    "objects": [
        {
            "annotations": [
                {"annotator": "bob", "label": True},
                {"annotator": "ann", "label": False},
            ]
        },
        {"annotations": [{"annotator": "ann", "label": True}]},
    ],
    "single": [{"winner": "model_a"}, {"winner": "tie"}],
}
TABLES = {
    "columns": {"annotator1": ("1", "2"), "annotator2": ("2", None), "annotator_3": ("1", None)},
    "letters": {"rater_a": ("x",), "rater_b": ("y",)},
    "list": {"votes[1]": ("1", "1"), "votes[2]": ("2", None), "votes[3]": (None, None)},
    "objects": {"bob": ("true", None), "ann": ("false", "true")},
    "single": {"winner": ("model_a", "tie")},
}


def by_origin(rows):
    return {f"f:{i}": row for i, row in enumerate(rows, 1)}


@pytest.mark.parametrize("shape", ROWS)
def test_labels_are_found_in_rows(shape):
    votes = collect_votes(by_origin(ROWS[shape]))
    assert votes.table == TABLES[shape]
    assert votes.origins == tuple(by_origin(ROWS[shape]))


def test_columns_can_be_named():
    rows = by_origin([{"x": "a", "y": "b", "annotator1": 1, "annotator2": 1}])
    assert list(collect_votes(rows, ["x", "y"]).table) == ["x", "y"]
    with pytest.raises(DataError, match="no row has a column 'z'; has x, y"):
        collect_votes(rows, ["x", "z"])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "completion": "c"},
        {"label": "x" * 50},
        {"human1": "a long question, which is no label of anything", "human2": "another one"},
    ],
)
def test_what_is_no_vote(row):
    assert collect_votes(by_origin([row])) is None


def test_columns_with_many_values_are_no_labels():
    rows = [{"annotator1": f"name {i}", "annotator2": f"name {i + 1}"} for i in range(30)]
    assert collect_votes(by_origin(rows)) is None


@pytest.mark.parametrize(
    ("label", "known", "side"),
    [
        ("1", "012", 1), ("2", "012", 2), ("0", "012", 0), ("0", "01", 1), ("1", "01", 2),
        ("A", "AB", 1), ("model_b", ["model_b"], 2), ("tie", ["tie"], 0), ("maybe", ["maybe"], None),
        (None, "12", None),
    ],
)  # fmt: skip
def test_which_side_a_label_prefers(label, known, side):
    assert choose_side(label, known) == side


def test_sides_and_noise_of_votes():
    votes = collect_votes(
        by_origin([{"annotator1": "A", "annotator2": v} for v in 10 * ["A", "tie", "B"]])
    )
    assert list(votes.sides().values())[:3] == [[1, 1], [1, 0], [1, 2]]
    # A tie is no vote: of the 20 pairs that are left half differ.
    assert (votes.noise().differing, votes.noise().judged) == (10, 20)
    scale = collect_votes(by_origin([{"annotator1": i, "annotator2": 5 - i} for i in range(5)] * 9))
    assert scale.sides() == {} and scale.noise() is None


def test_the_three_annotators_of_pandalm(shared):
    rows = json.loads(shared("data/pandalm_testset_v1.json").read_text())
    votes = collect_votes(by_origin(rows))
    assert list(votes.table) == ["annotator1", "annotator2", "annotator3"]
    found = measure_agreement(votes.table)
    assert found.rows == 999
    assert [round(p.agreement, 4) for p in found.pairs] == [0.9129, 0.9289, 0.9179]
    # scikit-learn's cohen_kappa_score and statsmodels' fleiss_kappa give the same digits.
    assert [round(p.kappa, 4) for p in found.pairs] == [0.8520, 0.8789, 0.8617]
    assert round(found.fleiss, 4) == 0.8642
    assert not math.isnan(found.annotators[0].agreement)
