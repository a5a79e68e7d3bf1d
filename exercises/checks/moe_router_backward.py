"""Chapter 3, the way back through the router."""

import numpy as np
from grader.spec import Case, Check, Wrong

from checks.draws import normal


def arrived(
    N: int, D: int, E: int, K: int, lam: float, seed: int, level: float = 0.0
) -> Case:
    """What arrives at a router, with affinities that are those of u and W."""
    u, W = normal(N, D, seed=seed), normal(E, D, seed=seed + 1, scale=0.8)
    u[:, 0], W[:, 0] = 1.0, W[:, 0] + level
    s = 1 / (1 + np.exp(-u @ W.T))
    experts = np.argsort(normal(N, E, seed=seed + 2), axis=1)[:, :K]
    dgates = normal(N, K, seed=seed + 3)
    ds = normal(N, E, seed=seed + 4, scale=0.3) / s.mean()
    label = f"{N} tokens, D={D}, {K} of {E} experts, lam={lam}"
    return Case(label, (dgates, ds, u, W, experts, s, lam))


ROUTE_BACKWARD = Check(
    "moe.4",
    returns=("du", "dW"),
    cases=lambda: [
        Case(
            "one token, two of three experts, nothing from others",
            (
                np.array([[1.0, -1.0]]),
                np.zeros((1, 3)),
                np.array([[1.0, -1.0]]),
                np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 1.0]]),
                np.array([[1, 2]]),
                1 / (1 + np.exp([[-2.0, 0.0, 1.0]])),
                2.5,
            ),
        ),
        arrived(N=5, D=4, E=7, K=3, lam=2.5, seed=10),
        arrived(N=4, D=3, E=5, K=1, lam=1.5, seed=20),
        arrived(N=3, D=6, E=4, K=4, lam=1.0, seed=30),
        arrived(N=6, D=2, E=9, K=2, lam=16.0, seed=40, level=-26.0),
        arrived(N=1, D=5, E=6, K=3, lam=2.5, seed=50),
    ],
    hints=(
        "If all dgates of a token are equal, nothing may come out: the gates always "
        "sum to lam. What has to be subtracted for that?",
        "`chosen` (N, K) and `total` (N, 1) as on the way there. The mean is the sum "
        "of `chosen / total * dgates` over K, with `keepdims=True`. "
        "`np.put_along_axis(zeros, experts, values, axis=1)` brings (N, K) into (N, "
        "E).",
        "`lam / total * (dgates - mean)` goes to the chosen, the others have 0. Add "
        "`ds`, times `s * (1 - s)`: that is `dz` (N, E). Return `dz @ W` and `dz.T @ "
        "u`.",
    ),
    wrong=(
        Wrong(
            "the mean not subtracted",
            "(dgates - mean)",
            "dgates",
            "The sum below the fraction depends on each affinity too. What one gains "
            "the others lose, and that is the mean.",
        ),
        Wrong(
            "the plain mean over K",
            "np.sum(chosen / total * dgates, axis=1, keepdims=True)",
            "np.mean(dgates, axis=1, keepdims=True)",
            "The mean is weighed with the shares: an expert with a large gate has more "
            "to lose.",
        ),
        Wrong(
            "weighed with affinities instead of shares",
            "chosen / total * dgates",
            "chosen * dgates",
            "The weights of a mean sum to 1: the affinities are divided by their sum "
            "S.",
        ),
        Wrong(
            "weighed with the gates",
            "chosen / total * dgates",
            "lam * chosen / total * dgates",
            "The gates sum to lam, and a mean's weights to 1. Divide by lam, or take "
            "the shares s / S.",
        ),
        Wrong(
            "lam forgotten",
            "lam / total",
            "1 / total",
            "The gates were shares times lam, so their gradient is lam times as large.",
        ),
        Wrong(
            "not divided by the sum",
            "lam / total * (dgates",
            "lam * (dgates",
            "A share is s / S. By how much it moves if s moves, is one part in S.",
        ),
        Wrong(
            "the sum over all experts",
            "total = chosen.sum(",
            "total = s.sum(",
            "The shares are those among the chosen. S is the sum over K, not over E.",
        ),
        Wrong(
            "the sigmoid forgotten",
            "(dshares + ds) * s * (1 - s)",
            "dshares + ds",
            "Between the product and the affinity stands a sigmoid, whose slope is "
            "s (1 - s).",
        ),
        Wrong(
            "half of the sigmoid's slope",
            "* s * (1 - s)",
            "* s",
            "The slope of the sigmoid is s (1 - s): flat at both ends, where s is near "
            "0 and where it is near 1.",
        ),
        Wrong(
            "a softmax where the sigmoid was",
            "(dshares + ds) * s * (1 - s)",
            "dshares + ds\n    dz = s * (dz - np.sum(s * dz, axis=1, keepdims=True))",
            "That is the way back through a softmax over the experts. Each affinity "
            "went through a sigmoid of its own, with the slope s (1 - s).",
        ),
        Wrong(
            "the way through the sigmoid for the gates alone",
            "(dshares + ds) * s * (1 - s)",
            "dshares * s * (1 - s) + ds",
            "ds is a gradient of the affinities, like what comes from the gates. Both "
            "go through the sigmoid.",
        ),
        Wrong(
            "what others send back forgotten",
            "(dshares + ds)",
            "dshares",
            "The affinities were read twice, by the gates and by whoever sends ds. Two "
            "gradients add.",
        ),
        Wrong(
            "what others send back lost where an expert was chosen",
            "dshares = np.zeros(s.shape)",
            "dshares, ds = ds.copy(), 0.0",
            "A chosen expert hears from both, its gate and ds: add, do not overwrite.",
        ),
        Wrong(
            "the mean taken from all experts",
            "dz = (dshares + ds)",
            "others = np.ones(s.shape)\n"
            "    np.put_along_axis(others, experts, 0.0, axis=1)\n"
            "    dz = (dshares - lam / total * mean * others + ds)",
            "No gate depends on an expert that was not chosen. It hears nothing from "
            "the gates, not the mean either.",
        ),
        Wrong(
            "ranks taken for experts",
            "dshares, experts, lam / total",
            "dshares, np.argsort(experts, axis=1), lam / total",
            "The k-th gate of a token belongs to expert experts[t, k].",
        ),
        Wrong(
            "the mean over the tokens",
            "return dz @ W, dz.T @ u",
            "return dz @ W, dz.T @ u / len(u)",
            "Every token read the same W, so their gradients add. Where the loss is a "
            "mean, dgates holds that already.",
        ),
        Wrong(
            "back as through a softmax",
            "lam / total * (dgates - mean)",
            "lam * chosen / total * (dgates - mean)",
            "So a softmax goes back to its logits. Here the shares are s / S, "
            "without an exponential: no s stands in front of the bracket.",
        ),
    ),
    right=(
        "def route_backward(dgates, ds, u, W, experts, s, lam):\n"
        "    dz = ds * s * (1 - s)\n"
        "    for n in range(len(u)):\n"
        "        e = experts[n]\n"
        "        p = s[n, e] / s[n, e].sum()\n"
        "        J = (np.eye(len(e)) - p[:, None]) * lam / s[n, e].sum()\n"
        "        dz[n, e] += J.T @ dgates[n] * s[n, e] * (1 - s[n, e])\n"
        "    return dz @ W, np.einsum('ne,nd->ed', dz, u)\n",
        "def route_backward(dgates, ds, u, W, experts, s, lam):\n"
        "    f = np.float32\n"
        "    dgates, ds, u, W, s = (a.astype(f) for a in (dgates, ds, u, W, s))\n"
        "    at = np.arange(len(u))[:, None], experts\n"
        "    hit = np.zeros(s.shape, f)\n"
        "    hit[at] = 1\n"
        "    share = s * hit / (s * hit).sum(-1, keepdims=True)\n"
        "    dg = np.zeros(s.shape, f)\n"
        "    dg[at] = dgates\n"
        "    dg = dg - hit * (share * dg).sum(-1, keepdims=True)\n"
        "    dz = f(lam) * share * (1 - s) * dg + ds * s * (1 - s)\n"
        "    return dz.dot(W), dz.T.dot(u)\n",
    ),
)

CHECKS = [ROUTE_BACKWARD]
