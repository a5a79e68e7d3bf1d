r"""MLA in NumPy: queries, latents, the naive and the absorbed form; all backwards.

Parameters come under DeepSeek's names: ``q_a_proj.weight`` (d_cq, D),
``q_a_layernorm.weight``, ``q_b_proj.weight`` (N_h*(d_h+d_R), d_cq), or a single
``q_proj.weight`` (N_h*(d_h+d_R), D); ``kv_a_proj_with_mqa.weight`` (d_c+d_R, D),
``kv_a_layernorm.weight``, ``kv_b_proj.weight`` (N_h*(d_h+d_v), d_c), ``o_proj.weight``.
Rows of the second projections lie head by head: d_h of content, then d_R that rotate;
d_h of the key, then d_v of the value.
"""

import numpy as np

from minidsv3.config import Config
from minidsv3.parameters import check_shapes, mla_shapes
from minidsv3.primitives.attention_numpy_ref import (
    Cache,
    causal_attention_backward,
    causal_attention_forward,
)
from minidsv3.primitives.numpy_ref import (
    linear_backward,
    linear_forward,
    rmsnorm_backward,
    rmsnorm_forward,
    rope_backward,
    rope_forward,
    softmax_scale,
)

Array = np.ndarray
Params = dict[str, Array]

# The released code builds the norms of the latents with this, whatever rms_norm_eps is.
LATENT_EPS = 1e-6


# --- queries ------------------------------------------------------------------------


def queries_forward(
    params: Params, x: Array, config: Config, rotation: Array
) -> tuple[Array, Array, tuple]:
    """Queries of all heads, through their latent or, without one, from x directly.

    Eqs. (6)–(9). The latent of the queries is not cached; it saves parameters, and
    activations in training. Shapes: x (B, T, D) -> content q_C (B, T, N_h, d_h) and
    rotated q_R (B, T, N_h, d_R).
    """
    B, T, _ = x.shape
    saved_a = None
    if config.q_lora_rank is None:
        q, saved_b = linear_forward(x, params["q_proj.weight"])
    else:
        a, saved_down = linear_forward(x, params["q_a_proj.weight"])
        c_Q, saved_norm = rmsnorm_forward(a, params["q_a_layernorm.weight"], LATENT_EPS)
        q, saved_b = linear_forward(c_Q, params["q_b_proj.weight"])
        saved_a = (saved_down, saved_norm)
    q = q.reshape(B, T, config.num_attention_heads, -1)  # (B, T, N_h, d_h + d_R)
    q_C, q_R = np.split(q, [config.qk_nope_head_dim], axis=-1)
    q_R, saved_rope = rope_forward(q_R, rotation)
    return q_C, q_R, (saved_a, saved_b, saved_rope)


def queries_backward(dq_C: Array, dq_R: Array, saved: tuple) -> tuple[Array, Params]:
    """Gradients of the queries: back through rotation, heads and latent.

    Returns dx (B, T, D) and the gradients under the parameters' names.
    """
    saved_a, saved_b, saved_rope = saved
    B, T, N_h, _ = dq_C.shape
    dq = np.concatenate([dq_C, rope_backward(dq_R, saved_rope)], axis=-1)
    dq = dq.reshape(B, T, -1)  # (B, T, N_h*d)
    dc_Q, dW_b = linear_backward(dq, saved_b)
    if saved_a is None:
        return dc_Q, {"q_proj.weight": dW_b}
    saved_down, saved_norm = saved_a
    da, dg = rmsnorm_backward(dc_Q, saved_norm)
    dx, dW_a = linear_backward(da, saved_down)
    grads = {
        "q_a_proj.weight": dW_a,
        "q_a_layernorm.weight": dg,
        "q_b_proj.weight": dW_b,
    }
    return dx, grads


# --- the latent and the shared key: what is cached ------------------------------------


def latents_forward(
    params: Params, x: Array, config: Config, rotation: Array
) -> tuple[Array, tuple]:
    """What is kept of each token: its latent c_KV, and behind it its rotated key k_R.

    Eqs. (1) and (3). The latent is kept normalised and the key rotated, so neither is
    done again for a token of the past; the norm is on the latent only. No head has a
    key of its own here. Shapes: x (B, T, D) -> (B, T, d_c + d_R).
    """
    kv, saved_down = linear_forward(x, params["kv_a_proj_with_mqa.weight"])
    a, k_R = np.split(kv, [config.kv_lora_rank], axis=-1)  # (B, T, d_c), (B, T, d_R)
    c_KV, saved_norm = rmsnorm_forward(a, params["kv_a_layernorm.weight"], LATENT_EPS)
    k_R, saved_rope = rope_forward(k_R[:, :, None], rotation)  # (B, T, 1, d_R)
    kept = np.concatenate([c_KV, k_R[:, :, 0]], axis=-1)  # (B, T, d_c + d_R)
    return kept, (saved_down, saved_norm, saved_rope)


