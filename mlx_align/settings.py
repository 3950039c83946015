"""Settings are frozen dataclasses whose fields carry their range, choices and help text.

A class derived from `Settings` checks itself when it is built, so a value that came from a flag, a
YAML file or Python is refused at the same place with the same words. This module knows nothing of
the command line; `mlx_align.cli.options` turns the same fields into flags.
"""

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path

from mlx_align.errors import SettingsError


def setting(
    default,
    help: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    choices: Iterable[str] = (),
    aliases: Iterable[str] = (),
    hidden: bool = False,
):
    """Declare a field of a `Settings` class.

    `minimum`/`maximum` are inclusive bounds, `above`/`below` exclusive ones. `aliases` are other
    names (with underscores) under which files and flags may give the field.
    """
    metadata = {
        "help": help,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "below": below,
        "choices": tuple(choices),
        "aliases": tuple(aliases),
        "hidden": hidden,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base class: converts and checks every field when an object is built."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = coerce(field, getattr(self, field.name))
            object.__setattr__(self, field.name, value)


def value_type(field: dataclasses.Field) -> tuple[type, bool, bool]:
    """The field's scalar type, whether None is allowed, and whether it is a tuple of scalars."""
    kind, optional, many = field.type, False, False
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        members = [m for m in typing.get_args(kind) if m is not type(None)]
        optional, kind = True, members[0]
    if typing.get_origin(kind) is tuple:
        many, kind = True, typing.get_args(kind)[0]
    return kind, optional, many


def coerce(field: dataclasses.Field, value):
    """`value` converted to the field's type and checked against its range and choices."""
    kind, optional, many = value_type(field)
    if value is None:
        if optional:
            return None
        raise SettingsError(f"{field.name}: a value is needed, not null")
    if many:
        items = [value] if isinstance(value, str | int | float) else value
        return tuple(_scalar(field, kind, item) for item in items)
    return _scalar(field, kind, value)


def _scalar(field, kind, value):
    name, meta = field.name, field.metadata
    try:
        if kind is bool:
            if not isinstance(value, bool):
                raise ValueError
        elif kind is int:
            # YAML and JSON may write whole numbers as 1e3 or 100.0.
            if isinstance(value, bool) or float(value) != int(float(value)):
                raise ValueError
            value = int(float(value))
        elif kind is float:
            if isinstance(value, bool):
                raise ValueError
            value = float(value)
        elif kind is str:
            value = str(value)
    except (TypeError, ValueError, OverflowError):
        raise SettingsError(f"{name}: {value!r} is not {_article(kind)}") from None
    if meta.get("choices") and value not in meta["choices"]:
        options = ", ".join(meta["choices"])
        raise SettingsError(
            f"{name}: {value!r} is not one of {options}{nearest(value, meta['choices'])}"
        )
    for key, holds, words in (
        ("minimum", lambda v, b: v >= b, "at least"),
        ("above", lambda v, b: v > b, "greater than"),
        ("maximum", lambda v, b: v <= b, "at most"),
        ("below", lambda v, b: v < b, "less than"),
    ):
        bound = meta.get(key)
        if bound is not None and not holds(value, bound):
            raise SettingsError(f"{name}: {value} is out of range; it must be {words} {bound}")
    return value


def _article(kind) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def nearest(name: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' for the closest known name, or an empty string."""
    match = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


def flatten(*groups: Settings) -> dict:
    """The fields of several settings objects as one flat mapping of plain JSON values."""
    flat = {}
    for group in groups:
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            flat[field.name] = list(value) if isinstance(value, tuple) else value
    return flat


def build(classes: Iterable[type], values: Mapping, source: str) -> list:
    """One object of each class from one flat mapping; aliases are understood.

    Raises `SettingsError` that names `source` and the nearest known key for every unknown key.
    """
    classes = list(classes)
    names = {}
    for cls in classes:
        for field in dataclasses.fields(cls):
            for name in (field.name, *field.metadata["aliases"]):
                names[name] = (cls, field.name)
    chosen, unknown = {cls: {} for cls in classes}, []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in names:
            unknown.append(f"{key!r}{nearest(name, names)}")
            continue
        cls, field_name = names[name]
        if field_name in chosen[cls]:
            raise SettingsError(f"{source}: {field_name!r} is given twice (as {key!r} too)")
        chosen[cls][field_name] = value
    if unknown:
        raise SettingsError(f"{source}: unknown setting {', '.join(unknown)}")
    objects = []
    for cls in classes:
        try:
            objects.append(cls(**chosen[cls]))
        except SettingsError as error:
            raise SettingsError(f"{source}: {error}") from None
    return objects


def read_file(path: str | Path) -> dict:
    """The settings in a YAML or JSON file; of a `run.json`, the settings of that run."""
    import yaml

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such settings file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read: {error}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise SettingsError(f"{path}{line}: not valid YAML: {problem}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: expected 'name: value' lines, found {type(values).__name__}")
    if isinstance(values.get("settings"), dict) and "method" in values:
        return {"method": values["method"], **values["settings"]}
    return values


def fingerprint(value) -> str:
    """A short content hash of plain JSON data: equal data, equal fingerprint, on any machine."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]
