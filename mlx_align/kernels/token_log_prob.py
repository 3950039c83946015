"""Log-probabilities of given tokens without the full logits.

    logp[t] = z[t, target] - logsumexp(z[t])    z = softcap(scale * (hidden @ W.T + bias)) / temperature

The vocabulary is walked in chunks with a running maximum and sum (Milakov and Gimelshein 2018,
arXiv:1805.02867), so memory is tokens x chunk, not tokens x V. With a frozen head the unit gradient
d logp / d hidden = W[target] - softmax(z) @ W falls out of the same walk and the backward pass only
scales it: two matrix products a token instead of three.

On a Mac our Metal kernels reduce each chunk in one reading, where they are faster. All sums and logits
are float32 whatever the weights are. Knows nothing of where heads come from.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from mlx_align.kernels import dispatch, metal_log_prob
from mlx_align.kernels.dispatch import Variant
from mlx_align.kernels.metal_log_prob import Chunk
from mlx_align.kernels.source import DTYPES, MIN_ELEMENTS

# Bytes of one chunk of logits; also bounds the float32 copy of one chunk of weights. MLX's CPU
# backend allocates up to 100 operations ahead of the one that runs, which is about 8 chunks.
CHUNK_BYTES = {"cpu": 8 * 2**20, "gpu": 64 * 2**20}
# More rows at a time would make the chunks of the vocabulary too narrow for matrix products.
BLOCK_ROWS = 2048


def _chunk_bytes() -> int:
    return CHUNK_BYTES["cpu" if mx.default_device() == mx.cpu else "gpu"]


class TokenScores(NamedTuple):
    """What a head says of M targets.

    logp is float32[M], hit bool[M] (the target is the most likely token). Where they were asked for,
    collision, float32[M], is log(sum of p^2) over the vocabulary, and entropy, float32[M], -sum of p log
    p in nats; no gradient flows through them.
    """

    logp: mx.array
    hit: mx.array
    collision: mx.array | None = None
    entropy: mx.array | None = None


@dataclass(frozen=True, eq=False)
class Projection:
    """How hidden states become logits: a frozen matrix [V, D], perhaps quantised.

    `quantisation` is (scales, biases, group size, bits, mode) of MLX's packed `weight`.
    """

    weight: mx.array
    quantisation: tuple | None = None
    bias: mx.array | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def rows(self, index) -> mx.array:
        """Rows of the matrix in float32, for a slice or an array of row numbers."""
        weight = self.weight[index]
        if self.quantisation is None:
            return weight.astype(mx.float32)
        scales, biases, group_size, bits, mode = self.quantisation
        return mx.dequantize(
            weight,
            scales[index],
            None if biases is None else biases[index],
            group_size=group_size,
            bits=bits,
            mode=mode,
        ).astype(mx.float32)


def frozen_log_probs(
    hidden: mx.array,
    targets: mx.array,
    head: Projection,
    *,
    gradient: bool = True,
    moments: bool = False,
) -> TokenScores:
    """The scores of each target; `moments` asks for collision and entropy, too.

    `hidden` is [M, D], `targets` int[M]. Differentiable in `hidden` only; `gradient=False` skips
    the work for that.
    """
    if not gradient:
        hidden = mx.stop_gradient(hidden)
        *scores, _ = _blocks(hidden, targets, head, False, moments)
        return TokenScores(*scores[: 4 if moments else 2])

    @mx.custom_function
    def log_probs(hidden, targets):
        return _blocks(hidden, targets, head, True, moments)

    @log_probs.vjp
    def backward(primals, cotangents, outputs):
        return (cotangents[0][:, None] * outputs[-1]).astype(primals[0].dtype), None

    *scores, _ = log_probs(hidden, targets)
    return TokenScores(*scores[: 4 if moments else 2])


def _blocks(hidden, targets, head, gradient, moments):
    """`_walk` for blocks of rows, one after the other."""
    parts = []
    for start in range(0, hidden.shape[0], BLOCK_ROWS):
        here = hidden[start : start + BLOCK_ROWS]
        if parts:
            here = mx.depends([here], [p for p in parts[-1] if p is not None])[0]
        parts.append(_walk(here, targets[start : start + BLOCK_ROWS], head, gradient, moments))
    if len(parts) == 1:
        return parts[0]
    return tuple(None if p[0] is None else mx.concatenate(p) for p in zip(*parts, strict=True))


def _walk(hidden, targets, head, gradient, moments):
    """(logp, is the most likely, collision, entropy, unit gradient) by one walk over the vocabulary.

    Without `moments` the third and fourth are the first again, since a custom function has no empty
    outputs.
    """
    if _use_kernel(mx.float32, hidden.shape[0], head.weight.shape[0]):
        return _walk_by_kernel(hidden, targets, head, gradient)
    # The softmax is in base 2 (see tree_attention); a soft cap needs natural units before it.
    unit = math.log2(math.e) / head.temperature
    factor = head.scale * (1.0 if head.softcap else unit)
    hidden = hidden.astype(mx.float32) * factor

    def logits(hidden, weight, bias):
        """Base-2 logits, and their derivative by the natural logit if that is not constant."""
        z = hidden @ weight.swapaxes(-1, -2)
        if bias is not None:
            z = z + bias.astype(mx.float32) * factor
        if not head.softcap:
            return z, None
        bent = mx.tanh(z / head.softcap)
        return bent * (head.softcap * unit), 1 - bent * bent

    target_weight = head.rows(targets)
    bias = None if head.bias is None else head.bias[targets]
    target = (hidden * target_weight).sum(axis=-1)
    if bias is not None:
        target = target + bias.astype(mx.float32) * factor
    slope = 1.0
    if head.softcap:
        bent = mx.tanh(target / head.softcap)
        target, slope = bent * (head.softcap * unit), (1 - bent * bent)[:, None]

    top = total = squares = mean = pull = None
    for part in _columns(hidden, head):
        if top is not None:
            # Without an order MLX may start many chunks at once, and memory would grow with them.
            hidden = mx.depends([hidden], [top, total] if pull is None else [top, total, pull])[0]
        weight = head.rows(part)
        z, slopes = logits(hidden, weight, None if head.bias is None else head.bias[part])
        here = z.max(axis=-1, keepdims=True)
        new = here if top is None else mx.maximum(top, here)
        mass = mx.power(2.0, z - new)
        here_total = mass.sum(axis=-1, keepdims=True)
        shrink = None if top is None else mx.power(2.0, top - new)
        total = here_total if top is None else total * shrink + here_total
        if moments:
            here_squares = (mass * mass).sum(axis=-1, keepdims=True)
            squares = here_squares if top is None else squares * shrink * shrink + here_squares
            here_mean = (mass * z).sum(axis=-1, keepdims=True)
            mean = here_mean if top is None else mean * shrink + here_mean
        if gradient:
            here_pull = (mass if slopes is None else mass * slopes) @ weight
            pull = here_pull if pull is None else pull * shrink + here_pull
        top = new
    log_total = (top + mx.log2(total))[:, 0]
    logp = (target - log_total) * math.log(2)
    # Equal up to rounding: the target's logit comes from another sum than the chunk's.
    hit = target >= top[:, 0] - 1e-5 * mx.abs(top[:, 0])
    collision = entropy = logp
    if moments:
        collision = ((mx.log2(squares) - 2 * mx.log2(total)) * math.log(2))[:, 0]
        entropy = (log_total - (mean / total)[:, 0]) * math.log(2)
    if not gradient:
        return logp, hit, collision, entropy, None
    pulled = (slope * target_weight - pull / total) * (head.scale / head.temperature)
    return logp, hit, collision, entropy, pulled


def _columns(hidden, head) -> list[slice]:
    """The parts of the vocabulary whose logits are there at a time."""
    count, width = hidden.shape
    vocabulary = head.weight.shape[0]
    size = max(64, _chunk_bytes() // (4 * max(count, width)))
    # A few columns that are left go with those in front of them: the kernels take no tiny arrays.
    starts = range(0, max(1, vocabulary - MIN_ELEMENTS), size)
    return [slice(a, b) for a, b in itertools.pairwise([*starts, vocabulary])]


def _use_kernel(dtype, count, vocabulary) -> bool:
    if dtype not in DTYPES or count * vocabulary < MIN_ELEMENTS:
        return False
    return dispatch.use(Variant.of(metal_log_prob.FILE, dtype), (count, vocabulary))


def _walk_by_kernel(hidden, targets, head, gradient):
    """`_walk` with one reading of each chunk of logits, and another and one writing for the gradient."""
    hidden = hidden.astype(mx.float32) * head.scale
    one, none = mx.ones(hidden.shape[0]), mx.zeros(hidden.shape[0])
    scores = pull = None
    for part in _columns(hidden, head):
        if scores is not None:
            hidden = mx.depends([hidden], list(scores) if pull is None else [*scores, pull])[0]
        weight = head.rows(part)
        z = hidden @ weight.swapaxes(-1, -2)
        if head.bias is not None:
            z = z + head.bias[part].astype(mx.float32) * head.scale
        chunk = Chunk(part.start, head.softcap, head.temperature)
        here = metal_log_prob.chunk_scores(z, targets, chunk)
        before, scores = scores, here if scores is None else scores.joined(here)
        if gradient:
            share = metal_log_prob.chunk_gradient(z, targets, scores.log_sum, none, one, chunk)
            here_pull = share @ weight
            if before is not None:
                here_pull = here_pull + pull * mx.exp(before.log_sum - scores.log_sum)[:, None]
            pull = here_pull
    logp, hit, collision, entropy = of_kernel(scores)
    if not gradient:
        return logp, hit, collision, entropy, None
    slope = 1 / head.temperature
    if head.softcap:
        bent = scores.target * head.temperature / head.softcap
        slope = ((1 - bent * bent) / head.temperature)[:, None]
    return logp, hit, collision, entropy, (slope * head.rows(targets) - pull) * head.scale


def of_kernel(scores: metal_log_prob.ChunkScores) -> TokenScores:
    """What the scores of the whole vocabulary say."""
    return TokenScores(
        scores.target - scores.log_sum,
        scores.target >= scores.top,
        scores.log_squares - 2 * scores.log_sum,
        scores.log_sum - scores.mean,
    )


def full_log_probs(logits: mx.array, targets: mx.array, *, moments: bool = False) -> TokenScores:
    """The scores of each target, int[M], given all logits, float[M, V]."""
    if _use_kernel(logits.dtype, *logits.shape):
        logp, scores = metal_log_prob.scores_of_logits(logits, targets)
        scores = of_kernel(scores)._replace(logp=logp)
        return scores if moments else TokenScores(*scores[:2])
    return plain_log_probs(logits, targets, moments=moments)


def plain_log_probs(logits, targets, *, moments: bool = False) -> TokenScores:
    """`full_log_probs` in MLX's own operations."""
    logits = logits.astype(mx.float32)
    target = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    total = mx.logsumexp(logits, axis=-1)
    logp, hit = target - total, target >= logits.max(axis=-1)
    if not moments:
        return TokenScores(logp, hit)
    fixed, fixed_total = mx.stop_gradient(logits), mx.stop_gradient(total)
    mean = (mx.exp(fixed - fixed_total[:, None]) * fixed).sum(axis=-1)
    collision = mx.logsumexp(2 * fixed, axis=-1) - 2 * fixed_total
    return TokenScores(logp, hit, collision, fixed_total - mean)


