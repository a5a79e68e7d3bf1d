r"""MoE in PyTorch: the router by autograd, the experts by our own backward pass.

`MoE` has the parameters of `minidsv3.moe.numpy_ref` under the same names, and the bias
as a buffer. N = B*T tokens, P = N*K pairs of a token and an expert. The experts are
computed many at a time: sorted by load, cut into slabs of nearly equal load, filled up
to the fullest of the slab, one batched product a slab. `Experts` is a
``torch.autograd.Function`` because autograd would keep every intermediate, of which
most are cheaper to make again, and would add up the tokens' gradients pair by pair.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidsv3.config import Config
from minidsv3.moe import numpy_ref
from minidsv3.parameters import cut, moe_shapes
from minidsv3.primitives.torch_port import SwiGLU

SLAB = 16  # experts of one batched product


class Routing(NamedTuple):
    """Where each of N tokens goes."""

    experts: Tensor  # (N, K) the chosen ones, the best first
    gates: Tensor  # (N, K) how much each answer counts
    affinities: Tensor  # (N, E) the scores of all, without bias


# --- the router ---------------------------------------------------------------------


def top(scores: Tensor, k: int) -> Tensor:
    """Indices of the k best along the last axis, best first: (..., E) -> (..., k).

    Of equal scores the lower index wins; ``topk`` leaves that open. On the processor
    NumPy's `top` is asked: its maximum is eight times as fast as torch's (measured).
    """
    if scores.device.type == "cpu":
        return torch.from_numpy(numpy_ref.top(scores.detach().numpy(), k))
    return top_anywhere(scores, k)


def top_anywhere(scores: Tensor, k: int) -> Tensor:
    """The same in torch's own operations, for tensors of any device."""
    scores, best = scores.clone(), []
    for _ in range(k):
        best.append(scores.argmax(dim=-1, keepdim=True))  # the first of equals
        scores.scatter_(-1, best[-1], -torch.inf)
    return torch.cat(best, dim=-1)


def choose(choice: Tensor, config: Config) -> Tensor:
    """The experts of each token, from s + b: choice (N, E) -> (N, K), best first.

    Only the experts of the best ``topk_group`` groups can win; a group's score is the
    sum of its two best. The others get -inf, not 0 (see the NumPy `choose`).
    """
    n_group, kept = config.n_group, config.topk_group
    if kept < n_group:
        grouped = choice.unflatten(-1, (n_group, -1))  # (N, n_group, E/n_group)
        best = grouped.argmax(dim=-1, keepdim=True)  # (N, n_group, 1)
        others = grouped.scatter(-1, best, -torch.inf)  # (N, n_group, E/n_group)
        scores = grouped.amax(-1) + others.amax(-1)  # (N, n_group)
        open_groups = top(scores, kept)  # (N, kept)
        closed = choice.new_ones(len(choice), n_group, dtype=torch.bool)
        closed = closed.scatter(-1, open_groups, False)  # (N, n_group)
        choice = grouped.masked_fill(closed[..., None], -torch.inf).flatten(-2)
    return top(choice, config.num_experts_per_tok)


class Router(nn.Module):
    """Scores, choice and gates: eqs. (13), (15) and (16) of the report, p. 9.

    In float32 at least, under autocast too: in bfloat16 a good part of the tokens would
    go elsewhere. So are its biases, whatever the rest of the model is converted to.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        E, D = config.n_routed_experts, config.hidden_size
        self.weight = nn.Parameter(torch.empty(E, D))
        self.register_buffer("e_score_correction_bias", torch.zeros(E))
        self.config = config

    def forward(self, u: Tensor) -> Routing:
        """Shapes: u (N, D) -> the routing of N tokens."""
        wide = torch.promote_types(u.dtype, torch.float32)
        with torch.autocast(u.device.type, enabled=False):
            s = F.linear(u.to(wide), self.weight.to(wide)).sigmoid()  # (N, E)
            with torch.no_grad():
                choice = s + self.e_score_correction_bias
                experts = choose(choice, self.config)  # (N, K)
            chosen = s.gather(-1, experts)  # (N, K)
            shares = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
        return Routing(experts, self.config.routed_scaling_factor * shares, s)

    def _apply(self, fn: Callable, recurse: bool = True) -> "Router":
        """Keep the biases wide in ``model.bfloat16()``: they move in steps of 0.001."""
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if torch.finfo(after.dtype).bits < 32:
            self.e_score_correction_bias = before.to(after.device)
        return self


# --- the experts --------------------------------------------------------------------


class Slab(NamedTuple):
    """Experts of similar load, whose rows lie one after the other."""

    experts: Tensor  # (n,)
    rows: slice  # of all of them, n * height
    height: int  # rows of each


class Layout(NamedTuple):
    """Where each pair lies in an array of P' ≥ P rows that is filled up to slabs."""

    slabs: list[Slab]
    idle: Tensor  # the experts without a row
    token: Tensor  # (P',) whose row it is; a filler reads token 0, with weight 0
    place: Tensor  # (N, K) the row of each pair


