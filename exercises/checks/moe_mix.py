"""Chapter 3, the experts: each is asked once."""

from collections.abc import Callable

import numpy as np
from grader.compare import ByName
from grader.spec import Case, Check, Wrong

from checks.draws import normal, rng


class Experts:
    """E networks of one layer, and how often each was called with how many rows.

    Without a seed, expert i answers 10^i x: one can see who was asked.
    """

    def __init__(self, E: int, D: int, seed: int | None = None) -> None:
        self.E, self.D, self.seen = E, D, seed is None
        self.A = normal(E, D + 1, D, seed=seed or 0)
        self.B = normal(E, D, D + 1, seed=seed or 0)
        self.calls, self.rows = np.zeros(E, int), np.zeros(E, int)

    def __call__(self, i: int, x: np.ndarray) -> np.ndarray:
        """Expert i's answers: x (n, D) -> (n, D). Raises ValueError."""
        E, D = self.E, self.D
        if np.ndim(i) or np.asarray(i).dtype.kind not in "iu" or not 0 <= i < E:
            raise ValueError(f"ffn({i!r}, x): there are experts 0 to {E - 1}")
        if np.ndim(x) != 2 or np.shape(x)[1] != D:
            raise ValueError(
                f"ffn({i}, x) takes rows, (n, {D}), not an array of shape {np.shape(x)}"
            )
        self.calls[i] += 1
        self.rows[i] += len(x)
        if self.seen:
            return 10.0 ** int(i) * np.asarray(x)
        return np.tanh(x @ self.A[i].T) @ self.B[i].T


def answer_and_calls(
    function: Callable, u: np.ndarray, experts: np.ndarray, gates: np.ndarray,
    ffn: Experts, E: int,
) -> object:  # fmt: skip
    """The answer, and what it took."""
    y = function(u, experts, gates, ffn, E)
    if y is ... or y is None:
        return y
    return ByName(y=y, calls=ffn.calls, rows=ffn.rows)


