"""Batches: tokens, visibility and the prediction table, against drawings made by hand."""

import numpy as np
import pytest

from mlx_align.data.packing import pack, pad, split_into_packs
from mlx_align.data.stream import Stream
from mlx_align.data.template import make_example


def example(prompt, *completions, masks=None):
    masks = masks or [[True] * len(c) for c in completions]
    return make_example(prompt, completions, masks, "f:1")


def test_a_pack_of_two_examples():
    batch = pack([example([1, 2, 3], [4, 5], [6, 7, 8]), example([9], [10])])
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1]]
    assert batch.ends.tolist() == [[8, 8, 8, 5, 5, 8, 8, 8, 10, 10]]
    assert batch.source.tolist() == [2, 3, 2, 5, 6, 8]
    assert batch.target.tolist() == [4, 5, 6, 7, 8, 10]
    assert batch.owner.tolist() == [0, 0, 1, 1, 1, 2]
    assert [tuple(s) for s in batch.segments] == [
        (0, 0, 3, -1), (0, 3, 5, 0), (0, 5, 8, 0), (0, 8, 9, -1), (0, 9, 10, 3),
    ]  # fmt: skip
    assert batch.completions == 3 and batch.real_tokens == 5 + 6 + 2


def test_only_scored_tokens_are_predicted():
    masked = example([1, 2], [3, 4, 5, 6], masks=[[False, True, False, True]])
    batch = pack([masked])
    assert batch.source.tolist() == [2, 4] and batch.target.tolist() == [4, 6]
    rows = pad([masked])
    assert rows.source.tolist() == [2, 4] and rows.target.tolist() == [4, 6]


def test_padded_rows_repeat_the_prompt():
    batch = pad([example([1, 2], [3], [4, 5, 6])])
    assert batch.tokens.tolist() == [[1, 2, 3, 0, 0], [1, 2, 4, 5, 6]]
    assert batch.source.tolist() == [1, 6, 7, 8] and batch.target.tolist() == [3, 4, 5, 6]
    assert batch.owner.tolist() == [0, 1, 1, 1] and batch.segments == ()


def test_padding_is_never_a_target_and_counts_nothing():
    batch = pack([example([1, 2, 3], [4, 5], [6])], multiple=8)
    assert batch.tokens.shape == (1, 8) and len(batch.source) == 8
    assert batch.ends[0, 6:].tolist() == [0, 0]
    assert batch.weight.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


def test_every_completion_token_is_a_target_once():
    rng = np.random.default_rng(0)
    examples = [
        example(rng.integers(1, 99, 5), *(rng.integers(1, 99, n) for n in rng.integers(1, 9, 2)))
        for _ in range(6)
    ]
    targets = np.concatenate([c for e in examples for c in e.completions])
    for batch in (pack(examples), pad(examples)):
        assert batch.target.tolist() == targets.tolist()
        # The source of a target holds the token before it.
        before = batch.tokens.reshape(-1)[batch.source]
        expected = [
            t for e in examples for c in e.completions for t in [e.prompt[-1], *c[:-1].tolist()]
        ]
        assert before.tolist() == expected


@pytest.mark.parametrize("shared", [True, False])
def test_packs_hold_all_examples_within_the_limit(shared):
    rng = np.random.default_rng(1)
    examples = [
        example(range(1, rng.integers(5, 60)), range(1, rng.integers(4, 50)), [1, 2])
        for _ in range(40)
    ]
    packs = split_into_packs(examples, 200, shared=shared)
    assert sorted(e.uid for p in packs for e in p) == sorted(e.uid for e in examples)
    make = pack if shared else pad
    assert all(make(p).tokens.size <= 200 for p in packs)
    assert len(packs) < len(examples)
    again = split_into_packs(examples, 200, shared=shared)
    assert [[e.uid for e in p] for p in packs] == [[e.uid for e in p] for p in again]


def test_a_long_example_gets_a_pack_of_its_own():
    long, short = example(range(1, 300), [1, 2]), example([1], [2])
    packs = split_into_packs([short, long, short], 100)
    assert [len(p) for p in packs] == [1, 2]
    assert split_into_packs([], 100) == []


def test_each_example_once_an_epoch_in_a_repeatable_order():
    examples = [example([i], [1]) for i in range(1, 24)]
    stream = Stream(examples, 5, seed=3)
    assert stream.steps_per_epoch == 5
    first = [[e.uid for e in stream.batch(step)] for step in range(10)]
    for epoch in (first[:5], first[5:]):
        assert sorted(u for batch in epoch for u in batch) == sorted(e.uid for e in examples)
    assert first[:5] != first[5:]
    # Any step can be asked for, in any order: there is no state to lose.
    later = Stream(examples, 5, seed=3)
    assert [e.uid for e in later.batch(7)] == first[7]
    assert [e.uid for e in later.batch(2)] == first[2]
    assert [e.uid for e in Stream(examples, 5, seed=4).batch(0)] != first[0]
