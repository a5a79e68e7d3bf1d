"""Chapter 4, the naive form backwards, and what both backward passes are asked."""

import numpy as np
from grader.spec import Case, Check, Wrong

from checks.draws import normal


def arriving(
    B: int, T: int, S: int, N_h: int, widths: tuple[int, ...], alpha: float, seed: int
) -> Case:
    """Gradients at the heads' outputs; widths are d_h, d_R, d_v, d_c."""
    d_h, d_R, d_v, d_c = widths
    do = normal(B, T, N_h, d_v, seed=seed)
    q_C = normal(B, T, N_h, d_h, seed=seed + 3)
    q_R = normal(B, T, N_h, d_R, seed=seed + 4)
    kept = normal(B, S, d_c + d_R, seed=seed + 5)
    W_UKV = normal(N_h * (d_h + d_v), d_c, seed=seed + 6)
    label = (
        f"B={B}, {T} queries, {S} kept, {N_h} heads, d_h={d_h}, d_R={d_R}, d_v={d_v}, "
        f"d_c={d_c}"
    )
    P = forward_weights(q_C, q_R, kept, W_UKV, alpha)
    return Case(label, (do, q_C, q_R, kept, W_UKV, P, alpha))


def forward_weights(
    q_C: np.ndarray, q_R: np.ndarray, kept: np.ndarray, W_UKV: np.ndarray, alpha: float
) -> np.ndarray:
    """P of the forward pass, for whoever computes it again: (B, N_h, T, S)."""
    (T, N_h, d_h), (S, d_c) = q_C.shape[1:], (kept.shape[1], W_UKV.shape[1])
    W_UK = W_UKV.reshape(N_h, -1, d_c)[:, :d_h]
    scores = np.einsum("bthd,hdc,bsc->bhts", q_C, W_UK, kept[..., :d_c])
    scores += np.einsum("bthr,bsr->bhts", q_R, kept[..., d_c:])
    e = np.exp(alpha * scores) * np.tri(T, S, S - T)
    return e / e.sum(axis=-1, keepdims=True)


def by_hand() -> Case:
    """The tiny one."""
    do = np.array([[[[1.0], [-1.0]]]])
    q_C, q_R = np.array([[[[1.0], [2.0]]]]), np.array([[[[1.0, 0.0], [0.5, 1.0]]]])
    kept = np.array([[[1.0, 1.0, 0.0], [2.0, 0.0, 1.0], [-1.0, 0.5, 0.5]]])
    W_UKV = np.array([[1.0], [2.0], [-1.0], [3.0]])
    P = forward_weights(q_C, q_R, kept, W_UKV, 0.5)
    label = "one query, three tokens kept, two heads of 1 + 2 numbers"
    return Case(label, (do, q_C, q_R, kept, W_UKV, P, 0.5))


def cases_of_both() -> list[Case]:
    """What both backward passes are asked."""
    return [
        by_hand(),
        arriving(B=2, T=3, S=3, N_h=2, widths=(3, 2, 4, 5), alpha=0.6, seed=10),
        arriving(B=1, T=2, S=5, N_h=3, widths=(2, 4, 1, 3), alpha=-0.8, seed=20),
        arriving(B=2, T=1, S=4, N_h=1, widths=(3, 2, 3, 2), alpha=0.1, seed=30),
        arriving(B=3, T=2, S=3, N_h=3, widths=(4, 4, 4, 4), alpha=0.35, seed=40),
        arriving(B=1, T=4, S=6, N_h=2, widths=(1, 6, 2, 3), alpha=0.7, seed=50),
    ]


RETURNS = ("dq_C", "dq_R", "dkept", "dW_UKV")

