"""The run folder's records: `run.json` and one JSON line for every step in `metrics.jsonl`.

Every row of metrics.jsonl has `step` (optimizer steps done), `split` ("train" or "valid"), `epoch`,
`loss`, and the method's metrics under TRL's names. Rows of "train" also have `learning_rate`,
`grad_norm` (before clipping), `tokens_per_second` (a prompt counted with each of its completions),
`num_tokens` (so far), `peak_memory_gb` (since the start, as MLX counts it) and `seconds` (training
time so far, without evaluations).
"""

import json
import os
import platform
import shutil
from pathlib import Path

from mlx_align.errors import RunError
from mlx_align.files import write_json, write_rows

RUN, METRICS, SAMPLES = "run.json", "metrics.jsonl", "samples.jsonl"


def versions() -> dict[str, str]:
    """Versions of what computes."""
    from importlib.metadata import PackageNotFoundError, version

    found = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    for package in ("mlx-align", "mlx", "mlx-lm", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_run(folder: Path, record: dict) -> None:
    """Write run.json."""
    write_json(folder / RUN, record)


def read_run(folder: Path) -> dict:
    """Read run.json. Raises `RunError` where the folder is no run."""
    path = folder / RUN
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{folder}: not a run folder (it has no {RUN})") from None
    except ValueError as error:
        raise RunError(f"{path}: not valid JSON: {error}") from None


class Metrics:
    """Appends rows to metrics.jsonl."""

    def __init__(self, folder: Path):
        self.path = folder / METRICS

    def write(self, row: dict) -> None:
        """Append a row; a crash leaves it out or in, and half a line is dropped when resuming."""
        rounded = {k: _round(v) if isinstance(v, float) else v for k, v in row.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(rounded) + "\n")

    def write_samples(self, step: int, samples: list[dict]) -> None:
        """Append what was sampled in a step to samples.jsonl."""
        if samples:
            lines = [json.dumps({"step": step, **s}, ensure_ascii=False) + "\n" for s in samples]
            with open(self.path.with_name(SAMPLES), "a", encoding="utf-8") as file:
                file.write("".join(lines))

    def cut_after(self, step: int) -> None:
        """Drop the rows of steps that a resumed run will do again, and their samples."""
        for path in (self.path, self.path.with_name(SAMPLES)):
            if path.exists():
                kept = [row for row in _rows(path) if row["step"] <= step]
                write_rows(path, kept)

    def rows(self) -> list[dict]:
        """All complete rows."""
        return _rows(self.path)


def _rows(path: Path) -> list[dict]:
    """The rows of a file, without a last one that a crash cut short."""
    rows = []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _round(value: float) -> float:
    """Nine significant digits: all that float32 has."""
    return float(f"{value:.9g}")


def claim_folder(folder: Path) -> None:
    """Make a new run folder and try to write in it, before any work is done.

    Raises `RunError` if it is in use or cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        hint = f"; continue it with --resume {folder}" if (folder / RUN).exists() else ""
        raise RunError(f"{folder}: exists already and is not empty{hint}. Choose another --output.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.write_bytes(os.urandom(4096))
        probe.unlink()
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror or error}") from None


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise `RunError` where the disk has less room than a run's checkpoints will need."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise RunError(
            f"{folder}: the disk has {free / 1e9:.2f} GB free; the checkpoints of this run need "
            f"{needed_bytes / 1e9:.2f} GB. Free some space, or choose another --output."
        )
