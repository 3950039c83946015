"""Golden numbers of the losses, restated in float64 numpy from the papers' formulas.

python tests/golden/make_golden.py > tests/golden/golden.json
"""

import json

import numpy as np

# Sums of log-probabilities of three pairs, and the tokens of each completion.
PAIRS = {
    "chosen": [-12.0, -20.5, -8.25],
    "rejected": [-14.0, -18.0, -9.0],
    "ref_chosen": [-13.0, -20.0, -8.0],
    "ref_rejected": [-13.5, -19.0, -8.5],
    "chosen_length": [6, 10, 4],
    "rejected_length": [7, 8, 5],
}


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def make():
    p = {name: np.array(values) for name, values in PAIRS.items()}
    beta = 0.1
    r_chosen, r_rejected = p["chosen"] - p["ref_chosen"], p["rejected"] - p["ref_rejected"]
    losses = -log_sigmoid(beta * (r_chosen - r_rejected))
    return {
        "pairs": PAIRS,
        "dpo": {
            "settings": {"beta": beta},
            "per_pair": losses.round(8).tolist(),
            "mean": round(float(losses.mean()), 8),
            "metrics": {
                "rewards/chosen": round(float((beta * r_chosen).mean()), 8),
                "rewards/rejected": round(float((beta * r_rejected).mean()), 8),
                "rewards/margins": round(float((beta * (r_chosen - r_rejected)).mean()), 8),
                "rewards/accuracies": round(float((r_chosen > r_rejected).mean()), 8),
                "logps/chosen": round(float(p["chosen"].mean()), 8),
                "logps/rejected": round(float(p["rejected"].mean()), 8),
                "logps/accuracies": round(float((p["chosen"] > p["rejected"]).mean()), 8),
            },
        },
    }


if __name__ == "__main__":
    print(json.dumps(make(), indent=1))
