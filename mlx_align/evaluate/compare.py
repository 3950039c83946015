"""One model measured, or two side by side: the table, the verdict, and what both say.

Puts the other modules of this room together; how files, flags and folders name models and data is the
business of `api`.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from mlx_align.data.records import Text
from mlx_align.evaluate.answers import is_right, recogniser_error, refuses
from mlx_align.evaluate.cases import CaseSet
from mlx_align.evaluate.changes import Change, pair_measures, single_measures
from mlx_align.evaluate.contender import Contender, Progress, answer, same_tokens
from mlx_align.evaluate.harness import TaskResult, check_harness, run_tasks
from mlx_align.evaluate.heldout import run_beta
from mlx_align.evaluate.judge import (
    MOST_DISAGREEMENT,
    counts,
    mean_reward,
    reward_answers,
    win_rate,
)
from mlx_align.evaluate.measures import (
    ANSWERED,
    Findings,
    answer_measures,
    examine,
    fitting,
    measure,
    text_divergence,
)
from mlx_align.evaluate.statistics import FEWEST_PROMPTS, LEVEL, RESAMPLES, Measure
from mlx_align.evaluate.verdict import Verdict, judge_changes
from mlx_align.rollout.judge import Duel, Judge, spoken
from mlx_align.rollout.sampler import SamplingSettings
from mlx_align.settings import build

# Two standard errors, for results that bring no cases to resample.
_NORMAL = 1.96


@dataclass(frozen=True)
class Options:
    """How models are measured, besides the cases.

    `beta` scales the implicit reward, `judge` and `reward` name models that compare answers, `tasks`
    are lm-evaluation-harness's, `limit` bounds the cases of a set.
    """

    sampling: SamplingSettings
    beta: float = 0.1
    judge: str | None = None
    reward: str | None = None
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    progress: Progress = lambda what, done, total: None


def make_options(values: Mapping, source: str | Path) -> Options:
    """`Options` of flat keywords, those of the sampling among them; beta is the run's own if not given.

    Raises `SettingsError` where tasks are asked for that cannot be run here.
    """
    names = {field.name for field in fields(Options)} - {"sampling"}
    own = {name: value for name, value in values.items() if name in names}
    sampling = {name: value for name, value in values.items() if name not in names}
    if own.get("beta") is None:
        own["beta"] = run_beta(source) or Options.beta
    check_harness(own.get("tasks", ()))
    return Options(build([SamplingSettings], sampling, "settings")[0], **own)


@dataclass(frozen=True)
class Answers:
    """A prompt and what both models say to it."""

    prompt: Text
    base: str
    aligned: str


@dataclass(frozen=True, eq=False)
class Comparison:
    """What changed from one model to another, in numbers and words.

    `answers` are a few that show it; `all_answers` are rows of plain data with every answer that was
    generated and how it was counted. `notes` say how the numbers came about.
    """

    changes: list[Change]
    answers: list[Answers]
    verdict: Verdict
    notes: list[str]
    names: tuple[str, str]
    all_answers: list[dict]

    def as_dict(self) -> dict:
        """Plain JSON data; the same models and cases give the same."""
        return {
            "before": self.names[0],
            "after": self.names[1],
            "verdict": {
                "text": str(self.verdict),
                "aligned": self.verdict.aligned,
                "ability": self.verdict.ability,
                "regressed": list(self.verdict.regressed),
                "reasons": list(self.verdict.reasons),
                "warnings": list(self.verdict.warnings),
            },
            "changes": [change.as_dict() for change in self.changes],
            **_method(self.notes),
            "answers": self.all_answers,
        }


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What was measured of one model: each row's value is its `after`; see `Comparison`."""

    measures: list[Change]
    notes: list[str]
    name: str
    all_answers: list[dict]

    def as_dict(self) -> dict:
        """Plain JSON data."""
        names = ("key", "what", "source", "unit", "better", "count")
        rows = []
        for change in self.measures:
            row = change.as_dict()
            kept = {name: row[name] for name in names}
            rows.append({**kept, "value": row["after"], "interval": row["after_interval"]})
        return {
            "model": self.name,
            "measures": rows,
            **_method(self.notes),
            "answers": self.all_answers,
        }


def _method(notes):
    error = recogniser_error()
    return {
        "notes": notes,
        "intervals": {"method": "bootstrap over prompts", "level": LEVEL, "resamples": RESAMPLES},
        "refusal_recogniser": {
            "labelled_answers": error.labelled,
            "wrong": round(error.share, 4),
            "precision": round(error.precision, 4),
            "recall": round(error.recall, 4),
        },
    }


