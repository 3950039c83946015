"""Rows to records: kinds told apart, mistakes named, hopeless rows left out."""

import pytest

from mlx_align.data.records import (
    ChatRecord,
    CompletionRecord,
    PairRecord,
    TextRecord,
    Unfit,
    is_transcript,
    parse_record,
    parse_transcript,
)
from mlx_align.errors import DataError

USER = {"role": "user", "content": "Hi"}
YES = {"role": "assistant", "content": "Yes"}
NO = {"role": "assistant", "content": "No"}
TALK = "\n\nHuman: a\n\nAssistant: "


def test_pairs_of_text_and_of_messages():
    record = parse_record({"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, "f:1")
    assert record == PairRecord("Hi", "Yes", "No", "f:1")
    record = parse_record({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, "f:1")
    assert (record.prompt, record.chosen, record.rejected) == ((USER,), (YES,), (NO,))


def test_implicit_prompts():
    record = parse_record({"chosen": [USER, YES], "rejected": [USER, NO]}, "f:1")
    assert (record.prompt, record.chosen, record.rejected) == ((USER,), (YES,), (NO,))
    record = parse_record(
        {"chosen": "Is it so? It is.", "rejected": "Is it so? It never is."}, "f:1"
    )
    assert (record.prompt, record.chosen, record.rejected) == ("Is it so? It ", "is.", "never is.")


def test_a_whole_dialogue_beats_a_prompt_column_that_repeats_it():
    row = {"prompt": "Hi", "chosen": [USER, YES], "rejected": [USER, NO]}
    assert parse_record(row, "f:1").prompt == (USER,)


def test_transcripts_are_cut_behind_the_last_assistant_marker():
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    record = parse_record({"chosen": start + " yes", "rejected": start + " no"}, "f:1")
    assert (record.prompt, record.chosen, record.rejected) == (start, " yes", " no")
    assert is_transcript(record.prompt)
    turns, joined = parse_transcript(record.prompt)
    assert [(t["role"], t["content"]) for t in turns] == [
        ("user", "a"), ("assistant", "b"), ("user", "c"),
    ]  # fmt: skip
    assert not joined


def test_turns_of_one_speaker_are_joined():
    turns, joined = parse_transcript(
        "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c\n\nHuman: d\n\nAssistant:"
    )
    assert joined
    assert [t["content"] for t in turns] == ["a", "b\n\nc", "d"]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"messages": [USER, YES]}, ChatRecord),
        ({"prompt": "Hi", "completion": "Yes"}, CompletionRecord),
        ({"prompt": [USER], "completion": [YES]}, CompletionRecord),
        ({"text": "Hi there"}, TextRecord),
    ],
)
def test_kinds_are_told_apart(row, kind):
    assert isinstance(parse_record(row, "f:1"), kind)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "Hi", "chosen": "Yes"}, 'f:1: "rejected" is missing'),
        ({"foo": 1}, "f:1: no known kind of row (its keys: foo)"),
        ([1], "must be a JSON object, not list"),
        ({"completion": "x"}, '"prompt" is missing'),
        ({"messages": "hi"}, '"messages" must be text or a list of messages'),
        ({"messages": [{"content": "x"}]}, '"messages"[0] is not a message with a "role"'),
        ({"messages": [{"role": "user", "content": 3}]}, "is not text"),
        (
            {"chosen": "a", "rejected": [NO], "prompt": "p"},
            "must both be text or both message lists",
        ),
        ({"text": 3}, '"text" must be a string'),
        ({"messages": [USER, YES], "tools": "{"}, '"tools" is not valid JSON'),
    ],
)
def test_malformed_rows_say_what_is_wrong(row, words):
    with pytest.raises(DataError) as caught:
        parse_record(row, "f:1")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "Hi", "chosen": " ", "rejected": "No"}, "empty chosen"),
        ({"prompt": "Hi", "chosen": "No", "rejected": ""}, "empty rejected"),
        ({"prompt": "Hi", "chosen": "No", "rejected": "No"}, "chosen equals rejected"),
        ({"chosen": [USER, YES], "rejected": [NO, NO]}, "prompts of chosen and rejected differ"),
        ({"chosen": "yes", "rejected": "no"}, "chosen and rejected share no prompt"),
        ({"chosen": TALK + "b", "rejected": "Oh" + TALK + "c"}, "prompts of chosen and rejected differ"),
        ({"chosen": [USER], "rejected": [USER]}, "chosen does not end with an assistant turn"),
        ({"text": "  "}, "empty text"),
        ({"prompt": "Hi", "completion": ""}, "empty completion"),
    ],
)  # fmt: skip
def test_hopeless_rows_are_left_out_with_a_reason(row, kind):
    with pytest.raises(Unfit) as caught:
        parse_record(row, "f:1")
    assert caught.value.kind == kind


def test_nulls_of_columnar_files_are_absent_keys():
    row = {"messages": [{**USER, "tool_calls": None}, YES], "text": None, "tools": None}
    record = parse_record(row, "f:1")
    assert record == ChatRecord((USER, YES), "f:1")


def test_system_column_and_tools():
    record = parse_record({"prompt": "Hi", "completion": "Yes", "system": "Be brief."}, "f:1")
    assert record.prompt == ({"role": "system", "content": "Be brief."}, USER)
    record = parse_record({"messages": [USER, YES], "tools": '[{"name": "f"}]'}, "f:1")
    assert record.tools == ({"name": "f"},)


def test_content_parts_are_joined():
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    record = parse_record({"messages": [{"role": "user", "content": parts}, YES]}, "f:1")
    assert record.messages[0]["content"] == "Hi"
