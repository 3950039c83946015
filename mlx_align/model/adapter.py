"""The part of a model that is trained: LoRA, DoRA, or all weights.

An adapter is a tree of arrays that the model wears. Taken off, the base layers stand where the
adapted ones stood, so the model is the base bit for bit: that is the reference policy. Files are
those of mlx-lm (`adapters.safetensors`, `adapter_config.json`), which its tools read.
"""

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_align.data.jsonl import summarise
from mlx_align.errors import ModelError, SettingsError
from mlx_align.files import write_atomically
from mlx_align.model.files import read_json
from mlx_align.settings import Settings, setting

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class AdapterSettings(Settings):
    """What is trained."""

    fine_tune: str = setting(
        "lora",
        "What to train: low-rank updates (lora), with magnitudes (dora), every weight (full), or only "
        "the reward head on the frozen model (head).",
        choices=("lora", "dora", "full", "head"),
        aliases=("fine_tune_type",),
    )
    start: str | None = setting(
        None,
        "Run or adapter to go on from, on the same base; its rank and layers are kept, and the "
        "reference is the model that wears it. --model RUN says the same.",
    )
    lora_rank: int = setting(8, "Rank of the updates.", minimum=1)
    lora_scale: float = setting(
        2.0, "Factor on the updates (what other tools call alpha / rank).", above=0
    )
    lora_layers: int = setting(
        -1, "Adapt the last n blocks only; -1 for all.", minimum=-1, aliases=("num_layers",)
    )
    lora_dropout: float = setting(
        0.0,
        "Dropout in front of the updates. Above 0 the first step of a preference method no longer "
        "starts at the reference.",
        minimum=0,
        below=1,
    )
    lora_keys: tuple[str, ...] | None = setting(
        None,
        "Layers to adapt, by name inside a block (self_attn.q_proj) or by their whole name "
        "(model.embed_tokens, lm_head). Default: all linear ones of the blocks.",
    )


