"""Chapter 2, the module: the shifts, and its entrance."""

import numpy as np
from grader.spec import Case, Check, Wrong

from checks.draws import normal, rng


def sequence(B: int, T: int, D: int, k: int, seed: int) -> Case:
    """States of depth k - 1 and the ids of a batch."""
    ids = rng(seed).integers(0, 50, (B, T + 1))
    label = f"batch of {B}, {T} positions, depth {k}"
    return Case(label, (normal(B, T - k + 1, D, seed=seed + 10), ids, k))


SHIFTED = Check(
    "mtp.1",
    returns=("states", "tokens", "targets"),
    cases=lambda: [
        Case(
            "four positions, depth 1",
            (
                np.array([[[0.1], [0.2], [0.3], [0.4]]]),
                np.array([[10, 20, 30, 40, 50]]),
                1,
            ),
        ),
        sequence(B=2, T=7, D=3, k=3, seed=1),
        sequence(B=3, T=5, D=2, k=4, seed=2),
        sequence(B=1, T=6, D=1, k=2, seed=3),
        sequence(B=2, T=2, D=4, k=1, seed=4),
    ],
    hints=(
        "Write down one sequence of five tokens and, below it, who reads what at depth "
        "1. Which state is left over, the first or the last?",
        "All three have T - k positions. In Python's counting, row i of the answer has "
        "state i, token i + k and target i + k + 1, with i from 0.",
        "The states are `h[:, :-1]`, the tokens `ids[:, k:-1]`. The targets begin one "
        "later and go to the end.",
    ),
    wrong=(
        Wrong(
            "the target is the token that was given",
            "ids[:, k + 1 :]",
            "ids[:, k:-1]",
            "Depth k has been told t_(i+k). It is asked for the next one, t_(i+k+1): "
            "one place further than it may look.",
        ),
        Wrong(
            "the trunk's target at every depth",
            "ids[:, k + 1 :]",
            "ids[:, 1:-k]",
            "t_(i+1) is what the trunk is asked for at i. Each depth is asked for one "
            "place more: t_(i+k+1).",
        ),
        Wrong(
            "the token beside the state",
            "ids[:, k:-1]",
            "ids[:, : -k - 1]",
            "t_i is what the state has read already. The module is told something new, "
            "t_(i+k).",
        ),
        Wrong(
            "the first state dropped instead of the last",
            "h[:, :-1]",
            "h[:, 1:]",
            "State i goes with token i + k, so the states begin at the front. The last "
            "one has no target, and is the one that falls away.",
        ),
        Wrong(
            "k states dropped",
            "h[:, :-1]",
            "h[:, :-k]",
            "h is what depth k - 1 has left: k - 1 positions are gone already, and one "
            "more goes.",
        ),
        Wrong(
            "tokens and targets exchanged",
            "ids[:, k:-1], ids[:, k + 1 :]",
            "ids[:, k + 1 :], ids[:, k:-1]",
            "A module that reads t_(i+k+1) has been told what it is to guess.",
        ),
        Wrong(
            "depth 1 at every depth",
            "ids[:, k:-1], ids[:, k + 1 :]",
            "ids[:, 1:-1], ids[:, 2:]",
            "Depth k looks k places ahead of its state, and loses k positions.",
        ),
        Wrong(
            "rolled round, the beginning put at the end",
            "h[:, :-1], ids[:, k:-1], ids[:, k + 1 :]",
            "h, np.roll(ids, -k, 1)[:, : h.shape[1]], "
            "np.roll(ids, -k - 1, 1)[:, : h.shape[1]]",
            "A roll puts the first tokens behind the last, and the last positions are "
            "asked for them. Cut those positions off.",
        ),
    ),
    right=(
        "def shifted(h, ids, k):\n"
        "    n = ids.shape[1] - 1 - k\n"
        "    at = np.arange(n)\n"
        "    return h[:, :n], ids[:, at + k], ids[:, at + k + 1]\n",
        "def shifted(h, ids, k):\n"
        "    T = ids.shape[1] - 1\n"
        "    states, tokens, targets = [], [], []\n"
        "    for i in range(1, T - k + 1):\n"
        "        states.append(h[:, i - 1])\n"
        "        tokens.append(ids[:, i + k - 1])\n"
        "        targets.append(ids[:, i + k])\n"
        "    return np.stack(states, 1), np.stack(tokens, 1), np.stack(targets, 1)\n",
    ),
)


def pair(B: int, T: int, D: int, eps: float, scale: float, seed: int) -> tuple:
    """h, e, both gains, W and eps; the embedding's numbers are of another size."""
    h, e = normal(B, T, D, seed=seed), normal(B, T, D, seed=seed + 1, scale=scale)
    gains = normal(D, seed=seed + 2), normal(D, seed=seed + 3)
    return h, e, *gains, normal(D, 2 * D, seed=seed + 4), eps


