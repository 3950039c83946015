"""What a data check finds: kinds, faults with their lines, lengths, repetitions, bias, noise, advice."""

import json
from collections import Counter

import numpy as np
import pytest
import tiny

from mlx_align.data.inspect import (
    Asked,
    Comparison,
    Prompt,
    count_unended,
    find_labeller,
    find_leakage,
    has_checkable_answer,
    inspect_data,
    join_origins,
    measure_lengths,
    parse_item,
    read_split,
    shorten,
    suggest_fields,
    tokens_needed,
)
from mlx_align.data.records import PairRecord, Unfit
from mlx_align.data.template import Encoder, find_template, make_example
from mlx_align.errors import DataError

METHODS = ("sft", "dpo", "cdpo", "robust", "ipo", "dpo-norm", "kto", "bco", "orpo")
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

    def run(rows, valid=None, *, template="own", limit=1024, fields=(), **options):
        splits = {}
        for name, content in (("train", rows), ("valid", valid)):
            if content is not None:
                file = tmp_path / f"{name}.jsonl"
                lines = [row if isinstance(row, str) else json.dumps(row) for row in content]
                file.write_text("".join(line + "\n" for line in lines))
                splits[name] = read_split([file], fields)
        found = find_template(tokenizer) if template == "own" else template
        encoder = Encoder(tokenizer, max_length=limit, template=found)
        asked = Asked("data.jsonl", "some/model", fields, limit)
        return inspect_data(asked, splits, encoder, methods=METHODS, **options)

    return run


def pair(prompt="Hi", chosen="Yes", rejected="No", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def pairs(count, **more):
    return [pair(f"Question {i}?", **more) for i in range(count)]


def texts(found):
    return [remark.text for remark in found.remarks]


# -- rows ------------------------------------------------------------------------------------------


def test_all_faults_are_collected_with_their_lines(check):
    rows = [
        pair(), "{oops", {"prompt": "a", "chosen": "b"}, pair(rejected=""), "[1]",
        {"prompt": "p", "completion": "c", "label": "meh"},
        {"prompt": "p", "completion": "c", "label": "7, or 8. So"}, *["{oops"] * 7,
    ]  # fmt: skip
    found = check(rows)
    faults = {(t.count, t.message[:18], t.stops): t.origins for t in found.troubles}
    lines = {key: [o.rpartition(":")[2] for o in origins] for key, origins in faults.items()}
    assert lines == {
        (8, "not valid JSON: Ex", True): ["2", "8", "9", "10", "11"],
        (1, '"rejected" is miss', True): ["3"],
        (1, "a row must be a JS", True): ["5"],
        (2, "\"label\" is 'meh'. ", True): ["6", "7"],
        (1, "empty rejected", False): ["4"],
    }
    assert (found.rows, found.usable, found.kind) == ({"train": 14}, 1, "pairs")
    text = "\n".join(found.lines())
    assert (
        "8 rows (stops training): not valid JSON" in text
        and "train.jsonl:2, 8, 9, 10, 11 and 3" in text
    )
    assert "warning: training stops at 12 rows" in text


def test_faults_of_held_out_rows_count_too(check):
    found = check([pair()], [pair("b"), {"x": 1}, {"prompt": "p", "completion": "c"}])
    assert [t.origins[0].rpartition("/")[2] for t in found.troubles] == ["valid.jsonl:2"]
    assert any("several kinds of rows (2 pairs, 1 completions)" in text for text in texts(found))


def test_a_file_that_cannot_be_read_is_a_fault_of_its_own(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("{")
    (tmp_path / "b.csv").write_text("x")
    split = read_split([file, tmp_path / "b.csv"])
    assert [(f.origin, f.count) for f in split.faults] == [
        (f"{file}:1", 1),
        (str(tmp_path / "b.csv"), 0),
    ]


def test_nothing_usable(check):
    found = check([{"x": 1}, {"y": 2}])
    assert found.usable == found.understood == 0 and not found.advice
    assert found.lines()[:2] == ["data.jsonl: 2 rows in train", "  0 of 2 rows can be trained on"]
    assert check([]).lines()[0] == "data.jsonl: 0 rows in train"


@pytest.mark.parametrize(
    ("row", "item"),
    [
        (
            {"instruction": "a", "input": "b", "response1": "x", "response2": "y"},
            Comparison("a\n\nb", "x", "y", "f:1"),
        ),
        (
            {"question": "a", "answer_b": "y", "answer_a": "x"},
            Comparison("a", "x", "y", "f:1"),
        ),
        ({"prompt": "a", "id": 3}, Prompt("a", "f:1")),
        ({"prompt": [USER]}, Prompt((USER,), "f:1")),
        ({"question": "1 + 1?", "answer": "2"}, Prompt("1 + 1?", "f:1")),
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
        ({"prompt": [{"role": "user"}]}, DataError, "no known kind"),
        (["a"], DataError, "must be a JSON object"),
    ],
)
def test_what_is_no_row(row, error, words):
    with pytest.raises(error, match=words):
        parse_item(row, "f:1")


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"question": "a", "response": "b"}, ("prompt=question", "completion=response")),
        ({"prompt": "a", "response": "b", "rating": 1}, ("completion=response", "label=rating")),
        ({"query": "a", "better": "b", "worse": "c"}, ("prompt=query", "chosen=better", "rejected=worse")),
        ({"winner": "so it is", "loser": "so it was"}, ("chosen=winner", "rejected=loser")),
        ({"prompt": "a", "response": "b", "rating": 3.5}, ("completion=response",)),
        ({"x": 1}, ()),
        ([1], ()),
    ],
)  # fmt: skip
def test_other_names_are_suggested_where_they_would_do(row, fields):
    assert suggest_fields(row) == fields


