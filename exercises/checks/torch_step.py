"""Chapter 6, MTP: one step in which what is shared counts once."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from grader.compare import ByName
from grader.spec import Case, Check, Wrong
from torch import nn

from checks.draws import normal

OWN = ("norm", "proj")  # of trunk and modules each
MAKE_LR = 0.5


class Part(nn.Module):
    """The trunk, or a module: a norm and a matrix of its own, and what is shared."""

    def __init__(self, embed: nn.Module, head: nn.Module, D: int, width: int) -> None:
        super().__init__()
        self.embed, self.head = embed, head
        self.norm, self.proj = nn.RMSNorm(D), nn.Linear(width, D, bias=False)


class Descent:
    """Gradient descent with the manners of torch's optimisers, and with decay.

    torch.optim itself takes a second to start when it is first used.
    """

    def __init__(self, groups: Iterable) -> None:
        groups = list(groups)
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        self.param_groups, seen = [], set()
        for group in groups:
            params = group["params"]
            params = [params] if isinstance(params, torch.Tensor) else list(params)
            if seen & {*map(id, params)}:
                raise ValueError(
                    "some parameters appear in more than one parameter group"
                )
            seen |= {*map(id, params)}
            new = {"weight_decay": 0.0, **group, "params": params}
            self.param_groups.append(new)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of an earlier step."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad = None if set_to_none else torch.zeros_like(p)

    @torch.no_grad()
    def step(self) -> None:
        """Move every weight that has a gradient, as often as it is listed."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p -= MAKE_LR * (p.grad + group["weight_decay"] * p)


def names(n: int) -> list[str]:
    """The weights of a trunk and n modules, each once."""
    parts = ["trunk", *(f"modules[{k}]" for k in range(n))]
    own = [f"{part}.{name}" for part in parts for name in OWN]
    return ["embed", "head", *own, "idle"]


def world(
    V: int, D: int, n: int, decay: float, clip: float, stale: float, seed: int
) -> Case:
    """Weights, what each use of them pulls at, and gradients of an earlier step."""
    shapes = {"embed": (V, D), "head": (V, D), "idle": (D, D)}
    shapes |= {name: (D,) for name in names(n) if name.endswith("norm")}
    shapes |= {
        name: (D, D if name.startswith("trunk") else 2 * D)
        for name in names(n) if name.endswith("proj")
    }  # fmt: skip
    weights = {
        name: normal(*shapes[name], seed=100 * seed + k)
        for k, name in enumerate(names(n))
    }
    uses = {
        name: normal(
            n + 1 if name in ("embed", "head") else 1,
            *shapes[name], seed=100 * seed + 50 + k,
        )
        for k, name in enumerate(names(n)) if name != "idle"
    }  # fmt: skip
    label = f"V={V}, D={D}, {n} module{'s' * (n != 1)}, decay={decay}, clip={clip}"
    label += ", gradients of a step before" * bool(stale)
    return Case(label, (weights, uses, decay, clip, stale))


def call(
    function: Callable,
    weights: Mapping[str, torch.Tensor],
    uses: Mapping[str, torch.Tensor],
    decay: float,
    clip: float,
    stale: float,
) -> object:
    """Build trunk and modules, a loss whose slopes are ``uses``, and let them step."""
    V, D = weights["embed"].shape
    n = len([name for name in weights if name.endswith("proj")]) - 1
    embed, head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
    parts = [Part(embed, head, D, (1 + bool(k)) * D) for k in range(n + 1)]
    trunk, modules = parts[0], parts[1:]
    trunk.idle = nn.Linear(D, D, bias=False)
    table = {"embed": embed.weight, "head": head.weight, "idle": trunk.idle.weight}
    for k, part in enumerate(parts):
        place = f"modules[{k - 1}]" if k else "trunk"
        for name in OWN:
            table[f"{place}.{name}"] = getattr(part, name).weight
    for name, parameter in table.items():
        parameter.data = weights[name].clone()
        parameter.grad = torch.full_like(parameter, stale) if stale else None
    table["idle"].grad = None
    total = sum((table[name] * use).sum() for name, slopes in uses.items()
                for use in slopes)  # fmt: skip
    norm = function(trunk, modules, total, Descent, decay, clip)
    if norm is None or norm is ...:
        return norm
    found = {name: table[name].detach().clone() for name in weights}
    rows = [found[name].flatten() for name in weights if "modules" in name]
    several = torch.cat(rows) if rows else torch.zeros(0)
    kept = {name: value for name, value in found.items() if "modules" not in name}
    return ByName(norm=norm, **kept, modules=several)


