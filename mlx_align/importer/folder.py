"""Model folders for MLX, from a GGUF file or from a folder of Hugging Face's or MLX's.

A folder gets its name only when it is complete and mlx-lm can load it.
"""

import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_align.errors import ModelError
from mlx_align.export.folder import (
    TOKENIZER_FILES,
    export_folder,
    licence_files,
    write_shards,
)
from mlx_align.files import new_folder, write_json
from mlx_align.importer.architecture import (
    Place,
    make_config,
    place_tensors,
    shares_of_kinds,
    split_halves,
)
from mlx_align.importer.blocks import GROUP, float_type, is_plain, to_floats, to_packed
from mlx_align.importer.gguf_file import read_model
from mlx_align.importer.source import Source
from mlx_align.importer.tokenizer import ImportedTokenizer, read_tokenizer
from mlx_align.model.config import read_config
from mlx_align.model.files import read_json, weight_files
from mlx_align.model.load import DTYPES, STORED, load_model, load_tokenizer, load_weights

log = logging.getLogger("mlx_align")

INDEX = "model.safetensors.index.json"


def import_gguf(source: Source, output: Path, dtype: str | None = None) -> Path:
    """Write the model of a GGUF file, or of several, as a folder; returns it.

    Quantised matrices stay so, in MLX's packing; with `dtype` all weights become floats of that type.
    Raises `ModelError` where the file is damaged or its model is not one that MLX computes alike.
    """
    file = read_model(source.path)
    config = make_config(file)
    tokenizer = read_tokenizer(file)
    size = tokenizer.tokenizer.get_vocab_size()
    if size != config["vocab_size"]:
        raise ModelError(f"{file.path}: has {size} tokens and {config['vocab_size']} embeddings")
    places = place_tensors(file, config)
    kinds = shares_of_kinds(file)
    conversion = Conversion(DTYPES[dtype] if dtype else None, float_type(max(kinds, key=kinds.get)))
    with new_folder(output) as folder:
        try:
            write_shards(folder, conversion.tensors(places), "mlx")
        except ModelError as error:
            raise ModelError(f"{file.path}: {error}") from None
        name = _name(conversion.floats)
        ids = {
            f"{k}_token_id": v for k, v in tokenizer.special.items() if k in ("bos", "eos", "pad")
        }
        config = {**config, **ids, "torch_dtype": name, "dtype": name, **conversion.quantization()}
        write_json(folder / "config.json", config)
        write_tokenizer(folder, tokenizer)
        write_json(folder / "generation_config.json", _generation(source, tokenizer, ids))
        _look_at_layers(source, tokenizer, folder)
        _check(folder)
    conversion.report()
    return output


class Conversion:
    """Turns placed tensors into MLX's arrays, and keeps account of what became of them.

    `floats` is the type of all that is not packed: `dtype`, or the one that suits the file's matrices.
    Without `dtype` what that type cannot hold exactly stays float32.
    """

    def __init__(self, dtype: mx.Dtype | None, floats: mx.Dtype):
        self._dtype = dtype
        self.floats = dtype or floats
        self._bits: dict[str, int] = {}
        self._done: Counter = Counter()
        self._rounding: dict[str, np.ndarray] = {}

    def tensors(self, places: list[Place]) -> Iterator[tuple[str, mx.array]]:
        """(parameter's path, array) of each place."""
        for place in places:
            kind = place.tensor.kind
            if self._dtype is None and place.packable and not is_plain(kind):
                packed = to_packed(place.tensor)
                arrays = {f"{place.module}.{name}": a for name, a in packed.arrays.items()}
                self._bits[place.module] = packed.bits
                how = f"packed in {packed.bits} bits, exactly"
                if packed.rounding is not None:
                    how = f"rounded to {packed.bits} bits"
                    self._rounding[kind.name] = self._rounding.get(kind.name, 0) + packed.rounding
            else:
                array, how = self._floats_of(place)
                arrays = {place.path: array}
            self._done[kind.name, how] += 1
            for path, array in arrays.items():
                yield path, split_halves(array, place.heads) if place.heads else array

    def _floats_of(self, place: Place) -> tuple[mx.array, str]:
        tensor, offset = place.tensor, place.offset
        as_stored = is_plain(tensor.kind) and float_type(tensor.kind) == self.floats
        if not offset and (as_stored or self._dtype is not None):
            array = to_floats(tensor, self.floats)
        else:
            stored = to_floats(tensor, mx.float32)
            array = (stored - offset).astype(self.floats)
            exact = (array.astype(mx.float32) + offset == stored).all()
            if self._dtype is None and not exact:
                array = stored - offset
        verb = "stored as" if as_stored or self._dtype is None else "converted to"
        return array, f"{verb} {_name(array.dtype)}"

    def quantization(self) -> dict:
        """What the config says of the packed layers: the most common packing, and the others by layer."""
        if not self._bits:
            return {}
        usual = Counter(self._bits.values()).most_common(1)[0][0]
        others = {
            path: {"group_size": GROUP, "bits": bits, "mode": "affine"}
            for path, bits in self._bits.items()
            if bits != usual
        }
        return {"quantization": {"group_size": GROUP, "bits": usual, "mode": "affine", **others}}

    def report(self) -> None:
        """Say what became of each type."""
        for (kind, how), count in sorted(self._done.items()):
            line = f"{kind}: {count} tensors {how}"
            if how.endswith("bits") and kind in self._rounding:
                changed, whole = self._rounding[kind]
                line += f" (root mean square error {(changed / whole) ** 0.5:.2%} of the weights')"
            log.info(line)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def write_tokenizer(folder: Path, tokenizer: ImportedTokenizer) -> None:
    """Write the files of a tokenizer and its chat template."""
    tokenizer.tokenizer.save(str(folder / "tokenizer.json"))
    template = tokenizer.template
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    extra = {"chat_template": template} if template else {}
    write_json(folder / "tokenizer_config.json", {**tokenizer.config, **extra})


