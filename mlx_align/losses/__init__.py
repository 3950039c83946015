"""All methods; importing this package fills the register."""

from mlx_align.losses import labels, likelihood, policy, preference, reward, selfplay, sft
from mlx_align.losses.base import METHODS, Loss, Method, Pairs, Scores

__all__ = ["METHODS", "Loss", "Method", "Pairs", "Scores"]
__all__ += ["labels", "likelihood", "policy", "preference", "reward", "selfplay", "sft"]
