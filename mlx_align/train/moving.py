"""A reference that follows the policy (TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656).

Every n steps: reference = w * policy + (1 - w) * reference, of the weights. With LoRA the weights'
updates are what is mixed, exactly: an update A B of rank r is a term of the sum, so the reference
wears its terms side by side, as one update of a higher rank.
"""

import mlx.core as mx
import numpy as np

from mlx_align.data.packing import Batch
from mlx_align.errors import SettingsError
from mlx_align.model.adapter import Adapter
from mlx_align.model.forward import token_log_probs
from mlx_align.model.load import LoadedModel

# Terms with less weight than this are forgotten; at w = 0.6 that leaves about ten.
SMALLEST = 1e-4


class MovingReference:
    """The reference's state: terms (factor, arrays by name), the newest last."""

    def __init__(self, loaded: LoadedModel, adapter: Adapter, every: int, weight: float):
        if adapter.kind == "dora" and weight < 1:
            raise SettingsError(
                "sync_weight: updates with magnitudes (dora) cannot be mixed; use --sync-weight 1 or lora"
            )
        self._loaded, self._adapter = loaded, adapter
        self._every, self._weight = every, weight
        self.terms = [(1.0, adapter.weights())]

    def log_probs(self, batch: Batch) -> np.ndarray:
        """The reference's log-probabilities of a batch's table, float32[M]."""
        self._loaded.model.eval()
        with self._adapter.wearing(self._mixed()):
            return np.array(token_log_probs(self._loaded, batch)[0])

    def after(self, step: int) -> None:
        """Follow the policy where `step` steps are a multiple of the interval."""
        if step % self._every:
            return
        now = self._adapter.weights()
        if self._adapter.kind == "full":
            (_, before), w = self.terms[0], self._weight
            mixed = {name: w * now[name] + (1 - w) * before[name] for name in now}
            mx.eval(mixed)
            self.terms = [(1.0, mixed)]
            return
        kept = [(factor * (1 - self._weight), arrays) for factor, arrays in self.terms]
        self.terms = [t for t in kept if t[0] >= SMALLEST] + [(self._weight, now)]

    def state(self) -> dict[str, mx.array]:
        """Everything to go on with, as arrays by name."""
        factors = np.array([factor for factor, _ in self.terms], np.float64)
        state = {"factors": mx.array(factors.view(np.uint32))}
        for i, (_, arrays) in enumerate(self.terms):
            state |= {f"{i}/{name}": array for name, array in arrays.items()}
        return state

    def load(self, state: dict[str, mx.array]) -> None:
        """Continue from a saved state."""
        factors = np.array(state["factors"]).view(np.float64).tolist()
        self.terms = [
            (factor, {n.partition("/")[2]: a for n, a in state.items() if n.startswith(f"{i}/")})
            for i, factor in enumerate(factors)
        ]

    def _mixed(self) -> dict[str, mx.array]:
        if len(self.terms) == 1 and self.terms[0][0] == 1.0:
            return self.terms[0][1]
        mixed = {}
        for name in self.terms[0][1]:
            if name.endswith("lora_b"):
                parts = [factor * arrays[name] for factor, arrays in self.terms]
                mixed[name] = mx.concatenate(parts, axis=0 if parts[0].ndim == 2 else -1)
            else:
                parts = [arrays[name] for _, arrays in self.terms]
                mixed[name] = mx.concatenate(parts, axis=-1 if parts[0].ndim == 2 else -2)
        return mixed
