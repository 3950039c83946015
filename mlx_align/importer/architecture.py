"""What a GGUF file's keys and tensor names say in MLX's terms: a config, and a place for each tensor.

The places are those of mlx-lm's own model made from the config, so a tensor that is missing, left
over, or of another shape is found before any weight is read.
"""

import importlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import MODEL_ARCH_NAMES
from mlx.utils import tree_flatten

from mlx_align.errors import ModelError
from mlx_align.export.architectures import (
    FAMILIES,
    gemma_scale,
    gguf_name,
    llama3_factors,
    rotated_heads,
)
from mlx_align.importer.gguf_file import GGUFFile, Tensor
from mlx_align.model.config import MOST_LAYERS, check_config, check_period, normalise_config

log = logging.getLogger("mlx_align")

# GGUF's architectures, and the model type as which mlx-lm computes each.
MODEL_TYPES = {
    MODEL_ARCH_NAMES[family.architecture]: kind for kind, family in reversed(FAMILIES.items())
}
# What the configs say and GGUF leaves unsaid.
_UNSAID = {
    "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    "smollm3": {"no_rope_layer_interval": 4},
}
# Tensors of a vision model that some files carry besides the text model.
_VISION = ("v.", "mm.")


@dataclass(frozen=True, eq=False)
class Place:
    """Where a tensor goes: the parameter `path` of the MLX model. `heads` is the number of heads whose
    rows stand in pairs, `offset` was added to its values, `packable` says that MLX can hold it packed."""

    path: str
    tensor: Tensor
    heads: int | None
    offset: float
    packable: bool

    @property
    def module(self) -> str:
        """The path of the layer that the parameter belongs to."""
        return self.path.rsplit(".", 1)[0]


def find_type(file: GGUFFile) -> str:
    """The model type of a file, one of `FAMILIES`.

    Raises `ModelError` where it holds no language model that is known.
    """
    architecture = file.text("general.architecture")
    holds = file.text("general.type", "model")
    if holds != "model" or not file.tensors:
        what = "a vocabulary" if holds == "model" else f"a part of a model ({holds})"
        raise ModelError(f"{file.path}: holds only {what}; import the file of the whole model")
    if architecture == "llama" and file.integer("llama.expert_count", 0):
        return "mixtral"
    if architecture not in MODEL_TYPES:
        known = ", ".join(sorted(MODEL_TYPES))
        raise ModelError(
            f"{file.path}: models of type {architecture!r} cannot be imported from GGUF yet; those that "
            f"can: {known}. Many others can be had as safetensors from the Hub"
        )
    return MODEL_TYPES[architecture]


