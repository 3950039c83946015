"""Rollouts: prompts are answered and the answers rewarded.

    prompts -> sample_groups -> texts -> rewards -> Rollout

Knows neither advantages nor losses. What is sampled is a function of the seed and the policy.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlx_align.data.template import Example
from mlx_align.losses.policy import Online
from mlx_align.model.load import LoadedModel
from mlx_align.rollout.advantages import without_signal
from mlx_align.rollout.groups import Sample, sample_groups
from mlx_align.rollout.rewards import Request, Reward, combine
from mlx_align.rollout.roles import Mixture, Reference

# Samples of a step that are written down.
WRITTEN = 8


@dataclass(frozen=True, eq=False)
class Rollout:
    """The samples of P prompts with their texts and rewards; G of each prompt.

    `reward` is float64[P, G], what is learnt from: NaN where no reward applies. `parts` are the
    rewards by name, float64[P, G], unweighted. The first `own` samples of each prompt are the policy's.
    """

    prompts: list[Example]
    groups: list[list[Sample]]
    texts: list[list[str]]
    reward: np.ndarray
    parts: dict[str, np.ndarray]
    own: int

    @property
    def samples(self) -> list[Sample]:
        """The policy's samples, in order."""
        return [sample for group in self.groups for sample in group[: self.own]]

    def joined(self, other: "Rollout") -> "Rollout":
        """The prompts of both."""
        return replace(
            self,
            prompts=self.prompts + other.prompts,
            groups=self.groups + other.groups,
            texts=self.texts + other.texts,
            reward=np.concatenate([self.reward, other.reward]),
            parts={n: np.concatenate([v, other.parts[n]]) for n, v in self.parts.items()},
        )

    def kept(self, keep: np.ndarray) -> "Rollout":
        """The prompts that `keep`, bool[P], says."""
        chosen = np.flatnonzero(keep)
        return replace(
            self,
            prompts=[self.prompts[i] for i in chosen],
            groups=[self.groups[i] for i in chosen],
            texts=[self.texts[i] for i in chosen],
            reward=self.reward[keep],
            parts={n: v[keep] for n, v in self.parts.items()},
        )

    def metrics(self, clip: float | None = None) -> dict[str, float]:
        """TRL's metrics of rewards and lengths, and how far the policy's samples repeat themselves.

        `clip` is where rewards were clipped, if they were.
        """
        reward = self.reward[:, : self.own]
        found = {"reward": float(np.nanmean(reward)), "reward_std": float(np.nanstd(reward))}
        if clip is not None:
            found["rewards/clipped_ratio"] = float((np.abs(reward) >= clip).mean())
        for name, values in self.parts.items():
            own = values[:, : self.own]
            if np.isfinite(own).any():
                found[f"rewards/{name}/mean"] = float(np.nanmean(own))
                found[f"rewards/{name}/std"] = float(np.nanstd(own))
        if self.reward.shape[1] > 1:
            found["frac_reward_zero_std"] = float(without_signal(self.reward).mean())
        lengths = np.array([len(s.ids) for s in self.samples])
        finished = np.array([s.finished for s in self.samples])
        return found | {
            "completions/mean_length": float(lengths.mean()),
            "completions/min_length": float(lengths.min()),
            "completions/max_length": float(lengths.max()),
            "completions/clipped_ratio": float(1 - finished.mean()),
            **diversity([s.ids for s in self.samples]),
        }

    def written(self) -> list[dict]:
        """The best and the worst sample of the first prompts, as rows of samples.jsonl."""
        rows = []
        for i in range(min(WRITTEN, len(self.prompts))):
            order = np.argsort(-np.nan_to_num(self.reward[i]), kind="stable")
            for k in dict.fromkeys((order[0], order[-1])):
                reward = self.reward[i, k]
                rows.append(
                    {
                        "prompt": self.prompts[i].asked,
                        "completion": self.texts[i][k],
                        "reward": None if np.isnan(reward) else float(reward),
                        "finished": self.groups[i][k].finished,
                        "origin": self.prompts[i].origin,
                    }
                )
        return rows


