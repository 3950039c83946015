"""The emulator runs kernels nobody here wrote, MLX's and mlx-lm's own, and gets MLX's results on the CPU.

MLX's wheel holds part of its Metal sources; a checkout of MLX, its folder in $MLX_SOURCE, has the rest.
"""

import importlib
import os
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from metal.emulator import Library, Output

from metal import emulator

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

KERNELS = "mlx/backend/metal/kernels"
STAND_INS = Path(__file__).parent / "stand_ins"
FOLDERS = [
    *(Path(p) / "include" for p in importlib.import_module("mlx").__path__),
    Path(os.environ.get("MLX_SOURCE", "none")),
]
# Type, its name in Metal, and the relative rounding of a result.
TYPES = [
    (mx.float32, "float", 2**-23),
    (mx.float16, "half", 2**-11),
    (mx.bfloat16, "bfloat", 2**-8),
]
each_type = pytest.mark.parametrize(("dtype", "name", "rounding"), TYPES, ids=lambda x: str(x))


def library(*files):
    for file in files:
        if not any((folder / KERNELS / file).exists() for folder in FOLDERS):
            pytest.skip(f"{file} is not in MLX's wheel; set MLX_SOURCE to a checkout of MLX")
    text = "".join(f'#include "{KERNELS}/{file}"\n' for file in ("utils.h", *files))
    return Library(text, [STAND_INS, *FOLDERS])


def run(*arguments, **options):
    outputs, _ = Library.run(*arguments, **options)
    return outputs


def normal(*shape, dtype=mx.float32, scale=1.0):
    return (mx.random.normal(shape) * scale).astype(dtype)


def float32(*arrays):
    return [a.astype(mx.float32) for a in arrays]


def assert_close(found, expected, tolerance):
    """Within `tolerance` of the expected values, for small ones of their size altogether."""
    found, expected = (np.array(a.astype(mx.float32), np.float64) for a in (found, expected))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.fixture(autouse=True)
def seed():
    mx.random.seed(1)


@each_type
@pytest.mark.parametrize(("kernel", "threads"), [("single_row", 256), ("looped", 1024)])
def test_softmax(dtype, name, rounding, kernel, threads):
    x = normal(6, 1000, dtype=dtype, scale=3)
    (found,) = run(
        library("softmax.h"),
        f"softmax_{kernel}",
        {"in": x, "out": Output(x.shape, dtype), "axis_size": mx.array(1000)},
        (6 * threads, 1, 1),
        (threads, 1, 1),
        f"{name}, float",
    )
    assert_close(found, mx.softmax(*float32(x), axis=-1), 4 * rounding)


@each_type
@pytest.mark.parametrize(("kernel", "threads"), [("logsumexp", 256), ("logsumexp_looped", 1024)])
def test_logsumexp(dtype, name, rounding, kernel, threads):
    x = normal(6, 1000, dtype=dtype, scale=3)
    (found,) = run(
        library("logsumexp.h"),
        kernel,
        {"in": x, "out": Output((6,), dtype), "axis_size": mx.array(1000)},
        (6 * threads, 1, 1),
        (threads, 1, 1),
        name,
    )
    assert_close(found, mx.logsumexp(*float32(x), axis=-1), rounding)


@each_type
def test_cross_entropy_and_its_gradient(dtype, name, rounding):
    logits, targets = normal(6, 1000, dtype=dtype, scale=3), mx.array([0, 5, 999, 100, 3, 7])
    cotangent = normal(6)

    def loss(x):
        return mx.logsumexp(x, -1) - mx.take_along_axis(x, targets[:, None], -1)[:, 0]

    (expected,), (gradient,) = mx.vjp(loss, float32(logits), [cotangent])
    source = library("cross_entropy.h")
    threads, inputs = ((6 * 256, 1, 1), (256, 1, 1)), {"in": logits, "targets": targets}
    (found,) = run(
        source,
        "cross_entropy",
        {**inputs, "out": Output((6,), mx.float32), "axis_size": mx.array(1000)},
        *threads,
        f"{name}, float",
    )
    assert_close(found, expected, 2**-20)
    (found,) = run(
        source,
        "cross_entropy_vjp",
        {
            **inputs,
            "loss": expected,
            "cotan": cotangent,
            "out": Output(logits.shape, dtype),
            "axis_size": mx.array(1000),
        },
        *threads,
        f"{name}, float",
    )
    assert_close(found, gradient, 4 * rounding)