def compare_contenders(
    before: Contender,
    after: Contender,
    sets: Sequence[CaseSet],
    options: Options,
    names: tuple[str, str],
) -> Comparison:
    """Both models on all sets."""
    sets, notes = _prepare(sets, (before, after), options)
    found = [examine(c, sets, options.sampling, options.progress) for c in (before, after)]
    measures: list[list[Measure]] = [[], []]
    for cases in sets:
        for contender, findings, rows in zip((before, after), found, measures, strict=True):
            rows += measure(contender, cases, findings, found[0], options.beta)
        if cases.kind == "texts":
            measures[1] += text_divergence(cases, after, before, options.progress)
    for findings, rows in zip(found, measures, strict=True):
        rows += answer_measures(sets, findings)
    same = same_tokens(before, after)
    if not same:
        notes.append(
            "The two models cut text into tokens differently: compare bits per byte, not perplexity "
            "per token. There is no KL between them."
        )
    duels = _duels(sets, *found)
    *more, remarks = _wins(duels, options, (after.name, before.name))
    for rows, won in zip(measures, more, strict=True):
        rows += won
    changes = pair_measures(*measures)
    if options.tasks:
        pair = [_tasks(contender, options) for contender in (before, after)]
        changes += _task_changes(*pair)
    verdict = judge_changes(changes, same_tokens=same)
    all_answers = _rows(sets, found, ("before", "after"))
    return Comparison(changes, _shown(sets, found), verdict, [*notes, *remarks], names, all_answers)


def evaluate_contender(
    contender: Contender,
    base: Contender | None,
    sets: Sequence[CaseSet],
    options: Options,
    name: str,
) -> Evaluation:
    """One model on all sets; with its base, also its implicit reward and its distance from it."""
    sets, notes = _prepare(sets, (contender,), options)
    found = examine(contender, sets, options.sampling, options.progress)
    reference = None
    if base is not None:
        pairs = [s for s in sets if s.kind == "pairs"]
        reference = examine(base, pairs, options.sampling, options.progress, generate=False)
    measures: list[Measure] = []
    for cases in sets:
        of_base = reference if cases.kind == "pairs" else None
        measures += measure(contender, cases, found, of_base, options.beta)
        if cases.kind == "texts" and base is not None:
            measures += text_divergence(cases, contender, base, options.progress)
    measures += answer_measures(sets, found)
    duels = []
    if options.judge or options.reward:
        duels = _duels_with_chosen(sets, contender, options)
        if not duels:
            notes.append(
                "No win rate: it is against the chosen completions of preference pairs, and no data "
                "with pairs was given."
            )
    _, won, remarks = _wins(duels, options, ("the model", "the chosen completion"))
    rows = single_measures([*measures, *won])
    if options.tasks:
        rows += _task_changes([], _tasks(contender, options))
    return Evaluation(rows, [*notes, *remarks], name, _rows(sets, [found], ("answer",)))


def both_answers(
    before: Contender, after: Contender, prompts: Sequence[Text], settings: SamplingSettings
) -> list[Answers]:
    """What both models say to each prompt."""
    texts = [[c.text for c in answer(x, prompts, settings)] for x in (before, after)]
    return [Answers(*row) for row in zip(prompts, *texts, strict=True)]


# -- cases -------------------------------------------------------------------------------------------


def _prepare(sets, contenders, options) -> tuple[list[CaseSet], list[str]]:
    """The sets as they are measured, and what has to be said of them."""
    sets = fitting([cases.limited(options.limit) for cases in sets], contenders)
    notes = []
    for cases in sets:
        for kind, count in Counter(problem.kind for problem in cases.problems).items():
            notes.append(f"{cases.name}: {count} rows left out: {kind}.")
        if 0 < len(cases.cases) < FEWEST_PROMPTS:
            notes.append(f"{cases.name}: {len(cases.cases)} cases are too few for an interval.")
    if any(cases.kind == "requests" for cases in sets):
        notes.append(str(recogniser_error()))
    if any(cases.kind == "pairs" for cases in sets):
        notes.append(
            "The implicit reward is beta * (log pi - log pi_base), here with beta = "
            f"{options.beta:g}."
        )
    return [cases for cases in sets if cases.cases], notes


def _answered(sets, found):
    """(set, case, its completion by each contender) of everything that was answered."""
    for cases in sets:
        if cases.kind in ANSWERED:
            columns = [findings.answers[cases.name, cases.kind] for findings in found]
            for case, *completions in zip(cases.cases, *columns, strict=True):
                yield cases, case, completions


def _shown(sets, found) -> list[Answers]:
    """One harmful request, one harmless one and one question, as far as there are any."""
    wanted = {"harmful": None, "harmless": None, "question": None}
    for cases, case, (base, aligned) in _answered(sets, found):
        name = "question"
        if cases.kind == "requests":
            name = "harmful" if case.harmful else "harmless"
        if wanted[name] is None:
            wanted[name] = Answers(case.prompt, base.text, aligned.text)
    return [answers for answers in wanted.values() if answers is not None]


