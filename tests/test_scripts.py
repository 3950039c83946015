"""The scripts run, and what they write is what their help says."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def run(script, *arguments):
    """The output of a script; what it says on stderr is shown where it fails."""
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- bench_dpo and bench_methods --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "name"),
    [("bench_dpo", "mlx-align, later epochs, ch"), ("bench_methods", "mlx-align, kto, first")],
)
def test_one_contender_of_a_benchmark(script, name):
    output = run(script, "--tiny", "--steps", 1, "--batch-size", 2, "--only", name)
    (found,) = json.loads(output.splitlines()[-1]).values()
    tokens = int(re.search(r"pairs: 1, (\d+) tokens", output)[1])
    assert found["seconds_per_step"] > 0
    assert found["tokens_per_second"] * found["seconds_per_step"] == pytest.approx(tokens)
    assert 0 < found["peak_gb"] < found["rss_gb"] < 4


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import benchmark

    return benchmark


def test_benchmark_counts_the_weights(benchmark):
    """8 blocks of queries and output, keys and values, and the FFN; and the head."""
    weights = benchmark.Weights.of(benchmark.SHAPE)
    assert weights.blocks == 8 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1536)
    assert weights.head == 512 * 32_000
    assert weights.work(10, 3) == 10 * weights.blocks + 3 * weights.head


def test_other_tools_see_every_batch_in_order(benchmark):
    """Also those that make a new iterator at every step, as mlx-lm-lora's trainers do."""
    peer = object.__new__(benchmark.Peer)
    peer.rows, peer.size, peer.shapes = list(range(6)), 2, []

    class Rows(list):
        shape = (2, 1)

    def make(rows, batch_size, max_seq_length):
        yield [Rows(rows)]

    iterate = peer.in_order(make)
    anew = [next(iterate(peer.rows, batch_size=2, max_seq_length=9, train=True)) for _ in range(3)]
    assert anew == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert len(peer.shapes) == 3


# -- kernels -----------------------------------------------------------------------------------------


def test_bench_kernels_states_registers():
    rows = [line.split() for line in run("bench_kernels", "--registers").splitlines()[2:]]
    assert len(rows) == 15
    assert ["float16", "128", "16", "in", "registers", "8,960", "88", "108", "108", "88"] in rows
    assert max(int(n) for row in rows for n in row[-4:]) <= 128


def test_bench_kernels_counts():
    output = run("bench_kernels", "--tokens", 128, "--dims", 64, "--rows", 2, "--vocabulary", 600)
    rows = [line.split() for line in output.splitlines()]
    # One head, 128 tokens, 16 segments: the array's bytes are written four times, for O and gradients.
    (segments,) = (row for row in rows if row[:3] == ["16", "uneven", "segments"])
    assert segments[3] == "64" and float(segments[11]) == round(4 * 128 * 64 * 2 / 1e6, 1)
    chunks = {row[1]: row[2:4] for row in rows if row and row[0] == "float16" and len(row) == 9}
    assert chunks["token_log_prob_gradient"] == ["1.00", "1.00"]
    assert chunks["token_log_prob_log_ratio"] == ["2.00", "0.02"]
    assert ["32,768", "1.35", "GB", "138.8", "GB"] in rows


def test_bench_kernels_memory_grows_with_the_length_and_not_its_square():
    output = run("bench_kernels", "--memory", "--tokens", 1024)
    rows = [re.findall(r"(\d+) +\d+\.\d", line) for line in output.splitlines()[3:]]
    assert [len(row) for row in rows] == [6] * 5
    for row in rows:
        # Kept and computed again, at T / 2, T and 2 T.
        for _, once, twice in (map(int, row[:3]), map(int, row[3:])):
            assert twice < 2.2 * once


def test_mutate_kernels_shows_what_notices_a_fault():
    output = run("mutate_kernels", "ratio the other way").splitlines()
    assert output[2].startswith(
        "| token_log_prob: ratio the other way | test_ratios_of_two_models["
    )
    assert output[2].endswith("| numbers |")
    assert output[-1] == "1 of 1 faults noticed"


def test_the_table_of_faults_has_them_all():
    script = runpy.run_path(str(SCRIPTS / "mutate_kernels"))
    lines = script["TABLE"].read_text(encoding="utf-8").splitlines()
    listed = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| t")]
    mutants = script["MUTANTS"]
    assert listed == [f"{mutant.file}: {mutant.name}" for mutant in mutants]
    assert lines[-1] == f"{len(mutants)} of {len(mutants)} faults noticed"
    for mutant in mutants:
        source = (SCRIPTS.parent / "metal" / f"{mutant.file}.metal").read_text(encoding="utf-8")
        assert mutant.apply(source) != source


# -- gsm8k_preferences -------------------------------------------------------------------------------


def judged(*solutions):
    """Columns m0, m1, ... from (text, is_correct)."""
    return {f"m{i}": {"solution": t, "is_correct": c} for i, (t, c) in enumerate(solutions)}


