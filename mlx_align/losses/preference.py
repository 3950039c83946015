"""Losses on preference pairs.

Notation: r_c and r_r are the log-ratios log pi - log pi_ref of the chosen and the rejected
completion, summed over their tokens.
"""

from dataclasses import dataclass

import mlx.core as mx

from mlx_align.losses.base import Loss, Method, Pairs, Scores, log_sigmoid, mean_of, method
from mlx_align.settings import setting


def preference_metrics(pairs: Pairs, beta: float) -> dict:
    """TRL's metrics of pairs; rewards are beta * (log pi - log pi_ref), always of the plain sums.

    One is ours: `logps/accuracies`, the share of pairs whose chosen completion is the likelier one,
    which says something even of the untrained model, whose rewards are all zero.
    """
    chosen = mx.stop_gradient(beta * (pairs.chosen - pairs.ref_chosen))
    rejected = mx.stop_gradient(beta * (pairs.rejected - pairs.ref_rejected))
    likelier = mx.stop_gradient(pairs.chosen) > mx.stop_gradient(pairs.rejected)
    return {
        "rewards/chosen": mean_of(chosen),
        "rewards/rejected": mean_of(rejected),
        "rewards/margins": mean_of(chosen - rejected),
        "rewards/accuracies": mean_of((chosen > rejected).astype(mx.float32)),
        "logps/chosen": mean_of(mx.stop_gradient(pairs.chosen)),
        "logps/rejected": mean_of(mx.stop_gradient(pairs.rejected)),
        "logps/accuracies": mean_of(likelier.astype(mx.float32)),
    }


@method(
    "dpo",
    data="pairs",
    reference=True,
    learning_rate=1e-5,
    source="Rafailov et al. 2023, arXiv:2305.18290, equation 7",
)
@dataclass(frozen=True)
class DPO(Method):
    """Direct preference optimization on pairs of a chosen and a rejected completion.

    loss = - log sigmoid(beta * (r_c - r_r)), the mean over pairs.
    """

    beta: float = setting(
        0.1, "Strength of the pull to the reference: higher stays closer to it.", above=0
    )

    def __call__(self, scores: Scores) -> Loss:
        pairs = scores.pairs()
        difference = (pairs.chosen - pairs.ref_chosen) - (pairs.rejected - pairs.ref_rejected)
        losses = -log_sigmoid(self.beta * difference)
        total, count = mean_of(losses)
        return Loss(total, count, preference_metrics(pairs, self.beta))
