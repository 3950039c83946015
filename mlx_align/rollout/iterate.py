"""Iterated rounds: sample from the model, score the samples, train on them, and again with the result.

    round-1/samples.jsonl -> round-1/data.jsonl -> round-1/run -> round-2/samples.jsonl -> ...

Every round has a folder of its own; what is there is not done again. The report of a round says how the
rewards do on samples that they have not been trained on, which drift away from their training data.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_align.data.dataset import DataSettings, load_dataset
from mlx_align.data.jsonl import read_rows
from mlx_align.data.stream import Stream
from mlx_align.demo import DEMO
from mlx_align.errors import DataError, SettingsError
from mlx_align.files import write_json, write_rows
from mlx_align.losses.selfplay import OnlineDPO
from mlx_align.model.open import open_model
from mlx_align.rollout.rewards import combine, parse_rewards
from mlx_align.rollout.rollouts import Rollout, Sampling, requests
from mlx_align.rollout.sampler import prompt_encoder
from mlx_align.settings import Settings, build, read_file, setting
from mlx_align.train.config import RunSettings, find_method
from mlx_align.train.loop import Events, Result, train_once

log = logging.getLogger("mlx_align")

SAMPLES, DATA, QUESTIONS, REPORT, PLAN = (
    "samples.jsonl", "data.jsonl", "to_label.jsonl", "report.json", "plan.json",
)  # fmt: skip
# Rewards of a reward model are in deviations from the mean of its training data; beyond so many it
# has seen hardly anything like it.
FAR = 3.0
# A reward that agrees with the watched one on so much fewer pairs than in the first round has drifted.
DRIFT = 0.1


@dataclass(frozen=True)
class Rounds(Settings):
    """The plan's own settings, besides `sample` and `train`."""

    model: str = setting(DEMO, "Model, run or adapter to begin with.")
    prompts: str = setting(DEMO, "Prompts to sample from, as for methods that learn from prompts.")
    output: str = setting("runs/iterated", "Folder of all rounds.")
    rounds: int = setting(3, "Rounds of sampling, scoring and training.", minimum=1)
    prompts_per_round: int = setting(256, "Prompts sampled from in a round.", minimum=1)
    label: bool = setting(
        False, "Have people label the samples instead of rewarding them; each round waits for them."
    )
    dtype: str = setting("auto", "Type to sample in.")
    seed: int = setting(0, "Seed of the prompts' order and of the sampling.", minimum=0)


@dataclass(frozen=True)
class Plan:
    """What `mlx-align iterate` does: `sample` as in online-dpo, `train` the settings of a method."""

    rounds: Rounds = field(default_factory=Rounds)
    sample: OnlineDPO = field(default_factory=OnlineDPO)
    method: str = "dpo"
    train: Mapping = field(default_factory=dict)

    def __post_init__(self):
        kind = find_method(self.method).data
        if kind == "prompts" or find_method(self.method).reads != "tokens":
            raise SettingsError(
                f"train: {self.method} does not learn from scored samples; name a method that learns from "
                "pairs, labels or completions"
            )
        if not self.sample.reward and not self.rounds.label:
            raise SettingsError(
                "sample: say what samples are rewarded by (reward: [runs/rm]), or let people judge "
                "(label: true)"
            )
        if self.rounds.label and kind != "pairs":
            raise SettingsError(
                f"label: people compare pairs, which {self.method} does not learn from"
            )

    def as_dict(self) -> dict:
        """Plain JSON data."""
        train = {"method": self.method, **self.train}
        return {**asdict(self.rounds), "sample": asdict(self.sample), "train": train}


