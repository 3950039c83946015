"""The families of models that can be exported and imported, and what is particular to each.

For GGUF: the architecture that runs a family in llama.cpp, how its tensors differ from MLX's, the keys
it reads, and what it computes otherwise than the model, which is refused. For Hugging Face: the names
of its classes and weights. Facts about llama.cpp are those of its loaders, src/models/*.cpp.
"""

import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter

from mlx_align.errors import ExportError
from mlx_align.export.fuse import Packed, fused_tensors
from mlx_align.model.load import LoadedModel

log = logging.getLogger("mlx_align")

# What begins the names of the language model's weights in a multimodal model.
_PREFIX = "language_model."


@dataclass(frozen=True)
class Family:
    """What is particular to a model type; the defaults hold for most.

    `stem` begins the names of transformers' classes, as in LlamaForCausalLM; `classifier` where that
    of the sequence classification differs. `experts` names the projections of an expert as the
    checkpoints do. `scalings` are the kinds of position scaling that both mlx-lm and llama.cpp compute.
    `keys` are a family's own, config name -> (GGUF key, what is meant where nothing is said; None where
    something must be). `refusals` names what llama.cpp hard-codes.
    """

    architecture: MODEL_ARCH
    stem: str
    classifier: str = ""
    interleaved: bool = False  # rows (2i, 2i + 1) of a head are rotated, not (i, i + d/2)
    norm_offset: float = 0.0  # what norms add to their stored weights
    head_required: bool = False  # a tied head is written a second time
    biases: bool = False  # llama.cpp reads those that attention_bias and mlp_bias switch on
    fixed_head_dim: bool = False  # a head is always hidden size / heads wide
    partial_rotary: bool = False
    activation: str = "silu"
    scalings: tuple[str, ...] = ("linear", "yarn")
    # Or "optional": ignored, and off by default; "written", but switched off in llama.cpp; "kept".
    window: str = "ignored"
    experts: dict[str, str] = field(default_factory=dict)
    keys: dict[str, tuple[str, int | float | None]] = field(default_factory=dict)
    refusals: Callable[[dict], Iterator[str]] = lambda config: iter(())


# The numbers of layers by which llama.cpp knows the models of 27B.
_LARGE_GEMMAS = {"gemma2": 46, "gemma3_text": 62}


def gemma_scale(config: dict) -> int:
    """What llama.cpp takes for a Gemma's query_pre_attn_scalar, of which GGUF says nothing."""
    if config["num_hidden_layers"] == _LARGE_GEMMAS[config["model_type"]]:
        return config["hidden_size"] // config["num_attention_heads"]
    return head_dim(config)


def _gemma_refusals(config):
    scale = gemma_scale(config)
    if config["query_pre_attn_scalar"] != scale:
        yield f"query_pre_attn_scalar {config['query_pre_attn_scalar']} (it takes {scale})"
    if config.get("use_bidirectional_attention"):
        yield "bidirectional attention"


def _gemma2_refusals(config):
    yield from _gemma_refusals(config)
    yield from _period_refusals(config, 2)


def _gemma3_refusals(config):
    yield from _gemma_refusals(config)
    yield from _period_refusals(config, config["sliding_window_pattern"])
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(name):
            yield name


def _period_refusals(config, period):
    kinds = config.get("layer_types") or []
    full = [i for i, kind in enumerate(kinds, 1) if kind == "full_attention"]
    if full != list(range(period, len(kinds) + 1, period)):
        yield f"layer_types other than full attention in every layer {period}, {2 * period}, ..."


def _qwen3_moe_refusals(config):
    if not config.get("norm_topk_prob"):
        yield "norm_topk_prob false (it scales the weights of the chosen experts to a sum of 1)"
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        yield "layers without experts"


def _smollm3_refusals(config):
    expected = [int(i % 4 != 0) for i in range(1, config["num_hidden_layers"] + 1)]
    if config["no_rope_layers"] != expected:
        yield "no_rope_layers other than every fourth"


