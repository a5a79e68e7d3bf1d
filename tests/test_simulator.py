"""The CUDA simulator: right kernels come out right, and each planted bug is named."""

import inspect
import math
import pickle
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from minidsv3.gpu import reductions
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


def sums(kernel: Callable, **how) -> None:
    launch(kernel, 1, 64, normal(64), np.zeros(1, np.float32), 64, **how)


def adds(kernel: Callable, **how) -> None:
    launch(kernel, 2, 32, normal(50), normal(50), np.zeros(50, np.float32), 50, **how)


def windows(kernel: Callable, **how) -> None:
    launch(kernel, 1, 64, normal(50), np.zeros(50, np.float32), 50, **how)


def transposes(kernel: Callable, **how) -> None:
    x, y = normal(16, 12), np.zeros((12, 16), np.float32)
    launch(kernel, (2, 2), (8, 8), x, y, 16, 12, **how)


def counts(kernel: Callable, **how) -> None:
    launch(kernel, 2, 32, np.arange(100) % 10, np.zeros(10, np.int32), 100, **how)


# what is planted where: the error, and in rising order its line, thread and element
SYNC = "    cuda.syncthreads()\n"
SKIP = "    pass\n"
BUGS = {
    "no barrier after loading": (
        tree_sum, sums, SYNC + "    s = 32", SKIP + "    s = 32",
        RaceError, "tile[t] += tile", (0, 0, 0), "tile[32]"),
    "no barrier in the loop": (
        tree_sum, sums, "cuda.syncthreads()  # in the loop", "pass",
        RaceError, "tile[t] += tile", (1, 0, 0), "tile[1]"),
    "no barrier between warps": (
        block_sum, sums, SYNC, SKIP, RaceError, "partial[1]", (0, 0, 0), "partial[1]"),
    "no barrier before a tile is read": (
        transpose, transposes, SYNC, SKIP,
        RaceError, "= tile[tx, ty]", (0, 1, 0), "tile[0, 1]"),
    "no barrier before counting": (
        histogram, counts, SYNC + "    i =", SKIP + "    i =",
        RaceError, "atomic.add(own, x[i]", (6, 0, 0), "own[0]"),
    "no barrier before a merge": (
        histogram, counts, "cuda.syncthreads()  # before", "pass  #",
        RaceError, "atomic.add(counts", (4, 0, 0), "own[4]"),
    "a barrier inside an if": (
        tree_sum, sums, "        cuda.syncthreads()  # in",
        "            cuda.syncthreads()  # in",
        DivergenceError, "in the loop", (0, 0, 0), None),
    "a return before a barrier": (
        tree_sum, sums, "    if t == 0:\n        out[",
        "    if t: return\n    cuda.syncthreads(); out[",
        DivergenceError, "out[cuda", (0, 0, 0), None),
    "one too far": (
        window_sum, windows, "n - 1)]", "n)]",
        BoundsError, "near[k] = x", (49, 0, 0), "x[50]"),
    "one before the first": (
        window_sum, windows, "max(i + k - 1, 0)", "i + k - 1",
        BoundsError, "near[k] = x", (0, 0, 0), "x[-1]"),
    "no guard": (
        add, adds, "i < n", "True", BoundsError, "out[i] =", (18, 0, 0), "x[50]"),
    "axes exchanged": (
        transpose, transposes, "y[column, row]", "y[row, column]",
        BoundsError, "= tile[tx, ty]", (4, 0, 0), "y[12, 0]"),
    "an axis forgotten": (
        transpose, transposes, "tile[ty, tx] =", "tile[ty] =",
        BoundsError, "= x[row, column]", (0, 0, 0), "tile[0]"),
    "an axis too many": (
        transpose, transposes, "= x[row, column]", "= x[row, column, 0]",
        BoundsError, "= x[row, column]", (0, 0, 0), "x[0, 0, 0]"),
    "shared memory not set": (
        histogram, counts, "own[t] = 0", "pass",
        UninitialisedError, "atomic.add(own, x[i]", (0, 0, 0), "own[0]"),
    "a column of a tile not set": (
        transpose, transposes, "= tile[tx, ty]", "= tile[tx, ty + 1]",
        UninitialisedError, "= tile[tx, ty", (0, 7, 0), "tile[0, 8]"),
    "a local element not set": (
        window_sum, windows, "near[k] =", "near[0] =",
        UninitialisedError, "y[i] =", (0, 0, 0), "near[1]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_named(name: str) -> None:
    kernel, run, old, new, kind, text, thread, element = BUGS[name]
    broken = planted(kernel, old, new)
    for order in ORDERS:
        with pytest.raises(SimulatorError) as caught:
            run(broken, order=order)
        assert type(caught.value) is kind
    with pytest.raises(kind) as caught:
        run(broken)
    error, line = caught.value, line_of(kernel, text)
    assert (error.kernel, error.line, error.thread) == (kernel.__name__, line, thread)
    assert error.file == __file__ and text in error.text
    assert f"kernel {kernel.__name__}, line {line}, block " in str(error)
    assert error.text in str(error)
    if element:
        assert element in str(error)
        assert element == f"{error.array}[{error.index}]".translate(NO_BRACKETS)


NO_BRACKETS = str.maketrans("", "", "()")


# --- races --------------------------------------------------------------------------


def neighbours(x):
    i = cuda.grid(1)
    x[i] = x[(i + 1) % x.size]


def same_value(flag):
    flag[0] = 1


def counted(total):
    total[0] += 1


def alias(x, y):
    i = cuda.grid(1)
    if i + 1 < x.size:
        y[i] = x[i + 1]


def late_plain_read(total):
    cuda.atomic.add(total, 0, 1)
    if cuda.threadIdx.x == 0:
        total[1] = total[0]


def set_and_counted(total):
    if cuda.grid(1) == 3:
        total[0] = 0
    else:
        cuda.atomic.add(total, 0, 1)


RACES = [
    (neighbours, 8),
    (same_value, 1),
    (counted, 1),
    (late_plain_read, 2),
    (set_and_counted, 1),
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("grid", "block"), [(1, 8), (8, 1), (2, 4)])
@pytest.mark.parametrize(("kernel", "size"), RACES)
def test_races_in_global_memory(
    kernel: Callable, size: int, grid: int, block: int, order: str | int
) -> None:
    with pytest.raises(RaceError):
        launch(kernel, grid, block, np.zeros(size), order=order)


def test_a_race_says_who_and_where() -> None:
    with pytest.raises(RaceError) as caught:
        launch(neighbours, 2, 2, np.zeros(4))
    error, line = caught.value, line_of(neighbours, "x[i] =")
    assert (error.array, error.index) == ("x", 1)
    assert (error.block, error.thread) == ((0, 0, 0), (1, 0, 0))
    assert (error.other_block, error.others) == ((0, 0, 0), ((0, 0, 0),))
    assert error.line == error.other_line == line
    message = f"line {line}, block 0, thread 1: writes x[1], which thread 0 read in"
    assert message in str(error) and "cuda.syncthreads()" in str(error)


def test_a_race_between_blocks_says_that_no_barrier_helps() -> None:
    with pytest.raises(
        RaceError, match=r"block 1, thread 0: writes flag\[0\]"
    ) as caught:
        launch(same_value, 2, 1, np.zeros(1))
    assert "thread 0 of block 0 wrote" in str(caught.value)
    assert "Blocks run in any order" in str(caught.value)


def test_two_names_of_one_array_race() -> None:
    x = np.zeros(8)
    launch(alias, 1, 8, x.copy(), x)
    with pytest.raises(RaceError):
        launch(alias, 1, 8, x, x)
    with pytest.raises(RaceError):
        launch(alias, 1, 8, x[2:], x)


def many_readers_one_writer(x, y, writer):
    i = cuda.grid(1)
    y[i] = x[0]
    if i == writer:
        x[0] = 1


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("grid", "block"), [(1, 3), (1, 70), (3, 2), (2, 40)])
def test_a_writer_races_with_any_of_many_readers(
    grid: int, block: int, order: str | int
) -> None:
    threads = grid * block
    for writer in {0, 1, threads // 2, threads - 1}:
        args = np.zeros(1), np.zeros(threads), writer
        with pytest.raises(RaceError):
            launch(many_readers_one_writer, grid, block, *args, order=order)


def reads_in_two_epochs(x, writer):
    x[0]
    cuda.syncthreads()
    x[0]
    cuda.syncthreads()
    if cuda.grid(1) == writer:
        x[0] = 1


def reads_on_after_a_barrier(x, reader):
    t = cuda.threadIdx.x
    if t < 32:
        x[0]
    cuda.syncthreads()
    if t == reader:
        x[0]
    elif t == 40 - reader:
        x[0] += 1


@pytest.mark.parametrize("order", ORDERS)
def test_old_readers_hide_no_race(order: str | int) -> None:
    for writer in (0, 2, 3):
        with pytest.raises(RaceError):
            launch(reads_in_two_epochs, 2, 2, np.zeros(1), writer, order=order)
    launch(reads_in_two_epochs, 1, 70, np.zeros(1), 0, order=order)
    for reader in (0, 40):
        with pytest.raises(RaceError):
            launch(reads_on_after_a_barrier, 1, 70, np.zeros(1), reader, order=order)


def passed_on(x, hops, mask):
    """Each hop, a lane hands its neighbour what it has, and only those two meet."""
    t = cuda.threadIdx.x
    for hop in range(hops):
        if t == hop:
            x[hop + 1] = x[hop] + 1
        if (mask or 3 << hop) >> t & 1:
            cuda.syncwarp(mask or 3 << hop)


@pytest.mark.parametrize("order", ORDERS)
def test_lanes_that_meet_are_ordered_also_through_a_third(order: str | int) -> None:
    x = np.zeros(6)
    launch(passed_on, 1, 32, x, 5, 0, order=order)
    assert x[5] == 5
    with pytest.raises(RaceError, match="syncwarp"):
        launch(passed_on, 1, 32, np.zeros(6), 5, 0b111100, order=order)


def across_warps(x):
    t = cuda.threadIdx.x
    x[t] = t
    cuda.syncwarp()
    x[t ^ 32] += 1


def neighbour_after(meet):
    """Each lane reads what its neighbour wrote, after the lanes have met so."""

    def kernel(out):
        t = cuda.threadIdx.x
        tile = cuda.shared.array(32, np.int32)
        tile[t] = t
        meet()
        out[t] = tile[(t + 1) % 32]

    return kernel


VALUES_ONLY = {
    "shuffle": lambda: cuda.shfl_xor_sync(0xFFFFFFFF, 1, 1),
    "ballot": lambda: cuda.ballot_sync(0xFFFFFFFF, True),
    "any": lambda: cuda.any_sync(0xFFFFFFFF, True),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("meet", VALUES_ONLY.values(), ids=VALUES_ONLY)
def test_only_syncwarp_orders_memory(meet: Callable, order: str | int) -> None:
    """CUDA's guide: shuffles and votes imply no memory barrier, syncwarp does."""
    out = np.zeros(32, np.int32)
    with pytest.raises(RaceError):
        launch(neighbour_after(meet), 1, 32, out, order=order)
    launch(neighbour_after(cuda.syncwarp), 1, 32, out, order=order)
    assert out.tolist() == [*range(1, 32), 0]


def test_memory_begins_poisoned() -> None:
    """Whatever reads it without asking finds NaN, not a zero that happens to be."""
    found = []

    def kernel():
        found.append(cuda.shared.array(2, np.float32).data.copy())
        found.append(cuda.local.array(2, np.float64).data.copy())

    launch(kernel, 1, 1)
    assert all(np.isnan(array).all() for array in found)


@pytest.mark.parametrize("order", ORDERS)
def test_syncwarp_orders_no_two_warps(order: str | int) -> None:
    with pytest.raises(RaceError):
        launch(across_warps, 1, 64, np.zeros(64), order=order)


# Random programs against an oracle that forgets nothing. A program is a list of phases:
# what threads touch, {(block, thread): [(kind, element)]}, and whom they meet after it,
# {thread: mask} in its warp, or None for all of the block.

BLOCK = 36  # a whole warp and a small one


def follows(x, program):
    t = cuda.threadIdx.x
    for touched, masks in program:
        for kind, element in touched.get((cuda.blockIdx.x, t), ()):
            if kind == "read":
                x[element]
            elif kind == "write":
                x[element] = 0
            else:
                cuda.atomic.add(x, element, 1)
        if masks is None:
            cuda.syncthreads()
        elif t in masks:
            cuda.syncwarp(masks[t])


def random_program(seed: int, blocks: int) -> list:
    r = np.random.default_rng(seed)
    odds = [0.7, 0.2, 0.1] if blocks == 1 else [0.92, 0.06, 0.02]
    actors = [*r.choice(32, size=4, replace=False).tolist(), 34, 35]
    program = []
    for _ in range(4):
        touched, masks = {}, None
        for _ in range(r.integers(5)):
            who = int(r.integers(blocks)), int(r.choice(actors))
            kind = r.choice(["read", "write", "atomic"], p=odds)
            touched.setdefault(who, []).append((kind, int(r.integers(2))))
        if r.random() < 0.6:
            team = r.integers(3, size=BLOCK)  # team 0 meets nobody
            masks = {
                t: sum(1 << u % 32 for u in range(BLOCK) if meet(t, u, team))
                for t in range(BLOCK)
                if team[t]
            }
        program.append((touched, masks))
    return program


def meet(t: int, u: int, team: np.ndarray) -> bool:
    return t // 32 == u // 32 and team[t] == team[u]


def has_race(program: list) -> bool:
    """Each thread knows a set of (thread, phase): what happened before its present."""
    knows, done = {}, []
    for phase, (touched, masks) in enumerate(program):
        for who, accesses in touched.items():
            for kind, element in accesses:
                for other, earlier, other_kind, other_element in done:
                    agree = kind == other_kind != "write" or other == who
                    seen = (other, earlier) in knows.get(who, ())
                    if element == other_element and not agree and not seen:
                        return True
                done.append((who, phase, kind, element))
        for b in (0, 1):
            together = {}
            for t in range(BLOCK):
                if masks is None or t in masks:
                    key = masks and (t // 32, masks[t])
                    together.setdefault(key, []).append((b, t))
            for group in together.values():
                shared = {(who, p) for who in group for p in range(phase + 1)}
                shared = shared.union(*(knows.get(who, ()) for who in group))
                knows |= dict.fromkeys(group, shared)
    return False


@pytest.mark.parametrize(("blocks", "programs"), [(1, 150), (2, 100)])
def test_random_programs_race_as_an_oracle_says(blocks: int, programs: int) -> None:
    verdicts = []
    for seed in range(programs):
        program = random_program(seed, blocks)
        verdicts.append(has_race(program))
        for order in ("rising", "falling"):
            try:
                launch(follows, blocks, BLOCK, np.zeros(2), program, order=order)
                found = False
            except RaceError:
                found = True
            assert found == verdicts[-1], f"{seed}, {order}: {program}"
    assert 20 < sum(verdicts) < programs - 20


# --- barriers and warps -------------------------------------------------------------


def two_barriers(out):
    if cuda.threadIdx.x < 3:
        cuda.syncthreads()  # one
    else:
        cuda.syncthreads()  # another


def early_return(out):
    t = cuda.threadIdx.x
    if t >= out.size:
        return
    cuda.syncthreads()
    out[t] = 1


def barrier_against_shuffle(out):
    if cuda.threadIdx.x % 2:
        cuda.syncthreads()
    else:
        cuda.syncwarp()


def lanes_left_behind(out):
    if cuda.laneid < 8:
        cuda.shfl_sync(FULL, 1, 0)


def two_shuffles(out):
    t = cuda.laneid
    v = t
    if t < 16:
        v = cuda.shfl_down_sync(FULL, v, 8)  # half of them
    v = cuda.shfl_down_sync(FULL, v, 4)


def not_in_its_own_mask(out):
    cuda.any_sync(0b111, True)


def inactive_source(out):
    if cuda.laneid < 16:
        cuda.shfl_down_sync(0xFFFF, 1.0, 8)


def past_the_block(out):
    cuda.shfl_xor_sync(FULL, 1.0, 16)


DIVERGENT = [
    (two_barriers, 8, "# one", 3, ["threads 0, 1, 2 wait", "3, 4, 5 and 2 more wait"]),
    (early_return, 8, "cuda.sync", 4, ["0, 1, 2 and 1 more", "and 1 more have finish"]),
    (barrier_against_shuffle, 8, "syncwarp", 1, ["threads 1, 3, 5 and 1 more wait at"]),
    (lanes_left_behind, 32, "shfl_sync", 8, ["8, 9, 10 and 21 more have", "mask prom"]),
    (two_shuffles, 32, "half of them", 16, ["16, 17, 18 and 13 more wait at"]),
    (not_in_its_own_mask, 4, "any_sync", None, ["thread 3: lane 3", "0x00000007"]),
    (
        inactive_source,
        32,
        "shfl_down",
        16,
        ["lane 8 reads", "from lane 16", "0x0000ffff"],
    ),
    (past_the_block, 24, "shfl_xor", None, ["lane 8 reads", "24 threads"]),
]


@pytest.mark.parametrize(("kernel", "block", "text", "other", "said"), DIVERGENT)
def test_divergence_says_who_is_where(
    kernel: Callable, block: int, text: str, other: int | None, said: list
) -> None:
    for order in ORDERS:
        with pytest.raises(DivergenceError):
            launch(kernel, 1, block, np.zeros(4), order=order)
    with pytest.raises(DivergenceError) as caught:
        launch(kernel, 1, block, np.zeros(4))
    error = caught.value
    assert error.line == line_of(kernel, text) and text in error.text
    assert [piece for piece in said if piece not in str(error)] == []
    assert error.others[:1] == (((other, 0, 0),) if other is not None else ())


def test_divergence_names_the_other_line() -> None:
    with pytest.raises(DivergenceError) as caught:
        launch(two_barriers, 1, 8, np.zeros(4))
    assert caught.value.other_line == line_of(two_barriers, "# another")
    with pytest.raises(DivergenceError) as caught:
        launch(early_return, 1, 8, np.zeros(4))
    assert caught.value.other_line is None


def shuffles(out):
    t = cuda.laneid
    v = 10 + t
    out[0, t] = cuda.shfl_sync(FULL, v, 3)
    out[1, t] = cuda.shfl_up_sync(FULL, v, 2)
    out[2, t] = cuda.shfl_down_sync(FULL, v, 2)
    out[3, t] = cuda.shfl_xor_sync(FULL, v, 5)
    out[4, t] = cuda.ballot_sync(FULL, t % 3 == 0)
    out[5, t] = cuda.any_sync(FULL, t == 7)
    out[6, t] = cuda.all_sync(FULL, t == 7)


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles_and_votes(order: str | int) -> None:
    out, t = np.zeros((7, 32), np.int64), np.arange(32)
    stats = launch(shuffles, 1, 32, out, order=order)
    expected = [np.full(32, 13), 10 + np.where(t < 2, t, t - 2)]
    expected += [10 + np.where(t > 29, t, t + 2), 10 + (t ^ 5)]
    expected += [np.full(32, sum(1 << i for i in range(0, 32, 3)))]
    np.testing.assert_array_equal(out, [*expected, np.ones(32), np.zeros(32)])
    assert stats.warp_operations == 7


def halves_apart(out):
    t = cuda.laneid
    if t < 16:
        out[t] = cuda.shfl_xor_sync(0x0000FFFF, t, 1)
    else:
        out[t] = cuda.shfl_xor_sync(0xFFFF0000, t, 2)


@pytest.mark.parametrize("order", ORDERS)
def test_halves_of_a_warp_go_different_ways(order: str | int) -> None:
    out, t = np.zeros(32), np.arange(32)
    launch(halves_apart, 1, 32, out, order=order)
    np.testing.assert_array_equal(out, t ^ np.where(t < 16, 1, 2))


# --- order --------------------------------------------------------------------------


def who_comes_first(out):
    out[cuda.atomic.add(out, 0, 1) + 1] = cuda.grid(1)


def ranks(order: str | int) -> list:
    out = np.zeros(13, np.int64)
    launch(who_comes_first, 3, 4, out, order=order)
    return out[1:].tolist()


def test_order_shows_kernels_that_are_right_by_luck() -> None:
    assert ranks("rising") == [*range(12)]
    assert ranks("falling") == [*range(11, -1, -1)]
    assert sorted(ranks(7)) == [*range(12)] and ranks(7) == ranks(7) != ranks(8)


# --- arrays -------------------------------------------------------------------------


def stores(x):
    x[0] = 3.9
    x[1] = -1
    x[2] = 2**40 + 5


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("int32", [3, -1, 5]), ("uint8", [3, 255, 5]), ("uint32", [3, 2**32 - 1, 5]),
     ("int64", [3, -1, 2**40 + 5]), ("float16", [np.float16(3.9), -1, np.inf])],
)  # fmt: skip
def test_stores_convert_to_the_dtype(dtype: str, stored: list) -> None:
    x = np.zeros(3, dtype)
    launch(stores, 1, 1, x)
    assert x.tolist() == stored


def describes(x, out):
    row = x[1]
    out[:] = 7
    out[0] = row.shape[0] + x.ndim + len(x) + x.size
    out[1] = row[2] + x[1, 0:2][1] + x[..., 3][0]
    out[2] = sum(v for v in row)
    row[3] = math.nan
    assert type(row[0]) is np.float32 and row.dtype == np.float32
    x[0, 1:3] = x[1, 0:2]


def test_views_and_descriptions() -> None:
    x, out = np.arange(8, dtype=np.float32).reshape(2, 4), np.zeros(4)
    launch(describes, 1, 1, x, out)
    assert out.tolist() == [4 + 2 + 2 + 8, 6 + 5 + 3, 4 + 5 + 6 + 7, 7]
    np.testing.assert_array_equal(x, [[0, 4, 5, 3], [4, 5, 6, math.nan]])


def row_too_short(x):
    row = x[cuda.threadIdx.x, 1:3]
    row[2] = 0


def row_too_far(x):
    row = x[cuda.threadIdx.x + 1]
    row[0] = 0


def last_row(x):
    x[-1][0] = 0


def slice_too_long(x):
    x[0, 2:5] = 0


def row_races(x):
    row = x[0]
    row[1] = cuda.threadIdx.x


def half(x):
    x[0, 3 / 2] = 0


@pytest.mark.parametrize(
    ("kernel", "kind", "said"),
    [
        (row_too_short, BoundsError, "x[0, 1:3][2] is out of bounds"),
        (row_too_far, BoundsError, "thread 1: x[2] is out of bounds"),
        (last_row, BoundsError, "x[-1] is out of bounds"),
        (slice_too_long, BoundsError, "x[0, 2:5] is out of bounds"),
        (row_races, RaceError, "thread 1: writes x[0][1], which thread 0 wrote"),
        (half, SimulatorError, "x is indexed by 1.5, which is not an integer"),
    ],
)
def test_views_stay_checked(kernel: Callable, kind: type, said: str) -> None:
    with pytest.raises(kind) as caught:
        launch(kernel, 1, 2, np.zeros((2, 4)))
    assert said in str(caught.value)


def dynamic(out):
    words = cuda.shared.array(0, np.float32)
    bytes_ = cuda.shared.array(0, np.uint8)
    t = cuda.threadIdx.x
    words[t] = t
    bytes_[4 * cuda.blockDim.x + t] = t
    cuda.syncthreads()
    out[t] = words[(t + 1) % 4] + bytes_[4 * cuda.blockDim.x + (t + 2) % 4]


def test_dynamic_shared_memory() -> None:
    out = np.zeros(4)
    launch(dynamic, 1, 4, out, dynamic_shared=20)
    assert out.tolist() == [3, 5, 3, 1]
    with pytest.raises(BoundsError, match=r"bytes_\[19\].*shape \(19,\)"):
        launch(dynamic, 1, 4, out, dynamic_shared=19)
    with pytest.raises(SimulatorError, match="dynamic_shared="):
        launch(dynamic, 1, 4, out)


def every_atomic(x, old):
    for i in range(10):
        x[i] = 6
    atomic = cuda.atomic
    old[0] = atomic.add(x, 0, 2)
    atomic.sub(x, 1, 2)
    atomic.max(x, 2, 9)
    atomic.min(x, 3, 9)
    old[1] = atomic.exch(x, 4, 1)
    atomic.and_(x, 5, 3)
    atomic.xor(x, 6, 3)
    atomic.inc(x, 7, 6)
    atomic.dec(x, 8, 6)
    old[2] = atomic.cas(x, 9, 6, 11)
    old[3] = atomic.cas(x, 9, 6, 12)
    old[4] = atomic.compare_and_swap(x[9:10], 11, 13)
    atomic.add(x, 10, 2**32 + 1)


def test_atomics() -> None:
    x, old = np.full(11, 2**31 - 1, np.int32), np.zeros(5)
    stats = launch(every_atomic, 1, 1, x, old)
    assert x.tolist() == [8, 4, 9, 6, 1, 2, 5, 0, 5, 13, -(2**31)]
    assert old.tolist() == [6, 6, 6, 11, 11] and stats.atomics == 13


def bits(out):
    out[0], out[1], out[2] = cuda.popc(0b1011), cuda.ffs(0b1000), cuda.clz(1)
    out[3], out[4] = cuda.clz(np.int64(1)), cuda.popc(np.int64(-1))
    out[5], out[6] = cuda.fma(2, 3, 4), cuda.selp(True, 8, 9)


def test_integers_bit_by_bit() -> None:
    out = np.zeros(7, np.int64)
    launch(bits, 1, 1, out)
    assert out.tolist() == [3, 4, 31, 63, 64, 10, 8]


def indices(out):
    x, y, z = cuda.grid(3)
    at = (z * cuda.gridsize(3)[1] + y) * cuda.gridsize(2)[0] + x
    out[at] = cuda.laneid + 100 * cuda.gridDim.y + 1000 * cuda.blockDim.z


def test_three_dimensions() -> None:
    out = np.full(2 * 1 * 3 * 3 * 2 * 2, -1)
    stats = launch(indices, (2, 1, 3), (3, 2, 2), out)
    assert set(out.tolist()) == {2100 + lane for lane in range(12)}
    assert (stats.blocks, stats.threads) == (6, 72)


# --- stats, state, wrong use --------------------------------------------------------


def test_stats_count_what_was_done() -> None:
    x, out = normal(100), np.zeros(2, np.float32)
    stats = launch(tree_sum, 2, 64, x, out, 100)
    assert (stats.blocks, stats.threads, stats.barriers) == (2, 128, 2 * 7)
    assert (stats.global_reads, stats.global_writes) == (100, 2)
    additions = 32 + 16 + 8 + 4 + 2 + 1
    assert stats.shared_writes == 2 * (64 + additions)
    assert stats.shared_reads == 2 * (2 * additions + 1)
    assert (stats.warp_operations, stats.atomics) == (0, 0)
    stats = launch(block_sum, 2, 64, x, out, 100)
    assert (stats.warp_operations, stats.barriers) == (2 * 2 * 5, 2)


def divides(x):
    i = cuda.grid(1)
    cuda.syncthreads()
    x[i] = 1 // (5 - i)


def misspelt(x):
    x[0] = cuda.treadIdx.x  # typo


@pytest.mark.parametrize(
    ("kernel", "kind", "said"),
    [
        (divides, ZeroDivisionError, "block 1, thread 1: x[i] = 1 // (5 - i)"),
        (misspelt, AttributeError, "block 0, thread 0: x[0] = cuda.treadIdx.x"),
    ],
)
def test_exceptions_of_python_come_with_a_note(
    kernel: Callable, kind: type, said: str
) -> None:
    with pytest.raises(kind) as caught:
        launch(kernel, 2, 4, np.zeros(8))
    (note,) = caught.value.__notes__
    line = line_of(kernel, said.split(": ")[1])
    assert note == f"in kernel {kernel.__name__}, line {line}, {note.split(', ', 2)[2]}"
    assert said in note


def leaves_with_a_bang(x, left):
    try:
        cuda.syncthreads()
        x[cuda.threadIdx.x + 1] = 0
        cuda.syncthreads()
    finally:
        left.append(1)
        if len(left) > 1:  # the others, which are made to leave
            cuda.syncthreads()


def test_a_failure_leaves_nothing_behind() -> None:
    left = []
    for _ in range(2):
        with pytest.raises(BoundsError):
            launch(leaves_with_a_bang, 1, 4, np.zeros(4), left)
        assert len(left) == 4  # every thread was left, none is still waiting
        left.clear()
        with pytest.raises(SimulatorError, match="while a kernel runs"):
            _ = cuda.threadIdx
        out = np.zeros(5, np.float32)
        launch(add, 1, 8, np.ones(5), np.ones(5), out, 5)
        assert out.tolist() == [2] * 5


def keeps_its_array(x, kept):
    kept.append(x)


def test_arrays_are_closed_when_the_kernel_is_over() -> None:
    kept = []
    launch(keeps_its_array, 1, 1, np.zeros(1), kept)
    with pytest.raises(SimulatorError, match="while a kernel runs"):
        kept[0][0]


def returns(x):
    return x.size


def launches(x):
    launch(returns, 1, 1, x)


def odd_shape(x):
    cuda.shared.array(cuda.threadIdx.x + 1, np.float32)


def no_dtype(x):
    cuda.local.array(3, "float33")


@pytest.mark.parametrize(
    ("kernel", "grid", "block", "args", "said"),
    [
        (same_value, 1, 1025, 1, "block is 1025: a block has at most 1024 threads"),
        (same_value, 1, (32, 33), 1, r"block is \(32, 33\): .* at most 1024"),
        (same_value, 1, (1, 1, 65), 1, r"block is \(1, 1, 65\): along z .* at most 64"),
        (same_value, (1, 65536), 1, 1, r"grid is \(1, 65536\): along y and z .* 65535"),
        (same_value, 0, 1, 1, "grid is 0: it must be a positive integer"),
        (same_value, 1, (4, 0), 1, r"block is \(4, 0\): it must be"),
        (same_value, (1, 1, 1, 1), 1, 1, "up to three"),
        (same_value, 1.5, 1, 1, "grid is 1.5: it must be"),
        (same_value, 1, 1, 0, r"same_value\(flag\) got 0 arguments: missing.*'flag'"),
        (same_value, 1, 1, 2, "got 2 arguments: too many"),
        (returns, 1, 1, 1, "kernel returns returns 1: nobody is there to take it"),
        (launches, 1, 1, 1, "a kernel cannot launch another"),
        (odd_shape, 1, 2, 1, r"asks here for \(2,\) of float32, .* \(1,\) of float32"),
        (no_dtype, 1, 1, 1, "an array of 'float33', which is no dtype"),
        ("add", 1, 1, 1, "a kernel is a plain function, not 'add'"),
    ],
)
def test_wrong_use(kernel, grid, block, args: int, said: str) -> None:
    with pytest.raises(SimulatorError, match=said):
        launch(kernel, grid, block, *[np.zeros(1)] * args)


@pytest.mark.parametrize("order", ["up", None, 1.5])
def test_wrong_order(order) -> None:
    with pytest.raises(
        SimulatorError, match='it must be "rising", "falling" or a seed'
    ):
        launch(same_value, 1, 1, np.zeros(1), order=order)


def test_errors_can_be_sent_to_another_process() -> None:
    with pytest.raises(BoundsError) as caught:
        adds(planted(add, "i < n", "True"))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value) and vars(copy) == vars(caught.value)


# --- names of arrays and of functions -----------------------------------------------


def nameless(x):
    x[0] = cuda.shared.array(3, np.float32)[1]


def outer_read(x, i):
    return x[i + 4]


def calls_a_function(x):
    x[0] = outer_read(x, 0)


def test_names_in_messages() -> None:
    with pytest.raises(UninitialisedError) as caught:
        launch(nameless, 1, 1, np.zeros(1))
    assert caught.value.array == f"shared array of line {line_of(nameless, 'x[0]')}"
    with pytest.raises(BoundsError) as caught:
        launch(calls_a_function, 1, 1, np.zeros(4))
    error, line = caught.value, line_of(outer_read, "return")
    assert (error.kernel, error.function) == ("calls_a_function", "outer_read")
    assert f"kernel calls_a_function, in outer_read, line {line}," in str(error)


def test_a_kernel_without_source() -> None:
    scope = {"cuda": cuda}
    exec("def hidden(x):\n    x[1] = 0", scope)
    with pytest.raises(BoundsError, match="kernel hidden, line 2") as caught:
        launch(scope["hidden"], 1, 1, np.zeros(1))
    assert caught.value.text is None


# --- kernels written for Numba ------------------------------------------------------


@pytest.fixture(scope="module")
def numba_cuda():
    return pytest.importorskip("numba.cuda")


def test_kernels_written_for_numba(numba_cuda, monkeypatch) -> None:
    from numba import float32

    monkeypatch.setitem(globals(), "cuda", numba_cuda)
    nc, double = numba_cuda, numba_cuda.jit(device=True)(outer_read)
    inner = numba_cuda.jit(lambda x, i: double(x, i) * float32(2.0))

    @numba_cuda.jit
    def kernel(x, out):
        tile = nc.shared.array(8, float32)
        t = nc.threadIdx.x
        tile[t] = inner(x, t)
        nc.syncthreads()
        out[t] = tile[(t + 1) % 8]

    x, out = np.arange(12, dtype=np.float32), np.zeros(8)
    launch(kernel, 1, 8, x, out)
    np.testing.assert_array_equal(out, 2 * np.roll(x[4:], -1))
    for plain in (tree_sum, block_sum):  # global names, in a device function too
        sums(plain)
        assert plain.__globals__["cuda"] is numba_cuda


def test_the_simulator_needs_no_heavy_package() -> None:
    loaded = loads(ROOT, "minidsv3.gpu.simulator")
    assert not loaded & {"numba", "torch", "greenlet"}


def test_greenlet_missing(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "greenlet", None)
    with pytest.raises(ImportError, match="pip install greenlet"):
        launch(same_value, 1, 1, np.zeros(1))


# --- a GPU's limits, and the host's threads -----------------------------------------


def test_shared_memory_is_that_of_an_h100():
    def kernel(out):
        first = cuda.shared.array(200 * 1024, np.uint8)
        second = cuda.shared.array(27 * 1024, np.uint8)
        first[0] = second[0] = 1
        out[0] = first[0] + second[0]

    out = np.zeros(1)
    launch(kernel, 1, 1, out)
    assert out[0] == 2
    larger = planted(kernel, "27 * 1024", "27 * 1024 + 1")
    with pytest.raises(SimulatorError, match="232449 bytes of shared memory"):
        launch(larger, 1, 1, out)


@pytest.mark.parametrize("shuffle", ["shfl_xor_sync", "shfl_up_sync", "shfl_down_sync"])
@pytest.mark.parametrize("distance", [-1, 32, 33])
def test_a_shuffle_reaches_within_its_warp(shuffle, distance):
    """A GPU would take the lowest five bits: 33 would mean 1."""

    def kernel(out):
        out[cuda.threadIdx.x] = getattr(cuda, shuffle)(FULL, 1, distance)

    with pytest.raises(SimulatorError, match=f"distance of {distance}"):
        launch(kernel, 1, 32, np.zeros(32))


def test_a_compared_value_is_of_the_elements_dtype():
    """Unsigned, -1 is 4294967295, and that is what the element holds."""

    def kernel(lock):
        cuda.atomic.cas(lock, 0, -1, 7)

    lock = np.array([2**32 - 1], np.uint32)
    launch(kernel, 1, 1, lock)
    assert lock[0] == 7


def test_host_threads_launch_one_after_another():
    """They share one simulator; none is told that it is inside another's kernel."""

    def kernel(x):
        for _ in range(20):
            cuda.syncthreads()
            x[cuda.threadIdx.x] += 1

    arrays = [np.zeros(32) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda x: [launch(kernel, 1, 32, x) for _ in range(5)], arrays))
    assert all((x == 100).all() for x in arrays)


def test_a_reduction_is_seen_line_by_line():
    """It lies in the simulator's folder, but is part of the kernel that calls it."""

    block_total = reductions.block_sum

    def kernel(x):
        scratch = cuda.shared.array(1, np.float32)
        x[0] = block_total(x[0], scratch)

    with pytest.raises(BoundsError) as caught:
        launch(kernel, 1, 64, np.zeros(1, np.float32))
    assert caught.value.function == "block_sum" and "scratch[" in caught.value.text
