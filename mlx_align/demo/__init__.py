"""The tiny model and data that come with the package, so that everything runs with no download.

They are made by `scripts/build_demo_model`; `README.md` beside this file tells what they hold.
"""

from pathlib import Path

DEMO = "demo"
_HERE = Path(__file__).parent


def model_folder() -> Path:
    """The demo model, a Hugging Face folder."""
    return _HERE / "model"


def data_folder(kind: str) -> Path:
    """Training and held-out data of a kind: "pairs" or "completions"."""
    return _HERE / "data" / kind
