"""Steps from samples: prompts are answered, answers rewarded, rewards become advantages.

    prompts -> sample_groups -> rewards -> advantages -> packs that share the prompt -> updates

Old and reference log-probabilities come from the forward pass that trains, on the very packs that are
trained on, so the first ratio is exactly 1. What a step samples is a function of the seed, the step and
the policy: a resumed run samples again what the interrupted one had sampled.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from mlx_align.data.packing import Batch
from mlx_align.data.template import Example, make_example
from mlx_align.errors import SettingsError
from mlx_align.model.forward import make_batches, token_scores
from mlx_align.rollout.advantages import (
    AdaptiveKL,
    gae,
    group_advantages,
    kl_penalties,
    leave_one_out,
    returns_to_go,
    whiten,
    without_signal,
)
from mlx_align.rollout.groups import Sample, sample_groups
from mlx_align.rollout.rewards import Request, Scored, check_columns, combine, parse_rewards
from mlx_align.rollout.roles import CriticRole, SharedRewardModel, open_shared
from mlx_align.train.source import Ground, Update, Work, open_reference
from mlx_align.train.step import Part, Whole, mean_length

log = logging.getLogger("mlx_align")

# Tries of dynamic sampling before a step goes on with what it has.
TRIES = 3
# Samples of a step that are written down.
WRITTEN = 8
# Steps have seeds of their own; the held-out prompts have one that no step has.
HELD_OUT = 2**31 - 1


class Rollout:
    """The samples of some prompts with their rewards; P prompts, G samples each."""

    def __init__(self, prompts: list[Example], groups: list[list[Sample]], scored: Scored, texts):
        self.prompts, self.groups, self.texts = prompts, groups, texts
        self.scored = scored
        self.reward = scored.total.reshape(len(prompts), -1)

    @property
    def samples(self) -> list[Sample]:
        """All samples in order."""
        return [sample for group in self.groups for sample in group]

    def joined(self, other: "Rollout") -> "Rollout":
        """Both together."""
        total = np.concatenate([self.scored.total, other.scored.total])
        rewards = {
            name: np.concatenate([values, other.scored.rewards[name]])
            for name, values in self.scored.rewards.items()
        }
        return Rollout(
            self.prompts + other.prompts,
            self.groups + other.groups,
            Scored(total, rewards),
            self.texts + other.texts,
        )

    def kept(self, keep: np.ndarray) -> "Rollout":
        """The groups that `keep`, bool[P], says."""
        size = self.reward.shape[1]
        wide = np.repeat(keep, size)
        rewards = {name: values[wide] for name, values in self.scored.rewards.items()}
        chosen = np.flatnonzero(keep)
        return Rollout(
            [self.prompts[i] for i in chosen],
            [self.groups[i] for i in chosen],
            Scored(self.scored.total[wide], rewards),
            [self.texts[i] for i in chosen],
        )


class Lesson(NamedTuple):
    """What a mini-batch teaches: the policy its advantages, the critic (if there is one) its returns."""

    policy: list[Part]
    critic: list[Part]


class OnlineSource:
    """Samples, rewards and advantages for the loop; see `train.source.Source`."""

    def __init__(self, ground: Ground):
        method = ground.settings.method
        if not method.reward:
            raise SettingsError(
                "reward: say what completions are rewarded by, like --reward gsm8k, --reward "
                "my_rewards.py:function, or --reward RUN of a reward model"
            )
        self._ground, self._method = ground, method
        self._rewards = parse_rewards(
            method.reward, open_model=lambda source: open_shared(ground, source)
        )
        examples = [*ground.dataset.train, *ground.dataset.valid]
        check_columns(self._rewards, [e.row for e in examples])
        if any(e.weight != 1 for e in examples):
            log.warning("the data has weights, which methods that sample do not use")
        self._reference = None
        if method.uses_reference:
            if method.reference != "start":
                self._reference = open_reference(ground)[0]
            elif ground.adapter.kind == "full":
                raise SettingsError(
                    "beta: with --fine-tune full the reference is gone after the first step; name a "
                    "--reference model, or use --beta 0"
                )
            self._start = ground.adapter.weights() if ground.settings.adapter.start else None
        self.keeps: dict = {}
        self._critic = None
        if method.advantage == "gae":
            if ground.adapter.kind == "full":
                raise SettingsError(
                    "fine_tune: full leaves no base for the critic to share; use lora or dora"
                )
            shared = [getattr(reward, "model", None) for reward in self._rewards]
            start = next((m for m in shared if isinstance(m, SharedRewardModel)), None)
            self._critic = CriticRole(ground, start)
            self.keeps = {"critic": self._critic}

    # -- what the loop asks

    def work(self, step: int, state: dict) -> Work:
        """Sample and reward the prompts of the step, and say what each update learns from."""
        began = time.perf_counter()
        rollout, filtered = self._gather(step)
        sampled = time.perf_counter() - began
        beta = state.get("beta", self._method.beta)
        lessons, found = self._score(rollout, beta)
        tokens = sum(p.batch.real_tokens for lesson in lessons for p in lesson.policy)
        spent = time.perf_counter() - began
        new = sum(len(sample.ids) for sample in rollout.samples)
        metrics = {
            **self._rewarded(rollout),
            **self._lengths(rollout),
            "rollout/tokens_per_second": new / sampled,
            "rollout/seconds": spent,
            **found,
        }
        if self._method.uses_reference:
            metrics["beta"] = beta
            if self._method.kl_target:
                steered = AdaptiveKL(beta, self._method.kl_target)
                kl = metrics["objective/kl"]
                state = {**state, "beta": steered.update(kl, len(rollout.samples))}
        if filtered:
            metrics["rollout/prompts_filtered"] = float(filtered)
        return Work(self._updates(lessons, step), state, tokens, metrics, self._written(rollout))

    def measure(self, state: dict) -> dict[str, float]:
        """The mean reward of one sample of each held-out prompt."""
        if not self._ground.held_out:
            return {}
        rollout = self._sample(self._ground.held_out, 1, HELD_OUT)
        return {**self._rewarded(rollout, groups=False), **self._lengths(rollout)}

    def after(self, step: int) -> None:
        """Nothing moves besides the policy."""

    def facts(self) -> dict:
        """Nothing that the adapter's config would need."""
        return {}

    # -- sampling and rewarding

    def _gather(self, step: int) -> tuple[Rollout, int]:
        """The step's rollout, and how many prompts were replaced because they teach nothing."""
        prompts = self._ground.stream.batch(step)
        seed = self._ground.settings.train.seed * 1_000_003 + step
        rollout, filtered = self._sample(prompts, self._method.group_size, seed), 0
        if not self._method.dynamic_sampling:
            return rollout, filtered
        steps = self._ground.stream.steps_per_epoch
        for attempt in range(1, TRIES + 1):
            dull = without_signal(rollout.reward)
            if not dull.any():
                break
            # The prompts of steps to come stand in; they are seen again in their own.
            others = self._ground.stream.batch(step + attempt * max(steps // 4, 1))[: dull.sum()]
            more = self._sample(others, self._method.group_size, seed + attempt * 7_919)
            fresh = more.kept(~without_signal(more.reward))
            if fresh.prompts:
                keep = ~dull
                keep[np.flatnonzero(dull)[len(fresh.prompts) :]] = True
                rollout = rollout.kept(keep).joined(fresh)
                filtered += len(fresh.prompts)
        return rollout, filtered

    def _sample(self, prompts: list[Example], count: int, seed: int) -> Rollout:
        method, loaded = self._method, self._ground.loaded
        groups = sample_groups(
            loaded,
            [e.prompt.tolist() for e in prompts],
            count,
            max_tokens=method.max_tokens,
            temperature=method.temperature,
            top_p=method.top_p,
            seed=seed % 2**31,
        )
        decode = loaded.tokenizer.decode
        texts = [
            [decode(s.ids.tolist(), skip_special_tokens=True) for s in group] for group in groups
        ]
        requests = [
            Request(e.asked, text, e.row, s.finished, len(s.ids), e.origin)
            for e, group, said in zip(prompts, groups, texts, strict=True)
            for s, text in zip(group, said, strict=True)
        ]
        return Rollout(prompts, groups, combine(self._rewards, requests), texts)

    # -- scoring and advantages

    def _score(self, rollout: Rollout, beta: float) -> tuple[list[Lesson], dict[str, float]]:
        """What each mini-batch teaches, and the metrics of the scores."""
        method, loaded = self._method, self._ground.loaded
        loaded.model.eval()
        examples = self._examples(rollout)
        size = -(-len(examples) // method.minibatches)
        pack_length = self._ground.settings.train.pack_length
        groups = [
            make_batches(loaded, examples[i : i + size], pack_length)
            for i in range(0, len(examples), size)
        ]
        entropy = tokens = 0.0
        old, ref, value = {}, {}, {}
        for pack in (p for group in groups for p in group):
            scores = token_scores(loaded, pack, moments=True, temperature=method.temperature)
            old |= pack.by_example_tokens(np.array(scores.logp))
            entropy += float((np.array(scores.entropy) * pack.weight).sum())
            tokens += float(pack.weight.sum())
            if method.uses_reference:
                ref |= pack.by_example_tokens(self._reference_scores(pack))
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
        kl = {uid: kl_penalties(old[uid], ref[uid]) for uid in ref}
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
        """One example a prompt: its samples as completions. Equal ones are told apart by their place."""
        examples = []
        for i, (prompt, group) in enumerate(zip(rollout.prompts, rollout.groups, strict=True)):
            masks = [
                np.full(len(s.ids), s.finished or not self._method.mask_unfinished) for s in group
            ]
            made = make_example(prompt.prompt, [s.ids for s in group], masks, prompt.origin)
            examples.append(replace(made, uid=f"{i}:{made.uid}"))
        return examples

    def _reference_scores(self, pack: Batch) -> np.ndarray:
        loaded, temperature = self._ground.loaded, self._method.temperature
        if self._reference is not None:
            return np.array(token_scores(self._reference, pack, temperature=temperature).logp)
        with self._ground.adapter.at_start(self._start):
            return np.array(token_scores(loaded, pack, temperature=temperature).logp)

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
        for row, n, score, sample in zip(rows, lengths, scores, rollout.samples, strict=True):
            if n:
                row[n - 1] += score - (0.0 if sample.finished else method.unfinished_penalty)

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

    def _updates(self, lessons: list[Lesson], step: int):
        """Every mini-batch once in each pass, in an order of its own."""
        for iteration in range(self._method.iterations):
            rng = np.random.default_rng([self._ground.settings.train.seed, step, iteration])
            for i in rng.permutation(len(lessons)) if iteration else range(len(lessons)):
                policy, critic = lessons[i]
                if not any(part.batch.weight.any() for part in policy):
                    continue
                examples = [e for part in policy for e in part.batch.examples]
                whole = Whole(mean_length(examples), [None] * len(policy))
                yield Update(policy, whole)
                if critic:
                    yield Update(critic, whole, self._critic.learner)

    # -- what is reported

    def _rewarded(self, rollout: Rollout, groups: bool = True) -> dict[str, float]:
        reward = rollout.reward
        found = {"reward": float(np.nanmean(reward)), "reward_std": float(np.nanstd(reward))}
        for name, values in rollout.scored.rewards.items():
            if np.isfinite(values).any():
                found[f"rewards/{name}/mean"] = float(np.nanmean(values))
                found[f"rewards/{name}/std"] = float(np.nanstd(values))
        if groups and reward.shape[1] > 1:
            found["frac_reward_zero_std"] = float(without_signal(reward).mean())
        return found

    def _lengths(self, rollout: Rollout) -> dict[str, float]:
        lengths = np.array([len(s.ids) for s in rollout.samples])
        finished = np.array([s.finished for s in rollout.samples])
        return {
            "completions/mean_length": float(lengths.mean()),
            "completions/min_length": float(lengths.min()),
            "completions/max_length": float(lengths.max()),
            "completions/clipped_ratio": float(1 - finished.mean()),
        }

    def _written(self, rollout: Rollout) -> list[dict]:
        rows = []
        for i in range(min(WRITTEN, len(rollout.prompts))):
            prompt = rollout.prompts[i]
            order = np.argsort(-np.nan_to_num(rollout.reward[i]), kind="stable")
            for k in dict.fromkeys((order[0], order[-1])):
                reward = rollout.reward[i, k]
                rows.append(
                    {
                        "prompt": prompt.asked,
                        "completion": rollout.texts[i][k],
                        "reward": None if np.isnan(reward) else float(reward),
                        "finished": rollout.groups[i][k].finished,
                        "origin": prompt.origin,
                    }
                )
        return rows


def _sums(example: Example, values: np.ndarray) -> Sequence[float]:
    """The sum of a token's values over each completion."""
    ends = np.cumsum(example.scored_lengths)
    return [float(part.sum()) for part in np.split(values, ends[:-1])]
