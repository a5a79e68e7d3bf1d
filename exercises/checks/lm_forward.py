"""Chapter 1, forwards: softmax, the causal mask, RoPE."""

import numpy as np
from grader.spec import Case, Check, Wrong

from checks.draws import normal

SOFTMAX = Check(
    "lm.1",
    returns=("p",),
    exact_zeros=True,
    cases=lambda: [
        Case("two rows of three", (np.array([[0.0, 1.0, 3.0], [2.0, -1.0, 0.5]]),)),
        Case("three axes, none alike", (normal(2, 3, 5, seed=1, scale=3.0),)),
        Case("numbers around 1000", (np.array([[1000.0, 1001.5, 999.0, 0.0]]),)),
        Case(
            "one row near 1000, one near -1000",
            (np.array([[1000.0, 1001.0], [-1000.0, -1002.0]]),),
        ),
        Case(
            "entries of -inf",
            (np.array([[-np.inf, 0.5, 2.0], [1.0, -np.inf, -np.inf]]),),
        ),
        Case("rows of one number", (np.array([[3.0], [-700.0]]),)),
    ],
    hints=(
        "Adding a constant to a whole row changes no probability: numerator and "
        "denominator get the same factor. Which constant makes every exponent "
        "harmless?",
        "Take the maximum of each row away first. `x.max(axis=-1, keepdims=True)` "
        "has shape (..., 1), so that it is subtracted from its own row.",
        "`e = np.exp(x - x.max(axis=-1, keepdims=True))`, then divide `e` by its sum "
        "over the same axis, with `keepdims` again.",
    ),
    wrong=(
        Wrong(
            "no maximum subtracted",
            "x - x.max(axis=-1, keepdims=True)",
            "x",
            "e^710 overflows float64. Subtract each row's maximum first: no "
            "probability changes, and the largest exponent is 0.",
        ),
        Wrong(
            "one sum for the whole array",
            "e.sum(axis=-1, keepdims=True)",
            "e.sum()",
            "Each row is a distribution of its own: sum over the last axis, with "
            "keepdims=True.",
        ),
        Wrong(
            "one maximum and one sum for the whole array",
            "    e = np.exp(x - x.max(axis=-1, keepdims=True))\n"
            "    e /= e.sum(axis=-1, keepdims=True)\n",
            "    e = np.exp(x - x.max())\n    e /= e.sum()\n",
            "Each row is a distribution of its own. Both the maximum and the sum run "
            "over the last axis, with keepdims=True.",
        ),
        Wrong(
            "softmax over the first axis",
            "e.sum(axis=-1, keepdims=True)",
            "e.sum(axis=0, keepdims=True)",
            "The probabilities lie along the last axis: axis=-1, not axis=0.",
        ),
        Wrong(
            "one maximum for the whole array",
            "x.max(axis=-1, keepdims=True)",
            "x.max()",
            "A row far below the array's maximum underflows to 0/0. Subtract each "
            "row's own maximum.",
        ),
    ),
    right=(
        "def softmax(x):\n"
        "    z = x - np.amax(x, axis=-1)[..., None]\n"
        "    return np.exp(z - np.log(np.exp(z).sum(-1))[..., None])\n",
        "def softmax(x):\n"
        "    x = x.astype(np.float32)\n"
        "    e = np.exp(x - x.max(-1, keepdims=True))\n"
        "    return e / e.sum(-1, keepdims=True)\n",
        "def softmax(x):\n"
        "    out = np.zeros(x.shape)\n"
        "    for i in np.ndindex(x.shape[:-1]):\n"
        "        e = [np.exp(n - max(x[i])) for n in x[i]]\n"
        "        out[i] = np.array(e) / sum(e)\n"
        "    return out\n",
    ),
)

CAUSAL = Check(
    "lm.2",
    returns=("P",),
    exact_zeros=True,
    cases=lambda: [
        Case(
            "three positions",
            (np.array([[[[1.0, 5.0, 5.0], [0.0, 2.0, 7.0], [1.0, 0.0, 3.0]]]]),),
        ),
        Case("two queries over five positions", (normal(2, 3, 2, 5, seed=1),)),
        Case("every score below -50", (normal(1, 2, 4, 4, seed=2) - 60,)),
        Case("one query, four positions", (normal(2, 1, 1, 4, seed=3),)),
        Case("scores around 1000", (1000 + normal(1, 2, 3, 3, seed=4, scale=2.0),)),
    ],
    hints=(
        "A score of 0 is not silence: `e**0` is 1. Which score is silence, exactly?",
        "Query t of the last T among S positions stands at position S - T + t. "
        "Compare `np.arange(S)` with `np.arange(S - T, S)[:, None]`: that is a (T, "
        "S) mask.",
        "`softmax(np.where(future, -np.inf, scores))`, with `future` true where the "
        "column's position is greater than the row's.",
    ),
    wrong=(
        Wrong(
            "the future masked with 0",
            "-np.inf, scores",
            "0.0, scores",
            "A score of 0 is e^0 = 1 before normalisation, and beats every negative "
            "score. Silence is a score of -inf.",
        ),
        Wrong(
            "masked after the softmax",
            "softmax(np.where(future, -np.inf, scores))",
            "softmax(scores) * ~future",
            "The rows no longer sum to one, and the future has weakened the past. "
            "Mask the scores, before the softmax.",
        ),
        Wrong(
            "the queries counted from 0",
            "np.arange(S - T, S)",
            "np.arange(T)",
            "The T queries are the last T of S positions: the first of them already "
            "sees the S - T positions before it.",
        ),
        Wrong(
            "a position that must not see itself",
            "np.arange(S) > ",
            "np.arange(S) >= ",
            "Position t hears all up to and including t; only later ones are the "
            "future.",
        ),
        Wrong(
            "the past masked instead of the future",
            "np.arange(S) > ",
            "np.arange(S) < ",
            "Rows are the positions that ask, columns those that are asked. Columns "
            "to the right of the diagonal are the future.",
        ),
    ),
    right=(
        "def causal_weights(scores):\n"
        "    T, S = scores.shape[-2:]\n"
        "    return softmax(scores + np.triu(np.full((T, S), -np.inf), S - T + 1))\n",
        "def causal_weights(scores):\n"
        "    T, S = scores.shape[-2:]\n"
        "    keep = np.tri(T, S, S - T, dtype=bool)\n"
        "    e = np.exp(scores - np.max(scores, -1, where=keep, initial=-np.inf,\n"
        "               keepdims=True), where=keep, out=np.zeros(scores.shape))\n"
        "    return e / e.sum(-1, keepdims=True)\n",
    ),
)

