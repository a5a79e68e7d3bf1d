"""Chapter 4: judges of the MLA exercises.

Each reference faces the library and torch; gradients face autograd and central
differences of a forward pass in torch's words.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from minidsv3.config import TINY, V3, Config
from minidsv3.mla import numpy_ref as library
from minidsv3.primitives import numpy_ref as primitives

from ..judging import FORWARD, Rng, agree, differences, grads_of, leaf, sizes
from ..oracles import AUTOGRAD, DIFFERENCES

WIDTHS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")


def config_of(N_h: int, *widths: int, **more: object) -> Config:
    """The library's config of some heads; widths are d_h, d_R, d_v, d_c."""
    named = dict(zip(WIDTHS, widths, strict=True), num_attention_heads=N_h)
    return replace(TINY, num_key_value_heads=N_h, **named, **more)


def widths(rng: Rng) -> tuple[int, int, int, int, int]:
    """N_h, d_h, d_R, d_v, d_c; pairs need an even d_R."""
    N_h, d_h, half, d_v, d_c = sizes(rng, 5, high=5)
    return N_h, d_h, 2 * half, d_v, d_c


def turned(x: torch.Tensor, positions: np.ndarray) -> torch.Tensor:
    """RoPE in torch's complex numbers: x (B, T, …, d)."""
    d = x.shape[-1]
    theta = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = torch.outer(torch.tensor(positions, dtype=torch.float64), theta)
    turn = torch.polar(torch.ones_like(angle), angle)  # (T, d/2)
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turn = turn[:, None] if x.ndim == 4 else turn
    return torch.view_as_real(z * turn).flatten(-2)


def kept_in_torch(x, W_DKV, g, positions: np.ndarray, eps: float) -> torch.Tensor:
    a, k = F.linear(x, W_DKV).split([len(g), len(W_DKV) - len(g)], dim=-1)
    return torch.cat([F.rms_norm(a, g.shape, g, eps), turned(k, positions)], dim=-1)


def latents(f: Callable, rng: Rng) -> None:
    (_, _, d_R, _, d_c), (B, T, D) = widths(rng), sizes(rng, 3)
    positions = rng.integers(0, 999, T)
    x, W = rng.normal(size=(B, T, D)), rng.normal(size=(d_c + d_R, D))
    g, eps = rng.normal(size=d_c), float(rng.choice([1e-6, 0.3]))
    theirs = kept_in_torch(*map(torch.tensor, (x, W, g)), positions, eps)
    # at position 999 an angle is known to some 1e-13
    agree(f(x, W, g, positions, eps), theirs.numpy(), 10 * FORWARD)
    params = {"kv_a_proj_with_mqa.weight": W, "kv_a_layernorm.weight": g}
    config = config_of(2, 3, d_R, 3, d_c)
    frequencies = primitives.rope_frequencies(config)
    rotation = primitives.rope_rotation(positions, frequencies, x.dtype)
    by_library, _ = library.latents_forward(params, x, config, rotation)
    agree(f(x, W, g, positions), by_library, 10 * FORWARD)


# --- the two forms ----------------------------------------------------------------


def core(rng: Rng) -> tuple[list[np.ndarray], Config]:
    """q_C, q_R, kept, W_UKV, and the config they belong to."""
    (N_h, d_h, d_R, d_v, d_c), (B, T, more) = widths(rng), sizes(rng, 3, high=5)
    S = T + more - 1
    shapes = [
        (B, T, N_h, d_h), (B, T, N_h, d_R), (B, S, d_c + d_R), (N_h * (d_h + d_v), d_c),
    ]  # fmt: skip
    return [rng.normal(size=s) for s in shapes], config_of(N_h, d_h, d_R, d_v, d_c)


