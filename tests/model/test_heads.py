"""The head is found by watching, with whatever the model does to its logits."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_align.model.adapter import LoRALinear
from mlx_align.model.heads import find_head


@pytest.mark.parametrize(
    ("family", "method", "scale", "softcap"),
    [
        ("llama", "as_linear", 1.0, None),
        ("llama-untied", "__call__", 1.0, None),
        ("gemma2", "as_linear", 1.0, 3.0),
        ("cohere", "as_linear", 0.25, None),
        ("granite", "as_linear", 0.125, None),
        ("gemma4_text", "as_linear", 1.0, 30.0),
    ],
)
def test_heads_of_real_architectures(loaded_model, family, method, scale, softcap):
    head = loaded_model(family).head
    assert (head.method, head.scale, head.softcap) == (method, scale, softcap)


def test_tapping_leaves_no_trace(loaded_model):
    loaded = loaded_model()
    tokens = mx.array([[1, 2, 3]])
    before = loaded.model(tokens)
    cls = type(loaded.head.module)
    with pytest.raises(RuntimeError), loaded.head.tapped():
        raise RuntimeError
    assert type(loaded.head.module) is cls
    assert mx.array_equal(loaded.model(tokens), before)


class Toy(nn.Module):
    """A model of one layer whose logits pass through a function of choice."""

    def __init__(self, head, after):
        super().__init__()
        self.layers = [nn.Linear(8, 8)]
        self.embed = nn.Embedding(30, 8)
        self.out = head
        self.after = after

    def __call__(self, tokens, cache=None):
        return self.after(self.out(self.layers[0](self.embed(tokens))))


@pytest.mark.parametrize(
    "after", [lambda z: z * z, lambda z: mx.maximum(z, 0), lambda z: z + 1, lambda z: z.sum(-1)]
)
def test_what_is_no_scale_and_no_cap_is_not_taken_for_one(after):
    assert find_head(Toy(nn.Linear(8, 30), after)) is None


def test_scale_and_cap_are_measured():
    toy = Toy(nn.Linear(8, 30), lambda z: 5 * mx.tanh(0.5 * z / 5))
    head = find_head(toy)
    assert head.scale == pytest.approx(0.5, rel=1e-3) and head.softcap == pytest.approx(5)


def trained(toy, head, hidden, targets):
    """Gradients of everything trained in the head, chunked and plainly."""
    toy.freeze()
    toy.out.unfreeze()
    if isinstance(toy.out, LoRALinear):
        toy.out.linear.freeze()
    parameters = toy.out.trainable_parameters()

    def chunked(p, h):
        toy.out.update(p)
        return (head.log_probs(h, targets, gradient=True)[0] * mx.arange(len(targets))).sum()

    def plain(p, h):
        toy.out.update(p)
        losses = nn.losses.cross_entropy(toy.after(toy.out(h)), targets)
        return -(losses * mx.arange(len(targets))).sum()

    results = [mx.grad(f, argnums=(0, 1))(parameters, hidden) for f in (chunked, plain)]
    toy.out.update(parameters)
    return results


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_head_that_is_trained(wrapped):
    linear = nn.Linear(8, 30)
    toy = Toy(LoRALinear(linear, 2, 2.0, 0.0) if wrapped else linear, lambda z: 7 * mx.tanh(z / 7))
    if wrapped:
        toy.out.lora_b = mx.random.normal(toy.out.lora_b.shape)
    head = find_head(toy)
    hidden = mx.random.normal((11, 8))
    targets = mx.array(np.arange(11) * 2)
    found, expected = trained(toy, head, hidden, targets)
    assert np.allclose(found[1], expected[1], atol=1e-5)
    gradients, wanted = dict(tree_flatten(found[0])), dict(tree_flatten(expected[0]))
    assert gradients.keys() == wanted.keys()
    for name in wanted:
        assert np.abs(np.array(wanted[name])).max() > 0
        assert np.allclose(gradients[name], wanted[name], atol=1e-4), name
