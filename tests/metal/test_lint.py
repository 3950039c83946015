"""The lint refuses what Metal's compiler refuses and C++ lets pass: pointers to the wrong memory."""

import mlx.core as mx
import pytest
from metal.lint import LintedKernel, LintError

from metal import lint

pytestmark = pytest.mark.skipif(lint.missing() is not None, reason=str(lint.missing()))

# Loads, stores, vectors, matrices and shared memory, all as they should be.
HEADER = """
template <typename T>
void copy(const device T* from, threadgroup T* to, uint i) { to[i] = from[i]; }

template <typename T>
T total(const threadgroup T* values, int count) {
  T sum = T(0);
  for (int i = 0; i < count; i++) sum += values[i];
  return sum;
}
"""
SOURCE = """
  threadgroup T tile[64];
  const uint i = thread_position_in_threadgroup.x;
  copy(x, tile, i);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_matrix<float, 8, 8> a, b(0.0f);
  simdgroup_load(a, reinterpret_cast<const device float*>(x), 8);
  simdgroup_multiply_accumulate(b, a, a, b);
  const float4 four = float4(b.thread_elements(), 1.0f, float(i));
  const auto other = reinterpret_cast<const device vec<T, 2>*>(x)[i];
  y[i] = total(tile, 64) + T(dot(four, four.wzyx)) + other.x + T(weights[i % 3]);
"""


def check(header, source, dtype=mx.float32):
    kernel = LintedKernel("tiled", ["x", "weights"], ["y"], source, header)
    (y,) = kernel(
        inputs=[mx.zeros((128,), dtype), mx.zeros((3,))],
        template=[("T", dtype)],
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(64,)],
        output_dtypes=[dtype],
    )
    assert y.shape == (64,) and y.dtype == dtype


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_correct_kernel_passes(dtype):
    check(HEADER, SOURCE, dtype)


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("copy(x, tile, i)", "copy(tile, tile, i)", "no matching function"),
        ("copy(x, tile, i)", "copy(x, y, i)", "no matching function"),
        # MLX passes inputs of fewer than 8 elements as constant.
        ("copy(x, tile, i)", "copy(weights, tile, i)", "no matching function"),
        ("total(tile, 64)", "total(y, 64)", "no matching function"),
        ("threadgroup T tile[64];", "T tile[64];", "no matching function"),
        ("const device vec<T, 2>*", "const threadgroup vec<T, 2>*", "not allowed"),
        # Metal's C++ is that of 2014.
        ("y[i] =", "if constexpr (sizeof(T) > 2) y[i] =", r"before C\+\+17"),
        ("y[i] =", "constant float* w = weights; w[0] = 1; y[i] =", "not assignable"),
    ],
)
def test_a_wrong_address_space_is_refused(right, wrong, message):
    assert right in SOURCE
    with pytest.raises(LintError, match=message):
        check(HEADER, SOURCE.replace(right, wrong))