def diversity(completions: Sequence[np.ndarray]) -> dict[str, float]:
    """How far completions (ids) repeat themselves, and one another.

    `completions/repetition` is the share of a completion's trigrams that it has had before, the mean
    over completions; `completions/distinct_2` the share of different ones among all bigrams (Li et
    al. 2016, arXiv:1510.03055).
    """
    repeated = [1 - len(set(grams)) / len(grams) for c in completions if (grams := _grams(c, 3))]
    pairs = Counter(gram for c in completions for gram in _grams(c, 2))
    return {
        "completions/repetition": float(np.mean(repeated)) if repeated else 0.0,
        "completions/distinct_2": len(pairs) / max(pairs.total(), 1),
    }


def _grams(ids, size) -> list[tuple]:
    return list(zip(*(ids[i:].tolist() for i in range(size)), strict=False))


class Sampling:
    """Draws rollouts as a method says, with its rewards."""

    def __init__(
        self,
        loaded: LoadedModel,
        method: Online,
        rewards: Sequence[Reward],
        reference: Reference | None,
    ):
        self._loaded, self._method, self._rewards = loaded, method, rewards
        self._reference = reference

    def step(self, prompts: list[Example], seed: int) -> Rollout:
        """The samples a step learns from; of two contenders the opponent's behind the policy's."""
        method = self._method
        if method.opponent == "policy":
            groups = self._draw(self._loaded, prompts, method.group_size, seed)
            return self.rewarded(prompts, groups, own=method.group_size)
        if method.opponent == "reference":
            return self.against_reference(prompts, seed)
        mixed = replace(
            self._loaded, model=Mixture(self._loaded.model, self._reference, method.mixture)
        )
        return self._paired(prompts, self._draw(mixed, prompts, 1, seed + 1), seed)

    def alone(self, prompts: list[Example], seed: int) -> Rollout:
        """One sample of each prompt."""
        return self.rewarded(prompts, self._draw(self._loaded, prompts, 1, seed), own=1)

    def against_reference(self, prompts: list[Example], seed: int) -> Rollout:
        """One sample of each prompt, and the reference's behind it."""
        with self._reference.worn() as loaded:
            theirs = self._draw(loaded, prompts, 1, seed + 1)
        return self._paired(prompts, theirs, seed)

    def _paired(self, prompts, theirs: list[list[Sample]], seed: int) -> Rollout:
        mine = self._draw(self._loaded, prompts, 1, seed)
        pairs = [own + other for own, other in zip(mine, theirs, strict=True)]
        return self.rewarded(prompts, pairs, own=1)

    def rewarded(self, prompts: list[Example], groups: list[list[Sample]], own: int) -> Rollout:
        """Samples with their texts and rewards."""
        method, texts = self._method, [[self._text(s) for s in group] for group in groups]
        scored = combine(self._rewards, requests(prompts, groups, texts))
        finished = np.array([s.finished for group in groups for s in group])
        total = scored.total - method.unfinished_penalty * ~finished
        if method.reward_clip is not None:
            total = np.clip(total, -method.reward_clip, method.reward_clip)
        shape = (len(prompts), -1)
        parts = {name: values.reshape(shape) for name, values in scored.rewards.items()}
        return Rollout(prompts, groups, texts, total.reshape(shape), parts, own)

    def _draw(self, loaded, prompts, count, seed) -> list[list[Sample]]:
        method = self._method
        return sample_groups(
            loaded,
            [e.prompt.tolist() for e in prompts],
            count,
            max_tokens=method.max_tokens,
            temperature=method.temperature,
            top_p=method.top_p,
            top_k=method.top_k,
            stop=method.stop,
            seed=seed % 2**31,
        )

    def _text(self, sample: Sample) -> str:
        text = self._loaded.tokenizer.decode(sample.ids.tolist(), skip_special_tokens=True)
        for end in self._method.stop:
            text = text.partition(end)[0]
        return text


def requests(prompts, groups, texts) -> list[Request]:
    """The samples as rewards are asked for them, in order."""
    return [
        Request(e.asked, text, e.row, s.finished, len(s.ids), e.origin)
        for e, group, said in zip(prompts, groups, texts, strict=True)
        for s, text in zip(group, said, strict=True)
    ]
