"""Losses on completions that are sampled and compared while training goes on: online DPO, XPO, Nash-MD.

Two completions of a prompt are compared by rewards or by a judge. Who writes the second one, and how
the comparison becomes chosen and rejected, is the business of `rollout`; a method only says which.
"""

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx

from mlx_align.losses.base import METHODS, Loss, Scores, mean_of, method
from mlx_align.losses.policy import Online, by_completion, mean_by_completion
from mlx_align.settings import setting


@dataclass(frozen=True)
class SelfPlay(Online):
    """Settings of all methods that compare two completions of a prompt."""

    beta: float = setting(
        0.1, "Strength of the pull to the reference: higher stays closer to it.", above=0
    )

    advantage: ClassVar[str] = "pairs"


@dataclass(frozen=True)
class OnlinePairs(SelfPlay):
    """Settings of the methods that learn from the comparison as from a preference pair."""

    pair_loss: str = setting(
        "dpo", "The loss of a pair.", choices=("dpo", "ipo"), aliases=("loss_type",)
    )

    def __call__(self, scores: Scores, context=None) -> Loss:
        return METHODS[self.pair_loss](beta=self.beta)(scores)


@method(
    "online-dpo", data="prompts", learning_rate=1e-5, source="Guo et al. 2024, arXiv:2402.04792"
)
@dataclass(frozen=True)
class OnlineDPO(OnlinePairs):
    """Online DPO: the policy's own completions, the best and the worst of a prompt as a pair.

    loss = - log sigmoid(beta * D), the mean over pairs. Prompts whose completions are rewarded alike
    make no pair.
    """

    group_size: int = setting(2, "Completions sampled for each prompt.", minimum=2)


@method(
    "xpo",
    data="prompts",
    learning_rate=1e-5,
    source="Xie et al. 2024, arXiv:2405.21046, algorithm 1",
)
@dataclass(frozen=True)
class XPO(OnlinePairs):
    """Exploratory preference optimization: online DPO against the reference, with a bonus for the new.

    loss = - log sigmoid(beta * D) + alpha * log pi(y_ref), the mean over pairs. One completion is the
    policy's, the other, y_ref, the reference's; lowering its likelihood makes the policy explore.
    """

    alpha: float = setting(1e-5, "Weight of the exploration.", minimum=0)

    opponent: ClassVar[str] = "reference"

    def __call__(self, scores: Scores, context=None) -> Loss:
        loss = super().__call__(scores)
        # The advantage is 1 on the tokens that the reference wrote.
        opposing = by_completion(scores.token * scores.advantage, scores)
        bonus = opposing[0::2] + opposing[1::2]
        metrics = {**loss.metrics, "logps/reference_completion": mean_of(bonus)}
        return Loss(loss.total + self.alpha * bonus.sum(), loss.weight, metrics)


@method(
    "nash-md",
    data="prompts",
    learning_rate=1e-5,
    source="Munos et al. 2023, arXiv:2312.00886, section 7",
)
@dataclass(frozen=True)
class NashMD(SelfPlay):
    """Nash mirror descent: win against a mixture of the policy and the reference.

    loss = beta * sum over tokens of sg(log pi - log pi_ref) log pi - (P(y > y') - 1/2) * log pi(y), the
    mean over completions y of the policy; y' comes from the geometric mixture. P is the sigmoid of the
    rewards' difference, or what a judge says.
    """

    mixture: float = setting(
        0.5,
        "The reference's share of the opponent: 0 is the policy, 1 the reference.",
        minimum=0,
        maximum=1,
    )

    opponent: ClassVar[str] = "mixture"

    def __call__(self, scores: Scores, context=None) -> Loss:
        ratio = mx.stop_gradient(scores.token - scores.ref_token)
        losses = (self.beta * ratio - scores.advantage) * scores.token * scores.weight
        metrics = {
            "rewards/probabilities": mean_of(0.5 + mean_by_completion(scores.advantage, scores)),
            "kl": (mx.stop_gradient(ratio * scores.weight).sum(), scores.weight.sum()),
        }
        return Loss(losses.sum(), mx.array(float(scores.length.size)), metrics)
