"""Chapter 3, balance: the loss of each sequence."""

import numpy as np
from grader.spec import Case, Check, Wrong

from checks.draws import normal


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
        Wrong(
            "shares of the K best",
            "    shares = s / total",
            "    total = np.sum(s * visits, axis=-1, keepdims=True)\n"
            "    shares = s * visits / total",
            "So the gates are shared out. P is an expert's part in the sum of all "
            "E affinities, and those that were not chosen have one.",
            (("(f - mean) / total", "visits * (f - mean) / total"),),
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

CHECKS = [BALANCE]
