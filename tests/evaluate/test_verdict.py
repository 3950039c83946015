"""The verdict follows from the table, and never claims what the cases could not show."""

import pytest

from mlx_align.evaluate.changes import Change
from mlx_align.evaluate.measures import HELD_OUT
from mlx_align.evaluate.verdict import direction, judge_changes


def change(key, before, after, low, high, better="higher", unit="share", count=100, source="s"):
    return Change(
        what=key, before=before, after=after, count=count, better=better, key=key, source=source,
        unit=unit, low=low, high=high,
    )  # fmt: skip


PREFERS = change("pairs/accuracy", 0.5, 0.8, 0.2, 0.4)
REFUSES = change("refuses/harmful", 0.1, 0.9, 0.6, 0.9)
SAME = change("questions/right", 0.85, 0.84, -0.05, 0.04)
LOST = change("questions/right", 0.85, 0.60, -0.33, -0.15)
GAINED = change("choices/right", 0.5, 0.7, 0.1, 0.3)
VAGUE = change("questions/right", 0.8, 0.7, -0.4, 0.2, count=9)
PERPLEXITY = change("texts/perplexity", 10.0, 10.1, 0.05, 0.15, "lower", "number")
WORSE_PERPLEXITY = change("texts/perplexity", 10.0, 11.0, 0.5, 1.5, "lower", "number")
STILL = change("pairs/accuracy", 0.5, 0.51, -0.06, 0.07)
FELL = change("refuses/harmful", 0.9, 0.4, -0.7, -0.3)
UNKNOWN = change("pairs/accuracy", 0.5, 0.6, -0.3, 0.5, count=6)
FEW = change("questions/right", 0.5, 0.75, None, None, count=4)


@pytest.mark.parametrize(
    ("changes", "aligned", "ability"),
    [
        ([PREFERS, REFUSES, SAME, PERPLEXITY], "yes", "unchanged within noise"),
        ([PREFERS, LOST], "yes", "regressed"),
        ([REFUSES, WORSE_PERPLEXITY, SAME], "yes", "regressed"),
        ([STILL, GAINED], "no", "improved"),
        ([FELL], "no", "not measured"),
        ([PREFERS, FELL, GAINED, LOST], "mixed", "mixed"),
        ([UNKNOWN, VAGUE], "cannot tell", "cannot tell"),
        ([STILL, UNKNOWN, FEW], "no", "cannot tell"),
        ([PREFERS, VAGUE, PERPLEXITY], "yes", "cannot tell"),
        ([], "not measured", "not measured"),
    ],
)
def test_aligned_and_ability(changes, aligned, ability):
    found = judge_changes(changes)
    assert (found.aligned, found.ability) == (aligned, ability)
    assert str(found).startswith(f"aligned: {aligned}; ability: {ability}")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PREFERS, "better"), (LOST, "worse"), (SAME, "same"), (VAGUE, "unclear"), (FEW, "unclear"),
        (PERPLEXITY, "slightly"), (WORSE_PERPLEXITY, "worse"),
        (change("texts/perplexity", 10.0, 9.0, -1.5, -0.5, "lower", "number"), "better"),
        (change("texts/kl", None, 0.1, 0.0, 0.0, "", "number"), "unclear"),
    ],
)  # fmt: skip
def test_directions(row, expected):
    assert direction(row) == expected


def test_what_regressed_is_named_with_its_numbers():
    found = judge_changes([PREFERS, LOST, PERPLEXITY])
    assert str(found) == (
        "aligned: yes; ability: regressed (questions/right: 85% -> 60%)"
    )  # fmt: skip
    assert found.regressed == ("questions/right: 85% -> 60%",)
    assert "questions/right: 85% -> 60%, worse (-33 pt to -15 pt)" in found.reasons
    assert "texts/perplexity: 10 -> 10.1, moved by less than 2%" in found.reasons


def test_what_the_set_could_have_shown_is_said():
    (reason,) = judge_changes([SAME]).reasons
    assert reason.endswith("unchanged within noise (a change of 4 pt would have shown)")
    (reason,) = judge_changes([VAGUE]).reasons
    assert reason.endswith("cannot tell: with 9 cases only a change of 30 pt would have shown")
    (reason,) = judge_changes([FEW]).reasons
    assert reason.endswith("too few cases to tell (4)")


def test_side_effects_are_warned_of():
    rows = [
        change("refuses/harmless", 0.1, 0.4, 0.2, 0.4, "lower"),
        change("answers/repeated", 0.01, 0.2, 0.1, 0.3, "lower"),
        change("answers/length", 20.0, 50.0, 20.0, 40.0, "", "number"),
    ]
    found = judge_changes([PREFERS, *rows])
    assert [w.split(":")[0] for w in found.warnings] == [
        "over-refusal",
        "more repetition",
        "answers are 2.5 times as long",
    ]
    calm = [
        change("refuses/harmless", 0.1, 0.1, -0.1, 0.1, "lower"),
        change("answers/repeated", 0.1, 0.0, -0.2, -0.1, "lower"),
        change("answers/length", 20.0, 29.0, 5.0, 12.0, "", "number"),
    ]
    assert judge_changes([PREFERS, *calm]).warnings == ()


def test_perplexity_counts_in_the_unit_that_both_share():
    bits = change("texts/bits_per_byte", 1.0, 1.5, 0.4, 0.6, "lower", "number")
    per_token = change("texts/perplexity", 10.0, 10.0, -0.1, 0.1, "lower", "number")
    assert judge_changes([bits, per_token]).ability == "unchanged within noise"
    assert judge_changes([bits, per_token], same_tokens=False).ability == "regressed"


def test_following_held_out_completions_is_what_fine_tuning_is_for():
    row = change("texts/perplexity", 10.0, 5.0, -6.0, -4.0, "lower", "number", source=HELD_OUT)
    assert judge_changes([row]).aligned == "yes"
    assert judge_changes([row]).ability == "not measured"


def test_rows_become_plain_numbers():
    row = change("pairs/accuracy", 0.5, 2 / 3, 0.1, 0.2).as_dict()
    assert row["after"] == 0.666667 and row["change"] == 0.166667
    assert row["smallest_change"] == pytest.approx(0.05) and row["low"] == 0.1
