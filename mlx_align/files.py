"""Writing files so that a crash at any moment leaves the old file or the new one, never half.

And where caches live.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from mlx_align.errors import ExportError


def cache_folder() -> Path:
    """Where caches live: $MLX_ALIGN_CACHE, or ~/.cache/mlx-align."""
    return Path(os.environ.get("MLX_ALIGN_CACHE") or Path.home() / ".cache" / "mlx-align")


def write_atomically(path: Path, content: str | Path) -> None:
    """Replace `path` by text, or by a finished temporary file beside it."""
    if isinstance(content, Path):
        temporary = content
    else:
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(content, encoding="utf-8")
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_json(path: Path, value) -> None:
    """`write_atomically` for plain data."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_rows(path: Path, rows: Iterable) -> None:
    """`write_atomically` for plain data, one JSON line each."""
    write_atomically(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder to fill that takes the place of `final` in one step; after an error nothing is left."""
    temporary = final.with_name(f".{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        replace_folder(temporary, final)
    except OSError as error:
        raise ExportError(f"{final}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_file(final: Path) -> Iterator[Path]:
    """A file to write that takes the place of `final` in one step; after an error nothing is left."""
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        write_atomically(final, temporary)
    except OSError as error:
        raise ExportError(f"{final}: cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def replace_folder(temporary: Path, final: Path) -> None:
    """Move a finished folder to its place; what stood there is moved away whole, then removed."""
    former = final.with_name(f".{final.name}.old.tmp")
    shutil.rmtree(former, ignore_errors=True)
    if final.exists():
        os.replace(final, former)
    os.replace(temporary, final)
    sync_folder(final.parent)
    shutil.rmtree(former, ignore_errors=True)
