"""Chapter 6, MoE: the router, which stays exact under autocast."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from grader.compare import WrongForm
from grader.spec import Case, Check, Wrong
from grader.tensors import arriving

from checks.draws import normal
from checks.modules import rounded
from minidsv3.moe import numpy_ref as library

NARROW = torch.bfloat16, torch.float16


def tokens(
    N: int,
    D: int,
    E: int,
    K: int,
    groups: tuple[int, int],
    seed: int,
    how: str = "",
    level: float = -0.6,
) -> Case:
    """Random tokens; of ``groups`` some stay open. The biases are mostly negative."""
    dtype = np.float32 if how else float
    u, W = normal(N, D, seed=seed), normal(E, D, seed=seed + 1, scale=0.8)
    b = normal(E, seed=seed + 2, scale=0.5) + level
    if how == "bfloat16":
        u = rounded(u)
    label = f"{N} tokens, D={D}, {K} of {E} experts, {groups[1]} of {groups[0]} groups"
    label += {
        "": "", "autocast": ", under autocast", "bfloat16": ", autocast, u in bfloat16",
    }[how]  # fmt: skip
    arrays = (a.astype(dtype) for a in (u, W, b))
    return Case(label, (*arrays, K, *groups, 1.8, how))


def call(
    function: Callable,
    u: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor,
    K: int,
    n_group: int,
    topk_group: int,
    lam: float,
    how: str = "",
) -> object:
    """As it is, or where autocast is on, u perhaps already in bfloat16."""
    if how == "bfloat16":
        u = u.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(how)):
        value = function(u, W, b, K, n_group, topk_group, lam)
    if isinstance(value, tuple | list) and len(value) == 3:
        for name, result in zip(("gates", "s"), value[1:], strict=True):
            if getattr(result, "dtype", None) in NARROW:
                raise WrongForm(f"Your {name} come out in {result.dtype}.")
    return value


def oracle(
    u: np.ndarray,
    W: np.ndarray,
    b: np.ndarray,
    K: int,
    n_group: int,
    topk_group: int,
    lam: float,
    how: str = "",
) -> tuple:
    """The library's NumPy reference, in float64."""
    config = SimpleNamespace(
        n_group=n_group, topk_group=topk_group, num_experts_per_tok=K,
        routed_scaling_factor=lam,
    )  # fmt: skip
    params = {"gate.weight": W.astype(float), library.BIAS: b.astype(float)}
    routing, saved = library.route_forward(params, u.astype(float), config)
    experts, gates, s = routing
    du, dW = library.route_backward(arriving(gates.shape), saved, arriving(s.shape))
    du = rounded(du) if how == "bfloat16" else du
    return experts, gates, s, du, dW, np.zeros(b.shape)


SCORES = "s = (u.to(wide) @ W.to(wide).T).sigmoid()  # (N, E)"
SHARES = "chosen.sum(dim=1, keepdim=True)"
EXACT = "with torch.autocast(u.device.type, enabled=False):"

