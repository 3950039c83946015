"""Adapters without their base, for mlx-lm, PEFT and llama.cpp.

An update of a layer is `scale * (x A) B` everywhere; the programs differ in names, in which way the
arrays lie, and in how they write the scale. What a format cannot hold is refused, and the advice
is to merge.
"""

import logging
import re
import shutil
from pathlib import Path

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGUFWriter

from mlx_align.demo import DEMO
from mlx_align.errors import ExportError, SettingsError
from mlx_align.export.architectures import (
    find_family,
    gguf_name,
    interleave,
    language_config,
    language_model,
    rotated_heads,
)
from mlx_align.export.folder import copy_tokenizer
from mlx_align.export.quants import quantise_tensor
from mlx_align.export.recipe import FILE_TYPES
from mlx_align.files import new_file, new_folder, write_json
from mlx_align.model.adapter import (
    CONFIG,
    WEIGHTS,
    Adapter,
    read_adapter_config,
    save_weights,
    settings_of_adapter,
)
from mlx_align.model.load import DTYPES, LoadedModel
from mlx_align.model.open import TEMPLATE, find_template_file

log = logging.getLogger("mlx_align")

# What PEFT calls things in its adapter_model.safetensors.
PEFT_WEIGHTS, PEFT_PREFIX = "adapter_model.safetensors", "base_model.model."
LINEAR_PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
EMBEDDING_PARTS = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}
GGUF_TYPES = ("f32", "f16", "bf16")
# Embedding and head in the models of `FAMILIES`; a tied model has no head of its own.
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def export_peft(
    loaded: LoadedModel,
    adapter: Adapter,
    source: Path,
    output: Path,
    *,
    base_name: str | None = None,
    dtype: str | None = None,
) -> Path:
    """Write the adapter of the folder `source` as one for PEFT.

    `base_name` is the base in transformers' format, where that is not the model that was trained;
    `dtype` is the type of the arrays, by default the one they have. The base of a reward model is
    loaded by `AutoModelForSequenceClassification` with `num_labels=1` and a `pad_token_id`.
    """
    if "text_config" in loaded.config:
        _refuse(loaded, "is on a part of a multimodal model, which has other names in transformers")
    find_family(loaded, "a PEFT adapter")
    if base_name is None and loaded.quantised:
        log.warning(
            "%s is quantised for MLX, which transformers cannot read: name the model it was made from "
            "with --base-name",
            loaded.name,
        )
    layers = _updates(loaded, adapter)
    weights = _peft_weights(loaded.model, layers)
    targets = layers.keys() | {HEAD for name in weights if name.startswith(f"{HEAD}.")}
    settings, reward = settings_of_adapter(source), "score" in loaded.model
    alpha = settings["lora_scale"] * settings["lora_rank"]
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if reward else "CAUSAL_LM",
        "base_model_name_or_path": base_name or _base(loaded),
        "inference_mode": True,
        "r": settings["lora_rank"],
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": settings["lora_dropout"],
        "use_dora": adapter.kind == "dora",
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": ["score"] if reward else None,
        **_targets(loaded.model, targets),
    }
    with new_folder(output) as folder:
        named = {PEFT_PREFIX + name: _cast(array, dtype) for name, array in weights.items()}
        save_weights(folder / PEFT_WEIGHTS, named, {"format": "pt"})
        write_json(folder / CONFIG, config)
        copy_tokenizer(loaded, folder)
    return output


def export_mlx_adapter(
    loaded: LoadedModel,
    adapter: Adapter,
    source: Path,
    output: Path,
    *,
    base_name: str | None = None,
    dtype: str | None = None,
) -> Path:
    """Write the adapter of the folder `source` as one for `mlx_lm.generate --adapter-path`.

    `base_name` is the base elsewhere, where that is not the model that was trained.
    """
    config = read_adapter_config(source)
    if base_name is not None:
        config["model"] = base_name
    weights = {name: _cast(array, dtype) for name, array in adapter.weights().items()}
    template = find_template_file(source)
    with new_folder(output) as folder:
        save_weights(folder / WEIGHTS, weights)
        write_json(folder / CONFIG, config)
        if template is not None:
            shutil.copyfile(template, folder / TEMPLATE)
    return output


