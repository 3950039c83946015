"""Says in plain words when a reward is being hacked, from the rows of metrics.jsonl alone.

A policy that is trained against a reward finds what the reward pays for, which is not always what was
meant (Gao et al. 2022, arXiv:2210.10760). The signs are a watched reward that falls while the one that
is trained on rises, and completions that get longer, repeat themselves or become all alike with it.
"""

import math
from collections.abc import Callable

from mlx_align.train.course import FAR_NATS, Seen, brief

# Standard errors by which a watched reward must have fallen below its best. It is measured on the same
# held-out prompts each time, a few times in a run.
FALLEN = 2.0
# Completions half as long again, or a third shorter, than in the first window.
DRIFT = 1.5
LENGTH = "completions/mean_length"
# Of a completion's trigrams, so many more are repetitions than in the first window.
REPEATS = 0.15
# Of a step's bigrams, only this share of what were different ones is left.
ALIKE = 0.5
# Where so many rewards are at the clip, or so many completions unfinished, the rest hardly counts.
MOST = 0.5


def _risen(seen: Seen) -> tuple[float, float] | None:
    """The reward's means in the first window and in the last, where it has risen."""
    reward = seen.changed("reward")
    return reward if reward and reward[1] > reward[0] else None


def reward_hacking(seen: Seen) -> str | None:
    """The reward has risen on held-out prompts, and a watched one has fallen from its best."""
    rows = [row for row in seen.held_out if "watch" in row]
    if len(rows) < 2:
        return None
    best, last = max(rows[:-1], key=lambda row: row["watch"]), rows[-1]
    noise = math.hypot(best["watch_error"], last["watch_error"])
    if best["watch"] - last["watch"] <= FALLEN * noise or last["reward"] <= best["reward"]:
        return None
    return (
        f"The reward is being hacked: on held-out prompts it has risen from {brief(best['reward'])} to "
        f"{brief(last['reward'])} since step {best['step']}, while the watched reward has fallen from "
        f"{brief(best['watch'])} to {brief(last['watch'])}. What the policy learns now is a fault of the "
        "reward. checkpoints/best is from before; raise --beta, or mend the reward."
    )


def length_hacking(seen: Seen) -> str | None:
    """The reward rises, and completions get longer or shorter with it."""
    reward, length = _risen(seen), _drifted(seen)
    if not reward or not length:
        return None
    return (
        f"The reward has risen ({_course(reward)}) and the sampled completions have become "
        f"{_direction(length)} with it ({_course(length)} tokens). If the task does not ask for that, "
        "the reward pays for length: read a few of samples.jsonl, add --reward length:max=N*0.2, or "
        "raise --beta."
    )


def repetition(seen: Seen) -> str | None:
    """The reward rises, and completions repeat themselves more."""
    reward, share = _risen(seen), seen.changed("completions/repetition")
    if not reward or not share or share[1] - share[0] < REPEATS:
        return None
    return (
        f"The reward has risen ({_course(reward)}) and the sampled completions repeat themselves: "
        f"{share[1]:.0%} of their word triples are repetitions, {share[0]:.0%} in the first steps. The "
        "reward is probably being hacked: read a few of samples.jsonl, raise --beta, or add a reward "
        "against it."
    )


def monotony(seen: Seen) -> str | None:
    """The reward rises, and completions of different prompts become alike."""
    reward, share = _risen(seen), seen.changed("completions/distinct_2")
    if not reward or not share or share[1] > ALIKE * share[0]:
        return None
    return (
        f"The reward has risen ({_course(reward)}) and the sampled completions have become alike: "
        f"{share[1]:.0%} of a step's word pairs are different ones, {share[0]:.0%} in the first steps. "
        "If the prompts do not ask for that, the policy has found one answer that always pays: read a "
        "few of samples.jsonl, raise --beta, or mend the reward."
    )


def kl_budget(seen: Seen) -> str | None:
    """The policy is further from its reference than it was to go."""
    kl, budget = seen.level("objective/kl"), seen.settings.get("kl_budget") or FAR_NATS
    if kl is None or not kl.surely_above(budget):
        return None
    given = "--kl-budget" if seen.settings.get("kl_budget") else "a usual budget"
    return (
        f"A completion's KL to the reference is {brief(kl.mean)} nats, beyond {given} of {brief(budget)}: "
        "so far away rewards mislead more and more. Raise --beta, lower --learning-rate, or take an "
        "earlier checkpoint (checkpoints/best)."
    )


def length_drift(seen: Seen) -> str | None:
    """Sampled completions get longer or shorter, whatever the reward does."""
    length = _drifted(seen)
    if not length or "length-hacking" in seen.found:
        return None
    return (
        f"Sampled completions get {_direction(length)}: {brief(length[1])} tokens, {brief(length[0])} in "
        "the first steps. If the task does not ask for that, the reward pays for length: read a few "
        "samples, correct the reward, or raise --beta."
    )


def rewards_clipped(seen: Seen) -> str | None:
    """Most rewards are at the clip, where they all look alike."""
    share = _most(seen, "rewards/clipped_ratio")
    if share is None:
        return None
    return (
        f"{share:.0%} of the rewards are at --reward-clip {brief(seen.settings['reward_clip'])}, "
        "where good and better are the same. Raise it, or lower the rewards' weights."
    )


def unfinished(seen: Seen) -> str | None:
    """Most completions are cut off before they end."""
    share = _most(seen, "completions/clipped_ratio")
    if share is None:
        return None
    return (
        f"{share:.0%} of the sampled completions do not end within --max-tokens "
        f"{seen.settings['max_tokens']}, so their rewards are those of fragments. Raise --max-tokens, "
        "give --stop, or make ending pay with --unfinished-penalty 1."
    )


def _most(seen: Seen, name: str) -> float | None:
    """A share in the last window, where it is most of all."""
    share = seen.level(name)
    return share.mean if share is not None and share.surely_above(MOST) else None


def _drifted(seen: Seen) -> tuple[float, float] | None:
    length = seen.changed(LENGTH)
    if not length or length[0] / DRIFT < length[1] < length[0] * DRIFT:
        return None
    return length


def _direction(length: tuple[float, float]) -> str:
    return "longer" if length[1] > length[0] else "shorter"


def _course(values: tuple[float, float]) -> str:
    return f"{brief(values[0])} to {brief(values[1])}"


# Signs of hacking, for which --stop-on-hacking stops, and what else is worth saying of samples.
HACKING_RULES: tuple[Callable[[Seen], str | None], ...] = (
    reward_hacking,
    length_hacking,
    repetition,
    monotony,
    kl_budget,
)
SAMPLING_RULES: tuple[Callable[[Seen], str | None], ...] = (
    length_drift,
    rewards_clipped,
    unfinished,
)
