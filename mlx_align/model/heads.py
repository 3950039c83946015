"""The vocabulary head of an mlx-lm model: found by watching, not by name.

mlx-lm models return logits. Training wants the hidden states before the head, because only some
rows need logits and never all at once. So the head is tapped: while a tap is on, the head hands
over its input and returns next to nothing. What the model does to logits behind the head (a scale,
a soft cap) is measured once by letting the tap return known values.
"""

import contextlib
import functools
import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_align.errors import ModelError
from mlx_align.kernels.token_log_prob import (
    Projection,
    TokenScores,
    frozen_log_probs,
    trained_log_probs,
)


class Tap:
    """What a tapped head saw and what it answers."""

    def __init__(self, answer=None):
        self.hidden = None
        self.answer = answer

    def __call__(self, hidden):
        self.hidden = hidden
        return hidden[..., :1] if self.answer is None else self.answer


@functools.cache
def _tapped_class(cls, method: str):
    def tapped(self, hidden, *args, **kwargs):
        return self._tap(hidden)

    return type(f"Tapped{cls.__name__}", (cls,), {method: tapped})


@contextlib.contextmanager
def _tapped(module, method, tap):
    original = type(module)
    module.__class__ = _tapped_class(original, method)
    object.__setattr__(module, "_tap", tap)
    try:
        yield tap
    finally:
        module.__class__ = original
        object.__delattr__(module, "_tap")


@dataclass(eq=False)
class Head:
    """The module that makes logits, by its place in the model, how it is called, and what follows."""

    parent: nn.Module
    key: str
    method: str  # "__call__" of a linear layer or "as_linear" of a tied embedding
    scale: float = 1.0
    softcap: float | None = None

    @property
    def module(self) -> nn.Module:
        """What stands there now: the base's layer or, while an adapter is worn, an adapted one."""
        return self.parent[self.key]

    def tapped(self):
        """While this is open, the model stops at the head; the tap's `hidden` is what it was given."""
        return _tapped(self.module, self.method, Tap())

    def log_probs(
        self,
        hidden,
        targets,
        *,
        gradient: bool,
        moments: bool = False,
        temperature: float = 1.0,
    ) -> TokenScores:
        """The scores of targets int[M] given hidden [M, D], of the logits divided by `temperature`."""
        projection = self._projection(temperature)
        if projection is not None:
            return frozen_log_probs(hidden, targets, projection, gradient=gradient, moments=moments)

        def logits(parameters, hidden):
            return self._logits(parameters, hidden) / temperature

        parameters = self.module.trainable_parameters()
        vocabulary = self._logits(parameters, hidden[:1]).shape[-1]
        try:
            return trained_log_probs(
                hidden, targets, parameters, logits, vocabulary, moments=moments
            )
        finally:
            self.module.update(parameters)

    def logits(self, hidden) -> mx.array:
        """All logits of hidden states, float32, as the model gives them."""
        z = getattr(self.module, self.method)(hidden).astype(mx.float32) * self.scale
        return mx.tanh(z / self.softcap) * self.softcap if self.softcap else z

    def _logits(self, parameters, hidden):
        self.module.update(parameters)
        return self.logits(hidden)

    def _projection(self, temperature: float) -> Projection | None:
        """The head as a frozen matrix, or None where it is trained or is more than a matrix."""
        module = self.module
        if tree_flatten(module.trainable_parameters()):
            return None
        quantised = isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)
        if not quantised and type(module) not in (nn.Linear, nn.Embedding):
            return None
        quantisation = None
        if quantised:
            quantisation = (
                module.scales, module.get("biases"), module.group_size, module.bits, module.mode
            )  # fmt: skip
        return Projection(
            module.weight,
            quantisation,
            module.get("bias"),
            self.scale,
            self.softcap,
            temperature,
        )


def find_head(model: nn.Module) -> Head | None:
    """The head of a model, or None where it is not a linear layer or does more than scale and cap."""
    in_blocks = {id(m) for block in model.layers for m in block.modules()}
    candidates = []
    places = [(parent, key) for parent in model.modules() for key in parent]
    for parent, key in places:
        module = parent[key]
        if not isinstance(module, nn.Module) or id(module) in in_blocks:
            continue
        if hasattr(module, "as_linear"):
            candidates.append((parent, key, "as_linear"))
        elif isinstance(module, nn.Linear | nn.QuantizedLinear) or hasattr(module, "lora_a"):
            candidates.append((parent, key, "__call__"))
    values = np.concatenate([[1e-3, 1.0, 1e9], np.linspace(-40, 40, 13)]).astype(np.float32)
    answer = mx.array(np.tile(values, (1, 2, 1)))
    found = []
    for place in candidates:
        # What is asked but is no head (Gemma 4 projects embeddings) cannot go on with such an answer.
        with (
            _tapped(place[0][place[1]], place[2], Tap(answer)) as tap,
            contextlib.suppress(TypeError, ValueError, IndexError),
        ):
            out = model(mx.array([[0, 1]]))
            if tap.hidden is not None and out.shape == answer.shape:
                found.append((place, out))
    if len(found) != 1:
        return None
    place, out = found[0]
    y = np.asarray(out[0, -1].astype(mx.float32), np.float64)
    scale, top = float(y[0] / values[0]), float(y[2])
    # The test value 1e9 comes back whole from a scale, and as the cap from a soft cap.
    softcap = None if abs(top) > 1e6 * abs(scale) else top
    z = values.astype(np.float64) * scale
    expected = z if softcap is None else softcap * np.tanh(z / softcap)
    if not all(map(math.isfinite, (scale, top))) or not np.allclose(
        y, expected, rtol=1e-3, atol=1e-4
    ):
        return None
    return Head(*place, _round(scale), None if softcap is None else _round(softcap))


class RewardHead(nn.Module):
    """reward = hidden @ weight.T, one number for each hidden state; float32.

    It starts as small random numbers of deviation 1 / (D + 1), so that the first loss is near log 2.
    """

    def __init__(self, width: int):
        super().__init__()
        self.weight = mx.random.normal((1, width)) / (width + 1)

    def __call__(self, hidden):
        return (hidden.astype(mx.float32) @ self.weight.T)[..., 0]


def attach_reward_head(model: nn.Module, head: Head | None, seed: int = 0) -> RewardHead:
    """Put a fresh reward head on a model, as its part `score` (transformers' name for it)."""
    if head is None:
        raise ModelError(
            "this model's vocabulary head is of an unknown kind, so the hidden states that a reward "
            "head reads cannot be found"
        )
    with head.tapped() as tap:
        model(mx.array([[0]]))
    mx.random.seed(seed)
    model.score = RewardHead(tap.hidden.shape[-1])
    return model.score


def _round(value: float) -> float:
    """The value without the rounding noise of the measurement."""
    return float(f"{value:.6g}")
