"""What a loss sees, what it gives back, and the register of methods.

A method is one frozen dataclass: its fields are its settings, its docstring is its help, calling it
is its mathematics. `@method` enters it in the register, from which the command, the YAML keys, the
run record and the tests follow.

Losses give sums and counts, never means: the step adds them over packs and divides once, so a
result does not depend on how the examples were packed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import mlx.core as mx

from mlx_align.errors import SettingsError
from mlx_align.settings import Settings, setting


class Pairs(NamedTuple):
    """The scores of P pairs, chosen and rejected side by side; all float32[P]."""

    chosen: mx.array  # sum of log-probabilities over the completion's tokens
    rejected: mx.array
    ref_chosen: mx.array
    ref_rejected: mx.array
    chosen_length: mx.array  # scored tokens
    rejected_length: mx.array
    margin: mx.array  # by how much the data says the chosen one is better; 0 where it does not
    weight: mx.array  # how much the pair counts

    @property
    def chosen_ratio(self) -> mx.array:
        """log pi - log pi_ref of the chosen completions."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> mx.array:
        """log pi - log pi_ref of the rejected completions."""
        return self.rejected - self.ref_rejected


class Scores(NamedTuple):
    """What the model says of N completions with M scored tokens.

    token and ref_token are float32[M] log-probabilities under policy and reference (natural
    logarithm), hit is bool[M] (the token is the policy's first choice), owner int32[M] names the
    completion, weight float32[M] is 0 for padding. logp, ref_logp and length are float32[N], summed
    over the tokens. Without a reference the ref_ arrays are zeros.

    value, float32[N], is how good the data says a completion is, importance, float32[N], how much its
    example counts. mean_length is the mean number of scored tokens of an example's first completion
    over the whole optimizer step: dividing by it makes a sum over tokens, counted in examples, a mean
    over tokens. collision, float32[M], is log(sum p^2) over the vocabulary where a method asked for
    it; in_prompt, float32[M], is 1 for tokens of prompts (whose weight is 0), where those are scored;
    reward, float32[N], is a reward head's score, where there is one.

    Of sampled completions old_token, float32[M], is the log-probability under the policy that sampled
    them, and advantage, float32[M], how much better than expected a token turned out. For a critic
    these are the value now, the value when the completion was sampled, and the return.
    """

    token: mx.array
    ref_token: mx.array
    hit: mx.array
    owner: mx.array
    weight: mx.array
    logp: mx.array
    ref_logp: mx.array
    length: mx.array
    value: mx.array
    importance: mx.array
    mean_length: float = 1.0
    collision: mx.array | None = None
    in_prompt: mx.array | None = None
    reward: mx.array | None = None
    old_token: mx.array | None = None
    advantage: mx.array | None = None

    @classmethod
    def of(
        cls,
        token,
        hit,
        owner,
        weight,
        completions: int,
        ref_token=None,
        *,
        value=None,
        importance=None,
        mean_length: float = 1.0,
        collision=None,
        in_prompt=None,
    ) -> "Scores":
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
            mx.zeros((completions,)) if value is None else value,
            mx.ones((completions,)) if importance is None else importance,
            mean_length,
            collision,
            in_prompt,
        )

    @classmethod
    def of_rewards(cls, reward, value, importance) -> "Scores":
        """The scores of a reward head alone; there are no tokens."""
        nothing, none = mx.zeros((0,)), mx.zeros(reward.shape)
        return cls(*[nothing] * 5, none, none, none, value, importance, reward=reward)

    @property
    def mean_logp(self) -> mx.array:
        """Mean log-probability of a token, by completion."""
        return self.logp / mx.maximum(self.length, 1)

    def pairs(self) -> Pairs:
        """Completions 2i and 2i+1 as chosen and rejected of pair i."""
        return Pairs(
            self.logp[0::2],
            self.logp[1::2],
            self.ref_logp[0::2],
            self.ref_logp[1::2],
            self.length[0::2],
            self.length[1::2],
            self.value[0::2] - self.value[1::2],
            self.importance[0::2],
        )

    def scaled(self, factor: mx.array) -> "Scores":
        """The same with every token's log-probability times `factor` [M] in the sums."""
        zeros = mx.zeros_like(self.logp)
        factor = factor * self.weight
        return self._replace(
            logp=zeros.at[self.owner].add(self.token * factor),
            ref_logp=zeros.at[self.owner].add(self.ref_token * factor),
        )

    def place(self) -> mx.array:
        """The place of each token in its completion, counted from 0; int32[M]."""
        starts = mx.cumsum(self.length) - self.length
        return mx.arange(self.owner.size) - starts.astype(mx.int32)[self.owner]

    def stopped(self) -> "Scores":
        """The same numbers, through which no gradient flows."""
        return Scores(*(mx.stop_gradient(x) if isinstance(x, mx.array) else x for x in self))


