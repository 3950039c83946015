"""Whole runs: what they leave, how they go on after being killed, what they refuse before starting."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
import tiny
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from mlx_align import api
from mlx_align.errors import DataError, RunError, SettingsError, StaleReferenceError
from mlx_align.model.open import open_model
from mlx_align.train.loop import Events
from mlx_align.train.runlog import METRICS


def write_pairs(path, count=24, seed=0):
    rng = np.random.default_rng(seed)
    words = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog", "bakes", "bread", "salt"]

    def text(n):
        return " ".join(rng.choice(words, n))

    rows = [
        {"prompt": f"{i} {text(5)}?", "chosen": text(6), "rejected": text(7)} for i in range(count)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def job(model_folder, tmp_path):
    """Arguments of a small DPO run on a tiny model; `job(**changes)` gives a variation."""
    data = write_pairs(tmp_path / "pairs.jsonl")

    def make(output, **changes):
        return {
            "model": str(model_folder()),
            "data": str(data),
            "output": str(tmp_path / output),
            "batch_size": 3,
            "steps": 14,
            "save_every": 4,
            "eval_every": 5,
            "learning_rate": 1e-3,
            "valid_share": 0.2,
            **changes,
        }

    return make


def rows(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def adapter(folder):
    return mx.load(str(folder / "adapters.safetensors"))


def same_bits(a, b):
    return a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]) for k in a)


def command(job, *extra):
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in job.items()]
    return [sys.executable, "-m", "mlx_align", "dpo", *flags, *extra]


def test_a_run_leaves_its_record(job, tmp_path):
    result = api.train_model("dpo", **job("run"))
    folder = tmp_path / "run"
    assert result.folder == folder and result.finished and result.steps == 14
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "run.json",
        "metrics.jsonl",
        "adapters.safetensors",
        "adapter_config.json",
        "checkpoints",
    }
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {
        "best",
        "step-000008",
        "step-000012",
    }
    record = json.loads((folder / "run.json").read_text())
    assert record["method"] == "dpo" and record["finished"]
    assert record["train_examples"] + record["valid_examples"] == 24
    assert record["before"]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert record["after"] == result.after and record["before"] == result.before
    train = [r for r in rows(folder) if r["split"] == "train"]
    valid = [r for r in rows(folder) if r["split"] == "valid"]
    assert [r["step"] for r in train] == list(range(1, 15))
    assert [r["step"] for r in valid] == [0, 5, 10, 14]
    assert train[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    for key in (
        "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gb", "seconds", "num_tokens",
        "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
        "logps/chosen", "logps/rejected",
    ):  # fmt: skip
        assert all(np.isfinite(r[key]) for r in train), key
    assert min(valid, key=lambda r: r["loss"] if r["step"] else 9)["step"] == result.best_step


def test_a_record_repeats_the_run(job, tmp_path):
    api.train_model("dpo", **job("run"))
    again = api.train_model(
        "dpo", config=tmp_path / "run" / "run.json", output=str(tmp_path / "again")
    )
    assert same_bits(adapter(tmp_path / "run"), adapter(again.folder))


@pytest.mark.parametrize("moment", [1, 6, 13])
def test_killed_and_resumed_is_unbroken(job, tmp_path, moment):
    settings = {"lora_dropout": 0.1}  # so that the random state matters
    api.train_model("dpo", **job("whole", **settings))
    folder = tmp_path / "broken"
    process = subprocess.Popen(command(job("broken", **settings)), stdout=subprocess.DEVNULL)
    wait_for_step(process, folder, moment)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "adapters.safetensors").exists()
    result = api.train_model("dpo", resume=folder)
    assert result.finished
    assert same_bits(adapter(tmp_path / "whole"), adapter(folder))
    times = ("tokens_per_second", "seconds", "peak_memory_gb")
    whole, broken = (
        [{k: v for k, v in r.items() if k not in times} for r in rows(f)]
        for f in (tmp_path / "whole", folder)
    )
    assert whole == broken


def wait_for_step(process, folder, step):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before it could be killed"
        if (folder / METRICS).exists() and any(
            r["step"] >= step and r["split"] == "train" for r in complete(folder)
        ):
            return
        time.sleep(0.002)
    raise AssertionError("the run did not get that far")


def complete(folder):
    for line in (folder / METRICS).read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


def test_interrupted_during_the_reference_pass(job, tmp_path, monkeypatch):
    from mlx_align.train import reference

    monkeypatch.setattr(reference, "PART", 5)
    monkeypatch.setenv("MLX_ALIGN_CACHE", str(tmp_path / "one"))
    api.train_model("dpo", **job("whole"))
    monkeypatch.setenv("MLX_ALIGN_CACHE", str(tmp_path / "two"))

    class Pull(Events):
        def on_progress(self, what, done, total):
            if done >= 12:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.train_model("dpo", **job("broken"), events=Pull())
    assert api.train_model("dpo", resume=tmp_path / "broken").finished
    assert same_bits(adapter(tmp_path / "whole"), adapter(tmp_path / "broken"))


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(job, tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen(command(job("run", steps=400)), stdout=subprocess.PIPE, text=True)
    wait_for_step(process, folder, 3)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"mlx-align dpo --resume {folder}" in output
    last = max(r["step"] for r in rows(folder))
    assert (folder / "checkpoints" / f"step-{last:06d}" / "state.json").exists()
    assert (folder / "adapters.safetensors").exists()


def test_a_stop_during_the_reference_pass_says_how_to_go_on(job, tmp_path, monkeypatch, capsys):
    from mlx_align.cli.console import Console
    from mlx_align.cli.train import _StopOnInterrupt
    from mlx_align.train import reference

    monkeypatch.setattr(reference, "PART", 5)
    monkeypatch.setenv("MLX_ALIGN_CACHE", str(tmp_path / "cache"))
    console = Console()
    with _StopOnInterrupt(console) as stop, pytest.raises(KeyboardInterrupt):
        stop._on_signal()
        api.train_model("dpo", **job("run"), events=console, should_stop=stop.asked)
    assert console.folder == tmp_path / "run"
    assert api.train_model("dpo", resume=tmp_path / "run").finished


def test_a_short_run_asks_the_reference_only_for_what_it_sees(job, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_ALIGN_CACHE", str(tmp_path / "cache"))
    asked = []

    class Count(Events):
        def on_progress(self, what, done, total):
            asked.append(total)

    settings = job("run", steps=2, eval_examples=3)
    result = api.train_model("dpo", **settings, events=Count())
    assert result.finished
    assert set(asked) == {2 * settings["batch_size"] + 3}


def test_stopping_by_callback_and_going_on(job, tmp_path):
    steps = []

    class Count(Events):
        def on_step(self, row, total):
            steps.append(row["step"])

    stopped = api.train_model(
        "dpo", **job("run"), events=Count(), should_stop=lambda: len(steps) == 5
    )
    assert not stopped.finished and stopped.steps == 5
    api.train_model("dpo", resume=tmp_path / "run")
    api.train_model("dpo", **job("whole"))
    assert same_bits(adapter(tmp_path / "whole"), adapter(tmp_path / "run"))


def test_a_half_written_checkpoint_is_not_used(job, tmp_path):
    steps = []

    class Count(Events):
        def on_step(self, row, total):
            steps.append(row["step"])

    api.train_model("dpo", **job("run"), events=Count(), should_stop=lambda: len(steps) == 9)
    folder = tmp_path / "run"
    leftover = folder / "checkpoints" / ".step-000099.tmp"
    shutil.copytree(folder / "checkpoints" / "step-000009", leftover)
    (leftover / "state.json").unlink()
    with open(folder / METRICS, "a") as file:
        file.write('{"step": 10, "split": "tra')
    api.train_model("dpo", resume=folder)
    api.train_model("dpo", **job("whole"))
    assert not leftover.exists()
    assert same_bits(adapter(tmp_path / "whole"), adapter(folder))
    assert [r["step"] for r in rows(folder) if r["split"] == "train"] == list(range(1, 15))


def test_resuming_refuses_what_it_cannot_continue(job, tmp_path):
    steps = []

    class Count(Events):
        def on_step(self, row, total):
            steps.append(row["step"])

    settings = job("run")
    api.train_model("dpo", **settings, events=Count(), should_stop=lambda: len(steps) == 5)
    folder = tmp_path / "run"
    with pytest.raises(SettingsError, match="is a run of dpo, not of sft"):
        api.train_model("sft", resume=folder)
    data = tmp_path / "pairs.jsonl"
    kept = data.read_text()
    data.write_text(kept.replace("fox", "cat"))
    with pytest.raises(StaleReferenceError, match="the data is not what it was"):
        api.train_model("dpo", resume=folder)
    assert (folder / "checkpoints").exists()  # nothing was lost by trying
    data.write_text(kept)
    assert api.train_model("dpo", resume=folder).finished
    with pytest.raises(RunError, match="finished"):
        api.train_model("dpo", resume=folder)
    with pytest.raises(RunError, match="not a run folder"):
        api.train_model("dpo", resume=tmp_path)


def test_a_changed_model_stops_the_resume(job, tmp_path, model_folder):
    model = tmp_path / "model"
    shutil.copytree(model_folder(), model)
    steps = []

    class Count(Events):
        def on_step(self, row, total):
            steps.append(row["step"])

    api.train_model(
        "dpo", **job("run", model=str(model)), events=Count(), should_stop=lambda: len(steps) == 5
    )
    weights = mx.load(str(model / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
    mx.save_safetensors(str(model / "model.safetensors"), weights)
    with pytest.raises(StaleReferenceError, match="the model is not what it was"):
        api.train_model("dpo", resume=tmp_path / "run")


def test_folders_that_cannot_hold_a_run(job, tmp_path, monkeypatch):
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="exists already and is not empty"):
        api.train_model("dpo", **job("used"))
    assert (used / "notes.txt").read_text() == "mine"
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        api.train_model("dpo", **job("file/run"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(RunError, match=r"the disk has 0.00 GB free"):
        api.train_model("dpo", **job("full"))
    assert not (tmp_path / "full").exists()


def test_a_failed_start_leaves_nothing_behind(job, tmp_path):
    with pytest.raises(DataError):
        api.train_model("dpo", **job("run", data=str(tmp_path / "none.jsonl")))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder(job, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunError, match="cannot be written"):
            api.train_model("dpo", **job("run"))
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_both_methods_learn_in_every_way(job, tmp_path, kind, method):
    changes = {"fine_tune": kind, "steps": 25, "learning_rate": 3e-3, "batch_size": 8}
    if method == "sft":
        pairs = (tmp_path / "pairs.jsonl").read_text().splitlines()
        texts = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in map(json.loads, pairs)]
        changes["data"] = str(tmp_path / "texts.jsonl")
        (tmp_path / "texts.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
    result = api.train_model(method, **job("run", **changes))
    train = [r for r in rows(result.folder) if r["split"] == "train"]
    assert train[-1]["loss"] < 0.8 * train[0]["loss"]


def test_grad_checkpoint_and_pack_length_change_no_result(job):
    plain = api.train_model("dpo", **job("plain"))
    other = api.train_model("dpo", **job("other", grad_checkpoint=True, pack_length=40))
    assert other.after["loss"] == pytest.approx(plain.after["loss"], rel=1e-3)


def test_a_plain_model_trains_and_resumes_as_well(job, tmp_path, model_folder):
    settings = {"model": str(model_folder("mamba")), "steps": 6, "save_every": 2}
    api.train_model("dpo", **job("whole", **settings))
    steps = []

    class Count(Events):
        def on_step(self, row, total):
            steps.append(row["step"])

    api.train_model(
        "dpo", **job("run", **settings), events=Count(), should_stop=lambda: len(steps) == 3
    )
    api.train_model("dpo", resume=tmp_path / "run")
    assert same_bits(adapter(tmp_path / "whole"), adapter(tmp_path / "run"))


def test_another_beta_and_seed_use_the_same_reference(job, monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_ALIGN_CACHE", str(tmp_path / "cache"))
    seen = []

    class Watch(Events):
        def on_progress(self, what, done, total):
            seen.append(done)

    api.train_model("dpo", **job("one"), events=Watch())
    assert seen
    seen.clear()
    api.train_model("dpo", **job("two", beta=0.5, seed=3), events=Watch())
    assert not seen


def test_resume_after_midnight_keeps_the_templates_date(job, tmp_path, model_folder, monkeypatch):
    import datetime

    from tiny import CHATML

    dated = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
    model = model_folder("qwen2", template=dated)
    steps = []

    class Count(Events):
        def on_step(self, row, total):
            steps.append(row["step"])

    api.train_model(
        "dpo", **job("run", model=str(model)), events=Count(), should_stop=lambda: len(steps) == 5
    )

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls):
            return cls(2099, 1, 1)

    monkeypatch.setattr(datetime, "date", Tomorrow)
    assert api.train_model("dpo", resume=tmp_path / "run").finished


THINKING = tiny.CHATML + (
    "{% if add_generation_prompt and not enable_thinking | default(true) %}"
    "<think>\n\n</think>\n\n{% endif %}"
)


@pytest.mark.parametrize(("thinking", "opening"), [(False, "<think>\n\n</think>\n\n"), (True, "")])
def test_what_a_run_was_taught_of_thinking_goes_along(
    job, model_folder, tmp_path, thinking, opening
):
    model = str(model_folder(style="qwen2", template=THINKING))
    api.train_model("dpo", **job("run", model=model, steps=1, thinking=thinking))
    loaded, _ = open_model(tmp_path / "run")
    asked = [{"role": "user", "content": "Hi"}]
    rendered = loaded.template.render(asked, generation=True)
    assert rendered.endswith("<|im_start|>assistant\n" + opening)
    # A row may still ask for the other mode.
    other = loaded.template.render(
        asked, generation=True, arguments=(("enable_thinking", not thinking),)
    )
    assert other != rendered
    exported = api.export_model(tmp_path / "run", "hf")
    tokenizer = AutoTokenizer.from_pretrained(exported)
    for asks in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        text = tokenizer.apply_chat_template(
            asked, tokenize=False, add_generation_prompt=True, **asks
        )
        assert text == rendered


def test_tokens_beyond_the_embedding_are_named(job, model_folder, tmp_path):
    shutil.copytree(model_folder(), tmp_path / "model")
    file = str(tmp_path / "model" / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    size = tokenizer.get_vocab_size()
    tokenizer.add_tokens(["<beyond>"])
    tokenizer.save(file)
    data = write_pairs(tmp_path / "more.jsonl", 8)
    lines = data.read_text().splitlines()
    lines[2] = lines[2].replace("?", "<beyond>?")
    data.write_text("\n".join(lines))
    with pytest.raises(
        DataError,
        match=rf"more\.jsonl:3: has the token {size} \('<beyond>'\).*embedding has {size} rows",
    ):
        api.train_model("dpo", **job("run", model=str(tmp_path / "model"), data=str(data)))
