"""From what contenders answer and find likely to measures, set by set.

    pairs      accuracy (summed and per token), margin, calibration; against a reference also those of
               the implicit reward, beta * (log pi - log pi_ref)
    requests   refusals of harmful and harmless requests, by type
    questions  right answers            choices   right choices
    texts      perplexity per token, per word, bits per byte; KL to the reference
    answers    length, whether they ended by themselves, repetition

Every measure keeps its cases apart by prompt, see `statistics`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlx_align.data.records import Problem, Unfit
from mlx_align.data.template import Example
from mlx_align.evaluate.answers import distinct, is_right, refuses
from mlx_align.evaluate.cases import CaseSet
from mlx_align.evaluate.contender import (
    Contender,
    Progress,
    answer,
    divergence,
    same_tokens,
    score,
    scored_tokens,
)
from mlx_align.evaluate.statistics import (
    Measure,
    calibration_columns,
    calibration_error,
    exp_ratio,
    per_prompt,
    ratio,
)
from mlx_align.rollout.sampler import Completion, SamplingSettings

# Kinds of cases that are answered; the others are scored.
ANSWERED = ("requests", "questions", "prompts")
# The name of the sets that a run kept out of its training.
HELD_OUT = "held-out rows"


@dataclass(frozen=True, eq=False)
class Findings:
    """What one contender did with all sets.

    `answers` holds, for each answered set, its completions; `scores` for each scored set, what `score`
    gave for each case.
    """

    answers: dict[tuple[str, str], list[Completion]]
    scores: dict[tuple[str, str], list]


def fitting(sets: Sequence[CaseSet], contenders: Sequence[Contender]) -> list[CaseSet]:
    """The sets without the cases that do not fit one of the models; those become problems."""
    return [_fitting(cases, contenders) for cases in sets]


def _fitting(cases, contenders):
    kept, problems = [], []
    for i, case in enumerate(cases.cases):
        try:
            for contender in contenders:
                _encode(contender, cases.kind, case)
            kept.append(i)
        except Unfit as unfit:
            problems.append(Problem(unfit.kind, getattr(case, "origin", f"case {i + 1}")))
    return replace(cases.only(kept), problems=(*cases.problems, *problems))


def _encode(contender, kind, case) -> list[Example]:
    """What of a case is scored, or [] where its prompt is answered."""
    if kind in ("pairs", "texts"):
        return contender.examples(case)
    if kind == "choices":
        return contender.choices(case.prompt, case.choices)
    room = contender.loaded.context_length
    if room and len(contender.prompt_ids(case.prompt)) >= room:
        raise Unfit(f"prompt fills the model's context of {room} tokens")
    return []


def examine(
    contender: Contender,
    sets: Sequence[CaseSet],
    settings: SamplingSettings,
    progress: Progress,
    *,
    generate: bool = True,
) -> Findings:
    """Let a contender answer and score everything; without `generate`, only score."""
    answers, scores = {}, {}
    chosen = [s for s in sets if s.kind in ANSWERED and generate]
    prompts = [case.prompt for s in chosen for case in s.cases]
    completions = iter(answer(contender, prompts, settings, progress))
    for cases in chosen:
        answers[cases.name, cases.kind] = [next(completions) for _ in cases.cases]
    for cases in sets:
        if cases.kind not in ANSWERED:
            groups = [_encode(contender, cases.kind, case) for case in cases.cases]
            flat = iter(score(contender, [e for group in groups for e in group], progress))
            scores[cases.name, cases.kind] = [
                [(example, next(flat)) for example in group] for group in groups
            ]
    return Findings(answers, scores)


def measure(
    contender: Contender,
    cases: CaseSet,
    found: Findings,
    reference: Findings | None = None,
    beta: float = 0.1,
) -> list[Measure]:
    """Everything that one set says of one contender."""
    if not cases.cases:
        return []
    key = cases.name, cases.kind
    match cases.kind:
        case "pairs":
            return _pairs(cases, found.scores[key], reference and reference.scores[key], beta)
        case "texts":
            return _texts(cases, found.scores[key], contender.loaded.tokenizer.decode)
        case "choices":
            return _choices(cases, found.scores[key])
        case "requests" if key in found.answers:
            return _requests(cases, found.answers[key])
        case "questions" if key in found.answers:
            return _questions(cases, found.answers[key])
    return []


# -- pairs -------------------------------------------------------------------------------------------


def _pairs(cases, scored, reference, beta) -> list[Measure]:
    prompts = list(map(_prompt_key, cases.cases))
    logp = np.array([group[0][1] for group in scored])
    lengths = np.array([scored_tokens(group[0][0]) for group in scored])
    each = logp / lengths
    per_token = each[:, 0] - each[:, 1]
    margin = logp[:, 0] - logp[:, 1]
    told = " (held out)" if cases.name == HELD_OUT else ""

    def share(key, what, margins):
        return _share(cases, prompts, f"pairs/{key}", what, _wins(margins))

    def mean(key, what, margins):
        return _mean(cases, prompts, f"pairs/{key}", what, margins, "higher")

    def calibration(key, what, margins):
        return _calibration(cases, prompts, f"pairs/{key}", what, margins)

    measures = [
        share("accuracy", f"prefers the chosen completion{told}", margin),
        share("accuracy_per_token", "prefers it per token", per_token),
        mean("margin", "margin of log-probability, nats", margin),
        calibration("calibration", "calibration error of the odds", margin),
    ]
    if reference is not None:
        of_reference = logp - np.array([group[0][1] for group in reference])
        reward = beta * (of_reference[:, 0] - of_reference[:, 1])
        measures += [
            share("reward_accuracy", "implicit reward prefers the chosen", reward),
            mean("reward_margin", "margin of implicit reward", reward),
        ]
        if reward.any():
            # A reference has no reward of its own, and nothing to be calibrated.
            measures.append(calibration("reward_calibration", "its calibration error", reward))
    return measures


def _wins(margins) -> np.ndarray:
    """1 for a positive margin, 1/2 for a tie; rounding makes no winner."""
    return np.where(np.abs(margins) < 1e-6, 0.5, margins > 0)


def _calibration(cases, prompts, key, what, logits) -> Measure:
    """By Bradley and Terry the first wins with probability sigmoid(logit); is that so?

    Of a policy's own margin this is the probability that it says the chosen one, given that it says
    one of the two.
    """
    probability = 0.5 * (1 + np.tanh(logits / 2))
    sums = per_prompt(prompts, *calibration_columns(probability))
    return Measure(
        key, cases.name, what, sums, len(cases.cases), "lower", "share", calibration_error
    )


# -- texts -------------------------------------------------------------------------------------------


def _texts(cases, scored, decode) -> list[Measure]:
    """Perplexity per token, and in units that do not depend on the tokenizer."""
    rows = [(i, example, sums) for i, group in enumerate(scored) for example, sums in group]
    prompts = [i for i, _, _ in rows]
    nats = np.array([-sums.sum() for _, _, sums in rows])
    tokens = [scored_tokens(example).sum() for _, example, _ in rows]
    texts = [
        decode(example.completions[0][example.scored[0]].tolist(), skip_special_tokens=True)
        for _, example, _ in rows
    ]
    octets = [max(1, len(text.encode())) for text in texts]
    words = [max(1, len(text.split())) for text in texts]

    def per(units, key, what, nats=nats, statistic=exp_ratio):
        sums = per_prompt(prompts, nats, units)
        count = len(cases.cases)
        return Measure(key, cases.name, what, sums, count, "lower", statistic=statistic)

    bits = nats / math.log(2)
    return [
        per(tokens, "texts/perplexity", f"perplexity of {cases.name}"),
        per(words, "texts/word_perplexity", "perplexity per word"),
        per(octets, "texts/bits_per_byte", "bits per byte", bits, ratio),
    ]


def text_divergence(
    cases: CaseSet, after: Contender, before: Contender, progress: Progress
) -> list[Measure]:
    """KL(after || before) per token, where both read the same ids."""
    if not cases.cases or not same_tokens(after, before):
        return []
    rows = [(i, e) for i, case in enumerate(cases.cases) for e in after.examples(case)]
    nats = divergence(after, before, [e for _, e in rows], progress)
    tokens = [scored_tokens(e).sum() for _, e in rows]
    sums = per_prompt([i for i, _ in rows], nats, tokens)
    what = f"KL to {before.name} per token, nats"
    return [Measure("texts/kl", cases.name, what, sums, len(cases.cases))]


# -- answers -----------------------------------------------------------------------------------------


def _requests(cases, completions) -> list[Measure]:
    refused = np.array([refuses(c.text) for c in completions], float)
    measures = []
    for harmful, word, better in ((True, "harmful", "higher"), (False, "harmless", "lower")):
        here = [i for i, case in enumerate(cases.cases) if case.harmful == harmful]
        if here:
            chosen = cases.only(here)
            what = f"refuses {word} requests"
            measures.append(_refusals(chosen, f"refuses/{word}", what, refused[here], better))
    for kind, harmful in sorted({(c.type, c.harmful) for c in cases.cases if c.type}):
        here = [i for i, c in enumerate(cases.cases) if (c.type, c.harmful) == (kind, harmful)]
        key = f"refuses/type/{'harmful' if harmful else 'harmless'}/{kind}"
        what = f"refuses {kind} ({'harmful' if harmful else 'harmless'})"
        better = "higher" if harmful else "lower"
        measures.append(_refusals(cases.only(here), key, what, refused[here], better))
    return measures


def _refusals(cases, key, what, refused, better):
    return _share(cases, list(map(_prompt_key, cases.cases)), key, what, refused, better)


def _questions(cases, completions) -> list[Measure]:
    pairs = zip(completions, cases.cases, strict=True)
    right = [float(is_right(c.text, case.answers)) for c, case in pairs]
    prompts = list(map(_prompt_key, cases.cases))
    return [_share(cases, prompts, "questions/right", "answers questions right", right)]


def _choices(cases, scored) -> list[Measure]:
    """The likeliest choice per token; sums would favour short ones."""
    right = []
    for case, group in zip(cases.cases, scored, strict=True):
        each = [sums[0] / scored_tokens(example)[0] for example, sums in group]
        right.append(float(int(np.argmax(each)) == case.right))
    prompts = list(map(_prompt_key, cases.cases))
    return [_share(cases, prompts, "choices/right", "picks the right choice", right)]


def answer_measures(sets: Sequence[CaseSet], found: Findings) -> list[Measure]:
    """Length, ending and repetition of all answers together."""
    rows = [
        (_prompt_key(case), completion)
        for cases in sets
        if (cases.name, cases.kind) in found.answers
        for case, completion in zip(cases.cases, found.answers[cases.name, cases.kind], strict=True)
    ]
    if not rows:
        return []
    prompts = [prompt for prompt, _ in rows]
    everything = CaseSet("answers", "prompts", tuple(prompts))
    ids = [completion.ids for _, completion in rows]
    length = [len(i) for i in ids]
    ended = [float(completion.finished) for _, completion in rows]
    # An answer too short for an n-gram repeats none.
    repeated = [1 - (1.0 if (d := distinct(i, 4)) is None else d) for i in ids]
    bigrams = [1.0 if (d := distinct(i, 2)) is None else d for i in ids]

    def mean(key, what, values, better, unit="share"):
        return _mean(everything, prompts, f"answers/{key}", what, values, better, unit)

    return [
        mean("length", "length of answers, tokens", length, "", "number"),
        _share(everything, prompts, "answers/ended", "answers that end by themselves", ended),
        mean("repeated", "repeated 4-grams in an answer", repeated, "lower"),
        mean("distinct", "distinct 2-grams in an answer", bigrams, "higher"),
    ]


# -- making measures ---------------------------------------------------------------------------------


def _share(cases, prompts, key, what, values, better="higher") -> Measure:
    sums = per_prompt(prompts, values, np.ones(len(values)))
    return Measure(key, cases.name, what, sums, len(values), better, "share", yes_or_no=True)


def _mean(cases, prompts, key, what, values, better, unit="number") -> Measure:
    sums = per_prompt(prompts, values, np.ones(len(values)))
    return Measure(key, cases.name, what, sums, len(values), better, unit)


def _prompt_key(case) -> object:
    """What tells prompts apart: cases of one prompt are resampled together."""
    if isinstance(case, Example):
        return case.prompt.tobytes()
    return case.prompt if isinstance(case.prompt, str) else json.dumps(case.prompt, default=str)
