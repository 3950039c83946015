"""Importance matrices: read as llama-imatrix writes them, measured as it measures them, and used."""

import struct

import gguf
import mlx.core as mx
import numpy as np
import pytest
import tiny
from llama_cpp import reference_blocks
from test_folder import adapted
from test_gguf import fields

from mlx_align.errors import DataError, ExportError
from mlx_align.export.gguf import export_gguf
from mlx_align.export.importance import measure_importance, read_imatrix
from mlx_align.model.load import load_model

ENTRIES = {
    "blk.0.attn_q.weight": np.float32([1, 2, 0.5, 4]),
    "blk.0.ffn_up.weight": np.ones(2, "f"),
}


def write_older(path, entries, calls=3):
    parts = [struct.pack("<i", len(entries))]
    for name, means in entries.items():
        values = (means * np.float32(calls)).tobytes()
        parts += [struct.pack("<i", len(name)), name.encode()]
        parts += [struct.pack("<2i", calls, len(means)), values]
    path.write_bytes(b"".join(parts) + struct.pack("<2i", calls, 4) + b"text")
    return path


def write_gguf(path, sums):
    """`sums` are (sums of squares [matrices, in], counts [matrices]) by name."""
    writer = gguf.GGUFWriter(str(path), "none")
    writer.add_type("imatrix")
    for name, (values, counts) in sums.items():
        writer.add_tensor(f"{name}.in_sum2", np.float32(values))
        writer.add_tensor(f"{name}.counts", np.float32(counts).reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_older_format(tmp_path):
    read = read_imatrix(write_older(tmp_path / "imatrix.dat", ENTRIES))
    assert read.keys() == ENTRIES.keys()
    assert all(np.allclose(read[name], means) for name, means in ENTRIES.items())


def test_the_gguf_format(tmp_path):
    """An expert that saw no token counts evenly."""
    sums = {"blk.0.attn_q.weight": ([[2, 4, 6, 8]], [2])}
    sums["blk.0.ffn_up_exps.weight"] = ([[3, 6], [0, 0]], [3, 0])
    read = read_imatrix(write_gguf(tmp_path / "imatrix.gguf", sums))
    assert np.array_equal(read["blk.0.attn_q.weight"], [[1, 2, 3, 4]])
    assert np.array_equal(read["blk.0.ffn_up_exps.weight"], [[1, 2], [1, 1]])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file"),
        (b"", "is not an importance matrix"),
        (b"just some text, not an importance matrix", "is not an importance matrix"),
        (b"GGUF" + bytes(20), "is not an importance matrix"),
        (struct.pack("<i", 0), "without entries"),
        ({"a": np.float32([1, np.nan])}, "a has values that are not finite or below zero"),
        ({"a": np.float32([1, -1])}, "a has values that are not finite or below zero"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, content, words):
    path = tmp_path / "imatrix.dat"
    if isinstance(content, dict):
        write_older(path, content)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_imatrix(path)


def test_half_a_file_is_refused(tmp_path):
    path = write_older(tmp_path / "imatrix.dat", ENTRIES)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match="is not an importance matrix"):
        read_imatrix(path)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(tiny.CORPUS * 4))
    return path


def inputs(loaded, text):
    """Hidden states [tokens, width] of the windows that are measured, before the first block."""
    ids = loaded.tokenizer.encode(text.read_text())
    return [
        loaded.model.model.embed_tokens(mx.array([ids[i : i + 512]]))
        for i in range(0, len(ids) - 511, 512)
    ]


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("quantise", [None, (4, 32)])
def test_means_of_squared_inputs(model_folder, text, kind, quantise):
    if quantise and kind == "full":
        pytest.skip("a quantised model is not trained fully")
    loaded = adapted(model_folder, "llama", kind, quantise=quantise)
    layers, logits = loaded.model.named_modules(), loaded.model(mx.array([[3, 5, 9]]))
    measured = measure_importance(loaded, text)
    # The model is what it was.
    same = zip(layers, loaded.model.named_modules(), strict=True)
    assert all(a is b for (_, a), (_, b) in same)
    assert mx.array_equal(logits, loaded.model(mx.array([[3, 5, 9]])))
    assert len(measured) == 2 * 7 and not any("embed" in name for name in measured)
    block = loaded.model.model.layers[0]
    windows = inputs(loaded, text)
    normed = np.concatenate([np.array(block.input_layernorm(w)[0], np.float64) for w in windows])
    assert len(windows) > 1
    for name in ("q_proj", "k_proj", "v_proj"):
        found = measured[f"model.layers.0.self_attn.{name}.weight"]
        assert found.shape == (64,) and np.allclose(found, (normed**2).mean(0), rtol=1e-4)