def write_problems(path, *problems):
    rows = [{"question": q, "ground_truth": "A: 1", **judged(*s)} for q, s in problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


ONE_OF_EACH = (
    "Two and two?",
    [("2 + 2 = <<2+2=4>>4\nA: 4", True), ("2 + 2 =  4\nA: 4 ", True), ("2 + 2 = 5\nA: 5", False)],
)
ALL_RIGHT = ("One?", [("A: 1", True), ("It is 1\nA: 1", True), (" ", False)])
TWO_OF_EACH = ("Q", [("r0", True), ("w0", False), ("r1", True), ("w1", False)])


def test_gsm8k_preferences_of_a_small_file(tmp_path):
    file = write_problems(tmp_path / "solutions.jsonl", ONE_OF_EACH, ALL_RIGHT)
    output = run("gsm8k_preferences", file, tmp_path / "out", "--valid-share", 0)
    assert output == (
        "2 problems with 4 solutions (2 more were empty, repeated or judged both ways); 1 have right "
        "and wrong ones\n"
        "train: 2 problems, 1 pairs, 3 good and 1 bad labels\n"
        "  the shorter solution is the right one in 0.0% of the pairs (95 % interval 0.0% to 79.3%)\n"
        "valid: 0 problems, 0 pairs, 0 good and 0 bad labels\n"
    )
    assert read(tmp_path / "out", "pairs/train.jsonl") == [
        {"prompt": "Two and two?", "chosen": "2 + 2 = 4\nA: 4", "rejected": "2 + 2 = 5\nA: 5"}
    ]
    assert read(tmp_path / "out", "labels/train.jsonl") == [
        {"prompt": "Two and two?", "completion": "2 + 2 = 4\nA: 4", "label": True},
        {"prompt": "Two and two?", "completion": "2 + 2 = 5\nA: 5", "label": False},
        {"prompt": "One?", "completion": "A: 1", "label": True},
        {"prompt": "One?", "completion": "It is 1\nA: 1", "label": True},
    ]
    assert read(tmp_path / "out", "pairs/valid.jsonl") == []


def test_gsm8k_preferences_leaves_out_what_is_judged_both_ways(tmp_path):
    contradiction = ("Q", [("A: 1", True), ("A: 1", False), ("A: 2", False)])
    file = write_problems(tmp_path / "solutions.jsonl", contradiction)
    run("gsm8k_preferences", file, tmp_path / "out", "--valid-share", 0)
    assert read(tmp_path / "out", "pairs/train.jsonl") == []
    assert read(tmp_path / "out", "labels/train.jsonl") == [
        {"prompt": "Q", "completion": "A: 2", "label": False}
    ]


@pytest.mark.parametrize("seed", range(4))
def test_gsm8k_preferences_use_each_solution_once_before_any_again(tmp_path, seed):
    three = ("R", [*TWO_OF_EACH[1], ("w2", False)])
    file = write_problems(tmp_path / "solutions.jsonl", TWO_OF_EACH, three)
    options = ("--valid-share", 0, "--seed", seed)
    run("gsm8k_preferences", file, tmp_path / "two", *options)
    run("gsm8k_preferences", file, tmp_path / "all", "--per-problem", 9, *options)

    pairs = read(tmp_path / "two", "pairs/train.jsonl")
    assert [p["prompt"] for p in pairs] == ["Q", "Q", "R", "R"]
    for first, second in (pairs[:2], pairs[2:]):
        assert {first["chosen"], second["chosen"]} == {"r0", "r1"}
        assert first["rejected"] != second["rejected"]

    pairs = [tuple(p.values()) for p in read(tmp_path / "all", "pairs/train.jsonl")]
    assert len(pairs) == len(set(pairs)) == 4 + 6
    assert {rejected for _, _, rejected in pairs[4:7]} == {"w0", "w1", "w2"}


def test_gsm8k_preferences_hold_out_whole_problems_whatever_the_order(tmp_path):
    problems = [(f"Q{i}", TWO_OF_EACH[1]) for i in range(10)]

    def held_out(name, problems):
        file = write_problems(tmp_path / f"{name}.jsonl", *problems)
        run("gsm8k_preferences", file, tmp_path / name)
        return {
            (folder, part): {r["prompt"] for r in read(tmp_path / name, f"{folder}/{part}.jsonl")}
            for folder in ("pairs", "labels")
            for part in ("train", "valid")
        }

    forwards, backwards = held_out("a", problems), held_out("b", problems[::-1])
    assert forwards == backwards
    assert forwards["pairs", "valid"] == forwards["labels", "valid"]
    assert len(forwards["pairs", "valid"]) == 2
    assert forwards["pairs", "train"] == {q for q, _ in problems} - forwards["pairs", "valid"]


def test_gsm8k_preferences_names_the_row_that_it_cannot_read(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"question": "Q", "answer": "A"}\n')
    command = [sys.executable, SCRIPTS / "gsm8k_preferences", tmp_path / "bad.jsonl", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert f'{tmp_path}/bad.jsonl:1: needs a "question"' in done.stderr
    assert "Traceback" not in done.stderr
