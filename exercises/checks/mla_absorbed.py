"""Chapter 4, attention in the absorbed form: no head has a key of its own."""

import numpy as np
from grader.spec import Case, Check, Wrong

from checks.draws import normal, rng
from checks.mla_naive import EITHER_FORM, SCORES, cases_of_both


def too_large_for_keys() -> Case:
    """Latents whose keys and values overflow in float32; scores and outputs do not.

    Of the latent's numbers, 0 and 1 are for the keys: times W_UK some 2^130, times a
    query near 2^-126 it is a score. Number 2 is for the values: 2^126 at one token,
    times W_UV beyond 2^128, but that token's weight is e^-70.
    """
    draw = rng(7).uniform
    c = np.concatenate(
        [draw(1, 1.5, (4, 2)) * 2.0**69, np.zeros((4, 1)), normal(4, 1) * 2.0**26],
        axis=-1,
    )  # (4, 4)
    c[0, 2] = 2.0**126
    k_R = np.array([[-70.0, 0.0], [0.3, 1.0], [-0.4, 0.2], [0.5, -0.6]])
    W_UK = np.zeros((2, 3, 4))
    W_UK[..., :2] = draw(1, 1.5, (2, 3, 2)) * 2.0**59
    W_UV = np.zeros((2, 2, 4))
    W_UV[..., 2], W_UV[..., 3] = draw(4, 7, (2, 2)), draw(-2, 2, (2, 2))
    q_C = np.array([[1, -1, 0.5], [-1, 1.5, -1]]) * 2.0**-125
    q_R = np.array([[1.0, 0.5], [1.0, -0.5]])
    W_UKV = np.concatenate([W_UK, W_UV], axis=1).reshape(-1, 4)
    q_C, q_R = np.stack([q_C, q_C[::-1]])[None], np.stack([q_R, q_R[::-1]])[None]
    kept = np.concatenate([c, k_R], axis=-1)[None]
    args = (a.astype(np.float32) for a in (q_C, q_R, kept, W_UKV))
    return Case("float32, every head's keys and values would overflow", (*args, 1.0))


