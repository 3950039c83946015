"""What a data set is, which of its rows will not work, and what can be measured of the others.

    files  -> read_split    Split      records, comparisons, prompts; faults with their file:line
           -> inspect_data  DataCheck  all measurements, `lines()` for people, `as_dict()` for programs

Tokens come from an `Encoder`, the one that training uses. What the measurements mean is said by
`data.advice`.
"""

import dataclasses
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np

from mlx_align.data.agreement import (
    Agreement,
    Noise,
    Share,
    collect_votes,
    estimate_noise,
    find_ai_labels,
    majority,
    measure_agreement,
    wilson_share,
)
from mlx_align.data.dataset import KINDS as RECORD_KINDS
from mlx_align.data.dataset import DataSettings
from mlx_align.data.jsonl import read_rows
from mlx_align.data.records import (
    ChatRecord,
    LabelRecord,
    PairRecord,
    PromptRecord,
    Record,
    Text,
    Unfit,
    parse_prompt,
    parse_record,
)
from mlx_align.data.spellings import rename
from mlx_align.data.template import Encoder, Example
from mlx_align.errors import DataError

# More tokens than any row has: lengths are measured whole and cut afterwards.
UNLIMITED = 2**31 - 1
LIMITS = (256, 512, 1024, 2048, 4096, 8192)
SHOWN_ORIGINS, SHOWN_CHARACTERS = 5, 700


# -- what is read ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Two completions of a prompt; which one is better is said by votes."""

    prompt: Text
    first: str
    second: str
    origin: str


Item = Record | Comparison


def name_of(kind: type) -> str:
    """ "pairs" of `PairRecord`."""
    return kind.__name__.removesuffix("Record").lower() + "s"


KINDS = {name_of(kind): words for kind, words in RECORD_KINDS.items()} | {
    "comparisons": "comparisons of two completions"
}


@dataclass(frozen=True)
class Rows:
    """How many rows something is true of, and where the first ones stand."""

    count: int
    origins: tuple[str, ...]

    @classmethod
    def at(cls, origins: Iterable[str]) -> "Rows":
        """The rows at these places."""
        origins = tuple(origins)
        return cls(len(origins), origins[:SHOWN_ORIGINS])

    def __add__(self, other):
        origins = (*self.origins, *other.origins)[:SHOWN_ORIGINS]
        return Rows(self.count + other.count, origins)

    def __str__(self):
        """ "15 rows (a.jsonl:3, 7, b.jsonl:2 and 12 more)"."""
        places, previous = [], None
        for origin in self.origins:
            file, _, line = origin.rpartition(":")
            places.append(line if file == previous else origin)
            previous = file
        more = self.count - len(places)
        listed = ", ".join(places) + (f" and {more:,} more" if more else "")
        return count_rows(self.count) + (f" ({listed})" if places else "")


def count_rows(count: int) -> str:
    """ "1 row" or "1,234 rows"."""
    return f"{count:,} row{'' if count == 1 else 's'}"


@dataclass(frozen=True)
class Fault:
    """Why rows will not work: training `stops` at them, or drops them."""

    message: str
    rows: Rows
    stops: bool


@dataclass
class Split:
    """What the files of one split hold: every row that is an object by its origin, what the rows were
    understood as, and the faults."""

    total: int = 0
    rows: dict[str, Mapping] = field(default_factory=dict)
    items: list[Item] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


def read_split(files: Iterable[Path], fields: Sequence[tuple[str, str]] = ()) -> Split:
    """Everything in some files; a row that cannot be read becomes a fault, and reading goes on.

    Raises `DataError` where a file cannot be read at all.
    """
    split = Split()
    for file in files:
        try:
            for origin, row in read_rows(file):
                split.total += 1
                with _faults_into(split.faults, origin):
                    row = rename(row, fields, origin)
                    if isinstance(row, Mapping):
                        split.rows[origin] = row
                    split.items.append(parse_item(row, origin))
        except DataError as error:
            faults = list(_bad_lines(error, file))
            split.total += sum(fault.rows.count for fault in faults)
            split.faults += faults
    return split