class TokenRatios(NamedTuple):
    """What two models say of M targets, float32[M] each.

    logp and entropy (nats, through which no gradient flows) are the policy's; log_ratio = logp - that of
    the reference, the k1 estimate of the KL; k3 = exp(-log_ratio) - 1 + log_ratio (Schulman 2020,
    Approximating KL divergence).
    """

    logp: mx.array
    log_ratio: mx.array
    k3: mx.array
    entropy: mx.array

    @classmethod
    def of(cls, policy: TokenScores, reference: mx.array) -> "TokenRatios":
        """From scores with moments, and the reference's log-probabilities."""
        log_ratio = policy.logp - reference
        return cls(policy.logp, log_ratio, mx.expm1(-log_ratio) + log_ratio, policy.entropy)


def log_ratios(policy: mx.array, reference: mx.array, targets: mx.array) -> TokenRatios:
    """The ratios of each target, int[M], given all logits of both, float[M, V].

    Differentiable in the policy's logits; the reference's are taken as fixed.
    """
    reference = mx.stop_gradient(reference)
    if policy.dtype == reference.dtype and _use_kernel(policy.dtype, *policy.shape):
        return TokenRatios(*metal_log_prob.ratios_of_logits(policy, reference, targets))
    return plain_log_ratios(policy, reference, targets)