@pytest.mark.parametrize("wear", [False, True], ids=["base", "adapter"])
def test_experts_have_means_of_their_own(model_folder, text, wear):
    loaded = load_model(str(model_folder("qwen3_moe")))
    if wear:
        loaded = adapted(model_folder, "qwen3_moe")
    measured = measure_importance(loaded, text)
    block = loaded.model.model.layers[0]
    sums, counts = np.zeros((4, 64)), np.zeros(4)
    for window in inputs(loaded, text):
        hidden = window + block.self_attn(block.input_layernorm(window), mask="causal")
        hidden = block.post_attention_layernorm(hidden)
        chosen = np.array(mx.argpartition(-block.mlp.gate(hidden), kth=1, axis=-1)[0, :, :2])
        squares = np.array(hidden[0], np.float64) ** 2
        for expert in range(4):
            sent = (chosen == expert).any(-1)
            sums[expert] += squares[sent].sum(0)
            counts[expert] += sent.sum()
    for name in ("gate_proj", "up_proj"):
        found = measured[f"model.layers.0.mlp.switch_mlp.{name}.weight"]
        assert np.allclose(found, sums / counts[:, None], rtol=1e-3)
    assert measured["model.layers.0.mlp.switch_mlp.down_proj.weight"].shape == (4, 32)


def test_short_or_missing_texts(model_folder, tmp_path):
    loaded = load_model(str(model_folder()))
    (tmp_path / "short.txt").write_text("Hello")
    with pytest.raises(DataError, match=r"short.txt: has \d tokens; at least 512"):
        measure_importance(loaded, tmp_path / "short.txt")
    with pytest.raises(DataError, match=r"none.txt: cannot be read as text: .*No such file"):
        measure_importance(loaded, tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("family", "known", "names"),
    [
        ("llama", "14 of 15", {"attn_q": "self_attn.q_proj", "ffn_up": "mlp.up_proj"}),
        ("qwen3_moe", "14 of 15", {"ffn_up_exps": "mlp.switch_mlp.up_proj"}),
        ("mixtral", "14 of 16", {"ffn_gate_exps": "block_sparse_moe.switch_mlp.gate_proj"}),
        ("phi3", "8 of 9", {"ffn_up": "mlp.gate_up_proj"}),
    ],
)
def test_blocks_are_made_by_importance(model_folder, tmp_path, text, caplog, family, known, names):
    """By the model's names as by those of GGUF."""
    loaded = load_model(str(model_folder(family, dtype=mx.float16)))
    measured = measure_importance(loaded, text)
    caplog.set_level("INFO")
    path = export_gguf(loaded, tmp_path / "m.gguf", quantise="q4_k_m", importance=measured)
    assert f"importance is known of {known} quantised tensors" in caplog.text
    _, tensors = fields(path)
    _, half = fields(export_gguf(loaded, tmp_path / "f16.gguf"))
    names = {f"blk.0.{name}.weight": own for name, own in names.items()}
    renamed = {}
    for name, own in names.items():
        renamed[name] = measured[f"model.layers.0.{own}.weight"]
        # Of stacked experts the last.
        last = (-1,) * (renamed[name].ndim - 1)
        kind, values = tensors[name].tensor_type, half[name].data[last]
        blocks = reference_blocks(values, kind, renamed[name][last])
        plain = reference_blocks(values, kind)
        assert np.mean(tensors[name].data[last] == blocks) > 0.995 > np.mean(plain == blocks)
    again = export_gguf(loaded, tmp_path / "n.gguf", quantise="q4_k_m", importance=renamed)
    _, others = fields(again)
    assert all(np.array_equal(others[name].data, tensors[name].data) for name in names)


def test_a_matrix_of_another_model_is_refused(model_folder, tmp_path):
    loaded = load_model(str(model_folder()))
    for matrix, words in (
        ({"blk.0.attn_q.weight": np.ones(32, "f")}, "its importance has 32 values, not 64"),
        ({"blk.7.attn_q.weight": np.ones(64, "f")}, "no entry for any tensor"),
    ):
        with pytest.raises(ExportError, match=words):
            export_gguf(loaded, tmp_path / "m.gguf", quantise="q4_k_m", importance=matrix)
    assert list(tmp_path.iterdir()) == []
