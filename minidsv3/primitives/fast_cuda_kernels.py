r"""The primitives as kernels near the speed of the memory: 16 bytes at a time.

The same work as in `plain_cuda_kernels`, and what is done for speed: every load and
store moves 16 bytes, and neighbours in a warp move neighbouring ones; a row is read
once and stays in registers; sums go through shuffles and two barriers. Rows and arrays
begin at multiples of 16 bytes.

How many numbers are in 16 bytes, ``per``, is 8 of bfloat16 and 4 of float32; it must be
a constant for the compiler, as must the number of vectors that a thread keeps of its
row. So each kernel is made by a function of them. Widths are multiples of per.
"""

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
    log2,
    round_to,
    rsqrt,
    store4,
    store8,
)
from minidsv3.gpu.reductions import LOWEST, block_max, block_sum
from minidsv3.primitives.plain_cuda_kernels import LN_2, NAN, flat_index, sigmoid

Kernel = Callable[..., None]


def _moves(per: int) -> tuple[Callable, Callable]:
    """What loads and stores ``per`` numbers."""
    return {4: (load4, store4), 8: (load8, store8)}[per]


@lru_cache
def _row_moves(vectors: int, per: int) -> tuple[Callable, Callable]:
    """What loads and stores a thread's share of a row: ``vectors`` times ``per``.

    Thread t has the vectors t, t + blockDim, t + 2 blockDim, … of the row.
    """
    load, store = _moves(per)

    def load_row(array: Any, row: uint64, width: uint32, into: Any) -> None:
        """The thread's share of the row that begins at element ``row``; beyond, zeros.

        All loads come first and without a condition, so they are under way together. A
        condition would make each wait for the one before; therefore what would lie
        beyond the row's end is the last vector once more, and forgotten.
        """
        step = uint32(per) * uint32(cuda.blockDim.x)
        first = uint32(per) * uint32(cuda.threadIdx.x)
        for k in range(vectors):
            i = min(first + uint32(k) * step, width - uint32(per))
            load(array, row + uint64(i), into, per * k)
        for k in range(vectors):
            if first + uint32(k) * step >= width:
                for e in range(per):
                    into[per * k + e] = float32(0)

    def store_row(array: Any, row: uint64, width: uint32, values: Any) -> None:
        """The thread's share of the row."""
        step = uint32(per) * uint32(cuda.blockDim.x)
        first = uint32(per) * uint32(cuda.threadIdx.x)
        for k in range(vectors):
            i = first + uint32(k) * step
            if i < width:
                store(array, row + uint64(i), values, per * k)

    return load_row, store_row


@lru_cache
def rmsnorm_fast(vectors: int, per: int) -> Kernel:
    """RMSNorm with ``vectors`` times ``per`` numbers of its row in each thread."""
    size = per * vectors
    load_row, store_row = _row_moves(vectors, per)

    def rmsnorm(
        x: Any, g: Any, y: Any, r: Any, width: uint32, inverse: float32, eps: float32
    ) -> None:
        r"""`numpy_ref.rmsnorm_forward`: a block a row, read once and written once.

        x (rows, width), g (width) -> y like x, r (rows) float32; inverse = 1/width.
        """
        scratch = cuda.shared.array(32, float32)
        kept, gains = cuda.local.array(size, float32), cuda.local.array(size, float32)
        row = uint64(cuda.blockIdx.x) * uint64(width)
        load_row(x, row, width, kept)
        load_row(g, uint64(0), width, gains)
        squares = float32(0)
        for e in range(size):
            squares += kept[e] * kept[e]
        scale = rsqrt(block_sum(squares, scratch) * inverse + eps)
        if cuda.threadIdx.x == 0:
            r[cuda.blockIdx.x] = scale
        for e in range(size):
            kept[e] = kept[e] * scale * gains[e]
        store_row(y, row, width, kept)

    return rmsnorm


