"""Tiny random models and tokenizers, made on the spot."""

import importlib
import json
import re
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
CORPUS = [
    "The quick brown fox jumps over the lazy dog. What do you think about that, my friend?",
    "Human: How do I bake bread? Assistant: Mix flour, water, salt and yeast; knead; wait; bake.",
    "I'm sorry, I can't help with that. It's not what we'd do, they're right. 1234567890",
    "def f(x):\n    return x ** 2  # code\n\nfor i in range(10):\n\tprint(f(i))\n",
    "日本語のテキスト、中文文本 한국어 텍스트 Привет мир ñandú café naïve 🚀🦙",
] * 4

# The shape of every tiny model; each family adds what it needs.
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
FAMILIES = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "llama-untied": {"model_type": "llama", "tie_word_embeddings": False},
    "llama-biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-scaled": {
        "model_type": "llama",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama-sliding": {
        "model_type": "llama",
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 8},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"]},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "num_hidden_layers": 4,
        "query_pre_attn_scalar": 16,
        "sliding_window": 6,
        "sliding_window_pattern": 2,
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 400,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_oss": {
        "tie_word_embeddings": False,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 6,
    },
    "deepseek_v3": {
        "tie_word_embeddings": False,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    },
    "phi3": {"rope_scaling": None, "original_max_position_embeddings": 512},
    "phi3-long": {
        "model_type": "phi3",
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 256,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.0, 1.0, 1.0],
            "long_factor": [1.0, 1.5, 2.0, 3.0],
        },
    },
    "smollm3": {"num_hidden_layers": 4, "tie_word_embeddings": True},
    "olmo2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
    "cohere": {"logit_scale": 0.25, "layer_norm_eps": 1e-5},
    "granite": {
        "logits_scaling": 8.0,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "mamba": {
        "state_size": 8,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
    "lfm2": {
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_ff_dim": 128,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1],
        "num_hidden_layers": 3,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
}


def make_tokenizer(
    folder: Path, *, style: str = "llama3", template: str | None = "own", size: int = 400
):
    """Write a byte-level BPE tokenizer; `style` is "llama3" (adds BOS) or "qwen2" (no BOS)."""
    split, own = (LLAMA3_SPLIT, LLAMA3) if style == "llama3" else (QWEN2_SPLIT, CHATML)
    tokenizer = Tokenizer(models.BPE(ignore_merges=style == "llama3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if style == "llama3":
        bos, eos, pad = "<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>"
        specials = [bos, pad, "<|start_header_id|>", "<|end_header_id|>", eos]
    else:
        bos, eos, pad = None, "<|im_end|>", "<|endoftext|>"
        specials = [pad, "<|im_start|>", eos]
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    while tokenizer.get_vocab_size() < size - len(specials):
        tokenizer.add_tokens([f"<filler{tokenizer.get_vocab_size()}>"])
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "clean_up_tokenization_spaces": False,
    }
    template = own if template == "own" else template
    if template:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def make_model(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype=mx.float32,
    quantise: tuple[int, int] | None = None,
    style: str | None = None,
    template: str | None = "own",
    **changes,
) -> Path:
    """Write a random model with a tokenizer; weights are large enough that logits differ.

    `quantise` is (bits, group size) for a model quantised by MLX.
    """
    style = style or ("qwen2" if "qwen" in family else "llama3")
    tokenizer = make_tokenizer(folder, style=style, template=template)
    config = {"model_type": family, **SHAPE, **FAMILIES[family], **changes}
    config.setdefault("vocab_size", tokenizer.get_vocab_size())
    saved = json.loads((folder / "tokenizer_config.json").read_text())
    config["eos_token_id"] = tokenizer.token_to_id(saved["eos_token"])
    if saved["bos_token"]:
        config["bos_token_id"] = tokenizer.token_to_id(saved["bos_token"])
    kind = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))

    def spread(path, x):
        if x.ndim >= 2 and mx.issubdtype(x.dtype, mx.floating) and "conv" not in path:
            return mx.random.normal(x.shape) * (1.5 / x.shape[-1] ** 0.5)
        if path.endswith(("bias", "sinks")):
            return mx.random.normal(x.shape) * 0.1
        return x

    weights = [(path, spread(path, x)) for path, x in tree_flatten(model.parameters())]
    model.load_weights(weights)
    if config.get("tie_word_embeddings") and hasattr(model, "sanitize") and "lm_head" in model:
        model.pop("lm_head")
    model.update(tree_map(lambda x: x.astype(dtype), model.parameters()))
    if quantise:
        import mlx.nn as nn

        bits, group = quantise
        nn.quantize(model, group_size=group, bits=bits)
        config["quantization"] = {"bits": bits, "group_size": group, "mode": "affine"}
    mx.eval(model.parameters())
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_adapter(folder: Path, model: Path, *, reward: bool = False, **settings) -> Path:
    """Write an adapter with random arrays on a model; `settings` are those of `AdapterSettings`."""
    from mlx_align.model.adapter import AdapterSettings, wear_adapter
    from mlx_align.model.heads import attach_reward_head
    from mlx_align.model.load import load_model

    loaded = load_model(str(model))
    extra = {"model": str(model)}
    if reward:
        attach_reward_head(loaded.model, loaded.head)
        extra |= {"head": "reward", "reward": {"mean": 0.0, "std": 1.0}}
    made = AdapterSettings(**settings)
    adapter = wear_adapter(loaded.model, made, seed=0)
    keys = iter(mx.random.split(mx.random.key(1), 1000))

    def nudge(x):
        return x + 0.05 * mx.random.normal(x.shape, key=next(keys)).astype(x.dtype)

    loaded.model.update(tree_map(nudge, adapter.parameters()))
    folder.mkdir(parents=True)
    adapter.save(folder, made, extra)
    return folder


def make_sentencepiece(
    folder: Path, model_file: Path, *, keep_model: bool, template: str | None = None
) -> None:
    """Write a tokenizer.json like Llama 2's from a SentencePiece model."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromFile(str(model_file))
    pieces = [processor.IdToPiece(i) for i in range(processor.vocab_size())]
    scores = [processor.GetScore(i) for i in range(len(pieces))]
    write_tokenizer(folder, scored_tokenizer(pieces, scores), "<s>", "</s>", template)
    if keep_model:
        (folder / "tokenizer.model").write_bytes(model_file.read_bytes())


def train_sentencepiece(folder: Path, size: int = 440) -> Path:
    """Train a SentencePiece model on a few texts."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(folder / "trained"), vocab_size=size,
        model_type="bpe", byte_fallback=True, character_coverage=0.98, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    return folder / "trained.model"


def scored_tokenizer(pieces: list[str], scores: list[float]) -> Tokenizer:
    """Llama 2's kind of tokenizer: merges in the order of the scores of what they make."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i, piece in enumerate(pieces):
        if piece in ("<unk>", "<s>", "</s>") or re.fullmatch("<0x..>", piece):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append((-scores[i], ids[left], ids[right], left, right))
    merges = [(left, right) for _, _, _, left, right in sorted(merges)]
    model = models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(
        [AddedToken(s, special=True, normalized=False) for s in ("<unk>", "<s>", "</s>")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", ids["<s>"])]
    )
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer, bos, eos, template=None) -> None:
    """Write a tokenizer's two files."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": "<unk>" if tokenizer.token_to_id("<unk>") is not None else None,
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
