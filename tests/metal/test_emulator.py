"""The emulator computes what a GPU would, and reports what a kernel must not do, whatever the schedule."""

import inspect

import mlx.core as mx
import numpy as np
import pytest
from metal.emulator import BuildError, KernelError, SourceError, metal_kernel

from metal import emulator

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))


def run(
    source,
    x=None,
    *,
    threads=64,
    groups=1,
    outputs=1,
    size=None,
    dtype=mx.float32,
    call=None,
    **options,
):
    """The outputs and the statistics of a kernel of x, by default 0, 1, 2, ... for each thread."""
    count = threads * groups
    kernel = metal_kernel("test", ["x"], ["y", "z", "u", "v"][:outputs], source, **options)
    found = kernel(
        inputs=[mx.arange(count).astype(mx.float32) if x is None else x],
        grid=(count, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(size or count,)] * outputs,
        output_dtypes=[dtype] * outputs,
        **(call or {}),
    )
    return [np.array(f) for f in found], kernel.statistics


# Each block of 64 numbers backwards: the smallest kernel whose threads exchange something.
REVERSE = """
  const uint i = thread_index_in_threadgroup, first = thread_position_in_grid.x - i;
  threadgroup float tile[64];
  tile[i] = x[first + i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[first + i] = tile[63 - i];
"""
# The same through the output, in device memory.
EXCHANGE = """
  const uint i = thread_index_in_threadgroup, first = thread_position_in_grid.x - i;
  y[first + i] = x[first + i];
  threadgroup_barrier(mem_flags::mem_device);
  const float other = y[first + 63 - i];
  threadgroup_barrier(mem_flags::mem_device);
  y[first + i] = other;
"""
# The lower lanes of a SIMD-group and the upper ones change places through threadgroup memory.
SWAP_HALVES = """
  const uint i = thread_index_in_threadgroup;
  threadgroup float tile[64];
  tile[i] = x[thread_position_in_grid.x];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  y[thread_position_in_grid.x] = tile[i ^ 16];
"""
# The sum of the first k numbers of each SIMD-group, k the lane.
SUMS = """
  const uint i = thread_position_in_grid.x;
  int weights[4] = {1, 1, 1, 1};
  y[i] = simd_prefix_exclusive_sum(x[i] * weights[i % 4]);
"""
# 1 + A A^T for an 8 x 8 matrix A, and A squared.
PRODUCT = """
  const uint first = 64 * threadgroup_position_in_grid.x;
  simdgroup_matrix<T, 8, 8> a, b;
  simdgroup_float8x8 c(1.0f), square;
  simdgroup_load(a, x + first, 8);
  simdgroup_load(b, x, 8, ulong2(0, 8 * threadgroup_position_in_grid.x), true);
  simdgroup_multiply_accumulate(c, a, b, c);
  simdgroup_store(c, y + first, 8);
  simdgroup_multiply(square, a, a);
  simdgroup_store(square, z + first, 8, ulong2(0), true);
"""


def expected(source, x):
    pairs, warps = x.reshape(-1, 64), x.reshape(-1, 32)
    if source in (REVERSE, EXCHANGE):
        return pairs[:, ::-1].reshape(-1)
    if source is SWAP_HALVES:
        return np.roll(warps, 16, axis=1).reshape(-1)
    return (np.cumsum(warps, axis=1) - warps).reshape(-1)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("source", [REVERSE, EXCHANGE, SWAP_HALVES, SUMS])