@contextmanager
def _faults_into(faults: list[Fault], origin: str):
    """Adds the fault of a row where it has one, instead of raising it."""
    try:
        yield
    except Unfit as unfit:
        faults.append(Fault(unfit.kind, Rows.at([origin]), stops=False))
    except DataError as error:
        faults.append(Fault(str(error).removeprefix(f"{origin}: "), Rows.at([origin]), stops=True))


def _bad_lines(error: DataError, file: Path) -> Iterator[Fault]:
    """The faults that `read_rows` lists in its message: the first lines, and how many follow."""
    message = ""
    for line in str(error).splitlines():
        place = re.match(rf"({re.escape(str(file))}:\d+): (.*)", line)
        more = re.fullmatch(r"\.\.\. and (\d+) more", line)
        if not place and not more:
            raise error
        message = place[2] if place else message
        yield Fault(message, Rows.at([place[1]]) if place else Rows(int(more[1]), ()), stops=True)


def parse_item(row, origin: str) -> Item:
    """The record that a row holds, or what else it is. Raises as `parse_record` does."""
    try:
        return parse_record(row, origin)
    except DataError as error:
        try:
            record = parse_prompt(row, origin)
        except DataError:
            raise error from None
        item = _comparison(row, record) or (None if _MORE & row.keys() else record)
        if item is None:
            raise
        return item


# Columns of which a row has two: the completions that were compared.
_COMPARED = re.compile(r"(response|completion|answer|output|candidate)[_ -]?[012ab]", re.I)
# Columns that say that a row is more than a prompt.
_MORE = {"chosen", "rejected", "completion", "label", "response", "output", "reply", "assistant"}


def _comparison(row, record: PromptRecord) -> Comparison | None:
    columns = sorted(name for name in row if _COMPARED.fullmatch(name))
    if len(columns) != 2:
        return None
    for name in columns:
        if not isinstance(row[name], str):
            raise DataError(f'{record.origin}: "{name}" is {row[name]!r}, not text')
        if not row[name].strip():
            raise Unfit(f"empty {name}")
    return Comparison(record.prompt, *(row[name] for name in columns), record.origin)


# Common names of columns, for rows of no known kind.
_OTHER_NAMES = {
    "prompt": ("question", "problem", "query", "input"),
    "chosen": ("preferred", "accepted", "better", "winner"),
    "rejected": ("dispreferred", "worse", "loser"),
    "completion": ("response", "output", "reply", "answer", "solution"),
}


def suggest_fields(row: Mapping) -> list[str]:
    """The `--field` arguments with which a row of no known kind would be read, or nothing."""
    names = [(o, n) for o, others in _OTHER_NAMES.items() for n in others if n in row]
    new = [(ours, name) for ours, name in dict(reversed(names)).items() if ours not in row]
    try:
        parse_record(rename(row, new, ""), "")
    except (DataError, Unfit):
        return []
    return [f"{ours}={name}" for ours, name in new[::-1]]


# -- what is measured ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """Tokens of the prompt and the longest completion together.

    `histogram` holds (low, high, examples) of bins [low, high). `limits` holds, for several length
    limits, (limit, examples whose completion loses its end, examples dropped).
    """

    examples: int
    median: float
    maximum: int
    histogram: tuple[tuple[int, int, int], ...]
    limits: tuple[tuple[int, int, int], ...]


def group_faults(faults: Iterable[Fault]) -> tuple[Fault, ...]:
    """Faults of one kind together, the most frequent first; the first one's words stand for all."""
    groups: dict[tuple, Fault] = {}
    for fault in faults:
        kind = re.sub(r'(?<=not valid JSON).*|(?<=" is ).*(?=[.,] )|\d+', "#", fault.message)
        known = groups.get((kind, fault.stops), dataclasses.replace(fault, rows=Rows(0, ())))
        groups[kind, fault.stops] = dataclasses.replace(known, rows=known.rows + fault.rows)
    return tuple(sorted(groups.values(), key=lambda fault: (not fault.stops, -fault.rows.count)))


