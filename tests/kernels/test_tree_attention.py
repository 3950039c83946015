"""Attention over a pack equals attention with the matrix that says who sees whom."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_align.data.packing import Segment
from mlx_align.kernels import reference
from mlx_align.kernels import tree_attention as module
from mlx_align.kernels.tree_attention import dense_mask, tree_attention

# (row, start, end, parent)
TREES = {
    "one segment": [(0, 0, 7, -1)],
    "a pair": [(0, 0, 5, -1), (0, 5, 9, 0), (0, 9, 12, 0)],
    "many short ones": [(0, 0, 1, -1)] + [(0, i, i + 1, 0) for i in range(1, 9)],
    "two prompts": [(0, 0, 3, -1), (0, 3, 10, 0), (0, 10, 11, -1), (0, 11, 15, 2), (0, 15, 18, 2)],
    "three levels": [(0, 0, 4, -1), (0, 4, 9, 0), (0, 9, 12, 1), (0, 12, 16, 1), (0, 16, 19, 0)],
    "long ones": [(0, 0, 40, -1), (0, 40, 75, 0), (0, 75, 80, 0)],
    "two rows": [(0, 0, 4, -1), (0, 4, 6, 0), (1, 0, 3, -1), (1, 3, 9, 2)],
}  # fmt: skip


def layout(tree):
    """(segments, positions, ends) of a tree, from the rule."""
    segments = tuple(Segment(*s) for s in tree)
    rows = max(s.row for s in segments) + 1
    width = max(s.end for s in segments) + 3  # three tokens of padding
    positions, ends = np.zeros((2, rows, width), int)

    def depth(i):
        if i < 0:
            return 0
        s = segments[i]
        return depth(s.parent) + s.end - s.start

    def last(i):
        children = [last(j) for j, s in enumerate(segments) if s.parent == i]
        return max([segments[i].end, *children])

    for i, s in enumerate(segments):
        positions[s.row, s.start : s.end] = depth(s.parent) + np.arange(s.end - s.start)
        ends[s.row, s.start : s.end] = last(i)
    return segments, positions, ends


def arrays(rows, width, heads, groups, dim=8, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(rows, heads, width, dim), (rows, groups, width, dim), (rows, groups, width, dim)]
    return [mx.array(rng.normal(size=s).astype(np.float32)) for s in shapes]


def visible(tree):
    """bool[B, T]: tokens that belong to a segment."""
    segments, positions, _ = layout(tree)
    inside = np.zeros(positions.shape, bool)
    for s in segments:
        inside[s.row, s.start : s.end] = True
    return inside


@pytest.fixture(params=["flash", "fused"])
def path(request, monkeypatch):
    """The CPU's path, and the GPU's, which runs on the CPU as well."""
    monkeypatch.setattr(module, "_fused_is_faster", lambda: request.param == "fused")
    return request.param


LIMITS = [
    {},
    {"window": 1},
    {"window": 4},
    {"softcap": 0.7},
    {"sinks": True},
    {"window": 4, "softcap": 0.7, "sinks": True},
]


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: "-".join(limits) or "none")
@pytest.mark.parametrize("score_bytes", [1, 2**20])
def test_values_and_gradients(path, tree, heads, groups, limits, score_bytes, monkeypatch):
    """Compared with the definition in float64."""
    monkeypatch.setattr(module, "SCORE_BYTES", score_bytes)
    segments, positions, ends = layout(TREES[tree])
    q, k, v = arrays(*positions.shape, heads, groups)
    upstream = mx.random.normal(q.shape, key=mx.random.key(1))
    sinks = [mx.linspace(-1.0, 2.0, heads)] if "sinks" in limits else []
    rest = {"scale": 0.3, "softcap": limits.get("softcap")}

    def attend(q, k, v, *sinks):
        (sinks,) = sinks or (None,)
        window = limits.get("window")
        return tree_attention(q, k, v, segments, window=window, sinks=sinks, **rest)

    (out,), gradients = mx.vjp(attend, [q, k, v, *sinks], [upstream])
    # Padding sees nothing here, not even itself, and is to get zeros.
    mask = np.array(dense_mask(positions, ends, limits.get("window")))
    mask &= visible(TREES[tree])[:, :, None]
    expected = reference.attention(
        q, k, v, upstream, mask, sinks=sinks[0] if sinks else None, **rest
    )
    assert np.allclose(out, expected["out"], atol=2e-6)
    names = ("q", "k", "v", "sinks")[: 3 + len(sinks)]
    for name, found in zip(names, gradients, strict=True):
        assert np.allclose(found, expected[name], rtol=1e-5, atol=5e-6), name


def test_sinks_are_those_of_mlx():
    """And so of the models that have them: a natural logarithm, not scaled."""
    segments, positions, ends = layout(TREES["one segment"])
    q, k, v = arrays(*positions.shape, 4, 2)
    sinks, mask = mx.array([-1.0, 0.0, 1.0, 3.0]), dense_mask(positions, ends)[:, None]
    found = tree_attention(q, k, v, segments, scale=0.3, sinks=sinks)
    wanted = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask, sinks=sinks)
    assert np.allclose(found[:, :, :7], wanted[:, :, :7], atol=1e-6)


def test_dense_mask_is_the_rule_of_the_paths():
    segments, positions, ends = layout(TREES["three levels"])
    mask = np.array(dense_mask(positions, ends)[0])
    assert np.array_equal(dense_mask(positions, ends, None, 2, 5, 17)[0], mask[5:17, 2:17])
    parents = {i: s.parent for i, s in enumerate(segments)}

    def owner(token):
        return next((i for i, s in enumerate(segments) if s.start <= token < s.end), None)

    for i in range(mask.shape[0]):
        path, j = set(), owner(i)
        while j is not None and j >= 0:
            path.add(j)
            j = parents[j]
        for key in range(mask.shape[0]):
            sees = (owner(key) in path and key <= i) if path else key == i
            assert mask[i, key] == sees, (i, key)


def test_half_precision_comes_back_as_it_came(path):
    segments, positions, _ = layout(TREES["a pair"])
    q, k, v = (x.astype(mx.bfloat16) for x in arrays(*positions.shape, 4, 2))
    assert tree_attention(q, k, v, segments, scale=0.3).dtype == mx.bfloat16


@pytest.mark.parametrize("limits", [{}, {"window": 6}, {"softcap": 3.0}, {"sinks": mx.zeros(2)}])
def test_memory_grows_with_the_length_and_not_its_square(limits):
    def peak(tokens):
        segments = (Segment(0, 0, tokens // 2, -1), Segment(0, tokens // 2, tokens, 0))
        q, k, v = arrays(1, tokens, 2, 2, dim=4)
        mx.eval(q, k, v)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.grad(lambda q: tree_attention(q, k, v, segments, scale=0.5, **limits).sum())(q))
        return mx.get_peak_memory() - before

    assert peak(4096) < 2.2 * peak(2048)