def make_config(file: GGUFFile) -> dict:
    """The config.json of a file's model, in the spellings of transformers 4 and 5.

    Raises `ModelError` as `find_type` does, and where the keys make no model.
    """
    kind = find_type(file)
    family = FAMILIES[kind]
    architecture = file.text("general.architecture")
    # No size can be larger than the largest side of a tensor; that bounds what a bad key can ask for.
    largest = min(2**31 - 1, max(max(t.shape) for t in file.tensors.values()))

    def size(name, *default):
        return file.integer(f"{architecture}.{name}", *default, least=1, most=largest)

    def number(name, default):
        return file.number(f"{architecture}.{name}", default)

    embedding = _tensor(file, "token_embd.weight")
    heads, hidden = size("attention.head_count"), size("embedding_length")
    head_dim = size("attention.key_length", hidden // heads)
    config = {
        "model_type": kind,
        "architectures": [f"{family.stem}ForCausalLM"],
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": file.integer(f"{architecture}.block_count", least=1, most=MOST_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.integer(f"{architecture}.context_length", least=1),
        "rms_norm_eps": file.number(f"{architecture}.attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "hidden_act": family.activation,
        **_UNSAID.get(kind, {}),
    }
    for name, (key, default) in family.keys.items():
        if default is None:
            config[name] = size(key)
        elif isinstance(default, int):
            config[name] = file.integer(f"{architecture}.{key}", default) or None
        else:
            config[name] = number(key, default)
    if kind.startswith("gemma"):
        config["hidden_activation"] = family.activation
        config["query_pre_attn_scalar"] = gemma_scale(config)
    # Ollama's converter writes Gemma 3's frequencies under names of its own.
    config["rope_theta"] = number("rope.freq_base", number("rope.global.freq_base", 10000.0))
    local = number("rope.local.freq_base", None)
    if local is not None:
        config["rope_local_base_freq"] = local
    _add_rope(config, file, architecture, family)
    shared = config["num_key_value_heads"]
    if heads % shared or head_dim % 2 or max(heads, shared) * head_dim > largest:
        raise ModelError(
            f"{file.path}: {heads} heads and {shared} of keys and values, of {head_dim} dimensions, "
            "do not make a model"
        )
    check_config(config, file.path)
    config = normalise_config(config)
    check_period(config, file.path)
    return config


def _add_rope(config, file, architecture, family) -> None:
    """How positions are scaled, and which part of a head is rotated."""

    def key(name):
        return f"{architecture}.rope.{name}"

    dim, context = config["head_dim"], config["max_position_embeddings"]
    rotated = file.integer(key("dimension_count"), dim, least=2, most=dim)
    original = file.integer(key("scaling.original_context_length"), context, least=1)
    if family.partial_rotary:
        config["original_max_position_embeddings"] = original
        config["partial_rotary_factor"] = rotated / dim
    elif rotated != dim:
        raise ModelError(
            f"{file.path}: rotates {rotated} of {dim} dimensions, which mlx-lm does not"
        )
    kind = file.text(key("scaling.type"), "none")
    scaling = None
    if "rope_freqs.weight" in file.tensors:
        scaling = _llama3_scaling(config, _tensor(file, "rope_freqs.weight"), file)
    elif "rope_factors_long.weight" in file.tensors:
        kind = "longrope"
        scaling = {
            f"{length}_factor": _vector(_tensor(file, f"rope_factors_{length}.weight"), file)
            for length in ("short", "long")
        }
    elif kind != "none":
        scaling = {"factor": file.number(key("scaling.factor"))}
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = original
            for beta in ("beta_fast", "beta_slow"):
                if key(f"scaling.yarn_{beta}") in file.keys:
                    scaling[beta] = file.number(key(f"scaling.yarn_{beta}"))
    if scaling is None:
        return
    kind = scaling.get("rope_type", kind)
    if kind not in family.scalings:
        raise ModelError(
            f"{file.path}: scales positions by {kind!r}, which mlx-lm does not for {config['model_type']}"
        )
    config["rope_scaling"] = {**scaling, "rope_type": kind, "type": kind}


def _vector(tensor: Tensor, file: GGUFFile) -> list[float]:
    if tensor.kind != gguf.GGMLQuantizationType.F32 or len(tensor.shape) != 1:
        raise ModelError(f"{file.path}: {tensor.name} is not a list of float32 numbers")
    # The shortest decimals that name these float32 numbers.
    return [float(str(x)) for x in tensor.data.view(np.float32)[0]]


def _llama3_scaling(config: dict, tensor: Tensor, file: GGUFFile) -> dict | None:
    """Llama 3's scaling from its frequency divisors; None where all are 1.

    Between both bounds, s = (1 / divisor - 1 / factor) / (1 - 1 / factor) equals (context /
    wavelength - low) / (high - low). Meta's low = 1 and high = 4 are taken, and the context found is
    held against the divisors, so other bounds are refused and not guessed.
    """
    divisors = np.array(_vector(tensor, file))
    factor = divisors.max()
    if factor == 1.0 == divisors.min():
        return None
    half = len(divisors)
    wavelengths = 2 * np.pi * config["rope_theta"] ** (np.arange(half) / half)
    low, high = 1.0, 4.0
    ramp = (divisors > 1 + 1e-6) & (divisors < factor * (1 - 1e-6))
    context = 8192
    if ramp.any() and factor > 1:
        share = (1 / divisors[ramp] - 1 / factor) / (1 - 1 / factor)
        context = round(float(np.median((share * (high - low) + low) * wavelengths[ramp])))
    scaling = {
        "rope_type": "llama3",
        "factor": float(factor),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
    again = llama3_factors({**config, "rope_scaling": scaling})
    if again.shape != divisors.shape or not np.allclose(again, divisors, rtol=1e-5):
        raise ModelError(f"{file.path}: rope_freqs.weight is not Llama 3's scaling of positions")
    return scaling


def place_tensors(file: GGUFFile, config: dict) -> list[Place]:
    """Every parameter of the model with its tensor, in the file's order.

    Raises `ModelError` with what is missing, misshapen or left over.
    """
    model, family = _one_layer(config, file), FAMILIES[config["model_type"]]
    names = gguf.get_tensor_name_map(family.architecture, 1)
    left = {name for name in file.tensors if not name.startswith(("rope_f", *_VISION))}
    heads = rotated_heads(family, config)
    places, problems = [], []
    for path, parameter in tree_flatten(model.parameters()):
        if path == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        layer = path.split(".")[-2]
        for own_path, name in _in_all_layers(path, gguf_name(names, path) or path, config):
            tensor = file.tensors.get(name)
            left.discard(name)
            if tensor is None:
                problems.append(f"{name} is missing")
            elif tensor.shape != tuple(parameter.shape):
                problems.append(f"{name} is {tensor.shape} instead of {tuple(parameter.shape)}")
            else:
                places.append(
                    Place(
                        own_path,
                        tensor,
                        heads.get(layer),
                        family.norm_offset if layer.endswith("norm") else 0.0,
                        path.endswith(".weight") and _packable(model, path),
                    )
                )
    problems += [f"{name} has no place in the model" for name in sorted(left)]
    if problems:
        shown = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        raise ModelError(f"{file.path}: its tensors do not make a {config['model_type']}: {shown}")
    if any(name.startswith(_VISION) for name in file.tensors):
        log.warning("%s: its vision part is left out; the text model is imported", file.path.name)
    order = {name: i for i, name in enumerate(file.tensors)}
    return sorted(places, key=lambda place: order[place.tensor.name])


def _one_layer(config: dict, file: GGUFFile) -> nn.Module:
    """The model with a single layer: all are of one shape, and nothing is computed of it."""
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    try:
        return module.Model(module.ModelArgs.from_dict({**config, "num_hidden_layers": 1}))
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise ModelError(f"{file.path}: its keys do not make a model: {error}") from None


def _in_all_layers(path: str, name: str, config: dict) -> Iterator[tuple[str, str]]:
    if ".layers.0." not in path:
        yield path, name
        return
    for i in range(config["num_hidden_layers"]):
        yield path.replace(".layers.0.", f".layers.{i}."), name.replace("blk.0.", f"blk.{i}.")


def _packable(model: nn.Module, path: str) -> bool:
    module = model
    for part in path.split(".")[:-1]:
        module = module[int(part)] if part.isdigit() else module[part]
    return hasattr(module, "to_quantized")


def _tensor(file: GGUFFile, name: str) -> Tensor:
    if name not in file.tensors:
        raise ModelError(f"{file.path}: has no tensor {name}")
    return file.tensors[name]


def split_halves(weight: mx.array, heads: int) -> mx.array:
    """Rows from pairs, as llama.cpp rotates them, to "all first halves, all second halves" of a head;
    the inverse of what the GGUF export does."""
    rest = weight.shape[1:]
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, *rest).swapaxes(1, 2).reshape(weight.shape)


def shares_of_kinds(file: GGUFFile) -> dict[gguf.GGMLQuantizationType, int]:
    """How many weights of matrices there are of each type."""
    counts: dict = {}
    for tensor in file.tensors.values():
        if len(tensor.shape) > 1:
            counts[tensor.kind] = counts.get(tensor.kind, 0) + math.prod(tensor.shape)
    return counts
