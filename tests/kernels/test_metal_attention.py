"""The kernels of attention over packs equal the definition in float64, values and gradients."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from harness import WAYS, close, exact, use_kernels
from mlx.utils import tree_flatten

from mlx_align.data.packing import Segment, pack
from mlx_align.data.template import make_example
from mlx_align.kernels import reference
from mlx_align.kernels.check import split
from mlx_align.kernels.metal_attention import (
    HEAD_DIMS,
    ROWS,
    VALUES,
    Tiling,
    make_tables,
)
from mlx_align.kernels.source import DTYPES, read_source
from mlx_align.kernels.tree_attention import dense_mask, tree_attention
from mlx_align.losses.preference import DPO
from mlx_align.model.adapter import AdapterSettings, wear_adapter
from mlx_align.model.recompute import checkpoint_blocks
from mlx_align.train.reference import reference_log_probs
from mlx_align.train.step import Part, gradient_batch

# Relative to the greatest value: float32 sums, results rounded to the dtype.
TOLERANCE = {mx.float32: 3e-6, mx.float16: 8e-4, mx.bfloat16: 6e-3}


def chain(*lengths):
    """Segments without parents, one after the other."""
    ends = np.cumsum(lengths).tolist()
    return tuple(Segment(0, e - n, e, -1) for e, n in zip(ends, lengths, strict=True))


def shared(prompt, *completions, row=0, start=0, parent=-1, index=0):
    """A prompt and its completions, from token `start` and segment `index` of the pack on."""
    at = start + prompt
    segments = [Segment(row, start, at, parent)]
    for n in completions:
        segments.append(Segment(row, at, at + n, index))
        at += n
    return tuple(segments)


# Segments and tokens; what is behind the last segment is padding.
PACKS = {
    "one token": (chain(1), 1),
    "one segment": (chain(33), 33),
    "one long segment": (chain(257), 257),
    "many short ones": (chain(*[1, 2, 3, 5, 8, 13, 21] * 3), 159),
    "a pair": (shared(70, 40, 19), 129),
    "eight completions": (shared(37, *range(3, 19, 2)), 117),
    "three levels": (
        (*shared(20, 9), Segment(0, 29, 50, 1), Segment(0, 50, 61, 1), Segment(0, 61, 66, 0)),
        66,
    ),
    "blocks of padding": (chain(20, 11), 140),
    "two rows": (
        (*shared(9, 30, 3), *shared(40, 8, row=1, index=3), Segment(1, 48, 70, -1)),
        70,
    ),
}  # fmt: skip


def problem(segments, tokens, heads, groups, dtype, head_dim, seed=0):
    """q, k, v and the gradient of the output."""
    rng = np.random.default_rng(seed)
    rows = max(s.row for s in segments) + 1
    shapes = [(rows, n, tokens, head_dim) for n in (heads, groups, groups, heads)]
    return [mx.array(rng.normal(size=s).astype(np.float32)).astype(dtype) for s in shapes]


def visible(segments, tokens, window=None):
    """bool[B, T, T], from the paths of the segments alone."""
    mask = np.zeros((max(s.row for s in segments) + 1, tokens, tokens), bool)
    paths = []
    for s in segments:
        above = paths[s.parent] if s.parent >= 0 else []
        paths.append([*above, *range(s.start, s.end)])
        for token in range(s.start, s.end):
            path = paths[-1][: len(above) + token - s.start + 1]
            mask[s.row, token, path[-window:] if window else path] = True
    return mask


def check(segments, tokens, dtype, head_dim, heads=4, groups=2, window=None, softcap=None):
    q, k, v, upstream = problem(segments, tokens, heads, groups, dtype, head_dim)
    scale = head_dim**-0.5
    expected = reference.attention(
        *map(exact, (q, k, v, upstream)),
        visible(segments, tokens, window),
        scale=scale,
        softcap=softcap,
    )

    def attend(q, k, v):
        return tree_attention(q, k, v, segments, scale=scale, window=window, softcap=softcap)

    (out,), gradients = mx.vjp(attend, [q, k, v], [upstream])
    assert out.dtype == dtype
    for name, found in zip(("out", "q", "k", "v"), (out, *gradients), strict=True):
        assert close(found, expected[name], TOLERANCE[dtype], least=1.0), name


@pytest.mark.parametrize("name", PACKS)
def test_packs(kernels, name):
    check(*PACKS[name], mx.float32, 64)


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 3), (6, 2), (8, 1)])
def test_groups_of_heads(kernels, heads, groups):
    check(*PACKS["three levels"], mx.float32, 64, heads, groups)


@pytest.mark.parametrize("name", ["one long segment", "a pair", "three levels", "two rows"])
@pytest.mark.parametrize("window", [1, 13, 64, 1000])
def test_windows(kernels, name, window):
    check(*PACKS[name], mx.float32, 64, window=window)


@pytest.mark.parametrize("window", [None, 13])
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_soft_caps(kernels, softcap, window):
    check(*PACKS["a pair"], mx.float32, 64, window=window, softcap=softcap)


def test_large_scores_stay_finite(kernels):
    """Scores of several thousands: the softmax is a choice, and nothing overflows."""
    segments, tokens = PACKS["a pair"]
    q, k, v, upstream = problem(segments, tokens, 4, 2, mx.float32, 64)
    expected = reference.attention(
        *map(exact, (q, k, v, upstream)), visible(segments, tokens), scale=40.0
    )
    out = tree_attention(q, k, v, segments, scale=40.0)
    assert close(out, expected["out"], 1e-3)


@pytest.mark.parametrize("broken", range(4))
def test_what_is_not_a_number_shows(kernels, broken):
    """NaN in q, k, v or upstream reaches who sees it; zeros would hide that a model has diverged."""
    segments = chain(20, 20)
    arrays = problem(segments, 40, 2, 1, mx.float32, 64)
    arrays[broken][0, 0, 7, 3] = mx.nan
    *qkv, upstream = arrays
    (out,), gradients = mx.vjp(
        lambda *qkv: tree_attention(*qkv, segments, scale=0.1), qkv, [upstream]
    )
    seeing = {0: [7], 1: range(7, 20), 2: range(7, 20), 3: []}[broken]
    for token in seeing:
        assert np.isnan(exact(out)[0, 0, token]).any(), token
    assert all(np.isnan(exact(g)[0, 0, 7]).any() for g in gradients[: 1 if broken == 1 else 2])
    assert not np.isnan(exact(out)[0, :, 32:]).any()


# Rows in registers or read again, tiles of 8 and 16 tokens; dtypes alternate.
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        (mx.float16, 64),
        (mx.bfloat16, 80),
        (mx.float32, 96),
        (mx.bfloat16, 128),
        (mx.float32, 128),
        (mx.float16, 256),
        (mx.float32, 256),
    ],
)
@pytest.mark.parametrize("name", ["one token", "a pair", "three levels", "two rows"])
def test_variants(kernels, dtype, head_dim, name):
    check(*PACKS[name], dtype, head_dim)


def test_any_order_of_threads_gives_the_same(emulator, monkeypatch):
    segments, tokens = PACKS["a pair"]
    q, k, v, upstream = problem(segments, tokens, 4, 2, mx.float16, 64)
    results = []
    for seed in range(3):

        def maker(seed=seed, **parts):
            return emulator.metal_kernel(**parts, seed=seed)

        use_kernels(monkeypatch, maker)
        (out,), gradients = mx.vjp(
            lambda *qkv: tree_attention(*qkv, segments, scale=0.1), [q, k, v], [upstream]
        )
        results.append([exact(x) for x in (out, *gradients)])
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


# -- what is computed, and what is not ---------------------------------------------------------------


def counted(emulator, monkeypatch, segments, tokens, window=None, head_dim=64):
    """Kernels, and what each did, of one head's forward and backward pass."""
    made = []

    def maker(**parts):
        made.append(emulator.metal_kernel(**parts))
        return made[-1]

    use_kernels(monkeypatch, maker)
    q, k, v, upstream = problem(segments, tokens, 1, 1, mx.float16, head_dim)

    def attend(q, k, v):
        return tree_attention(q, k, v, segments, scale=0.1, window=window)

    mx.eval(mx.vjp(attend, [q, k, v], [upstream]))
    return {kernel.name: kernel.statistics for kernel in made}


