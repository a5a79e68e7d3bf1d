r"""The primitives as kernels, written as plainly as CUDA allows: one number at a time.

These are for reading, and for shapes that the fast ones of `cuda_kernels` do not take.
Every kernel is a plain function in Numba's dialect. It runs in `gpu.simulator`, and
`gpu.launch` compiles it for a GPU. Numbers are float32, or bfloat16 as its bits;
`load1` and `store1` know which. Rows of a matrix lie one after the other in a flat
array.
"""

import math
from typing import Any

from numpy import float32, uint32, uint64

from minidsv3.gpu.dialect import cuda
from minidsv3.gpu.intrinsics import (
    LOG2_E,
    exp2,
    load1,
    log2,
    reciprocal,
    rsqrt,
    store1,
)
from minidsv3.gpu.reductions import LOWEST

THREADS = 128
"""Threads of a block that works on one row."""
LN_2, NAN = float32(math.log(2)), float32(math.nan)


def flat_index() -> uint64:
    """The thread's number in a grid of one dimension, wide enough for any array."""
    block = uint64(cuda.blockIdx.x) * uint64(cuda.blockDim.x)
    return block + uint64(cuda.threadIdx.x)


def tree_sum(x: float32, scratch: Any) -> float32:
    """The sum over a block of `THREADS`, in every thread: half of them add, then half.

    scratch: `THREADS` float32, shared. Seven rounds, and a barrier after each.
    """
    thread = cuda.threadIdx.x
    scratch[thread] = x
    cuda.syncthreads()
    active = THREADS // 2
    while active > 0:
        if thread < active:
            scratch[thread] += scratch[thread + active]
        cuda.syncthreads()
        active //= 2
    total = scratch[0]
    cuda.syncthreads()  # nobody may fill scratch anew before all have read
    return total


def tree_max(x: float32, scratch: Any) -> float32:
    """The largest over a block of `THREADS`; as `tree_sum`."""
    thread = cuda.threadIdx.x
    scratch[thread] = x
    cuda.syncthreads()
    active = THREADS // 2
    while active > 0:
        if thread < active:
            scratch[thread] = max(scratch[thread], scratch[thread + active])
        cuda.syncthreads()
        active //= 2
    largest = scratch[0]
    cuda.syncthreads()
    return largest


def rmsnorm_plain(
    x: Any, g: Any, y: Any, r: Any, width: uint32, inverse: float32, eps: float32
) -> None:
    r"""`numpy_ref.rmsnorm_forward`: a block a row, its threads side by side.

    x (rows, width), g (width) -> y like x, r (rows) float32; inverse = 1/width. Reads x
    twice, the second time most likely from a cache; writes y. Four operations a number.
    """
    scratch = cuda.shared.array(THREADS, float32)
    row = uint64(cuda.blockIdx.x) * uint64(width)
    squares = float32(0)
    for i in range(cuda.threadIdx.x, width, THREADS):
        value = load1(x, row + uint64(i))
        squares += value * value
    scale = rsqrt(tree_sum(squares, scratch) * inverse + eps)
    if cuda.threadIdx.x == 0:
        r[cuda.blockIdx.x] = scale
    for i in range(cuda.threadIdx.x, width, THREADS):
        value = load1(x, row + uint64(i)) * scale
        store1(y, row + uint64(i), value * load1(g, uint64(i)))


def add_plain(x: Any, residual: Any, total: Any, n: uint64) -> None:
    """``total = x + residual``, n numbers, a thread each: the add before a norm."""
    i = flat_index()
    if i < n:
        store1(total, i, load1(x, i) + load1(residual, i))


def rmsnorm_backward_plain(
    dy: Any, x: Any, g: Any, r: Any, dx: Any, partial: Any, rows: uint32,
    width: uint32, inverse: float32,
) -> None:  # fmt: skip
    r"""`numpy_ref.rmsnorm_backward`: a block takes every gridDim-th row.

    dx like x; partial (blocks, width) float32, the block's share of dg, which the host
    adds up. Reads dy and x twice; partial is read and written for every row.
    """
    scratch = cuda.shared.array(THREADS, float32)
    mine = uint64(cuda.blockIdx.x) * uint64(width)
    for i in range(cuda.threadIdx.x, width, THREADS):
        partial[mine + uint64(i)] = float32(0)
    for n in range(cuda.blockIdx.x, rows, cuda.gridDim.x):
        row, scale = uint64(n) * uint64(width), r[n]
        dot = float32(0)
        for i in range(cuda.threadIdx.x, width, THREADS):
            at = row + uint64(i)
            dot += load1(dy, at) * load1(g, uint64(i)) * load1(x, at)
        shared = tree_sum(dot, scratch) * inverse * scale * scale
        for i in range(cuda.threadIdx.x, width, THREADS):
            at = row + uint64(i)
            up, value = load1(dy, at), load1(x, at)
            dz = up * load1(g, uint64(i))
            store1(dx, at, scale * (dz - value * shared))
            partial[mine + uint64(i)] += up * value * scale


