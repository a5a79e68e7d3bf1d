"""Small kernels around one intrinsic each, for the simulator, the compiler and a GPU.

A warp's kernels are launched with one block of 32 threads; thread t reads and writes
``array[t + 32 k]``, the k-th value of its lane.
"""

from collections.abc import Callable
from typing import Any

from numpy import float32, uint32

from minidsv3.gpu.dialect import cuda
from minidsv3.gpu.intrinsics import (
    commit_copies,
    copy_async16,
    high_of,
    ldmatrix4,
    ldmatrix4_transposed,
    load1,
    load4,
    load8,
    low_of,
    mma_bf16,
    pack2,
    round_to,
    store1,
    store4,
    store8,
    wait_copies,
)

Kernel = Callable[..., None]


def elementwise(function: Callable[[Any], Any]) -> Kernel:
    """``y[i] = function(x[i])``."""

    def kernel(x, y, n):
        i = cuda.grid(1)
        if i < n:
            y[i] = function(x[i])

    return kernel


def packed(x, y, n):
    """Word i of y has numbers 2i and 2i + 1 of x."""
    i = cuda.grid(1)
    if i < n:
        y[i] = pack2(x[2 * i], x[2 * i + 1])


def unpacked(x, y, n):
    """Numbers 2i and 2i + 1 of y are those in word i of x."""
    i = cuda.grid(1)
    if i < n:
        y[2 * i] = low_of(x[i])
        y[2 * i + 1] = high_of(x[i])


def copied(x, y, n):
    """One element a thread."""
    i = cuda.grid(1)
    if i < n:
        store1(y, i, load1(x, i))


def wide_load(x, y, n):
    """Eight elements a thread, loaded together, stored one by one."""
    i = 8 * cuda.grid(1)
    values = cuda.local.array(16, float32)
    if i < n:
        load8(x, i, values, 8)
        for k in range(8):
            store1(y, i + k, values[8 + k])


def wide_store(x, y, n):
    """Eight elements a thread, loaded one by one, stored together."""
    i = 8 * cuda.grid(1)
    values = cuda.local.array(16, float32)
    if i < n:
        for k in range(8):
            values[8 + k] = load1(x, i + k)
        store8(y, i, values, 8)


def load_of_four(x, y, n):
    """`wide_load`, of four."""
    i = 4 * cuda.grid(1)
    values = cuda.local.array(8, float32)
    if i < n:
        load4(x, i, values, 4)
        for k in range(4):
            store1(y, i + k, values[4 + k])


def store_of_four(x, y, n):
    """`wide_store`, of four."""
    i = 4 * cuda.grid(1)
    values = cuda.local.array(8, float32)
    if i < n:
        for k in range(4):
            values[4 + k] = load1(x, i + k)
        store4(y, i, values, 4)


def rounded(x, y, like, n):
    """Numbers of x as an array like this one would hold them, and still float32."""
    i = cuda.grid(1)
    if i < n:
        y[i] = round_to(like, x[i])


def one_by_one(x, y, n):
    """What `wide_load` and `wide_store` are for, without them."""
    i = 8 * cuda.grid(1)
    if i < n:
        for k in range(8):
            y[i + k] = x[i + k]


def multiply(mma: Callable[..., tuple]) -> Kernel:
    """``D = A B + C`` from and to fragments that lie in memory."""

    def kernel(a, b, c, d):
        t = cuda.threadIdx.x
        d0, d1, d2, d3 = mma(
            c[t], c[t + 32], c[t + 64], c[t + 96],
            a[t], a[t + 32], a[t + 64], a[t + 96],
            b[t], b[t + 32],
        )  # fmt: skip
        d[t] = d0
        d[t + 32] = d1
        d[t + 64] = d2
        d[t + 96] = d3

    return kernel


def spread(load: Callable[..., tuple]) -> Kernel:
    """Four 8 × 8 matrices, a row in four words of x, to the lanes' words in y."""

    def kernel(x, y):
        tile = cuda.shared.array(128, uint32, alignment=16)
        t = cuda.threadIdx.x
        for k in range(4):
            tile[t + 32 * k] = x[t + 32 * k]
        cuda.syncthreads()
        w0, w1, w2, w3 = load(tile, 4 * t)
        y[t] = w0
        y[t + 32] = w1
        y[t + 64] = w2
        y[t + 96] = w3

    return kernel


def product(a, b, d):
    """D (16, 8) = A (16, 16) B (16, 8), as a real kernel does it.

    A and B are bfloat16, row by row, two in a word; D is float32. Lanes 0–15 of the
    loads of A name the left halves of its rows. B comes by a load of which two matrices
    are rows 0–7 and 8–15 of B, and two are not used.
    """
    left = cuda.shared.array(128, uint32, alignment=16)
    right = cuda.shared.array(64, uint32, alignment=16)
    t = cuda.threadIdx.x
    for k in range(4):
        left[t + 32 * k] = a[t + 32 * k]
    for k in range(2):
        right[t + 32 * k] = b[t + 32 * k]
    cuda.syncthreads()
    a0, a1, a2, a3 = ldmatrix4(left, 8 * (t % 16) + 4 * (t // 16))
    b0, b1, _, _ = ldmatrix4_transposed(right, 4 * (t % 16))
    zero = float32(0)
    d0, d1, d2, d3 = mma_bf16(zero, zero, zero, zero, a0, a1, a2, a3, b0, b1)
    row, column = t // 4, 2 * (t % 4)
    d[8 * row + column] = d0
    d[8 * row + column + 1] = d1
    d[8 * (row + 8) + column] = d2
    d[8 * (row + 8) + column + 1] = d3


def copied_aside(x, y):
    """128 words by way of shared memory, past the registers, and turned around."""
    tile = cuda.shared.array(128, uint32, alignment=16)
    t = cuda.threadIdx.x
    copy_async16(tile, 4 * t, x, 4 * t)
    commit_copies()
    wait_copies(0)
    cuda.syncthreads()
    for k in range(4):
        y[t + 32 * k] = tile[127 - t - 32 * k]


def copied_in_stages(x, y):
    """Two groups of copies; the older is read while the younger may be under way."""
    tile = cuda.shared.array(256, uint32, alignment=16)
    t = cuda.threadIdx.x
    copy_async16(tile, 4 * t, x, 4 * t)
    commit_copies()
    copy_async16(tile, 128 + 4 * t, x, 128 + 4 * t)
    commit_copies()
    wait_copies(1)
    cuda.syncthreads()
    for k in range(4):
        y[t + 32 * k] = tile[127 - t - 32 * k]
    wait_copies(0)
    cuda.syncthreads()
    for k in range(4):
        y[128 + t + 32 * k] = tile[255 - t - 32 * k]
