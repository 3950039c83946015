"""Rows of the table: one quantity before and after, or of one model alone, with intervals."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from mlx_align.evaluate.measures import HELD_OUT
from mlx_align.evaluate.statistics import Estimate, Measure


@dataclass(frozen=True)
class Change:
    """One quantity before and after, of `count` cases.

    `low` and `high` bound the change at 95 % (None where too few prompts were seen); the bounds of
    both values are `before_interval` and `after_interval`. `better` says which way is up: "higher",
    "lower", or "" where neither is. `before` is None for what only the second model has.
    """

    what: str
    before: float | None
    after: float
    count: int
    better: str
    key: str = ""
    source: str = ""
    unit: str = "share"
    low: float | None = None
    high: float | None = None
    before_interval: tuple[float, float] | None = None
    after_interval: tuple[float, float] | None = None

    @property
    def change(self) -> float | None:
        """After minus before."""
        return None if self.before is None else self.after - self.before

    @property
    def smallest(self) -> float | None:
        """About the smallest change that these cases could have shown: half the interval."""
        return None if self.low is None else (self.high - self.low) / 2

    @property
    def held_out(self) -> bool:
        """Whether the cases are rows that the run kept out of its training."""
        return self.source == HELD_OUT

    @property
    def interval(self) -> str:
        """The change's interval, written."""
        if self.low is None:
            return "too few cases"
        return f"{_signed(self.low, self.unit)} to {_signed(self.high, self.unit)}"

    @property
    def written_smallest(self) -> str:
        """`smallest`, written."""
        return _signed(self.smallest, self.unit).removeprefix("+")

    def written(self, value: float | None) -> str:
        """A value of this quantity, written."""
        if value is None:
            return "-"
        return f"{value:.0%}" if self.unit == "share" else _number(value)

    @property
    def written_change(self) -> str:
        """After minus before, written."""
        return "" if self.change is None else _signed(self.change, self.unit)

    def as_dict(self) -> dict:
        """Plain JSON data."""
        row = {**asdict(self), "change": self.change, "smallest_change": self.smallest}
        return {name: _rounded(value) for name, value in row.items()}


def pair_measures(before: Sequence[Measure], after: Sequence[Measure]) -> list[Change]:
    """The rows of a comparison, in the order of `after`. Sets are named where one kind has several."""
    earlier = {(m.key, m.source): m for m in before}
    several = _keys_of_several(after)
    return [_row(m, earlier.get((m.key, m.source)), m.key in several) for m in after]


def single_measures(measures: Sequence[Measure]) -> list[Change]:
    """The rows for one model alone."""
    return pair_measures((), measures)


def _keys_of_several(measures):
    sources: dict[str, set] = {}
    for m in measures:
        sources.setdefault(m.key, set()).add(m.source)
    return {key for key, found in sources.items() if len(found) > 1}


def _row(after: Measure, before: Measure | None, named: bool) -> Change:
    now = after.estimate()
    then = None if before is None else before.estimate()
    moved = Estimate(0.0) if before is None else after.change(before)
    return Change(
        what=f"{after.what}, {after.source}" if named else after.what,
        before=None if then is None else then.value,
        after=now.value,
        count=after.cases,
        better=after.better,
        key=after.key,
        source=after.source,
        unit=after.unit,
        low=moved.low,
        high=moved.high,
        before_interval=None if then is None else _bounds(then),
        after_interval=_bounds(now),
    )


def _bounds(estimate):
    return None if estimate.low is None else (estimate.low, estimate.high)


def _signed(value, unit) -> str:
    """A difference; that of shares in points, since percent would be of what?"""
    return f"{100 * value:+.0f} pt" if unit == "share" else _number(value, "+", 3)


def _number(value, sign="", digits=4) -> str:
    return f"{value:{sign}.0f}" if abs(value) >= 1000 else f"{value:{sign}.{digits}g}"


def _rounded(value):
    """Six digits, which is more than any of this is worth, so that files can be compared."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, tuple):
        return [_rounded(v) for v in value]
    return value
