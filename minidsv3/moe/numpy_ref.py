r"""MoE in NumPy: route, sort by expert, compute in groups, weigh, add; and balance.

Parameters come under the names ``gate.weight`` (E, D), ``gate.e_score_correction_bias``
(E,), ``experts.gate_proj.weight`` and ``experts.up_proj.weight`` (E, I, D),
``experts.down_proj.weight`` (E, D, I), and those of the shared expert under
``shared_experts.``. N = B*T tokens, and P = N*K pairs of a token and an expert that it
chose; no pair is ever dropped.
"""

from typing import NamedTuple

import numpy as np

from minidsv3.config import Config
from minidsv3.parameters import check_shapes, cut, moe_shapes, prefixed
from minidsv3.primitives.numpy_ref import (
    linear_backward,
    linear_forward,
    sigmoid,
    silu_backward,
    silu_forward,
    swiglu_backward,
    swiglu_forward,
)

Array = np.ndarray
Params = dict[str, Array]

BIAS = "gate.e_score_correction_bias"


class Routing(NamedTuple):
    """Where each of N tokens goes."""

    experts: Array  # (N, K) the chosen ones, the best first
    gates: Array  # (N, K) how much each answer counts
    affinities: Array  # (N, E) the scores of all, without bias


# --- the router ---------------------------------------------------------------------


def top(scores: Array, k: int) -> Array:
    """Indices of the k best along the last axis, best first: (..., E) -> (..., k).

    Of equal scores the lower index wins, on every machine. So k times the maximum is
    taken, and struck out: for few of many that is also faster than sorting.
    """
    scores = scores.copy()
    best = np.empty((*scores.shape[:-1], k), np.int64)
    for rank in range(k):
        winner = scores.argmax(axis=-1, keepdims=True)  # (..., 1)
        np.put_along_axis(scores, winner, -np.inf, axis=-1)
        best[..., rank] = winner[..., 0]
    return best


def group_scores(choice: Array, n_group: int) -> Array:
    """The sum of the two best of each group: choice (N, E) -> (N, n_group).

    Two, because 8 experts in at most 4 groups are two a group (report, p. 10).
    """
    grouped = choice.reshape(len(choice), n_group, -1)  # (N, n_group, E/n_group)
    return np.partition(grouped, -2, axis=-1)[..., -2:].sum(axis=-1)  # (N, n_group)


