"""Runs Metal kernels on the CPU: `MetalKernel` in the place of `mx.fast.metal_kernel`, and `Library`.

With `check` (the default) every access to memory is looked at: out of bounds, read before written, or
unordered with another thread's, it raises KernelError. That takes about four times as long as without.
"""

import ctypes
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from .build import HEADERS, build
from .source import ATTRIBUTES, SourceError, inline_includes, translate

# MLX passes inputs of fewer elements in the constant address space.
LEAST_DEVICE_ELEMENTS = 8
GUARD_BYTES = 4096
POISON = 0xFF  # NaN as a number, -1 as an integer

TYPES = {
    mx.bool_: "bool", mx.float32: "float", mx.float16: "float16_t", mx.bfloat16: "bfloat16_t",
    mx.int8: "int8_t", mx.int16: "int16_t", mx.int32: "int32_t", mx.int64: "int64_t",
    mx.uint8: "uint8_t", mx.uint16: "uint16_t", mx.uint32: "uint32_t", mx.uint64: "uint64_t",
}  # fmt: skip


class KernelError(Exception):
    """What a kernel did that it must not do, one finding a line."""


@dataclass(frozen=True)
class Statistics:
    """What one call did.

    `read` and `written` are the bytes of each buffer that the threads loaded and stored, as often as they
    did; empty without `check`. `threadgroup_bytes` is the most that one threadgroup had declared.
    """

    seconds: float
    barriers: int
    collectives: int
    matrix_products: int
    threadgroup_bytes: int
    read: dict[str, int]
    written: dict[str, int]

    @property
    def matrix_flops(self) -> int:
        """Floating-point operations of the 8 x 8 x 8 products, two to a multiply-add."""
        return self.matrix_products * 2 * 8**3


@dataclass(frozen=True)
class Output:
    """A buffer for a kernel to write, of garbage or filled with `fill`."""

    shape: Sequence[int]
    dtype: mx.Dtype
    fill: float | None = None


class _Memory:
    """The bytes of one argument, between two guards that nobody may write."""

    def __init__(self, name: str, argument: mx.array | Output | None):
        self.name, self.argument = name, argument
        content = _content(argument)
        self.size = content.size
        self._whole = np.full(self.size + 2 * GUARD_BYTES + 64, POISON, np.uint8)
        # At an odd multiple of 16: what more than that a kernel asks for, it does not find by luck.
        self._start = GUARD_BYTES + (16 - self._whole.ctypes.data - GUARD_BYTES) % 32
        self._content[:] = content

    @property
    def _content(self) -> np.ndarray:
        return self._whole[self._start : self._start + self.size]

    @property
    def address(self) -> int:
        return self._whole.ctypes.data + self._start

    @property
    def kind(self) -> int:
        """As Region::Kind in checker.h."""
        if not isinstance(self.argument, Output):
            return 0
        return 1 if self.argument.fill is None else 2

    def guards_hold(self) -> bool:
        guards = np.delete(self._whole, np.s_[self._start : self._start + self.size])
        return bool((guards == POISON).all())

    def array(self) -> mx.array:
        return mx.array(self._content).view(self.argument.dtype).reshape(self.argument.shape)


def _content(argument: mx.array | Output | None) -> np.ndarray:
    if argument is None:
        return np.empty(0, np.uint8)
    if isinstance(argument, Output):
        if argument.fill is None:
            return np.full(math.prod(argument.shape) * argument.dtype.size, POISON, np.uint8)
        argument = mx.full(argument.shape, argument.fill, argument.dtype)
    return np.array(argument.flatten().view(mx.uint8))


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("kind", ctypes.c_int),
        ("name", ctypes.c_char_p),
    )


class _Counts(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("collectives", "barriers", "matrix_products", "threadgroup_bytes")
    )


def _execute(
    library: Path,
    memories: list[_Memory],
    grid: Sequence[int],
    threadgroup: Sequence[int],
    check: bool,
    seed: int,
) -> tuple[str, Statistics]:
    """Calls a library from `build`; returns what was found wrong and what was done."""
    if min(*grid, *threadgroup) < 1:
        raise ValueError(f"no threads in a grid of {grid} and threadgroups of {threadgroup}")
    run = ctypes.CDLL(str(library)).emulator_run
    run.restype = ctypes.c_char_p
    buffers = [_Buffer(m.address, m.size, m.kind, m.name.encode()) for m in memories]
    counts, traffic = _Counts(), (ctypes.c_uint64 * (2 * len(memories)))()
    start = time.perf_counter()
    findings = run(
        (_Buffer * len(buffers))(*buffers),
        len(buffers),
        (ctypes.c_uint32 * 3)(*grid),
        (ctypes.c_uint32 * 3)(*threadgroup),
        int(check),
        ctypes.c_uint64(seed),
        ctypes.byref(counts),
        traffic,
    )
    seconds = time.perf_counter() - start
    names = [m.name for m in memories] if check else []
    return findings.decode(), Statistics(
        seconds,
        read=dict(zip(names, traffic[::2], strict=False)),
        written=dict(zip(names, traffic[1::2], strict=False)),
        **{name: getattr(counts, name) for name, _ in _Counts._fields_},
    )