def _rounded_up(rows: int) -> int:
    """To the next of eight steps a doubling: at most an eighth more.

    Heights then repeat from step to step of training, and with them the shapes of the
    products, for each of which a library may prepare code of its own.
    """
    step = 2 ** max(0, rows.bit_length() - 4)
    return -(-rows // step) * step


def lay_out(experts: Tensor, E: int) -> Layout:
    """Give every pair its row: experts (N, K) -> Layout."""
    flat = experts.flatten()  # (P)
    counts = flat.bincount(minlength=E)
    by_load = counts.argsort(descending=True, stable=True)  # (E)
    loads, slabs, first_row, row = counts[by_load].tolist(), [], [], 0
    busy = E - loads.count(0)
    for start in range(0, busy, SLAB):
        members, height = (
            by_load[:busy][start : start + SLAB],
            _rounded_up(loads[start]),
        )
        end = row + len(members) * height
        slabs.append(Slab(members, slice(row, end), height))
        first_row += range(row, end, height)
        row = end
    order = flat.argsort(stable=True)  # (P) the pairs, sorted by expert
    home = torch.zeros_like(counts)  # (E) the first row of each expert
    home[by_load[:busy]] = torch.tensor(first_row, device=flat.device)
    shift = home - (counts.cumsum(0) - counts)  # (E)
    place = torch.empty_like(flat)
    place[order] = torch.arange(len(flat), device=flat.device) + shift[flat[order]]
    token = torch.zeros(row, dtype=torch.int64, device=flat.device)
    token[place] = torch.arange(len(flat), device=flat.device) // experts.shape[1]
    return Layout(slabs, by_load[busy:], token, place.view(experts.shape))


def grouped_linear(x: Tensor, W: Tensor, slabs: list[Slab]) -> Tensor:
    """Each expert's rows times its own matrix: x (P', I), W (E, O, I) -> (P', O).

    A slab's matrices are copied side by side and used at once, while they are near; in
    the precision of x.
    """
    y = x.new_empty(len(x), W.shape[1])
    for members, rows, height in slabs:
        W_slab = W.index_select(0, members).to(x.dtype)  # (n, O, I)
        x_slab = x[rows].unflatten(0, (-1, height))  # (n, height, I)
        y_slab = y[rows].unflatten(0, (-1, height))  # (n, height, O)
        torch.bmm(x_slab, W_slab.mT, out=y_slab)
    return y


def add_grouped_dx(dx: Tensor, dy: Tensor, W: Tensor, slabs: list[Slab]) -> Tensor:
    """Add the gradient of x in `grouped_linear` to dx (P', I): dy (P', O) times W."""
    for members, rows, height in slabs:
        W_slab = W.index_select(0, members).to(dy.dtype)  # (n, O, I)
        dy_slab = dy[rows].unflatten(0, (-1, height))  # (n, height, O)
        dx_slab = dx[rows].unflatten(0, (-1, height))  # (n, height, I)
        torch.baddbmm(dx_slab, dy_slab, W_slab, out=dx_slab)
    return dx


def grouped_dW(dy: Tensor, x: Tensor, W: Tensor, layout: Layout) -> Tensor:
    """The gradient of W in `grouped_linear`, (E, O, I), in its precision.

    An expert without rows gets zeros, and they are exact.
    """
    dW = torch.empty_like(W)
    for members, rows, height in layout.slabs:
        dy_slab = dy[rows].unflatten(0, (-1, height))  # (n, height, O)
        x_slab = x[rows].unflatten(0, (-1, height))  # (n, height, I)
        dW.index_copy_(0, members, (dy_slab.mT @ x_slab).to(W.dtype))
    return dW.index_fill_(0, layout.idle, 0)


class Experts(torch.autograd.Function):
    r"""The routed part of eq. (12): :math:`\sum_{i∈T} g_i\,\mathrm{FFN}_i(u)`.

    Inputs: u (N, D), gates (N, K), W_gate and W_up (E, I, D), W_down (E, D, I), and
    the `Layout`. Everything is computed in the dtype of u; gradients come back in the
    dtype of what they belong to.
    """

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        gates: Tensor,
        W_gate: Tensor,
        W_up: Tensor,
        W_down: Tensor,
        layout: Layout,
    ) -> Tensor:
        """Gather, three grouped products, and the answers back to their tokens."""
        x = u.index_select(0, layout.token)  # (P', D)
        a = grouped_linear(x, W_gate, layout.slabs)  # (P', I)
        b = grouped_linear(x, W_up, layout.slabs)  # (P', I)
        o = grouped_linear(F.silu(a) * b, W_down, layout.slabs)  # (P', D)
        ctx.save_for_backward(u, gates, W_gate, W_up, W_down, a, b)
        ctx.layout = layout
        return F.embedding_bag(
            layout.place, o, mode="sum", per_sample_weights=gates.to(u.dtype)
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        r"""The lines of forward in reverse.

        A gate multiplies the whole answer, so it may be applied to the I numbers before
        W_down instead of the D behind it: :math:`dg = ⟨dy, W_{down}h⟩ = ⟨dy W_{down},
        h⟩`. The answers themselves need not be kept.
        """
        u, gates, W_gate, W_up, W_down, a, b = ctx.saved_tensors
        slabs, _, token, place = ctx.layout
        g = u.new_zeros(len(token), 1)  # (P', 1), zero for fillers
        g[place.flatten(), 0] = gates.flatten().to(u.dtype)
        x, dy_rows = u.index_select(0, token), dy.index_select(0, token)  # (P', D)
        gated = F.silu(a)
        h = gated * b
        dh = add_grouped_dx(torch.zeros_like(h), dy_rows, W_down, slabs)  # unweighed
        dgates = (dh * h).sum(-1, dtype=gates.dtype).take(place)  # (N, K)
        dW_down = grouped_dW(dy_rows, g * h, W_down, ctx.layout)
        dh *= g
        da, db = torch.ops.aten.silu_backward(dh * b, a), dh * gated
        dW_gate = grouped_dW(da, x, W_gate, ctx.layout)
        dW_up = grouped_dW(db, x, W_up, ctx.layout)
        dx = add_grouped_dx(torch.zeros_like(x), da, W_gate, slabs)  # (P', D)
        dx = add_grouped_dx(dx, db, W_up, slabs)
        du = F.embedding_bag(place, dx, mode="sum")  # (N, D)
        return du, dgates, dW_gate, dW_up, dW_down, None


class Stack(nn.Module):
    """One matrix an expert, (E, out, in): a weight with a name, and nothing else."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


class RoutedExperts(nn.Module):
    """The stacked weights of all routed experts, and their weighed answers."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        shapes = cut(moe_shapes(config), "experts.")
        self.gate_proj = Stack(shapes["gate_proj.weight"])
        self.up_proj = Stack(shapes["up_proj.weight"])
        self.down_proj = Stack(shapes["down_proj.weight"])

    @torch.compiler.disable(recursive=True)  # its shapes follow from the data
    def forward(self, u: Tensor, routing: Routing) -> Tensor:
        """Shapes: u (N, D) -> (N, D), in the dtype of autocast if it is on."""
        if torch.is_autocast_enabled(u.device.type):
            u = u.to(torch.get_autocast_dtype(u.device.type))
        W_gate, W_up = self.gate_proj.weight, self.up_proj.weight
        layout = lay_out(routing.experts, len(W_gate))
        return Experts.apply(
            u, routing.gates, W_gate, W_up, self.down_proj.weight, layout
        )


class MoE(nn.Module):
    """The whole layer, eq. (12) without the stream: shared and routed experts."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = RoutedExperts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            width = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = SwiGLU(config.hidden_size, width)

    def forward(self, u: Tensor) -> tuple[Tensor, Routing]:
        """Shapes: u (B, T, D), normalised -> (B, T, D), and where the tokens went."""
        rows = u.flatten(0, 1)  # (N, D)
        routing = self.gate(rows)
        y = self.experts(rows, routing).view(u.shape)  # (B, T, D)
        if self.shared_experts is not None:
            y = y + self.shared_experts(u)
        return y, routing


# --- balance: the bias rule and the loss ---------------------------------------------


def load(experts: Tensor, E: int) -> Tensor:
    """Tokens that each expert received: experts (N, K) -> counts (E,)."""
    return experts.flatten().bincount(minlength=E)


@torch.no_grad()
def update_bias(bias: Tensor, counts: Tensor, speed: float) -> None:
    r"""Move the bias, in place: :math:`b_i + γ\,\mathrm{sign}(\bar c - c_i)`.

    counts (E,) are the tokens of the whole batch that the step was taken on (report,
    section 2.1.2, p. 9). No gradient step: the optimiser never sees the bias.
    """
    above = counts.sum() - len(counts) * counts  # E times the mean less c: exact
    bias += speed * above.sign().to(bias.dtype)


def balance_loss(affinities: Tensor, K: int) -> Tensor:
    r"""The sequence-wise balance loss :math:`\sum_i f_i P_i`, eqs. (17)–(20), p. 9.

    The mean over sequences, without α: perfect balance gives 1. f counts the plain K
    best, without bias or groups, and has no gradient. Shapes: affinities (B, T, E).
    """
    _, T, E = affinities.shape
    with torch.no_grad():
        chosen = torch.zeros_like(affinities).scatter(-1, top(affinities, K), 1.0)
        f = chosen.sum(1) * (E / (K * T))  # (B, E)
    P = (affinities / (affinities.sum(-1, keepdim=True) + 1e-20)).mean(1)  # (B, E)
    return (f * P).sum(-1).mean()
