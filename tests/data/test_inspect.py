"""What a data check finds: kinds, faults with their lines, lengths, repetitions, bias, noise, advice."""

import json
import re
from collections import Counter

import numpy as np
import pytest
import tiny

from mlx_align.data.agreement import find_ai_labels
from mlx_align.data.dataset import DataSettings
from mlx_align.data.inspect import (
    UNLIMITED,
    Comparison,
    Rows,
    count_unended,
    find_leakage,
    inspect_data,
    measure_lengths,
    parse_item,
    read_split,
    shorten,
    suggest_fields,
    tokens_needed,
)
from mlx_align.data.records import PairRecord, PromptRecord, Unfit
from mlx_align.data.template import Encoder, find_template, make_example
from mlx_align.errors import DataError

USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from mlx_lm.utils import load_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.make_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture
def check(tmp_path, tokenizer):
    """check(rows, ...) -> the check of rows written to a file; rows may be raw lines."""

    def run(rows, valid=None, *, limit=1024, **options):
        splits = {}
        for name, content in (("train", rows), ("valid", valid)):
            if content is not None:
                file = tmp_path / f"{name}.jsonl"
                lines = [row if isinstance(row, str) else json.dumps(row) for row in content]
                file.write_text("".join(line + "\n" for line in lines))
                splits[name] = read_split([file])
        encoder = Encoder(tokenizer, max_length=UNLIMITED, template=find_template(tokenizer))
        settings = DataSettings(data="data.jsonl", max_length=limit)
        return inspect_data(settings, splits, encoder, model="some/model", **options)

    return run


def pair(prompt="Hi", chosen="Yes", rejected="No", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def pairs(count, **more):
    return [pair(f"Question {i}?", **more) for i in range(count)]


def lines(origins):
    return [origin.rpartition(":")[2] for origin in origins]


# -- rows ------------------------------------------------------------------------------------------


def test_all_faults_are_collected_with_their_lines(check):
    rows = [
        pair(), "{oops", {"prompt": "a", "chosen": "b"}, pair(rejected=""), "[1]",
        {"prompt": "p", "completion": "c", "label": "meh"},
        {"prompt": "p", "completion": "c", "label": "7, or 8. So"}, *["{oops"] * 7,
    ]  # fmt: skip
    found = check(rows)
    faults = {(f.rows.count, f.message[:18], f.stops): f.rows.origins for f in found.faults}
    assert {key: lines(origins) for key, origins in faults.items()} == {
        (8, "not valid JSON: Ex", True): ["2", "8", "9", "10", "11"],
        (1, '"rejected" is miss', True): ["3"],
        (1, "a row must be a JS", True): ["5"],
        (2, "\"label\" is 'meh'. ", True): ["6", "7"],
        (1, "empty rejected", False): ["4"],
    }
    assert (found.rows, found.usable, found.kind) == ({"train": 14}, 1, "pairs")
    text = "\n".join(found.lines())
    assert "stops training: not valid JSON" in text
    assert "train.jsonl:2, 8, 9, 10, 11 and 3 more)" in text


def test_faults_of_held_out_rows_count_too(check):
    found = check([pair()], [pair("b"), {"x": 1}, {"prompt": "p", "completion": "c"}])
    assert [fault.rows.origins[0].rpartition("/")[2] for fault in found.faults] == ["valid.jsonl:2"]
    assert found.kinds == {"train": {"pairs": 1}, "valid": {"pairs": 1, "completions": 1}}


def test_a_file_that_cannot_be_read(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("{")
    (fault,) = read_split([file]).faults
    assert fault.rows == Rows(1, (f"{file}:1",))
    (tmp_path / "b.csv").write_text("x")
    with pytest.raises(DataError, match="unknown file type"):
        read_split([tmp_path / "b.csv"])


def test_nothing_usable(check):
    found = check([{"x": 1}, {"y": 2}])
    assert found.usable == found.understood == 0
    words = "  0 of 2 rows can be trained on as they stand"
    assert found.lines()[:2] == ["data.jsonl: 2 rows in train", words]
    assert check([]).lines()[0] == "data.jsonl: 0 rows in train"


@pytest.mark.parametrize(
    ("row", "item"),
    [
        (
            {"instruction": "a", "input": "b", "response1": "x", "response2": "y"},
            Comparison("a\n\nb", "x", "y", "f:1"),
        ),
        ({"prompt": "a", "answer_b": "y", "answer_a": "x"}, Comparison("a", "x", "y", "f:1")),
        ({"prompt": "a", "id": "3"}, PromptRecord("a", {"prompt": "a", "id": "3"}, "f:1")),
        ({"prompt": [USER]}, PromptRecord((USER,), {"prompt": [USER]}, "f:1")),
        (pair(), PairRecord("Hi", "Yes", "No", "f:1")),
    ],
)
def test_what_a_row_is(row, item):
    assert parse_item(row, "f:1") == item


@pytest.mark.parametrize(
    ("row", "error", "words"),
    [
        ({"prompt": "a", "response": "b"}, DataError, "no known kind"),
        ({"prompt": "a", "chosen": "b"}, DataError, '"rejected" is missing'),
        ({"response1": "x", "response2": "y"}, DataError, "no known kind"),
        ({"prompt": "a", "response1": True, "response2": "y"}, DataError, "True, not text"),
        ({"prompt": "a", "response1": "x", "response2": " "}, Unfit, "empty response2"),
        ({"prompt": [5]}, DataError, "no known kind"),
        ({"question": "1 + 1?", "answer": "2"}, DataError, "no known kind"),
        (["a"], DataError, "must be a JSON object"),
    ],
)
def test_what_is_no_row(row, error, words):
    with pytest.raises(error, match=words):
        parse_item(row, "f:1")


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"question": "a", "answer": "b"}, ["prompt=question", "completion=answer"]),
        ({"prompt": "a", "response": "b", "answer": "c"}, ["completion=response"]),
        ({"query": "a", "better": "b", "worse": "c"}, ["prompt=query", "chosen=better", "rejected=worse"]),
        ({"winner": "so it is", "loser": "so it was"}, ["chosen=winner", "rejected=loser"]),
        ({"prompt": "a", "chosen": "b"}, []),
        ({"x": 1}, []),
    ],
)  # fmt: skip
def test_other_names_are_suggested_where_they_would_do(row, fields):
    assert suggest_fields(row) == fields


