"""What the simulator counts of a warp's accesses, its wide accesses, and its traces."""

import json
import math
import warnings
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from minidsv3.gpu.simulator import (
    Access,
    AlignmentError,
    BoundsError,
    RaceError,
    SimulatorError,
    UninitialisedError,
    cuda,
    launch,
)
from tests.test_simulator import block_sum, line_of, normal, planted, transpose

ORDERS = ["rising", "falling", 3]
FULL = 0xFFFFFFFF


def counted(kernel: Callable, block, *args, grid=1, **how) -> tuple[Access, ...]:
    return launch(kernel, grid, block, *args, count=True, **how).accesses


def only(accesses: tuple, expression: str) -> Access:
    (found,) = [a for a in accesses if a.expression == expression]
    return found


# --- global memory: sectors ---------------------------------------------------------


def reads_at(x, where):
    t = cuda.threadIdx.x
    if where[t] is not None:
        x[where[t]]


LANES = range(32)
SECTORS = {
    "coalesced": ("float32", [*LANES], 4),
    "stride 2": ("float32", [2 * i for i in LANES], 8),
    "stride 32": ("float32", [32 * i for i in LANES], 32),
    "misaligned by 4 bytes": ("float32", [i + 1 for i in LANES], 5),
    "one element": ("float32", [77] * 32, 1),
    "permuted": ("float32", [i ^ 21 for i in LANES], 4),
    "float64": ("float64", [*LANES], 8),
    "bytes": ("uint8", [*LANES], 1),
    "12 bytes over a border": ([("xyz", "f4", 3)], [2] + [None] * 31, 2),
    "half of the lanes": ("float32", [i if i < 16 else None for i in LANES], 2),
}


@pytest.mark.parametrize("name", SECTORS)
def test_sectors_that_one_knows_by_hand(name: str) -> None:
    dtype, where, sectors = SECTORS[name]
    (access,) = counted(reads_at, 32, np.zeros(1024, dtype), where)
    lanes = [i for i in where if i is not None]
    assert (access.requests, access.threads, access.sectors) == (1, len(lanes), sectors)
    size = np.dtype(dtype).itemsize
    assert access.bytes == size * len(lanes)
    useful = Fraction(size * len(set(lanes)), 32 * sectors)
    assert access.efficiency == float(useful)
    assert (access.passes, access.conflicts) == (0, 0)


def test_addresses_count_from_where_the_memory_begins() -> None:
    """NumPy's own address does not matter, and a piece of an array lies where it is."""
    raw = np.zeros(4 * 1024 + 300, np.uint8)
    for shift in range(0, 64, 4):  # owned elsewhere: this is how addresses differ
        x = np.frombuffer(memoryview(raw)[shift : shift + 4096], np.float32)
        assert counted(reads_at, 32, x, [*LANES])[0].sectors == 4
        assert counted(reads_at, 32, x[1:], [*LANES])[0].sectors == 5
        assert counted(reads_at, 32, x[8:], [*LANES])[0].sectors == 4
        assert counted(reads_at, 32, x[1:].reshape(1, -1)[0], [*LANES])[0].sectors == 5


def reads_a_row(x):
    row = x[cuda.threadIdx.y, 1:]
    row[cuda.threadIdx.x]


def test_a_view_in_the_kernel_keeps_its_place_and_its_array() -> None:
    (access,) = counted(reads_a_row, (32, 3), np.zeros((3, 40), np.float32))
    assert (access.array, access.requests, access.sectors) == ("x", 3, 15)
    assert access.expression == "row[cuda.threadIdx.x]"


# --- shared memory: passes ----------------------------------------------------------


def tile_column(tile_columns):
    tile = cuda.shared.array((32, tile_columns), np.float32)
    t = cuda.threadIdx.x
    for row in range(32):
        tile[row, t] = 0
    cuda.syncthreads()
    tile[t, 5]
    tile[3, 4]


