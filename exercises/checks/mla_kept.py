"""Chapter 4, what is kept of a token: made once, and appended when one more comes."""

import numpy as np
from grader.spec import Case, Check, Wrong

from checks.draws import normal


def stream(
    B: int, D: int, d_c: int, d_R: int, at: list[int], seed: int, **more: float
) -> Case:
    """A stream at some positions; ``scale`` is its size, ``eps`` that of the norm."""
    scale, eps = more.get("scale", 1.0), more.get("eps", 1e-6)
    x, W = normal(B, len(at), D, seed=seed, scale=scale), normal(d_c + d_R, D, seed=1)
    label = f"B={B}, T={len(at)}, d_c={d_c}, d_R={d_R}, positions {at}, eps={eps}"
    args = x, W, normal(d_c, seed=seed + 2), np.array(at)
    return Case(label, args if eps == 1e-6 else (*args, eps))


LATENTS = Check(
    "mla.1",
    returns=("kept",),
    cases=lambda: [
        Case(
            "two positions, two numbers of latent and two of key",
            (
                np.array([[[1.0, 2.0], [2.0, -1.0]]]),
                np.array([[1.0, 1.0], [1.0, 0.0], [0.5, 0.0], [0.0, 0.5]]),
                np.array([1.0, 2.0]),
                np.array([0, 1]),
            ),
        ),
        stream(B=2, D=5, d_c=3, d_R=4, at=[7, 300, 2], seed=10),
        stream(B=3, D=4, d_c=6, d_R=2, at=[5, 0, 41], seed=20),
        stream(B=1, D=3, d_c=4, d_R=6, at=[12, 13], seed=30, scale=1e-3),
        stream(B=2, D=3, d_c=2, d_R=4, at=[9], seed=40, eps=0.5),
        stream(B=2, D=4, d_c=1, d_R=2, at=[1, 2, 3, 4], seed=50),
    ],
    hints=(
        "One product with all of W_DKV, then cut the last axis in two. Each half has "
        "one thing done to it, and not the other's.",
        "`np.split(x @ W_DKV.T, [len(g)], axis=-1)` gives (B, T, d_c) and (B, T, d_R). "
        "`rope` wants an axis of heads: `k[:, :, None]` is (B, T, 1, d_R).",
        "`c = g * a * (np.mean(a * a, axis=-1, keepdims=True) + eps) ** -0.5`, `k_R = "
        "rope(k[:, :, None], positions)[:, :, 0]`, and `np.concatenate([c, k_R], "
        "axis=-1)`.",
    ),
    wrong=(
        Wrong(
            "the key normalised too",
            "rope(k[:, :, None], positions)",
            "rope((k * (np.mean(k * k, axis=-1, keepdims=True) + eps) ** -0.5)"
            "[:, :, None], positions)",
            "The norm is on the latent alone. The key is kept at its own size.",
        ),
        Wrong(
            "one norm over latent and key",
            "    c = g * a * (np.mean(a * a, axis=-1, keepdims=True) + eps) ** -0.5\n",
            "    both = np.concatenate([a, k], axis=-1)\n"
            "    r = (np.mean(both * both, axis=-1, keepdims=True) + eps) ** -0.5\n"
            "    c, k = g * a * r, k * r\n",
            "The mean square runs over the d_c numbers of the latent alone, and the "
            "key is not normalised.",
        ),
        Wrong(
            "the key counted in the latent's mean square",
            "np.mean(a * a, axis=-1, keepdims=True)",
            "np.mean((x @ W_DKV.T) ** 2, axis=-1, keepdims=True)",
            "Cut first, then normalise: the mean square runs over the d_c numbers of "
            "the latent.",
        ),
        Wrong(
            "the latent not normalised",
            "c = g * a * (np.mean(a * a, axis=-1, keepdims=True) + eps) ** -0.5",
            "c = a",
            "The report's equations leave this norm out; its text on page 22, and the "
            "released weights, have it.",
        ),
        Wrong(
            "the gain without the norm",
            "c = g * a * (np.mean(a * a, axis=-1, keepdims=True) + eps) ** -0.5",
            "c = g * a",
            "Before the gain g, a is divided by the root of its mean square.",
        ),
        Wrong(
            "the gain left out",
            "c = g * a * ",
            "c = a * ",
            "The norm of the latent has a gain, g.",
        ),
        Wrong(
            "the mean subtracted",
            "    c = g * a *",
            "    a = a - np.mean(a, axis=-1, keepdims=True)\n    c = g * a *",
            "That is LayerNorm. RMSNorm divides by the root of the mean square, and "
            "subtracts nothing.",
        ),
        Wrong(
            "the sum of squares instead of their mean",
            "np.mean(a * a",
            "np.sum(a * a",
            "RMSNorm divides by the root of the mean square, so that numbers have size "
            "one each, however many there are.",
        ),
        Wrong(
            "eps added outside the root",
            "(np.mean(a * a, axis=-1, keepdims=True) + eps) ** -0.5",
            "1 / (np.sqrt(np.mean(a * a, axis=-1, keepdims=True)) + eps)",
            "eps stands under the root, beside the mean square.",
        ),
        Wrong(
            "eps forgotten",
            "keepdims=True) + eps) ** -0.5",
            "keepdims=True)) ** -0.5",
            "eps stands beside the mean square. Where a is as small as eps, it shows.",
        ),
        Wrong(
            "kept before the rotation",
            "k_R = rope(k[:, :, None], positions)[:, :, 0]",
            "k_R = k",
            "Turn the key now, when its position is known. Kept as it is, all keys of "
            "the past would have to be turned again for each new token.",
        ),
        Wrong(
            "the latent rotated too",
            "    k_R = rope(k[:, :, None], positions)[:, :, 0]  # (B, T, d_R)\n"
            "    return np.concatenate([c, k_R], axis=-1)",
            "    both = np.concatenate([c, k], axis=-1)[:, :, None]\n"
            "    return rope(both, positions)[:, :, 0]",
            "The latent has no position: a rotation between W_DKV and W_UK could not "
            "be absorbed. Only the last d_R numbers turn.",
        ),
        Wrong(
            "positions taken to be 0, 1, 2, ...",
            "rope(k[:, :, None], positions)",
            "rope(k[:, :, None], np.arange(x.shape[1]))",
            "The positions are an argument because they need not begin at 0: a cached "
            "text goes on at 5000.",
        ),
        Wrong(
            "the key turned by the number of its sequence",
            "rope(k[:, :, None], positions)[:, :, 0]",
            "rope(k, positions)",
            "`rope` takes (B, T, heads, d). Without an axis of heads it reads your B "
            "as T; where they are equal, nothing complains.",
        ),
        Wrong(
            "turned the other way",
            "rope(k[:, :, None], positions)",
            "rope(k[:, :, None], -positions)",
            "The key turns by plus p theta, as the queries will.",
        ),
        Wrong(
            "pairs of halves",
            "k_R = rope(k[:, :, None], positions)[:, :, 0]",
            "h = np.arange(k.shape[-1]).reshape(2, -1).T.ravel()\n"
            "    k_R = rope(k[:, :, None, h], positions)[:, :, 0, np.argsort(h)]",
            "Coordinates j and j + d/2 are Llama's pairs in Hugging Face's code. "
            "DeepSeek's weights have neighbours: 2j and 2j+1.",
        ),
        Wrong(
            "right pairs, kept as halves",
            "k_R = rope(k[:, :, None], positions)[:, :, 0]",
            "k_R = rope(k[:, :, None], positions)[:, :, 0]\n"
            "    k_R = np.concatenate([k_R[..., 0::2], k_R[..., 1::2]], axis=-1)",
            "Each pair goes back to where it came from, 2j and 2j+1. (Scores would not "
            "notice if queries did the same; a cache shared with other code would.)",
        ),
        Wrong(
            "the key in front of the latent",
            "[c, k_R]",
            "[k_R, c]",
            "The latent comes first and the key behind it, as in the rows of W_DKV.",
        ),
        Wrong(
            "the first rows of W_DKV taken for the key",
            "a, k = np.split(x @ W_DKV.T, [len(g)], axis=-1)",
            "k, a = np.split(x @ W_DKV.T, [len(W_DKV) - len(g)], axis=-1)",
            "The first d_c rows of W_DKV make the latent, the last d_R the key.",
        ),
    ),
    right=(
        "def latents(x, W_DKV, g, positions, eps=1e-6):\n"
        "    d = len(g)\n"
        "    W_C, W_R = W_DKV[:d], W_DKV[d:]\n"
        "    c = np.einsum('btj,cj->btc', x, W_C)\n"
        "    c = c / np.sqrt(np.square(c).mean(-1) + eps)[..., None] * g\n"
        "    turn = rope(np.einsum('btj,rj->btr', x, W_R)[:, :, None, :], positions)\n"
        "    return np.dstack([c, turn.squeeze(2)])\n",
        "def latents(x, W_DKV, g, positions, eps=1e-6):\n"
        "    d_R = len(W_DKV) - len(g)\n"
        "    theta = 10000.0 ** (-np.arange(0, d_R, 2) / d_R)\n"
        "    out = np.zeros((*x.shape[:2], len(W_DKV)), np.float32)\n"
        "    for b, t in np.ndindex(x.shape[:2]):\n"
        "        y = W_DKV @ x[b, t]\n"
        "        a, k = y[:len(g)], y[len(g):]\n"
        "        out[b, t, :len(g)] = g * a / (a @ a / len(a) + eps) ** 0.5\n"
        "        z = (k[::2] + 1j * k[1::2]) * np.exp(1j * positions[t] * theta)\n"
        "        out[b, t, len(g):] = np.column_stack([z.real, z.imag]).ravel()\n"
        "    return out\n",
    ),
)


