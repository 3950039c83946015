"""Fused model folders, for mlx-lm and for Hugging Face transformers.

They differ in the names of experts, and in that transformers gets the language model of a multimodal
one by itself. The tokenizer's files are copied as they are, and so is the licence.
"""

import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import mlx.core as mx

from mlx_align.data.template import added_tokens
from mlx_align.errors import ExportError
from mlx_align.export.architectures import (
    FAMILIES,
    Family,
    find_family,
    hugging_face_names,
    hugging_face_tensors,
    language_model,
)
from mlx_align.export.fuse import Packed, fused_tensors
from mlx_align.export.mlx_quants import Quantiser
from mlx_align.files import new_folder, write_json
from mlx_align.model.config import normalise_config
from mlx_align.model.files import read_json, weight_files
from mlx_align.model.load import DTYPES, LoadedModel

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
    "added_tokens.json", "vocab.json", "merges.txt", "*.tiktoken", "chat_template.jinja",
)  # fmt: skip
LICENCE_FILES = re.compile(r"(licen[cs]e|notice|use_policy).*", re.IGNORECASE)
# What is held in memory until a file is written.
SHARD_BYTES = 2**30
# What the config of a multimodal model says for its language model too.
_SHARED = ("torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id")


def export_folder(
    loaded: LoadedModel,
    output: Path,
    *,
    flavour: str,
    dtype: str | None,
    bits: int | None = None,
) -> Path:
    """Write the model with its adapter merged in as a folder; `flavour` is "mlx" or "hf".

    `dtype` names the type of the weights; by default the one they are stored in. With `bits` MLX's are
    quantised.
    """
    kind = DTYPES[dtype] if dtype else loaded.dtype
    config = fused_config(loaded, kind)
    if flavour == "hf":
        family = find_family(loaded, "a Hugging Face folder")
        tensors = hugging_face_tensors(loaded, family)
        config = _transformers_config(loaded, family, config)
    elif bits is None:
        tensors = fused_tensors(loaded.model)
    else:
        quantiser = Quantiser(loaded, bits, kind)
        tensors = quantiser.arrays(fused_tensors(loaded.model, packed=True))
        # mlx-lm reads the one, what looks for Hugging Face's spelling the other.
        config |= dict.fromkeys(("quantization", "quantization_config"), quantiser.config)
    with new_folder(output) as folder:
        write_shards(folder, _cast(tensors, kind), "pt" if flavour == "hf" else "mlx")
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", generation_config(loaded))
        copy_tokenizer(loaded, folder)
        for file in licence_files(loaded.path):
            shutil.copyfile(file, folder / file.name)
    return output


def licence_files(folder: Path) -> list[Path]:
    """What a model's folder says of how it may be used, the licence itself first."""
    return sorted(f for f in folder.iterdir() if LICENCE_FILES.fullmatch(f.name) and f.is_file())


def written_matrices(
    loaded: LoadedModel, folder: Path
) -> Iterator[tuple[str, Callable[[], mx.array]]]:
    """(name, function that reads it) of every matrix of a model in a folder by `export_folder`.

    In float32; names and shapes are the model's own, so those of experts are stacked.
    """
    config = read_json(folder / "config.json")
    quantisation = config.get("quantization", {})
    files = {name: file for file in weight_files(folder) for name in mx.load(str(file))}

    def stored(name: str) -> mx.array:
        return mx.load(str(files[name]))[name]

    def read(name: str) -> mx.array:
        layer = name.removesuffix(".weight")
        if f"{layer}.scales" not in files:
            return stored(name).astype(mx.float32)
        parts = (stored(f"{layer}.{part}") for part in ("weight", "scales", "biases"))
        size = quantisation.get(layer, quantisation)
        return Packed(*parts, size["bits"], size["group_size"]).dense()

    def read_all(names: list[str], shape: tuple[int, ...]) -> mx.array:
        return mx.stack([read(name) for name in names]).reshape(shape)

    for name, array in fused_tensors(loaded.model):
        if array.ndim > 1:
            own = [name]
            if name not in files:
                own = hugging_face_names(FAMILIES[config["model_type"]], name, len(array))
            yield name, partial(read_all, own, array.shape)


def _cast(tensors, dtype) -> Iterator[tuple[str, mx.array]]:
    for name, array in tensors:
        floating = mx.issubdtype(array.dtype, mx.floating)
        yield name, array.astype(dtype) if floating else array


