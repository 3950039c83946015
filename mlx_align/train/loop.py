"""The training loop: the only one.

open the run folder -> examples -> reference -> for each step: losses and gradients over packs,
update, log, perhaps evaluate, perhaps save. Nothing here knows one method from another.
"""

import contextlib
import logging
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_align.data.dataset import Dataset, DataSettings, load_dataset
from mlx_align.data.stream import Stream
from mlx_align.data.template import Encoder, Example
from mlx_align.errors import (
    AlignError,
    DataError,
    RunError,
    SettingsError,
    StaleReferenceError,
)
from mlx_align.files import write_atomically
from mlx_align.model.adapter import WEIGHTS, Adapter, wear_adapter
from mlx_align.model.forward import choose_layout
from mlx_align.model.heads import attach_reward_head
from mlx_align.model.load import LoadedModel, load_model
from mlx_align.model.open import TEMPLATE, find_adapter
from mlx_align.model.recompute import checkpoint_blocks
from mlx_align.settings import fingerprint
from mlx_align.train.checkpoint import Checkpoints, Progress
from mlx_align.train.config import RunSettings
from mlx_align.train.diagnosis import Diagnosis
from mlx_align.train.optimizer import Optimizer, learning_rate_at
from mlx_align.train.reference import model_fingerprint
from mlx_align.train.runlog import (
    RUN,
    Metrics,
    check_space,
    claim_folder,
    read_run,
    versions,
    write_run,
)
from mlx_align.train.source import Ground, Offline, Source
from mlx_align.train.step import NOTHING, Totals, train_step

log = logging.getLogger("mlx_align")


class Events:
    """What a caller may watch; the default does nothing."""

    def on_start(self, folder: Path) -> None:
        """The run folder is there; from now on the run can be resumed."""

    def on_progress(self, what: str, done: int, total: int) -> None:
        """Preparatory work, such as the reference pass."""

    def on_step(self, row: dict, total: int) -> None:
        """After every optimizer step; `row` is what metrics.jsonl gets."""

    def on_eval(self, row: dict) -> None:
        """After every evaluation on held-out data."""

    def on_samples(self, step: int, samples: list[dict]) -> None:
        """What was sampled in a step, as rows of samples.jsonl; every few steps."""


@dataclass(frozen=True)
class Result:
    """What a run came to. `before` and `after` are the held-out metrics, empty without held-out data;
    `monitor` is the one that tells the best step and whether it is to rise, `stopped` says why the run
    stopped itself."""

    folder: Path
    steps: int
    finished: bool
    before: dict
    after: dict
    best_step: int | None
    monitor: tuple[str, bool]
    stopped: str


@dataclass
class _Run:
    """What one training run works with."""

    ground: Ground
    source: Source
    checkpoints: Checkpoints
    metrics: Metrics
    events: Events

    @property
    def settings(self) -> RunSettings:
        return self.ground.settings


def train(
    settings: RunSettings,
    folder: Path,
    *,
    resume: bool = False,
    events: Events | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    prepared: dict[str, Dataset] | None = None,
    make_source: Callable[[Ground], Source] = Offline,
) -> Result:
    """Run the training that the settings describe in `folder`, or go on with the one that is there.

    `should_stop` is asked after every step; when it says yes, a checkpoint is written and the
    unfinished result returned. Before the first step there is nothing to write: what is asked to stop
    there raises `KeyboardInterrupt`, and the run can be resumed all the same. `prepared` keeps data
    sets by what they depend on, for several runs on the same data. `make_source` makes what says which
    examples each step learns from.
    """
    events = events or Events()
    if resume:
        record = read_run(folder)
    else:
        claim_folder(folder)
        record = {"method": settings.method.name, "settings": settings.flat(), "finished": False}
        write_run(folder, record)
    events.on_start(folder)
    with _awake():
        try:
            run = _prepare(settings, folder, record, events, should_stop, prepared, make_source)
        except AlignError:
            if not resume:
                # Nothing was begun, so nothing is left behind: the same command can be given again.
                shutil.rmtree(folder)
            raise
        return _loop(run, record, should_stop)


