"""On the demo's preferences every kind of method learns what they say, and no more than seconds."""

import pytest

from mlx_align import api
from mlx_align.data.agreement import wilson_share


@pytest.mark.parametrize(
    ("method", "metric", "start"),
    [
        ("dpo", "rewards/accuracies", 0.0),
        ("ipo", "rewards/accuracies", 0.0),
        ("simpo", "rewards/accuracies", 0.7),
        ("orpo", "rewards/accuracies", 0.7),
        ("reward", "accuracy", 0.7),
    ],
)
def test_held_out_preferences_are_learnt(method, metric, start, tmp_path):
    result = api.train_model(method, output=tmp_path / "run", save_every=1000)
    assert result.before[metric] <= start
    # Of 60 held-out pairs; what is above 0.9 is surely above chance.
    assert result.after[metric] > 0.9
    assert wilson_share(round(60 * result.after[metric]), 60).low > 0.8


def test_kto_learns_pairs_that_it_saw_only_as_single_completions(tmp_path):
    run = api.train_model("kto", output=tmp_path / "kto", save_every=1000).folder
    # The rewards of whole pairs, by a DPO run that starts from it and is held to the base.
    check = api.train_model("dpo", start=run, reference="demo", steps=1, output=tmp_path / "check")
    assert check.before["rewards/accuracies"] > 0.9
