"""Losses on single completions that were judged good or bad: KTO and BCO.

Notation: r is the log-ratio log pi - log pi_ref of a completion, summed over its tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from mlx_align.losses.base import (
    Loss,
    Referenced,
    Scores,
    log_sigmoid,
    mean_of,
    mean_where,
    method,
)
from mlx_align.settings import setting


@dataclass(frozen=True)
class LabelMethod(Referenced):
    """What both share: the metrics, and a mean over examples."""

    beta: float = setting(
        0.1, "Strength of the pull to the reference: higher stays closer to it.", above=0
    )

    def summed(self, scores: Scores, losses: mx.array, metrics: dict) -> Loss:
        """The loss from one value for each example, with TRL's metrics of both classes."""
        reward, good = self.beta * (scores.logp - scores.ref_logp), scores.value > 0.5
        bad = mx.logical_not(good)
        metrics = {
            **metrics,
            "rewards/chosen": mean_where(reward, good),
            "rewards/rejected": mean_where(reward, bad),
            "logps/chosen": mean_where(scores.logp, good),
            "logps/rejected": mean_where(scores.logp, bad),
            "lengths/chosen": mean_where(scores.length, good),
            "lengths/rejected": mean_where(scores.length, bad),
        }
        return Loss((losses * scores.importance).sum(), scores.importance.sum(), metrics)


@method(
    "kto",
    data="labels",
    learning_rate=1e-5,
    source="Ethayarajh et al. 2024, arXiv:2402.01306",
)
@dataclass(frozen=True)
class KTO(LabelMethod):
    """Kahneman-Tversky optimization on completions judged good or bad, one by one.

    loss = w_D (1 - sigmoid(beta (r - z))) of good and w_U (1 - sigmoid(beta (z - r))) of bad
    completions, the mean over examples. z = max(0, mean r of prompts with completions of other
    prompts), over the whole optimizer step and without gradient. Class weights are to make w_D n_D :
    w_U n_U lie between 1 and 4/3.
    """

    desirable_weight: float = setting(1.0, "w_D, the weight of good completions.", minimum=0)
    undesirable_weight: float = setting(1.0, "w_U, the weight of bad completions.", minimum=0)
    kl: bool = setting(
        True,
        "Estimate z. Without it z is 0, which saves a pass and is APO-zero for single completions "
        "(D'Oosterlinck et al. 2024).",
    )

    coupled: ClassVar[str | None] = "mismatched"

    def advice(self, values):
        good = sum(1 for value in values if value > 0.5)
        bad = len(values) - good
        weight = self.desirable_weight, self.undesirable_weight
        if not (good and bad):
            return [
                f"all {len(values)} completions are {'good' if good else 'bad'}: KTO needs both kinds"
            ]
        ratio = weight[0] * good / (weight[1] * bad) if weight[1] else float("inf")
        if 1 <= ratio <= 4 / 3:
            return []
        # The range that the paper recommends, for one weight with the other as it is.
        lower, upper = (weight[1] * bad * r / good for r in (1, 4 / 3))
        other = (weight[0] * good / (bad * r) for r in (4 / 3, 1))
        return [
            f"{good} good completions at weight {weight[0]:g} stand against {bad} bad ones at "
            f"{weight[1]:g}: a ratio of {ratio:.2f}, and KTO works best between 1 and 1.33. Use "
            f"--desirable-weight {lower:.2f} to {upper:.2f}, or --undesirable-weight "
            + " to ".join(f"{w:.2f}" for w in other)
            + ", not both"
        ]

    @property
    def coupling(self) -> str | None:
        return self.coupled if self.kl else None

    def couple(self, parts, state, training=True):
        if not self.kl or not parts:
            return [mx.array(0.0)], state
        ratios = mx.concatenate([part.logp - part.ref_logp for part in parts])
        return [mx.maximum(ratios.mean(), 0)], state

    def __call__(self, scores: Scores, context=None) -> Loss:
        z = mx.array(0.0) if context is None else context
        good = scores.value > 0.5
        ratio = scores.logp - scores.ref_logp
        x = self.beta * mx.where(good, ratio - z, z - ratio)
        weight = mx.where(good, self.desirable_weight, self.undesirable_weight)
        losses = weight * (1 - mx.sigmoid(x))
        metrics = {"kl": mean_of(mx.broadcast_to(z, scores.logp.shape))}
        return self.summed(scores, losses, metrics)


@method(
    "bco",
    data="labels",
    learning_rate=1e-5,
    source="Jung et al. 2024, arXiv:2404.04656",
)
@dataclass(frozen=True)
class BCO(LabelMethod):
    """Binary classifier optimization: is a completion good, by its reward against a running mean?

    loss = - log sigmoid(beta r - delta) of good and - log sigmoid(delta - beta r) of bad completions,
    the mean over examples. delta is the mean reward of all completions seen so far in training, this
    step's among them.
    """

    coupled: ClassVar[str | None] = "batch"

    def couple(self, parts, state, training=True):
        if not training:
            return [state.get("total", 0.0) / max(state.get("count", 0), 1)] * len(parts), state
        rewards = mx.concatenate([self.beta * (part.logp - part.ref_logp) for part in parts])
        count = state.get("count", 0) + rewards.size
        total = state.get("total", 0.0) + rewards.sum().item()
        return [total / count] * len(parts), {"count": count, "total": total}

    def __call__(self, scores: Scores, context=None) -> Loss:
        delta = 0.0 if context is None else context
        x = self.beta * (scores.logp - scores.ref_logp) - delta
        losses = -log_sigmoid(mx.where(scores.value > 0.5, x, -x))
        return self.summed(scores, losses, {"delta": mean_of(mx.full(x.shape, delta))})
