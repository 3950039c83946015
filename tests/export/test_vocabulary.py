"""Tokenizers in GGUF files: llama.cpp gives the ids that the model was trained with."""

import json
import shutil

import pytest
import tiny
from llama_cpp import Server
from test_gguf import TEXTS
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers

from mlx_align.errors import ExportError
from mlx_align.export.gguf import export_gguf
from mlx_align.export.vocabulary import read_vocabulary
from mlx_align.importer.folder import write_tokenizer
from mlx_align.importer.gguf_file import GGUFFile
from mlx_align.importer.tokenizer import read_tokenizer
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
SEED = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+"
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
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
    "seed-coder": ([split(SEED), CUT_BYTES], False),
    "minicpm5": (
        [split(r"\p{N}{1,3}"), split(tiny.LLAMA3_SPLIT.replace("{1,3}", "+")), CUT_BYTES],
        True,
    ),
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
def whole():
    """A tokenizer.json whose merges cross every boundary, so that a wrong cut gives other ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, show_progress=False, special_tokens=["<|end|>"]
    )
    tokenizer.train_from_iterator(tiny.CORPUS * 3 + [" ".join(TEXTS)] * 9, trainer)
    return json.loads(tokenizer.to_str())


@pytest.fixture(scope="module")
def uncut(whole):
    """`whole` without its last merges, so that only those who ignore merges find what they make."""
    return {**whole, "model": {**whole["model"], "merges": whole["model"]["merges"][:-100]}}


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


@pytest.mark.parametrize(("name", "ignores"), [("tekken", False), ("qwen2", True)])
def test_whether_merges_are_ignored_matters_only_where_some_are_missing(
    whole, uncut, model_folder, tmp_path, name, ignores
):
    shutil.copytree(model_folder("llama", vocab_size=900), tmp_path, dirs_exist_ok=True)
    before = {"type": "Sequence", "pretokenizers": CUTS[name][0]}

    def saved(tokenizer):
        model = {**tokenizer["model"], "ignore_merges": ignores}
        return save({**tokenizer, "model": model, "pre_tokenizer": before}, tmp_path)

    with pytest.raises(ExportError, match=f"ignore_merges: {ignores}"):
        read_vocabulary(saved(uncut))
    loaded = saved(whole)
    server = Server(export_gguf(loaded, tmp_path / "m.gguf"))
    for text in TEXTS:
        assert server.tokenize(text) == list(loaded.tokenizer.encode(text)), text


def test_the_beginning_is_what_the_tokenizer_puts_there(whole, model_folder, tmp_path):
    """Whatever its config calls BOS."""
    shutil.copytree(model_folder("llama", vocab_size=910), tmp_path, dirs_exist_ok=True)
    tokenizer = Tokenizer.from_str(json.dumps({**whole, "pre_tokenizer": CUTS["gpt-2"][0][0]}))
    tokenizer.add_special_tokens(["<begin>", "<other>"])
    begin = tokenizer.token_to_id("<begin>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", begin)]
    )
    tiny.write_tokenizer(tmp_path, tokenizer, "<other>", "<|end|>")
    loaded = load_model(str(tmp_path))
    own = list(loaded.tokenizer.encode("Hi"))
    assert own[0] == begin
    server = Server(export_gguf(loaded, tmp_path / "m.gguf"))
    assert server.tokenize("Hi", add_special=True) == own


def test_added_tokens_keep_their_spelling(whole, model_folder, tmp_path):
    """As those of DeepSeek's distilled models, in which a bar is no space."""
    shutil.copytree(model_folder("llama", vocab_size=910), tmp_path, dirs_exist_ok=True)
    tokens = ["<｜tool▁sep｜>", "<think>"]
    before = {"type": "Sequence", "pretokenizers": CUTS["qwen2"][0]}
    tokenizer = Tokenizer.from_str(json.dumps({**whole, "pre_tokenizer": before}))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    loaded = save(json.loads(tokenizer.to_str()), tmp_path)
    text = "a<｜tool▁sep｜> <think>\nb ▁"
    own = list(loaded.tokenizer.encode(text))
    assert set(loaded.tokenizer.convert_tokens_to_ids(tokens)) < set(own)
    assert Server(export_gguf(loaded, tmp_path / "m.gguf")).tokenize(text) == own


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


SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Prepend", "prepend": "▁"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
# Where SentencePiece tokenizers put spaces: published in this form by Llama 2, Gemma and Mistral.
SENTENCEPIECE = {
    "llama": ({"type": "Sequence", "normalizers": [PREPEND, SPACES]}, None),
    "gemma": (
        SPACES,
        {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
    ),
    "mistral": (None, METASPACE),
}  # fmt: skip
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)


@pytest.fixture
def sentencepiece_model(model_folder, tmp_path):
    """make(kind, keep_model, template, change) -> a model with such a tokenizer, its file changed."""

    def make(kind, keep_model=True, template=None, change=lambda tokenizer: None):
        folder = tmp_path / "model"
        shutil.copytree(model_folder("llama", vocab_size=448), folder)
        trained = tiny.train_sentencepiece(tmp_path)
        tiny.make_sentencepiece(folder, trained, keep_model=keep_model, template=template)
        file = folder / "tokenizer.json"
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        tokenizer["normalizer"], tokenizer["pre_tokenizer"] = SENTENCEPIECE[kind]
        change(tokenizer)
        file.write_text(json.dumps(tokenizer), encoding="utf-8")
        return load_model(str(folder))

    return make


@pytest.mark.parametrize("keep_model", [True, False], ids=["own scores", "scores from merges"])
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_sentencepiece_gives_the_same_ids(sentencepiece_model, tmp_path, kind, keep_model):
    loaded = sentencepiece_model(kind, keep_model)
    server = Server(export_gguf(loaded, tmp_path / "m.gguf"))
    for text in filter(None, [*TEXTS, *tiny.CORPUS, "a</s> b<s>c <unk> <0x41>"]):
        for special in (False, True):
            own = list(loaded.tokenizer.encode(text, add_special_tokens=special))
            assert server.tokenize(text, add_special=special) == own, text


def test_spaces_are_where_the_chat_template_has_them(sentencepiece_model, tmp_path, caplog):
    loaded = sentencepiece_model("mistral", template=INST)
    server = Server(export_gguf(loaded, tmp_path / "m.gguf"))
    talk = [("user", "Hi there"), ("assistant", "Yes?"), ("user", " What do you think?")]
    messages = [{"role": role, "content": content} for role, content in talk]
    text = loaded.template.render(messages, generation=True)
    assert text.startswith("<s>[INST]")
    assert server.tokenize(text) == list(loaded.tokenizer.encode(text, add_special_tokens=False))
    assert "a text without it begins with other tokens" in caplog.text


def test_without_a_template_a_text_begins_with_a_space(sentencepiece_model, tmp_path, caplog):
    loaded = sentencepiece_model("mistral")
    server = Server(export_gguf(loaded, tmp_path / "m.gguf"))
    assert server.tokenize("Hello world") == list(
        loaded.tokenizer.encode("Hello world", add_special_tokens=False)
    )
    assert "a text that begins with a space" in caplog.text


@pytest.mark.parametrize("broken", [True, False], ids=["another format", "another vocabulary"])
def test_scores_of_another_vocabulary_are_not_taken(sentencepiece_model, tmp_path, broken):
    loaded = sentencepiece_model("llama")
    if broken:
        (loaded.path / "tokenizer.model").write_bytes(b"no such thing")
    else:
        tiny.train_sentencepiece(tmp_path, 430).replace(loaded.path / "tokenizer.model")
    server = Server(export_gguf(loaded, tmp_path / "m.gguf"))
    for text in tiny.CORPUS:
        own = list(loaded.tokenizer.encode(text, add_special_tokens=False))
        assert server.tokenize(text) == own


