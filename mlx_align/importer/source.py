"""Finding out what a user names: a GGUF file, a model of Ollama or LM Studio, or a folder.

Nothing is downloaded but models of the Hub, and nothing here reads weights.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from mlx_align.errors import ExportError, ModelError
from mlx_align.export.lm_studio import models_folder
from mlx_align.importer.gguf_file import PART
from mlx_align.model.files import read_json
from mlx_align.model.load import resolve_model

OLLAMA, LM_STUDIO = "ollama:", "lmstudio:"
GGUF, FOLDER, PEFT = "gguf", "folder", "peft"
_LAYER = "application/vnd.ollama.image."


@dataclass(frozen=True)
class Source:
    """What there is to import: `kind` is GGUF (a file), FOLDER (config.json with safetensors) or PEFT (an
    adapter). `layers` are the files that Ollama keeps beside a model's weights, by their kind."""

    kind: str
    path: Path
    name: str
    layers: dict[str, list[Path]] = field(default_factory=dict)


def find_source(name: str | Path) -> Source:
    """What `name` is. Raises `ModelError` where there is nothing that can be imported."""
    text = str(name)
    if text.startswith(OLLAMA):
        return _find_in_ollama(text.removeprefix(OLLAMA))
    if text.startswith(LM_STUDIO):
        return _find_at(_lm_studio_path(text.removeprefix(LM_STUDIO)))
    path = Path(text).expanduser()
    if path.exists():
        return _find_at(path)
    return Source(FOLDER, resolve_model(text), plain_name(text.rpartition("/")[2]))


def _find_at(path: Path) -> Source:
    if path.is_file():
        part = PART.fullmatch(path.name)
        return Source(GGUF, path, plain_name(part[1] if part else path.stem))
    name = plain_name(path.resolve().name)
    if (path / "config.json").is_file():
        return Source(FOLDER, path, name)
    if (path / "adapter_config.json").is_file():
        if "peft_type" in read_json(path / "adapter_config.json"):
            return Source(PEFT, path, name)
        raise ModelError(f"{path}: is a run or an adapter of MLX; mlx-align export takes it")
    # The vision part of a model lies in a file of its own; of a split model the first file stands for all.
    models: dict[str, Path] = {}
    for file in sorted(path.glob("*.gguf")):
        part = PART.fullmatch(file.name)
        if not file.name.startswith("mmproj"):
            models.setdefault(part[1] if part else file.name, file)
    files = list(models.values())
    if not files:
        raise ModelError(
            f"{path}: neither a model folder (no config.json) nor one with a GGUF file"
        )
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ModelError(f"{path}: has several GGUF files; name one of them: {names}")
    return _find_at(files[0])


def plain_name(name: str) -> str:
    """A name as that of one folder: letters, digits, dots and dashes, and no way out of its parent."""
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "model"


def _lm_studio_path(name: str) -> Path:
    """A folder or file in LM Studio's models: publisher/model, or publisher/model/file."""
    parts = _parts(name, f"{LM_STUDIO}publisher/model")
    try:
        root = models_folder()
    except ExportError:
        raise ModelError(f"{LM_STUDIO}{name}: LM Studio's folder ~/.lmstudio is not here") from None
    path = root / Path(*parts)
    if not path.exists():
        raise ModelError(f"{LM_STUDIO}{name}: not among the models in {root}")
    return path


def _find_in_ollama(name: str) -> Source:
    """A model of the local store, from [host/][namespace/]model[:tag]."""
    root = Path(os.environ.get("OLLAMA_MODELS") or "~/.ollama/models").expanduser()
    # A colon before a slash is that of a host's port.
    path, tag = re.fullmatch(r"(.*?)(?::([^/:]*))?", name, re.DOTALL).groups()
    *parts, tag = _parts(f"{path}/{tag or 'latest'}", f"{OLLAMA}llama3.2:1b")
    parts = ["registry.ollama.ai", "library"][: max(0, 3 - len(parts))] + parts
    manifest = root / "manifests" / Path(*parts, tag)
    if not manifest.is_file():
        raise ModelError(
            f"{OLLAMA}{name}: not in Ollama's store {root}; fetch it with: ollama pull {name}, or set "
            "OLLAMA_MODELS to where the store is"
        )
    layers: dict[str, list[Path]] = {}
    found = read_json(manifest).get("layers")
    for layer in found if isinstance(found, list) else []:
        layer = layer if isinstance(layer, dict) else {}
        digest = re.fullmatch(r"sha256:([0-9a-f]{64})", str(layer.get("digest")))
        if digest is None:
            raise ModelError(f"{manifest}: names a layer without a digest")
        blob = root / "blobs" / f"sha256-{digest[1]}"
        if not blob.is_file() or blob.stat().st_size != layer.get("size"):
            raise ModelError(f"{blob}: is not there as a whole; fetch it with: ollama pull {name}")
        layers.setdefault(str(layer.get("mediaType")).removeprefix(_LAYER), []).append(blob)
    if "model" not in layers:
        raise ModelError(
            f"{OLLAMA}{name}: holds no GGUF file (it may be in Ollama's MLX format); take the model's "
            "safetensors from the Hub"
        )
    if len(layers["model"]) > 1:
        raise ModelError(
            f"{OLLAMA}{name}: consists of {len(layers['model'])} files; import the original GGUF files"
        )
    if "adapter" in layers:
        raise ModelError(
            f"{OLLAMA}{name}: wears an adapter, without which it would be another model; import its base, "
            "and the adapter's safetensors as a PEFT adapter"
        )
    return Source(GGUF, layers["model"][0], plain_name(name), layers)


def _parts(name: str, example: str) -> list[str]:
    """The parts of a name, each that of one file or folder."""
    parts = name.split("/")
    if not all(re.fullmatch(r"\w[\w.+@-]*(:\d+)?", part) for part in parts):
        raise ModelError(f"{name}: not a name; one is written like {example}")
    return parts
