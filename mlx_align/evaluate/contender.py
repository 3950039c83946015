"""A model under evaluation: what it answers, and how likely it finds given text.

Two contenders may share one model in memory: the base is the aligned model with its adapter off.
Knows nothing of what is measured by this.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_align.data.packing import pad, split_into_packs
from mlx_align.data.records import CompletionRecord, Record, Text, TextRecord, Unfit
from mlx_align.data.template import Encoder, Example, make_example
from mlx_align.errors import ModelError
from mlx_align.model.adapter import Adapter
from mlx_align.model.forward import (
    PACK_LENGTH,
    choose_layout,
    completion_log_probs,
    make_batches,
    predicting_states,
)
from mlx_align.model.load import LoadedModel, load_model
from mlx_align.model.open import open_model
from mlx_align.rollout.sampler import Completion, SamplingSettings, sample

Progress = Callable[[str, int, int], None]
# Prompts answered between two reports of progress.
PORTION = 64
# Texts are scored in windows of this many tokens, or of the model's context where that is less.
WINDOW = 1024
# Bytes of the full logits of both models while their divergence is computed.
DIVERGENCE_BYTES = 64 * 2**20
_THOUGHTS = re.compile(r"^\s*<think>.*?(?:</think>|\Z)", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Contender:
    """A model under a name; while `worn()` is open it is the one that is meant."""

    name: str
    loaded: LoadedModel
    encoder: Encoder
    worn: Callable[[], AbstractContextManager] = nullcontext

    def prompt_ids(self, prompt: Text | Example) -> list[int]:
        """The ids that an answer starts from."""
        if isinstance(prompt, Example):
            return prompt.prompt.tolist()
        return self.encoder.prompt_ids(prompt)

    def examples(self, record: Record | Example) -> list[Example]:
        """A record as ids. Raises `Unfit` where it does not fit this model."""
        if isinstance(record, Example):
            return [record]
        if isinstance(record, TextRecord):
            return self._windows(record)
        return self.encoder.examples(record)

    def choices(self, prompt: Text, texts: Sequence[str]) -> list[Example]:
        """One example for each possible answer."""
        records = [CompletionRecord(prompt, text, "") for text in texts]
        return [self.encoder.examples(record)[0] for record in records]

    def _windows(self, record) -> list[Example]:
        """All of a text, each token predicted once; no end token, which a reader does not see."""
        prefix = self.encoder.prefix
        ids = list(self.loaded.tokenizer.encode(record.text, add_special_tokens=False))
        if len(prefix) + len(ids) < 2:
            raise Unfit("a text of one token")
        opening, ids = (prefix, ids) if prefix else (ids[:1], ids[1:])
        size = min(WINDOW, self.loaded.context_length or WINDOW) - len(opening)
        windows = []
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            before = opening if prefix or not start else ids[start - 1 : start]
            windows.append(make_example(before, [part], [np.ones(len(part), bool)], record.origin))
        return windows


def open_contender(
    name: str, source: str | Path, *, base: str | None = None, dtype: str = "auto", **encoding
) -> tuple[Contender, Contender | None]:
    """The model that `source` names, and its base where it has an adapter (else None).

    `encoding` is `prompt_format` and `thinking`.
    """
    loaded, adapter = open_model(source, dtype, base)
    if "score" in loaded.model:
        raise ModelError(
            f"{source}: is a reward model; measure it with: mlx-align score --data ..."
        )
    contender = _contender(name, loaded, encoding)
    return contender, _base_of(contender, adapter, dtype, encoding) if adapter else None


def _contender(name, loaded, encoding, worn=nullcontext) -> Contender:
    loaded.model.eval()
    choose_layout(loaded)
    encoder = Encoder(
        loaded.tokenizer,
        max_length=loaded.context_length or 1 << 20,
        template=loaded.template,
        **encoding,
    )
    return Contender(name, loaded, encoder, worn)


def _base_of(contender, adapter: Adapter, dtype, encoding) -> Contender:
    if adapter.kind != "full":
        return Contender("base", contender.loaded, contender.encoder, adapter.off)
    # All weights were trained, so the base has to be loaded beside it.
    base = load_model(contender.loaded.name, dtype)
    base.template = contender.loaded.template
    base.tokenizer.eos_token_ids = contender.loaded.tokenizer.eos_token_ids
    return _contender("base", base, encoding)


def open_pair(
    before: str | Path, after: str | Path | None, *, base: str | None = None, **options
) -> tuple[Contender, Contender]:
    """What is compared: a run's base with the run, or any two models."""
    if after is not None:
        return (
            open_contender("before", before, base=base, **options)[0],
            open_contender("after", after, base=base, **options)[0],
        )
    aligned, its_base = open_contender("aligned", before, base=base, **options)
    if its_base is None:
        raise ModelError(
            f"{before}: has no adapter, so there is nothing to compare it with; name a second model "
            "or run"
        )
    return its_base, aligned