ABSORBED = Check(
    "mla.3",
    returns=("o", "P"),
    cases=lambda: [*cases_of_both(), too_large_for_keys()],
    hints=(
        "W_UK goes to the side of the query, W_UV behind the sum over tokens. In "
        "between stands attention with one key for all heads, and with the latent for "
        "a value.",
        "`W_UKV.reshape(N_h, -1, d_c)` is (N_h, d_h+d_v, d_c); split its axis 1 at "
        "d_h. The query becomes `'bthd,hdc->bthc'` of q_C and W_UK, d_c numbers a "
        "head.",
        "Scores: `'bthc,bsc->bhts'` of q_latent and c, plus `'bthr,bsr->bhts'` of q_R "
        "and k_R, times alpha. Then `o_latent` is `'bhts,bsc->bthc'` of P and c, and o "
        "is `'bthc,hvc->bthv'` of o_latent and W_UV.",
    ),
    wrong=(
        Wrong(
            "keys made after all",
            'np.einsum("bthc,bsc->bhts", q_latent, c)',
            'np.einsum("bthd,bshd->bhts", q_C, np.einsum("bsc,hdc->bshd", c, W_UK))',
            "That is the naive form: it multiplies W_UK with each token's latent. "
            "Multiply it with the query, once, and attend to the latents.",
        ),
        Wrong(
            "values made after all",
            "    return np.einsum",
            '    v = np.einsum("bsc,hvc->bshv", c, W_UV)\n'
            '    return np.einsum("bhts,bshv->bthv", P, v), P\n'
            "    return np.einsum",
            "You multiply W_UV with each token's latent. Sum the latents by their "
            "weights first, and multiply the sum.",
        ),
        Wrong(
            "the scale of the wide queries",
            SCORES,
            "(d_c + q_R.shape[-1]) ** -0.5 * (content + position)",
            "The scores are the same numbers as in the naive form, so their scale is "
            "too: alpha, which knows nothing of d_c.",
        ),
        Wrong(
            "all keys first, then all values",
            "W_UK, W_UV = np.split(W_UKV.reshape(N_h, -1, d_c), [d_h], axis=1)",
            "W_UK, W_UV = (W.reshape(N_h, -1, d_c)\n"
            "        for W in np.split(W_UKV, [N_h * d_h]))",
            "The rows of W_UKV lie head by head: the first head's key and its value, "
            "then the second head's.",
        ),
        Wrong(
            "the value in front of the key",
            "W_UK, W_UV = np.split(W_UKV.reshape(N_h, -1, d_c), [d_h], axis=1)",
            "W_UV, W_UK = np.split(W_UKV.reshape(N_h, -1, d_c), [-d_h], axis=1)",
            "Of each head's rows, the first d_h make the key and the rest the value.",
        ),
        Wrong(
            "heads dealt out like cards",
            "W_UKV.reshape(N_h, -1, d_c)",
            "W_UKV.reshape(-1, N_h, d_c).swapaxes(0, 1)",
            "A head's d_h + d_v rows lie together, so the axis of heads comes first in "
            "the reshape.",
        ),
        Wrong(
            "the first head's W_UV for all",
            '"bthc,hvc->bthv", o_latent, W_UV',
            '"bthc,vc->bthv", o_latent, W_UV[0]',
            "The latents are shared, what is read from them is not: head h has "
            "W_UV[h].",
        ),
        Wrong(
            "the first head's W_UK for all",
            '"bthd,hdc->bthc", q_C, W_UK',
            '"bthd,dc->bthc", q_C, W_UK[0]',
            "The latents are shared, what is asked of them is not: head h has W_UK[h].",
        ),
        *EITHER_FORM,
    ),
    right=(
        "def absorbed_forward(q_C, q_R, kept, W_UKV, alpha):\n"
        "    B, T, N_h, d_h = q_C.shape\n"
        "    d_c = W_UKV.shape[-1]\n"
        "    c, rows = kept[..., :d_c], len(W_UKV) // N_h\n"
        "    o, P = [], []\n"
        "    for h in range(N_h):\n"
        "        W = W_UKV[h * rows:(h + 1) * rows]\n"
        "        q = np.concatenate([q_C[:, :, h] @ W[:d_h], q_R[:, :, h]], axis=-1)\n"
        "        s = alpha * np.matmul(q, kept.transpose(0, 2, 1))\n"
        "        P.append(causal_weights(s[:, None]))\n"
        "        o.append((P[h][:, 0] @ c) @ W[d_h:].T)\n"
        "    return np.stack(o, axis=2), np.concatenate(P, axis=1)\n",
        "def absorbed_forward(q_C, q_R, kept, W_UKV, alpha):\n"
        "    (B, T, N_h, d_h), d_c = q_C.shape, W_UKV.shape[1]\n"
        "    W = W_UKV.astype(np.float32).reshape(N_h, -1, d_c)\n"
        "    S = kept.shape[1]\n"
        "    out = np.zeros((B, T, N_h, W.shape[1] - d_h), np.float32)\n"
        "    P = np.zeros((B, N_h, T, S), np.float32)\n"
        "    for b, t, h in np.ndindex(B, T, N_h):\n"
        "        past = S - T + t + 1\n"
        "        s = kept[b, :past, :d_c] @ (q_C[b, t, h] @ W[h, :d_h])\n"
        "        s = alpha * (s + kept[b, :past, d_c:] @ q_R[b, t, h])\n"
        "        w = np.exp(s - s.max())\n"
        "        P[b, h, t, :past] = w / w.sum()\n"
        "        out[b, t, h] = W[h, d_h:] @ (P[b, h, t, :past] @ "
        "kept[b, :past, :d_c])\n"
        "    return out, P\n",
    ),
)

CHECKS = [ABSORBED]
