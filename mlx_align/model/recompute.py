"""Gradient checkpointing: keep each block's input only, compute its inside again when needed.

Chen et al. 2016 (arXiv:1604.06174), one block a segment: memory for one block's activations instead
of all, for about a third more compute.
"""

import functools

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map


class _Checkpointed:
    """Marks block classes that recompute their inside while they are in training mode."""


@functools.cache
def _checkpointed_class(cls):
    def call(self, *args, **kwargs):
        if not self.training:
            return cls.__call__(self, *args, **kwargs)

        def inside(parameters, *args, **kwargs):
            self.update(parameters)
            return cls.__call__(self, *args, **kwargs)

        # Parameters have to be arguments: mx.checkpoint sees no gradient for captured arrays.
        return mx.checkpoint(inside)(self.trainable_parameters(), *args, **kwargs)

    return type(cls.__name__, (_Checkpointed, cls), {"__call__": call})


def checkpoint_blocks(model: nn.Module) -> None:
    """Checkpoint every block of a loaded model. Doing it twice changes nothing more."""
    for block in model.layers:
        if not isinstance(block, _Checkpointed):
            block.__class__ = _checkpointed_class(type(block))


def recomputed(function):
    """`function` of trees of arrays, whose inside is computed again for the backward pass.

    Unlike mx.checkpoint, not before the gradients of all its outputs are there: of functions that feed
    each other, one at a time is then inside out.
    """

    @mx.custom_function
    def run(*args):
        return function(*args)

    @run.vjp
    def backward(primals, cotangents, outputs):
        upstream = _leaves(cotangents)

        def flat(*arrays):
            return _leaves(function(*_filled(primals, arrays)))

        _, gradients = mx.vjp(flat, mx.depends(_leaves(primals), upstream), upstream)
        # All or none: what the others are made of does not wait for whoever asks for them last.
        return _filled(primals, mx.depends(gradients, gradients))

    return run


def _leaves(tree) -> list[mx.array]:
    return [x for _, x in tree_flatten(tree)]


def _filled(tree, arrays):
    """The tree with other arrays in it."""
    rest = iter(arrays)
    return tree_map(lambda _: next(rest), tree)