def test_fields_are_used_and_repeated_in_the_command(check):
    rows = [{"q": f"a {i}", "a": "b"} for i in range(3)]
    assert check(rows).usable == 0
    found = check(rows, fields=(("prompt", "q"), ("completion", "a")))
    assert found.usable == 3
    assert found.advice[0].command == (
        "mlx-align sft --model some/model --data data.jsonl --field prompt=q,completion=a"
    )


# -- tokens ----------------------------------------------------------------------------------------


def test_the_scored_part_is_marked_up_to_the_end_of_the_turn(check):
    talk = [USER, {"role": "assistant", "content": "Yes."}] * 2
    found = check([{"messages": talk}])
    text = "\n".join(found.lines())
    assert text.count("⟦Yes.<|eot_id|>⟧") == 2 and "⟦Hi" not in text
    prompt, completion = found.samples[0].parts
    assert prompt.spans[0][0].startswith("<|begin_of_text|>")
    assert [scored for _, scored in completion.spans] == [True, False, True]
    assert found.unended == 0
    assert not check([{"messages": talk}], examples=0).samples


def test_a_template_without_an_end_of_turn_is_warned_of(check, tokenizer):
    from mlx_align.data.template import ChatTemplate

    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    found = check(
        pairs(3),
        template=ChatTemplate(source + "{% if add_generation_prompt %}assistant: {% endif %}"),
    )
    assert found.unended == 3
    assert any("in 3 examples the end of a turn is not scored" in text for text in texts(found))


def test_each_scored_turn_must_end():
    good = make_example([1], [[5, 9, 2, 6, 9]], [[1, 1, 0, 1, 1]], "f:1")
    bad = make_example([1], [[5, 3, 2, 6, 9]], [[1, 1, 0, 1, 1]], "f:2")
    assert count_unended([good, bad], {9}) == 1


def test_a_cut_example_is_shown_cut(check):
    row = pair("Hi", "Yes, and so on and so forth.", "No")
    prompt, *whole = check([row]).samples[0].parts
    cut = check([row], limit=prompt.tokens + 3).samples[0].parts[1:]
    assert whole[0].tokens > 3 and [part.tokens for part in cut] == [3, min(3, whole[1].tokens)]
    assert (
        whole[0].spans[0][0].startswith(cut[0].spans[0][0])
        and "<|eot_id|>" not in cut[0].spans[0][0]
    )


