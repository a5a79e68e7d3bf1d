"""Chapter 2, the module: the shifts, its entrance, and the entrance backwards."""

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
        sequence(B=2, T=6, D=3, k=2, seed=1),
        sequence(B=3, T=5, D=2, k=4, seed=2),
        sequence(B=1, T=9, D=1, k=3, seed=3),
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

ENTRANCE_BACKWARD = Check(
    "mtp.3",
    returns=("dh", "de", "dg_h", "dg_e", "dW"),
    cases=lambda: [
        Case(
            "one position, two numbers",
            (
                np.array([[[1.0, -1.0]]]),
                np.array([[[1.0, 2.0]]]),
                np.array([[[0.1, -0.3]]]),
                np.array([1.0, 3.0]),
                np.array([1.0, 0.5]),
                np.array([[1.0, 2.0, 0.0, 1.0], [0.0, 0.0, 1.0, -1.0]]),
                1e-6,
            ),
        ),
        Case(
            "two sequences of three",
            (normal(2, 3, 4, seed=41), *pair(2, 3, 4, 1e-6, 0.2, seed=50)),
        ),
        Case(
            "embeddings as small as eps",
            (normal(1, 4, 5, seed=42), *pair(1, 4, 5, 1e-6, 1e-3, seed=60)),
        ),
        Case(
            "a large eps",
            (normal(3, 1, 2, seed=43), *pair(3, 1, 2, 0.5, 2.0, seed=70)),
        ),
    ],
    hints=(
        "Three steps back: the product with W, the pair, the two norms. A pair laid "
        "side by side comes apart where it was joined.",
        "`dh_prime @ W` is the gradient of the pair, (B, T, 2*D); `np.split(..., 2, "
        "axis=-1)` gives the embedding's half first. dW needs the pair as it went in, "
        "so compute it again.",
        "dW is `np.einsum('btd,btj->dj', dh_prime, joined)`. Then `de, dg_e = "
        "rmsnorm_backward(de_hat, e, g_e, eps)`, and the same for h.",
    ),
    wrong=(
        Wrong(
            "the trunk detached",
            "return dh, de,",
            "return np.zeros_like(h), de,",
            "A module that is cut off from the trunk is a drafter and no more. Its "
            "loss is to change the trunk: nothing is cut.",
        ),
        Wrong(
            "the embedding detached",
            "return dh, de,",
            "return dh, np.zeros_like(e),",
            "The embedding is looked up a second time here, so it hears a second time.",
        ),
        Wrong(
            "the halves exchanged",
            "de_hat, dh_hat = np",
            "dh_hat, de_hat = np",
            "The embedding stood first in the pair, so the first D columns are its.",
        ),
        Wrong(
            "dW from what was not normalised",
            "[norm(e, g_e), norm(h, g_h)]",
            "[e, h]",
            "W was multiplied by the normalised pair; its gradient is made of that.",
        ),
        Wrong(
            "the norms skipped on the way back",
            "return dh, de,",
            "return dh_hat, de_hat,",
            "That is what arrives behind the norms. In front of them stand h and e.",
        ),
        Wrong(
            "one gradient for both",
            "return dh, de,",
            "return dh + de, dh + de,",
            "State and embedding have a half of the pair each, and each its own "
            "gradient. They add up only where one array was used twice.",
        ),
    ),
    right=(
        "def entrance_backward(dh_prime, h, e, g_h, g_e, W, eps):\n"
        "    D = W.shape[0]\n"
        "    r = [(np.mean(x * x, -1, keepdims=True) + eps) ** -0.5 for x in (e, h)]\n"
        "    n = [x * s for x, s in zip((e, h), r)]\n"
        "    rows = dh_prime.reshape(-1, D)\n"
        "    both = np.concatenate([n[0] * g_e, n[1] * g_h], -1)\n"
        "    dW = rows.T @ both.reshape(-1, 2 * D)\n"
        "    out = []\n"
        "    for x, s, half, g in zip(n, r, (W[:, :D], W[:, D:]), (g_e, g_h)):\n"
        "        dy = dh_prime @ half\n"
        "        dx = s * (dy * g - x * (dy * g * x).mean(-1, keepdims=True))\n"
        "        out += [dx, (dy * x).sum((0, 1))]\n"
        "    return out[2], out[0], out[3], out[1], dW\n",
        "def entrance_backward(dh_prime, h, e, g_h, g_e, W, eps):\n"
        "    D = len(g_h)\n"
        "    dpair = np.einsum('btd,dj->btj', dh_prime, W)\n"
        "    dh, dg_h = rmsnorm_backward(dpair[..., D:], h, g_h, eps)\n"
        "    de, dg_e = rmsnorm_backward(dpair[..., :D], e, g_e, eps)\n"
        "    he = [g * x / np.sqrt((x ** 2).mean(-1)[..., None] + eps)\n"
        "          for g, x in ((g_e, e), (g_h, h))]\n"
        "    both = ([0, 1], [0, 1])\n"
        "    dW = np.hstack([np.tensordot(dh_prime, x, both) for x in he])\n"
        "    return [dh, de, dg_h, dg_e, dW]\n",
    ),
)

CHECKS = [SHIFTED, ENTRANCE, ENTRANCE_BACKWARD]