def _prepare(
    settings: RunSettings,
    folder: Path,
    record: dict,
    events: Events,
    should_stop,
    prepared: dict[str, Dataset] | None,
    make_source: Callable[[Ground], Source],
) -> _Run:
    loaded = load_model(
        settings.model.model,
        settings.model.dtype,
        settings.data.chat_template,
        record.get("template_date"),
    )
    choose_layout(loaded)
    if settings.method.reads == "rewards":
        attach_reward_head(loaded.model, loaded.head, settings.train.seed)
    if loaded.layout == "plain":
        log.warning(
            "this model cannot run packed (its tokens cannot choose what they see): every completion "
            "runs with its own copy of the prompt; slower, the results are the same"
        )
    _use_memory_well()
    dataset = _read_data(settings, loaded, {} if prepared is None else prepared)
    facts = {
        "model_fingerprint": model_fingerprint(loaded),
        "data_fingerprint": dataset.fingerprint,
        "template_date": loaded.template.date if loaded.template else None,
    }
    for name, value in facts.items():
        if record.get(name, value) != value:
            what = "model" if name.startswith("model") else "data"
            raise StaleReferenceError(
                f"{folder}: the {what} is not what it was when this run began, so the run cannot go "
                "on. Start a new run."
            )
    adapter = wear_adapter(loaded.model, settings.adapter, settings.train.seed)
    _start_from(adapter, settings.adapter.start)
    keep = settings.train.keep_checkpoints + 2
    check_space(folder, 3 * keep * sum(x.nbytes for x in adapter.weights().values()))
    record |= {
        **facts,
        "learning_rate": settings.learning_rate,
        "trained_values": adapter.size,
        "layout": loaded.layout,
        "dtype": str(loaded.dtype).removeprefix("mlx.core."),
        "device": str(mx.default_device()),
        "data_report": dataset.report.as_dict(),
        "train_examples": len(dataset.train),
        "valid_examples": len(dataset.valid),
        "versions": versions(),
    }
    write_run(folder, record)
    log.info(
        "model %s, data %s: %d training and %d held-out examples; %s values trained (%s), in %s",
        settings.model.model,
        settings.data.data,
        len(dataset.train),
        len(dataset.valid),
        f"{adapter.size:,}",
        settings.adapter.fine_tune,
        record["dtype"],
    )
    if settings.adapter.fine_tune == "full" and loaded.dtype != mx.float32:
        log.warning(
            "all weights are trained in %s: updates below its precision are lost; --dtype float32 "
            "keeps them and takes twice the memory",
            record["dtype"],
        )
    values = [value for e in dataset.train for value in e.values]
    for line in settings.method.advice(values):
        log.warning("%s", line)
    stream = Stream(
        dataset.train,
        settings.train.batch_size,
        settings.train.seed,
        mixed=settings.method.data == "labels",
    )
    total = settings.train.steps or math.ceil(settings.train.epochs * stream.steps_per_epoch)
    held_out = _sample(dataset.valid, settings.train.eval_examples, settings.train.seed)

    def on_progress(what, done, count):
        events.on_progress(what, done, count)
        if should_stop():
            raise KeyboardInterrupt

    ground = Ground(
        settings, folder, loaded, adapter, dataset, stream, held_out, total, on_progress
    )
    source = make_source(ground)
    if settings.train.grad_checkpoint:
        checkpoint_blocks(loaded.model)
    if settings.data.chat_template:
        write_atomically(folder / TEMPLATE, loaded.template.source)
    checkpoints = Checkpoints(
        folder, settings.adapter, _adapter_extra(settings), settings.train.keep_checkpoints
    )
    return _Run(ground, source, checkpoints, Metrics(folder), events)


def _start_from(adapter: Adapter, start: str | None) -> None:
    """Put the arrays of the adapter in a folder on; a reward head that is new stays as it is."""
    if start is None:
        return
    folder = find_adapter(start)
    if folder is None:
        raise RunError(f"{start}: the adapter to start from is not there (any more)")
    weights = mx.load(str(folder / WEIGHTS))
    own = adapter.weights()
    fresh = {name: own[name] for name in own.keys() - weights.keys() if name.startswith("score.")}
    adapter.load({**weights, **fresh}, str(folder / WEIGHTS))


def _adapter_extra(settings: RunSettings) -> dict:
    """What the adapter's config says besides mlx-lm's keys: where to put it on, how it was made."""
    extra = {"model": settings.model.model, "method": settings.method.name}
    if settings.data.thinking is not None:
        extra["thinking"] = settings.data.thinking
    if settings.method.reads == "rewards":
        extra |= {"head": "reward", "prompt_format": settings.data.prompt_format}
    return extra


def _read_data(settings: RunSettings, loaded: LoadedModel, prepared: dict) -> Dataset:
    method, seed = settings.method, settings.train.seed
    key = fingerprint(
        [
            asdict(settings.data),
            settings.model.model,
            loaded.template.date if loaded.template else None,
            seed,
            [method.data, method.reads, method.needs_margin],
        ]
    )
    if key in prepared:
        return prepared[key]
    wanted, possible = settings.data.max_length, loaded.context_length
    if possible and wanted > possible and wanted != DataSettings().max_length:
        log.warning("--max-length is more than the model's context; %d is used", possible)
    dataset = read_run_data(settings, loaded, loaded.template)
    for line in dataset.report.lines():
        log.warning("%s", line)
    prepared[key] = dataset
    return dataset