def fragments(segments, tokens, window=None, tile=16):
    """Pairs of 8 rows and a tile of which some row sees something."""
    mask = visible(segments, -(-tokens // ROWS) * ROWS, window)[0]
    by_rows = mask.reshape(mask.shape[0] // 8, 8, -1).any(axis=1)
    by_columns = mask.reshape(-1, mask.shape[1] // 8, 8).any(axis=2)
    rows = by_rows.reshape(len(by_rows), -1, tile).any(axis=2).sum()
    columns = by_columns.reshape(-1, tile, by_columns.shape[1]).any(axis=1).sum()
    return int(rows), int(columns)


@pytest.mark.parametrize(
    "name", ["one long segment", "many short ones", "a pair", "blocks of padding"]
)
def test_tiles_that_nobody_sees_are_never_touched(emulator, monkeypatch, name):
    """A matrix product of 8 x 8 x 8 is made for each fragment that is seen, and for no other."""
    segments, tokens = PACKS[name]
    found = [s.matrix_products for s in counted(emulator, monkeypatch, segments, tokens).values()]
    rows, columns = fragments(segments, tokens)
    each = (64 // 8) * (16 // 8)
    # Products by fragment: scores and output; scores, their gradient and the sum, twice; scores and sum.
    assert found == [2 * each * rows, 3 * each * rows, 3 * each * columns, 2 * each * columns]


def test_uneven_segments_cost_little_more_than_their_scores(emulator, monkeypatch):
    """16 segments in 4,096 tokens: at most 25 % more arithmetic than the visible pairs take."""
    segments, made = split(4096, 16), []

    def maker(**parts):
        made.append(emulator.metal_kernel(**parts, check=False))
        return made[-1]

    use_kernels(monkeypatch, maker)
    x = mx.zeros((1, 1, 4096, 64), mx.float16)

    def attend(q, k, v):
        return tree_attention(q, k, v, segments, scale=0.1)

    mx.eval(mx.vjp(attend, [x, x, x], [x]))
    pairs = sum((n := s.end - s.start) * (n + 1) // 2 for s in segments)
    for kernel, products in zip(made, (2, 3, 3, 2), strict=True):
        least = 2 * products * 64 * pairs
        assert least < kernel.statistics.matrix_flops < 1.25 * least, kernel.name


def test_windows_bound_the_work(emulator, monkeypatch):
    one, two = (
        sum(
            s.matrix_products
            for s in counted(emulator, monkeypatch, chain(tokens), tokens, 64).values()
        )
        for tokens in (512, 1024)
    )
    assert two < 2.2 * one


def test_threadgroup_memory_and_registers_suffice(emulator, monkeypatch):
    for tiling in (Tiling(d, n) for d in DTYPES for n in HEAD_DIMS):
        assert max(tiling.registers().values()) <= 128, tiling
    # 32 KB is the limit, which the emulator enforces; two groups fit in where heads are small.
    for head_dim, limit in ((64, 16_384), (128, 16_384), (256, 32_768)):
        found = counted(emulator, monkeypatch, chain(9), 9, head_dim=head_dim)
        assert max(s.threadgroup_bytes for s in found.values()) <= limit


def test_the_source_lists_the_variants_that_are_used():
    names = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat"}
    text = read_source("tree_attention")
    listed = [line for line in text.splitlines() if line.startswith("VARIANT(")]
    wanted = {
        f"VARIANT({names[d]}_{n}, {names[d]}, {n}, {t.tile}, {int(t.held)})"
        for d in DTYPES
        for n in HEAD_DIMS
        for t in [Tiling(d, n)]
    }
    assert set(listed) == wanted and len(listed) == len(wanted)


@pytest.mark.parametrize("name", PACKS)
def test_tables_say_what_the_mask_says(name):
    segments, tokens = PACKS[name]
    rows = max(s.row for s in segments) + 1
    ends, positions, spans = (np.array(x) for x in make_tables(segments, rows, tokens, 16))
    assert ends.shape[1] % ROWS == 0 and not ends[:, tokens:].any()
    mask = np.array(dense_mask(positions, ends, 13)) & (ends > 0)[:, :, None]
    mask = mask[:, :tokens, :tokens]
    assert np.array_equal(mask, visible(segments, tokens, 13))
    block = slice(16, 32)
    wanted = [f(x[0, block]) for x in (ends, positions) for f in (np.min, np.max)]
    assert spans[0, 1].tolist() == wanted


# -- how it is called --------------------------------------------------------------------------------


def operations(name, **about):
    """A maker of kernels whose kernels are MLX operations, for what an emulator cannot do: be traced."""

    def mask_of(ends, positions, tokens):
        i, j = mx.arange(tokens)[:, None], mx.arange(tokens)[None]
        return ((j <= i) & (i < ends[:, None, :tokens]))[:, None]

    def shares(q, k, ends, positions, sizes):
        scores = (q @ k.swapaxes(-1, -2)) * sizes[5:6].view(mx.float32)
        return mx.where(mask_of(ends, positions, q.shape[2]), scores, -1e30)

    def forward(q, k, v, ends, positions, spans, sizes):
        scores = shares(q, k, ends, positions, sizes)
        padding = [(0, 0), (0, 0), (0, ends.shape[1] - q.shape[2])]
        return [mx.softmax(scores, axis=-1) @ v, mx.pad(mx.logsumexp(scores, axis=-1), padding)]

    def gradient(
        whose, own, partner, other, others, log_sums, delta, ends, positions, spans, sizes
    ):
        q, k, v, u = (own, other, others, partner) if not whose else (other, own, partner, others)
        tokens = q.shape[2]
        scores = shares(q, k, ends, positions, sizes)
        p = mx.exp(scores - log_sums[:, :, :tokens, None])
        if whose == VALUES:
            return [p.swapaxes(-1, -2) @ u]
        by_score = p * (u @ v.swapaxes(-1, -2) - delta[:, :, :tokens, None])
        by_score = by_score * sizes[5:6].view(mx.float32)
        return [by_score.swapaxes(-1, -2) @ q if whose else by_score @ k]

    def call(*, inputs, template, **rest):
        template = dict(template)
        return gradient(template["WHOSE"], *inputs) if "gradient" in name else forward(*inputs)

    return call


@pytest.mark.parametrize("how", WAYS)
def test_transformations(monkeypatch, how):
    segments, tokens = PACKS["three levels"]
    q, k, v, upstream = problem(segments, tokens, 2, 2, mx.float32, 64)
    expected = reference.attention(
        *map(exact, (q, k, v, upstream)), visible(segments, tokens), scale=0.1
    )
    use_kernels(monkeypatch, operations)

    def loss(qkv):
        return (tree_attention(*qkv, segments, scale=0.1) * upstream).sum()

    function = WAYS[how](loss)
    for _ in range(2):
        value, gradients = function([q, k, v])
        assert close(value, (expected["out"] * exact(upstream)).sum(), 1e-4)
        for name, found in zip("qkv", gradients, strict=True):
            assert close(found, expected[name], 1e-5), name


def test_gradients_of_a_module(kernels):
    """nn.value_and_grad through projections, as in a model."""
    segments, tokens = PACKS["a pair"]
    layer = nn.Linear(128, 3 * 128, bias=False)
    x = mx.random.normal((1, tokens, 128), key=mx.random.key(0))
    inside = mx.array((visible(segments, tokens).any(axis=2))[:, None, :, None])

    def loss(model, attend):
        q, k, v = (
            part.reshape(1, tokens, 2, 64).swapaxes(1, 2) for part in mx.split(model(x), 3, axis=-1)
        )
        return (attend(q, k, v) * inside).square().sum()

    def ours(q, k, v):
        return tree_attention(q, k, v, segments, scale=0.125)

    def plain(q, k, v):
        mask = mx.array(visible(segments, tokens))[:, None] | mx.eye(tokens).astype(mx.bool_)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125, mask=mask)

    value, gradients = nn.value_and_grad(layer, loss)(layer, ours)
    expected, others = nn.value_and_grad(layer, loss)(layer, plain)
    assert close(value, exact(expected), 1e-5)
    assert close(gradients["weight"], exact(others["weight"]), 1e-5)


def test_heads_without_a_kernel_run_plain(monkeypatch):
    def refuse(**about):
        raise AssertionError("a kernel was made")

    use_kernels(monkeypatch, refuse)
    segments, tokens = PACKS["a pair"]
    check(segments, tokens, mx.float32, 40)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_training_is_that_of_the_plain_path(
    loaded_model, emulator, monkeypatch, checkpointing
):
    """DPO on a model whose heads have 64 dimensions: the loss, and every gradient of the adapter."""
    rng = np.random.default_rng(0)
    examples = [
        make_example(
            rng.integers(0, 390, prompt),
            [rng.integers(0, 390, n) for n in lengths],
            [np.ones(n, bool) for n in lengths],
            f"rows.jsonl:{prompt}",
        )
        for prompt, *lengths in ((30, 21, 9), (7, 4, 12))
    ]
    loaded = loaded_model(
        hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64
    )
    assert loaded.layout == "segments"
    adapter = wear_adapter(loaded.model, AdapterSettings(), seed=0)
    adapter.load({name: x + 0.02 for name, x in adapter.weights().items()}, "")
    with adapter.at_start(None):
        logp = reference_log_probs(loaded, adapter, examples)
    batch = pack(examples)
    loaded.model.train()
    if checkpointing:
        checkpoint_blocks(loaded.model)

    def step():
        totals, gradients = gradient_batch(loaded, DPO(), Part(batch, batch.join(logp)))
        return totals.means()["loss"], dict(tree_flatten(gradients))

    loss, gradients = step()
    started = []

    def maker(**parts):
        started.append(parts["name"])
        return emulator.metal_kernel(**parts)

    use_kernels(monkeypatch, maker)
    kernel_loss, found = step()
    for name in ("attention_forward", "attention_gradient", "prob_forward", "prob_gradient"):
        assert any(name in kernel for kernel in started), name
    assert kernel_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in found.items():
        assert close(gradient, exact(gradients[name]), 2e-5), name
