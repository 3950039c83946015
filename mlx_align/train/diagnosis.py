"""Says in plain words what goes wrong in a run, from the rows of metrics.jsonl alone.

Every rule looks at what was seen so far and gives its text or None; each speaks once in a run. The
rules know nothing of models, batches or files: the same rows give the same findings, so a resumed
run feeds the old rows again and goes on. The rules for methods that sample are in `train.hacking`.
"""

import math
from collections.abc import Callable, Sequence
from statistics import fmean, median

from mlx_align.train.course import (
    EARLY_STEPS,
    FAR_NATS,
    LENGTH_EXAMPLES,
    SURE,
    Finding,
    Level,
    Seen,
    brief,
)
from mlx_align.train.hacking import HACKING_RULES, SAMPLING_RULES

# ------------------------------------------------------------------------------------ the gradient

ZERO_STEPS = 5


def gradient_zero(seen: Seen) -> str | None:
    """The gradient is exactly 0.

    A floating-point norm is exactly 0 only where no example gives a signal at all. A hinge loss or
    equal rewards may do that to a batch or two; five in a row are no accident.
    """
    norms = seen.last("grad_norm", ZERO_STEPS)
    if norms is None or any(norms):
        return None
    seen_any = any(row.get("grad_norm") for row in seen.recent)
    if seen_any:
        return (
            f"The gradient has been exactly 0 for {ZERO_STEPS} steps: every example counts as "
            "settled, and nothing more is learned. Stop here, or look at the examples with "
            "`mlx-align data check FILE` if the loss is not near its lowest value."
        )
    return (
        f"The gradient has been exactly 0 in the first {ZERO_STEPS} steps: nothing is trained. Either "
        "both sides of every pair are the same, or no token of the completions is scored, or the "
        "adapter sits on no layer. Look at the examples with `mlx-align data check FILE` and at "
        "--lora-keys and --lora-layers."
    )


SPIKE, SPIKES = 10.0, 3
SPIKE_STEPS, SPIKE_BEFORE, SPIKE_ENOUGH = 100, 50, 20


def gradient_spikes(seen: Seen) -> str | None:
    """Gradient norms far above the usual, again and again.

    Norms of single batches vary by a factor of three to five around their median; ten times the
    median, three times within a hundred steps, is the pattern that precedes loss spikes (Chowdhery
    et al. 2022, arXiv:2204.02311, section 5.1, traced them to particular batches in a particular
    state of the model). A norm that clipping leaves alone is no spike.
    """
    rows = [row["grad_norm"] for row in seen.recent if "grad_norm" in row]
    clip = seen.settings.get("max_grad_norm") or 0.0

    def is_spike(i: int) -> bool:
        before = rows[max(0, i - SPIKE_BEFORE) : i]
        return len(before) >= SPIKE_ENOUGH and rows[i] > max(SPIKE * median(before), clip)

    if not rows or not is_spike(len(rows) - 1):
        return None
    spikes = [i for i in range(max(0, len(rows) - SPIKE_STEPS), len(rows)) if is_spike(i)]
    if len(spikes) < SPIKES:
        return None
    usual = median(rows[-SPIKE_BEFORE:])
    guard = (
        f"--max-grad-norm {brief(clip)} cuts each of them down, but their direction still counts"
        if clip
        else "nothing cuts them down: --max-grad-norm 1 would"
    )
    return (
        f"The gradient has spiked {len(spikes)} times in the last {SPIKE_STEPS} steps, up to "
        f"{brief(max(rows[i] for i in spikes))} where {brief(usual)} is usual ({guard}). Usually the "
        "steps are too large, or some examples are wrong (swapped sides, broken text). Lower "
        "--learning-rate, raise --batch-size, or look at the data with `mlx-align data check FILE`."
    )


# ---------------------------------------------------------------------------- nothing is learned

SAME_STEPS = 5