def test_correct_kernels_pass_and_compute(source, seed, check):
    (y,), _ = run(source, groups=3, seed=seed, check=check)
    np.testing.assert_array_equal(y, expected(source, np.arange(192.0)))


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
# Name -> a correct kernel, what to replace by what in it, and the message then.
FAULTS = {
    "missing barrier": (REVERSE, BARRIER, "", "race: .* 'tile'"),
    "barrier of no memory": (REVERSE, "mem_threadgroup", "mem_none", "race: .* 'tile'"),
    "barrier of the other memory": (REVERSE, "mem_threadgroup", "mem_device", "race: .* 'tile'"),
    "barrier of a SIMD-group only": (
        REVERSE, "threadgroup_barrier", "simdgroup_barrier", "race: .* 'tile'"),
    "device memory, other barrier": (EXCHANGE, "mem_device", "mem_threadgroup", "race: .* 'y'"),
    "no simdgroup_barrier": (
        SWAP_HALVES, "simdgroup_barrier(mem_flags::mem_threadgroup);", "", "race: .* 'tile'"),
    "simdgroup_barrier of no memory": (
        SWAP_HALVES, "mem_threadgroup", "mem_none", "race: .* 'tile'"),
    "two threads write one place": (
        REVERSE, "y[first + i] =", "y[first + i / 2] =", "race: write not .* 'y'"),
    "two threadgroups write one place": (
        REVERSE, "y[first + i] =", "y[i] =", "race: write not .* 'y'"),
    "uninitialised threadgroup memory": (
        REVERSE, "tile[i] =", "if (i < 32) tile[i] =", "uninitialised: .* 'tile'"),
    "uninitialised output": (REVERSE, "y[first + i] =", "y[first + i] +=", "uninitialised: .* 'y'"),
    "read past the end": (
        REVERSE, "= x[first + i]", "= x[first + i + 1]", "read of 4 bytes out of bounds .* 'x'"),
    "read before the start": (
        REVERSE, "= x[first + i]", "= x[int(first + i) - 1]", "read of 4 .* bounds .* 'x'"),
    "read far away": (
        REVERSE, "= x[first + i]", "= x[first + i + 1000000000]", "read of 4 bytes out of bounds"),
    "write past the end": (
        REVERSE, "y[first + i] =", "y[first + i + 1] =", "write of 4 bytes out of bounds .* 'y'"),
    "threadgroup array index": (
        REVERSE, "tile[i] =", "tile[i + 1] =", "index out of bounds at test, source:4"),
    "threadgroup pointer": (
        REVERSE, "tile[i] =", "threadgroup float* p = tile; p[i + 1] =", "bounds .* 'tile'"),
    "private array index": (
        SUMS, "weights[i % 4]", "weights[i % 5]", "index out of bounds at test, source:4"),
    "write to an input": (
        REVERSE, "y[first + i] =", "((device float*)x)[i] =", "write to the input 'x'"),
    "write to constant memory": (
        REVERSE, "y[first", "*(float*)&table[i % 2] = 1; y[first", "constant memory"),
    "divergent barriers": (
        REVERSE, BARRIER, f"if (i < 40) {BARRIER}\nelse {BARRIER}", "divergent barriers"),
    "barrier for some threads": (
        REVERSE, BARRIER, f"if (i < 32) {BARRIER}", "divergent barrier .* 32 threads"),
    "return before a barrier": (
        REVERSE, BARRIER, f"if (i == 0) return; {BARRIER}", "divergent barrier .* 1 threads"),
    "divergent SIMD-group functions": (
        SUMS, "y[i] =", "if (i % 2) y[i] = simd_sum(1); else y[i] =", "divergent .* 16 in .* 16 in"),
    "barrier beside a SIMD-group function": (
        REVERSE, BARRIER, f"if (i % 32 == 0) simd_sum(1); {BARRIER}", "divergent .* 31 in a barrier"),
    "matrix for some lanes": (
        PRODUCT, "const uint", "if (thread_index_in_simdgroup == 5) return; const uint", "31 .* all 32"),
    "too much threadgroup memory": (
        REVERSE, "tile[64]", "tile[8193]", "32772 bytes of threadgroup memory .* 32768"),
    "private pointer": (
        REVERSE, "tile[i] =", "float own[4]; thread float* p = own; p[4] = x[first]; tile[i] = 0 * p[4] +",
        "access outside of a variable at test, source:4"),
    "vectors in an array of numbers": (
        REVERSE, "tile[i] =", "if (i < 16) ((threadgroup float4*)tile)[i] = float4(1); tile[i] =",
        "misaligned"),
    "misaligned vector": (
        REVERSE, "= x[first + i]", "= reinterpret_cast<const device float2*>(x + 1)[0].x", "misaligned"),
    "shift": (SUMS, "weights[i % 4]", "(1 << (weights[i % 4] + 31))", "shift out of range"),
    "integer overflow": (
        SUMS, "weights[i % 4]", "(weights[i % 4] + 2147483647)", "signed overflow"),
    "division by zero": (SUMS, "weights[i % 4]", "(1 % (weights[i % 4] - 1))", "division by zero"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_reported_whatever_the_schedule(fault):
    right, old, new, message = FAULTS[fault]
    assert old in right
    for seed in range(4):
        with pytest.raises(KernelError, match=message):
            run(
                right.replace(old, new),
                header="constant float table[2] = {1, 2};",
                groups=2,
                outputs=2 if right is PRODUCT else 1,
                call={"template": [("T", mx.float32)]},
                seed=seed,
            )


def test_seeds_let_simd_groups_run_ahead_of_each_other():
    racy = REVERSE.replace(BARRIER, "")
    found = {run(racy, seed=seed, check=False)[0][0].tobytes() for seed in range(8)}
    assert len(found) > 1


def test_a_threadgroup_holds_1024_threads_and_32_kilobytes():
    source = """
      threadgroup float tile[8192];
      tile[thread_position_in_grid.x] = x[thread_position_in_grid.x];
      y[thread_position_in_grid.x] = tile[thread_position_in_grid.x];
    """
    (y,), statistics = run(source, threads=1024)
    np.testing.assert_array_equal(y, np.arange(1024))
    assert statistics.threadgroup_bytes == 32768
    with pytest.raises(KernelError, match="1025 threads in a threadgroup; the limit is 1024"):
        run(source, threads=1025)


def test_writes_beyond_a_buffer_are_noticed_without_checks():
    with pytest.raises(KernelError, match="write out of bounds of 'y'"):
        run("y[thread_position_in_grid.x + 1] = 0;", check=False)


@pytest.mark.parametrize(
    "source",
    ["y[i] = part.thread_elements()[0];", "float own[40]; y[i] = own[int(x[i]) % 40];", ""],
)
def test_what_is_not_written_is_nan(source):
    source = f"const uint i = thread_position_in_grid.x; simdgroup_float8x8 part; {source}"
    (y,), _ = run(source, check=False)
    assert not np.isfinite(y).any() or np.abs(y).min() > 1e30


SIMD_FUNCTIONS = {
    "simd_sum(v)": lambda v, lane: np.full(32, v.sum()),
    "simd_product(v)": lambda v, lane: np.full(32, np.prod(v)),
    "simd_max(v)": lambda v, lane: np.full(32, v.max()),
    "simd_min(v)": lambda v, lane: np.full(32, v.min()),
    "simd_prefix_inclusive_sum(v)": lambda v, lane: np.cumsum(v),
    "simd_prefix_exclusive_product(v)": lambda v, lane: np.concatenate([[1], np.cumprod(v)[:-1]]),
    "simd_shuffle(v, lane / 2)": lambda v, lane: v[lane // 2],
    "simd_broadcast(v, 7)": lambda v, lane: np.full(32, v[7]),
    "simd_shuffle_xor(v, 5)": lambda v, lane: v[lane ^ 5],
    "simd_shuffle_down(v, 3)": lambda v, lane: np.where(lane < 29, v[(lane + 3) % 32], v),
    "simd_shuffle_up(v, 3)": lambda v, lane: np.where(lane < 3, v, v[lane - 3]),
    "simd_shuffle_rotate_down(v, 3)": lambda v, lane: v[(lane + 3) % 32],
    "simd_shuffle_rotate_up(v, 3)": lambda v, lane: v[lane - 3],
    "simd_shuffle_and_fill_up(v, -v, 3)": lambda v, lane: np.where(lane < 3, -v[lane - 3], v[lane - 3]),
    "quad_broadcast(v, 1)": lambda v, lane: v[lane // 4 * 4 + 1],
    "simd_any(v > 5)": lambda v, lane: np.full(32, 1),
    "simd_all(v > 5)": lambda v, lane: np.full(32, 0),
    "popcount(uint(ulong(simd_ballot(v > 5))))": lambda v, lane: np.full(32, (v > 5).sum()),
    "simd_or(lane)": lambda v, lane: np.full(32, 31),
    "simd_shuffle_xor(float2(v, -v), 1).y": lambda v, lane: -v[lane ^ 1],
    "simd_sum(half3(v, 2, 3)).z": lambda v, lane: np.full(32, 96),
}  # fmt: skip


def test_simd_group_functions():
    lane = np.arange(32)
    v = (lane * 7 % 11 - 5 + 0.5).astype(np.float32)
    lines = [f"y[{32 * k} + lane] = {name};" for k, name in enumerate(SIMD_FUNCTIONS)]
    start = "const uint lane = thread_index_in_simdgroup; const float v = x[lane];"
    (y,), _ = run("\n".join([start, *lines]), mx.array(v), threads=32, size=32 * len(lines))
    for found, (name, function) in zip(y.reshape(-1, 32), SIMD_FUNCTIONS.items(), strict=True):
        np.testing.assert_allclose(
            found, function(v.astype(np.float64), lane), rtol=1e-5, err_msg=name
        )


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_matrix_functions(dtype):
    mx.random.seed(0)
    x = mx.random.normal((2, 8, 8)).astype(dtype)
    (y, z), statistics = run(
        PRODUCT, x, threads=32, groups=2, size=128, outputs=2, call={"template": [("T", dtype)]}
    )
    a = np.array(x.astype(mx.float32), np.float64)
    np.testing.assert_allclose(y.reshape(2, 8, 8), np.eye(8) + a @ a.swapaxes(1, 2), atol=1e-4)
    np.testing.assert_allclose(z.reshape(2, 8, 8), (a @ a).swapaxes(1, 2), atol=1e-4)
    assert statistics.matrix_products == 4 and statistics.matrix_flops == 4 * 2 * 512
    assert statistics.read["x"] == 2 * 2 * 64 * dtype.size
    assert statistics.written == {"x": 0, "y": 512, "z": 512}


def test_positions_at_the_edge_of_a_grid():
    source = """
      const uint3 at = thread_position_in_grid, group = threadgroup_position_in_grid;
      const uint3 inside = thread_position_in_threadgroup, size = threads_per_threadgroup;
      const uint3 full = dispatch_threads_per_threadgroup;
      const uint place = at.x + threads_per_grid.x * (at.y + threads_per_grid.y * at.z);
      y[place] = all(at == group * full + inside) && all(inside < size)
          && thread_index_in_threadgroup == inside.x + size.x * (inside.y + size.y * inside.z)
          && thread_index_in_threadgroup == 32 * simdgroup_index_in_threadgroup + thread_index_in_simdgroup
          ? simdgroups_per_threadgroup : 1000;
    """
    grid, threadgroup = (10, 7, 3), (4, 4, 3)
    (y,) = metal_kernel("position", [], ["y"], source)(
        inputs=[],
        grid=grid,
        threadgroup=threadgroup,
        output_shapes=[grid[::-1]],
        output_dtypes=[mx.int32],
    )
    _, row, column = np.indices(grid[::-1])
    width, height = np.where(column < 8, 4, 2), np.where(row < 4, 4, 3)
    np.testing.assert_array_equal(np.array(y), -(-width * height * 3 // 32))


@pytest.mark.parametrize("fill", [0, None])
def test_atomic_outputs(fill):
    source = """
      atomic_fetch_add_explicit(&y[uint(x[thread_position_in_grid.x]) % 5], 1, memory_order_relaxed);
    """
    options = {"groups": 3, "size": 5, "dtype": mx.int32, "atomic_outputs": True}
    if fill is None:
        with pytest.raises(KernelError, match=r"uninitialised: .* 'y'"):
            run(source, **options)
    else:
        (y,), _ = run(source, **options, call={"init_value": fill})
        np.testing.assert_array_equal(y, np.bincount(np.arange(192) % 5))


def test_shapes_strides_and_scalars_come_as_mlx_passes_them():
    source = """
      const uint i = thread_position_in_grid.x;
      y[i] = x[elem_to_loc(i, x_shape, x_strides, x_ndim)] * scale + few[i % few_shape[0]];
    """
    x, few = mx.arange(24.0).reshape(2, 3, 4), mx.array([1.0, 2.0, 3.0])
    (y,) = metal_kernel("scaled", ["x", "few", "scale"], ["y"], source)(
        inputs=[x, few, 2.0],
        grid=(24, 1, 1),
        threadgroup=(8, 1, 1),
        output_shapes=[(24,)],
        output_dtypes=[mx.float32],
    )
    np.testing.assert_array_equal(np.array(y), np.arange(24) * 2 + np.arange(24) % 3 + 1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("bfloat16_t b = x[0];", "conversion"),  # only widening conversions are implicit
        ("y[0] = max(x[0], 1);", "ambiguous"),
        ("undeclared();", "test, source:1"),
        ("float fragment = x[0]; y[0] = fragment;", "test, source:1"),  # a reserved word
        ("double d = x[0];", "poisoned"),
        ("simdgroup_half8x8 a; simdgroup_load(a, x);", "memory of its own type"),
        (
            "const simdgroup_float8x8 a; simdgroup_float8x8 c; simdgroup_multiply(c, a, a);",
            "multiply",
        ),
    ],
)
def test_what_metal_refuses_does_not_compile(source, message):
    with pytest.raises(BuildError, match=message):
        run(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("threadgroup struct { int a; } s;", "not understood"),
        ("threadgroup float tile[2] = {0};", "not understood"),
        ('#include "missing.h"', "test:.*missing.h is in none"),
        ("helper();", "only kernels declare threadgroup variables: threadgroup int more"),
    ],
)
def test_text_that_is_not_understood_is_refused(source, message):
    header = "void helper() { threadgroup int more[4]; more[0] = 1; }" if "helper" in source else ""
    with pytest.raises(SourceError, match=message):
        run(source, header=header)


def test_the_signature_is_that_of_mlx():
    own = set(inspect.signature(metal_kernel).parameters) - {"check", "seed"}
    assert all(name in mx.fast.metal_kernel.__doc__ for name in own)
