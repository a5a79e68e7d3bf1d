"""What a kernel could cost: against figures known by hand, and what kernels ask for.

Occupancies are NVIDIA's: the answers of ``cuda_occupancy.h`` (CUDA 13.0), compiled and
asked once. Bytes are the simulator's counts, operations are counted while the
kernels run. Machine code is in `tests/cuda/test_kernel_code.py`.
"""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from numpy import float32, uint32, uint64

from minidsv3.gpu import intrinsics, roofline
from minidsv3.gpu.roofline import H100, H200, Work, floor, occupancy
from minidsv3.gpu.simulator import cuda, launch
from minidsv3.primitives import fast_cuda_kernels as fast
from minidsv3.primitives import plain_cuda_kernels as plain
from minidsv3.primitives import work_of_cuda_kernels as work
from minidsv3.primitives.work_of_cuda_kernels import BFLOAT16, FLOAT32, Job

# --- the machine --------------------------------------------------------------------

NVIDIAS = [  # registers, threads, shared: blocks, and what allows no more
    (128, 256, 0, 2, "registers"),
    (32, 256, 0, 8, "warps"),
    (37, 256, 0, 6, "registers"),  # 37 are given out as 40
    (48, 224, 128, 5, "registers"),
    (56, 224, 128, 5, "registers"),
    (57, 224, 128, 4, "registers"),
    (255, 256, 0, 1, "registers"),
    (64, 1024, 0, 1, "registers"),
    (65, 1024, 0, 0, "registers"),  # cannot be launched
    (16, 32, 0, 32, "blocks"),
    (33, 96, 0, 16, "registers"),
    (168, 384, 0, 1, "registers"),
    (32, 1024, 232_448, 1, "shared memory"),
    (32, 128, 115_712, 2, "shared memory"),
    (32, 128, 115_713, 1, "shared memory"),  # one byte more
    (32, 128, 65_536, 3, "shared memory"),
]


@pytest.mark.parametrize(("registers", "threads", "shared", "blocks", "limit"), NVIDIAS)
def test_occupancy_is_nvidias(registers, threads, shared, blocks, limit) -> None:
    got = occupancy(H200, registers, threads, shared)
    assert (got.blocks, got.limited_by) == (blocks, limit)
    assert got.warps == blocks * math.ceil(threads / 32)
    assert got.fraction == got.warps / 64


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ((256, 128), "registers is 256: a block on H200 has 1 to 255"),
        ((0, 128), "registers is 0"),
        ((32, 1025), "threads is 1025: a block on H200 has 1 to 1024"),
        ((32, 0), "threads is 0"),
        ((32, 128, 232_449), "shared is 232449: a block on H200 has 0 to 232448"),
        ((32, 128, -1), "shared is -1"),
    ],
)
def test_a_block_that_cannot_be_is_refused(asked, says) -> None:
    with pytest.raises(ValueError, match=says):
        occupancy(H200, *asked)


def test_data_sheets() -> None:
    """What follows from one another: 132 x 128 FMA and 132 x 16 specials a cycle."""
    for machine in (H200, H100):
        cycles = machine.float32 / (2 * 128 * machine.multiprocessors)
        assert cycles == pytest.approx(1.98e9, rel=0.01)  # boost clock of both
        assert machine.special / machine.float32 == pytest.approx(16 / 256)
        assert machine.bandwidth < machine.sheet_bandwidth
        assert machine.registers * 4 == 256 * 1024  # 256 KB of registers
        assert machine.shared - machine.shared_of_block == machine.shared_reserved


def test_floor_is_the_slowest_part() -> None:
    assert floor(H200, Work(4.3e12, 1)) == roofline.Floor(1.0, "memory")
    assert floor(H200, Work(1, 67e12)) == roofline.Floor(1.0, "arithmetic")
    assert floor(H200, Work(1, 78e13), True) == roofline.Floor(1.0, "tensor cores")
    specials = floor(H200, Work(1, 1, 132 * 16 * 1.98e9))
    assert specials.bound == "special functions"
    assert specials.seconds == pytest.approx(1, rel=0.01)


