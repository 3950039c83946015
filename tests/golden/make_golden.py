"""The losses restated in float64 numpy from the papers' formulas, and golden numbers made with them.

python tests/golden/make_golden.py > tests/golden/golden.json
"""

import json

import numpy as np

# Sums of log-probabilities of three pairs, the tokens of each completion, and the data's margins.
PAIRS = {
    "chosen": [-12.0, -20.5, -8.25],
    "rejected": [-14.0, -18.0, -9.0],
    "ref_chosen": [-13.0, -20.0, -8.0],
    "ref_rejected": [-13.5, -19.0, -8.5],
    "chosen_length": [6, 10, 4],
    "rejected_length": [7, 8, 5],
    "margin": [1.0, -0.5, 2.0],
}
# Four judged completions, and what the KL term is estimated on.
LABELS = {
    "logp": [-10.0, -15.0, -7.5, -22.0],
    "ref_logp": [-11.0, -14.0, -8.0, -21.0],
    "label": [1, 0, 1, 0],
    "other": [-16.0, -9.0, -23.0, -8.0],
    "ref_other": [-16.4, -9.2, -22.9, -8.3],
}
REWARDS = {"chosen": [1.2, -0.3, 0.5], "rejected": [0.7, 0.1, 0.5], "margin": [0.5, 0.0, 1.0]}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def log1mexp(x):
    return np.where(x < -np.log(2), np.log1p(-np.exp(x)), np.log(-np.expm1(x)))


DIVERGENCES = {
    "reverse_kl": lambda r, a: r,
    "forward_kl": lambda r, a: -np.exp(-r),
    "js": lambda r, a: log_sigmoid(r),
    "alpha": lambda r, a: np.exp((a - 1) * r) / (a - 1),
}


class View:
    """The quantities of the formulas, under the names of the papers."""

    def __init__(self, p, settings):
        self.lc, self.lr = p["chosen"], p["rejected"]
        self.rc, self.rr = p["chosen"] - p["ref_chosen"], p["rejected"] - p["ref_rejected"]
        self.ref_gap = p["ref_chosen"] - p["ref_rejected"]
        self.nc, self.nr = p["chosen_length"], p["rejected_length"]
        self.g = p["margin"]
        self.b = settings.get("beta", 0.1)
        f = DIVERGENCES[settings.get("f_divergence", "reverse_kl")]
        self.sc, self.sr = (f(r, settings.get("f_alpha", 0.5)) for r in (self.rc, self.rr))
        self.x = self.b * (self.sc - self.sr)
        self.ac, self.ar = self.lc / self.nc, self.lr / self.nr
        self.e = settings.get("label_smoothing", 0.0)


def noisy(x, e):
    return -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x)


def robust(v, s):
    return (-(1 - v.e) * log_sigmoid(v.x) + v.e * log_sigmoid(-v.x)) / (1 - 2 * v.e)


def exo(v, s):
    p, q = sigmoid(v.x), sigmoid(-v.x)
    return p * (np.log(p) - np.log(1 - v.e)) + q * (np.log(q) - np.log(v.e))


def discopop(v, s):
    m = sigmoid(v.x / s["tau"])
    return -(1 - m) * log_sigmoid(v.x) + m * np.exp(-v.x)


def ipo(v, s):
    if s.get("length_normalise", True):
        return (v.sc / v.nc - v.sr / v.nr - 1 / (2 * v.b)) ** 2
    return (v.sc - v.sr - 1 / (2 * v.b)) ** 2


def coin_kl(a, b):
    pa, pb = sigmoid(a), sigmoid(b)
    return pa * np.log(pa / pb) + (1 - pa) * np.log((1 - pa) / (1 - pb))


def rpo_gap(v, s):
    kind = s.get("distance", "backward")
    if kind == "square":
        return (v.x - v.g) ** 2
    return coin_kl(v.g, v.x) if kind == "backward" else coin_kl(v.x, v.g)


def alphapo(v, s):
    rc, rr = ((1 - np.exp(a) ** -s["alpha"]) / s["alpha"] for a in (v.ac, v.ar))
    return -log_sigmoid(s["beta"] * (rc - rr) - s["gamma"])


def orpo(v, s):
    odds = (v.ac - v.ar) - (log1mexp(v.ac) - log1mexp(v.ar))
    return -s["beta"] * log_sigmoid(odds)


def dpop(v, s):
    return -log_sigmoid(v.x - v.b * s["penalty"] * np.maximum(0, -v.rc))


