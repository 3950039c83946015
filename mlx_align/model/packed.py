"""How a pack runs through an unchanged mlx-lm model: a layout in the place of the cache, and hooks.

mlx-lm's blocks ask their cache for an offset, for a mask, and to take keys and values; they rotate
by `self.rope(x, offset=...)` and attend by their module's `scaled_dot_product_attention`. A
`PackLayout` answers in the cache's place, its masks are `TreeMask`s. Hooks understand them: one rotates
every token by its own position, one attends along the tree. Modules that compute their scores
themselves are run as they are on one block of queries after the other, as in generation; those
with a soft cap attend along the tree, too. Everything else passes through the hooks untouched, so
generation after hooking gives the tokens it gave before.
"""

import functools
import inspect
import math
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_align.data.packing import Batch
from mlx_align.kernels.tree_attention import dense_mask, tree_attention
from mlx_align.model.recompute import recomputed

# In blocks of queries, one has at most about so many scores for each head, and at least so many queries.
BLOCK_SCORES, BLOCK_QUERIES = 2**19, 16


class PackLayout:
    """Takes a cache's place for one layer while a pack runs through the model.

    With `dense`, attention modules are given masks as matrices, a block of queries at a time.
    """

    def __init__(self, batch: Batch, *, dense: bool = False):
        self.batch = batch
        self.dense = dense
        # Two axes tell positions of single tokens from mlx-lm's one offset for each row.
        self.offset = mx.array(batch.positions)
        self.ends = mx.array(batch.ends)

    def __getitem__(self, index):
        """Of layers that keep several caches, each is this one."""
        return self

    # Python would take the items for a sequence without end.
    __iter__ = None

    def update_and_fetch(self, keys, values):
        """All keys and values of the pack are there already."""
        return keys, values

    def make_mask(self, tokens: int, return_array: bool = False, window_size: int | None = None):
        """The mask for `tokens` queries; what a model makes of it, `choose_layout` finds out."""
        return TreeMask(self, window_size)


class TreeMask:
    """Stands for "whatever the layout lets a token see", at most `window` positions back."""

    def __init__(self, layout: PackLayout, window: int | None):
        self.layout = layout
        self.window = window

    def attend(self, q, k, v, scale, *, softcap=None, sinks=None):
        """The attention of one layer over the pack."""
        limits = {"scale": scale, "window": self.window, "softcap": softcap, "sinks": sinks}
        return tree_attention(q, k, v, self.layout.batch.segments, **limits)

    def matrix(self, first, start, end) -> mx.array:
        """What queries [start, end) see of keys [first, end): bool[n, m], of several rows [B, 1, n, m]."""
        layout = self.layout
        mask = dense_mask(layout.offset, layout.ends, self.window, first, start, end)
        return mask[0] if len(mask) == 1 else mask[:, None]


def install_hooks(model: nn.Module) -> None:
    """Make a loaded model understand `PackLayout`. Doing it twice changes nothing more."""
    for block in model.layers:
        for module in block.modules():
            _hook_rope(module)
            _hook_attention(sys.modules.get(type(module).__module__))
            _hook_module(module)


def _hook_rope(module):
    cls = type(module)
    if issubclass(cls, _PerTokenRope) or module.parameters():
        return
    if "offset" in inspect.signature(cls.__call__).parameters:
        module.__class__ = _per_token_class(cls)


class _PerTokenRope:
    """Marks rope classes that accept one position for every token."""


@functools.cache
def _per_token_class(cls):
    def call(self, x, offset=0, *args, **kwargs):
        if not (isinstance(offset, mx.array) and offset.ndim == 2):
            return cls.__call__(self, x, offset, *args, **kwargs)
        # mx.fast.rope takes one offset for each batch row, so tokens become batch rows.
        rows, heads, tokens, dim = x.shape
        x = x.swapaxes(1, 2).reshape(rows * tokens, heads, 1, dim)
        x = cls.__call__(self, x, offset.reshape(-1), *args, **kwargs)
        return x.reshape(rows, tokens, heads, dim).swapaxes(1, 2)

    return type(cls.__name__, (_PerTokenRope, cls), {"__call__": call})


def _hook_attention(module):
    name = "scaled_dot_product_attention"
    original = getattr(module, name, None)
    if original is None or hasattr(original, "understands_packs"):
        return

    @functools.wraps(original)
    def dispatch(queries, keys, values, cache=None, scale=1.0, mask=None, sinks=None, **kwargs):
        # Layers that share another one's keys have a mask, but no cache.
        if isinstance(mask, TreeMask):
            return mask.attend(queries, keys, values, scale, sinks=sinks)
        if sinks is not None:
            kwargs["sinks"] = sinks
        return original(queries, keys, values, cache=cache, scale=scale, mask=mask, **kwargs)

    dispatch.understands_packs = True
    setattr(module, name, dispatch)