def test_ridges_known_by_hand() -> None:
    """MLA's decode with 128 heads, 242 FLOP a byte, is beyond the H200's ridge."""
    assert roofline.ridge(H200, tensor=True) == pytest.approx(181, abs=0.5)
    assert roofline.ridge(H200) == pytest.approx(15.6, abs=0.05)
    decode = Work(1, 1.89 * 128)
    assert roofline.intensity(decode) == pytest.approx(242, abs=0.5)
    assert floor(H200, decode, tensor=True).bound == "tensor cores"
    assert floor(H200, Work(1, 1.89 * 16), tensor=True).bound == "memory"
    on_cores = floor(H200, Work(1, 1.89 * 16))  # 16 heads, CUDA cores
    assert on_cores.bound == "arithmetic"
    assert 1 / H200.bandwidth / on_cores.seconds == pytest.approx(0.515, abs=0.001)


def test_littles_law() -> None:
    """4.3 TB/s for a microsecond is 4.3 MB, of which each of 132 has 32.6 KB."""
    assert roofline.in_flight(H200, 1e-6) == pytest.approx(32_576, abs=1)
    assert roofline.reachable(H200, 16_288, 1e-6) == pytest.approx(0.5, abs=1e-4)
    assert roofline.reachable(H200, 1e6, 1e-6) == 1


def test_nobody_waits_for_a_store() -> None:
    """Of a copy half is loads: half of the bytes must be under way as loads."""
    assert roofline.in_flight(H200, 1e-6, loads=0.5) == pytest.approx(16_288, abs=1)
    assert roofline.reachable(H200, 8_144, 1e-6, loads=0.5) == pytest.approx(
        0.5, abs=1e-4
    )


def test_shares_of_loads() -> None:
    """Two of SwiGLU's three arrays, one of a norm's two, all that the loss has."""
    assert work.swiglu(1000, BFLOAT16).loads == pytest.approx(2 / 3)
    assert work.add(1000, FLOAT32).loads == pytest.approx(2 / 3)
    assert work.rmsnorm(10_000, 8, BFLOAT16).loads == pytest.approx(0.5, abs=1e-4)
    assert work.cross_entropy(8, 1000, BFLOAT16).loads == 1


FLOORS = {  # microseconds on an H200, as known before this code
    "RMSNorm": (work.rmsnorm(65_536, 7_168, BFLOAT16), 437),
    "RMSNorm with residual": (work.add_rmsnorm(65_536, 7_168, BFLOAT16), 874),
    "RoPE": (work.rope(65_536, 128, 64, 65_536, BFLOAT16), 503),
    "SwiGLU": (work.swiglu(32_768 * 2_048, BFLOAT16), 94),
}


@pytest.mark.parametrize("name", FLOORS)
def test_floors_known_before(name: str) -> None:
    job, microseconds = FLOORS[name]
    found = floor(H200, job.work)
    assert found.bound == "memory"
    assert round(1e6 * found.seconds) == microseconds


# --- bytes: what the simulator sees the kernels ask for -----------------------------

ROWS, WIDTH = 3, 512
TOKENS, HEADS, ROTARY, PERIOD = 4, 8, 64, 2
KINDS = {"float32": (np.float32, FLOAT32), "bfloat16": (np.uint16, BFLOAT16)}
ONE = {"float32": 1.0, "bfloat16": 0x3F80}
each_dtype = pytest.mark.parametrize("dtype", KINDS)


def ones(dtype: str, n: int) -> np.ndarray:
    return np.full(n, ONE[dtype], KINDS[dtype][0])


def floats(n: int) -> np.ndarray:
    return np.ones(n, np.float32)