def read_run_data(settings: RunSettings, loaded: LoadedModel, template) -> Dataset:
    """The examples of a run, as its settings read, render and split them."""
    method, data, context = settings.method, settings.data, loaded.context_length
    encoder = Encoder(
        loaded.tokenizer,
        max_length=min(data.max_length, context or data.max_length),
        template=template,
        prompt_format=data.prompt_format,
        thinking=data.thinking,
        # A reward is read off the end, which a cut answer does not have.
        truncate=method.reads != "rewards",
    )
    dataset = load_dataset(
        data,
        encoder,
        kind=method.data,
        method=method.name,
        seed=settings.train.seed,
        needs_margin=method.needs_margin,
    )
    _check_ids([*dataset.train, *dataset.valid], loaded)
    return dataset


def _check_ids(examples: Sequence[Example], loaded: LoadedModel) -> None:
    """Raise `DataError` for tokens that the model has no embedding of; MLX would read beyond it."""
    for example in examples:
        top = max(int(ids.max(initial=0)) for ids in (example.prompt, *example.completions))
        if top >= loaded.vocabulary:
            raise DataError(
                f"{example.origin}: has the token {top} ({loaded.tokenizer.decode([top])!r}), but the "
                f"model's embedding has {loaded.vocabulary} rows; the tokenizer is of another model, or "
                "the text holds a token that this model does not know"
            )