def step(
    B: int, S: int, length: int, T: int, N_h: int, widths: tuple[int, ...], seed: int
) -> Case:
    """A step behind a cache; widths are D, d_h, d_R, d_v, d_c."""
    D, d_h, d_R, d_v, d_c = widths
    label = (
        f"B={B}, {length} of {S} kept stand, {T} new, {N_h} heads, d_h={d_h}, "
        f"d_R={d_R}, d_v={d_v}, d_c={d_c}"
    )
    cache, x = normal(B, S, d_c + d_R, seed=seed), normal(B, T, D, seed=seed + 1)
    q, W = normal(B, T, N_h, d_h + d_R, seed=seed + 2), normal(d_c + d_R, D, seed=3)
    g, W_UKV = normal(d_c, seed=seed + 4), normal(N_h * (d_h + d_v), d_c, seed=5)
    return Case(label, (cache, length, x, q, W, g, W_UKV, (d_h + d_R) ** -0.5))


POSITIONS = "positions = np.arange(length, length + x.shape[1])"

DECODE = Check(
    "mla.4",
    returns=("o", "cache"),
    cases=lambda: [
        step(B=1, S=1, length=1, T=1, N_h=1, widths=(2, 1, 2, 1, 1), seed=10),
        step(B=2, S=5, length=3, T=1, N_h=2, widths=(3, 3, 2, 4, 5), seed=20),
        step(B=2, S=4, length=4, T=3, N_h=3, widths=(4, 2, 4, 1, 3), seed=30),
        step(B=1, S=0, length=0, T=4, N_h=2, widths=(5, 1, 6, 2, 4), seed=40),
        step(B=3, S=2, length=0, T=2, N_h=1, widths=(2, 4, 2, 3, 2), seed=50),
        step(B=1, S=40, length=38, T=2, N_h=4, widths=(3, 2, 2, 2, 2), seed=60),
        step(B=2, S=4, length=2, T=2, N_h=2, widths=(3, 2, 4, 4, 3), seed=70),
    ],
    hints=(
        "Three lines in the order of the text: the past that stands, the new tokens "
        "behind it, their queries over both. Which number says where the text ends?",
        "Positions are `np.arange(length, length + T)`, for keys and queries alike. "
        "`np.concatenate([..., ...], axis=1)` joins `cache[:, :length]` and the new "
        "latents. d_R is `len(W_DKV) - len(g)`.",
        "`new = latents(x, W_DKV, g, positions)`, join to `kept`, split q at "
        "`q.shape[-1] - d_R`, then `o, _ = absorbed_forward(q_C, rope(q_R, positions), "
        "kept, W_UKV, alpha)`, and return o and kept.",
    ),
    wrong=(
        Wrong(
            "positions counted from 0",
            POSITIONS,
            "positions = np.arange(x.shape[1])",
            "The new tokens stand behind the text: their positions begin at `length`. "
            "At 0, distances to what is kept come out wrong.",
        ),
        Wrong(
            "positions counted from 1",
            POSITIONS,
            "positions = np.arange(length, length + x.shape[1]) + 1",
            "Positions count from 0, so the first behind `length` tokens has the "
            "position `length`.",
        ),
        Wrong(
            "one position for all new tokens",
            POSITIONS,
            "positions = np.full(x.shape[1], length)",
            "T tokens stand at T positions, one behind the other.",
        ),
        Wrong(
            "the positions of the old cache",
            POSITIONS,
            "positions = np.arange(cache.shape[1], cache.shape[1] + x.shape[1])",
            "The text ends at `length`. What lies behind is a draft that was refused: "
            "its positions are free again.",
        ),
        Wrong(
            "the refused draft left in the cache",
            "[cache[:, :length], new]",
            "[cache, new]",
            "Crop first: only the first `length` positions are part of the text.",
        ),
        Wrong(
            "cache and positions uncropped",
            POSITIONS,
            "positions = np.arange(cache.shape[1], cache.shape[1] + x.shape[1])",
            "Only the first `length` positions are part of the text. Crop the cache, "
            "and count on from there.",
            (("[cache[:, :length], new]", "[cache, new]"),),
        ),
        Wrong(
            "cropped in front",
            "[cache[:, :length], new]",
            "[cache[:, cache.shape[1] - length :], new]",
            "The refused draft lies at the end. What stands is in front of it.",
        ),
        Wrong(
            "one too many forgotten",
            "[cache[:, :length], new]",
            "[cache[:, : max(length - 1, 0)], new]",
            "The first `length` positions stand, number `length` - 1 included.",
        ),
        Wrong(
            "the queries not rotated",
            "rope(q_R, positions)",
            "q_R",
            "q is handed in as it left its projection. Its last d_R numbers must turn, "
            "as the keys did.",
        ),
        Wrong(
            "the queries' positions counted from 0",
            "rope(q_R, positions)",
            "rope(q_R, np.arange(q.shape[1]))",
            "A token's query has its key's position, so that the two turn against each "
            "other by nothing.",
        ),
        Wrong(
            "every query rotated as the first",
            "rope(q_R, positions)",
            "rope(q_R, positions * 0 + length)",
            "Each new token has its own position, its query as its key.",
        ),
        Wrong(
            "the first numbers of a query rotated",
            "q_C, q_R = np.split(q, [q.shape[-1] - d_R], axis=-1)",
            "q_R, q_C = np.split(q, [d_R], axis=-1)",
            "In a head's query content comes first; the last d_R numbers turn.",
        ),
        Wrong(
            "the keys of the past rotated again",
            "    o, _ =",
            "    again = rope(kept[:, :, None, -d_R:], np.arange(kept.shape[1]))\n"
            "    kept = np.concatenate([kept[..., :-d_R], again[:, :, 0]], axis=-1)\n"
            "    o, _ =",
            "They were turned before they were kept, and the new ones by `latents`. A "
            "second time is twice as far.",
        ),
        Wrong(
            "the latents normalised again",
            "    o, _ =",
            "    c = kept[..., :-d_R]\n"
            "    c = g * c * (np.mean(c * c, axis=-1, keepdims=True) + 1e-6) ** -0.5\n"
            "    kept = np.concatenate([c, kept[..., -d_R:]], axis=-1)\n"
            "    o, _ =",
            "What is kept has been normalised, with its gain. It is ready as it lies.",
        ),
        Wrong(
            "a token that does not hear itself",
            "    o, _ = absorbed_forward(q_C, rope(q_R, positions), kept, W_UKV, "
            "alpha)",
            "    T = x.shape[1]\n"
            "    first = kept[:, : length + 1 - (length > 0)]\n"
            "    steps = [(t, kept[:, : length + t] if length + t else first)\n"
            "             for t in range(T)]\n"
            "    q_R = rope(q_R, positions)\n"
            "    o = np.concatenate([absorbed_forward(q_C[:, t : t + 1], "
            "q_R[:, t : t + 1], past, W_UKV, alpha)[0] for t, past in steps], axis=1)",
            "Append first, then attend: a token's own key is among those it hears.",
        ),
        Wrong(
            "the past not heard",
            "kept, W_UKV, alpha)",
            "new, W_UKV, alpha)",
            "Attend to all that is kept: the past that stands, and the new.",
        ),
        Wrong(
            "all new tokens heard by each",
            "    o, _ = absorbed_forward(q_C, rope(q_R, positions), kept, W_UKV, "
            "alpha)",
            "    q_R = rope(q_R, positions)\n"
            "    o = np.concatenate([absorbed_forward(q_C[:, t : t + 1], "
            "q_R[:, t : t + 1], kept, W_UKV, alpha)[0] for t in range(x.shape[1])], 1)",
            "Alone over all that is kept, a query counts as the last. Hand in all T at "
            "once, or each with what it may hear.",
        ),
        Wrong(
            "new tokens in front of the old",
            "[cache[:, :length], new]",
            "[new, cache[:, :length]]",
            "The cache is in the order of the text, and the mask counts on it.",
        ),
        Wrong(
            "only the new returned",
            "return o, kept",
            "return o, new",
            "The next step needs all of it: the past that stands, and the new.",
        ),
    ),
    right=(
        "def decode(cache, length, x, q, W_DKV, g, W_UKV, alpha):\n"
        "    (B, T, _), d_c = x.shape, len(g)\n"
        "    kept = np.empty((B, length + T, len(W_DKV)))\n"
        "    kept[:, :length] = cache[:, :length]\n"
        "    o = []\n"
        "    for t in range(length, length + T):\n"
        "        at, now = np.array([t]), slice(t - length, t - length + 1)\n"
        "        kept[:, t:t + 1] = latents(x[:, now], W_DKV, g, at)\n"
        "        d_h = q.shape[-1] - (len(W_DKV) - d_c)\n"
        "        q_R = rope(q[:, now, :, d_h:], at)\n"
        "        o += [absorbed_forward(q[:, now, :, :d_h], q_R, kept[:, :t + 1],\n"
        "                               W_UKV, alpha)[0]]\n"
        "    return np.concatenate(o, axis=1), kept\n",
        "def decode(cache, length, x, q, W_DKV, g, W_UKV, alpha):\n"
        "    T, N_h, d_c = x.shape[1], q.shape[2], W_UKV.shape[1]\n"
        "    at = length + np.arange(T)\n"
        "    S, d_R = length + T, len(W_DKV) - d_c\n"
        "    kept = np.append(cache[:, :length], latents(x, W_DKV, g, at), axis=1)\n"
        "    kv = (kept[..., :d_c] @ W_UKV.T).reshape(len(x), S, N_h, -1)\n"
        "    k_R = np.repeat(kept[:, :, None, d_c:], N_h, axis=2)\n"
        "    d_h = q.shape[-1] - d_R\n"
        "    k = np.concatenate([kv[..., :d_h], k_R], axis=-1)\n"
        "    q = np.concatenate([q[..., :d_h], rope(q[..., d_h:], at)], axis=-1)\n"
        "    s = alpha * np.einsum('bthd,bshd->bhts', q, k)\n"
        "    s = np.where(np.tri(T, S, length) > 0, s, -np.inf)\n"
        "    P = np.exp(s - s.max(-1, keepdims=True))\n"
        "    P /= P.sum(-1, keepdims=True)\n"
        "    return np.einsum('bhts,bshv->bthv', P, kv[..., d_h:]), kept\n",
    ),
)

CHECKS = [LATENTS, DECODE]
