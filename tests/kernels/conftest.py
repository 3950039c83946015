"""Metal kernels where there is no Metal: an emulator in the place of MLX's maker of kernels."""

import mlx.core as mx
import pytest
from harness import use_kernels


@pytest.fixture
def emulator():
    """The emulator, wherever a compiler for it is."""
    from metal import emulator

    if why := emulator.missing():
        pytest.skip(why)
    return emulator


@pytest.fixture(params=["emulated", *(["on the GPU"] if mx.metal.is_available() else [])])
def kernels(request, monkeypatch):
    """Our kernels are used: in the emulator, which checks every access to memory, and on a Mac's GPU."""
    maker = mx.fast.metal_kernel
    if request.param == "emulated":
        maker = request.getfixturevalue("emulator").metal_kernel
    use_kernels(monkeypatch, maker)
