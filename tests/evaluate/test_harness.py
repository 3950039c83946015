"""lm-evaluation-harness is asked for by name, and what it says becomes rows of the table.

The harness itself is not run here: its data sets are on the Hub. A stand-in with its interface checks
that the model is handed over as it is worn, and that results are read right.
"""

import importlib.util
import sys
import types

import pytest

from mlx_align.errors import SettingsError
from mlx_align.evaluate.compare import _task_changes
from mlx_align.evaluate.contender import open_contender
from mlx_align.evaluate.harness import TaskResult, check_harness, run_tasks


def test_without_the_harness_the_error_says_what_to_install():
    if importlib.util.find_spec("lm_eval"):
        pytest.skip("lm_eval is installed here")
    check_harness(())
    with pytest.raises(SettingsError, match="pip install lm_eval"):
        check_harness(("arc_easy",))


@pytest.fixture
def harness(monkeypatch):
    """A module `lm_eval` with what mlx-lm's adapter imports; its calls are recorded."""
    calls = []

    class LM:
        def __init__(self):
            self.prepared = True

    def simple_evaluate(model, tasks, **options):
        calls.append((model, tasks, options))
        return {
            "results": {
                "arc": {"acc,none": 0.5, "acc_stderr,none": 0.02, "alias": "arc"},
                "text": {"word_perplexity,none": 12.0, "word_perplexity_stderr,none": "N/A"},
            },
            "higher_is_better": {"arc": {"acc": True}, "text": {"word_perplexity": False}},
        }

    modules = {name: types.ModuleType(name) for name in (
        "lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry",
    )}  # fmt: skip
    modules["lm_eval"].simple_evaluate = simple_evaluate
    modules["lm_eval.api.model"].LM = LM
    modules["lm_eval.api.registry"].register_model = lambda name: lambda cls: cls
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield calls
    sys.modules.pop("mlx_lm.evaluate", None)


def test_the_loaded_model_is_handed_to_the_harness(harness, model_folder):
    contender, _ = open_contender("x", str(model_folder("llama")))
    check_harness(("arc",))
    results = run_tasks(contender, ("arc", "text"), limit=5, seed=3)
    ((model, tasks, options),) = harness
    assert model._model is contender.loaded.model and model.prepared
    assert tasks == ["arc", "text"] and options["limit"] == 5 and options["random_seed"] == 3
    assert options["apply_chat_template"] is True
    # The adapter really computes with it.
    ((logp, greedy),) = model.loglikelihood([types.SimpleNamespace(args=("The quick", " brown"))])
    assert logp < 0 and isinstance(greedy, bool)
    assert results == [
        TaskResult("arc", "acc", 0.5, 0.02, True),
        TaskResult("text", "word_perplexity", 12.0, None, False),
    ]


def test_task_results_become_changes():
    before = [TaskResult("arc", "acc", 0.50, 0.03, True)]
    after = [TaskResult("arc", "acc", 0.60, 0.04, True), TaskResult("new", "acc", 0.2, None, True)]
    first, second = _task_changes(before, after)
    assert first.key == "tasks/arc/acc" and first.change == pytest.approx(0.1)
    # Two independent errors of 0.03 and 0.04 make one of 0.05.
    assert first.low == pytest.approx(0.1 - 1.96 * 0.05)
    assert first.before_interval == pytest.approx((0.5 - 1.96 * 0.03, 0.5 + 1.96 * 0.03))
    assert second.before is None and second.low is None and second.after_interval is None
