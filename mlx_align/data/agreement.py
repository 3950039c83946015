"""Who labelled what, how far they agree, and how many wrong labels their disagreement implies.

            row 1  row 2  row 3
    ann       1      2      1        ann and bob: 2 of 3 rows agree
    bob       1      1      1        ann, of the rows where the others agree: 1 of 2
    cat       1      1      2

Labels are categories without order; None is a missing one. Knows nothing of records and tokens.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mlx_align.errors import DataError

Labels = Sequence[Hashable | None]
# Two-sided 95 % of the normal distribution.
Z = 1.959963984540054
# Pairs of labels needed to estimate noise, and annotators that a report names.
ENOUGH, SHOWN = 20, 10


@dataclass(frozen=True)
class Share:
    """`hits` of `total`, with the 95 % interval (`low`, `high`) of the share they stand for."""

    hits: float
    total: int
    share: float
    low: float
    high: float

    def __str__(self):
        return f"{self.share:.1%} of {self.total:,} ({self.low:.1%} to {self.high:.1%})"


@dataclass(frozen=True)
class PairAgreement:
    """Two annotators on the rows that both labelled. `kappa` is None where it is not defined."""

    first: str
    second: str
    rows: int
    agreement: float
    kappa: float | None


@dataclass(frozen=True)
class AnnotatorAgreement:
    """One annotator against the majority of the others, on the `rows` where they have one."""

    name: str
    rows: int
    agreement: float | None
    labels: dict[str, int]


@dataclass(frozen=True)
class Agreement:
    """What is known of a table of labels; `rows` are those with at least two.

    `unanimous` counts the rows where all labels are the same. `fleiss` is over the `fleiss_rows` rows
    that have the commonest number of labels.
    """

    annotators: tuple[AnnotatorAgreement, ...]
    pairs: tuple[PairAgreement, ...]
    rows: int
    unanimous: int
    fleiss: float | None
    fleiss_rows: int

    def lines(self) -> list[str]:
        """The statistics in words, those of the first annotators where there are many."""
        lines = [f"annotators, {self.rows:,} rows with several labels:"]
        for pair in self.pairs[:SHOWN]:
            who = f"{pair.first} and {pair.second}: agree in {pair.agreement:.1%} of {pair.rows:,}"
            lines.append(f"  {who}, Cohen's kappa {_kappa(pair.kappa)}")
        all_of_them = f"Fleiss' kappa {_kappa(self.fleiss)} ({self.fleiss_rows:,} rows)"
        lines.append(f"  all: {all_of_them}, unanimous in {self.unanimous:,}")
        for one in self.annotators[:SHOWN]:
            agrees = "-" if one.agreement is None else f"{one.agreement:.1%} of {one.rows:,}"
            labels = ", ".join(f"{label}: {n:,}" for label, n in sorted(one.labels.items()))
            lines.append(f"  {one.name}: with the majority of the others in {agrees}; {labels}")
        return lines


def _kappa(value: float | None) -> str:
    return "not defined (one label only)" if value is None else f"{value:.2f}"


@dataclass(frozen=True)
class Noise:
    """An estimate of the share of wrong labels, from `differing` of `judged` pairs of judgements."""

    rate: float
    low: float
    high: float
    differing: int
    judged: int

    def __str__(self):
        found = f"{self.differing:,} of {self.judged:,} pairs of judgements differ"
        return f"{self.rate:.1%} ({self.low:.1%} to {self.high:.1%}), as {found}"


def wilson_share(hits: float, total: int) -> Share:
    """The share with its interval (Wilson 1927, without continuity correction).

    `hits` may hold halves, for draws; the interval then is a little wide.
    """
    if total == 0:
        return Share(hits, 0, math.nan, 0.0, 1.0)
    p, z2 = hits / total, Z * Z
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total * total))
    return Share(hits, total, p, max(0.0, centre - half), min(1.0, centre + half))


def percent_agreement(first: Labels, second: Labels) -> tuple[float, int]:
    """Share of equal labels among the rows that both labelled, and the number of those rows."""
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    return (sum(a == b for a, b in both) / len(both) if both else math.nan), len(both)


def cohen_kappa(first: Labels, second: Labels) -> float | None:
    """Agreement of two annotators beyond chance, (po - pe) / (1 - pe) (Cohen 1960, equation 1).

    None where chance alone gives full agreement (only one label is used), or no row has both.
    """
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if not both:
        return None
    observed = sum(a == b for a, b in both) / len(both)
    left, right = Counter(a for a, _ in both), Counter(b for _, b in both)
    expected = sum(left[label] * right[label] for label in left) / len(both) ** 2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def fleiss_kappa(counts: np.ndarray) -> float | None:
    """Agreement of many annotators beyond chance (Fleiss 1971).

    `counts` [rows, labels] says how many annotators gave each label; every row has the same number
    of annotators, at least two, who need not be the same persons. None where it is not defined.
    """
    counts = np.asarray(counts, np.float64)
    raters = counts.sum(axis=1)
    if counts.shape[0] == 0 or raters[0] < 2 or np.any(raters != raters[0]):
        return None
    n = raters[0]
    observed = np.mean((np.sum(counts**2, axis=1) - n) / (n * (n - 1)))
    expected = np.sum((counts.sum(axis=0) / counts.sum()) ** 2)
    return None if expected == 1 else float((observed - expected) / (1 - expected))


def majority(labels: Labels) -> Hashable | None:
    """The label that more than half of the given ones are, or None."""
    given = Counter(label for label in labels if label is not None)
    if not given:
        return None
    label, count = given.most_common(1)[0]
    return label if 2 * count > given.total() else None


def measure_agreement(table: Mapping[str, Labels]) -> Agreement:
    """All statistics of a table: for each annotator the labels of all rows, in one order."""
    names = list(table)
    rows = list(zip(*table.values(), strict=True))
    given = [[label for label in row if label is not None] for row in rows]
    rated = [labels for labels in given if len(labels) > 1]
    kappa, used = _fleiss_of_rows(rated)
    return Agreement(
        annotators=tuple(_against_others(names[i], i, rows) for i in range(len(names))),
        pairs=tuple(_pair_agreements(table)),
        rows=len(rated),
        unanimous=sum(len(set(labels)) == 1 for labels in rated),
        fleiss=kappa,
        fleiss_rows=used,
    )


def _pair_agreements(table):
    for first, second in combinations(table, 2):
        agreement, rows = percent_agreement(table[first], table[second])
        if rows:
            kappa = cohen_kappa(table[first], table[second])
            yield PairAgreement(first, second, rows, agreement, kappa)


def _fleiss_of_rows(rated):
    """Kappa of the rows with the commonest number of labels, and how many they are."""
    if not rated:
        return None, 0
    size = Counter(map(len, rated)).most_common(1)[0][0]
    chosen = [labels for labels in rated if len(labels) == size]
    known = sorted({label for labels in chosen for label in labels}, key=str)
    counts = np.array([[labels.count(label) for label in known] for labels in chosen])
    return fleiss_kappa(counts), len(chosen)


def _against_others(name, i, rows):
    own = [row[i] for row in rows]
    others = [majority(row[:i] + row[i + 1 :]) for row in rows]
    agreement, compared = percent_agreement(own, others)
    labels = Counter(str(label) for label in own if label is not None)
    return AnnotatorAgreement(name, compared, agreement if compared else None, dict(labels))


def noise_rate(disagreement: float) -> float:
    """Share of wrong labels that a share of disagreeing pairs of labels implies.

    If each of two choices is wrong with probability e, by itself, two labels of one row differ with
    probability d = 2 e (1 - e), so e = (1 - sqrt(1 - 2 d)) / 2: the one-coin case, for two equally
    good annotators, of Dawid and Skene 1979. From d = 1/2 on the labels are coin flips: e = 1/2.
    """
    return (1 - math.sqrt(1 - 2 * min(max(disagreement, 0.0), 0.5))) / 2


def estimate_noise(rows: Iterable[Labels]) -> Noise | None:
    """The share of wrong labels that the labels of the same rows imply; None where few rows have two.

    The interval takes the pairs of labels for independent, which they nearly are.
    """
    differing = judged = 0
    for row in rows:
        given = Counter(label for label in row if label is not None)
        pairs = math.comb(given.total(), 2)
        judged += pairs
        differing += pairs - sum(math.comb(count, 2) for count in given.values())
    if judged < ENOUGH:
        return None
    share = wilson_share(differing, judged)
    return Noise(*map(noise_rate, (share.share, share.low, share.high)), differing, judged)


# -- finding the labels in rows --------------------------------------------------------------------

_VOTERS = "annotator|annotation|rater|judge|judgement|judgment|label|vote|voter|worker|evaluator"
_VOTE_SERIES = re.compile(rf"((?:{_VOTERS}|expert|human)s?)(?:[_ -]?\d+|[_ -][a-z])", re.IGNORECASE)
_VOTE_LISTS = ("annotations", "annotators", "votes", "judgements", "judgments", "labels")
_VOTE_SINGLES = ("winner", "preference", "preferred", "choice", "vote", "better", "label")
_WHO = ("annotator", "annotator_id", "rater", "worker", "worker_id", "user", "judge", "name", "id")
_WHAT = ("label", "value", "choice", "preference", "vote", "rating", "judgement", "judgment")
# Categories have few, short values; a column with more is something else.
_MOST_LABELS, _LONGEST_LABEL = 20, 40


@dataclass(frozen=True)
class Votes:
    """Who said what: for each annotator one label (or None) for each of the rows in `origins`."""

    origins: tuple[str, ...]
    table: dict[str, tuple[str | None, ...]]

    def rows(self) -> list[tuple[str | None, ...]]:
        """The labels of each row."""
        return list(zip(*self.table.values(), strict=True))

    def labels(self) -> set[str]:
        """All labels that were given."""
        return {label for given in self.table.values() for label in given} - {None}

    def sides(self) -> dict[str, list[int | None]]:
        """The labels of each row, by its origin, as sides: 1 or 2 for a completion, 0 for a tie.
        Nothing where a label says nothing of the kind."""
        known = self.labels()
        if any(choose_side(label, known) is None for label in known):
            return {}
        rows = [[choose_side(label, known) for label in row] for row in self.rows()]
        return dict(zip(self.origins, rows, strict=True))

    def noise(self) -> Noise | None:
        """Label noise, where the labels are one of two; a tie is no vote for either side."""
        sides = self.sides()
        if sides:
            return estimate_noise([side or None for side in row] for row in sides.values())
        return estimate_noise(self.rows()) if len(self.labels()) == 2 else None


def collect_votes(rows: Mapping[str, Mapping], named: Sequence[str] = ()) -> Votes | None:
    """The labels of annotators: in the columns `named`, in a series of columns (annotator1,
    annotator2, ...), in a list column ("annotations"), or in one column ("winner").

    `rows` are by their origin. Raises `DataError` where no row has a named column.
    """
    columns = list(dict.fromkeys(str(name) for row in rows.values() for name in row))
    missing = [name for name in named if name not in columns]
    if missing:
        raise DataError(f"annotators: no row has a column {missing[0]!r}; has {', '.join(columns)}")
    for names in (list(named), *_vote_series(columns)):
        votes = _votes_of_columns(rows, names, trusted=bool(named)) if names else None
        if votes:
            return votes
    for name in _VOTE_LISTS:
        votes = _votes_of_list(rows, name) if name in columns else None
        if votes:
            return votes
    singles = [[name] for name in _VOTE_SINGLES if name in columns]
    return next(filter(None, (_votes_of_columns(rows, names) for names in singles)), None)


def _vote_series(columns) -> list[list[str]]:
    series: dict[str, list[str]] = {}
    for name in columns:
        match = _VOTE_SERIES.fullmatch(name)
        if match:
            series.setdefault(match[1].lower(), []).append(name)
    return sorted((s for s in series.values() if len(s) > 1), key=len, reverse=True)


def _votes_of_columns(rows, names, trusted=False) -> Votes | None:
    table = {name: tuple(_vote(row.get(name)) for row in rows.values()) for name in names}
    votes = Votes(tuple(rows), table)
    return votes if trusted or _are_categories(votes) else None


def _votes_of_list(rows, name) -> Votes | None:
    """Lists of labels belong to annotators by their place, lists of objects by who is named."""
    given: list[dict[str, str | None]] = []
    for row in rows.values():
        labels: dict[str, str | None] = {}
        value = row.get(name)
        for place, item in enumerate(value if isinstance(value, list) else (), 1):
            who = None
            if isinstance(item, Mapping):
                who = next((str(item[k]) for k in _WHO if item.get(k) is not None), None)
            labels[who or f"{name}[{place}]"] = _vote(item)
        given.append(labels)
    voters = list(dict.fromkeys(who for labels in given for who in labels))
    table = {who: tuple(labels.get(who) for labels in given) for who in voters}
    votes = Votes(tuple(rows), table)
    return votes if len(voters) > 1 and _are_categories(votes) else None


def _vote(value) -> str | None:
    """A label as text, so that 1, 1.0 and "1" are one label."""
    if isinstance(value, Mapping):
        value = next((value[k] for k in _WHAT if value.get(k) is not None), None)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | float):
        return None
    return str(value).strip() or None


def _are_categories(votes: Votes) -> bool:
    labels = votes.labels()
    short = all(len(label) <= _LONGEST_LABEL for label in labels)
    return bool(labels) and short and len(labels) <= _MOST_LABELS


_CHOICES = {
    1: {"1", "a", "first", "left", "response1", "response_1", "response_a", "model_a", "model a"},
    2: {"2", "b", "second", "right", "response2", "response_2", "response_b", "model_b", "model b"},
    0: {"0", "tie", "draw", "equal", "same", "both", "neither", "none", "c", "tie (bothbad)"},
}


def choose_side(label: str | None, known: Collection[str]) -> int | None:
    """1 or 2 for the completion that a label prefers, 0 for a tie, None where it cannot be told.

    0 and 1 alone count from 0; with a 2 among the `known` labels, 0 is a tie.
    """
    if label is None:
        return None
    if set(known) <= {"0", "1"}:
        return int(label) + 1
    return next((side for side, words in _CHOICES.items() if label.lower() in words), None)


_LABELLERS = (
    "annotator_type", "label_source", "label_type", "labeler", "labeller", "labeled_by", "judge",
    "annotator", "source", "model",
)  # fmt: skip
_AI = re.compile(
    r"\b(ai|gpt|chatgpt|o\d|llms?|claude|gemini|llama|mistral|qwen|deepseek|machine|automatic"
    r"|synthetic|rlaif|bot|model)(?![a-z])",
    re.IGNORECASE,
)
_HUMAN = re.compile(
    r"\b(humans?|person|people|crowd|experts?|workers?|manual|volunteers?)(?![a-z])", re.IGNORECASE
)


def find_ai_labels(rows: Collection[Mapping]) -> dict[str, Share]:
    """The first column that says of rows whether a person or a program labelled them, and the share
    of programs among those; empty where none does."""
    for name in _LABELLERS:
        values = [value for row in rows if isinstance(value := row.get(name), str)]
        ai = sum(bool(_AI.search(value)) for value in values)
        human = sum(bool(_HUMAN.search(value) and not _AI.search(value)) for value in values)
        if ai + human:
            return {name: wilson_share(ai, ai + human)}
    return {}
