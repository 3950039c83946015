"""Everything a run needs to go on: adapter, optimizer, position, what a method keeps. Atomic folders.

    checkpoints/step-000050/  adapters.safetensors  adapter_config.json  optimizer.safetensors  state.json

A checkpoint is written under another name and moved into place when it is complete, so what is
there is whole. Each is an adapter folder that mlx-lm can load. Order and randomness are functions of
the seed and the step, so they need no state.
"""

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import mlx.core as mx

from mlx_align.errors import RunError
from mlx_align.files import replace_folder, write_json
from mlx_align.model.adapter import WEIGHTS, Adapter, AdapterSettings, save_weights
from mlx_align.train.optimizer import Optimizer

BEST = "best"


@dataclass
class Progress:
    """Where a run stands after a number of optimizer steps."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_value: float | None = None
    best_step: int | None = None
    method_state: dict = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run: Path, settings: AdapterSettings, adapter_extra: dict, keep: int):
        self.folder = run / "checkpoints"
        self._settings = settings
        self._extra = adapter_extra
        self._keep = keep

    def save(self, adapter: Adapter, optimizer: Optimizer, progress: Progress, keeps: dict) -> Path:
        """Write the state after `progress.step` steps and remove the oldest ones.

        `keeps` is what else is to be kept, by name; each has state() and load().
        """
        target = self.folder / f"step-{progress.step:06d}"
        temporary = self._begin(target, adapter)
        save_weights(temporary / "optimizer.safetensors", optimizer.state())
        for name, kept in keeps.items():
            save_weights(temporary / f"{name}.safetensors", kept.state())
        write_json(temporary / "state.json", asdict(progress))
        replace_folder(temporary, target)
        for old in self._steps()[: -self._keep]:
            shutil.rmtree(old)
        return target

    def save_best(self, adapter: Adapter, progress: Progress) -> Path:
        """Keep the adapter as the best so far."""
        target = self.folder / BEST
        temporary = self._begin(target, adapter)
        write_json(temporary / "state.json", asdict(progress))
        replace_folder(temporary, target)
        return target

    def load_latest(self, adapter: Adapter, optimizer: Optimizer, keeps: dict) -> Progress:
        """Put the newest state back; a fresh `Progress` where there is none."""
        self._clean()
        steps = self._steps()
        if not steps:
            return Progress()
        folder = steps[-1]
        try:
            progress = Progress(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
            weights = mx.load(str(folder / WEIGHTS))
            state = mx.load(str(folder / "optimizer.safetensors"))
            kept = {name: mx.load(str(folder / f"{name}.safetensors")) for name in keeps}
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise RunError(
                f"{folder}: this checkpoint cannot be read ({error}); delete the folder to go on from "
                "the one before"
            ) from None
        adapter.load(weights, str(folder / WEIGHTS))
        optimizer.load(state, adapter.parameters())
        for name, values in kept.items():
            keeps[name].load(values)
        return progress

    def _begin(self, target: Path, adapter: Adapter) -> Path:
        temporary = target.with_name(f".{target.name}.tmp")
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        adapter.save(temporary, self._settings, self._extra)
        return temporary

    def _steps(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("step-*") if p.is_dir())

    def _clean(self) -> None:
        for leftover in self.folder.glob(".*.tmp"):
            shutil.rmtree(leftover)
