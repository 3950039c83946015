"""What a file of evaluation data holds, told apart by its rows.

    {"prompt", "chosen", "rejected"}                  pairs       which completion is likelier?
    {"prompt", "harmful": true}                       requests    is it refused?
    prompt, type, label (XSTest's columns)            requests    the same, by type
    {"question", "answer": "...#### 42"}              questions   is the generated answer right?
    {"question", "choices": [...], "answer": 1}       choices     which choice is likeliest?
    {"text"}, {"messages"}, {"prompt", "completion"}  texts       how well are they predicted?
    {"prompt"}                                        prompts     answered, for length and win rates

"prompt" and "question" mean the same. Rows are read from what `data.jsonl` reads and from .csv. Knows
nothing of models.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlx_align.data.jsonl import SUFFIXES, find_files, read_rows, summarise
from mlx_align.data.records import (
    ChatRecord,
    CompletionRecord,
    PairRecord,
    Problem,
    Text,
    TextRecord,
    Unfit,
    parse_record,
)
from mlx_align.data.template import Example
from mlx_align.demo import DEMO, data_folder, evaluation_folder
from mlx_align.errors import DataError
from mlx_align.evaluate.answers import SETS


@dataclass(frozen=True)
class Request:
    """Something asked for, and whether a good model refuses it. `type` groups the report."""

    prompt: Text
    harmful: bool
    type: str = ""


@dataclass(frozen=True)
class Question:
    """A question and the spellings of its one right answer."""

    prompt: Text
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """A question, its possible answers, and the index of the right one."""

    prompt: Text
    choices: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Prompt:
    """Something to answer, without a right answer."""

    prompt: Text


Case = (
    Request | Question | Choice | Prompt | PairRecord | TextRecord | ChatRecord | CompletionRecord
)
KINDS = {
    PairRecord: "pairs", Request: "requests", Question: "questions", Choice: "choices",
    TextRecord: "texts", ChatRecord: "texts", CompletionRecord: "texts", Prompt: "prompts",
}  # fmt: skip
# Columns by which a row is one of the records that training reads, too.
_RECORD = (
    "chosen", "rejected", "preferred_output", "messages", "conversations", "completion", "text",
    "instruction", "label", "kto_tag",
)  # fmt: skip
# XSTest's types of safe prompts (Röttger et al. 2024, arXiv:2308.01263); those of unsafe ones have
# "contrast_" in front. Some of its files have no label column.
XSTEST = frozenset(
    (
        "homonyms", "figurative_language", "safe_targets", "safe_contexts", "definitions", "discr",
        "real_group_nons_discr", "nons_group_real_discr", "historical_events", "privacy",
        "privacy_public", "privacy_fictional",
    )
)  # fmt: skip
EXPECTED = (
    "Expected prompt/chosen/rejected, prompt/harmful, XSTest's columns, question/answer, "
    "question/choices/answer, text, messages, prompt/completion, or prompt."
)


@dataclass(frozen=True, eq=False)
class CaseSet:
    """Cases of one kind under one name; `problems` says which rows were left out and why.

    The held-out rows of a run come as `Example`s, tokenised as in its training.
    """

    name: str
    kind: str
    cases: tuple[Case | Example, ...]
    problems: tuple[Problem, ...] = ()

    def only(self, chosen: Sequence[int]) -> "CaseSet":
        """The set with these of its cases."""
        return replace(self, cases=tuple(self.cases[i] for i in chosen))

    def limited(self, limit: int | None) -> "CaseSet":
        """At most `limit` cases, spread evenly over the set."""
        if limit is None or len(self.cases) <= limit:
            return self
        return self.only(np.linspace(0, len(self.cases) - 1, limit).round().astype(int))


def read_sets(source: str) -> list[CaseSet]:
    """The cases in a file, a folder or a Hub data set: one set for each file and kind of row.

    Of a data set with splits, the rows kept out of training are taken. Raises `DataError` naming the
    first rows that are of no known kind.
    """
    sets = []
    for file in _files(source):
        found: dict[str, list] = {}
        problems, errors = [], []
        for origin, row in _rows(file):
            try:
                case = parse_case(row, origin)
                found.setdefault(KINDS[type(case)], []).append(case)
            except Unfit as unfit:
                problems.append(Problem(unfit.kind, origin))
            except DataError as error:
                errors.append(str(error))
        if errors:
            raise DataError(summarise(errors))
        if not found:
            raise DataError(f"{file}: no usable row")
        name = file.name.partition(".")[0]
        sets += [CaseSet(name, kind, tuple(c), tuple(problems)) for kind, c in found.items()]
    return sets


# What the sets that come along are called.
OWN = {
    "requests": "own requests",
    "questions": "own questions",
    "choices": "own questions",
    "texts": "neutral texts",
}


def own_sets(model: str) -> list[CaseSet]:
    """The sets that come along: requests, questions and choices, neutral texts.

    The embedded demo gets those of its own world, which is all it knows.
    """
    if model == DEMO:
        files = [evaluation_folder() / f"{name}.jsonl" for name in ("requests", "questions")]
        sets = [found for file in files for found in read_sets(str(file))]
        sets.append(_demo_texts())
    else:
        files = [SETS / f"{name}.jsonl" for name in ("requests", "questions", "neutral")]
        sets = [found for file in files for found in read_sets(str(file))]
    return [replace(cases, name=OWN[cases.kind]) for cases in sets]


def _demo_texts() -> CaseSet:
    """The facts in the demo's held-out conversations, each turn by itself.

    It has never seen two turns in a row. The other turns say how to do something ("To knit a scarf,
    ..."), which is what its preferences are about, so they are no neutral text.
    """
    (found,) = read_sets(str(data_folder("completions") / "valid.jsonl"))
    facts = {
        asked["content"]: CompletionRecord((asked,), (said,), case.origin)
        for case in found.cases
        for asked, said in zip(case.messages[0::2], case.messages[1::2], strict=True)
        if not said["content"].startswith("To ")
    }
    return CaseSet("texts", "texts", tuple(facts.values()))


def parse_case(row, origin: str) -> Case:
    """The case that a row holds.

    Raises `DataError` where the row is of no known kind, `Unfit` where nothing can be measured by it.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{origin}: a row must be a JSON object, not {type(row).__name__}")
    row = {key: value for key, value in row.items() if value is not None and value != ""}
    prompt = row.get("prompt", row.get("question"))
    if prompt is not None and not {"chosen", "rejected", "completion"} & row.keys():
        prompt = _prompt(prompt, origin)
        if "harmful" in row:
            return Request(prompt, _truth(row["harmful"], origin), str(row.get("type", "")))
        kind = str(row.get("type", ""))
        if str(row.get("label", "")).lower() in ("safe", "unsafe"):
            return Request(prompt, row["label"].lower() == "unsafe", kind)
        if "label" not in row and kind.removeprefix("contrast_") in XSTEST:
            return Request(prompt, kind.startswith("contrast_"), kind)
        if "choices" in row:
            return _choice(prompt, row, origin)
        if "answer" in row or "answers" in row:
            return Question(prompt, _answers(row.get("answer", row.get("answers")), origin))
    if any(key in row for key in _RECORD):
        record = parse_record(row, origin)
        if type(record) in KINDS:
            return record
        raise DataError(f"{origin}: labelled completions are not evaluated. {EXPECTED}")
    if prompt is not None:
        return Prompt(prompt)
    keys = ", ".join(sorted(map(str, row))) or "nothing"
    raise DataError(f"{origin}: no known kind of row (its keys: {keys}). {EXPECTED}")


def _prompt(value, origin) -> Text:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and all(isinstance(m, Mapping) for m in value):
        return tuple(dict(m) for m in value)
    raise DataError(f"{origin}: the prompt must be text or a list of messages")


def _truth(value, origin) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    word = str(value).strip().lower()
    if word not in words:
        raise DataError(f'{origin}: "harmful" is {value!r}; it must be true or false')
    return words[word]


def _answers(value, origin) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    answers = tuple(str(v).strip() for v in values if isinstance(v, str | int | float))
    if not answers or not all(answers):
        raise DataError(f'{origin}: "answer" must be text, a number, or a list of spellings')
    return answers


def _choice(prompt, row, origin) -> Choice:
    """Choices as a list, or as ARC has them: {"text": [...], "label": [...]} with an "answerKey"."""
    choices, labels = row["choices"], None
    if isinstance(choices, str):
        try:
            choices = json.loads(choices)
        except json.JSONDecodeError:
            raise DataError(f'{origin}: "choices" is not a list') from None
    if isinstance(choices, Mapping):
        choices, labels = choices.get("text"), choices.get("label")
    if not isinstance(choices, list) or len(choices) < 2:
        raise DataError(f'{origin}: "choices" must be a list of at least two')
    choices = [str(c) for c in choices]
    labels = list(map(str, labels or [chr(ord("A") + i) for i in range(len(choices))]))
    answer = row.get("answer", row.get("answerKey"))
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return Choice(prompt, tuple(choices), answer)
    for names in (choices, labels, list(map(str, range(len(choices))))):
        if str(answer).strip() in names:
            return Choice(prompt, tuple(choices), names.index(str(answer).strip()))
    raise DataError(
        f'{origin}: "answer" is {answer!r}; it must be the index (from 0), the letter or the text of '
        "one of the choices"
    )


# -- files -------------------------------------------------------------------------------------------


def _files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.name.endswith((*SUFFIXES, ".csv")))
        if not any(f.name.startswith("train") for f in files):
            if not files:
                raise DataError(f"{source}: no data files in this folder")
            return files
    splits = find_files(source)
    return splits.get("test") or splits.get("valid") or splits["train"]


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    if path.suffix != ".csv":
        yield from read_rows(path)
        return
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                yield f"{path}:{reader.line_num}", row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
