"""From a batch to the log-probability of every predicted token: the one path for all methods."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import mlx.core as mx
import numpy as np

from mlx_align.data.packing import Batch, pack, pad, split_into_packs
from mlx_align.data.template import Example, make_example
from mlx_align.kernels.token_log_prob import (
    TokenRatios,
    TokenScores,
    full_log_probs,
    log_ratios,
)
from mlx_align.model.load import LoadedModel
from mlx_align.model.packed import PackLayout, install_hooks

log = logging.getLogger("mlx_align")

# Mean difference of log-probabilities that rounding alone explains, by the model's dtype.
TOLERANCE = {mx.float32: 1e-4, mx.float16: 0.01, mx.bfloat16: 0.05}


def token_log_probs(
    loaded: LoadedModel, batch: Batch, *, gradient: bool = False
) -> tuple[mx.array, mx.array]:
    """Log-probability of each target of a batch, and whether it is the model's first choice.

    Returns float32[M] and bool[M]. `gradient` says whether a backward pass will follow.
    """
    return token_scores(loaded, batch, gradient=gradient)[:2]


def token_scores(
    loaded: LoadedModel,
    batch: Batch,
    *,
    gradient: bool = False,
    moments: bool = False,
    temperature: float = 1.0,
) -> TokenScores:
    """The scores of each target of a batch, of the logits divided by `temperature`.

    `moments` asks for collision and entropy, too.
    """
    states, targets = predicting_states(loaded, batch), mx.array(batch.target)
    if loaded.head is None:
        logits = states.astype(mx.float32) / temperature
        return full_log_probs(logits, targets, moments=moments)
    return loaded.head.log_probs(
        states, targets, gradient=gradient, moments=moments, temperature=temperature
    )


def token_ratios(
    loaded: LoadedModel,
    reference: Callable[[], AbstractContextManager[LoadedModel]],
    batch: Batch,
    *,
    temperature: float = 1.0,
) -> TokenRatios:
    """The scores of each target of a batch beside those of a reference, which `reference` puts on.

    The policy's are those of `token_scores`, to the last bit. Where the models give whole logits, both
    are compared in one pass over them.
    """

    def logits(model):
        return predicting_states(model, batch).astype(mx.float32) / temperature

    if loaded.head is None:
        own = logits(loaded)
        mx.eval(own)
        with reference() as other:
            if other.head is None:
                return log_ratios(own, logits(other), mx.array(batch.target))
    scores = token_scores(loaded, batch, moments=True, temperature=temperature)
    # Before the reference's pass, so that the insides of one are in memory at a time.
    mx.eval(scores)
    with reference() as other:
        return TokenRatios.of(scores, token_scores(other, batch, temperature=temperature).logp)


def completion_log_probs(loaded: LoadedModel, batch: Batch) -> dict[str, np.ndarray]:
    """Summed log-probability of each completion by the uid of its example, float64[K] each."""
    token, _ = token_log_probs(loaded, batch)
    return batch.by_example(batch.sum_tokens(np.asarray(token, np.float64)))


def rewards(loaded: LoadedModel, batch: Batch) -> mx.array:
    """The reward head's score of each completion of a batch, read off its last token; float32[N]."""
    return loaded.model.score(_states(loaded, batch)[mx.array(batch.last)])


def values(loaded: LoadedModel, batch: Batch) -> mx.array:
    """A critic's value of the state in which each target of a batch is chosen; float32[M]."""
    return loaded.model.score(predicting_states(loaded, batch))


def predicting_states(loaded: LoadedModel, batch: Batch) -> mx.array:
    """The hidden state that predicts each target of a batch, [M, D], in front of the vocabulary head.

    Where the head is unknown, the logits, [M, V].
    """
    return _states(loaded, batch)[mx.array(batch.source)]


def _states(loaded, batch) -> mx.array:
    """What the vocabulary head is given at every token, [B * T, D]; the logits where it is unknown."""
    tokens, cache = mx.array(batch.tokens), None
    if batch.segments:
        layout = PackLayout(batch, dense=loaded.layout == "dense")
        cache = [layout] * loaded.cache_entries
    if loaded.head is None:
        states = loaded.model(tokens, cache=cache)
    else:
        with loaded.head.tapped() as tap:
            loaded.model(tokens, cache=cache)
        states = tap.hidden
    return states.reshape(-1, states.shape[-1])


# Most tokens in a pack unless a run says otherwise: small packs stay in a CPU's cache, large ones
# keep a GPU busy.
PACK_LENGTH = {mx.cpu: 512, mx.gpu: 2048}


def make_batches(
    loaded: LoadedModel,
    examples: Sequence[Example],
    pack_length: int | None = None,
    *,
    prompts: bool = False,
) -> list[Batch]:
    """Batches of at most `pack_length` tokens in the layout that the model can run.

    On a GPU, sizes are rounded up, so that few different shapes are seen. With `prompts`, the
    prompts' tokens are predicted too.
    """
    shared = loaded.layout != "plain"
    device = mx.default_device().type
    pack_length = pack_length or PACK_LENGTH[device]
    multiple = 1 if device == mx.cpu else 32
    make = pack if shared else pad
    groups = split_into_packs(examples, pack_length, shared=shared)
    return [make(group, multiple, prompts=prompts) for group in groups]


def choose_layout(loaded: LoadedModel) -> str:
    """Find out, by trying, how this model can run packs, and prepare it.

    "segments" (attention along the tree), "dense" (masks as matrices, for models that compute their own
    scores; a block of queries at a time) or "plain" (one completion a row, for recurrent models and
    others that do not let a token choose what it sees). Each layout is compared with separate forward
    passes on a small made-up batch.
    """
    examples = _probe_examples(loaded.vocabulary)
    loaded.layout = "plain"
    separate = np.concatenate(
        [_score(loaded, pad([single])) for e in examples for single in _split(e)]
    )
    install_hooks(loaded.model)
    tolerance = TOLERANCE.get(loaded.dtype, 0.05)
    for layout in ("segments", "dense"):
        loaded.layout = layout
        try:
            difference = np.abs(_score(loaded, pack(examples)) - separate).mean()
        except (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError) as error:
            log.debug("layout %s: %s", layout, error)
            continue
        log.debug("layout %s differs from separate passes by %.2e", layout, difference)
        if difference <= tolerance:
            return layout
    loaded.layout = "plain"
    return "plain"


def _score(loaded, batch):
    logp, _ = token_log_probs(loaded, batch)
    return np.asarray(logp)


def _probe_examples(vocabulary: int) -> list[Example]:
    rng = np.random.default_rng(0)

    def ids(count):
        return rng.integers(0, vocabulary, count)

    def example(prompt, *completions):
        masks = [np.ones(n, bool) for n in completions]
        return make_example(ids(prompt), [ids(n) for n in completions], masks, "probe")

    return [example(9, 12, 5), example(3, 2, 10, 7)]


def _split(example):
    """One example for each completion."""
    return [
        make_example(example.prompt, [c], [s], example.origin)
        for c, s in zip(example.completions, example.scored, strict=True)
    ]
