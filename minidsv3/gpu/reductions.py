"""One number out of many threads: sums and maxima over a warp and over a block.

Device functions, to be called by all threads of a block whose size is a multiple of 32.
The order of additions is fixed, so a result is the same at every run.
"""

from typing import Any

from numpy import float32, uint32

from minidsv3.gpu.dialect import cuda

FULL_MASK = 0xFFFFFFFF
LOWEST = float32(-3.4028235e38)
"""Where a maximum begins: finite, for -inf - (-inf) would be no number."""


def warp_sum(x: float32) -> float32:
    """The sum over the 32 lanes, in every lane: five exchanges, no memory."""
    for distance in (16, 8, 4, 2, 1):
        x += cuda.shfl_xor_sync(FULL_MASK, x, distance)
    return x


def warp_max(x: float32) -> float32:
    """The largest over the 32 lanes, in every lane."""
    for distance in (16, 8, 4, 2, 1):
        x = max(x, cuda.shfl_xor_sync(FULL_MASK, x, distance))
    return x


def block_sum(x: float32, scratch: Any) -> float32:
    """The sum over the block, in every thread. scratch: 32 float32, shared.

    Each warp leaves its sum, and every thread adds those up itself: all lanes read the
    same word at once, which costs one access. Scratch may be used again at once.
    """
    thread = uint32(cuda.threadIdx.x)
    x = warp_sum(x)
    if thread & uint32(31) == uint32(0):
        scratch[thread >> uint32(5)] = x
    cuda.syncthreads()
    total = float32(0)
    for warp in range(uint32(cuda.blockDim.x) >> uint32(5)):
        total += scratch[warp]
    cuda.syncthreads()
    return total


def block_max(x: float32, scratch: Any) -> float32:
    """The largest over the block, in every thread; as `block_sum`."""
    thread = uint32(cuda.threadIdx.x)
    x = warp_max(x)
    if thread & uint32(31) == uint32(0):
        scratch[thread >> uint32(5)] = x
    cuda.syncthreads()
    largest = LOWEST
    for warp in range(uint32(cuda.blockDim.x) >> uint32(5)):
        largest = max(largest, scratch[warp])
    cuda.syncthreads()
    return largest
