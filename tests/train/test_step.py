"""One optimizer step: first-step identities, independence of the packing, errors that name rows."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_align.data.template import make_example
from mlx_align.errors import NonFiniteError
from mlx_align.losses.preference import DPO
from mlx_align.losses.sft import SFT
from mlx_align.model.adapter import AdapterSettings, wear_adapter
from mlx_align.model.forward import make_batches
from mlx_align.train.optimizer import Optimizer, learning_rate_at
from mlx_align.train.reference import reference_log_probs
from mlx_align.train.step import NOTHING, Part, evaluate, gradient_batch, survey, train_step


def pairs(count, seed=0, words=390):
    rng = np.random.default_rng(seed)

    def one(i):
        ids = [rng.integers(0, words, n) for n in rng.integers(2, 12, 2)]
        masks = [np.ones(len(c), bool) for c in ids]
        return make_example(
            rng.integers(0, words, rng.integers(1, 15)), ids, masks, f"rows.jsonl:{i}"
        )

    return [one(i) for i in range(1, count + 1)]


def ready(loaded, examples, **adapter_settings):
    adapter = wear_adapter(loaded.model, AdapterSettings(**adapter_settings), seed=0)
    loaded.model.eval()
    reference = reference_log_probs(loaded, adapter, examples)
    loaded.model.train()
    return adapter, reference


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mamba"])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_the_first_step_starts_at_the_reference(loaded_model, family, kind):
    if kind == "dora" and family == "mamba":
        kind = "lora"
    loaded = loaded_model(family)
    examples = pairs(6)
    _, reference = ready(loaded, examples, fine_tune=kind)
    for batch in make_batches(loaded, examples, 64):
        totals, gradients = gradient_batch(loaded, DPO(), Part(batch, batch.join(reference)))
        means = totals.means()
        assert means["loss"] == pytest.approx(np.log(2), abs=2e-5)
        assert abs(means["rewards/margins"]) < 1e-4
        assert max(np.abs(np.array(g)).max() for _, g in tree_flatten(gradients)) > 1e-4


@pytest.mark.parametrize("quantise", [(4, 32), (8, 32)])
def test_quantised_bases_start_at_the_reference_too(loaded_model, quantise):
    loaded = loaded_model("llama", quantise=quantise)
    examples = pairs(4)
    _, reference = ready(loaded, examples)
    (batch,) = make_batches(loaded, examples, 4096)
    totals, _ = gradient_batch(loaded, DPO(), Part(batch, batch.join(reference)))
    assert totals.means()["loss"] == pytest.approx(np.log(2), abs=2e-5)


@pytest.mark.parametrize("method", [DPO(), SFT()])
@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_1x8_2x4_and_8x1_are_the_same_step(loaded_model, method, family):
    examples = pairs(8)

    def step(pack_length):
        loaded = loaded_model(family)
        adapter, reference = ready(loaded, examples, lora_rank=4)
        adapter.load({n: x + 0.02 for n, x in adapter.weights().items()}, "")
        batches = make_batches(loaded, examples, pack_length)
        totals, gradients = NOTHING, {}
        for batch in batches:
            here, more = gradient_batch(loaded, method, Part(batch, batch.join(reference)))
            totals = totals.add(here)
            for name, g in tree_flatten(more):
                gradients[name] = gradients.get(name, 0) + np.array(g, np.float64)
        joined = [Part(b, b.join(reference)) for b in batches]
        stepped, norm = train_step(loaded, adapter, Optimizer(0.0, 1.0), method, joined, 1e-2)
        assert stepped.means() == pytest.approx(totals.means(), rel=1e-6)
        return (
            len(batches),
            totals.means(),
            {n: g / totals.weight for n, g in gradients.items()},
            norm,
        )

    (one, means, gradients, norm), *others = [step(n) for n in (10_000, 130, 1)]
    assert one < others[0][0] < others[1][0] == 8
    assert norm == pytest.approx(np.sqrt(sum((g**2).sum() for g in gradients.values())), rel=1e-5)
    for _, other_means, other_gradients, other_norm in others:
        assert other_norm == pytest.approx(norm, rel=1e-5)
        assert other_means == pytest.approx(means, rel=1e-4, abs=1e-5)
        for name, g in gradients.items():
            assert np.allclose(other_gradients[name], g, atol=1e-6 * norm), name


def test_gradients_agree_with_finite_differences(loaded_model):
    loaded = loaded_model()
    examples = pairs(3)
    adapter, reference = ready(loaded, examples, lora_rank=2)
    (batch,) = make_batches(loaded, examples, 4096)
    part = Part(batch, batch.join(reference))
    whole, _ = survey(loaded, DPO(), [part])
    direction = {
        name: mx.random.normal(x.shape, key=mx.random.key(i))
        for i, (name, x) in enumerate(adapter.weights().items())
    }
    start = {
        n: x + 0.05 * mx.random.normal(x.shape, key=mx.random.key(99))
        for n, x in adapter.weights().items()
    }

    def loss_at(t):
        adapter.load({n: x + t * direction[n] for n, x in start.items()}, "")
        return evaluate(loaded, DPO(beta=1.0), [part], whole).loss

    h = 2e-3
    numeric = (loss_at(h) - loss_at(-h)) / (2 * h)
    adapter.load(start, "")
    _, gradients = gradient_batch(loaded, DPO(beta=1.0), part)
    slope = sum(float((g * direction[n]).sum()) for n, g in tree_flatten(gradients))
    assert slope == pytest.approx(numeric, rel=2e-2)


def test_eight_pairs_are_learnt_by_heart(loaded_model):
    loaded = loaded_model()
    examples = pairs(8)
    adapter, reference = ready(loaded, examples)
    optimizer = Optimizer(0.0, 1.0)
    (batch,) = make_batches(loaded, examples, 4096)
    joined = [Part(batch, batch.join(reference))]
    for _ in range(30):
        totals, _ = train_step(loaded, adapter, optimizer, DPO(), joined, 1e-2)
    means = totals.means()
    assert means["rewards/accuracies"] == 1.0 and means["loss"] < 0.1
    assert means["rewards/chosen"] > means["rewards/rejected"]


def test_a_step_with_zero_learning_rate_changes_nothing(loaded_model):
    loaded = loaded_model()
    examples = pairs(2)
    adapter, reference = ready(loaded, examples)
    before = adapter.weights()
    (batch,) = make_batches(loaded, examples, 4096)
    train_step(
        loaded,
        adapter,
        Optimizer(0.1, 1.0),
        DPO(),
        [Part(batch, batch.join(reference))],
        0.0,
    )
    assert all(mx.array_equal(before[n], x) for n, x in adapter.weights().items())


def test_a_loss_that_is_not_finite_names_the_rows_and_changes_nothing(loaded_model):
    loaded = loaded_model()
    examples = pairs(4)
    adapter, reference = ready(loaded, examples)
    # A broken row of the embedding: only examples with this token are to blame.
    token = int(examples[2].completions[0][0])
    loaded.model.model.embed_tokens.weight[token] = mx.array(float("nan"))
    blamed = {e.origin for e in examples if token in np.concatenate([e.prompt, *e.completions])}
    before = adapter.weights()
    (batch,) = make_batches(loaded, examples, 4096)
    with pytest.raises(NonFiniteError) as caught:
        joined = [Part(batch, batch.join(reference))]
        train_step(loaded, adapter, Optimizer(0.0, 1.0), DPO(), joined, 1e-3)
    assert any(origin in str(caught.value) for origin in blamed)
    assert all(mx.array_equal(before[n], x) for n, x in adapter.weights().items())


def test_adamw_is_the_papers():
    """Three steps against the update of Loshchilov and Hutter 2019, algorithm 2, in float64."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=5)
    gradients = rng.normal(size=(3, 5))
    optimizer = Optimizer(weight_decay=0.1, max_grad_norm=0.0)
    ours = {"w": mx.array(weight.astype(np.float32))}
    m, v = np.zeros(5), np.zeros(5)
    for t, g in enumerate(gradients, 1):
        rate = 0.01 * t
        ours, norm = optimizer.step(ours, {"w": mx.array(g.astype(np.float32))}, rate)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        weight = weight * (1 - rate * 0.1)
        weight -= rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        assert float(norm) == pytest.approx(np.linalg.norm(g), rel=1e-5)
        assert np.allclose(ours["w"], weight, atol=1e-6)


def test_adamw_is_torchs():
    torch = pytest.importorskip("torch", reason="compared where torch is installed (extra: parity)")
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(4, 3)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(weight))
    other = torch.optim.AdamW([theirs], lr=0.02, weight_decay=0.05)
    optimizer, ours = Optimizer(0.05, 1.0), {"w": mx.array(weight)}
    for _ in range(5):
        g = rng.normal(size=(4, 3)).astype(np.float32) * 3
        theirs.grad = torch.tensor(g)
        torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        other.step()
        ours, _ = optimizer.step(ours, {"w": mx.array(g)}, 0.02)
    assert np.allclose(ours["w"], theirs.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", [0.5, 1] + [0.5 * (1 - np.cos(np.pi * left / 8)) for left in range(8, 0, -1)]),
    ],
)
def test_schedules(schedule, expected):
    rates = [learning_rate_at(step, 10, 3.0, schedule, warmup=0.2) for step in range(10)]
    assert rates == pytest.approx([3.0 * e for e in expected])
    assert learning_rate_at(0, 10, 3.0, schedule, warmup=0.0) == 3.0
