"""The files of a model folder, checked before anything else reads them.

Headers of safetensors are held against the size of their file, as in the format's specification;
pickle files, which run code when they are opened, are never read.
"""

import json
import math
from pathlib import Path

from mlx_align.errors import ModelError

# The specification's bound.
MOST_HEADER_BYTES = 100_000_000
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises `ModelError` that names the file."""
    check_regular(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        # Halves of characters, which JSON can spell, could not be written again.
        json.dumps(value, ensure_ascii=False).encode()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object")
    return value


def check_regular(path: Path) -> None:
    """Raise `ModelError` for what can be opened but has no end: a pipe, or a device."""
    if path.exists() and not path.is_file():
        raise ModelError(f"{path}: not a file")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, each with a sound header."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        pickles = [file.name for pattern in _PICKLES for file in sorted(folder.glob(pattern))]
        if pickles:
            raise ModelError(
                f"{folder}: has its weights only as {pickles[0]}, a kind of file that can run code when "
                "it is opened and is never read here; take safetensors (many models on the Hub have them "
                "on a branch or in a conversion), or save it again with transformers where you trust it"
            )
        raise ModelError(f"{folder}: has no weights (model*.safetensors)")
    for file in files:
        check_safetensors(file)
    return files


def check_safetensors(path: Path) -> None:
    """Raise `ModelError` unless every tensor of a file lies inside it, apart from all others."""

    def check(sound, what):
        if not sound:
            raise ModelError(f"{path}: damaged safetensors file: {what}")

    check_regular(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            fits = 8 + length <= size and length <= MOST_HEADER_BYTES
            check(size > 8 and fits, f"a header of {length} bytes in a file of {size}")
            text = file.read(length)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        header = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: damaged safetensors file: its header: {error}") from None
    check(isinstance(header, dict), "its header is no object")
    header.pop("__metadata__", None)
    spans = []
    for name, info in header.items():
        info = info if isinstance(info, dict) else {}
        kind, shape, offsets = (info.get(key) for key in ("dtype", "shape", "data_offsets"))
        check(isinstance(kind, str) and kind in _SIZES, f"{name!r} has the unknown type {kind!r}")
        check(_are_sizes(shape), f"{name!r} has no shape")
        check(_are_sizes(offsets) and len(offsets) == 2, f"{name!r} has no place")
        fits = offsets[1] - offsets[0] == math.prod(shape) * _SIZES[kind]
        check(fits, f"{name!r} has the shape {shape} and {offsets[1] - offsets[0]} bytes")
        spans.append((*offsets, name))
    end, previous = 0, None
    for start, stop, name in sorted(spans):
        check(start >= end, f"{previous!r} and {name!r} overlap")
        end, previous = stop, name
    check(8 + length + end <= size, f"{previous!r} reaches past its end; was it copied whole?")


def _are_sizes(values) -> bool:
    """Whether these are a few numbers of 0 or more, as shapes and places are."""
    return (
        isinstance(values, list)
        and len(values) <= 16
        and all(type(v) is int and 0 <= v < 2**63 for v in values)
    )


def _without_repeats(pairs) -> dict:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name appears twice")
    return values
