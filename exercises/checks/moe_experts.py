"""Chapter 3, the way back through the experts."""

from grader.spec import Case, Check, Wrong

from checks.draws import normal
from checks.moe_mix import idle, pairs


def stack(
    N: int, D: int, width: int, E: int, K: int, seed: int, among: int | None = None
) -> Case:
    """A stack of experts, and what arrives at their answer."""
    dy, u = normal(N, D, seed=seed), normal(N, D, seed=seed + 1)
    experts, gates = pairs(N, E, K, seed + 2, among)
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
        Wrong(
            "first choices alone",
            "np.nonzero(experts == i)",
            "np.nonzero(experts[:, :1] == i)",
            "An expert that is second or eighth has the token as well, and learns "
            "from it.",
        ),
        Wrong(
            "the gate a second time",
            "swiglu_backward(do @",
            "swiglu_backward(gates[t, k][:, None] * do @",
            "The gate is in do already, once for all that stands in front of it.",
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

CHECKS = [EXPERTS_BACKWARD]
