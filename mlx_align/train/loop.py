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
from mlx_align.data.packing import Batch
from mlx_align.data.stream import Stream
from mlx_align.data.template import Encoder, Example
from mlx_align.errors import AlignError, RunError, StaleReferenceError
from mlx_align.files import write_atomically
from mlx_align.model.adapter import Adapter, wear_adapter
from mlx_align.model.forward import choose_layout, make_batches
from mlx_align.model.load import LoadedModel, load_model
from mlx_align.model.open import TEMPLATE
from mlx_align.model.recompute import checkpoint_blocks
from mlx_align.train.checkpoint import Checkpoints, Progress
from mlx_align.train.config import RunSettings
from mlx_align.train.optimizer import Optimizer, learning_rate_at
from mlx_align.train.reference import (
    LogProbs,
    join_reference,
    model_fingerprint,
    reference_log_probs,
)
from mlx_align.train.runlog import Metrics, check_space, claim_folder, read_run, versions, write_run
from mlx_align.train.step import NOTHING, evaluate_batch, train_step

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


@dataclass(frozen=True)
class Result:
    """What a run came to. `before` and `after` are the held-out metrics, empty without held-out data."""

    folder: Path
    steps: int
    finished: bool
    before: dict
    after: dict
    best_step: int | None


@dataclass
class _Run:
    """What one training run works with."""

    settings: RunSettings
    folder: Path
    loaded: LoadedModel
    adapter: Adapter
    stream: Stream
    held_out: list[Example]
    total: int
    reference: LogProbs | None
    checkpoints: Checkpoints
    metrics: Metrics
    events: Events

    def batches(self, examples: Sequence[Example]) -> list[tuple[Batch, np.ndarray | None]]:
        """The examples as packs, each with its reference."""
        packs = make_batches(self.loaded, examples, self.settings.train.pack_length)
        if self.reference is None:
            return [(pack, None) for pack in packs]
        return [(pack, join_reference(pack, self.reference)) for pack in packs]