def reference_is_policy(seen: Seen) -> str | None:
    """Rewards of exactly 0 although steps with a gradient were made.

    Only the first step may have them: there the fresh adapter changes nothing. Any update that
    reaches the model moves some log-probability by more than float32's resolution.
    """
    if not seen.uses_reference:
        return None
    names = ("rewards/chosen", "rewards/rejected", "grad_norm", "learning_rate", "step")
    columns = [seen.last(name, SAME_STEPS) for name in names]
    if any(column is None for column in columns):
        return None
    chosen, rejected, norms, rates, steps = columns
    if any(chosen) or any(rejected) or not all(norms) or not all(rates) or steps[0] < 2:
        return None
    return (
        f"After {seen.step} steps the policy is still exactly its reference: all rewards are 0, "
        f"although there is a gradient ({brief(norms[-1])}). The updates do not reach the model, or the "
        f"reference follows the policy. Usually --learning-rate ({brief(max(rates))} now) is too low "
        "for the precision: raise it, or train with --dtype float32."
    )


# The loss counts as unchanged within this share of its start: for DPO a mean margin of 0.007.
STUCK = 0.005
# It may take so much of the run, and so many windows, to get going.
STUCK_SHARE, STUCK_WINDOWS = 0.25, 2
# Nats with which the policy has moved, although the loss has not. A margin of 1 leaves the loss within
# STUCK of its start only if beta is below 0.007; 0.3 of both sides together are, at the usual beta of
# 0.1, four times the margin that such a loss allows.
MARGIN_NATS, JOINT_NATS = 1.0, 0.3
# Rows with one of these have a loss that learning must lower; that of a policy gradient need not.
FALLING = ("rewards/chosen", "rewards/rejected", "mean_token_accuracy", "margin")


def _must_fall(seen: Seen) -> bool:
    return any(name in seen.recent[-1] for name in FALLING)


def _unchanged_loss(seen: Seen) -> tuple[float, float] | None:
    """The loss at the start and now, where they are the same after a good part of the run.

    Held-out rows decide where there are any, since they score the same examples each time, unless
    the training loss has fallen: a held-out loss may also come back to its start. Without them the
    training loss must be known well enough to say that it is the same.
    """
    enough = max(STUCK_SHARE * seen.total, STUCK_WINDOWS * seen.window)
    if seen.step < enough or not _must_fall(seen):
        return None
    now, start = seen.level("loss"), seen.start_loss()
    if now is None or start is None or start.mean <= 0:
        return None
    if now.surely_below((1 - STUCK) * start.mean):
        return None
    first, last = seen.held_out_first, seen.held_out_last
    if first and first["step"] == 0 and last["step"] >= enough:
        pair, noise = (first["loss"], last["loss"]), 0.0
    else:
        pair, noise = (start.mean, now.mean), math.hypot(start.error, now.error)
    return pair if abs(pair[1] - pair[0]) + 2 * noise < STUCK * pair[0] else None


def _moved_margin(seen: Seen) -> bool:
    """Whether the policy tells the sides apart, by however little the loss sees of it."""
    margin = seen.margin()
    return margin is not None and margin.surely_above(0) and margin.mean >= MARGIN_NATS


def loss_stuck(seen: Seen) -> str | None:
    """The loss is where it began (trl#1311, trl#1627: DPO at 0.6931 for a whole run).

    After a quarter of the run the sum of the learning rates is a good third of the whole run's, so
    what has not begun by then is not going to get far.
    """
    unchanged = _unchanged_loss(seen)
    if unchanged is None or seen.found & {"gradient-zero", "reference-is-policy"}:
        return None
    moved = _moved(seen)
    if _moved_margin(seen):
        return None  # beta_too_low speaks of this.
    if moved is not None and moved >= JOINT_NATS:
        return (
            f"After {seen.step} of {seen.total} steps the loss is where it began "
            f"({brief(unchanged[0])}, now {brief(unchanged[1])}), although the policy has moved "
            f"({brief(moved)} nats): what it learns from some pairs does not hold for others. Look for "
            "swapped or random sides with `mlx-align data check FILE`."
        )
    rate = max(row.get("learning_rate", 0.0) for row in seen.recent)
    return (
        f"After {seen.step} of {seen.total} steps the loss is where it began ({brief(unchanged[0])}, now "
        f"{brief(unchanged[1])}): nothing is learned. Usually --learning-rate is too low ({brief(rate)} "
        "now): try ten times as much. If that does not help, look at the examples with "
        "`mlx-align data check FILE`."
    )