ENTRANCE = Check(
    "mtp.2",
    returns=("h_prime",),
    cases=lambda: [
        Case(
            "one position, two numbers",
            (
                np.array([[[1.0, 2.0]]]),
                np.array([[[0.1, -0.3]]]),
                np.array([1.0, 3.0]),
                np.array([1.0, 0.5]),
                np.array([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]]),
                1e-6,
            ),
        ),
        Case("two sequences of three", pair(2, 3, 4, 1e-6, 0.02, seed=10)),
        Case("embeddings as small as eps", pair(1, 4, 5, 1e-6, 1e-3, seed=20)),
        Case("a large eps", pair(3, 1, 2, 0.5, 2.0, seed=30)),
    ],
    hints=(
        "A trained state and a fresh embedding may differ in size by a hundred. Each "
        "must be brought to its own size before they meet.",
        "`np.concatenate([..., ...], axis=-1)` of two (B, T, D) is (B, T, 2*D). The "
        "embedding's half stands first. `W` is (D, 2*D): its transpose goes to the "
        "right of the product.",
        "With `norm(x, g)` as `g * x * (np.mean(x * x, axis=-1, keepdims=True) + eps) "
        "** -0.5`: join `norm(e, g_e)` and `norm(h, g_h)`, then `joined @ W.T`.",
    ),
    wrong=(
        Wrong(
            "the state first, as in the report",
            "[norm(e, g_e), norm(h, g_h)]",
            "[norm(h, g_h), norm(e, g_e)]",
            "So equation (21) has it. In the released weights the first D columns of W "
            "act on the embedding.",
        ),
        Wrong(
            "the two gains exchanged",
            "[norm(e, g_e), norm(h, g_h)]",
            "[norm(e, g_h), norm(h, g_e)]",
            "g_e belongs to the embedding and g_h to the state.",
        ),
        Wrong(
            "one norm over both",
            "np.concatenate([norm(e, g_e), norm(h, g_h)], axis=-1)",
            "norm(np.concatenate([e, h], axis=-1), np.concatenate([g_e, g_h]))",
            "One mean square for the pair: the larger of the two drowns the other. "
            "Normalise each by its own, then join.",
        ),
        Wrong(
            "the state not normalised",
            "norm(h, g_h)]",
            "h]",
            "That the trunk's final norm has been there does not help: hnorm is a norm "
            "of the module's own, with another gain.",
        ),
        Wrong(
            "the embedding not normalised",
            "[norm(e, g_e)",
            "[e",
            "Embeddings are small beside states. Without enorm the module hardly hears "
            "the token.",
        ),
        Wrong(
            "the gains left out",
            "return g * x",
            "return x",
            "Each norm has a gain of its own, which multiplies the normalised numbers.",
        ),
        Wrong(
            "the mean subtracted",
            "return g * x * (np.mean(x * x, axis=-1, keepdims=True) + eps) ** -0.5",
            "x = x - np.mean(x, axis=-1, keepdims=True)\n"
            "        return g * x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)",
            "That is LayerNorm. RMSNorm divides by the root of the mean square, and "
            "subtracts nothing.",
        ),
        Wrong(
            "eps added outside the root",
            "(np.mean(x * x, axis=-1, keepdims=True) + eps) ** -0.5",
            "1 / (np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + eps)",
            "eps stands under the root, beside the mean square.",
        ),
        Wrong(
            "normalised over time",
            "axis=-1, keepdims=True",
            "axis=1, keepdims=True",
            "The mean square runs over the D numbers of one position, the last axis.",
        ),
    ),
    right=(
        "def entrance(h, e, g_h, g_e, W, eps):\n"
        "    D = len(g_h)\n"
        "    u = e / np.sqrt(np.square(e).mean(-1) + eps)[..., None] * g_e\n"
        "    v = h / np.sqrt(np.square(h).mean(-1) + eps)[..., None] * g_h\n"
        "    return u @ W[:, :D].T + np.einsum('btj,dj->btd', v, W[:, D:])\n",
        "def entrance(h, e, g_h, g_e, W, eps):\n"
        "    out = np.zeros(h.shape, np.float32)\n"
        "    for b, t in np.ndindex(h.shape[:2]):\n"
        "        x, y = e[b, t], h[b, t]\n"
        "        x = g_e * x / (x @ x / len(x) + eps) ** 0.5\n"
        "        y = g_h * y / (y @ y / len(y) + eps) ** 0.5\n"
        "        out[b, t] = W @ np.hstack((x, y))\n"
        "    return out\n",
    ),
)

CHECKS = [SHIFTED, ENTRANCE]
