"""Other tools' rows, and columns under other names."""

import pytest

from mlx_align.data.records import (
    ChatRecord,
    CompletionRecord,
    JudgedPairRecord,
    LabelRecord,
    PairRecord,
    Unfit,
    parse_record,
)
from mlx_align.data.spellings import parse_fields, rename
from mlx_align.errors import DataError, SettingsError

USER, YES, NO = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes"},
    {"role": "assistant", "content": "No"},
)
HUMAN, GPT, BAD = (
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": "Yes"},
    {"from": "gpt", "value": "No"},
)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": [HUMAN, GPT]}, ChatRecord((USER, YES), "f:1")),
        (
            {"conversations": [HUMAN], "chosen": GPT, "rejected": BAD},
            PairRecord((USER,), (YES,), (NO,), "f:1"),
        ),
        (
            {"chosen": [HUMAN, GPT], "rejected": [HUMAN, BAD]},
            PairRecord((USER,), (YES,), (NO,), "f:1"),
        ),
        (
            {"instruction": "Say", "input": "it", "output": "so"},
            CompletionRecord("Say\n\nit", "so", "f:1"),
        ),
        ({"instruction": "Say", "input": "", "output": "so"}, CompletionRecord("Say", "so", "f:1")),
        (
            {"instruction": "Say", "output": "so", "history": [["Hi", "Yes"]]},
            CompletionRecord((USER, YES, {"role": "user", "content": "Say"}), "so", "f:1"),
        ),
        (
            {"instruction": "Hi", "chosen": "Yes", "rejected": "No"},
            PairRecord("Hi", "Yes", "No", "f:1"),
        ),
        ({"instruction": "Hi", "output": ["Yes", "No"]}, PairRecord("Hi", "Yes", "No", "f:1")),
        (
            {
                "input": {"messages": [USER]},
                "preferred_output": [YES],
                "non_preferred_output": [NO],
            },
            PairRecord((USER,), (YES,), (NO,), "f:1"),
        ),
        (
            {"conversations": [HUMAN, GPT], "kto_tag": False},
            LabelRecord((USER,), (YES,), False, "f:1"),
        ),
        (
            {"prompt": "Hi", "chosen": [USER, YES], "rejected": [USER, NO], "score_chosen": 8.0},
            PairRecord((USER,), (YES,), (NO,), "f:1"),
        ),
        (
            {"prompt": "Hi", "chosen": "Yes", "rejected": "No", "margin": 2, "weight": 0.5},
            PairRecord("Hi", "Yes", "No", "f:1", weight=0.5, margin=2.0),
        ),
    ],
)
def test_other_tools_rows(row, expected):
    assert parse_record(row, "f:1") == expected


@pytest.mark.parametrize("up", [True, 1, "up", "👍", "Good", "1", "thumbs_up", 1.0])
@pytest.mark.parametrize("down", [False, 0, -1, "down", "👎", "bad", "0", "thumbs_down"])
def test_labels_in_many_words(up, down):
    for label, expected in ((up, True), (down, False)):
        record = parse_record({"prompt": "Hi", "completion": "Yes", "label": label}, "f:1")
        assert record == LabelRecord("Hi", "Yes", expected, "f:1")


def test_labels_that_say_nothing_are_refused():
    with pytest.raises(DataError, match=r'f:1: "label" is 3.*must say good or bad'):
        parse_record({"prompt": "Hi", "completion": "Yes", "label": 3}, "f:1")
    with pytest.raises(Unfit, match="do not end with an answer"):
        parse_record({"messages": [USER], "label": True}, "f:1")


def test_bad_numbers_are_refused():
    row = {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}
    for extra in ({"margin": "much"}, {"margin": True}, {"weight": -1}, {"weight": float("nan")}):
        with pytest.raises(DataError, match=f'f:1: "{next(iter(extra))}" is'):
            parse_record({**row, **extra}, "f:1")
    with pytest.raises(Unfit, match="weight 0"):
        parse_record({**row, "weight": 0}, "f:1")


def test_columns_under_other_names():
    fields = parse_fields(("label=rating", "prompt=meta.question", "completion = answer"))
    row = {"rating": "up", "meta": {"question": "Hi"}, "answer": "Yes"}
    assert parse_record(rename(row, fields, "f:1"), "f:1") == LabelRecord("Hi", "Yes", True, "f:1")
    assert row == {"rating": "up", "meta": {"question": "Hi"}, "answer": "Yes"}
    (field,) = parse_fields(("margin=score_chosen-score_rejected",))
    assert rename({"score_chosen": 8, "score_rejected": 5.5}, [field], "f:1")["margin"] == 2.5
    with pytest.raises(DataError, match="f:3: has no column 'rating'"):
        rename({"stars": 1}, fields, "f:3")
    with pytest.raises(SettingsError, match="is not NAME=COLUMN"):
        parse_fields(("label",))


def test_pairs_unpaired_and_conversations_as_a_whole():
    pair = PairRecord("Hi", "Yes", "No", "f:1", weight=2.0)
    assert pair.unpaired() == JudgedPairRecord("Hi", "Yes", "No", "f:1", weight=2.0)
    assert pair.whole() is pair
    assert ChatRecord((USER, YES), "f:1").whole() == CompletionRecord((USER,), (YES,), "f:1")
    with pytest.raises(Unfit):
        ChatRecord((USER,), "f:1").whole()


def test_names_can_be_swapped():
    fields = parse_fields(("chosen=rejected", "rejected=chosen"))
    row = {"prompt": "Hi", "chosen": "No", "rejected": "Yes"}
    assert rename(row, fields, "f:1") == {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}