def pairs(
    N: int, E: int, K: int, seed: int, among: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Choices (N, K) among some experts, and gates of which none is like another."""
    among = among or E
    draws = rng(seed)
    names = draws.permutation(E)[:among]
    order = np.argsort(draws.random((N, among)), axis=-1)[:, :K]
    return names[order], draws.random((N, K)) + 0.1


def idle(E: int, among: int | None) -> str:
    """How many have nothing to do, for a label."""
    return "" if among is None else f", {E - among} of them idle"


def crowd(N: int, D: int, E: int, K: int, seed: int, among: int | None = None) -> Case:
    """Tokens that all choose among some of the experts."""
    experts, gates = pairs(N, E, K, seed, among)
    label = f"{N} tokens, D={D}, {K} of {E} experts"
    label += idle(E, among)
    ffn = Experts(E, D, seed + 1)
    return Case(label, (normal(N, D, seed=seed + 2), experts, gates, ffn, E))


MIX = Check(
    "moe.3",
    returns=("y", "calls", "rows"),
    call=answer_and_calls,
    cases=lambda: [
        Case(
            "three tokens, two of four experts; expert i answers 10^i x",
            (
                np.array([[1.0, -1.0], [5.0, 2.0], [-2.0, 0.0]]),
                np.array([[2, 0], [0, 3], [2, 3]]),
                np.array([[1.0, 0.5], [1.2, 0.3], [0.9, 0.6]]),
                Experts(4, 2),
                4,
            ),
        ),
        crowd(N=7, D=3, E=5, K=3, seed=10),
        crowd(N=12, D=4, E=9, K=2, seed=20, among=3),
        crowd(N=6, D=2, E=4, K=1, seed=30, among=1),
        crowd(N=1, D=5, E=8, K=4, seed=40),
        crowd(N=5, D=1, E=3, K=3, seed=50),
        crowd(N=40, D=3, E=6, K=2, seed=60, among=4),
    ],
    hints=(
        "Write down the pairs of three tokens, and sort them by expert. What do you "
        "need in order to know, of a pair in the sorted list, which token it was and "
        "where its answer belongs?",
        '`np.argsort(experts.ravel(), kind="stable")` lists the N * K pairs by expert; '
        "pair p belongs to token `p // K`. `np.bincount(experts.ravel(), minlength=E)` "
        "says how many each expert has.",
        "For each expert with pairs: `answers[pairs] = ffn(i, u[pairs // K])`, into an "
        "array (N * K, D). Reshaped to (N, K, D) it meets the gates: "
        "`np.einsum('nk,nkd->nd', gates, answers)`.",
    ),
    wrong=(
        Wrong(
            "the gates forgotten",
            'np.einsum("nk,nkd->nd", gates, answers.reshape(N, K, D))',
            "answers.reshape(N, K, D).sum(axis=1)",
            "Each answer counts as much as its gate says.",
        ),
        Wrong(
            "the gates made to sum to 1",
            '"nk,nkd->nd", gates,',
            '"nk,nkd->nd", gates / gates.sum(axis=1, keepdims=True),',
            "The gates come ready from the router. They sum to lam, and stay as they "
            "are.",
        ),
        Wrong(
            "the gates in front of the experts",
            "ffn(i, u[pairs // K])",
            "ffn(i, gates.ravel()[pairs][:, None] * u[pairs // K])",
            "An expert is no linear map: half of its input is not half of its answer. "
            "The gate weighs the answer.",
            (('"nk,nkd->nd", gates,', '"nk,nkd->nd", np.ones((N, K)),'),),
        ),
        Wrong(
            "the answers left in the order of the experts",
            "answers[pairs] = ffn(i, u[pairs // K])",
            "answers[sum(counts[:i]) : sum(counts[: i + 1])] = ffn(i, u[pairs // K])",
            "Sorted by expert, the answers are those of other tokens. Put each back "
            "where its pair was.",
        ),
        Wrong(
            "the gates in another order than the answers",
            '"nk,nkd->nd", gates,',
            '"nk,nkd->nd", gates.ravel()[np.argsort(order)].reshape(N, K),',
            "Sorted answers and gates as they came do not belong together. Sort both "
            "or neither.",
        ),
        Wrong(
            "the pairs taken apart the wrong way",
            "pairs // K",
            "pairs % N",
            "The pairs of a token are neighbours, K of them: pair p is token p // K's, "
            "and its choice of rank p % K.",
        ),
        Wrong(
            "a limit to an expert's tokens",
            "        if len(pairs):\n",
            "        pairs = pairs[: -(-N * K // E)]\n        if len(pairs):\n",
            "That expert is full, and the last tokens lose their answer: because of "
            "what others chose. Nothing is dropped here, however many come.",
            (("np.empty((", "np.zeros(("),),
        ),
        Wrong(
            "only the best expert",
            'np.einsum("nk,nkd->nd", gates, answers.reshape(N, K, D))',
            "gates[:, :1] * answers.reshape(N, K, D)[:, 0]",
            "A token has K experts, and all of their answers are added.",
        ),
        Wrong(
            "the last expert's answer alone",
            'return np.einsum("nk,nkd->nd", gates, answers.reshape(N, K, D))',
            "y = np.zeros(u.shape)\n"
            "    for p in order:\n"
            "        y[p // K] = gates.ravel()[p] * answers[p]\n"
            "    return y",
            "A token stands in several lists. Its answers add; an assignment keeps the "
            "last.",
        ),
        Wrong(
            "the mean of the answers",
            'np.einsum("nk,nkd->nd", gates, answers.reshape(N, K, D))',
            'np.einsum("nk,nkd->nd", gates, answers.reshape(N, K, D)) / K',
            "The gates are the weights already. Nothing else divides.",
        ),
        Wrong(
            "the stream added",
            'return np.einsum("nk',
            'return u + np.einsum("nk',
            "Equation (12) adds u, the stream; the block does that, with what was not "
            "normalised. Here, only the experts answer.",
        ),
        Wrong(
            "a call for each pair",
            "            answers[pairs] = ffn(i, u[pairs // K])\n",
            "            for p in pairs:\n"
            "                answers[p] = ffn(i, u[[p // K]])[0]\n",
            "The answer is right, and the weights of an expert are read once for each "
            "token. Hand in all of its rows at once.",
        ),
        Wrong(
            "experts asked by rank",
            "            answers[pairs] = ffn(i, u[pairs // K])\n",
            "            for k in range(K):\n"
            "                some = pairs[pairs % K == k]\n"
            "                if len(some):\n"
            "                    answers[some] = ffn(i, u[some // K])\n",
            "The answer is right, but an expert is asked up to K times. Whoever has it "
            "first and whoever has it second can be asked together.",
        ),
        Wrong(
            "idle experts asked",
            "        if len(pairs):\n    ",
            "    ",
            "The answer is right, but experts without a token are called with nothing. "
            "Leave them alone: their weights need not even be read.",
        ),
        Wrong(
            "every expert asked about every token",
            "            answers[pairs] = ffn(i, u[pairs // K])\n",
            "            answers[pairs] = ffn(i, u)[pairs // K]\n",
            "The answer is right at E / K times the price. An expert gets the rows "
            "of those that chose it.",
        ),
        Wrong(
            "every expert asked about every token, idle ones too",
            "        if len(pairs):\n"
            "            answers[pairs] = ffn(i, u[pairs // K])\n",
            "        answers[pairs] = ffn(i, u)[pairs // K]\n",
            "The answer is right at E / K times the price. An expert gets the "
            "rows of those that chose it, and without any it is left alone.",
        ),
    ),
    right=(
        "def mix(u, experts, gates, ffn, E):\n"
        "    y = np.zeros(u.shape)\n"
        "    for i in np.unique(experts):\n"
        "        t, k = np.where(experts == i)\n"
        "        y[t] += gates[t, k, None] * ffn(i, u[t])\n"
        "    return y\n",
        "def mix(u, experts, gates, ffn, E):\n"
        "    weights = np.zeros((len(u), E), np.float32)\n"
        "    np.put_along_axis(weights, experts, gates.astype(np.float32), 1)\n"
        "    y = np.zeros(u.shape, np.float32)\n"
        "    for i in reversed(range(E)):\n"
        "        mine = np.flatnonzero((experts == i).any(axis=1))[::-1]\n"
        "        if mine.size == 0:\n"
        "            continue\n"
        "        np.add.at(y, mine, weights[mine][:, [i]] * ffn(i, u[mine]))\n"
        "    return y\n",
        "def mix(u, experts, gates, ffn, E):\n"
        "    flat = experts.reshape(-1)\n"
        "    order = np.argsort(flat)\n"
        "    who = np.repeat(np.arange(len(u)), experts.shape[1])[order]\n"
        "    ends = np.searchsorted(flat[order], np.arange(E + 1))\n"
        "    out = [ffn(i, u[who[a:b]]) for i, (a, b) in\n"
        "           enumerate(zip(ends, ends[1:])) if b > a]\n"
        "    y = np.zeros_like(u)\n"
        "    np.add.at(y, who, gates.reshape(-1)[order][:, None] * np.vstack(out))\n"
        "    return y\n",
    ),
)

CHECKS = [MIX]
