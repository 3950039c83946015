"""From a data source to training and held-out examples, with a report of what was left out."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlx_align import demo
from mlx_align.data.jsonl import find_files, read_rows, summarise
from mlx_align.data.records import (
    ChatRecord,
    CompletionRecord,
    JudgedPairRecord,
    LabelRecord,
    PairRecord,
    Problem,
    PromptRecord,
    Record,
    TextRecord,
    Unfit,
    parse_prompt,
    parse_record,
)
from mlx_align.data.spellings import parse_fields, rename
from mlx_align.data.template import Encoder, Example
from mlx_align.demo import DEMO
from mlx_align.errors import DataError
from mlx_align.settings import Settings, setting

KINDS = {
    PairRecord: "preference pairs (prompt, chosen, rejected)",
    JudgedPairRecord: "pairs taken as judged completions",
    LabelRecord: "completions judged good or bad (prompt, completion, label)",
    CompletionRecord: "prompts with one completion",
    ChatRecord: "conversations (messages)",
    TextRecord: "plain text",
    PromptRecord: "prompts to be answered",
}
ACCEPTS = {
    "pairs": (PairRecord,),
    "labels": (LabelRecord, JudgedPairRecord),
    "prompts": (PromptRecord,),
    "completions": (ChatRecord, CompletionRecord, TextRecord),
}
SHOWN_LINES = 12


@dataclass(frozen=True)
class DataSettings(Settings):
    """What to learn from."""

    data: str = setting(
        DEMO,
        "File (.jsonl, .jsonl.gz, .json, .parquet), folder with train/valid/test files, or Hub data "
        "set; demo is the data that comes along.",
    )
    valid_data: str | None = setting(None, "File of held-out examples, instead of a split.")
    field: tuple[str, ...] = setting(
        (),
        "Columns under other names, as NAME=COLUMN: label=rating, prompt=meta.question, "
        "margin=score_chosen-score_rejected.",
    )
    unpair: bool = setting(
        False,
        "Take preference pairs as judged completions, the chosen ones good and the rejected ones bad.",
    )
    split: str | None = setting(
        None, "Name of the split to train on, where a folder or Hub data set has several."
    )
    valid_share: float = setting(
        0.05,
        "Share of the prompts held out when the data brings no held-out file; 0 for none.",
        minimum=0,
        below=1,
    )
    max_length: int = setting(
        1024,
        "Longest prompt + completion in tokens; longer completions are cut, longer prompts dropped.",
        minimum=2,
        aliases=("max_seq_length",),
    )
    chat_template: str | None = setting(
        None, "Chat template to use instead of the tokenizer's: 'chatml' or a .jinja file."
    )
    prompt_format: str = setting(
        "auto",
        "How a prompt given as text is read. chat: as the user's turn; text: as it stands; auto: chat "
        "where the tokenizer has a chat template and the text is not rendered yet.",
        choices=("auto", "chat", "text"),
    )
    thinking: bool | None = setting(
        None,
        "Render with the chat template's thinking mode on or off. Default: the template's own.",
    )


@dataclass
class DataReport:
    """What was read, changed and left out, for people and for `run.json`."""

    source: str
    rows: int = 0
    kind: str = ""
    problems: list[Problem] = field(default_factory=list)
    changes: Counter = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """The report in words: one line for each kind of thing that was dropped or changed."""
        by_kind: dict[str, list[str]] = {}
        for problem in self.problems:
            by_kind.setdefault(problem.kind, []).append(problem.origin)
        lines = [
            f"dropped {len(origins)} of {self.rows} rows: {kind} ({_join_lines(origins)})"
            for kind, origins in by_kind.items()
        ]
        return lines + [f"{count} {what}" for what, count in sorted(self.changes.items()) if count]

    def as_dict(self) -> dict:
        """Plain JSON data."""
        return {
            "source": self.source,
            "kind": self.kind,
            "rows": self.rows,
            "dropped": dict(Counter(p.kind for p in self.problems)),
            "dropped_rows": [[p.origin, p.kind] for p in self.problems],
            "changed": {what: count for what, count in self.changes.items() if count},
        }


def _join_lines(origins: list[str]) -> str:
    """ "a.jsonl: lines 3, 7, 9 and 4 more"."""
    file = origins[0].rpartition(":")[0]
    numbers = [o.rpartition(":")[2].removeprefix("row ") for o in origins[:SHOWN_LINES]]
    more = len(origins) - len(numbers)
    listed = ", ".join(numbers) + (f" and {more} more" if more > 0 else "")
    return f"{file}: line{'s' if len(origins) > 1 else ''} {listed}"


@dataclass
class Dataset:
    """Training and held-out examples and the report of how they came about."""

    train: list[Example]
    valid: list[Example]
    report: DataReport

    @property
    def fingerprint(self) -> str:
        """Hash of all examples in order: what a resumed run must find again."""
        digest = hashlib.sha256()
        for part in (self.train, self.valid):
            for e in part:
                digest.update(bytes.fromhex(e.uid) + repr((e.values, e.weight)).encode())
            digest.update(b"|")
        return digest.hexdigest()[:32]


def read_records(
    files: Iterable,
    report: DataReport,
    fields: Sequence[tuple[str, str]] = (),
    parse: Callable[[object, str], Record] = parse_record,
) -> list[Record]:
    """All usable records of some files; what is left out goes into the report.

    `fields` are other names for columns, as `spellings.parse_fields` gives them. Raises `DataError`
    with the first malformed lines and their number.
    """
    records, errors = [], []
    for file in files:
        try:
            for origin, row in read_rows(file):
                report.rows += 1
                try:
                    records.append(parse(rename(row, fields, origin), origin))
                except Unfit as unfit:
                    report.problems.append(Problem(unfit.kind, origin))
                except DataError as error:
                    errors.append(str(error))
        except DataError as error:
            errors.append(str(error))
    if errors:
        raise DataError(summarise(errors))
    return records


def encode_records(
    records: Iterable[Record], encoder: Encoder, report: DataReport
) -> list[Example]:
    """The examples of all records that can be encoded; the others go into the report."""
    examples = []
    for record in records:
        try:
            examples += encoder.examples(record)
        except Unfit as unfit:
            report.problems.append(Problem(unfit.kind, record.origin))
    report.changes.update(encoder.counts)
    encoder.counts.clear()
    return examples


def load_dataset(
    settings: DataSettings,
    encoder: Encoder,
    *,
    kind: str,
    method: str,
    seed: int,
    needs_margin: bool = False,
) -> Dataset:
    """Read, check, encode and split the data that the settings name.

    `kind` is what the method learns from (a key of `ACCEPTS`). Raises `DataError` when
    a file is malformed, of another kind, or leaves nothing to learn from.
    """
    source = str(demo.data_folder(kind)) if settings.data == DEMO else settings.data
    unpair = settings.unpair or (settings.data == DEMO and kind == "labels")
    fields = parse_fields(settings.field)
    files = find_files(source, settings.split)
    report = DataReport(settings.data)

    def usable(files):
        parse = parse_prompt if kind == "prompts" else parse_record
        records = read_records(files, report, fields, parse)
        if kind == "labels" and unpair:
            records = [r.unpaired() if isinstance(r, PairRecord) else r for r in records]
        _check_kind(records, kind, method, report)
        if needs_margin:
            _check_margins(records, method)
        return records

    records = usable(files["train"])
    held_out = _held_out_files(settings, files)
    if held_out:
        train = encode_records(records, encoder, report)
        valid = encode_records(usable(held_out), encoder, report)
    else:
        examples = encode_records(records, encoder, report)
        train, valid = split_by_prompt(examples, settings.valid_share, seed)
    if not train:
        what = "; ".join(report.lines()) or "the file is empty"
        raise DataError(f"{settings.data}: no usable example is left: {what}")
    return Dataset(train, valid, report)


def _held_out_files(settings, files):
    if settings.valid_data:
        return find_files(settings.valid_data)["train"]
    return files.get("valid") or files.get("test")


def _check_margins(records, method):
    lacking = next((r for r in records if r.margin is None), None)
    if lacking is not None:
        raise DataError(
            f'{lacking.origin}: has no "margin". {method} learns how much better the chosen completion '
            'is; give every row a number "margin", or name columns: '
            "--field margin=score_chosen-score_rejected."
        )


def _check_kind(records, kind, method, report):
    accepts = ACCEPTS[kind]
    counts = Counter(type(r) for r in records)
    if not counts:
        return
    report.kind = KINDS[counts.most_common(1)[0][0]]
    wrong = next((r for r in records if not isinstance(r, accepts)), None)
    if wrong is not None:
        wanted = " or ".join(KINDS[t] for t in accepts)
        raise DataError(
            f"{wrong.origin}: this row is of the kind: {KINDS[type(wrong)]}. "
            f"{method} learns from {wanted}.{_advice(type(wrong), kind)}"
        )


def _advice(found, wanted: str) -> str:
    if found is PairRecord and wanted == "labels":
        return (
            " To take the chosen completions as good and the rejected ones as bad, add --unpair; the "
            "method made for pairs is: mlx-align dpo."
        )
    fitting = {PairRecord: "dpo", LabelRecord: "kto"}.get(found, "sft")
    return f" For this kind of data use: mlx-align {fitting}."


def split_by_prompt(
    examples: list[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Hold out about `share` of the examples, all examples of one prompt on one side.

    The split depends on the content and the seed alone, not on the order of the rows.
    """

    def group(example):
        # Plain text has no prompt; all texts begin alike.
        return example.uid.encode() if example.whole else example.prompt.tobytes()

    prompts = sorted({group(e) for e in examples})
    held = round(len(prompts) * share)
    if share > 0 and held == 0 and len(prompts) >= 2:
        held = 1
    order = np.random.default_rng([seed, 0x5EED]).permutation(len(prompts))
    chosen = {prompts[i] for i in order[:held]}
    train = [e for e in examples if group(e) not in chosen]
    valid = [e for e in examples if group(e) in chosen]
    return train, valid