# -- tokens ----------------------------------------------------------------------------------------


def test_the_scored_part_is_marked_up_to_the_end_of_the_turn(check):
    talk = [USER, {"role": "assistant", "content": "Yes."}] * 2
    found = check([{"messages": talk}])
    text = "\n".join(found.lines())
    assert text.count("⟦Yes.<|eot_id|>⟧") == 2 and "⟦Hi" not in text
    assert re.search(r"  prompt, \d+ tokens\n    <\|begin_of_text\|>", text)
    assert found.unended == 0
    assert not check([{"messages": talk}], examples=0).samples


def test_the_last_scored_token_must_end_the_turn():
    good = make_example([1], [[5, 3, 2, 6, 9]], [[1, 1, 0, 1, 1]], "f:1")
    bad = make_example([1], [[5, 9], [5, 9, 3]], [[1, 1], [1, 1, 1]], "f:2")
    assert count_unended([good, bad], {9}) == 1


def test_a_cut_example_is_shown_cut(check):
    row = pair("Hi", "Yes, and so on and so forth.", "No")
    (whole,) = check([row]).samples
    tokens = [int(n) for n in re.findall(r"(\d+) tokens", whole)]
    (cut,) = check([row], limit=tokens[0] + 3).samples
    assert [int(n) for n in re.findall(r"(\d+) tokens", cut)] == [tokens[0], 3, min(3, tokens[2])]
    assert "so forth.<|eot_id|>⟧" in whole and "so forth" not in cut


@pytest.mark.parametrize(
    ("completions", "scored", "needed"),
    [
        ([[5, 6, 7]], [[1, 1, 1]], 2),
        ([[5, 6, 7]], [[0, 0, 1]], 4),
        ([[5, 6, 7], [5, 6, 8]], [[1, 1, 1], [1, 1, 1]], 4),
        ([[5, 6], [5, 6, 8]], [[1, 1], [1, 1, 1]], 4),
        ([], [], 1),
    ],
)
def test_tokens_without_which_nothing_is_learnt(completions, scored, needed):
    assert tokens_needed(make_example([1, 2], completions, scored, "f:1")) == needed