def oracle(
    weights: dict[str, np.ndarray],
    uses: dict[str, np.ndarray],
    decay: float,
    clip: float,
    stale: float,
) -> ByName:
    """Sum the uses, clip all together, step: a line each."""
    grads = {name: use.sum(axis=0) for name, use in uses.items()}
    norm = np.sqrt(sum(np.sum(g * g) for g in grads.values()))
    shrink = min(1.0, clip / norm)
    after = dict(weights)
    for name, g in grads.items():
        wd = 0.0 if name == "embed" or name.endswith("norm") else decay
        after[name] = weights[name] - MAKE_LR * (shrink * g + wd * weights[name])
    rows = [after[name].ravel() for name in weights if "modules" in name]
    kept = {name: value for name, value in after.items() if "modules" not in name}
    return ByName(
        norm=norm, **kept, modules=np.concatenate(rows) if rows else np.zeros(0)
    )


LISTED = "list(nn.ModuleList([trunk, *modules]).parameters())"
EACH = "[p for part in (trunk, *modules) for p in part.parameters()]"
CLIP = "norm = nn.utils.clip_grad_norm_(weights, clip)"
BACK = "    optimiser.zero_grad()\n    total.backward()\n"

STEP = Check(
    "mtp.torch.3",
    returns=("norm", "embed", "head", "trunk.norm", "trunk.proj", "idle", "modules"),
    call=call,
    oracle=oracle,
    cases=lambda: [
        world(V=2, D=1, n=1, decay=0.25, clip=1.0, stale=0.0, seed=1),
        world(V=4, D=3, n=2, decay=0.1, clip=2.0, stale=0.7, seed=2),
        world(V=5, D=2, n=3, decay=0.3, clip=1000.0, stale=0.0, seed=3),
        world(V=3, D=3, n=0, decay=0.2, clip=0.5, stale=-0.4, seed=4),
        world(V=3, D=2, n=1, decay=0.0, clip=50.0, stale=2.0, seed=5),
    ],
    hints=(
        "Ask for the parameters of all of them *together*. PyTorch lists each once if "
        "one module holds the others; lists that you join know nothing of each other.",
        "`nn.ModuleList([trunk, *modules]).parameters()` is such a list. "
        "`nn.utils.clip_grad_norm_(weights, clip)` clips them together, skips those "
        "without a gradient, and returns the norm as it was. Of tensors, `p is q` asks "
        "for the object; `p in list` compares numbers.",
        "Two groups, `p.ndim > 1 and p is not trunk.embed.weight` and the rest, with "
        "`weight_decay` decay and 0. Then zero_grad, `total.backward()`, clip, step, "
        "in that order.",
    ),
    wrong=(
        Wrong(
            "listed once for each user",
            LISTED,
            EACH,
            "Trunk and modules all list embedding and head. So they are counted in the "
            "norm and stepped D + 1 times; each weight belongs into the list once.",
        ),
        Wrong(
            "clipped once for each user",
            "clip_grad_norm_(weights, clip)",
            f"clip_grad_norm_({EACH}, clip)",
            "The optimiser has each weight once, the norm does not: the shared ones "
            "are in it D + 1 times, and are shrunk as often.",
        ),
        Wrong(
            "the modules forgotten",
            "[trunk, *modules]",
            "[trunk]",
            "The modules have weights of their own, beside what they share.",
        ),
        Wrong(
            "a mean over the uses",
            CLIP,
            f"trunk.head.weight.grad /= 1 + len(modules)\n    {CLIP}",
            "The head was used D + 1 times, and its gradient is the sum. lam / D has "
            "weighed the modules' share already.",
        ),
        Wrong(
            "gradients of the step before",
            "    optimiser.zero_grad()\n",
            "",
            "`backward` adds to what lies in .grad. Without zero_grad the last step's "
            "gradient is taken again.",
        ),
        Wrong(
            "zero_grad after backward",
            BACK,
            "    total.backward()\n    optimiser.zero_grad()\n",
            "That forgets what backward has just found, and nothing moves. Clear "
            "first, then go back.",
        ),
        Wrong(
            "clipped after the step",
            f"    {CLIP}\n    optimiser.step()\n",
            f"    optimiser.step()\n    {CLIP}\n",
            "By then the weights have moved, by gradients of any size. Clip first.",
        ),
        Wrong(
            "clipped before backward",
            f"    total.backward()\n    {CLIP}\n",
            f"    {CLIP}\n    total.backward()\n",
            "There is nothing to clip yet. First backward, then clip, then step.",
        ),
        Wrong(
            "each tensor clipped by itself",
            CLIP,
            "norm = nn.utils.get_total_norm(\n"
            "        [p.grad for p in weights if p.grad is not None])\n"
            "    for p in weights:\n"
            "        nn.utils.clip_grad_norm_(p, clip)",
            "That bends the direction: some tensors are shrunk and others are not. One "
            "norm over all of them, and one factor.",
        ),
        Wrong(
            "every number clipped by itself",
            CLIP,
            "norm = nn.utils.get_total_norm(\n"
            "        [p.grad for p in weights if p.grad is not None])\n"
            "    nn.utils.clip_grad_value_(weights, clip)",
            "That bends the direction. One factor for all gradients: clip_grad_norm_.",
        ),
        Wrong(
            "stretched as well as shrunk",
            CLIP,
            "norm = nn.utils.clip_grad_norm_(weights, clip)\n"
            "    for p in weights:\n"
            "        if p.grad is not None:\n"
            "            p.grad *= max(1.0, clip / float(norm))",
            "Only a norm that exceeds clip is changed; a smaller one stays.",
        ),
        Wrong(
            "the embedding decays",
            "p.ndim > 1 and p is not trunk.embed.weight",
            "p.ndim > 1",
            "The embedding is a table, not a matrix that multiplies: rows that are not "
            "looked up would shrink all the same. It is left out.",
            (("p.ndim < 2 or p is trunk.embed.weight", "p.ndim < 2"),),
        ),
        Wrong(
            "everything decays",
            '"weight_decay": 0.0',
            '"weight_decay": decay',
            "Norms and the embedding do not decay.",
        ),
        Wrong(
            "the head spared as well",
            "p.ndim > 1 and p is not trunk.embed.weight",
            "p.ndim > 1 and p.shape != trunk.embed.weight.shape",
            "The head has the embedding's shape and is a matrix like others: it "
            "decays. Ask for the object, `is`.",
            (
                (
                    "p.ndim < 2 or p is trunk.embed.weight",
                    "p.ndim < 2 or p.shape == trunk.embed.weight.shape",
                ),
            ),
        ),
    ),
    right=(
        "def one_step(trunk, modules, total, make, decay, clip):\n"
        "    seen = {}\n"
        "    for part in [trunk] + list(modules):\n"
        "        for name, p in part.named_parameters():\n"
        "            seen.setdefault(p, name)\n"
        "            p.grad = None\n"
        "    spared = lambda p: p.dim() == 1 or seen[p] == 'embed.weight'\n"
        "    optimiser = make([dict(params=[p], weight_decay=0.0 if spared(p)\n"
        "                           else decay) for p in seen])\n"
        "    total.backward()\n"
        "    graded = [p for p in seen if p.grad is not None]\n"
        "    norm = sum(p.grad.pow(2).sum() for p in graded) ** 0.5\n"
        "    if norm > clip:\n"
        "        for p in graded:\n"
        "            p.grad.mul_(clip / norm)\n"
        "    optimiser.step()\n"
        "    return norm\n",
        "def one_step(trunk, modules, total, make, decay, clip):\n"
        "    both = {id(p): p for part in (*modules, trunk)\n"
        "            for p in part.parameters()}\n"
        "    out = {id(trunk.embed.weight)} | {\n"
        "        i for i, p in both.items() if len(p.shape) < 2}\n"
        "    opt = make([\n"
        "        {'params': [both[i] for i in out]},\n"
        "        {'params': [p for i, p in both.items() if i not in out],\n"
        "         'weight_decay': decay}])\n"
        "    weights = list(both.values())\n"
        "    grads = torch.autograd.grad(total, weights, allow_unused=True)\n"
        "    for p, g in zip(weights, grads):\n"
        "        p.grad = g\n"
        "    norm = torch.cat([g.flatten() for g in grads if g is not None]).norm()\n"
        "    for p in weights:\n"
        "        if p.grad is not None:\n"
        "            p.grad = p.grad * torch.clamp(clip / norm, max=1.0)\n"
        "    opt.step()\n"
        "    return norm.item()\n",
    ),
)

CHECKS = [STEP]
