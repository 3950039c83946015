"""Supervised fine-tuning: make the given completions more likely."""

from dataclasses import dataclass

from mlx_align.losses.base import Loss, Method, Scores, method


@method(
    "sft",
    data="completions",
    reference=False,
    learning_rate=1e-4,
    source="Ouyang et al. 2022, arXiv:2203.02155, section 3.5",
)
@dataclass(frozen=True)
class SFT(Method):
    """Supervised fine-tuning on completions, conversations or plain text.

    loss = - sum of log p(token) / number of tokens, over all scored tokens of the optimizer step
    (not a mean of means). Of a conversation every assistant turn is scored and nothing else.
    """

    def __call__(self, scores: Scores) -> Loss:
        tokens = scores.weight.sum()
        correct = (scores.hit * scores.weight).sum()
        nll = -(scores.token * scores.weight).sum()
        return Loss(nll, tokens, {"mean_token_accuracy": (correct, tokens)})
