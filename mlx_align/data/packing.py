"""Examples to batches: token rows, and a table of what is predicted where.

A pack of one pair (prompt p, completions a and b) and the table that scores it:

    index      0  1  2 | 3  4 | 5  6  7        source  target  owner
    tokens     p0 p1 p2  a0 a1  b0 b1 b2         2       a0      0      the prompt's last token
    positions  0  1  2   3  4   3  4  5          3       a1      0      predicts two successors
    ends       8  8  8   5  5   8  8  8          2       b0      1
                                                 5       b1      1
                                                 6       b2      1

`ends[j]` is the end of the subtree of j's segment: token i sees token j iff j <= i < ends[j]. The
hidden state at `source` predicts token `target` for completion `owner`; nobody shifts by one.
Host data only (numpy); knows nothing of models.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlx_align.data.template import Example


class Segment(NamedTuple):
    """Tokens [start, end) of a row that see themselves causally and everything of `parent`."""

    row: int
    start: int
    end: int
    parent: int  # index into the batch's segments, -1 for a root


class Batch(NamedTuple):
    """B rows of T tokens with M predictions for N completions.

    tokens, positions, ends are int32[B, T]; source (an index into the flattened rows), target and
    owner int32[M]; weight float32[M] is 1 for a prediction and 0 for padding. `last`, int32[N], is
    where each completion's last token stands in the flattened rows. `segments` is empty for rows that
    hold one completion each, without sharing. Completions of one example lie side by side; `examples`
    names them in order.

    Where prompts are predicted too, their predictions stand behind those of the completions, with
    weight 0 and the example's first completion as owner; in_prompt, float32[M], is 1 for them.
    """

    tokens: np.ndarray
    positions: np.ndarray
    ends: np.ndarray
    source: np.ndarray
    target: np.ndarray
    owner: np.ndarray
    weight: np.ndarray
    in_prompt: np.ndarray
    last: np.ndarray
    segments: tuple[Segment, ...]
    examples: tuple[Example, ...]

    @property
    def completions(self) -> int:
        """N, the number of completions."""
        return sum(len(e.completions) for e in self.examples)

    @property
    def real_tokens(self) -> int:
        """Tokens as a user counts them: every completion with its own copy of the prompt."""
        return sum(sum(e.lengths) for e in self.examples)

    def by_example(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """Values of all completions, [N], cut by example: uid to [K]."""
        return self._cut(values, [len(e.completions) for e in self.examples])

    def by_example_tokens(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """Values of the table's rows, [M], cut by example: uid to those of its scored tokens."""
        return self._cut(values, [sum(e.scored_lengths) for e in self.examples])

    def sum_tokens(self, values: np.ndarray) -> np.ndarray:
        """Values of the table's rows, [M], summed over each completion: float64[N]."""
        return np.bincount(self.owner, values * self.weight, self.completions)

    def join(self, values: dict[str, np.ndarray]) -> np.ndarray:
        """What `by_example_tokens` cut, in the order of this table: float32[M], padded with 0."""
        rows = np.concatenate([values[e.uid] for e in self.examples]).astype(np.float32)
        return np.pad(rows, (0, len(self.target) - len(rows)))

    def _cut(self, values, counts):
        ends = np.cumsum(counts)
        parts = np.split(values[: ends[-1]], ends[:-1])
        return {e.uid: part for e, part in zip(self.examples, parts, strict=True)}


def pack(examples: Sequence[Example], multiple: int = 1, *, prompts: bool = False) -> Batch:
    """One row that holds all examples, each prompt once.

    T and M are padded to a multiple of `multiple`, so that a backend that prefers few shapes sees
    few.
    """
    tokens, positions, ends, segments = [], [], [], []
    table, last = _Table(prompts), []
    at, completion = 0, 0
    for example in examples:
        root, size = len(segments), len(example.prompt)
        segments.append(Segment(0, at, at + size, -1))
        tokens.append(example.prompt)
        positions.append(np.arange(size))
        ends.append(np.full(size, at + example.packed_length))
        last_of_prompt = at + size - 1
        table.prompt(at, example.prompt, completion)
        at += size
        for ids, scored in zip(example.completions, example.scored, strict=True):
            segments.append(Segment(0, at, at + len(ids), root))
            tokens.append(ids)
            positions.append(size + np.arange(len(ids)))
            ends.append(np.full(len(ids), at + len(ids)))
            sources = np.concatenate([[last_of_prompt], at + np.arange(len(ids) - 1)])
            table.completion(sources[scored], ids[scored], completion)
            at += len(ids)
            last.append(at - 1)
            completion += 1
    return Batch(
        *(_row(parts, multiple) for parts in (tokens, positions, ends)),
        *table.arrays(multiple),
        np.array(last, np.int32),
        tuple(segments),
        tuple(examples),
    )


