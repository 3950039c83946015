"""Our kernels pass pointers to the memories that Metal would accept; C++ would not tell."""

import mlx.core as mx
import pytest
from harness import use_kernels

from mlx_align.data.packing import Segment
from mlx_align.kernels.metal_attention import flash_attention
from mlx_align.kernels.source import DTYPES, read_kernels, read_source
from mlx_align.kernels.token_log_prob import full_log_probs, log_ratios


@pytest.fixture(autouse=True)
def linted(monkeypatch):
    from metal import lint

    if why := lint.missing():
        pytest.skip(why)
    use_kernels(monkeypatch, lint.LintedKernel)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 256])
def test_attention(dtype, head_dim):
    q, k, v = (mx.zeros((1, n, 1, head_dim), dtype) for n in (2, 1, 1))
    segments = (Segment(0, 0, 1, -1),)
    mx.vjp(lambda *qkv: flash_attention(*qkv, segments, scale=0.1), [q, k, v], [q])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 9])
def test_log_probs(dtype, rows):
    logits, targets = mx.zeros((rows, 100), dtype), mx.zeros((rows,), mx.int32)
    mx.grad(lambda z: full_log_probs(z, targets).logp.sum())(logits)
    log_ratios(logits, logits, targets)


@pytest.mark.parametrize(
    ("file", "template"), [("tree_attention", "half, 64, 16, 1"), ("token_log_prob", "half")]
)
def test_whole_files(file, template):
    """With all variants, as `scripts/check_metal` compiles them on a Mac."""
    from metal.emulator.source import inline_includes, translate
    from metal.lint import lint

    text = f"#define MLX_ALIGN_STANDALONE\n{read_source(file)}"
    kernel = next(iter(read_kernels(text)))
    lint(translate(inline_includes(text, [], file, set()), kernel, template, {})[0])
