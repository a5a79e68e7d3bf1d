"""Chapter 6, MTP: a module around a block, with nothing of the trunk's own."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from grader.spec import Case, Check, Wrong
from grader.tensors import arriving
from torch import nn

from checks.draws import normal, rng
from checks.modules import refuse_other_names
from minidsv3.mtp import numpy_ref as library

OWN = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
PARTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
NAMES = (*OWN, *PARTS)


class Block(nn.Module):
    """Two parts with a weight each: a running sum in place of attention, and a tanh."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self.self_attn = nn.ModuleDict({"o_proj": nn.Linear(D, D, bias=False)})
        self.mlp = nn.ModuleDict({"down_proj": nn.Linear(D, D, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shapes: x (B, T, D) -> (B, T, D)."""
        x = x + self.self_attn["o_proj"](x.cumsum(dim=1))
        return x + self.mlp["down_proj"](x.tanh())


def block_forward(params: dict, x: np.ndarray) -> tuple[np.ndarray, tuple]:
    """The same in NumPy, and backwards below."""
    W_attn, W_mlp = (params[name] for name in PARTS)
    sums = x.cumsum(axis=1)
    x = x + sums @ W_attn.T
    t = np.tanh(x)
    return x + t @ W_mlp.T, (sums, t, W_attn, W_mlp)


def block_backward(dy: np.ndarray, saved: tuple) -> tuple[np.ndarray, dict]:
    """Gradients of the block: its lines in reverse."""
    sums, t, W_attn, W_mlp = saved
    dW_mlp = np.einsum("btd,bte->de", dy, t)
    dx = dy + (dy @ W_mlp) * (1 - t * t)
    dW_attn = np.einsum("btd,bte->de", dx, sums)
    dsums = dx @ W_attn
    dx = dx + dsums[:, ::-1].cumsum(axis=1)[:, ::-1]
    return dx, dict(zip(PARTS, (dW_attn, dW_mlp), strict=True))


class World(nn.Module):
    """Trunk's embedding and head, the block, and a module made around them.

    So all weights can be exchanged at once, after the module was made. Embedding and
    head are zeros until then, which a copy would still be.
    """

    def __init__(self, make: Callable, V: int, D: int, eps: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D, dtype=torch.float64)
        self.head = nn.Linear(D, V, bias=False, dtype=torch.float64)
        for shared in (self.embed, self.head):
            nn.init.zeros_(shared.weight)
        self.made = make(D, Block(D), self.embed, self.head, eps)

    def forward(self, h: torch.Tensor, tokens: torch.Tensor) -> object:
        """Ask the module."""
        return self.made(h, tokens)


def module(B: int, T: int, D: int, V: int, eps: float, seed: int) -> Case:
    """States behind a norm, embeddings and weights of sizes that tell them apart."""
    shapes = (D,), (D,), (D, 2 * D), (D,), (D, D), (D, D)
    params = {
        name: normal(*shape, seed=100 * seed + n, scale=0.7)
        for n, (name, shape) in enumerate(zip(NAMES, shapes, strict=True))
    }
    h = normal(B, T, D, seed=seed)
    tokens = rng(seed + 1).integers(0, V, (B, T))
    embed, head = normal(V, D, seed=seed + 2, scale=0.1), normal(V, D, seed=seed + 3)
    label = f"B={B}, T={T}, D={D}, V={V}, eps={eps:g}"
    return Case(label, (h, tokens, params, embed, head, eps))


def call(
    function: Callable,
    h: torch.Tensor,
    tokens: torch.Tensor,
    params: Mapping[str, torch.Tensor],
    embed: torch.Tensor,
    head: torch.Tensor,
    eps: float,
) -> object:
    """Make the module, look at its names, give the weights to all, call it."""
    V, D = embed.shape
    world = World(function, V, D, eps)
    refuse_other_names(world.made, params)
    weights = {f"made.{name}": weight for name, weight in params.items()}
    weights |= {"embed.weight": embed, "head.weight": head}
    return torch.func.functional_call(world, weights, (h, tokens))


def oracle(
    h: np.ndarray,
    tokens: np.ndarray,
    params: dict[str, np.ndarray],
    embed: np.ndarray,
    head: np.ndarray,
    eps: float,
) -> tuple:
    """The library's NumPy reference around the block above."""
    block = library.Block(block_forward, block_backward)
    h_k, saved = library.mtp_forward(params, h, embed[tokens], block, eps)
    logits = h_k @ head.T
    dlogits = arriving(logits.shape)
    dh_k = arriving(h_k.shape) + dlogits @ head
    dh, de, grads = library.mtp_backward(dh_k, saved)
    dembed = np.zeros(embed.shape)
    np.add.at(dembed, tokens, de)
    dhead = np.einsum("btv,btd->vd", dlogits, h_k)
    return h_k, logits, dh, dembed, dhead, *(grads[name] for name in NAMES)


LOOP = (
    "        for name, part in block.named_children():\n"
    "            self.add_module(name, part)\n"
)
BORROWED = "self.borrowed = block, embed, head"
PAIR = "[self.enorm(embed(tokens)), self.hnorm(h)]"

MODULE = Check(
    "mtp.torch.1",
    returns=("h", "logits"),
    gradients={"dh": 0, "dembed": 3, "dhead": 4}
    | {f"d{name}": (2, name) for name in NAMES},
    call=call,
    oracle=oracle,
    joint_scale=True,
    cases=lambda: [
        module(1, 2, 2, 3, 1e-6, 1),
        module(2, 3, 4, 5, 1e-6, 2),
        module(1, 4, 3, 2, 0.1, 3),
        module(3, 1, 5, 4, 1e-3, 4),
    ],
    hints=(
        "`self.add_module(name, part)` is an assignment whose name comes at run time. "
        "And what must *not* be registered has to be kept in something that nn.Module "
        "does not look into.",
        "`block.named_children()` gives names and parts. `nn.ModuleDict({'norm': "
        "...})` under the name shared_head gives shared_head.norm.weight. A tuple of "
        "modules registers nothing: `self.borrowed = block, embed, head`.",
        "Forwards: `pair = torch.cat([self.enorm(embed(tokens)), self.hnorm(h)], "
        "dim=-1)`, then `h = self.shared_head['norm'](block(self.eh_proj(pair)))`, "
        "and `h, head(h)`. block works on the parts that you have registered: they "
        "are the same objects.",
    ),
    wrong=(
        Wrong(
            "block. in the names",
            LOOP,
            "        self.block = block\n",
            "As an attribute, the block puts its name before those of its parts. In "
            "the released files they lie beside enorm: register the parts, one by one.",
        ),
        Wrong(
            "the block there twice",
            BORROWED,
            f"self.block = block\n        {BORROWED}",
            "`self.block = block` registers it, with all its parts, once more. Keep it "
            "where nn.Module does not look, in a tuple.",
        ),
        Wrong(
            "the block's parts not registered",
            LOOP,
            "",
            "Hidden in a tuple, the block works, and nobody saves or trains it. Its "
            "parts must be registered, under their own names.",
        ),
        Wrong(
            "embedding and head registered",
            BORROWED,
            f"self.embed, self.head = embed, head\n        {BORROWED}",
            "Assigning a module registers it: the file would hold embedding and head "
            "once more for each module. Keep them where nn.Module does not look.",
        ),
        Wrong(
            "the head registered",
            BORROWED,
            f'self.shared_head["head"] = head\n        {BORROWED}',
            "transformers writes a copy of the head there. Here the state dict has "
            "none: the head is the trunk's own.",
        ),
        Wrong(
            "copies of embedding and head",
            BORROWED,
            'copy = __import__("copy").deepcopy\n'
            "        self.borrowed = block, copy(embed), copy(head)",
            "A copy goes its own way from the first step on. Keep the trunk's own "
            "objects, so that what one learns the other knows.",
        ),
        Wrong(
            "a copy of the head",
            BORROWED,
            'copy = __import__("copy").deepcopy\n'
            "        self.borrowed = block, embed, copy(head)",
            "A copied head is trained on targets two steps on, and no trunk profits. "
            "Keep the trunk's own object.",
        ),
        Wrong(
            "the head shut off",
            "return h, head(h)",
            "return h, F.linear(h, head.weight.detach())",
            "Shared means that the module's loss reaches the head as well: call it, "
            "without detach.",
        ),
        Wrong(
            "the trunk shut off",
            "self.hnorm(h)",
            "self.hnorm(h.detach())",
            "That the trunk hears of the tokens further on is what MTP is for. No "
            "detach.",
        ),
        Wrong(
            "the state's half first",
            PAIR,
            "[self.hnorm(h), self.enorm(embed(tokens))]",
            "So the report prints it. The released weights have the embedding's half "
            "first.",
        ),
        Wrong(
            "the two norms exchanged",
            PAIR,
            "[self.hnorm(embed(tokens)), self.enorm(h)]",
            "enorm is for embeddings, hnorm for states.",
        ),
        Wrong(
            "the last norm never called",
            'self.shared_head["norm"](block(self.eh_proj(pair)))',
            "block(self.eh_proj(pair))",
            "shared_head.norm stands between the block and the shared head. It has a "
            "weight in the state dict, and you never call it.",
        ),
        Wrong(
            "the state handed on before its norm",
            'h = self.shared_head["norm"](block(self.eh_proj(pair)))',
            "h = block(self.eh_proj(pair))",
            "What the next module takes is what the head reads: the state behind the "
            "last norm.",
            (("return h, head(h)", 'return h, head(self.shared_head["norm"](h))'),),
        ),
        Wrong(
            "past the block",
            "(block(self.eh_proj(pair)))",
            "(self.eh_proj(pair))",
            "The block stands between projection and norm; else it is never trained.",
        ),
        Wrong(
            "eps left to torch",
            "nn.RMSNorm(D, eps=eps), nn.RMSNorm(D, eps=eps)",
            "nn.RMSNorm(D), nn.RMSNorm(D)",
            "Not told, nn.RMSNorm takes the spacing of floats at 1. Embeddings are "
            "small, so that eps counts: eps=eps, in all three.",
            (('{"norm": nn.RMSNorm(D, eps=eps)}', '{"norm": nn.RMSNorm(D)}'),),
        ),
        Wrong(
            "a bias left on",
            "nn.Linear(2 * D, D, bias=False)",
            "nn.Linear(2 * D, D)",
            "nn.Linear has a bias unless it is told bias=False, and DeepSeek's file "
            "has none to load into it.",
        ),
    ),
    right=(
        "class MTPModule(nn.Module):\n"
        "    def __init__(self, D, block, embed, head, eps):\n"
        "        super().__init__()\n"
        "        self.__dict__.update(block=block, embed=embed, head=head)\n"
        "        for name in ('enorm', 'hnorm'):\n"
        "            setattr(self, name, nn.RMSNorm(D, eps))\n"
        "        self.eh_proj = nn.Linear(D + D, D, False)\n"
        "        self.shared_head = nn.Module()\n"
        "        self.shared_head.norm = nn.RMSNorm(D, eps)\n"
        "        for name, part in block._modules.items():\n"
        "            setattr(self, name, part)\n"
        "    def forward(self, h, tokens):\n"
        "        D = h.shape[-1]\n"
        "        W = self.eh_proj.weight\n"
        "        x = self.enorm(self.embed(tokens)) @ W[:, :D].T\n"
        "        x = x + F.linear(self.hnorm(h), W[:, D:])\n"
        "        x = self.shared_head.norm(self.block(x))\n"
        "        return x, self.head(x)\n",
        "class Norm(nn.Module):\n"
        "    def __init__(self, D, eps):\n"
        "        super().__init__()\n"
        "        self.weight, self.eps = nn.Parameter(torch.ones(D)), eps\n"
        "    def forward(self, x):\n"
        "        size = (x * x).mean(-1, keepdim=True) + self.eps\n"
        "        return self.weight * x / size.sqrt()\n"
        "class MTPModule(nn.Module):\n"
        "    def __init__(self, D, block, embed, head, eps):\n"
        "        super().__init__()\n"
        "        self._ask = lambda: (block, embed, head)\n"
        "        self.enorm, self.hnorm = Norm(D, eps), Norm(D, eps)\n"
        "        self.eh_proj = nn.Linear(2 * D, D, bias=False)\n"
        "        self._modules.update(block.named_children())\n"
        "        self.shared_head = nn.ModuleDict()\n"
        "        self.shared_head['norm'] = Norm(D, eps)\n"
        "    def forward(self, h, tokens):\n"
        "        block, embed, head = self._ask()\n"
        "        e = F.embedding(tokens, embed.weight)\n"
        "        x = torch.cat((self.enorm(e), self.hnorm(h)), dim=2)\n"
        "        x = block(self.eh_proj(x))\n"
        "        x = self.shared_head['norm'](x)\n"
        "        return x, x @ head.weight.T\n",
    ),
)

CHECKS = [MODULE]
