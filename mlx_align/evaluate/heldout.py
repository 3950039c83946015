"""What a model is measured on: given files, the rows its run kept out of training, and our own sets."""

from collections.abc import Sequence
from pathlib import Path

from mlx_align.data.template import Example, find_template, make_example
from mlx_align.errors import DataError
from mlx_align.evaluate.cases import CaseSet, own_sets, read_sets
from mlx_align.evaluate.contender import Contender
from mlx_align.evaluate.measures import HELD_OUT
from mlx_align.train.config import RunSettings
from mlx_align.train.loop import read_run_data
from mlx_align.train.runlog import RUN, read_run


def is_run(source: str | Path) -> bool:
    """Whether a folder is a run's."""
    return (Path(source).expanduser() / RUN).is_file()


def run_beta(source: str | Path) -> float | None:
    """The beta that a run was trained with, if it is a run and its method has one."""
    if not is_run(source):
        return None
    return read_run(Path(source).expanduser()).get("settings", {}).get("beta")


def read_given(data: str | Path | Sequence[str | Path]) -> list[CaseSet]:
    """The sets in the files that a caller names."""
    sources = [data] if isinstance(data, str | Path) else data
    return [cases for source in sources for cases in read_sets(str(source))]


def gather_sets(
    given: Sequence[CaseSet], run: str | Path | None, contender: Contender, own: bool
) -> tuple[list[CaseSet], list[str]]:
    """The given sets; with `own`, before them the run's held-out rows and behind them those that come
    along, for the kinds that were not given. And what has to be said of them."""
    sets, notes = list(given), []
    if own:
        kinds = {cases.kind for cases in given}
        if kinds & {"questions", "choices"}:
            kinds |= {"questions", "choices"}
        sets += [cases for cases in own_sets(contender.loaded.name) if cases.kind not in kinds]
        if run is not None and is_run(run):
            found, why_not = held_out_sets(run, contender)
            sets = [*found, *sets]
            notes += [f"Not measured on held-out rows: {why_not}."] if why_not else []
    if not sets:
        raise DataError("nothing to measure: give data, or leave the sets that come along in")
    return sets, notes


def held_out_sets(source: str | Path, contender: Contender) -> tuple[list[CaseSet], str]:
    """The held-out rows of a run as it saw them, and why there are none (or "").

    They are read, rendered and split again by the run's settings; the fingerprint of the data tells
    whether that gave the same rows.
    """
    record = read_run(Path(source).expanduser())
    run = RunSettings.from_flat(record["method"], record["settings"], f"{source}/{RUN}")
    if run.method.data == "prompts":
        return [], _rewarded(record)
    loaded = contender.loaded
    template = loaded.template
    if template is not None and template.source is not None:
        # Templates may print the date, and the run began on another day.
        date = record.get("template_date")
        template = find_template(loaded.tokenizer, run.data.chat_template, date)
    try:
        dataset = read_run_data(run, loaded, template)
    except DataError as error:
        return [], f"the run's held-out rows cannot be read: {str(error).splitlines()[0]}"
    if dataset.fingerprint != record.get("data_fingerprint"):
        return [], "the run's data is not what it was when the run began, so none of it is used"
    sets = [
        CaseSet(HELD_OUT, "pairs", tuple(_pairs(dataset.valid))),
        CaseSet(HELD_OUT, "texts", tuple(e for e in dataset.valid if not _is_labelled(e))),
    ]
    sets = [s.limited(run.train.eval_examples) for s in sets if s.cases]
    return sets, "" if sets else "the run has no held-out rows that tell good from bad"


def _rewarded(record) -> str:
    """What is known of a run that learnt from rewards: they have no held-out answers."""
    before, after = (record.get(when) or {} for when in ("before", "after"))
    if "reward" not in before or "reward" not in after:
        return "the run learns from rewards, and is not finished"
    return (
        "the run learnt from rewards; on held-out prompts its mean reward went from "
        f"{before['reward']:.3f} to {after['reward']:.3f}"
    )


def _is_labelled(example) -> bool:
    return len(example.completions) > 1 or bool(example.values)


def _pairs(examples) -> list[Example]:
    """Pairs as they are, and the good and bad completions that share a prompt as pairs."""
    pairs = [e for e in examples if len(e.completions) == 2]
    judged: dict[bytes, tuple[list, list]] = {}
    for e in examples:
        if len(e.completions) == 1 and e.values:
            sides = judged.setdefault(e.prompt.tobytes(), ([], []))
            sides[0 if e.values[0] > 0 else 1].append(e)
    for good, bad in judged.values():
        for one, other in zip(good, bad, strict=False):
            completions = [*one.completions, *other.completions]
            scored = [*one.scored, *other.scored]
            pairs.append(make_example(one.prompt, completions, scored, one.origin))
    return pairs
