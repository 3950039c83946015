"""Each rule on runs with the fault and on healthy ones: simulated, published, and real small ones."""

import json
import math

import numpy as np
import pytest

from mlx_align import api
from mlx_align.train.diagnosis import RULES, Diagnosis, Finding
from mlx_align.train.runlog import METRICS, RUN

SETTINGS = {"batch_size": 8, "beta": 0.1, "max_grad_norm": 1.0, "sft_weight": 0.0, "ld_alpha": None}


def findings(rows, *, method="dpo", total=None, uses_reference=True, **settings):
    """What a run with these rows is told: {rule: text}, each at most once."""
    total = total or max(row["step"] for row in rows)
    diagnosis = Diagnosis(method, {**SETTINGS, **settings}, total, uses_reference)
    said = [found for row in rows for found in diagnosis.update(row)]
    assert len({found.rule for found in said}) == len(said), "a rule spoke twice"
    return {found.rule: found.text for found in said}


# -------------------------------------------------------------------------------- simulated runs


def rate_at(step, steps, peak=1e-5):
    """Warm-up over 5 % of the steps, then linear to 0."""
    rising = math.ceil(0.05 * steps)
    return peak * min((step + 1) / rising, (steps - step) / (steps - rising))


def dpo_rows(
    steps=120,
    batch=8,
    seed=0,
    *,
    beta=0.1,
    chosen=0.0,
    rejected=-10.0,
    spread=1.0,
    lengths=(50, 50),
):
    """Rows of a DPO run, pair by pair: `chosen` and `rejected` are the mean log-ratios (nats) at its
    end, or functions of the share of the run; a pair's own lie around them with a deviation of `spread`
    times their distance from 0. A token has 1 +- 0.3 nats; completions 15 to 150 tokens."""
    rng = np.random.default_rng(seed)

    def side(end, share, length):
        mean = end(share) if callable(end) else end * share
        tokens = np.maximum(length * rng.lognormal(0, 0.5, batch), 1)
        logp = -tokens * rng.normal(1, 0.3, batch).clip(0.1)
        return mean + spread * abs(mean) * rng.normal(0, 1, batch), logp, tokens

    rows = []
    for step in range(steps):
        share = step / steps
        c, c_logp, c_tokens = side(chosen, share, lengths[0])
        r, r_logp, r_tokens = side(rejected, share, lengths[1])
        margin = beta * (c - r)
        row = {
            "step": step + 1,
            "split": "train",
            "epoch": (step + 1) / steps,
            "loss": np.logaddexp(0, -margin).mean(),
            "rewards/chosen": beta * c.mean(),
            "rewards/rejected": beta * r.mean(),
            "rewards/margins": margin.mean(),
            "rewards/accuracies": (margin > 0).mean(),
            "logps/chosen": (c_logp + c).mean(),
            "logps/rejected": (r_logp + r).mean(),
            "lengths/chosen": c_tokens.mean(),
            "lengths/rejected": r_tokens.mean(),
            "learning_rate": rate_at(step, steps),
            "grad_norm": rng.lognormal(0, 0.5),
        }
        rows.append({k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()})
    return rows


def sft_rows(steps=120, batch=8, seed=0, *, fall=0.3, start=1.5):
    """Rows of an SFT run whose loss falls by a share of its start."""
    rng = np.random.default_rng(seed)
    return [
        {
            "step": step + 1,
            "split": "train",
            "loss": start * (1 - fall * step / steps) * rng.lognormal(0, 0.4 / math.sqrt(batch)),
            "mean_token_accuracy": 0.6,
            "learning_rate": rate_at(step, steps),
            "grad_norm": rng.lognormal(0, 0.5),
        }
        for step in range(steps)
    ]


HEALTHY = {
    "usual": {},
    "hard pairs": {"rejected": -3.0, "spread": 3.0},
    "chosen rises": {"chosen": 8.0, "rejected": -2.0},
    "chosen falls a little": {"chosen": -5.0, "rejected": -25.0},
    "low beta": {"beta": 0.01, "chosen": -5.0, "rejected": -60.0, "lengths": (200, 200)},
    "high beta": {"beta": 0.5, "rejected": -4.0},
    "longer by a quarter": {"lengths": (60, 48)},
}


