"""Model configs as transformers 5 writes them, in the spelling that every reader understands.

transformers 5 nests `rope_theta` and `rope_scaling` in `rope_parameters` (one per layer type where
layers differ) and renames `num_experts`. Several families of mlx-lm ignore the new keys without a
word and run with default frequencies, so the old keys are put beside the new ones.
"""

import itertools
import math
import re
from pathlib import Path

from mlx_align.errors import ModelError
from mlx_align.model.files import read_json

MOST_LAYERS = 1024
# Which layers have full attention by default, in models whose masks are made for the first of those.
_PERIODS = {"gemma3_text": 6, "cohere2": 4}
# What these hold wherever they are given; the rest is for mlx-lm to judge.
_HOLDS = {
    "text_config": dict, "rope_parameters": dict, "rope_scaling": dict, "quantization": dict,
    "layer_types": list, "rope_theta": int | float | list, "rope_local_base_freq": int | float,
    "rms_norm_eps": int | float, "sliding_window_pattern": int | str,
}  # fmt: skip
_WORDS = {
    dict: "an object", list: "a list", int | float: "a number", int | str: "an integer or letters",
    int | float | list: "a number, nor a list of one for each layer",
}  # fmt: skip


def read_config(folder: Path) -> dict:
    """The config.json of a model folder, with old and new spellings side by side.

    Raises `ModelError` where it cannot be read, or would make something else than a model.
    """
    path = folder / "config.json"
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{path}: has no model_type")
    check_config(config, path)
    config = normalise_config(config)
    check_period(config, path)
    return config


def check_config(config: dict, path: Path) -> None:
    """Raise `ModelError` for values of the wrong kind, and for more layers than any model has."""
    for key, value in config.items():
        kind = _HOLDS.get(key)
        if kind and value is not None:
            sound = isinstance(value, kind) and not isinstance(value, bool)
            if not sound or (isinstance(value, float) and not math.isfinite(value)):
                raise ModelError(f"{path}: {key} is {value!r:.80}, not {_WORDS[kind]}")
        if (
            re.fullmatch(r"n(um)?_(\w+_)?layers?", key)
            and isinstance(value, int | float)
            and not value <= MOST_LAYERS
        ):
            raise ModelError(f"{path}: {key} is {value}; no model has more than {MOST_LAYERS}")
    for value in config.values():
        if isinstance(value, dict):
            check_config(value, path)


def check_period(config: dict, path: Path) -> None:
    """Raise `ModelError` where mlx-lm would look for a layer of full attention behind the last one.

    `config` is a normalised one.
    """
    config = config.get("text_config") or config
    period, layers = _PERIODS.get(config.get("model_type")), config.get("num_hidden_layers")
    if period is None or layers is None:
        return
    period = config.get("sliding_window_pattern") or period
    if not 0 < period <= layers:
        raise ModelError(
            f"{path}: sliding_window_pattern is {period} for {layers} layers; mlx-lm runs such models "
            "only with a layer of full attention"
        )


def normalise_config(config: dict) -> dict:
    """A copy of a config.json with old and new spellings side by side; nested text configs too."""
    config = dict(config)
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = text = normalise_config(config["text_config"])
        if text.get("vocab_size") is not None:
            config.setdefault("vocab_size", text["vocab_size"])
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and rope:
        _hoist_rope(config, rope)
    elif "rope_theta" in config:
        _nest_rope(config)
    for have, lack in itertools.permutations(("num_experts", "num_local_experts")):
        if config.get(have) is not None and config.get(lack) is None:
            config[lack] = config[have]
    kinds = config.get("layer_types")
    if kinds and "sliding_window_pattern" not in config and "full_attention" in kinds:
        period = kinds.index("full_attention") + 1
        expected = [
            "full_attention" if (i + 1) % period == 0 else kinds[0] for i in range(len(kinds))
        ]
        if list(kinds) == expected:
            config["sliding_window_pattern"] = period
    return config


def _hoist_rope(config, rope):
    by_layer = all(isinstance(value, dict) for value in rope.values())
    main = rope.get("full_attention") if by_layer else rope
    if main is None:
        main = next(iter(rope.values()))
    if main.get("rope_theta") is not None:
        config["rope_theta"] = main["rope_theta"]
    if main.get("partial_rotary_factor") is not None:
        config["partial_rotary_factor"] = main["partial_rotary_factor"]
    kind = main.get("rope_type", main.get("type", "default"))
    if kind != "default":
        scaling = {
            k: v for k, v in main.items() if k not in ("rope_theta", "partial_rotary_factor")
        }
        config["rope_scaling"] = {**scaling, "rope_type": kind, "type": kind}
    elif config.get("rope_scaling") is None:
        config.pop("rope_scaling", None)
    local = rope.get("sliding_attention") if by_layer else None
    if local and local.get("rope_theta") is not None:
        config["rope_local_base_freq"] = local["rope_theta"]


def _nest_rope(config):
    """`rope_parameters` from the old keys, one set for each kind of layer where these differ."""
    scaling = dict(config.get("rope_scaling") or {})
    kind = scaling.pop("type", None)
    kind = scaling.pop("rope_type", kind) or "default"
    rope = {"rope_theta": config["rope_theta"], "rope_type": kind, **scaling}
    if config.get("partial_rotary_factor") is not None:
        rope["partial_rotary_factor"] = config["partial_rotary_factor"]
    local = config.get("rope_local_base_freq")
    if local is not None:
        plain = {"rope_theta": local, "rope_type": "default"}
        rope = {"full_attention": rope, "sliding_attention": plain}
    config["rope_parameters"] = rope
