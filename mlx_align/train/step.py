"""One optimizer step: add up losses and gradients over packs, divide once, update."""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_align.data.packing import Batch
from mlx_align.data.template import Example
from mlx_align.errors import NonFiniteError
from mlx_align.losses import Loss, Method, Scores
from mlx_align.model.adapter import Adapter
from mlx_align.model.forward import rewards, token_log_probs, token_scores, values
from mlx_align.model.load import LoadedModel
from mlx_align.train.optimizer import Optimizer


class Part(NamedTuple):
    """A pack and what is known of its table's tokens, float32[M] each, or None.

    The reference's log-probabilities; of samples also those of the policy that sampled them, and their
    advantages.
    """

    batch: Batch
    reference: np.ndarray | None = None
    old: np.ndarray | None = None
    advantage: np.ndarray | None = None


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
        """The loss and every metric that something counts for, divided."""
        values = {name: total / count for name, (total, count) in self.metrics.items() if count}
        return {"loss": self.loss / self.weight, **values}


NOTHING = Totals(0.0, 0.0, {})


class Whole(NamedTuple):
    """What every part of an optimizer step is told of the whole.

    `mean_length` as in `Scores`; `contexts` hold what the method's `couple` made for each part.
    """

    mean_length: float
    contexts: list


def score_batch(
    loaded: LoadedModel,
    method: Method,
    part: Part,
    mean_length: float = 1.0,
    *,
    gradient: bool = False,
) -> Scores:
    """What the model says of a pack, as the method wants it."""
    batch = part.batch
    value, importance = _judgements(batch.examples)
    if method.reads == "rewards":
        return Scores.of_rewards(rewards(loaded, batch), value, importance)
    if method.reads == "values":
        found = values(loaded, batch)
        return _summed(part, found, found > 0, value, importance, mean_length)
    scores = token_scores(
        loaded,
        batch,
        gradient=gradient,
        moments=method.needs_collision,
        temperature=method.temperature,
    )
    return _summed(
        part,
        scores.logp,
        scores.hit,
        value,
        importance,
        mean_length,
        collision=scores.collision,
        in_prompt=mx.array(batch.in_prompt) if method.scores_prompts else None,
    )


def _summed(part: Part, token, hit, value, importance, mean_length, **extra) -> Scores:
    batch = part.batch
    scores = Scores.of(
        token,
        hit,
        mx.array(batch.owner),
        mx.array(batch.weight),
        batch.completions,
        _array(part.reference),
        value=value,
        importance=importance,
        mean_length=mean_length,
        **extra,
    )
    return scores._replace(old_token=_array(part.old), advantage=_array(part.advantage))


def _array(values: np.ndarray | None) -> mx.array | None:
    return None if values is None else mx.array(values)


def _judgements(examples: Sequence[Example]) -> tuple[mx.array, mx.array]:
    """The values and the weights of all completions, float32[N] each."""
    value, importance = [], []
    for example in examples:
        count = len(example.completions)
        value += example.values or (0.0,) * count
        importance += (example.weight,) * count
    return mx.array(value, mx.float32), mx.array(importance, mx.float32)


def survey(
    loaded: LoadedModel,
    method: Method,
    parts: Sequence[Part],
    mismatched: Sequence[Part] = (),
    state: dict | None = None,
    *,
    training: bool = True,
) -> tuple[Whole, dict]:
    """What the parts of a step need to know of the whole, and the method's state after the step.

    `mismatched` are packs of the same prompts with completions of others, for methods that ask.
    """
    examples = [e for part in parts for e in part.batch.examples]
    length, state = mean_length(examples, method.scores_prompts), state or {}
    if method.coupling is None:
        return Whole(length, [None] * len(parts)), state
    seen = []
    for part in mismatched if method.coupling == "mismatched" else parts:
        scores = score_batch(loaded, method, part)
        mx.eval([x for x in scores if isinstance(x, mx.array)])
        seen.append(scores)
    contexts, state = method.couple(seen, state, training)
    if method.coupling == "mismatched":
        contexts = contexts * len(parts)
    return Whole(length, contexts), state