def _generation(source: Source, tokenizer: ImportedTokenizer, ids: dict) -> dict:
    """The generation_config.json; Ollama's parameters among those that it knows."""
    parameters = {}
    for path in source.layers.get("params", []):
        parameters |= read_json(path)
    stops = parameters.get("stop")
    added = {t.content: i for i, t in tokenizer.tokenizer.get_added_tokens_decoder().items()}
    stops = [added[s] for s in added if isinstance(stops, list) and s in stops]
    ends = list(dict.fromkeys([*tokenizer.ends, *stops]))
    kept = {
        name: parameters[name]
        for name in ("temperature", "top_p", "top_k")
        if isinstance(parameters.get(name), int | float)
    }
    return {**ids, **kept, **({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {})}


def _look_at_layers(source: Source, tokenizer: ImportedTokenizer, folder: Path) -> None:
    """What a model says besides its weights and tokenizer, and what is to be done about it."""
    if tokenizer.template is None:
        own = source.layers.get("template")
        log.warning(
            "the file has no chat template in Jinja%s. Train with --chat-template chatml, or with a Jinja "
            "file from the page of the original model on the Hub",
            f"; Ollama's own, in another language, is {own[0]}" if own else "",
        )
    for path in source.layers.get("system", []):
        text = path.read_text(encoding="utf-8", errors="replace")
        log.warning("Ollama gives this model a system prompt, which is yours to give now: %s", text)
    licences = source.layers.get("license", [])
    if licences:
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in licences]
        (folder / "LICENSE").write_text("\n\n".join(texts), encoding="utf-8")
    if "projector" in source.layers:
        log.warning("its vision part is left out; the text model is imported")


def import_folder(source: Source, output: Path, dtype: str | None = None) -> Path:
    """Write a folder of safetensors as one whose config every reader understands; returns it.

    The weights are linked where the disk allows it and copied elsewhere; with `dtype` they are written
    anew as floats of that type. Raises `ModelError` where mlx-lm cannot load them.
    """
    files = weight_files(source.path)
    _check_index(source.path, files)
    if dtype is not None:
        return export_folder(
            load_model(str(source.path), STORED), output, flavour="mlx", dtype=dtype
        )
    config = read_config(source.path)
    load_weights(source.path, load_tokenizer(source.path).config)
    with new_folder(output) as folder:
        patterns = (*TOKENIZER_FILES, "generation_config.json", INDEX)
        texts = [f for pattern in patterns for f in source.path.glob(pattern) if f.is_file()]
        for file in (*texts, *licence_files(source.path)):
            shutil.copyfile(file, folder / file.name)
        write_json(folder / "config.json", config)
        for file in files:
            _link(file.resolve(), folder / file.name)
    return output


def _check_index(folder: Path, files: list[Path]) -> None:
    """Raise `ModelError` unless the index, where there is one, names files of the folder."""
    if not (folder / INDEX).is_file():
        return
    named = read_json(folder / INDEX).get("weight_map")
    shards = set(map(str, named.values())) if isinstance(named, dict) else {"nothing"}
    strange = sorted(shards - {file.name for file in files})
    if strange:
        raise ModelError(
            f"{folder / INDEX}: names {strange[0]!r}, which is no weight file beside it; was the model "
            "fetched as a whole?"
        )


def _check(folder: Path) -> None:
    """Raise `ModelError` unless mlx-lm can load a folder; its weights are not read for that."""
    load_weights(folder, load_tokenizer(folder).config)


def _link(file: Path, target: Path) -> None:
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
