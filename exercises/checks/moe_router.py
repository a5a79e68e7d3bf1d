"""Chapter 3, the router: affinities, choice and gates."""

from collections.abc import Callable, Sequence

import numpy as np
from grader.spec import Case, Check, Wrong

from checks.draws import normal
from checks.moe_groups import as_indices


def the_best(K: int, closed: Sequence[int] = ()) -> Callable[[np.ndarray], np.ndarray]:
    """The K best experts that are not closed; of equal numbers the first wins."""

    def choose(choice: np.ndarray) -> np.ndarray:
        if np.ndim(choice) != 2:
            raise ValueError(
                "choose(...) takes all tokens at once, (N, E), "
                f"not an array of shape {np.shape(choice)}"
            )
        choice = np.array(choice)
        choice[:, list(closed)] = -np.inf
        return np.argsort(-choice, axis=1, kind="stable")[:, :K]

    return choose


def tokens(
    N: int, D: int, E: int, K: int, lam: float, seed: int, level: float = 0.0,
    closed: Sequence[int] = (),
) -> Case:  # fmt: skip
    """Random tokens; ``level`` is added to every z."""
    u, W = normal(N, D, seed=seed), normal(E, D, seed=seed + 1, scale=0.8)
    u[:, 0], W[:, 0] = 1.0, W[:, 0] + level
    b = normal(E, seed=seed + 2, scale=0.3)
    label = f"{N} tokens, D={D}, {K} of {E} experts, lam={lam}"
    label += ", a group closed" * bool(closed)
    return Case(label, (u, W, b, lam, the_best(K, closed)))