class Library:
    """Metal text with kernel functions of its own.

    `folders` are where files included by "..." are looked for.
    """

    def __init__(self, text: str, folders: Sequence[Path] = (), name: str = "metal"):
        self.text = inline_includes(text, folders, name, set())

    def run(
        self,
        function: str,
        arguments: Mapping[str, mx.array | Output],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        template: str = "",
        constants: Mapping = {},
        check: bool = True,
        seed: int = 0,
    ) -> tuple[list[mx.array], Statistics]:
        """Runs a kernel function and returns its outputs and what it did.

        `arguments` are the buffers by the names of their parameters; one that is left out has no memory.
        `grid` counts threads. With a `seed` SIMD-groups and threadgroups take turns in another order.
        """
        code, names = translate(self.text, function, template, constants)
        if unknown := set(arguments) - set(names):
            raise SourceError(f"{function} has no {sorted(unknown)}, only {names}")
        memories = [_Memory(name, arguments.get(name)) for name in names]
        found, statistics = _execute(build(code, check), memories, grid, threadgroup, check, seed)
        for memory in memories:
            if not memory.guards_hold():
                found += f"write out of bounds of '{memory.name}'\n"
        if found:
            raise KernelError(f"{function}:\n{found.strip()}")
        return [m.array() for m in memories if isinstance(m.argument, Output)], statistics


@dataclass
class MetalKernel:
    """A kernel made and called as with `mx.fast.metal_kernel`; `check` and `seed` as for `Library.run`.

    Inputs are always row-contiguous and compile options change nothing. `statistics` are of the last call.
    """

    name: str
    input_names: Sequence[str]
    output_names: Sequence[str]
    source: str
    header: str = ""
    ensure_row_contiguous: bool = True
    atomic_outputs: bool = False
    compile_options: dict | None = None
    check: bool = field(default=True, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    statistics: Statistics | None = field(default=None, init=False)

    def __post_init__(self):
        if not self.ensure_row_contiguous:
            raise NotImplementedError("the emulator makes all inputs row-contiguous")

    def __call__(
        self,
        *,
        inputs: Sequence,
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        template: Sequence[tuple] = (),
        init_value: float | None = None,
        verbose: bool = False,
        stream=None,
    ) -> list[mx.array]:
        """The outputs; raises KernelError if the kernel did anything wrong."""
        arrays = [a if isinstance(a, mx.array) else mx.array(a) for a in inputs]
        outputs = [
            Output(shape, dtype, init_value)
            for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
        ]
        parameters, arguments = self._parameters(arrays, outputs)
        text = self._text(parameters, template)
        if verbose:
            print(text)
        return self._run(
            Library(text, [HEADERS], self.name),
            f"custom_kernel_{self.name}",
            ", ".join(_template_value(value) for _, value in template),
            arguments,
            (grid, threadgroup),
        )

    def _run(self, library, function, template, arguments, sizes):
        results, self.statistics = library.run(
            function, arguments, *sizes, template, check=self.check, seed=self.seed
        )
        return results

    def _parameters(self, arrays, outputs):
        """The parameters of the kernel function MLX would write, and the buffers behind them by name."""
        parameters, arguments = [], {}

        def add(kind, name, argument):
            parameters.append(f"{kind} {name} [[buffer({len(arguments)})]]")
            arguments[name] = argument

        for name, array in zip(self.input_names, arrays, strict=True):
            space = "constant" if array.size < LEAST_DEVICE_ELEMENTS else "device"
            mark = "*" if array.ndim else "&"
            add(f"const {space} {TYPES[array.dtype]}{mark}", name, array)
            strides = [math.prod(array.shape[i + 1 :]) for i in range(array.ndim)]
            for suffix, kind, value in (
                ("shape", "const constant int*", mx.array(array.shape, mx.int32)),
                ("strides", "const constant int64_t*", mx.array(strides, mx.int64)),
                ("ndim", "const constant int&", mx.array(array.ndim)),
            ):
                if array.ndim and f"{name}_{suffix}" in self.source:
                    add(kind, f"{name}_{suffix}", value)
        for name, output in zip(self.output_names, outputs, strict=True):
            kind = TYPES[output.dtype]
            add(f"device {f'atomic<{kind}>' if self.atomic_outputs else kind}*", name, output)
        for kind, names in ATTRIBUTES.items():
            parameters += [f"{kind} {name} [[{name}]]" for name in names if name in self.source]
        return parameters, arguments

    def _text(self, parameters, template):
        declared = ", ".join(f"{_template_kind(value)} {name}" for name, value in template)
        return "\n".join(
            [
                '#include "mlx_custom_kernel.h"',
                f'#line 1 "{self.name}, header"',
                self.header,
                f"template <{declared}>" if template else "",
                f"[[kernel]] void custom_kernel_{self.name}({', '.join(parameters)}) {{",
                f'#line 1 "{self.name}, source"',
                self.source,
                "}",
            ]
        )


def _template_kind(value) -> str:
    return "typename" if isinstance(value, mx.Dtype) else type(value).__name__


def _template_value(value) -> str:
    return TYPES[value] if isinstance(value, mx.Dtype) else str(value).lower()
