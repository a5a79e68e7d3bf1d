"""The CUDA simulator: right kernels come out right, and each planted bug is named."""

import inspect
import math
import pickle
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minidsv3.gpu.simulator import (
    BoundsError,
    DivergenceError,
    RaceError,
    SimulatorError,
    UninitialisedError,
    cuda,
    launch,
)
from tests.layout import loads

ROOT = Path(__file__).parents[1]
ORDERS = ["rising", "falling", 0, 1, 2]
FULL = 0xFFFFFFFF


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def planted(kernel: Callable, old: str, new: str) -> Callable:
    """The kernel with a piece of its source replaced, on the same lines."""
    lines, first = inspect.getsourcelines(kernel)
    source = textwrap.dedent("".join(lines))
    assert source.count(old) == 1 and old.count("\n") == new.count("\n")
    code = compile("\n" * (first - 1) + source.replace(old, new), __file__, "exec")
    scope = dict(kernel.__globals__)
    exec(code, scope)
    return scope[kernel.__name__]


def line_of(kernel: Callable, text: str) -> int:
    """The number of the only line of a kernel that has this in it."""
    lines, first = inspect.getsourcelines(kernel)
    (offset,) = [i for i, line in enumerate(lines) if text in line]
    return first + offset


# --- right kernels ------------------------------------------------------------------


def add(x, y, out, n):
    i = cuda.grid(1)
    if i < n:
        out[i] = x[i] + y[i]


def tree_sum(x, out, n):
    tile = cuda.shared.array(64, np.float32)
    t = cuda.threadIdx.x
    i = cuda.grid(1)
    tile[t] = x[i] if i < n else 0.0
    cuda.syncthreads()
    s = 32
    while s > 0:
        if t < s:
            tile[t] += tile[t + s]
        cuda.syncthreads()  # in the loop
        s //= 2
    if t == 0:
        out[cuda.blockIdx.x] = tile[0]


def warp_sum(v):
    for bits in (16, 8, 4, 2, 1):
        v += cuda.shfl_xor_sync(FULL, v, bits)
    return v


def block_sum(x, out, n):
    partial = cuda.shared.array(2, np.float32)
    i, t = cuda.grid(1), cuda.threadIdx.x
    v = warp_sum(x[i] if i < n else np.float32(0))
    if cuda.laneid == 0:
        partial[t // cuda.warpsize] = v
    cuda.syncthreads()
    if t == 0:
        out[cuda.blockIdx.x] = partial[0] + partial[1]


def transpose(x, y, rows, columns):
    tile = cuda.shared.array((8, 9), np.float32)
    tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
    column, row = cuda.grid(2)
    if row < rows and column < columns:
        tile[ty, tx] = x[row, column]
    cuda.syncthreads()
    column = cuda.blockIdx.x * 8 + ty
    row = cuda.blockIdx.y * 8 + tx
    if row < rows and column < columns:
        y[column, row] = tile[tx, ty]


def histogram(x, counts, n):
    own = cuda.shared.array(10, np.int32)
    t = cuda.threadIdx.x
    if t < 10:
        own[t] = 0
    cuda.syncthreads()
    i = cuda.grid(1)
    while i < n:
        cuda.atomic.add(own, x[i], 1)
        i += cuda.gridsize(1)
    cuda.syncthreads()  # before the merge
    if t < 10:
        cuda.atomic.add(counts, t, own[t])


def window_sum(x, y, n):
    near = cuda.local.array(3, np.float32)
    i = cuda.grid(1)
    if i >= n:
        return
    for k in range(3):
        near[k] = x[min(max(i + k - 1, 0), n - 1)]
    y[i] = near[0] + near[1] + near[2]


def softmax_rows(x, y):
    row = x[cuda.blockIdx.y, cuda.blockIdx.x]
    t = cuda.threadIdx.x
    largest = row[0]
    for j in range(1, len(row)):
        largest = max(largest, row[j])
    total = 0.0
    for j in range(row.shape[0]):
        total += math.exp(row[j] - largest)
    y[cuda.blockIdx.y, cuda.blockIdx.x, t] = math.exp(row[t] - largest) / total


SIZES = [1, 63, 64, 65, 200]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", SIZES)
def test_right_kernels_in_one_dimension(n: int, order: str | int) -> None:
    blocks = -(-n // 64)
    x, y, out = normal(n), normal(n)[::-1], np.zeros(n, np.float32)
    launch(add, blocks, 64, x, y, out, n, order=order)
    np.testing.assert_array_equal(out, x + y)

    padded = np.pad(x, (0, 64 * blocks - n)).reshape(blocks, 64)
    for kernel in (tree_sum, block_sum):
        sums = np.zeros(blocks, np.float32)
        launch(kernel, blocks, 64, x, sums, n, order=order)
        np.testing.assert_allclose(sums, padded.sum(1), rtol=1e-5, atol=1e-5)

    launch(window_sum, blocks, 64, x, out, n, order=order)
    wide = np.pad(x, 1, mode="edge")
    np.testing.assert_allclose(out, wide[:-2] + wide[1:-1] + wide[2:], rtol=1e-5)

    ids, counts = np.random.default_rng(n).integers(10, size=n), np.zeros(10, np.int32)
    launch(histogram, 2, 33, ids, counts, n, order=order)
    np.testing.assert_array_equal(counts, np.bincount(ids, minlength=10))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(1, 1), (8, 8), (9, 23), (17, 3)])
