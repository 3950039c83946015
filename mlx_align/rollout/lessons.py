"""Rollouts into lessons: what each mini-batch teaches the policy, and the critic if there is one.

Old and reference log-probabilities come from the forward pass that trains, on the very packs that are
trained on, so the first ratio is exactly 1.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from mlx_align.data.packing import Batch
from mlx_align.data.template import Example, make_example
from mlx_align.model.forward import make_batches, token_ratios, token_scores
from mlx_align.rollout.advantages import (
    gae,
    group_advantages,
    kl_penalties,
    leave_one_out,
    returns_to_go,
    whiten,
    without_signal,
)
from mlx_align.rollout.groups import Sample
from mlx_align.rollout.roles import CriticRole, Reference
from mlx_align.rollout.rollouts import Rollout
from mlx_align.train.source import Ground
from mlx_align.train.step import Part


class Lesson(NamedTuple):
    """What a mini-batch teaches: the policy its advantages, the critic (if there is one) its returns."""

    policy: list[Part]
    critic: list[Part]


class Teacher:
    """What all teachers share: the method, the reference, and how examples become mini-batches."""

    def __init__(self, ground: Ground, reference: Reference | None):
        self._ground, self._method, self._reference = ground, ground.settings.method, reference

    def teach(self, rollout: Rollout, beta: float) -> tuple[list[Lesson], dict[str, float]]:
        """What each mini-batch teaches where the KL weighs `beta`, and the metrics of the scores."""
        raise NotImplementedError

    def _minibatches(self, examples: list[Example]) -> list[list[Batch]]:
        """The packs of each mini-batch."""
        loaded, length = self._ground.loaded, self._ground.settings.train.pack_length
        loaded.model.eval()
        size = max(-(-len(examples) // self._method.minibatches), 1)
        parts = (examples[i : i + size] for i in range(0, len(examples), size))
        return [make_batches(loaded, part, length) for part in parts]


def as_example(prompt: Example, samples: Sequence[Sample], masks, place: int) -> Example:
    """Samples as the completions of their prompt. Equal prompts are told apart by their place."""
    made = make_example(prompt.prompt, [s.ids for s in samples], masks, prompt.origin)
    return replace(made, uid=f"{place}:{made.uid}")


class PolicyTeacher(Teacher):
    """Rewards into advantages, for policy gradients."""

    def __init__(self, ground: Ground, reference: Reference | None, critic: CriticRole | None):
        super().__init__(ground, reference)
        self._critic = critic

    def teach(self, rollout: Rollout, beta: float) -> tuple[list[Lesson], dict[str, float]]:
        method, loaded = self._method, self._ground.loaded
        examples = self._examples(rollout)
        groups = self._minibatches(examples)
        entropy = tokens = 0.0
        old, ref, kl, value = {}, {}, {}, {}
        for pack in (p for group in groups for p in group):
            if self._reference is None:
                scores = token_scores(loaded, pack, moments=True, temperature=method.temperature)
            else:
                scores = token_ratios(
                    loaded, self._reference.worn, pack, temperature=method.temperature
                )
                ref |= pack.by_example_tokens(np.array(scores.logp - scores.log_ratio))
                kl |= pack.by_example_tokens(np.array(scores.log_ratio, np.float64))
            old |= pack.by_example_tokens(np.array(scores.logp))
            entropy += float((np.array(scores.entropy) * pack.weight).sum())
            tokens += float(pack.weight.sum())
            if self._critic is not None:
                value |= pack.by_example_tokens(self._critic.values(pack))
        gaps = [
            np.abs(old[e.uid] - np.concatenate([s.logp for s in group])[np.concatenate(e.scored)])
            for e, group in zip(examples, rollout.groups, strict=True)
        ]
        found = {
            "entropy": entropy / max(tokens, 1),
            "sampling/logp_gap": float(np.concatenate(gaps).mean()) if tokens else 0.0,
        }
        if kl:
            found["objective/kl"] = float(np.mean([_sums(e, kl[e.uid]) for e in examples]))
        advantages, returns = self._advantages(rollout, examples, kl, value, beta, found)
        lessons = [
            Lesson(
                [
                    Part(
                        pack, pack.join(ref) if ref else None, pack.join(old), pack.join(advantages)
                    )
                    for pack in group
                ],
                [Part(pack, None, pack.join(value), pack.join(returns)) for pack in group if value],
            )
            for group in groups
        ]
        return lessons, found

    def _examples(self, rollout: Rollout) -> list[Example]:
        """One example a prompt: its samples as completions."""
        examples = []
        for i, (prompt, group) in enumerate(zip(rollout.prompts, rollout.groups, strict=True)):
            masks = [
                np.full(len(s.ids), s.finished or not self._method.mask_unfinished) for s in group
            ]
            examples.append(as_example(prompt, group, masks, i))
        return examples

    def _advantages(
        self, rollout, examples, kl, value, beta, found
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The advantages of tokens by example and, with a critic, their returns."""
        method, reward = self._method, rollout.reward
        match method.advantage:
            case "group":
                values = group_advantages(reward, method.scale_rewards)
            case "leave-one-out":
                if kl:
                    reward = reward - beta * np.array([_sums(e, kl[e.uid]) for e in examples])
                values = leave_one_out(reward)
            case "return" | "gae":
                return self._along_tokens(rollout, examples, kl, value, beta, found)
        each = zip(examples, values, strict=True)
        return {e.uid: np.repeat(row, e.scored_lengths) for e, row in each}, {}

    def _along_tokens(
        self, rollout, examples, kl, value, beta, found
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Advantages of tokens from rewards of tokens: the score on the last one, the KL on each.

        Without a critic the whitened reward to go (REINFORCE++), with one the whitened generalised
        advantage estimate, and the returns that the critic is to learn.
        """
        method, reward = self._method, rollout.reward.reshape(-1)
        # What no reward applies to is taken for average: it is neither pushed nor pulled.
        average = float(np.nanmean(reward)) if np.isfinite(reward).any() else 0.0
        scores = np.where(np.isnan(reward), average, reward)
        lengths = [n for e in examples for n in e.scored_lengths]
        rows = np.zeros((len(lengths), max(lengths)))
        mask = np.arange(rows.shape[1]) < np.array(lengths)[:, None]
        if kl:
            rows[mask] = -beta * np.concatenate([kl[e.uid] for e in examples])
        for row, n, score in zip(rows, lengths, scores, strict=True):
            if n:
                row[n - 1] += score

        def by_example(table):
            ends = np.cumsum([sum(e.scored_lengths) for e in examples])
            parts = np.split(table[mask], ends[:-1])
            return {e.uid: part for e, part in zip(examples, parts, strict=True)}

        if not value:
            return by_example(whiten(returns_to_go(rows, mask), mask, bessel=False)), {}
        states = np.zeros_like(rows)
        states[mask] = np.concatenate([value[e.uid] for e in examples])
        advantages, returns = gae(rows, states, mask, method.gamma, method.gae_lambda)
        spread = returns[mask].var()
        found["critic/explained_variance"] = (
            float(1 - (returns - states)[mask].var() / spread) if spread else 0.0
        )
        found["critic/value_mean"] = float(states[mask].mean())
        found["objective/rlhf_reward"] = float(rows.sum(axis=1).mean())
        return by_example(whiten(advantages, mask)), by_example(returns)


class Compared(NamedTuple):
    """Samples of a prompt as one example: which of them are the policy's, and a number on each token."""

    example: Example
    samples: list[Sample]
    own: list[bool]
    advantage: np.ndarray


class PairTeacher(Teacher):
    """Rewards into comparisons: chosen and rejected samples, or how likely a sample is to win."""

    def __init__(self, ground: Ground, reference: Reference, judged: bool):
        """`judged` says that rewards are shares of won comparisons, not utilities."""
        super().__init__(ground, reference)
        self._judged = judged

    def teach(self, rollout: Rollout, beta: float) -> tuple[list[Lesson], dict[str, float]]:
        made = self._wins(rollout) if self._method.opponent == "mixture" else self._pairs(rollout)
        groups = self._minibatches([c.example for c in made])
        ref: dict[str, np.ndarray] = {}
        for pack in (p for group in groups for p in group):
            ref |= pack.by_example_tokens(self._reference.log_probs(pack))
        advantages = {c.example.uid: c.advantage for c in made}
        lessons = [
            Lesson([Part(p, p.join(ref), None, p.join(advantages)) for p in group], [])
            for group in groups
        ]
        likelihoods = [float(s.logp.sum()) for s in rollout.samples]
        found = {"objective/entropy": -float(np.mean(likelihoods))}
        kl = [kl for c in made for kl in self._kl(c, ref[c.example.uid])]
        if kl:
            found["objective/kl"] = float(np.mean(kl))
        return lessons, found

    def _kl(self, compared: Compared, ref: np.ndarray) -> list[float]:
        """log pi - log pi_ref of the policy's samples."""
        sampled = np.concatenate([s.logp for s in compared.samples])
        sums = _sums(compared.example, kl_penalties(sampled, ref))
        return [kl for kl, own in zip(sums, compared.own, strict=True) if own]

    def _pairs(self, rollout: Rollout) -> list[Compared]:
        """The best and the worst sample of each prompt; 1 on the tokens of the opponent's samples."""
        rollout = rollout.kept(~without_signal(rollout.reward))
        pairs = []
        for i, reward in enumerate(rollout.reward):
            sides = (int(np.nanargmax(reward)), int(np.nanargmin(reward)))
            own = [k < rollout.own for k in sides]
            pairs.append(self._compared(rollout, i, sides, own, [0.0 if x else 1.0 for x in own]))
        return pairs

    def _wins(self, rollout: Rollout) -> list[Compared]:
        """The policy's samples, and P(y > y') - 1/2 on each of their tokens."""
        rollout = rollout.kept(np.isfinite(rollout.reward).all(axis=1))
        gap = rollout.reward[:, 0] - rollout.reward[:, 1]
        edge = np.clip(gap / 2, -0.5, 0.5) if self._judged else 1 / (1 + np.exp(-gap)) - 0.5
        return [self._compared(rollout, i, (0,), [True], [edge[i]]) for i in range(len(edge))]

    def _compared(self, rollout, i, sides, own, advantages) -> Compared:
        samples = [rollout.groups[i][k] for k in sides]
        masks = [np.ones(len(s.ids), bool) for s in samples]
        example = as_example(rollout.prompts[i], samples, masks, i)
        return Compared(example, samples, own, np.repeat(advantages, example.scored_lengths))


def _sums(example: Example, values: np.ndarray) -> Sequence[float]:
    """The sum of a token's values over each completion."""
    ends = np.cumsum(example.scored_lengths)
    return [float(part.sum()) for part in np.split(values, ends[:-1])]
