"""Chapter 6, MTP: the loss of trunk and modules, all in one graph."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from grader.compare import WrongForm
from grader.spec import Case, Check, Wrong
from grader.tensors import arriving

from checks.draws import normal, rng
from minidsv3.primitives import numpy_ref as primitives


def chain(B: int, T: int, V: int, D: int, n: int, lam: float, seed: int) -> Case:
    """A text, the trunk's states, and n modules with two matrices each."""
    ids = rng(seed).integers(0, V, (B, T + 1))
    label = f"B={B}, T={T}, V={V}, D={D}, {n} module{'s' * (n != 1)}, lam={lam}"
    return Case(
        label,
        (
            normal(B, T, D, seed=seed + 1),
            ids,
            normal(V, D, seed=seed + 2),
            normal(V, D, seed=seed + 3),
            normal(n, 2, D, D, seed=seed + 4, scale=0.7),
            lam,
        ),
    )


def call(
    function: Callable,
    h: torch.Tensor,
    ids: torch.Tensor,
    table: torch.Tensor,
    W_head: torch.Tensor,
    weights: torch.Tensor,
    lam: float,
) -> object:
    """With an embedding, a head and modules that refuse what does not fit."""

    def embed(ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, table)

    def head(h: torch.Tensor) -> torch.Tensor:
        return F.linear(h, W_head)

    def module(A: torch.Tensor, C: torch.Tensor) -> Callable:
        def ask(h: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
            if h.shape != e.shape:
                raise WrongForm(
                    f"module(h, e): h is {tuple(h.shape)}, e is {tuple(e.shape)}; each "
                    "state needs its token."
                )
            return (F.linear(h, A) + F.linear(e, C)).tanh()

        return ask

    return function(h, ids, embed, head, [module(*pair) for pair in weights], lam)


def oracle(
    h: np.ndarray,
    ids: np.ndarray,
    table: np.ndarray,
    W_head: np.ndarray,
    weights: np.ndarray,
    lam: float,
) -> tuple:
    """The losses, and everything backwards by hand."""
    n, dloss = len(weights), float(arriving(()))
    states = [h]
    for k, (A, C) in enumerate(weights, start=1):
        e = table[ids[:, k:-1]]
        states.append(np.tanh(states[-1][:, :-1] @ A.T + e @ C.T))
    total, dstates, dW_head = 0.0, [], np.zeros(W_head.shape)
    for k, h_k in enumerate(states):
        share = lam / n if k else 1.0
        loss, saved = primitives.cross_entropy_forward(h_k @ W_head.T, ids[:, k + 1 :])
        total += share * loss
        dlogits = primitives.cross_entropy_backward(share * dloss, saved)
        dW_head += np.einsum("btv,btd->vd", dlogits, h_k)
        dstates.append(dlogits @ W_head)
    dtable, dweights = np.zeros(table.shape), np.zeros(weights.shape)
    for k in range(n, 0, -1):
        tokens, (A, C) = ids[:, k:-1], weights[k - 1]
        dz = dstates[k] * (1 - states[k] ** 2)
        dweights[k - 1, 0] = np.einsum("btd,bte->de", dz, states[k - 1][:, :-1])
        dweights[k - 1, 1] = np.einsum("btd,bte->de", dz, table[tokens])
        np.add.at(dtable, tokens, dz @ C)
        dstates[k - 1][:, :-1] += dz @ A
    return np.array(total), dstates[0], dtable, dW_head, dweights


NEXT = "h = module(h[:, :-1], embed(ids[:, k:-1]))"
ADDED = "total = total + lam / len(modules) * loss(h, ids[:, k + 1 :])"

LOSS = Check(
    "mtp.torch.2",
    returns=("loss",),
    gradients={"dh": 0, "dembed": 2, "dhead": 3, "dmodules": 4},
    call=call,
    oracle=oracle,
    cases=lambda: [
        chain(B=1, T=2, V=2, D=2, n=1, lam=0.5, seed=10),
        chain(B=2, T=5, V=4, D=3, n=2, lam=0.3, seed=20),
        chain(B=3, T=4, V=7, D=2, n=3, lam=1.7, seed=30),
        chain(B=2, T=3, V=5, D=4, n=0, lam=0.3, seed=40),
        chain(B=1, T=6, V=3, D=3, n=1, lam=0.1, seed=50),
    ],
    hints=(
        "One function for the loss of given states and given targets, and a loop in "
        "which the states grow shorter by one at each depth.",
        "Depth k takes `h[:, :-1]` of the depth before and the tokens `ids[:, k:-1]`, "
        "both of T - k places; its targets are `ids[:, k + 1 :]`. "
        "`F.cross_entropy(logits.flatten(0, 1), targets.flatten())` is a mean.",
        "`total = loss(h, ids[:, 1:])`; for k and module in `enumerate(modules, "
        "start=1)`: `h = module(h[:, :-1], embed(ids[:, k:-1]))` and `total = total + "
        "lam / len(modules) * loss(h, ids[:, k + 1 :])`.",
    ),
    wrong=(
        Wrong(
            "every depth from the trunk",
            "total = loss(h, ids[:, 1:])",
            "trunk, total = h, loss(h, ids[:, 1:])",
            "Module k reads what module k - 1 answered, not the trunk again: so it "
            "keeps the whole causal chain.",
            (("module(h[:, :-1],", "module(trunk[:, :-k],"),),
        ),
        Wrong(
            "the chain cut",
            "module(h[:, :-1],",
            "module(h[:, :-1].detach(),",
            "With detach, the trunk learns nothing of the tokens further on, and that "
            "is what MTP is for.",
        ),
        Wrong(
            "embeddings that learn nothing",
            "embed(ids[:, k:-1])",
            "embed(ids[:, k:-1]).detach()",
            "The embedding is shared: what a module looks up, it also teaches.",
        ),
        Wrong(
            "numbers instead of losses",
            "* loss(h, ids[:, k + 1 :])",
            "* loss(h, ids[:, k + 1 :]).item()",
            "`.item()` is a Python number without a past. The sum looks right, and the "
            "modules learn nothing.",
        ),
        Wrong(
            "not divided by the number of modules",
            "lam / len(modules)",
            "lam",
            "lam is for all modules together: each counts lam / D.",
        ),
        Wrong(
            "divided by all depths",
            "lam / len(modules)",
            "lam / (len(modules) + 1)",
            "The trunk's own loss is not among those that share lam: D modules, lam / "
            "D each.",
        ),
        Wrong(
            "the token that is asked for already",
            "loss(h, ids[:, k + 1 :])",
            "loss(h, ids[:, k:-1])",
            "Module k has read the token k further on. It is asked for the one behind "
            "it.",
        ),
        Wrong(
            "the token that the state has read",
            "embed(ids[:, k:-1])",
            "embed(ids[:, k - 1 : -2])",
            "State i has read t_i. Depth k gives it t_{i+k}, which it has not seen.",
        ),
        Wrong(
            "the first state dropped",
            "module(h[:, :-1],",
            "module(h[:, 1:],",
            "The last state goes, for nothing is behind it. Without the first, every "
            "state would stand with a token that is nearer than k.",
        ),
        Wrong(
            "a mean over T places",
            "* loss(h, ids[:, k + 1 :])",
            "* loss(h, ids[:, k + 1 :]) * h.shape[1] / (ids.shape[1] - 1)",
            "Depth k has T - k places, and its loss is their mean.",
        ),
        Wrong(
            "sums instead of means",
            "targets.flatten())",
            'targets.flatten(), reduction="sum")',
            "Each loss is a mean over its places, so that a depth with fewer places "
            "weighs as much as another.",
        ),
        Wrong(
            "classes on the last axis",
            "F.cross_entropy(head(h).flatten(0, 1), targets.flatten())",
            "F.cross_entropy(head(h), targets)",
            "F.cross_entropy takes axis 1 for the classes; with (B, T, V) that is "
            "time. Flatten batch and time into one axis.",
        ),
        Wrong(
            "rolled, so that the end meets the beginning",
            NEXT,
            "h = module(h, embed(ids[:, :-1].roll(-k, 1)))",
            "roll brings the first tokens back at the end, and the last states are "
            "asked for them. Cut them off instead.",
            (("loss(h, ids[:, k + 1 :])", "loss(h, ids[:, 1:].roll(-k, 1))"),),
        ),
        Wrong(
            "the last module alone",
            ADDED,
            "further = lam / len(modules) * loss(h, ids[:, k + 1 :])",
            "Every depth has its loss, and all are added.",
            (("return total", "return total + (further if modules else 0)"),),
        ),
    ),
    right=(
        "def mtp_loss(h, ids, embed, head, modules, lam):\n"
        "    e, T = embed(ids), h.shape[1]\n"
        "    losses = []\n"
        "    for k in range(len(modules) + 1):\n"
        "        if k:\n"
        "            h = modules[k - 1](h[:, : T - k], e[:, k:T])\n"
        "        logits = head(h).transpose(1, 2)\n"
        "        losses.append(F.cross_entropy(logits, ids[:, k + 1 :]))\n"
        "    if not modules:\n"
        "        return losses[0]\n"
        "    return losses[0] + lam * torch.stack(losses[1:]).mean()\n",
        "def mtp_loss(h, ids, embed, head, modules, lam):\n"
        "    total = 0\n"
        "    weights = [1] + [lam / len(modules) for _ in modules]\n"
        "    for k, weight in enumerate(weights):\n"
        "        targets = ids[:, k + 1 :]\n"
        "        log_p = head(h).log_softmax(-1)\n"
        "        picked = log_p.gather(-1, targets.unsqueeze(-1))\n"
        "        total = total - weight * picked.mean()\n"
        "        if k < len(modules):\n"
        "            h = modules[k](h.narrow(1, 0, h.shape[1] - 1),\n"
        "                           embed(ids[:, k + 1 : ids.shape[1] - 1]))\n"
        "    return total\n",
        "def mtp_loss(h, ids, embed, head, modules, lam):\n"
        "    B, T, D = h.shape\n"
        "    loss = F.cross_entropy(head(h).reshape(B * T, -1),\n"
        "                           ids[:, 1:].reshape(-1))\n"
        "    for k in range(1, len(modules) + 1):\n"
        "        h = modules[k - 1](h[:, :-1], embed(ids)[:, k:-1])\n"
        "        padded = F.pad(ids[:, k + 1:], (0, k), value=-100)\n"
        "        z = F.pad(head(h), (0, 0, 0, k)).reshape(B * T, -1)\n"
        "        loss += F.cross_entropy(z, padded.reshape(-1)) * lam / len(modules)\n"
        "    return loss\n",
    ),
)

CHECKS = [LOSS]