ROUTE = Check(
    "moe.1",
    returns=("experts", "gates", "s"),
    call=as_indices,
    cases=lambda: [
        Case(
            "one token, two of three experts",
            (
                np.array([[1.0, -1.0]]),
                np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 1.0]]),
                np.array([-0.5, 0.1, 0.2]),
                2.5,
                the_best(2),
            ),
        ),
        tokens(N=5, D=4, E=7, K=3, lam=2.5, seed=10),
        tokens(N=4, D=3, E=5, K=1, lam=1.5, seed=20),
        tokens(N=3, D=6, E=4, K=4, lam=1.0, seed=30),
        tokens(N=6, D=2, E=9, K=2, lam=16.0, seed=40, level=-26.0),
        tokens(N=1, D=5, E=6, K=3, lam=2.5, seed=50, level=4.0),
        tokens(N=5, D=3, E=6, K=2, lam=2.5, seed=60, closed=(2, 3)),
    ],
    hints=(
        "Three lines, three kinds of numbers: the affinities of all, the indices of "
        "the chosen, the affinities of the chosen. The bias occurs in one of them.",
        "`s` is (N, E), from `u @ W.T`. `choose(s + b)` gives indices (N, K); "
        "`np.take_along_axis(s, experts, axis=1)` picks the affinities that belong "
        "to them, (N, K).",
        "With these as `chosen`, the gates are `lam * chosen / chosen.sum(axis=1, "
        "keepdims=True)`. Return `experts, gates, s`.",
    ),
    wrong=(
        Wrong(
            "gates from the biased scores",
            "np.take_along_axis(s, experts",
            "np.take_along_axis(s + b, experts",
            "The bias decides who is chosen, and nothing else. How much an answer "
            "counts is a matter of s alone.",
        ),
        Wrong(
            "the bias only below the fraction",
            "lam * chosen / chosen.sum(",
            "lam * chosen / np.take_along_axis(s + b, experts, axis=1).sum(",
            "The sum below the fraction is over the s of the chosen, without bias, so "
            "that the gates of a token sum to lam.",
        ),
        Wrong(
            "a softmax over the experts",
            "1 / (1 + np.exp(-u @ W.T))",
            "np.exp(u @ W.T)\n    s = s / s.sum(axis=1, keepdims=True)",
            "In a softmax the experts compete, and each row sums to 1. DeepSeek-V3 "
            "scores each expert by itself, with a sigmoid.",
        ),
        Wrong(
            "a softmax over the chosen",
            "gates = lam * chosen / chosen.sum(axis=1, keepdims=True)",
            "chosen = np.exp(np.take_along_axis(u @ W.T, experts, axis=1))\n"
            "    gates = lam * chosen / chosen.sum(axis=1, keepdims=True)",
            "A softmax takes exponentials of z. The gates are shares of the "
            "affinities, which have been through their sigmoid.",
        ),
        Wrong(
            "a softmax of the affinities",
            "gates = lam * chosen / chosen.sum(axis=1, keepdims=True)",
            "chosen = np.exp(chosen)\n"
            "    gates = lam * chosen / chosen.sum(axis=1, keepdims=True)",
            "The affinities are positive already: divide each by their sum, without "
            "another exponential.",
        ),
        Wrong(
            "the bias inside the sigmoid",
            "np.exp(-u @ W.T)",
            "np.exp(-u @ W.T - b)",
            "The bias is added to s, behind the sigmoid, and only for the choice. "
            "Within, it changes the gates too.",
            (("choose(s + b)", "choose(s)"),),
        ),
        Wrong(
            "chosen by z + b",
            "choose(s + b)",
            "choose(u @ W.T + b)",
            "The bias is held against numbers between 0 and 1: it is added to the "
            "affinity, not to what goes into the sigmoid.",
        ),
        Wrong(
            "chosen without the bias",
            "choose(s + b)",
            "choose(s)",
            "Then the bias does nothing at all. The choice is by s + b.",
        ),
        Wrong(
            "the K best, whatever `choose` says",
            "experts = choose(s + b)",
            "experts = np.argsort(-(s + b), axis=1)[:, : choose(s + b).shape[1]]",
            "`choose` knows which groups are closed. Its experts are the answer.",
        ),
        Wrong(
            "the bias subtracted",
            "choose(s + b)",
            "choose(s - b)",
            "An expert with a high bias is chosen more often: s + b.",
        ),
        Wrong(
            "shares of all experts",
            "chosen.sum(",
            "s.sum(",
            "The gates of a token sum to lam. Only the chosen ones share it.",
        ),
        Wrong(
            "not divided by the sum",
            "lam * chosen / chosen.sum(axis=1, keepdims=True)",
            "lam * chosen",
            "A gate is a share: each affinity is divided by the sum over the chosen, "
            "then multiplied by lam.",
        ),
        Wrong(
            "lam forgotten",
            "lam * chosen",
            "chosen",
            "The gates of a token sum to lam, 2.5 in DeepSeek-V3. That number stands "
            "only in its config file.",
        ),
        Wrong(
            "something added below the fraction",
            ".sum(axis=1, keepdims=True)",
            ".sum(axis=1, keepdims=True) + 1e-6\n    gates = lam * chosen / total",
            "Affinities of 1e-12 are good for shares. What is added to their sum must "
            "be far smaller than any of them, 1e-20 in transformers, or nothing.",
            (("gates = lam * chosen / chosen", "total = chosen"),),
        ),
        Wrong(
            "the biased scores handed on",
            "return experts, gates, s",
            "return experts, gates, s + b",
            "Returned are the affinities, s. The balance loss reads them, and the "
            "report counts there without bias.",
        ),
        Wrong(
            "the bias left in the affinities",
            "experts = choose(s + b)",
            "s = s + b\n    experts = choose(s)",
            "`s += b` changes s for good, and then gates and affinities are "
            "biased too. Add b where the choice is made, and nowhere else.",
        ),
        Wrong(
            "2.5 by heart",
            "lam * chosen",
            "2.5 * chosen",
            "lam is an argument. 2.5 is only what DeepSeek-V3 hands in.",
        ),
    ),
    right=(
        "def route(u, W, b, lam, choose):\n"
        "    z = np.einsum('nd,ed->ne', u, W)\n"
        "    s = 0.5 * (1 + np.tanh(z / 2)) if z.min() > -10 else np.where(\n"
        "        z > 0, 1 / (1 + np.exp(-z)), np.exp(z) / (1 + np.exp(z)))\n"
        "    experts = choose(b + s)\n"
        "    gates = np.zeros(experts.shape)\n"
        "    for n, row in enumerate(experts):\n"
        "        gates[n] = lam * s[n, row] / (sum(s[n, row]) + 1e-20)\n"
        "    return experts, gates, s\n",
        "def route(u, W, b, lam, choose):\n"
        "    u, W, b = (np.asarray(a, np.float32) for a in (u, W, b))\n"
        "    s = 1 / (1 + np.exp(-(u @ W.T)))\n"
        "    experts = choose(s + b)\n"
        "    rows = np.arange(len(u))[:, None]\n"
        "    gates = s[rows, experts]\n"
        "    gates = gates / gates.sum(1)[:, None] * lam\n"
        "    return [experts, gates, s]\n",
    ),
)

CHECKS = [ROUTE]
