"""Sweeps: every combination once, one data set, and a pick that says why."""

import json
from types import SimpleNamespace

import pytest

from mlx_align import api
from mlx_align.cli import main
from mlx_align.errors import SettingsError
from mlx_align.evaluate.sweep import Trial, pick_trial
from mlx_align.train import loop


def trial(name, accuracy, regressed=(), perplexity=10.0, metric="rewards/accuracies"):
    comparison = SimpleNamespace(
        verdict=SimpleNamespace(regressed=regressed),
        changes=[SimpleNamespace(key="texts/perplexity", after=perplexity)],
    )
    return Trial({"beta": name}, None, {metric: accuracy, "loss": 1 - accuracy}, comparison)


def test_the_best_on_held_out_data_is_picked():
    sweep = pick_trial([trial(0.1, 0.7), trial(0.3, 0.9), trial(1.0, 0.8)])
    assert sweep.pick.values == {"beta": 0.3}
    assert sweep.reason == "rewards/accuracies 0.900 on held-out data, the best of all"


def test_a_trial_that_lost_ability_is_not_picked_and_the_reason_says_so():
    sweep = pick_trial([trial(0.01, 0.95, ("answers questions right -20 %",)), trial(0.1, 0.9)])
    assert sweep.pick.values == {"beta": 0.1}
    assert "beta 0.01 reached 0.950, but lost: answers questions right -20 %" in sweep.reason
    every = pick_trial([trial(0.01, 0.95, ("x",)), trial(0.1, 0.9, ("x",))])
    assert every.pick.values == {"beta": 0.01} and "every trial lost ability" in every.reason


def test_ties_go_to_the_lower_perplexity_and_losses_are_ranked_downwards():
    sweep = pick_trial([trial(1, 0.9, perplexity=12.0), trial(2, 0.9, perplexity=11.0)])
    assert sweep.pick.values == {"beta": 2} and "lowest perplexity" in sweep.reason
    sweep = pick_trial([trial(1, 0.9, metric="kl"), trial(2, 0.7, metric="kl")])
    assert sweep.metric == "loss" and sweep.pick.values == {"beta": 1}


def test_a_sweep_of_the_demo_goes_on_and_reads_its_data_once(tmp_path, monkeypatch, capsys):
    read = []
    original = loop.read_run_data
    monkeypatch.setattr(loop, "read_run_data", lambda *a: read.append(1) or original(*a))
    flags = ["--beta", "0.05,0.5", "--steps", "4", "--eval-examples", "20"]
    command = ["sweep", "dpo", *flags, "--output", str(tmp_path / "sweep")]
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            main(command)
        assert end.value.code == 0
    assert len(read) == 1
    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [t["settings"] for t in record["trials"]] == [{"beta": 0.05}, {"beta": 0.5}]
    output = capsys.readouterr().out
    assert "* beta" in output and "pick: beta" in output and "trial 2 of 2" in output
    run = json.loads((tmp_path / "sweep" / "beta=0.5" / "run.json").read_text())
    assert run["settings"]["beta"] == 0.5 and run["settings"]["steps"] == 4
    with pytest.raises(SettingsError, match="is a run with other settings"):
        api.sweep("dpo", beta=[0.05, 0.5], steps=5, output=tmp_path / "sweep")


def test_what_cannot_be_swept_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="nothing varies"):
        api.sweep("dpo", beta=0.1, output=tmp_path / "a")
    with pytest.raises(SettingsError, match="data: cannot be varied"):
        api.sweep("dpo", data=["a.jsonl", "b.jsonl"], output=tmp_path / "a")
    with pytest.raises(SettingsError, match=r"unknown setting .betta..*beta"):
        api.sweep("dpo", betta=[0.1, 0.2], output=tmp_path / "a")
    with pytest.raises(SettingsError, match="beta: 'much' is not a number"):
        api.sweep("dpo", beta=["0.1", "much"], output=tmp_path / "a")
    assert not (tmp_path / "a").exists()