def encode_all(items: Iterable[Item], encoder: Encoder, faults: list[Fault]) -> list[Example]:
    """The examples of all records; the faults of those that have none are added to `faults`."""
    examples = []
    for item in items:
        if isinstance(item, Record):
            with _faults_into(faults, item.origin):
                examples += encoder.examples(item)
    return examples


def tokens_needed(example: Example) -> int:
    """The largest length limit under which nothing can be learnt from an example: a completion is cut
    before its first scored token, two completions before they differ, or a prompt alone is cut."""
    first = min((int(np.argmax(scored)) for scored in example.scored), default=-1)
    if len(example.completions) > 1:
        same = os.path.commonprefix([ids.tolist() for ids in example.completions])
        first = max(first, len(same))
    return len(example.prompt) + first


def measure_lengths(examples: Sequence[Example], max_length: int) -> Lengths | None:
    """Distribution of lengths and the effect of several limits, `max_length` among them."""
    if not examples:
        return None
    totals = np.array([max(e.lengths, default=len(e.prompt)) for e in examples])
    needed = np.array([tokens_needed(e) for e in examples])
    # Each bin is twice as wide as the one before; the first ends at 32 = 2^5.
    bins = Counter(max(5, int(n).bit_length()) for n in totals)
    # Beyond the first limit that holds everything there is nothing to tell.
    enough = next((limit for limit in LIMITS if limit >= totals.max()), LIMITS[-1])
    limits = sorted({max_length, *(limit for limit in LIMITS if limit <= enough)})
    return Lengths(
        examples=len(totals),
        median=float(np.median(totals)),
        maximum=int(totals.max()),
        histogram=tuple(
            (2 ** (k - 1) if k > 5 else 0, 2**k, bins[k]) for k in range(min(bins), max(bins) + 1)
        ),
        limits=tuple(
            (x, int(((totals > x) & (needed < x)).sum()), int((needed >= x).sum())) for x in limits
        ),
    )


def count_unended(examples: Iterable[Example], stops: Collection[int]) -> int:
    """Examples in which the last scored token of a completion does not stop generation."""
    return sum(
        any(int(ids[s][-1]) not in stops for ids, s in zip(e.completions, e.scored, strict=True))
        for e in examples
    )


def render_example(example: Example, tokenizer, max_length: int) -> str:
    """An example as the model will see it, cut at the length limit, special tokens in sight; what is
    scored stands between ⟦ and ⟧."""
    lines = [f"example, {example.origin}; what is scored is between ⟦ and ⟧:"]
    names = [(), ("completion",), ("chosen", "rejected")][len(example.completions)]
    parts = [("prompt", example.prompt, np.zeros(len(example.prompt), bool))]
    parts += zip(names, example.completions, example.scored, strict=True)
    room = max_length
    for name, ids, scored in parts:
        ids, scored = ids[:room], scored[:room]
        room = max_length - len(example.prompt)
        bounds = [0, *(np.flatnonzero(np.diff(scored)) + 1).tolist(), len(ids)]
        text = ""
        for start, end in pairwise(bounds):
            span = shorten(tokenizer.decode(ids[start:end].tolist()))
            text += f"⟦{span}⟧" if scored[start] else span
        lines.append(f"  {name}, {len(ids)} tokens")
        lines += [f"    {line}".rstrip() for line in text.split("\n")]
    return "\n".join(lines)


