"""Win rates: which of two models' answers are better, by a local judge or by a reward model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlx_align.data.records import Text
from mlx_align.evaluate.statistics import Measure, per_prompt
from mlx_align.rollout.judge import Duel, spoken

# A judge whose two orders disagree in a larger share than this is not believed.
MOST_DISAGREEMENT = 0.5


def reward_answers(source: str | Path, rows: Sequence[tuple[Text, str]]) -> np.ndarray:
    """A reward model's score of each (prompt, completion), float64[n]."""
    from mlx_align.model.reward import open_reward_model

    return np.asarray(open_reward_model(source).score(list(rows)), np.float64)


def win_rate(key: str, what: str, duels: Sequence[Duel], results: np.ndarray) -> Measure:
    """The mean of 1 for a win, 1/2 for a tie and 0 for a loss."""
    prompts = [spoken(duel.prompt) for duel in duels]
    sums = per_prompt(prompts, results, np.ones(len(results)))
    return Measure(key, "answers", what, sums, len(duels), "higher", "share", yes_or_no=True)


def mean_reward(duels: Sequence[Duel], rewards: np.ndarray) -> Measure:
    """The mean reward of one side's answers."""
    prompts = [spoken(duel.prompt) for duel in duels]
    sums = per_prompt(prompts, rewards, np.ones(len(rewards)))
    return Measure(
        "answers/reward", "answers", "mean reward of answers", sums, len(duels), "higher"
    )


def counts(results: np.ndarray) -> tuple[int, int, int]:
    """Wins, ties and losses."""
    wins, losses = int((results == 1).sum()), int((results == 0).sum())
    return wins, len(results) - wins - losses, losses
