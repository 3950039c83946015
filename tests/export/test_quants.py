"""Blocks equal those of llama.cpp's own quantiser, decode to weights near by, and keep MLX's exactly."""

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from llama_cpp import reference_blocks

from mlx_align.errors import ExportError
from mlx_align.export import quants
from mlx_align.export.fuse import Packed
from mlx_align.export.quants import is_exact, quantise_tensor, repack

K_QUANTS = [Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K]
SIMPLE = [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0]
WIDTH = 512


def make_rows(kind):
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((24, WIDTH)).astype(np.float32)
    if kind == "one outlier":
        normal[:, 7::256] = 500
    return {
        "gaussian": 0.02 * normal,
        "heavy tails": 0.01 * rng.standard_t(2, normal.shape),
        "one sign": np.abs(normal) + 1,
        "far from zero": 0.01 * normal - 5,
        "on a grid": np.round(4 * normal) / 8,
        "constant": np.repeat(normal[:, :1], WIDTH, 1),
        "zero": np.zeros_like(normal),
        "scales too small": 1e-8 * normal,
        "nearly zero": 1e-20 * normal,
        "huge": 3e3 * normal,
        "one outlier": 0.02 * normal,
    }[kind].astype(np.float32)


KINDS = [
    "gaussian", "heavy tails", "one sign", "far from zero", "on a grid", "constant", "zero",
    "scales too small", "nearly zero", "huge", "one outlier",
]  # fmt: skip


def error(blocks, rows, kind):
    return np.sqrt(np.mean((gguf.quants.dequantize(blocks, kind) - rows) ** 2))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("rows", KINDS)
@pytest.mark.parametrize("kind", [*K_QUANTS, *SIMPLE])
def test_blocks_are_those_of_llama_cpp(kind, rows, weighted):
    rows = make_rows(rows)
    importance = None
    if weighted:
        importance = np.random.default_rng(1).exponential(size=WIDTH).astype(np.float32)
    expected = reference_blocks(rows, kind, importance)
    blocks = quantise_tensor("weight", rows, kind, importance)
    assert blocks.dtype == np.uint8 and blocks.shape == expected.shape
    # Where llama.cpp was compiled to fused products, sums differ in the last bit.
    assert np.mean(blocks == expected) > 0.995
    assert error(blocks, rows, kind) <= 1.005 * error(expected, rows, kind)


@pytest.mark.parametrize(
    ("kind", "bound"),
    [
        (Type.Q2_K, 0.30), (Type.Q3_K, 0.16), (Type.Q4_K, 0.072), (Type.Q5_K, 0.037),
        (Type.Q6_K, 0.018), (Type.Q4_0, 0.087), (Type.Q8_0, 0.0055),
    ],
)  # fmt: skip
def test_errors_of_gaussian_weights(kind, bound):
    rows = np.random.default_rng(2).standard_normal((64, WIDTH)).astype(np.float32)
    found = error(quantise_tensor("weight", rows, kind), rows, kind)
    assert 0.9 * bound < found < bound


@pytest.mark.parametrize("kind", [*K_QUANTS, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1])
def test_importance_lessens_the_error_where_it_is(kind):
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((64, WIDTH)).astype(np.float32)
    importance = rng.exponential(size=WIDTH).astype(np.float32) ** 3

    def weighted(blocks):
        return np.mean(importance * (gguf.quants.dequantize(blocks, kind) - rows) ** 2)

    plain = quantise_tensor("weight", rows, kind)
    assert weighted(quantise_tensor("weight", rows, kind, importance)) < 0.95 * weighted(plain)


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q5_1])
def test_chunks_and_stacks_change_nothing(kind, monkeypatch):
    rng = np.random.default_rng(4)
    stack = rng.standard_normal((3, 21, WIDTH)).astype(np.float32)
    importance = rng.exponential(size=(3, WIDTH)).astype(np.float32)
    alone = [quantise_tensor("w", m, kind, i) for m, i in zip(stack, importance, strict=True)]
    monkeypatch.setattr(quants, "CHUNK", 2 * WIDTH)
    assert np.array_equal(quantise_tensor("w", stack, kind, importance), np.stack(alone))
    assert np.array_equal(
        quantise_tensor("w", stack, kind)[1], quantise_tensor("w", stack[1], kind)
    )


@pytest.fixture
def gpu(monkeypatch):
    """MLX takes the part of a GPU; compiling for the CPU would take minutes."""
    mx.disable_compile()
    quants._gpu_agrees.cache_clear()
    monkeypatch.setattr(quants, "_has_gpu", lambda: True)
    monkeypatch.setattr(quants, "GPU_CHUNK", 5 * WIDTH)
    yield
    quants._gpu_agrees.cache_clear()
    mx.enable_compile()


