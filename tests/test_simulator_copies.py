"""Asynchronous copies in the simulator: when they happen, and who looks early."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy import float32, uint32

from minidsv3.gpu.intrinsics import (
    commit_copies,
    copy_async16,
    ldmatrix4,
    ldmatrix4_transposed,
    wait_copies,
)
from minidsv3.gpu.simulator import (
    AlignmentError,
    BoundsError,
    RaceError,
    SimulatorError,
    cuda,
    launch,
)
from tests.test_simulator import planted

ORDERS = ["rising", "falling", 0, 1]
POLICIES = ["issue", "wait"]
THREADS, TILE = 64, 256


def shifted(x, y):
    tile = cuda.shared.array(TILE, float32, alignment=16)
    i = 4 * cuda.threadIdx.x
    copy_async16(tile, i, x, i)
    commit_copies()
    wait_copies(0)
    cuda.syncthreads()
    for e in range(4):
        y[i + e] = tile[(i + e + 4) % TILE]


def pipelined(x, y, tiles):
    """Sums of neighbours, tile by tile, the next tile on its way meanwhile."""
    tile = cuda.shared.array(2 * TILE, float32, alignment=16)
    i = 4 * cuda.threadIdx.x
    copy_async16(tile, i, x, i)
    commit_copies()
    for n in range(tiles):
        here, there = n % 2 * TILE, (n + 1) % 2 * TILE
        if n + 1 < tiles:
            copy_async16(tile, there + i, x, (n + 1) * TILE + i)
        commit_copies()
        wait_copies(1)
        cuda.syncthreads()
        for e in range(4):
            right = tile[here + (i + e + 4) % TILE]
            y[n * TILE + i + e] = tile[here + i + e] + right
        cuda.syncthreads()


def numbers(n: int) -> np.ndarray:
    return np.random.default_rng(n).normal(size=n).astype(np.float32)


def run(kernel: Callable, *args, **how) -> None:
    launch(kernel, 1, THREADS, *args, **how)


@pytest.mark.parametrize("copies", POLICIES)
@pytest.mark.parametrize("order", ORDERS)
def test_a_copy_arrives(order, copies):
    x, y = numbers(TILE), np.full(TILE, np.nan, np.float32)
    run(shifted, x, y, order=order, copies=copies)
    np.testing.assert_array_equal(y, np.roll(x, -4))


@pytest.mark.parametrize("copies", POLICIES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tiles", [1, 2, 5])
def test_two_stages(order, copies, tiles):
    x = numbers(tiles * TILE)
    y = np.full_like(x, np.nan)
    run(pipelined, x, y, tiles, order=order, copies=copies)
    rows = x.reshape(tiles, TILE)
    expected = rows + np.roll(rows, -4, axis=1)
    np.testing.assert_array_equal(y.reshape(tiles, TILE), expected)


MISTAKES = {
    "no wait": (shifted, "    wait_copies(0)", "    pass", RaceError),
    "one group too many": (shifted, "wait_copies(0)", "wait_copies(1)", RaceError),
    "not committed": (shifted, "commit_copies()", "pass", RaceError),
    "no barrier": (shifted, "cuda.syncthreads()", "pass", RaceError),
    "pipeline waits for too few": (
        pipelined, "wait_copies(1)", "wait_copies(2)", RaceError
    ),
    "pipeline without the first barrier": (
        pipelined, "(1)\n        cuda.syncthreads()", "(1)\n        pass", RaceError
    ),
    "pipeline without the last barrier": (
        pipelined, "right\n        cuda.syncthreads()", "right\n        pass", RaceError
    ),
    "pipeline into the tile in use": (
        pipelined, "there + i, x", "here + i, x", RaceError
    ),
}  # fmt: skip


@pytest.mark.parametrize("copies", POLICIES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake, order, copies):
    kernel, old, new, error = MISTAKES[mistake]
    wrong = planted(kernel, old, new)
    x = numbers(3 * TILE)
    more = (3,) if kernel is pipelined else ()
    with pytest.raises(error):
        run(wrong, x, np.zeros_like(x), *more, order=order, copies=copies)


@pytest.mark.parametrize("copies", POLICIES)
def test_looking_early_is_named(copies):
    wrong = planted(shifted, "    wait_copies(0)", "    pass")
    x = numbers(TILE)
    with pytest.raises(RaceError) as caught:
        run(wrong, x, np.zeros_like(x), copies=copies)
    said = str(caught.value)
    assert "reads tile[4], which a copy that thread 1 began is still writing" in said
    assert "wait_copies()" in said
    assert caught.value.thread == (0, 0, 0) and caught.value.others == ((1, 0, 0),)


def one_copy(x, tile_at, source_at):
    tile = cuda.shared.array(TILE, float32, alignment=16)
    copy_async16(tile, tile_at, x, source_at)
    commit_copies()
    wait_copies(0)


@pytest.mark.parametrize(
    ("tile_at", "source_at", "error"),
    [
        (0, 2, AlignmentError),
        (1, 0, AlignmentError),
        (TILE, 0, BoundsError),
        (0, TILE, BoundsError),
        (-4, 0, BoundsError),
    ],
)
def test_both_ends_are_checked(tile_at, source_at, error):
    with pytest.raises(error):
        launch(one_copy, 1, 1, numbers(TILE), tile_at, source_at)


def unpromised(x, y):
    tile = cuda.shared.array(TILE, float32)
    tile[0] = x[0]
    copy_async16(tile, 4, x, 0)


def dynamic(x, y):
    tile = cuda.shared.array(0, float32, alignment=16)
    copy_async16(tile, 4, x, 4)
    commit_copies()
    wait_copies(0)
    y[0] = tile[5]


def test_shared_memory_must_be_asked_for_with_its_alignment():
    """Numba promises an array no more than its dtype's size."""
    x, y = numbers(8), np.zeros(1, np.float32)
    with pytest.raises(AlignmentError, match="alignment=16") as caught:
        launch(unpromised, 1, 1, x, y)
    assert "begins at a multiple of 4" in str(caught.value)
    launch(dynamic, 1, 1, x, y, dynamic_shared=64)
    assert y[0] == x[5]
    bare = planted(dynamic, ", alignment=16", "")
    with pytest.raises(AlignmentError):
        launch(bare, 1, 1, x, y, dynamic_shared=64)