def read_plan(source: str | Path | Mapping) -> Plan:
    """A plan from a YAML or JSON file or a mapping. Raises `SettingsError` that says what is wrong."""
    values = dict(source if isinstance(source, Mapping) else read_file(source))
    name = "plan" if isinstance(source, Mapping) else str(source)
    parts = {}
    for part in ("sample", "train"):
        parts[part] = values.pop(part, {})
        if not isinstance(parts[part], Mapping):
            raise SettingsError(f"{name}: {part} must hold 'name: value' lines")
    train = dict(parts["train"])
    method = train.pop("method", "dpo")
    (rounds,) = build((Rounds,), values, name)
    (sample,) = build((OnlineDPO,), parts["sample"], f"{name}: sample")
    return Plan(rounds, sample, method, train)


@dataclass(frozen=True)
class Report:
    """How the samples of a round's model are, before it is trained; shares are of 1, None where unknown.

    `agreement` is how often the reward prefers of two samples of a prompt the one that the watched
    reward, or people, prefer; `far` the share of rewards beyond 3 (of a reward model: deviations from
    the mean of its training data); `by_length` the correlation of reward and length within prompts.
    """

    round: int
    samples: int
    used: int
    reward: float | None
    watch: float | None
    agreement: float | None
    far: float | None
    by_length: float | None
    length: float
    finished: float


@dataclass(frozen=True)
class Iteration:
    """What became of a plan: the rounds' reports, the last run, and the file that waits for labels."""

    reports: list[Report]
    run: Path | None
    waiting: Path | None = None


def iterate(
    plan: Plan,
    resolve: Callable[[str, dict], dict],
    train: Callable[..., Result],
    *,
    events: Events | None = None,
    on_round: Callable[[str, int, int], None] = lambda what, number, count: None,
) -> Iteration:
    """Run all rounds of a plan, or those that are left; a last one only samples, to see what came of it.

    `resolve` makes of a method's settings all settings of a run, `train` is the loop.
    """
    rounds, folder = plan.rounds, Path(plan.rounds.output).expanduser()
    _claim(folder, plan)
    reports: list[Report] = []
    model, run = rounds.model, None
    for number in range(1, rounds.rounds + 2):
        place = folder / f"round-{number}"
        place.mkdir(exist_ok=True)
        last = number > rounds.rounds
        on_round("sampling", number, rounds.rounds)
        rows = _samples(plan, model, place, number)
        if rounds.label and not last and not _labelled(place):
            return Iteration(reports, run, place / QUESTIONS)
        data = [] if last else _data(plan, rows, place)
        reports.append(_report(number, rows, data, place))
        write_json(place / REPORT, asdict(reports[-1]))
        _say_drift(reports)
        if last:
            break
        on_round("training", number, rounds.rounds)
        settings = {**plan.train, "model": model, "data": str(place / DATA)}
        run = place / "run"
        made = resolve(plan.method, {**settings, "output": str(run)})
        train_once(train, RunSettings.from_flat(plan.method, made, "train"), run, events=events)
        model = str(run)
    return Iteration(reports, run)


def _claim(folder: Path, plan: Plan) -> None:
    """Make the folder this plan's. Raises `SettingsError` where it is another's."""
    record = folder / PLAN
    if record.exists():
        kept = read_plan(read_file(record))
        # Further rounds may be added to those that are there.
        same = {**plan.as_dict(), "rounds": None} == {**kept.as_dict(), "rounds": None}
        if not same:
            raise SettingsError(
                f"{folder}: holds the rounds of another plan; choose another output"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise SettingsError(f"{folder}: exists already and is not empty; choose another output")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record, plan.as_dict())


# -- sampling ----------------------------------------------------------------------------------------


def _samples(plan: Plan, model: str, place: Path, number: int) -> list[dict]:
    """The samples of a round with their rewards: one row a prompt."""
    path = place / SAMPLES
    if not path.exists():
        write_rows(path, _sample(plan, model, number))
        # The model is not needed while the next one trains.
        mx.clear_cache()
    return [row for _, row in read_rows(path)]


