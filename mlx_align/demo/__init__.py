"""The tiny model and data that come with the package, so that everything runs with no download.

They are made by `scripts/build_demo_model`; `README.md` beside this file tells what they hold.
"""

from pathlib import Path

DEMO = "demo"
_HERE = Path(__file__).parent

# A model this small wants larger steps than the ones it stands for, and IPO's target of 1 / (2 beta)
# nats a token must be one that answers of a dozen tokens can reach.
_SETTINGS = {
    "sft": {"learning_rate": 1e-3},
    "reward": {"learning_rate": 1e-3},
    "kto": {"learning_rate": 1e-3},
    "bco": {"learning_rate": 1e-3},
    "ipo": {"learning_rate": 5e-4, "beta": 0.5},
}
_ONLINE = {"learning_rate": 1e-3}
# PPO's several passes over the samples of a step, and pairs of few kinds, want smaller steps. A reward
# model made of so few pairs pays for an empty answer to a harmful request, which more steps would find.
_ONLINE_SETTINGS = {
    "ppo": {"learning_rate": 2e-4, "group_size": 8, "steps": 30},
    "xpo": {"learning_rate": 5e-4},
}
# What a right answer contains is in the demo's prompts, and says nothing of other data.
_ONLINE_DATA = {"reward": ("contains",), "max_tokens": 40, "steps": 30}

# Rounds of sampling and training that show what `mlx-align iterate` does.
PLAN = {
    "rounds": 2,
    "prompts_per_round": 96,
    "sample": {"reward": ["contains"], "group_size": 4, "max_tokens": 40},
    "train": {"method": "dpo", "epochs": 2},
}


def settings(method: str, kind: str, own_data: bool) -> dict:
    """Settings that suit the demo model for a method that learns from `kind`, where a run does not say
    otherwise; `own_data` says that it learns from the demo's data."""
    if kind == "prompts":
        chosen = _ONLINE | _ONLINE_DATA if own_data else _ONLINE
        return chosen | _ONLINE_SETTINGS.get(method, {})
    return _SETTINGS.get(method, {"learning_rate": 5e-4})


def model_folder() -> Path:
    """The demo model, a Hugging Face folder."""
    return _HERE / "model"


def data_folder(kind: str) -> Path:
    """Training and held-out data of a kind: "pairs" (also for "labels"), "completions", "prompts"."""
    return _HERE / "data" / ("pairs" if kind == "labels" else kind)


def evaluation_folder() -> Path:
    """Requests (harmful or not) and questions to measure a model of the demo's world by."""
    return _HERE / "data" / "evaluation"