@pytest.mark.parametrize(("columns", "passes"), [(32, 32), (33, 1), (34, 2), (36, 4)])
def test_a_column_of_a_tile(columns: int, passes: int) -> None:
    accesses = counted(tile_column, 32, columns)
    column = only(accesses, "tile[t, 5]")
    assert (column.passes, column.conflicts) == (passes, passes - 1)
    assert column.efficiency == 1 / passes and column.sectors == 0
    assert only(accesses, "tile[3, 4]").passes == 1  # a broadcast
    row = only(accesses, "tile[row, t]")
    assert (row.requests, row.passes, row.kind, row.space) == (
        32,
        32,
        "write",
        "shared",
    )


def shared_at(dtype, n, where, op):
    tile = cuda.shared.array(512, dtype, alignment=16)
    t = cuda.threadIdx.x
    if t < len(where) and where[t] is not None:
        if op == "atomic":
            cuda.atomic.exch(tile, where[t], 0)
        elif n == 1:
            tile[where[t]] = 0
        else:
            tile.write_vector(where[t], [0] * n)


WIDE = {
    "float64 in order": ("float64", 1, [*LANES], 2, 2),
    "float64, stride 2": ("float64", 1, [2 * i for i in LANES], 4, 2),
    "8 bytes at once": ("float32", 2, [2 * i for i in LANES], 2, 2),
    "16 bytes at once": ("float32", 4, [4 * i for i in LANES], 4, 4),
    "16 bytes, stride 32": ("float32", 4, [8 * i for i in LANES], 8, 4),
    "16 bytes, half a warp": ("float32", 4, [4 * i for i in range(16)], 2, 2),
    "bytes, 4 in a word": ("uint8", 1, [*LANES], 1, 1),
    "bytes of 32 words": ("uint8", 1, [4 * i for i in LANES], 1, 1),
    "bytes of one bank": ("uint8", 1, [128 * i for i in range(4)], 4, 1),
}


@pytest.mark.parametrize("name", WIDE)
def test_passes_of_other_widths(name: str) -> None:
    dtype, n, where, passes, least = WIDE[name]
    (access,) = counted(shared_at, 32, dtype, n, where, "write")
    assert (access.requests, access.passes, access.least) == (1, passes, least)
    assert access.conflicts == passes - least


def bins(own, where):
    tile = cuda.shared.array(64, np.int32)
    t = cuda.threadIdx.x
    tile[t] = 0
    tile[t + 32] = 0
    cuda.syncthreads()
    cuda.atomic.add(tile, where[t], 1)


