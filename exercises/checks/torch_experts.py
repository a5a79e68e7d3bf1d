"""Chapter 6, MoE: the experts' backward pass as a torch.autograd.Function."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from grader.compare import WrongForm
from grader.spec import Case, Check, Wrong
from grader.tensors import arriving

from checks.draws import normal, rng
from minidsv3.primitives.numpy_ref import silu_backward, silu_forward

GRADIENTS = {"du": 0, "dgates": 1, "dW_gate": 2, "dW_up": 3, "dW_down": 4}
QUIET = 2.0**-60  # what arrives where the answers are too loud


def asked(N: int, D: int, width: int, E: int, K: int, seed: int) -> Case:
    """Random tokens and weights; one expert is not asked by anybody, if K allows it."""
    busy = rng(seed).permutation(E)[: max(K, E - 1)]
    experts = rng(seed + 1).permuted(np.tile(busy, (N, 1)), axis=1)[:, :K]
    segments = [(i, *np.nonzero(experts == i)) for i in range(E) if i in experts]
    shapes = (N, D), (N, K), (E, width, D), (E, width, D), (E, D, width)
    arrays = [
        normal(*shape, seed=10 * seed + n, scale=0.8) for n, shape in enumerate(shapes)
    ]
    label = f"{N} tokens, D={D}, I={width}, {K} of {E} experts"
    return Case(label, (*arrays, segments))


def too_loud() -> Case:
    """Answers beyond 2^128, messages of 2^-60: times W_down they are of size 2^4."""
    draw = rng(50).uniform
    shapes = (4, 2), (4, 2), (3, 3, 2), (3, 3, 2), (3, 2, 3)
    scales = 1.0, 1.0, 2.0**33, 2.0**33, 2.0**64
    arrays = (
        (draw(1, 2, shape) * scale).astype(np.float32)
        for shape, scale in zip(shapes, scales, strict=True)
    )
    experts = np.array([[0, 1], [1, 2], [2, 0], [1, 0]])
    segments = [(i, *np.nonzero(experts == i)) for i in range(3)]
    label = "float32, the answers would overflow; the result looked at is dgates"
    return Case(label, (*arrays, segments, True), graph=False)


def call(
    function: Callable,
    u: torch.Tensor,
    gates: torch.Tensor,
    W_gate: torch.Tensor,
    W_up: torch.Tensor,
    W_down: torch.Tensor,
    segments: Sequence,
    loud: bool = False,
) -> object:
    """Apply it; where the answers are too loud, ask for the gates' gradient alone."""
    given = [u, gates, W_gate, W_up, W_down]
    if not loud:
        return function.apply(*given, segments)
    leaves = [a.clone().requires_grad_() for a in given]
    y = function.apply(*leaves, segments)
    (dgates,) = torch.autograd.grad(y, leaves[1:2], torch.full_like(y, QUIET))
    if not dgates.isfinite().all():
        raise WrongForm("dgates overflows, as the answers do: are they made again?")
    return dgates


def oracle(
    u: np.ndarray,
    gates: np.ndarray,
    W_gate: np.ndarray,
    W_up: np.ndarray,
    W_down: np.ndarray,
    segments: Sequence,
    loud: bool = False,
) -> object:
    """Expert by expert, and back as in moe.5: answers kept, gates behind W_down."""
    y, dy = np.zeros(u.shape), arriving(u.shape)
    if loud:
        u, gates, W_gate, W_up, W_down = (
            a.astype(float) for a in (u, gates, W_gate, W_up, W_down)
        )
        dy = np.full(u.shape, QUIET)
    du, dgates = np.zeros(u.shape), np.zeros(gates.shape)
    dW_gate, dW_up, dW_down = (np.zeros(W.shape) for W in (W_gate, W_up, W_down))
    for i, t, k in segments:
        a, b = u[t] @ W_gate[i].T, u[t] @ W_up[i].T
        gated, saved = silu_forward(a)
        answers = (gated * b) @ W_down[i].T  # (n, D)
        y[t] += gates[t, k][:, None] * answers
        dgates[t, k] = (dy[t] * answers).sum(axis=1)
        do = gates[t, k][:, None] * dy[t]
        dW_down[i] = do.T @ (gated * b)
        dh = do @ W_down[i]
        da, db = silu_backward(dh * b, saved), dh * gated
        dW_gate[i], dW_up[i] = da.T @ u[t], db.T @ u[t]
        du[t] += da @ W_gate[i] + db @ W_up[i]
    return dgates if loud else (y, du, dgates, dW_gate, dW_up, dW_down)


