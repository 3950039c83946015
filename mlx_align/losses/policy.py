"""Losses on completions that the policy sampled itself: GRPO and its family, RLOO, REINFORCE++.

Notation: rho = exp(log pi - log pi_old) of a token, A its advantage, e the clip. What is sampled, how it
is rewarded and how rewards become advantages is the business of `rollout`; a method only says which.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from mlx_align.errors import SettingsError
from mlx_align.losses.base import Loss, Method, Scores, method
from mlx_align.settings import setting


@dataclass(frozen=True)
class Online(Method):
    """Settings of all methods that learn from what they sample."""

    reward: tuple[str, ...] = setting(
        (),
        "What completions are rewarded by: the run of a reward model, my_rewards.py:function, a "
        "built-in verifier (see mlx-align verifiers), or judge:MODEL, each with a weight like gsm8k*2.",
    )
    reward_clip: float | None = setting(
        None, "Hold the sum of rewards between minus this and this.", above=0
    )
    watch: tuple[str, ...] = setting(
        (),
        "Further rewards, measured on held-out prompts and never trained on. They say which checkpoint "
        "is the best, and a reward that rises while they fall is reported as hacked.",
    )
    kl_budget: float | None = setting(
        None,
        "KL of a completion to the reference, in nats, beyond which the run is reported.",
        above=0,
    )
    stop_on_hacking: bool = setting(
        False,
        "Stop with a checkpoint as soon as the reward looks hacked or the KL budget is spent.",
    )
    max_tokens: int = setting(
        256,
        "Longest completion in tokens.",
        minimum=1,
        aliases=("max_completion_length", "max_new_tokens"),
    )
    stop: tuple[str, ...] = setting(
        (), "Texts that end a completion, besides the model's own end-of-turn tokens."
    )
    temperature: float = setting(1.0, "Temperature of the sampling.", above=0)
    top_p: float = setting(
        1.0,
        "Sample from the most likely tokens of this total. Below 1 the samples are not the policy's, "
        "and the gradient is biased.",
        above=0,
        maximum=1,
    )
    top_k: int = setting(
        0, "Sample from the k most likely tokens; 0 for all. Biased as --top-p is.", minimum=0
    )
    iterations: int = setting(1, "Passes over the samples of a step.", minimum=1)
    minibatches: int = setting(1, "Optimizer steps in each pass.", minimum=1)
    beta: float = setting(
        0.0, "Weight of the KL to the reference; 0 needs no reference.", minimum=0
    )
    reference: str = setting(
        "start",
        "What the KL is taken to: start (the model as it is when training starts), or another model, "
        "adapter or run with the same vocabulary.",
    )
    unfinished_penalty: float = setting(
        0.0, "Taken off the reward of a completion that did not end by itself.", minimum=0
    )
    show_every: int = setting(
        10, "Show a sample with its reward every n steps; 0 for never.", minimum=0
    )

    # How rewards become advantages: "group", "leave-one-out", "return" or "gae"; or "pairs", where
    # samples become chosen and rejected ones.
    advantage: ClassVar[str] = "group"
    # Completions of a prompt.
    group_size: ClassVar[int] = 2
    # Who writes the last completion of a prompt: the policy like the others ("policy"), the reference,
    # or the geometric mixture of both ("mixture").
    opponent: ClassVar[str] = "policy"
    # What only some methods have as settings.
    dynamic_sampling: ClassVar[bool] = False
    kl_target: ClassVar[float | None] = None

    @property
    def monitor(self) -> tuple[str, bool]:
        return ("watch" if self.watch else "reward", True)

    @property
    def uses_reference(self) -> bool:
        return self.beta > 0 or self.kl_budget is not None

    @property
    def needs_group(self) -> bool:
        """Whether a single sample of a prompt teaches nothing."""
        return self.advantage in ("group", "leave-one-out")

    def __post_init__(self):
        super().__post_init__()
        if self.needs_group and self.group_size < 2:
            raise SettingsError(
                "group_size: must be at least 2; with one sample every advantage is 0"
            )

    def advice(self, values: Sequence[float]) -> list[str]:
        """Sampling that is cut makes the log-probabilities those of another distribution."""
        if self.top_p == 1 and not self.top_k:
            return []
        return [
            "--top-p and --top-k leave words out of the sampling that the log-probabilities count: the "
            "KL may turn negative, and the gradient is biased. --temperature alone does neither."
        ]

    def kl_loss(self, scores: Scores) -> mx.array:
        """beta * k3 of every token, with its gradient (Schulman 2020, Approximating KL divergence)."""
        difference = scores.ref_token - scores.token
        return self.beta * (mx.expm1(difference) - difference)

    def policy_metrics(self, scores: Scores, ratio: mx.array, low: float, high: float) -> dict:
        """What TRL reports of an update, all means over tokens."""
        tokens, step = scores.weight.sum(), scores.token - scores.old_token
        below = (ratio < 1 - low) & (scores.advantage < 0)
        above = (ratio > 1 + high) & (scores.advantage > 0)
        values = {
            "clip_ratio/low_mean": below,
            "clip_ratio/high_mean": above,
            "clip_ratio/region_mean": below | above,
            "policy/approxkl_avg": 0.5 * mx.square(step),
            "val/ratio": ratio,
        }
        if self.uses_reference:
            difference = scores.ref_token - scores.token
            values["kl"] = mx.expm1(difference) - difference
        return {
            name: (mx.stop_gradient(value * scores.weight).sum(), tokens)
            for name, value in values.items()
        }


@dataclass(frozen=True)
class Clipped(Online):
    """What the methods share that hold the new policy near the one that sampled (PPO's clip)."""

    group_size: int = setting(8, "Completions sampled for each prompt.", minimum=1)
    epsilon: float = setting(
        0.2, "How far the ratio of new and old probability counts.", above=0, below=1
    )
    epsilon_high: float | None = setting(
        None,
        "The same upwards, where it differs (clip-higher, DAPO, Yu et al. 2025, arXiv:2503.14476: "
        "0.28).",
        above=0,
    )
    delta: float | None = setting(
        None,
        "Largest ratio that counts at all, against negative advantages that explode (two-sided clip, "
        "INTELLECT-2, arXiv:2505.07291); above 1 + epsilon.",
        above=1,
    )
    mask_unfinished: bool = setting(
        False, "Leave completions out of the loss that did not end within --max-tokens."
    )

    @property
    def bounds(self) -> tuple[float, float]:
        """How far down and up the ratio counts."""
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return self.epsilon, high

    def clipped(self, ratio: mx.array, advantage: mx.array) -> mx.array:
        """-min(rho A, clip(rho) A), of tokens or of sequences."""
        low, high = self.bounds
        free = ratio if self.delta is None else mx.minimum(ratio, self.delta)
        return -mx.minimum(free * advantage, mx.clip(ratio, 1 - low, 1 + high) * advantage)

    def __call__(self, scores: Scores, context=None) -> Loss:
        """The clipped loss, the mean over tokens; what PPO and REINFORCE++ have."""
        ratio = mx.exp(scores.token - scores.old_token)
        losses = self.clipped(ratio, scores.advantage) * scores.weight
        metrics = self.policy_metrics(scores, ratio, *self.bounds)
        return Loss(losses.sum(), scores.weight.sum(), metrics)


def by_completion(values: mx.array, scores: Scores) -> mx.array:
    """The sum of a token's values over each completion, float32[N]."""
    return mx.zeros_like(scores.length).at[scores.owner].add(values * scores.weight)


def mean_by_completion(values: mx.array, scores: Scores) -> mx.array:
    """The mean of a token's values over each completion, float32[N]; 0 where none counts."""
    return by_completion(values, scores) / mx.maximum(scores.length, 1)


@method(
    "grpo",
    data="prompts",
    learning_rate=1e-5,
    source="Shao et al. 2024, arXiv:2402.03300, equation 3",
)
@dataclass(frozen=True)
class GRPO(Clipped):
    """Group relative policy optimization: completions of one prompt are judged against each other.

    loss = - min(rho A, clip(rho, 1 - e, 1 + e) A) + beta * k3, aggregated over tokens. A is the reward's
    distance from the group's mean, in the group's standard deviations. The loss itself starts at 0 and
    stays near it; watch the reward.
    """

    scale_rewards: str = setting(
        "group",
        "What advantages are divided by: the group's standard deviation, the batch's, or nothing (Dr. "
        "GRPO, Liu et al. 2025, arXiv:2503.20783).",
        choices=("group", "batch", "none"),
    )
    aggregation: str = setting(
        "dapo",
        "Mean over all tokens of the step (dapo, bnpo), over completions of means over tokens (grpo), or "
        "sums over tokens by the greatest length (dr-grpo).",
        choices=("dapo", "bnpo", "grpo", "dr-grpo"),
    )
    objective: str = setting(
        "clip",
        "clip (PPO's); gspo, one ratio for a whole completion (Zheng et al. 2025, arXiv:2507.18071); "
        "cispo, the ratio as a capped weight (MiniMax 2025, arXiv:2506.13585); or sapo, a soft gate (Gao "
        "et al. 2025, arXiv:2511.20347).",
        choices=("clip", "gspo", "cispo", "sapo"),
    )
    cap: float = setting(5.0, "CISPO's largest ratio (the cap itself, not 1 + epsilon).", above=0)
    dynamic_sampling: bool = setting(
        False,
        "Sample further prompts in the place of those whose completions are all rewarded alike (DAPO), "
        "up to three times.",
    )

    def __call__(self, scores: Scores, context=None) -> Loss:
        log_ratio, advantage = scores.token - scores.old_token, scores.advantage
        ratio = mx.exp(log_ratio)
        match self.objective:
            case "clip":
                losses = self.clipped(ratio, advantage)
            case "gspo":
                ratio = mx.exp(mean_by_completion(log_ratio, scores))[scores.owner]
                losses = self.clipped(ratio, advantage)
            case "cispo":
                weight = mx.stop_gradient(mx.minimum(ratio, self.cap))
                losses = -weight * advantage * scores.token
            case "sapo":
                tau = mx.where(advantage > 0, 1.0, 1.05)
                losses = -(4 / tau) * mx.sigmoid(tau * (ratio - 1)) * advantage
        if self.beta:
            losses = losses + self.kl_loss(scores)
        total, weight = self.aggregate(losses, scores)
        return Loss(total, weight, self.policy_metrics(scores, ratio, *self.bounds))

    def aggregate(self, losses: mx.array, scores: Scores) -> tuple[mx.array, mx.array]:
        """Numerator and denominator of the loss."""
        if self.aggregation in ("dapo", "bnpo"):
            return (losses * scores.weight).sum(), scores.weight.sum()
        if self.aggregation == "grpo":
            counted = (scores.length > 0).astype(mx.float32)
            return mean_by_completion(losses, scores).sum(), counted.sum()
        return (losses * scores.weight).sum() / self.max_tokens, mx.array(float(scores.length.size))


@method(
    "rloo",
    data="prompts",
    learning_rate=1e-5,
    source="Ahmadian et al. 2024, arXiv:2402.14740, equation 8",
)
@dataclass(frozen=True)
class RLOO(Clipped):
    """REINFORCE leave-one-out: the other completions of a prompt are the baseline.

    loss = - min(rho A, clip(rho, 1 - e, 1 + e) A) with rho of whole completions, the mean over
    completions. A is the reward minus the mean of the others; the KL, beta * sum of (log pi_old - log
    pi_ref), is taken off the reward.
    """

    group_size: int = setting(4, "Completions sampled for each prompt.", minimum=1)
    beta: float = setting(
        0.05, "Weight of the KL to the reference; 0 needs no reference.", minimum=0
    )

    advantage: ClassVar[str] = "leave-one-out"

    def __call__(self, scores: Scores, context=None) -> Loss:
        ratio = mx.exp(by_completion(scores.token - scores.old_token, scores))
        # All tokens of a completion have the advantage of the completion.
        advantage = mean_by_completion(scores.advantage, scores)
        counted = (scores.length > 0).astype(mx.float32)
        total = (self.clipped(ratio, advantage) * counted).sum()
        metrics = self.policy_metrics(scores, ratio[scores.owner], *self.bounds)
        return Loss(total, counted.sum(), metrics)


@method("reinforce++", data="prompts", learning_rate=1e-5, source="Hu 2025, arXiv:2501.03262")
@dataclass(frozen=True)
class ReinforcePlusPlus(Clipped):
    """REINFORCE++: PPO's clip and per-token KL without a critic.

    loss = - min(rho A, clip(rho, 1 - e, 1 + e) A), the mean over tokens. A is the reward to go, with the
    score on the last token and -beta (log pi_old - log pi_ref) on every token, whitened over the step.
    """

    group_size: int = setting(1, "Completions sampled for each prompt.", minimum=1)
    beta: float = setting(
        0.01, "Weight of the KL to the reference; 0 needs no reference.", minimum=0
    )

    advantage: ClassVar[str] = "return"


@method(
    "ppo",
    data="prompts",
    learning_rate=1e-5,
    source="Schulman et al. 2017, arXiv:1707.06347; Ouyang et al. 2022, arXiv:2203.02155",
)
@dataclass(frozen=True)
class PPO(Clipped):
    """Proximal policy optimization: a critic says what was to be expected of every token.

    loss = - min(rho A, clip(rho, 1 - e, 1 + e) A), the mean over tokens. A is the generalised advantage
    estimate, whitened over the step, of rewards that hold the score on the last token and -beta (log
    pi_old - log pi_ref) on every token. Policy, critic and reference are one base in memory, with
    adapters; so is a reward model on the same base.
    """

    group_size: int = setting(1, "Completions sampled for each prompt.", minimum=1)
    beta: float = setting(
        0.05, "Weight of the KL to the reference; 0 needs no reference.", minimum=0
    )
    kl_target: float | None = setting(
        None,
        "KL of a completion, in nats, that beta is adapted to hold (Ziegler et al. 2019, "
        "arXiv:1909.08593, section 2.2).",
        above=0,
    )
    iterations: int = setting(4, "Passes over the samples of a step.", minimum=1)
    gamma: float = setting(1.0, "Discount of later rewards.", above=0, maximum=1)
    gae_lambda: float = setting(
        0.95, "How far advantages look ahead: 1 to the end, 0 one token.", minimum=0, maximum=1
    )
    value_clip: float = setting(
        0.2, "How far the critic may move from its values at sampling.", above=0
    )
    critic_start: str = setting(
        "reward",
        "What the critic begins as: the reward model, where there is one on the same base (reward), or "
        "the bare model (policy).",
        choices=("reward", "policy"),
    )
    critic_rate: float = setting(
        5.0, "The critic's learning rate, as a multiple of the policy's.", above=0
    )

    advantage: ClassVar[str] = "gae"


@dataclass(frozen=True)
class Critic(Method):
    """The value of a state is learnt from the returns that followed it (PPO's critic).

    loss = max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2, the mean over tokens.
    """

    clip: float = setting(0.2, "How far a value may move from the one at sampling.", above=0)

    reads: ClassVar[str] = "values"

    def __call__(self, scores: Scores, context=None) -> Loss:
        value, old, returns = scores.token, scores.old_token, scores.advantage
        held = mx.clip(value, old - self.clip, old + self.clip)
        free, bound = mx.square(value - returns), mx.square(held - returns)
        losses = 0.5 * mx.maximum(free, bound) * scores.weight
        tokens = scores.weight.sum()
        metrics = {
            "loss/value_avg": (mx.stop_gradient(losses).sum(), tokens),
            "val/clipfrac_avg": (((bound > free) * scores.weight).sum(), tokens),
        }
        return Loss(losses.sum(), tokens, metrics)
