"""Every method as a whole run: it learns, it goes on bit for bit, its reference is what it says."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from train.test_loop import adapter, rows, same_bits, write_pairs

from mlx_align import api
from mlx_align.errors import DataError, ModelError, SettingsError
from mlx_align.losses import METHODS
from mlx_align.train.loop import Events

PREFERENCE = [n for n, m in METHODS.items() if m.data in ("pairs", "labels") and n != "rpo-gap"]


@pytest.fixture
def job(model_folder, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl", 16)

    def make(output, **changes):
        return {
            "model": str(model_folder()),
            "data": str(data),
            "output": str(tmp_path / output),
            "batch_size": 4,
            "steps": 6,
            "save_every": 2,
            "eval_every": 3,
            "learning_rate": 1e-3,
            "valid_share": 0.2,
            **changes,
        }

    return make


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def with_margins(job, tmp_path):
    lines = read(job("x")["data"])
    path = tmp_path / "margins.jsonl"
    path.write_text("".join(json.dumps({**r, "margin": 1.5}) + "\n" for r in lines))
    return str(path)


def interrupted(method, job, tmp_path, at=3, **changes):
    """The same run unbroken, and stopped after `at` steps and resumed."""
    api.train_model(method, **job("whole", **changes))
    count = []
    stopped = api.train_model(
        method, **job("broken", **changes), should_stop=lambda: count.append(1) or len(count) == at
    )
    assert not stopped.finished
    api.train_model(method, resume=tmp_path / "broken")
    return tmp_path / "whole", tmp_path / "broken"


@pytest.mark.parametrize("name", PREFERENCE)
def test_every_method_learns_by_heart_what_it_sees_often(name, job, tmp_path):
    changes = {"unpair": True} if METHODS[name].data == "labels" else {}
    result = api.train_model(
        name, **job("run", steps=24, valid_share=0.0, learning_rate=1e-2, **changes)
    )
    train = rows(result.folder)
    first, last = (np.mean([r["loss"] for r in part]) for part in (train[:4], train[-4:]))
    assert last < first
    accuracy = "accuracy" if name == "reward" else "rewards/accuracies"
    if accuracy in train[-1]:
        assert np.mean([r[accuracy] for r in train[-4:]]) > 0.9, name
    else:
        good, bad = (
            np.mean([r[f"rewards/{side}"] for r in train[-4:]]) for side in ("chosen", "rejected")
        )
        assert good > bad + 0.5


def test_the_reward_gap_needs_margins(job, tmp_path):
    with pytest.raises(DataError, match=r'pairs.jsonl:\d+: has no "margin".*--field margin='):
        api.train_model("rpo-gap", **job("run"))
    result = api.train_model("rpo-gap", **job("run", data=with_margins(job, tmp_path)))
    assert result.finished


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("reward", {}),
        ("reward", {"fine_tune": "head"}),
        ("kto", {"unpair": True}),
        ("bco", {"unpair": True}),
        ("aot-unpaired", {}),
        ("orpo", {"nll_on": "full"}),
        ("dpo", {"sync_every": 2}),
        ("dpo", {"sync_every": 2, "fine_tune": "full"}),
        ("dpo", {"wpo": True, "ld_alpha": 0.5, "f_divergence": "js"}),
    ],
)
def test_resumed_runs_are_the_unbroken_ones(name, changes, job, tmp_path):
    whole, broken = interrupted(name, job, tmp_path, **changes)
    assert same_bits(adapter(whole), adapter(broken))
    drop = ("tokens_per_second", "seconds", "peak_memory_gb")
    a, b = (
        [{k: v for k, v in r.items() if k not in drop} for r in rows(f)] for f in (whole, broken)
    )
    assert a == b


@pytest.mark.parametrize("name", ["kto", "bco", "aot", "aot-unpaired", "orpo", "reward", "rpo"])
def test_packs_change_nothing(name, job, tmp_path):
    """Losses that look at the whole step see the same whole, however it is cut."""
    changes = {"unpair": True} if METHODS[name].data == "labels" else {}
    runs = [
        api.train_model(name, **job(f"run-{n}", pack_length=n, steps=3, **changes)).folder
        for n in (16, 4096)
    ]
    a, b = ([r for r in rows(folder) if r["split"] == "train"] for folder in runs)
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], rel=1e-3)


def test_label_methods_refuse_pairs_unless_told_and_pair_methods_refuse_labels(job, tmp_path):
    with pytest.raises(DataError, match="add --unpair"):
        api.train_model("kto", **job("run"))
    labels = tmp_path / "labels.jsonl"
    row = {"prompt": "Hi", "completion": "Yes", "label": True}
    labels.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="use: mlx-align kto"):
        api.train_model("dpo", **job("run", data=str(labels)))


def test_thumbs_from_a_log_with_other_names(job, tmp_path):
    log = tmp_path / "log.jsonl"
    pairs = read(job("x")["data"])
    log.write_text(
        "".join(
            json.dumps({"q": r["prompt"], "a": r[side], "thumb": thumb}) + "\n"
            for r in pairs
            for side, thumb in (("chosen", "up"), ("rejected", "down"))
        )
    )
    fields = ("prompt=q", "completion=a", "label=thumb")
    result = api.train_model("kto", **job("run", data=str(log), field=fields))
    record = json.loads((result.folder / "run.json").read_text())
    assert record["train_examples"] + record["valid_examples"] == 32
    assert "kl" in result.after


def test_two_copies_of_a_row_are_one_of_weight_two(job, tmp_path):
    data = read(job("x")["data"])[:3]
    files = []
    for name, made in (
        ("twice", [*data, data[0]]),
        ("weighted", [{**data[0], "weight": 2}, *data[1:]]),
    ):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(r) + "\n" for r in made))
    for method in ("dpo", "sft", "reward"):
        seen = []
        for i, file in enumerate(files):
            if method == "sft":
                fields = {"field": ("completion=chosen",)}
                rows_ = read(file)
                for r in rows_:
                    r.pop("rejected", None)
                file = file.with_name(f"sft-{file.name}")
                file.write_text("".join(json.dumps(r) + "\n" for r in rows_))
            else:
                fields = {}
            run = job(
                f"{method}{i}", data=str(file), batch_size=8, steps=1, valid_share=0.0, **fields
            )
            seen.append(rows(api.train_model(method, **run).folder)[0])
        assert seen[0]["loss"] == pytest.approx(seen[1]["loss"], rel=1e-5), method
        assert seen[0]["grad_norm"] == pytest.approx(seen[1]["grad_norm"], rel=1e-4), method


# -- references ------------------------------------------------------------------------------------


def test_going_on_from_a_run_starts_at_it(job, tmp_path):
    api.train_model("dpo", **job("first"))
    second = api.train_model("ipo", **job("second", model=str(tmp_path / "first"), steps=1))
    # The reference is the model that wears the first run's adapter, so nothing has moved yet.
    assert second.before["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert second.before["loss"] == pytest.approx(25, rel=1e-4)
    record = json.loads((second.folder / "run.json").read_text())
    assert record["settings"]["start"] == str(tmp_path / "first")
    assert record["settings"]["model"] == job("x")["model"]
    before = api.train_model("dpo", **job("third", steps=1)).before
    assert before["logps/chosen"] != pytest.approx(second.before["logps/chosen"], abs=1e-3)
    with pytest.raises(SettingsError, match="lora_rank: the adapter to start from has 8"):
        api.train_model("dpo", **job("fourth", start=str(tmp_path / "first"), lora_rank=4))


def test_a_run_as_the_reference(job, tmp_path):
    api.train_model("dpo", **job("first"))
    run = api.train_model("dpo", **job("second", reference=str(tmp_path / "first"), steps=1))
    start = api.train_model("dpo", **job("third", steps=1))
    # The same policy, held to the first run instead of to itself: the first run's rewards, reversed.
    first = json.loads((tmp_path / "first" / "run.json").read_text())["after"]
    assert run.before["logps/chosen"] == pytest.approx(start.before["logps/chosen"], rel=1e-5)
    assert run.before["rewards/margins"] == pytest.approx(-first["rewards/margins"], rel=1e-3)


def test_no_reference(job, tmp_path):
    run = api.train_model("dpo", **job("run", reference="none", steps=1))
    chosen, rejected = (run.before[f"logps/{side}"] for side in ("chosen", "rejected"))
    assert run.before["rewards/margins"] == pytest.approx(0.1 * (chosen - rejected), rel=1e-4)


def test_another_vocabulary_cannot_be_the_reference(job, model_folder):
    other = str(model_folder("qwen2"))
    with pytest.raises(ModelError, match="has another vocabulary"):
        api.train_model("dpo", **job("run", reference=other))


def test_a_moving_reference_is_the_mixture_of_weights(loaded_model):
    from mlx_align.data.template import make_example
    from mlx_align.export.fuse import fused_tensors
    from mlx_align.model.adapter import AdapterSettings, wear_adapter
    from mlx_align.model.forward import make_batches, token_log_probs
    from mlx_align.train.moving import MovingReference

    loaded = loaded_model()
    adapter = wear_adapter(loaded.model, AdapterSettings(lora_rank=3), seed=1)
    example = make_example(range(5, 15), [range(20, 40)], [np.ones(20, bool)], "f")
    (batch,) = make_batches(loaded, [example])
    moving = MovingReference(loaded, adapter, every=2, weight=0.6)
    base = {name: np.array(x) for name, x in fused_tensors(loaded.model)}
    mixture = base
    for step in (1, 2, 3, 4):
        keys = mx.random.split(mx.random.key(step), len(adapter.weights()))
        adapter.load(
            {
                n: 0.3 * mx.random.normal(x.shape, key=k)
                for (n, x), k in zip(adapter.weights().items(), keys, strict=True)
            },
            "",
        )
        moving.after(step)
        if step % 2 == 0:
            now = {name: np.array(x) for name, x in fused_tensors(loaded.model)}
            mixture = {n: 0.6 * now[n] + 0.4 * mixture[n] for n in now}
    ours = moving.log_probs(batch)
    plain = loaded_model()
    plain.model.load_weights([(n, mx.array(x)) for n, x in mixture.items()])
    assert np.allclose(ours, np.array(token_log_probs(plain, batch)[0]), atol=2e-4)
    again = MovingReference(loaded, adapter, every=2, weight=0.6)
    again.load(moving.state())
    assert np.array_equal(again.log_probs(batch), ours)


def test_a_reference_that_follows_starts_where_training_starts(job):
    with pytest.raises(SettingsError, match="leave out --reference"):
        api.train_model("dpo", **job("run", reference="some/model", sync_every=2))


def test_held_out_data_does_not_move_bcos_mean():
    from losses.test_losses import labelled

    method = METHODS["bco"](beta=0.1)
    (context,), state = method.couple([labelled()], {"total": 3.0, "count": 10}, False)
    assert context == pytest.approx(0.3) and state == {"total": 3.0, "count": 10}
    assert method.couple([labelled()], {}, False)[0] == [0.0]


def test_kto_without_kl_needs_no_other_completions(job, tmp_path, monkeypatch):
    asked = []

    class Count(Events):
        def on_progress(self, what, done, total):
            asked.append(total)

    monkeypatch.setenv("MLX_ALIGN_CACHE", str(tmp_path / "cache"))
    api.train_model("kto", **job("run", unpair=True, kl=False, steps=1), events=Count())
    without = asked[-1]
    monkeypatch.setenv("MLX_ALIGN_CACHE", str(tmp_path / "other"))
    api.train_model("kto", **job("with", unpair=True, steps=1), events=Count())
    assert asked[-1] == 2 * without


def test_plain_texts_are_held_out_one_by_one(job, tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"text": f"### {i} bread and salt"}) + "\n" for i in range(40))
    )
    run = api.train_model("sft", **job("run", data=str(texts), valid_share=0.25, steps=1))
    record = json.loads((run.folder / "run.json").read_text())
    assert (record["train_examples"], record["valid_examples"]) == (30, 10)


def test_an_unfinished_run_is_its_newest_checkpoint(job, tmp_path):
    from mlx_align.model.open import find_adapter

    count = []
    run = api.train_model(
        "dpo", **job("run"), should_stop=lambda: count.append(1) or len(count) == 2
    ).folder
    assert find_adapter(run) == run / "checkpoints" / "step-000002"
    api.train_model("dpo", resume=run)
    assert find_adapter(run) == run


def test_a_run_goes_on_with_the_template_it_began_with(job, tmp_path):
    template = tmp_path / "my.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    )
    first = api.train_model("dpo", **job("first", chat_template=str(template), steps=1)).folder
    second = api.train_model("dpo", **job("second", model=str(first), steps=1)).folder
    settings = json.loads((second / "run.json").read_text())["settings"]
    assert settings["chat_template"] == str(first / "chat_template.jinja")
