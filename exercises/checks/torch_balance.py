"""Chapter 6, MoE: biases that are saved and never trained, and the balance loss."""

from collections.abc import Callable

import numpy as np
import torch
from grader.compare import WrongForm
from grader.spec import Case, Check, Wrong
from grader.tensors import arriving
from torch import nn

from checks.draws import normal, rng
from minidsv3.moe import numpy_ref as library

NAME = "e_score_correction_bias"


def batch(B: int, T: int, E: int, K: int, seed: int, idle: int = 0) -> Case:
    """Sequences that lean to different experts; the last ones stay idle, if asked."""
    z = normal(B, T, E, seed=seed) + 2 * normal(B, 1, E, seed=seed + 1)
    s = 1 / (1 + np.exp(-z))
    liked = z.reshape(B * T, E) + rng(seed + 2).gumbel(size=(B * T, E))
    liked[:, E - idle :] = -np.inf
    experts = np.argsort(-liked, axis=1)[:, :K]
    label = f"{B} sequences of {T} tokens, {K} of {E} experts"
    label += ", the last idle" * bool(idle)
    b = normal(E, seed=seed + 3, scale=0.3)
    return Case(label, (s, b, experts, K, 0.05))


def call(
    function: Callable,
    s: torch.Tensor,
    b: torch.Tensor,
    experts: torch.Tensor,
    K: int,
    gamma: float,
) -> tuple:
    """Make one, look at what it holds, give it biases, ask for both."""
    module = function(len(b))
    if not isinstance(module, nn.Module):
        raise WrongForm("Your class is no nn.Module: `class ...(nn.Module):`.")
    held = getattr(module, NAME, None)
    if not isinstance(held, torch.Tensor):
        raise WrongForm(f"The module has no tensor `{NAME}`.")
    if weights := [*module.parameters()]:
        frozen = "" if weights[0].requires_grad else ", a frozen one"
        raise WrongForm(f"Among the module's parameters is `{NAME}`{frozen}.")
    if NAME not in dict(module.named_buffers()):
        raise WrongForm(f"`.to(device)` does not move `{NAME}`: it is not registered.")
    if [*module.state_dict()] != [NAME]:
        raise WrongForm(
            f"The state dict holds {[*module.state_dict()]}, not [{NAME!r}]."
        )
    if held.shape != b.shape or held.any():
        raise WrongForm(f"`{NAME}` is {held.tolist()} at first; expected E zeros.")
    module.to(s.dtype).load_state_dict({NAME: b})
    loss, held = module.loss(s, K), getattr(module, NAME)
    module.update(experts, gamma)
    if module.state_dict()[NAME].data_ptr() != held.data_ptr():
        raise WrongForm("After `update`, the biases are another tensor than before.")
    return loss, held.clone()


def oracle(
    s: np.ndarray, b: np.ndarray, experts: np.ndarray, K: int, gamma: float
) -> tuple:
    """The library's NumPy reference."""
    loss, saved = library.balance_forward(s, K)
    moved = library.update_bias(b, library.load(experts, len(b)), gamma)
    return loss, moved, library.balance_backward(float(arriving(())), saved)


FIRST = 'self.register_buffer("e_score_correction_bias", torch.zeros(E))'
VISITS = "visits = torch.zeros_like(s).scatter(-1, best, 1.0)"
SUM = "s.sum(dim=-1, keepdim=True)"