NAIVE_BACKWARD = Check(
    "mla.6",
    returns=RETURNS,
    cases=cases_of_both,
    hints=(
        "First as if keys and values were given: dv, dP, dS, and from dS the gradients "
        "of both parts of queries and keys. Then one more step, from keys and values "
        "to c and W_UKV. Who used k_R?",
        "`dS = alpha * softmax_backward(dP, P)`. dk_R is `'bhts,bthr->bsr'` of dS and "
        "q_R: h is gone, so it sums over heads. dk_C is `'bhts,bthd->bshd'`: each head "
        "has its own.",
        "Join dk_C and dv on the last axis and reshape to (B, S, N_h*(d_h+d_v)). Then "
        "dc is `dkv @ W_UKV`, dW_UKV is `np.einsum('bso,bsc->oc', dkv, c)`, and dkept "
        "is dc with dk_R behind it.",
    ),
    wrong=(
        Wrong(
            "the shared key hears from one head",
            'np.einsum("bhts,bthr->bsr", dS, q_R)',
            'np.einsum("bts,btr->bsr", dS[:, 0], q_R[:, :, 0])',
            "All heads used this key, so its gradient is the sum over them. (The most "
            "common bug of MLA.)",
        ),
        Wrong(
            "the shared key hears from the last head",
            'np.einsum("bhts,bthr->bsr", dS, q_R)',
            'np.einsum("bts,btr->bsr", dS[:, -1], q_R[:, :, -1])',
            "In a loop over heads the key's gradient grows by +=; with = each head "
            "replaces the one before.",
        ),
        Wrong(
            "the shared key's gradient averaged over heads",
            'np.einsum("bhts,bthr->bsr", dS, q_R)',
            'np.einsum("bhts,bthr->bsr", dS, q_R) / N_h',
            "What is shared, sums: the heads' gradients add up, nothing divides them.",
        ),
        Wrong(
            "the shared key detached",
            'np.einsum("bhts,bthr->bsr", dS, q_R)',
            "np.zeros_like(k_R)",
            "The key of the positions comes from x by a matrix that learns too.",
        ),
        Wrong(
            "the scale forgotten",
            "alpha * softmax_backward(dP, P)",
            "softmax_backward(dP, P)",
            "The scores were alpha times the products, so the products' gradient is "
            "alpha times that of the scores.",
        ),
        Wrong(
            "the scale twice",
            "alpha * softmax_backward(dP, P)",
            "alpha**2 * softmax_backward(dP, P)",
            "The scores carry alpha once: put it into dS, and nowhere else.",
        ),
        Wrong(
            "a scale of its own",
            "alpha * softmax_backward(dP, P)",
            "(d_h + q_R.shape[-1]) ** -0.5 * softmax_backward(dP, P)",
            "alpha is handed in. Under YaRN it is more than 1 / sqrt(d_h + d_R).",
        ),
        Wrong(
            "the scale forgotten at the positions",
            'dq_R = np.einsum("bhts,bsr->bthr", dS, k_R)',
            'dq_R = np.einsum("bhts,bsr->bthr", dS / alpha, k_R)',
            "alpha multiplied the whole score, so the rotated parts get it too.",
            (('bthr->bsr", dS, q_R', 'bthr->bsr", dS / alpha, q_R'),),
        ),
        Wrong(
            "the softmax skipped",
            "alpha * softmax_backward(dP, P)",
            "alpha * dP",
            "dP is the gradient of the weights. The scores are on the other side of "
            "the softmax.",
        ),
        Wrong(
            "half of the softmax's gradient",
            "softmax_backward(dP, P)",
            "P * dP",
            "The weights of a row sum to one: one grows at the cost of the others. Use "
            "`softmax_backward`.",
        ),
        Wrong(
            "the arguments of softmax_backward exchanged",
            "softmax_backward(dP, P)",
            "softmax_backward(P, dP)",
            "softmax_backward takes the gradient first: dP, then P.",
        ),
        Wrong(
            "the latent hears from the keys alone",
            "dkv @ W_UKV, dk_R]",
            'np.einsum("bshd,hdc->bsc", dk_C, W_UKV.reshape(N_h, -1, c.shape[-1])'
            "[:, :d_h]), dk_R]",
            "c made keys and values. Both send a gradient back, and they add up.",
        ),
        Wrong(
            "the latent hears from the values alone",
            "dkv @ W_UKV, dk_R]",
            'np.einsum("bshv,hvc->bsc", dv, W_UKV.reshape(N_h, -1, c.shape[-1])'
            "[:, d_h:]), dk_R]",
            "c made keys and values. Both send a gradient back, and they add up.",
        ),
        Wrong(
            "values in front of keys",
            "[dk_C, dv], axis=-1)",
            "[dv, dk_C], axis=-1)",
            "Of each head's rows, the first d_h made the key and the rest the value. "
            "Join the gradients in the same order.",
        ),
        Wrong(
            "all keys first, then all values",
            "dkv = np.concatenate([dk_C, dv], axis=-1).reshape(B, S, -1)",
            "dkv = np.concatenate([dk_C.reshape(B, S, -1), dv.reshape(B, S, -1)], -1)",
            "The rows of W_UKV lie head by head: join a head's two gradients first, "
            "then the heads.",
        ),
        Wrong(
            "the key's gradient in front of the latent's",
            "[dkv @ W_UKV, dk_R]",
            "[dk_R, dkv @ W_UKV]",
            "dkept lies as kept does: d_c numbers of the latent, then the key.",
        ),
        Wrong(
            "dW_UKV averaged over positions",
            'np.einsum("bso,bsc->oc", dkv, c)',
            'np.einsum("bso,bsc->oc", dkv, c) / (B * S)',
            "Every position used W_UKV, and their gradients add up. A mean is taken "
            "once, in the loss.",
        ),
        Wrong(
            "dv from the scores' gradient",
            'dv = np.einsum("bhts,bthv->bshv", P, do)',
            'dP = np.einsum("bthv,bshv->bhts", do, v)\n'
            "    dv = np.einsum(\n"
            '        "bhts,bthv->bshv", alpha * softmax_backward(dP, P), do)',
            "o is P v: the values' gradient is made of the weights themselves, P.",
        ),
        Wrong(
            "the scale on the queries' side alone",
            '"bhts,bthd->bshd", dS,',
            '"bhts,bthd->bshd", dS / alpha,',
            "alpha multiplied the product of query and key: the gradients of both "
            "have it.",
            (('"bhts,bthr->bsr", dS,', '"bhts,bthr->bsr", dS / alpha,'),),
        ),
    ),
    right=(
        "def naive_backward(do, q_C, q_R, kept, W_UKV, P, alpha):\n"
        "    (B, T, N_h, d_h), d_c = q_C.shape, W_UKV.shape[1]\n"
        "    W, c = W_UKV.reshape(N_h, -1, d_c), kept[..., :d_c]\n"
        "    k_R = kept[..., d_c:]\n"
        "    dq_C, dq_R = np.zeros(q_C.shape), np.zeros(q_R.shape)\n"
        "    dW, dkept = np.zeros(W.shape), np.zeros(kept.shape)\n"
        "    for b, h in np.ndindex(B, N_h):\n"
        "        k, v = c[b] @ W[h, :d_h].T, c[b] @ W[h, d_h:].T\n"
        "        w, out = P[b, h], do[b, :, h]\n"
        "        dw = out @ v.T\n"
        "        ds = w * (dw - (out * (w @ v)).sum(-1, keepdims=True)) * alpha\n"
        "        dq_C[b, :, h], dq_R[b, :, h] = ds @ k, ds @ k_R[b]\n"
        "        dkv = np.hstack([ds.T @ q_C[b, :, h], w.T @ out])\n"
        "        dkept[b, :, :d_c] += dkv @ W[h]\n"
        "        dkept[b, :, d_c:] += ds.T @ q_R[b, :, h]\n"
        "        dW[h] += dkv.T @ c[b]\n"
        "    return dq_C, dq_R, dkept, dW.reshape(-1, d_c)\n",
        "def naive_backward(do, q_C, q_R, kept, W_UKV, P, alpha):\n"
        "    do, q_C, q_R, kept, W_UKV, P = (\n"
        "        x.astype(np.float32) for x in (do, q_C, q_R, kept, W_UKV, P))\n"
        "    (n, d_c), (B, T, N_h, d_h) = W_UKV.shape, q_C.shape\n"
        "    S = kept.shape[1]\n"
        "    by_head = lambda x: x.transpose(0, 2, 1, 3)\n"
        "    kv = by_head((kept[..., :d_c] @ W_UKV.T).reshape(B, S, N_h, n // N_h))\n"
        "    k_R = np.repeat(kept[:, None, :, d_c:], N_h, 1)\n"
        "    k = np.concatenate([kv[..., :d_h], k_R], -1)\n"
        "    q = by_head(np.concatenate([q_C, q_R], -1))\n"
        "    dS = softmax_backward(by_head(do) @ kv[..., d_h:].swapaxes(2, 3), P)\n"
        "    dq, dk = dS @ k * alpha, (dS.swapaxes(2, 3) @ q) * alpha\n"
        "    dv = P.swapaxes(2, 3) @ by_head(do)\n"
        "    dkv = np.concatenate([dk[..., :d_h], dv], -1)\n"
        "    dkv = by_head(dkv).reshape(B * S, n)\n"
        "    dc = (dkv @ W_UKV).reshape(B, S, d_c)\n"
        "    dkept = np.concatenate([dc, dk[..., d_h:].sum(1)], -1)\n"
        "    dW = dkv.T @ kept[..., :d_c].reshape(B * S, d_c)\n"
        "    dq = by_head(dq)\n"
        "    return dq[..., :d_h], dq[..., d_h:], dkept, dW\n",
    ),
)

CHECKS = [NAIVE_BACKWARD]