ROPE = Check(
    "lm.3",
    returns=("y",),
    cases=lambda: [
        Case(
            "two positions, one head of four",
            (
                np.array([[[[1.0, 0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0, 1.0]]]]),
                np.array([0, 1]),
            ),
        ),
        Case(
            "positions 7, 0, 9",
            (normal(2, 3, 2, 8, seed=1), np.array([7, 0, 9])),
        ),
        Case(
            "positions from 5000 on, base 500",
            (normal(1, 4, 3, 6, seed=2), np.arange(5000, 5004), 500.0),
        ),
        Case("negative positions", (normal(2, 2, 1, 4, seed=3), np.array([-3, -8]))),
        Case("one pair a head", (normal(1, 5, 2, 2, seed=4), np.arange(5) * 2)),
    ],
    hints=(
        "A pair is a point in the plane. Turning it by an angle is one line of "
        "school geometry, and it leaves the length of the pair as it was.",
        "`theta` has shape (d/2,). The angles need shape (T, 1, d/2), so that they "
        "meet `x[..., 0::2]` and `x[..., 1::2]`, both (B, T, H, d/2).",
        "New even numbers: `even * cos - odd * sin`. New odd ones: `even * sin + odd "
        "* cos`. Write them to `y[..., 0::2]` and `y[..., 1::2]` of a new array.",
    ),
    wrong=(
        Wrong(
            "turned the other way",
            "np.cos(angle), np.sin(angle)",
            "np.cos(angle), -np.sin(angle)",
            "The pair turns from its first coordinate towards its second: y_2j = "
            "x_2j cos - x_2j+1 sin.",
        ),
        Wrong(
            "positions taken to be 0, 1, 2, ...",
            "positions[:, None, None] * theta",
            "np.arange(len(positions))[:, None, None] * theta",
            "The positions are an argument because they need not begin at 0, nor "
            "follow each other.",
        ),
        Wrong(
            "the exponent without its 2",
            "-2.0 * np.arange(d // 2) / d",
            "-1.0 * np.arange(d // 2) / d",
            "theta_j is base^(-2j/d): the last pair is nearly as slow as 1/base.",
        ),
        Wrong(
            "pairs of halves",
            "    even, odd = x[..., 0::2], x[..., 1::2]  # (B, T, H, d/2)\n"
            "    y = np.empty_like(x)\n"
            "    y[..., 0::2] = even * cos - odd * sin\n"
            "    y[..., 1::2] = even * sin + odd * cos\n",
            "    even, odd = x[..., : d // 2], x[..., d // 2 :]\n"
            "    y = np.empty_like(x)\n"
            "    y[..., : d // 2] = even * cos - odd * sin\n"
            "    y[..., d // 2 :] = even * sin + odd * cos\n",
            "Coordinates j and j + d/2 are Llama's pairs in Hugging Face's code. "
            "DeepSeek's weights have neighbours: 2j and 2j+1.",
        ),
        Wrong(
            "right pairs, stored as halves",
            "    y[..., 0::2] = even * cos - odd * sin\n"
            "    y[..., 1::2] = even * sin + odd * cos\n",
            "    y[..., : d // 2] = even * cos - odd * sin\n"
            "    y[..., d // 2 :] = even * sin + odd * cos\n",
            "Each pair goes back to where it came from, 2j and 2j+1. (Scores would "
            "not notice; a cache shared with other code would.)",
        ),
    ),
    right=(
        "def rope(x, positions, base=10000.0):\n"
        "    theta = base ** -(np.arange(0, x.shape[-1], 2) / x.shape[-1])\n"
        "    turn = np.exp(1j * np.outer(positions, theta))[:, None]\n"
        "    z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn\n"
        "    return np.stack([z.real, z.imag], -1).reshape(x.shape)\n",
        "def rope(x, positions, base=10000.0):\n"
        "    d = x.shape[-1]\n"
        "    y = x.astype(float).copy()\n"
        "    for t, p in enumerate(positions):\n"
        "        for j in range(d // 2):\n"
        "            a = p / base ** (2 * j / d)\n"
        "            c, s = np.cos(a), np.sin(a)\n"
        "            pair = slice(2 * j, 2 * j + 2)\n"
        "            turn = np.array([[c, s], [-s, c]])\n"
        "            y[:, t, :, pair] = x[:, t, :, pair] @ turn\n"
        "    return y\n",
    ),
)

CHECKS = [SOFTMAX, CAUSAL, ROPE]