# The loss of each pair, without an added likelihood: name -> function(View, settings).
PAIR_LOSSES = {
    "dpo": lambda v, s: -log_sigmoid(v.x),
    "cdpo": lambda v, s: noisy(v.x, v.e),
    "robust": robust,
    "ipo": ipo,
    "hinge": lambda v, s: np.maximum(0, 1 - v.x),
    "exo": exo,
    "nca": lambda v, s: (
        -log_sigmoid(v.b * v.sc) - 0.5 * log_sigmoid(-v.b * v.sc) - 0.5 * log_sigmoid(-v.b * v.sr)
    ),
    "bco-pair": lambda v, s: -log_sigmoid(v.b * v.sc) - log_sigmoid(-v.b * v.sr),
    "sppo": lambda v, s: (v.sc - 0.5 / v.b) ** 2 + (v.sr + 0.5 / v.b) ** 2,
    "aot": lambda v, s: noisy(v.b * (np.sort(v.lc - v.lr) - np.sort(v.ref_gap)), v.e),
    "aot-unpaired": lambda v, s: noisy(v.b * (np.sort(v.rc) - np.sort(v.rr)), v.e),
    "apo-zero": lambda v, s: 1 - sigmoid(v.b * v.rc) + sigmoid(v.b * v.rr),
    "apo-down": lambda v, s: sigmoid(v.b * v.rc) + 1 - sigmoid(v.x),
    "discopop": discopop,
    "dpo-norm": lambda v, s: -log_sigmoid(v.b * (v.sc / v.nc - v.sr / v.nr)),
    "dpop": dpop,
    "rpo": lambda v, s: -log_sigmoid(v.x),
    "rpo-gap": rpo_gap,
    "mpo": lambda v, s: (
        0.8 * -log_sigmoid(v.x) + 0.2 * (-log_sigmoid(v.b * v.sc) - log_sigmoid(-v.b * v.sr))
    ),
    "cpo": lambda v, s: noisy(v.b * (v.lc - v.lr), v.e),
    "simpo": lambda v, s: -log_sigmoid(s["beta"] * (v.ac - v.ar) - s["gamma"]),
    "alphapo": alphapo,
    "orpo": orpo,
}
# What is checked: method, its settings, and the key of the same number in the shared collection.
CASES = [
    ("dpo", {"beta": 0.1}, "dpo/sigmoid"),
    ("dpo", {"beta": 0.1, "f_divergence": "forward_kl"}, "dpo/forward_kl+sigmoid"),
    ("dpo", {"beta": 0.1, "f_divergence": "js"}, "dpo/js+sigmoid"),
    ("dpo", {"beta": 0.1, "f_divergence": "alpha", "f_alpha": 0.5}, "dpo/alpha(.5)+sigmoid"),
    ("cdpo", {"beta": 0.1, "label_smoothing": 0.1}, "dpo/sigmoid_label_smoothing_cDPO(eps=.1)"),
    ("robust", {"beta": 0.1, "label_smoothing": 0.1}, "dpo/robust(eps=.1)"),
    ("ipo", {"beta": 0.1}, "dpo/ipo_token_mean"),
    ("ipo", {"beta": 0.1, "length_normalise": False}, "dpo/ipo_token_sum(non-TRL)"),
    ("hinge", {"beta": 0.1}, "dpo/hinge"),
    ("exo", {"beta": 0.1, "label_smoothing": 0.1}, "dpo/exo_pair(eps=.1)"),
    ("nca", {"beta": 0.1}, "dpo/nca_pair"),
    ("bco-pair", {"beta": 0.1}, "dpo/bco_pair(delta=0)"),
    ("sppo", {"beta": 0.1}, "dpo/sppo_hard"),
    ("aot", {"beta": 0.1, "label_smoothing": 0.1}, "dpo/aot(eps=.1)"),
    ("aot-unpaired", {"beta": 0.1, "label_smoothing": 0.1}, "dpo/aot_unpaired(eps=.1)"),
    ("apo-zero", {"beta": 0.1}, "dpo/apo_zero"),
    ("apo-down", {"beta": 0.1}, "dpo/apo_down"),
    ("discopop", {"beta": 0.1, "tau": 0.05}, "dpo/discopop(tau=.05)"),
    ("dpo-norm", {"beta": 0.1}, "dpo/sigmoid_norm"),
    ("dpop", {"beta": 0.1, "penalty": 5.0}, None),
    ("rpo", {"beta": 0.1, "sft_weight": 0.5}, None),
    ("rpo-gap", {"beta": 0.2, "distance": "backward"}, "rpo_bwd_kl(beta=.2)"),
    ("rpo-gap", {"beta": 0.2, "distance": "forward"}, "rpo_fwd_kl(beta=.2)"),
    ("rpo-gap", {"beta": 0.2, "distance": "square"}, "rpo_sq(beta=.2)"),
    ("mpo", {"beta": 0.1, "sft_weight": 1.0}, None),
    ("cpo", {"beta": 0.1, "sft_weight": 0.0}, "cpo/sigmoid(beta=.1, sum logps, w/o nll)"),
    ("simpo", {"beta": 2.0, "gamma": 0.5}, "simpo(beta=2,gamma=.5 -> minus gamma)"),
    ("alphapo", {"alpha": 0.25, "beta": 2.0, "gamma": 0.5}, "alphapo(alpha=.25,beta=2,gamma=.5)"),
    ("orpo", {"beta": 0.1, "sft_weight": 1.0}, None),
]


