"""Best of n: several completions of a prompt, and the one that a scorer likes best.

Scorers are a reward model, or the implicit reward of an aligned model, log pi - log pi_ref summed
over the completion (Rafailov et al. 2023, arXiv:2305.18290, section 5.1; beta does not change the
order).
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from mlx_align.data.template import end_of_turn, make_example
from mlx_align.errors import SettingsError
from mlx_align.model.adapter import Adapter
from mlx_align.model.forward import choose_layout, completion_log_probs, make_batches
from mlx_align.model.load import LoadedModel
from mlx_align.rollout.sampler import Completion, SamplingSettings, sample

# (prompt ids, its completions) -> a score for each completion, for every prompt.
Scorer = Callable[[Sequence[tuple[Sequence[int], list[Completion]]]], list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Ranked:
    """The completions of one prompt, best first, with their scores."""

    completions: tuple[Completion, ...]
    scores: tuple[float, ...]


def best_of(
    loaded: LoadedModel,
    prompts: Sequence[Sequence[int]],
    count: int,
    scorer: Scorer,
    settings: SamplingSettings,
) -> list[Ranked]:
    """`count` completions of each prompt, ranked. Equal scores stay in the order of sampling."""
    if settings.temperature == 0 and count > 1:
        raise SettingsError(
            "best_of: at temperature 0 all completions are the same; use --temperature 1"
        )
    samples = sample(loaded, [p for p in prompts for _ in range(count)], settings)
    groups = [samples[i * count : (i + 1) * count] for i in range(len(prompts))]
    ranked = []
    for group, scores in zip(groups, scorer(list(zip(prompts, groups, strict=True))), strict=True):
        order = np.argsort(-scores, kind="stable")
        ranked.append(Ranked(tuple(group[i] for i in order), tuple(scores[order].tolist())))
    return ranked


def implicit_scorer(loaded: LoadedModel, adapter: Adapter, start: dict | None = None) -> Scorer:
    """log pi - log pi_ref of what was sampled.

    The reference is the model with the adapter off, or wearing the arrays `start`.
    """
    choose_layout(loaded)
    end = _end(loaded)

    def score(groups):
        examples = []
        for prompt, completions in groups:
            for completion in completions:
                ids = [*completion.ids, *([end] if completion.finished else [])]
                examples.append(make_example(prompt, [ids], [np.ones(len(ids), bool)], "sample"))
        loaded.model.eval()
        batches = make_batches(loaded, examples)
        with adapter.at_start(start):
            reference = _log_probs(loaded, batches)
        policy = _log_probs(loaded, batches)
        ratios = iter([float((policy[e.uid] - reference[e.uid])[0]) for e in examples])
        return [np.array([next(ratios) for _ in completions]) for _, completions in groups]

    return score


def reward_scorer(reward_model, prompts: Sequence) -> Scorer:
    """The rewards of a `RewardModel`; `prompts` are the texts or messages that were asked."""

    def score(groups):
        flat = [
            (prompt, completion.text or " ")
            for prompt, (_, completions) in zip(prompts, groups, strict=True)
            for completion in completions
        ]
        rewards = iter(reward_model.score(flat))
        return [np.array([next(rewards) for _ in completions]) for _, completions in groups]

    return score


def _end(loaded: LoadedModel) -> int:
    """The id that a completion ends with: the template's end of turn, or the tokenizer's end."""
    turn = None
    if loaded.template is not None:
        turn, _ = end_of_turn(loaded.tokenizer, loaded.template)
    return loaded.tokenizer.eos_token_id if turn is None else turn


def _log_probs(loaded, batches) -> dict[str, np.ndarray]:
    found = {}
    for batch in batches:
        found |= completion_log_probs(loaded, batch)
    return found