@lru_cache
def add_rmsnorm_fast(vectors: int, per: int) -> Kernel:
    """The residual add and the RMSNorm of its result, in one pass over the row."""
    size = per * vectors
    load_row, store_row = _row_moves(vectors, per)

    def add_rmsnorm(
        x: Any, residual: Any, g: Any, total: Any, y: Any, r: Any,
        width: uint32, inverse: float32, eps: float32,
    ) -> None:  # fmt: skip
        r"""``total = x + residual``, ``y = rmsnorm(total)``; a block a row.

        All (rows, width) but g (width) and r (rows) float32. The norm is of the sum as
        it was rounded to total's dtype, so that it is the norm of what is kept.
        """
        scratch = cuda.shared.array(32, float32)
        kept, other = cuda.local.array(size, float32), cuda.local.array(size, float32)
        row = uint64(cuda.blockIdx.x) * uint64(width)
        load_row(x, row, width, kept)
        load_row(residual, row, width, other)
        squares = float32(0)
        for e in range(size):
            kept[e] = round_to(total, kept[e] + other[e])
            squares += kept[e] * kept[e]
        store_row(total, row, width, kept)
        load_row(g, uint64(0), width, other)
        scale = rsqrt(block_sum(squares, scratch) * inverse + eps)
        if cuda.threadIdx.x == 0:
            r[cuda.blockIdx.x] = scale
        for e in range(size):
            kept[e] = kept[e] * scale * other[e]
        store_row(y, row, width, kept)

    return add_rmsnorm


@lru_cache
def rmsnorm_backward_fast(vectors: int, per: int) -> Kernel:
    """The gradient of RMSNorm; a block walks over rows and keeps its share of dg."""
    size = per * vectors
    load_row, store_row = _row_moves(vectors, per)

    def rmsnorm_backward(
        dy: Any, x: Any, g: Any, r: Any, dx: Any, partial: Any, rows: uint32,
        width: uint32, inverse: float32,
    ) -> None:  # fmt: skip
        r"""`numpy_ref.rmsnorm_backward`: reads dy and x once, writes dx.

        partial (blocks, width) float32: each block's share of dg, in registers until
        the end. g is read again for every row, from a cache.
        """
        scratch = cuda.shared.array(32, float32)
        up, kept = cuda.local.array(size, float32), cuda.local.array(size, float32)
        dg, gains = cuda.local.array(size, float32), cuda.local.array(size, float32)
        for e in range(size):
            dg[e] = float32(0)
        n = uint32(cuda.blockIdx.x)
        while n < rows:
            row, scale = uint64(n) * uint64(width), r[n]
            load_row(dy, row, width, up)
            load_row(x, row, width, kept)
            load_row(g, uint64(0), width, gains)
            dot = float32(0)
            for e in range(size):
                dg[e] += up[e] * kept[e] * scale
                up[e] *= gains[e]
                dot += up[e] * kept[e]
            shared = block_sum(dot, scratch) * inverse * scale * scale
            for e in range(size):
                up[e] = scale * (up[e] - kept[e] * shared)
            store_row(dx, row, width, up)
            n += uint32(cuda.gridDim.x)
        store_row(partial, uint64(cuda.blockIdx.x) * uint64(width), width, dg)

    return rmsnorm_backward


@lru_cache
def rope_fast(per: int) -> Kernel:
    """RoPE in place, ``per / 2`` pairs a thread and head."""
    load, store = _moves(per)

    def rope(
        x: Any, turns: Any, tokens: uint32, heads: uint32, head: uint32,
        rotary: uint32, period: uint32, sign: float32,
    ) -> None:  # fmt: skip
        r"""`numpy_ref.rope_forward` in place; a block takes blockDim.z tokens.

        As `plain_cuda_kernels.rope_plain`, in a block of (rotary/per, any, any)
        threads. A thread keeps the turns of its pairs and goes through the heads.
        """
        turn, pairs = cuda.local.array(per, float32), cuda.local.array(per, float32)
        token = uint32(cuda.blockIdx.x) * uint32(cuda.blockDim.z)
        token += uint32(cuda.threadIdx.z)
        if token < tokens:
            column = uint64(per) * uint64(cuda.threadIdx.x)
            row = uint64(uint32(token) % period) * uint64(rotary)
            load(turns, row + column, turn, 0)
            first = uint64(token) * uint64(heads) * uint64(head)
            h = uint32(cuda.threadIdx.y)
            while h < heads:
                at = first + uint64(h) * uint64(head) + uint64(head - rotary) + column
                load(x, at, pairs, 0)
                for j in range(0, per, 2):
                    cos, sin = turn[j], sign * turn[j + 1]
                    even, odd = pairs[j], pairs[j + 1]
                    pairs[j] = even * cos - odd * sin
                    pairs[j + 1] = even * sin + odd * cos
                store(x, at, pairs, 0)
                h += uint32(cuda.blockDim.y)

    return rope


