"""The base and the aligned model side by side: rates on small sets, and what both say."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_align.data.records import Text
from mlx_align.evaluate.answers import Question, Request, accuracy, refusal_rate
from mlx_align.model.adapter import Adapter
from mlx_align.model.load import LoadedModel
from mlx_align.rollout.sampler import SamplingSettings, prompt_encoder, sample


@dataclass(frozen=True)
class Change:
    """One measured share before and after, of `count` cases; `better` says which way is up."""

    what: str
    before: float
    after: float
    count: int
    better: str  # "higher" or "lower"


@dataclass(frozen=True)
class Answers:
    """A prompt and what both models say to it."""

    prompt: Text
    base: str
    aligned: str


@dataclass(frozen=True)
class Comparison:
    """What alignment changed, and some answers that show it."""

    changes: list[Change]
    answers: list[Answers]


def both_answers(
    loaded: LoadedModel,
    adapter: Adapter,
    base: LoadedModel | None,
    prompts: Sequence[Text],
    settings: SamplingSettings,
) -> tuple[list[str], list[str]]:
    """What base and aligned model say to each prompt.

    The base is the same model with the adapter off; `base` gives it where that cannot be (all
    weights were trained).
    """
    encoder = prompt_encoder(loaded)
    ids = [encoder.prompt_ids(prompt) for prompt in prompts]
    if base is None:
        with adapter.off():
            before = sample(loaded, ids, settings)
    else:
        before = sample(base, ids, settings)
    after = sample(loaded, ids, settings)
    return [c.text for c in before], [c.text for c in after]


def measure_changes(
    before: Sequence[str],
    after: Sequence[str],
    requests: Sequence[Request],
    questions: Sequence[Question],
) -> list[Change]:
    """The rates of refusals and right answers, from the answers to all requests, then questions."""
    split = len(requests)
    changes = []
    for harmful, what, better in (
        (True, "refuses harmful requests", "higher"),
        (False, "refuses harmless requests", "lower"),
    ):
        chosen = [i for i, r in enumerate(requests) if r.harmful == harmful]
        if chosen:
            rates = [refusal_rate([texts[i] for i in chosen]) for texts in (before, after)]
            changes.append(Change(what, *rates, len(chosen), better))
    if questions:
        rates = [accuracy(texts[split:], questions) for texts in (before, after)]
        changes.append(Change("answers questions right", *rates, len(questions), "higher"))
    return changes
