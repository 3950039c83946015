"""Attention over a pack of segments that form trees: a prompt, its completions, the next prompt.

    tokens   p p p  a a  b b b  q q  c c          segments  (start, end, parent)
    segment  0 0 0  1 1  2 2 2  3 3  4 4          0 (0,3,-)  1 (3,5,0)  2 (5,8,0)  3 (8,10,-)  4 ...

A token sees the tokens of its own segment up to itself, and all tokens of the segments above. No
score between tokens that do not see each other is ever computed: each segment is one causal
attention over [ancestors, own], the lower-right causal case. On a Mac our Metal kernels do the whole
pack at once, where they are faster.

`dense_mask` states the same rule as one matrix and is the reference for tests. Knows nothing of
models.
"""

import math
from typing import NamedTuple

import mlx.core as mx

from mlx_align.kernels import dispatch, metal_attention
from mlx_align.kernels.dispatch import Variant
from mlx_align.kernels.source import DTYPES

# In plain operations, queries are taken in blocks whose scores, for all heads, have about this many bytes.
SCORE_BYTES = 4 * 2**20
# MLX's fused attention on the GPU has no backward pass for 8 queries or fewer.
FUSED_MIN_QUERIES = 9


def dense_mask(
    positions,
    ends,
    window: int | None = None,
    first: int = 0,
    start: int = 0,
    end: int | None = None,
) -> mx.array:
    """Which key each token sees, bool[B, T, T]: `j <= i < ends[j]`, and `window` positions back.

    `positions` and `ends` are int[B, T]; `ends[j]` is the end of the subtree of j's segment, 0 for
    padding. A padding token sees itself, so that no row is empty. Of the matrix only the rows
    [start, end) and the columns [first, end) are made, lazily.
    """
    positions, ends = (mx.array(x)[:, :end] for x in (positions, ends))
    index = mx.arange(positions.shape[1])
    queries, keys = index[start:, None], index[None, first:]
    mask = (keys <= queries) & (queries < ends[:, None, first:])
    if window is not None:
        mask = mask & (positions[:, start:, None] - positions[:, None, first:] < window)
    return mask | (keys == queries)


def causal_bias(rows: int, keys: int, window: int | None) -> mx.array:
    """float32[rows, keys] to add to scores: 0 where a query sees a key, else very negative.

    Lower-right causal: the last query sees the last key. Lazy, so that it takes no memory before it
    is needed.
    """
    back = mx.arange(keys - rows, keys)[:, None] - mx.arange(keys)[None, :]
    hidden = back < 0
    if window is not None:
        hidden = hidden | (back >= window)
    return hidden * -1e30


def tree_attention(
    q,
    k,
    v,
    segments,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention of every token over its path in the tree.

    q is [B, H, T, D], k and v are [B, G, T, D] with H a multiple of G; `segments` holds the
    segments of all rows in order (each knows its row). Returns [B, H, T, D]; tokens outside every
    segment (padding) get zeros. A `window` of w lets a token see its last w positions only; a `softcap`
    of c bends scores s to c tanh(s / c); `sinks`, [H], add exp(sinks[h]) to the denominator of head h.
    """
    limits = {"scale": scale, "window": window, "softcap": softcap}
    if sinks is None and _has_kernel(q, k, v):
        size = (q.shape[2], len(segments))
        if dispatch.use(Variant.of(metal_attention.FILE, q.dtype, q.shape[-1]), size):
            return metal_attention.flash_attention(q, k, v, segments, **limits)
    return plain_attention(q, k, v, segments, **limits, sinks=sinks)


def _has_kernel(q, k, v) -> bool:
    return (
        q.dtype in DTYPES
        and q.dtype == k.dtype == v.dtype
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] in metal_attention.HEAD_DIMS
    )


def plain_attention(q, k, v, segments, *, scale, window=None, softcap=None, sinks=None) -> mx.array:
    """`tree_attention` in MLX's own operations."""
    rows = []
    for row in range(q.shape[0]):
        index = [i for i, segment in enumerate(segments) if segment.row == row]
        single = slice(row, row + 1)
        arrays = (q[single], k[single], v[single])
        # MLX's fused attention has no soft cap; with a window or sinks its gradients are T x T.
        simple = softcap is None and sinks is None and not _exceeds(segments, index, window)
        if simple and _fused_is_faster():
            parts = _fused_row(*arrays, segments, index, scale)
        else:
            parts = _flash_row(*arrays, segments, index, scale, window, softcap, sinks)
        done = segments[index[-1]].end if index else 0
        if done < q.shape[2]:
            parts = [*parts, mx.zeros((1, q.shape[1], q.shape[2] - done, v.shape[-1]), q.dtype)]
        rows.append(_join(parts))
    return mx.concatenate(rows) if len(rows) > 1 else rows[0]


def _fused_is_faster() -> bool:
    """Whether MLX's fused attention is the faster one."""
    return mx.default_device() != mx.cpu


def _exceeds(segments, index, window) -> bool:
    """Whether some token does not see its whole path."""
    lengths = {}
    for i in index:
        segment = segments[i]
        lengths[i] = lengths.get(segment.parent, 0) + segment.end - segment.start
    return window is not None and max(lengths.values(), default=0) > window


def _join(parts):
    return mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]


