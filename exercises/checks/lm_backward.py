"""Chapter 1, backwards: RMSNorm and softmax."""

import numpy as np
from grader.spec import Case, Check, Wrong

from checks.draws import normal, weights

RMSNORM = Check(
    "lm.6",
    returns=("dx", "dg"),
    cases=lambda: [
        Case(
            "two rows of three",
            (
                np.array([[[1.0, -2.0, 0.5], [3.0, 1.0, -1.0]]]),
                np.array([[[2.0, 1.0, -3.0], [0.5, -1.0, 4.0]]]),
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
                normal(1, 2, 5, seed=5, scale=1e-4),
                normal(5, seed=6),
                1e-8,
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
            "a plus between the two terms",
            "dx = r * dz - x",
            "dx = r * dz + x",
            "A larger x makes r smaller: the second term carries a minus.",
        ),
        Wrong(
            "half of the second term",
            " - x * r**3",
            " - 0.5 * x * r**3",
            "The 1/2 of the root meets the 2 of x squared: together they are 1.",
        ),
        Wrong(
            "the second term twice",
            " - x * r**3",
            " - 2 * x * r**3",
            "The 2 of x squared meets the 1/2 of the root: together they are 1.",
        ),
        Wrong(
            "the gain forgotten in dx",
            "dz = g * dy",
            "dz = dy",
            "What arrives at the normalised row has passed the gain: dz = g * dy, in "
            "both terms.",
        ),
        Wrong(
            "the gain pulled out in front",
            "r * dz - x * r**3 * np.mean(dz * x, axis=-1, keepdims=True)",
            "g * (r * dy - x * r**3 * np.mean(dy * x, axis=-1, keepdims=True))",
            "The mean mixes the entries of a row, each with a gain of its own: g is "
            "inside it, and not in front of the second term.",
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
            "sums in place of both means",
            "np.mean(x * x,",
            "np.sum(x * x,",
            "The M of RMS is a mean: r comes from the mean of the squares, and its "
            "derivative carries the same 1/D.",
            (("np.mean(dz * x,", "np.sum(dz * x,"),),
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
        Wrong(
            "the gain in its own gradient",
            "np.sum(dy * x * r,",
            "np.sum(dz * x * r,",
            "y is linear in g, so its derivative is x r, without g: dg is made from dy "
            "and not from dz.",
        ),
        Wrong(
            "the gain's gradient averaged",
            "np.sum(dy * x * r,",
            "np.mean(dy * x * r,",
            "What is shared, sums: all rows use one gain, and nothing divides their "
            "gradients.",
        ),
        Wrong(
            "the gain's gradient not summed",
            "np.sum(dy * x * r, axis=(0, 1))",
            "dy * x * r",
            "What is shared, sums: all B*T rows use one gain, so dg has shape (D,).",
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
            "the sum of dP without weights",
            "np.sum(P * dP, axis=-1, keepdims=True)",
            "np.sum(dP, axis=-1, keepdims=True)",
            "The average that is subtracted weighs each dP by its probability: the sum "
            "of P * dP.",
        ),
        Wrong(
            "a mean of P * dP where the sum belongs",
            "np.sum(P * dP, axis=-1, keepdims=True)",
            "np.mean(P * dP, axis=-1, keepdims=True)",
            "P already holds the weights, and they sum to one. Nothing is left to "
            "divide by.",
        ),
        Wrong(
            "one sum for the whole array",
            "np.sum(P * dP, axis=-1, keepdims=True)",
            "np.sum(P * dP)",
            "Each row is a softmax of its own: sum over the last axis, with "
            "keepdims=True.",
        ),
        Wrong(
            "the sum over the last axis but one",
            "np.sum(P * dP, axis=-1, keepdims=True)",
            "np.sum(P * dP, axis=-2, keepdims=True)",
            "The probabilities of one softmax lie along the last axis: axis=-1.",
        ),
        Wrong(
            "the second term without its P",
            "P * (dP - np.sum(P * dP, axis=-1, keepdims=True))",
            "P * dP - np.sum(P * dP, axis=-1, keepdims=True)",
            "P stands in front of both terms: P * (dP - sum).",
        ),
        Wrong(
            "the arguments exchanged",
            "P * (dP - np.sum(P * dP, axis=-1, keepdims=True))",
            "dP * (P - np.sum(P * dP, axis=-1, keepdims=True))",
            "The gradient dP comes first, the probabilities P second; the result "
            "carries P in front.",
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

CHECKS = [RMSNORM, SOFTMAX_BACKWARD]
