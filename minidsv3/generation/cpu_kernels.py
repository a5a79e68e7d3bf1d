r"""The products of a decoding step as plain loops, compiled for the processor by Numba.

A step of few tokens reads every weight that it needs once and does little with it; a
library call for each product costs more than the product. Here a layer is two calls.
Weights are the model's own arrays, neither copied nor folded. N = B*T rows: T new
tokens in each of B texts, whose lengths may differ.

The compiler may reorder sums (``reassoc``), or it could not add sixteen numbers at
once, fuse a product with a sum (``contract``) and ignore the sign of zero (``nsz``). It
may not assume that there is no NaN: `route` spreads them on purpose. All arrays of a
call have one precision, float32 or float64, and lie in C order.
"""

from collections.abc import Callable

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

Array = np.ndarray
LINE = 64  # bytes that a processor fetches at once


def _compiled(function: Callable) -> Callable:
    """Compile at the first call, and keep the machine code beside this file."""
    how = {"fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}
    try:
        return numba.njit(**how, cache=True)(function)
    except RuntimeError:  # nowhere to write: compiled anew in every process
        return numba.njit(**how)(function)


# --- rows ---------------------------------------------------------------------------


@intrinsic
def _fetch(typing: object, address: types.Integer) -> tuple:
    """Ask for the line of memory at an address, and do not wait for it."""

    def code(context, builder, signature, arguments):  # noqa: ANN001, ANN202
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        name = "llvm.prefetch.p0"
        function = cgutils.get_or_insert_function(builder.module, kind, name)
        place = builder.inttoptr(arguments[0], pointer)
        read, near, data = number(0), number(3), number(1)
        builder.call(function, [place, read, near, data])
        return context.get_dummy_value()

    return types.void(types.intp), code


@_compiled
def dot(a: Array, b: Array) -> float:
    """Sum of products of two vectors."""
    total = a.dtype.type(0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@_compiled
def linear(x: Array, W: Array, y: Array, add: bool, ahead: Array) -> None:
    """Rows times a matrix, y = x W^T or added to y: x (N, I), W (O, I), y (N, O).

    Four rows of W meet two of x at a time, so that a number once loaded is used more
    than once, and W comes from memory once for all rows of x. ahead is the matrix that
    is needed next: it is fetched at the same pace (empty: nothing is).
    """
    zero, N, (rows, columns) = W.dtype.type(0), x.shape[0], W.shape
    if not add:
        y[:] = zero
    fetched = 0
    for o in range(0, rows - 3, 4):
        until = min(fetched + 4 * columns * W.itemsize, ahead.size * W.itemsize)
        for place in range(fetched, until, LINE):
            _fetch(ahead.ctypes.data + place)
        fetched = until
        for n in range(0, N - 1, 2):
            a = b = c = d = e = f = g = h = zero
            for i in range(columns):
                v, w = x[n, i], x[n + 1, i]
                a += W[o, i] * v
                b += W[o + 1, i] * v
                c += W[o + 2, i] * v
                d += W[o + 3, i] * v
                e += W[o, i] * w
                f += W[o + 1, i] * w
                g += W[o + 2, i] * w
                h += W[o + 3, i] * w
            for at, four in ((n, (a, b, c, d)), (n + 1, (e, f, g, h))):
                for k in range(4):
                    y[at, o + k] += four[k]
        if N % 2:
            four = four_rows(W[o : o + 4], x[N - 1])
            for k in range(4):
                y[N - 1, o + k] += four[k]
    for o in range(rows - rows % 4, rows):
        for n in range(N):
            y[n, o] += dot(W[o], x[n])


@_compiled
def four_rows(W: Array, x: Array) -> tuple[float, float, float, float]:
    """Four sums of products side by side: W (4, I), x (I,)."""
    a = b = c = d = W.dtype.type(0)
    for i in range(x.shape[0]):
        a += W[0, i] * x[i]
        b += W[1, i] * x[i]
        c += W[2, i] * x[i]
        d += W[3, i] * x[i]
    return a, b, c, d


@_compiled
def rmsnorm(x: Array, g: Array, eps: float, y: Array) -> None:
    """RMSNorm of each row: x (N, D), g (D,) -> y (N, D)."""
    N, D = x.shape
    for n in range(N):
        r = x.dtype.type(1 / np.sqrt(dot(x[n], x[n]) / D + eps))
        for i in range(D):
            y[n, i] = g[i] * (x[n, i] * r)


@_compiled
def turn(x: Array, angles: Array, factor: float) -> None:
    """Rotate the pairs of x (d_R,) in place, and scale: angles (2, d_R/2), cos, sin."""
    for j in range(x.shape[0] // 2):
        even, odd = x[2 * j] * factor, x[2 * j + 1] * factor
        x[2 * j] = even * angles[0, j] - odd * angles[1, j]
        x[2 * j + 1] = even * angles[1, j] + odd * angles[0, j]


# --- attention, absorbed ------------------------------------------------------------


@_compiled
def project(
    x: Array, starts: Array, cache: Array, angles: Array, d_h: int, scale: float,
    eps: float, latent_eps: float, g: Array, W_DQ: Array, g_Q: Array, W_UQ: Array,
    W_DKV: Array, g_KV: Array, W_UKV: Array, q: Array,
) -> None:  # fmt: skip
    """Latents of the new tokens into the cache, and their absorbed queries: q.

    x (N, D), starts (B,) the lengths of the texts, cache (B, capacity, d_c + d_R),
    angles (capacity, 2, d_R/2); q (N, N_h, d_c + d_R) is written, multiplied by scale.
    Without a latent for queries W_DQ is empty. Eqs. (1)–(9) of the report, p. 7–8.
    """
    N, B, (N_h, d_c) = x.shape[0], cache.shape[0], (q.shape[1], g_KV.shape[0])
    u = np.empty_like(x)
    rmsnorm(x, g, eps, u)
    heads = np.empty((N, W_UQ.shape[0]), x.dtype)
    if W_DQ.size:
        c_Q = np.empty((N, W_DQ.shape[0]), x.dtype)
        linear(u, W_DQ, c_Q, False, W_UQ)
        rmsnorm(c_Q, g_Q, latent_eps, c_Q)
        linear(c_Q, W_UQ, heads, False, W_DKV)
    else:
        linear(u, W_UQ, heads, False, W_DKV)
    kv = np.empty((N, W_DKV.shape[0]), x.dtype)
    linear(u, W_DKV, kv, False, W_UKV)
    rmsnorm(kv[:, :d_c], g_KV, latent_eps, kv[:, :d_c])
    W = W_UKV.reshape(N_h, -1, d_c)  # (N_h, d_h + d_v, d_c)
    for n in range(N):
        b, t = n // (N // B), n % (N // B)
        position = starts[b] + t
        turn(kv[n, d_c:], angles[position], x.dtype.type(1))
        cache[b, position] = kv[n]
        absorb(heads[n].reshape(N_h, -1), W, d_h, scale, q[n])
        for h in range(N_h):
            turn(q[n, h, d_c:], angles[position], x.dtype.type(scale))


@_compiled
def absorb(head: Array, W: Array, d_h: int, scale: float, q: Array) -> None:
    """Each head's content times its W_UK, scaled; behind it its part to be rotated.

    head (N_h, d_h + d_R), W (N_h, d_h + d_v, d_c) -> q (N_h, d_c + d_R).
    """
    d_c = W.shape[2]
    for h in range(head.shape[0]):
        q[h, :d_c] = 0
        for i in range(d_h):
            content = head[h, i] * head.dtype.type(scale)
            for j in range(d_c):
                q[h, j] += content * W[h, i, j]
        q[h, d_c:] = head[h, d_h:]


@_compiled
def attend(q: Array, starts: Array, cache: Array, sums: Array, latents: Array) -> None:
    """Weigh the latents of a short past, all heads and tokens, without a library.

    q (N, N_h, w), cache (B, capacity, w) -> latents (N, N_h, d_c), weighed with
    exponentials, and sums (N, N_h) of those. A token sees its text up to itself.
    """
    N, N_h, _ = q.shape
    T = N // cache.shape[0]
    for n in range(N):
        kept, seen = cache[n // T], starts[n // T] + n % T + 1
        weights = np.empty(seen, q.dtype)
        for h in range(N_h):
            for s in range(0, seen - 3, 4):
                four = four_rows(kept[s : s + 4], q[n, h])
                for k in range(4):
                    weights[s + k] = four[k]
            for s in range(seen - seen % 4, seen):
                weights[s] = dot(kept[s], q[n, h])
            largest = weights.max()
            for s in range(seen):
                weights[s] = np.exp(weights[s] - largest)
            sums[n, h] = weights.sum()
            weigh(weights, kept, latents[n, h])


@_compiled
def weigh(weights: Array, kept: Array, latent: Array) -> None:
    """Latents times weights (S,), summed: kept (≥ S, ≥ d_c) -> latent (d_c,)."""
    S, d_c = weights.shape[0], latent.shape[0]
    latent[:] = 0
    for s in range(0, S - 3, 4):
        a, b, c, d = weights[s], weights[s + 1], weights[s + 2], weights[s + 3]
        for j in range(d_c):
            latent[j] += (a * kept[s, j] + b * kept[s + 1, j]) + (
                c * kept[s + 2, j] + d * kept[s + 3, j]
            )
    for s in range(S - S % 4, S):
        for j in range(d_c):
            latent[j] += weights[s] * kept[s, j]


@_compiled
def shift(scores: Array, starts: Array) -> None:
    """Make scores (B, T, N_h, S) ready for exp: subtract the largest of each row.

    A token sees its text up to itself; what lies further right gets -inf. The maximum
    is taken in 16 lanes, which the processor compares at once.
    """
    B, T, N_h, S = scores.shape
    lanes = np.empty(16, scores.dtype)
    for b in range(B):
        for t in range(T):
            seen = min(starts[b] + t + 1, S)
            for h in range(N_h):
                row = scores[b, t, h]
                lanes[:] = row[0]
                for s in range(0, seen - 15, 16):
                    for i in range(16):
                        one = row[s + i]
                        lanes[i] = one if one > lanes[i] else lanes[i]
                largest = lanes.max()
                for s in range(seen - seen % 16, seen):
                    largest = max(largest, row[s])
                for s in range(seen):
                    row[s] -= largest
                row[seen:] = -np.inf


@_compiled
def output(
    x: Array, sums: Array, latents: Array, d_h: int, W_UKV: Array, W_O: Array
) -> None:
    """Expand the weighed latents and add the output to the stream x (N, D).

    latents (N, N_h, d_c) are weighed with exponentials whose sums are (N, N_h).
    Eqs. (10) and (11).
    """
    N, N_h, d_c = latents.shape
    W = W_UKV.reshape(N_h, -1, d_c)  # (N_h, d_h + d_v, d_c)
    d_v = W.shape[1] - d_h
    o = np.empty((N, N_h * d_v), x.dtype)
    for n in range(N):
        for h in range(N_h):
            for v in range(d_v):
                o[n, h * d_v + v] = dot(W[h, d_h + v], latents[n, h]) / sums[n, h]
    linear(o, W_O, x, True, W_O[:0])


@_compiled
def attention(
    x: Array, starts: Array, cache: Array, angles: Array, d_h: int, scale: float,
    eps: float, latent_eps: float, g: Array, W_DQ: Array, g_Q: Array, W_UQ: Array,
    W_DKV: Array, g_KV: Array, W_UKV: Array, W_O: Array,
) -> None:  # fmt: skip
    """`project`, `attend` and `output` in one call, on the stream x (N, D)."""
    N, d_c, w = x.shape[0], g_KV.shape[0], cache.shape[2]
    N_h = W_UQ.shape[0] // (d_h + w - d_c)
    q, sums = np.empty((N, N_h, w), x.dtype), np.empty((N, N_h), x.dtype)
    latents = np.empty((N, N_h, d_c), x.dtype)
    project(
        x, starts, cache, angles, d_h, scale, eps, latent_eps, g, W_DQ, g_Q, W_UQ,
        W_DKV, g_KV, W_UKV, q,
    )  # fmt: skip
    attend(q, starts, cache, sums, latents)
    output(x, sums, latents, d_h, W_UKV, W_O)


# --- feed-forward -------------------------------------------------------------------


@_compiled
def dense(
    x: Array, eps: float, g: Array, W_gate: Array, W_up: Array, W_down: Array
) -> None:
    """Normalise, SwiGLU, add to the stream x (N, D)."""
    u = np.empty_like(x)
    rmsnorm(x, g, eps, u)
    swiglu(u, W_gate, W_up, W_down, x.dtype.type(1), x, W_gate[:0])


@_compiled
def swiglu(
    u: Array, W_gate: Array, W_up: Array, W_down: Array, weight: float, y: Array,
    ahead: Array,
) -> None:  # fmt: skip
    """Add weight times SwiGLU of u (N, D) to y (N, D); ahead is for `linear`."""
    a = np.empty((u.shape[0], W_gate.shape[0]), u.dtype)
    b = np.empty_like(a)
    linear(u, W_gate, a, False, W_up)
    linear(u, W_up, b, False, W_down)
    one = a.dtype.type(1)
    for n in range(a.shape[0]):
        for i in range(a.shape[1]):
            a[n, i] = weight * (a[n, i] / (one + np.exp(-a[n, i]))) * b[n, i]
    linear(a, W_down, y, True, ahead)


@_compiled
def experts(
    x: Array, eps: float, g: Array, W: Array, bias: Array, n_group: int,
    topk_group: int, K: int, factor: float, W_gate: Array, W_up: Array, W_down: Array,
    S_gate: Array, S_up: Array, S_down: Array,
) -> None:  # fmt: skip
    """Normalise, route, add K experts and the shared ones to the stream x (N, D).

    W (E, D) and bias (E,) are the router's, W_gate, W_up (E, I, D) and W_down
    (E, D, I) the experts'; those with an S are the shared one's, empty if there is
    none. Who comes next is known, so its weights are on their way before they are
    needed.
    """
    N = x.shape[0]
    u = np.empty_like(x)
    rmsnorm(x, g, eps, u)
    s = np.empty((N, W.shape[0]), x.dtype)
    linear(u, W, s, False, W[:0])
    chosen, gates = np.empty(N * K, np.int64), np.empty(N * K, x.dtype)
    for n in range(N):
        token = slice(n * K, n * K + K)
        route(s[n], bias, n_group, topk_group, factor, chosen[token], gates[token])
    if S_gate.size:
        swiglu(u, S_gate, S_up, S_down, x.dtype.type(1), x, W_gate[chosen[0]])
    for pair in range(N * K):
        e, row = chosen[pair], slice(pair // K, pair // K + 1)
        ahead = W_gate[chosen[min(pair + 1, N * K - 1)]]
        swiglu(u[row], W_gate[e], W_up[e], W_down[e], gates[pair], x[row], ahead)


@_compiled
def route(
    s: Array, bias: Array, n_group: int, topk_group: int, factor: float,
    chosen: Array, gates: Array,
) -> None:  # fmt: skip
    """Choose by s + b within the best groups, weigh by s: eqs. (13), (15), (16), p. 9.

    s (E,) are logits, and scores afterwards. A logit or bias that is not finite makes
    every gate NaN: it would send the token anywhere.
    """
    one, E = s.dtype.type(1), s.shape[0]
    choice, size = np.empty_like(s), E // n_group
    poison = (s.sum() + bias.sum()) * 0
    for e in range(E):
        s[e] = one / (one + np.exp(-s[e]))
        choice[e] = s[e] + bias[e]
    if topk_group < n_group:
        close_groups(choice.reshape(n_group, size), topk_group)
    total = s.dtype.type(1e-20)
    for k in range(chosen.shape[0]):
        chosen[k] = choice.argmax()  # of equal ones the first
        choice[chosen[k]] = -np.inf
        total += s[chosen[k]]
    for k in range(chosen.shape[0]):
        gates[k] = s.dtype.type(factor) * (s[chosen[k]] / total) + poison


@_compiled
def close_groups(choice: Array, kept: int) -> None:
    """Leave the groups whose two best sum highest; -inf for the others.

    choice (n_group, E / n_group), in place.
    """
    n_group = choice.shape[0]
    sums, shut = np.empty(n_group, choice.dtype), np.ones(n_group, np.bool_)
    for i in range(n_group):
        best = second = choice.dtype.type(-np.inf)
        for c in choice[i]:
            if c > best:
                best, second = c, best
            elif c > second:
                second = c
        sums[i] = best + second
    for _ in range(kept):
        i = sums.argmax()
        sums[i], shut[i] = -np.inf, False
    for i in range(n_group):
        if shut[i]:
            choice[i] = -np.inf


# --- the ends -----------------------------------------------------------------------


@_compiled
def head(x: Array, g: Array, eps: float, W: Array, h: Array, logits: Array) -> None:
    """Final norm and head: x (N, D) -> h (N, D), logits (N, V)."""
    rmsnorm(x, g, eps, h)
    linear(h, W, logits, False, W[:0])


@_compiled
def entrance(
    h: Array, e: Array, eps: float, g_e: Array, g_h: Array, W: Array, x: Array
) -> None:
    """What the block of an MTP module reads, eq. (21): h, e (N, D) -> x (N, D)."""
    N, D = h.shape
    joined = np.empty((N, 2 * D), h.dtype)
    rmsnorm(e, g_e, eps, joined[:, :D])
    rmsnorm(h, g_h, eps, joined[:, D:])
    linear(joined, W, x, False, W[:0])