def pair_loss(name, settings, pairs) -> float:
    """The whole loss of a method on pairs: the mean over pairs, and the likelihood it adds."""
    p = {key: np.asarray(value, np.float64) for key, value in pairs.items()}
    losses = PAIR_LOSSES[name](View(p, settings), settings)
    nll = -p["chosen"].sum() / p["chosen_length"].sum()
    return losses.mean() + settings.get("sft_weight", 0.0) * nll


def kto_loss(labels, beta, desirable=1.0, undesirable=1.0) -> tuple[float, float]:
    """KTO's loss and its KL estimate."""
    p = {key: np.asarray(value, np.float64) for key, value in labels.items()}
    z = max(0.0, (p["other"] - p["ref_other"]).mean())
    r, good = p["logp"] - p["ref_logp"], p["label"] > 0.5
    up, down = 1 - sigmoid(beta * (r - z)), 1 - sigmoid(beta * (z - r))
    return np.where(good, desirable * up, undesirable * down).mean(), z


def bco_loss(labels, beta, delta=None) -> tuple[float, float]:
    """BCO's loss at the first step, and the mean reward it is taken against."""
    p = {key: np.asarray(value, np.float64) for key, value in labels.items()}
    reward = beta * (p["logp"] - p["ref_logp"])
    delta = reward.mean() if delta is None else delta
    x = np.where(p["label"] > 0.5, reward - delta, delta - reward)
    return -log_sigmoid(x).mean(), delta


def reward_loss(rewards, center=0.0, margin=True) -> float:
    """The reward model's loss."""
    c, r, m = (np.asarray(rewards[k], np.float64) for k in ("chosen", "rejected", "margin"))
    return (-log_sigmoid(c - r - m * margin) + center * (c + r) ** 2).mean()


def make():
    p = {key: np.asarray(value, np.float64) for key, value in PAIRS.items()}
    cases = []
    for name, settings, shared in CASES:
        losses = PAIR_LOSSES[name](View(p, settings), settings)
        cases.append(
            {
                "method": name,
                "settings": settings,
                "shared": shared,
                "per_pair": losses.round(8).tolist(),
                "loss": round(float(pair_loss(name, settings, PAIRS)), 8),
            }
        )
    ratio = {side: p[side] - p[f"ref_{side}"] for side in ("chosen", "rejected")}
    return {
        "pairs": PAIRS,
        "labels": LABELS,
        "rewards": REWARDS,
        "cases": cases,
        "dpo_metrics": {
            "rewards/chosen": round(float((0.1 * ratio["chosen"]).mean()), 8),
            "rewards/rejected": round(float((0.1 * ratio["rejected"]).mean()), 8),
            "rewards/margins": round(
                float((0.1 * (ratio["chosen"] - ratio["rejected"])).mean()), 8
            ),
            "rewards/accuracies": round(float((ratio["chosen"] > ratio["rejected"]).mean()), 8),
            "logps/chosen": round(float(p["chosen"].mean()), 8),
            "logps/rejected": round(float(p["rejected"].mean()), 8),
            "lengths/chosen": round(float(p["chosen_length"].mean()), 8),
        },
        "kto": [round(float(x), 8) for x in kto_loss(LABELS, 0.1, 1.0, 1.33)],
        "bco": [round(float(x), 8) for x in bco_loss(LABELS, 0.1)],
        "reward": {
            "plain": round(reward_loss(REWARDS, margin=False), 8),
            "margin": round(reward_loss(REWARDS), 8),
            "centred": round(reward_loss(REWARDS, center=0.01, margin=False), 8),
        },
    }


if __name__ == "__main__":
    print(json.dumps(make(), indent=1))
