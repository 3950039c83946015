"""A tokenizer.json from the `tokenizer.ggml.*` keys of a GGUF file.

The two kinds that the export writes: byte-level BPE ("gpt2"), which names its way of cutting text, and
SentencePiece ("llama"), whose merges follow from the scores of its pieces. The result is meant to give
the ids that llama.cpp gives.
"""

import logging
import re
from dataclasses import dataclass

from gguf import TokenType
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from mlx_align.data.template import ChatTemplate
from mlx_align.errors import DataError, ModelError
from mlx_align.export.vocabulary import PRE_TOKENIZERS
from mlx_align.importer.gguf_file import GGUFFile

log = logging.getLogger("mlx_align")

# llama.cpp's names for ways of cutting text, in the words of `PRE_TOKENIZERS`: the steps, and whether
# merges are skipped for whole words. For tekken and gpt-4o these are the models' own expressions;
# llama.cpp's cut some letters with marks otherwise.
WAYS = {name: way for way, name in PRE_TOKENIZERS.items()}
_ALSO = {
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "pixtral", "lfm2"),
    "dbrx": ("smaug-bpe", "chatglm-bpe"),
    "qwen2": ("deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"),
    "gpt-2": ("phi-2", "mpt", "olmo"),
    "smollm": ("starcoder", "refact", "command-r", "minerva-7b"),
    "gpt-4o": ("llama4",),
}
WAYS |= {also: WAYS[name] for name, others in _ALSO.items() for also in others}
# Where a file does not say so, these begin every text with the BOS token.
_BOS_BY_DEFAULT = {*_ALSO["llama-bpe"], "llama-bpe", "tekken"}


@dataclass(frozen=True, eq=False)
class ImportedTokenizer:
    """A rebuilt tokenizer: `config` is its tokenizer_config.json, `special` the ids of bos, eos, eot,
    eom, unk and pad that the file names, `ends` the ids that end a completion, `template` its Jinja chat
    template or None."""

    tokenizer: Tokenizer
    config: dict
    special: dict[str, int]
    ends: list[int]
    template: str | None


def read_tokenizer(file: GGUFFile) -> ImportedTokenizer:
    """Rebuild the tokenizer of a file. Raises `ModelError` where that would change ids."""
    model = file.text("tokenizer.ggml.model")
    tokens = file.texts("tokenizer.ggml.tokens")
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < len(tokens) or not tokens or "" in ids:
        raise ModelError(f"{file.path}: its vocabulary has empty or repeated tokens")
    types = [int(TokenType.NORMAL)] * len(tokens)
    if "tokenizer.ggml.token_type" in file.keys:
        types = file.numbers("tokenizer.ggml.token_type", len(tokens), "iu").tolist()
    special = _special_ids(file, model, len(tokens))
    if model == "gpt2":
        tokenizer = _byte_level(file, ids)
    elif model == "llama":
        unknown = tokens[special["unk"]] if "unk" in special else None
        tokenizer = _sentencepiece(file, ids, types, unknown)
    else:
        raise ModelError(
            f"{file.path}: its tokenizer is of kind {model!r}; those of kind gpt2 and llama can be rebuilt"
        )
    _add_tokens(tokenizer, file, tokens, types)
    if tokenizer.get_vocab(with_added_tokens=True) != ids:
        raise ModelError(f"{file.path}: its tokens cannot all keep their ids")
    _add_ends(tokenizer, file, model, special, tokens)
    _check_texts(tokenizer, types)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{k}_token": tokens[special[k]] for k in ("bos", "eos", "unk", "pad") if k in special},
        "clean_up_tokenization_spaces": False,
    }
    ends = _ends(file, special, len(tokens))
    return ImportedTokenizer(tokenizer, config, special, ends, _template(file))


def _template(file: GGUFFile) -> str | None:
    source = file.text("tokenizer.chat_template", "")
    try:
        ChatTemplate(source)
    except DataError as error:
        log.warning("%s; it is left out", error)
        return None
    return source or None


def _special_ids(file, model, size) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom"}
    names |= {"unk": "unknown", "pad": "padding"}
    # What llama.cpp assumes of SentencePiece files that do not say.
    assumed = {"bos": 1, "eos": 2, "unk": 0} if model == "llama" else {}
    found = {}
    for ours, theirs in names.items():
        key = f"tokenizer.ggml.{theirs}_token_id"
        token = file.integer(key, assumed.get(ours), most=2**32 - 1)
        # Some converters write the largest number for none.
        if token is None or token == 2**32 - 1:
            continue
        if token >= size:
            raise ModelError(f"{file.path}: {key} is {token}, but there are {size} tokens")
        found[ours] = token
    return found


def _ends(file: GGUFFile, special: dict[str, int], size: int) -> list[int]:
    ends = [special[kind] for kind in ("eos", "eot", "eom") if kind in special]
    # So Ollama's own converter names them where there are several.
    more = "tokenizer.ggml.eos_token_ids"
    if more in file.keys:
        ends += file.numbers(more, None, "iu").tolist()
    if not all(0 <= token < size for token in ends):
        raise ModelError(f"{file.path}: {more} names other ids than those of its {size} tokens")
    return list(dict.fromkeys(ends))


