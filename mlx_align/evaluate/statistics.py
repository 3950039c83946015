"""Measured quantities with their intervals: the bootstrap over prompts.

Every quantity here is a function of sums over prompts, so one resample is one row of a matrix
product. Drawing prompts instead of cases keeps together what belongs together: two pairs of one
prompt are no independent evidence. Before and after are resampled with the same draws, so a change's
interval profits from both having seen the same prompts. Knows nothing of models.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0
# With fewer prompts a resample says next to nothing about another sample.
FEWEST_PROMPTS = 5
BINS = 10


def ratio(sums: np.ndarray) -> np.ndarray:
    """sums [..., 2]: the first by the second; a mean, a rate, a number per token."""
    return sums[..., 0] / sums[..., 1]


def exp_ratio(sums: np.ndarray) -> np.ndarray:
    """A perplexity from negative log-probabilities and counts."""
    return np.exp(ratio(sums))


def calibration_error(sums: np.ndarray) -> np.ndarray:
    """Expected calibration error (Naeini et al. 2015; Guo et al. 2017, arXiv:1706.04599, eq. 3).

    sums [..., 2 * BINS] holds for each bin of confidence the sum of confidence minus outcome, then
    the counts.
    """
    return np.abs(sums[..., :BINS]).sum(axis=-1) / sums[..., BINS:].sum(axis=-1)


@dataclass(frozen=True)
class Estimate:
    """A value with the bounds of its 95 % interval; None where too few prompts were seen."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def half_width(self) -> float | None:
        """Half the interval's width: about the smallest difference from zero it could tell."""
        return None if self.low is None else (self.high - self.low) / 2


@dataclass(frozen=True, eq=False)
class Measure:
    """One quantity measured on some cases.

    `sums` is float64[P, k], for each of P prompts the sums that `statistic` makes the quantity of.
    `key` is its stable name, `source` the set of cases it was measured on, `what` says it in words.
    `better` is "higher", "lower" or "" (neither is); `unit` is "share" or "number". `yes_or_no` says
    that every case counts as 0 or 1.
    """

    key: str
    source: str
    what: str
    sums: np.ndarray
    cases: int
    better: str = ""
    unit: str = "number"
    statistic: Callable[[np.ndarray], np.ndarray] = ratio
    yes_or_no: bool = False

    @property
    def value(self) -> float:
        """The quantity on all prompts together."""
        return float(self.statistic(self.sums.sum(axis=0)))

    def estimate(self) -> Estimate:
        """The quantity with its interval.

        For shares, two prompts that count 1 and two that count 0 are added before resampling (Agresti
        and Coull 1998): the bootstrap of 24 successes in 24 would else claim certainty.
        """
        sums = self.sums
        if self.yes_or_no:
            weight = sums[:, 1].mean()
            added = [[weight, weight]] * 2 + [[0, weight]] * 2
            sums = np.concatenate([sums, added])
        return self._estimate(self.value, len(self.sums), _resampled(self.statistic, sums))

    def change(self, before: "Measure") -> Estimate:
        """This minus `before`, measured on the same prompts in the same order.

        For shares, one prompt that rose and one that fell are added before resampling (Bonett and
        Price 2012, doi:10.3102/1076998611411915), for the same reason.
        """
        ours, theirs = self.sums, before.sums
        if self.yes_or_no:
            up, down = ours[:, 1].mean(), theirs[:, 1].mean()
            ours = np.concatenate([ours, [[up, up], [0, up]]])
            theirs = np.concatenate([theirs, [[0, down], [down, down]]])
        resampled = _resampled(self.statistic, ours) - _resampled(self.statistic, theirs)
        return self._estimate(self.value - before.value, len(self.sums), resampled)

    @staticmethod
    def _estimate(value, prompts, resampled):
        if prompts < FEWEST_PROMPTS:
            return Estimate(value)
        tail = (1 - LEVEL) / 2
        low, high = np.nanquantile(resampled, [tail, 1 - tail])
        # A skewed resample of few prompts may miss the value itself.
        return Estimate(value, float(min(low, value)), float(max(high, value)))


def per_prompt(prompts: Sequence, *columns: Sequence[float]) -> np.ndarray:
    """The columns' sums for each distinct prompt, in order of first appearance; float64[P, k]."""
    index: dict = {}
    rows = np.array([index.setdefault(prompt, len(index)) for prompt in prompts])
    table = np.asarray(columns, np.float64).T
    sums = np.zeros((len(index), table.shape[1]))
    np.add.at(sums, rows, table)
    return sums


def calibration_columns(probability: np.ndarray) -> list[np.ndarray]:
    """The columns of `calibration_error` for the probability given to what turned out to be right.

    The confidence is that of the likelier side, in BINS bins over [0.5, 1].
    """
    probability = np.asarray(probability, np.float64)
    confidence = np.maximum(probability, 1 - probability)
    right = np.where(probability == 0.5, 0.5, probability > 0.5)
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    inside = np.arange(BINS)[:, None] == bins
    return [*(inside * (confidence - right)), *inside.astype(np.float64)]


@functools.lru_cache(maxsize=4)
def _draws(prompts: int) -> np.ndarray:
    """How often each resample draws each prompt, float32[RESAMPLES, P]; the same for every measure."""
    rng = np.random.default_rng([SEED, prompts])
    drawn = np.empty((RESAMPLES, prompts), np.float32)
    for row in drawn:
        row[:] = np.bincount(rng.integers(0, prompts, prompts), minlength=prompts)
    return drawn


def _resampled(statistic, sums) -> np.ndarray:
    """The quantity of each resample, float64[RESAMPLES]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return statistic(_draws(len(sums)) @ sums)