def same_tokens(one: Contender, other: Contender) -> bool:
    """Whether both read and write the same ids for the same text."""
    if one.loaded is other.loaded:
        return True
    a, b = one.loaded.tokenizer, other.loaded.tokenizer
    return one.loaded.vocabulary == other.loaded.vocabulary and a.get_vocab() == b.get_vocab()


def answer(
    contender: Contender,
    prompts: Sequence[Text | Example],
    settings: SamplingSettings,
    progress: Progress = lambda what, done, total: None,
) -> list[Completion]:
    """One completion of each prompt; a model's thoughts before its answer are cut off its text."""
    ids = [contender.prompt_ids(prompt) for prompt in prompts]
    completions: list[Completion] = []
    for start in range(0, len(ids), PORTION):
        with contender.worn():
            completions += sample(contender.loaded, ids[start : start + PORTION], settings)
        progress(f"answers of {contender.name}", len(completions), len(ids))
    return [Completion(c.ids, _THOUGHTS.sub("", c.text), c.finished) for c in completions]


def score(
    contender: Contender,
    examples: Sequence[Example],
    progress: Progress = lambda what, done, total: None,
) -> list[np.ndarray]:
    """Summed log-probability (nats) of each completion of each example, float64[K] each."""
    unique = list({e.uid: e for e in examples}.values())
    found: dict[str, np.ndarray] = {}
    with contender.worn():
        for batch in make_batches(contender.loaded, unique):
            found |= completion_log_probs(contender.loaded, batch)
            progress(f"log-probabilities of {contender.name}", len(found), len(unique))
    return [found[e.uid] for e in examples]


def scored_tokens(example: Example) -> np.ndarray:
    """Tokens that count of each completion, int[K]."""
    return np.array(example.scored_lengths)


def divergence(
    after: Contender,
    before: Contender,
    examples: Sequence[Example],
    progress: Progress = lambda what, done, total: None,
) -> list[float]:
    """KL(after || before) of the next token in nats, summed over the scored tokens of each example.

    Exact over the vocabulary, in float32, in chunks of rows: the full logits of a text never exist.
    Both must write the same ids (`same_tokens`).
    """
    unique = list({e.uid: e for e in examples}.values())
    found: dict[str, float] = {}
    for group in split_into_packs(unique, PACK_LENGTH[mx.default_device().type], shared=False):
        batch = pad(group)
        hidden = [_hidden(contender, batch) for contender in (after, before)]
        rows = max(1, DIVERGENCE_BYTES // (8 * after.loaded.vocabulary))
        parts = []
        for start in range(0, len(batch.source), rows):
            p, q = (
                _log_softmax(contender, states[start : start + rows])
                for contender, states in zip((after, before), hidden, strict=True)
            )
            parts.append((mx.exp(p) * (p - q)).sum(axis=-1))
            mx.eval(parts[-1])
        sums = batch.sum_tokens(np.concatenate([np.asarray(part, np.float64) for part in parts]))
        found |= {uid: float(each.sum()) for uid, each in batch.by_example(sums).items()}
        progress("divergence", len(found), len(unique))
    return [found[e.uid] for e in examples]


def _hidden(contender, batch) -> mx.array:
    """What the vocabulary head is given for each prediction [M, D]; the logits where it is unknown."""
    with contender.worn():
        states = predicting_states(contender.loaded, batch)
        mx.eval(states)
    return states


def _log_softmax(contender, states) -> mx.array:
    head = contender.loaded.head
    with contender.worn():
        z = states.astype(mx.float32) if head is None else head.logits(states)
    return z - mx.logsumexp(z, axis=-1, keepdims=True)
