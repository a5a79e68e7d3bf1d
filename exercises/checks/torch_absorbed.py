"""Chapter 6, MLA: the absorbed form by torch's own attention."""

from types import SimpleNamespace

import numpy as np
from grader.spec import Case, Check, Wrong
from grader.tensors import arriving

from checks.draws import normal
from checks.mla_absorbed import too_large_for_keys
from minidsv3.mla import numpy_ref as library


def cache(
    B: int, T: int, S: int, N_h: int, widths: tuple[int, ...], scale: float, seed: int
) -> Case:
    """The last T of S positions; widths are d_h, d_R, d_v, d_c."""
    d_h, d_R, d_v, d_c = widths
    label = f"B={B}, T={T} of S={S}, {N_h} heads, d_h={d_h}, d_R={d_R}, d_v={d_v}, "
    return Case(
        f"{label}d_c={d_c}",
        (
            # in memory, positions before heads: as a layer makes them
            normal(B, T, N_h, d_h, seed=seed).swapaxes(1, 2),
            normal(B, T, N_h, d_R, seed=seed + 1).swapaxes(1, 2),
            normal(B, S, d_c + d_R, seed=seed + 2),
            normal(N_h * (d_h + d_v), d_c, seed=seed + 3),
            scale,
        ),
    )


def overflow() -> Case:
    """That of mla.3, heads in front."""
    case = too_large_for_keys()
    q_C, q_R, *rest = case.args
    args = (q_C.swapaxes(1, 2), q_R.swapaxes(1, 2), *rest)
    return Case(case.label, args, graph=False)


def oracle(
    q_C: np.ndarray, q_R: np.ndarray, kept: np.ndarray, W: np.ndarray, scale: float
) -> object:
    """The library's NumPy reference, with positions before heads."""
    _, N_h, _, d_h = q_C.shape
    d_R, d_c = q_R.shape[-1], W.shape[-1]
    config = SimpleNamespace(
        num_attention_heads=N_h, qk_nope_head_dim=d_h, qk_rope_head_dim=d_R,
        v_head_dim=len(W) // N_h - d_h, kv_lora_rank=d_c, rope_scaling=None,
        qk_head_dim=scale**-2,
    )  # fmt: skip
    q_C, q_R = q_C.swapaxes(1, 2), q_R.swapaxes(1, 2)
    o, saved = library.absorbed_forward(W, q_C, q_R, kept, config)
    o = o.swapaxes(1, 2)
    if q_C.dtype == np.float32:
        return o
    do = arriving(o.shape).swapaxes(1, 2)
    dW, dq_C, dq_R, dkept = library.absorbed_backward(do, saved)
    return o, dq_C.swapaxes(1, 2), dq_R.swapaxes(1, 2), dkept, dW


KEY = "k = kept[:, None].expand(-1, N_h, -1, -1)"

