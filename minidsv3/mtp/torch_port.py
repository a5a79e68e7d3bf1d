r"""MTP in PyTorch: one module around a block; `DeepSeekV3.loss` chains D of them.

The released files keep a module's own weights and those of its block side by side
(``model.layers.61.eh_proj.weight``, ``model.layers.61.mlp.gate.weight``), so
`MTPModule` takes over the parts of the block that it is handed.
"""

import torch
from torch import Tensor, nn

from minidsv3.primitives.torch_port import RMSNorm, linear


class MTPModule(nn.Module):
    r"""Module k: from :math:`h^{k-1}_i` and Emb(:math:`t_{i+k}`) to :math:`h^k_i`.

    Eqs. (21) and (22) of the DeepSeek-V3 report (section 2.2, p. 10); the order of the
    two halves and the last norm as in the released weights (see the NumPy
    `mtp_forward`). ``block(x, …)`` answers (y, whatever else).
    """

    def __init__(self, width: int, eps: float, block: nn.Module) -> None:
        super().__init__()
        self.enorm, self.hnorm = RMSNorm(width, eps), RMSNorm(width, eps)
        self.eh_proj = linear(2 * width, width)
        for name, part in block.named_children():
            self.add_module(name, part)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(width, eps)})
        # not registered: its parts are, above, under the names of the released files
        object.__setattr__(self, "block", block)

    def forward(self, h: Tensor, e: Tensor, *more: object) -> tuple[Tensor, object]:
        """Shapes: h, e (B, T, D) -> (B, T, D), which the shared head reads.

        What the block answers beside its y is handed on; ``more`` goes to the block.
        Raises ValueError if h and e differ in shape.
        """
        x, further = self.block(self.entrance(h, e), *more)
        return self.shared_head["norm"](x), further

    def entrance(self, h: Tensor, e: Tensor) -> Tensor:
        """What the block reads, eq. (21): h, e (B, T, D) -> (B, T, D)."""
        if h.shape != e.shape:
            raise ValueError(
                f"mtp: hidden states {tuple(h.shape)} and embeddings {tuple(e.shape)} "
                "must have one shape: give each position i the token i + k"
            )
        joined = torch.cat([self.enorm(e), self.hnorm(h)], dim=-1)  # (B, T, 2*D)
        return self.eh_proj(joined).to(h.dtype)  # the stream: not under autocast