@pytest.mark.parametrize("limit", [12, 16, 20, 28, 60])
def test_limits_do_what_the_encoder_does(check, tokenizer, limit):
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    rows = [
        pair(" ".join(words[: i % 7]) + "?", " ".join(words[: i % 5 + 1]), " ".join(words[: i % 3 + 2]))
        for i in range(40)
    ]  # fmt: skip
    rows = [row for row in rows if row["chosen"] != row["rejected"]]
    encoder = Encoder(tokenizer, max_length=limit, template=find_template(tokenizer))
    outcome = Counter()
    for row in rows:
        encoder.counts.clear()
        try:
            encoder.examples(parse_item(row, "f:1"))
            outcome["cut" if encoder.counts.total() else "whole"] += 1
        except Unfit:
            outcome["dropped"] += 1
    found = check(rows, limit=limit)
    cut, dropped = next(shares for x, *shares in found.lengths.limits if x == limit)
    assert (cut, dropped) == (outcome["cut"], outcome["dropped"])
    assert found.usable == len(rows) - outcome["dropped"]
    assert sum(fault.rows.count for fault in found.faults) == outcome["dropped"]
    assert dropped + cut > 0 or limit == 60


def test_the_histogram_holds_every_example():
    examples = [make_example([1] * n, [[2]], [[1]], "f:1") for n in (1, 31, 32, 63, 64, 700)]
    lengths = measure_lengths(examples, 1024)
    assert [count for *_, count in lengths.histogram] == [1, 2, 2, 0, 0, 1]
    assert [low for low, *_ in lengths.histogram] == [0, 32, 64, 128, 256, 512]
    assert lengths.maximum == 701
    assert lengths.limits == ((256, 0, 1), (512, 0, 1), (1024, 0, 0))
    assert measure_lengths([], 1024) is None


# -- content ---------------------------------------------------------------------------------------


def test_repetitions_and_contradictions(check):
    rows = [
        pair("a"), pair("a"), pair("a", "No", "Yes"), pair("b"), pair("B "), pair("b", "Yes", "Nope"),
    ]  # fmt: skip
    found = check(rows)
    assert found.prompts == 2
    assert (found.repeated.count, lines(found.repeated.origins)) == (1, ["2"])
    assert (found.contradicting.count, lines(found.contradicting.origins)) == (3, ["1", "2", "3"])


def test_labels_that_contradict_each_other(check):
    row = {"prompt": "a", "completion": "b"}
    found = check([{**row, "label": True}, {**row, "label": False}, {**row, "label": True}])
    assert (found.repeated.count, found.contradicting.count) == (1, 3)


def test_leakage_to_the_letter_and_nearly(check):
    valid = [pair("Question 1?"), pair("question  1?\n"), pair("Question 99?")]
    leak = check(pairs(3), valid).leakage["valid"]
    assert (leak.count, lines(leak.origins)) == (2, ["1", "2"])
    turns = [[{"role": "user", "content": text}] for text in ("so\nit is", "So it  is", "So is it")]
    talks = [PairRecord(tuple(t), "a", "b", f"f:{i}") for i, t in enumerate(turns)]
    assert find_leakage(talks[:1], talks[1:]).origins == ("f:1",)
    assert find_leakage([], []).count == 0
    assert check(pairs(3)).leakage == {}


def test_length_bias_with_draws(check):
    longer, shorter = pairs(7, chosen="Yes, yes, yes"), pairs(2, rejected="No, no, no, no")
    found = check([*longer, *shorter, pair(chosen="No", rejected="Yo")])
    assert (found.chosen_is_longer.hits, found.chosen_is_longer.total) == (7, 10)
    assert found.longer_wins.share == pytest.approx(0.75)
    assert found.longer_wins.low < 0.75 < found.longer_wins.high
    text = "\n".join(found.lines())
    assert "always picking the longer completion is right: 75.0% of 10 (" in text


@pytest.mark.parametrize(
    ("values", "column", "ai"),
    [
        ([{"annotator_type": "ai"}, {"annotator_type": "human"}, {}], "annotator_type", 1),
        ([{"judge": "gpt-4o"}, {"judge": "claude-3"}, {"judge": "crowd worker"}], "judge", 2),
        ([{"source": "sharegpt"}, {"source": "flan"}], None, 0),
        ([{"source": 3}], None, 0),
    ],
)
def test_who_labelled(values, column, ai):
    found = find_ai_labels(values)
    assert {name: share.hits for name, share in found.items()} == ({column: ai} if column else {})


def test_answers_to_compare_with(check):
    answers = [
        42,
        "$1,234.50",
        "so.\n#### -7",
        r"thus \boxed{3}",
        "Paris",
        "in 1984 it was so",
        None,
    ]
    found = check([{"prompt": f"{i}?", "answer": answer} for i, answer in enumerate(answers)])
    assert (found.kind, found.usable, found.answered, found.numeric) == ("prompts", 7, 6, 4)
    assert check([{"prompt": "a longer prompt"}], limit=2).usable == 0


