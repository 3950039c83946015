"""PEFT's adapter folders (LoRA, rsLoRA, DoRA) as adapters of MLX.

The arrays are read by their names, which say all that `target_modules` would. MLX has one rank and
one scale for all layers: lower ranks are filled up with zeros, other scales go into B. Experts, which
have updates of their own in PEFT, are stacked in MLX. Where PEFT saved whole modules (embeddings, head,
norms), the result is all weights, merged.
"""

import logging
import math
import re
import shutil
from collections import defaultdict
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mode

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_align.data.jsonl import summarise
from mlx_align.errors import ModelError, SettingsError
from mlx_align.export.adapter import (
    EMBEDDING,
    EMBEDDING_PARTS,
    HEAD,
    LINEAR_PARTS,
    PEFT_PREFIX,
    PEFT_WEIGHTS,
)
from mlx_align.export.architectures import FAMILIES
from mlx_align.export.fuse import fused_tensors
from mlx_align.files import new_folder
from mlx_align.model.adapter import (
    CONFIG,
    Adapter,
    AdapterSettings,
    adaptable_layers,
    check_fit,
    read_adapter_config,
    wear_adapter,
)
from mlx_align.model.files import check_safetensors
from mlx_align.model.heads import RewardHead
from mlx_align.model.load import load_tokenizer, load_weights, resolve_model
from mlx_align.model.open import TEMPLATE
from mlx_align.settings import Settings, coerce, setting

log = logging.getLogger("mlx_align")

PICKLE = "adapter_model.bin"
MERGE = "merge it in PEFT (merge_and_unload) and take the merged model"
# Ways to begin that leave the base as it is; the others change its weights.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
# Settings with which the arrays mean something else, or are not all there is.
OTHER_MEANINGS = (
    "fan_in_fan_out", "lora_bias", "layer_replication", "trainable_token_indices", "target_parameters",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config",
    "monteclora_config",
)  # fmt: skip
SCORE = "score.weight"


@dataclass(frozen=True)
class PeftSettings(Settings):
    """What PEFT's adapter_config.json says of the arrays beside it."""

    base_model_name_or_path: str | None = setting(None, "The base.")
    r: int = setting(8, "Rank of the updates.", minimum=1)
    lora_alpha: float = setting(
        8.0, "Factor on the updates, times the rank.", above=-math.inf, below=math.inf
    )
    lora_dropout: float = setting(0.0, "Dropout in front of the updates.", minimum=0, below=1)
    use_rslora: bool = setting(False, "Whether alpha is divided by the root of the rank.")
    use_dora: bool = setting(False, "Whether the updates have magnitudes.")


@dataclass(frozen=True)
class Factors:
    """Rank and scale of each module's update."""

    settings: PeftSettings
    ranks: list[tuple[re.Pattern, int]]
    alphas: list[tuple[re.Pattern, float]]

    def rank(self, name: str) -> int:
        """The rank of a module's update."""
        return next((r for p, r in self.ranks if p.fullmatch(name)), self.settings.r)

    def scale(self, name: str) -> float:
        """alpha / rank, or for rsLoRA alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)."""
        alpha = next((a for p, a in self.alphas if p.fullmatch(name)), self.settings.lora_alpha)
        rank = self.rank(name)
        scale = alpha / (math.sqrt(rank) if self.settings.use_rslora else rank)
        # Without the rounding noise of an alpha that was made from a scale.
        return float(f"{scale:.12g}")


def import_peft(folder: Path, output: Path, base: str | None = None) -> Path:
    """Write the adapter in a PEFT folder as one of MLX; returns its path.

    `base` is the model it goes on, by default the one that the folder names; of its weights those are
    read that are needed. Raises `ModelError` that lists what does not fit.
    """
    factors = _read_config(folder)
    settings = factors.settings
    updates, saved = _read_arrays(folder)
    weights, rank, scale = _unify(updates, factors, folder)
    base = base or settings.base_model_name_or_path
    if not base:
        raise ModelError(
            f"{folder}: its {CONFIG} does not name the base model; give it with --model"
        )
    path = resolve_model(base)
    model, config = load_weights(path, load_tokenizer(path).config)
    _check_base(model, config, saved, folder)
    _stack_experts(model, FAMILIES[config["model_type"]], weights)
    extra = {"model": str(path.resolve()) if Path(base).expanduser().exists() else base}
    if SCORE in saved:
        weights[SCORE] = saved.pop(SCORE)
        model.score = RewardHead(config["hidden_size"])
        # How the scores were spread over the training data is not known, so they stay as they are.
        extra |= {"head": "reward", "reward": {"mean": 0.0, "std": 1.0}}
    elif HEAD not in model:
        _tie(model, weights, saved, folder)
    made = AdapterSettings(
        fine_tune="dora" if settings.use_dora else "lora",
        lora_rank=rank,
        lora_scale=scale,
        lora_dropout=settings.lora_dropout,
        **_choose_layers(model, weights, folder),
    )
    adapter, made = _put_on(model, made, weights, saved, folder)
    with new_folder(output) as written:
        adapter.save(written, made, extra)
        if (folder / TEMPLATE).is_file():
            shutil.copyfile(folder / TEMPLATE, written / TEMPLATE)
    return output


