"""The course of a run as far as rules need it: first rows, last rows, and levels that are for sure.

Rows of small batches are noisy. A rule therefore compares means over windows of many examples, asks
for a change that is `SURE` standard errors away from chance, and for one that is large enough to
matter. A single odd batch widens the standard error along with the mean, so it sets nothing off.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

# A window: at least this many steps and this many examples. The mean of 64 yes-no values has a standard
# error of at most 1/16.
WINDOW_STEPS, WINDOW_EXAMPLES = 10, 64
# Standard errors that a difference needs. Windows are looked at after every step, so the usual 2
# would be exceeded by chance in every longer run; 4 is exceeded once in 600 looks with ten rows, once in
# 10,000 with sixty, and every rule asks for a large change besides.
SURE = 4.0
# Past a KL of some tens of nats the true reward falls again (Gao et al. 2022, arXiv:2210.10760; in DPO
# as well: Rafailov et al. 2024, arXiv:2406.02900).
FAR_NATS = 50.0
# Steps kept for rules that look further back than a window.
KEPT_STEPS = 150
# Steps and examples from the start that rules on the first rows look at.
EARLY_STEPS, LENGTH_EXAMPLES = 8, 128


@dataclass(frozen=True)
class Finding:
    """What a rule found: its name, the step after which it spoke, what to tell the user, and whether it
    is a sign that the reward is being hacked."""

    rule: str
    step: int
    text: str
    hacking: bool = False


@dataclass(frozen=True)
class Level:
    """The mean of a metric over a window, and the mean's standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float], scale: float = 1.0) -> "Level":
        """The level of `scale` times the values; at least two of them."""
        mean, count = fmean(values), len(values)
        variance = sum((x - mean) ** 2 for x in values) / (count - 1)
        return cls(scale * mean, abs(scale) * math.sqrt(variance / count))

    def surely_below(self, value: float) -> bool:
        """Below `value` by more than chance."""
        return self.mean + SURE * self.error < value

    def surely_above(self, value: float) -> bool:
        """Above `value` by more than chance."""
        return self.mean - SURE * self.error > value


@dataclass
class Seen:
    """The run so far, as far as rules need it: its settings, its first rows and its last ones."""

    method: str
    settings: dict
    total: int
    uses_reference: bool
    found: set[str] = field(default_factory=set)
    first: list[dict] = field(default_factory=list)
    recent: deque = field(default_factory=lambda: deque(maxlen=KEPT_STEPS))
    held_out: list[dict] = field(default_factory=list)

    def add(self, row: dict) -> None:
        """Take in a row of metrics.jsonl."""
        if row["split"] == "train":
            self.recent.append(row)
            if len(self.first) < max(self.window, 1 + self.rows_for(EARLY_STEPS, LENGTH_EXAMPLES)):
                self.first.append(row)
        else:
            self.held_out.append(row)

    @property
    def held_out_first(self) -> dict | None:
        """The first evaluation on held-out data, if there was one."""
        return self.held_out[0] if self.held_out else None

    @property
    def held_out_last(self) -> dict | None:
        """The latest one."""
        return self.held_out[-1] if self.held_out else None

    def rows_for(self, steps: int, examples: int) -> int:
        """Rows that hold at least so many steps and examples."""
        return max(steps, math.ceil(examples / self.settings.get("batch_size", 1)))

    @property
    def window(self) -> int:
        """Rows in a window."""
        return min(self.rows_for(WINDOW_STEPS, WINDOW_EXAMPLES), KEPT_STEPS)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.recent[-1]["step"]

    @property
    def beta(self) -> float | None:
        """The scale of the rewards; None where they do not tell how far the policy has moved.

        They do where they are beta times a log-ratio to the model as it was at the start.
        """
        start = self.settings.get("reference", "start") == "start"
        moves = self.settings.get("sync_every")
        return self.settings.get("beta") if self.uses_reference and start and not moves else None

    def last(self, name: str, count: int) -> list[float] | None:
        """A metric in the last `count` training rows; None where they are not all there."""
        rows = list(self.recent)[-count:]
        values = [row[name] for row in rows if name in row]
        return values if len(values) == count else None

    def level(self, name: str, scale: float = 1.0) -> Level | None:
        """The level of `scale` times a metric in the last window; None while there is none.

        There is none either while the learning rate still rises: what happens during the warm-up
        says nothing of the run. Half of the rows must have the metric: a small batch may lack a side.
        """
        rows = list(self.recent)[-self.window :]
        values = [row[name] for row in rows if name in row]
        if len(rows) < self.window or 2 * len(values) < self.window:
            return None
        if rows[0].get("learning_rate", 0.0) < rows[-1].get("learning_rate", 0.0):
            return None
        return Level.of(values, scale)

    def changed(self, name: str) -> tuple[float, float] | None:
        """A metric's means in the first window and in the last, where they differ by more than chance."""
        values = [row[name] for row in self.first[: self.window] if name in row]
        now = self.level(name)
        if now is None or len(values) < self.window or self.step < 2 * self.window:
            return None
        start = Level.of(values)
        sure = SURE * math.hypot(start.error, now.error) < abs(now.mean - start.mean)
        return (start.mean, now.mean) if sure else None

    def log_ratio(self, side: str) -> Level | None:
        """Mean log pi - log pi_ref of the "chosen" or "rejected" completions, in nats."""
        return self.level(f"rewards/{side}", 1 / self.beta) if self.beta else None

    def margin(self) -> Level | None:
        """The chosen log-ratio minus the rejected one, in nats."""
        chosen, rejected = self.log_ratio("chosen"), self.log_ratio("rejected")
        if chosen is None or rejected is None:
            return None
        # Within pairs, the sides' noise partly cancels.
        pairs = self.level("rewards/margins", 1 / self.beta)
        error = math.hypot(chosen.error, rejected.error)
        return pairs or Level(chosen.mean - rejected.mean, error)

    def reference_logp(self, side: str) -> float | None:
        """Mean log-probability under the reference of the last window's completions."""
        ratio, logp = self.log_ratio(side), self.level(f"logps/{side}")
        return logp.mean - ratio.mean if ratio and logp else None

    def start_loss(self) -> Level | None:
        """The loss before anything was learned.

        Where every pair has the same loss as long as policy and reference are equal, the first row's
        is exact. Otherwise it is the first window's mean.
        """
        if self.beta and self.first and "nll_loss" not in self.first[0]:
            loss, held_out = self.first[0]["loss"], self.held_out_first
            if (
                held_out is None
                or held_out["step"]
                or math.isclose(loss, held_out["loss"], rel_tol=0.01)
            ):
                return Level(loss, 0.0)
        if len(self.first) < self.window:
            return None
        return Level.of([row["loss"] for row in self.first[: self.window]])


def brief(value: float) -> str:
    """A number as a person writes it."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