# --------------------------------------------------------------------------- too easy, too long

# Examples within which telling pairs apart counts as "at once", and the share right.
EARLY_EXAMPLES, EASY = 96, 0.95
# Chosen completions so many times as long as rejected ones (or the other way round) differ in
# length before anything else; the pairs of HH harmless have 0.8. For sure it must be more than 1.2.
LONGER, SURELY_LONGER = 1.5, 1.2
ACCURACIES = ("rewards/accuracies", "accuracy")


def accuracy_at_once(seen: Seen) -> str | None:
    """Nearly every pair is told apart from the first steps on (trl#1236, LlamaFactory#5321).

    Annotators agree with each other on 73 % of pairs (Ouyang et al. 2022, arXiv:2203.02155), and
    a preference is learned from hundreds. What is learned from a few dozen is a mark that one side
    carries. Counted from the second step, since at the first one all rewards are 0, and
    within the first epoch, since later the pairs are known by heart.
    """
    count = seen.rows_for(EARLY_STEPS, EARLY_EXAMPLES)
    early = seen.first[1 : 1 + count]
    name = next((n for n in ACCURACIES if early and n in early[0]), None)
    if name is None or len(early) < count or early[-1].get("epoch", 0.0) > 1:
        return None
    accuracy = fmean(row[name] for row in early)
    if accuracy < EASY:
        return None
    what = (
        f"Already in steps 2 to {early[-1]['step']} the chosen side wins {accuracy:.0%} of the pairs: "
        "the two sides differ in something that is learned at a glance. "
    )
    ratio = _length_ratio(early)
    if ratio and not 1 / LONGER < ratio < LONGER:
        return what + (
            f"Here it is the length: chosen completions have {brief(ratio)} times the tokens of rejected "
            f"ones. {_length_remedy(seen)}"
        )
    return what + (
        "Usually one side has a mark: another format, an ending, a phrase, another author. Compare "
        "the sides with `mlx-align data check FILE`; if they are meant to be that easy, fewer steps "
        "will do (--steps)."
    )


def _length_remedy(seen: Seen) -> str:
    remedies = ["Even the lengths out in the data"]
    if "rewards/margins" in seen.recent[-1]:
        remedies.append("use a length-normalised method (simpo, dpo-norm)")
    if "ld_alpha" in seen.settings:
        remedies.append("give --ld-alpha 0.5")
    return ", or ".join(remedies) + "."


# These divide by the length, or have their own way of keeping it out.
LENGTH_NORMALISED = {"simpo", "alphapo", "orpo", "ipo", "dpo-norm"}


def _length_ratio(rows: Sequence[dict]) -> float | None:
    """Chosen tokens per rejected token, of the rows that have both sides."""
    sides = [(row.get("lengths/chosen"), row.get("lengths/rejected")) for row in rows]
    both = [(chosen, rejected) for chosen, rejected in sides if chosen and rejected]
    return sum(c for c, _ in both) / sum(r for _, r in both) if both else None


def length_drift(seen: Seen) -> str | None:
    """The pairs will make completions longer or shorter.

    A loss on sums of log-probabilities learns length before quality where one side is mostly longer
    (Singhal et al. 2023, arXiv:2310.03716; Park et al. 2024, arXiv:2403.19159).
    """
    count = seen.rows_for(EARLY_STEPS, LENGTH_EXAMPLES)
    rows = seen.first[:count]
    if len(rows) < count or seen.settings.get("ld_alpha") is not None:
        return None
    if seen.method in LENGTH_NORMALISED or "accuracy-at-once" in seen.found:
        return None
    sides = [(row.get("lengths/chosen"), row.get("lengths/rejected")) for row in rows]
    logs = [math.log(c / r) for c, r in sides if c and r]
    ratio = _length_ratio(rows)
    if ratio is None or len(logs) < len(rows) / 2 or 1 / LONGER < ratio < LONGER:
        return None
    level, surely = Level.of(logs), math.log(SURELY_LONGER)
    if not (level.surely_above(surely) if ratio > 1 else level.surely_below(-surely)):
        return None
    direction = "longer" if ratio > 1 else "shorter"
    return (
        f"Chosen completions have {brief(ratio)} times the tokens of rejected ones: the model will learn "
        f"to answer {direction} before it learns anything else. {_length_remedy(seen)}"
    )