def _read_config(folder) -> Factors:
    config = read_adapter_config(folder)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(
            f"{folder / CONFIG}: peft_type is {kind!r}; only LORA can become an MLX adapter"
        )
    other = [name for name in OTHER_MEANINGS if config.get(name)]
    if config.get("bias") not in (None, "none"):
        other.append("bias")
    if config.get("init_lora_weights") not in PLAIN_STARTS:
        other.append("init_lora_weights")
    if other:
        listed = ", ".join(f"{name}: {config[name]!r}" for name in other)
        raise ModelError(f"{folder / CONFIG}: MLX adapters cannot do this ({listed}); {MERGE}")
    known = {field.name: field for field in fields(PeftSettings)}
    try:
        return Factors(
            PeftSettings(**{name: config[name] for name in known if name in config}),
            _read_patterns(config, "rank_pattern", known["r"]),
            _read_patterns(config, "alpha_pattern", known["lora_alpha"]),
        )
    except SettingsError as error:
        raise ModelError(f"{folder / CONFIG}: {error}") from None


def _read_patterns(config, name, field) -> list[tuple[re.Pattern, float]]:
    """(pattern that a module's name is to match, value) in order; PEFT takes the first that does."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise SettingsError(f"{name}: {patterns!r} is not an object of names and values")
    try:
        return [(re.compile(rf"(.*\.)?({p})"), coerce(field, v)) for p, v in patterns.items()]
    except re.error as error:
        raise SettingsError(f"{name}: not a pattern: {error}") from None


def _read_arrays(folder) -> tuple[dict[str, dict[str, mx.array]], dict[str, mx.array]]:
    """The updates in MLX's layout, by module and part, and the weights that were saved whole."""
    path = folder / PEFT_WEIGHTS
    if not path.is_file():
        if (folder / PICKLE).is_file():
            raise ModelError(
                f"{folder / PICKLE}: is a pickle, which may run any program when it is read; save the "
                "adapter as safetensors (in PEFT: save_pretrained with safe_serialization=True)"
            )
        raise ModelError(f"{folder}: not a complete adapter (it has no {PEFT_WEIGHTS})")
    check_safetensors(path)
    try:
        arrays = mx.load(str(path))
    except RuntimeError as error:
        raise ModelError(f"{path}: cannot be read: {error}") from None
    strange = [
        name for name, array in arrays.items() if not mx.issubdtype(array.dtype, mx.floating)
    ]
    if strange:
        raise ModelError(
            f"{path}: {strange[0]} is not of a floating-point type that MLX has; {MERGE}"
        )
    updates, saved = defaultdict(dict), {}
    for full_name, array in arrays.items():
        name = full_name.removeprefix(PEFT_PREFIX)
        match = _PART.fullmatch(name)
        if match:
            updates[match["module"]][_PARTS[match["part"]]] = array.T.astype(mx.float32)
        else:
            saved[re.sub(r"\.(base_layer|modules_to_save)\.", ".", name)] = array
    if not updates:
        raise ModelError(f"{path}: holds no low-rank updates")
    return dict(updates), saved


_PARTS = {theirs: ours for ours, theirs in (*LINEAR_PARTS.items(), *EMBEDDING_PARTS.items())}
_PARTS["lora_magnitude_vector.weight"] = "m"
_PART = re.compile(rf"(?P<module>.+)\.(?P<part>{'|'.join(map(re.escape, _PARTS))})")


def _unify(updates, factors: Factors, folder) -> tuple[dict[str, mx.array], int, float]:
    """All updates with one rank and one scale: (weights by MLX's names, rank, scale)."""
    wrong = []
    for name, parts in updates.items():
        if factors.settings.use_dora and name == EMBEDDING:
            wrong.append(
                f"{name}: has magnitudes (DoRA), which MLX adapters have on linear layers only"
            )
        for part, axis in (("lora_a", 1), ("lora_b", 0)):
            shape, rank = parts[part].shape if part in parts else (), factors.rank(name)
            if part in parts and (len(shape) != 2 or shape[axis] != rank):
                wrong.append(f"{name}: {part} is {shape}, and its rank is to be {rank}")
    if wrong:
        listed = summarise(sorted(wrong))
        raise ModelError(f"{folder}: its updates cannot be those of an MLX adapter:\n{listed}")
    rank = max(factors.rank(name) for name in updates)
    scale = mode(factors.scale(name) for name in updates)
    if scale <= 0:
        scale = 1.0
    weights = {}
    for name, parts in updates.items():
        fill, factor = rank - factors.rank(name), factors.scale(name) / scale
        for part, array in parts.items():
            if part == "lora_a":
                array = mx.pad(array, [(0, 0), (0, fill)])
            elif part == "lora_b":
                array = mx.pad(array * factor, [(0, fill), (0, 0)])
            weights[f"{name}.{part}"] = array
    return weights, rank, scale


