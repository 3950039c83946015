"""What tests of kernels share: how numbers are compared, and how kernels come to be used."""

import mlx.core as mx
import numpy as np

from mlx_align.kernels import dispatch, source

# What MLX does with functions: how to get value and gradient by the first argument.
WAYS = {
    "value_and_grad": mx.value_and_grad,
    "compiled": lambda f: mx.compile(mx.value_and_grad(f)),
    "compiled inside": lambda f: mx.value_and_grad(mx.compile(f)),
    "checkpointed": lambda f: mx.value_and_grad(mx.checkpoint(f)),
    "checkpointed and compiled": lambda f: mx.compile(mx.value_and_grad(mx.checkpoint(f))),
}


def exact(x) -> np.ndarray:
    """An array's numbers in float64."""
    return np.array(x.astype(mx.float32), np.float64)


def close(found, expected, tolerance, least=0.0) -> bool:
    """Whether all numbers are as expected, up to a share of themselves and of the greatest one.

    `least` is how great they are at any rate, where all that is expected may be zeros.
    """
    limit = tolerance * max(np.abs(expected).max(), least)
    return np.allclose(exact(found), expected, rtol=tolerance, atol=limit)


def use_kernels(monkeypatch, maker):
    """Take the kernels wherever there are some, made by `maker`."""
    monkeypatch.setenv(dispatch.MODE, "on")
    monkeypatch.setattr(dispatch, "metal_available", lambda: True)
    monkeypatch.setattr(source, "kernel_maker", lambda: maker)
