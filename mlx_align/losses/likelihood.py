"""Losses on preference pairs that need no reference: CPO, SimPO, AlphaPO, ORPO.

Notation: l_c and l_r are the summed log-probabilities of the chosen and the rejected completion,
a_c and a_r their means over tokens.
"""

import math
from dataclasses import dataclass

import mlx.core as mx

from mlx_align.losses.base import Loss, Pairs, Scores, log_sigmoid, mean_of, method
from mlx_align.losses.preference import MAX_EXPONENT, PairMethod, smoothed
from mlx_align.settings import setting


def mean_logps(pairs: Pairs) -> tuple[mx.array, mx.array]:
    """a_c and a_r."""
    return pairs.chosen / pairs.chosen_length, pairs.rejected / pairs.rejected_length


@method("cpo", data="pairs", learning_rate=5e-6, source="Xu et al. 2024, arXiv:2401.08417")
@dataclass(frozen=True)
class CPO(PairMethod):
    """Contrastive preference optimization: DPO against a uniform reference, with the NLL added.

    loss = - log sigmoid(beta (l_c - l_r)), the mean over pairs, + sft_weight * NLL of the chosen
    completions, the mean over their tokens.
    """

    beta: float = setting(0.1, "Scale of the log-probabilities' difference.", above=0)
    label_smoothing: float = setting(
        0.0, "Share of pairs assumed to be labelled the wrong way round.", minimum=0, below=0.5
    )
    sft_weight: float = setting(
        1.0,
        "Weight of the chosen completion's negative log-likelihood (mean over tokens).",
        minimum=0,
    )

    def pair_losses(self, pairs, context=None):
        return smoothed(self.beta * (pairs.chosen - pairs.rejected), self.label_smoothing)

    def rewards(self, pairs):
        return self.beta * pairs.chosen, self.beta * pairs.rejected


@method(
    "simpo",
    data="pairs",
    learning_rate=5e-6,
    source="Meng et al. 2024, arXiv:2405.14734, equation 6",
)
@dataclass(frozen=True)
class SimPO(PairMethod):
    """Simple preference optimization: the mean log-probability of a token is the reward.

    loss = - log sigmoid(beta (a_c - a_r) - gamma). Gamma is subtracted after the multiplication by
    beta: the ratio gamma / beta that the authors quote as 0.55 is 1.375 / 2.5 here.
    """

    beta: float = setting(2.5, "Scale of the mean log-probabilities' difference.", above=0)
    gamma: float = setting(1.375, "Margin that the scaled difference is to exceed.", minimum=0)

    def pair_losses(self, pairs, context=None):
        chosen, rejected = self.rewards(pairs)
        return -log_sigmoid(chosen - rejected - self.gamma)

    def rewards(self, pairs):
        chosen, rejected = mean_logps(pairs)
        return self.beta * chosen, self.beta * rejected


@method(
    "alphapo",
    data="pairs",
    learning_rate=5e-6,
    source="Gupta et al. 2025, arXiv:2501.03884",
)
@dataclass(frozen=True)
class AlphaPO(SimPO):
    """SimPO with a reward of another shape, which keeps likelihoods from collapsing.

    loss = - log sigmoid(beta (R_c - R_r) - gamma) with R = (1 - exp(a)^-alpha) / alpha; for alpha = 0
    R = a.
    """

    gamma: float = setting(0.1, "Margin that the scaled difference is to exceed.", minimum=0)
    alpha: float = setting(0.25, "Shape of the reward; 0 is SimPO's.")

    def rewards(self, pairs):
        chosen, rejected = mean_logps(pairs)
        if self.alpha:
            chosen, rejected = (
                (1 - mx.exp(mx.minimum(-self.alpha * a, MAX_EXPONENT))) / self.alpha
                for a in (chosen, rejected)
            )
        return self.beta * chosen, self.beta * rejected


def log1mexp(x: mx.array) -> mx.array:
    """log(1 - exp(x)) for x < 0, exact near 0 and far from it (Maechler 2012, R package Rmpfr)."""
    # Where p = 1 the odds are infinite; this bound keeps their logarithm finite in float32.
    x = mx.minimum(x, -1e-6)
    near = x > -math.log(2)
    # Each branch sees only arguments that it is exact for, so that no gradient is nan.
    return mx.where(
        near,
        mx.log(-mx.expm1(mx.where(near, x, -1.0))),
        mx.log1p(-mx.exp(mx.where(near, -1.0, x))),
    )


@method(
    "orpo",
    data="pairs",
    learning_rate=5e-6,
    source="Hong et al. 2024, arXiv:2403.07691, equation 6",
)
@dataclass(frozen=True)
class ORPO(PairMethod):
    """Odds ratio preference optimization: fine-tuning and preferences in one stage, one model.

    loss = NLL of the chosen completions (mean over their tokens) - beta * log sigmoid(log odds_c - log
    odds_r), the mean over pairs, where odds = p / (1 - p) of p = exp(a). The paper's lambda is beta.
    """

    beta: float = setting(0.1, "Weight of the odds ratio (the paper's lambda).", above=0)
    nll_on: str = setting(
        "completion",
        "Tokens of the chosen example whose likelihood is learnt: completion, or full (with the "
        "prompt, as TRL does).",
        choices=("completion", "full"),
    )
    sft_weight: float = setting(
        1.0, "Weight of the chosen completion's negative log-likelihood.", minimum=0
    )

    @property
    def scores_prompts(self) -> bool:
        return self.nll_on == "full" and self.sft_weight > 0

    def log_odds(self, pairs: Pairs) -> mx.array:
        """log odds_c - log odds_r."""
        chosen, rejected = mean_logps(pairs)
        return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))

    def pair_losses(self, pairs, context=None):
        return -self.beta * log_sigmoid(self.log_odds(pairs))

    def rewards(self, pairs):
        chosen, rejected = mean_logps(pairs)
        return self.beta * chosen, self.beta * rejected

    def __call__(self, scores: Scores, context=None) -> Loss:
        loss = super().__call__(scores, context)
        log_odds = self.log_odds(scores.pairs())
        loss.metrics["log_odds_chosen"] = mean_of(log_odds)
        loss.metrics["log_odds_ratio"] = mean_of(log_sigmoid(log_odds))
        return loss