@pytest.mark.parametrize("batch", [1, 4, 32])
@pytest.mark.parametrize("kind", HEALTHY)
def test_healthy_runs_hear_nothing(kind, batch):
    for seed in range(3):
        rows = dpo_rows(150, batch, seed, **HEALTHY[kind])
        beta = HEALTHY[kind].get("beta", 0.1)
        assert findings(rows, batch_size=batch, beta=beta) == {}


@pytest.mark.parametrize("batch", [1, 4, 32])
def test_healthy_fine_tuning_hears_nothing(batch):
    for seed in range(10):
        rows = sft_rows(150, batch, seed)
        assert findings(rows, method="sft", uses_reference=False, batch_size=batch) == {}


FAULTS = {
    "displacement": {"chosen": -20.0, "rejected": -40.0},
    "kl-explodes": {"chosen": -150.0, "rejected": -180.0, "spread": 0.3},
    "loss-stuck": {"chosen": 1e-4, "rejected": -1e-4},
    "loss-rises": {"chosen": lambda share: -30 * share, "rejected": -25.0, "spread": 1.5},
    "accuracy-at-once": {"chosen": 5.0, "rejected": -20.0, "spread": 0.3},
    "length-drift": {"lengths": (90, 45)},
    "beta-too-high": {"beta": 5.0, "chosen": 0.4, "rejected": -0.8, "spread": 0.5},
    "beta-too-low": {"beta": 0.001, "chosen": 5.0, "rejected": -60.0, "lengths": (60, 60)},
}


@pytest.mark.parametrize("rule", FAULTS)
def test_simulated_faults_are_named(rule):
    for seed in range(3):
        rows = dpo_rows(200, 4, seed, **FAULTS[rule])
        said = findings(rows, batch_size=4, beta=FAULTS[rule].get("beta", 0.1))
        assert rule in said, seed


def test_beta_is_too_high_where_the_loss_is_above_its_start():
    rows = dpo_rows(200, 8, beta=10.0, chosen=0.2, rejected=-0.3, spread=4.0)
    said = findings(rows, beta=10.0)
    assert set(said) == {"beta-too-high"}
    assert "every small move costs too much. --beta 10 is too high" in said["beta-too-high"]


def test_every_rule_has_a_test():
    tested = {
        *FAULTS,
        "gradient-zero",
        "gradient-spikes",
        "reference-is-policy",
    }
    assert {rule.__name__.replace("_", "-") for rule in RULES} == tested
    assert all(rule.__doc__ for rule in RULES)


def test_zero_gradients():
    rows = dpo_rows(12)
    for row in rows:
        row["grad_norm"] = 0.0
    text = findings(rows)["gradient-zero"]
    assert "nothing is trained" in text and "--lora-keys" in text
    rows = dpo_rows(60)
    for row in rows[40:]:
        row["grad_norm"] = 0.0
    assert "nothing more is learned" in findings(rows)["gradient-zero"]
    rows = dpo_rows(60)
    for row in rows[::3]:
        row["grad_norm"] = 0.0
    assert findings(rows) == {}


def test_spiking_gradients():
    rows = dpo_rows(120)
    for i in (60, 75):
        rows[i]["grad_norm"] = 40.0
    assert findings(rows) == {}
    rows[90]["grad_norm"] = 60.0
    text = findings(rows)["gradient-spikes"]
    assert "3 times" in text and "up to 60" in text and "--learning-rate" in text
    assert "--max-grad-norm 1 would" in findings(rows, max_grad_norm=0.0)["gradient-spikes"]
    # What clipping leaves alone is no spike.
    assert findings(rows, max_grad_norm=100.0) == {}


def test_a_policy_that_stays_its_reference():
    rows = dpo_rows(30, chosen=0.0, rejected=0.0)
    said = findings(rows)
    assert set(said) == {"reference-is-policy"}
    assert "exactly its reference" in said["reference-is-policy"]
    rows = dpo_rows(30, chosen=1e-5, rejected=-1e-5, spread=4.0)
    assert set(findings(rows)) == {"loss-stuck"}


