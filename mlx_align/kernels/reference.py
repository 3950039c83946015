"""What the kernels compute, from the definitions, in float64 NumPy: values and gradients.

For checks of small inputs only: T x T and n x V arrays.
"""

import numpy as np


def attention(q, k, v, upstream, mask, *, scale, softcap=None, sinks=None) -> dict[str, np.ndarray]:
    """Output "out" and the gradients "q", "k", "v" and "sinks" of (out * upstream).sum().

    q and upstream are [B, H, T, D], k and v [B, G, T, D]; mask, bool[B, T, T], says which key (last)
    each token sees. Tokens that see nothing get zeros. `sinks`, [H], are scores of keys without values.
    """
    q, k, v, upstream = (np.asarray(x, np.float64) for x in (q, k, v, upstream))
    groups = k.shape[1]
    repeats = q.shape[1] // groups
    keys, values = np.repeat(k, repeats, axis=1), np.repeat(v, repeats, axis=1)
    scores, slope = scale * q @ keys.swapaxes(-1, -2), 1.0
    if softcap:
        bent = np.tanh(scores / softcap)
        scores, slope = softcap * bent, 1 - bent**2
    scores = np.where(mask[:, None], scores, -np.inf)
    sinks = np.full(q.shape[1], -np.inf) if sinks is None else np.asarray(sinks, np.float64)
    sinks = sinks[None, :, None, None]
    top = np.maximum(scores.max(axis=-1, keepdims=True), sinks)
    top = np.where(np.isfinite(top), top, 0.0)
    mass, sunk = np.exp(scores - top), np.exp(sinks - top)
    total = np.maximum(mass.sum(axis=-1, keepdims=True) + sunk, 1e-300)
    share = mass / total
    out = share @ values
    delta = (upstream * out).sum(axis=-1, keepdims=True)
    by_score = share * (upstream @ values.swapaxes(-1, -2) - delta) * slope * scale

    def grouped(x):
        """The sum over the query heads that share a key head."""
        return x.reshape(x.shape[0], groups, repeats, *x.shape[2:]).sum(axis=2)

    return {
        "out": out,
        "q": by_score @ keys,
        "k": grouped(by_score.swapaxes(-1, -2) @ q),
        "v": grouped(share.swapaxes(-1, -2) @ upstream),
        "sinks": -(sunk / total * delta).sum(axis=(0, 2, 3)),
    }


def token_log_probs(logits, targets, upstream, *, softcap=None, temperature=1.0) -> dict:
    """Of logits [n, V]: "logp" and "entropy", [n], "collision" = log(sum p^2), and "logits".

    The last is the gradient of (logp * upstream).sum() by the logits, [n, V].
    """
    z, slope = np.asarray(logits, np.float64), 1.0
    if softcap:
        bent = np.tanh(z / softcap)
        z, slope = softcap * bent, 1 - bent**2
    z = z / temperature
    logs = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
    p, rows = np.exp(logs), np.arange(len(z))
    gradient = -p
    gradient[rows, targets] += 1
    return {
        "logp": logs[rows, targets],
        "entropy": -(p * logs).sum(axis=1),
        "collision": np.log((p * p).sum(axis=1)),
        "logits": np.asarray(upstream, np.float64)[:, None] * gradient * slope / temperature,
    }
