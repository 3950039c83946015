"""GGUF files read strictly: a damaged or hostile one is refused before anything is made of it.

Every count and offset is held against the size of the file before memory is taken, so a header can
ask for no more than the file holds. Weights are mapped, not read. The layout is that of ggml's GGUF
specification, versions 2 and 3, little endian.
"""

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from mlx_align.errors import ModelError

# Bounds well above any real model; what a header may cost in memory and time follows from them.
MOST_HEADER_BYTES = 2**28
MOST_KEYS = 2**14
MOST_TENSORS = 2**17
MOST_ELEMENTS = 2**22
MOST_NAME_BYTES = 2**10

_NUMBERS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4",
    6: "<f4", 7: "|b1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY, _FLOAT32, _BOOL = 8, 9, 6, 7
_REQUIRED = object()
# How the files of a split model are named.
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor: `shape` has the rows first; `data` is uint8[rows, bytes of a row], mapped."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    data: np.ndarray


class GGUFFile:
    """The keys and tensors of a file. Raises `ModelError` where it is not sound from end to end.

    `keys` holds numbers, texts, lists of texts, and numpy arrays; `tensors` is by name.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                size = file.seek(0, 2)
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from None
        if mapped[:4] != b"GGUF":
            raise ModelError(f"{path}: not a GGUF file (it does not begin with GGUF)")
        reader = _Reader(mapped, path)
        version = reader.number("<u4")
        if version not in (2, 3):
            swapped = version in (2 << 24, 3 << 24)
            reason = "is big-endian" if swapped else f"has version {version}"
            raise ModelError(f"{path}: {reason}; little-endian files of version 2 and 3 are read")
        tensor_count, key_count = reader.number("<u8"), reader.number("<u8")
        reader.check(key_count <= MOST_KEYS, f"it announces {key_count} keys")
        reader.check(tensor_count <= MOST_TENSORS, f"it announces {tensor_count} tensors")
        self.keys: dict = {}
        for _ in range(key_count):
            name = reader.text(MOST_NAME_BYTES)
            reader.check(name not in self.keys, f"the key {name!r} appears twice")
            self.keys[name] = reader.value()
        infos = [_tensor_info(reader) for _ in range(tensor_count)]
        alignment = self.integer("general.alignment", 32, least=8, most=2**20)
        reader.check(alignment & (alignment - 1) == 0, f"an alignment of {alignment} bytes")
        self.tensors = _map_tensors(reader, infos, alignment)

    def text(self, name: str, default=_REQUIRED) -> str:
        """A key that holds a text."""
        return self._get(name, default, str, "a text")

    def flag(self, name: str, default=_REQUIRED) -> bool:
        """A key that holds true or false."""
        return self._get(name, default, bool, "true or false")

    def texts(self, name: str) -> list[str]:
        """A key that holds a list of texts."""
        return self._get(name, _REQUIRED, list, "a list of texts")

    def number(self, name: str, default=_REQUIRED) -> float:
        """A key that holds a number above zero."""
        value = self._get(name, default, int | float, "a number")
        if value is not default and (isinstance(value, bool) or not 0 < value < np.inf):
            raise ModelError(f"{self.path}: {name} is {value}, not a number above zero")
        return value if value is None else float(value)

    def integer(
        self, name: str, default=_REQUIRED, *, least: int = 0, most: int = 2**31 - 1
    ) -> int:
        """A key that holds an integer, or the same integer for every layer."""
        value = self._get(name, default, object, "an integer")
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()
        if value is not default and (type(value) is not int or not least <= value <= most):
            shown = "a list" if isinstance(value, list | np.ndarray) else repr(value)
            raise ModelError(f"{self.path}: {name} is {shown}, not an integer in {least}..{most}")
        return value

    def numbers(self, name: str, size: int | None, kinds: str = "iuf") -> np.ndarray:
        """A key that holds `size` (None: any number of) finite numbers of numpy's `kinds`."""
        values = self._get(name, _REQUIRED, np.ndarray, "a list of numbers")
        size = len(values) if size is None else size
        if len(values) != size or values.dtype.kind not in kinds or not np.isfinite(values).all():
            raise ModelError(f"{self.path}: {name} is no list of {size} numbers, as it must be")
        return values

    def _get(self, name, default, kind, what):
        value = self.keys.get(name, default)
        if value is _REQUIRED:
            raise ModelError(f"{self.path}: has no key {name}")
        if value is not default and not isinstance(value, kind):
            raise ModelError(f"{self.path}: {name} is not {what}")
        return value