def train(
    settings: RunSettings,
    folder: Path,
    *,
    resume: bool = False,
    events: Events | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Result:
    """Run the training that the settings describe in `folder`, or go on with the one that is there.

    `should_stop` is asked after every step; when it says yes, a checkpoint is written and the
    unfinished result returned. Before the first step there is nothing to write: what is asked to stop
    there raises `KeyboardInterrupt`, and the run can be resumed all the same.
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
            run = _prepare(settings, folder, record, events, should_stop)
        except AlignError:
            if not resume:
                # Nothing was begun, so nothing is left behind: the same command can be given again.
                shutil.rmtree(folder)
            raise
        return _loop(run, record, should_stop)


def _prepare(
    settings: RunSettings, folder: Path, record: dict, events: Events, should_stop
) -> _Run:
    loaded = load_model(
        settings.model.model,
        settings.model.dtype,
        settings.data.chat_template,
        record.get("template_date"),
    )
    choose_layout(loaded)
    if loaded.layout == "plain":
        log.warning(
            "this model cannot run packed (its tokens cannot choose what they see): every completion "
            "runs with its own copy of the prompt; slower, the results are the same"
        )
    _use_memory_well()
    dataset = _read_data(settings, loaded)
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
    stream = Stream(dataset.train, settings.train.batch_size, settings.train.seed)
    total = settings.train.steps or math.ceil(settings.train.epochs * stream.steps_per_epoch)
    held_out = _sample(dataset.valid, settings.train.eval_examples, settings.train.seed)
    reference = None
    if settings.method.uses_reference:

        def on_progress(done, count):
            events.on_progress("reference", done, count)
            if should_stop():
                raise KeyboardInterrupt

        loaded.model.eval()
        reference = reference_log_probs(
            loaded,
            adapter,
            [*stream.seen(total), *held_out],
            settings.train.pack_length,
            on_progress,
        )
    if settings.train.grad_checkpoint:
        checkpoint_blocks(loaded.model)
    if settings.data.chat_template:
        write_atomically(folder / TEMPLATE, loaded.template.source)
    checkpoints = Checkpoints(
        folder, settings.adapter, _adapter_extra(settings), settings.train.keep_checkpoints
    )
    return _Run(
        settings,
        folder,
        loaded,
        adapter,
        stream,
        held_out,
        total,
        reference,
        checkpoints,
        Metrics(folder),
        events,
    )


def _adapter_extra(settings: RunSettings) -> dict:
    """What the adapter's config says besides mlx-lm's keys: where to put it on, how it was made."""
    return {"model": settings.model.model, "method": settings.method.name}


def _read_data(settings: RunSettings, loaded: LoadedModel) -> Dataset:
    max_length = settings.data.max_length
    if loaded.context_length and max_length > loaded.context_length:
        max_length = loaded.context_length
        if settings.data.max_length != DataSettings().max_length:
            log.warning("--max-length is more than the model's context; %d is used", max_length)
    encoder = Encoder(
        loaded.tokenizer,
        max_length=max_length,
        template=loaded.template,
        prompt_format=settings.data.prompt_format,
        thinking=settings.data.thinking,
    )
    dataset = load_dataset(
        settings.data,
        encoder,
        kind=settings.method.data,
        method=settings.method.name,
        seed=settings.train.seed,
    )
    for line in dataset.report.lines():
        log.warning("%s", line)
    return dataset


def _loop(run: _Run, record: dict, should_stop) -> Result:
    settings, stream, total = run.settings.train, run.stream, run.total
    eval_every = max(1, total // 4) if settings.eval_every is None else settings.eval_every
    optimizer = Optimizer(settings.weight_decay, settings.max_grad_norm)
    progress = run.checkpoints.load_latest(run.adapter, optimizer)
    # Without a checkpoint everything is done again, the evaluation before the first step too.
    run.metrics.cut_after(progress.step or -1)
    held_out = run.batches(run.held_out)
    if progress.step == 0:
        record["before"] = _evaluate(run, held_out, progress)
        write_run(run.folder, record)

    while progress.step < total:
        learning_rate = learning_rate_at(
            progress.step, total, run.settings.learning_rate, settings.schedule, settings.warmup
        )
        started = time.perf_counter()
        batches = run.batches(stream.batch(progress.step))
        run.loaded.model.train()
        # Dropout then depends on the step alone, and a resumed run draws what the unbroken one drew.
        mx.random.seed(settings.seed * 1_000_003 + progress.step)
        totals, grad_norm = train_step(
            run.loaded, run.adapter, optimizer, run.settings.method, batches, learning_rate
        )
        seconds = time.perf_counter() - started
        tokens = sum(batch.real_tokens for batch, _ in batches)
        progress.step += 1
        progress.tokens += tokens
        progress.seconds += seconds
        row = {
            "step": progress.step,
            "split": "train",
            "epoch": stream.epoch(progress.step),
            **totals.means(),
            "learning_rate": learning_rate,
            "grad_norm": grad_norm,
            "tokens_per_second": tokens / seconds,
            "num_tokens": progress.tokens,
            "peak_memory_gb": mx.get_peak_memory() / 1e9,
            "seconds": progress.seconds,
        }
        run.metrics.write(row)
        run.events.on_step(row, total)
        last = progress.step == total
        if last or (eval_every and progress.step % eval_every == 0):
            after = _evaluate(run, held_out, progress)
            _keep_best(run, progress, after)
        stopping = not last and should_stop()
        if stopping or (progress.step % settings.save_every == 0 and not last):
            run.checkpoints.save(run.adapter, optimizer, progress)
        if stopping:
            break

    finished = progress.step == total
    run.adapter.save(run.folder, run.settings.adapter, _adapter_extra(run.settings))
    record |= {"finished": finished, "progress": asdict(progress)}
    if finished:
        record["after"] = after
    write_run(run.folder, record)
    return Result(
        run.folder,
        progress.step,
        finished,
        record.get("before") or {},
        record.get("after") or {},
        progress.best_step,
    )


def _evaluate(run: _Run, held_out, progress: Progress) -> dict:
    """The method's loss and metrics on held-out data; an empty dict where there is none."""
    if not held_out:
        return {}
    run.loaded.model.eval()
    totals = NOTHING
    for batch, reference in held_out:
        totals = totals.add(evaluate_batch(run.loaded, run.settings.method, batch, reference))
    means = totals.means()
    row = {
        "step": progress.step,
        "split": "valid",
        "epoch": run.stream.epoch(progress.step),
        **means,
    }
    run.metrics.write(row)
    run.events.on_eval(row)
    return means


def _keep_best(run: _Run, progress: Progress, metrics: dict) -> None:
    if not metrics:
        return
    value = metrics["loss"]
    if progress.best_value is None or value < progress.best_value:
        progress.best_value, progress.best_step = value, progress.step
        run.checkpoints.save_best(run.adapter, progress)


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


def resume_settings(folder: Path) -> RunSettings:
    """The settings of the run in a folder. Raises `RunError` where it is finished already."""
    record = read_run(folder)
    if record.get("finished"):
        raise RunError(f"{folder}: this run is finished; nothing is left to do")
    return RunSettings.from_flat(record["method"], record["settings"], str(folder / "run.json"))