def test_a_warm_up_is_not_a_loss_that_is_stuck():
    rows = dpo_rows(100, chosen=0.0, rejected=lambda share: -1e-3 if share < 0.6 else -10.0)
    for i, row in enumerate(rows):
        row["learning_rate"] = 1e-5 * min(1, (i + 1) / 60)
    assert findings(rows) == {}


def test_a_beta_that_hides_what_is_learned_is_not_a_low_learning_rate():
    rows = dpo_rows(60, beta=1e-4, chosen=5.0, rejected=-5.0, spread=2.0)
    assert set(findings(rows, beta=1e-4)) == {"beta-too-low"}


def test_random_labels_are_not_a_low_learning_rate():
    rows = dpo_rows(100, chosen=-3.0, rejected=-3.0, spread=0.05, lengths=(90, 90))
    assert "does not hold for others" in findings(rows)["loss-stuck"]


def held_out(step, **values):
    return {"step": step, "split": "valid", **values}


def test_held_out_rows_decide_for_noisy_losses():
    def said(after, fall):
        rows = [held_out(0, loss=1.5), *sft_rows(fall=fall)]
        rows.insert(61, held_out(60, loss=after))
        return findings(rows, method="sft", uses_reference=False)

    assert set(said(1.499, 0.0)) == {"loss-stuck"}
    assert said(1.4, 0.1) == {}
    # Overfitted: the held-out loss comes back to its start, the training loss does not.
    assert said(1.5, 0.6) == {}


@pytest.mark.parametrize("fall,spoken", [(2.0, False), (30.0, True)])
def test_displacement_without_a_reference(fall, spoken):
    rows = [held_out(0, **{"loss": 1.0, "logps/chosen": -90.0, "rewards/margins": 0.1})]
    rows += dpo_rows(40, chosen=-fall, rejected=-2 * fall)
    rows += [held_out(40, **{"loss": 0.8, "logps/chosen": -90.0 - fall, "rewards/margins": 0.4})]
    said = findings(rows, method="simpo", uses_reference=False, beta=2.5)
    assert set(said) == ({"displacement"} if spoken else set())


def test_a_reference_that_is_not_the_start_says_nothing_of_the_start():
    rows = dpo_rows(120, chosen=lambda share: -20.0, rejected=lambda share: -22.0, spread=0.1)
    assert set(findings(rows)) == {"displacement"}
    for changes in ({"reference": "another/model"}, {"sync_every": 10}):
        assert findings(rows, **changes) == {}


def test_ktos_kl_and_its_missing_sides():
    rows = dpo_rows(120, batch=4, chosen=2.0, rejected=-8.0)
    for i, row in enumerate(rows):
        row["kl"] = 0.5
        del row["rewards/margins"], row["rewards/accuracies"]
        if i % 5 == 0:  # a batch without a good completion
            del row["rewards/chosen"], row["logps/chosen"], row["lengths/chosen"]
    assert findings(rows, method="kto", batch_size=4) == {}
    for row in rows[60:]:
        row["kl"] = 80.0
    assert "the KL to it is" in findings(rows, method="kto", batch_size=4)["kl-explodes"]


def test_reward_models():
    def rows(accuracy, loss):
        rng = np.random.default_rng(0)
        return [
            {
                "step": i + 1, "split": "train", "loss": loss(i / 100) * rng.lognormal(0, 0.05),
                "accuracy": rng.binomial(8, accuracy) / 8, "margin": 0.5, "mean_reward": 0.0,
                "learning_rate": rate_at(i, 100), "grad_norm": rng.lognormal(0, 0.4),
            }
            for i in range(100)
        ]  # fmt: skip

    def said(*args):
        return set(findings(rows(*args), method="reward", uses_reference=False))

    assert said(0.75, lambda share: 0.7 - 0.2 * share) == set()
    assert said(0.99, lambda share: 0.7 - 0.6 * share) == {"accuracy-at-once"}


def test_known_by_heart_is_not_at_once():
    rows = dpo_rows(60, chosen=5.0, rejected=-20.0, spread=0.3)
    for row in rows:
        row["epoch"] = row["step"] / 5
    assert "accuracy-at-once" not in findings(rows)


