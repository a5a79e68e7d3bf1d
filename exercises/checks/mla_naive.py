"""Chapter 4, attention in the naive form, and what both forms are asked."""

import numpy as np
from grader.spec import Case, Check, Wrong

from checks.draws import normal


def heads(
    B: int, T: int, S: int, N_h: int, widths: tuple[int, ...], seed: int, **more: float
) -> Case:
    """Queries of T positions over S that are kept; widths are d_h, d_R, d_v, d_c.

    ``times`` multiplies the usual scale, ``size`` all that is kept.
    """
    d_h, d_R, d_v, d_c = widths
    times, size = more.get("times", 1.0), more.get("size", 1.0)
    q_C = normal(B, T, N_h, d_h, seed=seed)
    q_R = normal(B, T, N_h, d_R, seed=seed + 1)
    kept = normal(B, S, d_c + d_R, seed=seed + 2, scale=size)
    W_UKV = normal(N_h * (d_h + d_v), d_c, seed=seed + 3)
    label = (
        f"B={B}, {T} queries, {S} kept, {N_h} heads, d_h={d_h}, d_R={d_R}, d_v={d_v}, "
        f"d_c={d_c}"
    )
    return Case(label, (q_C, q_R, kept, W_UKV, times * (d_h + d_R) ** -0.5))


def cases_of_both() -> list[Case]:
    """What the naive form and the absorbed one are both asked."""
    return [
        Case(
            "two positions, one head of 1 + 2 numbers",
            (
                np.array([[[[1.0]], [[-1.0]]]]),
                np.array([[[[0.0, 1.0]], [[2.0, 0.0]]]]),
                np.array([[[1.0, 0.0, 1.0], [2.0, -1.0, 0.5]]]),
                np.array([[2.0], [3.0]]),
                0.5,
            ),
        ),
        heads(B=2, T=3, S=3, N_h=2, widths=(3, 2, 4, 5), seed=10),
        heads(B=1, T=2, S=5, N_h=3, widths=(2, 4, 1, 3), seed=20, times=1.8738542),
        heads(B=2, T=1, S=4, N_h=2, widths=(3, 2, 3, 2), seed=30, times=0.4),
        heads(B=3, T=3, S=3, N_h=1, widths=(2, 6, 4, 6), seed=40),
        heads(B=1, T=4, S=6, N_h=3, widths=(4, 4, 4, 4), seed=50, times=1.4),
        heads(B=1, T=3, S=4, N_h=2, widths=(1, 2, 2, 3), seed=60, size=1e-3),
    ]


SCORES = "alpha * (content + position)"
EITHER_FORM = (
    Wrong(
        "a scale for each part of the score",
        SCORES,
        "content / q_C.shape[-1] ** 0.5 + position / q_R.shape[-1] ** 0.5",
        "Content and position are two parts of one product of queries and keys, and "
        "that has one scale, alpha.",
    ),
    Wrong(
        "the scale on the content alone",
        SCORES,
        "alpha * content + position",
        "alpha multiplies the whole score, both parts of it.",
    ),
    Wrong(
        "the scale on the position alone",
        SCORES,
        "content + alpha * position",
        "alpha multiplies the whole score, both parts of it. (That of YaRN too, though "
        "the content does not rotate.)",
    ),
    Wrong(
        "the scale forgotten",
        SCORES,
        "content + position",
        "The scores are multiplied by alpha before the softmax.",
    ),
    Wrong(
        "the scale twice",
        SCORES,
        "alpha**2 * (content + position)",
        "alpha on queries or on scores, but not on both.",
    ),
    Wrong(
        "a scale of its own",
        SCORES,
        "(q_C.shape[-1] + q_R.shape[-1]) ** -0.5 * (content + position)",
        "alpha is handed in. Under YaRN it is more than 1 / sqrt(d_h + d_R).",
    ),
    Wrong(
        "the scale of a head without its rotated part",
        SCORES,
        "q_C.shape[-1] ** -0.5 * (content + position)",
        "alpha is handed in. Without YaRN it is 1 / sqrt(d_h + d_R): a query has both "
        "parts.",
    ),
    Wrong(
        "positions left out",
        SCORES,
        "alpha * content",
        "A score has two parts. Without the rotated one, a head cannot know where a "
        "token stands.",
    ),
    Wrong(
        "content left out",
        SCORES,
        "alpha * position",
        "A score has two parts; that of the content is missing.",
    ),
    Wrong(
        "two softmaxes",
        f"causal_weights({SCORES})",
        "(causal_weights(alpha * content) + causal_weights(alpha * position)) / 2",
        "The two parts of a score are added first. One softmax weighs the sums.",
    ),
    Wrong(
        "the future heard",
        f"P = causal_weights({SCORES})",
        f"e = np.exp({SCORES})\n    P = e / e.sum(axis=-1, keepdims=True)",
        "A query must not hear a later position. `causal_weights` sees to it.",
    ),
    Wrong(
        "the queries taken for the first of the positions",
        f"P = causal_weights({SCORES})",
        f"s = {SCORES}\n"
        "    e = np.where(np.tri(*s.shape[2:]) > 0, np.exp(s), 0)\n"
        "    P = e / e.sum(axis=-1, keepdims=True)",
        "The T queries are the last T of the S positions, as when a cache holds the "
        "rest.",
    ),
    Wrong(
        "the key taken from the front of what is kept",
        "c, k_R = np.split(kept,",
        "k_R, c = np.split(kept, [kept.shape[-1] - W_UKV.shape[1]], axis=-1)\n"
        "    _ = np.split(kept,",
        "The latent comes first, d_c numbers, and the rotated key behind it.",
    ),
)

