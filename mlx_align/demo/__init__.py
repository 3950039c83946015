"""The tiny model and data that come with the package, so that everything runs with no download.

They are made by `scripts/build_demo_model`; `README.md` beside this file tells what they hold.
"""

from pathlib import Path

DEMO = "demo"
_HERE = Path(__file__).parent

# A model this small wants larger steps than the ones it stands for.
_LEARNING_RATES = {"sft": 1e-3, "reward": 1e-3}
_LEARNING_RATE = 5e-4


def settings(method: str) -> dict:
    """Settings that suit the demo model, where a run does not say otherwise."""
    return {"learning_rate": _LEARNING_RATES.get(method, _LEARNING_RATE)}


def model_folder() -> Path:
    """The demo model, a Hugging Face folder."""
    return _HERE / "model"


def data_folder(kind: str) -> Path:
    """Training and held-out data of a kind: "pairs" (also for "labels") or "completions"."""
    return _HERE / "data" / ("completions" if kind == "completions" else "pairs")


def evaluation_folder() -> Path:
    """Requests (harmful or not) and questions to measure a model of the demo's world by."""
    return _HERE / "data" / "evaluation"
