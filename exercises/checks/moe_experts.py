"""Chapter 3, the experts: asked once each, and what they learn."""

from collections.abc import Callable

import numpy as np
from grader.compare import ByName
from grader.spec import Case, Check, Wrong

from checks.draws import normal, rng


class Experts:
    """E networks of one layer, and how often each was called with how many rows."""

    def __init__(self, E: int, D: int, seed: int) -> None:
        self.A, self.B = normal(E, D + 1, D, seed=seed), normal(E, D, D + 1, seed=seed)
        self.calls, self.rows = np.zeros(E, int), np.zeros(E, int)

    def __call__(self, i: int, x: np.ndarray) -> np.ndarray:
        """Expert i's answers: x (n, D) -> (n, D). Raises ValueError."""
        E, D, _ = self.B.shape
        if np.ndim(i) or np.asarray(i).dtype.kind not in "iu" or not 0 <= i < E:
            raise ValueError(f"ffn({i!r}, x): there are experts 0 to {E - 1}")
        if np.ndim(x) != 2 or np.shape(x)[1] != D:
            raise ValueError(
                f"ffn({i}, x) takes rows, (n, {D}), not an array of shape {np.shape(x)}"
            )
        self.calls[i] += 1
        self.rows[i] += len(x)
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
    N: int, D: int, E: int, K: int, seed: int, among: int | None = None
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
    experts, gates = pairs(N, D, E, K, seed, among)
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
            "three tokens, two of four experts each",
            (
                np.array([[1.0, -1.0], [0.5, 2.0], [-2.0, 0.0]]),
                np.array([[2, 0], [0, 3], [2, 3]]),
                np.array([[1.0, 0.5], [1.2, 0.3], [0.9, 0.6]]),
                Experts(4, 2, seed=0),
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

# --- the way back ------------------------------------------------------------------


def stack(
    N: int, D: int, width: int, E: int, K: int, seed: int, among: int | None = None
) -> Case:
    """A stack of experts, and what arrives at their answer."""
    dy, u = normal(N, D, seed=seed), normal(N, D, seed=seed + 1)
    experts, gates = pairs(N, D, E, K, seed + 2, among)
    weights = [normal(E, width, D, seed=seed + n, scale=0.8) for n in (3, 4)]
    weights.append(normal(E, D, width, seed=seed + 5, scale=0.8))
    label = f"{N} tokens, D={D}, I={width}, {K} of {E} experts"
    label += idle(E, among)
    return Case(label, (dy, u, experts, gates, *weights))


EXPERTS_BACKWARD = Check(
    "moe.5",
    returns=("du", "dgates", "dW_gate", "dW_up", "dW_down"),
    exact_zeros=True,
    cases=lambda: [
        stack(N=2, D=2, width=1, E=3, K=2, seed=100, among=2),
        stack(N=6, D=4, width=3, E=5, K=3, seed=200),
        stack(N=5, D=2, width=6, E=7, K=1, seed=300),
        stack(N=1, D=3, width=2, E=4, K=2, seed=400),
        stack(N=9, D=3, width=4, E=6, K=2, seed=500, among=3),
        stack(N=4, D=5, width=2, E=3, K=3, seed=600),
    ],
    hints=(
        "Go through the experts as on the way there. For expert i collect its tokens, "
        "compute its answer again, and write down what each of the five arrays gets "
        "from it.",
        "`t, k = np.nonzero(experts == i)` are its n tokens and the rank at which each "
        "has it; `gates[t, k]` (n,) are their gates. `do = gates[t, k][:, None] * "
        "dy[t]` (n, D) is what arrives at its answer. A linear layer `y = x @ W.T` has "
        "`dx = dy @ W` and `dW = dy.T @ x`.",
        "`dgates[t, k]` is the sum over D of `dy[t]` times the answer, `h @ "
        "W_down[i].T`. `dW_down[i] = do.T @ h`, `da, db = swiglu_backward(do @ "
        "W_down[i], a, b)`, `dW_gate[i] = da.T @ x`, `dW_up[i] = db.T @ x`, and `du[t] "
        "+= da @ W_gate[i] + db @ W_up[i]`.",
    ),
    wrong=(
        Wrong(
            "the expert hears dy at full strength",
            "do = gates[t, k][:, None] * dy_i",
            "do = dy_i",
            "Its answer counted as much as its gate, and so does what it hears.",
        ),
        Wrong(
            "the gate in its own gradient",
            "np.sum(dy_i * (h",
            "np.sum(gates[t, k][:, None] * dy_i * (h",
            "y is linear in a gate: its gradient is dy times the answer, and the gate "
            "itself is not in it.",
        ),
        Wrong(
            "the last expert's message alone",
            "du[t] += da",
            "du[t] = da",
            "A token was read by K experts. Their gradients add; an assignment keeps "
            "the last.",
        ),
        Wrong(
            "the message of the last rank alone",
            "du[t] += da @ W_gate[i] + db @ W_up[i]",
            "last = (k == gates.shape[1] - 1)[:, None]\n"
            "        du[t] += last * (da @ W_gate[i] + db @ W_up[i])",
            "`du[tokens] += ...` adds once where a token occurs K times in the list. "
            "Add expert by expert, or use `np.add.at`.",
        ),
        Wrong(
            "each expert learns from its last token alone",
            "dW_down[i] = do.T @ h",
            "dW_down[i] = do[-1:].T @ h[-1:]",
            "`dW[experts] += ...` adds once where an expert occurs several times in "
            "the list. A product over its rows, or `np.add.at`, adds all.",
            (("= da.T @ x, db.T @ x", "= da[-1:].T @ x[-1:], db[-1:].T @ x[-1:]"),),
        ),
        Wrong(
            "the gate's half of the way back to u",
            "da @ W_gate[i] + db @ W_up[i]",
            "da @ W_gate[i]",
            "The input was read twice, by W_gate and by W_up. Two gradients add.",
        ),
        Wrong(
            "the other half of the way back to u",
            "da @ W_gate[i] + db @ W_up[i]",
            "db @ W_up[i]",
            "The input was read twice, by W_gate and by W_up. Two gradients add.",
        ),
        Wrong(
            "W_down learns without its gates",
            "dW_down[i] = do.T @ h",
            "dW_down[i] = dy_i.T @ h",
            "The gate stands behind W_down: what arrives there is do, dy times the "
            "gate.",
        ),
        Wrong(
            "W_gate and W_up learn without the gates",
            "swiglu_backward(do @ W_down[i]",
            "swiglu_backward(dy_i @ W_down[i]",
            "What goes back through W_down is do, dy times the gate.",
        ),
        Wrong(
            "W_down learns from half of its input",
            "dW_down[i] = do.T @ h",
            "dW_down[i] = do.T @ (a / (1 + np.exp(-a)))",
            "W_down was multiplied by the whole product, silu(a) times b.",
        ),
        Wrong(
            "the mean over an expert's tokens",
            "dW_gate[i], dW_up[i] = da.T @ x, db.T @ x",
            "dW_gate[i], dW_up[i] = da.T @ x, db.T @ x\n"
            "        for dW in (dW_gate, dW_up, dW_down):\n"
            "            dW[i] /= max(len(t), 1)",
            "Every token of the expert adds its part. Where the loss is a mean, dy "
            "holds that already.",
        ),
        Wrong(
            "the message divided by K",
            "return du, dgates",
            "return du / gates.shape[1], dgates",
            "What K experts read hears from K experts, and nothing divides: the gates "
            "have weighed them.",
        ),
        Wrong(
            "the gates of other ranks",
            "dgates[t, k] = np.sum(",
            "dgates[t, np.argsort(np.argsort(experts))[t, k]] = np.sum(",
            "The k-th gate of a token belongs to expert experts[t, k], in whatever "
            "order they were visited.",
        ),
        Wrong(
            "all tokens for every expert",
            "x, dy_i = u[t], dy[t]",
            "own = np.zeros((len(u), 1))\n"
            "        own[t] = 1\n"
            "        x, dy_i = u[t], (dy * own.mean())[t]",
            "An expert hears of its own tokens alone, each with its own dy.",
        ),
        Wrong(
            "W_gate and W_up exchanged",
            "dW_gate[i], dW_up[i] = da",
            "dW_up[i], dW_gate[i] = da",
            "a came from W_gate and b from W_up; silu is on a.",
        ),
        Wrong(
            "the router's mean subtracted here",
            "return du, dgates",
            "dgates -= np.mean(dgates, axis=1, keepdims=True)\n    return du, dgates",
            "That gates are shares is the router's affair. A gate hears the product "
            "of dy and its answer.",
        ),
    ),
    right=(
        "def experts_backward(dy, u, experts, gates, W_gate, W_up, W_down):\n"
        "    G, U, V = W_gate[experts], W_up[experts], W_down[experts]\n"
        "    a, b = (np.einsum('nd,nkid->nki', u, W) for W in (G, U))\n"
        "    s = 1 / (1 + np.exp(-a))\n"
        "    h = a * s * b\n"
        "    dgates = np.einsum('nd,nkdi,nki->nk', dy, V, h)\n"
        "    do = gates[:, :, None] * dy[:, None]\n"
        "    dh = np.einsum('nkd,nkdi->nki', do, V)\n"
        "    da, db = dh * b * s * (1 + a * (1 - s)), dh * a * s\n"
        "    du = np.einsum('nki,nkid->nd', da, G) + np.einsum('nki,nkid->nd', db, U)\n"
        "    grads = [np.zeros_like(W) for W in (W_gate, W_up, W_down)]\n"
        "    np.add.at(grads[0], experts, np.einsum('nki,nd->nkid', da, u))\n"
        "    np.add.at(grads[1], experts, np.einsum('nki,nd->nkid', db, u))\n"
        "    np.add.at(grads[2], experts, np.einsum('nkd,nki->nkdi', do, h))\n"
        "    return du, dgates, *grads\n",
        "def experts_backward(dy, u, experts, gates, W_gate, W_up, W_down):\n"
        "    f = np.float32\n"
        "    du, dgates = np.zeros(u.shape, f), np.zeros(gates.shape, f)\n"
        "    out = [np.zeros(W.shape, f) for W in (W_gate, W_up, W_down)]\n"
        "    for n, k in np.ndindex(experts.shape):\n"
        "        i, g = experts[n, k], gates[n, k]\n"
        "        a, b = W_gate[i] @ u[n], W_up[i] @ u[n]\n"
        "        h = a / (1 + np.exp(-a)) * b\n"
        "        dgates[n, k] = dy[n] @ W_down[i] @ h\n"
        "        out[2][i] += g * np.outer(dy[n], h)\n"
        "        da, db = swiglu_backward(g * dy[n] @ W_down[i], a, b)\n"
        "        out[0][i] += np.outer(da, u[n])\n"
        "        out[1][i] += np.outer(db, u[n])\n"
        "        du[n] += W_gate[i].T @ da + W_up[i].T @ db\n"
        "    return [du, dgates, *out]\n",
    ),
)

CHECKS = [MIX, EXPERTS_BACKWARD]