class Given:
    """Arguments of the kernels, all ones, in one dtype."""

    def __init__(self, dtype: str) -> None:
        self.dtype, (_, self.size) = dtype, KINDS[dtype]
        self.per, self.n = 16 // self.size, ROWS * WIDTH
        self.vectors = WIDTH // (32 * self.per)
        self.blocks = self.n // (32 * self.per)
        self.rows = {"rows": ROWS, "width": WIDTH, "size": self.size}
        self.row = ones(dtype, WIDTH)

    def many(self, how_many: int) -> list[np.ndarray]:
        return [ones(self.dtype, self.n) for _ in range(how_many)]


def norms(given: Given) -> dict[str, tuple]:
    """Kernel, grid, block and arguments, and the job that it should be."""
    made, rows, many, n = (given.vectors, given.per), given.rows, given.many, given.n
    norm = uint32(WIDTH), float32(1 / WIDTH)
    forward = *many(1), given.row, *many(1), floats(ROWS), *norm, float32(0)
    added = *many(2), given.row, *many(2), floats(ROWS), *norm, float32(0)
    back = (
        *many(2),
        given.row,
        floats(ROWS),
        *many(1),
        floats(2 * WIDTH),
        uint32(ROWS),
        *norm,
    )
    return {
        "rmsnorm_plain": (plain.rmsnorm_plain, ROWS, 128, forward,
                          work.rmsnorm(**rows, fast=False)),
        "rmsnorm_fast": (fast.rmsnorm_fast(*made), ROWS, 32, forward,
                         work.rmsnorm(**rows)),
        "add_plain": (plain.add_plain, n // 256, 256, (*many(3), uint64(n)),
                      work.add(n, given.size)),
        "add_rmsnorm_fast": (fast.add_rmsnorm_fast(*made), ROWS, 32, added,
                             work.add_rmsnorm(**rows)),
        "rmsnorm_backward_plain": (
            plain.rmsnorm_backward_plain, 2, 128, back,
            work.rmsnorm_backward(**rows, blocks=2, fast=False),
        ),
        "rmsnorm_backward_fast": (fast.rmsnorm_backward_fast(*made), 2, 32, back,
                                  work.rmsnorm_backward(**rows, blocks=2)),
    }  # fmt: skip