class LoRALinear(nn.Module):
    """y = linear(x) + scale * (x A) B with A [in, r], B [r, out] (Hu et al. 2021, arXiv:2106.09685).

    Parameters are float32 and computed with in the type of x. Attribute names are mlx-lm's, so its
    files fit.
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: float):
        super().__init__()
        outputs, inputs = linear.weight.shape
        if hasattr(linear, "bits"):
            inputs = inputs * 32 // linear.bits
        bound = 1 / math.sqrt(inputs)
        self.linear = linear
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.lora_a = mx.random.uniform(-bound, bound, (inputs, rank))
        self.lora_b = mx.zeros((rank, outputs))

    def __call__(self, x):
        inner = (self.dropout(x) @ self.lora_a.astype(x.dtype)) * self.scale
        # One product with an addend: no pass over the outputs for the addition.
        return mx.addmm(self.linear(x), inner, self.lora_b.astype(x.dtype))


@dataclass(eq=False)
class Adapter:
    """What a model wears: the adapted layers with the base layers they stand for."""

    model: nn.Module
    kind: str
    layers: list[tuple[nn.Module | dict | list, str | int, nn.Module, nn.Module]]
    head: nn.Module | None = None  # a score head that is put on and taken off with the layers

    def parameters(self) -> dict:
        """The tree of trained arrays."""
        return self.model.trainable_parameters()

    @property
    def size(self) -> int:
        """Number of trained values."""
        return sum(x.size for _, x in tree_flatten(self.parameters()))

    @contextlib.contextmanager
    def wearing(self, weights: dict[str, mx.array]):
        """While this is open the model has other arrays, by name, in the places of some of its own."""
        own = self.weights()
        kept = [(name, own[name]) for name in weights]
        self.model.update(tree_unflatten(list(weights.items())))
        try:
            yield
        finally:
            self.model.update(tree_unflatten(kept))

    @contextlib.contextmanager
    def off(self):
        """While this is open the model is its base; afterwards it wears the adapter again."""
        self.take_off()
        try:
            yield
        finally:
            self.put_on()

    def at_start(self, start: dict[str, mx.array] | None):
        """While this is open the model is what training started from: its base, or, where it went on
        from another adapter, the base wearing that one's arrays."""
        return self.off() if start is None else self.wearing(start)

    @contextlib.contextmanager
    def replaced_by(self, other: "Adapter"):
        """While this is open the model wears the other adapter, which must be off."""
        with self.off():
            other.put_on()
            try:
                yield
            finally:
                other.take_off()

    def put_on(self) -> None:
        """Let the model wear the adapter."""
        for parent, key, adapted, _ in self.layers:
            parent[key] = adapted
        if self.head is not None:
            self.model.score = self.head

    def take_off(self) -> None:
        """Let the model be its base."""
        if self.kind == "full":
            raise ModelError("a fully fine-tuned model has no base to fall back to")
        for parent, key, _, base in self.layers:
            parent[key] = base
        if self.head is not None:
            self.model.pop("score")

    def weights(self) -> dict[str, mx.array]:
        """The trained arrays by name."""
        return dict(tree_flatten(self.parameters()))

    def identity(self) -> dict[str, mx.array]:
        """All that makes the adapter what it is: its arrays, and the factor on them."""
        scale = next(
            (layer.scale for _, _, layer, _ in self.layers if hasattr(layer, "scale")), 1.0
        )
        return {**self.weights(), "scale": mx.array(float(scale))}

    def load(self, weights: dict[str, mx.array], source: str) -> None:
        """Put on saved arrays. Raises `ModelError` as `check_fit` does."""
        own = self.weights()
        check_fit(own, weights, source)
        cast = [(name, array.astype(own[name].dtype)) for name, array in weights.items()]
        self.model.update(tree_unflatten(cast))
        mx.eval(self.parameters())

    def save(self, folder: Path, settings: AdapterSettings, extra: dict) -> None:
        """Write the adapter's two files, each replaced in one step."""
        save_weights(folder / WEIGHTS, self.weights())
        config = {
            "fine_tune_type": settings.fine_tune,
            "num_layers": settings.lora_layers,
            "lora_parameters": {
                "rank": settings.lora_rank,
                "scale": settings.lora_scale,
                "dropout": settings.lora_dropout,
            },
            **extra,
        }
        if settings.lora_keys:
            config["lora_parameters"]["keys"] = list(settings.lora_keys)
        write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def check_fit(own: dict[str, mx.array], weights: dict[str, mx.array], source: str) -> None:
    """Raise `ModelError` that lists where weights differ in names or shapes from a model's own."""
    wrong = [f"{name}: missing" for name in own.keys() - weights.keys()]
    for name, array in weights.items():
        if name not in own:
            wrong.append(f"{name}: not in this model")
        elif array.shape != own[name].shape:
            wrong.append(f"{name}: shape {array.shape}, this model needs {own[name].shape}")
    if wrong:
        listed = summarise(sorted(wrong)).replace("\n", "\n  ")
        raise ModelError(f"{source}: the adapter does not fit this model:\n  {listed}")


def save_weights(path: Path, weights: dict[str, mx.array], metadata: dict | None = None) -> None:
    """Write a safetensors file so that the path never holds half of it."""
    temporary = path.with_name(f".{path.stem}.tmp.safetensors")
    mx.save_safetensors(str(temporary), weights, {"format": "mlx", **(metadata or {})})
    write_atomically(path, temporary)