@each_type
def test_rms_norm(dtype, name, rounding):
    x, weight = normal(6, 1000, dtype=dtype), normal(1000, dtype=dtype)
    (found,) = run(
        library("rms_norm.metal"),
        "rms_single_row",
        {
            "x": x,
            "w": weight,
            "out": Output(x.shape, dtype),
            "eps": mx.array(1e-5),
            "axis_size": mx.array(1000, mx.uint32),
            "w_stride": mx.array(1, mx.uint32),
        },
        (6 * 256, 1, 1),
        (256, 1, 1),
        name,
        {"has_w": True},
    )
    assert_close(found, mx.fast.rms_norm(*float32(x, weight), 1e-5), 4 * rounding)


@each_type
@pytest.mark.parametrize("traditional", [False, True])
def test_rope(dtype, name, rounding, traditional):
    heads, tokens, width = 6, 9, 64
    x = normal(1, heads, tokens, width, dtype=dtype)
    strides = mx.array([tokens * width, width, 1], mx.int64)
    (found,) = run(
        library("rope.metal"),
        "rope",
        {
            "in": x,
            "out": Output(x.shape, dtype),
            "offset": mx.array([3]),
            "scale": mx.array(1.0),
            "strides": strides,
            "out_strides": strides,
            "offset_stride": mx.array(0, mx.int64),
            "n_head": mx.array(heads),
            "base": mx.array(np.log2(10000.0), mx.float32),
        },
        (width // 2, tokens, 2),
        (32, 4, 1),
        f"{name}, int",
        {"forward": True, "traditional": traditional, "hs_transpose": False},
    )
    (x,) = float32(x)
    expected = mx.fast.rope(x, width, traditional=traditional, base=10000.0, scale=1.0, offset=3)
    assert_close(found, expected, 4 * rounding + 1e-5)


@each_type
def test_vector_attention(dtype, name, rounding):
    heads, groups, tokens, width = 4, 2, 77, 64
    q = normal(1, heads, 1, width, dtype=dtype)
    k, v = (normal(1, groups, tokens, width, dtype=dtype) for _ in range(2))
    strides = {f"{x}_head_stride": mx.array(tokens * width, mx.uint64) for x in "kv"}
    strides |= {f"{x}_seq_stride": mx.array(width, mx.uint64) for x in "kv"}
    (found,) = run(
        library("sdpa_vector.h"),
        "sdpa_vector",
        {
            "queries": q,
            "keys": k,
            "values": v,
            "out": Output(q.shape, dtype),
            "gqa_factor": mx.array(heads // groups),
            "N": mx.array(tokens),
            "scale": mx.array(width**-0.5),
            **strides,
        },
        (heads * 1024, 1, 1),
        (1024, 1, 1),
        f"{name}, {width}",
        dict.fromkeys(
            ["has_mask", "query_transposed", "do_causal", "bool_mask", "float_mask", "has_sinks"],
            False,
        )
        | {"blocks": 0},
    )
    expected = mx.fast.scaled_dot_product_attention(*float32(q, k, v), scale=width**-0.5)
    assert_close(found, expected, 4 * rounding)


@each_type
@pytest.mark.parametrize(
    ("width", "queries", "keys", "mask"),
    [(64, 64, 64, "causal"), (64, 50, 90, "causal"), (128, 40, 72, "bool"), (64, 33, 65, "float")],
)
def test_matrix_attention(dtype, name, rounding, width, queries, keys, mask):
    heads, groups, bq, bk = 4, 2, 32, 32 if width < 128 else 16
    q = normal(1, heads, queries, width, dtype=dtype)
    k, v = (normal(1, groups, keys, width, dtype=dtype) for _ in range(2))
    numbers = [1, heads, width, queries, keys, heads // groups]
    blocks = [-(-queries // bq), -(-keys // bk), queries // bq, keys // bk]
    rest = [queries % bq, keys % bk, keys - queries]
    strides = [
        stride
        for rows, count in ((queries, heads), (keys, groups), (keys, groups), (queries, heads))
        for stride in (count * rows * width, rows * width, width)
    ]
    parameters = struct.pack("=6if7i12q", *numbers, width**-0.5, *blocks, *rest, *strides)
    visible = {
        "bool": mx.random.uniform(shape=(queries, keys)) < 0.7,
        "float": normal(queries, keys, dtype=dtype),
    }.get(mask)
    arguments = {
        "Q": q,
        "K": k,
        "V": v,
        "O": Output(q.shape, dtype),
        "params": mx.array(np.frombuffer(parameters, np.uint8)),
    }
    if visible is not None:
        arguments |= {"mask": visible, "mask_params": mx.array([0, 0, keys], mx.int64)}
    (found,) = run(
        library("steel/attn/kernels/steel_attention.h"),
        "attention",
        arguments,
        (blocks[0] * 32, heads * 4, 1),
        (32, 4, 1),
        f"{name}, {bq}, {bk}, {width}, {width}, 4, 1, {'bool' if mask == 'bool' else name}, float",
        {
            "align_Q": queries % bq == 0,
            "align_K": keys % bk == 0,
            "has_mask": visible is not None,
            "do_causal": mask == "causal",
            "has_sinks": False,
            "save_lse": False,
        },
    )
    mask = (
        visible.astype(mx.float32) if mask == "float" else "causal" if mask == "causal" else visible
    )
    expected = mx.fast.scaled_dot_product_attention(*float32(q, k, v), scale=width**-0.5, mask=mask)
    assert_close(found, expected, 4 * rounding)


@each_type
def test_sort(dtype, name, rounding):
    x = normal(6, 300, dtype=dtype)
    (found,) = run(
        library("sort.h"),
        "block_sort",
        {
            "inp": x,
            "out": Output(x.shape, dtype),
            "size_sorted_axis": mx.array(300),
            "in_stride_sorted_axis": mx.array(1),
            "out_stride_sorted_axis": mx.array(1),
            "in_stride_segment_axis": mx.array(300),
            "out_stride_segment_axis": mx.array(300),
        },
        (128, 6, 1),
        (128, 1, 1),
        f"{name}, {name}, false, 128, 4",
    )
    assert_close(found, mx.sort(*float32(x), axis=-1), 0)


def mlx_lm_kernels(name, monkeypatch):
    """A module of mlx_lm.kernels whose kernels are emulated."""
    pytest.importorskip("mlx_lm.kernels", reason="this mlx-lm has no kernels of its own")
    module = importlib.import_module(f"mlx_lm.kernels.{name}")
    monkeypatch.setattr(mx.fast, "metal_kernel", emulator.metal_kernel)
    spec = importlib.util.spec_from_file_location(module.__name__, module.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


@each_type
def test_rms_norm_and_rope_of_mlx_lm(dtype, name, rounding, monkeypatch):
    batch, tokens, heads, groups, width = 2, 5, 4, 2, 64
    qkvg = normal(batch, tokens, 2 * (heads + groups) * width, dtype=dtype)
    found = mlx_lm_kernels("qk_norm_rope", monkeypatch).qk_norm_rope(
        qkvg,
        n_heads=heads,
        n_kv_heads=groups,
        head_dim=width,
        eps=1e-5,
        query_scale=0.5,
        rope_base=10000.0,
        offset=mx.array([7, 2]),
    )
    (x,) = float32(qkvg)
    q, k, *_ = mx.split(x, np.cumsum([heads * width, groups * width]).tolist(), axis=-1)
    for got, part, scale in zip(found, (q, k), (0.5, 1.0), strict=True):
        rows = part.reshape(batch, tokens, -1, width)
        expected = mx.fast.rope(
            (mx.fast.rms_norm(rows, None, 1e-5) * scale).swapaxes(1, 2),
            width,
            traditional=True,
            base=10000.0,
            scale=1.0,
            offset=mx.array([7, 2]),
        )
        assert_close(got, expected.swapaxes(1, 2), 4 * rounding + 1e-5)
