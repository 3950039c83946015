"""The order in which examples are seen, and what they are set against: pure functions of the seed.

There is no iterator state to save: step k of a run always sees the same examples, so a resumed run
goes on exactly where the interrupted one stopped.
"""

import math

import numpy as np

from mlx_align.data.template import Example, make_example


class Stream:
    """Batches of `batch_size` examples, each example once an epoch, reshuffled every epoch.

    The last batch of an epoch holds what is left over, so no example is skipped or seen twice. With
    `mixed`, examples of different labels are spread evenly, so that every batch has its share of each.
    """

    def __init__(self, examples: list[Example], batch_size: int, seed: int, *, mixed: bool = False):
        self.examples = examples
        self._labels = np.array([e.values[0] for e in examples]) if mixed else None
        self.batch_size = batch_size
        self.seed = seed
        self._epoch, self._order = -1, None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every example once."""
        return math.ceil(len(self.examples) / self.batch_size)

    def epoch(self, step: int) -> float:
        """Epochs finished after `step` steps."""
        return step / self.steps_per_epoch

    def seen(self, steps: int) -> list[Example]:
        """The examples that the first `steps` steps see, in the order of the data."""
        if steps >= self.steps_per_epoch:
            return self.examples
        self.batch(0)
        return [self.examples[i] for i in sorted(self._order[: steps * self.batch_size])]

    def batch(self, step: int) -> list[Example]:
        """The examples of optimizer step `step`, counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            order = rng.permutation(len(self.examples))
            if self._labels is not None:
                order = _spread(order, self._labels[order], rng)
            self._epoch, self._order = epoch, order
        chosen = self._order[index * self.batch_size : (index + 1) * self.batch_size]
        return [self.examples[i] for i in chosen]


def _spread(order, labels, rng):
    """The order with each label's examples at even distances; `labels` are those of the order."""
    place = np.empty(len(order))
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        place[own] = (np.arange(len(own)) + rng.random()) / len(own)
    return order[np.argsort(place, kind="stable")]


def mismatched(examples: list[Example], max_length: int, seed: int) -> dict[str, Example]:
    """For each example, by uid: its prompt with as many completions of another prompt's example.

    KTO estimates its KL term on such pairs (Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1).
    The partners are fixed for a run, so their reference is computed once. Empty where there is one
    prompt only.
    """
    order = np.random.default_rng([seed, 0x3157]).permutation(len(examples))
    partners: dict[str, Example] = {}
    for place, index in enumerate(order):
        example = examples[index]
        prompt = example.prompt.tobytes()
        others = (examples[order[(place + k) % len(order)]] for k in range(1, len(order)))
        other = next((o for o in others if o.prompt.tobytes() != prompt), None)
        if other is not None:
            room = max_length - len(example.prompt)
            count = min(len(example.completions), len(other.completions))
            cut = [ids[:room] for ids in other.completions[:count]]
            masks = [np.ones(len(ids), bool) for ids in cut]
            partners[example.uid] = make_example(example.prompt, cut, masks, example.origin)
    return partners