def pad(examples: Sequence[Example], multiple: int = 1, *, prompts: bool = False) -> Batch:
    """One row a completion, the prompt repeated, padded on the right: for models without packing."""
    rows = [np.concatenate([e.prompt, c]) for e in examples for c in e.completions]
    width = _round_up(max(len(row) for row in rows), multiple)
    tokens = np.zeros((len(rows), width), np.int32)
    ends = np.zeros((len(rows), width), np.int32)
    table, last = _Table(prompts), []
    row = 0
    for example in examples:
        before = len(example.prompt)
        table.prompt(row * width, example.prompt, row)
        for ids, scored in zip(example.completions, example.scored, strict=True):
            tokens[row, : before + len(ids)] = rows[row]
            ends[row, : before + len(ids)] = before + len(ids)
            sources = row * width + before - 1 + np.arange(len(ids))
            table.completion(sources[scored], ids[scored], row)
            last.append(row * width + before + len(ids) - 1)
            row += 1
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), tokens.shape)
    last = np.array(last, np.int32)
    return Batch(tokens, positions, ends, *table.arrays(multiple), last, (), tuple(examples))


def _row(parts, multiple):
    row = np.concatenate(parts).astype(np.int32)
    return np.pad(row, (0, _round_up(len(row), multiple) - len(row)))[None]


class _Table:
    """Collects the rows of the prediction table: (source, target, owner) of completions and prompts."""

    def __init__(self, prompts: bool):
        self._completions: list = []
        self._prompts: list | None = [] if prompts else None

    def completion(self, source, target, owner):
        self._completions.append((source, target, np.full(len(target), owner)))

    def prompt(self, start, ids, owner):
        if self._prompts is not None:
            sources = start + np.arange(len(ids) - 1)
            self._prompts.append((sources, ids[1:], np.full(len(ids) - 1, owner)))

    def arrays(self, multiple):
        """source, target, owner, weight, in_prompt, padded."""
        parts = [*self._completions, *(self._prompts or ())]
        columns = [np.concatenate(c).astype(np.int32) for c in zip(*parts, strict=True)]
        weight = np.zeros(len(columns[0]), np.float32)
        scored = sum(len(owner) for _, _, owner in self._completions)
        weight[:scored] = 1
        # A table has a row even where nothing counts.
        extra = (0, _round_up(max(len(weight), 1), multiple) - len(weight))
        return [np.pad(c, extra) for c in (*columns, weight)] + [np.pad(1 - weight, extra)]


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def split_into_packs(
    examples: Sequence[Example], pack_length: int, *, shared: bool = True
) -> list[list[Example]]:
    """Distribute examples over as few packs of at most `pack_length` tokens as it takes.

    The packs are about equally full, since the fullest sets the peak memory. An example longer than
    `pack_length` gets a pack of its own. With `shared` false, lengths count a prompt once for every
    completion, padded to the longest, as `pad` lays them out.
    """

    def size(group):
        if shared:
            return sum(e.packed_length for e in group)
        return max(max(e.lengths) for e in group) * sum(len(e.completions) for e in group)

    order = sorted(examples, key=lambda e: -e.packed_length)
    if not shared:
        # Rows are padded to the longest of their pack, so neighbours in length belong together.
        packs: list[list[Example]] = []
        for example in order:
            if packs and size([*packs[-1], example]) <= pack_length:
                packs[-1].append(example)
            else:
                packs.append([example])
        return packs
    first_fit: list[list[Example]] = []
    for example in order:
        fits = (p for p in first_fit if size(p) + example.packed_length <= pack_length)
        target = next(fits, None)
        if target is None:
            first_fit.append([example])
        else:
            target.append(example)
    balanced: list[list[Example]] = [[] for _ in first_fit]
    for example in order:
        min(balanced, key=size).append(example)
    fullest = max(map(size, balanced), default=0)
    return balanced if fullest <= max(map(size, first_fit), default=0) else first_fit