def test_lengths_that_are_told_apart_at_once_name_the_remedy():
    rows = dpo_rows(60, chosen=5.0, rejected=-20.0, spread=0.3, lengths=(120, 40))
    said = findings(rows)
    assert set(said) == {"accuracy-at-once"}
    assert "--ld-alpha" in said["accuracy-at-once"] and "simpo" in said["accuracy-at-once"]
    assert "length-drift" not in findings(dpo_rows(lengths=(40, 90)), ld_alpha=0.5)
    assert "answer shorter" in findings(dpo_rows(lengths=(40, 90)))["length-drift"]
    assert findings(dpo_rows(lengths=(40, 90)), method="dpo-norm") == {}


def test_sampled_lengths_that_drift():
    rng = np.random.default_rng(0)
    rows = [
        {
            "step": i + 1, "split": "train", "loss": 0.0, "learning_rate": 1e-6,
            "grad_norm": rng.lognormal(0, 0.4), "completions/mean_length": rng.normal(100 + i, 10),
            "reward": 0.5,
        }
        for i in range(100)
    ]  # fmt: skip
    assert "get longer" in findings(rows, method="grpo", uses_reference=False)["length-drift"]
    for row in rows:
        row["completions/mean_length"] = rng.normal(100, 30)
    assert findings(rows, method="grpo", uses_reference=False) == {}


def test_a_resumed_run_is_not_told_twice():
    rows = dpo_rows(200, 4, **FAULTS["displacement"])
    whole = Diagnosis("dpo", {**SETTINGS, "batch_size": 4}, 200, True)
    said = [found for row in rows for found in whole.update(row)]
    step = next(found.step for found in said if found.rule == "displacement")
    for cut in (step - 1, step):
        resumed = Diagnosis("dpo", {**SETTINGS, "batch_size": 4}, 200, True)
        before = [found for row in rows[:cut] for found in resumed.update(row)]
        after = [found for row in rows[cut:] for found in resumed.update(row)]
        assert before + after == said and all(isinstance(f, Finding) for f in said)


def test_findings_say_what_is_seen_and_what_to_do():
    for rule, fault in FAULTS.items():
        text = findings(dpo_rows(200, 4, **fault), batch_size=4, beta=fault.get("beta", 0.1))[rule]
        assert any(c.isdigit() for c in text) and text.endswith(".") and "\n" not in text
        assert "--" in text or "mlx-align data check" in text or "simpo" in text


# -------------------------------------------------------------------------------- published runs