@pytest.mark.parametrize(
    ("where", "passes"),
    [([*LANES], 1), ([0] * 32, 32), ([i // 2 for i in LANES], 2), ([0, 32] * 16, 32)],
)
def test_atomics_that_meet_go_one_by_one(where: list, passes: int) -> None:
    (access,) = [a for a in counted(bins, 32, None, where) if a.kind == "atomic"]
    assert (access.requests, access.threads, access.passes) == (1, 32, passes)


# --- random accesses against a count that goes byte by byte ---------------------------


def follows(x, tile_size, n, where):
    tile = cuda.shared.array(tile_size, x.dtype, alignment=16)
    t = cuda.threadIdx.x
    for i in range(t, tile_size, cuda.blockDim.x):
        tile[i] = 0
    cuda.syncthreads()
    for places in where[cuda.blockIdx.x]:
        if places[t] is None:
            continue
        if n == 1:
            x[places[t]]
            tile[places[t]]
        else:
            x.read_vector(places[t], n)
            tile.read_vector(places[t], n)


def byte_by_byte(where: list, width: int, size: int, shift: int) -> dict:
    """Requests one after another: sectors as a set of bytes, passes by playing them."""
    total = dict.fromkeys(["requests", "threads", "sectors", "needed", "passes"], 0)
    for block in where:
        turn = [0] * len(block[0])  # a lane that stays away is one time behind
        requests = {}
        for places in block:
            for t, i in enumerate(places):
                if i is not None:
                    requests.setdefault((t // 32, turn[t]), []).append((t % 32, i))
                    turn[t] += 1
        for lanes in requests.values():
            touched = {size * i + b + shift for _, i in lanes for b in range(width)}
            total["requests"] += 1
            total["threads"] += len(lanes)
            total["needed"] += len(touched)
            total["sectors"] += len({b - b % 32 for b in touched})
            total["passes"] += played(lanes, width, size)
    return total


def played(lanes: list, width: int, size: int) -> int:
    """Each pass, every bank serves one word to whoever of the same part wants it."""
    passes, parts = 0, {1: 1, 2: 1, 4: 1, 8: 2, 16: 4}[width]
    for part in range(parts):
        wanted = []
        for lane, i in lanes:
            if lane * parts // 32 == part:
                wanted += [(size * i + b) // 4 for b in range(width)]
        while wanted:
            passes += 1
            served = {}
            for word in wanted:
                served.setdefault(word % 32, word)
            wanted = [word for word in wanted if served[word % 32] != word]
    return passes


@pytest.mark.parametrize("dtype", ["uint8", "float16", "int32", "float64"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_random_accesses_byte_by_byte(dtype: str, n: int) -> None:
    size = np.dtype(dtype).itemsize
    n = min(n, 16 // size)
    r = np.random.default_rng([size, n])
    for shift, block, spread in [(0, 32, 40), (n, 45, 256), (3 * n, 70, 500)]:
        where = r.integers(spread // n, size=(2, 3, block)) * n
        away = r.random(where.shape) < 0.2
        where = np.where(away, None, where).tolist()
        x = np.zeros(512 + shift, dtype)[shift:]
        for order in ORDERS:
            accesses = counted(follows, block, x, 512, n, where, grid=2, order=order)
            reads = {a.space: a for a in accesses if a.kind == "read"}
            expected = byte_by_byte(where, n * size, size, shift * size)
            for space, unit in (("global", "sectors"), ("shared", "passes")):
                names = ("requests", "threads", "needed", unit)
                found = {name: getattr(reads[space], name) for name in names}
                assert found == {name: expected[name] for name in names}
                assert reads[space].bytes == expected["threads"] * n * size
                assert reads[space].least <= getattr(reads[space], unit)


# --- which accesses are one request ---------------------------------------------------


def doubled(x, i):
    return 2 * x[i]


def calls_twice(x, y):
    t = cuda.threadIdx.x
    y[t] = doubled(x, t) + doubled(x, t + 32)


def one_line(x, y):
    t = cuda.threadIdx.x
    y[t] = x[t] + x[2 * t]


def shorter_loops(x):
    for k in range(cuda.threadIdx.x % 4):
        x[k]


def test_calls_from_two_places_are_two_requests() -> None:
    x, y = np.zeros(64, np.float32), np.zeros(32, np.float32)
    read, write = counted(calls_twice, 32, x, y)
    assert (read.function, read.line) == ("doubled", line_of(doubled, "x[i]"))
    assert read.text == "return 2 * x[i]" and read.expression == "x[i]"
    assert (read.requests, read.sectors) == (2, 8)
    assert (write.kind, write.requests) == ("write", 1)


def test_two_reads_in_a_line_are_two_accesses() -> None:
    x, y = np.zeros(64, np.float32), np.zeros(32, np.float32)
    for order in ORDERS:
        accesses = counted(one_line, 32, x, y, order=order)
        expressions = [(a.expression, a.kind, a.sectors) for a in accesses]
        assert expressions == [
            ("x[t]", "read", 4), ("x[2 * t]", "read", 8), ("y[t]", "write", 4)
        ]  # fmt: skip


def test_turns_of_a_loop_that_lanes_leave_at_different_times() -> None:
    (access,) = counted(shorter_loops, 32, np.zeros(4))
    assert (access.requests, access.threads) == (3, 24 + 16 + 8)
    assert (access.sectors, access.needed) == (3, 3 * 8)


def hot(x, n):
    s = 0.0
    for k in range(n):
        s += x[k]


def test_an_instruction_that_python_makes_fast_stays_the_same() -> None:
    (access,) = counted(hot, 32, np.zeros(200), 200)
    assert (access.requests, access.threads) == (200, 32 * 200)
    (access,) = counted(planted(hot, "x[k]", "x[k] "), 1, np.zeros(200), 200)
    assert access.requests == 200


@pytest.mark.parametrize("order", ORDERS)
def test_the_sums_agree_with_what_is_counted_anyway(order: str | int) -> None:
    x, y = normal(9, 23), np.zeros((23, 9), np.float32)
    plain = launch(transpose, (3, 2), (8, 8), x, y, 9, 23, order=order)
    stats = launch(transpose, (3, 2), (8, 8), x, y, 9, 23, order=order, count=True)
    np.testing.assert_array_equal(y, x.T)
    threads = {(a.space, a.kind): a.threads for a in stats.accesses}
    assert threads == {
        ("global", "read"): plain.global_reads,
        ("global", "write"): plain.global_writes,
        ("shared", "read"): plain.shared_reads,
        ("shared", "write"): plain.shared_writes,
    }
    assert plain.accesses == () and plain.trace is None
    assert stats.global_reads == plain.global_reads


def test_a_watched_launch_finds_the_same_errors() -> None:
    broken = planted(block_sum, "    cuda.syncthreads()\n", "    pass\n")
    args = normal(64), np.zeros(1, np.float32), 64
    said = []
    for how in ({}, {"count": True}, {"count": True, "trace": (0, 1)}):
        with pytest.raises(RaceError) as caught:
            launch(broken, 1, 64, *args, **how)
        said.append(str(caught.value))
    assert len(set(said)) == 1


# --- the table ------------------------------------------------------------------------


def test_the_table_is_aligned_and_says_it_all() -> None:
    x, y = np.zeros((8, 32), np.float32), np.zeros((32, 8), np.float32)
    stats = launch(transpose, (4, 1), (8, 8), x, y, 8, 32, count=True)
    lines = stats.table().splitlines()
    assert str(stats) == stats.table()
    heads = lines[0].split()
    assert heads == ["requests", "bytes", "sectors", "passes", "efficiency"]
    line = line_of(transpose, "tile[ty, tx] =")
    assert lines[1] == f"line {line}: tile[ty, tx] = x[row, column]"
    assert lines[2].split() == [
        "read", "x[row,", "column],", "global", "8", "1024", "32", "–", "100.0%"
    ]  # fmt: skip
    assert lines[3].split()[-5:] == ["8", "1024", "–", "16", "50.0%"]
    assert len({len(line) for line in lines if "line" not in line}) == 1
    assert str(launch(transpose, 1, (8, 8), x, y, 8, 8)).startswith("Stats(blocks=1")


def test_the_table_names_the_array_behind_a_view() -> None:
    stats = launch(reads_a_row, 1, 4, np.zeros((3, 40), np.float32), count=True)
    assert "read row[cuda.threadIdx.x] of x, global" in stats.table()


# --- several elements at once ---------------------------------------------------------


def copies(x, y, n, shift):
    i = n * cuda.grid(1) + shift
    y.write_vector(i, x.read_vector(i, n))


@pytest.mark.parametrize(("dtype", "n"), [("float32", 4), ("uint8", 8), ("int64", 2)])
@pytest.mark.parametrize("integer", [int, np.int32, np.uint32])
def test_vectors_copy(dtype: str, n: int, integer: type) -> None:
    x, y = np.arange(66 * n).astype(dtype), np.zeros(66 * n, dtype)
    stats = launch(copies, 2, 32, x, y, n, integer(n), count=True)
    np.testing.assert_array_equal(y[n : 65 * n], x[n : 65 * n])
    assert not y[:n].any() and not y[65 * n :].any()
    assert (stats.global_reads, stats.global_writes) == (64, 64)
    size = n * x.itemsize
    for access in stats.accesses:
        assert (access.requests, access.threads, access.bytes) == (2, 64, 64 * size)
        assert access.sectors == sum(
            math.ceil((first + 32 * size) / 32) - first // 32
            for first in (size, 33 * size)
        )


def writes_mixed(x, values):
    x.write_vector(0, values)


def reads_types(x, kept):
    kept.append(x.read_vector(4, 4))


def test_vectors_convert_as_elements_do() -> None:
    x = np.zeros(4, np.int32)
    launch(writes_mixed, 1, 1, x, (3.9, -1, 2**40 + 5, np.uint64(2**63)))
    assert x.tolist() == [3, -1, 5, 0]
    kept = []
    launch(reads_types, 1, 1, np.arange(8, dtype=np.float32), kept)
    assert kept == [(4, 5, 6, 7)] and {type(v) for v in kept[0]} == {np.float32}


def vector_of_shared(out):
    tile = cuda.shared.array(8, np.float32, alignment=16)
    t = cuda.threadIdx.x
    tile[t] = t
    cuda.syncthreads()  # before
    for k, v in enumerate(tile.read_vector(4 - 4 * (t // 4), 4)):
        if k == t % 4:
            out[t] = v


def vector_unwritten(out):
    tile = cuda.local.array(4, np.float32)
    for k in range(3):
        tile[k] = k
    out[0] = tile.read_vector(0, 4)[3]


def vectors_overlap(x):
    t = cuda.threadIdx.x
    if t == 0:
        x.write_vector(0, (1, 2, 3, 4))
    else:
        x[3]


def vector_over_one(x):
    if cuda.threadIdx.x == 0:
        x[6] = 1
    else:
        x.read_vector(4, 4)


def test_vectors_race_element_by_element() -> None:
    out = np.zeros(8, np.float32)
    launch(vector_of_shared, 1, 8, out)
    assert out.tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    broken = planted(vector_of_shared, "cuda.syncthreads()  #", "pass  #")
    for order in ORDERS:
        with pytest.raises(SimulatorError, match="tile") as caught:
            launch(broken, 1, 8, out, order=order)
        assert isinstance(caught.value, RaceError | UninitialisedError)
        for kernel, element in ((vectors_overlap, 3), (vector_over_one, 6)):
            with pytest.raises(RaceError) as caught:
                launch(kernel, 1, 2, np.zeros(8, np.float32), order=order)
            assert caught.value.index == element
    with pytest.raises(UninitialisedError, match=r"tile\[3\]"):
        launch(vector_unwritten, 1, 1, out)


def reads_vector(x, i, n):
    x.read_vector(i, n)


def writes_in_a_row(x, column):
    row = x[cuda.threadIdx.x]
    row.write_vector(column, (0, 0))


X = np.zeros(16, np.float32)
NO_VECTORS = [
    (X, 2, 4, AlignmentError, "reads x[2:6] at once, 16 bytes from byte 8 of x on"),
    (X, 1, 2, AlignmentError, "A 8-byte load needs an address that is a multiple of 8"),
    (X[1:], 0, 4, AlignmentError, "A 16-byte load needs an address that is a multiple"),
    (X, 16, 4, BoundsError, "x[16:20] is out of bounds: x has the shape (16,)"),
    (X[:14], 12, 4, BoundsError, "x[12:16] is out of bounds"),
    (X, -4, 4, BoundsError, "x[-4:0] is out of bounds"),
    (X, 0, 3, SimulatorError, "One access takes 1, 2, 4, 8 or 16 bytes"),
    (X, 0, 8, SimulatorError, "float32: 8 of it from 0 on are no one access"),
    (X, 0, 0, SimulatorError, "One access takes"),
    (X[::2], 0, 4, SimulatorError, "of neighbours along one axis"),
    (X[::-1], 0, 4, SimulatorError, "strides of (-4,) bytes"),
    (X.reshape(4, 4), 0, 4, SimulatorError, "has the shape (4, 4)"),
    (X, 1.0, 4, SimulatorError, "x is indexed by 1.0, which is not an integer"),
]


@pytest.mark.parametrize(("x", "i", "n", "kind", "said"), NO_VECTORS)
def test_what_is_no_vector(x, i, n: int, kind: type, said: str) -> None:
    with pytest.raises(SimulatorError) as caught:
        launch(reads_vector, 1, 1, x, i, n)
    assert type(caught.value) is kind and said in str(caught.value)
    assert caught.value.array == "x"


def test_alignment_is_that_of_the_whole_array() -> None:
    launch(writes_in_a_row, 1, 2, np.zeros((2, 6), np.float32), 2)
    with pytest.raises(AlignmentError) as caught:
        launch(writes_in_a_row, 1, 2, np.zeros((2, 5), np.float32), 2)
    error = caught.value  # the first row is all right
    assert (error.thread, error.array, error.index) == ((1, 0, 0), "x[1]", 2)
    assert "writes x[1][2:4] at once, 8 bytes from byte 28 of x on" in str(error)
    assert "A 8-byte store" in str(error)


# --- integers of NumPy as indices -----------------------------------------------------

INTEGERS = [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64]


@pytest.mark.parametrize("integer", INTEGERS)
def test_integers_of_numpy_are_indices(integer: type) -> None:
    kept = []

    def kernel(x, y):
        i = integer(cuda.threadIdx.x)
        y[i, integer(1)] = x[i]
        kept.append(y[i, 1])

    x, y = np.arange(100.0), np.zeros((100, 2))
    launch(kernel, 1, 100, x, y)
    np.testing.assert_array_equal(y[:, 1], x)
    assert kept == x.tolist()
    with pytest.raises(BoundsError) as caught:
        launch(kernel, 1, 101, x, np.zeros((101, 2)))
    assert caught.value.index == 100 and type(caught.value.index) is int
    if np.issubdtype(integer, np.signedinteger):
        with pytest.raises(BoundsError, match="does not count from the end"):
            launch(lambda x: x[integer(-1)], 1, 1, x)


# --- arithmetic -----------------------------------------------------------------------


def overflows(x):
    t = cuda.threadIdx.x
    cuda.syncthreads()
    x[t] = x[t] / x[t]  # 0 / 0
    cuda.syncwarp()
    x[t + 2] = np.float32(3e38) * np.float32(t + 9)


def test_arithmetic_makes_no_noise() -> None:
    x, before = np.zeros(4, np.float32), np.geterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launch(overflows, 1, 2, x)
    np.testing.assert_array_equal(x, [math.nan, math.nan, math.inf, math.inf])
    assert np.geterr() == before


# --- traces ---------------------------------------------------------------------------


def steps(kernel: Callable, block, *args, trace=(0, 0), grid=1, **how) -> tuple:
    return launch(kernel, grid, block, *args, trace=trace, **how).trace.steps


@pytest.mark.parametrize("order", ORDERS)
def test_a_trace_of_a_reduction(order: str | int) -> None:
    x, out = normal(128), np.zeros(2, np.float32)
    stats = launch(block_sum, 2, 64, x, out, 128, order=order, trace=(1, 1))
    trace = stats.trace
    assert (trace.kernel, trace.block, trace.warp) == ("block_sum", (1, 0, 0), 1)
    assert trace.threads == 32 and stats.accesses == ()
    v = x[96:]
    ops = ["read", *["shfl_xor_sync"] * 5, "write", "syncthreads"]
    assert [step.op for step in trace.steps] == ops
    assert trace.steps[0].answers == tuple(v) and trace.steps[0].array == "x"
    assert trace.steps[0].indices == tuple(range(96, 128))
    for bits, step in zip((16, 8, 4, 2, 1), trace.steps[1:6], strict=True):
        other = v[np.arange(32) ^ bits]
        assert step.operands == tuple((own, bits) for own in v)
        assert step.answers == tuple(other)
        assert (step.function, step.mask, len(step.lanes)) == ("warp_sum", FULL, 32)
        v = v + other
    write = trace.steps[6]
    assert (write.lanes, write.space, write.array) == ((0,), "shared", "partial")
    assert write.operands == (v[0], *[None] * 31)
    assert write.indices[0] == 1 and set(write.answers) == {None}
    assert trace.steps[7].lanes == tuple(range(32))
    assert math.isclose(out[1], x[64:].sum(), rel_tol=1e-5)


def two_ways(x, near):
    t = cuda.threadIdx.x
    own = cuda.local.array(1, np.int32)
    if t % 2:
        own[0] = x[t]  # odd
    else:
        own[0] = -x[t]  # even
    cuda.atomic.add(near, 0, own[0])


@pytest.mark.parametrize("order", ORDERS)
def test_lanes_that_went_two_ways_meet_again(order: str | int) -> None:
    x = np.arange(24, dtype=np.int32)
    found = steps(two_ways, 24, x, np.zeros(1, np.int32), order=order)
    assert [(s.op, s.space, len(s.lanes)) for s in found] == [
        ("read", "global", 12), ("write", "local", 12),
        ("read", "global", 12), ("write", "local", 12),
        ("read", "local", 24), ("atomic", "global", 24),
    ]  # fmt: skip
    assert found[0].text.endswith("# odd") and found[2].text.endswith("# even")
    assert found[0].lanes == tuple(range(1, 24, 2))
    assert found[3].operands[:5] == (0, None, -2, None, -4)
    own = np.where(np.arange(24) % 2, 1, -1) * np.arange(24)
    assert found[4].answers == (*own, *[None] * 8)
    last = found[5]
    gained = [a - b for a, b in zip(last.operands[:24], last.answers[:24], strict=True)]
    assert gained == own.tolist()


def loops_with_a_gap(x):
    t = cuda.threadIdx.x
    for k in range(3):
        x[k]  # all
        if (t + k) % 2:
            x[k + 3]  # some


def other_way_round(x):
    for k in range(2):
        if cuda.threadIdx.x == k:
            x[0]  # first
        else:
            x[1]  # second


def test_steps_keep_the_order_of_each_lane() -> None:
    found = steps(loops_with_a_gap, 2, np.zeros(6))
    lanes = [(s.text[-4:].strip(), s.lanes) for s in found]
    together = ("all", (0, 1))
    assert lanes == [
        together, ("some", (1,)), together, ("some", (0,)), together, ("some", (1,))
    ]  # fmt: skip
    for lane in (0, 1):
        own = [s.indices[lane] for s in found if lane in s.lanes]
        assert own == [i for k in range(3) for i in [k] + [k + 3] * ((lane + k) % 2)]


def one_lane_goes_round(x):
    if cuda.threadIdx.x == 1:
        for k in range(3):
            x[k]  # alone
    x[5]  # both


def test_a_step_waits_for_all_its_lanes() -> None:
    found = steps(one_lane_goes_round, 2, np.zeros(6))
    assert [s.lanes for s in found] == [(1,), (1,), (1,), (0, 1)]


def test_lanes_that_wait_for_each_other_go_alone() -> None:
    found = steps(other_way_round, 2, np.zeros(2))
    for lane in (0, 1):
        own = [s.indices[lane] for s in found if lane in s.lanes]
        assert own == ([0, 1] if lane == 0 else [1, 0])
    assert sum(len(s.lanes) for s in found) == 4


def extremes(x, big):
    x[0]
    x.read_vector(0, 2)
    big[0]
    cuda.shfl_sync(1, x[2] > 0, 0)
    cuda.syncthreads()


def test_a_trace_as_json_loses_nothing() -> None:
    x = np.array([0.1, math.inf, math.nan], np.float32)
    x = np.concatenate([x[:1], -x[1:2], x[2:]])
    stats = launch(extremes, 1, 1, x, np.array([2**53 + 1]), trace=(0, 0))
    plain = json.loads(json.dumps(stats.trace.as_dict(), allow_nan=False))
    assert plain["kernel"] == "extremes" and plain["block"] == [0, 0, 0]
    first, vector, big, nan, vote, barrier = plain["steps"]
    assert np.float32(first["answers"][0]) == x[0] and first["answers"][1] is None
    assert first["answers"][0] == float(np.float32(0.1)) != 0.1
    assert vector["answers"][0] == [first["answers"][0], "-Infinity"]
    assert big["answers"][0] == str(2**53 + 1) and nan["answers"][0] == "NaN"
    assert vote["operands"][0] == [False, 0] and vote["answers"][0] is False
    assert barrier["op"] == "syncthreads" and barrier["lanes"] == [0]
    assert first["line"] == line_of(extremes, "x[0]") and first["text"] == "x[0]"
    assert first["indices"][0] == 0 and first["array"] == "x"


@pytest.mark.parametrize(
    ("trace", "said"),
    [
        ((2, 0), r"warp 0 of block \(2, 0, 0\): the grid is \(2, 1, 1\)"),
        ((0, 1), "a block has 1 warps, counted from 0"),
        ((0, -1), "trace names warp -1"),
        (((0, 1), 0), "trace names"),
        ((1.5, 0), "it must be .block, warp."),
        (3, "trace is 3: it must be .block, warp."),
        ((0,), "it must be"),
        (((0, 0, 0, 0), 0), "it must be"),
    ],
)
def test_traces_of_what_is_not_there(trace, said: str) -> None:
    with pytest.raises(SimulatorError, match=said):
        launch(shorter_loops, 2, 4, np.zeros(4), trace=trace)
