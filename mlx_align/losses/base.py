"""What a loss sees, what it gives back, and the register of methods.

A method is one frozen dataclass: its fields are its settings, its docstring is its help, calling it
is its mathematics. `@method` enters it in the register, from which the command, the YAML keys, the
run record and the tests follow.

Losses give sums and counts, never means: the step adds them over packs and divides once, so a
result does not depend on how the examples were packed.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from mlx_align.settings import Settings


class Pairs(NamedTuple):
    """The scores of P pairs, chosen and rejected side by side; all float32[P]."""

    chosen: mx.array  # sum of log-probabilities over the completion's tokens
    rejected: mx.array
    ref_chosen: mx.array
    ref_rejected: mx.array
    chosen_length: mx.array  # scored tokens
    rejected_length: mx.array


class Scores(NamedTuple):
    """What the model says of N completions with M scored tokens.

    token and ref_token are float32[M] log-probabilities under policy and reference (natural
    logarithm), hit is bool[M] (the token is the policy's first choice), owner int32[M] names the
    completion, weight float32[M] is 0 for padding. logp, ref_logp and length are float32[N], summed
    over the tokens. Without a reference the ref_ arrays are zeros.
    """

    token: mx.array
    ref_token: mx.array
    hit: mx.array
    owner: mx.array
    weight: mx.array
    logp: mx.array
    ref_logp: mx.array
    length: mx.array

    @classmethod
    def of(cls, token, hit, owner, weight, completions: int, ref_token=None) -> "Scores":
        """Sum token scores into completions."""
        ref_token = mx.zeros_like(token) if ref_token is None else ref_token

        def per_completion(values):
            return mx.zeros((completions,)).at[owner].add(values)

        return cls(
            token,
            ref_token,
            hit,
            owner,
            weight,
            per_completion(token * weight),
            per_completion(ref_token * weight),
            per_completion(weight),
        )

    def pairs(self) -> Pairs:
        """Completions 2i and 2i+1 as chosen and rejected of pair i."""
        return Pairs(
            self.logp[0::2],
            self.logp[1::2],
            self.ref_logp[0::2],
            self.ref_logp[1::2],
            self.length[0::2],
            self.length[1::2],
        )


class Loss(NamedTuple):
    """total / weight is the loss; every metric is a (sum, count) pair of its own."""

    total: mx.array
    weight: mx.array
    metrics: dict[str, tuple[mx.array, mx.array]]


@dataclasses.dataclass(frozen=True)
class Method(Settings):
    """Base class of all methods; `name` and the rest are set by `@method`."""

    name = ""
    data = ""  # "pairs" or "completions"
    uses_reference = False
    learning_rate = 1e-5
    better = "lower"  # the direction of `monitor` that is better
    monitor = "loss"

    def __call__(self, scores: Scores) -> Loss:
        raise NotImplementedError


METHODS: dict[str, type[Method]] = {}


def method(
    name: str,
    *,
    data: str,
    reference: bool,
    learning_rate: float,
    source: str,
) -> Callable[[type], type]:
    """Register a method class under its command name.

    `data` is what it learns from ("pairs" or "completions"), `learning_rate` its default for LoRA,
    `source` the paper.
    """

    def register(cls):
        cls.name, cls.data, cls.uses_reference = name, data, reference
        cls.learning_rate, cls.source = learning_rate, source
        METHODS[name] = cls
        return cls

    return register


def log_sigmoid(x: mx.array) -> mx.array:
    """log(1 / (1 + exp(-x))) without overflow."""
    return -mx.logaddexp(mx.zeros_like(x), -x)


def mean_of(values: mx.array) -> tuple[mx.array, mx.array]:
    """A metric that averages `values`."""
    return values.sum(), mx.array(float(values.size))
