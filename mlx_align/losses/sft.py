"""Supervised fine-tuning: make the given completions more likely."""

from dataclasses import dataclass

import mlx.core as mx

from mlx_align.losses.base import Loss, Method, Scores, method
from mlx_align.settings import setting


@method(
    "sft",
    data="completions",
    learning_rate=1e-4,
    source="Ouyang et al. 2022, arXiv:2203.02155, section 3.5",
)
@dataclass(frozen=True)
class SFT(Method):
    """Supervised fine-tuning on completions, conversations or plain text.

    loss = - sum of log p(token) / number of tokens, over all scored tokens of the optimizer step
    (not a mean of means). Of a conversation every assistant turn is scored and nothing else.
    """

    loss: str = setting(
        "nll",
        "nll, or dft: each token weighted by its own probability, which learns less from what the "
        "model finds unlikely (dynamic fine-tuning, Wu et al. 2025, arXiv:2508.05629).",
        choices=("nll", "dft"),
    )

    def __call__(self, scores: Scores, context=None) -> Loss:
        weight = scores.weight * scores.importance[scores.owner]
        nll = -scores.token * weight
        if self.loss == "dft":
            nll = mx.stop_gradient(mx.exp(scores.token)) * nll
        tokens = scores.weight.sum()
        metrics = {"mean_token_accuracy": ((scores.hit * scores.weight).sum(), tokens)}
        if self.loss == "dft":
            plain = mx.stop_gradient(-(scores.token * scores.weight).sum())
            metrics["nll_loss"] = (plain, tokens)
        return Loss(nll.sum(), weight.sum(), metrics)