def shorten(text: str) -> str:
    """A long text without its middle, and without characters that would move a terminal's cursor."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda m: f"\\x{ord(m[0]):02x}", text)
    half, left_out = SHOWN_CHARACTERS // 2, len(text) - SHOWN_CHARACTERS
    return (
        f"{text[:half]} [... {left_out:,} characters ...] {text[-half:]}" if left_out > 0 else text
    )


def _key(text: Text) -> str:
    return json.dumps(text, sort_keys=True, ensure_ascii=False, default=str)


def prompt_key(item: Item) -> str | None:
    """What comes before the completion, but for case and white space; None for plain text."""
    prompt = getattr(item, "prompt", None)
    if isinstance(item, ChatRecord):
        first = next((i for i, m in enumerate(item.messages) if m["role"] == "assistant"), 0)
        prompt = item.messages[:first]
    # White space inside JSON strings is written with a backslash.
    return re.sub(r"\\[nrt]|\s", "", _key(prompt)).casefold() if prompt else None


def judgement(item: Item) -> tuple[tuple, bool | None]:
    """What a row speaks of, and what it says of it: of two completions whether the first in the
    alphabet is the better one, of one completion its label, of anything else None."""
    if isinstance(item, PairRecord):
        two = sorted((_key(item.chosen), _key(item.rejected)))
        return (_key(item.prompt), *two), _key(item.chosen) == two[0]
    if isinstance(item, LabelRecord):
        return (_key(item.prompt), _key(item.completion)), item.label
    return (_key(dataclasses.asdict(dataclasses.replace(item, origin=""))),), None


# "42", "so it is\n#### 42" and "\\boxed{42}".
_FINAL_NUMBER = re.compile(r"(\A|####)\s*[-+$]*\d[\d,./%]*\s*\Z|\\boxed\{[-+\d]")


def find_repeats(items: Iterable[Item]) -> tuple[Rows, Rows, list[list[bool | None]]]:
    """Rows that say again what another says, rows that contradict another, and for each thing that is
    judged all its judgements."""
    seen: dict[tuple, dict[bool | None, list[str]]] = {}
    for item in items:
        subject, verdict = judgement(item)
        seen.setdefault(subject, {}).setdefault(verdict, []).append(item.origin)
    things = [list(said.values()) for said in seen.values()]
    repeated = [origin for said in things for origins in said for origin in origins[1:]]
    contradicting = [o for said in things if len(said) > 1 for origins in said for o in origins]
    judged = [[v for v, origins in said.items() for _ in origins] for said in seen.values()]
    return Rows.at(repeated), Rows.at(contradicting), judged


def find_leakage(train: Iterable[Item], held_out: Iterable[Item]) -> Rows:
    """Held-out rows whose prompt is also trained on, but for case and white space."""
    known = set(map(prompt_key, train)) - {None}
    return Rows.at(item.origin for item in held_out if prompt_key(item) in known)


def measure_length_bias(examples: Iterable[Example]) -> tuple[Share | None, Share | None]:
    """The share of pairs whose chosen completion has more tokens, and that in which always picking the
    longer one is right, where equal lengths count half."""
    lengths = [tuple(map(len, e.completions)) for e in examples if len(e.completions) == 2]
    longer = sum(chosen > rejected for chosen, rejected in lengths)
    equal = sum(chosen == rejected for chosen, rejected in lengths)
    return share_of(longer, len(lengths)), share_of(longer + equal / 2, len(lengths))


def share_of(hits: float, total: int) -> Share | None:
    """The share; None of nothing."""
    return wilson_share(hits, total) if total else None


def decide_comparisons(
    items: Iterable[Item], sides: Mapping[str, Sequence[int | None]]
) -> tuple[list[PairRecord], int]:
    """The pairs that majorities of sides, by origin, make of comparisons, and the number of ties."""
    pairs, ties = [], 0
    for item in items:
        if isinstance(item, Comparison):
            winner = majority(sides.get(item.origin, ()))
            two = (item.second, item.first) if winner == 2 else (item.first, item.second)
            ties += winner == 0
            if winner and item.first != item.second:
                pairs.append(PairRecord(item.prompt, *two, item.origin))
    return pairs, ties


# -- the report ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Remark:
    """What measurements mean: a "warning" wants action, a "note" does not, "advice" is what to do, by a
    method where one fits at once."""

    level: str
    text: str
    method: str | None = None
    command: str | None = None


@dataclass(frozen=True)
class DataCheck:
    """Everything that was found out about a data set.

    `rows` and `kinds` are by split; faults are those of all splits, everything else speaks of the one
    that is trained on. `usable` counts the rows that can be trained on as they stand, `understood` adds
    comparisons. Comparisons that are decided become pairs; lengths and their bias then
    speak of these. In `unended` examples no end of turn is scored. An annotated field is reported in
    the words beside its type.
    """

    settings: DataSettings
    model: str
    has_template: bool
    rows: dict[str, int]
    kinds: dict[str, dict[str, int]]
    usable: int
    understood: int
    faults: tuple[Fault, ...]
    samples: tuple[str, ...]
    lengths: Lengths | None
    agreement: Agreement | None
    unended: int
    suggested_fields: list[str]
    prompts: Annotated[int, "different prompts"]
    repeated: Annotated[Rows, "rows that repeat another"]
    contradicting: Annotated[Rows, "rows that contradict another"]
    leakage: Annotated[dict[str, Rows], "prompts that are trained on, in"]
    answered: Annotated[int, "prompts with an answer to compare with"]
    numeric: Annotated[int, "answers that end in a number"]
    chosen_is_longer: Annotated[Share | None, "chosen completion is longer"]
    longer_wins: Annotated[Share | None, "always picking the longer completion is right"]
    good_labels: Annotated[Share | None, "good labels"]
    decided: Annotated[int, "comparisons where most prefer one completion"]
    ties: Annotated[int, "comparisons that are a tie to most"]
    noise: Annotated[Noise | None, "wrong labels, estimated"]
    ai_labels: Annotated[dict[str, Share], "labels by AI, by the column"]
    remarks: tuple[Remark, ...] = ()

    @property
    def kind(self) -> str:
        """The commonest kind of row that is trained on, or nothing."""
        kinds = self.kinds["train"]
        return max(kinds, key=kinds.get, default="")

    def as_dict(self) -> dict:
        """Plain JSON data."""
        return {"kind": self.kind, **dataclasses.asdict(self)}

    def lines(self) -> list[str]:
        """The report in words."""
        sections = [
            _describe_rows(self),
            _describe_faults(self),
            self.samples,
            _describe_lengths(self),
            _describe_facts(self),
            self.agreement.lines() if self.agreement else (),
            _describe_remarks(self),
        ]
        return [line for lines in map(list, sections) if lines for line in ("", *lines)][1:]


def inspect_data(
    settings: DataSettings,
    splits: Mapping[str, Split],
    encoder: Encoder,
    *,
    model: str,
    annotators: Sequence[str] = (),
    examples: int = 1,
) -> DataCheck:
    """Measure the split "train"; the other splits are checked for faults and leakage.

    The encoder has no limit of its own (`UNLIMITED`). `examples` is how many are rendered. Raises
    `DataError` where no row has a column of `annotators`.
    """
    train, limit = splits["train"], settings.max_length
    held_out = {name: split for name, split in splits.items() if name != "train"}
    faults = [fault for split in splits.values() for fault in split.faults]
    for split in held_out.values():
        encode_all(split.items, encoder, faults)
    votes = collect_votes(train.rows, annotators)
    several = votes is not None and len(votes.table) > 1
    sides = votes.sides() if votes else {}
    decided, ties = decide_comparisons(train.items, sides)
    made = encode_all(train.items, encoder, faults) or encode_all(decided, encoder, [])
    kept = [e for e in made if tokens_needed(e) < limit]
    left = {e.origin for e in kept}
    lost = Rows.at(dict.fromkeys(e.origin for e in made if e.origin not in left))
    if lost.count:
        faults.append(Fault(f"too long: nothing to learn within {limit} tokens", lost, stops=False))
    records = {item.origin for item in train.items if isinstance(item, Record)}
    labels = [item.label for item in train.items if isinstance(item, LabelRecord)]
    prompts = [item.row for item in train.items if isinstance(item, PromptRecord)]
    answers = [str(row["answer"]) for row in prompts if row.get("answer") is not None]
    unread = train.rows.keys() - {item.origin for item in train.items}
    suggestions = (suggest_fields(row) for origin, row in train.rows.items() if origin in unread)
    repeated, contradicting, judged = find_repeats(train.items)
    chosen_is_longer, longer_wins = measure_length_bias(made)
    return DataCheck(
        settings=settings,
        model=model,
        has_template=encoder.template is not None,
        rows={name: split.total for name, split in splits.items()},
        kinds={
            name: dict(Counter(name_of(type(item)) for item in split.items))
            for name, split in splits.items()
        },
        usable=len(records & left),
        understood=len(records & left) + len(train.items) - len(records),
        faults=group_faults(faults),
        samples=tuple(render_example(e, encoder.tokenizer, limit) for e in kept[:examples]),
        lengths=measure_lengths(made, limit),
        agreement=measure_agreement(votes.table) if several else None,
        suggested_fields=next(filter(None, suggestions), []),
        prompts=len(set(map(prompt_key, train.items)) - {None}),
        repeated=repeated,
        contradicting=contradicting,
        leakage={name: find_leakage(train.items, split.items) for name, split in held_out.items()},
        unended=count_unended(made, encoder.stops),
        answered=len(answers),
        numeric=sum(bool(_FINAL_NUMBER.search(answer)) for answer in answers),
        chosen_is_longer=chosen_is_longer,
        longer_wins=longer_wins,
        good_labels=share_of(sum(labels), len(labels)),
        decided=len(decided),
        ties=ties,
        noise=votes.noise() if several else estimate_noise(judged),
        ai_labels=find_ai_labels(train.rows.values()),
    )


# -- in words --------------------------------------------------------------------------------------


def _describe_rows(check):
    splits = ", ".join(f"{count_rows(count)} in {name}" for name, count in check.rows.items())
    yield f"{check.settings.data}: {splits}"
    for kind, count in check.kinds["train"].items():
        yield f"  {count_rows(count)}: {KINDS[kind]}"
    yield f"  {check.usable:,} of {count_rows(check.rows['train'])} can be trained on as they stand"


def _describe_faults(check):
    if check.faults:
        yield "rows that will not work:"
    for fault in check.faults:
        yield f"  {'stops training' if fault.stops else 'dropped'}: {fault.message}"
        yield f"    {fault.rows}"


def _describe_lengths(check):
    lengths = check.lengths
    if lengths is None:
        return
    yield f"tokens of prompt and completion: median {lengths.median:,.0f}, longest {lengths.maximum:,}"
    most = max(count for *_, count in lengths.histogram)
    for low, high, count in lengths.histogram:
        bar = "█" * -(-24 * count // most)
        yield f"  {low:>6,} to {high - 1:<6,} {count:>7,}  {bar}".rstrip()
    for limit, cut, dropped in lengths.limits:
        cut, dropped = f"{cut / lengths.examples:.1%}", f"{dropped / lengths.examples:.1%}"
        now = " (--max-length)" if limit == check.settings.max_length else ""
        yield f"  limit {limit:>6,}: {cut} lose their end, {dropped} dropped{now}"


def _describe_facts(check):
    for entry in dataclasses.fields(check) if check.understood else ():
        value, (words,) = getattr(check, entry.name), getattr(entry.type, "__metadata__", ("",))
        if words and isinstance(value, dict):
            yield from (f"{words} {name}: {of_it}" for name, of_it in value.items())
        elif words and value:
            yield f"{words}: {value:,}" if isinstance(value, int) else f"{words}: {value}"


def _describe_remarks(check):
    for remark in check.remarks:
        yield ": ".join(filter(None, (remark.level, remark.method, remark.text)))
        if remark.command:
            yield f"  {remark.command}"
