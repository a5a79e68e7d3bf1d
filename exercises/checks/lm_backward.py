"""Chapter 1, backwards: RMSNorm, softmax, attention."""

import numpy as np
from grader.spec import Case, Check, Wrong

from checks.draws import normal, weights


def attention(
    B: int, H: int, T: int, S: int, d: int, d_v: int, scale: float, seed: int
) -> Case:
    """One case of multi-query attention."""
    do, q = normal(B, H, T, d_v, seed=seed), normal(B, H, T, d, seed=seed + 10)
    k, v = normal(B, S, d, seed=seed + 20), normal(B, S, d_v, seed=seed + 30)
    P = weights(B, H, T, S, seed=seed + 40)
    label = f"B={B}, {H} heads, {T} queries, {S} keys, d={d}, d_v={d_v}"
    return Case(label, (do, q, k, v, P, scale))


RMSNORM = Check(
    "lm.6",
    returns=("dx", "dg"),
    cases=lambda: [
        Case(
            "one row of three",
            (
                np.array([[[1.0, 0.0, -1.0]]]),
                np.array([[[2.0, 1.0, 2.0]]]),
                np.array([1.0, 2.0, 0.5]),
                1e-6,
            ),
        ),
        Case(
            "two sequences of three",
            (
                normal(2, 3, 4, seed=1),
                normal(2, 3, 4, seed=2, scale=3.0),
                normal(4, seed=3),
                1e-6,
            ),
        ),
        Case(
            "a row as small as eps",
            (
                normal(1, 2, 5, seed=4),
                normal(1, 2, 5, seed=5, scale=1e-3),
                normal(5, seed=6),
                1e-6,
            ),
        ),
        Case(
            "a large eps",
            (
                normal(3, 1, 2, seed=7),
                normal(3, 1, 2, seed=8),
                np.array([-1.0, 3.0]),
                0.5,
            ),
        ),
    ],
    hints=(
        "Nudge x in `y = g * x * r`. The product rule gives two terms: x moves with "
        "r held, and r moves with x held. And r moves because the mean of the "
        "squares does.",
        "With r of shape (B, T, 1) and `dz = g * dy`: the second term is one number "
        "a row, the mean of `dz * x`, times `x * r**3`, with a minus. dg has shape "
        "(D,): sum over both other axes.",
        "`dx = r * dz - x * r**3 * np.mean(dz * x, axis=-1, keepdims=True)` and `dg "
        "= np.sum(dy * x * r, axis=(0, 1))`.",
    ),
    wrong=(
        Wrong(
            "the second term forgotten",
            " - x * r**3 * np.mean(dz * x, axis=-1, keepdims=True)",
            "",
            "x also moves r, for the whole row. Without that term the gradient keeps "
            "a part along x, which cannot change the loss.",
        ),
        Wrong(
            "the gain left out of the second term",
            "np.mean(dz * x,",
            "np.mean(dy * x,",
            "What arrives at the normalised row has passed the gain: dz = g * dy in "
            "both terms.",
        ),
        Wrong(
            "a sum where the mean belongs",
            "np.mean(dz * x,",
            "np.sum(dz * x,",
            "r holds the mean of x squared, so its derivative carries a 1/D.",
        ),
        Wrong(
            "r squared instead of cubed",
            "r**3",
            "r**2",
            "The derivative of u^(-1/2) is -1/2 u^(-3/2), and u^(-1/2) is r: the "
            "power is three.",
        ),
        Wrong(
            "eps added outside the root",
            "(np.mean(x * x, axis=-1, keepdims=True) + eps) ** -0.5",
            "1 / (np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + eps)",
            "eps stands under the root, beside the mean square.",
        ),
        Wrong(
            "the gain's gradient without r",
            "np.sum(dy * x * r,",
            "np.sum(dy * x,",
            "y = g * (x r): what g multiplies is the normalised row x r, not x.",
        ),
    ),
    right=(
        "def rmsnorm_backward(dy, x, g, eps):\n"
        "    n = x / np.sqrt((x ** 2).mean(-1, keepdims=True) + eps)\n"
        "    r = 1 / np.sqrt((x ** 2).mean(-1, keepdims=True) + eps)\n"
        "    dn = dy * g\n"
        "    dx = (dn - n * (dn * n).sum(-1, keepdims=True) / x.shape[-1]) * r\n"
        "    return dx, np.einsum('btd,btd->d', dy, n)\n",
        "def rmsnorm_backward(dy, x, g, eps):\n"
        "    dx, dg = np.zeros(x.shape, np.float32), np.zeros(len(g), np.float32)\n"
        "    for i in np.ndindex(x.shape[:2]):\n"
        "        r = (x[i] @ x[i] / len(g) + eps) ** -0.5\n"
        "        J = r * np.eye(len(g)) - r ** 3 / len(g) * np.outer(x[i], x[i])\n"
        "        dx[i] = J @ (g * dy[i])\n"
        "        dg += dy[i] * x[i] * r\n"
        "    return [dx, dg]\n",
    ),
)

