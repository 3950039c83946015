"""Where optimizer steps come from: the loop asks a source what to learn from next.

`Offline` gives batches of a data set. The online source, which samples, is `rollout.batches`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from mlx_align.data.dataset import Dataset
from mlx_align.data.stream import Stream, mismatched
from mlx_align.data.template import Example
from mlx_align.errors import ModelError
from mlx_align.losses import Method
from mlx_align.model.adapter import Adapter
from mlx_align.model.forward import choose_layout, make_batches, rewards
from mlx_align.model.load import LoadedModel
from mlx_align.model.open import open_model
from mlx_align.train.config import RunSettings
from mlx_align.train.moving import MovingReference
from mlx_align.train.optimizer import Optimizer
from mlx_align.train.reference import LogProbs, reference_log_probs
from mlx_align.train.step import Part, Whole, evaluate, survey


@dataclass(frozen=True, eq=False)
class Ground:
    """What every source stands on: the run's settings, model, adapter, data and order of examples."""

    settings: RunSettings
    folder: Path
    loaded: LoadedModel
    adapter: Adapter
    dataset: Dataset
    stream: Stream
    held_out: list[Example]
    total: int
    on_progress: Callable[[str, int, int], None]


class Learner(NamedTuple):
    """Somebody besides the policy who learns: its loss, its adapter (off until its turn), its optimizer,
    and its learning rate as a multiple of the policy's."""

    method: Method
    adapter: Adapter
    optimizer: Optimizer
    rate: float


class Update(NamedTuple):
    """What one optimizer step learns from, and who learns, if it is not the policy."""

    parts: list[Part]
    whole: Whole
    learner: Learner | None = None


@dataclass
class Work:
    """One step of the loop: its updates, the method's state after it, and what is to be recorded.

    `tokens` are counted as a user would, every completion with its prompt; `samples` go to
    samples.jsonl, and `sampling` is how many seconds it took to get them.
    """

    updates: Iterable[Update]
    state: dict
    tokens: int
    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[dict] = field(default_factory=list)
    sampling: float = 0.0


class Source(Protocol):
    """What the loop asks."""

    # What a checkpoint keeps besides adapter and optimizer, by name; each has state() and load().
    keeps: dict

    def work(self, step: int, state: dict) -> Work:
        """What step `step`, counted from 0, learns from."""

    def measure(self, state: dict) -> dict[str, float]:
        """The metrics on held-out data; empty where there is none."""

    def after(self, step: int) -> None:
        """Called when `step` steps are done."""

    def facts(self) -> dict:
        """What the adapter's config is to say of a finished run."""


class Offline:
    """Examples from a data set, against a reference that is computed before training."""

    def __init__(self, ground: Ground):
        self._ground = ground
        settings, method = ground.settings, ground.settings.method
        seen = [*ground.stream.seen(ground.total), *ground.held_out]
        self._partners: dict[str, Example] = {}
        if method.coupling == "mismatched":
            for examples in (ground.dataset.train, ground.dataset.valid):
                self._partners |= mismatched(
                    examples, settings.data.max_length, settings.train.seed
                )
            seen += [self._partners[e.uid] for e in seen if e.uid in self._partners]
        self._reference: LogProbs | None = None
        self._moving: MovingReference | None = None
        if method.uses_reference and method.sync_every:
            self._moving = MovingReference(
                ground.loaded, ground.adapter, method.sync_every, method.sync_weight
            )
        elif method.uses_reference:
            self._reference = _reference(ground, seen)
        self.keeps = {} if self._moving is None else {"reference": self._moving}

    def work(self, step: int, state: dict) -> Work:
        """The batch of the step."""
        examples = self._ground.stream.batch(step)
        parts, whole, state = self._gather(examples, state, training=True)
        tokens = sum(part.batch.real_tokens for part in parts)
        return Work([Update(parts, whole)], state, tokens)

    def measure(self, state: dict) -> dict[str, float]:
        """Loss and metrics of all held-out examples as one step."""
        ground = self._ground
        if not ground.held_out:
            return {}
        parts, whole, _ = self._gather(ground.held_out, state, training=False)
        return evaluate(ground.loaded, ground.settings.method, parts, whole).means()

    def after(self, step: int) -> None:
        """Let the reference follow."""
        if self._moving is not None:
            self._moving.after(step)

    def facts(self) -> dict:
        """Of a reward model the mean and deviation of its scores."""
        method = self._ground.settings.method
        return {"reward": self._reward_statistics()} if method.reads == "rewards" else {}

    def _gather(self, examples, state, training) -> tuple[list[Part], Whole, dict]:
        ground = self._ground
        ground.loaded.model.eval()
        parts = self._parts(examples)
        others = [self._partners[e.uid] for e in examples if e.uid in self._partners]
        whole, state = survey(
            ground.loaded,
            ground.settings.method,
            parts,
            self._parts(others),
            state,
            training=training,
        )
        return parts, whole, state

    def _parts(self, examples: Sequence[Example]) -> list[Part]:
        """The examples as packs, each with its reference."""
        settings = self._ground.settings
        packs = make_batches(
            self._ground.loaded,
            examples,
            settings.train.pack_length,
            prompts=settings.method.scores_prompts,
        )
        if self._moving is not None:
            return [Part(pack, self._moving.log_probs(pack)) for pack in packs]
        if self._reference is None:
            return [Part(pack) for pack in packs]
        return [Part(pack, pack.join(self._reference)) for pack in packs]

    def _reward_statistics(self) -> dict:
        """Mean and standard deviation of the reward over the completions that were trained on."""
        ground = self._ground
        ground.loaded.model.eval()
        seen = ground.stream.seen(ground.total)
        packs = make_batches(ground.loaded, seen, ground.settings.train.pack_length)
        scores = np.concatenate([np.array(rewards(ground.loaded, pack)) for pack in packs])
        scores = scores.astype(np.float64)
        return {"mean": float(scores.mean()), "std": float(scores.std())}


def _reference(ground: Ground, examples) -> LogProbs:
    """The log-probabilities of all examples under the reference that the settings name."""
    loaded, adapter, settings = ground.loaded, ground.adapter, ground.settings
    pack_length, name = settings.train.pack_length, settings.method.reference

    def on_progress(done, count):
        ground.on_progress("reference", done, count)

    if name != "start":
        other, worn = open_reference(ground)
        arrays = None if worn is None else worn.identity()
        return reference_log_probs(other, None, examples, pack_length, on_progress, arrays)
    loaded.model.eval()
    if settings.adapter.start:
        worn = adapter.identity()
        return reference_log_probs(loaded, None, examples, pack_length, on_progress, worn)
    return reference_log_probs(loaded, adapter, examples, pack_length, on_progress)


def open_reference(ground: Ground) -> tuple[LoadedModel, Adapter | None]:
    """The other model that the settings name as the reference, ready to score."""
    settings, name = ground.settings, ground.settings.method.reference
    other, worn = open_model(name, settings.model.dtype)
    if other.tokenizer.get_vocab() != ground.loaded.tokenizer.get_vocab():
        raise ModelError(
            f"{name}: has another vocabulary than {ground.loaded.name}, so it cannot be its reference"
        )
    choose_layout(other)
    other.model.eval()
    mx.eval(other.model.parameters())
    return other, worn
