"""The reference's cache: found again, complete, and refused when it is not what its name says."""

import mlx.core as mx
import numpy as np
import pytest
from test_step import pairs

from mlx_align.errors import StaleReferenceError
from mlx_align.model.adapter import AdapterSettings, wear_adapter
from mlx_align.train import reference as module
from mlx_align.train.reference import (
    model_fingerprint,
    reference_description,
    reference_log_probs,
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_ALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "PART", 3)
    return tmp_path / "cache" / "reference"


def computed(loaded, examples, adapter=None):
    """The log-probabilities and how many examples had to be computed."""
    counts = []
    found = reference_log_probs(
        loaded, adapter, examples, progress=lambda done, total: counts.append(total)
    )
    return found, counts[-1] if counts else 0


def test_a_second_run_reads_what_the_first_one_computed(cache, loaded_model):
    loaded, examples = loaded_model(), pairs(8)
    first, count = computed(loaded, examples)
    assert count == 8 and len(list(cache.rglob("*.safetensors"))) == 3
    second, count = computed(loaded, examples[::-1])
    assert count == 0
    assert all(np.array_equal(first[uid], second[uid]) for uid in first)


def test_only_what_is_missing_is_computed(cache, loaded_model):
    loaded, examples = loaded_model(), pairs(8)
    computed(loaded, examples[:4])
    _, count = computed(loaded, examples)
    assert count == 4


def test_it_is_the_base_whatever_the_model_wears(cache, loaded_model):
    examples = pairs(4)
    expected, _ = computed(loaded_model(), examples)
    for file in cache.rglob("*.safetensors"):
        file.unlink()
    loaded = loaded_model()
    adapter = wear_adapter(loaded.model, AdapterSettings(), seed=0)
    adapter.load({n: x + 0.1 for n, x in adapter.weights().items()}, "")
    found, count = computed(loaded, examples, adapter)
    assert count == 4
    assert all(np.array_equal(found[uid], expected[uid]) for uid in expected)


def test_an_interrupted_pass_goes_on_with_the_same_numbers(cache, loaded_model):
    loaded, examples = loaded_model(), pairs(10)
    whole, _ = computed(loaded, examples)
    files = sorted(cache.rglob("*.safetensors"), key=lambda f: f.stat().st_mtime_ns)
    for file in files[2:]:
        file.unlink()
    again, count = computed(loaded, examples)
    assert count == 4
    assert all(np.array_equal(whole[uid], again[uid]) for uid in whole)


@pytest.mark.parametrize("change", [{"seed": 1}, {"rope_theta": 77.0}, {"quantise": (8, 32)}])
def test_another_model_never_finds_it(cache, loaded_model, change):
    examples = pairs(3)
    computed(loaded_model(), examples)
    _, count = computed(loaded_model("llama", **change), examples)
    assert count == 3


def test_another_row_never_finds_it(cache, loaded_model):
    loaded = loaded_model()
    computed(loaded, pairs(3))
    _, count = computed(loaded, pairs(3, seed=1))
    assert count == 3


def test_the_fingerprint_follows_the_bytes(cache, model_folder, tmp_path):
    import shutil

    from mlx_align.model.load import load_model

    folder = tmp_path / "copy"
    shutil.copytree(model_folder(), folder)
    loaded = load_model(str(folder))
    before = model_fingerprint(loaded)
    assert before == model_fingerprint(load_model(str(model_folder())))
    weights = mx.load(str(folder / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1e-3
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    assert model_fingerprint(loaded) != before


def test_files_that_are_not_what_they_say_are_refused(cache, loaded_model):
    loaded, examples = loaded_model(), pairs(3)
    computed(loaded, examples)
    (file,) = cache.rglob("*.safetensors")
    arrays, metadata = mx.load(str(file), return_metadata=True)
    mx.eval(arrays)

    mx.save_safetensors(str(file), {**arrays, "logp": arrays["logp"] + 1}, metadata)
    with pytest.raises(StaleReferenceError, match="its content was changed"):
        computed(loaded, examples)

    other = metadata["description"].replace(reference_description(loaded)["model"], "0" * 32)
    mx.save_safetensors(str(file), arrays, {**metadata, "description": other})
    with pytest.raises(StaleReferenceError, match="computed with another model"):
        computed(loaded, examples)

    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(StaleReferenceError, match="not a readable reference cache"):
        computed(loaded, examples)


def test_an_interrupted_write_leaves_nothing_to_read(cache, loaded_model, monkeypatch):
    loaded, examples = loaded_model(), pairs(3)

    def full_disk(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlx_align.model.adapter.write_atomically", full_disk)
    with pytest.raises(OSError, match="No space"):
        computed(loaded, examples)
    monkeypatch.undo()
    monkeypatch.setenv("MLX_ALIGN_CACHE", str(cache.parent))
    _, count = computed(loaded, examples)
    assert count == 3
