"""A tokenizer as the `tokenizer.ggml.*` keys of a GGUF file.

Two kinds: byte-level BPE ("gpt2" in GGUF), whose way of cutting text into words must be one that
llama.cpp knows by name, and SentencePiece-like BPE with byte fallback ("llama").
"""

import contextlib
import itertools
import json
import logging
import re
from dataclasses import dataclass, field

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer, models

from mlx_align.data.template import end_of_turn
from mlx_align.errors import ExportError
from mlx_align.export.folder import end_ids
from mlx_align.model.load import LoadedModel

log = logging.getLogger("mlx_align")

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = "[^\\r\\n\\p{L}\\p{N}]?"
_SPACES = "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_MARKS = "| ?[^\\s\\p{L}\\p{N}]+"
_LLAMA3 = f"{_CONTRACTIONS}|{_WORD}\\p{{L}}+|\\p{{N}}{{1,3}}{_MARKS}[\\r\\n]*{_SPACES}"
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_QWEN35 = _QWEN2.replace("?\\p{L}+", "?[\\p{L}\\p{M}]+").replace("\\s\\p{L}", "\\s\\p{L}\\p{M}")
_UPPER, _LOWER = "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]", "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
_TEKKEN = f"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\\p{{N}}{_MARKS}[\\r\\n/]*{_SPACES}"
_GPT4O = (
    f"{_WORD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_WORD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    f"|\\p{{N}}{{1,3}}{_MARKS}[\\r\\n/]*{_SPACES}"
)
_SEED_CODER = _QWEN2.replace("\\p{N}| ", "\\p{N}{1}| ").replace(
    "\\p{N}]+[\\r\\n]*", "\\p{N}\\r\\n]+"
)
_MINICPM5 = _LLAMA3.replace("{1,3}", "+")
_DEEPSEEK_CODER = (
    "split [\\r\\n]", "split \\s?\\p{L}+", "split \\s?\\p{P}+",
    "split [\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
)  # fmt: skip
_DEEPSEEK_V3 = (
    "split \\p{N}{1,3}",
    "split [\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "split [!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
    "|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
)

# How tokenizer.json cuts text (each step in short), and whether merges are skipped for whole words
# -> llama.cpp's name for that (src/llama-vocab.cpp).
PRE_TOKENIZERS = {
    (("bytes regex",), False): "gpt-2",
    (("digits single", "bytes regex"), False): "smollm",
    ((f"split {_LLAMA3}", "bytes"), True): "llama-bpe",
    ((f"split {_LLAMA3}", "bytes"), False): "dbrx",
    ((f"split {_QWEN2}", "bytes"), False): "qwen2",
    ((f"split {_QWEN35}", "bytes"), False): "qwen35",
    ((f"split {_SEED_CODER}", "bytes"), False): "seed-coder",
    (("split \\p{N}{1,3}", f"split {_MINICPM5}", "bytes"), True): "minicpm5",
    ((f"split {_TEKKEN}", "bytes"), True): "tekken",
    ((f"split {_GPT4O}", "bytes"), False): "gpt-4o",
    ((*_DEEPSEEK_CODER, "digits single", "bytes"), False): "deepseek-coder",
    ((*_DEEPSEEK_V3, "bytes"), False): "deepseek-v3",
}


@dataclass
class Vocabulary:
    """What GGUF wants to know of a tokenizer."""

    model: str
    pre: str
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    rstrip: bool = False  # special tokens swallow the spaces behind them, as Phi-3's do
    chat_template: str | None = None


def read_vocabulary(loaded: LoadedModel) -> Vocabulary:
    """The vocabulary of a loaded model. Raises `ExportError` where llama.cpp has no counterpart."""
    backend = getattr(loaded.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(
            f"{loaded.name}: its tokenizer has no tokenizer.json form, which GGUF needs"
        )
    tokenizer = json.loads(backend.to_str())
    model = tokenizer["model"]
    if model.get("type", "BPE") != "BPE":
        raise ExportError(
            f"{loaded.name}: tokenizers of type {model['type']} cannot be written as GGUF"
        )
    cuts = [step["type"] for step in _steps(tokenizer, "pre_tokenizer")]
    if model.get("byte_fallback") and "ByteLevel" not in cuts:
        vocabulary = _sentencepiece(loaded, tokenizer)
    else:
        vocabulary = _byte_level(loaded, tokenizer)
    _add_special_ids(loaded, vocabulary)
    added = _added_by_itself(tokenizer)
    vocabulary.add_bos, vocabulary.add_eos = "bos" in added, "eos" in added
    if "bos" in added:
        vocabulary.special["bos"] = added["bos"]
    vocabulary.rstrip = _strips_right(tokenizer)
    vocabulary.chat_template = loaded.template.source if loaded.template is not None else None
    return vocabulary


def write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Add the keys to a file."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list([t.encode("utf-8") for t in vocabulary.tokens])
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    else:
        writer.add_token_merges(vocabulary.merges)
    for name, token in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(token)
    # Always said: llama.cpp's own default differs from one kind of tokenizer to the next.
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _steps(tokenizer: dict, part: str) -> list[dict]:
    """The steps of a part of tokenizer.json, one after another."""
    whole = tokenizer.get(part)
    if whole is None:
        return []
    inside = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}.get(part, "processors")
    return whole[inside] if whole["type"] == "Sequence" else [whole]


def _merges(model: dict) -> list[tuple[str, str]]:
    """The pairs that are merged, the first ones first."""
    return [tuple(m.split(" ", 1) if isinstance(m, str) else m) for m in model["merges"]]


def _byte_level(loaded, tokenizer) -> Vocabulary:
    changes = [s["type"] for s in _steps(tokenizer, "normalizer") if s["type"] != "NFC"]
    if changes:
        raise ExportError(
            f"{loaded.name}: its tokenizer changes texts ({', '.join(changes)}), which llama.cpp does not"
        )
    vocabulary = Vocabulary("gpt2", pre_tokenizer_name(tokenizer, loaded.name))
    vocabulary.merges = [
        " ".join(part.replace(" ", "Ġ") for part in pair) for pair in _merges(tokenizer["model"])
    ]
    _add_tokens(vocabulary, loaded, tokenizer, lambda token, _: (TokenType.NORMAL, 0.0))
    return vocabulary


def _sentencepiece(loaded, tokenizer) -> Vocabulary:
    model = tokenizer["model"]
    scores = _scores(loaded, model)

    def kind(token, index):
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return TokenType.BYTE, 0.0
        if token == model.get("unk_token"):
            return TokenType.UNKNOWN, 0.0
        return TokenType.NORMAL, scores.get(index, _LOWEST)

    vocabulary = Vocabulary("llama", "default")
    _add_tokens(vocabulary, loaded, tokenizer, kind)
    vocabulary.add_space_prefix = _space_prefix(loaded, tokenizer)
    return vocabulary


def _space_prefix(loaded, tokenizer) -> bool:
    """Whether llama.cpp is to put a space before a text, and behind every special token.

    Raises `ExportError` where a SentencePiece tokenizer does more to a text than that.
    """
    known = (
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        # Spaces are gone by then.
        {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
    )  # fmt: skip
    steps = _steps(tokenizer, "normalizer") + _steps(tokenizer, "pre_tokenizer")
    spaces = [s for s in steps if s["type"] == "Metaspace" and not s.get("split", True)]
    unknown = [step for step in steps if step not in known and step not in spaces]
    if unknown or tokenizer["model"].get("ignore_merges"):
        raise ExportError(
            f"{loaded.name}: llama.cpp has no counterpart of what its tokenizer does: "
            f"{'; '.join(map(str, unknown)) or 'ignore_merges'}"
        )
    schemes = [s["prepend_scheme"] for s in spaces if s["prepend_scheme"] != "never"]
    if "first" in schemes and _opens_with_special(loaded, tokenizer):
        log.warning(
            "%s: the file is right for its chat template; a text without it begins with other tokens in "
            "llama.cpp",
            loaded.name,
        )
        return False
    if schemes:
        log.warning(
            "%s: llama.cpp gives other tokens to a text that begins with a space, or follows a special "
            "token",
            loaded.name,
        )
    return bool(schemes) or known[0] in steps


def _opens_with_special(loaded, tokenizer) -> bool:
    """Whether what the chat template renders begins with a special token."""
    if loaded.template is None:
        return False
    text = loaded.template.render([{"role": "user", "content": "a"}], generation=True)
    return text.startswith(tuple(a["content"] for a in tokenizer["added_tokens"]))


def _strips_right(tokenizer) -> bool:
    """Whether special tokens swallow spaces just as llama.cpp lets those of Phi-3 do."""
    keep = {"<unk>", "<s>", "<|endoftext|>"}
    added = {a["content"]: a for a in tokenizer["added_tokens"]}
    swallow = {token for token, a in added.items() if a["rstrip"]}
    if "</s>" in swallow and keep <= added.keys() and swallow == added.keys() - keep:
        return True
    odd = swallow | {token for token, a in added.items() if a["lstrip"]}
    if odd:
        log.warning(
            "llama.cpp keeps the spaces that this tokenizer swallows next to: %s",
            ", ".join(sorted(odd)),
        )
    return False


# Below every score there is: a piece that no merge makes.
_LOWEST = -1e6


def _scores(loaded, model) -> dict[int, float]:
    """The pieces' scores: SentencePiece's own, or ones that give the order of the merges."""
    made = [left + right for left, right in _merges(model)]
    path = loaded.path / "tokenizer.model"
    if path.is_file():
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor()
        # A file of another format or vocabulary says nothing about this one, and where only that file
        # is there, transformers puts the merges of spaces in an order of its own.
        with contextlib.suppress(OSError, RuntimeError):
            processor.LoadFromFile(str(path))
        ids = range(processor.vocab_size())
        if ids and all(model["vocab"].get(processor.IdToPiece(i)) == i for i in ids):
            scores = {i: processor.GetScore(i) for i in ids}
            order = [scores.get(model["vocab"][token], 0.0) for token in made]
            if all(a >= b for a, b in itertools.pairwise(order)):
                return scores
    rank: dict[str, int] = {}
    for order, token in enumerate(made):
        rank.setdefault(token, order)
    return {i: -float(rank[token]) for token, i in model["vocab"].items() if token in rank}


def _add_tokens(vocabulary, loaded, tokenizer, kind) -> None:
    """Every id from 0 to the embedding's last; ids without a token get a name of their own."""
    by_id = {i: token for token, i in tokenizer["model"]["vocab"].items()}
    added = {a["id"]: a for a in tokenizer["added_tokens"]}
    unknown = tokenizer["model"].get("unk_token")
    seen = set()
    for i in range(loaded.vocabulary):
        if i in added:
            token = added[i]["content"]
            special = added[i]["special"] or _looks_special(token)
            token_type = TokenType.CONTROL if special else TokenType.USER_DEFINED
            if vocabulary.model == "llama" and token == unknown:
                token_type = TokenType.UNKNOWN
            elif vocabulary.model == "llama" and not special:
                # It is looked for before spaces are replaced.
                token = token.replace("▁", " ")
            score = -1000.0
        elif i in by_id:
            token = by_id[i]
            token_type, score = kind(token, i)
        else:
            token, token_type, score = f"[PAD{i}]", TokenType.UNUSED, -10000.0
        # llama.cpp refuses to load a file that names two ids alike.
        if token in seen:
            token, token_type = f"[PAD{i}]", TokenType.UNUSED
        seen.add(token)
        vocabulary.tokens.append(token)
        vocabulary.types.append(int(token_type))
        vocabulary.scores.append(score)


def _looks_special(token: str) -> bool:
    return token in ("<pad>", "<mask>") or (token.startswith("<|") and token.endswith("|>"))


def pre_tokenizer_name(tokenizer: dict, model_name: str) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts text.

    Raises `ExportError` that shows the way where there is no such name: a wrong one gives wrong ids
    without any message.
    """
    described = []
    for step in _steps(tokenizer, "pre_tokenizer"):
        kind = step["type"]
        if kind == "Split":
            pattern = step["pattern"]
            # A line's end in a pattern may stand there as itself or in an escaped form.
            pattern = pattern.get("Regex", pattern.get("String"))
            described.append("split " + pattern.replace("\r", "\\r").replace("\n", "\\n"))
            # The patterns leave nothing between their matches, so removing that changes nothing.
            how = (step["behavior"], step.get("invert", False))
            if how not in (("Isolated", False), ("Removed", True)):
                described[-1] += f" ({how[0]}{', inverted' if how[1] else ''})"
        elif kind == "ByteLevel":
            described.append("bytes regex" if step.get("use_regex", True) else "bytes")
            if step.get("add_prefix_space", True):
                described[-1] += " with a space in front"
        elif kind == "Digits":
            described.append("digits single" if step["individual_digits"] else "digits")
        else:
            described.append(kind)
    steps, whole_words = tuple(described), bool(tokenizer["model"].get("ignore_merges"))
    name = PRE_TOKENIZERS.get((steps, whole_words))
    other = PRE_TOKENIZERS.get((steps, not whole_words))
    if name is None and other is not None and _merges_make_every_token(tokenizer):
        name = other
    if name is None:
        raise ExportError(
            f"{model_name}: llama.cpp's name for this tokenizer's way of cutting text is not known, "
            f"and a wrong one would give wrong tokens. Its steps: {'; '.join(described)}; "
            f"ignore_merges: {whole_words}"
        )
    return name


def _merges_make_every_token(tokenizer: dict) -> bool:
    """Whether it is all the same if merges are skipped for words that are a token as a whole."""
    vocab, added = tokenizer["model"]["vocab"], {a["content"] for a in tokenizer["added_tokens"]}
    tokens = [token for token in vocab if token not in added]
    merging = Tokenizer(models.BPE(vocab, _merges(tokenizer["model"])))
    encoded = merging.encode_batch_fast(tokens, add_special_tokens=False)
    return all(e.ids == [vocab[token]] for e, token in zip(encoded, tokens, strict=True))


def _added_by_itself(tokenizer) -> dict[str, int]:
    """The ids that the tokenizer puts before ("bos") and behind ("eos") every text."""
    for step in _steps(tokenizer, "post_processor"):
        if step["type"] == "TemplateProcessing":
            pieces = {"bos": step["single"][0], "eos": step["single"][-1]}
            names = {k: p["SpecialToken"]["id"] for k, p in pieces.items() if "SpecialToken" in p}
            return {k: step["special_tokens"][name]["ids"][0] for k, name in names.items()}
    return {}


def _add_special_ids(loaded, vocabulary) -> None:
    """BOS, EOS and so on, with up to three ids that end a completion."""
    tokenizer = loaded.tokenizer
    bos = getattr(tokenizer, "bos_token_id", None)
    bos = loaded.config.get("bos_token_id") if bos is None else bos
    ends = end_ids(loaded)
    turn = end_of_turn(tokenizer, loaded.template)[0] if loaded.template is not None else None
    if turn in ends[2:]:
        # Of the many ends the one that the template writes must be among those that are kept.
        ends = [ends[0], turn, *(e for e in ends[1:] if e != turn)]
    special = dict(zip(("eos", "eot", "eom"), ends, strict=False))
    special |= {"bos": bos, "unk": getattr(tokenizer, "unk_token_id", None)}
    special["pad"] = getattr(tokenizer, "pad_token_id", None)
    size = loaded.vocabulary
    vocabulary.special = {k: v for k, v in special.items() if isinstance(v, int) and 0 <= v < size}
