"""Best of n: ranked by what the scorer says."""

import numpy as np
import pytest

from mlx_align.errors import SettingsError
from mlx_align.model.adapter import AdapterSettings, wear_adapter
from mlx_align.rollout.best_of import best_of, implicit_scorer, reward_scorer
from mlx_align.rollout.sampler import Completion, SamplingSettings

SAMPLING = SamplingSettings(max_tokens=6, temperature=1.0)


def test_completions_are_ranked_by_their_scores(loaded_model):
    loaded = loaded_model()

    def longest(groups):
        return [np.array([float(sum(c.ids)) for c in completions]) for _, completions in groups]

    ranked = best_of(loaded, [[5, 6], [7]], 4, longest, SAMPLING)
    for one in ranked:
        assert len(one.completions) == 4
        assert list(one.scores) == sorted(one.scores, reverse=True)
        assert [float(sum(c.ids)) for c in one.completions] == list(one.scores)
    with pytest.raises(SettingsError, match="temperature 0"):
        best_of(loaded, [[5]], 2, longest, SamplingSettings())


def test_the_implicit_reward_is_policy_minus_reference(loaded_model):
    import mlx.core as mx

    loaded = loaded_model()
    adapter = wear_adapter(loaded.model, AdapterSettings(), seed=0)
    made = {
        n: x + 0.1 * mx.random.normal(x.shape, key=mx.random.key(7))
        for n, x in adapter.weights().items()
    }
    adapter.load(made, "")
    prompt, ids = [5, 6, 7], (20, 21, 22)
    completions = [Completion(ids, "", False), Completion((30,), "", False)]
    (scores,) = implicit_scorer(loaded, adapter)([(prompt, completions)])

    def logp(ids):
        row = mx.array([[*prompt, *ids]])
        z = loaded.model(row)[0].astype(mx.float32)
        logs = z - mx.logsumexp(z, axis=-1, keepdims=True)
        return sum(logs[len(prompt) - 1 + i, t].item() for i, t in enumerate(ids))

    with_adapter = [logp(c.ids) for c in completions]
    with adapter.off():
        without = [logp(c.ids) for c in completions]
    assert scores == pytest.approx(np.subtract(with_adapter, without), abs=1e-3)


def test_a_reward_model_as_scorer_gets_the_texts():
    class Model:
        def score(self, pairs):
            assert pairs == [("p", "a"), ("p", "bb"), ("q", "ccc")]
            return np.array([len(text) for _, text in pairs], float)

    groups = [
        ([1], [Completion((1,), "a", True), Completion((2,), "bb", True)]),
        ([2], [Completion((3,), "ccc", True)]),
    ]
    scores = reward_scorer(Model(), ["p", "q"])(groups)
    assert [s.tolist() for s in scores] == [[1.0, 2.0], [3.0]]
