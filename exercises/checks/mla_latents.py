"""Chapter 4, what is kept of a token."""

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
        Wrong(
            "eps by heart",
            "+ eps) ** -0.5",
            "+ 1e-6) ** -0.5",
            "eps is an argument, and 1e-6 only its default.",
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


CHECKS = [LATENTS]
