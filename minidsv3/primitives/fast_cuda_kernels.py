r"""The primitives as kernels near the speed of the memory: 16 bytes at a time.

The same work as in `plain_cuda_kernels`, and what is done for speed: every load and
store moves 16 bytes, and neighbours in a warp move neighbouring ones; a row is read
once and stays in registers; sums go through shuffles and two barriers. Rows and arrays
begin at multiples of 16 bytes.

How many numbers are in 16 bytes, ``per``, is 8 of bfloat16 and 4 of float32; it must be
a constant for the compiler, as must the number of vectors that a thread keeps of its
row. So each kernel is made by a function of them. Widths are multiples of per.
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
    load4,
    load8,
    round_to,
    rsqrt,
    store4,
    store8,
)
from minidsv3.gpu.reductions import LOWEST, block_max, block_sum
from minidsv3.primitives.plain_cuda_kernels import LN_2, flat_index, sigmoid

Kernel = Callable[..., None]


def _moves(per: int) -> tuple[Callable, Callable]:
    """What loads and stores ``per`` numbers."""
    return {4: (load4, store4), 8: (load8, store8)}[per]


@lru_cache
def rmsnorm_fast(vectors: int, per: int) -> Kernel:
    """RMSNorm with ``per * vectors`` numbers of its row in each thread."""
    kept_size = per * vectors
    load, store = _moves(per)

    def rmsnorm(
        x: Any, g: Any, y: Any, r: Any, width: uint32, inverse: float32, eps: float32
    ) -> None:
        r"""`numpy_ref.rmsnorm_forward`: a block a row, read once and written once.

        x (rows, width), g (width) -> y like x, r (rows) float32; inverse = 1/width.
        """
        scratch = cuda.shared.array(32, float32)
        kept = cuda.local.array(kept_size, float32)
        gains = cuda.local.array(per, float32)
        row = uint64(cuda.blockIdx.x) * uint64(width)
        first = uint32(per) * uint32(cuda.threadIdx.x)
        step = uint32(per) * uint32(cuda.blockDim.x)
        for e in range(kept_size):
            kept[e] = float32(0)
        for k in range(vectors):  # all loads first: they are under way together
            i = first + uint32(k) * step
            if i < width:
                load(x, row + uint64(i), kept, per * k)
        squares = float32(0)
        for e in range(kept_size):
            squares += kept[e] * kept[e]
        scale = rsqrt(block_sum(squares, scratch) * inverse + eps)
        if cuda.threadIdx.x == 0:
            r[cuda.blockIdx.x] = scale
        for k in range(vectors):
            i = first + uint32(k) * step
            if i < width:
                load(g, i, gains, 0)
                for e in range(per):
                    kept[per * k + e] *= scale * gains[e]
                store(y, row + uint64(i), kept, per * k)

    return rmsnorm


@lru_cache
def add_rmsnorm_fast(vectors: int, per: int) -> Kernel:
    """The residual add and the RMSNorm of its result, in one pass over the row."""
    kept_size = per * vectors
    load, store = _moves(per)

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
        gains = cuda.local.array(per, float32)
        row = uint64(cuda.blockIdx.x) * uint64(width)
        first = uint32(per) * uint32(cuda.threadIdx.x)
        step = uint32(per) * uint32(cuda.blockDim.x)
        for e in range(kept_size):
            kept[e] = other[e] = float32(0)
        # All loads first: they are under way together. Under a condition, two loads of
        # bfloat16 would be waited for before the next two; so beyond the row's end the
        # last vector is loaded again, and forgotten.
        for k in range(vectors):
            i = min(first + uint32(k) * step, width - uint32(per))
            load(x, row + uint64(i), kept, per * k)
            load(residual, row + uint64(i), other, per * k)
        for k in range(vectors):
            if first + uint32(k) * step >= width:
                for e in range(per):
                    kept[per * k + e] = other[per * k + e] = float32(0)
        squares = float32(0)
        for e in range(kept_size):
            kept[e] = round_to(total, kept[e] + other[e])
            squares += kept[e] * kept[e]
        for k in range(vectors):
            i = first + uint32(k) * step
            if i < width:
                store(total, row + uint64(i), kept, per * k)
        scale = rsqrt(block_sum(squares, scratch) * inverse + eps)
        if cuda.threadIdx.x == 0:
            r[cuda.blockIdx.x] = scale
        for k in range(vectors):
            i = first + uint32(k) * step
            if i < width:
                load(g, i, gains, 0)
                for e in range(per):
                    kept[per * k + e] *= scale * gains[e]
                store(y, row + uint64(i), kept, per * k)

    return add_rmsnorm


@lru_cache
def rmsnorm_backward_fast(vectors: int, per: int) -> Kernel:
    """The gradient of RMSNorm; a block walks over rows and keeps its share of dg."""
    kept_size = per * vectors
    load, store = _moves(per)

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
        gains = cuda.local.array(per, float32)
        first = uint32(per) * uint32(cuda.threadIdx.x)
        step = uint32(per) * uint32(cuda.blockDim.x)
        for e in range(kept_size):
            dg[e] = float32(0)
        for n in range(uint32(cuda.blockIdx.x), rows, uint32(cuda.gridDim.x)):
            row, scale = uint64(n) * uint64(width), r[n]
            for k in range(vectors):  # without condition, as in add_rmsnorm
                i = min(first + uint32(k) * step, width - uint32(per))
                load(dy, row + uint64(i), up, per * k)
                load(x, row + uint64(i), kept, per * k)
            dot = float32(0)
            for k in range(vectors):
                i = first + uint32(k) * step
                if i < width:
                    load(g, i, gains, 0)
                    for e in range(per):
                        at = per * k + e
                        dg[at] += up[at] * kept[at] * scale
                        up[at] *= gains[e]
                        dot += up[at] * kept[at]
            shared = block_sum(dot, scratch) * inverse * scale * scale
            for k in range(vectors):
                i = first + uint32(k) * step
                if i < width:
                    for e in range(per):
                        at = per * k + e
                        up[at] = scale * (up[at] - kept[at] * shared)
                    store(dx, row + uint64(i), up, per * k)
        mine = uint64(cuda.blockIdx.x) * uint64(width)
        for k in range(vectors):
            i = first + uint32(k) * step
            if i < width:
                store(partial, mine + uint64(i), dg, per * k)

    return rmsnorm_backward


@lru_cache
def rope_fast(per: int) -> Kernel:
    """RoPE in place, ``per / 2`` pairs a thread and head."""
    load, store = _moves(per)

    def rope(
        x: Any, turns: Any, heads: uint32, head: uint32, rotary: uint32, period: uint32,
        sign: float32,
    ) -> None:  # fmt: skip
        r"""`numpy_ref.rope_forward` in place: a block a token.

        As `plain_cuda_kernels.rope_plain`, in a block of (rotary/per, any) threads. A
        thread keeps the turns of its pairs and goes through the heads with them.
        """
        turn, pairs = cuda.local.array(per, float32), cuda.local.array(per, float32)
        column = uint32(per) * uint32(cuda.threadIdx.x)
        row = uint64(uint32(cuda.blockIdx.x) % period) * uint64(rotary)
        load(turns, row + uint64(column), turn, 0)
        token = uint64(cuda.blockIdx.x) * uint64(heads) * uint64(head)
        for h in range(uint32(cuda.threadIdx.y), heads, uint32(cuda.blockDim.y)):
            at = token + uint64(uint32(h) * head + head - rotary + column)
            load(x, at, pairs, 0)
            for j in range(0, per, 2):
                cos, sin = turn[j], sign * turn[j + 1]
                even, odd = pairs[j], pairs[j + 1]
                pairs[j] = even * cos - odd * sin
                pairs[j + 1] = even * sin + odd * cos
            store(x, at, pairs, 0)

    return rope


@lru_cache
def swiglu_fast(per: int) -> Kernel:
    """SwiGLU, ``per`` numbers a thread."""
    load, store = _moves(per)

    def swiglu(gate: Any, up: Any, h: Any, n: uint32) -> None:
        """``h = silu(gate) * up``, n numbers, a multiple of per; a thread takes per."""
        a, b = cuda.local.array(per, float32), cuda.local.array(per, float32)
        i = uint64(per) * flat_index()
        if i < uint64(n):
            load(gate, i, a, 0)
            load(up, i, b, 0)
            for e in range(per):
                a[e] = a[e] * sigmoid(a[e]) * b[e]
            store(h, i, a, 0)

    return swiglu


@lru_cache
def swiglu_backward_fast(per: int) -> Kernel:
    """The gradient of `swiglu_fast`."""
    load, store = _moves(per)

    def swiglu_backward(
        dh: Any, gate: Any, up: Any, dgate: Any, dup: Any, n: uint32
    ) -> None:
        """The gradient of `swiglu_fast`; per numbers a thread."""
        above = cuda.local.array(per, float32)
        a, b = cuda.local.array(per, float32), cuda.local.array(per, float32)
        i = uint64(per) * flat_index()
        if i < uint64(n):
            load(dh, i, above, 0)
            load(gate, i, a, 0)
            load(up, i, b, 0)
            for e in range(per):
                s = sigmoid(a[e])
                slope = s * (float32(1) + a[e] * (float32(1) - s))
                b[e] = above[e] * b[e] * slope
                a[e] = above[e] * a[e] * s
            store(dgate, i, b, 0)
            store(dup, i, a, 0)

    return swiglu_backward


@lru_cache
def cross_entropy_fast(per: int) -> Kernel:
    """The loss of each row, ``per`` logits at a time."""
    load, _ = _moves(per)

    def cross_entropy(
        logits: Any, targets: Any, losses: Any, log_sums: Any, width: uint32
    ) -> None:
        r"""`numpy_ref.cross_entropy_forward` of a row, in one reading; a block a row.

        Online softmax: a thread keeps the largest number it has seen and the sum of
        :math:`2^{z - \max}` of all it has seen; where a larger one comes, the sum
        shrinks by :math:`2^{old - new}`. Here z are logits times log2(e). As in
        `plain_cuda_kernels.cross_entropy_plain`, a target outside the row gives NaN.
        """
        scratch = cuda.shared.array(32, float32)
        z = cuda.local.array(per, float32)
        row = uint64(cuda.blockIdx.x) * uint64(width)
        largest, total = LOWEST, float32(0)
        step = uint32(per) * uint32(cuda.blockDim.x)
        for i in range(uint32(per) * uint32(cuda.threadIdx.x), width, step):
            load(logits, row + uint64(i), z, 0)
            before = largest
            for e in range(per):
                z[e] *= LOG2_E
                largest = max(largest, z[e])
            total *= exp2(before - largest)
            for e in range(per):
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

    return cross_entropy


@lru_cache
def cross_entropy_backward_fast(per: int) -> Kernel:
    """The gradient of `cross_entropy_fast`."""
    load, store = _moves(per)

    def cross_entropy_backward(
        logits: Any, targets: Any, log_sums: Any, dlosses: Any, width: uint32
    ) -> None:
        """``dz = (softmax(z) - onehot) dloss`` in the place of z; a block a row."""
        z = cuda.local.array(per, float32)
        row = uint64(cuda.blockIdx.x) * uint64(width)
        log_sum, dloss = log_sums[cuda.blockIdx.x], dlosses[cuda.blockIdx.x]
        target = uint32(targets[cuda.blockIdx.x])
        step = uint32(per) * uint32(cuda.blockDim.x)
        for i in range(uint32(per) * uint32(cuda.threadIdx.x), width, step):
            load(logits, row + uint64(i), z, 0)
            for e in range(per):
                z[e] = exp2((z[e] - log_sum) * LOG2_E)
                if uint32(i) + uint32(e) == target:
                    z[e] -= float32(1)
                z[e] *= dloss
            store(logits, row + uint64(i), z, 0)

    return cross_entropy_backward