def test_right_kernels_in_two_dimensions(shape: tuple, order: str | int) -> None:
    x, y = normal(*shape), np.zeros(shape[::-1], np.float32)
    grid = (-(-shape[1] // 8), -(-shape[0] // 8))
    launch(transpose, grid, (8, 8), x, y, *shape, order=order)
    np.testing.assert_array_equal(y, x.T)

    x = normal(3, 2, 5)
    y = np.zeros_like(x)
    launch(softmax_rows, (2, 3), 5, x, y, order=order)
    np.testing.assert_allclose(y.sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(y[1, 0], np.exp(x[1, 0]) / np.exp(x[1, 0]).sum(), 1e-6)


# --- planted bugs -------------------------------------------------------------------


def sums(kernel: Callable, n: int = 64, blocks: int = 1, **how) -> None:
    launch(kernel, blocks, 64, normal(n), np.zeros(blocks, np.float32), n, **how)


def adds(kernel: Callable, **how) -> None:
    launch(kernel, 2, 32, normal(50), normal(50), np.zeros(50, np.float32), 50, **how)


def windows(kernel: Callable, **how) -> None:
    launch(kernel, 1, 64, normal(50), np.zeros(50, np.float32), 50, **how)


def transposes(kernel: Callable, **how) -> None:
    x, y = normal(16, 12), np.zeros((12, 16), np.float32)
    launch(kernel, (2, 2), (8, 8), x, y, 16, 12, **how)


def counts(kernel: Callable, **how) -> None:
    launch(kernel, 2, 32, np.arange(100) % 10, np.zeros(10, np.int32), 100, **how)


BARRIER = "    cuda.syncthreads()\n"
NONE = "    pass\n"
BUGS = {
    "no barrier after loading": (
        tree_sum, sums, BARRIER + "    s = 32", NONE + "    s = 32",
        RaceError, "tile[t] += tile", "tile", 32),
    "no barrier in the loop": (
        tree_sum, sums, "cuda.syncthreads()  # in the loop", "pass",
        RaceError, "tile[t] += tile", "tile", 16),
    "no barrier between warps": (
        block_sum, sums, BARRIER, NONE, RaceError, "partial[1]", "partial", 1),
    "no barrier before a tile is read": (
        transpose, transposes, BARRIER, NONE,
        RaceError, "= tile[tx, ty]", "tile", (1, 0)),
    "no barrier before counting": (
        histogram, counts, BARRIER + "    i =", NONE + "    i =",
        RaceError, "atomic.add(own, x[i]", "own", 1),
    "no barrier before a merge": (
        histogram, counts, "cuda.syncthreads()  # before", "pass  #",
        RaceError, "atomic.add(own, x[i]", "own", 0),
    "a barrier inside an if": (
        tree_sum, sums, "        cuda.syncthreads()  # in", "            cuda.syncthreads()  # in",
        DivergenceError, "in the loop", None, None),
    "a return before a barrier": (
        tree_sum, sums, "    tile[t] = x[i] if i < n else 0.0",
        "    tile[t] = 0.0 if t < 60 else exit",
        TypeError, "", None, None),
    "one too far": (
        window_sum, windows, "n - 1)]", "n)]", BoundsError, "near[k] = x", "x", 50),
    "before the first": (
        window_sum, windows, "max(i + k - 1, 0)", "i + k - 1",
        BoundsError, "near[k] = x", "x", -1),
    "no guard": (add, adds, "i < n", "True", BoundsError, "out[i] =", "x", 50),
    "axes exchanged": (
        transpose, transposes, "y[column, row]", "y[row, column]",
        BoundsError, "= tile[tx, ty]", "y", (12, 0)),
    "an axis forgotten": (
        transpose, transposes, "tile[ty, tx] =", "tile[ty] =",
        BoundsError, "= x[row, column]", "tile", 0),
    "shared memory not set to zero": (
        histogram, counts, "own[t] = 0", "pass",
        UninitialisedError, "atomic.add(own, x[i]", "own", 0),
    "a shared element left out": (
        block_sum, sums, "partial[0] + partial[1]", "partial[0] + partial[1 - 1]",
        None, "", None, None),
}  # fmt: skip