def wear_adapter(model: nn.Module, settings: AdapterSettings, seed: int) -> Adapter:
    """Put a fresh adapter on a loaded model and make exactly its arrays trainable.

    Raises `SettingsError` where nothing would be trained, or where the weights cannot be.
    """
    mx.random.seed(seed)
    model.freeze()
    reward_head = model.get("score")
    if reward_head is not None:
        reward_head.unfreeze()
    if settings.fine_tune == "head":
        if reward_head is None:
            raise SettingsError(
                "fine_tune: head trains a reward head, which only reward models have"
            )
        return Adapter(model, "head", [])
    if settings.fine_tune == "full":
        if any(hasattr(m, "bits") for m in model.modules()):
            raise SettingsError(
                "fine_tune: the weights of a quantised model cannot be trained; use lora or dora, or "
                "start from the float model"
            )
        model.unfreeze()
        return Adapter(model, "full", [])
    layers = [
        (parent, key, _adapted(base, settings), base)
        for parent, key, base in _chosen_layers(model, settings)
    ]
    if not layers:
        known = ", ".join(sorted({name for name, *_ in adaptable_layers(model.layers[-1])}))
        raise SettingsError(
            f"nothing would be trained: lora_layers is {settings.lora_layers}, lora_keys is "
            f"{list(settings.lora_keys or [])}. A block of this model has: {known}"
        )
    for parent, key, adapted, _ in layers:
        parent[key] = adapted
        adapted.unfreeze(keys=["lora_a", "lora_b", "m"], recurse=False)
    return Adapter(model, settings.fine_tune, layers)


def _chosen_layers(model, settings: AdapterSettings):
    """(parent, key, layer) of the layers to adapt; names are read as mlx-lm reads them."""
    blocks = list(model.layers)
    count = len(blocks) if settings.lora_layers < 0 else min(settings.lora_layers, len(blocks))
    for block in blocks[len(blocks) - count :]:
        for name, *place in adaptable_layers(block):
            if not settings.lora_keys or name in settings.lora_keys:
                yield place
    for name, *place in adaptable_layers(model) if settings.lora_keys else ():
        if name in settings.lora_keys:
            yield place


def adaptable_layers(module: nn.Module):
    """(name, parent, key, layer) of every layer of a block or model that an adapter can go on."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    kinds = (
        nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear,
        nn.Embedding, nn.QuantizedEmbedding,
    )  # fmt: skip

    def walk(value, path):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in list(items):
            name = f"{path}.{key}" if path else str(key)
            if isinstance(child, kinds) or hasattr(child, "to_lora"):
                yield name, value, key, child
            elif isinstance(child, dict | list):
                yield from walk(child, name)

    return walk(module, "")


def _adapted(base, settings: AdapterSettings):
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRAEmbedding, LoRASwitchLinear

    how = {"r": settings.lora_rank, "scale": settings.lora_scale, "dropout": settings.lora_dropout}
    linear = isinstance(base, nn.Linear | nn.QuantizedLinear)
    if settings.fine_tune == "dora":
        if not linear:
            raise SettingsError(
                f"fine_tune: dora does not support layers of type {type(base).__name__}; use lora"
            )
        return DoRALinear.from_base(base, **how)
    if linear:
        return LoRALinear(base, settings.lora_rank, settings.lora_scale, settings.lora_dropout)
    if hasattr(base, "to_lora"):
        return base.to_lora(**how)
    if isinstance(base, nn.Embedding | nn.QuantizedEmbedding):
        return LoRAEmbedding.from_base(base, **how)
    return LoRASwitchLinear.from_base(base, **how)


def read_adapter_config(folder: Path) -> dict:
    """The adapter_config.json of an adapter folder."""
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder}: not an adapter (it has no {CONFIG})")
    return read_json(folder / CONFIG)


def load_adapter(model: nn.Module, folder: Path) -> Adapter:
    """Put on the adapter in a folder, ours or mlx-lm's."""
    settings = AdapterSettings(**settings_of_adapter(folder))
    weights_file = folder / WEIGHTS
    if not weights_file.is_file():
        raise ModelError(f"{folder}: not a complete adapter (it has no {WEIGHTS})")
    adapter = wear_adapter(model, settings, seed=0)
    adapter.load(mx.load(str(weights_file)), str(weights_file))
    return adapter


def settings_of_adapter(folder: Path) -> dict:
    """The settings, by name, that an adapter in a folder was made with."""
    config = read_adapter_config(folder)
    lora = config.get("lora_parameters") or {}
    return {
        "fine_tune": config.get("fine_tune_type", "lora"),
        "lora_rank": lora.get("rank", 8),
        "lora_scale": lora.get("scale", 20.0),
        "lora_layers": max(config.get("num_layers", -1), -1),
        "lora_dropout": lora.get("dropout", 0.0),
        "lora_keys": lora.get("keys"),
    }
