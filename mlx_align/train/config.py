"""All settings of a training run in one object, and the flat form they have in files and flags."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from mlx_align.data.dataset import DataSettings
from mlx_align.errors import SettingsError
from mlx_align.losses import METHODS, Method
from mlx_align.model.adapter import AdapterSettings
from mlx_align.model.load import ModelSettings
from mlx_align.settings import Settings, build, flatten, nearest, setting


@dataclass(frozen=True)
class TrainSettings(Settings):
    """How the run goes."""

    output: str | None = setting(
        None, "Run folder to create. Default: runs/METHOD-DATE-TIME.", aliases=("adapter_path",)
    )
    steps: int | None = setting(
        None, "Optimizer steps. Default: as many as --epochs needs.", minimum=1, aliases=("iters",)
    )
    epochs: float = setting(1.0, "Passes over the data.", above=0)
    batch_size: int = setting(8, "Examples per optimizer step.", minimum=1)
    pack_length: int | None = setting(
        None,
        "Most tokens computed at once. Bounds memory; does not change the result. Default: 512 on "
        "the CPU, 2048 on a GPU.",
        minimum=16,
    )
    learning_rate: float | None = setting(
        None,
        "Peak learning rate. Default: the method's, a tenth of it for --fine-tune full.",
        above=0,
    )
    schedule: str = setting(
        "linear",
        "Learning rate after the warm-up: constant, or falling to 0.",
        choices=("constant", "linear", "cosine"),
    )
    warmup: float = setting(
        0.05, "Share of the steps over which the learning rate rises.", minimum=0, below=1
    )
    weight_decay: float = setting(0.0, "AdamW's weight decay.", minimum=0)
    max_grad_norm: float = setting(
        1.0, "Clip the gradient to this norm; 0 for no clipping.", minimum=0
    )
    seed: int = setting(0, "Seed of the split, the order, and the adapter's start.", minimum=0)
    eval_every: int | None = setting(
        None,
        "Steps between evaluations on held-out data; 0 for none but the first and last. "
        "Default: a quarter of the run.",
        minimum=0,
        aliases=("steps_per_eval",),
    )
    eval_examples: int = setting(256, "Most held-out examples used for an evaluation.", minimum=1)
    save_every: int = setting(50, "Steps between checkpoints.", minimum=1)
    keep_checkpoints: int = setting(2, "Checkpoints kept, besides the best.", minimum=1)
    grad_checkpoint: bool = setting(
        False, "Compute activations twice instead of keeping them: less memory, a third more time."
    )


# The groups of settings that every method has, in the order in which help shows them.
GROUPS = (ModelSettings, DataSettings, AdapterSettings, TrainSettings)


@dataclass(frozen=True)
class RunSettings:
    """Everything that determines a run."""

    method: Method
    model: ModelSettings
    data: DataSettings
    adapter: AdapterSettings
    train: TrainSettings

    @classmethod
    def from_flat(cls, method: str, values: Mapping, source: str) -> "RunSettings":
        """From flat names; `source` names where they came from in errors."""
        method_class = find_method(method)
        own, *groups = build((method_class, *GROUPS), values, source)
        return cls(own, *groups)

    def flat(self) -> dict:
        """All settings by name, as plain JSON values."""
        return flatten(self.method, self.model, self.data, self.adapter, self.train)

    def with_values(self, **values) -> "RunSettings":
        """A copy with some settings changed."""
        return self.from_flat(self.method.name, {**self.flat(), **values}, "settings")

    @property
    def learning_rate(self) -> float:
        """The peak learning rate, resolved."""
        if self.train.learning_rate is not None:
            return self.train.learning_rate
        full = self.adapter.fine_tune == "full"
        return self.method.learning_rate / 10 if full else self.method.learning_rate


def find_method(name: str) -> type[Method]:
    """The method class of a name. Raises `SettingsError` that lists the known ones."""
    if name not in METHODS:
        known = ", ".join(METHODS)
        raise SettingsError(f"unknown method {name!r}{nearest(name, METHODS)}; known: {known}")
    return METHODS[name]


def setting_names(method: str) -> dict[str, dataclasses.Field]:
    """Every setting of a method by its name."""
    classes = (find_method(method), *GROUPS)
    return {field.name: field for cls in classes for field in dataclasses.fields(cls)}
