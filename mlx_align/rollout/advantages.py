"""Rewards into advantages, for one rollout: pure functions of float64 arrays.

Knows neither models nor text. B rows of T tokens, right-padded or with holes, where `mask` says
which tokens were sampled; n prompts with G completions each, where a NaN reward means that no
reward applied. Everything is computed and returned in float64, whatever comes in.
"""

from typing import Literal

import numpy as np

from mlx_align.errors import NonFiniteError, SettingsError

# -- along the tokens ------------------------------------------------------------------------------


def gae(rewards, values, mask, gamma: float = 1.0, lam: float = 0.95):
    """Generalised advantage estimation: (advantages, returns), both [B, T], 0 where masked out.

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t = delta_t + gamma lam A_{t+1}
        R_t = A_t + V_t

    with t + 1 the next token that the mask keeps, and V = A = 0 behind the last one (Schulman et al.
    2015, arXiv:1506.02438, equations 11 to 16). `rewards`, `values`, `mask`: [B, T] or [T].
    Deviation: tokens that are masked out in the middle (what a tool said) are stepped over.
    """
    mask = np.asarray(mask, bool)
    rewards, values = _kept(rewards, mask), _kept(values, mask)
    advantages = np.zeros(mask.shape)
    later = later_value = np.zeros(mask.shape[:-1])
    for t in reversed(range(mask.shape[-1])):
        keep = mask[..., t]
        delta = rewards[..., t] + gamma * later_value - values[..., t]
        later = np.where(keep, delta + gamma * lam * later, later)
        later_value = np.where(keep, values[..., t], later_value)
        advantages[..., t] = np.where(keep, later, 0.0)
    return advantages, advantages + values


def returns_to_go(rewards, mask, gamma: float = 1.0):
    """G_t = r_t + gamma G_{t+1} over the tokens that the mask keeps: [B, T], 0 elsewhere.

    The advantages of REINFORCE and, whitened over the batch, of REINFORCE++ (Hu 2025,
    arXiv:2501.03262).
    """
    return gae(rewards, np.zeros(np.shape(mask)), mask, gamma, 1.0)[0]


def whiten(x, mask, bessel: bool = True):
    """(x - mean) / sqrt(variance + 1e-8) over everything that the mask keeps; 0 elsewhere.

    `bessel` divides the squares by n - 1 (as TRL does), otherwise by n (OpenRLHF, NeMo-Aligner).
    """
    mask = np.asarray(mask, bool)
    kept = np.asarray(x, np.float64)[mask]
    whitened = np.zeros(mask.shape)
    if kept.size:
        centred = kept - kept.mean()
        count = max(kept.size - bessel, 1)
        whitened[mask] = centred / np.sqrt((centred**2).sum() / count + 1e-8)
    return whitened


def kl_penalties(logp, ref, estimator: Literal["k1", "k2", "k3"] = "k1"):
    """Estimates of KL(policy || reference) for every token from its two log-probabilities (natural).

        k1 = logp - ref     k2 = (logp - ref)^2 / 2     k3 = exp(ref - logp) - 1 - (ref - logp)

    (Schulman 2020, joschu.net/blog/kl-approx.html.) k1 belongs in a reward, where it is unbiased; k2
    and k3 belong in a loss. k3 goes through expm1: written out, it loses all digits near 0.
    """
    ratio = np.asarray(ref, np.float64) - np.asarray(logp, np.float64)
    if estimator == "k1":
        return -ratio
    if estimator == "k2":
        return ratio**2 / 2
    if estimator == "k3":
        return np.expm1(ratio) - ratio
    raise SettingsError(f"kl estimator: {estimator!r} is not one of k1, k2, k3")


# -- across the completions of a prompt ------------------------------------------------------------


def group_advantages(rewards, scale: Literal["group", "batch", "none"] = "group"):
    """GRPO: A = (R - mean of the group) / (standard deviation + 1e-4), [n, G] -> [n, G].

    `scale` says whose deviation: the group's (Shao et al. 2024, arXiv:2402.03300, section 4.1.2), the
    whole batch's (Lite PPO, arXiv:2508.08221), or none (Dr. GRPO, Liu et al. 2025,
    arXiv:2503.20783). Deviations divide by the count - 1. NaN rewards enter nothing and get
    advantage 0; a group whose rewards are all equal gets exact zeros.
    """
    rewards = _groups(rewards)
    centred = _centred(rewards)
    if scale == "none":
        return centred
    if scale == "group":
        return centred / (_deviation(rewards, axis=1) + 1e-4)
    if scale == "batch":
        return centred / (_deviation(rewards, axis=None) + 1e-4)
    raise SettingsError(f"scale: {scale!r} is not one of group, batch, none")