def plain_log_ratios(policy, reference, targets) -> TokenRatios:
    """`log_ratios` in MLX's own operations."""
    scores = plain_log_probs(policy, targets, moments=True)
    return TokenRatios.of(scores, plain_log_probs(reference, targets).logp)


def trained_log_probs(
    hidden: mx.array,
    targets: mx.array,
    parameters: dict,
    logits: Callable[[dict, mx.array], mx.array],
    vocabulary: int,
    *,
    moments: bool = False,
) -> TokenScores:
    """`frozen_log_probs` for a head with `parameters` (a tree of arrays) that are trained too.

    `logits(parameters, hidden[n, D])` gives [n, V]. Tokens are walked in chunks, and the backward
    pass computes each chunk's logits again instead of keeping them.
    """
    rows = max(16, _chunk_bytes() // (4 * vocabulary))
    count = hidden.shape[0]
    chunks = [slice(s, min(s + rows, count)) for s in range(0, count, rows)]

    def piece(parameters, hidden, targets):
        z = logits(parameters, hidden)
        return tuple(x for x in full_log_probs(z, targets, moments=moments) if x is not None)

    @mx.custom_function
    def log_probs(parameters, hidden, targets):
        parts = []
        for part in chunks:
            here = hidden[part]
            if parts:
                here = mx.depends([here], parts[-1])[0]
            parts.append(piece(parameters, here, targets[part]))
        return tuple(mx.concatenate(p) for p in zip(*parts, strict=True))

    @log_probs.vjp
    def backward(primals, cotangents, outputs):
        parameters, hidden, targets = primals
        grads, grad_hidden = None, []
        for part in chunks:
            here = hidden[part]
            if grad_hidden:
                finished = [leaf for _, leaf in tree_flatten(grads)]
                here = mx.depends([here], [grad_hidden[-1], *finished])[0]

            def weighted(parameters, here, target=targets[part], upstream=cotangents[0][part]):
                return (piece(parameters, here, target)[0] * upstream).sum()

            here_grads, here_hidden = mx.grad(weighted, argnums=(0, 1))(parameters, here)
            here_grads = tree_map(lambda g: g.astype(mx.float32), here_grads)
            grads = here_grads if grads is None else tree_map(mx.add, grads, here_grads)
            grad_hidden.append(here_hidden)
        grads = tree_map(lambda g, p: g.astype(p.dtype), grads, parameters)
        return grads, mx.concatenate(grad_hidden), None

    return TokenScores(*log_probs(parameters, hidden, targets))