# (share of the run, rewards/chosen, rewards/rejected) as their model cards have them; beta, the
# log-probabilities per side without training, and what a diagnosis should say.
PUBLISHED = {
    # huggingface.co/YeungNLP/firefly-qwen1.5-en-7b-dpo-v0.1: 64 to 73 % of the pairs right
    "firefly": (
        0.1,
        (-280, -260),
        [(0.0, 0.0, 0.0), (0.2, -0.36, -1.02), (0.5, -1.35, -2.46), (0.6, -1.59, -2.95)],
        set(),
    ),
    # huggingface.co/rasyosef/phi-1_5-dpo
    "phi-1_5-dpo": (
        0.1,
        (-118, -138),
        [(0.0, 0.0, 0.0), (0.25, -0.2, -0.56), (0.5, -0.41, -1.19), (1.0, -1.025, -2.389)],
        set(),
    ),
    # huggingface.co/alignment-handbook/zephyr-7b-dpo-full: good, and known for its displacement
    "zephyr": (
        0.01,
        (-262, -262),
        [(0.0, 0.0, 0.0), (0.2, -0.5, -1.0), (1.0, -0.947, -1.893)],
        {"displacement"},
    ),
    # huggingface.co/TrevorJS/mtg-dpo-fail
    "mtg-dpo-fail": (
        0.1,
        (-67, -34),
        [(0.0, 0.0, 0.0), (0.07, -0.4, -7.8), (0.22, -2.7, -12.1), (1.0, -8.5, -25.9)],
        {"accuracy-at-once", "displacement", "kl-explodes"},
    ),
    # huggingface.co/CXL295/zephyr-7b-dpo-full: 68 % right, a loss of 0.85 and more
    "beta 1": (
        1.0,
        (-284, -262),
        [(0.0, 0.0, 0.0), (0.42, -0.66, -2.66), (0.84, 0.52, -1.6), (1.0, 0.7, -1.37)],
        {"beta-too-high"},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_runs(name):
    beta, logps, points, expected = PUBLISHED[name]
    shares, chosen, rejected = zip(*points, strict=True)
    spread = {"mtg-dpo-fail": 0.4, "beta 1": 2.0}.get(name, 1.0)
    rows = dpo_rows(
        300,
        16,
        beta=beta,
        chosen=lambda share: np.interp(share, shares, chosen) / beta,
        rejected=lambda share: np.interp(share, shares, rejected) / beta,
        spread=spread,
        lengths=tuple(-logp / 1.13 for logp in logps),  # the mean of the lognormal lengths
    )
    assert set(findings(rows, batch_size=16, beta=beta)) - {"length-drift"} == expected


# ------------------------------------------------------------------------------------- real runs

WORDS = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog", "bakes", "bread", "salt"]


def write_pairs(path, kind):
    """160 pairs of random words. taste: the chosen side likes some words better; marker: it begins
    with another word; longer: it is more than twice as long."""
    rng = np.random.default_rng(0)
    liked = np.array([2.0] * 5 + [1.0] * 5) / 15

    def text(count, weights=None):
        return " ".join(rng.choice(WORDS, count, p=weights))

    sides = {
        "taste": lambda: (text(6, liked), text(6, liked[::-1])),
        "marker": lambda: ("Sure! " + text(6), text(6)),
        "longer": lambda: (text(14), text(6)),
    }[kind]
    rows = []
    for i in range(160):
        chosen, rejected = sides()
        rows.append({"prompt": f"{i} {text(5)}?", "chosen": chosen, "rejected": rejected})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def told(model_folder, tmp_path):
    """told(kind, **settings): what a real run on a tiny model is told."""

    def run(kind="taste", method="dpo", **settings):
        data = write_pairs(tmp_path / "pairs.jsonl", kind)
        if method == "sft":
            pairs = [json.loads(line) for line in data.read_text().splitlines()]
            texts = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in pairs]
            data.write_text("".join(json.dumps(text) + "\n" for text in texts))
        usual = {"batch_size": 4, "steps": 40, "learning_rate": 1e-3, "valid_share": 0.1}
        paths = {"model": str(model_folder()), "data": str(data), "output": str(tmp_path / "run")}
        result = api.train_model(method, **{**paths, **usual, **settings})
        return diagnose(result.folder)

    return run


def diagnose(folder):
    record = json.loads((folder / RUN).read_text())
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    settings = record["settings"]
    return findings(
        rows, method=record["method"], uses_reference=record["method"] == "dpo", **settings
    )


@pytest.mark.parametrize(
    "method,settings",
    [("dpo", {}), ("dpo", {"steps": 80}), ("dpo", {"batch_size": 16}), ("sft", {})],
)
def test_real_healthy_runs(told, method, settings):
    assert told(method=method, **settings) == {}


@pytest.mark.parametrize(
    "rule,settings",
    [
        ("loss-stuck", {"learning_rate": 1e-9}),
        ("loss-stuck", {"method": "sft", "learning_rate": 1e-7}),
        ("reference-is-policy", {"learning_rate": 1e-14}),
        ("accuracy-at-once", {"kind": "marker"}),
        ("beta-too-high", {"beta": 20.0}),
        ("beta-too-low", {"beta": 1e-4}),
    ],
)
def test_real_faults_are_named(told, rule, settings):
    assert set(told(**settings)) == {rule}


def test_a_real_run_on_pairs_of_unequal_length(told):
    said = told("longer")
    assert set(said) == {"accuracy-at-once"} and "it is the length" in said["accuracy-at-once"]


def test_a_real_run_with_a_far_too_high_learning_rate(tmp_path):
    settings = {"learning_rate": 1e-2, "steps": 25, "eval_every": 0, "eval_examples": 8}
    result = api.train_model("dpo", output=str(tmp_path / "run"), **settings)
    assert {"displacement", "kl-explodes"} <= set(diagnose(result.folder))


def test_the_demo_hears_nothing(tmp_path):
    result = api.train_model("dpo", output=str(tmp_path / "run"))
    assert diagnose(result.folder) == {}
