"""Sums over a chunk of logits by our Metal kernels, and their gradients.

`metal/token_log_prob.metal` says what they compute and how. A chunk is [n, V], in float32, float16 or
bfloat16; it may be a part of the vocabulary's columns.
"""

import struct
from typing import NamedTuple

import mlx.core as mx

from mlx_align.kernels.source import MIN_ELEMENTS, launch

FILE = "token_log_prob"
# Threads of a threadgroup, and logits that each takes at a time; kThreads and kBatch in the source.
THREADS, BATCH = 256, 4


class Chunk(NamedTuple):
    """Where a chunk's columns start in the vocabulary, and what makes logits of its numbers."""

    first: int = 0
    softcap: float | None = None
    temperature: float = 1.0


WHOLE = Chunk()


class ChunkScores(NamedTuple):
    """float32[n] each, of z = softcap tanh(x / softcap) / temperature of the columns of a chunk.

    log_sum is log sum exp z, target the z of the target (0 where it is elsewhere), top the greatest z,
    mean the mean of z under the softmax, log_squares log sum exp 2z.
    """

    log_sum: mx.array
    target: mx.array
    top: mx.array
    mean: mx.array
    log_squares: mx.array

    def joined(self, other: "ChunkScores") -> "ChunkScores":
        """The scores of the columns of both."""
        log_sum = mx.logaddexp(self.log_sum, other.log_sum)
        parts = mx.exp(self.log_sum - log_sum), mx.exp(other.log_sum - log_sum)
        return ChunkScores(
            log_sum,
            self.target + other.target,
            mx.maximum(self.top, other.top),
            parts[0] * self.mean + parts[1] * other.mean,
            mx.logaddexp(self.log_squares, other.log_squares),
        )


def _sizes(logits, chunk):
    bits = struct.unpack("2i", struct.pack("2f", chunk.softcap or 0.0, 1 / chunk.temperature))
    return mx.array([logits.shape[1], chunk.first, *bits, 0, 0, 0, 0], mx.int32)


def _padded(x, dtype):
    """A vector with as many elements as MLX needs to pass it as the kernels declare it."""
    return mx.pad(x.astype(dtype), (0, max(0, MIN_ELEMENTS - x.shape[0])))


def _reduce(name, arrays, targets, chunk, count):
    """Start a kernel that makes `count` float32[n] of rows of logits."""
    rows = arrays[0].shape[0]
    return launch(
        FILE,
        name,
        [*arrays, _padded(targets, mx.int32), _sizes(arrays[0], chunk)],
        {"T": arrays[0].dtype},
        grid=(THREADS, rows, 1),
        threadgroup=(THREADS, 1, 1),
        outputs=[((rows,), mx.float32)] * count,
    )


def chunk_scores(logits: mx.array, targets: mx.array, chunk: Chunk = WHOLE) -> ChunkScores:
    """The scores of a chunk's rows for `targets`, int[n]; not differentiable."""
    return ChunkScores(*_reduce("token_log_prob_forward", [logits], targets, chunk, 5))


def chunk_gradient(
    logits: mx.array,
    targets: mx.array,
    log_sum: mx.array,
    target_factor: mx.array,
    softmax_factor: mx.array,
    chunk: Chunk = WHOLE,
) -> mx.array:
    """(a [j = target] + b exp(z_j - log_sum)) dz_j / dx_j, [n, V] in the dtype of the logits.

    a and b are the factors, float[n]; so a = g, b = -g is the gradient of a log-probability.
    """
    rows, columns = logits.shape
    vectors = [_padded(x, mx.float32) for x in (log_sum, target_factor, softmax_factor)]
    return launch(
        FILE,
        "token_log_prob_gradient",
        [logits, _padded(targets, mx.int32), *vectors, _sizes(logits, chunk)],
        {"T": logits.dtype},
        grid=(-(-columns // (THREADS * BATCH)) * THREADS, rows, 1),
        threadgroup=(THREADS, 1, 1),
        outputs=[(logits.shape, logits.dtype)],
    )[0]


def scores_of_logits(
    logits: mx.array, targets: mx.array, chunk: Chunk = WHOLE
) -> tuple[mx.array, ChunkScores]:
    """Log-probabilities float32[n], differentiable in the logits, and the scores, which are not."""

    @mx.custom_function
    def score(logits, targets):
        scores = chunk_scores(logits, targets, chunk)
        return scores.target - scores.log_sum, *scores

    @score.vjp
    def backward(primals, cotangents, outputs):
        upstream = cotangents[0]
        return chunk_gradient(*primals, outputs[1], upstream, -upstream, chunk), None

    logp, *scores = score(logits, targets)
    return logp, ChunkScores(*scores)


def ratios_of_logits(
    policy: mx.array, reference: mx.array, targets: mx.array, chunk: Chunk = WHOLE
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """(log-probability, log-ratio, k3, entropy) of targets, float32[n].

    Both chunks hold all columns and have one dtype. The log-ratio is the k1 estimate of the KL. The
    first three are differentiable in the policy's logits.
    """

    @mx.custom_function
    def compare(policy, reference, targets):
        arrays = [policy, reference]
        return tuple(_reduce("token_log_prob_log_ratio", arrays, targets, chunk, 5))

    @compare.vjp
    def backward(primals, cotangents, outputs):
        policy, reference, targets = primals
        log_sum, _, log_ratio, *_ = outputs
        _, by_log_prob, by_log_ratio, by_k3, _ = cotangents
        upstream = by_log_prob + by_log_ratio - by_k3 * mx.expm1(-log_ratio)
        gradient = chunk_gradient(policy, targets, log_sum, upstream, -upstream, chunk)
        return gradient, mx.zeros_like(reference), None

    return tuple(compare(policy, reference, targets)[1:])
