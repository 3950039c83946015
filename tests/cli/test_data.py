"""`mlx-align data check`: what it prints, how it ends, and what it writes."""

import json

import click
import pytest

import mlx_align
from mlx_align.cli import main

PAIRS = [{"prompt": f"Question {i}?", "chosen": "Yes.", "rejected": "No."} for i in range(4)]


def run(*arguments):
    try:
        main(["data", "check", *map(str, arguments)])
    except SystemExit as end:
        return end.code
    raise AssertionError("main must exit")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return path


def test_the_demo_is_checked_by_default(capsys):
    assert run() == 0
    output = capsys.readouterr().out
    for words in (
        "demo: 340 rows in train, 60 rows in valid",
        "340 rows: preference pairs",
        "340 of 340 rows can be trained on",
        "<|im_end|>⟧",
        "(--max-length)",
        "prompts that are trained on, in valid: 2 rows",
        "advice: dpo",
        "  mlx-align dpo\n",
    ):
        assert words in output, words
    assert "\x1b" not in output


def test_flags(file, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    rows = [
        {"q": r["prompt"], "good": r["chosen"], "bad": r["rejected"], "x": 1, "y": 1} for r in PAIRS
    ]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = tmp_path / "report.json"
    status = run(
        other, "--field", "prompt=q,chosen=good,rejected=bad", "--valid-data", file,
        "--annotators", "x,y", "--max-length", "512", "--examples", "2", "--output", report,
        "--chat-template", "chatml",
    )  # fmt: skip
    output = capsys.readouterr().out
    assert status == 0
    assert output.count("example, ") == 2 and "x and y: agree in 100.0%" in output
    assert "--field prompt=q,chosen=good,rejected=bad" in output and "--max-length 512" in output
    saved = json.loads(report.read_text())
    assert saved["kind"] == "pairs" and saved["usable"] == 4 and len(saved["samples"]) == 2
    assert saved["settings"]["max_length"] == 512


def test_status_1_where_no_row_is_understood(file, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"x": 1}\n{oops\n')
    assert run(bad) == 1
    output = capsys.readouterr().out
    assert f"{bad}:1" in output and f"{bad}:2" in output and "0 of 2 rows" in output
    with bad.open("a") as lines:
        lines.write(json.dumps(PAIRS[0]) + "\n")
    assert run(bad) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.jsonl"], "no such file or folder"),
        (["{file}", "--field", "label"], "is not NAME=COLUMN"),
        (["{file}", "--annotators", "bob"], "no row has a column 'bob'"),
        (["{file}", "--model", "no/such/model"], "no such model folder"),
        (["{file}", "--chat-template", "none.jinja"], "no such file"),
    ],
)
def test_mistakes_are_one_line(file, capsys, arguments, words):
    assert run(*(a.format(file=file) for a in arguments)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and "Traceback" not in error


def test_the_weights_are_not_needed(file, model_folder, tmp_path, capsys):
    folder = tmp_path / "bare"
    folder.mkdir()
    for part in model_folder("llama").iterdir():
        if part.suffix != ".safetensors":
            (folder / part.name).write_bytes(part.read_bytes())
    assert run(file, "--model", folder) == 0
    output = capsys.readouterr().out
    assert "<|eot_id|>⟧" in output and "demo model" not in output
    assert f"mlx-align dpo --model {folder} --data {file}" in output


def test_on_a_terminal_the_scored_part_is_coloured(file):
    from mlx_align.cli.data import colour

    text = colour("\n".join(mlx_align.check_data(file).lines()))
    assert click.style("⟦Yes.<|im_end|>⟧", fg="green", bold=True) in text
    assert click.style("advice:", fg="green", bold=True) + " dpo" in text


def test_from_python(file):
    check = mlx_align.check_data(str(file), field=["weight=missing"])
    assert check.understood == 0 and check.faults[0].rows.count == 4
    assert mlx_align.check_data(file, max_length=2).usable == 0
