"""What the measurements of a data set mean: what to mend, and which method fits.

Reads a `DataCheck` and measures nothing itself.
"""

import dataclasses
import shlex
from collections import Counter
from collections.abc import Collection

from mlx_align.data.dataset import DataSettings
from mlx_align.data.inspect import DataCheck, Remark, count_rows
from mlx_align.demo import DEMO

# Fewer examples than FEW rarely teach a preference; from PLENTY on their number is no worry.
FEW, PLENTY = 500, 5000
# Length decides more often than this, in one direction: it is an easy way to please.
BIASED = 0.6
# Shares of wrong labels: a method made for noise is advised; labels are close to coin flips.
NOISY, RANDOM = 0.05, 0.4
# Fleiss' kappa below which annotators have probably read their instructions differently.
LOW_KAPPA = 0.6
# Share of examples whose truncation is worth a remark.
MANY_CUT = 0.01
EXAMPLE_MODEL = "mlx-community/Llama-3.2-1B-Instruct-4bit"


def advise(check: DataCheck, methods: Collection[str]) -> DataCheck:
    """The check with its remarks: warnings and notes, then what to do, the best first.

    `methods` are those that there are commands for; no other is advised.
    """
    advisers = {
        "pairs": _for_pairs,
        "labels": _for_labels,
        "comparisons": _for_comparisons,
        "prompts": _for_prompts,
    }
    remarks = [Remark(*said) for said in (*_on_rows(check), *_on_labels(check))]
    if check.understood:
        fitting = advisers.get(check.kind, _for_completions)(check)
        remarks += [remark for remark in fitting if remark.method in (None, *methods)]
    return dataclasses.replace(check, remarks=tuple(remarks))


# -- warnings and notes ----------------------------------------------------------------------------


def _on_rows(check):
    stopping = sum(fault.rows.count for fault in check.faults if fault.stops)
    if stopping and check.understood:
        yield "warning", f"training stops at {count_rows(stopping)}, until that is mended"
    if check.suggested_fields:
        fields = ",".join(check.suggested_fields)
        yield "note", f"the columns have other names than ours; try --field {shlex.quote(fields)}"
    kinds = sum(map(Counter, check.kinds.values()), Counter())
    if len(kinds) > 1:
        found = ", ".join(f"{count:,} {kind}" for kind, count in kinds.items())
        yield "warning", f"several kinds of rows ({found}): training takes one kind only"
    size = check.usable or check.decided or check.understood
    if 0 < size < FEW:
        why = "the model may learn them by heart, and held-out numbers will be rough"
        yield "warning", f"{size:,} examples are fewer than {FEW}: {why}"
    elif FEW <= size < PLENTY:
        why = "enough to see an effect; more would make it firmer"
        yield "note", f"{size:,} examples are fewer than {PLENTY:,}: {why}"
    for name, rows in check.leakage.items():
        if rows.count:
            what = f"the prompts of {count_rows(rows.count)} in {name} are trained on"
            yield "warning", f"{what}: held-out numbers will look better than they are"
    if check.unended:
        why = "the model will not learn when to stop"
        yield "warning", f"in {check.unended:,} examples the end of the turn is not scored: {why}"
    if check.lengths:
        now = check.settings.max_length
        lost = sum(sum(shares) for limit, *shares in check.lengths.limits if limit == now)
        if lost > MANY_CUT * check.lengths.examples:
            yield "note", f"--max-length {now} cuts or drops {lost:,} examples"
        if check.model == DEMO and check.settings.data != DEMO:
            yield "note", "the tokens are those of the demo model; give --model to count yours"


def _on_labels(check):
    labels, longer, noise = check.good_labels, check.longer_wins, check.noise
    if check.contradicting.count:
        what = "completion" if check.kind == "labels" else "pair"
        yield "warning", f"{check.contradicting} judge the same {what} both ways"
    if longer and not 1 - BIASED <= longer.share <= BIASED:
        which = "longer" if longer.share > BIASED else "shorter"
        rule = (
            f"always picking the {which} one is right in {max(longer.share, 1 - longer.share):.0%}"
        )
        yield "note", f"{rule}: the model may learn length instead of quality"
    if labels and labels.share in (0, 1):
        word = "good" if labels.share else "bad"
        yield "warning", f"all labels are {word}: there is nothing to tell apart"
    if noise and noise.rate >= RANDOM:
        yield "warning", f"about {noise.rate:.0%} wrong labels: they hardly say what is better"
    kappa = check.agreement and check.agreement.fleiss
    if kappa is not None and kappa < LOW_KAPPA:
        why = "their instructions are probably unclear"
        yield "warning", f"annotators agree little beyond chance (kappa {kappa:.2f}): {why}"


