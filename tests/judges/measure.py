"""Chapter 11: judges of the two functions on measuring.

A multiprocessor in four parts that takes in blocks until something runs out, and
timings that are made backwards from the line that is to be found.
"""

from collections.abc import Callable
from numbers import Integral

import numpy as np

from ..judging import Rng

# --- who fits in ------------------------------------------------------------------


def taken_in(threads: int, registers: int, shared: int) -> int:
    """Block by block, by the whole rules: four parts, 32 blocks, what is handed out.

    Each part has room for 16 warps and 64 units of 256 registers. Warps go to the parts
    in turn. Shared memory is 1824 lines of 128 bytes.
    """
    warps, units, lines, blocks = [16] * 4, [64] * 4, 1824, 0
    while blocks < 32:
        lines -= len(range(0, shared + 1024, 128))
        for number in range(threads // 32):
            warps[number % 4] -= 1
            units[number % 4] -= len(range(0, 32 * registers, 256))
        if min(*warps, *units, lines) < 0:
            break
        blocks += 1
    return blocks


def some_kernels(rng: Rng) -> list[tuple[int, int, int]]:
    """Of all kinds, and right at the edges: one register or one byte too many."""
    kernels = []
    for _ in range(60):
        threads = 128 * int(rng.integers(1, 9))
        registers = int(rng.integers(1, 256))
        few = int(rng.integers(1, 33))
        eights = 8 * int(rng.integers(1, 31))
        shared = int(rng.integers(0, 233_000))
        edge = 128 * (1824 // int(rng.integers(1, 17))) - 1024
        kernels += [
            (threads, registers, 0), (threads, few, 0), (128, few, shared),
            (threads, eights, 0), (threads, eights + 1, 0), (threads, few, edge),
            (128, few, edge), (128, few, edge + 1), (threads, registers, shared),
        ]  # fmt: skip
    return [*kernels, (1024, 255, 0), (128, 1, 232_449)]  # neither is ever taken in


def resident(f: Callable, rng: Rng) -> None:
    for kernel in some_kernels(rng):
        blocks, occupancy = f(*kernel)
        assert isinstance(blocks, Integral)
        assert blocks == taken_in(*kernel), kernel
        assert occupancy == blocks * kernel[0] / 2048, kernel


# --- one launch -------------------------------------------------------------------


def in_between(rng: Rng, n: np.ndarray, size: float) -> np.ndarray:
    """Distances that leave the line of least squares where it is, as large as size."""
    if len(n) == 2:
        return np.zeros(2)  # the line goes through both
    off, far = rng.normal(size=len(n)), n - n.mean()
    off -= off.mean()
    off -= far * (off @ far) / (far @ far)
    return off * size / np.abs(off).max()


def timings_about(rng: Rng, t: float, R: int, size: float) -> np.ndarray:
    """R timings whose middle is t: as many before as behind, which may be far off."""
    below, above = size * rng.random(R // 2), size * rng.exponential(9, R // 2)
    if R % 2:
        found = [t - below, [t], t + above]
    else:
        nearest = below.min() / 2  # two in the middle, each as far from t
        below[0] = above[0] = nearest
        above[1:] += nearest
        found = [t - below, t + above]
    return rng.permutation(np.concatenate(found))


def per_launch(f: Callable, rng: Rng) -> None:
    for K, R in ((2, 5), (3, 4), (5, 9), (7, 6), (4, 1)):
        b = 10.0 ** rng.uniform(-6, -3)
        a = b * rng.uniform(5, 40) * int(rng.integers(4) > 0)
        counts = rng.permutation(np.arange(1, 60))[:K]
        t = a + b * counts + in_between(rng, counts, 0.7 * b)
        seconds = np.stack([timings_about(rng, at, R, 0.2 * b) for at in t])
        share, bandwidth = rng.uniform(0.1, 1.4), 10.0 ** rng.uniform(11, 13)
        given = counts.copy(), seconds.copy()
        found = f(*given, share * b * bandwidth, bandwidth)
        assert np.array_equal(given[0], counts) and np.array_equal(given[1], seconds)
        off = np.abs(np.array(found) - [a, b, share])
        assert (off <= 1e-11 * np.array([t.max(), t.max(), 1])).all(), (K, R)


JUDGES: dict[str, Callable[[Callable, Rng], None]] = {
    "measure.1": resident,
    "measure.2": per_launch,
}
