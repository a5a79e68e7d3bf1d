r"""The primitives as kernels near the speed of the memory: 16 bytes at a time.

The same work as in `plain_cuda_kernels`, and what is done for speed: every load and
store moves 16 bytes; a row is read once and stays in registers; sums go through
shuffles and two barriers. Rows and arrays begin at multiples of 16 bytes, and their
widths are multiples of 8. How many vectors of eight a thread keeps must be a constant
for the compiler, so kernels over rows are made by a function of that number.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from numpy import float32, uint32, uint64

from minidsv3.gpu.dialect import cuda
from minidsv3.gpu.intrinsics import (
    LOG2_E,
    exp2,
    load1,
    load8,
    round_to,
    rsqrt,
    store8,
)
from minidsv3.gpu.reductions import LOWEST, block_max, block_sum
from minidsv3.primitives.plain_cuda_kernels import LN_2, sigmoid

EIGHT = uint32(8)
Kernel = Callable[..., None]


@lru_cache
def rmsnorm_fast(vectors: int) -> Kernel:
    """RMSNorm with ``8 * vectors`` numbers of its row in each thread."""
    kept_size = 8 * vectors

    def rmsnorm(
        x: Any, g: Any, y: Any, r: Any, width: uint32, inverse: float32, eps: float32
    ) -> None:
        r"""`numpy_ref.rmsnorm_forward`: a block a row, read once and written once.

        x (rows, width), g (width) -> y like x, r (rows) float32; inverse = 1/width.
        """
        scratch = cuda.shared.array(32, float32)
        kept = cuda.local.array(kept_size, float32)
        gains = cuda.local.array(8, float32)
        row = uint64(cuda.blockIdx.x) * uint64(width)
        first = EIGHT * uint32(cuda.threadIdx.x)
        step = EIGHT * uint32(cuda.blockDim.x)
        for e in range(kept_size):
            kept[e] = float32(0)
        for k in range(vectors):  # all loads first: they are under way together
            i = first + uint32(k) * step
            if i < width:
                load8(x, row + uint64(i), kept, 8 * k)
        squares = float32(0)
        for e in range(kept_size):
            squares += kept[e] * kept[e]
        scale = rsqrt(block_sum(squares, scratch) * inverse + eps)
        if cuda.threadIdx.x == 0:
            r[cuda.blockIdx.x] = scale
        for k in range(vectors):
            i = first + uint32(k) * step
            if i < width:
                load8(g, i, gains, 0)
                for e in range(8):
                    kept[8 * k + e] *= scale * gains[e]
                store8(y, row + uint64(i), kept, 8 * k)

    return rmsnorm


@lru_cache
def add_rmsnorm_fast(vectors: int) -> Kernel:
    """The residual add and the RMSNorm of its result, in one pass over the row."""
    kept_size = 8 * vectors

    def add_rmsnorm(
        x: Any, residual: Any, g: Any, total: Any, y: Any, r: Any,
        width: uint32, inverse: float32, eps: float32,
    ) -> None:  # fmt: skip
        r"""``total = x + residual``, ``y = rmsnorm(total)``; a block a row.

        All (rows, width) but g (width) and r (rows) float32. The norm is of the sum as
        it was rounded to total's dtype, so that it is the norm of what is kept.
        """
        scratch = cuda.shared.array(32, float32)
        kept = cuda.local.array(kept_size, float32)
        other = cuda.local.array(kept_size, float32)
        gains = cuda.local.array(8, float32)
        row = uint64(cuda.blockIdx.x) * uint64(width)
        first = EIGHT * uint32(cuda.threadIdx.x)
        step = EIGHT * uint32(cuda.blockDim.x)
        for e in range(kept_size):
            kept[e] = other[e] = float32(0)
        for k in range(vectors):  # all loads first: they are under way together
            i = first + uint32(k) * step
            if i < width:
                load8(x, row + uint64(i), kept, 8 * k)
                load8(residual, row + uint64(i), other, 8 * k)
        squares = float32(0)
        for e in range(kept_size):
            kept[e] = round_to(total, kept[e] + other[e])
            squares += kept[e] * kept[e]
        for k in range(vectors):
            i = first + uint32(k) * step
            if i < width:
                store8(total, row + uint64(i), kept, 8 * k)
        scale = rsqrt(block_sum(squares, scratch) * inverse + eps)
        if cuda.threadIdx.x == 0:
            r[cuda.blockIdx.x] = scale
        for k in range(vectors):
            i = first + uint32(k) * step
            if i < width:
                load8(g, i, gains, 0)
                for e in range(8):
                    kept[8 * k + e] *= scale * gains[e]
                store8(y, row + uint64(i), kept, 8 * k)

    return add_rmsnorm


@lru_cache
def rmsnorm_backward_fast(vectors: int) -> Kernel:
    """The gradient of RMSNorm; a block walks over rows and keeps its share of dg."""
    kept_size = 8 * vectors

    def rmsnorm_backward(
        dy: Any, x: Any, g: Any, r: Any, dx: Any, partial: Any, rows: uint32,
        width: uint32, inverse: float32,
    ) -> None:  # fmt: skip
        r"""`numpy_ref.rmsnorm_backward`: reads dy and x once, writes dx.

        partial (blocks, width) float32: each block's share of dg, in registers until
        the end. g is read again for every row, from a cache.
        """
        scratch = cuda.shared.array(32, float32)
        up = cuda.local.array(kept_size, float32)
        kept = cuda.local.array(kept_size, float32)
        dg = cuda.local.array(kept_size, float32)
        gains = cuda.local.array(8, float32)
        first = EIGHT * uint32(cuda.threadIdx.x)
        step = EIGHT * uint32(cuda.blockDim.x)
        for e in range(kept_size):
            dg[e] = float32(0)
        for n in range(uint32(cuda.blockIdx.x), rows, uint32(cuda.gridDim.x)):
            row, scale = uint64(n) * uint64(width), r[n]
            for k in range(vectors):
                i = first + uint32(k) * step
                if i < width:
                    load8(dy, row + uint64(i), up, 8 * k)
                    load8(x, row + uint64(i), kept, 8 * k)
            dot = float32(0)
            for k in range(vectors):
                i = first + uint32(k) * step
                if i < width:
                    load8(g, i, gains, 0)
                    for e in range(8):
                        at = 8 * k + e
                        dg[at] += up[at] * kept[at] * scale
                        up[at] *= gains[e]
                        dot += up[at] * kept[at]
            shared = block_sum(dot, scratch) * inverse * scale * scale
            for k in range(vectors):
                i = first + uint32(k) * step
                if i < width:
                    for e in range(8):
                        at = 8 * k + e
                        up[at] = scale * (up[at] - kept[at] * shared)
                    store8(dx, row + uint64(i), up, 8 * k)
        mine = uint64(cuda.blockIdx.x) * uint64(width)
        for k in range(vectors):
            i = first + uint32(k) * step
            if i < width:
                store8(partial, mine + uint64(i), dg, 8 * k)

    return rmsnorm_backward


def rope_fast(
    x: Any, turns: Any, heads: uint32, head: uint32, rotary: uint32, period: uint32,
    sign: float32,
) -> None:  # fmt: skip
    r"""`numpy_ref.rope_forward` in place: a block a token, four pairs a thread.

    As `plain_cuda_kernels.rope_plain`, in a block of (rotary/8, any) threads. A thread
    keeps the turns of its four pairs and goes through the heads with them.
    """
    turn, pairs = cuda.local.array(8, float32), cuda.local.array(8, float32)
    column = EIGHT * uint32(cuda.threadIdx.x)
    row = uint64(uint32(cuda.blockIdx.x) % period) * uint64(rotary)
    load8(turns, row + uint64(column), turn, 0)
    token = uint64(cuda.blockIdx.x) * uint64(heads) * uint64(head)
    for h in range(uint32(cuda.threadIdx.y), heads, uint32(cuda.blockDim.y)):
        at = token + uint64(uint32(h) * head + head - rotary + column)
        load8(x, at, pairs, 0)
        for j in range(0, 8, 2):
            cos, sin = turn[j], sign * turn[j + 1]
            even, odd = pairs[j], pairs[j + 1]
            pairs[j] = even * cos - odd * sin
            pairs[j + 1] = even * sin + odd * cos
        store8(x, at, pairs, 0)


def swiglu_fast(gate: Any, up: Any, h: Any, n: uint32) -> None:
    """``h = silu(gate) * up``, n numbers, a multiple of 8; a thread takes eight."""
    a, b = cuda.local.array(8, float32), cuda.local.array(8, float32)
    thread = uint64(cuda.blockIdx.x) * uint64(cuda.blockDim.x) + uint64(
        cuda.threadIdx.x
    )
    i = uint64(8) * thread
    if i < uint64(n):
        load8(gate, i, a, 0)
        load8(up, i, b, 0)
        for e in range(8):
            a[e] = a[e] * sigmoid(a[e]) * b[e]
        store8(h, i, a, 0)


def swiglu_backward_fast(
    dh: Any, gate: Any, up: Any, dgate: Any, dup: Any, n: uint32
) -> None:
    """The gradient of `swiglu_fast`; eight numbers a thread."""
    above = cuda.local.array(8, float32)
    a, b = cuda.local.array(8, float32), cuda.local.array(8, float32)
    thread = uint64(cuda.blockIdx.x) * uint64(cuda.blockDim.x) + uint64(
        cuda.threadIdx.x
    )
    i = uint64(8) * thread
    if i < uint64(n):
        load8(dh, i, above, 0)
        load8(gate, i, a, 0)
        load8(up, i, b, 0)
        for e in range(8):
            s = sigmoid(a[e])
            slope = s * (float32(1) + a[e] * (float32(1) - s))
            b[e] = above[e] * b[e] * slope
            a[e] = above[e] * (a[e] * s)
        store8(dgate, i, b, 0)
        store8(dup, i, a, 0)


def cross_entropy_fast(
    logits: Any, targets: Any, losses: Any, log_sums: Any, width: uint32
) -> None:
    r"""`numpy_ref.cross_entropy_forward` of each row, in one reading; a block a row.

    Online softmax: a thread keeps the largest number it has seen and the sum of
    :math:`2^{z - \max}` of all it has seen; where a larger one comes, the sum shrinks
    by :math:`2^{old - new}`. Here z are logits times log2(e). As in
    `plain_cuda_kernels.cross_entropy_plain`, a target outside the row gives NaN.
    """
    scratch = cuda.shared.array(32, float32)
    z = cuda.local.array(8, float32)
    row = uint64(cuda.blockIdx.x) * uint64(width)
    largest, total = LOWEST, float32(0)
    step = EIGHT * uint32(cuda.blockDim.x)
    for i in range(EIGHT * uint32(cuda.threadIdx.x), width, step):
        load8(logits, row + uint64(i), z, 0)
        before = largest
        for e in range(8):
            z[e] *= LOG2_E
            largest = max(largest, z[e])
        total *= exp2(before - largest)
        for e in range(8):
            total += exp2(z[e] - largest)
    highest = block_max(largest, scratch)
    total = block_sum(total * exp2(largest - highest), scratch)
    if cuda.threadIdx.x == 0:
        log_sum = highest * LN_2 + math.log(total)
        target = targets[cuda.blockIdx.x]
        log_sums[cuda.blockIdx.x] = log_sum
        losses[cuda.blockIdx.x] = float32(math.nan)
        if 0 <= target < width:
            losses[cuda.blockIdx.x] = log_sum - load1(logits, row + uint64(target))


def cross_entropy_backward_fast(
    logits: Any, targets: Any, log_sums: Any, dlosses: Any, width: uint32
) -> None:
    """``dz = (softmax(z) - onehot) dloss`` in the place of logits; a block a row."""
    z = cuda.local.array(8, float32)
    row = uint64(cuda.blockIdx.x) * uint64(width)
    log_sum, dloss = log_sums[cuda.blockIdx.x], dlosses[cuda.blockIdx.x]
    target = uint32(targets[cuda.blockIdx.x])
    step = EIGHT * uint32(cuda.blockDim.x)
    for i in range(EIGHT * uint32(cuda.threadIdx.x), width, step):
        load8(logits, row + uint64(i), z, 0)
        for e in range(8):
            z[e] = exp2((z[e] - log_sum) * LOG2_E)
            if uint32(i) + uint32(e) == target:
                z[e] -= float32(1)
            z[e] *= dloss
        store8(logits, row + uint64(i), z, 0)