def gates_and_turns(given: Given) -> dict[str, tuple]:
    """The same for SwiGLU and RoPE."""
    per, n, size = given.per, given.n, given.size
    count, blocks = uint64(n), given.blocks
    x = ones(given.dtype, TOKENS * HEADS * ROTARY)
    shape = (TOKENS, HEADS, ROTARY, PERIOD, size)
    numbers = *map(uint32, (HEADS, ROTARY, ROTARY, PERIOD)), float32(1)
    rope = x, floats(PERIOD * ROTARY), *numbers
    many = x, floats(PERIOD * ROTARY), uint32(TOKENS), *numbers
    warps = ROTARY // per * 4 // 32
    return {
        "rope_plain": (plain.rope_plain, TOKENS, 128, rope,
                       work.rope(*shape, fast=False)),
        "rope_fast": (fast.rope_fast(per), TOKENS, (ROTARY // per, 4), many,
                      work.rope(*shape, warps=warps)),
        "swiglu_plain": (plain.swiglu_plain, n // 256, 256, (*given.many(3), count),
                         work.swiglu(n, size)),
        "swiglu_fast": (fast.swiglu_fast(per), blocks, 32, (*given.many(3), count),
                        work.swiglu(n, size)),
        "swiglu_backward_plain": (
            plain.swiglu_backward_plain, n // 256, 256, (*given.many(5), count),
            work.swiglu_backward(n, size),
        ),
        "swiglu_backward_fast": (
            fast.swiglu_backward_fast(per), blocks, 32, (*given.many(5), count),
            work.swiglu_backward(n, size),
        ),
    }  # fmt: skip


def losses(given: Given) -> dict[str, tuple]:
    """The same for cross-entropy."""
    targets, each = np.zeros(ROWS, np.int64), [floats(ROWS) for _ in range(2)]
    loss = *given.many(1), targets, *each, floats(ROWS), uint32(WIDTH)
    rows = given.rows
    return {
        "cross_entropy_plain": (plain.cross_entropy_plain, ROWS, 128, loss,
                                work.cross_entropy(**rows, fast=False)),
        "cross_entropy_fast": (fast.cross_entropy_fast(given.per), ROWS, 32, loss,
                               work.cross_entropy(**rows)),
        "cross_entropy_backward_plain": (
            plain.cross_entropy_backward_plain, ROWS, 128, loss,
            work.cross_entropy_backward(**rows),
        ),
        "cross_entropy_backward_fast": (
            fast.cross_entropy_backward_fast(given.per), ROWS, 32, loss,
            work.cross_entropy_backward(**rows),
        ),
    }  # fmt: skip


def cases(dtype: str) -> dict[str, tuple]:
    given = Given(dtype)
    return norms(given) | gates_and_turns(given) | losses(given)


NAMES = list(cases("float32"))


def asked(kernel, grid, block, args) -> dict[tuple[str, str], Counter]:
    """Bytes and sectors of each array and direction, as the simulator counts them."""
    found: dict[tuple[str, str], Counter] = {}
    for access in launch(kernel, grid, block, *args, count=True).accesses:
        if access.space == "global":
            sums = found.setdefault((access.array, access.kind), Counter())
            sums.update(bytes=access.needed, sectors=access.sectors)
    return found


def says_otherwise(job: Job, kernel, grid, block, args) -> list[str]:
    """Where a kernel does another thing than its job: nothing, if all is well."""
    found = asked(kernel, grid, block, args)
    said: dict[tuple[str, str], Counter] = {}
    for stream in job.streams:
        sums = said.setdefault((stream.array, stream.kind), Counter())
        sectors = stream.asked * stream.spread // 32
        sums.update(bytes=stream.asked, sectors=sectors)
    wrong = []
    for where, bytes_and_sectors in said.items():
        got = found.pop(where, Counter())
        if got != bytes_and_sectors:
            wrong.append(f"{where}: {dict(got)} and not {dict(bytes_and_sectors)}")
    names = kernel.__code__.co_varnames
    arrays = dict(zip(names, args, strict=False))
    small = {array for array, _ in found}
    if sum(arrays[name].nbytes for name in small) != job.words:
        wrong.append(f"{sorted(small)} are not {job.words} bytes")
    return wrong


@each_dtype
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_asks_for_the_bytes_of_its_job(name: str, dtype: str) -> None:
    kernel, grid, block, args, job = cases(dtype)[name]
    assert says_otherwise(job, kernel, grid, block, args) == []


def reads_x_again(x, y, n):
    i = 8 * cuda.threadIdx.x
    eight = cuda.local.array(8, np.float32)
    intrinsics.load8(x, i, eight, 0)
    intrinsics.load8(x, i, eight, 0)
    intrinsics.store8(y, i, eight, 0)


def leaves_gaps(x, y, n):
    i = cuda.threadIdx.x
    y[i] = x[2 * i % n]


def test_bytes_and_sectors_too_many_are_seen() -> None:
    """The check fails for a kernel that reads twice, and for one that strides."""
    x, y = ones("bfloat16", 256), ones("bfloat16", 256)
    copy = Job(
        (work.Stream("x", "read", 512, 512), work.Stream("y", "write", 512, 512)), 0
    )
    (wrong,) = says_otherwise(copy, reads_x_again, 1, 32, (x, y, 256))
    assert "'bytes': 1024" in wrong and "'x', 'read'" in wrong
    (wrong,) = says_otherwise(copy, leaves_gaps, 1, 256, (x, y, 256))
    assert "'sectors': 32" in wrong and "'x', 'read'" in wrong


@each_dtype
def test_memory_need_bring_each_byte_once(dtype: str) -> None:
    """A job's bytes are the arrays themselves, twice what is changed in its place."""
    for name, (*_, args, job) in cases(dtype).items():
        arrays = [a for a in args if isinstance(a, np.ndarray)]
        in_place = name.startswith(("rope", "cross_entropy_backward"))
        total = sum(a.nbytes for a in arrays) + in_place * arrays[0].nbytes
        assert job.bytes == total, name


def test_one_pass_saves_the_reading_of_the_sum() -> None:
    apart = work.add(8192, 2).bytes + work.rmsnorm(8, 1024, 2).bytes
    assert apart - work.add_rmsnorm(8, 1024, 2).bytes == 8192 * 2


# --- operations: counted while the kernels run --------------------------------------

DONE: Counter = Counter()


class Counted(np.float32):
    """A float32 that counts what is done with it; NumPy's own come to it too."""

    def __gt__(self, other):
        DONE["operations"] += 1
        return np.float32.__gt__(self, other)

    __lt__ = None  # max() asks for __gt__ alone

    def __neg__(self):
        return Counted(np.float32.__neg__(self))  # free


def counting(name: str):
    own = getattr(np.float32, name)

    def operation(self, other):
        DONE["operations"] += 1
        return Counted(own(np.float32(self), np.float32(other)))

    return operation


for _name in ("add", "sub", "mul"):
    for _side in ("__{}__", "__r{}__"):
        setattr(Counted, _side.format(_name), counting(_side.format(_name)))


def special(function):
    def counted(x):
        DONE["special"] += 1
        return Counted(function(np.float32(x)))

    return counted


class Kept(list):
    """A thread's local array of numbers that count."""

    def __setitem__(self, i, value):
        super().__setitem__(i, Counted(value))


@pytest.fixture
def counted(monkeypatch) -> None:
    """The kernels, on numbers that count."""
    load = intrinsics.load1
    monkeypatch.setattr(plain, "load1", lambda a, i: Counted(load(a, i)))
    for name in ("exp2", "reciprocal"):
        counting = special(getattr(intrinsics, name))
        monkeypatch.setattr(plain, name, counting)
        monkeypatch.setattr(fast, name, counting, raising=False)
    local = SimpleNamespace(array=lambda size, _: Kept([Counted(0)] * size))
    monkeypatch.setattr(fast, "cuda", OtherLocal(local))


class OtherLocal:
    """The simulator's cuda, but for its local arrays."""

    def __init__(self, local: SimpleNamespace) -> None:
        self.local = local

    def __getattr__(self, name: str):
        return getattr(cuda, name)


COUNTED = [name for name in NAMES if not name.startswith("rope")]


def operations(name: str, width: int, monkeypatch) -> tuple[Counter, Job]:
    monkeypatch.setattr(f"{__name__}.WIDTH", width)
    kernel, grid, block, args, job = cases("float32")[name]
    DONE.clear()
    launch(kernel, grid, block, *args)
    return Counter(DONE), job


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("name", COUNTED)
def test_operations_of_a_number(name: str, monkeypatch) -> None:
    """Between two widths, so that what a row does once falls out."""
    (short, job), (long, longer) = (
        operations(name, width, monkeypatch) for width in (256, 768)
    )
    grown = {what: long[what] - short[what] for what in ("operations", "special")}
    assert grown["operations"] == longer.operations - job.operations
    assert grown["special"] == longer.special - job.special
    assert grown["operations"] > 0


@pytest.mark.usefixtures("counted")
def test_operations_of_a_pair() -> None:
    kernel, grid, block, args, job = cases("float32")["rope_plain"]
    DONE.clear()
    launch(kernel, grid, block, *args)
    signs = TOKENS * HEADS * ROTARY // 2  # times the sine, before numbers are loaded
    assert DONE["operations"] + signs == job.operations