def read_model(path: Path) -> GGUFFile:
    """A model's file, with the tensors of its other files where it is split; `path` is any of them.

    Raises `ModelError` where one is damaged or missing.
    """
    file = GGUFFile(path)
    count = file.integer("split.count", 1)
    if count <= 1:
        return file
    name = PART.fullmatch(path.name)
    if name is None or int(name[3]) != count:
        raise ModelError(
            f"{path}: is one of {count} files of a model; their names must end in "
            f"-00001-of-{count:05}.gguf and so on"
        )
    parts = [path.with_name(f"{name[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ModelError(
            f"{path}: is one of {count} files of a model; beside it is no {', '.join(missing[:3])}"
        )
    whole, *others = map(GGUFFile, parts)
    for i, part in enumerate((whole, *others)):
        if (part.integer("split.no", None), part.integer("split.count", 1)) != (i, count):
            raise ModelError(f"{part.path}: is not part {i + 1} of {count}, as its name says")
    for part in others:
        twice = whole.tensors.keys() & part.tensors.keys()
        if twice:
            raise ModelError(f"{part.path}: the tensor {min(twice)!r} is in another part, too")
        whole.tensors |= part.tensors
    return whole


class _Reader:
    """Reads a header from its start; whatever goes past its end or its bounds is an error."""

    def __init__(self, mapped: mmap.mmap, path: Path):
        self.mapped, self.path = mapped, path
        self.size = len(mapped)
        self.position = 4

    def check(self, sound: bool, what: str) -> None:
        if not sound:
            raise ModelError(f"{self.path}: damaged GGUF file: {what}")

    def take(self, size: int) -> int:
        """Where the next `size` bytes begin."""
        start, self.position = self.position, self.position + size
        if self.position > self.size:
            raise ModelError(f"{self.path}: damaged GGUF file: it ends inside its header")
        if self.position > MOST_HEADER_BYTES:
            raise ModelError(f"{self.path}: damaged GGUF file: its header is too long")
        return start

    def number(self, kind: str):
        start = self.take(int(kind[2]))
        return np.frombuffer(self.mapped, kind, 1, start)[0].item()

    def text(self, most: int = MOST_HEADER_BYTES) -> str:
        (size,) = struct.unpack_from("<Q", self.mapped, self.take(8))
        self.check(size <= most, f"a text of {size} bytes")
        start = self.take(size)
        try:
            return self.mapped[start : start + size].decode("utf-8")
        except UnicodeDecodeError:
            raise ModelError(f"{self.path}: damaged GGUF file: a text is not UTF-8") from None

    def value(self):
        kind = self.number("<u4")
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self.array()
        self.check(kind in _NUMBERS, f"a value of unknown type {kind}")
        if kind == _BOOL:
            return self.number("|u1") != 0
        value = self.number(_NUMBERS[kind])
        # 1e-05 was stored as 9.999999747378752e-06; its shortest name is what was meant.
        return float(str(np.float32(value))) if kind == _FLOAT32 else value

    def array(self) -> list[str] | np.ndarray:
        kind, count = self.number("<u4"), self.number("<u8")
        self.check(kind != _ARRAY, "a list of lists")
        self.check(count <= MOST_ELEMENTS, f"a list of {count} entries")
        if kind == _STRING:
            return [self.text() for _ in range(count)]
        self.check(kind in _NUMBERS, f"a list of unknown type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        start = self.take(count * dtype.itemsize)
        return np.frombuffer(self.mapped, dtype, count, start)


def _tensor_info(reader: _Reader) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name = reader.text(MOST_NAME_BYTES)
    count = reader.number("<u4")
    reader.check(1 <= count <= 4, f"the tensor {name!r} has {count} dimensions")
    shape = tuple(reader.number("<u8") for _ in range(count))[::-1]
    kind, offset = reader.number("<u4"), reader.number("<u8")
    known = kind in GGMLQuantizationType.__members__.values()
    reader.check(known, f"the tensor {name!r} has the unknown type {kind}")
    return name, shape, GGMLQuantizationType(kind), offset


def _map_tensors(reader: _Reader, infos: list[tuple], alignment: int) -> dict[str, Tensor]:
    """The tensors, each inside the file and none on top of another."""
    start = -(-reader.position // alignment) * alignment
    tensors: dict[str, Tensor] = {}
    end, previous = 0, None
    for name, shape, kind, offset in sorted(infos, key=lambda info: info[3]):
        block, block_bytes = GGML_QUANT_SIZES[kind]
        reader.check(name not in tensors, f"the tensor {name!r} appears twice")
        reader.check(min(shape) > 0, f"the tensor {name!r} is empty")
        reader.check(shape[-1] % block == 0, f"the rows of {name!r} are not whole blocks")
        reader.check(offset % alignment == 0, f"the tensor {name!r} is not aligned")
        reader.check(offset >= end, f"the tensors {previous!r} and {name!r} overlap")
        row = shape[-1] // block * block_bytes
        rows = 1
        for size in shape[:-1]:
            rows *= size
        end, previous = offset + rows * row, name
        inside = start + end <= reader.size
        reader.check(inside, f"the tensor {name!r} reaches past its end; was it copied whole?")
        data = np.frombuffer(reader.mapped, np.uint8, rows * row, start + offset)
        tensors[name] = Tensor(name, shape, kind, data.reshape(rows, row))
    return tensors