def test_contradicting_pairs_tell_the_noise(check):
    found = check([*pairs(40), *pairs(10, chosen="No", rejected="Yes"), *pairs(40)[10:]])
    assert (found.noise.differing, found.noise.judged) == (10, 40)
    # d = 1/4 of the judgements differ: (1 - sqrt(1 - 2 d)) / 2.
    assert found.noise.rate == pytest.approx((1 - np.sqrt(0.5)) / 2)
    assert found.noise.low < found.noise.rate < found.noise.high
    assert check([*pairs(40), pair("Question 1?", "No", "Yes")]).noise is None


def test_annotators_of_pairs_tell_the_noise(check):
    votes = [{"annotator1": "a", "annotator2": "b" if i < 12 else "a"} for i in range(40)]
    found = check([{**row, **vote} for row, vote in zip(pairs(40), votes, strict=True)])
    assert (found.noise.differing, found.noise.judged) == (12, 40)
    assert found.agreement.pairs[0].agreement == pytest.approx(0.7)


def test_comparisons_become_pairs_by_their_majority(check):
    votes = [(1, 1, 2), (2, 2, 2), (0, 0, 1), (0, 1, 2)]
    rows = [
        {
            "prompt": f"{i}", "response1": "first", "response2": "second",
            **{f"annotator{k}": vote for k, vote in enumerate(row)},
        }
        for i, row in enumerate(votes)
    ]  # fmt: skip
    found = check(rows)
    assert (found.decided, found.ties, found.usable, found.understood) == (2, 1, 0, 4)
    assert re.findall("⟦(.*)⟧", found.samples[0])[1:] == ["first<|eot_id|>", "second<|eot_id|>"]
    bare = [{k: row[k] for k in ("prompt", "response1", "response2")} for row in rows]
    assert not check(bare).decided


def test_the_report_is_plain_json(check):
    found = check([*pairs(5), {"x": 1}, pair(annotator1=1, annotator2=2)], pairs(2))
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["kind"] == "pairs"


def test_words():
    assert str(Rows(5, ("a:1", "a:2", "b:row 3"))) == "5 rows (a:1, 2, b:row 3 and 2 more)"
    assert str(Rows.at(["a:1"])) == "1 row (a:1)" and str(Rows.at([])) == "0 rows"
    assert shorten("a\x1b[2Jb\n") == "a\\x1b[2Jb\n"
    assert len(shorten("x" * 10_000)) < 1000 and shorten("x" * 700) == "x" * 700


# -- real data -------------------------------------------------------------------------------------


def real(shared, tokenizer, name, *fields):
    file = shared(f"data/{name}")
    encoder = Encoder(tokenizer, max_length=UNLIMITED, template=find_template(tokenizer))
    splits = {"train": read_split([file], fields)}
    return inspect_data(DataSettings(data=str(file)), splits, encoder, model="some/model")


def test_pandalm(shared, tokenizer):
    found = real(shared, tokenizer, "pandalm_testset_v1.json")
    assert (found.kind, found.rows, found.decided, found.ties) == (
        "comparisons",
        {"train": 999},
        836,
        103,
    )
    # Six completions are the word True and not text, 54 are empty.
    assert [(fault.rows.count, fault.stops) for fault in found.faults] == [(6, True), (54, False)]
    text = "\n".join(found.lines())
    for words in (
        "annotator1 and annotator2: agree in 91.3% of 999, Cohen's kappa 0.85",
        "annotator1 and annotator3: agree in 92.9% of 999, Cohen's kappa 0.88",
        "annotator2 and annotator3: agree in 91.8% of 999, Cohen's kappa 0.86",
    ):
        assert words in text


def test_gsm8k(shared, tokenizer):
    found = real(shared, tokenizer, "gsm8k_test.jsonl.gz", ("prompt", "question"))
    assert (found.kind, found.usable, found.numeric) == ("prompts", 1319, 1319)
    assert real(shared, tokenizer, "gsm8k_test.jsonl.gz").understood == 0


def test_hh_harmless(shared, tokenizer):
    found = real(shared, tokenizer, "hh_harmless_test.jsonl.gz")
    assert found.rows == {"train": 2312} and found.kinds["train"] == {"pairs": 2303}
    faults = {fault.message: fault.rows.count for fault in found.faults}
    assert faults["empty chosen"] == 4 and faults["prompts of chosen and rejected differ"] == 5
    assert found.longer_wins.share == pytest.approx(0.44, abs=0.01)
