"""Runs Metal compute kernels on a CPU as a GPU would, and finds what they do wrong."""

from .build import BuildError, missing
from .kernel import KernelError, Library, MetalKernel, Output, Statistics
from .source import SourceError

metal_kernel = MetalKernel  # under the name of the function whose place it takes

__all__ = [
    "BuildError",
    "KernelError",
    "Library",
    "Output",
    "SourceError",
    "Statistics",
    "metal_kernel",
    "missing",
]
