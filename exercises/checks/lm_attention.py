"""Chapter 1, backwards: attention with one key head."""

from grader.spec import Case, Check, Wrong

from checks.draws import normal, weights


def attention(
    B: int, H: int, T: int, S: int, d: int, d_v: int, scale: float, seed: int
) -> Case:
    """One case of multi-query attention."""
    do, q = normal(B, H, T, d_v, seed=seed), normal(B, H, T, d, seed=seed + 10)
    k, v = normal(B, S, d, seed=seed + 20), normal(B, S, d_v, seed=seed + 30)
    P = weights(B, H, T, S, seed=seed + 40)
    label = f"B={B}, {H} heads, {T} queries, {S} keys, d={d}, d_v={d_v}"
    return Case(label, (do, q, k, v, P, scale))


ATTENTION = Check(
    "lm.8",
    returns=("dq", "dk", "dv"),
    cases=lambda: [
        attention(B=1, H=2, T=3, S=4, d=2, d_v=5, scale=0.3, seed=0),
        attention(B=2, H=3, T=2, S=5, d=4, d_v=3, scale=0.5, seed=1),
        attention(B=1, H=1, T=4, S=4, d=2, d_v=5, scale=-1.5, seed=2),
        attention(B=2, H=2, T=1, S=3, d=3, d_v=2, scale=3**-0.5, seed=3),
    ],
    hints=(
        "Walk back: o is the product of P and v, so it has two gradients, dP and dv. "
        "dP goes through the softmax, times the scale, and meets a second product.",
        "`np.einsum` spells the sums: dv is `'bhts,bhtv->bsv'` of P and do, summed "
        "over h and t, because one v serves all heads and all queries. `dS = scale * "
        "softmax_backward(dP, P)`.",
        "`dP = np.einsum('bhtv,bsv->bhts', do, v)`; dq is `'bhts,bsd->bhtd'` of dS "
        "and k; dk is `'bhts,bhtd->bsd'` of dS and q.",
    ),
    wrong=(
        Wrong(
            "the scale forgotten",
            "scale * softmax_backward(dP, P)",
            "softmax_backward(dP, P)",
            "The scores were scale * q k, so the gradient of q k is scale times that "
            "of the scores.",
        ),
        Wrong(
            "the softmax skipped",
            "softmax_backward(dP, P)",
            "dP",
            "dP is the gradient of the weights. The scores are on the other side of "
            "the softmax.",
        ),
        Wrong(
            "dk taken from one head",
            'dk = np.einsum("bhts,bhtd->bsd", dS, q)',
            "dk = dS[:, 0].swapaxes(1, 2) @ q[:, 0]",
            "One key serves all heads, so its gradient is the sum over them. (MLA "
            "has such a key, and this is its most common bug.)",
        ),
        Wrong(
            "dk averaged over the heads",
            'dk = np.einsum("bhts,bhtd->bsd", dS, q)',
            'dk = np.einsum("bhts,bhtd->bsd", dS, q) / q.shape[1]',
            "What is shared, sums: the heads' gradients add up, nothing divides them.",
        ),
        Wrong(
            "dv averaged over the heads",
            'dv = np.einsum("bhts,bhtv->bsv", P, do)',
            'dv = np.einsum("bhts,bhtv->bsv", P, do) / q.shape[1]',
            "What is shared, sums: one v serves all heads, and their gradients add up.",
        ),
        Wrong(
            "dk and dv averaged over the heads",
            'dk = np.einsum("bhts,bhtd->bsd", dS, q)',
            'dk = np.einsum("bhts,bhtd->bsd", dS, q) / q.shape[1]',
            "What is shared, sums: one key and one value serve all heads, and nothing "
            "divides the heads' gradients.",
            (
                (
                    'dv = np.einsum("bhts,bhtv->bsv", P, do)',
                    'dv = np.einsum("bhts,bhtv->bsv", P, do) / q.shape[1]',
                ),
            ),
        ),
        Wrong(
            "no sum over the heads",
            "bhts,bhtd->bsd",
            "bhts,bhtd->bhsd",
            "One key and one value serve all heads: sum over h too, so that dk and dv "
            "get the shapes of k and v. (MLA's most common bug.)",
            (("bhts,bhtv->bsv", "bhts,bhtv->bhsv"),),
        ),
        Wrong(
            "dk and dv of the first head only",
            'dk = np.einsum("bhts,bhtd->bsd", dS, q)',
            "dk = dS[:, 0].swapaxes(1, 2) @ q[:, 0]",
            "One key and one value serve all heads, so their gradients are sums over "
            "all heads.",
            (
                (
                    'dv = np.einsum("bhts,bhtv->bsv", P, do)',
                    "dv = P[:, 0].swapaxes(1, 2) @ do[:, 0]",
                ),
            ),
        ),
        Wrong(
            "dk and dv of the last head only",
            'dk = np.einsum("bhts,bhtd->bsd", dS, q)',
            "dk = dS[:, -1].swapaxes(1, 2) @ q[:, -1]",
            "What is shared, sums. In a loop over the heads, dk and dv grow by +=; "
            "with = each head replaces the one before.",
            (
                (
                    'dv = np.einsum("bhts,bhtv->bsv", P, do)',
                    "dv = P[:, -1].swapaxes(1, 2) @ do[:, -1]",
                ),
            ),
        ),
        Wrong(
            "the scale used twice",
            "scale * softmax_backward(dP, P)",
            "scale**2 * softmax_backward(dP, P)",
            "The scores carry one scale, so it enters dq once and dk once: in dS, or "
            "in the products with k and q, but not in both.",
        ),
        Wrong(
            "the scale forgotten in dk",
            '"bhts,bhtd->bsd", dS, q',
            '"bhts,bhtd->bsd", dS / scale, q',
            "The scores are scale * q k: the scale enters the gradient of k as it "
            "enters that of q.",
        ),
        Wrong(
            "the scale forgotten in dq",
            '"bhts,bsd->bhtd", dS, k',
            '"bhts,bsd->bhtd", dS / scale, k',
            "The scores are scale * q k: the scale enters the gradient of q as it "
            "enters that of k.",
        ),
        Wrong(
            "a scale of its own",
            "scale * softmax_backward(dP, P)",
            "q.shape[-1] ** -0.5 * softmax_backward(dP, P)",
            "The scale is an argument, and need not be d^-1/2. (In MLA it is not.)",
        ),
        Wrong(
            "the arguments of softmax_backward exchanged",
            "softmax_backward(dP, P)",
            "softmax_backward(P, dP)",
            "softmax_backward takes the gradient first: dP, then P.",
        ),
        Wrong(
            "dq and dk exchanged",
            "return dq, dk, dv",
            "return dk, dq, dv",
            "Return dq, dk, dv, in this order: dq has the shape of q.",
        ),
    ),
    right=(
        "def attention_backward(do, q, k, v, P, scale):\n"
        "    k, v = k[:, None], v[:, None]\n"
        "    dS = softmax_backward(do @ v.swapaxes(2, 3), P)\n"
        "    dv = (P.swapaxes(2, 3) @ do).sum(1)\n"
        "    dk = (dS.swapaxes(2, 3) @ (q * scale)).sum(1)\n"
        "    return dS @ k * scale, dk, dv\n",
        "def attention_backward(do, q, k, v, P, scale):\n"
        "    B, H, T, S = P.shape\n"
        "    rows = lambda x: x.reshape(B, H * T, -1)\n"
        "    o = P @ v[:, None]\n"
        "    dP = do @ v[:, None].swapaxes(2, 3)\n"
        "    dS = scale * P * (dP - (do * o).sum(-1, keepdims=True))\n"
        "    dk = rows(dS).swapaxes(1, 2) @ rows(q)\n"
        "    dv = rows(P).swapaxes(1, 2) @ rows(do)\n"
        "    return dS @ k[:, None], dk, dv\n",
    ),
)

CHECKS = [ATTENTION]