def leave_one_out(rewards):
    """RLOO: A_i = R_i - mean of the group's other rewards, [n, G] -> [n, G].

    Ahmadian et al. 2024, arXiv:2402.14740, section 2.2; computed as m / (m - 1) (R_i - mean) with m
    the rewards that are not NaN. NaN rewards, and one that is alone, get advantage 0.
    """
    rewards = _groups(rewards)
    count = np.isfinite(rewards).sum(axis=1, keepdims=True)
    return _centred(rewards) * count / np.maximum(count - 1, 1)


def without_signal(rewards):
    """Which groups teach nothing, bool[n]: fewer than two rewards that are not NaN, or all equal.

    These are what DAPO's dynamic sampling leaves out (Yu et al. 2025, arXiv:2503.14476, section 3.2).
    """
    valid = np.isfinite(rewards)
    highest = np.where(valid, rewards, -np.inf).max(axis=1)
    lowest = np.where(valid, rewards, np.inf).min(axis=1)
    return ~(highest > lowest)


def _groups(rewards):
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be [prompts, completions], not of shape {rewards.shape}")
    if rewards.shape[1] < 2:
        raise SettingsError(
            "a group of 1 completion has nothing to be compared with; sample at least 2 of each prompt"
        )
    return rewards


def _centred(rewards):
    """Rewards minus their group's mean; 0 for NaN, and exactly 0 where a group's rewards are equal."""
    valid = np.isfinite(rewards)
    count = np.maximum(valid.sum(axis=1, keepdims=True), 1)
    mean = np.where(valid, rewards, 0.0).sum(axis=1, keepdims=True) / count
    # The mean of equal numbers is not always that number: 3 times 0.1 has mean 0.10000000000000002.
    useful = valid & ~without_signal(rewards)[:, None]
    return np.where(useful, rewards - mean, 0.0)


def _deviation(rewards, axis):
    """Standard deviation (count - 1) of what is not NaN, with its axes kept; 0 for fewer than two."""
    valid = np.isfinite(rewards)
    count = valid.sum(axis=axis, keepdims=True)
    kept = np.where(valid, rewards, 0.0)
    mean = kept.sum(axis=axis, keepdims=True) / np.maximum(count, 1)
    squares = np.where(valid, (rewards - mean) ** 2, 0.0).sum(axis=axis, keepdims=True)
    return np.sqrt(squares / np.maximum(count - 1, 1))


def _kept(x, mask):
    """`x` in float64 with 0 where masked out, whatever stood there."""
    return np.where(mask, np.asarray(x, np.float64), 0.0)


# -- how strongly to hold to the reference ---------------------------------------------------------


class AdaptiveKL:
    """A KL coefficient that is steered towards a target KL (nats per completion, summed over tokens).

        error = clip(KL / target - 1, -0.2, 0.2)
        coefficient *= 1 + error * completions / horizon

    Ziegler et al. 2019, arXiv:1909.08593, section 2.2. Their K_beta (0.1 an update) is written as
    completions / horizon, as in their code, so that it does not depend on the size of a batch.
    """

    def __init__(
        self,
        coefficient: float,
        target: float,
        horizon: float = 10_000,
        error_clip: float = 0.2,
    ):
        for name, value in (
            ("coefficient", coefficient),
            ("target", target),
            ("horizon", horizon),
            ("error_clip", error_clip),
        ):
            if not 0 < value < np.inf:
                raise SettingsError(f"adaptive KL: its {name} must be greater than 0, not {value}")
        self.coefficient = float(coefficient)
        self.target, self.horizon, self.error_clip = target, horizon, error_clip

    def update(self, kl: float, completions: int) -> float:
        """Take in the mean KL that a batch of completions had; the new coefficient."""
        if not np.isfinite(kl):
            raise NonFiniteError(
                f"the KL to the reference is {kl}, so its coefficient cannot be adapted; "
                "a lower learning rate keeps the policy closer"
            )
        error = np.clip(kl / self.target - 1, -self.error_clip, self.error_clip)
        # A batch larger than horizon / error_clip would otherwise turn the coefficient negative.
        self.coefficient *= float(max(1 + error * completions / self.horizon, 0.1))
        return self.coefficient

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"coefficient": self.coefficient}

    def load(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint's `state`."""
        self.coefficient = float(state["coefficient"])