def latents_backward(dkept: Array, saved: tuple) -> tuple[Array, Params]:
    """Gradients of what is kept. Returns dx (B, T, D), and by the parameters' names."""
    saved_down, saved_norm, saved_rope = saved
    d_c = len(saved_norm[1])
    dc_KV, dk_R = np.split(dkept, [d_c], axis=-1)  # (B, T, d_c), (B, T, d_R)
    da, dg = rmsnorm_backward(dc_KV, saved_norm)
    dk_R = rope_backward(dk_R[:, :, None], saved_rope)[:, :, 0]  # (B, T, d_R)
    dx, dW = linear_backward(np.concatenate([da, dk_R], axis=-1), saved_down)
    return dx, {"kv_a_proj_with_mqa.weight": dW, "kv_a_layernorm.weight": dg}


# --- the naive form -------------------------------------------------------------------


def naive_forward(
    W_UKV: Array, q_C: Array, q_R: Array, kept: Array, config: Config
) -> tuple[Array, tuple]:
    """Make every head's keys and values from the latents, then attend as always.

    Eqs. (2), (4), (5) and (10). Each head's key is its own content followed by the one
    rotated key. Shapes: W_UKV (N_h*(d_h+d_v), d_c), q_C (B, T, N_h, d_h),
    q_R (B, T, N_h, d_R), kept (B, S, d_c + d_R) -> o (B, T, N_h, d_v).
    """
    B, S, _ = kept.shape
    N_h, d_h = config.num_attention_heads, config.qk_nope_head_dim
    c_KV, k_R = np.split(kept, [config.kv_lora_rank], axis=-1)
    kv, saved_up = linear_forward(c_KV, W_UKV)
    kv = kv.reshape(B, S, N_h, -1)  # (B, S, N_h, d_h + d_v)
    k_C, v = np.split(kv, [d_h], axis=-1)
    k_R = np.broadcast_to(k_R[:, :, None], (B, S, N_h, k_R.shape[-1]))
    q = np.concatenate([q_C, q_R], axis=-1)  # (B, T, N_h, d_h + d_R)
    k = np.concatenate([k_C, k_R], axis=-1)  # (B, S, N_h, d_h + d_R)
    o, saved_core = causal_attention_forward(q, k, v, softmax_scale(config))
    return o, (saved_up, saved_core, d_h)


def naive_backward(do: Array, saved: tuple) -> tuple[Array, ...]:
    """Gradients of the naive form: dW_UKV, dq_C, dq_R, dkept.

    The rotated key served every head, so its gradient is the sum over them.
    """
    saved_up, saved_core, d_h = saved
    dq, dk, dv = causal_attention_backward(do, saved_core)
    dq_C, dq_R = np.split(dq, [d_h], axis=-1)
    dk_C, dk_R = np.split(dk, [d_h], axis=-1)  # (B, S, N_h, …)
    dkv = np.concatenate([dk_C, dv], axis=-1)  # (B, S, N_h, d_h + d_v)
    dkv = dkv.reshape(*dkv.shape[:2], -1)  # (B, S, N_h*d_h + N_h*d_v)
    dc_KV, dW_UKV = linear_backward(dkv, saved_up)  # (B, S, d_c)
    dkept = np.concatenate([dc_KV, dk_R.sum(axis=2)], axis=-1)  # (B, S, d_c + d_R)
    return dW_UKV, dq_C, dq_R, dkept


# --- the absorbed form ----------------------------------------------------------------


def absorbed_forward(
    W_UKV: Array, q_C: Array, q_R: Array, kept: Array, config: Config
) -> tuple[Array, tuple]:
    r"""Move W_UK into the query and W_UV behind the sum: attend to the latents.

    :math:`q^C (W_{UK} c)^\top = (q^C W_{UK})\,c^\top`, and
    :math:`\sum_j p_j W_{UV} c_j = W_{UV} \sum_j p_j c_j`. What is left is multi-query
    attention: one key of d_c + d_R a token for all heads, whose first d_c numbers are
    the value too. The product of the matrices is never formed; it would be larger than
    both. Shapes as in `naive_forward`, and the same answer.
    """
    d_c = config.kv_lora_rank
    W = W_UKV.reshape(config.num_attention_heads, -1, d_c)  # (N_h, d_h + d_v, d_c)
    W_UK, W_UV = np.split(W, [config.qk_nope_head_dim], axis=1)
    q_latent = _by_head(q_C, W_UK)  # (B, T, N_h, d_c)
    q = np.concatenate([q_latent, q_R], axis=-1)  # (B, T, N_h, d_c + d_R)
    k = kept[:, :, None]  # (B, S, 1, d_c + d_R)
    alpha = softmax_scale(config)
    o_latent, saved_core = causal_attention_forward(q, k, k[..., :d_c], alpha)
    o = _by_head(o_latent, W_UV.swapaxes(1, 2))  # (B, T, N_h, d_v)
    return o, (saved_core, q_C, o_latent, W_UK, W_UV)