def _byte_level(file: GGUFFile, ids: dict[str, int]) -> Tokenizer:
    name = file.text("tokenizer.ggml.pre", "default")
    if name not in WAYS:
        raise ModelError(
            f"{file.path}: how its tokenizer cuts text (tokenizer.ggml.pre is {name!r}) is not known, and "
            "a guess would give wrong tokens. Take a newer GGUF of this model, or its safetensors"
        )
    steps, whole_words = WAYS[name]
    merges, lost = [], 0
    for merge in file.texts("tokenizer.ggml.merges"):
        # A part may be a space, which comes first then.
        left, _, right = merge[1:].partition(" ")
        left = merge[:1] + left
        if left in ids and right in ids and left + right in ids:
            merges.append((left, right))
        else:
            lost += 1
    if lost:
        log.warning("%d merges name tokens that the vocabulary lacks; they are left out", lost)
    missing = set(pre_tokenizers.ByteLevel.alphabet()) - ids.keys()
    if missing:
        log.warning(
            "its vocabulary lacks %d of the 256 bytes; texts with them lose them", len(missing)
        )
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=whole_words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([_step(step) for step in steps])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _step(step: str) -> pre_tokenizers.PreTokenizer:
    kind, _, rest = step.partition(" ")
    if kind == "split":
        return pre_tokenizers.Split(Regex(rest), "isolated")
    if kind == "digits":
        return pre_tokenizers.Digits(individual_digits=rest == "single")
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rest == "regex")


def _sentencepiece(file: GGUFFile, ids: dict[str, int], types, unknown: str | None) -> Tokenizer:
    scores = file.numbers("tokenizer.ggml.scores", len(ids)).tolist()
    merges = []
    for piece, i in ids.items():
        # A piece of many letters would cost their square; no vocabulary has such.
        if types[i] not in (TokenType.NORMAL, TokenType.USER_DEFINED) or len(piece) > 256:
            continue
        for cut in range(1, len(piece)):
            left, right = ids.get(piece[:cut]), ids.get(piece[cut:])
            if left is not None and right is not None:
                merges.append((-scores[i], left, right, piece[:cut], piece[cut:]))
    # The best score is merged first; ids decide between two ways to the same piece.
    merges = [(left, right) for *_, left, right in sorted(merges)]
    tokenizer = Tokenizer(
        models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = file.flag("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), spaces] if prefix else [spaces]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([*steps, *strip])
    return tokenizer


# Tokens of Phi-3 that do not swallow the space behind them.
_PHI3_KEEPS = ("<unk>", "<s>", "<|endoftext|>")


def _add_tokens(tokenizer: Tokenizer, file: GGUFFile, tokens: list[str], types: list[int]) -> None:
    """Tokens that are found in a text before it is cut: special ones, and a user's own."""
    # llama.cpp goes by the name, too: nothing else in the file says so.
    phi3 = re.search("phi-?3", file.text("general.name", "").lower()) is not None
    kinds = {TokenType.CONTROL: True, TokenType.UNKNOWN: True, TokenType.USER_DEFINED: False}
    added = [
        AddedToken(
            token,
            special=kinds[kind],
            normalized=False,
            rstrip=phi3 and token not in _PHI3_KEEPS,
        )
        for token, kind in zip(tokens, types, strict=True)
        if kind in kinds
    ]
    tokenizer.add_tokens([token for token in added if not token.special])
    tokenizer.add_special_tokens([token for token in added if token.special])


def _add_ends(tokenizer: Tokenizer, file: GGUFFile, model: str, special: dict, tokens) -> None:
    """Put a BOS before, and an EOS behind, every text where the file says so."""
    begins = model == "llama" or file.text("tokenizer.ggml.pre", "") in _BOS_BY_DEFAULT
    wanted = {
        "bos": file.flag("tokenizer.ggml.add_bos_token", begins),
        "eos": file.flag("tokenizer.ggml.add_eos_token", False),
    }
    ids = {tokens[special[k]]: special[k] for k, yes in wanted.items() if yes and k in special}
    if not ids:
        return
    first, last = (
        [tokens[special[k]]] if yes and k in special else [] for k, yes in wanted.items()
    )
    second = [f"{token}:1" for token in (*first, "$B", *last)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *second],
        special_tokens=list(ids.items()),
    )


def _check_texts(tokenizer: Tokenizer, types: list[int]) -> None:
    """Encode what every token stands for and decode it again; say how many come back."""
    normal = [[i] for i, kind in enumerate(types) if kind == TokenType.NORMAL]
    texts = [text for text in tokenizer.decode_batch(normal) if text and "\ufffd" not in text]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    again = tokenizer.decode_batch([e.ids for e in encoded], skip_special_tokens=False)
    changed = [text for text, back in zip(texts, again, strict=True) if text != back]
    if changed:
        log.warning(
            "%d of %d tokens' texts come back changed from the tokenizer, as %r does",
            len(changed), len(texts), changed[0],
        )  # fmt: skip
    else:
        log.info("tokenizer: %d ids as in the file; every text comes back", len(types))