# -- modules that compute their own scores -----------------------------------------------------------


def _hook_module(module):
    cls = type(module)
    if issubclass(cls, _OwnScores) or not _attends(cls):
        return
    # The innermost one: a block has these arguments, too, and hands them on.
    if not any(_attends(type(part)) for part in module.modules() if part is not module):
        module.__class__ = _own_scores_class(cls)


def _attends(cls) -> bool:
    return {"mask", "cache"} <= set(inspect.signature(cls.__call__).parameters)


class _OwnScores:
    """Marks attention classes that run where `scaled_dot_product_attention` is not asked."""


@functools.cache
def _own_scores_class(cls):
    signature = inspect.signature(cls.__call__)

    @functools.wraps(cls.__call__)
    def call(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs).arguments
        mask = given.get("mask")
        if isinstance(mask, TreeMask):
            if mask.layout.dense:
                return _attend_in_blocks(cls, signature, given)
            if softcap := getattr(self, "attn_logit_softcapping", None):
                return _attend_soft_capped(self, args[0], mask, softcap)
        return cls.__call__(self, *args, **kwargs)

    return type(cls.__name__, (_OwnScores, cls), {"__call__": call})


def _attend_soft_capped(module, x, mask, softcap):
    """What Gemma 2's attention computes, and others with parts of the same names."""
    rows, tokens, _ = x.shape

    def heads(name, count):
        y = module[f"{name}_proj"](x).reshape(rows, tokens, count, -1)
        norm = module.get(f"{name}_norm")
        return (norm(y) if norm else y).swapaxes(1, 2)

    q, k, v = (
        heads("q", module.n_heads),
        heads("k", module.n_kv_heads),
        heads("v", module.n_kv_heads),
    )
    q, k = (module.rope(y, offset=mask.layout.offset) for y in (q, k))
    out = mask.attend(q, k, v, module.scale, softcap=softcap)
    return module.o_proj(out.swapaxes(1, 2).reshape(rows, tokens, -1))


def _attend_in_blocks(cls, signature, given):
    """Run an attention module on a block of queries after the other, as with a cache that grows.

    More than one block are recomputed for the backward pass, so that the scores of only one exist at
    a time.
    """
    (_, module), (name, x), *_ = given.items()
    mask = given["mask"]
    blocks = _query_blocks(mask.layout.batch)
    # Parameters have to be arguments: captured arrays get no gradient.
    parameters = module.trainable_parameters()
    outputs, earlier = [], {}
    for first, start, end in blocks:
        # Blocks of the trees before are seen by nobody any more.
        earlier = {at: pair for at, pair in earlier.items() if at > first}

        def attend(parameters, x, earlier, start=start, end=end):
            module.update(parameters)
            cache = _BlockCache(mask.layout, start, end, earlier)
            before = sum(keys.shape[2] for keys, _ in earlier)
            seen = mask.matrix(start - before, start, end)
            arguments = {**given, name: x, "mask": seen, "cache": cache}
            call = inspect.BoundArguments(signature, arguments)
            return cls.__call__(*call.args, **call.kwargs), cache.own

        run = recomputed(attend) if len(blocks) > 1 else attend
        own = x[:, start:end]
        if outputs:
            (own,) = mx.depends([own], outputs[-1:])
        out, earlier[end] = run(parameters, own, list(earlier.values()))
        outputs.append(out)
    module.update(parameters)
    return mx.concatenate(outputs, axis=1)


class _BlockCache:
    """Takes a cache's place for tokens [start, end) of a pack.

    `earlier` are the keys and values of the blocks before, `own` will be those of this one.
    """

    def __init__(self, layout, start, end, earlier):
        self.offset = layout.offset[:, start:end]
        self.earlier = earlier
        self.own = None

    def update_and_fetch(self, keys, values):
        """All that this block may see."""
        self.own = (keys, values)
        pairs = [*self.earlier, self.own]
        return tuple(mx.concatenate(parts, axis=2) for parts in zip(*pairs, strict=True))


def _query_blocks(batch: Batch) -> list[tuple[int, int, int]]:
    """Queries [start, end) and the first token that one of them sees, block after block."""
    tokens = batch.tokens.shape[1]
    # Trees follow each other, and padding is its own.
    roots = np.arange(tokens)
    for segment in batch.segments:
        above = batch.segments[segment.parent] if segment.parent >= 0 else segment
        own = roots[segment.start : segment.end]
        own[:] = np.minimum(own, roots[above.start])
    blocks, start = [], 0
    while start < tokens:
        first = int(roots[start])
        before = start - first
        # n queries have n (before + n) scores.
        rows = int((math.sqrt(before**2 + 4 * BLOCK_SCORES) - before) / 2)
        end = min(tokens, start + max(rows, BLOCK_QUERIES))
        blocks.append((first, start, end))
        start = end
    return blocks
