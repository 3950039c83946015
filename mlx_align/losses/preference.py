"""Losses on preference pairs that compare the policy with a reference: DPO and its family.

Notation: r_c and r_r are the log-ratios log pi - log pi_ref of the chosen and the rejected
completion, summed over their tokens; n_c and n_r are their tokens; S_c and S_r are r_c and r_r, or
what an f-divergence other than the reverse KL makes of them; D = S_c - S_r.
"""

import math
from dataclasses import dataclass, fields
from typing import ClassVar

import mlx.core as mx

from mlx_align.errors import SettingsError
from mlx_align.losses.base import (
    METHODS,
    Loss,
    Method,
    Pairs,
    Referenced,
    Scores,
    log_sigmoid,
    mean_of,
    method,
)
from mlx_align.settings import nearest, setting

# Exponents are held below this, so that exp stays finite in float32 with room for sums.
MAX_EXPONENT = 80.0


def square(x: mx.array) -> mx.array:
    """x^2, held where float32 ends."""
    return mx.square(mx.clip(x, -1e18, 1e18))


def pair_metrics(pairs: Pairs, chosen: mx.array, rejected: mx.array) -> dict:
    """TRL's metrics of pairs, given the rewards of both completions.

    Two are ours: `logps/accuracies`, the share of pairs whose chosen completion is the likelier one,
    which says something even of the untrained model, whose rewards are all zero; and the lengths,
    which show a drift towards long answers.
    """
    return {
        "rewards/chosen": mean_of(chosen),
        "rewards/rejected": mean_of(rejected),
        "rewards/margins": mean_of(chosen - rejected),
        "rewards/accuracies": mean_of(chosen > rejected),
        "logps/chosen": mean_of(pairs.chosen),
        "logps/rejected": mean_of(pairs.rejected),
        "logps/accuracies": mean_of(pairs.chosen > pairs.rejected),
        "lengths/chosen": mean_of(pairs.chosen_length),
        "lengths/rejected": mean_of(pairs.rejected_length),
    }


@dataclass(frozen=True)
class PairMethod(Method):
    """What all losses on pairs share: a mean over pairs, perhaps with the chosen one's NLL added."""

    sft_weight: float = setting(
        0.0,
        "Weight of an added negative log-likelihood of the chosen completion (mean over tokens); "
        "keeps its probability from falling.",
        minimum=0,
    )

    def pair_losses(self, pairs: Pairs, context=None) -> mx.array:
        """The loss of each pair, float32[P]."""
        raise NotImplementedError

    def rewards(self, pairs: Pairs) -> tuple[mx.array, mx.array]:
        """The implicit rewards of chosen and rejected, for the metrics; float32[P] each."""
        raise NotImplementedError

    def likelihood_pairs(self, scores: Scores) -> Pairs:
        """The pairs that the losses are computed from."""
        return scores.pairs()

    def pair_weights(self, scores: Scores) -> mx.array | None:
        """A weight on every pair's loss besides the data's own, or None."""
        return None

    def __call__(self, scores: Scores, context=None) -> Loss:
        pairs = self.likelihood_pairs(scores)
        losses = self.pair_losses(pairs, context)
        extra = self.pair_weights(scores)
        if extra is not None:
            losses = losses * mx.stop_gradient(extra)
        total = (losses * pairs.weight).sum()
        plain = scores.pairs()
        metrics = pair_metrics(plain, *self.rewards(plain))
        if self.sft_weight:
            nll, tokens = self.likelihood(scores)
            total = total + self.sft_weight * nll / scores.mean_length
            metrics["nll_loss"] = (mx.stop_gradient(nll), tokens)
        return Loss(total, pairs.weight.sum(), metrics)

    def likelihood(self, scores: Scores) -> tuple[mx.array, mx.array]:
        """The negative log-likelihood of the chosen completions, and its tokens; both weighted.

        Of the prompts too, where the method scores them.
        """
        first = mx.arange(scores.length.size) % 2 == 0
        counted = scores.weight * first[scores.owner]
        if scores.in_prompt is not None:
            counted = counted + scores.in_prompt
        counted = counted * scores.importance[scores.owner]
        return -(scores.token * counted).sum(), counted.sum()