# ------------------------------------------------------------------- too far, or the wrong way

# Published DPO runs that stay close lose 5 to 9 % of the chosen log-probability (YeungNLP/
# firefly-qwen1.5-en-7b-dpo-v0.1, rasyosef/phi-1_5-dpo), others 23 to 141 % (zephyr-7b-dpo-full 36 %).
DISPLACED = 0.15
# Short, well-known completions have few nats to lose; three make them 20 times less likely.
DISPLACED_NATS = 3.0


def displacement(seen: Seen) -> str | None:
    """The chosen completions get less likely while the margin grows: likelihood displacement.

    A little of it is normal; much of it moves the probability to completions that nobody chose
    (Razin et al. 2024, arXiv:2410.08847; Pal et al. 2024, arXiv:2402.13228). With a reference the
    log-ratio shows it whatever the batch; without one only held-out rows do, which score the same
    completions every time.
    """
    course = _chosen_with_reference(seen) if seen.beta else _chosen_held_out(seen)
    if course is None:
        return None
    start, now, margin = course
    if start - now < max(DISPLACED_NATS, DISPLACED * abs(start)):
        return None
    remedies = ["a lower --learning-rate", "fewer --epochs"]
    if seen.settings.get("sft_weight"):
        remedies.insert(0, f"a higher --sft-weight ({brief(seen.settings['sft_weight'])} now)")
    elif "sft_weight" in seen.settings:
        remedies.insert(0, "--sft-weight 0.1")
    return (
        f"The chosen completions get less likely (log-probability {brief(start)} at the start, "
        f"{brief(now)} now) while the margin grows ({brief(margin)}): likelihood displacement. A little "
        "is normal; this much means that probability goes to completions nobody chose, often because the "
        f"two sides of the pairs are nearly alike. What helps: {', '.join(remedies)}."
    )


def _chosen_with_reference(seen: Seen) -> tuple[float, float, float] | None:
    """Chosen log-probability at the start and now, and the margin; None where not for sure."""
    ratio, start = seen.log_ratio("chosen"), seen.reference_logp("chosen")
    margin = seen.margin()
    if ratio is None or start is None or margin is None:
        return None
    if not (ratio.surely_below(0) and margin.surely_above(0)):
        return None
    first, last = seen.held_out_first, seen.held_out_last
    if first and not first["step"] and last["step"] and "logps/chosen" in first:
        # Training rows with wrong labels rightly get less likely; held-out ones are the surer witness.
        return first["logps/chosen"], last["logps/chosen"], seen.beta * margin.mean
    return start, start + ratio.mean, seen.beta * margin.mean


def _chosen_held_out(seen: Seen) -> tuple[float, float, float] | None:
    first, last = seen.held_out_first, seen.held_out_last
    names = ("logps/chosen", "rewards/margins")
    if not first or first["step"] or any(n not in row for row in (first, last) for n in names):
        return None
    if last["rewards/margins"] <= first["rewards/margins"]:
        return None
    return first["logps/chosen"], last["logps/chosen"], last["rewards/margins"]


# Pairs are not samples of the policy, and training may take much from the rejected ones. So both sides
# must, in the mean, have lost as much log-probability as they had: up to 0.6 of it in published runs
# with beta 0.01 that work, 2.1 and 3.4 in two that do not.
FAR_SHARE = 1.0