@pytest.mark.parametrize(
    ("completions", "scored", "needed"),
    [
        ([[5, 6, 7]], [[1, 1, 1]], 2),
        ([[5, 6, 7]], [[0, 0, 1]], 4),
        ([[5, 6, 7], [5, 6, 8]], [[1, 1, 1], [1, 1, 1]], 4),
        ([[5, 6], [5, 6, 8]], [[1, 1], [1, 1, 1]], 4),
        ([], [], 2),
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
    shown = next(x for x in found.lengths.limits if x.tokens == limit)
    assert (shown.cut, shown.dropped) == (outcome["cut"], outcome["dropped"])
    assert found.usable == len(rows) - outcome["dropped"]
    assert sum(t.count for t in found.troubles) == outcome["dropped"]
    assert shown.dropped + shown.cut > 0 or limit == 60


def test_the_histogram_holds_every_example():
    examples = [make_example([1] * n, [[2]], [[1]], "f:1") for n in (1, 31, 32, 63, 64, 700)]
    lengths = measure_lengths(examples, 1024)
    assert [count for *_, count in lengths.histogram] == [1, 2, 2, 0, 0, 1]
    assert [low for low, *_ in lengths.histogram] == [0, 32, 64, 128, 256, 512]
    assert (lengths.minimum, lengths.maximum) == (2, 701)
    assert [x.tokens for x in lengths.limits] == [256, 512, 1024]
    assert measure_lengths([], 1024) is None


# -- content ---------------------------------------------------------------------------------------


def test_repetitions_and_contradictions(check):
    rows = [
        pair("a"), pair("a"), pair("a", "No", "Yes"), pair("b"), pair("b", "Yes", "Nope"),
        pair([{"role": "user", "content": "b"}], [{"role": "assistant", "content": "Yes"}],
             [{"role": "assistant", "content": "No"}]),
    ]  # fmt: skip
    found = check(rows).repeats
    assert (found.prompts, found.repeated, found.conflicts) == (2, 1, 1)
    assert [o.rpartition(":")[2] for o in found.repeated_origins] == ["2"]
    assert [o.rpartition(":")[2] for o in found.conflict_origins] == ["1", "2", "3"]


def test_labels_that_contradict_each_other(check):
    row = {"prompt": "a", "completion": "b"}
    found = check([{**row, "label": True}, {**row, "label": False}, {**row, "label": True}])
    assert (found.repeats.repeated, found.repeats.conflicts) == (1, 1)
    assert any("1 times one completion is judged both ways" in text for text in texts(found))


def test_leakage_to_the_letter_and_nearly(check):
    valid = [pair("Question 1?"), pair("question  1?\n"), pair("Question 99?")]
    found = check(pairs(3), valid)
    leak = found.leakage[0]
    assert (leak.split, leak.rows, leak.exact, leak.near) == ("valid", 3, 1, 1)
    assert any("2 of 3 rows in valid have a prompt that is trained on" in t for t in texts(found))
    assert find_leakage([], [], "test").exact == 0
    assert check(pairs(3)).leakage == ()


def test_length_bias_with_the_better_direction_and_draws(check):
    longer, shorter = pairs(7, chosen="Yes, yes, yes"), pairs(2, rejected="No, no, no, no")
    bias = check([*longer, *shorter, pair(chosen="No", rejected="Yo")]).length_bias
    assert bias.longer.hits == 7 and bias.longer.total == 10 and bias.direction == "longer"
    assert bias.equal == 1 and bias.accuracy.share == pytest.approx(0.75)
    assert bias.accuracy.low < 0.75 < bias.accuracy.high
    bias = check(shorter).length_bias
    assert (bias.direction, bias.accuracy.share, bias.longer.share) == ("shorter", 1, 0)
    found = check(longer)
    assert any("always picking the longer completion is right in 100%" in t for t in texts(found))
    assert "dpo-norm" in [a.method for a in found.advice]


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
    found = find_labeller(values)
    assert (found and found.column) == column
    assert not found or found.ai.hits == ai


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"answer": 42}, True), ({"answer": "$1,234.50"}, True), ({"answer": "so.\n#### 42"}, True),
        ({"solution": r"thus \boxed{x^2}"}, True), ({"completion": "it is\n#### -7"}, True),
        ({"ground_truth": "so.\nA: 18"}, True), ({"answer": "Paris"}, False), ({"answer": True}, False),
        ({"answer": "in 1984 it was so"}, False), ({"prompt": "#### 42"}, False),
    ],
)  # fmt: skip
def test_answers_that_a_program_can_check(row, expected):
    assert has_checkable_answer(row) is expected


