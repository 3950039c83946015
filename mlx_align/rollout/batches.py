"""Steps from samples: prompts are answered, answers rewarded, and learnt from.

    prompts -> rollout -> lessons -> updates

What a step samples is a function of the seed, the step and the policy: a resumed run samples again what
the interrupted one had sampled.
"""

import logging
import time

import numpy as np

from mlx_align.errors import SettingsError
from mlx_align.rollout.advantages import AdaptiveKL, without_signal
from mlx_align.rollout.lessons import Lesson, PairTeacher, PolicyTeacher, Teacher
from mlx_align.rollout.rewards import check_columns, combine, parse_rewards
from mlx_align.rollout.roles import CriticRole, Reference, SharedRewardModel, open_shared
from mlx_align.rollout.rollouts import Rollout, Sampling, requests
from mlx_align.train.source import Ground, Update, Work
from mlx_align.train.step import Whole, mean_length

log = logging.getLogger("mlx_align")

# Tries of dynamic sampling before a step goes on with what it has.
TRIES = 3
# Steps have seeds of their own; the held-out prompts have one that no step has.
HELD_OUT = 2**31 - 1


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
        rewards, self._watched = (
            parse_rewards(specs, open_model=lambda source: open_shared(ground, source))
            if specs
            else []
            for specs in (method.reward, method.watch)
        )
        examples = [*ground.dataset.train, *ground.dataset.valid]
        check_columns([*rewards, *self._watched], [e.row for e in examples])
        if any(e.weight != 1 for e in examples):
            log.warning("the data has weights, which methods that sample do not use")
        # A judge compares: held-out samples with those of the reference.
        self._duels = any(getattr(r, "pairwise", False) for r in [*rewards, *self._watched])
        reference = Reference(ground) if method.uses_reference or self._duels else None
        self._sampling = Sampling(ground.loaded, method, rewards, reference)
        self.keeps: dict = {}
        self._critic = None
        if method.advantage == "gae":
            if ground.adapter.kind == "full":
                raise SettingsError(
                    "fine_tune: full leaves no base for the critic to share; use lora or dora"
                )
            self._critic = CriticRole(ground, self._critic_start(rewards))
            self.keeps = {"critic": self._critic}
        learnt = reference if method.uses_reference else None
        self._teacher: Teacher
        if method.advantage == "pairs":
            judged = all(getattr(r, "pairwise", False) for r in rewards if r.weight)
            self._teacher = PairTeacher(ground, learnt, judged)
        else:
            self._teacher = PolicyTeacher(ground, learnt, self._critic)

    # -- what the loop asks

    def work(self, step: int, state: dict) -> Work:
        """Sample and reward the prompts of the step, and say what each update learns from."""
        began = time.perf_counter()
        rollout, filtered = self._gather(step)
        sampled = time.perf_counter() - began
        beta = state.get("beta", self._method.beta)
        lessons, found = self._teacher.teach(rollout, beta)
        tokens = sum(p.batch.real_tokens for lesson in lessons for p in lesson.policy)
        new = sum(len(sample.ids) for group in rollout.groups for sample in group)
        metrics = {
            **rollout.metrics(self._method.reward_clip),
            "rollout/tokens_per_second": new / sampled,
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
        updates = self._updates(lessons, step)
        return Work(updates, state, tokens, metrics, rollout.written(), sampled)

    def measure(self, state: dict) -> dict[str, float]:
        """Rewards and watched rewards of one sample of each held-out prompt."""
        if not self._ground.held_out:
            return {}
        draw = self._sampling.against_reference if self._duels else self._sampling.alone
        rollout = draw(self._ground.held_out, HELD_OUT)
        return {**rollout.metrics(), **self._watch(rollout)}

    def after(self, step: int) -> None:
        """Nothing moves besides the policy."""

    def facts(self) -> dict:
        """Nothing that the adapter's config would need."""
        return {}

    # -- sampling

    def _gather(self, step: int) -> tuple[Rollout, int]:
        """The step's rollout, and how many prompts were replaced because they teach nothing."""
        prompts = self._ground.stream.batch(step)
        seed = self._ground.settings.train.seed * 1_000_003 + step
        rollout, filtered = self._sampling.step(prompts, seed), 0
        if not self._method.dynamic_sampling:
            return rollout, filtered
        steps = self._ground.stream.steps_per_epoch
        for attempt in range(1, TRIES + 1):
            dull = without_signal(rollout.reward)
            if not dull.any():
                break
            # The prompts of steps to come stand in; they are seen again in their own.
            others = self._ground.stream.batch(step + attempt * max(steps // 4, 1))[: dull.sum()]
            more = self._sampling.step(others, seed + attempt * 7_919)
            fresh = more.kept(~without_signal(more.reward))
            if fresh.prompts:
                keep = ~dull
                keep[np.flatnonzero(dull)[len(fresh.prompts) :]] = True
                rollout = rollout.kept(keep).joined(fresh)
                filtered += len(fresh.prompts)
        return rollout, filtered

    def _watch(self, rollout: Rollout) -> dict[str, float]:
        """The mean of the watched rewards with its standard error, and each of them."""
        if not self._watched:
            return {}
        asked = requests(rollout.prompts, rollout.groups, rollout.texts)
        scored = combine(self._watched, asked)
        total = scored.total.reshape(len(rollout.groups), -1)[:, 0]
        count = max(int(np.isfinite(total).sum()), 1)
        found = {
            "watch": float(np.nanmean(total)),
            "watch_error": float(np.nanstd(total)) / count**0.5,
        }
        for name, values in scored.rewards.items():
            found[f"watch/{name}/mean"] = float(
                np.nanmean(values.reshape(len(rollout.groups), -1)[:, 0])
            )
        return found

    # -- updates

    def _critic_start(self, rewards) -> SharedRewardModel | None:
        """The reward model that the critic begins as, if it is to and there is one on the same base."""
        if self._method.critic_start == "policy":
            return None
        models = [getattr(reward, "model", None) for reward in rewards]
        return next((m for m in models if isinstance(m, SharedRewardModel)), None)

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