@pytest.mark.parametrize(
    ("rows", "weighted"), [*((rows, False) for rows in KINDS), ("heavy tails", True)]
)
@pytest.mark.parametrize("kind", K_QUANTS)
def test_blocks_made_by_mlx_are_those_of_llama_cpp(gpu, kind, rows, weighted):
    rows = make_rows(rows)
    importance = np.linspace(0.1, 2, WIDTH, dtype=np.float32) if weighted else None
    assert quants._encoder(kind, weighted)[1]
    expected = reference_blocks(rows, kind, importance)
    blocks = quantise_tensor("weight", rows, kind, importance)
    assert np.mean(blocks == expected) > 0.995
    assert error(blocks, rows, kind) <= 1.005 * error(expected, rows, kind)


def test_a_gpu_that_is_wrong_is_not_used(gpu, monkeypatch, caplog):
    rows = make_rows("gaussian")
    expected = quants._on_cpu(quants._q6_k)(rows, None)
    monkeypatch.setattr(quants, "_on_gpu", lambda search: lambda rows, _: 0 * search(rows, None))
    assert np.array_equal(quantise_tensor("w", rows, Type.Q6_K), expected.reshape(len(rows), -1))
    assert "Q6_K: only" in caplog.text and "the CPU makes the blocks" in caplog.text


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16])
def test_plain_types(kind):
    rows = make_rows("gaussian")
    written = quantise_tensor("weight", rows, kind)
    expected = gguf.quants.quantize(rows, kind)
    assert written.dtype == expected.dtype and np.array_equal(written, expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [Type.F32, Type.BF16, Type.Q8_0, Type.Q4_K])
def test_weights_that_are_not_finite_are_refused(kind, value):
    rows = make_rows("gaussian")
    rows[23, 500] = value
    with pytest.raises(
        ExportError, match=r"blk\.3\.ffn_up\.weight: has weights that are not finite"
    ):
        quantise_tensor("blk.3.ffn_up.weight", rows, kind)


@pytest.mark.parametrize("kind", [Type.F16, *K_QUANTS, *SIMPLE])
def test_weights_beyond_the_scales_are_refused(kind):
    rows = make_rows("gaussian")
    rows[23, 500] = 1e30
    with pytest.raises(ExportError, match=f"w: has weights too large for {kind.name}"):
        quantise_tensor("w", rows, kind)


def pack(bits, group, dtype=mx.float16, scale=0.02, shape=(6, 256)):
    weight = mx.random.normal(shape, key=mx.random.key(0)) * scale
    return Packed(*mx.quantize(weight.astype(dtype), group, bits), bits, group)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(
    ("bits", "kind"),
    [(2, Type.Q4_1), (3, Type.Q4_1), (4, Type.Q4_1), (4, Type.Q5_1), (5, Type.Q5_1)],
)
@pytest.mark.parametrize("shape", [(6, 256), (2, 5, 256)], ids=["matrix", "stack"])
def test_packed_weights_stay_what_they_are(bits, kind, group, dtype, shape):
    packed = pack(bits, group, dtype, shape=shape)
    assert is_exact(packed, kind) and packed.shape == shape
    decoded = gguf.quants.dequantize(repack(packed, kind), kind)
    assert np.array_equal(decoded, np.array(packed.dense()))


@pytest.mark.parametrize(
    ("packed", "kind"),
    [
        (pack(5, 64), Type.Q4_1),
        (pack(8, 64), Type.Q5_1),
        (pack(4, 64, mx.float32), Type.Q4_1),
        (pack(4, 64, mx.bfloat16, scale=1e-7), Type.Q4_1),
        (pack(4, 64, mx.bfloat16, scale=1e7), Type.Q4_1),
    ],
    ids=["too many bits", "8 bits", "float32 scales", "small scales", "large scales"],
)
def test_what_blocks_cannot_hold_exactly(packed, kind):
    assert not is_exact(packed, kind)


def test_packed_arrays_know_their_shape_and_take_another_order():
    layer = nn.QuantizedLinear(128, 6, bias=False, group_size=32, bits=3)
    packed = Packed(layer.weight, layer.scales, layer.biases, 3, 32)
    dense = mx.dequantize(layer.weight, layer.scales, layer.biases, group_size=32, bits=3)
    assert packed.shape == (6, 128) and packed.ndim == 2
    assert np.array_equal(np.array(packed.dense()), np.array(dense))
    turned = packed.reordered(lambda part: part[::-1])
    assert np.array_equal(np.array(turned.dense()), np.array(dense[::-1]))
