r"""The model in NumPy: embedding, blocks, final norm, head, and all of it backwards.

Chapter 1's plain transformer is what stands here: pre-norm blocks of attention and
SwiGLU. Parameters are one flat dict under DeepSeek's names (`minidsv3.parameters`).
"""

from collections.abc import Sequence

import numpy as np

from minidsv3.config import Config, TrainConfig
from minidsv3.parameters import check, cut, first_not_finite, prefixed
from minidsv3.primitives.attention_numpy_ref import (
    Cache,
    attention_backward,
    attention_forward,
)
from minidsv3.primitives.numpy_ref import (
    cross_entropy_backward,
    cross_entropy_forward,
    embedding_backward,
    embedding_forward,
    linear_backward,
    linear_forward,
    rmsnorm_backward,
    rmsnorm_forward,
    rope_frequencies,
    rope_rotation,
    swiglu_backward,
    swiglu_forward,
)

Array = np.ndarray
Params = dict[str, Array]


def block_forward(
    params: Params,
    x: Array,
    config: Config,
    rotation: Array,
    cache: Cache | None = None,
) -> tuple[Array, tuple]:
    r"""One block: :math:`x ← x + \mathrm{Attn}(\mathrm{norm}(x))`, then the same with
    the feed-forward.

    Both parts read a normalised copy and add to the stream x, which itself is never
    normalised between blocks. Shapes: x (B, T, D) -> (B, T, D).
    """
    eps = config.rms_norm_eps
    u, saved_norm_1 = rmsnorm_forward(x, params["input_layernorm.weight"], eps)
    a, saved_attn = attention_forward(
        cut(params, "self_attn."), u, config, rotation, cache
    )
    x = x + a
    u, saved_norm_2 = rmsnorm_forward(x, params["post_attention_layernorm.weight"], eps)
    f, saved_mlp = swiglu_forward(cut(params, "mlp."), u)
    return x + f, (saved_norm_1, saved_attn, saved_norm_2, saved_mlp)


def block_backward(dy: Array, saved: tuple) -> tuple[Array, Params]:
    """Gradients of a block. At each addition the gradient goes both ways: unchanged
    along the stream, and through the part that was added.
    """
    saved_norm_1, saved_attn, saved_norm_2, saved_mlp = saved
    du, grads_mlp = swiglu_backward(dy, saved_mlp)
    dx, dg_2 = rmsnorm_backward(du, saved_norm_2)
    dx = dy + dx
    du, grads_attn = attention_backward(dx, saved_attn)
    dx_attn, dg_1 = rmsnorm_backward(du, saved_norm_1)
    grads = {
        "input_layernorm.weight": dg_1,
        **prefixed("self_attn.", grads_attn),
        "post_attention_layernorm.weight": dg_2,
        **prefixed("mlp.", grads_mlp),
    }
    return dx + dx_attn, grads


def trunk_forward(
    params: Params, config: Config, ids: Array, caches: Sequence[Cache] | None = None
) -> tuple[Array, tuple]:
    """From token ids (B, T) to hidden states (B, T, D) after the final norm.

    With caches, one a layer, ids continue what the caches hold.
    """
    _, T = ids.shape
    if caches is not None and len(caches) != config.num_hidden_layers:
        raise ValueError(
            f"{len(caches)} caches for {config.num_hidden_layers} layers: give each "
            "one, as new_caches does"
        )
    start = caches[0].length if caches else 0
    _check_length(start + T, config)
    x, saved_embed = embedding_forward(ids, params["model.embed_tokens.weight"])
    positions = np.arange(start, start + T)
    rotation = rope_rotation(positions, rope_frequencies(config), x.dtype)
    saved_blocks = []
    for layer in range(config.num_hidden_layers):
        block = cut(params, f"model.layers.{layer}.")
        cache = caches[layer] if caches else None
        x, saved = block_forward(block, x, config, rotation, cache)
        saved_blocks.append(saved)
    h, saved_norm = rmsnorm_forward(x, params["model.norm.weight"], config.rms_norm_eps)
    return h, (saved_embed, saved_blocks, saved_norm)


