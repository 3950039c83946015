"""Files, folders and Hub data sets as rows that know where they came from.

Reads .jsonl, .json (a list of rows) and .parquet (with pyarrow), the first two also gzipped. Knows
nothing of what a row means.
"""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

from mlx_align.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
SPLIT_NAMES = {
    "train": ("train",),
    "valid": ("valid", "validation", "val", "dev", "eval"),
    "test": ("test",),
}
SHOWN_ERRORS = 5


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yield ("file:line", row) for every row of a file.

    Raises `DataError` naming the first bad lines and their number, once all lines were tried.
    """
    name = path.name
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if name.endswith(".parquet"):
        yield from _read_parquet(path)
        return
    if not name.endswith(SUFFIXES):
        raise DataError(f"{path}: unknown file type; expected one of {', '.join(SUFFIXES)}")
    open_text = gzip.open if name.endswith(".gz") else open
    try:
        with open_text(path, "rt", encoding="utf-8-sig") as file:
            if ".jsonl" in name:
                yield from _read_lines(path, file)
            else:
                yield from _read_json(path, file.read())
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _read_lines(path, file):
    errors = []
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            errors.append(f"{path}:{number}: not valid JSON: {error.msg} at column {error.colno}")
            continue
        yield f"{path}:{number}", row
    if errors:
        raise DataError(summarise(errors))


def _read_json(path, text):
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Extra data"):
            raise DataError(f"{path}: holds one JSON object per line; name it .jsonl") from None
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list)]
        value = lists[0] if len(lists) == 1 else [value]
    for number, row in enumerate(value, 1):
        yield f"{path}:row {number}", row


def _read_parquet(path):
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow (pip install pyarrow)") from None
    import pyarrow

    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None


def summarise(errors: list[str]) -> str:
    """The first errors, one a line, and how many more there are."""
    more = len(errors) - SHOWN_ERRORS
    lines = errors[:SHOWN_ERRORS] + ([f"... and {more} more"] if more > 0 else [])
    return "\n".join(lines)


def find_files(source: str, split: str | None = None) -> dict[str, list[Path]]:
    """The files of each split ("train", "valid", "test") of a file, a folder or a Hub data set.

    A single file is all "train". In a folder, a file belongs to the split its name starts with
    (train.jsonl, validation-00000.parquet); `split` names the files to train on instead, and then
    the held-out files are those of the same name with another beginning ("train_prefs" goes with
    "test_prefs").
    """
    path = Path(source).expanduser()
    if path.is_file():
        return {"train": [path]}
    if not path.exists():
        path = _download(source)
    candidates = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
    found: dict[str, list[Path]] = {}
    for file in candidates:
        name = re.split(r"[.\-]", file.name)[0].lower()
        if name.isdigit() or name in ("data", "part"):
            name = file.parent.name.lower()
        for kind, starts in SPLIT_NAMES.items():
            if split is None:
                matches = name in starts
            elif kind == "train":
                matches = name == split.lower()
            else:
                rest = split.lower().removeprefix("train")
                matches = rest != split.lower() and name in [s + rest for s in starts]
            if matches:
                found.setdefault(kind, []).append(file)
    if "train" not in found:
        names = ", ".join(str(p.relative_to(path)) for p in candidates[:8]) or "no data files"
        wanted = split or "train"
        raise DataError(
            f"{source}: no file for the split {wanted!r} (found: {names}). Name the files "
            "train.jsonl, valid.jsonl, test.jsonl, or give --split, or name one file."
        )
    return found


def _download(source: str) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise DataError(f"{source}: no such file or folder (and not the name of a Hub data set)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                source, repo_type="dataset", allow_patterns=[f"*{suffix}" for suffix in SUFFIXES]
            )
        )
    except RepositoryNotFoundError:
        raise DataError(
            f"{source}: no such file or folder here, and no such data set on the Hub"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{source}: no such file or folder here, and the Hub could not be asked: {reason}"
        ) from None
