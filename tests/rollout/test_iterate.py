"""Rounds: what was done is not done again, and the reports say how the rewards do."""

import json

import numpy as np
import pytest

from mlx_align import api
from mlx_align.cli import main
from mlx_align.errors import DataError, SettingsError
from mlx_align.rollout import iterate as module
from mlx_align.rollout.iterate import read_plan


@pytest.fixture
def plan(model_folder, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {i}?"}) + "\n" for i in range(12)))
    rewards = tmp_path / "rewards.py"
    rewards.write_text(
        "def vowels(prompt, completion):\n    return sum(c in 'aeiou' for c in completion)\n"
        "def few(prompt, completion):\n    return -sum(c in 'aeiou' for c in completion)\n"
    )

    def make(output="rounds", train=(), sample=(), **changes):
        return {
            "model": str(model_folder("qwen2")),
            "prompts": str(prompts),
            "output": str(tmp_path / output),
            "rounds": 2,
            "prompts_per_round": 6,
            "sample": {
                "reward": [f"{rewards}:vowels"],
                "watch": [f"{rewards}:few"],
                "group_size": 3,
                "max_tokens": 8,
                "stop": ["e", "t", "s", "n", "r"],
                **dict(sample),
            },
            "train": {
                "method": "dpo",
                "learning_rate": 1e-2,
                "steps": 3,
                "valid_share": 0.0,
                **dict(train),
            },
            **changes,
        }

    return make


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_round_goes_on_from_the_one_before(plan, tmp_path):
    done = api.iterate(plan())
    folder = tmp_path / "rounds"
    assert done.run == folder / "round-2" / "run" and done.waiting is None
    assert [r.round for r in done.reports] == [1, 2, 3]
    second = json.loads((folder / "round-2" / "run" / "run.json").read_text())["settings"]
    assert second["start"] == str(folder / "round-1" / "run")
    for number in (1, 2):
        samples = rows(folder / f"round-{number}" / "samples.jsonl")
        pairs = rows(folder / f"round-{number}" / "data.jsonl")
        assert len(samples) == 6 and 0 < len(pairs) <= 6
        by_prompt = {
            s["prompt"] if isinstance(s["prompt"], str) else str(s["prompt"]): s for s in samples
        }
        for pair in pairs:
            sample = by_prompt[
                pair["prompt"] if isinstance(pair["prompt"], str) else str(pair["prompt"])
            ]
            worth = dict(zip(sample["completions"], sample["rewards"], strict=True))
            ended = dict(zip(sample["completions"], sample["finished"], strict=True))
            assert worth[pair["chosen"]] > worth[pair["rejected"]]
            assert ended[pair["chosen"]] and ended[pair["rejected"]]
    # The watched reward is the opposite of the one that is trained on.
    assert all(report.agreement == 0 for report in done.reports)
    assert done.reports[0].watch == pytest.approx(-done.reports[0].reward)


def test_what_is_done_is_not_done_again(plan, tmp_path, monkeypatch):
    first = api.iterate(plan())
    monkeypatch.setattr(module, "_sample", None)
    again = api.iterate(plan())
    assert again == first
    monkeypatch.undo()
    more = api.iterate(plan(rounds=3))
    assert more.reports[:2] == first.reports[:2] and more.run.parent.name == "round-3"
    with pytest.raises(SettingsError, match="rounds of another plan"):
        api.iterate(plan(seed=5))


def test_an_interrupted_round_goes_on(plan, tmp_path, monkeypatch):
    whole = api.iterate(plan("whole"))
    original = api._train

    def interrupted(run, folder, **options):
        if folder.parent.name == "round-2":
            count = []
            original(run, folder, should_stop=lambda: bool(count) or count.append(1), **options)
            raise KeyboardInterrupt
        return original(run, folder, **options)

    monkeypatch.setattr(api, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        api.iterate(plan("broken"))
    monkeypatch.undo()
    broken = api.iterate(plan("broken"))
    assert broken.reports == whole.reports
    files = [done.run / "adapters.safetensors" for done in (whole, broken)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("method", "columns"), [("kto", {"completion", "label"}), ("sft", {"completion"})]
)
def test_samples_become_what_the_method_learns_from(plan, tmp_path, method, columns):
    api.iterate(plan(rounds=1, train={"method": method}))
    found = rows(tmp_path / "rounds" / "round-1" / "data.jsonl")
    assert all(row.keys() == {"prompt", *columns} for row in found)
    if method == "kto":
        assert [row["label"] for row in found[:2]] == [True, False]


def test_people_label_the_samples(plan, tmp_path, capsys):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan(label=True, rounds=1, sample={"reward": []})))

    def run():
        with pytest.raises(SystemExit) as end:
            main(["iterate", str(file)])
        return end.value.code, capsys.readouterr()

    code, said = run()
    questions = tmp_path / "rounds" / "round-1" / "to_label.jsonl"
    assert code == 0 and str(questions) in said.out
    asked = rows(questions)
    assert asked and all(row["label"] == "" and row["a"] != row["b"] for row in asked)
    assert run()[0] == 0 and not (tmp_path / "rounds" / "round-1" / "run").exists()
    questions.write_text("".join(json.dumps({**row, "label": "c"}) + "\n" for row in asked))
    code, said = run()
    assert code == 1 and "to_label.jsonl:1" in said.err
    labels = ["b", "tie", *["a"] * len(asked)]
    questions.write_text(
        "".join(json.dumps({**r, "label": x}) + "\n" for r, x in zip(asked, labels, strict=False))
    )
    code, said = run()
    assert code == 0 and "last run" in said.out
    learnt = rows(tmp_path / "rounds" / "round-1" / "data.jsonl")
    assert learnt[0]["chosen"] == asked[0]["b"] and len(learnt) == len(asked) - 1