def trunk_backward(dh: Array, saved: tuple) -> Params:
    """Gradients of everything below the head, under the parameters' names."""
    saved_embed, saved_blocks, saved_norm = saved
    grads: Params = {}
    dx, grads["model.norm.weight"] = rmsnorm_backward(dh, saved_norm)
    for layer in reversed(range(len(saved_blocks))):
        dx, grads_block = block_backward(dx, saved_blocks[layer])
        grads |= prefixed(f"model.layers.{layer}.", grads_block)
    grads["model.embed_tokens.weight"] = embedding_backward(dx, saved_embed)
    return grads


def forward(
    params: Params, config: Config, ids: Array, caches: Sequence[Cache] | None = None
) -> tuple[Array, tuple]:
    """Logits of the next token at every position: ids (B, T) -> (B, T, vocab).

    Raises ParameterError for parameters that do not fit the config, ValueError for ids
    that are no integers, lie outside the vocabulary or exceed
    ``max_position_embeddings``, FloatingPointError for logits that are not finite
    (naming the parameter that is not, if one is).
    """
    check_supported(config)
    check(params, config)
    ids = _checked_ids(ids)
    h, saved_trunk = trunk_forward(params, config, ids, caches)
    logits, saved_head = linear_forward(h, params["lm_head.weight"])
    _check_finite(logits, params)
    return logits, (saved_trunk, saved_head)


def backward(dlogits: Array, saved: tuple) -> Params:
    """Gradient of every parameter, given that of the logits (B, T, vocab)."""
    saved_trunk, saved_head = saved
    dh, dW_head = linear_backward(dlogits, saved_head)
    return {**trunk_backward(dh, saved_trunk), "lm_head.weight": dW_head}


def loss_and_grads(
    params: Params, config: Config, ids: Array, train_config: TrainConfig
) -> tuple[dict[str, float], Params, dict]:
    """Losses (nats a token), gradients and statistics of one batch.

    ids (B, T+1): the first T columns are read, the last T are predicted.
    train_config weighs the further losses of models that have them; a plain
    transformer has none. Returns ``({"main", "total"}, grads, stats)``.
    """
    ids = _checked_ids(ids)
    if ids.shape[1] < 2:
        raise ValueError(f"ids of shape {ids.shape}: needs two columns at least")
    logits, saved = forward(params, config, ids[:, :-1])
    loss, saved_loss = cross_entropy_forward(logits, ids[:, 1:])
    grads = backward(cross_entropy_backward(1.0, saved_loss), saved)
    return {"main": loss, "total": loss}, grads, {}


def new_caches(config: Config, capacity: int) -> list[Cache]:
    """One empty cache a layer, for ``capacity`` positions."""
    _check_length(capacity, config)
    return [Cache(capacity) for _ in range(config.num_hidden_layers)]


def check_supported(config: Config) -> None:
    """Raise NotImplementedError for a config with mechanisms not built here yet."""
    asked = {
        "kv_lora_rank": config.kv_lora_rank,
        "n_routed_experts": config.n_routed_experts,
        "num_nextn_predict_layers": config.num_nextn_predict_layers or None,
    }
    for field, value in asked.items():
        if value is not None:
            raise NotImplementedError(
                f"{field}={value}: the NumPy model knows the plain transformer only "
                "so far; use a config with kv_lora_rank=None, n_routed_experts=None "
                "and num_nextn_predict_layers=0, such as minidsv3.config.PLAIN"
            )


def _checked_ids(ids: Array) -> Array:
    ids = np.asarray(ids)
    if ids.ndim != 2 or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"ids must be integers of shape (batch, time), neither axis empty, "
            f"got {ids.dtype} of shape {ids.shape}"
        )
    return ids


def _check_length(length: int, config: Config) -> None:
    if length > config.max_position_embeddings:
        raise ValueError(
            f"{length} positions asked for, but max_position_embeddings is "
            f"{config.max_position_embeddings}; shorten the text or raise the limit"
        )


def _check_finite(logits: Array, params: Params) -> None:
    if np.isfinite(logits).all():
        return
    culprit = first_not_finite(params)
    raise FloatingPointError(
        f"the logits are not finite: {culprit} holds NaN or infinity"
        if culprit
        else "the logits are not finite though every parameter is: activations "
        "overflowed; a lower learning rate or float64 helps"
    )