def test_scores_in_another_order_than_the_merges_are_not_taken(shared, model_folder, tmp_path):
    """Where there is only tokenizer.model, transformers merges spaces before everything else."""
    shape = {"hidden_size": 32, "intermediate_size": 32}
    folder = tmp_path / "model"
    shutil.copytree(model_folder("llama", vocab_size=32000, **shape), folder)
    (folder / "tokenizer.json").unlink()
    shutil.copy(shared("vocab/llama2_tokenizer.model"), folder / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "unk_token": "<unk>"}))
    loaded = load_model(str(folder))
    server = Server(export_gguf(loaded, tmp_path / "m.gguf"))
    for text in (text for text in TEXTS if text and text[0] != " "):
        assert server.tokenize(text) == list(
            loaded.tokenizer.encode(text, add_special_tokens=False)
        ), text


def with_phi3_tokens(tokenizer):
    names = {added["content"]: added for added in tokenizer["added_tokens"]}
    names["</s>"]["rstrip"] = True
    for i, token in enumerate(("<|endoftext|>", "<|user|>", "<|end|>")):
        added = {**names["<s>"], "content": token, "id": 440 + i, "rstrip": i > 0}
        tokenizer["added_tokens"].append(added)


def with_one_token_that_swallows(tokenizer):
    tokenizer["added_tokens"][2]["rstrip"] = True


def test_special_tokens_that_swallow_spaces(sentencepiece_model, tmp_path, caplog):
    """Phi-3's do, and llama.cpp does it for models that are called so."""
    loaded = sentencepiece_model("llama", change=with_phi3_tokens)
    server = Server(export_gguf(loaded, tmp_path / "m.gguf"))
    for text in ("<|user|>\n Hi<|end|>\n <|end|>  a", "a</s>  b<s> c<|endoftext|> d <unk> e"):
        own = list(loaded.tokenizer.encode(text, add_special_tokens=False))
        assert server.tokenize(text) == own, text
    assert "swallows" not in caplog.text


def test_only_what_phi3_does_with_spaces_is_known(sentencepiece_model, tmp_path, caplog):
    loaded = sentencepiece_model("llama", change=with_one_token_that_swallows)
    # By this name llama.cpp would look for tokens that this vocabulary does not have.
    loaded.name = "someone/Phi-3-tiny"
    server = Server(export_gguf(loaded, tmp_path / "m.gguf"))
    assert "keeps the spaces that this tokenizer swallows next to: </s>" in caplog.text
    assert server.tokenize("Hello") == list(
        loaded.tokenizer.encode("Hello", add_special_tokens=False)
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: tokenizer.update(normalizer={"type": "NFKC"}),
        lambda tokenizer: tokenizer.update(pre_tokenizer={**METASPACE, "split": True}),
        lambda tokenizer: tokenizer["model"].update(ignore_merges=True),
    ],
    ids=["normalises", "cuts at spaces", "ignores merges"],
)
def test_other_sentencepiece_tokenizers_are_refused(sentencepiece_model, tmp_path, change):
    loaded = sentencepiece_model("llama", change=change)
    with pytest.raises(ExportError, match="has no counterpart of what its tokenizer does"):
        export_gguf(loaded, tmp_path / "out" / "m.gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2"])
def test_published_vocabularies_give_the_published_ids(shared, tmp_path, name):
    file = shared(f"vocab/ggml-vocab-{name}.gguf")
    tokenizer = read_tokenizer(GGUFFile(file))
    size, shape = tokenizer.tokenizer.get_vocab_size(), {"hidden_size": 32, "intermediate_size": 32}
    tiny.make_model(tmp_path, "llama", vocab_size=size, **shape)
    write_tokenizer(tmp_path, tokenizer)
    loaded = load_model(str(tmp_path))
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