@dataclass(frozen=True)
class ReferencePairs(PairMethod, Referenced):
    """Pairs against a reference, by the plain log-ratios."""

    beta: float = setting(
        0.1, "Strength of the pull to the reference: higher stays closer to it.", above=0
    )
    ld_alpha: float | None = setting(
        None,
        "Count only the first min(n_c, n_r) tokens of a completion fully and the rest by this factor, "
        "against a drift to long answers (LD-DPO, Liu et al. 2024, arXiv:2409.06411; 0.5 is usual).",
        minimum=0,
        maximum=1,
    )

    def likelihood_pairs(self, scores: Scores) -> Pairs:
        if self.ld_alpha is None:
            return scores.pairs()
        shorter = mx.minimum(scores.length[0::2], scores.length[1::2])
        shared = mx.repeat(shorter, 2)[scores.owner]
        return scores.scaled(mx.where(scores.place() < shared, 1.0, self.ld_alpha)).pairs()

    def rewards(self, pairs: Pairs) -> tuple[mx.array, mx.array]:
        return self.beta * pairs.chosen_ratio, self.beta * pairs.rejected_ratio


@dataclass(frozen=True)
class DivergencePairs(ReferencePairs):
    """Pairs against a reference under a chosen divergence."""

    f_divergence: str = setting(
        "reverse_kl",
        "Divergence from the reference that is held down (f-DPO, Wang et al. 2023, "
        "arXiv:2309.16240): S = r, -exp(-r), log sigmoid(r), or exp((a - 1) r) / (a - 1).",
        choices=("reverse_kl", "forward_kl", "js", "alpha"),
    )
    f_alpha: float = setting(0.5, "The a of the alpha divergence; not 1.")
    wpo: bool = setting(
        False,
        "Weight each pair by how likely the policy itself would be to write it (WPO, Zhou et al. 2024, "
        "arXiv:2406.11827).",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.f_divergence == "alpha" and self.f_alpha == 1:
            raise SettingsError("f_alpha: 1 is the reverse KL; use --f-divergence reverse_kl")

    @property
    def needs_collision(self) -> bool:
        return self.wpo

    def pair_weights(self, scores: Scores) -> mx.array | None:
        """WPO's weights, aligned by the sum of squared probabilities (Zhou et al. 2024)."""
        if not self.wpo:
            return None
        aligned = (scores.token - scores.collision) * scores.weight
        sums = mx.zeros_like(scores.logp).at[scores.owner].add(aligned)
        weights = mx.exp(mx.minimum(sums / mx.maximum(scores.length, 1), MAX_EXPONENT))
        return weights[0::2] * weights[1::2]

    def divergence(self, ratio: mx.array) -> mx.array:
        """f'(pi / pi_ref) up to a constant, from the log-ratio."""
        match self.f_divergence:
            case "reverse_kl":
                return ratio
            case "forward_kl":
                return -mx.exp(mx.minimum(-ratio, MAX_EXPONENT))
            case "js":
                return log_sigmoid(ratio)
            case "alpha":
                power = self.f_alpha - 1
                return mx.exp(mx.minimum(power * ratio, MAX_EXPONENT)) / power

    def spread(self, pairs: Pairs) -> tuple[mx.array, mx.array]:
        """S_c and S_r."""
        return self.divergence(pairs.chosen_ratio), self.divergence(pairs.rejected_ratio)

    def difference(self, pairs: Pairs) -> mx.array:
        """beta * D."""
        chosen, rejected = self.spread(pairs)
        return self.beta * (chosen - rejected)


def smoothed(x: mx.array, smoothing: float) -> mx.array:
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x)."""
    return -(1 - smoothing) * log_sigmoid(x) - smoothing * log_sigmoid(-x)


def _smoothing(default: float, **bounds):
    return setting(default, "Share of pairs assumed to be labelled the wrong way round.", **bounds)


@method(
    "dpo",
    data="pairs",
    learning_rate=1e-5,
    source="Rafailov et al. 2023, arXiv:2305.18290, equation 7",
)
@dataclass(frozen=True)
class DPO(DivergencePairs):
    """Direct preference optimization on pairs of a chosen and a rejected completion.

    loss = - log sigmoid(beta * D), the mean over pairs.
    """

    def pair_losses(self, pairs, context=None):
        return -log_sigmoid(self.difference(pairs))


@method(
    "cdpo",
    data="pairs",
    learning_rate=1e-5,
    source="Mitchell 2023, A note on DPO with noisy preferences",
)
@dataclass(frozen=True)
class CDPO(DivergencePairs):
    """Conservative DPO, for pairs of which a known share is labelled the wrong way round.

    loss = - (1 - e) log sigmoid(beta * D) - e log sigmoid(-beta * D). It has its minimum at a finite D.
    """

    label_smoothing: float = _smoothing(0.1, minimum=0, below=0.5)

    def pair_losses(self, pairs, context=None):
        return smoothed(self.difference(pairs), self.label_smoothing)


@method(
    "robust",
    data="pairs",
    learning_rate=1e-5,
    source="Chowdhury et al. 2024, arXiv:2403.00409",
)
@dataclass(frozen=True)
class Robust(DivergencePairs):
    """Robust DPO: an unbiased estimate of the loss that clean labels would give.

    loss = (- (1 - e) log sigmoid(beta * D) + e log sigmoid(-beta * D)) / (1 - 2 e). It can be negative.
    """

    label_smoothing: float = _smoothing(0.1, minimum=0, below=0.5)

    def pair_losses(self, pairs, context=None):
        x, e = self.difference(pairs), self.label_smoothing
        return (-(1 - e) * log_sigmoid(x) + e * log_sigmoid(-x)) / (1 - 2 * e)


@method(
    "ipo",
    data="pairs",
    learning_rate=1e-5,
    source="Azar et al. 2023, arXiv:2310.12036, equation 17",
)
@dataclass(frozen=True)
class IPO(DivergencePairs):
    """Identity preference optimization: a margin of a fixed size instead of one that grows for ever.

    loss = (S_c / n_c - S_r / n_r - 1 / (2 beta))^2; without length normalisation S_c - S_r.
    """

    length_normalise: bool = setting(
        True, "Means over tokens (what the authors recommend) instead of sums."
    )

    def pair_losses(self, pairs, context=None):
        chosen, rejected = self.spread(pairs)
        if self.length_normalise:
            chosen, rejected = chosen / pairs.chosen_length, rejected / pairs.rejected_length
        return square(chosen - rejected - 1 / (2 * self.beta))


@method(
    "hinge",
    data="pairs",
    learning_rate=1e-5,
    source="Zhao et al. 2023, arXiv:2305.10425 (SLiC); Liu et al. 2023, arXiv:2309.06657",
)
@dataclass(frozen=True)
class Hinge(DivergencePairs):
    """The hinge loss of SLiC on DPO's margin: pairs beyond the margin teach nothing more.

    loss = max(0, 1 - beta * D).
    """

    def pair_losses(self, pairs, context=None):
        return mx.maximum(0, 1 - self.difference(pairs))


@method("exo", data="pairs", learning_rate=1e-5, source="Ji et al. 2024, arXiv:2402.00856")
@dataclass(frozen=True)
class EXO(DivergencePairs):
    """Efficient exact optimization: the reverse KL from the policy's to the labels' preference.

    loss = p (log p - log(1 - e)) + q (log q - log e) with p = sigmoid(beta * D), q = 1 - p.
    """

    label_smoothing: float = setting(
        1e-3, "Probability e that the labels give to the rejected completion.", above=0, below=0.5
    )

    def pair_losses(self, pairs, context=None):
        x, e = self.difference(pairs), self.label_smoothing
        return mx.sigmoid(x) * (log_sigmoid(x) - math.log1p(-e)) + mx.sigmoid(-x) * (
            log_sigmoid(-x) - math.log(e)
        )


@method("nca", data="pairs", learning_rate=1e-5, source="Chen et al. 2024, arXiv:2402.05369")
@dataclass(frozen=True)
class NCA(DivergencePairs):
    """Noise contrastive alignment: holds the likelihood of the chosen completion up, too.

    loss = - log sigmoid(beta S_c) - log sigmoid(-beta S_c) / 2 - log sigmoid(-beta S_r) / 2.
    """

    def pair_losses(self, pairs, context=None):
        chosen, rejected = (self.beta * s for s in self.spread(pairs))
        return -log_sigmoid(chosen) - 0.5 * (log_sigmoid(-chosen) + log_sigmoid(-rejected))


@method(
    "bco-pair",
    data="pairs",
    learning_rate=1e-5,
    source="Jung et al. 2024, arXiv:2404.04656",
)
@dataclass(frozen=True)
class BCOPair(DivergencePairs):
    """Binary classification of both completions of a pair, each against the reference.

    loss = - log sigmoid(beta S_c) - log sigmoid(-beta S_r). The paper's running mean (delta) is left
    out here; `bco` has it.
    """

    def pair_losses(self, pairs, context=None):
        chosen, rejected = (self.beta * s for s in self.spread(pairs))
        return -log_sigmoid(chosen) - log_sigmoid(-rejected)


@method(
    "sppo",
    data="pairs",
    learning_rate=1e-5,
    source="Wu et al. 2024, arXiv:2405.00675",
)
@dataclass(frozen=True)
class SPPO(DivergencePairs):
    """Self-play preference optimization with hard labels: each log-ratio is drawn to its target.

    loss = (S_c - 1 / (2 beta))^2 + (S_r + 1 / (2 beta))^2.
    """

    def pair_losses(self, pairs, context=None):
        chosen, rejected = self.spread(pairs)
        return square(chosen - 0.5 / self.beta) + square(rejected + 0.5 / self.beta)


@method(
    "apo-zero",
    data="pairs",
    learning_rate=1e-5,
    source="D'Oosterlinck et al. 2024, arXiv:2408.06266",
)
@dataclass(frozen=True)
class APOZero(ReferencePairs):
    """Anchored preference optimization: the chosen one up and the rejected one down.

    For a model that writes worse than the chosen completions.
    loss = 1 - sigmoid(beta r_c) + sigmoid(beta r_r).
    """

    def pair_losses(self, pairs, context=None):
        chosen, rejected = self.rewards(pairs)
        return 1 - mx.sigmoid(chosen) + mx.sigmoid(rejected)


@method(
    "apo-down",
    data="pairs",
    learning_rate=1e-5,
    source="D'Oosterlinck et al. 2024, arXiv:2408.06266",
)
@dataclass(frozen=True)
class APODown(DivergencePairs):
    """Anchored preference optimization: both down, the rejected one further.

    For a model that writes better than the chosen completions.
    loss = sigmoid(beta r_c) + 1 - sigmoid(beta * D).
    """

    def pair_losses(self, pairs, context=None):
        return mx.sigmoid(self.beta * pairs.chosen_ratio) + 1 - mx.sigmoid(self.difference(pairs))


@method(
    "discopop",
    data="pairs",
    learning_rate=1e-5,
    source="Lu et al. 2024, arXiv:2406.08414",
)
@dataclass(frozen=True)
class DiscoPOP(DivergencePairs):
    """The loss that a language model discovered: logistic and exponential, mixed by the margin.

    loss = (1 - m) (- log sigmoid(beta * D)) + m exp(-beta * D) with m = sigmoid(beta * D / tau).
    """

    tau: float = setting(0.05, "How sharply the mixture turns.", above=0)

    def pair_losses(self, pairs, context=None):
        x = self.difference(pairs)
        mix = mx.sigmoid(x / self.tau)
        return -(1 - mix) * log_sigmoid(x) + mix * mx.exp(mx.minimum(-x, MAX_EXPONENT))


@method(
    "dpo-norm",
    data="pairs",
    learning_rate=1e-5,
    source="Meng et al. 2024, arXiv:2405.14734; Lambert et al. 2024, arXiv:2411.15124",
)
@dataclass(frozen=True)
class DPONorm(DivergencePairs):
    """Length-normalised DPO: log-ratios per token, so that length alone earns nothing.

    loss = - log sigmoid(beta (S_c / n_c - S_r / n_r)).
    """

    beta: float = setting(
        2.0, "Strength of the pull to the reference; means over tokens want a larger one.", above=0
    )

    def pair_losses(self, pairs, context=None):
        chosen, rejected = self.spread(pairs)
        return -log_sigmoid(
            self.beta * (chosen / pairs.chosen_length - rejected / pairs.rejected_length)
        )


@method("dpop", data="pairs", learning_rate=1e-5, source="Pal et al. 2024, arXiv:2402.13228")
@dataclass(frozen=True)
class DPOP(DivergencePairs):
    """DPO-Positive: a penalty where the chosen completion becomes less likely than it was.

    loss = - log sigmoid(beta (D - lambda max(0, log pi_ref(chosen) - log pi(chosen)))).
    """

    penalty: float = setting(50.0, "The paper's lambda.", minimum=0)

    def pair_losses(self, pairs, context=None):
        fallen = mx.maximum(0, -pairs.chosen_ratio)
        return -log_sigmoid(self.difference(pairs) - self.beta * self.penalty * fallen)


@method(
    "rpo",
    data="pairs",
    learning_rate=1e-5,
    source="Pang et al. 2024, arXiv:2404.19733; Liu et al. 2024, arXiv:2405.16436",
)
@dataclass(frozen=True)
class RPO(DPO):
    """DPO with the likelihood of the chosen completion added, for reasoning and against forgetting.

    loss = - log sigmoid(beta * D), the mean over pairs, + sft_weight * NLL of the chosen completions,
    the mean over their tokens.
    """

    sft_weight: float = setting(
        1.0,
        "Weight of the chosen completion's negative log-likelihood (mean over tokens).",
        minimum=0,
    )


@method(
    "rpo-gap",
    data="pairs",
    learning_rate=1e-5,
    source="Sun et al. 2025, arXiv:2502.00203; Nvidia 2024, arXiv:2406.11704",
)
@dataclass(frozen=True)
class RewardGap(DivergencePairs):
    """Reward-aware preference optimization: the margin learnt is the one that the data gives.

    With G = scale * margin and b = beta * D, the loss = KL(sigmoid(G) || sigmoid(b)) of the two coins
    (backward), KL(sigmoid(b) || sigmoid(G)) (forward), or (b - G)^2 (square). Rows need a "margin".
    """

    distance: str = setting(
        "backward", "How b is compared with G.", choices=("backward", "forward", "square")
    )
    gap_scale: float = setting(1.0, "Factor on the data's margins.", above=0)

    @property
    def needs_margin(self) -> bool:
        return True

    def pair_losses(self, pairs, context=None):
        b, gap = self.difference(pairs), self.gap_scale * pairs.margin
        if self.distance == "square":
            return square(b - gap)
        first, second = (gap, b) if self.distance == "backward" else (b, gap)
        return mx.sigmoid(first) * (log_sigmoid(first) - log_sigmoid(second)) + mx.sigmoid(
            -first
        ) * (log_sigmoid(-first) - log_sigmoid(-second))


# -- optimal transport: the loss of a pair depends on its rank in the optimizer step ----------------


def _ranks(values: mx.array) -> mx.array:
    return mx.argsort(mx.argsort(values))


@dataclass(frozen=True)
class Transport(ReferencePairs):
    """What both AOT losses share. Ranks are taken over the whole optimizer step."""

    label_smoothing: float = _smoothing(0.0, minimum=0, below=0.5)
    coupled: ClassVar[str | None] = "batch"

    def matched(self, pairs: Pairs) -> tuple[mx.array, mx.array]:
        """The two sides whose sorted values are compared, for all pairs of the step."""
        raise NotImplementedError

    def couple(self, parts, state, training=True):
        every = [self.likelihood_pairs(part) for part in parts]
        whole = Pairs(*(mx.concatenate(column) for column in zip(*every, strict=True)))
        upper, lower = self.matched(whole)
        # For each value of one side, its partner of equal rank on the other.
        below = mx.sort(lower)[_ranks(upper)]
        above = mx.sort(upper)[_ranks(lower)]
        contexts, at = [], 0
        for pairs in every:
            here = slice(at, at + pairs.chosen.size)
            contexts.append((below[here], above[here]))
            at += pairs.chosen.size
        return contexts, state


@method(
    "aot",
    data="pairs",
    learning_rate=1e-5,
    source="Melnyk et al. 2024, arXiv:2406.05882",
)
@dataclass(frozen=True)
class AOT(Transport):
    """Alignment via optimal transport on pairs: the policy's margins dominate the reference's.

    loss = cDPO's of beta * d, where d is the difference of the sorted log pi(chosen) - log pi(rejected)
    and the sorted log pi_ref(chosen) - log pi_ref(rejected) of the optimizer step.
    """

    def matched(self, pairs):
        return pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected

    def pair_losses(self, pairs, context=None):
        below, _ = context
        return smoothed(self.beta * (pairs.chosen - pairs.rejected - below), self.label_smoothing)


@method(
    "aot-unpaired",
    data="pairs",
    learning_rate=1e-5,
    source="Melnyk et al. 2024, arXiv:2406.05882",
)
@dataclass(frozen=True)
class AOTUnpaired(Transport):
    """Alignment via optimal transport: the rewards of all chosen dominate those of all rejected.

    loss = cDPO's of beta * d, where d is the difference of the sorted r_c and the sorted r_r of the
    optimizer step. (Once called aot_pair elsewhere.)
    """

    def matched(self, pairs):
        return pairs.chosen_ratio, pairs.rejected_ratio

    def pair_losses(self, pairs, context=None):
        below, above = context
        upper = smoothed(self.beta * (pairs.chosen_ratio - below), self.label_smoothing)
        lower = smoothed(self.beta * (above - pairs.rejected_ratio), self.label_smoothing)
        # Each rank appears in both sums, once for the gradient of either side; counted once.
        return upper + lower - mx.stop_gradient(lower)


# -- several losses at once -------------------------------------------------------------------------


@method("mpo", data="pairs", learning_rate=1e-5, source="Wang et al. 2024, arXiv:2411.10442")
@dataclass(frozen=True)
class MPO(DivergencePairs):
    """Several pair losses at once, each with a weight.

    loss = the sum of weight * loss over `--losses`, and sft_weight * NLL of the chosen completion. All
    share beta and the settings of the divergence; their own settings have their defaults.
    """

    losses: tuple[str, ...] = setting(
        ("dpo=0.8", "bco-pair=0.2"),
        "Which losses, and their weights, like dpo=0.8,bco-pair=0.2.",
    )
    sft_weight: float = setting(
        1.0,
        "Weight of the chosen completion's negative log-likelihood (mean over tokens).",
        minimum=0,
    )

    def __post_init__(self):
        super().__post_init__()
        self._members()

    def _members(self) -> list[tuple[float, PairMethod]]:
        shared = {f.name: getattr(self, f.name) for f in fields(DivergencePairs)}
        members = []
        for part in self.losses:
            name, _, weight = part.partition("=")
            kind = METHODS.get(name.strip())
            if kind is None or not issubclass(kind, DivergencePairs) or kind is type(self):
                known = [
                    n for n, m in METHODS.items() if issubclass(m, DivergencePairs) and m is not MPO
                ]
                raise SettingsError(
                    f"losses: {name!r} cannot be part of a mixture{nearest(name, known)}; "
                    f"possible: {', '.join(known)}"
                )
            try:
                factor = float(weight or 1)
            except ValueError:
                raise SettingsError(f"losses: {part!r} is not NAME=WEIGHT") from None
            members.append((factor, kind(**shared)))
        return members

    @property
    def needs_margin(self) -> bool:
        return any(member.needs_margin for _, member in self._members())

    def pair_losses(self, pairs, context=None):
        return sum(weight * member.pair_losses(pairs) for weight, member in self._members())