def _rows(sets, found, names) -> list[dict]:
    rows = []
    for cases, case, completions in _answered(sets, found):
        row = {"set": cases.name, "prompt": case.prompt}
        if cases.kind == "requests":
            row |= {"harmful": case.harmful}
        for name, completion in zip(names, completions, strict=True):
            said = {"text": completion.text, "ended": completion.finished}
            if cases.kind == "requests":
                said["refuses"] = refuses(completion.text)
            elif cases.kind == "questions":
                said["right"] = is_right(completion.text, case.answers)
            row[name] = said
        rows.append(row)
    return rows


# -- win rates ---------------------------------------------------------------------------------------


def _duels(sets, before: Findings, after: Findings) -> list[Duel]:
    return [
        Duel(case.prompt, ours.text, theirs.text)
        for _, case, (theirs, ours) in _answered(sets, (before, after))
    ]


def _duels_with_chosen(sets, contender, options) -> list[Duel]:
    """The model's own answers against the chosen completions, where these are known as text."""
    records = [
        case for s in sets if s.kind == "pairs" for case in s.cases if hasattr(case, "chosen")
    ]
    prompts = [record.prompt for record in records]
    own = answer(contender, prompts, options.sampling, options.progress)
    return [
        Duel(record.prompt, completion.text, spoken(record.chosen))
        for record, completion in zip(records, own, strict=True)
    ]


def _wins(duels, options, sides) -> tuple[list[Measure], list[Measure], list[str]]:
    """The rows for both sides of what was asked for, and how they came about.

    A model against itself wins one half, which is what the other side's row of a win rate says.
    """
    theirs, ours, notes = [], [], []
    if not duels:
        return theirs, ours, notes

    def add(kind, results, remark, key):
        what = f"{sides[0]} beats {sides[1]}, by the {kind}"
        theirs.append(win_rate(key, what, duels, np.full(len(duels), 0.5)))
        ours.append(win_rate(key, what, duels, results))
        wins, ties, losses = counts(results)
        notes.append(
            f"{remark}: {sides[0]} wins {wins}, ties {ties}, loses {losses} of {len(duels)}."
        )

    if options.judge:
        results, disagreed = Judge(options.judge).results(duels, options.progress)
        how = f"asked in both orders, which disagreed in {disagreed:.0%}; these count as ties"
        # Ties of a judge that goes by position do not say that the answers are equally good.
        blind = disagreed > MOST_DISAGREEMENT
        add(
            "judge",
            results,
            f"Judge {options.judge} ({how})",
            "wins/judge_by_position" if blind else "wins/judge",
        )
        if blind:
            notes.append("This judge mostly goes by position, so the verdict leaves it out.")
    if options.reward:
        rows = [(d.prompt, d.ours) for d in duels] + [(d.prompt, d.theirs) for d in duels]
        scores = reward_answers(options.reward, rows)
        mine, other = scores[: len(duels)], scores[len(duels) :]
        add(
            "reward",
            (mine > other) + 0.5 * (mine == other),
            f"Reward model {options.reward}",
            "wins/reward",
        )
        theirs.append(mean_reward(duels, other))
        ours.append(mean_reward(duels, mine))
    return theirs, ours, notes


# -- lm-evaluation-harness ---------------------------------------------------------------------------


def _tasks(contender, options) -> list[TaskResult]:
    return run_tasks(contender, options.tasks, limit=options.limit, seed=options.sampling.seed)


def _task_changes(before: Sequence[TaskResult], after: Sequence[TaskResult]) -> list[Change]:
    """The harness gives standard errors, not cases, so both sides count as independent."""
    earlier = {(r.task, r.metric): r for r in before}
    return [_task_change(earlier.get((r.task, r.metric)), r) for r in after]


def _task_change(then: TaskResult | None, now: TaskResult) -> Change:
    spread = None
    if then is not None and None not in (then.standard_error, now.standard_error):
        spread = _NORMAL * math.hypot(then.standard_error, now.standard_error)
    change = None if then is None else now.value - then.value
    return Change(
        what=f"{now.task}, {now.metric}",
        before=None if then is None else then.value,
        after=now.value,
        count=0,
        better="higher" if now.higher_is_better else "lower",
        key=f"tasks/{now.task}/{now.metric}",
        source="lm-evaluation-harness",
        unit="share" if 0 <= now.value <= 1 else "number",
        low=None if spread is None else change - spread,
        high=None if spread is None else change + spread,
        before_interval=None if then is None else _two_errors(then),
        after_interval=_two_errors(now),
    )


def _two_errors(result):
    if result.standard_error is None:
        return None
    spread = _NORMAL * result.standard_error
    return (result.value - spread, result.value + spread)
