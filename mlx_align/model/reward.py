"""Reward models in use: opened from a run, they score completions."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_align.data.records import CompletionRecord, Text, Unfit
from mlx_align.data.template import Encoder, Example
from mlx_align.errors import DataError, ModelError
from mlx_align.model.adapter import read_adapter_config
from mlx_align.model.forward import choose_layout, make_batches, rewards
from mlx_align.model.load import LoadedModel
from mlx_align.model.open import find_adapter, open_model

log = logging.getLogger("mlx_align")


@dataclass(frozen=True)
class RewardModel:
    """A model with a reward head, and the mean and deviation of its scores on its training data."""

    loaded: LoadedModel
    mean: float
    std: float
    prompt_format: str = "auto"
    thinking: bool | None = None

    def encoder(self) -> Encoder:
        """Renders prompts and completions as in training."""
        return Encoder(
            self.loaded.tokenizer,
            max_length=self.loaded.context_length or 1 << 20,
            template=self.loaded.template,
            prompt_format=self.prompt_format,
            thinking=self.thinking,
            truncate=False,
        )

    def score_examples(self, examples: Sequence[Example]) -> list[np.ndarray]:
        """The normalised reward of every completion of each example: (score - mean) / deviation."""
        found: dict[str, np.ndarray] = {}
        self.loaded.model.eval()
        for batch in make_batches(self.loaded, examples):
            scores = (np.array(rewards(self.loaded, batch), np.float64) - self.mean) / self.std
            found |= batch.by_example(scores)
        return [found[example.uid] for example in examples]

    def score(self, completions: Sequence[tuple[Text, Text]]) -> np.ndarray:
        """The normalised reward of each (prompt, completion), float64[n].

        Prompts are text or messages. Raises `DataError` where one cannot be scored.
        """
        encoder, examples = self.encoder(), []
        for i, (prompt, completion) in enumerate(completions, 1):
            record = CompletionRecord(prompt, completion, f"completion {i}")
            try:
                examples += encoder.examples(record)
            except Unfit as unfit:
                raise DataError(f"{record.origin} cannot be scored: {unfit.kind}") from None
        return np.array([scores[0] for scores in self.score_examples(examples)])


def worn_reward_model(loaded: LoadedModel, folder: Path) -> RewardModel:
    """The reward model whose adapter, from `folder`, a loaded model wears."""
    config = read_adapter_config(folder)
    statistics = config.get("reward")
    if statistics is None:
        log.warning("%s: is not finished, so its rewards are not normalised", folder)
        statistics = {"mean": 0.0, "std": 1.0}
    return RewardModel(
        loaded,
        statistics["mean"],
        statistics["std"] or 1.0,
        config.get("prompt_format", "auto"),
        config.get("thinking"),
    )


def open_reward_model(source: str | Path, dtype: str = "auto") -> RewardModel:
    """The reward model that a run of `mlx-align reward` holds."""
    folder = find_adapter(source)
    config = {} if folder is None else read_adapter_config(folder)
    if config.get("head") != "reward":
        raise ModelError(f"{source}: is no reward model (train one with: mlx-align reward)")
    loaded, _ = open_model(source, dtype)
    choose_layout(loaded)
    mx.eval(loaded.model.parameters())
    return worn_reward_model(loaded, folder)
