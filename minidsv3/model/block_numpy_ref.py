"""One transformer block in NumPy: attention and feed-forward of whichever kind.

Attention is plain, or MLA where the config has a latent; the feed-forward is dense, or
a mixture of experts where the block's parameters have a router. The rest of the model
does not know which.
"""

import numpy as np

from minidsv3.config import Config
from minidsv3.mla.numpy_ref import mla_backward, mla_forward
from minidsv3.moe.numpy_ref import moe_backward, moe_forward
from minidsv3.parameters import cut, prefixed
from minidsv3.primitives.attention_numpy_ref import (
    Cache,
    attention_backward,
    attention_forward,
)
from minidsv3.primitives.numpy_ref import (
    rmsnorm_backward,
    rmsnorm_forward,
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
    a, saved_attn = attend_forward(
        cut(params, "self_attn."), u, config, rotation, cache
    )
    x = x + a
    u, saved_norm_2 = rmsnorm_forward(x, params["post_attention_layernorm.weight"], eps)
    f, saved_mlp = feed_forward(cut(params, "mlp."), u, config)
    return x + f, (saved_norm_1, saved_attn, saved_norm_2, saved_mlp)


def block_backward(
    dy: Array, saved: tuple, dbalance: float = 0.0
) -> tuple[Array, Params]:
    """Gradients of a block. At each addition the gradient goes both ways: unchanged
    along the stream, and through the part that was added.

    dbalance weighs the balance loss of the block's experts, if it has any.
    """
    saved_norm_1, saved_attn, saved_norm_2, saved_mlp = saved
    du, grads_mlp = feed_backward(dy, saved_mlp, dbalance)
    dx, dg_2 = rmsnorm_backward(du, saved_norm_2)
    dx = dy + dx
    du, grads_attn = attend_backward(dx, saved_attn)
    dx_attn, dg_1 = rmsnorm_backward(du, saved_norm_1)
    grads = {
        "input_layernorm.weight": dg_1,
        **prefixed("self_attn.", grads_attn),
        "post_attention_layernorm.weight": dg_2,
        **prefixed("mlp.", grads_mlp),
    }
    return dx + dx_attn, grads


def attend_forward(
    params: Params, u: Array, config: Config, rotation: Array, cache: Cache | None
) -> tuple[Array, tuple]:
    """Attention of the config's kind: u (B, T, D) -> (B, T, D).

    MLA takes the naive form in training and for a prompt, where many queries meet, and
    the absorbed form when it continues a cache.
    """
    if not config.uses_mla:
        y, saved = attention_forward(params, u, config, rotation, cache)
        return y, (attention_backward, saved)
    absorbed = cache is not None and cache.length > 0
    y, saved = mla_forward(params, u, config, rotation, cache, absorbed)
    return y, (mla_backward, saved)


def attend_backward(dy: Array, saved: tuple) -> tuple[Array, Params]:
    """Gradients of the attention that ran."""
    backward, saved = saved
    return backward(dy, saved)


def feed_forward(params: Params, u: Array, config: Config) -> tuple[Array, tuple]:
    """The block's feed-forward, dense or a mixture of experts: (B, T, D) -> same."""
    if "gate.weight" not in params:
        y, saved = swiglu_forward(params, u)
        return y, (None, saved)
    y, saved = moe_forward(params, u, config)
    return y, (saved, None)


def feed_backward(dy: Array, saved: tuple, dbalance: float) -> tuple[Array, Params]:
    """Gradients of the feed-forward that ran."""
    saved_moe, saved_dense = saved
    if saved_moe is None:
        return swiglu_backward(dy, saved_dense)
    return moe_backward(dy, saved_moe, dbalance)


def saved_attention(saved: tuple) -> tuple:
    """What attention saved, of whichever kind, inside what `block_forward` saved."""
    return saved[1][1]


def saved_experts(saved: tuple) -> tuple | None:
    """What `moe_forward` saved, inside what `block_forward` saved; None if dense."""
    return saved[3][0]
