r"""Causal attention with grouped heads, and the cache that decoding keeps.

One core serves every kind of attention in the book. With as many key heads as query
heads it is multi-head attention (MHA), with fewer it is grouped-query attention (GQA),
with one it is multi-query attention (MQA), and MLA in its absorbed form is MQA with
wide heads.
"""

import numpy as np

from minidsv3.config import Config
from minidsv3.primitives.cache import Cache
from minidsv3.primitives.numpy_ref import (
    linear_backward,
    linear_forward,
    rope_backward,
    rope_forward,
    softmax,
    softmax_backward,
    softmax_scale,
)

Array = np.ndarray


def _fold(x: Array, N_kv: int) -> Array:
    """(B, T, N_h, d) -> (B, N_kv, R*T, d), so that R heads share one matrix of keys.

    Their queries become rows of one matrix; a sum over rows is then a sum over heads.
    """
    B, T, N_h, d = x.shape
    R = N_h // N_kv
    x = x.reshape(B, T, N_kv, R, d)  # (B, T, N_kv, R, d)
    x = x.transpose(0, 2, 3, 1, 4)  # (B, N_kv, R, T, d)
    return x.reshape(B, N_kv, R * T, d)  # (B, N_kv, R*T, d)


def _unfold(x: Array, T: int) -> Array:
    """The inverse of `_fold`: (B, N_kv, R*T, d) -> (B, T, N_h, d)."""
    B, N_kv, RT, d = x.shape
    x = x.reshape(B, N_kv, RT // T, T, d)  # (B, N_kv, R, T, d)
    x = x.transpose(0, 3, 1, 2, 4)  # (B, T, N_kv, R, d)
    return x.reshape(B, T, N_kv * (RT // T), d)  # (B, T, N_h, d)


def _causal_bias(T: int, S: int, dtype: np.dtype) -> Array:
    """0 where query i (the i-th of the last T among S) may look, -inf where not."""
    future = np.arange(S) > np.arange(S - T, S)[:, None]  # (T, S)
    return np.where(future, -np.inf, 0.0).astype(dtype)


def causal_attention_forward(
    q: Array, k: Array, v: Array, scale: float
) -> tuple[Array, tuple]:
    r"""Scaled dot-product attention, :math:`o = \mathrm{softmax}(α\,q k^\top)\,v`.

    The T queries are the last T of the S positions, so a cached past needs no other
    mask. Shapes: q (B, T, N_h, d_k), k (B, S, N_kv, d_k), v (B, S, N_kv, d_v)
    -> o (B, T, N_h, d_v). d_v may differ from d_k. Raises ValueError if T > S or
    N_kv does not divide N_h, or if q, k and v do not belong together.
    """
    B, T, N_h, d_k = q.shape
    S, N_kv = k.shape[1:3]
    if v.shape[:3] != (B, S, N_kv) or k.shape != (B, S, N_kv, d_k):
        raise ValueError(
            f"attention: q {q.shape}, k {k.shape}, v {v.shape}; batch, positions and "
            "heads of k and v must agree, and the width of q and k"
        )
    if T > S or N_h % N_kv:
        raise ValueError(
            f"attention: {T} queries over {S} keys and {N_h} query heads over {N_kv} "
            "key heads; needs T ≤ S, and key heads that divide the query heads"
        )
    q_f = _fold(q, N_kv)  # (B, N_kv, R*T, d_k)
    k_f = k.transpose(0, 2, 1, 3)  # (B, N_kv, S, d_k)
    v_f = v.transpose(0, 2, 1, 3)  # (B, N_kv, S, d_v)
    scores = (q_f @ k_f.swapaxes(-1, -2)) * scale  # (B, N_kv, R*T, S)
    per_query = scores.reshape(B, N_kv, N_h // N_kv, T, S)  # (B, N_kv, R, T, S)
    P = softmax(per_query + _causal_bias(T, S, q.dtype))  # (B, N_kv, R, T, S)
    P = P.reshape(scores.shape)  # (B, N_kv, R*T, S)
    o = _unfold(P @ v_f, T)  # (B, T, N_h, d_v)
    return o, (q_f, k_f, v_f, P, scale, T)


def causal_attention_backward(do: Array, saved: tuple) -> tuple[Array, Array, Array]:
    """Gradients of the core: dq (B, T, N_h, d_k), dk and dv (B, S, N_kv, ...).

    A key head serves R query heads; since those lie folded along the rows, the sum of
    their gradients is the matrix product itself.
    """
    q_f, k_f, v_f, P, scale, T = saved
    do_f = _fold(do, k_f.shape[1])  # (B, N_kv, R*T, d_v)
    dv_f = P.swapaxes(-1, -2) @ do_f  # (B, N_kv, S, d_v)
    dP = do_f @ v_f.swapaxes(-1, -2)  # (B, N_kv, R*T, S)
    dS = softmax_backward(dP, P) * scale  # (B, N_kv, R*T, S)
    dq_f = dS @ k_f  # (B, N_kv, R*T, d_k)
    dk_f = dS.swapaxes(-1, -2) @ q_f  # (B, N_kv, S, d_k)
    dq = _unfold(dq_f, T)  # (B, T, N_h, d_k)
    dk = dk_f.transpose(0, 2, 1, 3)  # (B, S, N_kv, d_k)
    dv = dv_f.transpose(0, 2, 1, 3)  # (B, S, N_kv, d_v)
    return dq, dk, dv


def attention_forward(
    params: dict[str, Array],
    x: Array,
    config: Config,
    rotation: Array,
    cache: Cache | None = None,
) -> tuple[Array, tuple | None]:
    """Plain attention of one block: project, rotate, attend, project back.

    Parameters: q_proj.weight (N_h*d, D), k_proj.weight (N_kv*d, D), v_proj.weight
    (N_kv*d_v, D), o_proj.weight (D, N_h*d_v), with d = qk_rope_head_dim and
    d_v = v_head_dim. rotation comes from `rope_rotation`. With a cache, x continues
    what it holds, and ``saved`` is None: decoding is not trained through.
    Shapes: x (B, T, D) -> (B, T, D).
    """
    B, T, _ = x.shape
    q, saved_q = linear_forward(x, params["q_proj.weight"])
    k, saved_k = linear_forward(x, params["k_proj.weight"])
    v, saved_v = linear_forward(x, params["v_proj.weight"])
    q = q.reshape(B, T, config.num_attention_heads, -1)  # (B, T, N_h, d)
    k = k.reshape(B, T, config.num_key_value_heads, -1)  # (B, T, N_kv, d)
    v = v.reshape(B, T, config.num_key_value_heads, -1)  # (B, T, N_kv, d_v)
    q, saved_rope = rope_forward(q, rotation)
    k, _ = rope_forward(k, rotation)
    if cache is not None:
        k, v = cache.extend(k, v)  # (B, S, N_kv, d), (B, S, N_kv, d_v)
    o, saved_core = causal_attention_forward(q, k, v, softmax_scale(config))
    o = o.reshape(B, T, -1)  # (B, T, N_h*d_v)
    y, saved_o = linear_forward(o, params["o_proj.weight"])
    if cache is not None:
        return y, None
    return y, (saved_q, saved_k, saved_v, saved_rope, saved_core, saved_o)


def attention_backward(dy: Array, saved: tuple) -> tuple[Array, dict[str, Array]]:
    """Gradients of `attention_forward`: its lines in reverse.

    x was read three times, so dx is a sum of three. Returns dx (B, T, D) and the
    gradients under the parameters' names.
    """
    saved_q, saved_k, saved_v, saved_rope, saved_core, saved_o = saved
    B, T, _ = dy.shape
    do, dW_o = linear_backward(dy, saved_o)
    d_v = saved_core[2].shape[-1]
    do = do.reshape(B, T, -1, d_v)  # (B, T, N_h, d_v)
    dq, dk, dv = causal_attention_backward(do, saved_core)
    dq = rope_backward(dq, saved_rope).reshape(B, T, -1)  # (B, T, N_h*d)
    dk = rope_backward(dk, saved_rope).reshape(B, T, -1)  # (B, T, N_kv*d)
    dv = dv.reshape(B, T, -1)  # (B, T, N_kv*d_v)
    dx_q, dW_q = linear_backward(dq, saved_q)
    dx_k, dW_k = linear_backward(dk, saved_k)
    dx_v, dW_v = linear_backward(dv, saved_v)
    grads = {
        "q_proj.weight": dW_q,
        "k_proj.weight": dW_k,
        "v_proj.weight": dW_v,
        "o_proj.weight": dW_o,
    }
    return dx_q + dx_k + dx_v, grads


def attention_weights(saved: tuple) -> Array:
    """The softmax output inside what `attention_forward` saved: (B, N_h, T, S).

    Each row sums to one and says what its position read.
    """
    _, _, _, P, _, T = saved[4]
    B, N_kv, RT, S = P.shape
    return P.reshape(B, N_kv * RT // T, T, S)  # (B, N_h, T, S)
