"""A sweep: the same method with several settings, each judged on held-out data and on ability.

The trials share the reference's cache on disk and one prepared data set. A sweep that was interrupted
goes on: finished trials are kept, an unfinished one is resumed.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_align.errors import SettingsError
from mlx_align.evaluate.compare import Comparison
from mlx_align.files import write_json
from mlx_align.train.config import RunSettings, setting_names
from mlx_align.train.loop import Events, Result, train_once

SWEEP = "sweep.json"
# What trials are ranked by, the first that a method has. Losses come last: those of another beta or
# another loss are other quantities.
RANKED_BY = ("reward", "rewards/accuracies", "accuracy", "mean_token_accuracy", "loss")
# Of the table of changes, what breaks ties: the least harm to plain text.
TIE = "texts/perplexity"
# What a sweep may not vary: trials on other data cannot be compared.
FIXED = (
    "data",
    "valid_data",
    "split",
    "field",
    "unpair",
    "valid_share",
    "model",
    "output",
    "max_length",
)


@dataclass(frozen=True, eq=False)
class Trial:
    """One combination of settings, what it reached on held-out data, and what it did to ability."""

    values: dict
    folder: Path
    after: dict
    comparison: Comparison | None

    @property
    def name(self) -> str:
        """The settings that tell it from the others."""
        return ", ".join(f"{name} {value}" for name, value in self.values.items())

    @property
    def harmed(self) -> tuple[str, ...]:
        """What of the ability got worse beyond noise."""
        return self.comparison.verdict.regressed if self.comparison else ()

    def change(self, key: str) -> float | None:
        """The value after training of a row of the comparison."""
        rows = self.comparison.changes if self.comparison else ()
        return next((row.after for row in rows if row.key == key), None)


@dataclass(frozen=True, eq=False)
class Sweep:
    """All trials in the order of the grid, the metric they are ranked by, the pick and its reason."""

    trials: list[Trial]
    metric: str
    pick: Trial
    reason: str

    def as_dict(self) -> dict:
        """Plain JSON data."""
        rows = []
        for trial in self.trials:
            verdict = None if trial.comparison is None else str(trial.comparison.verdict)
            row = {"settings": trial.values, "folder": trial.folder.name, "held_out": trial.after}
            rows.append({**row, "verdict": verdict})
        pick = {
            "settings": self.pick.values,
            "folder": self.pick.folder.name,
            "reason": self.reason,
        }
        return {"ranked_by": self.metric, "pick": pick, "trials": rows}


def run_sweep(
    method: str,
    grid: Mapping[str, Sequence],
    resolve: Callable[[dict], dict],
    folder: Path,
    *,
    train: Callable[..., Result],
    judge: Callable[[Path], Comparison] | None = None,
    events: Events | None = None,
    on_trial: Callable[[int, int, dict], None] = lambda number, count, values: None,
) -> Sweep:
    """Train one run for every combination of the grid, in folders of their own, and pick one.

    `resolve` makes of a combination all settings of its run; `train` is the loop; `judge` compares a
    finished run with its base.
    Raises `SettingsError` where the grid or the data leave nothing to compare.
    """
    check_grid(method, grid)
    trials, prepared = [], {}
    names = list(grid)
    combinations = list(itertools.product(*(grid[name] for name in names)))
    for number, combination in enumerate(combinations, 1):
        values = dict(zip(names, combination, strict=True))
        on_trial(number, len(combinations), values)
        place = folder / "-".join(f"{name}={value}" for name, value in values.items())
        settings = {**resolve(values), "output": str(place)}
        run = RunSettings.from_flat(method, settings, "sweep")
        after = train_once(train, run, place, prepared=prepared, events=events)
        if not after:
            raise SettingsError("a sweep needs held-out data to judge by; see --valid-share")
        trials.append(Trial(values, place, after, judge(place) if judge else None))
    sweep = pick_trial(trials)
    write_json(folder / SWEEP, sweep.as_dict())
    return sweep


def check_grid(method: str, grid: Mapping[str, Sequence]) -> None:
    """Raise `SettingsError` where there is nothing to vary, or what must not be."""
    known = setting_names(method)
    for name in grid:
        if name not in known or name in FIXED:
            raise SettingsError(f"{name}: cannot be varied in a sweep of {method}")
    if not any(len(values) > 1 for values in grid.values()):
        raise SettingsError(
            "nothing varies; give a setting several values, like --beta 0.03,0.1,0.3"
        )


def pick_trial(trials: Sequence[Trial]) -> Sweep:
    """The best trial on held-out data among those that did no harm, and why."""
    metric = next(name for name in RANKED_BY if all(name in t.after for t in trials))
    sign = -1 if metric == "loss" else 1
    unharmed = [t for t in trials if not t.harmed]
    candidates = unharmed or list(trials)
    best = max(sign * t.after[metric] for t in candidates)
    level = [t for t in candidates if sign * t.after[metric] == best]
    pick = min(level, key=lambda t: t.change(TIE) or 0.0)
    reason = f"{metric} {pick.after[metric]:.3f} on held-out data, the best"
    if len(unharmed) == len(trials):
        reason += " of all" if trials[0].comparison else ""
    elif unharmed:
        reason += f" of the {len(unharmed)} that did no harm"
        better = [t for t in trials if t.harmed and sign * t.after[metric] > best]
        if better:
            lost = "; ".join(better[0].harmed)
            reason += f" ({better[0].name} reached {better[0].after[metric]:.3f}, but lost: {lost})"
    else:
        reason += ", though every trial lost ability: " + "; ".join(pick.harmed)
    if len(level) > 1 and pick.change(TIE) is not None:
        reason += f"; of {len(level)} that are level, the lowest perplexity on plain text"
    return Sweep(list(trials), metric, pick, reason)
