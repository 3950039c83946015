"""Tiny random models of every family, made and saved by transformers as users get them."""

import pytest
import tiny

SHAPE = {
    key: tiny.SHAPE[key]
    for key in (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "max_position_embeddings",
    )
} | {"num_hidden_layers": 2, "vocab_size": 400}  # fmt: skip
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 24}
LAYERS = ["sliding_attention", "full_attention"]
LLAMA3 = {"rope_theta": 3e4, **tiny.FAMILIES["llama-scaled"]["rope_scaling"]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 3e4,
    "partial_rotary_factor": 0.5,
    "original_max_position_embeddings": 256,
    # Alike, since mlx-lm takes the long ones for every text.
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [1.0, 1.5, 2.0, 3.0],
}
# model -> the stem of its classes, and its config
MODELS = {
    "llama": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", {"rope_parameters": {"rope_theta": 3e4, **YARN}}),
    "mistral": ("Mistral", {"head_dim": 32, "sliding_window": None}),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32, "rope_parameters": {"rope_theta": 1e6, **YARN}}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    # mlx-lm's Gemma 2 has no window.
    "gemma2": ("Gemma2", {**GEMMA, "sliding_window": 64}),
    "gemma3_text": (
        "Gemma3Text",
        {
            **GEMMA,
            "num_hidden_layers": 4,
            "layer_types": LAYERS * 2,
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            },
        },
    ),
    "phi3": ("Phi3", {"original_max_position_embeddings": 256, "rope_parameters": LONGROPE}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),
    "olmo2": ("Olmo2", {}),
    "olmo2-tied": ("Olmo2", {"tie_word_embeddings": True}),
    "gemma3": ("Gemma3", {}),
}


def save_model(folder, name):
    """Write a random model as transformers does, with a tokenizer; norms and biases are random too."""
    torch = pytest.importorskip("torch", reason="models are made with torch and transformers")
    transformers = pytest.importorskip("transformers")
    tokenizer = tiny.make_tokenizer(folder, style="qwen2" if "qwen" in name else "llama3")
    stem, own = MODELS[name]
    ends = {"eos_token_id": tokenizer.token_to_id("<|im_end|>" if "qwen" in name else "<|eot_id|>")}
    ends |= {"bos_token_id": 1, "pad_token_id": 0}
    if name == "gemma3":
        model = _multimodal(transformers, {**SHAPE, **MODELS["gemma3_text"][1], **ends})
    else:
        config = getattr(transformers, f"{stem}Config")(**{**SHAPE, **own, **ends})
        model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(noise * 0.2)
    model.save_pretrained(folder)
    return folder


def _multimodal(transformers, text):
    """Gemma 3 with eyes."""
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=1,
        eos_token_id=text["eos_token_id"],
    )
    return transformers.Gemma3ForConditionalGeneration(config)
