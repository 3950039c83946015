"""Damaged and hostile files are refused in no time and no memory, and leave nothing behind."""

import json
import struct
import time
import tracemalloc

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from make_gguf import write_gguf

from mlx_align import api
from mlx_align.errors import ModelError
from mlx_align.importer.gguf_file import GGUFFile
from mlx_align.model.files import check_safetensors
from mlx_align.model.load import STORED, load_model

UINT8, UINT32, BOOL, STRING, ARRAY, UINT64 = 0, 4, 7, 8, 9, 10
HUGE = 2**64 - 1


def text(value):
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name, kind, data):
    return text(name) + struct.pack("<I", kind) + data


def listing(kind, count, data=b""):
    return struct.pack("<IQ", kind, count) + data


def tensor(name="t", dims=(32,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf_bytes(keys=(), tensors=(), data=b"\0" * 4096, version=3, counts=None):
    counts = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


def refused(read, path, content):
    """The error that a file of this content meets within a second and 64 MB."""
    path.write_bytes(content)
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(ModelError) as caught:
        read(path)
    seconds = time.process_time() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1 and peak < 64e6
    return str(caught.value)


NESTED = listing(ARRAY, 1, listing(ARRAY, 1, listing(ARRAY, 1, listing(UINT8, 1, b"x"))))
HEADERS = {
    "nothing": (b"", "not a GGUF file"),
    "another format": (b"PK\x03\x04" * 20, "not a GGUF file"),
    "only the magic": (b"GGUF", "ends inside its header"),
    "old version": (gguf_bytes(version=1), "has version 1"),
    "big endian": (gguf_bytes(version=3 << 24), "big-endian"),
    "keys without end": (gguf_bytes(counts=(0, HUGE)), "announces 18446744073709551615 keys"),
    "tensors without end": (gguf_bytes(counts=(HUGE, 0)), "announces 18446744073709551615 tensors"),
    "more keys than bytes": (gguf_bytes(counts=(0, 9999), data=b""), "ends inside its header"),
    "long name": (gguf_bytes([struct.pack("<Q", HUGE)]), "a text of"),
    "long text": (gguf_bytes([key("k", STRING, struct.pack("<Q", 2**27))]), "ends inside"),
    "no UTF-8": (gguf_bytes([key("k", STRING, text(b"\xff\xfe"))]), "not UTF-8"),
    "unknown type": (gguf_bytes([key("k", 99, b"")]), "unknown type 99"),
    "long list": (gguf_bytes([key("k", ARRAY, listing(UINT64, 2**62))]), "a list of"),
    "list past the end": (gguf_bytes([key("k", ARRAY, listing(UINT64, 2**22))]), "ends inside"),
    "texts past the end": (gguf_bytes([key("k", ARRAY, listing(STRING, 2**22))]), "ends inside"),
    "list of lists": (gguf_bytes([key("k", ARRAY, NESTED)]), "a list of lists"),
    "list of nothing known": (gguf_bytes([key("k", ARRAY, listing(77, 1))]), "unknown type 77"),
    "a key twice": (gguf_bytes([key("k", BOOL, b"\1")] * 2), "'k' appears twice"),
    "alignment 0": (
        gguf_bytes([key("general.alignment", UINT32, struct.pack("<I", 0))]),
        "general.alignment is 0",
    ),
    "alignment 24": (
        gguf_bytes([key("general.alignment", UINT32, struct.pack("<I", 24))]),
        "an alignment of 24",
    ),
    "no dimensions": (gguf_bytes(tensors=[tensor(dims=())]), "has 0 dimensions"),
    "many dimensions": (gguf_bytes(tensors=[tensor(dims=(1,) * 9)]), "has 9 dimensions"),
    "a side of 0": (gguf_bytes(tensors=[tensor(dims=(32, 0))]), "is empty"),
    "overflowing sides": (
        gguf_bytes(tensors=[tensor(dims=(2**32, 2**32, 2**32, 2**32))]),
        "reaches past its end",
    ),
    "wrapping to 0": (gguf_bytes(tensors=[tensor(dims=(2**62, 4))]), "reaches past its end"),
    "half a block": (gguf_bytes(tensors=[tensor(dims=(33,), kind=8)]), "not whole blocks"),
    "unknown tensor": (gguf_bytes(tensors=[tensor(kind=250)]), "the unknown type 250"),
    "odd offset": (gguf_bytes(tensors=[tensor(offset=7)]), "is not aligned"),
    "far offset": (gguf_bytes(tensors=[tensor(offset=2**63)]), "reaches past its end"),
    "the same name": (gguf_bytes(tensors=[tensor(), tensor(offset=128)]), "appears twice"),
    "overlap": (gguf_bytes(tensors=[tensor(), tensor("u", offset=96)]), "'t' and 'u' overlap"),
    "the same place": (gguf_bytes(tensors=[tensor(), tensor("u")]), "'t' and 'u' overlap"),
    "too short": (gguf_bytes(tensors=[tensor(dims=(32, 99))]), "was it copied whole"),
    "only a vocabulary": (
        gguf_bytes([key("general.architecture", STRING, text("llama"))]),
        "holds only a vocabulary",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_absurd_headers(tmp_path, name):
    content, words = HEADERS[name]
    message = refused(
        lambda path: api.import_model(path, output=tmp_path / "out"), tmp_path / "m.gguf", content
    )
    assert words in message and "m.gguf" in message
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.fixture(scope="module")
def sound(model_folder, tmp_path_factory):
    """The bytes of a sound file of 4 types, and where its data begin."""
    loaded = load_model(str(model_folder("llama")), STORED)
    kinds = {"token_embd.weight": Kind.F16, "blk.0.ffn_up.weight": Kind.Q5_1}
    path = tmp_path_factory.mktemp("sound") / "m.gguf"
    data = write_gguf(loaded, path, Kind.Q8_0, kinds.get).read_bytes()
    sizes = [t.data.nbytes + -t.data.nbytes % 32 for t in GGUFFile(path).tensors.values()]
    return data, len(data) - sum(sizes)


def test_files_cut_off_anywhere(tmp_path, sound):
    data, start = sound
    rng = np.random.default_rng(0)
    cuts = {*range(40), *rng.integers(40, start, 150), *rng.integers(start, len(data) - 64, 50)}
    for cut in cuts:
        refused(GGUFFile, tmp_path / "m.gguf", data[:cut])


def test_random_bytes(tmp_path, sound):
    """Either the damage does no harm, or it is refused; nothing else, and nothing is left."""
    data, start = sound
    rng = np.random.default_rng(0)
    imported = 0
    for trial in range(120):
        damaged = bytearray(data)
        for place in rng.integers(4, (64, 2000, start, len(data))[trial % 4], 3):
            damaged[place] = rng.integers(256)
        path = tmp_path / "m.gguf"
        path.write_bytes(damaged)
        start_time = time.process_time()
        try:
            out = api.import_model(path, output=tmp_path / f"out-{trial}")
            imported += 1
            assert load_model(str(out)).config["model_type"] == "llama"
        except ModelError:
            assert not (tmp_path / f"out-{trial}").exists()
        assert not list(tmp_path.glob(".*")) and time.process_time() - start_time < 5
    assert 5 < imported < 100


def weights(header, data=b"\0" * 64):
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(body)) + body + data


def entry(shape=(4,), offsets=(0, 16), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


SAFETENSORS = {
    "nothing": (b"", "a header of 0 bytes in a file of 0"),
    "header without end": (struct.pack("<Q", HUGE) + b"{}", "a header of 18446744073709551615"),
    "no JSON": (weights(b"{oops"), "its header"),
    "no text": (weights(b"\xff\xfe{}"), "its header"),
    "deep": (weights(b"[" * 100_000), "its header"),
    "no object": (weights([1]), "no object"),
    "twice": (weights(b'{"a":{},"a":{}}'), "appears twice"),
    "no entry": (weights({"a": 3}), "unknown type None"),
    "unknown type": (weights({"a": entry(dtype="I3")}), "unknown type 'I3'"),
    "listed type": (weights({"a": entry(dtype=["F32"])}), "unknown type"),
    "negative": (weights({"a": entry((-4,), (0, -16))}), "has no shape"),
    "fractions": (weights({"a": entry((4.0,))}), "has no shape"),
    "overflow": (weights({"a": entry((2**62, 2**62))}), "has the shape"),
    "wrong size": (weights({"a": entry((5,))}), "has the shape [5] and 16 bytes"),
    "backwards": (weights({"a": entry((4,), (16, 0))}), "and -16 bytes"),
    "one place": (weights({"a": entry((4,), (0,))}), "has no place"),
    "past the end": (weights({"a": entry((99,), (0, 396))}), "reaches past its end"),
    "overlap": (weights({"a": entry(), "b": entry((4,), (8, 24))}), "'a' and 'b' overlap"),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_absurd_safetensors(tmp_path, name):
    content, words = SAFETENSORS[name]
    assert words in refused(check_safetensors, tmp_path / "model.safetensors", content)


def test_damaged_weights_are_refused_wherever_a_model_is_loaded(model_folder, tmp_path):
    folder = model_folder("llama")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    data = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-5])
    for use in (lambda: load_model(str(tmp_path)), lambda: api.import_model(tmp_path, output="x")):
        with pytest.raises(ModelError, match="was it copied whole"):
            use()