def in_torch(q_C, q_R, kept, W_UKV, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and weights, head by head; the mask is torch's own."""
    (_, T, N_h, d_h), (_, S, _), d_c = q_C.shape, kept.shape, W_UKV.shape[1]
    c, k_R = kept[..., :d_c], kept[..., d_c:]
    future = torch.ones(T, S, dtype=bool).triu(S - T + 1)
    o, P = [], []
    for head, W in enumerate(W_UKV.chunk(N_h)):
        k = torch.cat([F.linear(c, W[:d_h]), k_R], dim=-1)
        q = torch.cat([q_C[:, :, head], q_R[:, :, head]], dim=-1)
        scores = alpha * torch.baddbmm(torch.zeros(()).to(q), q, k.mT)
        P.append(scores.masked_fill(future, -torch.inf).softmax(dim=-1))
        o.append(P[-1] @ F.linear(c, W[d_h:]))
    return torch.stack(o, dim=2), torch.stack(P, dim=1)


def of_either_form(f: Callable, rng: Rng, of_library: Callable) -> None:
    arrays, config = core(rng)
    alpha = float(rng.uniform(0.1, 2))
    theirs = in_torch(*map(torch.tensor, arrays), alpha)
    agree(f(*arrays, alpha), [t.numpy() for t in theirs], FORWARD)
    q_C, q_R, kept, W_UKV = arrays
    by_library, _ = of_library(W_UKV, q_C, q_R, kept, config)
    o, _ = f(*arrays, primitives.softmax_scale(config))
    agree(o, by_library, FORWARD)


def naive_forward(f: Callable, rng: Rng) -> None:
    of_either_form(f, rng, library.naive_forward)


def absorbed_forward(f: Callable, rng: Rng) -> None:
    """Right, and without a key or a value of any head: counted, not believed."""
    of_either_form(f, rng, library.absorbed_forward)
    arrays = core(rng)[0]
    d_c = arrays[3].shape[1]
    arrays[2] = np.repeat(arrays[2][:1], 40, axis=1).view(Watched)
    arrays[3] = arrays[3].view(Watched)
    arrays[:2] = (q[:1] for q in arrays[:2])
    Watched.seen = []
    f(*arrays, 0.5)
    S, N_h = arrays[2].shape[1], arrays[0].shape[2]
    for shapes in Watched.seen:
        of_tokens = any(S in s and d_c in s for s in shapes)
        of_heads = any(len(s) == 3 and s[0] == N_h and S not in s for s in shapes)
        assert not (of_tokens and of_heads), f"a product of {shapes}"


class Watched(np.ndarray):
    """Remembers which shapes met in a product."""

    seen: list[list[tuple]] = []  # noqa: RUF012 – one record for a call

    def __array_function__(self, function, types, args, kwargs):
        if function is np.einsum:
            Watched.seen.append([np.shape(a) for a in args[1:]])
        return super().__array_function__(function, types, args, kwargs)

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        if ufunc is np.matmul:
            Watched.seen.append([np.shape(a) for a in inputs])
        plain = [np.asarray(a) for a in inputs]
        return np.asarray(getattr(ufunc, method)(*plain, **kwargs)).view(Watched)


def of_either_backward(f: Callable, rng: Rng, forward: Callable, back: Callable):
    arrays, config = core(rng)
    alpha = float(rng.uniform(0.1, 2))
    leaves = [leaf(a) for a in arrays]
    o, P = in_torch(*leaves, alpha)
    do = rng.normal(size=o.shape)
    ours = f(do, *arrays, P.detach().numpy(), alpha)
    agree(ours, grads_of(o, do, *leaves), AUTOGRAD)

    def numbers(*given):
        return in_torch(*map(torch.tensor, given), alpha)[0].numpy()

    agree(ours, differences(numbers, do, *arrays), DIFFERENCES)
    q_C, q_R, kept, W_UKV = arrays
    _, saved = forward(W_UKV, q_C, q_R, kept, config)
    dW, dq_C, dq_R, dkept = back(do, saved)
    alpha = primitives.softmax_scale(config)
    P = in_torch(*map(torch.tensor, arrays), alpha)[1].numpy()
    agree(f(do, *arrays, P, alpha), [dq_C, dq_R, dkept, dW], AUTOGRAD)


def naive_backward(f: Callable, rng: Rng) -> None:
    of_either_backward(f, rng, library.naive_forward, library.naive_backward)


def absorbed_backward(f: Callable, rng: Rng) -> None:
    of_either_backward(f, rng, library.absorbed_forward, library.absorbed_backward)


# --- decoding, YaRN ---------------------------------------------------------------


def decode(f: Callable, rng: Rng) -> None:
    """A text in pieces, with refused drafts between, against the text at once."""
    (N_h, d_h, d_R, d_v, d_c), (B, D) = widths(rng), sizes(rng, 2)
    alpha, pieces = (d_h + d_R) ** -0.5, [3, 1, 2, 1]
    T = sum(pieces)
    x, q = rng.normal(size=(B, T, D)), rng.normal(size=(B, T, N_h, d_h + d_R))
    W, g = rng.normal(size=(d_c + d_R, D)), rng.normal(size=d_c)
    W_UKV = rng.normal(size=(N_h * (d_h + d_v), d_c))
    at = np.arange(T)
    t = torch.tensor
    whole = kept_in_torch(t(x), t(W), t(g), at, 1e-6)
    q_R = turned(t(q[..., d_h:].copy()), at)
    o, _ = in_torch(t(q[..., :d_h]), q_R, whole, t(W_UKV), alpha)
    cache, length = np.empty((B, 0, d_c + d_R)), 0
    for piece in pieces:
        now = slice(length, length + piece)
        out, cache = f(cache, length, x[:, now], q[:, now], W, g, W_UKV, alpha)
        length += piece
        agree(out, o[:, now].numpy(), 10 * FORWARD)
        agree(cache, whole[:, :length].numpy(), 10 * FORWARD)
        draft = rng.normal(size=(B, int(rng.integers(0, 3)), d_c + d_R))
        cache = np.concatenate([cache, draft], axis=1)


def yarn(f: Callable, rng: Rng) -> None:
    """Pair by pair from its definition; against the library; and V3's own numbers."""
    d_h, d_R = int(rng.integers(1, 99)), 2 * int(rng.integers(4, 40))
    s, L = float(rng.uniform(1, 50)), int(rng.integers(500, 9000))
    b, slow = float(rng.choice([1e4, 5e5])), int(rng.integers(1, 4))
    theta, alpha = f(d_h, d_R, s, L, b, 32, slow)
    scaling = replace(
        V3.rope_scaling, factor=s, original_max_position_embeddings=L, beta_slow=slow
    )
    config = config_of(
        2, d_h, d_R, 3, 5, rope_theta=b, rope_scaling=scaling, max_position_embeddings=L
    )
    agree(theta, primitives.rope_frequencies(config), FORWARD)
    agree(alpha, primitives.softmax_scale(config), FORWARD)
    old = np.array([b ** (-2 * j / d_R) for j in range(d_R // 2)])
    turns = L * old / (2 * np.pi)
    share = np.interp(theta / old, [1 / s, 1], [1, 0]) if s > 1 else 0 * old
    assert np.all(theta[turns > 32] == old[turns > 32])
    assert np.all(np.diff(share) >= -1e-9)
    theta, alpha = f(128, 64, 40.0, 4096)
    agree(theta, primitives.rope_frequencies(V3), FORWARD)
    np.testing.assert_allclose(alpha, 0.1352338, rtol=1e-6)
    ratio = theta * 10000.0 ** (np.arange(32) / 32)
    assert np.allclose(ratio[:11], 1) and np.allclose(ratio[23:], 1 / 40)
    assert np.all((ratio[11:23] < 1) & (ratio[11:23] > 1 / 40))
    # a short base: the limits, which no released model reaches
    theta, _ = f(4, 8, 3.0, 4096, 10.0, 200, 1)
    low = np.floor(8 * np.log(4096 / (400 * np.pi)) / (2 * np.log(10)))
    ramp = np.clip((np.arange(4) - low) / (7 - low), 0, 1)
    agree(theta, 10.0 ** (-np.arange(4) / 4) * (1 - ramp * 2 / 3), FORWARD)
    theta, _ = f(4, 8, 3.0, 60)  # no pair turns 32 times
    high = np.ceil(8 * np.log(60 / (2 * np.pi)) / (2 * np.log(10000)))
    ramp = np.clip(np.arange(4) / high, 0, 1)
    agree(theta, 10000.0 ** (-np.arange(4) / 4) * (1 - ramp * 2 / 3), FORWARD)


# --- the layer --------------------------------------------------------------------

NAMES = ("W_DQ", "g_Q", "W_UQ", "W_DKV", "g_KV", "W_UKV", "W_O")
KEYS = (
    "q_a_proj.weight", "q_a_layernorm.weight", "q_b_proj.weight",
    "kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight", "kv_b_proj.weight",
    "o_proj.weight",
)  # fmt: skip


def layer_in_torch(x, weights: list, positions, N_h: int, alpha: float, eps: float):
    W_DQ, g_Q, W_UQ, W_DKV, g_KV, W_UKV, W_O = weights
    d_R = len(W_DKV) - len(g_KV)
    q = F.linear(F.rms_norm(F.linear(x, W_DQ), g_Q.shape, g_Q, eps), W_UQ)
    q = q.unflatten(-1, (N_h, -1))
    q_C, q_R = q.split([q.shape[-1] - d_R, d_R], dim=-1)
    kept = kept_in_torch(x, W_DKV, g_KV, positions, eps)
    o, _ = in_torch(q_C, turned(q_R, positions), kept, W_UKV, alpha)
    return F.linear(o.flatten(2), W_O)


def layer(f: Callable, rng: Rng) -> None:
    (N_h, d_h, d_R, d_v, d_c), (B, T, D, d_cq) = widths(rng), sizes(rng, 4, low=2)
    shapes = [
        (d_cq, D), (d_cq,), (N_h * (d_h + d_R), d_cq), (d_c + d_R, D), (d_c,),
        (N_h * (d_h + d_v), d_c), (D, N_h * d_v),
    ]  # fmt: skip
    arrays = [rng.normal(size=shape) for shape in shapes]
    params = dict(zip(NAMES, arrays, strict=True))
    x, dy = rng.normal(size=(B, T, D)), rng.normal(size=(B, T, D))
    at, alpha = rng.integers(0, 99, T), float(rng.uniform(0.1, 1))
    for absorb, eps in ((False, 0.1), (True, 0.2)):
        y, dx, grads = f(params, x, dy, at, N_h, alpha, absorb, eps)
        leaves = [leaf(x), *map(leaf, arrays)]
        out = layer_in_torch(leaves[0], leaves[1:], at, N_h, alpha, eps)
        agree(y, out.detach().numpy(), 10 * FORWARD)
        ours = (dx, *(grads[name] for name in NAMES))
        agree(ours, grads_of(out, dy, *leaves), AUTOGRAD)
    config = config_of(N_h, d_h, d_R, d_v, d_c, hidden_size=D, q_lora_rank=d_cq)
    rotation = primitives.rope_rotation(
        at, primitives.rope_frequencies(config), x.dtype
    )
    by_key = dict(zip(KEYS, arrays, strict=True))
    out, saved = library.mla_forward(by_key, x, config, rotation)
    dx_library, by_key = library.mla_backward(dy, saved)
    y, dx, grads = f(params, x, dy, at, N_h, primitives.softmax_scale(config))
    agree(y, out, 10 * FORWARD)
    theirs = [dx_library, *(by_key[key] for key in KEYS)]
    agree((dx, *(grads[name] for name in NAMES)), theirs, AUTOGRAD)


JUDGES = {
    "mla.1": latents,
    "mla.2": naive_forward,
    "mla.3": absorbed_forward,
    "mla.4": decode,
    "mla.5": yarn,
    "mla.6": naive_backward,
    "mla.7": absorbed_backward,
    "mla.8": layer,
}