NAIVE = Check(
    "mla.2",
    returns=("o", "P"),
    cases=cases_of_both,
    hints=(
        "Three steps: keys and values of all heads from c, scores from two products, "
        "then attention as in chapter 1. k_R has no axis of heads: all share it.",
        "`(c @ W_UKV.T).reshape(B, S, N_h, -1)` is (B, S, N_h, d_h+d_v); split its "
        "last axis at d_h. The content's scores are `'bthd,bshd->bhts'`, the "
        "position's `'bthr,bsr->bhts'`, with no h on the key.",
        "`P = causal_weights(alpha * (content + position))`, and o is "
        "`np.einsum('bhts,bshv->bthv', P, v)`. d_c is `W_UKV.shape[1]`.",
    ),
    wrong=(
        Wrong(
            "all keys first, then all values",
            "kv = (c @ W_UKV.T).reshape(B, S, N_h, -1)",
            "kv = np.concatenate([(c @ W.T).reshape(B, S, N_h, -1)\n"
            "        for W in np.split(W_UKV, [N_h * d_h])], axis=-1)",
            "The rows of W_UKV lie head by head: the first head's key and its value, "
            "then the second head's.",
        ),
        Wrong(
            "the value in front of the key",
            "k_C, v = np.split(kv, [d_h], axis=-1)",
            "v, k_C = np.split(kv, [kv.shape[-1] - d_h], axis=-1)",
            "Of each head's rows, the first d_h make the key and the rest the value.",
        ),
        Wrong(
            "heads dealt out like cards",
            "(c @ W_UKV.T).reshape(B, S, N_h, -1)",
            "(c @ W_UKV.T).reshape(B, S, -1, N_h).swapaxes(2, 3)",
            "A head's d_h + d_v rows lie together, so the axis of heads comes first in "
            "the reshape.",
        ),
        Wrong(
            "query and key joined in different orders",
            "P = causal_weights(",
            "q = np.concatenate([q_C, q_R], axis=-1)\n"
            "    shared = np.repeat(k_R[:, :, None], N_h, axis=2)\n"
            "    k = np.concatenate([shared, k_C], axis=-1)\n"
            "    content, position = np.einsum('bthd,bshd->bhts', q, k), 0\n"
            "    P = causal_weights(",
            "If you join the parts, do so in the same order on both sides: content "
            "meets content.",
        ),
        Wrong(
            "outputs reshaped instead of transposed",
            'return np.einsum("bhts,bshv->bthv", P, v), P',
            'o = np.einsum("bhts,bshv->bhtv", P, v)\n'
            "    return o.reshape(B, -1, N_h, v.shape[-1]), P",
            "A reshape does not exchange axes. From (B, N_h, T, d_v), use swapaxes.",
        ),
        Wrong(
            "the first head's keys for all",
            'position = np.einsum("bthr,bsr->bhts", q_R, k_R)',
            'position = np.einsum("bthr,bsr->bhts", q_R, k_R)\n'
            '    content = np.einsum("bthd,bsd->bhts", q_C, k_C[:, :, 0])',
            "Only the rotated key is shared. For the content each head makes keys of "
            "its own.",
        ),
        *EITHER_FORM,
    ),
    right=(
        "def naive_forward(q_C, q_R, kept, W_UKV, alpha):\n"
        "    B, T, N_h, d_h = q_C.shape\n"
        "    S, d_c = kept.shape[1], W_UKV.shape[1]\n"
        "    W = W_UKV.reshape(N_h, -1, d_c)\n"
        "    o, P = [], []\n"
        "    for h in range(N_h):\n"
        "        kv = kept[..., :d_c] @ W[h].T\n"
        "        k = np.dstack([kv[..., :d_h], kept[..., d_c:]])\n"
        "        q = np.dstack([q_C[:, :, h], q_R[:, :, h]])\n"
        "        s = alpha * (q @ k.swapaxes(1, 2))\n"
        "        P.append(causal_weights(s[:, None])[:, 0])\n"
        "        o.append(P[h] @ kv[..., d_h:])\n"
        "    return np.stack(o, 2), np.stack(P, 1)\n",
        "def naive_forward(q_C, q_R, kept, W_UKV, alpha):\n"
        "    q_C, q_R, kept = (x.astype(np.float32) for x in (q_C, q_R, kept))\n"
        "    (B, T, N_h, d_h), (n, d_c) = q_C.shape, W_UKV.shape\n"
        "    S = kept.shape[1]\n"
        "    heads = lambda x: np.moveaxis(x, 2, 1)\n"
        "    kv = np.tensordot(kept[..., :d_c], W_UKV.astype(np.float32), (2, 1))\n"
        "    kv = heads(kv.reshape(B, S, N_h, n // N_h))\n"
        "    k_R = np.broadcast_to(kept[:, None, :, d_c:], (B, N_h, S, q_R.shape[3]))\n"
        "    k = np.concatenate([kv[..., :d_h], k_R], 3)\n"
        "    q = heads(np.concatenate([q_C, q_R], 3)) * np.float32(alpha)\n"
        "    s = q @ k.transpose(0, 1, 3, 2)\n"
        "    s += np.triu(np.full((T, S), -np.inf), S - T + 1)\n"
        "    w = np.exp(s - s.max(3)[..., None])\n"
        "    w = w / w.sum(3)[..., None]\n"
        "    return heads(w @ kv[..., d_h:]), w\n",
    ),
)

CHECKS = [NAIVE]
