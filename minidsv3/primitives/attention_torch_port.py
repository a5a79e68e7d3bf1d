r"""Causal attention in PyTorch.

The core is torch's own ``scaled_dot_product_attention``, which never stores the (T, S)
matrix of probabilities where it has a fused kernel. Heads stand before positions here,
(B, N_h, T, d), as that function wants them.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidsv3.config import Config
from minidsv3.primitives.cache import Cache
from minidsv3.primitives.numpy_ref import softmax_scale
from minidsv3.primitives.torch_port import linear, rotate

CHUNK = 128  # queries of one product


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    visible: np.ndarray | None = None,
) -> Tensor:
    r"""Scaled dot-product attention, :math:`o = \mathrm{softmax}(α\,q k^\top)\,v`.

    The T queries are the last T of the S positions, so a cached past needs no other
    mask; where texts differ in length, visible (B, T, S) says who sees whom.
    Shapes: q (B, N_h, T, d_k), k (B, N_kv, S, d_k), v (B, N_kv, S, d_v) -> o
    (B, N_h, T, d_v). Each key head serves N_h / N_kv query heads.
    """
    T, S, grouped = q.shape[-2], k.shape[-2], q.shape[1] != k.shape[1]
    plain = visible is None
    if q.device.type == "cpu" and T > 1 and plain:
        return attention_in_chunks(q, k, v, scale)
    mask = None
    if not plain:
        mask = torch.from_numpy(visible).to(q.device)[:, None]  # (B, 1, T, S)
    elif 1 < T < S:  # torch's own causal mask aligns the first query with the first key
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=plain and 1 < T == S, scale=scale, enable_gqa=grouped
    )


def attention_in_chunks(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same by plain products, a chunk of queries at a time.

    A chunk multiplies the keys up to its own end and no further. On a processor torch's
    function takes one and a half times as long where d_k differs from d_v, in bfloat16
    three times (measured; the chapter on training has the table).
    """
    (B, N_kv, S, _), T = k.shape, q.shape[-2]
    q = q.unflatten(1, (N_kv, -1)).flatten(0, 1)  # (B*N_kv, N_h/N_kv, T, d_k)
    k, v = k.flatten(0, 1), v.flatten(0, 1)  # (B*N_kv, S, …)
    chunks = []
    for start in range(0, T, CHUNK):
        now = q[:, :, start : start + CHUNK]  # (B*N_kv, N_h/N_kv, CHUNK, d_k)
        end = S - T + start + now.shape[2]
        mask = q.new_full((now.shape[2], end), -torch.inf).triu(S - T + start + 1)
        mask = mask.repeat(now.shape[1], 1)  # (N_h/N_kv * CHUNK, end)
        scores = torch.baddbmm(mask, now.flatten(1, 2), k[:, :end].mT, alpha=scale)
        with torch.autocast("cpu", enabled=False):  # it would store float32
            P = scores.softmax(dim=-1)  # (B*N_kv, N_h/N_kv * CHUNK, end)
        o = P @ v[:, :end]  # (B*N_kv, N_h/N_kv * CHUNK, d_v)
        chunks.append(o.unflatten(1, now.shape[1:3]))
    o = torch.cat(chunks, dim=2)  # (B*N_kv, N_h/N_kv, T, d_v)
    return o.unflatten(0, (B, N_kv)).flatten(1, 2)  # (B, N_h, T, d_v)


def heads(x: Tensor, n: int) -> Tensor:
    """Cut the last axis into n heads: (B, T, n*d) -> (B, n, T, d)."""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)  # (B, n, T, d)


class PlainAttention(nn.Module):
    """Plain attention of one block (MHA, GQA or MQA): project, rotate, attend."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        D, d, d_v = config.hidden_size, config.qk_rope_head_dim, config.v_head_dim
        N_h, N_kv = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = linear(D, N_h * d)
        self.k_proj = linear(D, N_kv * d)
        self.v_proj = linear(D, N_kv * d_v)
        self.o_proj = linear(N_h * d_v, D)
        self.N_h, self.N_kv, self.scale = N_h, N_kv, softmax_scale(config)

    def forward(
        self, x: Tensor, rotation: Tensor, cache: Cache | None = None
    ) -> Tensor:
        """Shapes: x (B, T, D), rotation as `rope_rotation` makes it -> (B, T, D).

        With a cache, x continues what it holds.
        """
        q = rotate(heads(self.q_proj(x), self.N_h), rotation)
        k, v, visible = *self.keys(x, rotation), None
        if cache is not None:
            visible = cache.visible(x.shape[1])
            k, v = _appended(cache, k, v)  # (B, N_kv, S, d), both
        o = causal_attention(q, k, v, self.scale, visible)
        return self.o_proj(o.transpose(1, 2).flatten(2))

    def keys(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys, and values: x (B, T, D) -> (B, N_kv, T, d), both."""
        k = rotate(heads(self.k_proj(x), self.N_kv), rotation)
        return k, heads(self.v_proj(x), self.N_kv)

    def remember(self, x: Tensor, rotation: Tensor, cache: Cache) -> None:
        """Leave in the cache what others will attend to, and no more."""
        _appended(cache, *self.keys(x, rotation))


def _appended(cache: Cache, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """All that is kept, heads first: the cache grows along axis 1, before them."""
    kept = cache.extend(k.transpose(1, 2), v.transpose(1, 2))
    return tuple(one.transpose(1, 2) for one in kept)
