"""The order in which examples are seen: a pure function of the seed and the step.

There is no iterator state to save: step k of a run always sees the same examples, so a resumed run
goes on exactly where the interrupted one stopped.
"""

import math

import numpy as np

from mlx_align.data.template import Example


class Stream:
    """Batches of `batch_size` examples, each example once an epoch, reshuffled every epoch.

    The last batch of an epoch holds what is left over, so no example is skipped or seen twice.
    """

    def __init__(self, examples: list[Example], batch_size: int, seed: int):
        self.examples = examples
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
            self._epoch, self._order = epoch, rng.permutation(len(self.examples))
        chosen = self._order[index * self.batch_size : (index + 1) * self.batch_size]
        return [self.examples[i] for i in chosen]
