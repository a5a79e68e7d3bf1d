"""Chapter 4, the absorbed form backwards: the same four gradients."""

from grader.spec import Check, Wrong

from checks.mla_naive_backward import RETURNS, cases_of_both

ABSORBED_BACKWARD = Check(
    "mla.7",
    returns=RETURNS,
    cases=cases_of_both,
    hints=(
        "Three layers deep: W_UV behind, the core in the middle, W_UK in front. Make "
        "again what the forward pass had between them, then go back through the three. "
        "The latent was key and value, and both answer.",
        "Make q_latent and o_latent as forwards, with axes (B, N_h, T, d_c). do_latent "
        "is `'bthv,hvc->bhtc'` of do and W_UV. The core's query has d_c + d_R numbers, "
        "its key is `kept`, its value `c`.",
        "`dq, dkept, dc = attention_backward(do_latent, q, kept, c, P, alpha)`, then "
        "`dkept[..., :d_c] += dc`. The first d_c numbers of dq give dq_C by W_UK, and "
        "dW_UK with q_C; dW_UV is made of do and o_latent. Join the two on axis 1.",
    ),
    wrong=(
        Wrong(
            "the latent hears from its part as key alone",
            "    dkept[..., :d_c] += dc\n",
            "",
            "The latents were summed up as values too. That part sends dc, which is to "
            "be added.",
        ),
        Wrong(
            "the latent hears from its part as value alone",
            "dkept[..., :d_c] += dc",
            "dkept[..., :d_c] = dc",
            "The latents were keys too. Their two gradients add up: `+=`.",
        ),
        Wrong(
            "the part as value subtracted",
            "dkept[..., :d_c] += dc",
            "dkept[..., :d_c] -= dc",
            "What was used twice hears twice, and the two gradients add up.",
        ),
        Wrong(
            "the shared key detached",
            "dkept[..., :d_c] += dc",
            "dkept[..., :d_c] += dc\n    dkept[..., d_c:] = 0",
            "The last d_R numbers of what is kept were part of the key, and hear too.",
        ),
        Wrong(
            "what is kept hears a mean over the heads",
            "dkept[..., :d_c] += dc",
            "dkept[..., :d_c] += dc\n    dkept = dkept / N_h",
            "What is shared, sums: one key serves all heads, and nothing divides "
            "their gradients.",
        ),
        Wrong(
            "the scale of the wide queries",
            "kept, c, P, alpha)",
            "kept, c, P, (d_c + q_R.shape[-1]) ** -0.5)",
            "The scores are the same numbers as in the naive form, and so is alpha.",
        ),
        Wrong(
            "a scale of its own",
            "kept, c, P, alpha)",
            "kept, c, P, (d_h + q_R.shape[-1]) ** -0.5)",
            "alpha is handed in. Under YaRN it is more than 1 / sqrt(d_h + d_R).",
        ),
        Wrong(
            "the scale forgotten",
            "kept, c, P, alpha)",
            "kept, c, P, 1.0)",
            "attention_backward wants the scale of the scores as its last argument: "
            "alpha.",
        ),
        Wrong(
            "the scale a second time in dW_UK",
            "dW_UK = np",
            "dW_UK = alpha * np",
            "attention_backward has put alpha into dq. It enters dW_UK through that.",
        ),
        Wrong(
            "the scale a second time in dq_C",
            "dq_C = np",
            "dq_C = alpha * np",
            "attention_backward has put alpha into dq. It enters dq_C through that.",
        ),
        Wrong(
            "the scale a second time in dq_C and dW_UK",
            "dq_C = np",
            "dq_C = alpha * np",
            "attention_backward has put alpha into dq, and all that follows has it.",
            (("dW_UK = np", "dW_UK = alpha * np"),),
        ),
        Wrong(
            "W_UK detached",
            "[dW_UK, dW_UV]",
            "[0 * dW_UK, dW_UV]",
            "W_UK made the wide queries from q_C. Its gradient is made of theirs.",
        ),
        Wrong(
            "W_UV detached",
            "[dW_UK, dW_UV]",
            "[dW_UK, 0 * dW_UV]",
            "W_UV made the outputs from o_latent. Its gradient is made of do and that.",
        ),
        Wrong(
            "dW_UV in front of dW_UK",
            "[dW_UK, dW_UV]",
            "[dW_UV, dW_UK]",
            "Of each head's rows, the first d_h are those of the key.",
        ),
        Wrong(
            "all keys first, then all values",
            "np.concatenate([dW_UK, dW_UV], axis=1).reshape(W_UKV.shape)",
            "np.concatenate([dW_UK.reshape(-1, d_c), dW_UV.reshape(-1, d_c)])",
            "The rows of W_UKV lie head by head: the first head's key and its value, "
            "then the second head's. Join on axis 1.",
        ),
        Wrong(
            "dW_UV from latents that nobody weighted",
            'np.einsum("bthv,bhtc->hvc", do, o_latent)',
            'np.einsum("bthv,bsc->hvc", do, c)',
            "W_UV was multiplied by the weighted sum of the latents, o_latent.",
        ),
        Wrong(
            "W_UK averaged over positions",
            "dW_UK = np",
            "dW_UK = 1 / (P.shape[0] * P.shape[2]) * np",
            "Every query used W_UK, and their gradients add up. A mean is taken once, "
            "in the loss.",
            (("dW_UV = np", "dW_UV = 1 / (P.shape[0] * P.shape[2]) * np"),),
        ),
        Wrong(
            "dq reshaped instead of transposed",
            "dq.swapaxes(1, 2)",
            "dq.reshape(*q_C.shape[:3], -1)",
            "The core has its heads in front of the positions, dq_C and dq_R "
            "behind them: exchange the two axes. A reshape leaves the numbers "
            "where they are.",
        ),
    ),
    right=(
        "def absorbed_backward(do, q_C, q_R, kept, W_UKV, P, alpha):\n"
        "    (B, T, N_h, d_h), d_c = q_C.shape, W_UKV.shape[1]\n"
        "    W, c = W_UKV.reshape(N_h, -1, d_c), kept[..., :d_c]\n"
        "    dkept, dW = np.zeros(kept.shape), np.zeros(W.shape)\n"
        "    dq_C, dq_R = np.empty(q_C.shape), np.empty(q_R.shape)\n"
        "    for h in range(N_h):\n"
        "        U, V = W[h, :d_h], W[h, d_h:]\n"
        "        w, out = P[:, h], do[:, :, h] @ V\n"
        "        dw = out @ c.swapaxes(1, 2)\n"
        "        ds = alpha * w * (dw - (w * dw).sum(-1, keepdims=True))\n"
        "        dq = ds @ kept\n"
        "        wide = np.dstack([q_C[:, :, h] @ U, q_R[:, :, h]])\n"
        "        dkept += ds.swapaxes(1, 2) @ wide\n"
        "        dkept[..., :d_c] += w.swapaxes(1, 2) @ out\n"
        "        dq_C[:, :, h], dq_R[:, :, h] = dq[..., :d_c] @ U.T, dq[..., d_c:]\n"
        "        dW[h, :d_h] = np.tensordot(q_C[:, :, h], dq[..., :d_c], "
        "([0, 1], [0, 1]))\n"
        "        dW[h, d_h:] = np.tensordot(do[:, :, h], w @ c, ([0, 1], [0, 1]))\n"
        "    return dq_C, dq_R, dkept, dW.reshape(W_UKV.shape)\n",
        "def absorbed_backward(do, q_C, q_R, kept, W_UKV, P, alpha):\n"
        "    f = np.float32\n"
        "    n, d_h = q_C.shape[2:]\n"
        "    c = kept[:, :, :W_UKV.shape[1]].astype(f)\n"
        "    W = W_UKV.astype(f).reshape(n, -1, c.shape[2])\n"
        "    do, q_C, q_R = (np.moveaxis(x, 2, 1).astype(f) for x in (do, q_C, q_R))\n"
        "    q = np.concatenate([q_C @ W[:, :d_h], q_R], axis=3)\n"
        "    dq, dk, dv = attention_backward(do @ W[:, d_h:], q, kept, c, P, alpha)\n"
        "    dk = dk + np.pad(dv, ((0, 0), (0, 0), (0, dk.shape[2] - dv.shape[2])))\n"
        "    dl = dq[..., :c.shape[2]]\n"
        "    dU = (q_C.swapaxes(2, 3) @ dl).sum(0)\n"
        "    dV = (do.swapaxes(2, 3) @ (P @ c[:, None])).sum(0)\n"
        "    back = lambda x: np.moveaxis(x, 1, 2)\n"
        "    dW = np.hstack([dU, dV]).reshape(len(W_UKV), -1)\n"
        "    return (back(dl @ W[:, :d_h].swapaxes(1, 2)),\n"
        "            back(dq[..., c.shape[2]:]), dk, dW)\n",
    ),
)

CHECKS = [ABSORBED_BACKWARD]