ROUTE = Check(
    "moe.torch.1",
    returns=("experts", "gates", "s"),
    gradients={"du": 0, "dW": 1, "db": 2},
    call=call,
    oracle=oracle,
    cases=lambda: [
        Case(
            "one token, two of four experts, one of two groups",
            (
                np.array([[1.0, -1.0]]),
                np.array([[2.0, 0.0], [-1.0, 1.0], [0.5, 0.0], [0.0, -1.0]]),
                np.array([-0.5, -0.7, -0.4, -0.6]),
                2,
                2,
                1,
                2.5,
            ),
        ),
        tokens(N=6, D=4, E=8, K=3, groups=(4, 2), seed=10),
        tokens(N=5, D=3, E=9, K=2, groups=(3, 2), seed=20, level=-2.0),
        tokens(N=4, D=5, E=5, K=1, groups=(1, 1), seed=30),
        tokens(N=3, D=2, E=4, K=4, groups=(2, 2), seed=40, level=0.3),
        tokens(N=4, D=3, E=4, K=2, groups=(4, 4), seed=50),
        tokens(N=5, D=8, E=6, K=2, groups=(2, 1), seed=60, how="autocast"),
        tokens(N=4, D=6, E=8, K=3, groups=(4, 2), seed=70, how="bfloat16"),
    ],
    hints=(
        "Two things at once: a region in which autocast does not rule, and inputs that "
        "are wide when they meet in the product. What follows is moe.1 and moe.2.",
        "`with torch.autocast(u.device.type, enabled=False):` around it all; `wide = "
        "torch.promote_types(u.dtype, torch.float32)` is the dtype. `choice.unflatten("
        "-1, (n_group, -1))` makes groups, `.topk(2, dim=-1).values` their two best, "
        "`s.gather(1, experts)` picks.",
        "`closed = torch.ones_like(score, dtype=torch.bool).scatter(1, best, False)`, "
        "then `grouped.masked_fill(closed[..., None], -torch.inf).flatten(1)` and "
        "`.topk(K, dim=-1).indices`. The gates are `lam * chosen / chosen.sum(dim=-1, "
        "keepdim=True)`.",
    ),
    wrong=(
        Wrong(
            "autocast left on",
            EXACT,
            "if True:",
            "Widening the inputs is not enough: autocast narrows them again, at the "
            "product itself. Turn it off around the router.",
        ),
        Wrong(
            "widened after the product",
            SCORES,
            "s = (u @ W.to(u.dtype).T).to(wide).sigmoid()",
            "What the product has rounded to three digits, no later conversion brings "
            "back. Turn autocast off, and widen what goes into the product.",
            ((EXACT, "if True:"),),
        ),
        Wrong(
            "W narrowed to u",
            SCORES,
            "s = (u @ W.to(u.dtype).T).to(wide).sigmoid()",
            "Where u is in bfloat16, W follows it there, and so does the product. "
            "Widen u instead: both must be float32 when they meet.",
        ),
        Wrong(
            "everything through float32",
            "torch.promote_types(u.dtype, torch.float32)",
            "torch.float32",
            "float32 at least: that narrows float64. `torch.promote_types(u.dtype, "
            "torch.float32)` is the wider of the two.",
        ),
        Wrong(
            "narrowed again at the end",
            "return experts, gates, s",
            "return experts, gates.to(u.dtype), s.to(u.dtype)",
            "Affinities go into the balance loss and gates into the gradient of the "
            "router. They stay wide, whatever u was.",
        ),
        Wrong(
            "gates from the biased scores",
            "s.gather(1, experts)",
            "(s + b).gather(1, experts)",
            "`topk` offers its values, and they are those of s + b. The gates are made "
            "of s; the bias decides only who is chosen.",
        ),
        Wrong(
            "closed groups at 0",
            "-torch.inf",
            "0.0",
            "With negative biases the open experts are below 0, and the closed ones "
            "win. Closed is -inf.",
        ),
        Wrong(
            "a group by its best",
            "grouped.topk(2, dim=-1).values.sum(dim=-1)",
            "grouped.amax(dim=-1)",
            "A group is as good as the sum of its two best numbers, not as the best.",
        ),
        Wrong(
            "a group by all its experts",
            "grouped.topk(2, dim=-1).values.sum(dim=-1)",
            "grouped.sum(dim=-1)",
            "A group is as good as the sum of its two best numbers; the others do not "
            "count.",
        ),
        Wrong(
            "all groups open",
            "if topk_group < n_group:",
            "if False:",
            "Only the experts of the best topk_group groups may be chosen.",
        ),
        Wrong(
            "groups and experts by unbiased scores",
            "choice = s.detach() + b.detach()",
            "choice = s.detach()",
            "Then the bias does nothing at all. Groups and experts are chosen by s + "
            "b.",
        ),
        Wrong(
            "a softmax over the experts",
            ".T).sigmoid()",
            ".T).softmax(dim=-1)",
            "In a softmax the experts compete. DeepSeek-V3 scores each by itself, with "
            "a sigmoid.",
        ),
        Wrong(
            "shares of all experts",
            SHARES,
            "s.sum(dim=1, keepdim=True)",
            "The gates of a token sum to lam. Only the chosen ones share it.",
        ),
        Wrong(
            "lam forgotten",
            "lam * chosen",
            "chosen",
            "The gates of a token sum to lam, 2.5 in DeepSeek-V3.",
        ),
        Wrong(
            "gates without gradient",
            "chosen = s.gather",
            "chosen = s.detach().gather",
            "The choice has no gradient, for an index has none. The affinities of the "
            "chosen have one, and through it the router learns.",
        ),
        Wrong(
            "the sum below the fraction detached",
            SHARES,
            SHARES + ".detach()",
            "A share changes with the sum too: what one expert gains, the others lose. "
            "Leave the denominator in the graph.",
        ),
        Wrong(
            "affinities without gradient",
            "return experts, gates, s",
            "return experts, gates, s.detach()",
            "The balance loss reads the affinities, and only through it do the experts "
            "that were not chosen hear anything.",
        ),
    ),
    right=(
        "def route(u, W, b, K, n_group, topk_group, lam):\n"
        "    if u.dtype != torch.float64:\n"
        "        u, W, b = u.float(), W.float(), b.float()\n"
        "    with torch.autocast('cpu', enabled=False):\n"
        "        s = torch.sigmoid(F.linear(u, W))\n"
        "        with torch.no_grad():\n"
        "            choice = s + b\n"
        "            size = choice.shape[1] // n_group\n"
        "            groups = choice.view(-1, n_group, size)\n"
        "            two = groups.sort(-1, descending=True).values[..., :2].sum(-1)\n"
        "            order = two.argsort(-1, descending=True).argsort(-1)\n"
        "            closed = (order >= topk_group).repeat_interleave(size, 1)\n"
        "            choice = torch.where(closed, float('-inf'), choice)\n"
        "            experts = choice.argsort(-1, descending=True)[:, :K]\n"
        "        chosen = torch.take_along_dim(s, experts, 1)\n"
        "        gates = lam * F.normalize(chosen, p=1, dim=1)\n"
        "    return experts, gates, s\n",
        "def route(u, W, b, K, n_group, topk_group, lam):\n"
        "    kind = torch.float64 if u.dtype == torch.float64 else torch.float32\n"
        "    s = 1 / (1 + torch.exp(-(u[:, None].to(kind) * W.to(kind)).sum(-1)))\n"
        "    rows = []\n"
        "    for row in (s + b).tolist():\n"
        "        groups = [row[g::1][:len(row) // n_group]\n"
        "                  for g in range(0, len(row), len(row) // n_group)]\n"
        "        good = sorted(range(n_group), key=lambda g:\n"
        "                      -sum(sorted(groups[g])[-2:]))[:topk_group]\n"
        "        able = [e for e in range(len(row))\n"
        "                if e // (len(row) // n_group) in good]\n"
        "        rows.append(sorted(able, key=lambda e: -row[e])[:K])\n"
        "    experts = torch.tensor(rows)\n"
        "    g = s[torch.arange(len(s))[:, None], experts]\n"
        "    return experts, g / (g.sum(1)[:, None] + 1e-20) * lam, s\n",
    ),
)

CHECKS = [ROUTE]