# -- advice ----------------------------------------------------------------------------------------


def methods(found):
    return [advice.method for advice in found.advice]


def test_clean_pairs_go_to_dpo(check):
    found = check(pairs(600))
    assert methods(found)[0] == "dpo"
    assert found.advice[0].command == "mlx-align dpo --model some/model --data data.jsonl"
    assert [r.level for r in found.remarks if "600 examples" in r.text] == ["note"]
    assert [r.level for r in check(pairs(30)).remarks if "30 examples" in r.text] == ["warning"]


def test_contradicting_pairs_go_to_a_method_for_noise(check):
    turned = [pair(row["prompt"], "No", "Yes") for row in pairs(10)]
    found = check([*pairs(40), *turned, *pairs(40)[10:]])
    noise = found.noise[0]
    assert (noise.differing, noise.judged) == (10, 40)
    # d = 1/4 of the judgements differ: (1 - sqrt(1 - 2 d)) / 2.
    assert noise.rate == pytest.approx((1 - np.sqrt(0.5)) / 2)
    assert noise.low < noise.rate < noise.high
    assert methods(found)[:3] == ["cdpo", "ipo", "robust"]
    assert found.advice[0].command.endswith("--label-smoothing 0.15")


def test_few_judgements_do_not_choose_the_method(check):
    found = check([*pairs(40), pair("Question 1?", "No", "Yes")])
    assert found.noise[0].rate == 0.5 and methods(found)[0] == "dpo"


def test_annotators_of_pairs_tell_the_noise(check):
    votes = [{"annotator1": "a", "annotator2": "b" if i < 12 else "a"} for i in range(40)]
    found = check([{**row, **vote} for row, vote in zip(pairs(40), votes, strict=True)])
    assert found.noise[0].differing == 12 and methods(found)[0] == "cdpo"
    assert found.agreement.pairs[0].agreement == pytest.approx(0.7)


def test_scales_of_many_steps_give_no_noise(check):
    votes = [{"annotator1": i % 5 + 1, "annotator2": (i + 1) % 5 + 1} for i in range(40)]
    found = check([{**row, **vote} for row, vote in zip(pairs(40), votes, strict=True)])
    assert found.agreement and not found.noise and methods(found)[0] == "dpo"
    assert any("agree little beyond chance" in text for text in texts(found))


def test_a_model_without_a_template_gets_orpo_first(check):
    assert methods(check(pairs(30), template=None))[0] == "orpo"


@pytest.mark.parametrize(
    ("good", "bad", "flags"),
    [(10, 40, "--desirable-weight 4.67"), (40, 10, "--undesirable-weight 3.43"), (11, 10, "")],
)
def test_thumbs_go_to_kto_with_weights_in_its_range(check, good, bad, flags):
    rows = [{"prompt": f"{i}", "completion": "c", "label": i < good} for i in range(good + bad)]
    found = check(rows)
    assert methods(found)[0] == "kto" and found.advice[0].command.endswith(flags)
    weights = dict(zip(*[iter(flags.split())] * 2, strict=True))
    ratio = good * float(weights.get("--desirable-weight", 1))
    ratio /= bad * float(weights.get("--undesirable-weight", 1))
    assert 1 <= ratio <= 4 / 3
    assert (found.labels.hits, found.labels.total) == (good, good + bad)