def kl_explodes(seen: Seen) -> str | None:
    """The policy is far away from the reference.

    KTO measures a KL. For pairs (r_c + r_r) / 2, the mean log-ratio of the data's completions,
    stands for it: the margin does not enter, only what both sides lose together.
    """
    measured = seen.level("kl")
    if measured and measured.surely_above(FAR_NATS):
        return _far(f"the KL to it is {brief(measured.mean)} nats", seen)
    chosen, rejected = seen.log_ratio("chosen"), seen.log_ratio("rejected")
    references = [seen.reference_logp(side) for side in ("chosen", "rejected")]
    if chosen is None or rejected is None or None in references:
        return None
    drift = Level((chosen.mean + rejected.mean) / 2, math.hypot(chosen.error, rejected.error) / 2)
    if not drift.surely_below(0) or -drift.mean < max(FAR_NATS, FAR_SHARE * -fmean(references)):
        return None
    return _far(
        f"the completions of the data have lost {brief(-drift.mean)} nats, of {brief(-fmean(references))} "
        "that they had",
        seen,
    )


def _far(measure: str, seen: Seen) -> str:
    rate = max(row.get("learning_rate", 0.0) for row in seen.recent)
    beta = f" (now {brief(seen.beta)})" if seen.beta else ""
    return (
        f"The policy is far from its reference: {measure}. Such a model usually repeats itself or "
        f"rambles. Lower --learning-rate (now up to {brief(rate)}), raise --beta{beta}, train fewer "
        "steps, or take an earlier checkpoint (checkpoints/best)."
    )


# ------------------------------------------------------------------------------------------ beta

# A batch with a loss of a fifth of its start is settled: for DPO a margin of 2. Half of the batches
# must be: with a high beta the few wrong pairs make the mean useless.
SETTLED = 0.2
# With less than one nat the policy answers as the reference does.
SETTLED_NATS = 1.0
# A loss so far above its start is worse off than without training. Below so many nats the policy has
# hardly moved, and beta is the cause; beyond, the steps are too large.
WORSE, WORSE_NATS = 1.2, 3.0


def _loss_above_start(seen: Seen) -> tuple[float, float] | None:
    """The loss at the start and now, where it is well above; after at least two windows.

    Where most pairs are settled the loss is a few large values among zeros, and its noise is large.
    Half the certainty is enough then if the held-out loss has risen as well.
    """
    now, start = seen.level("loss"), seen.start_loss()
    if now is None or start is None or start.mean <= 0 or not _must_fall(seen):
        return None
    if seen.step < STUCK_WINDOWS * seen.window:
        return None
    first, last = seen.held_out_first, seen.held_out_last
    confirmed = first and first["step"] == 0 and last["loss"] > WORSE * first["loss"]
    noise = math.hypot(now.error, WORSE * start.error) * (SURE / 2 if confirmed else SURE)
    return (start.mean, now.mean) if now.mean - noise > WORSE * start.mean else None


def _moved(seen: Seen) -> float | None:
    """How far the policy is from the reference, in nats; None where rewards do not tell."""
    levels = [seen.log_ratio(side) for side in ("chosen", "rejected")]
    return None if None in levels else max(abs(level.mean) for level in levels)


def loss_rises(seen: Seen) -> str | None:
    """The loss is well above its start: the steps are so large that each undoes the others."""
    risen, moved = _loss_above_start(seen), _moved(seen)
    if risen is None or (moved is not None and moved < WORSE_NATS):
        return None
    rate = max(row.get("learning_rate", 0.0) for row in seen.recent)
    return (
        f"The loss has risen from {brief(risen[0])} to {brief(risen[1])}: the model is worse off than "
        f"before. Usually --learning-rate is too high (up to {brief(rate)} now): take a tenth of it."
    )