def choose(choice: Array, config: Config) -> Array:
    """The experts of each token, from s + b: choice (N, E) -> (N, K), best first.

    Only the experts of the best ``topk_group`` groups can win. The others get -inf, not
    0: with negative biases a zero would beat experts whose groups are open.
    """
    n_group, kept = config.n_group, config.topk_group
    if kept < n_group:
        open_groups = top(group_scores(choice, n_group), kept)  # (N, kept)
        closed = np.ones((len(choice), n_group), bool)
        np.put_along_axis(closed, open_groups, False, axis=-1)
        shut = np.repeat(closed, choice.shape[-1] // n_group, axis=-1)  # (N, E)
        choice = np.where(shut, -np.inf, choice)
    return top(choice, config.num_experts_per_tok)


def route_forward(params: Params, u: Array, config: Config) -> tuple[Routing, tuple]:
    r"""Scores, choice and gates: eqs. (13), (15) and (16) of the report, p. 9.

    :math:`s = σ(u\,W^\top)` is each expert's own, no competition. s + b decides who is
    chosen; the gates are λ s / Σ s over the chosen, of s alone. All of it in float32 at
    least, as the report keeps it (p. 15): in bfloat16 a good part of the tokens would
    go elsewhere. 1e-20, as in transformers, keeps scores that are all 0 from giving
    0/0. Shapes: u (N, D). Raises FloatingPointError if a score is not finite: it would
    send tokens anywhere.
    """
    u = u.astype(np.result_type(u, np.float32), copy=False)
    z, saved_linear = linear_forward(u, params["gate.weight"])  # (N, E)
    if not (np.isfinite(z).all() and np.isfinite(params[BIAS]).all()):
        what = "scores" if np.isfinite(u).all() else "inputs"
        raise FloatingPointError(f"the {what} of a router are not finite")
    s = sigmoid(z)
    experts = choose(s + params[BIAS], config)  # (N, K)
    chosen = np.take_along_axis(s, experts, axis=-1)  # (N, K)
    shares = chosen / (chosen.sum(axis=-1, keepdims=True) + 1e-20)
    routing = Routing(experts, config.routed_scaling_factor * shares, s)
    return routing, (saved_linear, routing, config.routed_scaling_factor)


def route_backward(
    dgates: Array, saved: tuple, daffinities: Array | float = 0.0
) -> tuple[Array, Array]:
    r"""Gradients of the router, given those of the gates (N, K).

    Gates are shares, so only differences count:
    :math:`ds_i = \frac{λ}{Σs}\big(dg_i - \sum_j \frac{s_j}{Σs} dg_j\big)` for the
    chosen i, then :math:`dz = ds\,s(1-s)`. Who was not chosen hears nothing, and with
    K = 1 nobody does: a share of one is 1 whatever s is. daffinities (N, E) is what
    others who read the affinities send back. Returns du (N, D), dW (E, D); the bias
    has no gradient.
    """
    saved_linear, (experts, _, s), scale = saved
    chosen = np.take_along_axis(s, experts, axis=-1)  # (N, K)
    total = chosen.sum(axis=-1, keepdims=True) + 1e-20  # (N, 1)
    mean = np.sum(chosen / total * dgates, axis=-1, keepdims=True)  # (N, 1)
    ds = np.zeros_like(s)
    np.put_along_axis(ds, experts, scale / total * (dgates - mean), axis=-1)
    dz = (ds + daffinities) * s * (1 - s)  # (N, E)
    return linear_backward(dz, saved_linear)


# --- the experts --------------------------------------------------------------------


class Order(NamedTuple):
    """The P pairs of a token and an expert, sorted by expert.

    ``pairs[starts[i] : starts[i + 1]]`` are those of expert i, tokens ascending; pair p
    is the choice of rank p % K of token p // K.
    """

    pairs: Array  # (P,)
    starts: Array  # (E + 1,)


def sort_by_expert(experts: Array, E: int) -> Order:
    """Put the pairs of one expert side by side: experts (N, K) -> Order."""
    flat = experts.ravel()  # (P)
    starts = np.concatenate([[0], np.cumsum(load(experts, E))])  # (E + 1)
    # few experts fit a short integer, which NumPy sorts by radix: one pass, no compares
    keys = flat.astype(np.uint16) if E <= 2**16 else flat
    return Order(np.argsort(keys, kind="stable"), starts)


def grouped_linear_forward(x: Array, W: Array, starts: Array) -> tuple[Array, tuple]:
    """A linear layer whose matrix depends on the row's expert.

    One product per expert that has rows; the loop is over experts, never over tokens.
    Shapes: x (P, I), W (E, O, I), starts (E + 1) -> (P, O).
    """
    y = np.empty((len(x), W.shape[1]), np.result_type(x, W))
    for i, rows in _segments(starts):
        np.matmul(x[rows], W[i].T, out=y[rows])
    return y, (x, W, starts)


def grouped_linear_backward(dy: Array, saved: tuple) -> tuple[Array, Array]:
    """Gradients of `grouped_linear_forward`: dx (P, I), dW (E, O, I).

    An expert without rows gets zeros, and they are exact.
    """
    x, W, starts = saved
    dx, dW = np.empty_like(x, dtype=dy.dtype), np.empty_like(W, dtype=dy.dtype)
    dW[np.diff(starts) == 0] = 0
    for i, rows in _segments(starts):
        np.matmul(dy[rows], W[i], out=dx[rows])
        np.matmul(dy[rows].T, x[rows], out=dW[i])
    return dx, dW


def _segments(starts: Array) -> list[tuple[int, slice]]:
    """Each expert that has rows, with the slice of them."""
    ends = starts.tolist()
    spans = enumerate(zip(ends[:-1], ends[1:], strict=True))
    return [(i, slice(a, b)) for i, (a, b) in spans if b > a]


def experts_forward(params: Params, u: Array, routing: Routing) -> tuple[Array, tuple]:
    r"""The routed part of eq. (12): :math:`\sum_{i∈T} g_i\,\mathrm{FFN}_i(u)`.

    Pairs are sorted by expert, each expert computes its segment in one piece, and the
    answers go back to their tokens, weighed. Shapes: u (N, D) -> (N, D).
    """
    N, K = routing.experts.shape
    order = sort_by_expert(routing.experts, len(params["experts.gate_proj.weight"]))
    x = u[order.pairs // K]  # (P, D)
    W_gate, W_up, W_down = (params[f"experts.{k}_proj.weight"] for k in PROJECTIONS)
    a, saved_gate = grouped_linear_forward(x, W_gate, order.starts)  # (P, I)
    b, saved_up = grouped_linear_forward(x, W_up, order.starts)  # (P, I)
    gated, saved_silu = silu_forward(a)
    o, saved_down = grouped_linear_forward(gated * b, W_down, order.starts)  # (P, D)
    answers = np.empty_like(o)
    answers[order.pairs] = o
    answers = answers.reshape(N, K, -1)  # (N, K, D)
    y = np.einsum("nk,nkd->nd", routing.gates, answers)  # (N, D)
    saved = (saved_gate, saved_up, saved_silu, gated, b, saved_down)
    return y, (*saved, answers, routing, order)


def experts_backward(dy: Array, saved: tuple) -> tuple[Array, Array, Params]:
    r"""Gradients of the routed part: du (N, D), dgates (N, K), and the experts'.

    :math:`dg_i = ⟨dy, \mathrm{FFN}_i(u)⟩`: a gate grows if its expert's answer points
    where the loss falls. An expert hears ``dy`` weighed with its gate. A token was read
    by K experts, so du sums over them.
    """
    saved_gate, saved_up, saved_silu, gated, b, saved_down, *more = saved
    answers, routing, order = more
    N, K = routing.experts.shape
    dgates = np.einsum("nd,nkd->nk", dy, answers)  # (N, K)
    weights = routing.gates.reshape(-1, 1)[order.pairs]  # (P, 1)
    do = weights * dy[order.pairs // K]  # (P, D)
    dh, dW_down = grouped_linear_backward(do, saved_down)
    db = dh * gated
    da = silu_backward(dh * b, saved_silu)
    dx_up, dW_up = grouped_linear_backward(db, saved_up)
    dx_gate, dW_gate = grouped_linear_backward(da, saved_gate)
    dx = np.empty_like(dx_up)
    dx[order.pairs] = dx_up + dx_gate  # (P, D)
    du = dx.reshape(N, K, -1).sum(axis=1)  # (N, D)
    grads = zip(PROJECTIONS, (dW_gate, dW_up, dW_down), strict=True)
    return du, dgates, {f"experts.{k}_proj.weight": dW for k, dW in grads}


PROJECTIONS = ("gate", "up", "down")


# --- the layer ----------------------------------------------------------------------


def moe_forward(params: Params, u: Array, config: Config) -> tuple[Array, tuple]:
    """The whole layer, eq. (12) without the stream: shared expert plus routed experts.

    The shared expert has no gate and no router: it sees every token. Several of them
    are one of their joint width. Shapes: u (B, T, D), normalised -> (B, T, D). Raises
    ParameterError for parameters that do not fit the config, ValueError for u of
    another shape, FloatingPointError as `route_forward` does.
    """
    check_shapes(params, moe_shapes(config))
    if u.ndim != 3 or u.shape[-1] != config.hidden_size or 0 in u.shape:
        raise ValueError(
            f"experts: u must be (batch, time, {config.hidden_size}), no axis empty, "
            f"got {u.shape}"
        )
    rows = u.reshape(-1, u.shape[-1])  # (N, D)
    routing, saved_route = route_forward(params, rows, config)
    y, saved_experts = experts_forward(params, rows, routing)
    y = y.reshape(u.shape)  # (B, T, D)
    if config.n_shared_experts == 0:
        return y, (u.shape, routing, saved_route, saved_experts, None)
    y_shared, saved_shared = swiglu_forward(cut(params, "shared_experts."), u)
    saved = (u.shape, routing, saved_route, saved_experts, saved_shared)
    return y + y_shared, saved


def moe_backward(
    dy: Array, saved: tuple, dbalance: float = 0.0
) -> tuple[Array, Params]:
    """Gradients of the layer; the bias is not among them.

    u was read by router, routed experts and shared expert: three gradients add.
    dbalance is the weight of the layer's `balance_loss` in the total (α in training).
    Returns du (B, T, D) and the gradients under the parameters' names.
    """
    shape, routing, saved_route, saved_experts, saved_shared = saved
    dy_rows = dy.reshape(-1, shape[-1])  # (N, D)
    du, dgates, grads = experts_backward(dy_rows, saved_experts)
    ds = 0.0
    if dbalance:
        _, saved_balance = balance_forward(*_sequences(saved))
        ds = balance_backward(dbalance, saved_balance)  # (B, T, E)
        ds = ds.reshape(routing.affinities.shape)  # (N, E)
    du_router, dW_router = route_backward(dgates, saved_route, ds)
    du = (du + du_router).reshape(shape)  # (B, T, D)
    grads = {"gate.weight": dW_router, **grads}
    if saved_shared is not None:
        du_shared, grads_shared = swiglu_backward(dy, saved_shared)
        du = du + du_shared
        grads |= prefixed("shared_experts.", grads_shared)
    return du, grads


def routing(saved: tuple) -> Routing:
    """Where the tokens went, inside what `moe_forward` saved."""
    return saved[1]


def balance_loss(saved: tuple) -> float:
    """The balance loss of what `moe_forward` saved, not yet weighed with α."""
    return balance_forward(*_sequences(saved))[0]


def _sequences(saved: tuple) -> tuple[Array, int]:
    """Affinities by sequence (B, T, E), and K."""
    (B, T, _), routing = saved[:2]
    affinities = routing.affinities.reshape(B, T, -1)  # (B, T, E)
    return affinities, routing.experts.shape[1]


# --- balance: the bias rule and the loss ---------------------------------------------


def load(experts: Array, E: int) -> Array:
    """Tokens that each expert received: experts (N, K) -> counts (E,)."""
    return np.bincount(experts.ravel(), minlength=E)


def update_bias(bias: Array, counts: Array, speed: float) -> Array:
    r"""The bias after a step: :math:`b_i + γ\,\mathrm{sign}(\bar c - c_i)`.

    counts (E,) are the tokens of the whole batch that the step was taken on. Only the
    direction counts, not how far an expert is from its share. Training alone does this;
    a model that is evaluated keeps its biases (report, section 2.1.2, p. 9; the signs
    as in Megatron-LM).
    """
    return bias + (speed * np.sign(counts.mean() - counts)).astype(bias.dtype)


def balance_forward(affinities: Array, K: int) -> tuple[float, tuple]:
    r"""The sequence-wise balance loss :math:`\sum_i f_i P_i`, eqs. (17)–(20), p. 9.

    For each sequence: :math:`f_i` is how often expert i is among the K best affinities,
    1 if all are equally often; :math:`P_i` the mean of its share of the affinities. The
    mean over sequences is returned, without α: perfect balance gives 1. As the
    equations say, f counts the plain K best: no bias, no groups.
    Shapes: affinities (B, T, E).
    """
    B, T, E = affinities.shape
    best = top(affinities, K).reshape(B, -1)  # (B, T*K)
    best += E * np.arange(B)[:, None]  # each sequence counts in a range of its own
    counts = np.bincount(best.ravel(), minlength=B * E)  # (B*E)
    counts = counts.reshape(B, 1, E)  # (B, 1, E)
    f = (counts * (E / (K * T))).astype(affinities.dtype)  # (B, 1, E)
    total = affinities.sum(axis=-1, keepdims=True) + 1e-20  # (B, T, 1)
    shares = affinities / total  # (B, T, E)
    loss = (f[:, 0] * shares.mean(axis=1)).sum(axis=-1).mean(dtype=np.float64)
    return float(loss), (f, shares, total)


def balance_backward(dloss: float, saved: tuple) -> Array:
    r"""Gradient for the affinities, (B, T, E). f counts, so it has none.

    :math:`ds_{i,t} = \frac{1}{BT}\,\frac{f_i - \sum_j f_j s'_{j,t}}{\sum_j s_{j,t}}`
    with the shares :math:`s'`. It reaches every expert, chosen or not.
    """
    f, shares, total = saved
    B, T, _ = shares.shape
    mean = np.sum(f * shares, axis=-1, keepdims=True)  # (B, T, 1)
    return dloss / (B * T) * (f - mean) / total


# --- how well balanced ----------------------------------------------------------------


def max_violation(counts: Array) -> float:
    """MaxVio: by how much the fullest expert exceeds its share, max / mean - 1.

    Few tokens scatter by themselves: a uniform router over 256 experts shows about 0.37
    at 2,048 tokens and 0.06 at 65,536. Pool the counts first. Raises ValueError if
    nothing was counted.
    """
    if counts.sum() == 0:
        raise ValueError("MaxVio: no token was counted, so there is no share to exceed")
    return float(counts.max() / counts.mean() - 1)


def machines_touched(experts: Array, config: Config) -> Array:
    """In how many groups each token's experts lie: (N, K) -> (N,)."""
    group = experts // (config.n_routed_experts // config.n_group)  # (N, K)
    in_group = group[:, :, None] == np.arange(config.n_group)  # (N, K, n_group)
    return in_group.any(axis=1).sum(axis=-1)