class Loss(NamedTuple):
    """total / weight is the loss; every metric is a (sum, count) pair of its own."""

    total: mx.array
    weight: mx.array
    metrics: dict[str, tuple[mx.array, mx.array]]


@dataclasses.dataclass(frozen=True)
class Method(Settings):
    """Base class of all methods; the class attributes are set by `@method`."""

    name: ClassVar[str] = ""
    data: ClassVar[str] = ""  # "pairs", "labels", "completions" or "prompts"
    learning_rate: ClassVar[float] = 1e-5
    source: ClassVar[str] = ""
    # What logits are divided by before they are scored: the temperature of the sampling.
    temperature: ClassVar[float] = 1.0
    # The held-out metric that tells the best checkpoint, and whether it is to rise.
    monitor: ClassVar[tuple[str, bool]] = ("loss", False)
    # Whether to stop where a reward looks hacked; a setting of the methods that have rewards.
    stop_on_hacking: ClassVar[bool] = False
    # Show what was sampled every n steps, likewise.
    show_every: ClassVar[int] = 0
    # What the model gives: "tokens" (log-probabilities), or by a scalar head "rewards" (of completions)
    # or "values" (of states).
    reads: ClassVar[str] = "tokens"
    # What the loss of a part of the optimizer step needs to know of the whole: nothing (None), the
    # scores of all its examples ("batch"), or those of their prompts with completions of other
    # prompts ("mismatched"). Without gradients; `couple` makes of them what the parts are given.
    coupled: ClassVar[str | None] = None

    @property
    def uses_reference(self) -> bool:
        """Whether the loss compares the policy with a reference."""
        return False

    @property
    def needs_collision(self) -> bool:
        """Whether the loss needs log(sum p^2) of every token."""
        return False

    @property
    def scores_prompts(self) -> bool:
        """Whether the loss needs the log-probabilities of the prompts' tokens, too."""
        return False

    @property
    def needs_margin(self) -> bool:
        """Whether every pair must come with a margin."""
        return False

    def advice(self, values: Sequence[float]) -> list[str]:
        """What to warn of before training; `values` are those of all training completions."""
        return []

    @property
    def coupling(self) -> str | None:
        """`coupled`, as the settings have it."""
        return self.coupled

    def couple(
        self, parts: Sequence[Scores], state: dict, training: bool = True
    ) -> tuple[list, dict]:
        """What each part's loss is given of the whole step, and the run's state after it.

        `state` holds plain JSON numbers that are saved with the checkpoints; it is empty at first.
        Without `training` the parts are held-out data, from which nothing is learnt.
        """
        return [None] * len(parts), state

    def __call__(self, scores: Scores, context=None) -> Loss:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Referenced(Method):
    """Settings of all methods that hold the policy to a reference."""

    reference: str = setting(
        "start",
        "What the policy is held to: start (the model as it is when training starts), none, or "
        "another model, adapter or run with the same vocabulary.",
    )
    sync_every: int = setting(
        0, "Move the reference towards the policy every n steps; 0 for never (TR-DPO).", minimum=0
    )
    sync_weight: float = setting(
        0.6,
        "How far the reference moves: reference = w * policy + (1 - w) * reference, of the weights.",
        above=0,
        maximum=1,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.sync_every and self.reference != "start":
            raise SettingsError(
                "sync_every: only the reference that training starts from can follow the policy; leave "
                "out --reference"
            )

    @property
    def uses_reference(self) -> bool:
        return self.reference != "none"


METHODS: dict[str, type[Method]] = {}


def method(name: str, *, data: str, learning_rate: float, source: str) -> Callable[[type], type]:
    """Register a method class under its command name.

    `data` is what it learns from ("pairs", "labels", "completions" or "prompts"), `learning_rate` its
    default for LoRA, `source` the paper.
    """

    def register(cls):
        cls.name, cls.data = name, data
        cls.learning_rate, cls.source = learning_rate, source
        METHODS[name] = cls
        return cls

    return register


def log_sigmoid(x: mx.array) -> mx.array:
    """log(1 / (1 + exp(-x))) without overflow."""
    return -mx.logaddexp(mx.zeros_like(x), -x)


def mean_of(values: mx.array) -> tuple[mx.array, mx.array]:
    """A metric that averages `values`; no gradient flows through it."""
    return mx.stop_gradient(values).astype(mx.float32).sum(), mx.array(float(values.size))


def mean_where(values: mx.array, chosen: mx.array) -> tuple[mx.array, mx.array]:
    """A metric that averages `values` where `chosen` (bool) holds."""
    chosen = chosen.astype(mx.float32)
    return (mx.stop_gradient(values) * chosen).sum(), chosen.sum()