def _sample(plan: Plan, model: str, number: int) -> list[dict]:
    rounds, sample = plan.rounds, plan.sample
    loaded, _ = open_model(model, rounds.dtype)
    encoder = prompt_encoder(loaded)
    source = DataSettings(data=rounds.prompts, valid_share=0.0)
    dataset = load_dataset(source, encoder, kind="prompts", method="iterate", seed=rounds.seed)
    prompts = Stream(dataset.train, rounds.prompts_per_round, rounds.seed).batch(number - 1)
    rewards, watched = (parse_rewards(s) if s else [] for s in (sample.reward, sample.watch))
    rollout = Sampling(loaded, sample, rewards, None).step(
        prompts, rounds.seed * 1_000_003 + number
    )
    watch = combine(watched, requests(prompts, rollout.groups, rollout.texts)).total
    return _rows(rollout, rewards != [], watch.reshape(rollout.reward.shape), watched != [])


def _rows(rollout: Rollout, rewarded: bool, watch: np.ndarray, watched: bool) -> list[dict]:
    rows = []
    for i, (prompt, group) in enumerate(zip(rollout.prompts, rollout.groups, strict=True)):
        row = {
            "prompt": prompt.asked,
            "completions": rollout.texts[i],
            "finished": [s.finished for s in group],
            "tokens": [len(s.ids) for s in group],
            "origin": prompt.origin,
        }
        if rewarded:
            row["rewards"] = _plain(rollout.reward[i])
        if watched:
            row["watch"] = _plain(watch[i])
        rows.append(row)
    return rows


def _plain(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(v) else float(v) for v in values]


# -- labels ------------------------------------------------------------------------------------------


def _labelled(place: Path) -> bool:
    """Whether people have labelled the round; if they were not asked yet, the file for them is made.

    Raises `DataError` where a label is none of a, b, tie.
    """
    path = place / QUESTIONS
    if not path.exists():
        rows = [
            {
                "prompt": row["prompt"],
                "a": row["completions"][i],
                "b": row["completions"][j],
                "label": "",
            }
            for _, row in read_rows(place / SAMPLES)
            if (sides := _finished(row))[1:]
            for i, j in [sides[:2]]
        ]
        write_rows(path, rows)
        return False
    labels = [(origin, row.get("label")) for origin, row in read_rows(path)]
    wrong = [origin for origin, label in labels if label not in ("a", "b", "tie", "")]
    if wrong:
        raise DataError(f'{wrong[0]}: "label" must be "a", "b" or "tie" ({len(wrong)} such rows)')
    return all(label for _, label in labels)


def _finished(row: dict) -> list[int]:
    """The places of the different completions that ended by themselves: others would teach to stop."""
    places = [i for i, done in enumerate(row["finished"]) if done and row["completions"][i].strip()]
    return list({row["completions"][i]: i for i in reversed(places)}.values())[::-1]


# -- samples into data ---------------------------------------------------------------------------------


def _data(plan: Plan, rows: Sequence[dict], place: Path) -> list[dict]:
    """The rows that the method learns from, also written down."""
    if plan.rounds.label:
        labelled = [row for _, row in read_rows(place / QUESTIONS) if row["label"] != "tie"]
        made = [
            {
                "prompt": row["prompt"],
                "chosen": row[row["label"]],
                "rejected": row["b" if row["label"] == "a" else "a"],
            }
            for row in labelled
        ]
    else:
        make = {"pairs": _pair, "labels": _judged, "completions": _best}[
            find_method(plan.method).data
        ]
        made = [found for row in rows for found in make(row)]
    if not made:
        raise DataError(
            f"{place}: no sample can be learnt from: all are rewarded alike or cut short. Raise "
            "max_tokens or group_size, or look at the rewards in samples.jsonl"
        )
    write_rows(place / DATA, made)
    return made


def _ranked(row: dict) -> list[int]:
    """The places of the completions that can be learnt from, best first."""
    places = [i for i in _finished(row) if row["rewards"][i] is not None]
    return sorted(places, key=lambda i: -row["rewards"][i])


