"""Chapter 1: rotary positions."""

import numpy as np
from grader.spec import Case, Check, Wrong

from checks.draws import normal

ROPE = Check(
    "lm.3",
    returns=("y",),
    atol=1e-4,  # a float32 angle near 500 is known to some 5e-5
    cases=lambda: [
        Case(
            "two positions, one head of four",
            (
                np.array([[[[1.0, 0.5, 2.0, -1.0]], [[1.0, 0.5, 2.0, -1.0]]]]),
                np.array([0, 1]),
            ),
        ),
        Case(
            "positions 300, 0, 400",
            (normal(2, 3, 2, 8, seed=1), np.array([300, 0, 400])),
        ),
        Case(
            "positions from 500 on, base 50",
            (normal(1, 4, 3, 6, seed=2), np.arange(500, 504), 50.0),
        ),
        Case("negative positions", (normal(2, 2, 1, 4, seed=3), np.array([-3, -8]))),
        Case(
            "one pair a head, positions up to 70000",
            (normal(1, 4, 2, 2, seed=4), np.array([2, 40_000, 6, 70_000])),
        ),
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
            "the 2 of the exponent counted twice",
            "-2.0 * np.arange(d // 2) / d",
            "-4.0 * np.arange(d // 2) / d",
            "The 2 of -2j/d stands for one thing only: multiply j by it, or count in "
            "steps of 2, or divide by d/2.",
        ),
        Wrong(
            "frequencies that grow",
            "-2.0 * np.arange(d // 2) / d",
            "2.0 * np.arange(d // 2) / d",
            "theta_j is base^(-2j/d), with a minus: the first pair turns by one "
            "radian a position, and each further one more slowly.",
        ),
        Wrong(
            "pairs counted from 1",
            "np.arange(d // 2)",
            "np.arange(1, d // 2 + 1)",
            "j begins at 0: theta_0 is base^0 = 1, one radian a position.",
        ),
        Wrong(
            "10000 whatever the base",
            "theta = base ** (",
            "theta = 10000.0 ** (",
            "base is an argument, and 10000 only its default.",
        ),
        Wrong(
            "positions counted from 1",
            "positions[:, None, None]",
            "(positions[:, None, None] + 1)",
            "Position 0 is not turned at all. Take the positions as they are handed "
            "in.",
        ),
        Wrong(
            "odd computed from the new even",
            "even * sin + odd * cos",
            "y[..., 0::2] * sin + odd * cos",
            "Both new coordinates come from both old ones. Keep the old pair until "
            "both are computed.",
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

CHECKS = [ROPE]
