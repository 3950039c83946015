"""The order of examples, labels mixed in every batch, and partners from other prompts."""

import numpy as np
import pytest

from mlx_align.data.stream import Stream, mismatched
from mlx_align.data.template import make_example


def example(prompt, answer, label=1.0):
    return make_example([prompt], [[answer, answer]], [[True, True]], "f", (label,))


def test_each_example_once_an_epoch_in_another_order():
    examples = [example(i, i) for i in range(10)]
    stream = Stream(examples, 4, seed=1)
    epochs = [[e.uid for k in range(3) for e in stream.batch(3 * n + k)] for n in range(2)]
    assert all(sorted(epoch) == sorted(e.uid for e in examples) for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = Stream(examples, 4, seed=1)
    assert [e.uid for e in again.batch(5)] == epochs[1][8:]


def test_what_a_short_run_sees():
    examples = [example(i, i) for i in range(10)]
    stream = Stream(examples, 4, seed=1)
    seen = {e.uid for k in range(2) for e in stream.batch(k)}
    assert {e.uid for e in stream.seen(2)} == seen and len(seen) == 8
    assert stream.seen(3) == examples and stream.seen(30) == examples


@pytest.mark.parametrize("good", [20, 10, 5])
def test_labels_are_mixed_in_every_batch(good):
    examples = [example(i, i, float(i < good)) for i in range(40)]
    stream = Stream(examples, 8, seed=3, mixed=True)
    for step in range(15):
        labels = [e.values[0] for e in stream.batch(step)]
        assert abs(sum(labels) - good / 5) <= 1, (step, labels)
    uids = sorted(e.uid for k in range(5) for e in stream.batch(k))
    assert uids == sorted(e.uid for e in examples)


def test_partners_come_from_other_prompts():
    examples = [example(p, 100 + 10 * p + k) for p in range(4) for k in range(3)]
    partners = mismatched(examples, 64, seed=0)
    assert partners.keys() == {e.uid for e in examples}
    prompts = {e.completions[0].tobytes(): e.prompt.tobytes() for e in examples}
    for e in examples:
        partner = partners[e.uid]
        assert partner.prompt.tobytes() == e.prompt.tobytes()
        assert prompts[partner.completions[0].tobytes()] != e.prompt.tobytes()
    again = mismatched(examples, 64, seed=0)
    assert {u: p.uid for u, p in again.items()} == {u: p.uid for u, p in partners.items()}


def test_partners_keep_the_length_limit_and_need_two_prompts():
    long = make_example([1], [list(range(2, 12))], [np.ones(10, bool)], "f")
    other = make_example([2, 3, 4, 5], [[6]], [[True]], "f")
    partners = mismatched([long, other], 6, seed=0)
    assert len(partners[other.uid].completions[0]) == 2
    assert mismatched([example(1, 2), example(1, 3)], 64, seed=0) == {}