def _path(segments, index: int) -> list[int]:
    """The segments that segment `index` sees, root first, itself last."""
    path = []
    while index >= 0:
        path.append(index)
        index = segments[index].parent
    return path[::-1]


# -- on a GPU: MLX's fused attention, once for each segment ------------------------------------------


def _fused_row(q, k, v, segments, index, scale):
    outputs = []
    for i in index:
        spans = [slice(segments[j].start, segments[j].end) for j in _path(segments, i)]
        keys = _join([k[:, :, span] for span in spans])
        values = _join([v[:, :, span] for span in spans])
        outputs.append(_fused(q[:, :, spans[-1]], keys, values, scale))
    return outputs


def _fused(q, k, v, scale):
    """Lower-right causal attention of one segment."""
    rows, keys = q.shape[2], k.shape[2]
    if rows < FUSED_MIN_QUERIES:
        return _plain(q, k, v, scale, causal_bias(rows, keys, None))
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")


def _plain(q, k, v, scale, bias):
    """Attention in plain operations."""
    batch, heads, rows, dim = q.shape
    groups = k.shape[1]
    q = q.reshape(batch, groups, heads // groups, rows, dim)
    scores = (q.astype(mx.float32) * scale) @ k[:, :, None].astype(mx.float32).swapaxes(-1, -2)
    weights = mx.softmax(scores + bias, axis=-1).astype(v.dtype)
    return (weights @ v[:, :, None]).reshape(batch, heads, rows, v.shape[-1])


# -- in plain operations: all segments in one function with its own backward pass ----------------------


class _Block(NamedTuple):
    """Queries [start, end) of a segment and the keys they see: (segment, first, last) inside each."""

    start: int
    end: int
    keys: list[tuple[int, int, int]]


def _rows(scores, seen, window) -> int:
    """Queries of a block with about so many scores, where the last one has `seen` keys in its path."""
    rows = scores // seen
    if window is not None:
        # n queries see window + n keys.
        rows = max(rows, int((math.sqrt(window**2 + 4 * scores) - window) / 2))
    return max(16, rows)


def _blocks(segments, index, heads, window) -> list[_Block]:
    blocks = []
    for i in index:
        path = _path(segments, i)
        before = sum(segments[j].end - segments[j].start for j in path[:-1])
        own = segments[i]
        seen = before + own.end - own.start
        rows = _rows(SCORE_BYTES // (4 * heads), seen, window)
        for start in range(own.start, own.end, rows):
            end = min(start + rows, own.end)
            # Positions along the path: the block's last query, and the first one any query sees.
            last = before + end - own.start
            first = 0 if window is None else max(0, before + start - own.start - window + 1)
            keys, at = [], 0
            for j in path:
                size = segments[j].end - segments[j].start
                low, high = max(first - at, 0), min(last - at, size)
                if low < high:
                    keys.append((j, low, high))
                at += size
            blocks.append(_Block(start, end, keys))
    return blocks


def _flash_row(q, k, v, segments, index, scale, window, softcap, sinks):
    """Softmax attention that keeps only its output and log-sum-exp for the backward pass.

    Dao et al. 2022 (arXiv:2205.14135), algorithms 1 and 4. The softmax is taken in base 2: on MLX's
    CPU backend a power is a third of the price of an exponential. One function for all segments,
    since the gradient of every slice would otherwise be a full-size array.
    """
    heads = q.shape[1]
    groups = k.shape[1]
    repeats = heads // groups
    unit = math.log2(math.e)
    factor = scale if softcap else scale * unit
    blocks = _blocks(segments, index, heads, window)

    def gather(x, block):
        parts = [
            x[:, :, segments[j].start + low : segments[j].start + high]
            for j, low, high in block.keys
        ]
        return _join(parts)

    def grouped(x, block):
        """[1, H, n, d] as [1, G, H/G * n, d]: query heads that share keys lie side by side."""
        x = x[:, :, block.start : block.end]
        return x.reshape(1, groups, -1, x.shape[-1])

    def ungrouped(x, block):
        return x.reshape(1, heads, block.end - block.start, x.shape[-1])

    def after(x, done):
        """x, but not before the last block is done: its scores make room for the next ones."""
        return mx.depends([x], done)[0] if done else x

    def scores(q, keys, block):
        """Scores in base 2, and what bends their gradients where there is a soft cap."""
        rows, count = block.end - block.start, keys.shape[2]
        s, slope = (q * factor) @ keys.swapaxes(-1, -2), None
        if softcap:
            bent = mx.tanh(s / softcap)
            s, slope = bent * (softcap * unit), 1 - bent * bent
        s = s.reshape(groups, repeats, rows, count) + causal_bias(rows, count, window)
        return s.reshape(1, groups, repeats * rows, count), slope

    def spread(sinks, block):
        """Sinks in base 2, one for each query as `grouped` lays them out: [1, G, H/G * n, 1]."""
        each = mx.repeat(sinks * unit, block.end - block.start)
        return each.reshape(1, groups, -1, 1)

    @mx.custom_function
    def attend(q, k, v, *sinks):
        outputs, log_sums = [], []
        for block in blocks:
            queries = after(grouped(q, block), [*outputs[-1:], *log_sums[-1:]])
            s, _ = scores(queries, gather(k, block), block)
            top = s.max(axis=-1, keepdims=True)
            for sink in sinks:
                top = mx.maximum(top, spread(sink, block))
            weights = mx.power(2.0, s - top)
            total = weights.sum(axis=-1, keepdims=True)
            for sink in sinks:
                total = total + mx.power(2.0, spread(sink, block) - top)
            outputs.append(ungrouped((weights @ gather(v, block)) / total, block))
            log_sums.append(ungrouped(top + mx.log2(total), block))
        return _join(outputs), _join(log_sums)

    @attend.vjp
    def backward(primals, cotangents, outputs):
        q, k, v, *sinks = primals
        grad_q, grad_k, grad_v = [], {}, {}
        grad_sinks = [mx.zeros_like(sink) for sink in sinks]
        for block in blocks:
            queries = after(grouped(q, block), [*grad_q[-1:], *grad_k.values(), *grad_v.values()])
            keys, values = gather(k, block), gather(v, block)
            grad, out = grouped(cotangents[0], block), grouped(outputs[0], block)
            s, slope = scores(queries, keys, block)
            log_sum = grouped(outputs[1], block)
            weights = mx.power(2.0, s - log_sum)
            delta = (grad * out).sum(axis=-1, keepdims=True)
            grad_scores = weights * (grad @ values.swapaxes(-1, -2) - delta)
            if softcap:
                grad_scores = grad_scores * slope
            grad_q.append(ungrouped(grad_scores @ keys, block))
            collect(grad_k, grad_scores.swapaxes(-1, -2) @ queries, block)
            collect(grad_v, weights.swapaxes(-1, -2) @ grad, block)
            # A sink is a key without a value.
            for i, sink in enumerate(sinks):
                each = mx.power(2.0, spread(sink, block) - log_sum) * delta
                grad_sinks[i] = grad_sinks[i] - each.reshape(heads, -1).sum(axis=-1)
        return (
            cover(scale * _join(grad_q), q),
            cover(scale * _join([grad_k[i] for i in index]), k),
            cover(_join([grad_v[i] for i in index]), v),
            *grad_sinks,
        )

    def collect(grads, grad, block):
        """Add the gradient of a block's keys to those of the segments they come from."""
        at = 0
        for j, low, high in block.keys:
            size = segments[j].end - segments[j].start
            part = grad[:, :, at : at + high - low]
            if high - low < size:
                part = mx.pad(part, [(0, 0), (0, 0), (low, size - high), (0, 0)])
            grads[j] = part if j not in grads else grads[j] + part
            at += high - low

    def cover(grad, like):
        missing = like.shape[2] - grad.shape[2]
        return mx.pad(grad, [(0, 0), (0, 0), (0, missing), (0, 0)]) if missing else grad

    arrays = (q, k, v) if sinks is None else (q, k, v, sinks)
    return [attend(*(x.astype(mx.float32) for x in arrays))[0].astype(q.dtype)]
