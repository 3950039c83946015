"""Tasks of lm-evaluation-harness, run by mlx-lm's adapter for it on a model that is loaded already.

Needs the package lm_eval, and its data sets from the Hub.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_align.errors import SettingsError
from mlx_align.evaluate.contender import Contender


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task, with the standard error that the harness gives for it (or None)."""

    task: str
    metric: str
    value: float
    standard_error: float | None
    higher_is_better: bool


def check_harness(tasks: Sequence[str]) -> None:
    """Raise `SettingsError` where tasks are asked for and lm_eval is not installed."""
    if not tasks:
        return
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise SettingsError(
            "--tasks runs lm-evaluation-harness, which is not installed: pip install lm_eval"
        ) from None


def run_tasks(
    contender: Contender, tasks: Sequence[str], *, limit: int | None, seed: int
) -> list[TaskResult]:
    """The results of some tasks for one contender, as `mlx_lm.evaluate` would compute them."""
    import lm_eval
    from mlx_lm.evaluate import MLXLM

    class Loaded(MLXLM):
        """mlx-lm's adapter without its loading."""

        def __init__(self, loaded):
            super(MLXLM, self).__init__()
            self._model, self.tokenizer = loaded.model, loaded.tokenizer
            self._max_tokens, self._batch_size, self._sampler = None, 8, None
            self.use_chat_template = loaded.template is not None

    with contender.worn():
        model = Loaded(contender.loaded)
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks),
            apply_chat_template=model.use_chat_template,
            limit=limit,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    results = []
    for task, row in found["results"].items():
        better = (found.get("higher_is_better") or {}).get(task) or {}
        for name, value in row.items():
            metric, _, kind = name.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = row.get(f"{metric}_stderr,{kind}")
            error = error if isinstance(error, int | float) else None
            results.append(
                TaskResult(task, metric, float(value), error, better.get(metric, True) is not False)
            )
    return results
