"""How a pack runs through an unchanged mlx-lm model: a layout in the place of the cache, two hooks.

mlx-lm's blocks ask their cache for an offset, for a mask, and to take keys and values; they rotate
by `self.rope(x, offset=...)` and attend by their module's `scaled_dot_product_attention`. A
`PackLayout` answers in the cache's place. Two hooks understand it: one rotates every token by its
own position, one attends along the tree. Everything else passes through them untouched, so
generation after hooking gives the tokens it gave before.
"""

import functools
import inspect
import sys

import mlx.core as mx
import mlx.nn as nn

from mlx_align.data.packing import Batch
from mlx_align.kernels.tree_attention import dense_mask, tree_attention


class TreeMask:
    """Stands for "whatever the layout lets a token see", at most `window` positions back."""

    def __init__(self, window: int | None):
        self.window = window


class PackLayout:
    """Takes a cache's place for one layer while a pack runs through the model.

    With `dense`, masks are matrices, for models that compute their own attention scores; the
    memory for those grows with the square of the pack.
    """

    def __init__(self, batch: Batch, *, dense: bool = False):
        self._batch = batch
        self._dense = dense
        # Two axes tell positions of single tokens from mlx-lm's one offset for each row.
        self.offset = mx.array(batch.positions)
        self._masks: dict = {}

    def update_and_fetch(self, keys, values):
        """All keys and values of the pack are there already."""
        return keys, values

    def make_mask(self, tokens: int, return_array: bool = False, window_size: int | None = None):
        """The mask for `tokens` queries, as an array where the model insists on one."""
        if return_array or self._dense:
            return self.dense_mask(window_size)
        return TreeMask(window_size)

    def dense_mask(self, window: int | None) -> mx.array:
        """bool[T, T], or bool[B, 1, T, T] for several rows."""
        if window not in self._masks:
            mask = mx.array(dense_mask(self._batch.positions, self._batch.ends, window))
            self._masks[window] = mask[0] if mask.shape[0] == 1 else mask[:, None]
        return self._masks[window]

    def attend(self, q, k, v, scale, mask, sinks):
        """The attention of one layer over the pack."""
        if isinstance(mask, TreeMask):
            if sinks is None:
                segments = self._batch.segments
                return tree_attention(q, k, v, segments, scale=scale, window=mask.window)
            mask = self.dense_mask(mask.window)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)


def install_hooks(model: nn.Module) -> None:
    """Make a loaded model understand `PackLayout`. Doing it twice changes nothing more."""
    for block in model.layers:
        for module in block.modules():
            _hook_rope(module)
            _hook_attention(sys.modules.get(type(module).__module__))


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
        if isinstance(cache, PackLayout):
            return cache.attend(queries, keys, values, scale, mask, sinks)
        if sinks is not None:
            kwargs["sinks"] = sinks
        return original(queries, keys, values, cache=cache, scale=scale, mask=mask, **kwargs)

    dispatch.understands_packs = True
    setattr(module, name, dispatch)
