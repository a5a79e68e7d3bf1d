"""Chapter 5, a block: MLA, then a dense feed-forward or experts."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from grader.spec import Case, Check, Wrong

from checks.draws import normal

Widths = tuple[int, ...]


def config(
    N_h: int, dense: int, K: int = 1, n_group: int = 1, open_: int = 1, lam: float = 2.5
) -> SimpleNamespace:
    """What the answers ask of a config."""
    return SimpleNamespace(
        num_attention_heads=N_h,
        first_k_dense_replace=dense,
        num_experts_per_tok=K,
        n_group=n_group,
        topk_group=open_,
        routed_scaling_factor=lam,
    )


def parameters(N_h: int, widths: Widths, seed: int) -> dict[str, np.ndarray]:
    """A block's; widths are D, d_h, d_R, d_v, d_c, the queries', and I, E, I_e, J."""
    D, d_h, d_R, d_v, d_c, d_cq, wide, E, narrow, J = widths
    shapes = {
        "norm_1": (D,), "W_DQ": (d_cq, D), "g_Q": (d_cq,),
        "W_UQ": (N_h * (d_h + d_R), d_cq), "W_DKV": (d_c + d_R, D), "g_KV": (d_c,),
        "W_UKV": (N_h * (d_h + d_v), d_c), "W_O": (D, N_h * d_v), "norm_2": (D,),
        "F_gate": (wide, D), "F_up": (wide, D), "F_down": (D, wide),
        "W": (E, D), "b": (E,), "W_gate": (E, narrow, D), "W_up": (E, narrow, D),
        "W_down": (E, D, narrow), "S_gate": (J, D), "S_up": (J, D), "S_down": (D, J),
    }  # fmt: skip
    found = {
        name: normal(*shape, seed=100 * seed + number, scale=0.8)
        for number, (name, shape) in enumerate(shapes.items())
    }
    found["b"] -= 0.8
    return found


def one(
    B: int, T: int, layer: int, c: SimpleNamespace, widths: Widths, seed: int,
    *eps: float, scale: float = 1.0,
) -> Case:  # fmt: skip
    """A block at its place in the model, and a stream of some size."""
    p = parameters(c.num_attention_heads, widths, seed)
    x = normal(B, T, widths[0], seed=100 * seed + 50, scale=scale)
    label = (
        f"layer {layer}, {c.first_k_dense_replace} dense, B={B}, T={T}, D={widths[0]}, "
        f"{c.num_attention_heads} heads, {c.num_experts_per_tok} of {widths[7]} experts"
    )
    return Case(label, (p, x, layer, c, *eps))


def zero_is_a_number(function: Callable, *given: object) -> object:
    """The answer's results; a balance of 0 may be a whole number."""
    value = function(*given)
    if isinstance(value, tuple) and len(value) == 2 and type(value[1]) is int:
        return value[0], float(value[1])
    return value


SMALL = (2, 1, 2, 1, 2, 2, 3, 2, 2, 1)
MIDDLE = (4, 3, 2, 5, 3, 4, 5, 8, 2, 3)
OTHER = (5, 2, 4, 1, 6, 3, 2, 6, 3, 4)
ADD = 'x = x + o.reshape(B, T, -1) @ p["W_O"].T'

