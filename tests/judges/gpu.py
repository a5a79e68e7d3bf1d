"""Chapter 10: judges of the kernels.

Plain NumPy in float64 for what they compute. Three orders of the threads, which must
have the same bits, and guards around every array. What a kernel asks of memory is held
against floors that follow from the shapes, and from 8 numbers to a sector.
"""

from collections.abc import Callable

import numpy as np
from numpy import float32

from minidsv3.gpu.simulator import Stats, cuda, launch

from ..judging import Rng, sizes

GUARD = 64  # numbers on either side, whole sectors of them
TOLERANCE = 2.0**-20  # of what is added up: sixteen roundings of a float32


def unwritten(size: int) -> np.ndarray:
    """An output: full of NaN, as no input is."""
    return np.full(size, np.nan, float32)


def framed(array: np.ndarray) -> np.ndarray:
    """A copy between guards, as float32."""
    return np.pad(array.astype(float32), GUARD, constant_values=np.nan)


def run(
    kernel: Callable, rng: Rng, grid: int | tuple, block: int | tuple, *args
) -> tuple[list[np.ndarray], Stats]:
    """What was written, the same in three orders, and what the first one counted."""
    everything, counted = [], None
    for order in ("rising", "falling", int(rng.integers(1000))):
        frames = [framed(a) if isinstance(a, np.ndarray) else a for a in args]
        given = [f[GUARD:-GUARD] if isinstance(f, np.ndarray) else f for f in frames]
        stats = launch(kernel, grid, block, *given, order=order, count=counted is None)
        counted = counted or stats
        results = []
        for frame, now, before in zip(frames, given, args, strict=True):
            if not isinstance(before, np.ndarray):
                continue
            assert np.isnan(frame[:GUARD]).all() and np.isnan(frame[-GUARD:]).all()
            if np.isnan(before).all():
                results.append(now)
            else:
                assert now.tobytes() == before.astype(float32).tobytes()
        everything.append(results)
    for others in everything[1:]:
        for one, other in zip(everything[0], others, strict=True):
            assert one.tobytes() == other.tobytes(), "the order of the threads shows"
    return everything[0], counted


def asked(stats: Stats, what: str, space: str, array: str = "", kind: str = "") -> int:
    """What all instructions together asked of one array, or of all."""
    return sum(
        getattr(access, what)
        for access in stats.accesses
        if access.space == space
        and access.array == (array or access.array)
        and access.kind == (kind or access.kind)
    )


def near(ours: np.ndarray, exact: np.ndarray, scale: np.ndarray) -> None:
    """Within the tolerance of a scale, number by number; NaN is not."""
    assert ours.shape == exact.shape
    off = np.abs(ours - exact) / scale
    assert (off <= TOLERANCE).all(), f"{off.max():.1e} of what is added up"


def numbers(rng: Rng, *shape: int, scale: float = 1.0) -> np.ndarray:
    """Normal ones that a float32 holds, in float64."""
    return rng.normal(0, scale, shape).astype(float32).astype(float)


def sectors_row_by_row(rows: int, columns: int) -> int:
    """Of a matrix, if 32 lanes side by side take pieces of its rows, each once."""
    total = 0
    for row in range(rows):
        for column in range(0, columns, 32):
            first = row * columns + column
            last = row * columns + min(column + 32, columns) - 1
            total += last // 8 - first // 8 + 1
    return total


# --- one number a lane ------------------------------------------------------------