def _check_base(model, config, saved, folder) -> None:
    kind = config["model_type"]
    if kind not in FAMILIES:
        raise ModelError(
            f"{folder}: its base is of type {kind!r}, whose parts have other names in MLX (those of "
            f"{', '.join(sorted(FAMILIES))} have the same); {MERGE}"
        )
    whole = sorted(saved.keys() - {SCORE})
    if whole and any(hasattr(module, "bits") for module in model.modules()):
        raise ModelError(
            f"{folder}: holds whole weights ({whole[0]}), which cannot go on a quantised base; give "
            "the float one with --model"
        )


def _stack_experts(model, family, weights) -> None:
    """Put updates of single experts together as MLX has them; an expert without one gets zeros."""
    ours = {theirs: name for name, theirs in family.experts.items()}
    layers, stacks = dict(model.named_modules()), defaultdict(dict)
    for name in [name for name in weights if _EXPERT.fullmatch(name)]:
        block, expert, projection, part = _EXPERT.fullmatch(name).groups()
        stack = stacks[f"{block}.switch_mlp.{ours.get(projection, projection)}", part]
        stack[int(expert)] = weights.pop(name).T
    for (layer, part), stack in stacks.items():
        count = layers[layer].num_experts if layer in layers else 0
        zeros = mx.zeros_like(next(iter(stack.values())))
        numbers = range(max(count, *stack, 0))
        weights[f"{layer}.{part}"] = mx.stack([stack.get(i, zeros) for i in numbers])


_EXPERT = re.compile(r"(.+)\.experts\.(\d{1,4})\.(\w+)\.(\w+)")


def _tie(model, weights, saved, folder) -> None:
    """Take the head's part out for a base whose head is its embedding, after checking that the two
    are changed alike."""
    base = dict(tree_flatten(model.parameters())).get(f"{EMBEDDING}.weight")
    pairs = [(saved.get(f"{EMBEDDING}.weight", base), saved.pop(f"{HEAD}.weight", base))]
    for ours, theirs in (("lora_a", "lora_b"), ("lora_b", "lora_a")):
        head = weights.pop(f"{HEAD}.{theirs}", None)
        pairs.append((weights.get(f"{EMBEDDING}.{ours}"), None if head is None else head.T))
    for one, other in pairs:
        if one is not other and (one is None or other is None or not mx.array_equal(one, other)):
            raise ModelError(
                f"{folder}: changes the embedding and the head of its base in different ways, and they "
                "are one matrix in that base (with ensure_weight_tying PEFT changes both alike)"
            )


def _choose_layers(model, weights, folder) -> dict:
    """The settings that put an adapter on exactly the modules that these weights are of.

    By names inside the last blocks where those have the same modules, else by whole names.
    """
    known = {name for name, *_ in adaptable_layers(model)}
    names = {name.rpartition(".")[0] for name in weights} & known
    if not names:
        # No adapter could be made to hold them against; this lists them all.
        check_fit({}, weights, str(folder))
    paths = {id(module): path for path, module in model.named_modules()}
    chosen, possible, whole = [], [], set(names)
    for block in model.layers:
        prefix = paths[id(block)] + "."
        possible.append({name for name, *_ in adaptable_layers(block)})
        chosen.append({name for name in possible[-1] if prefix + name in names})
        whole -= {prefix + name for name in chosen[-1]}
    first = next((i for i, inside in enumerate(chosen) if inside), 0)
    keys = set().union(*chosen)
    pairs = list(zip(chosen, possible, strict=True))[first:]
    if any(inside != keys & each for inside, each in pairs):
        return {"lora_keys": sorted(names)}
    every = not whole and all(inside == each for inside, each in pairs)
    return {
        "lora_layers": len(pairs) if first else -1,
        "lora_keys": None if every else sorted(keys) + sorted(whole),
    }


def _put_on(model, made, weights, saved, folder) -> tuple[Adapter, AdapterSettings]:
    """The adapter worn by the model; where other weights are changed too, all weights as one."""
    own = dict(tree_flatten(model.parameters()))
    changed = {n: x for n, x in saved.items() if n in own and not mx.array_equal(x, own[n])}
    _update(model, changed, own)
    adapter = wear_adapter(model, made, seed=0)
    needed = {name: own[name] for name in saved if name in own}
    check_fit({**adapter.weights(), **needed}, {**weights, **saved}, str(folder))
    adapter.load(weights, str(folder))
    if not changed:
        return adapter, made
    log.warning(
        "%s holds whole weights besides its updates (%s), so it becomes an adapter of all weights, as "
        "large as the model",
        folder,
        ", ".join(sorted(changed)),
    )
    merged = dict(fused_tensors(model))
    adapter.take_off()
    _update(model, merged, own)
    full = AdapterSettings(fine_tune="full")
    return wear_adapter(model, full, seed=0), full


def _update(model, weights, own) -> None:
    model.update(tree_unflatten([(n, x.astype(own[n].dtype)) for n, x in weights.items()]))
