"""Kernels that do nothing but reduce, and what must come of them.

Each reduces twice with the same shared memory, one right after the other: a thread
that is ahead would overwrite what a slow one has not read.
"""

import numpy as np
from numpy import float32, uint32

from minidsv3.gpu.dialect import cuda
from minidsv3.gpu.reductions import block_max, block_sum, warp_max, warp_sum
from minidsv3.primitives.plain_cuda_kernels import tree_max, tree_sum
from tests.kernel_jobs import F32, KERNELS, PLAIN_THREADS, Job, U, blank, draw, encoded


def over_warps(x, sums, maxima, other_sums):
    i = uint32(cuda.grid(1))
    sums[i] = warp_sum(x[i])
    maxima[i] = warp_max(x[i])
    other_sums[i] = warp_sum(-x[i])


def over_blocks(x, sums, maxima, other_sums):
    scratch = cuda.shared.array(32, float32)
    i = uint32(cuda.grid(1))
    sums[i] = block_sum(x[i], scratch)
    maxima[i] = block_max(x[i], scratch)
    other_sums[i] = block_sum(-x[i], scratch)


def over_trees(x, sums, maxima, other_sums):
    scratch = cuda.shared.array(PLAIN_THREADS, float32)
    i = uint32(cuda.grid(1))
    sums[i] = tree_sum(x[i], scratch)
    maxima[i] = tree_max(x[i], scratch)
    other_sums[i] = tree_sum(-x[i], scratch)


REDUCTIONS = {k.__name__: k for k in (over_warps, over_blocks, over_trees)}
SCOPE = {**KERNELS, **REDUCTIONS}


def reductions(kernel: str, blocks: int, threads: int, shift: float = 0) -> Job:
    """Numbers around ``shift``, reduced over 32 or over the block, in all threads."""
    x = draw(blocks * threads) + shift
    x = encoded(x, F32).astype(np.float64)
    each = 32 if kernel == "over_warps" else threads
    groups = x.reshape(-1, each)
    sums, maxima, sizes = (
        np.repeat(of, each) for of in (groups.sum(1), groups.max(1), abs(groups).sum(1))
    )
    error = sizes * (10 + threads // 32) * U
    exact = {"sums": sums, "maxima": maxima, "other_sums": -sums}
    return Job(
        f"{blocks} of {threads} around {shift}",
        kernel,
        blocks,
        threads,
        {"x": encoded(x, F32)} | {name: blank(x.size, F32) for name in exact},
        (),
        exact,
        {"sums": error, "maxima": 0 * error, "other_sums": error},
    )


def reduction_cases() -> list[Job]:
    """Blocks of one warp to 32, and numbers all on one side of zero."""
    found = [reductions("over_trees", 2, PLAIN_THREADS, shift) for shift in (0, -9)]
    found += [reductions("over_warps", 2, 96, shift) for shift in (0, -9)]
    shifts = {32: 0, 64: -9, 96: 0, 256: -9, 992: 9, 1024: 0}
    for threads, shift in shifts.items():
        found.append(reductions("over_blocks", 1 + (threads < 512), threads, shift))
    return found
