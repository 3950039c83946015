"""Tokenizers of published models, rebuilt from the vocabularies that llama.cpp tests itself with."""

import gguf
import tiny
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

SPLITS = {"llama-bpe": tiny.LLAMA3_SPLIT, "qwen2": tiny.QWEN2_SPLIT}


def write_rebuilt(file, folder) -> int:
    """Write the tokenizer that a vocabulary file was made from; returns its number of tokens."""
    fields = gguf.GGUFReader(file).fields
    keys = {name.removeprefix("tokenizer.ggml."): f.contents() for name, f in fields.items()}
    tokens, types = keys["tokens"], keys["token_type"]
    if keys["model"] == "llama":
        tokenizer = tiny.scored_tokenizer(tokens, keys["scores"])
    else:
        tokenizer = _byte_level(keys)
    special = (gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN)
    phi = "phi3" in keys["general.name"].lower()
    added = [
        AddedToken(
            token,
            special=kind in special,
            normalized=False,
            rstrip=phi and token not in ("<unk>", "<s>", "<|endoftext|>"),
        )
        for token, kind in zip(tokens, types, strict=True)
        if kind in (*special, gguf.TokenType.USER_DEFINED)
    ]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    tiny.write_tokenizer(
        folder, tokenizer, tokens[keys["bos_token_id"]], tokens[keys["eos_token_id"]]
    )
    return len(tokens)


def _byte_level(keys) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate(keys["tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in keys["merges"]]
    split = SPLITS.get(keys["pre"])
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=keys["pre"] == "llama-bpe"))
    steps = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if keys["pre"] == "llama-bpe":
        bos = keys["tokens"][keys["bos_token_id"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, keys["bos_token_id"])]
        )
    return tokenizer
