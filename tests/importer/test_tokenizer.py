"""Rebuilt tokenizers give llama.cpp's ids: its own golden ones, and those of awkward texts."""

import json
import random
from dataclasses import replace
from unicodedata import combining

import numpy as np
import pytest
from llama_cpp import Server
from make_gguf import write_gguf

from mlx_align import api
from mlx_align.errors import ModelError
from mlx_align.export.vocabulary import read_vocabulary, write_vocabulary
from mlx_align.importer.gguf_file import GGUFFile
from mlx_align.importer.tokenizer import WAYS, read_tokenizer
from mlx_align.model.load import STORED, load_model, load_tokenizer

VOCABULARIES = ["gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2"]
TEXTS = [
    "", " ", "\n", "Hello world", " leading and trailing ", "two  spaces   three\n\n\nlines\t\ttabs",
    "I'm sorry, it's 12345.67!", "日本語のテキスト 中文 한국어", "🚀🦙 emoji 👨‍👩‍👧",
    "--- *** ___ ~~~ ```",
    "<|im_start|>user\nHi<|im_end|>", "<|eot_id|><|begin_of_text|>x", "'ll 'VE don't", "１２３ ٤٥٦ ½",
    "https://example.com/?q=1&r=2#x", "def f(x):\n\treturn x**2  # ok\n", "<s>[INST] hi [/INST]", "▁▁x",
]  # fmt: skip
SEPARATOR = "\n__ggml_vocab_test__\n"


def fuzz(count, seed=0):
    """Texts of pieces that tokenizers stumble over."""
    pieces = [
        *" \t\n\r.,!?'\"/\\_-~#@", "  ", "\n\n", "'s", "'LL", "don't", "é", "e\u0301", "ß", "Ä", "ñ",
        "日本", "한국", "中文", "Привет", "العربية", "हिन्दी", "🚀", "👨‍👩‍👧",
        "\u200b", "\u00a0", "\ufeff", "½", "٤", "１", "12", "345", "6789", "Hello", "wORLD", "camelCase",
        "https://", "foo_bar", "(x)", "{}", "==", "▁", "<s>", "Ġ",
    ]  # fmt: skip
    rng = random.Random(seed)
    return ["".join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("name", VOCABULARIES)
def test_golden_ids(shared, name):
    file = shared(f"vocab/ggml-vocab-{name}.gguf")
    tokenizer = read_tokenizer(GGUFFile(file)).tokenizer
    texts = file.with_suffix(".gguf.inp").read_bytes().decode("utf-8").split(SEPARATOR)
    lines = file.with_suffix(".gguf.out").read_text().split("\n")
    assert len(texts) == len(lines) > 40
    for text, line in zip(texts, lines, strict=True):
        expected = [int(token) for token in line.split()]
        assert tokenizer.encode(text, add_special_tokens=False).ids == expected, text


@pytest.mark.parametrize("name", VOCABULARIES)
def test_awkward_texts_and_special_tokens(shared, model_folder, tmp_path, name):
    """A model around a vocabulary that stands alone in its file."""
    keys = GGUFFile(shared(f"vocab/ggml-vocab-{name}.gguf")).keys

    def copy_tokenizer(writer):
        adds = {str: writer.add_string, int: writer.add_uint32, bool: writer.add_bool}
        for key, value in keys.items():
            if key.startswith("tokenizer.") or key == "general.name":
                value = value.tolist() if isinstance(value, np.ndarray) else value
                adds.get(type(value), writer.add_array)(key, value)

    size = len(keys["tokenizer.ggml.tokens"])
    narrow = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    loaded = load_model(str(model_folder("llama", vocab_size=size, **narrow)), STORED)
    path = write_gguf(loaded, tmp_path / "m.gguf", tokenizer=copy_tokenizer)
    tokenizer = load_tokenizer(api.import_model(path, output=tmp_path / "out")).tokenizer
    server = Server(path)
    special = [token.content for token in tokenizer.added_tokens_decoder.values()][:40]
    for text in [*TEXTS, *fuzz(300), *(f"a{t} b {t}  c{t}\n{t}" for t in special)]:
        assert server.tokenize(text) == list(tokenizer.encode(text, add_special_tokens=False)), text
    assert server.tokenize("Hi", add_special=True) == list(tokenizer.encode("Hi"))


@pytest.mark.parametrize("way", sorted(WAYS))
def test_every_way_of_cutting_text_is_llama_cpps(model_folder, tmp_path, way):
    loaded = load_model(str(model_folder("llama")), STORED)
    vocabulary = replace(read_vocabulary(loaded), pre=way)
    path = write_gguf(
        loaded, tmp_path / "m.gguf", tokenizer=lambda w: write_vocabulary(w, vocabulary)
    )
    tokenizer, server = read_tokenizer(GGUFFile(path)).tokenizer, Server(path)
    for text in [*TEXTS, *fuzz(200)]:
        if way in ("tekken", "gpt-4o", "llama4") and any(combining(letter) for letter in text):
            continue
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert server.tokenize(text) == ids, text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pre": "default"}, "how its tokenizer cuts text"),
        ({"model": "bert"}, "of kind 'bert'"),
        ({"tokens": ["a"] * 400}, "empty or repeated tokens"),
        ({"types": [1] * 7}, "no list of 400 numbers"),
        ({"special": {"eos": 400}}, "there are 400 tokens"),
    ],
)
def test_vocabularies_that_would_change_ids_are_refused(model_folder, tmp_path, change, words):
    loaded = load_model(str(model_folder("llama")), STORED)
    vocabulary = replace(read_vocabulary(loaded), **change)
    path = write_gguf(
        loaded, tmp_path / "m.gguf", tokenizer=lambda w: write_vocabulary(w, vocabulary)
    )
    with pytest.raises(ModelError, match=words):
        read_tokenizer(GGUFFile(path))