def mean_length(examples: Sequence[Example], prompts: bool = False) -> float:
    """Scored tokens of the first completion (with `prompts`, the prompt's too), by weight."""
    tokens = weights = 0.0
    for example in examples:
        count = example.scored_lengths[0] + (len(example.prompt) - 1 if prompts else 0)
        tokens += example.weight * count
        weights += example.weight
    return tokens / weights


def _numbers(loss: Loss) -> Totals:
    metrics = {k: (float(total), float(count)) for k, (total, count) in loss.metrics.items()}
    return Totals(float(loss.total), float(loss.weight), metrics)


def evaluate(loaded, method: Method, parts: Sequence[Part], whole: Whole) -> Totals:
    """The loss and metrics of all parts together, without gradients."""
    totals = NOTHING
    for part, context in zip(parts, whole.contexts, strict=True):
        loss = method(score_batch(loaded, method, part, whole.mean_length), context)
        mx.eval(loss)
        here = _numbers(loss)
        _check_finite(here.loss, loaded, method, [part], "the held-out loss")
        totals = totals.add(here)
    return totals


def gradient_batch(
    loaded, method: Method, part: Part, mean_length: float = 1.0, context=None
) -> tuple[Totals, dict]:
    """The loss and metrics of a pack, and the gradient of the loss's sum (not of its mean)."""
    parameters = loaded.model.trainable_parameters()

    def total(parameters):
        loaded.model.update(parameters)
        loss = method(score_batch(loaded, method, part, mean_length, gradient=True), context)
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
    parts: Sequence[Part],
    learning_rate: float,
    whole: Whole | None = None,
) -> tuple[Totals, float]:
    """Update the adapter once from all parts together; returns the totals and the gradient norm.

    `whole` is what `survey` found. Raises `NonFiniteError` naming examples, before anything is
    changed.
    """
    whole = whole or survey(loaded, method, parts)[0]
    totals, gradients = NOTHING, None
    for part, context in zip(parts, whole.contexts, strict=True):
        here, more = gradient_batch(loaded, method, part, whole.mean_length, context)
        _check_finite(here.loss, loaded, method, [part], "the loss")
        totals = totals.add(here)
        gradients = more if gradients is None else tree_map(mx.add, gradients, more)
        mx.eval(gradients)
        del more
    gradients = tree_map(lambda g: g / totals.weight, gradients)
    parameters, norm = optimizer.step(adapter.parameters(), gradients, learning_rate)
    _check_finite(norm.item(), loaded, method, parts, "the gradient")
    del gradients
    loaded.model.update(parameters)
    mx.eval(adapter.parameters())
    optimizer.evaluate()
    return totals, norm.item()


def _check_finite(value: float, loaded, method, parts: Sequence[Part], what: str) -> None:
    if np.isfinite(value):
        return
    culprits = []
    for batch in (part.batch for part in parts):
        if method.reads == "values":
            scores, owner = np.asarray(values(loaded, batch)), np.asarray(batch.owner)
        elif method.reads == "rewards":
            scores, owner = np.asarray(rewards(loaded, batch)), np.arange(batch.completions)
        else:
            scores, owner = np.asarray(token_log_probs(loaded, batch)[0]), np.asarray(batch.owner)
        bad = set(owner[~np.isfinite(scores)].tolist())
        owners = [e.origin for e in batch.examples for _ in e.completions]
        culprits += [owners[i] for i in sorted(bad)]
    names = list(dict.fromkeys(culprits)) or [
        e.origin for part in parts for e in part.batch.examples
    ]
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    blame = "these examples have scores that are not finite" if culprits else "in the batch of"
    raise NonFiniteError(
        f"{what} is {value} ({blame}: {listed}). Nothing was changed by this step; look at these "
        "rows, lower --learning-rate, or use --dtype float32."
    )
