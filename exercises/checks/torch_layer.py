"""Chapter 6, MLA: the layer as a module that takes DeepSeek's weights."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from grader.spec import Case, Check, Wrong
from grader.tensors import arriving

from checks.draws import normal
from checks.modules import refuse_other_names
from checks.torch_rotate import angles
from minidsv3.mla import numpy_ref as library

SHAPES = {
    "q_a_proj.weight": "QD",
    "q_a_layernorm.weight": "Q",
    "q_b_proj.weight": "qQ",
    "kv_a_proj_with_mqa.weight": "cD",
    "kv_a_layernorm.weight": "C",
    "kv_b_proj.weight": "kC",
    "o_proj.weight": "Do",
}


def layer(B: int, T: int, sizes: tuple[int, ...], seed: int, size: float = 1.0) -> Case:
    """A layer of some sizes: D, N_h, d_h, d_R, d_v, d_c, d_cq. ``size`` is x's."""
    D, N_h, d_h, d_R, d_v, d_c, d_cq = sizes
    axes = {
        "D": D, "Q": d_cq, "C": d_c, "q": N_h * (d_h + d_R), "c": d_c + d_R,
        "k": N_h * (d_h + d_v), "o": N_h * d_v,
    }  # fmt: skip
    params = {
        name: normal(*(axes[a] for a in letters), seed=100 * seed + n, scale=0.8)
        for n, (name, letters) in enumerate(SHAPES.items())
    }
    x = normal(B, T, D, seed=seed, scale=size)
    label = f"B={B}, T={T}, D={D}, {N_h} heads, d_h={d_h}, d_R={d_R}, d_v={d_v}"
    label += f", d_c={d_c}, d_cq={d_cq}" + ", x very small" * (size < 0.1)
    return Case(label, (params, x, angles(T, d_R // 2, seed), sizes))


def call(
    function: Callable,
    params: dict[str, torch.Tensor],
    x: torch.Tensor,
    rotation: torch.Tensor,
    sizes: tuple[int, ...],
) -> object:
    """Make a module, look at its names, give it the weights, call it."""
    module = function(*sizes)
    refuse_other_names(module, params)
    return torch.func.functional_call(module, params, (x, rotation))


def oracle(
    params: dict[str, np.ndarray],
    x: np.ndarray,
    rotation: np.ndarray,
    sizes: tuple[int, ...],
) -> tuple:
    """The library's NumPy reference, forwards and backwards."""
    D, N_h, d_h, d_R, d_v, d_c, d_cq = sizes
    config = SimpleNamespace(
        hidden_size=D, num_attention_heads=N_h, qk_nope_head_dim=d_h,
        qk_rope_head_dim=d_R, qk_head_dim=d_h + d_R, v_head_dim=d_v, kv_lora_rank=d_c,
        q_lora_rank=d_cq, rope_scaling=None,
    )  # fmt: skip
    y, saved = library.mla_forward(params, x, config, rotation[0] + 1j * rotation[1])
    dx, grads = library.mla_backward(arriving(y.shape), saved)
    return y, dx, *(grads[name] for name in SHAPES)


LAYER = Check(
    "mla.torch.3",
    returns=("y",),
    gradients={"dx": 1} | {f"d{name}": (0, name) for name in SHAPES},
    call=call,
    oracle=oracle,
    joint_scale=True,
    cases=lambda: [
        layer(1, 2, (2, 1, 1, 2, 1, 2, 2), 1),
        layer(2, 3, (5, 2, 3, 2, 4, 3, 6), 2),
        layer(1, 4, (4, 3, 2, 4, 1, 6, 3), 3),
        layer(2, 2, (3, 2, 2, 2, 2, 4, 4), 4, size=1e-3),
        layer(1, 1, (4, 2, 3, 2, 3, 2, 5), 5),
    ],
    hints=(
        "`self.name = nn.Linear(...)` registers, and the attribute's name becomes the "
        "key. Seven attributes, then: queries, what is kept, keys and values, "
        "attention, output.",
        "`nn.Linear(D, d_c + d_R, bias=False)` and `nn.RMSNorm(d_c, eps=1e-6)`. Heads: "
        "`.unflatten(-1, (N_h, -1)).transpose(1, 2)`, and back `o.transpose(1, 2)."
        "flatten(2)`. The rotated key is `rotate(k_R[:, None], rotation)`, one head; "
        "`.expand(-1, N_h, -1, -1)` shows it to all.",
        "`c, k_R = self.kv_a_proj_with_mqa(x).split([self.d_c, self.d_R], dim=-1)`; "
        "`self.kv_b_proj(self.kv_a_layernorm(c))` cut into heads is content key and "
        "value. q and k are `torch.cat([content, rotated], dim=-1)`, then `F."
        "scaled_dot_product_attention(q, k, v, is_causal=True)`, whose own scale is "
        "right here.",
    ),
    wrong=(
        Wrong(
            "biases left on",
            "self.q_a_proj = nn.Linear(D, d_cq, bias=False)",
            "self.q_a_proj = nn.Linear(D, d_cq)",
            "nn.Linear has a bias unless it is told bias=False, and DeepSeek's file "
            "has none to load into it.",
            (
                ("d_R), bias=False)", "d_R))"),
                ("d_c + d_R, bias=False)", "d_c + d_R)"),
                ("d_v), bias=False)", "d_v))"),
                ("N_h * d_v, D, bias=False)", "N_h * d_v, D)"),
            ),
        ),
        Wrong(
            "eps left to torch",
            "nn.RMSNorm(d_cq, eps=1e-6)",
            "nn.RMSNorm(d_cq)",
            "Not told, nn.RMSNorm takes the spacing of floats at 1 for eps: 1e-7 or "
            "2e-16, as the dtype has it. DeepSeek's is 1e-6.",
            (("nn.RMSNorm(d_c, eps=1e-6)", "nn.RMSNorm(d_c)"),),
        ),
        Wrong(
            "LayerNorm for RMSNorm",
            "nn.RMSNorm(d_cq, eps=1e-6)",
            "nn.LayerNorm(d_cq, eps=1e-6, bias=False)",
            "LayerNorm subtracts the mean first. RMSNorm only divides by the size.",
            (("nn.RMSNorm(d_c, ", "nn.LayerNorm(d_c, bias=False, "),),
        ),
        Wrong(
            "names of one's own",
            "self.kv_a_layernorm = nn",
            "self.kv_norm = nn",
            "The attribute's name is the key under which weights are saved and loaded. "
            "Take DeepSeek's, letter by letter.",
            (("self.kv_a_layernorm(c)", "self.kv_norm(c)"),),
        ),
        Wrong(
            "a module in a list",
            "self.o_proj = nn.Linear(N_h * d_v, D, bias=False)",
            "self.out = [nn.Linear(N_h * d_v, D, bias=False)]",
            "A module in a plain list or dictionary is not registered: it is neither "
            "saved nor moved nor trained. Make it an attribute.",
            (("self.o_proj(", "self.out[0]("),),
        ),
        Wrong(
            "a rotated key for each head",
            "nn.Linear(D, d_c + d_R, bias=False)",
            "nn.Linear(D, d_c + N_h * d_R, bias=False)",
            "There is one rotated key a token, and all heads read it. That is what "
            "keeps the cache small.",
        ),
        Wrong(
            "the key normalised with the latent",
            "nn.RMSNorm(d_c, eps=1e-6)",
            "nn.RMSNorm(d_c + d_R, eps=1e-6)",
            "The norm is on the latent, d_c numbers. The rotated key does not pass "
            "through it.",
            (
                (
                    "c, k_R = self.kv_a_proj_with_mqa(x).split",
                    "c, k_R = self.kv_a_layernorm(self.kv_a_proj_with_mqa(x)).split",
                ),
                ("self.kv_b_proj(self.kv_a_layernorm(c))", "self.kv_b_proj(c)"),
            ),
        ),
        Wrong(
            "the latent not normalised",
            "self.kv_b_proj(self.kv_a_layernorm(c))",
            "self.kv_b_proj(c)",
            "The norm has its weight in the dictionary, and you never call it: the "
            "latent passes through kv_a_layernorm before keys and values are made.",
        ),
        Wrong(
            "the queries' latent not normalised",
            "self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))",
            "self.q_b_proj(self.q_a_proj(x))",
            "The norm has its weight in the dictionary, and you never call it: "
            "q_a_layernorm stands between the queries' two products.",
        ),
        Wrong(
            "heads cut without transposing",
            "q = q.unflatten(-1, (self.N_h, -1)).transpose(1, 2)",
            "q = q.reshape(len(x), self.N_h, x.shape[1], -1)",
            "A reshape to (B, N_h, T, d) deals the numbers of one token to several "
            "heads and positions. Cut the last axis, then transpose.",
            (
                (
                    "kv = kv.unflatten(-1, (self.N_h, -1)).transpose(1, 2)",
                    "kv = kv.reshape(len(x), self.N_h, x.shape[1], -1)",
                ),
            ),
        ),
        Wrong(
            "heads joined without transposing",
            "o.transpose(1, 2).flatten(2)",
            "o.reshape(len(x), x.shape[1], -1)",
            "o is (B, N_h, T, d_v), heads first. Bring positions to the front, then "
            "flatten heads and widths.",
        ),
        Wrong(
            "the rotated part in front",
            "q_C, q_R = q.split([self.d_h, self.d_R], dim=-1)",
            "q_R, q_C = q.split([self.d_R, self.d_h], dim=-1)",
            "Of each head's query the first d_h numbers are content, and the last d_R "
            "turn.",
        ),
        Wrong(
            "the value in front of the key",
            "k_C, v = kv.split([self.d_h, self.d_v], dim=-1)",
            "v, k_C = kv.split([self.d_v, self.d_h], dim=-1)",
            "Of each head's rows of kv_b_proj the first d_h make the key, and the rest "
            "the value.",
        ),
        Wrong(
            "the key not rotated",
            "rotate(k_R[:, None], rotation).expand",
            "k_R[:, None].expand",
            "Queries and key must turn both: only the difference of their positions is "
            "left in the score.",
        ),
        Wrong(
            "the queries not rotated",
            "rotate(q_R, rotation)]",
            "q_R]",
            "Queries and key must turn both: only the difference of their positions is "
            "left in the score.",
        ),
        Wrong(
            "the future seen",
            ", is_causal=True",
            "",
            "torch's attention hides nothing unless it is told: is_causal=True.",
        ),
        Wrong(
            "the scale of the content alone",
            ", is_causal=True",
            ", is_causal=True, scale=self.d_h**-0.5",
            "Content and position are one score, of d_h + d_R products. torch's own "
            "scale is that of the width it sees, and right here.",
        ),
    ),
    right=(
        "class Norm(nn.Module):\n"
        "    def __init__(self, width):\n"
        "        super().__init__()\n"
        "        self.weight = nn.Parameter(torch.ones(width))\n"
        "    def forward(self, x):\n"
        "        r = x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()\n"
        "        return x * r * self.weight\n"
        "class Matrix(nn.Module):\n"
        "    def __init__(self, n, m):\n"
        "        super().__init__()\n"
        "        self.weight = nn.Parameter(torch.empty(m, n))\n"
        "    forward = lambda self, x: x @ self.weight.T\n"
        "class LatentAttention(nn.Module):\n"
        "    def __init__(self, D, N_h, d_h, d_R, d_v, d_c, d_cq):\n"
        "        super().__init__()\n"
        "        self.sizes = N_h, d_h, d_R, d_v, d_c\n"
        "        self.o_proj = Matrix(N_h * d_v, D)\n"
        "        self.kv_b_proj = Matrix(d_c, N_h * (d_h + d_v))\n"
        "        self.kv_a_layernorm = Norm(d_c)\n"
        "        self.kv_a_proj_with_mqa = Matrix(D, d_c + d_R)\n"
        "        self.q_b_proj = Matrix(d_cq, N_h * (d_h + d_R))\n"
        "        self.q_a_layernorm = Norm(d_cq)\n"
        "        self.q_a_proj = Matrix(D, d_cq)\n"
        "    def forward(self, x, rotation):\n"
        "        (N_h, d_h, d_R, d_v, d_c), (B, T, _) = self.sizes, x.shape\n"
        "        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))\n"
        "        q = q.view(B, T, N_h, d_h + d_R)\n"
        "        kept = self.kv_a_proj_with_mqa(x)\n"
        "        c = self.kv_a_layernorm(kept[..., :d_c])\n"
        "        kv = self.kv_b_proj(c).view(B, T, N_h, d_h + d_v)\n"
        "        q_R = rotate(q[..., d_h:].transpose(1, 2), rotation)\n"
        "        k_R = rotate(kept[..., d_c:].unsqueeze(1), rotation)\n"
        "        s = torch.einsum('bthd,bshd->bhts', q[..., :d_h], kv[..., :d_h])\n"
        "        s = (s + q_R @ k_R.mT) / (d_h + d_R) ** 0.5\n"
        "        s = s + torch.full((T, T), -torch.inf, dtype=x.dtype).triu(1)\n"
        "        o = torch.einsum('bhts,bshv->bthv', s.softmax(-1), kv[..., d_h:])\n"
        "        return self.o_proj(o.reshape(B, T, -1))\n",
        "class LatentAttention(nn.Module):\n"
        "    def __init__(self, D, N_h, d_h, d_R, d_v, d_c, d_cq):\n"
        "        super().__init__()\n"
        "        self.cut = N_h, d_h, d_R, d_v, d_c\n"
        "        shapes = dict(q_a_proj=(D, d_cq),\n"
        "                      q_b_proj=(d_cq, N_h * (d_h + d_R)),\n"
        "                      kv_a_proj_with_mqa=(D, d_c + d_R),\n"
        "                      kv_b_proj=(d_c, N_h * (d_h + d_v)),\n"
        "                      o_proj=(N_h * d_v, D))\n"
        "        for name, shape in shapes.items():\n"
        "            setattr(self, name, nn.Linear(*shape, bias=False))\n"
        "        for name, n in dict(q_a_layernorm=d_cq, kv_a_layernorm=d_c).items():\n"
        "            self.add_module(name, nn.RMSNorm(n, 1e-6))\n"
        "    def forward(self, x, rotation):\n"
        "        N_h, d_h, d_R, d_v, d_c = self.cut\n"
        "        g = self.q_a_layernorm.weight\n"
        "        q = F.rms_norm(self.q_a_proj(x), g.shape, g, 1e-6)\n"
        "        q = q @ self.q_b_proj.weight.T\n"
        "        a = F.linear(x, self.kv_a_proj_with_mqa.weight)\n"
        "        c, k_R = self.kv_a_layernorm(a[..., :-d_R]), a[..., -d_R:]\n"
        "        W = self.kv_b_proj.weight.view(N_h, d_h + d_v, d_c)\n"
        "        q = torch.stack(q.chunk(N_h, dim=-1), dim=1)\n"
        "        q = torch.cat((q[..., :d_h] @ W[:, :d_h],\n"
        "                       rotate(q[..., d_h:], rotation)), 3)\n"
        "        k = torch.cat((c[:, None], rotate(k_R[:, None], rotation)), 3)\n"
        "        k = k.repeat(1, N_h, 1, 1)\n"
        "        o = F.scaled_dot_product_attention(\n"
        "            q, k, k[..., :d_c], is_causal=True, scale=(d_h + d_R) ** -0.5)\n"
        "        o = o @ W[:, d_h:].mT\n"
        "        return self.o_proj(torch.cat(o.unbind(1), dim=-1))\n",
    ),
)

CHECKS = [LAYER]