def rope_plain(
    x: Any, turns: Any, heads: uint32, head: uint32, rotary: uint32, period: uint32,
    sign: float32,
) -> None:  # fmt: skip
    r"""`numpy_ref.rope_forward` in place: a block a token, a thread every 128th pair.

    x (tokens, heads, head): the last ``rotary`` numbers of each head are turned, pair
    (2j, 2j+1) by the j-th turn of the token's row. turns (period, rotary/2, 2) float32:
    a cosine and a sine, so the complex numbers of `numpy_ref.rope_rotation` as they lie
    in memory; token t has row t mod period. sign 1 turns forward, -1 back, which is the
    gradient.
    """
    half = rotary // uint32(2)
    row = uint64(uint32(cuda.blockIdx.x) % period) * uint64(rotary)
    token = uint64(cuda.blockIdx.x) * uint64(heads) * uint64(head)
    for pair in range(cuda.threadIdx.x, heads * half, THREADS):
        h, j = uint32(pair) // half, uint32(pair) % half
        at = token + uint64(h * head + head - rotary + uint32(2) * j)
        turn = row + uint64(uint32(2) * j)
        cos, sin = turns[turn], sign * turns[turn + uint64(1)]
        even, odd = load1(x, at), load1(x, at + uint64(1))
        store1(x, at, even * cos - odd * sin)
        store1(x, at + uint64(1), even * sin + odd * cos)


def sigmoid(a: float32) -> float32:
    """1 / (1 + exp(-a)); where exp overflows to infinity, its reciprocal is 0.

    Relative to what is left of it, it loses digits far on the left: 2e-6 at -87.
    """
    return reciprocal(float32(1) + exp2(-a * LOG2_E))


def swiglu_plain(gate: Any, up: Any, h: Any, n: uint64) -> None:
    """``h = silu(gate) * up``, n numbers, a thread each."""
    i = flat_index()
    if i < n:
        a = load1(gate, i)
        store1(h, i, a * sigmoid(a) * load1(up, i))


def swiglu_backward_plain(
    dh: Any, gate: Any, up: Any, dgate: Any, dup: Any, n: uint64
) -> None:
    """``dgate = dh up σ(1 + a(1 - σ))``, ``dup = dh a σ``; n numbers, a thread each."""
    i = flat_index()
    if i < n:
        a, above = load1(gate, i), load1(dh, i)
        s = sigmoid(a)
        slope = s * (float32(1) + a * (float32(1) - s))
        store1(dgate, i, above * load1(up, i) * slope)
        store1(dup, i, above * (a * s))  # above * a may overflow where s is 0


def cross_entropy_plain(
    logits: Any, targets: Any, losses: Any, highest: Any, log_sums: Any, width: uint32
) -> None:
    r"""`numpy_ref.cross_entropy_forward` of each row, before the mean; a block a row.

    Two readings of the row: its maximum m, then the sum of :math:`e^{z-m}`. In nats:
    losses, highest (m) and log_sums (the sum's logarithm), all (rows) float32. The last
    two stay apart, for m may be large beside what their sum must not lose. A target
    outside 0 … width-1 gives NaN.
    """
    scratch = cuda.shared.array(THREADS, float32)
    row = uint64(cuda.blockIdx.x) * uint64(width)
    largest = LOWEST
    for i in range(cuda.threadIdx.x, width, THREADS):
        largest = max(largest, load1(logits, row + uint64(i)))
    largest = tree_max(largest, scratch)
    total = float32(0)
    for i in range(cuda.threadIdx.x, width, THREADS):
        total += exp2((load1(logits, row + uint64(i)) - largest) * LOG2_E)
    total = tree_sum(total, scratch)
    if cuda.threadIdx.x == 0:
        target = targets[cuda.blockIdx.x]
        log_sum = log2(total) * LN_2
        highest[cuda.blockIdx.x], log_sums[cuda.blockIdx.x] = largest, log_sum
        loss = NAN
        if 0 <= target < width:
            loss = largest - load1(logits, row + uint64(target)) + log_sum
        losses[cuda.blockIdx.x] = loss


def cross_entropy_backward_plain(
    logits: Any, targets: Any, highest: Any, log_sums: Any, dlosses: Any, width: uint32
) -> None:
    """``dz = (softmax(z) - onehot) dloss`` in the place of z; a block a row.

    A row whose target is outside 0 … width-1 becomes NaN, as its loss was.
    """
    row = uint64(cuda.blockIdx.x) * uint64(width)
    largest, log_sum = highest[cuda.blockIdx.x], log_sums[cuda.blockIdx.x]
    target, dloss = targets[cuda.blockIdx.x], dlosses[cuda.blockIdx.x]
    if target < 0 or target >= width:
        dloss = NAN
    for i in range(cuda.threadIdx.x, width, THREADS):
        z = load1(logits, row + uint64(i))
        p = exp2(((z - largest) - log_sum) * LOG2_E)
        if i == target:
            p -= float32(1)
        store1(logits, row + uint64(i), p * dloss)