SOFTMAX_BACKWARD = Check(
    "lm.7",
    returns=("dS",),
    cases=lambda: [
        Case(
            "one row of three",
            (np.array([[1.0, 0.0, -2.0]]), np.array([[0.5, 0.3, 0.2]])),
        ),
        Case("two axes in front", (normal(2, 3, 4, seed=1), weights(2, 3, 4, seed=2))),
        Case(
            "a row that is sure",
            (np.array([[3.0, -1.0]]), np.array([[1.0, 0.0]])),
        ),
        Case("dP far from zero", (normal(3, 5, seed=3) + 100, weights(3, 5, seed=4))),
    ],
    hints=(
        "The logarithm of P_j is S_j minus the logarithm of a sum. So a nudge of the "
        "scores moves P_j by P_j times (its own nudge minus the weighted mean of all "
        "nudges).",
        "The weighted mean of dP over a row has shape (..., 1): `np.sum(P * dP, "
        "axis=-1, keepdims=True)`.",
        "`P * (dP - mean)`, with that mean.",
    ),
    wrong=(
        Wrong(
            "only the diagonal of the Jacobian",
            "P * (dP - np.sum(P * dP, axis=-1, keepdims=True))",
            "P * (1 - P) * dP",
            "P_j moves with every score of its row, not only with its own: the terms "
            "-P_i P_j are missing.",
        ),
        Wrong(
            "the plain mean instead of the weighted one",
            "np.sum(P * dP, axis=-1, keepdims=True)",
            "np.mean(dP, axis=-1, keepdims=True)",
            "The average that is subtracted weighs each dP by its probability.",
        ),
        Wrong(
            "nothing subtracted",
            "(dP - np.sum(P * dP, axis=-1, keepdims=True))",
            "dP",
            "A constant added to all of dP must change nothing, for a row of P "
            "always sums to one. Yours moves with it.",
        ),
        Wrong(
            "the factor P in front forgotten",
            "P * (dP - np",
            "(dP - np",
            "A score that is hardly listened to has hardly any influence: its "
            "gradient carries its own P.",
        ),
    ),
    right=(
        "def softmax_backward(dP, P):\n"
        "    a = P * dP\n"
        "    return a - P * a.sum(-1)[..., None]\n",
        "def softmax_backward(dP, P):\n"
        "    J = P[..., None] * np.eye(P.shape[-1]) - P[..., None] * P[..., None, :]\n"
        "    return np.einsum('...ij,...j->...i', J, dP)\n",
    ),
)

ATTENTION = Check(
    "lm.8",
    returns=("dq", "dk", "dv"),
    cases=lambda: [
        attention(B=1, H=2, T=2, S=2, d=2, d_v=1, scale=0.5, seed=0),
        attention(B=2, H=3, T=2, S=5, d=4, d_v=3, scale=0.5, seed=1),
        attention(B=1, H=1, T=4, S=4, d=2, d_v=5, scale=-1.5, seed=2),
        attention(B=2, H=2, T=1, S=3, d=3, d_v=2, scale=3**-0.5, seed=3),
    ],
    hints=(
        "Walk back: o is the product of P and v, so it has two gradients, dP and dv. "
        "dP goes through the softmax, times the scale, and meets a second product.",
        "`np.einsum` spells the sums: dv is `'bhts,bhtv->bsv'` of P and do, summed "
        "over h and t, because one v serves all heads and all queries. `dS = scale * "
        "softmax_backward(dP, P)`.",
        "`dP = np.einsum('bhtv,bsv->bhts', do, v)`; dq is `'bhts,bsd->bhtd'` of dS "
        "and k; dk is `'bhts,bhtd->bsd'` of dS and q.",
    ),
    wrong=(
        Wrong(
            "the scale forgotten",
            "scale * softmax_backward(dP, P)",
            "softmax_backward(dP, P)",
            "The scores were scale * q k, so the gradient of q k is scale times that "
            "of the scores.",
        ),
        Wrong(
            "the softmax skipped",
            "softmax_backward(dP, P)",
            "dP",
            "dP is the gradient of the weights. The scores are on the other side of "
            "the softmax.",
        ),
        Wrong(
            "dk taken from one head",
            'dk = np.einsum("bhts,bhtd->bsd", dS, q)',
            "dk = dS[:, 0].swapaxes(1, 2) @ q[:, 0]",
            "One key serves all heads, so its gradient is the sum over them. (MLA "
            "has such a key, and this is its most common bug.)",
        ),
        Wrong(
            "dk averaged over the heads",
            'dk = np.einsum("bhts,bhtd->bsd", dS, q)',
            'dk = np.einsum("bhts,bhtd->bsd", dS, q) / q.shape[1]',
            "What is shared, sums: the heads' gradients add up, nothing divides them.",
        ),
        Wrong(
            "dv averaged over the heads",
            'dv = np.einsum("bhts,bhtv->bsv", P, do)',
            'dv = np.einsum("bhts,bhtv->bsv", P, do) / q.shape[1]',
            "What is shared, sums: one v serves all heads, and their gradients add up.",
        ),
        Wrong(
            "the scale used twice",
            'dq = np.einsum("bhts,bsd->bhtd", dS, k)',
            'dq = scale * np.einsum("bhts,bsd->bhtd", dS, k)',
            "dS carries the scale already.",
        ),
    ),
    right=(
        "def attention_backward(do, q, k, v, P, scale):\n"
        "    k, v = k[:, None], v[:, None]\n"
        "    dS = softmax_backward(do @ v.swapaxes(2, 3), P)\n"
        "    dv = (P.swapaxes(2, 3) @ do).sum(1)\n"
        "    dk = (dS.swapaxes(2, 3) @ (q * scale)).sum(1)\n"
        "    return dS @ k * scale, dk, dv\n",
        "def attention_backward(do, q, k, v, P, scale):\n"
        "    B, H, T, S = P.shape\n"
        "    rows = lambda x: x.reshape(B, H * T, -1)\n"
        "    o = P @ v[:, None]\n"
        "    dP = do @ v[:, None].swapaxes(2, 3)\n"
        "    dS = scale * P * (dP - (do * o).sum(-1, keepdims=True))\n"
        "    dk = rows(dS).swapaxes(1, 2) @ rows(q)\n"
        "    dv = rows(P).swapaxes(1, 2) @ rows(do)\n"
        "    return dS @ k[:, None], dk, dv\n",
    ),
)

CHECKS = [RMSNORM, SOFTMAX_BACKWARD, ATTENTION]
