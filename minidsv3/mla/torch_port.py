r"""MLA in PyTorch: one module, two forms, and autograd for the way back.

`LatentAttention` has the parameters of `minidsv3.mla.numpy_ref` under the same names.
The naive form trains and reads prompts, the absorbed form decodes. Heads stand before
positions, (B, N_h, T, d); a cache keeps one tensor, (B, S, d_c + d_R).
"""

import numpy as np
import torch
from torch import Tensor, nn

from minidsv3.config import Config
from minidsv3.mla.numpy_ref import LATENT_EPS, crossover
from minidsv3.primitives.attention_torch_port import causal_attention, heads
from minidsv3.primitives.cache import Cache
from minidsv3.primitives.numpy_ref import softmax_scale
from minidsv3.primitives.torch_port import RMSNorm, linear, rotate


class LatentAttention(nn.Module):
    """Multi-head latent attention of one block: eqs. (1)–(11) of the report, p. 7–8."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        D, d_c, d_R = config.hidden_size, config.kv_lora_rank, config.qk_rope_head_dim
        N_h, d_h, d_v = (
            config.num_attention_heads,
            config.qk_nope_head_dim,
            config.v_head_dim,
        )
        d_cq = config.q_lora_rank
        if d_cq is None:
            self.q_proj = linear(D, N_h * (d_h + d_R))
        else:
            self.q_a_proj = linear(D, d_cq)
            self.q_a_layernorm = RMSNorm(d_cq, LATENT_EPS)
            self.q_b_proj = linear(d_cq, N_h * (d_h + d_R))
        self.kv_a_proj_with_mqa = linear(D, d_c + d_R)
        self.kv_a_layernorm = RMSNorm(d_c, LATENT_EPS)
        self.kv_b_proj = linear(d_c, N_h * (d_h + d_v))
        self.o_proj = linear(N_h * d_v, D)
        self.config, self.scale = config, softmax_scale(config)
        self.crossover = crossover(config)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        cache: Cache | None = None,
        absorbed: bool = False,
    ) -> Tensor:
        """Shapes: x (B, T, D), rotation as `rope_rotation` makes it -> (B, T, D).

        With a cache, x continues what it holds. Both forms answer the same.
        """
        q_C, q_R = self.queries(x, rotation)
        kept, visible = self.latents(x, rotation), None
        if cache is not None:
            visible = cache.visible(x.shape[1])
            (kept,) = cache.extend(kept)  # (B, S, d_c + d_R)
        attend = self.attend_absorbed if absorbed else self.attend_naive
        o = attend(q_C, q_R, kept, visible)  # (B, N_h, T, d_v)
        return self.o_proj(o.transpose(1, 2).flatten(2))

    def remember(self, x: Tensor, rotation: Tensor, cache: Cache) -> None:
        """Leave in the cache what others will attend to, and no more."""
        cache.extend(self.latents(x, rotation))

    def queries(self, x: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Eqs. (6)–(9): x (B, T, D) -> q_C (B, N_h, T, d_h), q_R (B, N_h, T, d_R)."""
        c = self.config
        if c.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = heads(q, c.num_attention_heads)  # (B, N_h, T, d_h + d_R)
        q_C, q_R = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        return q_C, rotate(q_R, rotation)

    def latents(self, x: Tensor, rotation: Tensor) -> Tensor:
        """What is kept of each token, eqs. (1) and (3): (B, T, D) -> (B, T, d_c + d_R).

        Its latent, normalised, and behind it the one key that all heads share, rotated.
        """
        c = self.config
        a, k_R = self.kv_a_proj_with_mqa(x).split(
            [c.kv_lora_rank, c.qk_rope_head_dim], dim=-1
        )
        k_R = rotate(k_R[:, None], rotation)[:, 0]  # (B, T, d_R)
        return torch.cat([self.kv_a_layernorm(a), k_R], dim=-1)

    def attend_naive(
        self,
        q_C: Tensor,
        q_R: Tensor,
        kept: Tensor,
        visible: np.ndarray | None = None,
    ) -> Tensor:
        """Make every head's keys and values, then attend: eqs. (2), (5) and (10).

        Shapes: q_C (B, N_h, T, d_h), q_R (B, N_h, T, d_R), kept (B, S, d_c + d_R)
        -> (B, N_h, T, d_v). visible is that of `causal_attention`.
        """
        c = self.config
        N_h = c.num_attention_heads
        c_KV, k_R = kept.split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        kv = heads(self.kv_b_proj(c_KV), N_h)  # (B, N_h, S, d_h + d_v)
        k_C, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        k_R = k_R[:, None].expand(-1, N_h, -1, -1)  # (B, N_h, S, d_R)
        q = torch.cat([q_C, q_R], dim=-1)  # (B, N_h, T, d_h + d_R)
        k = torch.cat([k_C, k_R], dim=-1)  # (B, N_h, S, d_h + d_R)
        return causal_attention(q, k, v, self.scale, visible)

    def attend_absorbed(
        self,
        q_C: Tensor,
        q_R: Tensor,
        kept: Tensor,
        visible: np.ndarray | None = None,
    ) -> Tensor:
        """Move W_UK into the query and W_UV behind the sum: attend to the latents.

        Shapes and answer as in `attend_naive`. All heads read one key of d_c + d_R
        numbers a token, whose first d_c are the value too.
        """
        c = self.config
        W = self.kv_b_proj.weight.unflatten(0, (c.num_attention_heads, -1))
        W_UK, W_UV = W.split([c.qk_nope_head_dim, c.v_head_dim], dim=1)
        q = torch.cat([q_C @ W_UK, q_R], dim=-1)  # (B, N_h, T, d_c + d_R)
        k = kept[:, None]  # (B, 1, S, d_c + d_R)
        v = k[..., : c.kv_lora_rank]  # (B, 1, S, d_c)
        return causal_attention(q, k, v, self.scale, visible) @ W_UV.mT
