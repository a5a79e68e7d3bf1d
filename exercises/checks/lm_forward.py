"""Chapter 1, forwards: softmax and the causal mask."""

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
        Case("numbers around 1000", (np.array([[1000.0, 1001.5, 999.0, 640.0]]),)),
        Case(
            "rows far apart, and entries of -inf",
            (
                np.array(
                    [[20000, 20001, 0], [-1000, -1002, -1001], [-np.inf, 0.5, 2]]
                    + [[1, -np.inf, -np.inf]]
                ),
            ),
        ),
        Case("a whole row far below 0", (np.array([[-4e9, -np.inf, -4e9]]),)),
        Case("numbers just below 709.78", (np.array([[709.5, 709.0, 709.25]]),)),
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
            "x.max(axis=-1, keepdims=True)",
            "x.max(axis=0, keepdims=True)",
            "The probabilities lie along the last axis: axis=-1, not axis=0.",
            (("e.sum(axis=-1, keepdims=True)", "e.sum(axis=0, keepdims=True)"),),
        ),
        Wrong(
            "the sum over the first axis",
            "e.sum(axis=-1, keepdims=True)",
            "e.sum(axis=0, keepdims=True)",
            "Divide each row by its own sum, that over the last axis: axis=-1.",
        ),
        Wrong(
            "the maximum over the first axis",
            "x.max(axis=-1, keepdims=True)",
            "x.max(axis=0, keepdims=True)",
            "One constant may be taken from a whole row. A maximum along axis 0 takes "
            "another from each of its numbers, and changes the probabilities.",
        ),
        Wrong(
            "one maximum for the whole array",
            "x.max(axis=-1, keepdims=True)",
            "x.max()",
            "A row far below the array's maximum underflows to 0/0. Subtract each "
            "row's own maximum.",
        ),
        Wrong(
            "a maximum that is never below 0",
            "x.max(axis=-1, keepdims=True)",
            "x.max(axis=-1, keepdims=True, initial=0)",
            "A row may lie far below 0 as a whole: then every exponential is 0, and "
            "0/0 is nan. Its maximum is its largest number, whatever the sign.",
        ),
        Wrong(
            "another number than the maximum subtracted",
            "x.max(axis=-1, keepdims=True)",
            "x.mean(axis=-1, keepdims=True)",
            "The mean or the minimum may lie far below the largest number, and one "
            "-inf makes it -inf. Only the maximum leaves no exponent above 0.",
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
        Case(
            "the future far above the past",
            (np.array([[[[0.0, 1500.0, 1.0], [0.0, 1.0, 2000.0], [1.0, 2.0, 3.0]]]]),),
        ),
        Case("one query, four positions", (normal(2, 1, 1, 4, seed=3),)),
        Case(
            "one query near 0, one near -100000",
            (
                np.array([[[[2, 0.5, 1, 3], [-2, 0, -1, 1], [0, 1, 2, 3]]]])
                - [[0], [1e5], [0]],
            ),
        ),
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
            "The future was counted in the sum before it was struck out, and what "
            "is left of a row is too small. Mask the scores, before the softmax.",
        ),
        Wrong(
            "renormalised after the mask",
            "    return softmax(np.where(future, -np.inf, scores))\n",
            "    P = softmax(scores) * ~future\n"
            "    return P / P.sum(axis=-1, keepdims=True)\n",
            "Where the future is far above the past, the softmax leaves 0 to the past, "
            "and 0/0 is nan. Mask the scores, before the softmax.",
        ),
        Wrong(
            "a finite number in place of -inf",
            "-np.inf, scores",
            "-10.6, scores",  # on the first case like -10, and like -100
            "A finite score is not silence: its weight is small, not 0, and among "
            "scores that are lower still it is the loudest. e^-inf is 0.",
        ),
        Wrong(
            "0 times infinity",
            "np.where(future, -np.inf, scores)",
            "scores + future * -np.inf",
            "0 * inf is nan, so the product spoils what the mask should leave alone. "
            "np.where chooses without multiplying.",
        ),
        Wrong(
            "no mask at all",
            "np.where(future, -np.inf, scores)",
            "scores",
            "Every query hears all S positions. Those later than its own must weigh "
            "nothing: a score of -inf.",
        ),
        Wrong(
            "one position of the future heard",
            "np.arange(S) > ",
            "np.arange(S) > 1 + ",
            "The next position is the answer to be guessed, and it is heard. With T "
            "queries of S positions, the diagonal is k = S - T, not S - T + 1.",
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

CHECKS = [SOFTMAX, CAUSAL]