def _loop(run: _Run, record: dict, should_stop) -> Result:
    ground, source = run.ground, run.source
    settings, method, total = run.settings.train, run.settings.method, ground.total
    loaded, adapter = ground.loaded, ground.adapter
    eval_every = max(1, total // 4) if settings.eval_every is None else settings.eval_every
    optimizer = Optimizer(settings.weight_decay, settings.max_grad_norm)
    progress = run.checkpoints.load_latest(adapter, optimizer, source.keeps)
    # Without a checkpoint everything is done again, the evaluation before the first step too.
    run.metrics.cut_after(progress.step or -1)
    note = _Notes(run)
    if progress.step == 0:
        record["before"] = _evaluate(run, progress, note)
        write_run(ground.folder, record)

    while progress.step < total:
        learning_rate = learning_rate_at(
            progress.step, total, run.settings.learning_rate, settings.schedule, settings.warmup
        )
        started = time.perf_counter()
        try:
            work = source.work(progress.step, progress.method_state)
        except AlignError:
            # A user's reward function may fail after hours; what was learnt so far is kept.
            if progress.step:
                run.checkpoints.save(adapter, optimizer, progress, source.keeps)
            raise
        # Dropout then depends on the step alone, and a resumed run draws what the unbroken one drew.
        mx.random.seed(settings.seed * 1_000_003 + progress.step)
        totals, norms = NOTHING, []
        for parts, whole, learner in work.updates:
            loaded.model.train()
            if learner is None:
                here, norm = train_step(
                    loaded, adapter, optimizer, method, parts, learning_rate, whole
                )
                totals, norms = totals.add(here), [*norms, norm]
                continue
            with adapter.replaced_by(learner.adapter):
                loaded.model.train()
                here, _ = train_step(
                    loaded,
                    learner.adapter,
                    learner.optimizer,
                    learner.method,
                    parts,
                    learning_rate * learner.rate,
                    whole,
                )
            totals = totals.add(Totals(0.0, 0.0, here.metrics))
        progress.method_state = work.state
        seconds = time.perf_counter() - started
        progress.step += 1
        source.after(progress.step)
        progress.tokens += work.tokens
        progress.seconds += seconds
        row = {
            "step": progress.step,
            "split": "train",
            "epoch": ground.stream.epoch(progress.step),
            # Samples may leave nothing to learn from: all cut short, and those left out.
            **(totals.means() if norms else {"loss": 0.0}),
            **work.metrics,
            "learning_rate": learning_rate,
            "grad_norm": sum(norms) / max(len(norms), 1),
            "tokens_per_second": work.tokens / seconds,
            "num_tokens": progress.tokens,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
            "seconds": progress.seconds,
        }
        if work.sampling:
            row["rollout/share"] = work.sampling / seconds
        run.metrics.write_samples(progress.step, work.samples)
        note(row)
        run.events.on_step(row, total)
        if method.show_every and work.samples and progress.step % method.show_every == 0:
            run.events.on_samples(progress.step, work.samples)
        last = progress.step == total
        if last or (eval_every and progress.step % eval_every == 0):
            after = _evaluate(run, progress, note)
            _keep_best(run, progress, after)
        stopping = not last and (should_stop() or bool(note.stopped))
        if stopping or (progress.step % settings.save_every == 0 and not last):
            run.checkpoints.save(adapter, optimizer, progress, source.keeps)
        if stopping:
            break

    finished = progress.step == total
    extra = _adapter_extra(run.settings)
    if finished:
        facts = source.facts()
        extra |= facts
        record |= facts
        record["after"] = after
    adapter.save(ground.folder, run.settings.adapter, extra)
    record |= {"finished": finished, "progress": asdict(progress)}
    write_run(ground.folder, record)
    return Result(
        ground.folder,
        progress.step,
        finished,
        record.get("before") or {},
        record.get("after") or {},
        progress.best_step,
        method.monitor,
        "" if finished else note.stopped,
    )


class _Notes:
    """Writes rows down and says what they bring to light; on resuming, what was said is not repeated."""

    def __init__(self, run: _Run):
        settings = run.settings
        self._metrics, self._stops = run.metrics, settings.method.stop_on_hacking
        # Why the run is to stop, if it is.
        self.stopped = ""
        self._diagnosis = Diagnosis(
            settings.method.name, settings.flat(), run.ground.total, settings.method.uses_reference
        )
        for row in run.metrics.rows():
            self._diagnosis.update(row)

    def __call__(self, row: dict) -> None:
        self._metrics.write(row)
        for finding in self._diagnosis.update(row):
            log.warning("step %d: %s", finding.step, finding.text)
            if finding.hacking and self._stops:
                self.stopped = finding.rule


def _evaluate(run: _Run, progress: Progress, note: _Notes) -> dict:
    """The metrics on held-out data, written down; an empty dict where there is none."""
    run.ground.loaded.model.eval()
    means = run.source.measure(progress.method_state)
    if not means:
        return {}
    row = {
        "step": progress.step,
        "split": "valid",
        "epoch": run.ground.stream.epoch(progress.step),
        **means,
    }
    note(row)
    run.events.on_eval(row)
    return means


def _keep_best(run: _Run, progress: Progress, metrics: dict) -> None:
    if not metrics:
        return
    name, rising = run.settings.method.monitor
    value, best = metrics[name], progress.best_value
    if best is None or (value > best if rising else value < best):
        progress.best_value, progress.best_step = value, progress.step
        run.checkpoints.save_best(run.ground.adapter, progress)


def _sample(examples: list[Example], count: int, seed: int) -> list[Example]:
    if len(examples) <= count:
        return examples
    chosen = np.random.default_rng([seed, 0xE7A1]).permutation(len(examples))[:count]
    return [examples[i] for i in sorted(chosen)]


@contextlib.contextmanager
def _awake():
    """Keep a Mac from sleeping meanwhile; the display may, since a lit one has killed long runs."""
    if sys.platform != "darwin":
        yield
        return
    try:
        keeper = subprocess.Popen(["caffeinate", "-i", "-s"])
    except OSError:
        log.warning("caffeinate could not be started; the Mac may fall asleep during the run")
        yield
        return
    try:
        yield
    finally:
        keeper.terminate()


def _use_memory_well() -> None:
    """On Metal, wire the model down and keep the allocator's cache from growing without end."""
    if not mx.metal.is_available():
        return
    working_set = mx.device_info()["max_recommended_working_set_size"]
    mx.set_wired_limit(working_set)
    mx.set_cache_limit(working_set // 8)


def train_once(
    train: Callable[..., Result], settings: RunSettings, folder: Path, **options
) -> dict:
    """The held-out metrics of the run of these settings in a folder, by `train` as far as it is not done.

    Raises `SettingsError` where the folder holds a run of other settings.
    """
    resume = (folder / RUN).exists()
    if resume:
        record = read_run(folder)
        if record["settings"] != settings.flat():
            raise SettingsError(f"{folder}: is a run with other settings; choose another --output")
        if record["finished"]:
            return record.get("after") or {}
    return train(settings, folder, resume=resume, **options).after


def resume_settings(folder: Path) -> RunSettings:
    """The settings of the run in a folder. Raises `RunError` where it is finished already."""
    record = read_run(folder)
    if record.get("finished"):
        raise RunError(f"{folder}: this run is finished; nothing is left to do")
    return RunSettings.from_flat(record["method"], record["settings"], str(folder / "run.json"))
