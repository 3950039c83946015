"""Where LM Studio looks for models: PUBLISHER/NAME in its models folder, a GGUF or an MLX folder each."""

import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mlx_align.errors import ExportError, SettingsError
from mlx_align.export.folder import export_folder
from mlx_align.export.gguf import export_gguf
from mlx_align.export.mlx_quants import BITS
from mlx_align.files import new_folder
from mlx_align.model.load import LoadedModel

FORMATS = ("mlx", "gguf")
PUBLISHER = "mlx-align"


def default_format() -> str:
    """ "mlx" on Apple silicon, whose LM Studio has an engine for it; elsewhere "gguf"."""
    apple_silicon = platform.system() == "Darwin" and platform.machine() == "arm64"
    return "mlx" if apple_silicon else "gguf"


def export_lm_studio(
    loaded: LoadedModel,
    output: Path,
    *,
    format: str,
    quantise: str | None,
    dtype: str | None,
    importance: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write the model as a folder of one of `FORMATS`; `dtype` is for MLX, `importance` for GGUF."""
    if format == "mlx":
        bits = BITS.get(quantise)
        return export_folder(loaded, output, flavour="mlx", dtype=dtype, bits=bits)
    with new_folder(output) as folder:
        file = folder / f"{output.name}-{quantise.upper()}.gguf"
        export_gguf(loaded, file, quantise=quantise, importance=importance)
    return output


def model_folder(name: str) -> Path:
    """A new model's folder for a name or PUBLISHER/NAME.

    Raises `SettingsError` for a name that would lie elsewhere, `ExportError` where there is such a model
    already or no LM Studio.
    """
    parts = name.split("/")
    if len(parts) > 2 or not all(re.fullmatch(r"\w[\w.+-]*", part) for part in parts):
        raise SettingsError(f"name: {name!r} is no name of a model, nor PUBLISHER/NAME")
    folder = models_folder() / Path(*[PUBLISHER, *parts][-2:])
    if folder.exists():
        raise ExportError(f"{folder}: exists already; choose another --name, or remove it")
    return folder


def models_folder() -> Path:
    """LM Studio's models folder, found as its own program `lms` does.

    Raises `ExportError` where there is none.
    """
    home = _home()
    if home is None:
        raise ExportError(
            "LM Studio's folder ~/.lmstudio is not here; start LM Studio once, or name a folder with "
            "--output"
        )
    settings = home / "settings.json"
    if not settings.is_file():
        return home / "models"
    try:
        chosen = json.loads(settings.read_text(encoding="utf-8")).get("downloadsFolder")
        return Path(chosen).expanduser() if chosen else home / "models"
    except (ValueError, AttributeError, TypeError):
        raise ExportError(
            f"{settings}: not LM Studio's settings; name a folder with --output"
        ) from None


def _home() -> Path | None:
    """LM Studio's own folder: the one that is noted in the home, that of older versions, or the usual."""
    pointer = Path.home() / ".lmstudio-home-pointer"
    noted = [pointer.read_text(encoding="utf-8").strip()] if pointer.is_file() else []
    usual = [Path.home() / ".cache" / "lm-studio", Path.home() / ".lmstudio"]
    return next((Path(place) for place in (*noted, *usual) if Path(place).is_dir()), None)
