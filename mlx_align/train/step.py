"""One optimizer step: add up losses and gradients over packs, divide once, update."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_align.data.packing import Batch
from mlx_align.errors import NonFiniteError
from mlx_align.losses import Loss, Method, Scores
from mlx_align.model.adapter import Adapter
from mlx_align.model.forward import token_log_probs
from mlx_align.model.load import LoadedModel
from mlx_align.train.optimizer import Optimizer


class Totals(NamedTuple):
    """Sums over packs: the loss's numerator and denominator, and each metric's."""

    loss: float
    weight: float
    metrics: dict[str, tuple[float, float]]

    def add(self, other: "Totals") -> "Totals":
        """Both together."""
        metrics = dict(self.metrics)
        for name, (total, count) in other.metrics.items():
            before = metrics.get(name, (0.0, 0.0))
            metrics[name] = (before[0] + total, before[1] + count)
        return Totals(self.loss + other.loss, self.weight + other.weight, metrics)

    def means(self) -> dict[str, float]:
        """The loss and every metric, divided."""
        values = {name: total / max(count, 1e-30) for name, (total, count) in self.metrics.items()}
        return {"loss": self.loss / self.weight, **values}


NOTHING = Totals(0.0, 0.0, {})


def score_batch(
    loaded: LoadedModel, batch: Batch, reference: np.ndarray | None, *, gradient: bool = False
) -> Scores:
    """The scores of a batch; `reference` is float32[M], the reference's log-probabilities."""
    token, hit = token_log_probs(loaded, batch, gradient=gradient)
    return Scores.of(
        token,
        hit,
        mx.array(batch.owner),
        mx.array(batch.weight),
        batch.completions,
        None if reference is None else mx.array(reference),
    )


def _numbers(loss: Loss) -> Totals:
    metrics = {k: (float(total), float(count)) for k, (total, count) in loss.metrics.items()}
    return Totals(float(loss.total), float(loss.weight), metrics)


def evaluate_batch(loaded, method: Method, batch: Batch, reference) -> Totals:
    """The loss and metrics of a batch, without gradients."""
    loss = method(score_batch(loaded, batch, reference))
    mx.eval(loss)
    totals = _numbers(loss)
    _check_finite(totals.loss, loaded, [batch], "the held-out loss")
    return totals


def gradient_batch(loaded, method: Method, batch: Batch, reference) -> tuple[Totals, dict]:
    """The loss and metrics of a batch, and the gradient of the loss's sum (not of its mean)."""
    parameters = loaded.model.trainable_parameters()

    def total(parameters):
        loaded.model.update(parameters)
        loss = method(score_batch(loaded, batch, reference, gradient=True))
        return loss.total, loss

    try:
        (_, loss), gradients = mx.value_and_grad(total)(parameters)
    finally:
        loaded.model.update(parameters)
    mx.eval(loss, gradients)
    return _numbers(loss), gradients


def train_step(
    loaded: LoadedModel,
    adapter: Adapter,
    optimizer: Optimizer,
    method: Method,
    batches: Sequence[tuple[Batch, np.ndarray | None]],
    learning_rate: float,
) -> tuple[Totals, float]:
    """Update the adapter once from all batches together; returns the totals and the gradient norm.

    Raises `NonFiniteError` naming examples, before anything is changed.
    """
    totals, gradients = NOTHING, None
    for batch, reference in batches:
        here, more = gradient_batch(loaded, method, batch, reference)
        _check_finite(here.loss, loaded, [batch], "the loss")
        totals = totals.add(here)
        gradients = more if gradients is None else tree_map(mx.add, gradients, more)
        mx.eval(gradients)
        del more
    gradients = tree_map(lambda g: g / totals.weight, gradients)
    parameters, norm = optimizer.step(adapter.parameters(), gradients, learning_rate)
    _check_finite(norm.item(), loaded, [b for b, _ in batches], "the gradient")
    del gradients
    loaded.model.update(parameters)
    mx.eval(adapter.parameters())
    optimizer.evaluate()
    return totals, norm.item()


def _check_finite(value: float, loaded, batches, what: str) -> None:
    if np.isfinite(value):
        return
    culprits = []
    for batch in batches:
        token = np.asarray(token_log_probs(loaded, batch)[0])
        bad = set(np.asarray(batch.owner)[~np.isfinite(token)].tolist())
        owners = [e.origin for e in batch.examples for _ in e.completions]
        culprits += [owners[i] for i in sorted(bad)]
    names = list(dict.fromkeys(culprits)) or [e.origin for b in batches for e in b.examples]
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    blame = (
        "these examples have log-probabilities that are not finite"
        if culprits
        else "in the batch of"
    )
    raise NonFiniteError(
        f"{what} is {value} ({blame}: {listed}). Nothing was changed by this step; look at these "
        "rows, lower --learning-rate, or use --dtype float32."
    )
