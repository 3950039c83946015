"""What a data check says of its measurements: warnings, notes, and the method that fits."""

import dataclasses
import json
import shlex

import pytest

import mlx_align
from mlx_align.data.advice import advise


@pytest.fixture
def advised(tmp_path):
    """advised(rows, ...) -> the check of rows written to a file, remarks included."""

    def run(rows, valid=None, **settings):
        for name, content in (("train", rows), ("valid", valid)):
            if content is not None:
                file = tmp_path / f"{name}.jsonl"
                file.write_text("".join(json.dumps(row) + "\n" for row in content))
                settings |= {"valid_data": str(file)} if name == "valid" else {}
        return mlx_align.check_data(tmp_path / "train.jsonl", **settings)

    return run


def pairs(count, **more):
    return [
        {"prompt": f"Question {i}?", "chosen": "Yes", "rejected": "No", **more}
        for i in range(count)
    ]


def said(found, level):
    return [remark.text for remark in found.remarks if remark.level == level]


def methods(found):
    return [remark.method for remark in found.remarks if remark.level == "advice"]


def first(found):
    return next(remark for remark in found.remarks if remark.level == "advice")


def test_clean_pairs_go_to_dpo(advised):
    found = advised(pairs(600))
    assert methods(found)[0] == "dpo"
    words = shlex.split(first(found).command)
    assert words[:3] == ["mlx-align", "dpo", "--model"] and words[4:] == [
        "--data",
        found.settings.data,
    ]
    assert words[3] != "demo"
    assert any("600 examples are fewer than 5,000" in text for text in said(found, "note"))
    assert any("30 examples" in text for text in said(advised(pairs(30)), "warning"))


def test_a_command_repeats_the_settings(advised):
    rows = [{"q": f"a {i}", "a": "b"} for i in range(3)]
    field = ("prompt=q", "completion=a")
    found = advised(rows, field=field, max_length=99, thinking=False, chat_template="chatml")
    words = "--field prompt=q,completion=a --max-length 99 --chat-template chatml --no-thinking"
    assert first(found).command.endswith(f"{found.settings.data} {words}")
    assert first(mlx_align.check_data()).command == "mlx-align dpo"


def test_contradicting_pairs_go_to_a_method_for_noise(advised):
    turned = pairs(10, chosen="No", rejected="Yes")
    found = advised([*pairs(40), *turned, *pairs(40)[10:]])
    assert methods(found)[:2] == ["cdpo", "ipo"]
    assert first(found).command.endswith("--label-smoothing 0.15")
    assert any("judge the same pair both ways" in text for text in said(found, "warning"))


def test_annotators_of_pairs_tell_the_noise(advised):
    votes = [{"annotator1": "a", "annotator2": "b" if i < 12 else "a"} for i in range(40)]
    found = advised([{**row, **vote} for row, vote in zip(pairs(40), votes, strict=True)])
    assert methods(found)[0] == "cdpo"


def test_scales_of_many_steps_give_no_noise(advised):
    votes = [{"annotator1": i % 5 + 1, "annotator2": (i + 1) % 5 + 1} for i in range(40)]
    found = advised([{**row, **vote} for row, vote in zip(pairs(40), votes, strict=True)])
    assert found.agreement and not found.noise and methods(found)[0] == "dpo"
    assert any("agree little beyond chance" in text for text in said(found, "warning"))


def test_length_that_decides_is_noted(advised):
    longer = advised(pairs(7, chosen="Yes, yes, yes"))
    assert "always picking the longer one is right in 100%" in " ".join(said(longer, "note"))
    assert "dpo-norm" in methods(longer)
    shorter = advised(pairs(7, rejected="No, no, no, no"))
    assert "always picking the shorter one is right in 100%" in " ".join(said(shorter, "note"))


def test_rows_that_stop_training_and_other_kinds_are_warned_of(advised):
    found = advised(pairs(1), [*pairs(1), {"x": 1}, {"prompt": "p", "completion": "c"}])
    texts = " ".join(said(found, "warning"))
    assert "training stops at 1 row" in texts
    assert "several kinds of rows (2 pairs, 1 completions)" in texts
    assert "the prompts of 1 row in valid are trained on" in texts


def test_truncation_is_noted(advised):
    texts = said(advised(pairs(3), max_length=12), "note")
    assert any("--max-length 12 cuts or drops 3 examples" in text for text in texts)


def test_a_template_without_an_end_of_turn_is_warned_of(advised, tmp_path):
    template = tmp_path / "plain.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    found = advised(pairs(3), chat_template=str(template))
    assert found.unended == 3
    assert any(
        "in 3 examples the end of the turn is not scored" in t for t in said(found, "warning")
    )


def test_a_model_without_a_template_gets_orpo_first(advised):
    found = dataclasses.replace(advised(pairs(30)), has_template=False)
    assert methods(advise(found, mlx_align.METHODS))[0] == "orpo"


@pytest.mark.parametrize(
    ("good", "bad", "flags"),
    [(10, 40, "--desirable-weight 4.67"), (40, 10, "--undesirable-weight 3.43"), (11, 10, "")],
)
def test_thumbs_go_to_kto_with_weights_in_its_range(advised, good, bad, flags):
    rows = [{"prompt": f"{i}", "completion": "c", "label": i < good} for i in range(good + bad)]
    found = advised(rows)
    assert methods(found)[0] == "kto" and first(found).command.endswith(flags)
    weights = dict(zip(*[iter(flags.split())] * 2, strict=True))
    ratio = good * float(weights.get("--desirable-weight", 1))
    ratio /= bad * float(weights.get("--undesirable-weight", 1))
    assert 1 <= ratio <= 4 / 3
    assert (found.good_labels.hits, found.good_labels.total) == (good, good + bad)


def test_labels_of_one_kind(advised):
    found = advised([{"prompt": f"{i}", "completion": "c", "label": True} for i in range(5)])
    assert methods(found) == ["sft"]
    assert any("all labels are good" in text for text in said(found, "warning"))


def test_only_methods_that_exist_are_advised(advised):
    assert methods(advise(advised(pairs(3)), ("orpo",))) == ["orpo"]


def test_prompts_are_to_be_rewarded(advised):
    found = advised([{"prompt": f"{i}?", "answer": f"{i}"} for i in range(5)])
    assert methods(advise(found, ("grpo",))) == ["grpo", None]
    assert first(advise(found, ("grpo",))).command.endswith("--reward gsm8k")
    words = advise(advised([{"prompt": "Where?", "answer": "Paris"}]), ("grpo",))
    assert first(words).command.endswith("--reward contains")
    alone = advised([{"prompt": f"{i}?"} for i in range(5)])
    assert methods(alone) == [None] and "prompts alone teach nothing" in first(alone).text


def test_comparisons_are_to_be_written_as_pairs(advised):
    rows = [{"prompt": f"{i}", "response1": "a", "response2": "b"} for i in range(3)]
    assert "have them judged" in first(advised(rows)).text
    found = advised([{**row, "winner": i} for i, row in enumerate(rows)])
    assert "2 rows have a completion that most prefer" in first(found).text
    assert "leave out 1 ties" in first(found).text


def test_nothing_usable_gets_no_advice(advised):
    assert not methods(advised([{"x": 1}]))
    found = advised([{"question": "1 + 1?", "answer": "2"}])
    assert "try --field prompt=question,completion=answer" in said(found, "note")[0]
