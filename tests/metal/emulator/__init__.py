"""Runs Metal compute kernels on a CPU as a GPU would, and finds what they do wrong."""

from .build import BuildError, missing
from .kernel import KernelError, Library, Output, Statistics, metal_kernel
from .source import SourceError

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
