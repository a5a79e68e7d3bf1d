"""Chapter 3, balance: the loss for each sequence, and the biases."""

import numpy as np
from grader.spec import Case, Check, Wrong

from checks.draws import normal, rng


def sequences(
    B: int, T: int, E: int, K: int, alpha: float, seed: int, level: float = 0.0
) -> Case:
    """Affinities of a batch whose sequences lean on experts of their own."""
    z = normal(B, T, E, seed=seed) + 1.5 * normal(B, 1, E, seed=seed + 1) + level
    label = f"batch of {B}, {T} positions, {K} of {E} experts, alpha={alpha}"
    return Case(label, (1 / (1 + np.exp(-z)), K, alpha))


BALANCE = Check(
    "moe.6",
    returns=("loss", "ds"),
    cases=lambda: [
        Case(
            "one sequence of two tokens, one of three experts",
            (np.array([[[0.5, 0.25, 0.25], [0.8, 0.4, 0.4]]]), 1, 0.5),
        ),
        sequences(B=3, T=4, E=5, K=2, alpha=0.1, seed=10),
        sequences(B=2, T=1, E=4, K=3, alpha=1.0, seed=20),
        sequences(B=1, T=7, E=6, K=1, alpha=2.0, seed=30),
        sequences(B=4, T=3, E=8, K=3, alpha=1e-4, seed=40, level=-20.0),
        sequences(B=2, T=5, E=3, K=2, alpha=0.5, seed=50, level=2.0),
    ],
    hints=(
        "f is a number for each sequence and expert, and constant. Then the loss is "
        "linear in the shares, and the shares go back as those of moe.4 did, but with "
        "all experts.",
        "With 1 where an expert is among the K best and 0 elsewhere, f is `E / (K * "
        "T)` times the sum over axis 1; keep that axis, (B, 1, E). `shares = s / "
        "total` (B, T, E) with `total` (B, T, 1). Each position of each sequence has "
        "`alpha / (B * T)` of the loss.",
        "The loss is `alpha * np.sum(f * P) / B`. With `mean = np.sum(f * shares, "
        "axis=-1, keepdims=True)`, its gradient is `alpha / (B * T) * (f - mean) / "
        "total`.",
    ),
    wrong=(
        Wrong(
            "the whole batch as one sequence",
            "B, T, E = s.shape\n",
            "shape = s.shape\n"
            "    s = s.reshape(1, -1, shape[-1])\n"
            "    B, T, E = s.shape\n",
            "Then two texts that lean on different experts balance each other. f and P "
            "belong to one sequence.",
            (("(f - mean) / total", "((f - mean) / total).reshape(shape)"),),
        ),
        Wrong(
            "the sum over the sequences",
            "np.sum(f * P) / B",
            "np.sum(f * P)",
            "The loss is the mean over the B sequences, so a larger batch is not a "
            "larger loss.",
            (("alpha / (B * T)", "alpha / T"),),
        ),
        Wrong(
            "the gradient of the sum, not of the mean",
            "alpha / (B * T)",
            "alpha",
            "P is a mean over T positions and the loss a mean over B sequences: each "
            "position has one part in B T.",
        ),
        Wrong(
            "the gradient of the mean over T alone",
            "alpha / (B * T)",
            "alpha / T",
            "The loss is a mean over the B sequences as well: each position has one "
            "part in B T.",
        ),
        Wrong(
            "f without its factor",
            "E / (K * T) * visits",
            "1 / T * visits",
            "f is measured against an even load: K T visits over E experts, which "
            "makes f = 1 for each.",
        ),
        Wrong(
            "f without K",
            "E / (K * T)",
            "E / T",
            "A token makes K visits. For an even load, T K / E at each expert, f is 1.",
        ),
        Wrong(
            "only the best of each token counted",
            "[..., :K]",
            "[..., :1]",
            "A token makes K visits, and all of them count.",
        ),
        Wrong(
            "P from affinities that are no shares",
            "shares = s / total",
            "shares = s",
            "P is the mean of s divided by its sum over the experts. Else a router "
            "could lower the loss by liking nobody.",
            (("(f - mean) / total", "f * np.ones(s.shape)"),),
        ),
        Wrong(
            "a gradient that forgets the sum",
            "(f - mean) / total",
            "f / total",
            "The sum below the fraction depends on each affinity too. What one gains "
            "the others lose: subtract the mean of f.",
        ),
        Wrong(
            "the gradient of the shares",
            "(f - mean) / total",
            "f * np.ones(s.shape)",
            "That arrives at the shares. Going on to s, it loses its mean and is "
            "divided by the sum.",
        ),
        Wrong(
            "the plain mean of f",
            "mean = np.sum(f * shares, axis=-1, keepdims=True)",
            "mean = np.mean(f, axis=-1, keepdims=True)",
            "The mean is weighed with the shares of that token.",
        ),
        Wrong(
            "not divided by the sum",
            "(f - mean) / total",
            "(f - mean)",
            "A share is s over a sum: it moves one part in that sum as s moves.",
        ),
        Wrong(
            "the gradient for the chosen only",
            "(f - mean) / total",
            "(f - mean) / total * visits",
            "P has every expert's share, chosen or not. This loss is the only one that "
            "those who were not chosen hear.",
        ),
        Wrong(
            "the shares squared",
            "shares = s / total",
            "shares = s / total\n    f = E * shares.mean(axis=1, keepdims=True)",
            "f counts visits. The report's loss has one counted factor, and one that "
            "can be differentiated.",
        ),
        Wrong(
            "alpha forgotten in the gradient",
            "alpha / (B * T)",
            "1 / (B * T)",
            "alpha is part of the loss, and so of its gradient.",
        ),
        Wrong(
            "the loss not weighed with alpha",
            "loss = alpha * np.sum",
            "loss = np.sum",
            "Both results are those of the loss with its weight alpha.",
        ),
        Wrong(
            "a softmax of the affinities",
            "total = s.sum(axis=-1, keepdims=True)",
            "s = np.exp(s)\n    total = s.sum(axis=-1, keepdims=True)",
            "The affinities are divided by their sum, without another exponential.",
            (("(f - mean) / total", "(f - mean) * shares"),),
        ),
        Wrong(
            "the way back through the sigmoid too",
            "(f - mean) / total",
            "(f - mean) / total * s * (1 - s)",
            "Asked for is the gradient of s. The sigmoid comes behind it, in moe.4.",
        ),
    ),
    right=(
        "def balance(s, K, alpha):\n"
        "    B, T, E = s.shape\n"
        "    loss, ds = 0.0, np.zeros(s.shape)\n"
        "    for b in range(B):\n"
        "        f, P = np.zeros(E), np.zeros(E)\n"
        "        for t in range(T):\n"
        "            for i in np.argpartition(-s[b, t], K - 1)[:K]:\n"
        "                f[i] += E / (K * T)\n"
        "            P += s[b, t] / s[b, t].sum() / T\n"
        "        loss += alpha * (f @ P) / B\n"
        "        for t in range(T):\n"
        "            S = s[b, t].sum()\n"
        "            J = np.eye(E) / S - np.outer(s[b, t], np.ones(E)) / S**2\n"
        "            ds[b, t] = alpha / B / T * (f @ J)\n"
        "    return loss, ds\n",
        "def balance(s, K, alpha):\n"
        "    s = s.astype(np.float32)\n"
        "    B, T, E = s.shape\n"
        "    rank = (s[..., None, :] > s[..., None]).sum(-1)\n"
        "    f = (rank < K).mean(axis=1) * E / K\n"
        "    P = s / s.sum(-1, keepdims=True)\n"
        "    up = np.einsum('be,bte->bt', f, P)\n"
        "    ds = (f[:, None] - up[..., None]) / s.sum(-1, keepdims=True)\n"
        "    return alpha * up.mean(), alpha * ds / (B * T)\n",
    ),
)


