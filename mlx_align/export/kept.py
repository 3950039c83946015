"""Whether an export still does what training taught: a small update can drown in rounding.

With a = log p_aligned - log p_base of a token and e = log p_export - log p_base, the share that is kept
is sum(e a) / sum(a a): the factor on the adapter's changes that comes nearest to the export's, by least
squares. It is 1 for an export that computes as the aligned model and 0 for the bare base. What rounding
changes besides, e - share * a, is noise: it blurs the share by a standard error (White 1980,
Econometrica 48:817, for noise that differs from token to token).
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_align.data.template import Example, end_of_turn, make_example
from mlx_align.evaluate.cases import own_sets
from mlx_align.evaluate.contender import Contender
from mlx_align.evaluate.heldout import held_out_sets, is_run
from mlx_align.export import folder, gguf
from mlx_align.export.fuse import base_layer
from mlx_align.model.adapter import Adapter
from mlx_align.model.forward import choose_layout, make_batches, token_log_probs
from mlx_align.model.load import STORED, LoadedModel, load_model
from mlx_align.rollout.sampler import SamplingSettings, prompt_encoder, sample

log = logging.getLogger("mlx_align")

# Types whose rounding no update drowns in.
EXACT = ("f32", "f16", "float32", "float16")
# If the share may be less than this, within two standard errors, that is worth a warning.
ENOUGH = 0.8
# Held-out rows, or prompts of each set that comes along; tokens of an answer; tokens in all, padding
# counted, so that the file is read once.
CASES, ANSWER_TOKENS, MOST_TOKENS = 8, 48, 2048


class Kept(NamedTuple):
    """A share that is kept, and its standard error."""

    share: float
    error: float


def report_kept(loaded: LoadedModel, adapter: Adapter, source: str | Path, path: Path) -> None:
    """Say how much of what training changed is in a GGUF file or folder of the merged model."""
    loaded.model.eval()
    whole = adapter.kind == "full"
    what = "training" if whole else "the adapter"
    examples = _within(choose_completions(loaded, source), MOST_TOKENS)
    kept = kept_share(loaded, adapter, path, examples)
    count = sum(len(e.completions) for e in examples)
    if kept is None:
        log.warning("%s changes nothing that could be kept (%d completions)", what, count)
        return
    error = f", standard error {100 * kept.error:.0f} %" if kept.error >= 0.005 else ""
    log.info(
        "kept %.0f %% of what %s changed (%d completions%s)",
        100 * kept.share,
        what,
        count,
        error,
    )
    if kept.share - 2 * kept.error < ENOUGH:
        log.warning(
            "in %s much of what %s changed may be lost in rounding: take a finer --quantize%s",
            path.name,
            what,
            " or --dtype" if whole else ", or --adapter-only, which leaves the adapter as it is",
        )


def kept_share(
    loaded: LoadedModel, adapter: Adapter, path: Path, examples: Sequence[Example]
) -> Kept | None:
    """The share of training's changes of token log-probabilities that a GGUF file or a folder keeps.

    `loaded` wears the adapter; where all weights were trained, its base is loaded beside it. None where
    nothing changes.
    """
    aligned = _log_probs(loaded, examples)
    if adapter.kind == "full":
        untrained = load_model(loaded.name, STORED)
        choose_layout(untrained)
        base = _log_probs(untrained, examples)
        del untrained
    else:
        with adapter.off():
            base = _log_probs(loaded, examples)
    with _as_written(loaded, path):
        written = _log_probs(loaded, examples)
    return fit_share(aligned - base, written - base)


def fit_share(change: np.ndarray, written: np.ndarray) -> Kept | None:
    """How much of `change`, float64[M], is in `written`, float64[M]; None where nothing changes."""
    size = change @ change
    if not size:
        return None
    share = written @ change / size
    noise = written - share * change
    return Kept(float(share), float(np.linalg.norm(noise * change) / size))


def choose_completions(loaded: LoadedModel, source: str | Path) -> list[Example]:
    """Completions of held-out rows of a run as far as it has any, else short answers of the model."""
    encoder = prompt_encoder(loaded)
    if is_run(source):
        sets, _ = held_out_sets(source, Contender("aligned", loaded, encoder))
        if sets:
            return [example for cases in sets for example in cases.limited(CASES).cases]
    sets = [cases for cases in own_sets(loaded.name) if cases.kind in ("requests", "questions")]
    prompts = [
        encoder.prompt_ids(case.prompt) for cases in sets for case in cases.limited(CASES).cases
    ]
    # One by one, since some models of mlx-lm (Gemma 2) cannot write a batch.
    settings = SamplingSettings(max_tokens=ANSWER_TOKENS)
    answers = [sample(loaded, [prompt], settings)[0] for prompt in prompts]
    turn = end_of_turn(loaded.tokenizer, loaded.template)[0] if loaded.template else None
    end = loaded.tokenizer.eos_token_id if turn is None else turn
    examples = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = [*answer.ids, *([end] if answer.finished else [])]
        examples.append(make_example(prompt, [ids], [[True] * len(ids)], "built in"))
    return examples


def _within(examples: Sequence[Example], tokens: int) -> list[Example]:
    """The shortest of the examples, as many as fit in one batch; at least one."""
    chosen: list[Example] = []
    for example in sorted(examples, key=lambda e: max(e.lengths)):
        rows = sum(len(e.completions) for e in (*chosen, example))
        if chosen and rows * max(example.lengths) > tokens:
            break
        chosen.append(example)
    return chosen


def _log_probs(loaded, examples) -> np.ndarray:
    """float64 log-probability of every scored token, in the same order each time."""
    parts = []
    for batch in make_batches(loaded, examples, MOST_TOKENS):
        token, _ = token_log_probs(loaded, batch)
        parts.append(np.asarray(token, np.float64)[batch.weight > 0])
    return np.concatenate(parts)


@contextlib.contextmanager
def _as_written(loaded: LoadedModel, path: Path):
    """While this is open the model computes with the matrices of a GGUF file or a folder.

    Those of the blocks are read when they are used and dropped again, so one is in memory at a time.
    """
    modules = dict(loaded.model.named_modules())
    in_blocks = {id(m) for block in loaded.model.layers for m in block.modules()}
    own, replaced = {}, {}
    for name, read in _matrices(loaded, path):
        layer = name.removesuffix(".weight")
        # Convolutions, states and the like stay as they are; few of the weights are in them.
        if layer not in modules or not _is_linear(modules[layer]):
            continue
        own[layer] = modules[layer]
        if id(modules[layer]) in in_blocks:
            replaced[layer] = _FileLinear(read, _bias(modules[layer]))
        else:
            replaced[layer] = _in_memory(modules[layer], read().astype(loaded.dtype))
    loaded.model.update_modules(tree_unflatten(list(replaced.items())))
    try:
        yield
    finally:
        loaded.model.update_modules(tree_unflatten(list(own.items())))


def _matrices(loaded, path):
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    if files:
        return gguf.written_matrices(loaded, files[0])
    return folder.written_matrices(loaded, path)


class _FileLinear(nn.Module):
    """A linear layer, or stacked experts, with a matrix [..., out, in] that is read anew at each use;
    computes in float32."""

    def __init__(self, read: Callable[[], mx.array], bias: mx.array | None):
        super().__init__()
        self.read = read
        self.bias = mx.zeros(()) if bias is None else bias

    def __call__(self, x, experts=None, **options):
        weight = self.read().swapaxes(-1, -2)
        if experts is None:
            y = x @ weight + self.bias
        else:
            y = mx.gather_mm(x, weight, rhs_indices=experts, **options)
            if self.bias.ndim > 1:
                y = y + mx.expand_dims(self.bias[experts], -2)
        y = y.astype(x.dtype)
        mx.eval(y)
        return y


def _is_linear(layer) -> bool:
    """Whether a layer, adapted or not, is linear, an embedding, or stacked experts."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    kinds = (nn.Linear, nn.QuantizedLinear, nn.Embedding, nn.QuantizedEmbedding)
    return isinstance(base_layer(layer), (*kinds, SwitchLinear, QuantizedSwitchLinear))


def _bias(layer) -> mx.array | None:
    return base_layer(layer).get("bias")


def _in_memory(layer, weight: mx.array) -> nn.Module:
    """An embedding or head like `layer` with another matrix."""
    if hasattr(layer, "as_linear"):
        made = nn.Embedding(1, 1)
    else:
        made = nn.Linear(1, 1, bias=_bias(layer) is not None)
        if "bias" in made:
            made.bias = _bias(layer)
    made.weight = weight
    made.freeze()
    return made