def test_what_is_amiss_but_bearable_is_said(model_folder, tmp_path, caplog):
    loaded = load_model(str(model_folder("llama")), STORED)
    vocabulary = read_vocabulary(loaded)
    vocabulary = replace(
        vocabulary,
        tokens=["<no exclamation>" if t == "!" else t for t in vocabulary.tokens],
        merges=[*vocabulary.merges, "Ġ nowhere"],
        chat_template="{% for",
    )
    path = write_gguf(
        loaded, tmp_path / "m.gguf", tokenizer=lambda w: write_vocabulary(w, vocabulary)
    )
    tokenizer = read_tokenizer(GGUFFile(path))
    assert tokenizer.template is None
    assert "not valid Jinja" in caplog.text and "1 merges name tokens" in caplog.text
    assert "lacks 1 of the 256 bytes" in caplog.text


def test_every_end_and_the_beginning_come_from_the_file(model_folder, tmp_path):
    loaded = load_model(str(model_folder("qwen2")), STORED)
    vocabulary = replace(
        read_vocabulary(loaded), special={"bos": 5, "eos": 7, "eot": 8, "eom": 9}, add_bos=True,
        add_eos=True,
    )  # fmt: skip
    path = write_gguf(
        loaded, tmp_path / "m.gguf", tokenizer=lambda w: write_vocabulary(w, vocabulary)
    )
    out = api.import_model(path, output=tmp_path / "out")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [7, 8, 9]
    tokenizer = load_tokenizer(out).tokenizer
    ids = tokenizer.encode("Hello")
    assert (ids[0], ids[-1]) == (5, 7)
    assert tokenizer.eos_token_id == 7 and {7, 8, 9} <= set(tokenizer.eos_token_ids)


def test_ends_as_ollamas_converter_names_them(model_folder, tmp_path):
    loaded = load_model(str(model_folder("llama")), STORED)

    def ends(*ids):
        def add(writer):
            writer.add_array("tokenizer.ggml.eos_token_ids", list(ids))

        return GGUFFile(write_gguf(loaded, tmp_path / "m.gguf", extra=add))

    eos = loaded.tokenizer.eos_token_id
    assert read_tokenizer(ends(eos, 8, 9)).ends == [eos, 8, 9]
    with pytest.raises(ModelError, match="names other ids than those of its 400 tokens"):
        read_tokenizer(ends(eos, 400))
