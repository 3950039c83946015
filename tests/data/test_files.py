"""Files, folders and data sets: read with their line numbers, split by prompt, checked by kind."""

import gzip
import json

import pytest
import tiny

from mlx_align.data.dataset import (
    DataReport,
    DataSettings,
    load_dataset,
    read_records,
    split_by_prompt,
)
from mlx_align.data.jsonl import find_files, read_rows
from mlx_align.data.template import Encoder, find_template, make_example
from mlx_align.errors import DataError

PAIR = {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    from mlx_lm.utils import load_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.make_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    return Encoder(tokenizer, max_length=512, template=find_template(tokenizer))


def test_rows_know_their_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert list(read_rows(file)) == [(f"{file}:1", {"a": 1}), (f"{file}:3", {"a": 2})]


def test_gzip_json_and_parquet(tmp_path):
    rows = [{"a": 1}, {"a": 2}]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.json").write_text(json.dumps({"version": 1, "rows": rows}))
    assert [row for _, row in read_rows(tmp_path / "a.jsonl.gz")] == rows
    assert list(read_rows(tmp_path / "b.json"))[1] == (f"{tmp_path}/b.json:row 2", {"a": 2})
    assert [row for _, row in read_rows(tmp_path / "c.json")] == rows
    why = "Parquet is read where pyarrow is installed"
    pyarrow = pytest.importorskip("pyarrow", reason=why)
    parquet = pytest.importorskip("pyarrow.parquet", reason=why)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert [row for _, row in read_rows(tmp_path / "d.parquet")] == rows


def test_bad_lines_are_collected(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n' + "{oops\n" * 7)
    with pytest.raises(DataError) as caught:
        list(read_rows(file))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{file}:2: not valid JSON")
    assert len(lines) == 6 and lines[-1] == "... and 2 more"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.jsonl", None, "no such file"),
        ("a.csv", "x", "unknown file type"),
        ("a.json", '{"a": 1}\n{"a": 2}', "name it .jsonl"),
        ("a.json", "{", "not valid JSON"),
        ("a.jsonl.gz", "not gzip", "cannot be read"),
        ("a.jsonl", b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_unreadable_files_say_why(tmp_path, name, content, words):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        list(read_rows(file))
    assert words in str(caught.value) and str(file) in str(caught.value)


def test_folders_have_splits(tmp_path):
    for name in ("train.jsonl", "valid.jsonl", "test.jsonl", "notes.json"):
        write(tmp_path / name, [PAIR])
    found = find_files(str(tmp_path))
    assert {k: [p.name for p in v] for k, v in found.items()} == {
        "train": ["train.jsonl"], "valid": ["valid.jsonl"], "test": ["test.jsonl"],
    }  # fmt: skip


def test_hub_layouts_and_named_splits(tmp_path):
    names = ["train_prefs-00000-of-00001", "test_prefs-00000-of-00001", "train_sft-00000-of-00001"]
    for name in names:
        write(tmp_path / "data" / f"{name}.jsonl", [PAIR])
    with pytest.raises(DataError, match="--split"):
        find_files(str(tmp_path))
    found = find_files(str(tmp_path), "train_prefs")
    assert [p.name for p in found["train"]] == [names[0] + ".jsonl"]
    assert [p.name for p in found["test"]] == [names[1] + ".jsonl"]


def test_unknown_source_says_what_was_tried():
    with pytest.raises(DataError, match="no such file or folder"):
        find_files("no/such/thing.jsonl")
    with pytest.raises(DataError, match="the Hub could not be asked"):
        find_files("nobody/nothing")


def test_errors_of_all_rows_are_collected(tmp_path):
    file = write(tmp_path / "a.jsonl", [PAIR, {"x": 1}, {"prompt": "p", "chosen": "c"}])
    with pytest.raises(DataError) as caught:
        read_records([file], DataReport("a"))
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == ["2", "3"]


def test_the_split_holds_prompts_together_and_ignores_row_order():
    mask = [[True]]
    examples = [make_example([p], [[c]], mask, "") for p in range(40) for c in range(3)]
    train, valid = split_by_prompt(examples, 0.2, seed=1)
    assert len(valid) == 24 and len(train) + len(valid) == len(examples)
    prompts = {e.prompt[0] for e in valid}
    assert prompts.isdisjoint({e.prompt[0] for e in train})
    _, again = split_by_prompt(examples[::-1], 0.2, seed=1)
    assert {e.uid for e in again} == {e.uid for e in valid}
    _, other = split_by_prompt(examples, 0.2, seed=2)
    assert {e.uid for e in other} != {e.uid for e in valid}
    assert split_by_prompt(examples, 0.0, seed=1)[1] == []


def test_wrong_kind_of_data_names_the_fitting_method(tmp_path, encoder):
    file = write(tmp_path / "a.jsonl", [{"text": "abc"}])
    with pytest.raises(DataError) as caught:
        load_dataset(DataSettings(data=str(file)), encoder, kind="pairs", method="dpo", seed=0)
    assert "a.jsonl:1: this row is of the kind: plain text" in str(caught.value)
    assert "mlx-align sft" in str(caught.value)


def test_nothing_left_is_an_error_that_says_why(tmp_path, encoder):
    file = write(tmp_path / "a.jsonl", [{**PAIR, "chosen": "No"}] * 2)
    with pytest.raises(DataError, match=r"chosen equals rejected .*lines 1, 2"):
        load_dataset(DataSettings(data=str(file)), encoder, kind="pairs", method="dpo", seed=0)
    empty = write(tmp_path / "b.jsonl", [])
    with pytest.raises(DataError, match="the file is empty"):
        load_dataset(DataSettings(data=str(empty)), encoder, kind="pairs", method="dpo", seed=0)


def test_held_out_file_takes_the_place_of_the_split(tmp_path, encoder):
    train = write(tmp_path / "t.jsonl", [{**PAIR, "prompt": f"p{i}"} for i in range(10)])
    valid = write(tmp_path / "v.jsonl", [{**PAIR, "prompt": f"v{i}"} for i in range(3)])
    settings = DataSettings(data=str(train), valid_data=str(valid))
    dataset = load_dataset(settings, encoder, kind="pairs", method="dpo", seed=0)
    assert (len(dataset.train), len(dataset.valid)) == (10, 3)


def test_the_hh_pairs_are_read_and_the_bad_ones_reported(shared, encoder):
    file = shared("data/hh_harmless_test.jsonl.gz")
    report = DataReport(str(file))
    records = read_records([file], report)
    dropped = {}
    for problem in report.problems:
        dropped.setdefault(problem.kind, []).append(int(problem.origin.rsplit(":", 1)[1]))
    assert report.rows == 2312 and len(records) == 2303
    assert dropped == {
        "empty chosen": [87, 517, 926, 1104],
        "prompts of chosen and rejected differ": [1255, 1689, 1951, 1953, 2037],
    }
    assert any(
        "4 of 2312 rows: empty chosen" in line and "87, 517" in line for line in report.lines()
    )
    assert all(encoder.examples(r) for r in records[:50] if len(r.prompt) < 600)