def test_plans_that_cannot_be_followed_are_refused(plan, tmp_path):
    for changes, words in (
        ({"rouns": 2}, r"unknown setting 'rouns' \(did you mean 'rounds'"),
        ({"sample": {"reward": []}}, "say what samples are rewarded by"),
        ({"train": {"method": "grpo"}}, "does not learn from scored samples"),
        ({"train": {"method": "reward"}}, "does not learn from scored samples"),
        ({"train": {"method": "kto"}, "label": True}, "people compare pairs"),
        ({"sample": {"temprature": 1}}, "temprature"),
    ):
        with pytest.raises(SettingsError, match=words):
            read_plan(plan(**changes))
    with pytest.raises(SettingsError, match="must hold 'name: value' lines"):
        read_plan({"train": 3})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    with pytest.raises(SettingsError, match="not empty"):
        api.iterate(plan("full"))
    flat = tmp_path / "flat.py"
    flat.write_text("def flat(prompt, completion):\n    return 1.0\n")
    with pytest.raises(DataError, match="no sample can be learnt from"):
        api.iterate(plan("flat", sample={"reward": [f"{flat}:flat"], "watch": []}))


def test_agreement_counts_pairs_of_a_prompt():
    rewards = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, np.nan]])
    assert module._agreement(rewards, np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])) == 3.5 / 4
    assert module._agreement(rewards, np.array([[3.0, 2.0, np.nan], [np.nan] * 3])) == 0.0
    assert module._agreement(rewards, np.ones((2, 3))) is None


def test_correlation_with_length_is_that_within_prompts():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 50, (6, 5)).astype(float)
    rewards = 0.3 * tokens + rng.normal(size=(6, 5)) + 100 * np.arange(6)[:, None]
    x, y = (v - v.mean(axis=1, keepdims=True) for v in (rewards, tokens))
    assert module._correlation(rewards, tokens) == pytest.approx(
        np.corrcoef(x.ravel(), y.ravel())[0, 1]
    )
    assert module._correlation(np.ones((2, 3)), tokens[:2, :3]) is None
