r"""The primitives in PyTorch: modules that say the forward pass and nothing else.

Autograd writes the backward passes that `minidsv3.primitives.numpy_ref` has by hand.
What follows from a config alone, angles and softmax scale, is asked of that module: a
fact has one home. Every class is an ``nn.Module`` whose parameters have the names of
the NumPy dict, so that one file feeds both.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidsv3.config import Config
from minidsv3.primitives.numpy_ref import rope_frequencies


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer without bias, weight (outputs, inputs): no layer of V3 has one."""
    return nn.Linear(inputs, outputs, bias=False)


class RMSNorm(nn.Module):
    r"""RMSNorm, :math:`y = g ⊙ x\,(\overline{x^2}+ε)^{-1/2}`: (..., D) -> (..., D).

    Computed in float32 at least, whatever the dtype of x, and returned in it.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        wide = torch.promote_types(x.dtype, torch.float32)
        y = F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps)
        return y.to(x.dtype)


class SwiGLU(nn.Module):
    r"""Gated feed-forward, :math:`W_{down}(\mathrm{silu}(W_{gate}x) ⊙ W_{up}x)`."""

    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = linear(width, intermediate)
        self.up_proj = linear(width, intermediate)
        self.down_proj = linear(intermediate, width)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (..., D) -> (..., D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# --- rotary positions ---------------------------------------------------------------


def rope_rotation(positions: Tensor, config: Config, like: Tensor) -> Tensor:
    r"""Cosine and sine of the angles :math:`p\,θ_j`: positions (T,) -> (2, T, d_R/2).

    Texts with positions of their own, (B, T), give (2, B, 1, T, d_R/2). Formed in
    float64 on the processor, for some accelerators have none, and rounded once at the
    end to the precision of ``like``, float32 at least, on its device.
    """
    theta = torch.tensor(
        rope_frequencies(config).tolist(), dtype=torch.float64, device="cpu"
    )
    angles = positions.cpu()[..., None] * theta  # (..., T, d_R/2)
    if positions.ndim == 2:
        angles = angles[:, None]  # (B, 1, T, d_R/2), the same for all heads
    turn = torch.stack([angles.cos(), angles.sin()])  # (..., T, d_R/2)
    return turn.to(torch.promote_types(like.dtype, torch.float32)).to(like.device)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    r"""Turn each pair of coordinates by its angle (DeepSeek's interleaved pairs).

    Coordinates 2j and 2j+1 are one complex number, multiplied by :math:`e^{i\,p\,θ_j}`;
    written out in real numbers, which every device has and the compiler can fuse.
    Shapes: x (B, H, T, d_R), rotation of `rope_rotation` -> x's, in x's dtype.
    """
    cos, sin = rotation
    even, odd = x[..., 0::2], x[..., 1::2]  # (B, H, T, d_R/2), both
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)  # (B, H, T, d_R)