def absorbed_backward(do: Array, saved: tuple) -> tuple[Array, ...]:
    """Gradients of the absorbed form: dW_UKV, dq_C, dq_R, dkept.

    The latent played two parts, key and value, and gets a gradient for each.
    """
    saved_core, q_C, o_latent, W_UK, W_UV = saved
    d_c = W_UK.shape[-1]
    do_latent = _by_head(do, W_UV)  # (B, T, N_h, d_c)
    dW_UV = _outer_by_head(do, o_latent)  # (N_h, d_v, d_c)
    dq, dk, dv = causal_attention_backward(do_latent, saved_core)
    dq_latent, dq_R = np.split(dq, [d_c], axis=-1)
    dq_C = _by_head(dq_latent, W_UK.swapaxes(1, 2))  # (B, T, N_h, d_h)
    dW_UK = _outer_by_head(q_C, dq_latent)  # (N_h, d_h, d_c)
    dkept = dk[:, :, 0]  # (B, S, d_c + d_R), as key
    dkept[..., :d_c] += dv[:, :, 0]  # as value
    dW = np.concatenate([dW_UK, dW_UV], axis=1)  # (N_h, d_h + d_v, d_c)
    dW = dW.reshape(-1, d_c)  # (N_h*d_h + N_h*d_v, d_c)
    return dW, dq_C, dq_R, dkept


def crossover(config: Config) -> float:
    """New tokens from which on the naive form multiplies less, for a long past.

    Expanding costs (d_h + d_v) d_c for each latent and head, once; then a query costs
    d_h + d_R + d_v for each, not 2 d_c + d_R. Infinite where that is no more.
    """
    c = config
    expand = (c.qk_nope_head_dim + c.v_head_dim) * c.kv_lora_rank
    dearer = 2 * c.kv_lora_rank - c.qk_nope_head_dim - c.v_head_dim
    return expand / dearer if dearer > 0 else float("inf")


def _by_head(x: Array, W: Array) -> Array:
    """Each head's rows times its own matrix: (B, T, N_h, a), (N_h, a, b) -> (…, b)."""
    B, T, N_h, a = x.shape
    rows = x.transpose(2, 0, 1, 3).reshape(N_h, B * T, a)  # (N_h, B*T, a)
    y = (rows @ W).reshape(N_h, B, T, -1)  # (N_h, B, T, b)
    return y.transpose(1, 2, 0, 3)  # (B, T, N_h, b)


def _outer_by_head(x: Array, y: Array) -> Array:
    """Sum of outer products by head: (B, T, N_h, a), (B, T, N_h, b) -> (N_h, a, b)."""
    B, T, N_h, a = x.shape
    x = x.transpose(2, 3, 0, 1).reshape(N_h, a, B * T)  # (N_h, a, B*T)
    y = y.transpose(2, 0, 1, 3).reshape(N_h, B * T, -1)  # (N_h, B*T, b)
    return x @ y


# --- the layer ------------------------------------------------------------------------


def mla_forward(
    params: Params,
    x: Array,
    config: Config,
    rotation: Array,
    cache: Cache | None = None,
    absorbed: bool = False,
) -> tuple[Array, tuple | None]:
    """Multi-head latent attention of one block, in the naive or the absorbed form.

    rotation comes from `rope_rotation`, for the positions of x. With a cache, x
    continues what it holds, d_c + d_R numbers a position, and ``saved`` is None:
    decoding is not trained through. Softmax runs in the dtype of x, float32 at least.
    Shapes: x (B, T, D) -> (B, T, D). Raises ParameterError for parameters that do not
    fit the config, ValueError for a cache that is full.
    """
    check_shapes(params, mla_shapes(config))
    q_C, q_R, saved_q = queries_forward(params, x, config, rotation)
    kept, saved_kv = latents_forward(params, x, config, rotation)
    if cache is not None:
        (kept,) = cache.extend(kept)  # (B, S, d_c + d_R)
    attend = absorbed_forward if absorbed else naive_forward
    W_UKV = params["kv_b_proj.weight"]
    o, saved_core = attend(W_UKV, q_C, q_R, kept, config)
    heads = o.shape
    o = o.reshape(*x.shape[:2], -1)  # (B, T, N_h*d_v)
    y, saved_o = linear_forward(o, params["o_proj.weight"])
    if cache is not None:
        return y, None
    return y, (saved_q, saved_kv, saved_core, saved_o, heads, absorbed)


def mla_backward(dy: Array, saved: tuple) -> tuple[Array, Params]:
    """Gradients of `mla_forward`, in the form that it took: its lines in reverse.

    x was read twice, by queries and latents. Returns dx (B, T, D) and the gradients
    under the parameters' names.
    """
    saved_q, saved_kv, saved_core, saved_o, heads, absorbed = saved
    do, dW_o = linear_backward(dy, saved_o)
    do = do.reshape(heads)  # (B, T, N_h, d_v)
    backward = absorbed_backward if absorbed else naive_backward
    dW_UKV, dq_C, dq_R, dkept = backward(do, saved_core)
    dx_kv, grads_kv = latents_backward(dkept, saved_kv)
    dx_q, grads_q = queries_backward(dq_C, dq_R, saved_q)
    grads = {
        **grads_q,
        **grads_kv,
        "kv_b_proj.weight": dW_UKV,
        "o_proj.weight": dW_o,
    }
    return dx_q + dx_kv, grads