# -- what to do ------------------------------------------------------------------------------------


def _fit(check: DataCheck, method: str, reason: str, *flags: str) -> Remark:
    """A method, why it fits, and its command on this data."""
    model, settings = check.model, check.settings
    words = ["mlx-align", method]
    if model != DEMO or settings.data != DEMO:
        # On data of one's own the demo model makes no sense.
        words += ["--model", EXAMPLE_MODEL if model == DEMO else model]
    for field in dataclasses.fields(DataSettings):
        value = getattr(settings, field.name)
        name = field.name.replace("_", "-")
        if isinstance(value, bool) and value != field.default:
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value != field.default:
            words += [f"--{name}", ",".join(value) if isinstance(value, tuple) else str(value)]
    return Remark("advice", reason, method, shlex.join([*words, *flags]))


def _for_pairs(check):
    noise, longer = check.noise, check.longer_wins
    orpo = "ORPO learns to answer and to prefer in one run (or run sft first)"
    if not check.has_template:
        yield _fit(check, "orpo", f"no chat template, so probably no instruction model yet: {orpo}")
    labels = f"about {noise.rate:.1%} wrong labels" if noise else "no sign of many wrong labels"
    if noise and noise.rate >= NOISY:
        share = f"{min(noise.rate, 0.45):.2f}"
        yield _fit(check, "cdpo", f"{labels}, which it reckons with", "--label-smoothing", share)
        yield _fit(check, "ipo", f"{labels}: its margins stay finite, and it needs no share")
    else:
        yield _fit(check, "dpo", f"preference pairs with {labels}: the plain method does")
    if longer and longer.share > BIASED:
        yield _fit(check, "dpo-norm", "the longer one often wins: it takes log-ratios per token")
    if check.has_template:
        yield _fit(check, "orpo", f"if the model has not learnt such answers yet: {orpo}")


def _for_labels(check):
    good, bad = check.good_labels.hits, check.good_labels.total - check.good_labels.hits
    if bad == 0:
        yield _fit(check, "sft", "only good completions, to be imitated")
        return
    why, flags = f"completions judged one by one, {good:,} good and {bad:,} bad", ()
    # KTO wants w_D n_D : w_U n_U between 1 and 4/3 (Ethayarajh et al. 2024, arXiv:2402.01306).
    if good and not 1 <= good / bad <= 4 / 3:
        weight = bad / good * 7 / 6
        name = "--undesirable-weight" if good > bad else "--desirable-weight"
        flags = (name, f"{1 / weight if good > bad else weight:.2f}")
        why += ", which the weight balances"
    yield _fit(check, "kto", why, *flags)
    yield _fit(check, "bco", "the same data, without KTO's mismatched completions")


def _for_comparisons(check):
    if check.decided:
        pairs = f"{check.decided:,} rows have a completion that most prefer"
        how = "write it as chosen, the other as rejected, and the prompt, to train on pairs (dpo)"
        yield Remark("advice", f"{pairs}: {how}; leave out {check.ties:,} ties")
    else:
        why = "no column says which completion is preferred: have them judged, or name it"
        yield Remark("advice", f"{why} (--annotators)")


def _for_prompts(check):
    if check.answered:
        reward = "gsm8k" if check.numeric > check.answered / 2 else "contains"
        why = "what the model writes can be rewarded by comparing it with the answer"
        yield _fit(check, "grpo", why, "--reward", reward)
        yield Remark("advice", "sft imitates the answers: --field completion=answer names them")
    else:
        how = "reward what a model writes (grpo --reward), or let it answer and judge the answers"
        yield Remark("advice", f"prompts alone teach nothing: {how}")


def _for_completions(check):
    yield _fit(check, "sft", "examples to imitate, without a preference")