BLOCK = Check(
    "mini.1",
    returns=("x", "balance"),
    call=zero_is_a_number,
    cases=lambda: [
        one(1, 2, 0, config(1, 1), SMALL, 1),
        one(2, 3, 1, config(2, 1, 3, 4, 2), MIDDLE, 2, scale=3.0),
        one(2, 4, 2, config(3, 3, 2, 3, 2), OTHER, 3, 0.1),
        one(3, 3, 3, config(2, 2, 2, 3, 1, 1.5), OTHER, 4, 0.2, scale=0.3),
        one(2, 1, 0, config(2, 0, 1, 4, 3, 4.0), MIDDLE, 5),
    ],
    hints=(
        "Twice the same: normalise a copy of the stream, let a part read the copy, add "
        "what it says to the stream. Only the second part depends on the layer.",
        "`latents(u, W_DKV, g_KV, positions)` is what `naive_forward(q_C, q_R, "
        "kept, W_UKV, scale)` reads; its o is (B, T, N_h, d_v), and W_O wants the "
        "heads side by side. For `route` and `mix` make rows of u, (B*T, D); `balance` "
        "wants the affinities as (B, T, E).",
        "After `x = x + o.reshape(B, T, -1) @ p['W_O'].T` and `u = norm(x, "
        "p['norm_2'])`: a layer below `c.first_k_dense_replace` returns `x + swiglu(u, "
        "F_gate, F_up, F_down), 0.0`. Any other calls `route(rows, W, b, "
        "c.routed_scaling_factor, lambda choice: choose(choice, K, c.n_group, "
        "c.topk_group))`, `mix(rows, experts, gates, lambda i, r: swiglu(r, ...), E)`, "
        "adds the shared `swiglu`, and `balance(s.reshape(B, T, E), K, 1.0)[0]`.",
    ),
    wrong=(
        Wrong(
            "dense and experts exchanged",
            "layer < c.first",
            "layer >= c.first",
            "The first layers are the dense ones.",
        ),
        Wrong(
            "one dense layer too many",
            "layer < c.first",
            "layer <= c.first",
            "Layers count from 0: with first_k_dense_replace = 3 the dense ones are 0, "
            "1 and 2.",
        ),
        Wrong(
            "layer 0 dense, and no other",
            "layer < c.first_k_dense_replace",
            "layer == 0",
            "How many layers are dense is what c.first_k_dense_replace says; it may be "
            "none.",
        ),
        Wrong(
            "experts in every layer",
            "layer < c.first_k_dense_replace",
            "False",
            "Below first_k_dense_replace the feed-forward is dense, though p holds "
            "experts.",
        ),
        Wrong(
            "both norms missing",
            'u = norm(x, p["norm_1"])',
            "u = x",
            "Attention and feed-forward each read a normalised copy of the stream.",
            (('u = norm(x, p["norm_2"])', "u = x"),),
        ),
        Wrong(
            "no norm in front of attention",
            'u = norm(x, p["norm_1"])',
            "u = x",
            "Attention reads norm(x), with the gain norm_1.",
        ),
        Wrong(
            "no norm in front of the feed-forward",
            'u = norm(x, p["norm_2"])',
            "u = x",
            "The feed-forward reads norm(x), with the gain norm_2.",
        ),
        Wrong(
            "the two gains exchanged",
            'u = norm(x, p["norm_1"])',
            'u = norm(x, p["norm_2"])',
            "norm_1 stands in front of attention, norm_2 in front of the feed-forward.",
            (
                (
                    '.T\n\n    u = norm(x, p["norm_2"])',
                    '.T\n\n    u = norm(x, p["norm_1"])',
                ),
            ),
        ),
        Wrong(
            "the stream itself normalised",
            'u = norm(x, p["norm_1"])',
            'x = u = norm(x, p["norm_1"])',
            "The parts read a copy. What they say is added to the stream as it was.",
            (('u = norm(x, p["norm_2"])', 'x = u = norm(x, p["norm_2"])'),),
        ),
        Wrong(
            "norms behind the additions",
            'u = norm(x, p["norm_1"])',
            "u = x",
            "That is the transformer of 2017. Here the norm stands in front of each "
            "part, and the stream runs past it.",
            (
                (ADD, f'x = norm({ADD[4:]}, p["norm_1"])'),
                ('u = norm(x, p["norm_2"])', "u = x"),
                (
                    'return x + swiglu(u, p["F_gate"], p["F_up"], p["F_down"]), 0.0',
                    'return norm(x + swiglu(u, p["F_gate"], p["F_up"], p["F_down"]), '
                    'p["norm_2"]), 0.0',
                ),
                ("return x + y, load", 'return norm(x + y, p["norm_2"]), load'),
            ),
        ),
        Wrong(
            "the stream lost at attention",
            ADD,
            ADD.replace("x + ", ""),
            "What attention says is added to the stream: x + MLA(norm(x)).",
        ),
        Wrong(
            "the stream lost at the feed-forward",
            "return x + y, load",
            "return y, load",
            "What the feed-forward says is added to the stream: x + FFN(norm(x)).",
            (("return x + swiglu(", "return swiglu("),),
        ),
        Wrong(
            "the stream added twice",
            "return x + y, load",
            "return x_0 + x + y, load",
            "The stream behind attention holds x already: add to that, and once.",
            (
                ("return x + swiglu(", "return x_0 + x + swiglu("),
                (ADD, f"x_0, x = x, {ADD[4:]}"),
            ),
        ),
        Wrong(
            "attention and feed-forward side by side",
            ADD,
            f"x_0, x = x, {ADD[4:]}",
            "The feed-forward reads the stream to which attention has added already.",
            (('u = norm(x, p["norm_2"])', 'u = norm(x_0, p["norm_2"])'),),
        ),
        Wrong(
            "the shared expert left out",
            '    y = y + swiglu(u, p["S_gate"], p["S_up"], p["S_down"])\n',
            "",
            "A layer of experts is the shared expert plus the routed ones.",
        ),
        Wrong(
            "the gates sum to 1",
            "c.routed_scaling_factor, ours",
            "1.0, ours",
            "A token's gates sum to c.routed_scaling_factor: the `lam` of `route`.",
        ),
        Wrong(
            "the groups left out",
            "choose(choice, K, c.n_group, c.topk_group)",
            "choose(choice, K, 1, 1)",
            "Only experts of the best c.topk_group of c.n_group groups may be chosen.",
        ),
        Wrong(
            "the scale of the content alone",
            'p["W_UKV"], scale)',
            'p["W_UKV"], q_C.shape[-1] ** -0.5)',
            "A score sums d_h + d_R products, and has one scale: that of `queries`.",
        ),
        Wrong(
            "the latent's eps not its own",
            "positions)  #",
            "positions, eps)  #",
            "The norms of the latents keep 1e-6, the default of `latents`, whatever "
            "eps is.",
        ),
        Wrong(
            "the balance of the batch as one text",
            "balance(s.reshape(B, T, E), K, 1.0)",
            "balance(s[None], K, 1.0)",
            "f and P belong to one sequence: give `balance` the affinities as "
            "(B, T, E).",
        ),
        Wrong(
            "the balance of biased affinities",
            "balance(s.reshape(B, T, E), K, 1.0)",
            'balance((s + p["b"]).reshape(B, T, E), K, 1.0)',
            "The report's balance loss reads s, without bias.",
        ),
    ),
    right=(
        "def block(p, x, layer, c, eps=1e-6):\n"
        "    (B, T, D), H = x.shape, c.num_attention_heads\n"
        "    def norm(x, g, eps=eps):\n"
        "        return g * x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps)\n"
        "    def ffn(u, *W):\n"
        "        a = np.einsum('...d,id->...i', u, W[0])\n"
        "        h = a * np.einsum('...d,id->...i', u, W[1]) / (1 + np.exp(-a))\n"
        "        return np.einsum('...i,di->...d', h, W[2])\n"
        "    u, at, d_c = norm(x, p['norm_1']), np.arange(T), len(p['g_KV'])\n"
        "    d_R = len(p['W_DKV']) - d_c\n"
        "    q = norm(u @ p['W_DQ'].T, p['g_Q'], 1e-6) @ p['W_UQ'].T\n"
        "    q = q.reshape(B, T, H, -1)\n"
        "    d = q.shape[-1]\n"
        "    q_R = rope(q[..., d - d_R:], at)\n"
        "    kept = latents(u, p['W_DKV'], p['g_KV'], at)\n"
        "    c_KV, k_R = kept[..., :d_c], kept[..., d_c:]\n"
        "    W_UKV, heads = p['W_UKV'].reshape(H, -1, d_c), []\n"
        "    for h in range(H):\n"
        "        k = c_KV @ W_UKV[h, :d - d_R].T\n"
        "        S = q[:, :, h, :d - d_R] @ k.swapaxes(1, 2)\n"
        "        S = (S + q_R[:, :, h] @ k_R.swapaxes(1, 2)) / d ** 0.5\n"
        "        P = np.exp(S - S.max(-1, keepdims=True)) * np.tri(T)\n"
        "        P /= P.sum(-1, keepdims=True)\n"
        "        heads.append(P @ c_KV @ W_UKV[h, d - d_R:].T)\n"
        "    x = x + np.concatenate(heads, -1) @ p['W_O'].T\n"
        "    u = norm(x, p['norm_2'])\n"
        "    if not layer >= c.first_k_dense_replace:\n"
        "        return x + ffn(u, p['F_gate'], p['F_up'], p['F_down']), 0\n"
        "    K, lam = c.num_experts_per_tok, c.routed_scaling_factor\n"
        "    def few(choice):\n"
        "        return choose(choice, K, c.n_group, c.topk_group)\n"
        "    y, losses = ffn(u, p['S_gate'], p['S_up'], p['S_down']), []\n"
        "    for b in range(B):\n"
        "        e, g, s = route(u[b], p['W'], p['b'], lam, few)\n"
        "        for t in range(T):\n"
        "            for i, gate in zip(e[t], g[t]):\n"
        "                W = p['W_gate'][i], p['W_up'][i], p['W_down'][i]\n"
        "                y[b, t] += gate * ffn(u[b, t], *W)\n"
        "        losses.append(balance(s[None], K, 1)[0])\n"
        "    return x + y, sum(losses) / B\n",
    ),
)

CHECKS = [BLOCK]