def test_labels_of_one_kind(check):
    rows = [{"prompt": f"{i}", "completion": "c", "label": True} for i in range(5)]
    found = check(rows)
    assert methods(found) == ["sft"]
    assert any("all labels are good" in text for text in texts(found))


def test_a_method_that_does_not_exist_is_advised_without_a_command(check):
    rows = [{"question": f"{i}?", "answer": f"{i}"} for i in range(5)]
    found = check(rows)
    assert (found.usable, found.understood, found.checkable) == (0, 5, 5)
    first, second = found.advice
    assert first.method == "grpo" and first.command is None and "no such command" in first.reason
    assert second.command.endswith("--field prompt=question,completion=answer")


def test_prompts_alone_are_to_be_answered_first(check):
    found = check([{"prompt": f"{i}?"} for i in range(5)])
    assert found.advice[0].command == "mlx-align generate some/model --prompts data.jsonl"
    assert found.lengths.examples == 5


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
    assert [p.spans[0][0] for p in found.samples[0].parts[1:]] == [
        "first<|eot_id|>",
        "second<|eot_id|>",
    ]
    # Of 1, 1, 2 and 2, 2, 2 and 1 and 1, 2 the pairs that differ: 2 + 0 + 0 + 1 of 3 + 3 + 0 + 1.
    assert (found.noise[0].differing, found.noise[0].judged) == (3, 7)
    assert found.first_preferred.hits == 4 and found.first_preferred.total == 9
    assert found.advice[0].method == "dpo" and "2 rows have a completion" in found.advice[0].reason
    assert not check(
        [{k: row[k] for k in ("prompt", "response1", "response2")} for row in rows]
    ).decided


def test_the_report_is_plain_json(check):
    found = check([*pairs(5), {"x": 1}, pair(annotator1=1, annotator2=2)], pairs(2))
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["kind"] == "pairs"


def test_words():
    assert join_origins(["a:1", "a:2", "b:row 3"], 5) == "a:1, 2, b:row 3 and 2 more"
    assert shorten("a\x1b[2Jb\n") == "a\\x1b[2Jb\n"
    assert len(shorten("x" * 10_000)) < 1000 and shorten("x" * 700) == "x" * 700


# -- real data -------------------------------------------------------------------------------------


def real(shared, tokenizer, name, **options):
    file = shared(f"data/{name}")
    encoder = Encoder(tokenizer, max_length=1024, template=find_template(tokenizer))
    return inspect_data(Asked(str(file)), {"train": read_split([file])}, encoder, **options)


def test_pandalm(shared, tokenizer):
    found = real(shared, tokenizer, "pandalm_testset_v1.json", methods=METHODS)
    assert (found.kind, found.rows, found.decided, found.ties) == (
        "comparisons",
        {"train": 999},
        836,
        103,
    )
    # Six completions are the word True and not text, 54 are empty.
    assert [(t.count, t.stops) for t in found.troubles] == [(6, True), (54, False)]
    text = "\n".join(found.lines())
    for words in (
        "annotator1 and annotator2: agree in 91.3%, Cohen's kappa 0.85",
        "annotator1 and annotator3: agree in 92.9%, Cohen's kappa 0.88",
        "annotator2 and annotator3: agree in 91.8%, Cohen's kappa 0.86",
    ):
        assert words in text


def test_gsm8k(shared, tokenizer):
    found = real(shared, tokenizer, "gsm8k_test.jsonl.gz", methods=METHODS)
    assert (found.kind, found.understood, found.checkable) == ("prompts", 1319, 1319)


def test_hh_harmless(shared, tokenizer):
    found = real(shared, tokenizer, "hh_harmless_test.jsonl.gz", methods=METHODS)
    assert found.rows == {"train": 2312} and found.kinds["train"] == {"pairs": 2303}
    faults = {t.message: t.count for t in found.troubles}
    assert faults["empty chosen"] == 4 and faults["prompts of chosen and rejected differ"] == 5
    assert found.length_bias.direction == "shorter" and found.advice[0].method == "dpo"
