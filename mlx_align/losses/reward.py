"""Reward models: a scalar head that scores a prompt with a completion."""

from dataclasses import dataclass
from typing import ClassVar

from mlx_align.losses.base import Loss, Method, Scores, log_sigmoid, mean_of, method
from mlx_align.settings import setting


@method(
    "reward",
    data="pairs",
    learning_rate=1e-4,
    source="Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, equation 1; margin: Touvron "
    "et al. 2023, arXiv:2307.09288, equation 2; centring: Eisenstein et al. 2023, arXiv:2312.09244",
)
@dataclass(frozen=True)
class Reward(Method):
    """A reward model from preference pairs (Bradley-Terry).

    loss = - log sigmoid(s_c - s_r - margin), the mean over pairs, + center * (s_c + s_r)^2. The score
    s is read off the last token of prompt and completion by a linear head. Rows may have a "margin".
    """

    center: float = setting(
        0.0, "Weight that keeps scores centred around 0; 0.01 is usual.", minimum=0
    )
    margin: bool = setting(True, 'Subtract the "margin" column where the data has one.')

    reads: ClassVar[str] = "rewards"

    def __call__(self, scores: Scores, context=None) -> Loss:
        chosen, rejected = scores.reward[0::2], scores.reward[1::2]
        weight = scores.importance[0::2]
        difference = chosen - rejected
        required = scores.value[0::2] - scores.value[1::2] if self.margin else 0.0
        losses = -log_sigmoid(difference - required)
        if self.center:
            losses = losses + self.center * (chosen + rejected) ** 2
        metrics = {
            "accuracy": mean_of(chosen > rejected),
            "margin": mean_of(difference),
            "mean_reward": mean_of(scores.reward),
            "rewards/chosen": mean_of(chosen),
            "rewards/rejected": mean_of(rejected),
        }
        return Loss((losses * weight).sum(), weight.sum(), metrics)