@pytest.mark.parametrize("alignment", [0, -16, 4, 24, 16.0, "16"])
def test_an_alignment_is_a_power_of_two(alignment):
    def kernel(alignment):
        cuda.shared.array(4, float32, alignment=alignment)

    with pytest.raises(SimulatorError, match="power of two"):
        launch(kernel, 1, 1, alignment)


def test_only_from_global_to_shared_memory_of_one_dtype():
    def backwards(x):
        tile = cuda.shared.array(TILE, float32, alignment=16)
        copy_async16(x, 0, tile, 0)

    def mixed(x):
        tile = cuda.shared.array(TILE, uint32, alignment=16)
        copy_async16(tile, 0, x, 0)

    for kernel in (backwards, mixed):
        with pytest.raises(SimulatorError, match="goes from global to shared"):
            launch(kernel, 1, 1, numbers(TILE))


def test_refusals():
    with pytest.raises(SimulatorError, match='"issue" or "wait"'):
        launch(one_copy, 1, 1, numbers(TILE), 0, 0, copies="later")

    def negative(x):
        wait_copies(-1)

    with pytest.raises(SimulatorError, match="0 or more"):
        launch(negative, 1, 1, numbers(4))


def late_source(x, y):
    tile = cuda.shared.array(4, float32, alignment=16)
    if cuda.threadIdx.x == 0:
        copy_async16(tile, 0, x, 0)
        commit_copies()
    cuda.syncthreads()
    if cuda.threadIdx.x == 1:
        x[0] = float32(7)
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        wait_copies(0)
        y[0] = tile[0]


def test_the_policies_differ_where_the_source_changes_meanwhile():
    """What a kernel may not do, and how one sees that it did."""
    seen = {}
    for copies in POLICIES:
        x, y = np.arange(4, dtype=np.float32), np.zeros(1, np.float32)
        run(late_source, x, y, copies=copies)
        seen[copies] = float(y[0])
    assert seen == {"issue": 0.0, "wait": 7.0}


def test_a_copy_is_counted_once_where_it_begins():
    x = numbers(TILE)
    stats = launch(shifted, 1, THREADS, x, np.zeros_like(x), count=True)
    (write,) = [a for a in stats.accesses if (a.array, a.kind) == ("tile", "write")]
    assert write.text.startswith("copy_async16") and write.bytes == 4 * TILE
    (read,) = [a for a in stats.accesses if (a.array, a.kind) == ("x", "read")]
    assert read.sectors == 4 * TILE // 32
    assert stats.shared_writes == THREADS


def fragments(words, plain, transposed):
    tile = cuda.shared.array(128, uint32, alignment=16)
    lane = cuda.threadIdx.x
    for k in range(4):
        tile[4 * lane + k] = words[4 * lane + k]
    cuda.syncthreads()
    straight, turned = ldmatrix4(tile, 4 * lane), ldmatrix4_transposed(tile, 4 * lane)
    for m in range(4):
        plain[4 * lane + m] = straight[m]
        transposed[4 * lane + m] = turned[m]


def test_ldmatrix_from_shared_memory():
    """Each lane's words, element by element as the PTX ISA places them."""
    halves = np.arange(256, dtype=np.uint16)  # matrix m, row r, column c: 64m + 8r + c
    plain, transposed = np.zeros(128, np.uint32), np.zeros(128, np.uint32)
    launch(fragments, 1, 32, halves.view(np.uint32), plain, transposed)
    for lane in range(32):
        for m in range(4):
            row, column = lane // 4, 2 * (lane % 4)
            at = 64 * m + 8 * row + column
            assert plain[4 * lane + m] == at | (at + 1) << 16
            at = 64 * m + 8 * column + row
            assert transposed[4 * lane + m] == at | (at + 8) << 16