BALANCE = Check(
    "moe.torch.3",
    returns=("loss", "b"),
    gradients={"ds": 0},
    call=call,
    oracle=oracle,
    cases=lambda: [
        Case(
            "one sequence of two tokens, one of three experts; the last is idle",
            (
                np.array([[[0.5, 0.25, 0.125], [0.75, 0.5, 0.25]]]),
                np.array([0.2, 0.0, -0.1]),
                np.array([[0], [1]]),
                1,
                0.01,
            ),
        ),
        batch(B=2, T=4, E=5, K=2, seed=10, idle=1),
        batch(B=3, T=3, E=4, K=1, seed=20),
        batch(B=1, T=6, E=6, K=3, seed=30, idle=2),
        Case(
            "one expert has its share exactly",
            (
                batch(B=2, T=3, E=3, K=2, seed=40).args[0],
                np.array([0.0, 0.25, -0.5]),
                np.array([[0, 1], [1, 0], [0, 2]]),
                2,
                0.1,
            ),
        ),
        batch(B=2, T=1, E=4, K=2, seed=50),
    ],
    hints=(
        "A tensor that a module saves and moves but does not train is a buffer. And of "
        "the loss, one factor counts and the other one learns.",
        "`self.register_buffer(name, torch.zeros(E))`. Counts: "
        "`experts.flatten().bincount(minlength=E)`. In place means `b += ...` or "
        "`b.add_(...)` on the tensor itself. Visits of a token: "
        "`torch.zeros_like(s).scatter(-1, best, 1.0)` with the indices of `s.topk(K, "
        "dim=-1)`.",
        "`b += gamma * (counts.mean() - counts).sign()`, counts as floats. `f = E / "
        "(K * T) * visits.sum(dim=1)` and `P = (s / s.sum(dim=-1, "
        "keepdim=True)).mean(dim=1)`, both (B, E); then `(f * P).sum(dim=1).mean()`.",
    ),
    wrong=(
        Wrong(
            "the bias a parameter",
            FIRST,
            "self.e_score_correction_bias = nn.Parameter(torch.zeros(E))",
            "A parameter is what an optimiser moves, by weight decay at least. This "
            "one is moved by a rule alone: register_buffer.",
        ),
        Wrong(
            "a parameter that is frozen",
            FIRST,
            "self.e_score_correction_bias = nn.Parameter(\n"
            "            torch.zeros(E), requires_grad=False)",
            "It still is among the parameters that an optimiser is handed. What is not "
            "trained by nature is a buffer.",
        ),
        Wrong(
            "a tensor that nobody registered",
            FIRST,
            "self.e_score_correction_bias = torch.zeros(E)",
            "A plain tensor is an attribute like any other: it is not saved, and stays "
            "behind when the model goes to a GPU. register_buffer.",
        ),
        Wrong(
            "a buffer that is not saved",
            "torch.zeros(E))",
            "torch.zeros(E), persistent=False)",
            "persistent=False keeps it out of the state dict, and a loaded model would "
            "begin with biases of zero.",
        ),
        Wrong(
            "another tensor in its place",
            "b += gamma",
            "self.e_score_correction_bias = b + gamma",
            "Who held the old tensor, a compiled graph or another process, never hears "
            "of the new one. In place: b += ...",
        ),
        Wrong(
            "a sum that is let go",
            "b += gamma",
            "b = b + gamma",
            "`b = b + ...` makes a new tensor and gives it the name b, within this "
            "function. The buffer does not move.",
        ),
        Wrong(
            "the wrong way round",
            "(counts.mean() - counts)",
            "(counts - counts.mean())",
            "So the full ones get fuller. Who had more than the mean must be chosen "
            "less: its bias falls.",
        ),
        Wrong(
            "by the size of the violation",
            "(counts.mean() - counts).sign()",
            "(counts.mean() - counts)",
            "Only the side counts, not how far: by gamma or not at all.",
        ),
        Wrong(
            "idle experts forgotten",
            ".bincount(minlength=len(b))",
            ".bincount()",
            "bincount ends at the largest number that occurs. The experts behind it "
            "have been idle, and that must be counted too: minlength.",
        ),
        Wrong(
            "f made of shares",
            VISITS,
            "visits = K * s / s.sum(dim=-1, keepdim=True)",
            "f counts visits, as whole numbers. Made of shares it would have a "
            "gradient, and the loss would be another one.",
        ),
        Wrong(
            "a straight-through count",
            VISITS,
            VISITS + "\n        visits = visits + s - s.detach()",
            "That counts right and lends the count a gradient. f is a constant here; "
            "the loss learns through P alone.",
        ),
        Wrong(
            "P detached",
            f"P = (s / {SUM})",
            f"P = (s / {SUM}).detach()",
            "f has no gradient by nature. If P has none either, nobody learns.",
        ),
        Wrong(
            "the sum below the fraction detached",
            SUM,
            f"{SUM}.detach()",
            "P is a share: it changes with the sum too. Leave the denominator in the "
            "graph.",
        ),
        Wrong(
            "the K best with their biases",
            "s.topk(K, dim=-1)",
            "(s + self.e_score_correction_bias).topk(K, dim=-1)",
            "The report counts the K best of s, without bias.",
        ),
        Wrong(
            "over the batch, not by sequence",
            "return (f * P).sum(dim=1).mean()",
            "return (f.mean(dim=0) * P.mean(dim=0)).sum()",
            "Two sequences may lean to different experts and look balanced together. "
            "Multiply f and P within each sequence, then take the mean.",
        ),
        Wrong(
            "the sum over sequences",
            "return (f * P).sum(dim=1).mean()",
            "return (f * P).sum()",
            "Over the experts it is a sum, over the sequences a mean.",
        ),
        Wrong(
            "K forgotten in f",
            "E / (K * T)",
            "E / T",
            "A token visits K experts. If all are visited alike, every f is 1: divide "
            "by K T.",
        ),
    ),
    right=(
        "class Balance(nn.Module):\n"
        "    def __init__(self, E):\n"
        "        super().__init__()\n"
        "        self.E = E\n"
        "        zeros = torch.zeros(E, requires_grad=False)\n"
        "        self.register_buffer('e_score_correction_bias', zeros, True)\n"
        "    @torch.no_grad()\n"
        "    def update(self, experts, gamma):\n"
        "        one_hot = F.one_hot(experts, self.E)\n"
        "        counts = one_hot.sum((0, 1)) * self.E\n"
        "        step = torch.sign(experts.numel() - counts)\n"
        "        self.e_score_correction_bias.add_(step, alpha=gamma)\n"
        "    def loss(self, s, K):\n"
        "        B, T, E = s.shape\n"
        "        with torch.no_grad():\n"
        "            rank = s.argsort(-1, descending=True).argsort(-1)\n"
        "            f = (rank < K).to(s.dtype).mean(1) * E / K\n"
        "        shares = F.normalize(s, p=1, dim=-1)\n"
        "        return torch.einsum('be,bte->', f, shares) / (B * T)\n",
        "class Balance(nn.Module):\n"
        "    def __init__(self, E):\n"
        "        nn.Module.__init__(self)\n"
        "        self.register_buffer('e_score_correction_bias', torch.zeros((E,)))\n"
        "    def update(self, experts, gamma):\n"
        "        b = self.e_score_correction_bias\n"
        "        with torch.no_grad():\n"
        "            for i in range(len(b)):\n"
        "                count = int((experts == i).sum())\n"
        "                if count * len(b) < experts.numel():\n"
        "                    b[i] += gamma\n"
        "                elif count * len(b) > experts.numel():\n"
        "                    b[i] -= gamma\n"
        "        return b\n"
        "    def loss(self, s, K):\n"
        "        total = 0\n"
        "        for one in s:\n"
        "            T, E = one.shape\n"
        "            last = one.detach().topk(K).values[:, -1:]\n"
        "            f = (one.detach() >= last).double().sum(0) * E / K / T\n"
        "            P = (one / one.sum(1, keepdim=True)).mean(0)\n"
        "            total = total + f @ P\n"
        "        return total / len(s)\n",
    ),
)

CHECKS = [BALANCE]