def _pair(row: dict) -> list[dict]:
    """The best and the worst completion, where they differ in reward."""
    places = _ranked(row)
    if len(places) < 2 or row["rewards"][places[0]] == row["rewards"][places[-1]]:
        return []
    chosen, rejected = (row["completions"][places[k]] for k in (0, -1))
    return [{"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}]


def _judged(row: dict) -> list[dict]:
    """The best completion as a good one, the worst as a bad one."""
    return [
        {"prompt": row["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in _pair(row)
        for side in ("chosen", "rejected")
    ]


def _best(row: dict) -> list[dict]:
    """The best completion (rejection sampling)."""
    return [
        {"prompt": row["prompt"], "completion": row["completions"][i]} for i in _ranked(row)[:1]
    ]


# -- how the rewards do ----------------------------------------------------------------------------------


def _report(number: int, rows: Sequence[dict], data: Sequence[dict], place: Path) -> Report:
    rewards, watch = _column(rows, "rewards"), _column(rows, "watch")
    tokens = np.array([row["tokens"] for row in rows], np.float64)
    agreement = None
    if rewards is not None:
        judged = _people(rows, place) if (place / QUESTIONS).exists() else watch
        agreement = None if judged is None else _agreement(rewards, judged)
    return Report(
        round=number,
        samples=tokens.size,
        used=len(data),
        reward=_mean(rewards),
        watch=_mean(watch),
        agreement=agreement,
        far=None if rewards is None else float(np.nanmean(np.abs(rewards) > FAR)),
        by_length=None if rewards is None else _correlation(rewards, tokens),
        length=float(tokens.mean()),
        finished=float(np.mean([row["finished"] for row in rows])),
    )


def _column(rows, name) -> np.ndarray | None:
    """float64[prompts, samples], NaN where there is none; None where no row has the column."""
    if not rows or name not in rows[0]:
        return None
    return np.array([row[name] for row in rows], np.float64)


def _mean(values) -> float | None:
    return None if values is None or np.isnan(values).all() else float(np.nanmean(values))


def _people(rows, place: Path) -> np.ndarray:
    """1 for the completion that people preferred, 0 for the other one, NaN elsewhere."""
    judged = np.full((len(rows), len(rows[0]["completions"])), np.nan)
    labels = [row["label"] for _, row in read_rows(place / QUESTIONS)]
    asked = [i for i, row in enumerate(rows) if len(_finished(row)) > 1]
    for i, label in zip(asked, labels, strict=True):
        if label in ("a", "b"):
            a, b = _finished(rows[i])[:2]
            judged[i, a], judged[i, b] = (1, 0) if label == "a" else (0, 1)
    return judged


def _agreement(rewards: np.ndarray, judged: np.ndarray) -> float | None:
    """On how many pairs of samples of a prompt that `judged` tells apart the reward says the same.

    A reward that does not tell them apart counts one half.
    """
    mine = np.sign(rewards[:, :, None] - rewards[:, None, :])
    theirs = np.sign(judged[:, :, None] - judged[:, None, :])
    told = (theirs > 0) & np.isfinite(mine)
    return float(((mine[told] + 1) / 2).mean()) if told.any() else None


def _correlation(rewards: np.ndarray, tokens: np.ndarray) -> float | None:
    """Pearson's correlation of reward and length, each taken from its prompt's mean."""
    known = np.isfinite(rewards).all(axis=1)
    x, y = (v[known] - v[known].mean(axis=1, keepdims=True) for v in (rewards, tokens))
    scale = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / scale) if scale else None


def _say_drift(reports: Sequence[Report]) -> None:
    first, now = reports[0], reports[-1]
    if now is first or None in (first.agreement, now.agreement):
        return
    if now.agreement < first.agreement - DRIFT:
        log.warning(
            "round %d: the reward agrees with what is watched on %.0f%% of the pairs of fresh samples, in "
            "round 1 it was %.0f%%: it has drifted. Train it anew on labels of fresh samples.",
            now.round,
            100 * now.agreement,
            100 * first.agreement,
        )