def beta_too_high(seen: Seen) -> str | None:
    """The loss is satisfied, or upset, by a policy that is nearly the reference.

    The loss sees beta times the log-ratio, so with a high beta it saturates after a small move, or
    punishes small moves in the wrong direction: a published run with beta 1 ends at a loss of 0.85,
    above ln 2, its policy 2 nats away. Rafailov et al. 2023 (arXiv:2305.18290) use 0.1 to 0.5; Wu
    et al. 2024 (arXiv:2407.08639) show what beta does at either end.
    """
    moved, losses, start = _moved(seen), seen.last("loss", seen.window), seen.start_loss()
    if moved is None or losses is None or start is None:
        return None
    risen = _loss_above_start(seen)
    if moved < SETTLED_NATS and median(losses) < SETTLED * start.mean:
        what = (
            f"The loss is settled ({brief(median(losses))}, {brief(start.mean)} at the start), but the "
            f"policy is still nearly its reference ({brief(moved)} nats away): it will answer as before"
        )
    elif moved < WORSE_NATS and risen:
        accuracy = seen.level("rewards/accuracies")
        right = f", with {accuracy.mean:.0%} of the pairs right" if accuracy else ""
        what = (
            f"The loss is above its start ({brief(risen[1])}, {brief(risen[0])} at the start){right}, "
            f"although the policy has hardly moved ({brief(moved)} nats): every small move costs too much"
        )
    else:
        return None
    return f"{what}. --beta {brief(seen.beta)} is too high here; try a tenth of it."


# A policy that has moved a margin of 20 nats, a third of the reference's log-probability, while the
# loss still sees less than 0.5 (a pair right with 62 %), is held by nothing.
LOOSE_NATS, LOOSE_SHARE, LOOSE_REWARD = 20.0, 1 / 3, 0.5


def beta_too_low(seen: Seen) -> str | None:
    """The policy moves a long way and the loss hardly notices.

    The loss sees beta times the margin, and Adam's steps do not get smaller with it, so with a very
    low beta the policy runs on at full speed until the learning rate ends it. Runs that use 0.01
    well reach a margin of 0.9 at 100 nats of 260.
    """
    margin = seen.margin()
    references = [seen.reference_logp(side) for side in ("chosen", "rejected")]
    if margin is None or None in references:
        return None
    reward = seen.beta * margin.mean
    loose = max(LOOSE_NATS, LOOSE_SHARE * -fmean(references))
    runs_on = margin.surely_above(0) and margin.mean > loose and reward < LOOSE_REWARD
    if not (runs_on or (_moved_margin(seen) and _unchanged_loss(seen) is not None)):
        return None
    return (
        f"The margin is {brief(margin.mean)} nats by now, but times --beta {brief(seen.beta)} the loss "
        f"sees only {brief(reward)} of it and does not slow the policy down: it will go on drifting from "
        "the reference. --beta is too low here; try ten times as much, or a lower --learning-rate."
    )


# ------------------------------------------------------------------------------------------------

# In the order in which they are asked. A rule may keep silent where an earlier one has spoken.
RULES: tuple[Callable[[Seen], str | None], ...] = (
    gradient_zero,
    gradient_spikes,
    reference_is_policy,
    loss_stuck,
    loss_rises,
    accuracy_at_once,
    length_drift,
    displacement,
    kl_explodes,
    beta_too_high,
    beta_too_low,
)
# The loss of a method that learns from its own samples says nothing: it starts at 0 and stays there.
OF_SAMPLES = (gradient_zero, gradient_spikes, *HACKING_RULES, *SAMPLING_RULES)


class Diagnosis:
    """Watches a run: give it every row of metrics.jsonl, in order, and it says what is new.

    `settings` are the run's settings by name (`RunSettings.flat()`), `total` its steps. A resumed
    run gives the old rows first and drops what they bring, since it was said then.
    """

    def __init__(self, method: str, settings: dict, total: int, uses_reference: bool):
        self._seen = Seen(method, settings, total, uses_reference)

    def update(self, row: dict) -> list[Finding]:
        """What this row brings to light, mostly nothing."""
        seen = self._seen
        seen.add(row)
        if not seen.recent:
            return []
        findings = []
        for rule in OF_SAMPLES if "reward" in row else RULES:
            name = rule.__name__.replace("_", "-")
            if name not in seen.found and (text := rule(seen)):
                seen.found.add(name)
                findings.append(Finding(name, row["step"], text, rule in HACKING_RULES))
        return findings
