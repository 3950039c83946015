"""Tokenizers in GGUF files: llama.cpp gives the ids that the model was trained with."""

import json
import shutil

import pytest
import tiny
from llama_cpp import Server
from test_gguf import TEXTS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from vocabulary_files import write_rebuilt

from mlx_align.errors import ExportError
from mlx_align.export.gguf import export_gguf
from mlx_align.export.vocabulary import read_vocabulary
from mlx_align.model.load import load_model

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
CUT_BYTES = {**BYTES, "use_regex": False}


def split(pattern, **how):
    how = {"behavior": "Isolated", "invert": False, **how}
    return {"type": "Split", "pattern": {"Regex": pattern}, **how}


DIGITS = {"type": "Digits", "individual_digits": True}
HAN = split("[一-龥ࠀ-一가-퟿]+")
WORD = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+CONTRACTIONS"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*CONTRACTIONS"
    r"|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = WORD.replace("CONTRACTIONS", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace(
    "DIGITS", r"\p{N}{1,3}"
)
NEMO = WORD.replace("CONTRACTIONS", "").replace("DIGITS", r"\p{N}")
DEEPSEEK = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
MARKS = tiny.QWEN2_SPLIT.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"\s\p{L}", r"\s\p{L}\p{M}")
# llama.cpp's name -> how published tokenizers of that kind cut, and whether they ignore merges
CUTS = {
    "gpt-2": ([{**BYTES, "use_regex": True}], False),
    "smollm": ([DIGITS, {**BYTES, "use_regex": True}], False),
    "llama-bpe": ([split(tiny.LLAMA3_SPLIT), CUT_BYTES], True),
    "dbrx": ([split(tiny.LLAMA3_SPLIT, behavior="Removed", invert=True), CUT_BYTES], False),
    "qwen2": ([split(tiny.QWEN2_SPLIT), CUT_BYTES], False),
    "qwen35": ([split(MARKS), CUT_BYTES], False),
    "tekken": ([split(NEMO), CUT_BYTES], True),
    "gpt-4o": ([split(O200K), CUT_BYTES], False),
    "deepseek-coder": (
        [split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), HAN, DIGITS, CUT_BYTES],
        False,
    ),
    "deepseek-v3": (
        [split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(DEEPSEEK), CUT_BYTES],
        False,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def uncut():
    """A tokenizer.json whose merges cross every boundary, so that a wrong cut gives other ids; the last
    of them are left out, so that only those who ignore merges find what they make."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, show_progress=False, special_tokens=["<|end|>"]
    )
    tokenizer.train_from_iterator(tiny.CORPUS * 3 + [" ".join(TEXTS)] * 9, trainer)
    written = json.loads(tokenizer.to_str())
    written["model"]["merges"] = written["model"]["merges"][:-100]
    return written


def save(tokenizer, folder):
    tiny.write_tokenizer(folder, Tokenizer.from_str(json.dumps(tokenizer)), None, "<|end|>")
    return load_model(str(folder))


@pytest.mark.parametrize("name", CUTS)
def test_llama_cpp_cuts_as_the_tokenizer_does(uncut, model_folder, tmp_path, name):
    shutil.copytree(model_folder("llama", vocab_size=900), tmp_path, dirs_exist_ok=True)
    steps, ignores = CUTS[name]
    model = {**uncut["model"], "ignore_merges": ignores}
    before = {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0]
    loaded = save({**uncut, "model": model, "pre_tokenizer": before}, tmp_path)
    assert read_vocabulary(loaded).pre == name
    server = Server(export_gguf(loaded, tmp_path / "m.gguf"))
    for text in TEXTS:
        assert server.tokenize(text) == list(loaded.tokenizer.encode(text)), text


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {**BYTES, "use_regex": True, "add_prefix_space": True}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split("[a-z]+"), CUT_BYTES]}},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [split(tiny.QWEN2_SPLIT, behavior="Removed"), CUT_BYTES],
            }
        },
    ],
    ids=["lower case", "a space in front", "another pattern", "what matches is removed"],
)
def test_what_llama_cpp_cannot_do_is_refused(uncut, model_folder, tmp_path, changes):
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama", vocab_size=900), folder)
    loaded = save({**uncut, **changes}, folder)
    with pytest.raises(ExportError):
        export_gguf(loaded, tmp_path / "out" / "m.gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2"])
def test_published_vocabularies_give_the_published_ids(shared, tmp_path, name):
    file = shared(f"vocab/ggml-vocab-{name}.gguf")
    size = write_rebuilt(file, tmp_path)
    loaded = load_model(str(_random_model(tmp_path, size)))
    server = Server(export_gguf(loaded, tmp_path / "m.gguf"))
    texts = file.with_name(file.name + ".inp").read_text(encoding="utf-8")
    ids = file.with_name(file.name + ".out").read_text().splitlines()
    cases = texts.split("\n__ggml_vocab_test__\n")
    assert len(cases) - 1 == len(ids) > 40
    for text, expected in zip(cases[:-1], ids, strict=True):
        assert server.tokenize(text) == [int(i) for i in expected.split()], text
    # What llama.cpp takes for the end of a turn by its name alone is left out: "</s>" in Qwen's words.
    specials = ["<|end|>", "<|eot_id|>", "<|im_end|>", "<|endoftext|>", loaded.tokenizer.eos_token]
    for text in [*TEXTS, *(f"a{s}  b {s}\n {s}c" for s in specials)]:
        own = list(loaded.tokenizer.encode(text, add_special_tokens=False))
        assert server.tokenize(text) == own, text
        if text:
            own = list(loaded.tokenizer.encode(text))
            assert server.tokenize(text, add_special=True) == own, text


def _random_model(folder, size):
    """The smallest Llama with so many tokens, beside the tokenizer in the folder."""
    files = [(f, (folder / f).read_bytes()) for f in ("tokenizer.json", "tokenizer_config.json")]
    shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    tiny.make_model(folder, "llama", vocab_size=size, **shape)
    for name, data in files:
        (folder / name).write_bytes(data)
    return folder