def axpy(f: Callable, rng: Rng) -> None:
    """Fewer threads than numbers, more, none to do; whole warps, and pieces of them."""
    grid, warps, rounds = sizes(rng, 3, low=2, high=4)
    behind, extra = sizes(rng, 2, low=1, high=32)
    odd = 32 * warps - extra  # threads
    for block, n in (
        (32 * warps, rounds * grid * 32 * warps + extra),
        (32 * warps, extra),
        (odd, rounds * grid * odd + extra),
        (odd, 0),
    ):
        a, x, y = float32(rng.normal()), *numbers(rng, 2, n + behind)
        (z,), stats = run(f, rng, grid, block, a, x, y, unwritten(n + behind), n)
        near(z[:n], a * x[:n] + y[:n], np.abs(a * x[:n]) + np.abs(y[:n]))
        assert np.isnan(z[n:]).all()
        if block % 32 == 0:
            for array, kind in (("x", "read"), ("y", "read"), ("z", "write")):
                assert asked(stats, "sectors", "global", array, kind) <= -(-n // 8)


def transpose(f: Callable, rng: Rng) -> None:
    """Number by number; wider than high in whole sectors, and higher than wide."""
    high, narrow = int(rng.integers(33, 48)), int(rng.integers(18, 32))
    for rows, columns in ((24, 8 * int(rng.integers(5, 8))), (high, narrow)):
        x, grid = numbers(rng, rows * columns), (-(-columns // 32), -(-rows // 32))
        (y,), stats = run(
            f, rng, grid, (32, 8), x, unwritten(rows * columns), rows, columns
        )
        for row in range(rows):
            for column in range(columns):
                assert y[column * rows + row] == x[row * columns + column]
        read = asked(stats, "sectors", "global", "x", "read")
        written = asked(stats, "sectors", "global", "y", "write")
        assert read <= sectors_row_by_row(rows, columns)
        assert written <= sectors_row_by_row(columns, rows)
        assert asked(stats, "conflicts", "shared") == 0


# --- a block or a warp together ---------------------------------------------------


def all_of_them(total: Callable) -> Callable:
    """A kernel in which each thread says what it was told, twice in a row."""

    def kernel(x, told):
        scratch = cuda.shared.array(256, float32)
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        value = x[thread]
        for turn in range(2):
            told[turn * threads + thread] = total(value, scratch)
            value = -value - value

    return kernel


def statistics(f: Callable, rng: Rng) -> None:
    """Every thread's sums; then mean and variance. Fewer passes than threads."""
    total = f.__globals__["total"]
    few, some = int(rng.integers(3, 32)), int(rng.integers(65, 128))
    for threads in (1, few, some, 256):
        x = numbers(rng, threads)
        (told,), stats = run(
            all_of_them(total), rng, 1, threads, x, unwritten(2 * threads)
        )
        for turn, factor in enumerate((1, -2)):
            mine = told[turn * threads : (turn + 1) * threads]
            exact = np.full(threads, factor * x.sum())
            near(mine, exact, np.full(threads, abs(factor) * np.abs(x).sum()))
        # Each warp lays down and reads once, and in each round reads two and writes.
        rounds, warps = len(f"{threads - 1:b}"), -(-threads // 32)
        if threads > 64:
            most = 2 * warps * (2 + 3 * rounds)
            assert asked(stats, "passes", "shared") <= most < 2 * threads
    rows, threads = int(rng.integers(2, 4)), some
    width = threads + int(rng.integers(1, threads))
    x = numbers(rng, rows, width) + rng.normal()
    x = x.astype(float32).astype(float)
    (mean, variance), _ = run(
        f, rng, rows, threads, x.ravel(), unwritten(rows), unwritten(rows), width
    )
    near(mean, x.mean(axis=1), np.abs(x).mean(axis=1))
    near(variance, x.var(axis=1), (x**2).mean(axis=1))


def rows_of_logits(rng: Rng) -> list[np.ndarray]:
    """Ordinary ones, far below zero, far above, and hardly any."""
    short, long = int(rng.integers(2, 32)), int(rng.integers(34, 100))
    mild = numbers(rng, 3, short, scale=3)
    below = np.float32(numbers(rng, 4, long, scale=9) - 2000)
    above = np.float32(np.sort(numbers(rng, 2, long, scale=9)) + 900)
    falling = np.ascontiguousarray(above[:1, ::-1])
    holes = numbers(rng, 3, long)
    here = rng.integers(long, size=3)
    for row, place in zip(holes, here, strict=True):
        row[(rng.random(long) < 0.6) & (np.arange(long) != place)] = -np.inf
    holes[1, np.arange(long) != here[1]] = -np.inf
    lowest = np.float32(-1e32 * (1 + rng.random((2, short))))
    return [mild, below, above, falling, holes, lowest, numbers(rng, 2, 1)]


def log_sum_exp(f: Callable, rng: Rng) -> None:
    """The largest number to the bit; x once, shared memory never."""
    for x in rows_of_logits(rng):
        x, (rows, width) = x.astype(float), x.shape
        warps, spare = int(rng.integers(1, 4)), int(rng.integers(2))
        grid = -(-rows // warps) + spare
        (m, l), stats = run(  # noqa: E741  the name of the formula
            f, rng, grid, 32 * warps, x.ravel(), unwritten(rows), unwritten(rows),
            rows, width,
        )  # fmt: skip
        assert m.tolist() == [max(row) for row in x.tolist()]
        exact = np.logaddexp.reduce(x, axis=1)
        near(l, exact, 1 + np.abs(exact))
        assert asked(stats, "bytes", "global", "x", "read") <= 4 * rows * width
        read = asked(stats, "sectors", "global", "x", "read")
        assert read <= sectors_row_by_row(rows, width)
        assert asked(stats, "passes", "shared") == 0


def add_rmsnorm(f: Callable, rng: Rng) -> None:
    """Row by row; rows longer than the block and shorter, an eps that shows."""
    for longer in (True, False):
        threads, rows = 32 * int(rng.integers(1, 4)), int(rng.integers(2, 4))
        rest = int(rng.integers(1, threads))
        width = int(rng.integers(1, 3)) * threads + rest if longer else rest
        size = 10.0 ** rng.uniform(-3, 2)
        eps = float32(size**2 * rng.uniform(0.1, 0.9))
        x, residual = numbers(rng, 2, rows, width, scale=size)
        g = numbers(rng, width)
        flat, empty = (x.ravel(), residual.ravel()), unwritten(rows * width)
        (total, y), stats = run(
            f, rng, rows, threads, *flat, g, empty, empty.copy(), width, eps
        )
        together = (x + residual).ravel()
        near(total, together, np.abs(x).ravel() + np.abs(residual).ravel())
        for row in range(rows):
            here = slice(row * width, (row + 1) * width)
            t = together[here]
            root = (t @ t / width + float(eps)) ** 0.5
            parts = np.abs(x[row]) + np.abs(residual[row])
            near(y[here], g * t / root, np.abs(g) * parts / root)
        for array in ("x", "residual"):
            found = asked(stats, "bytes", "global", array, "read")
            assert found <= 4 * rows * width
            found = asked(stats, "sectors", "global", array, "read")
            assert found <= sectors_row_by_row(rows, width)


def gain_gradient(f: Callable, rng: Rng) -> None:
    """Row after row, as its definition says; several blocks, and a piece of one."""
    few, many = int(rng.integers(2, 8)), int(rng.integers(17, 36))
    narrow, wide = int(rng.integers(2, 32)), int(rng.integers(33, 64))
    for rows, width in ((few, narrow), (many, wide)):
        dy, x = numbers(rng, 2, rows, width)
        r = np.abs(numbers(rng, rows)) + 0.25
        r = r.astype(float32).astype(float)
        (dg,), stats = run(
            f, rng, -(-width // 32), (32, 8), dy.ravel(), x.ravel(), r,
            unwritten(width), rows, width,
        )  # fmt: skip
        exact, scale = np.zeros(width), np.zeros(width)
        for n in range(rows):
            exact += dy[n] * x[n] * r[n]
            scale += np.abs(dy[n] * x[n] * r[n])
        near(dg, exact, scale)
        for array in ("dy", "x"):
            read = asked(stats, "sectors", "global", array, "read")
            assert read <= sectors_row_by_row(rows, width)


JUDGES: dict[str, Callable[[Callable, Rng], None]] = {
    "gpu.cuda.1": axpy,
    "gpu.cuda.2": transpose,
    "gpu.cuda.3": statistics,
    "gpu.cuda.4": log_sum_exp,
    "gpu.cuda.5": add_rmsnorm,
    "gpu.cuda.6": gain_gradient,
}