def step(N: int, E: int, K: int, gamma: float, seed: int, among: int = 0) -> Case:
    """A batch whose tokens like some experts better; b is not at 0 any more."""
    draws = rng(seed)
    liked = draws.normal(0, 1.5, E)
    liked[draws.permutation(E)[: E - among if among else 0]] -= 100
    noise = draws.gumbel(size=(N, E))
    experts = np.argsort(-(liked + noise), axis=-1)[:, :K]
    label = f"{N} tokens, {K} of {E} experts, gamma={gamma}"
    label += f", {E - among} of them idle" * bool(among)
    return Case(label, (normal(E, seed=seed + 1, scale=0.05), experts, gamma))


UPDATE = Check(
    "moe.7",
    returns=("b", "max_vio"),
    cases=lambda: [
        Case(
            "three tokens, two of five experts each",
            (
                np.array([0.2, 0.0, -0.1, 0.0, 0.3]),
                np.array([[0, 1], [0, 2], [1, 0]]),
                0.01,
            ),
        ),
        Case(
            "one expert has its share exactly",
            (
                np.array([0.0, 0.25, -0.5]),
                np.array([[0, 1], [1, 0], [0, 2]]),
                0.1,
            ),
        ),
        step(N=30, E=6, K=2, gamma=0.001, seed=10),
        step(N=17, E=9, K=3, gamma=0.02, seed=20, among=4),
        step(N=8, E=5, K=1, gamma=0.5, seed=30, among=1),
        step(N=1, E=4, K=2, gamma=0.01, seed=40),
        step(N=11, E=7, K=4, gamma=0.0, seed=50),
        Case(
            "all alike",
            (normal(4, seed=60), np.array([[0, 1], [2, 3], [3, 0], [1, 2]]), 0.1),
        ),
    ],
    hints=(
        "Whoever is visited too often must become less attractive. By how much it is "
        "too often does not matter.",
        "`np.bincount(experts.ravel(), minlength=len(b))` counts for every expert, the "
        "idle ones at the end too. `np.sign` is 0 at 0.",
        "With `counts` (E,) and `share = counts.mean()`: the biases are `b + gamma * "
        "np.sign(share - counts)`, MaxVio is `counts.max() / share - 1`.",
    ),
    wrong=(
        Wrong(
            "the wrong way round",
            "np.sign(share - counts)",
            "np.sign(counts - share)",
            "So the full ones get fuller. Who had more than the mean is to be chosen "
            "less: its bias falls.",
        ),
        Wrong(
            "by the size of the violation",
            "np.sign(share - counts)",
            "(share - counts)",
            "Only the side counts, not how far: each bias moves by gamma or not at "
            "all.",
        ),
        Wrong(
            "by the size, relative to the share",
            "np.sign(share - counts)",
            "(1 - counts / share)",
            "Only the side counts, not how far: each bias moves by gamma or not at "
            "all.",
        ),
        Wrong(
            "the full ones punished, the others left alone",
            "np.sign(share - counts)",
            "np.minimum(np.sign(share - counts), 0)",
            "Both sides move: an expert with less than its share becomes more "
            "attractive by gamma.",
        ),
        Wrong(
            "only the fullest and the emptiest",
            "np.sign(share - counts)",
            "((counts == counts.min()) * 1.0 - (counts == counts.max()))",
            "Every expert has its thermostat, not the two at the ends alone.",
        ),
        Wrong(
            "a step up where the share is met",
            "np.sign(share - counts)",
            "np.where(counts > share, -1, 1)",
            "Who has exactly the mean stays: the sign of 0 is 0.",
        ),
        Wrong(
            "a step down where the share is met",
            "np.sign(share - counts)",
            "np.where(counts < share, 1, -1)",
            "Who has exactly the mean stays: the sign of 0 is 0.",
        ),
        Wrong(
            "the mean over those that were visited",
            "share = counts.mean()",
            "share = counts[counts > 0].mean()",
            "Idle experts are part of the mean: N K visits over all E experts.",
        ),
        Wrong(
            "the median for the mean",
            "share = counts.mean()",
            "share = np.median(counts)",
            "The share is the mean over all E. A few full experts pull it up, and then "
            "more than half rise.",
        ),
        Wrong(
            "the share rounded",
            "share = counts.mean()",
            "share = round(counts.mean())",
            "The mean need not be a whole number. Rounded, it may be met by experts "
            "that are above it or below.",
        ),
        Wrong(
            "one visit a token",
            "share = counts.mean()",
            "share = len(experts) / len(b)",
            "A token visits K experts, so the mean is N K / E.",
        ),
        Wrong(
            "first choices alone",
            "np.bincount(experts.ravel(),",
            "np.bincount(experts[:, 0],",
            "An expert that is second or eighth has the token as well.",
        ),
        Wrong(
            "scaled instead of moved",
            "b + gamma * np.sign(share - counts)",
            "b * (1 + gamma * np.sign(share - counts))",
            "The step is added. A bias of 0, and all begin there, could not be scaled "
            "away from it.",
        ),
        Wrong(
            "the step without what was there",
            "return b + gamma",
            "return gamma",
            "The biases remember: each step is added to the old one.",
        ),
        Wrong(
            "the mean of the step subtracted",
            "b + gamma * np.sign(share - counts)",
            "b + gamma * (np.sign(share - counts) - np.sign(share - counts).mean())",
            "torchtitan does, and nobody is chosen differently for it; but the report "
            "says that each bias moves by gamma.",
        ),
        Wrong(
            "MaxVio without the 1 subtracted",
            "counts.max() / share - 1",
            "counts.max() / share",
            "At perfect balance MaxVio is 0: by how much the fullest exceeds its "
            "share.",
        ),
        Wrong(
            "the worst of both sides",
            "counts.max() / share - 1",
            "np.abs(counts / share - 1).max()",
            "Nobody waits for an expert that has little to do. MaxVio looks at the "
            "fullest only.",
        ),
        Wrong(
            "MaxVio as a number of tokens",
            "counts.max() / share - 1",
            "counts.max() - share",
            "It is relative to the share, so that batches of all sizes compare.",
        ),
    ),
    right=(
        "def update_bias(b, experts, gamma):\n"
        "    E = len(b)\n"
        "    c = (experts[..., None] == np.arange(E)).sum((0, 1))\n"
        "    mean = experts.size / E\n"
        "    new = b.copy()\n"
        "    new[c > mean] -= gamma\n"
        "    new[c < mean] += gamma\n"
        "    return new, (c.max() - mean) / mean\n",
        "def update_bias(b, experts, gamma):\n"
        "    load = [0] * len(b)\n"
        "    for row in experts:\n"
        "        for i in row:\n"
        "            load[i] += 1\n"
        "    mean = sum(load) / len(load)\n"
        "    step = [(x < mean) - (x > mean) for x in load]\n"
        "    new = (b + gamma * np.array(step)).astype(np.float32)\n"
        "    return [new, np.float32(max(load) / mean - 1)]\n",
    ),
)

CHECKS = [BALANCE, UPDATE]
