"""Chapter 4, a step of decoding: what is kept, and one token more."""

from grader.spec import Case, Check, Wrong

from checks.draws import normal


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
        Wrong(
            "the past alone rotated again",
            "    o, _ =",
            "    again = rope(kept[:, :length, None, -d_R:], np.arange(length))\n"
            "    kept[:, :length, -d_R:] = again[:, :, 0]\n"
            "    o, _ =",
            "The keys of the past were turned before they were kept. A second "
            "time is twice as far.",
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

CHECKS = [DECODE]