_LLAMA = {"architecture": MODEL_ARCH.LLAMA, "interleaved": True}
_EXPERTS_USED = {"num_experts_per_tok": ("expert_used_count", None)}
_WINDOW = "attention.sliding_window"
_GEMMA = {"norm_offset": 1.0, "activation": "gelu_pytorch_tanh", "window": "kept"}
FAMILIES = {
    "llama": Family(**_LLAMA, stem="Llama", biases=True, scalings=("linear", "yarn", "llama3")),
    "mistral": Family(**_LLAMA, stem="Mistral", scalings=("linear", "yarn", "llama3")),
    "mixtral": Family(
        **_LLAMA,
        stem="Mixtral",
        fixed_head_dim=True,
        scalings=(),
        experts={"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
        keys={"num_local_experts": ("expert_count", None), **_EXPERTS_USED},
    ),
    "qwen2": Family(MODEL_ARCH.QWEN2, "Qwen2", fixed_head_dim=True, window="optional"),
    "qwen3": Family(MODEL_ARCH.QWEN3, "Qwen3", window="optional"),
    "qwen3_moe": Family(
        MODEL_ARCH.QWEN3MOE,
        "Qwen3Moe",
        window="optional",
        scalings=(),
        keys={
            "num_experts": ("expert_count", None),
            "moe_intermediate_size": ("expert_feed_forward_length", None),
            **_EXPERTS_USED,
        },
        refusals=_qwen3_moe_refusals,
    ),
    "gemma2": Family(
        MODEL_ARCH.GEMMA2,
        "Gemma2",
        **_GEMMA,
        scalings=(),
        keys={
            "attn_logit_softcapping": ("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": ("final_logit_softcapping", 30.0),
            # mlx-lm has no window, so a config that it wrote may not say.
            "sliding_window": (_WINDOW, 4096),
        },
        refusals=_gemma2_refusals,
    ),
    "gemma3_text": Family(
        MODEL_ARCH.GEMMA3,
        "Gemma3",
        classifier="Gemma3Text",
        **_GEMMA,
        scalings=("linear",),
        keys={
            "sliding_window": (_WINDOW, 1024),
            "sliding_window_pattern": (f"{_WINDOW}_pattern", 6),
            "rope_local_base_freq": ("rope.freq_base_swa", 10000.0),
        },
        refusals=_gemma3_refusals,
    ),
    "phi3": Family(
        MODEL_ARCH.PHI3,
        "Phi3",
        fixed_head_dim=True,
        partial_rotary=True,
        window="written",
        scalings=("linear", "longrope"),
        keys={"sliding_window": (_WINDOW, 0)},
    ),
    "smollm3": Family(
        MODEL_ARCH.SMOLLM3,
        "SmolLM3",
        interleaved=True,
        window="optional",
        refusals=_smollm3_refusals,
    ),
    "olmo2": Family(MODEL_ARCH.OLMO2, "Olmo2", fixed_head_dim=True, head_required=True),
}


def find_family(loaded: LoadedModel, what: str) -> Family:
    """The family of a model, or of its language model; `what` is to be written, for the error."""
    kind = (loaded.config.get("text_config") or loaded.config)["model_type"]
    if kind not in FAMILIES:
        raise ExportError(
            f"{loaded.name}: models of type {kind!r} cannot be written as {what} yet; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
    if "text_config" in loaded.config:
        log.warning("%s: only its language model is written, not what sees or hears", loaded.name)
    return FAMILIES[kind]


def language_model(loaded: LoadedModel) -> nn.Module:
    """The language model of a multimodal model, or the model itself."""
    return loaded.model.get("language_model", loaded.model)


def language_config(loaded: LoadedModel) -> dict:
    """The language model's config, with what mlx-lm assumes where config.json says nothing."""
    config = loaded.config.get("text_config") or loaded.config
    given = {key: value for key, value in config.items() if value is not None}
    return {**vars(language_model(loaded).args), **given, "vocab_size": loaded.vocabulary}


def hugging_face_tensors(loaded: LoadedModel, family: Family) -> Iterator[tuple[str, mx.array]]:
    """(name, array) of every weight as transformers names it; experts one by one."""
    for name, array in fused_tensors(loaded.model):
        names = hugging_face_names(family, name, len(array))
        if "score" in loaded.model and names[0].startswith("lm_head."):
            # A reward model has another head.
            continue
        if ".switch_mlp." in name:
            yield from zip(names, array, strict=True)
        else:
            yield names[0], array


def hugging_face_names(family: Family, name: str, count: int) -> list[str]:
    """What transformers calls a weight of mlx-lm's: each of its `count` experts by itself."""
    block, stack, rest = name.removeprefix(_PREFIX).partition(".switch_mlp.")
    if not stack:
        return [block]
    projection, kind = rest.split(".")
    projection = family.experts.get(projection, projection)
    return [f"{block}.experts.{expert}.{projection}.{kind}" for expert in range(count)]


def gguf_tensors(
    loaded: LoadedModel, family: Family, config: dict, *, packed: bool = False
) -> Iterator[tuple[str, str | None, mx.array | Packed]]:
    """(GGUF name, the model's own name, array) of every tensor, in llama.cpp's order of rows.

    `packed` is that of `fused_tensors`; merged arrays are not computed yet. Raises `ExportError` for a
    weight that GGUF has no place for.
    """
    names = gguf.get_tensor_name_map(family.architecture, config["num_hidden_layers"])
    heads = rotated_heads(family, config)
    written = {}
    for name, array in fused_tensors(loaded.model, packed=packed):
        target = gguf_name(names, name)
        if target is None:
            raise ExportError(f"{loaded.name}: GGUF has no place for the weight {name}")
        layer = name.rsplit(".", 2)[-2]
        if layer in heads:
            array = interleave(array, heads[layer])
        if family.norm_offset and layer.endswith("norm"):
            array = array.astype(mx.float32) + family.norm_offset
        if not target.startswith("blk."):
            written[target] = array
        yield target, name, array
    if family.head_required and "output.weight" not in written:
        yield "output.weight", None, written["token_embd.weight"]
    for name, factors in rope_factors(config).items():
        yield f"{name}.weight", None, mx.array(factors)


def gguf_name(names: gguf.TensorNameMap, name: str) -> str | None:
    """GGUF's name for a weight or layer of mlx-lm's, which stacks experts in a module of their own."""
    stacked = re.sub(r"\.\w+\.switch_mlp\.", ".mlp.experts.", name.removeprefix(_PREFIX))
    return names.get_name(stacked, try_suffixes=(".weight", ".bias"))


def rotated_heads(family: Family, config: dict) -> dict[str, int]:
    """The layers whose rows are in another order in llama.cpp, with the number of their heads."""
    if not family.interleaved:
        return {}
    return {"q_proj": config["num_attention_heads"], "k_proj": key_heads(config)}


def interleave(weight: mx.array | Packed, heads: int) -> mx.array | Packed:
    """Rows from "all first halves, all second halves" of a head to pairs, as llama.cpp rotates them."""
    if isinstance(weight, Packed):
        return weight.reordered(lambda part: interleave(part, heads))
    rest = weight.shape[1:]
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *rest).swapaxes(1, 2).reshape(weight.shape)


def head_dim(config: dict) -> int:
    """Width of one attention head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def key_heads(config: dict) -> int:
    """Number of heads of keys and values."""
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def rotary_dim(config: dict) -> int:
    """How many values of a head are rotated."""
    return int(head_dim(config) * config.get("partial_rotary_factor", 1.0))


def rope_scaling(config: dict) -> tuple[str, dict]:
    """The kind of position scaling ("default" for none) and its settings."""
    scaling = config.get("rope_scaling") or {}
    return scaling.get("rope_type", scaling.get("type", "default")), scaling


def rope_factors(config: dict) -> dict[str, np.ndarray]:
    """Divisors of the rotary frequencies, float32[rotary_dim / 2], by the names of GGUF's tensors."""
    kind, scaling = rope_scaling(config)
    if kind == "llama3":
        return {"rope_freqs": llama3_factors(config)}
    if kind == "longrope":
        sizes = {f"rope_factors_{size}": scaling[f"{size}_factor"] for size in ("long", "short")}
        return {name: np.array(factors, np.float32) for name, factors in sizes.items()}
    return {}


def llama3_factors(config: dict) -> np.ndarray:
    """Llama 3's frequency divisors, float32[head_dim / 2].

    1 for wavelengths below the high-frequency bound, `factor` above the low-frequency one, between
    them blended by the wavelength (as in Meta's reference code for Llama 3.1).
    """
    _, scaling = rope_scaling(config)
    dim = head_dim(config)
    factor = scaling["factor"]
    low, high = scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 4.0)
    context = scaling.get("original_max_position_embeddings", 8192)
    wavelength = 2 * np.pi * config["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    smooth = (context / wavelength - low) / (high - low)
    blended = 1 / ((1 - smooth) / factor + smooth)
    divisors = np.where(wavelength > context / low, factor, blended)
    return np.where(wavelength < context / high, 1.0, divisors).astype(np.float32)


def write_hyperparameters(writer: GGUFWriter, family: Family, config: dict) -> None:
    """Add the keys that say what llama.cpp is to compute."""
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config.get("max_position_embeddings") or 2048)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(key_heads(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(rotary_dim(config))
    writer.add_rope_freq_base(config["rope_theta"])
    kind, scaling = rope_scaling(config)
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
        original = scaling.get("original_max_position_embeddings")
        writer.add_rope_scaling_orig_ctx_len(original or config["max_position_embeddings"])
    elif kind == "longrope":
        original = config["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        factor = config["max_position_embeddings"] / original
        # LongRoPE (Ding et al. 2024, arXiv:2402.13753): longer contexts sharpen attention.
        sharper = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        writer.add_rope_scaling_attn_factors(sharper)
    for name, (key, default) in family.keys.items():
        value = config.get(name, default)
        key = f"{MODEL_ARCH_NAMES[family.architecture]}.{key}"
        if isinstance(default, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)


def check_config(loaded: LoadedModel, family: Family, config: dict) -> None:
    """Refuse what llama.cpp computes differently from the model, all of it at once."""
    kind, scaling = rope_scaling(config)
    if kind == "longrope" and scaling["short_factor"] != scaling["long_factor"]:
        log.warning(
            "%s: mlx-lm takes the long factors for short texts too; llama.cpp and transformers take the "
            "short ones up to %s tokens, so their answers differ a little",
            loaded.name,
            config["original_max_position_embeddings"],
        )
    window = _window(family, config)
    if window and family.window == "written":
        log.warning(
            "%s: mlx-lm and llama.cpp let a token see all tokens before it, transformers only the last "
            "%d; their answers to longer texts differ",
            loaded.name,
            window,
        )
    refused = [*_refusals(family, config), *family.refusals(config)]
    if refused:
        raise ExportError(
            f"{loaded.name}: llama.cpp would compute something else, so no GGUF is written. It does not "
            f"know, for this type: {'; '.join(refused)}"
        )


# What changes a scaling besides its factor, with the values that llama.cpp assumes.
_SCALING_DETAILS = {
    "beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale": 1, "mscale_all_dim": 0,
    "attention_factor": None, "short_mscale": None, "long_mscale": None,
}  # fmt: skip


def _refusals(family, config):
    kind, scaling = rope_scaling(config)
    if kind not in ("default", *family.scalings):
        yield f"rope scaling of type {kind!r}"
    for name, assumed in _SCALING_DETAILS.items():
        if scaling.get(name) not in (None, assumed):
            yield f"rope scaling with {name} {scaling[name]}"
    if rotary_dim(config) != head_dim(config) and not family.partial_rotary:
        yield "partial rotary embeddings"
    dim, heads, hidden = head_dim(config), config["num_attention_heads"], config["hidden_size"]
    if family.fixed_head_dim and dim * heads != hidden:
        yield f"a head dimension of {dim} that is not hidden size / heads"
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name) and not family.biases:
            yield name
    for name in ("hidden_act", "hidden_activation"):
        if config.get(name, family.activation) != family.activation:
            yield f"{name} {config[name]}"
    window, context = _window(family, config), config.get("max_position_embeddings")
    if window and family.window in ("ignored", "optional"):
        yield (
            f"a sliding window of {window} in a context of {context} (for texts up to {window} tokens, "
            "set max_position_embeddings to that in config.json)"
        )


def _window(family, config) -> int:
    """How many tokens a token sees at most, 0 where that is the whole context."""
    window, context = config.get("sliding_window") or 0, config.get("max_position_embeddings") or 0
    used = config.get("use_sliding_window", family.window != "optional")
    mixed = "sliding_attention" in (config.get("layer_types") or [])
    return window if window < context and (used or mixed) else 0
