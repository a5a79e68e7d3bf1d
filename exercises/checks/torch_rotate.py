"""Chapter 6, MLA: pairs turned in real numbers."""

from collections.abc import Callable

import numpy as np
import torch
from grader.compare import WrongForm
from grader.spec import Case, Check, Wrong
from grader.tensors import arriving

from checks.draws import normal
from checks.modules import rounded


def angles(T: int, pairs: int, seed: int) -> np.ndarray:
    """A rotation by any angles: (2, T, pairs)."""
    phi = normal(T, pairs, seed=seed, scale=3.0)
    return np.stack([np.cos(phi), np.sin(phi)])


def heads(
    B: int, H: int, T: int, d_R: int, seed: int, how: str = "", dtype: type = float
) -> Case:
    """Heads at some positions. In bfloat16 two roundings meet: no gradients there."""
    shape = (B, 1 if how == "expanded" else H, d_R, T)
    x = normal(*shape, seed=seed).astype(dtype)
    x = x.swapaxes(2, 3) if how == "strided" else x.reshape(*shape[:2], T, d_R)
    rotation = angles(T, d_R // 2, seed + 1)
    if how == "bfloat16":
        x, rotation = rounded(x), rotation.astype(np.float32)
    label = f"B={B}, H={H}, T={T}, d_R={d_R}"
    label += {
        "": "",
        "strided": ", a view whose last axis is not dense",
        "expanded": ", one key expanded to all heads",
        "bfloat16": ", x in bfloat16 and rotation in float32",
    }[how]
    label += ", x in float32 and rotation in float64" * (
        dtype is np.float32 and not how
    )
    return Case(label, (x, rotation, how, H), graph=how != "bfloat16")


def call(
    function: Callable,
    x: torch.Tensor,
    rotation: torch.Tensor,
    how: str = "",
    H: int = 1,
) -> object:
    """Hand in x as it is stored, or expanded, or in bfloat16; hold it to its dtype."""
    if how == "expanded":
        x = x.expand(-1, H, -1, -1)
    if how == "bfloat16":
        x = x.bfloat16()
    y = function(x, rotation)
    if isinstance(y, torch.Tensor) and y.dtype != x.dtype:
        raise WrongForm(f"x is {x.dtype}, your result is {y.dtype}.")
    return y


def turned(x: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """By complex numbers, x (B, H, T, d_R)."""
    c = (x[..., 0::2] + 1j * x[..., 1::2]) * (rotation[0] + 1j * rotation[1])
    return np.stack([c.real, c.imag], axis=-1).reshape(x.shape)


def oracle(x: np.ndarray, rotation: np.ndarray, how: str = "", H: int = 1) -> object:
    """The rotation, and the rotation back of what arrives."""
    wide = rotation.astype(float)
    if how == "expanded":
        x = np.repeat(x, H, axis=1)
    y = turned(x.astype(float), wide)
    if how == "bfloat16":
        return rounded(y)
    dx = turned(arriving(y.shape), wide * np.array([1, -1])[:, None, None])
    return y, dx.sum(axis=1, keepdims=True) if how == "expanded" else dx


SLICES = "even, odd = x[..., 0::2], x[..., 1::2]"
STACK = "turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)"

ROTATE = Check(
    "mla.torch.1",
    returns=("y",),
    gradients={"dx": 0},
    call=call,
    oracle=oracle,
    cases=lambda: [
        Case(
            "two positions, one pair: by 90 degrees, then by some 37",
            (
                np.array([[[[1.0, 2.0], [3.0, -1.0]]]]),
                np.array([[[0.0], [0.8]], [[1.0], [0.6]]]),
            ),
        ),
        heads(B=2, H=3, T=4, d_R=6, seed=10),
        heads(B=1, H=2, T=3, d_R=8, seed=20, how="strided"),
        heads(B=2, H=3, T=2, d_R=4, seed=30, how="expanded"),
        heads(B=2, H=2, T=5, d_R=4, seed=40, dtype=np.float32),
        heads(B=1, H=2, T=3, d_R=6, seed=50, how="bfloat16", dtype=np.float32),
    ],
    hints=(
        "Take the even coordinates and the odd ones apart, turn them as two arrays, "
        "and put them together again so that each pair are neighbours.",
        "`x[..., 0::2]` and `x[..., 1::2]` are (B, H, T, d_R/2), and views. Stacked on "
        "a new last axis they are (B, H, T, d_R/2, 2); `.flatten(-2)` makes one of the "
        "last two. The cosines, (T, d_R/2), fit as they are.",
        "`torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)`, "
        "flattened, and then `.to(x.dtype)`.",
    ),
    wrong=(
        Wrong(
            "halves instead of pairs",
            "x[..., 0::2], x[..., 1::2]",
            "x.chunk(2, dim=-1)",
            "That turns coordinate j with coordinate j + d_R/2, as many other models "
            "do. DeepSeek's weights are made for neighbours, 2j and 2j + 1.",
            (("torch.stack([", "torch.cat(["), ("turned.flatten(-2)", "turned")),
        ),
        Wrong(
            "the pairs left apart",
            "odd * cos], dim=-1)",
            "odd * cos], dim=-2)",
            "All even coordinates first, then all odd ones: right numbers in another "
            "order. Stack on a new *last* axis and flatten it away.",
        ),
        Wrong(
            "turned the other way",
            "even * cos - odd * sin, even * sin + odd * cos",
            "even * cos + odd * sin, odd * cos - even * sin",
            "That turns by minus the angle, which is the way back. The minus stands in "
            "front of odd * sin.",
        ),
        Wrong(
            "no minus at all",
            "even * cos - odd * sin",
            "even * cos + odd * sin",
            "Without the minus it is no rotation: lengths change. The even result is "
            "even * cos minus odd * sin.",
        ),
        Wrong(
            "cosine and sine exchanged",
            "cos, sin = rotation",
            "sin, cos = rotation",
            "rotation[0] holds the cosines, rotation[1] the sines.",
        ),
        Wrong(
            "the dtype of the angles",
            ".to(x.dtype)",
            "",
            "A product of bfloat16 and float32 is float32: it doubles the bytes of all "
            "that follows. Bring the result back to the dtype of x.",
        ),
        Wrong(
            "the angles rounded first",
            "cos, sin = rotation",
            "cos, sin = rotation.to(x.dtype)",
            "In bfloat16 a cosine has three digits. Multiply in the precision of the "
            "angles, and round the result, once.",
        ),
        Wrong(
            "everything through float32",
            "x[..., 0::2], x[..., 1::2]",
            "x.float()[..., 0::2], x.float()[..., 1::2]",
            "`.float()` widens bfloat16, but it narrows float64 as well. The product "
            "with the angles has the wider dtype of the two all by itself.",
        ),
        Wrong(
            "the even half already written over",
            SLICES,
            "y = x.clone()\n    even, odd = y[..., 0::2], y[..., 1::2]",
            "A slice is a view, not a copy. Once the even coordinates are written, "
            "`even` shows the new ones, and the odd ones are made of those.",
            (
                (
                    STACK,
                    "even.copy_(even * cos - odd * sin)\n"
                    "    odd.copy_(even * sin + odd * cos)",
                ),
                ("turned.flatten(-2).to(x.dtype)", "y"),
            ),
        ),
        Wrong(
            "written into x",
            "return turned.flatten(-2).to(x.dtype)",
            "return x.copy_(turned.flatten(-2))",
            "Others still read x: it is a slice of the layer's queries, or one key "
            "that was expanded to all heads. Return a new tensor.",
        ),
    ),
    right=(
        "def rotate(x, rotation):\n"
        "    wide = torch.promote_types(x.dtype, rotation.dtype)\n"
        "    z = torch.view_as_complex(\n"
        "        x.to(wide).contiguous().unflatten(-1, (-1, 2)))\n"
        "    turn = torch.complex(rotation[0].to(wide), rotation[1].to(wide))\n"
        "    return torch.view_as_real(z * turn).flatten(-2).to(x.dtype)\n",
        "def rotate(x, rotation):\n"
        "    cos, sin = rotation.repeat_interleave(2, dim=-1)\n"
        "    partner = x.unflatten(-1, (-1, 2)).flip(-1)\n"
        "    partner = partner * torch.tensor([-1, 1], dtype=x.dtype)\n"
        "    return (x * cos + partner.flatten(-2) * sin).to(x.dtype)\n",
        "def rotate(x, rotation):\n"
        "    cos, sin = rotation\n"
        "    y = torch.empty(x.shape, dtype=rotation.dtype)\n"
        "    y[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin\n"
        "    y[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos\n"
        "    return y.type_as(x)\n",
        "def rotate(x, rotation):\n"
        "    c, s = rotation\n"
        "    R = torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)\n"
        "    pairs = x.to(R.dtype).unflatten(-1, (-1, 2))\n"
        "    y = torch.einsum('tjac,bhtjc->bhtja', R, pairs)\n"
        "    return y.reshape(x.shape).to(x.dtype)\n",
    ),
)

CHECKS = [ROTATE]