ABSORBED = Check(
    "mla.torch.2",
    returns=("o",),
    gradients={"dq_C": 0, "dq_R": 1, "dkept": 2, "dW_UKV": 3},
    oracle=oracle,
    cases=lambda: [
        Case(
            "two positions, one head of 1 + 2 numbers",
            (
                np.array([[[[1.0], [-1.0]]]]),
                np.array([[[[0.0, 1.0], [2.0, 0.0]]]]),
                np.array([[[1.0, 0.0, 1.0], [2.0, -1.0, 0.5]]]),
                np.array([[2.0], [3.0]]),
                0.5,
            ),
        ),
        cache(B=2, T=3, S=3, N_h=2, widths=(3, 2, 4, 5), scale=0.45, seed=10),
        cache(B=1, T=2, S=5, N_h=3, widths=(2, 4, 1, 3), scale=0.77, seed=20),
        cache(B=2, T=1, S=4, N_h=2, widths=(3, 2, 3, 2), scale=0.2, seed=30),
        cache(B=3, T=3, S=3, N_h=1, widths=(2, 6, 4, 6), scale=0.35, seed=40),
        cache(B=1, T=4, S=6, N_h=3, widths=(4, 4, 4, 4), scale=0.5, seed=50),
        overflow(),
    ],
    hints=(
        "A matrix for each head is a batch of matrices. Cut W_UKV into one; the "
        "product of (B, N_h, T, d_h) with (N_h, d_h, d_c) does the rest.",
        "`W = W_UKV.unflatten(0, (N_h, -1))` is (N_h, d_h + d_v, d_c). The query is "
        "`torch.cat([q_C @ W_UK, q_R], dim=-1)`, d_c + d_R numbers a head; the key is "
        "`kept[:, None]`, for all heads, and its first d_c numbers are the value. "
        "`.expand` copies nothing.",
        "`seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)`, then `o = F."
        "scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)` and `o @ "
        "W_UV.mT`.",
    ),
    wrong=(
        Wrong(
            "the scale that torch guesses",
            ", scale=scale)",
            ")",
            "Not told, torch divides by the root of the width that it sees, d_c + d_R. "
            "The scores are those of the naive form, so their scale is handed in.",
        ),
        Wrong(
            "scaled twice",
            "(q, k, v, attn_mask=seen, scale=scale)",
            "(scale * q, k, v, attn_mask=seen)",
            "torch's attention divides by the root of the width of q unless it is told "
            "a scale. Hand it yours: scale=scale.",
        ),
        Wrong(
            "is_causal with a past",
            "attn_mask=seen",
            "is_causal=True",
            "torch's causal mask lets the first query see the first key alone. Yours "
            "are the last T of S: with a cache the first one sees S - T + 1 keys.",
        ),
        Wrong(
            "True for what is hidden",
            ".tril(S - T)",
            ".triu(S - T + 1)",
            "In a mask of truth values True means: takes part. It is the other way "
            "round than in masked_fill.",
        ),
        Wrong(
            "the future seen",
            "attn_mask=seen, ",
            "",
            "Nothing hides the future unless you say so: a mask of (T, S), True where "
            "a key may be seen.",
        ),
        Wrong(
            "the keys made after all",
            "q = torch.cat([q_C @ W_UK, q_R], dim=-1)",
            "q = torch.cat([q_C, q_R], dim=-1)",
            "That is the naive form: W_UK times each token's latent, for each head. "
            "Multiply it with the query, and attend to the latents.",
            (
                (
                    KEY,
                    "c, k_R = kept[:, None, :, :d_c], kept[:, None, :, d_c:]\n"
                    "    k_R = k_R.expand(-1, N_h, -1, -1)\n"
                    "    k = torch.cat([c @ W_UK.mT, k_R], dim=-1)",
                ),
                ("v = k[..., :d_c]", "v = c.expand(-1, N_h, -1, -1)"),
            ),
        ),
        Wrong(
            "the values made after all",
            "v = k[..., :d_c]",
            "v = k[..., :d_c] @ W_UV.mT",
            "You multiply W_UV with each token's latent. Sum the latents first, and "
            "multiply the sum.",
            (("return o @ W_UV.mT", "return o"),),
        ),
        Wrong(
            "W_UK transposed",
            "q_C @ W_UK,",
            "q_C @ W_UK.mT,",
            "nn.Linear multiplies with the transpose, and that made keys of latents. "
            "The query goes the other way: (T, d_h) @ (d_h, d_c).",
        ),
        Wrong(
            "W_UV not transposed",
            "o @ W_UV.mT",
            "o @ W_UV",
            "W_UV is (d_v, d_c), o is (T, d_c): as in nn.Linear, the transpose is "
            "needed, `.mT` for a batch.",
        ),
        Wrong(
            "the rotated key left out",
            "torch.cat([q_C @ W_UK, q_R], dim=-1)",
            "q_C @ W_UK",
            "Only the content is absorbed. The rotated key stands behind the latent, "
            "and q_R behind the query: positions come from there.",
            ((KEY, "k = kept[:, None, :, :d_c].expand(-1, N_h, -1, -1)"),),
        ),
        Wrong(
            "all keys first, then all values",
            "W_UK, W_UV = W[:, :d_h], W[:, d_h:]",
            "W_UK, W_UV = (\n"
            "        part.unflatten(0, (N_h, -1))\n"
            "        for part in (W_UKV[: N_h * d_h], W_UKV[N_h * d_h :])\n"
            "    )",
            "The rows of W_UKV lie head by head: the first head's key and its value, "
            "then the second head's. Cut into heads first.",
        ),
        Wrong(
            "heads dealt out like cards",
            "W_UKV.unflatten(0, (N_h, -1))",
            "W_UKV.unflatten(0, (-1, N_h)).transpose(0, 1)",
            "A head's d_h + d_v rows lie together, so the axis of heads comes first.",
        ),
        Wrong(
            "a cache that learns nothing",
            KEY,
            "k = kept.detach()[:, None].expand(-1, N_h, -1, -1)",
            "What is cached in generation is no constant in training: latents and key "
            "learn through it.",
        ),
    ),
    right=(
        "def attend_absorbed(q_C, q_R, kept, W_UKV, scale):\n"
        "    B, N_h, T, d_h = q_C.shape\n"
        "    d_c, S = W_UKV.shape[-1], kept.shape[1]\n"
        "    W = W_UKV.reshape(N_h, -1, d_c)\n"
        "    c, k_R = kept[..., :d_c], kept[..., d_c:]\n"
        "    q = torch.einsum('bhtd,hdc->bhtc', q_C, W[:, :d_h])\n"
        "    s = torch.einsum('bhtc,bsc->bhts', q, c)\n"
        "    s = scale * (s + torch.einsum('bhtr,bsr->bhts', q_R, k_R))\n"
        "    future = torch.arange(S) > torch.arange(S - T, S)[:, None]\n"
        "    P = s.masked_fill(future, float('-inf')).softmax(-1)\n"
        "    o = torch.einsum('bhts,bsc->bhtc', P, c)\n"
        "    return torch.einsum('bhtc,hvc->bhtv', o, W[:, d_h:])\n",
        "def attend_absorbed(q_C, q_R, kept, W_UKV, scale):\n"
        "    N_h, T, d_h = q_C.shape[1:]\n"
        "    out, d_c, S = [], W_UKV.shape[1], kept.shape[1]\n"
        "    mask = torch.full((T, S), -torch.inf, dtype=kept.dtype).triu(S - T + 1)\n"
        "    for h, W in enumerate(W_UKV.chunk(N_h)):\n"
        "        q = torch.cat((q_C[:, h] @ W[:d_h], q_R[:, h]), 2)\n"
        "        P = torch.softmax(torch.baddbmm(mask, q, kept.mT, alpha=scale), 2)\n"
        "        out.append(F.linear(torch.bmm(P, kept[..., :d_c]), W[d_h:]))\n"
        "    return torch.stack(out, 1)\n",
        "def attend_absorbed(q_C, q_R, kept, W_UKV, scale):\n"
        "    (B, N_h, T, d_h), d_c = q_C.shape, W_UKV.shape[1]\n"
        "    W_UK, W_UV = W_UKV.view(N_h, -1, d_c).tensor_split([d_h], 1)\n"
        "    q = torch.cat([torch.matmul(q_C, W_UK), q_R], -1).flatten(1, 2)\n"
        "    S = kept.shape[1]\n"
        "    seen = torch.tril(torch.ones(T, S), S - T).log().repeat(N_h, 1)\n"
        "    o = F.scaled_dot_product_attention(\n"
        "        q, kept, kept[..., :d_c], seen.to(q.dtype), scale=scale)\n"
        "    return o.unflatten(1, (N_h, T)) @ W_UV.transpose(-2, -1)\n",
    ),
)

CHECKS = [ABSORBED]