def tiny() -> Case:
    """One token at two experts, one number wide."""
    segments = [(0, np.array([0]), np.array([1])), (2, np.array([0]), np.array([0]))]
    W = np.array([[[1.0, 0.5]], [[1.0, 1.0]], [[-1.0, 1.0]]])
    W_down = np.array([[[1.0], [2.0]], [[3.0], [3.0]], [[-1.0], [0.5]]])
    return Case(
        "one token, at experts 2 and 0 of three, D=2, I=1",
        (np.array([[1.0, -0.5]]), np.array([[2.0, 0.5]]), W, W + 0.5, W_down, segments),
    )


EXPERTS = Check(
    "moe.torch.2",
    returns=("y",),
    gradients=GRADIENTS,
    call=call,
    oracle=oracle,
    cases=lambda: [
        tiny(),
        asked(N=5, D=3, width=4, E=4, K=2, seed=10),
        asked(N=4, D=4, width=2, E=5, K=3, seed=20),
        asked(N=6, D=2, width=3, E=3, K=1, seed=30),
        asked(N=3, D=3, width=3, E=4, K=3, seed=40),
        too_loud(),
    ],
    hints=(
        "The lines of forward in reverse, expert by expert. What you need twice is "
        "`dy` times W_down: weighed by the gate it goes on to a and b, and unweighed "
        "it tells the gate, together with h.",
        "With `dh = dy[t] @ W_down[i]`, (n, I): `dgates[t, k] = (dh * h).sum(dim=1)`. "
        "With `g = gates[t, k, None]`, (n, 1): W_down learns `dy[t].T @ (g * h)`, and "
        "from `g * dh` come da and db. Of `kept`, each expert takes the first two: `a, "
        "b, *kept = kept`.",
        "`da = dh * b * sigma * (1 + a * (1 - sigma))`, `db = dh * a * sigma`, dh "
        "weighed by now. `dW_gate[i] = da.T @ u[t]`, dW_up the same with db; `du[t] += "
        "da @ W_gate[i] + db @ W_up[i]`. Return five gradients and None.",
    ),
    wrong=(
        Wrong(
            "the gate in its own gradient",
            "(dh * h).sum(dim=1)",
            "(g * dh * h).sum(dim=-1)",
            "y is linear in the gate, so its gradient does not depend on it: take dy "
            "W_down before it is weighed.",
        ),
        Wrong(
            "the gate twice",
            "dh = dy[t] @ W_down[i]",
            "dh = (g * dy[t]) @ W_down[i]",
            "You weigh dy, and then dh again. Weigh once, where I numbers stand.",
        ),
        Wrong(
            "W_down learns unweighed",
            "dy[t].T @ (g * h)",
            "dy[t].T @ h",
            "An expert hears dy as loud as its gate is, W_down too: weigh h, its I "
            "numbers are fewer than dy's.",
        ),
        Wrong(
            "a and b hear dy unweighed",
            "            dh = g * dh\n",
            "",
            "Unweighed, dy W_down is for the gate alone. What goes on to a and b is as "
            "loud as the gate.",
        ),
        Wrong(
            "the last expert's word alone",
            "du[t] += da",
            "du[t] = da",
            "A token was read by K experts. Their messages add up: +=.",
        ),
        Wrong(
            "silu as its own derivative",
            "dh * b * sigma * (1 + a * (1 - sigma))",
            "dh * b * a * sigma",
            "That is silu(a). Its derivative is sigma * (1 + a * (1 - sigma)).",
        ),
        Wrong(
            "the sigmoid in silu held fast",
            "sigma * (1 + a * (1 - sigma))",
            "sigma",
            "silu(a) is a times sigma(a), and sigma changes with a too: sigma * (1 + a "
            "* (1 - sigma)).",
        ),
        Wrong(
            "a and b exchanged",
            "a, b, *kept = kept",
            "b, a, *kept = kept",
            "Of each expert a was kept first, then b.",
        ),
        Wrong(
            "b for h",
            "h = a * sigma * b",
            "h = sigma * b",
            "h is silu(a) times b, and silu(a) is a * sigma(a).",
        ),
        Wrong(
            "up without its b",
            "db = dh * a * sigma",
            "db = dh * b * sigma",
            "h is a product. b's factor is silu(a), a * sigma.",
        ),
        Wrong(
            "the answers made again",
            "(dh * h).sum(dim=1)",
            "(dy[t] * (h @ W_down[i].T)).sum(dim=-1)",
            "In real numbers that is the same, and it costs a product more, D wide. "
            "The answer does not have to occur: dy W_down is there already, and so is "
            "h.",
        ),
        Wrong(
            "gate and up in one",
            "du[t] += da @ W_gate[i] + db @ W_up[i]",
            "du[t] += da @ W_gate[i]",
            "The token was read twice, by W_gate and by W_up. Both answer.",
        ),
        Wrong(
            "nothing for the segments",
            "dW_down, None",
            "dW_down",
            "PyTorch wants as many gradients as forward has arguments, and None where "
            "there is none: six.",
        ),
    ),
    right=(
        "class Experts(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, u, gates, W_gate, W_up, W_down, segments):\n"
        "        y = torch.zeros_like(u)\n"
        "        for i, t, k in segments:\n"
        "            h = F.silu(u[t] @ W_gate[i].T) * (u[t] @ W_up[i].T)\n"
        "            y.index_add_(0, t, (gates[t, k, None] * h) @ W_down[i].T)\n"
        "        ctx.saved = [\n"
        "            (u[t] @ W_gate[i].T, u[t] @ W_up[i].T) for i, t, k in segments]\n"
        "        ctx.save_for_backward(u, gates, W_gate, W_up, W_down)\n"
        "        ctx.segments = segments\n"
        "        return y\n"
        "    @staticmethod\n"
        "    def backward(ctx, dy):\n"
        "        u, gates, W_gate, W_up, W_down = ctx.saved_tensors\n"
        "        out = [torch.zeros_like(a) for a in ctx.saved_tensors]\n"
        "        for (i, t, k), (a, b) in zip(ctx.segments, ctx.saved):\n"
        "            x, g = u.index_select(0, t), gates[t, k]\n"
        "            heard = torch.einsum('nd,di->ni', dy[t], W_down[i])\n"
        "            act = F.silu(a)\n"
        "            out[1][t, k] = torch.einsum('ni,ni->n', heard, act * b)\n"
        "            out[4][i] = torch.einsum('nd,ni,n->di', dy[t], act * b, g)\n"
        "            heard = heard * g.unsqueeze(1)\n"
        "            da = torch.ops.aten.silu_backward(heard * b, a)\n"
        "            db = heard * act\n"
        "            out[2][i], out[3][i] = da.mT.mm(x), db.mT.mm(x)\n"
        "            out[0].index_add_(0, t, da.mm(W_gate[i]) + db.mm(W_up[i]))\n"
        "        return (*out, None)\n",
        "class Experts(torch.autograd.Function):\n"
        "    @staticmethod\n"
        "    def forward(ctx, u, gates, W_gate, W_up, W_down, segments):\n"
        "        y, kept = torch.zeros_like(u), []\n"
        "        for i, t, k in segments:\n"
        "            a, b = u[t] @ W_gate[i].T, u[t] @ W_up[i].T\n"
        "            y[t] += gates[t, k, None] * ((F.silu(a) * b) @ W_down[i].T)\n"
        "            kept += [a, b]\n"
        "        ctx.save_for_backward(u, gates, W_gate, W_up, W_down, *kept)\n"
        "        ctx.segments = segments\n"
        "        return y\n"
        "    @staticmethod\n"
        "    @torch.autograd.function.once_differentiable\n"
        "    def backward(ctx, dy):\n"
        "        u, gates, A, B, C, *kept = ctx.saved_tensors\n"
        "        du, dg = u * 0, gates * 0\n"
        "        dA, dB, dC = A * 0, B * 0, C * 0\n"
        "        for n, (i, t, k) in enumerate(ctx.segments):\n"
        "            a, b = kept[2 * n], kept[2 * n + 1]\n"
        "            g, x = gates[t, k][:, None], u[t]\n"
        "            s = 1 / (1 + (-a).exp())\n"
        "            do = g * dy[t]\n"
        "            dh = do @ C[i]\n"
        "            h = a * s * b\n"
        "            dg[t, k] = ((dh * h).sum(1) / g[:, 0])\n"
        "            dC[i] = do.T @ h\n"
        "            da = dh * b * (s + a * s * (1 - s))\n"
        "            both = torch.cat([da, dh * a * s], 1)\n"
        "            dA[i], dB[i] = (both.T @ x).chunk(2)\n"
        "            du[t] = du[t] + both @ torch.cat([A[i], B[i]])\n"
        "        return du, dg, dA, dB, dC, None\n",
    ),
)

CHECKS = [EXPERTS]