def write_shards(folder: Path, tensors: Iterable[tuple[str, mx.array]], format_name: str) -> None:
    """Write safetensors of at most 1 GB as they fill; one file has no number in its name."""
    shards, shard, size = [], {}, 0

    def flush():
        nonlocal shard, size
        if shard:
            name = f"shard-{len(shards)}.safetensors"
            mx.save_safetensors(str(folder / name), shard, {"format": format_name})
            shards.append((name, list(shard), size))
            shard, size = {}, 0

    for name, array in tensors:
        mx.eval(array)
        if size + array.nbytes > SHARD_BYTES:
            flush()
        shard[name] = array
        size += array.nbytes
    flush()
    if len(shards) == 1:
        (folder / shards[0][0]).rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, (name, keys, _) in enumerate(shards, 1):
        final = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        (folder / name).rename(folder / final)
        weight_map |= dict.fromkeys(keys, final)
    total = sum(size for _, _, size in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def fused_config(loaded: LoadedModel, dtype: mx.Dtype) -> dict:
    """The config of the fused model: not quantised, in old and new spelling."""
    config = normalise_config(loaded.config)
    for key in ("quantization", "quantization_config", "_name_or_path"):
        config.pop(key, None)
    name = str(dtype).removeprefix("mlx.core.")
    return {**config, "torch_dtype": name, "dtype": name}


def _transformers_config(loaded: LoadedModel, family: Family, config: dict) -> dict:
    """What transformers reads: a language model by itself, of a class that it has."""
    if "text_config" in config:
        shared = {key: config[key] for key in _SHARED if key in config}
        config = {**config["text_config"], **shared}
    # Where these are not said, each class of transformers has its own idea of them.
    config |= {
        "vocab_size": loaded.vocabulary,
        "tie_word_embeddings": "lm_head" not in language_model(loaded),
    }
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config.setdefault(token, getattr(loaded.tokenizer, token, None))
    config["architectures"] = [f"{family.stem}ForCausalLM"]
    return {**config, **(_classifier(loaded, family) if "score" in loaded.model else {})}


def _classifier(loaded: LoadedModel, family: Family) -> dict:
    """What the config of a reward model says besides: transformers' sequence classification."""
    # transformers reads the score off the last token that is not padding, so padding must not be
    # what a completion ends with.
    ends, tokenizer = loaded.tokenizer.eos_token_ids, loaded.tokenizer
    choices = [tokenizer.pad_token_id, tokenizer.unk_token_id, *sorted(added_tokens(tokenizer))]
    pad = next((t for t in choices if t is not None and t not in ends), None)
    if pad is None:
        raise ExportError(
            f"{loaded.name}: its tokenizer has no token for padding that does not also end a text, and "
            "transformers would read scores off the wrong token"
        )
    return {
        "architectures": [f"{family.classifier or family.stem}ForSequenceClassification"],
        "num_labels": 1,
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "pad_token_id": pad,
    }


def generation_config(loaded: LoadedModel) -> dict:
    """The base's generation settings, ending at every id that the model was trained to end with."""
    path = loaded.path / "generation_config.json"
    config = read_json(path) if path.is_file() else {}
    ends = end_ids(loaded)
    if ends:
        config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    for key in ("bos_token_id", "pad_token_id"):
        if key not in config and loaded.config.get(key) is not None:
            config[key] = loaded.config[key]
    return config


def end_ids(loaded: LoadedModel) -> list[int]:
    """The ids that end a completion, the tokenizer's own first."""
    ends = sorted(loaded.tokenizer.eos_token_ids)
    own = loaded.tokenizer.eos_token_id
    return [own, *(e for e in ends if e != own)] if own in ends else ends


def copy_tokenizer(loaded: LoadedModel, folder: Path) -> None:
    """The tokenizer's files, with the chat template both where new and where old readers look."""
    for pattern in TOKENIZER_FILES:
        for file in loaded.path.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    if not (folder / "tokenizer.json").exists():
        backend = getattr(loaded.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    if getattr(loaded.tokenizer, "cut_as_saved", False):
        # The class that takes tokenizer.json as it is.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    source = loaded.template.source if loaded.template is not None else None
    if source and "score" in loaded.model:
        # Training ends a text with the token that ends a turn and reads the score there; many templates
        # put a newline behind it.
        source = (
            "{% set rendered %}" + source + "{% endset %}"
            "{{ rendered if add_generation_prompt else rendered.rstrip() }}"
        )
    if source:
        (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
        config["chat_template"] = source
    if path.exists():
        write_json(path, config)
