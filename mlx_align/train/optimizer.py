"""AdamW and the learning rate as a function of the step."""

import math

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten


def learning_rate_at(step: int, total: int, peak: float, schedule: str, warmup: float) -> float:
    """The learning rate of optimizer step `step` (from 0) of `total`.

    Rises linearly over the first `warmup` share of the steps, then stays ("constant") or falls to 0
    ("linear", "cosine").
    """
    rising = math.ceil(total * warmup)
    if step < rising:
        return peak * (step + 1) / rising
    if schedule == "constant":
        return peak
    left = (total - step) / max(total - rising, 1)
    return peak * (left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


class Optimizer:
    """AdamW with bias correction (Loshchilov and Hutter 2019, arXiv:1711.05101), as torch has it."""

    def __init__(self, weight_decay: float, max_grad_norm: float):
        self._adamw = optim.AdamW(
            learning_rate=0.0, weight_decay=weight_decay, bias_correction=True
        )
        self._max_grad_norm = max_grad_norm

    def step(
        self, parameters: dict, gradients: dict, learning_rate: float
    ) -> tuple[dict, mx.array]:
        """New parameters and the gradient's norm before clipping; lazy."""
        norm = mx.sqrt(sum(mx.square(g).sum() for _, g in tree_flatten(gradients)))
        if self._max_grad_norm:
            gradients, _ = optim.clip_grad_norm(gradients, self._max_grad_norm)
        self._adamw.learning_rate = learning_rate
        return self._adamw.apply_gradients(gradients, parameters), norm

    def evaluate(self) -> None:
        """Compute what is pending of the state."""
        mx.eval(self._adamw.state)

    def state(self) -> dict[str, mx.array]:
        """The moments and counters by name."""
        return dict(tree_flatten(self._adamw.state))

    def load(self, state: dict[str, mx.array], parameters: dict) -> None:
        """Continue from a saved state."""
        self._adamw.init(parameters)
        self._adamw.state = tree_unflatten(list(state.items()))