@lru_cache
def swiglu_fast(per: int) -> Kernel:
    """SwiGLU, ``per`` numbers a thread."""
    load, store = _moves(per)

    def swiglu(gate: Any, up: Any, h: Any, n: uint64) -> None:
        """``h = silu(gate) * up``, n numbers, a multiple of per; a thread takes per."""
        a, b = cuda.local.array(per, float32), cuda.local.array(per, float32)
        i = uint64(per) * flat_index()
        if i < n:
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
        dh: Any, gate: Any, up: Any, dgate: Any, dup: Any, n: uint64
    ) -> None:
        """The gradient of `swiglu_fast`; per numbers a thread."""
        above = cuda.local.array(per, float32)
        a, b = cuda.local.array(per, float32), cuda.local.array(per, float32)
        i = uint64(per) * flat_index()
        if i < n:
            load(dh, i, above, 0)
            load(gate, i, a, 0)
            load(up, i, b, 0)
            for e in range(per):
                s = sigmoid(a[e])
                slope = s * (float32(1) + a[e] * (float32(1) - s))
                b[e] = above[e] * b[e] * slope
                a[e] = above[e] * (a[e] * s)
            store(dgate, i, b, 0)
            store(dup, i, a, 0)

    return swiglu_backward


@lru_cache
def cross_entropy_fast(per: int) -> Kernel:
    """The loss of each row, ``per`` logits at a time."""
    load, _ = _moves(per)

    def cross_entropy(
        logits: Any, targets: Any, losses: Any, highest: Any, log_sums: Any,
        width: uint32,
    ) -> None:  # fmt: skip
        r"""`plain_cuda_kernels.cross_entropy_plain`, in one reading of the row.

        Online softmax: a thread keeps the largest number it has seen and the sum of
        :math:`e^{z - \max}` of all it has seen; where a larger one comes, the sum
        shrinks by :math:`e^{old - new}`.
        """
        scratch = cuda.shared.array(32, float32)
        z = cuda.local.array(per, float32)
        row = uint64(cuda.blockIdx.x) * uint64(width)
        largest, total = LOWEST, float32(0)
        i = uint64(per) * uint64(cuda.threadIdx.x)
        while i < width:
            load(logits, row + i, z, 0)
            before = largest
            for e in range(per):
                largest = max(largest, z[e])
            total *= exp2((before - largest) * LOG2_E)
            for e in range(per):
                total += exp2((z[e] - largest) * LOG2_E)
            i += uint64(per) * uint64(cuda.blockDim.x)
        top = block_max(largest, scratch)
        total = block_sum(total * exp2((largest - top) * LOG2_E), scratch)
        if cuda.threadIdx.x == 0:
            target = targets[cuda.blockIdx.x]
            log_sum = log2(total) * LN_2
            highest[cuda.blockIdx.x], log_sums[cuda.blockIdx.x] = top, log_sum
            loss = NAN
            if 0 <= target < width:
                loss = top - load1(logits, row + uint64(target)) + log_sum
            losses[cuda.blockIdx.x] = loss

    return cross_entropy


@lru_cache
def cross_entropy_backward_fast(per: int) -> Kernel:
    """The gradient of `cross_entropy_fast`."""
    load, store = _moves(per)

    def cross_entropy_backward(
        logits: Any, targets: Any, highest: Any, log_sums: Any, dlosses: Any,
        width: uint32,
    ) -> None:  # fmt: skip
        """`plain_cuda_kernels.cross_entropy_backward_plain`, 16 bytes at a time."""
        z = cuda.local.array(per, float32)
        row = uint64(cuda.blockIdx.x) * uint64(width)
        largest, log_sum = highest[cuda.blockIdx.x], log_sums[cuda.blockIdx.x]
        target, dloss = targets[cuda.blockIdx.x], dlosses[cuda.blockIdx.x]
        hot = uint32(target)
        if target < 0 or target >= width:
            dloss = NAN
        i = uint64(per) * uint64(cuda.threadIdx.x)
        while i < width:
            load(logits, row + i, z, 0)
            for e in range(per):
                z[e] = exp2(((z[e] - largest) - log_sum) * LOG2_E)
                if uint32(i) + uint32(e) == hot:
                    z[e] -= float32(1)
                z[e] *= dloss
            store(logits, row + i, z, 0)
            i += uint64(per) * uint64(cuda.blockDim.x)

    return cross_entropy_backward
