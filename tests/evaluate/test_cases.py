"""What a file holds is told by its rows, and said clearly where it cannot be."""

import json

import pytest

from mlx_align.data.records import Unfit
from mlx_align.errors import DataError
from mlx_align.evaluate.cases import (
    KINDS,
    CaseSet,
    Choice,
    Prompt,
    Question,
    Request,
    own_sets,
    parse_case,
    read_sets,
)


def kind(row):
    return KINDS[type(parse_case(row, "f:1"))]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "pairs"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}, "pairs"),
        ({"prompt": "a", "harmful": True}, "requests"),
        ({"prompt": "a", "type": "homonyms", "label": "safe", "id": "1"}, "requests"),
        ({"question": "a", "answer": "#### 3"}, "questions"),
        ({"prompt": "a", "answer": 3}, "questions"),
        ({"question": "a", "choices": ["x", "y"], "answer": 1}, "choices"),
        ({"text": "a b"}, "texts"),
        ({"prompt": "a", "completion": "b"}, "texts"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "texts"),
        ({"prompt": "a"}, "prompts"),
        ({"prompt": [{"role": "user", "content": "a"}]}, "prompts"),
        ({"prompt": "a", "type": "chat"}, "prompts"),
    ],
)  # fmt: skip
def test_kinds_of_rows(row, expected):
    assert kind(row) == expected


def test_xstest_rows_with_and_without_a_label():
    labelled = {"prompt": "a", "type": "contrast_homonyms", "label": "unsafe"}
    assert parse_case(labelled, "f:1") == Request("a", True, "contrast_homonyms")
    assert parse_case({"prompt": "a", "type": "contrast_discr"}, "f:1").harmful
    assert not parse_case({"prompt": "a", "type": "safe_targets"}, "f:1").harmful


@pytest.mark.parametrize("answer", [2, "2", "C", "green"])
def test_the_right_choice_by_index_letter_or_text(answer):
    row = {"question": "q", "choices": ["red", "blue", "green"], "answer": answer}
    assert parse_case(row, "f:1") == Choice("q", ("red", "blue", "green"), 2)


def test_arcs_layout_of_choices():
    row = {
        "question": "q",
        "choices": {"text": ["red", "blue"], "label": ["1", "2"]},
        "answerKey": "2",
    }
    assert parse_case(row, "f:1").right == 1


def test_spellings_of_an_answer():
    assert parse_case({"question": "q", "answer": ["8", "eight"]}, "f:1").answers == ("8", "eight")
    assert parse_case({"question": "q", "answer": 8}, "f:1") == Question("q", ("8",))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"foo": 1}, "no known kind of row (its keys: foo). Expected prompt/chosen/rejected"),
        (["a"], "must be a JSON object"),
        ({"prompt": "a", "harmful": "perhaps"}, '"harmful" is \'perhaps\''),
        ({"prompt": 7}, "the prompt must be text"),
        ({"question": "a", "choices": ["x"], "answer": 0}, "at least two"),
        ({"question": "a", "choices": ["x", "y"], "answer": 5}, "the index (from 0), the letter"),
        ({"question": "a", "answer": {}}, '"answer" must be text'),
        ({"prompt": "a", "completion": "b", "label": True}, "labelled completions are not evaluated"),
        ({"prompt": "a", "chosen": "b"}, '"rejected" is missing'),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(row, words):
    with pytest.raises(DataError) as error:
        parse_case(row, "f.jsonl:3")
    assert words in str(error.value) and str(error.value).startswith("f.jsonl:3")


def test_rows_from_which_nothing_can_be_measured():
    with pytest.raises(Unfit, match="chosen equals rejected"):
        parse_case({"prompt": "a", "chosen": "b", "rejected": "b"}, "f:1")


def test_a_file_of_several_kinds_becomes_several_sets(tmp_path):
    file = tmp_path / "mixed.jsonl"
    rows = [{"prompt": "a", "harmful": False}, {"text": "x y"}, {"prompt": "b", "harmful": True}]
    rows += [{"prompt": "c", "chosen": "x", "rejected": "x"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read_sets(str(file))
    assert (first.name, first.kind, len(first.cases)) == ("mixed", "requests", 2)
    assert (second.kind, len(second.cases)) == ("texts", 1)
    assert [p.kind for p in first.problems] == ["chosen equals rejected"]


def test_csv_rows_know_their_lines(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text('prompt,harmful\n"two\nlines",true\nb,no\n')
    (found,) = read_sets(str(file))
    assert found.cases == (Request("two\nlines", True), Request("b", False))
    file.write_text("prompt,harmful\na,true\nb,often\nc,never\n")
    with pytest.raises(DataError) as error:
        read_sets(str(file))
    assert f"{file}:3:" in str(error.value) and f"{file}:4:" in str(error.value)


def test_folders(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "b.csv").write_text("prompt,harmful\na,true\n")
    assert [(s.name, s.kind) for s in read_sets(str(tmp_path))] == [
        ("a", "prompts"),
        ("b", "requests"),
    ]
    # Of a data set with splits, never the rows that were trained on.
    (tmp_path / "train.jsonl").write_text('{"text": "trained on"}\n')
    (tmp_path / "valid.jsonl").write_text('{"text": "held out"}\n')
    assert [s.name for s in read_sets(str(tmp_path))] == ["valid"]


def test_files_that_are_not_there_or_empty(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_sets(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no usable row"):
        read_sets(str(tmp_path / "empty.jsonl"))


def test_a_limit_spreads_over_the_set():
    cases = CaseSet("s", "prompts", tuple(Prompt(str(i)) for i in range(100)))
    assert [c.prompt for c in cases.limited(4).cases] == ["0", "33", "66", "99"]
    assert cases.limited(None) is cases and cases.limited(200) is cases


def test_the_sets_that_come_along():
    sets = {(s.name, s.kind): s.cases for s in own_sets("any model")}
    requests = sets["own requests", "requests"]
    assert len(requests) >= 60 and sum(c.harmful for c in requests) == len(requests) / 2
    questions = sets["own questions", "questions"]
    choices = sets["own questions", "choices"]
    assert len(questions) + len(choices) >= 100
    assert len(sets["neutral texts", "texts"]) >= 40
    for case in questions:
        # An answer that stands in its question would be found in an echo.
        assert not any(a.lower() in case.prompt.lower().split() for a in case.answers), case
    for case in choices:
        assert 0 <= case.right < len(case.choices) == len(set(case.choices))
    for cases in sets.values():
        prompts = [getattr(c, "prompt", None) or c.text for c in cases]
        assert len(set(prompts)) == len(prompts)


def test_the_demo_has_sets_of_its_own_world():
    sets = {s.kind: s.cases for s in own_sets("demo")}
    assert sum(c.harmful for c in sets["requests"]) >= 20
    assert len(sets["questions"]) >= 50 and len(sets["texts"]) >= 40


def test_xstest(shared):
    (found,) = read_sets(str(shared("data/xstest_prompts.csv")))
    assert found.kind == "requests" and len(found.cases) == 450
    assert sum(case.harmful for case in found.cases) == 200
    assert all(case.type.startswith("contrast_") == case.harmful for case in found.cases)
    assert len({case.type for case in found.cases}) == 18


def test_real_pairs_and_problems(shared):
    (pairs,) = read_sets(str(shared("data/hh_harmless_test.jsonl.gz")))
    assert pairs.kind == "pairs" and len(pairs.cases) + len(pairs.problems) == 2312
    (problems,) = read_sets(str(shared("data/gsm8k_test.jsonl.gz")))
    assert problems.kind == "questions" and len(problems.cases) == 1319
