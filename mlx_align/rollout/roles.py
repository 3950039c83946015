"""The models beside the policy, where possible on its base: reference, critic, reward model.

One base is in memory. The policy's adapter is off while a role is worn, and on again afterwards.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlx_align.data.packing import Batch
from mlx_align.errors import SettingsError
from mlx_align.losses.policy import Critic
from mlx_align.model.adapter import (
    Adapter,
    AdapterSettings,
    load_adapter,
    read_adapter_config,
    wear_adapter,
)
from mlx_align.model.forward import token_scores, values
from mlx_align.model.heads import attach_reward_head
from mlx_align.model.load import LoadedModel
from mlx_align.model.open import find_adapter, find_template_file
from mlx_align.model.reward import RewardModel, open_reward_model, worn_reward_model
from mlx_align.train.optimizer import Optimizer
from mlx_align.train.source import Ground, Learner, open_reference

log = logging.getLogger("mlx_align")


class Reference:
    """What the KL is taken to: what training started from, or another model."""

    def __init__(self, ground: Ground):
        settings = ground.settings
        self._ground = ground
        self._other: LoadedModel | None = None
        self._start = ground.adapter.weights() if settings.adapter.start else None
        if settings.method.reference != "start":
            self._other = open_reference(ground)[0]
        elif ground.adapter.kind == "full":
            raise SettingsError(
                "with --fine-tune full the reference is gone after the first step; name a --reference "
                "model, or use --beta 0 and no --kl-budget"
            )

    @contextlib.contextmanager
    def worn(self) -> Iterator[LoadedModel]:
        """While this is open the model that it gives is the reference."""
        if self._other is not None:
            yield self._other
            return
        with self._ground.adapter.at_start(self._start):
            yield self._ground.loaded

    def log_probs(self, pack: Batch) -> np.ndarray:
        """The reference's log-probabilities of a pack's table, float32[M]."""
        temperature = self._ground.settings.method.temperature
        with self.worn() as loaded:
            return np.array(token_scores(loaded, pack, temperature=temperature).logp)


class Mixture(nn.Module):
    """A model that writes as a geometric mean of two does: log p = (1 - c) log pi + c log pi_ref + const.

    Munos et al. 2023, arXiv:2312.00886, section 7.1. Its cache is that of both.
    """

    def __init__(self, policy: nn.Module, reference: Reference, share: float):
        super().__init__()
        self._policy, self._reference, self._share = policy, reference, share
        self._own = len(make_prompt_cache(policy))

    def make_cache(self) -> list:
        """The policy's cache and the reference's behind it."""
        with self._reference.worn() as loaded:
            return make_prompt_cache(self._policy) + make_prompt_cache(loaded.model)

    def __call__(self, tokens: mx.array, cache: list) -> mx.array:
        logits = (1 - self._share) * self._policy(tokens, cache=cache[: self._own])
        with self._reference.worn() as loaded:
            return logits + self._share * loaded.model(tokens, cache=cache[self._own :])


class SharedRewardModel:
    """A reward model on the policy's own base, put on to score and taken off again."""

    def __init__(self, ground: Ground, folder: Path):
        loaded, policy = ground.loaded, ground.adapter
        policy.take_off()
        attach_reward_head(loaded.model, loaded.head)
        self.adapter = load_adapter(loaded.model, folder)
        self.adapter.head = loaded.model.score
        self.adapter.take_off()
        policy.put_on()
        self._policy = policy
        self.model = worn_reward_model(loaded, folder)

    def score(self, completions) -> np.ndarray:
        """As `RewardModel.score`."""
        with self._policy.replaced_by(self.adapter):
            return self.model.score(completions)


def open_shared(ground: Ground, source: str) -> SharedRewardModel | RewardModel:
    """The reward model of a run: on the policy's base where it was made on it, else beside it."""
    folder = find_adapter(source)
    config = {} if folder is None else read_adapter_config(folder)
    same = config.get("head") == "reward" and config.get("model") == ground.settings.model.model
    template = find_template_file(folder) if same else None
    if template is not None:
        own = ground.loaded.template
        same = own is not None and template.read_text(encoding="utf-8") == own.source
    if same and config.get("fine_tune_type") != "full" and ground.adapter.kind != "full":
        return SharedRewardModel(ground, folder)
    model = open_reward_model(source)
    log.info(
        "the reward model %s has another base or template, so two models are in memory", source
    )
    return model


class CriticRole:
    """The critic: an adapter like the policy's with a head of its own, and its optimizer."""

    def __init__(self, ground: Ground, start: SharedRewardModel | None):
        settings, loaded, policy = ground.settings, ground.loaded, ground.adapter
        method, train = settings.method, settings.train
        self._ground = ground
        policy.take_off()
        head = attach_reward_head(loaded.model, loaded.head, train.seed + 1)
        made: AdapterSettings = replace(settings.adapter, start=None)
        self.adapter: Adapter = wear_adapter(loaded.model, made, train.seed + 1)
        self.adapter.head = head
        if start is not None:
            self._start_from(start)
        mx.eval(self.adapter.parameters())
        self.adapter.take_off()
        policy.put_on()
        self._optimizer = Optimizer(train.weight_decay, train.max_grad_norm)
        critic = Critic(clip=method.value_clip)
        self.learner = Learner(critic, self.adapter, self._optimizer, method.critic_rate)

    def _start_from(self, start: SharedRewardModel) -> None:
        """Begin as the reward model, whose score of a finished answer is what is to be expected."""
        own = self.adapter.weights()
        with self.adapter.replaced_by(start.adapter):
            weights = start.adapter.weights()
        if {n: a.shape for n, a in weights.items()} != {n: a.shape for n, a in own.items()}:
            log.info("the reward model's adapter has another shape; the critic starts afresh")
            return
        # The reward is (score - mean) / deviation; the head has no constant, which it learns around.
        weights["score.weight"] = weights["score.weight"] / start.model.std
        self.adapter.load(weights, "the reward model")

    def values(self, batch) -> np.ndarray:
        """The values of a batch's table, float32[M]."""
        with self._ground.adapter.replaced_by(self.adapter):
            self._ground.loaded.model.eval()
            return np.array(values(self._ground.loaded, batch))

    # -- what a checkpoint keeps

    def state(self) -> dict[str, mx.array]:
        """Adapter and optimizer, as arrays by name."""
        with self._ground.adapter.replaced_by(self.adapter):
            weights = {f"weights/{n}": a for n, a in self.adapter.weights().items()}
        return weights | {f"optimizer/{n}": a for n, a in self._optimizer.state().items()}

    def load(self, state: dict[str, mx.array]) -> None:
        """Continue from a saved state."""
        parts = {"weights": {}, "optimizer": {}}
        for name, array in state.items():
            kind, _, rest = name.partition("/")
            parts[kind][rest] = array
        with self._ground.adapter.replaced_by(self.adapter):
            self.adapter.load(parts["weights"], "the critic")
            if parts["optimizer"]:
                self._optimizer.load(parts["optimizer"], self.adapter.parameters())