def export_gguf_adapter(
    loaded: LoadedModel, adapter: Adapter, output: Path, *, quantise: str = "f32"
) -> Path:
    """Write the adapter as a GGUF file for llama.cpp's --lora and Ollama's ADAPTER.

    It goes on a GGUF of the same base, quantised or not. `quantise` is one of `GGUF_TYPES`. The layout
    is that of llama.cpp's llama-adapter.cpp: A [r, in] and B [out, r], but [V, r] and [D, r] for the
    embedding; the factor on an update is alpha / r.
    """
    if quantise not in GGUF_TYPES:
        raise SettingsError(
            f"quantize: an adapter can be written as {', '.join(GGUF_TYPES)}, not as {quantise}"
        )
    family, config = find_family(loaded, "a GGUF adapter"), language_config(loaded)
    names = gguf.get_tensor_name_map(family.architecture, config["num_hidden_layers"])
    rotated, tensor_type = rotated_heads(family, config), FILE_TYPES[quantise][1]
    layers = _updates(loaded, adapter)
    tensors = {}
    for name, layer in layers.items():
        target = gguf_name(names, name)
        if target is None:
            _refuse(loaded, f"has an update of {name}, for which GGUF has no place")
        if "m" in layer:
            _refuse(loaded, "wears DoRA magnitudes, which llama.cpp does not know")
        if "embedding" in layer and HEAD not in language_model(loaded):
            _refuse(loaded, "has an update of its embedding, which is its head too")
        a, b = layer.lora_a, layer.lora_b.T
        heads = rotated.get(name.rsplit(".", 1)[-1])
        tensors[f"{target}.weight.lora_a"] = a if "embedding" in layer else a.T
        tensors[f"{target}.weight.lora_b"] = b if heads is None else interleave(b, heads)
    layer = next(iter(layers.values()))
    with new_file(output) as temporary:
        writer = GGUFWriter(str(temporary), gguf.MODEL_ARCH_NAMES[family.architecture])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(Path(loaded.name).name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, layer.scale * layer.lora_b.shape[0])
        for name, array in tensors.items():
            values = quantise_tensor(name, np.asarray(array.astype(mx.float32)), tensor_type)
            writer.add_tensor(name, values, raw_dtype=tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return output


def _updates(loaded, adapter) -> dict[str, nn.Module]:
    """The layers with a low-rank update, by name."""
    if adapter.kind in ("full", "head"):
        _refuse(loaded, f"was trained with fine_tune: {adapter.kind}, so it is no low-rank update")
    layers = {n: module for n, module in loaded.model.named_modules() if "lora_a" in module}
    for name in sorted(layers):
        if layers[name].lora_a.ndim != 2:
            _refuse(loaded, f"has an update of stacked experts ({name}), which only MLX stacks so")
    return layers


def _refuse(loaded, why):
    raise ExportError(
        f"{loaded.name}: the adapter on it {why}. Write the merged model instead (without "
        "--adapter-only; --to hf for transformers)"
    )


def _peft_weights(model, layers) -> dict[str, mx.array]:
    """The arrays by PEFT's names, without the prefix."""
    weights = {}
    for name, layer in layers.items():
        parts = EMBEDDING_PARTS if "embedding" in layer else LINEAR_PARTS
        for ours, theirs in parts.items():
            if ours in layer:
                weights[f"{name}.{theirs}"] = layer[ours].T
    if "score" in model:
        weights["score.weight"] = model.score.weight
    elif EMBEDDING in layers and HEAD not in model:
        # One matrix in MLX: its update is PEFT's for both places where the matrix is used.
        update = layers[EMBEDDING]
        weights[f"{HEAD}.lora_A.weight"] = update.lora_b
        weights[f"{HEAD}.lora_B.weight"] = update.lora_a
        log.warning(
            "PEFT wears the update of an embedding that is the head too as it should, but merges it "
            "twice; where the merged model is wanted, take --to hf"
        )
    return weights


def _cast(array: mx.array, dtype: str | None) -> mx.array:
    return array if dtype is None else array.astype(DTYPES[dtype])


def _base(loaded) -> str:
    """The base as PEFT is to find it: a Hub id, or where the model lies here."""
    local = loaded.name == DEMO or Path(loaded.name).expanduser().exists()
    return str(loaded.path.resolve()) if local else loaded.name


def _targets(model: nn.Module, names: set[str]) -> dict:
    """The settings with which PEFT finds exactly the modules of these names.

    Last parts of names where that and the numbers of blocks suffice, as is usual; else whole names.
    """
    blocks = {name: int(m[1]) for name in names if (m := _IN_BLOCK.match(name))}
    parts = sorted({name.rsplit(".", 1)[-1] for name in blocks})
    numbers = sorted(set(blocks.values()))
    caught = {
        path
        for path, _ in model.named_modules()
        if path.rsplit(".", 1)[-1] in parts
        and (m := _IN_BLOCK.match(path))
        and int(m[1]) in numbers
    }
    if caught != blocks.keys():
        return {"target_modules": sorted(names)}
    some = len(numbers) < len(model.layers)
    return {
        "target_modules": parts + sorted(names - caught),
        "layers_to_transform": numbers if some and numbers else None,
        "layers_pattern": "layers" if some and numbers else None,
    }


_IN_BLOCK = re.compile(r"model\.layers\.(\d+)\.")
