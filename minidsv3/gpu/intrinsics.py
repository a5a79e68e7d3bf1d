"""What a kernel may say beyond ``cuda``: wide loads, bf16, tensor cores, copies.

A kernel calls these functions by name. In the simulator they are what stands here:
plain Python, with every access checked. The compiler replaces each by the machine's own
instruction, see `ptx`. Arrays are one-dimensional; an index counts elements.

Numbers in memory are float32, or bfloat16 kept as its bits in uint16: the upper half of
a float32. All arithmetic is in float32. The same kernel serves both, for `load8`,
`store8`, `load1` and `store1` look at the array's dtype.

`exp2`, `log2`, `rsqrt` and `reciprocal` take denormal numbers for zero and give none,
as a GPU's do; their last digits differ from a GPU's, which only approximates. Other
arithmetic keeps denormal numbers on both sides.
"""

from typing import Any

import ml_dtypes
import numpy as np
from numpy import float32, uint32

from minidsv3.gpu.copies import copies_of
from minidsv3.gpu.dialect import warp_operation
from minidsv3.gpu.threads import current
from minidsv3.gpu.warps import FULL_MASK

F32 = np.dtype(np.float32)
BF16_BITS = np.dtype(np.uint16)
LOG2_E = float32(1.4426950408889634)
"""log2(e): ``exp(x) = exp2(x * LOG2_E)``, and the hardware has only the right side."""

SMALLEST_NORMAL = float32(2.0**-126)

Words = tuple[uint32, uint32, uint32, uint32]


# --- bfloat16 -----------------------------------------------------------------------


def float_of(bits: Any) -> float32:
    """The float32 whose upper half is these 16 bits: what a bfloat16 means, exactly."""
    return np.uint32(int(bits) << 16).view(np.float32)


def bits_of(value: float32) -> np.uint16:
    """A float32 as bfloat16, rounded to nearest, ties to even (``cvt.rn.bf16.f32``)."""
    value = np.float32(value)
    if np.isnan(value):
        return np.uint16(0x7FFF)
    return value.astype(ml_dtypes.bfloat16).view(np.uint16)


def pack2(low: float32, high: float32) -> uint32:
    """Two float32 as bfloat16 in one word, low in the lower half."""
    return uint32(int(bits_of(high)) << 16 | int(bits_of(low)))


def low_of(word: uint32) -> float32:
    """The lower bfloat16 of a word."""
    return float_of(int(word) & 0xFFFF)


def high_of(word: uint32) -> float32:
    """The upper bfloat16 of a word."""
    return float_of(int(word) >> 16)


# --- elements, one at a time and 16 bytes at a time ---------------------------------


def load1(array: Any, i: int) -> float32:
    """Element i of an array of float32 or bfloat16 bits, as float32."""
    value = array[i]
    return value if array.dtype == F32 else float_of(value)


def store1(array: Any, i: int, value: float32) -> None:
    """Store a float32 as element i, rounded to the array's precision."""
    array[i] = value if array.dtype == F32 else bits_of(value)


def round_to(array: Any, value: float32) -> float32:
    """A float32 rounded as storing it into the array would round it."""
    return value if array.dtype == F32 else float_of(bits_of(value))


def load4(array: Any, i: int, into: Any, j: int) -> None:
    """Elements i … i+3, as float32, into ``into[j:j+4]``, a thread's local array.

    One load, of 16 bytes from float32 and 8 from bfloat16: i is a multiple of 4, in an
    array that begins at such a multiple of bytes.
    """
    values = array.read_vector(i, 4)
    for k in range(4):
        into[j + k] = values[k] if array.dtype == F32 else float_of(values[k])


def store4(array: Any, i: int, values: Any, j: int) -> None:
    """Store ``values[j:j+4]`` of a local array as elements i … i+3; see `load4`."""
    four = [values[j + k] for k in range(4)]
    array.write_vector(i, four if array.dtype == F32 else [bits_of(v) for v in four])


def load8(array: Any, i: int, into: Any, j: int) -> None:
    """Elements i … i+7, as float32, into ``into[j:j+8]``, a thread's local array.

    One load of 16 bytes from bfloat16, two from float32: i must be a multiple of 8, in
    an array that begins at a multiple of 16 bytes.
    """
    if array.dtype == F32:
        load4(array, i, into, j)
        load4(array, i + 4, into, j + 4)
        return
    for k, bits in enumerate(array.read_vector(i, 8)):
        into[j + k] = float_of(bits)


def store8(array: Any, i: int, values: Any, j: int) -> None:
    """Store ``values[j:j+8]`` of a local array as elements i … i+7; see `load8`."""
    if array.dtype == F32:
        store4(array, i, values, j)
        store4(array, i + 4, values, j + 4)
        return
    array.write_vector(i, [bits_of(values[j + k]) for k in range(8)])


# --- arithmetic ---------------------------------------------------------------------


def _flushed(x: Any) -> float32:
    """Zero for what is too small to be a normal float32: ``ftz``, flush to zero."""
    x = np.float32(x)
    return x * np.float32(0) if abs(x) < SMALLEST_NORMAL else x


def exp2(x: float32) -> float32:
    """2ˣ to within two units in the last place (``ex2.approx.ftz.f32``)."""
    exact = np.exp2(np.float64(_flushed(x)))  # NumPy's own in float32 is off by more
    return _flushed(exact)


def log2(x: float32) -> float32:
    """The logarithm to base 2, to within 2⁻²² (``lg2.approx.ftz.f32``); -inf of 0."""
    return np.log2(_flushed(x))


def rsqrt(x: float32) -> float32:
    """1/√x to within two units in the last place (``rsqrt.approx.ftz.f32``)."""
    return np.float32(1) / np.sqrt(_flushed(x))


def reciprocal(x: float32) -> float32:
    """1/x to within one unit in the last place (``rcp.approx.ftz.f32``)."""
    return _flushed(np.float32(1) / _flushed(x))


# --- tensor cores -------------------------------------------------------------------


def ldmatrix4(tile: Any, i: int) -> Words:
    """Four 8 × 8 matrices of bfloat16 from shared memory, spread over the warp.

    tile holds words (uint32) of two bfloat16. Lane l names by i the first of the four
    words of one row: lanes 0–7 the rows of the first matrix, 8–15 of the second, and so
    on. Afterwards lane l holds of each matrix the word with row l / 4 and columns
    2(l mod 4), 2(l mod 4) + 1. Source: PTX ISA, ``ldmatrix``.
    """
    return warp_operation("ldmatrix", FULL_MASK, tile.read_vector(i, 4))


def ldmatrix4_transposed(tile: Any, i: int) -> Words:
    """`ldmatrix4`, each matrix transposed: lane l holds of column l / 4 two rows."""
    return warp_operation("ldmatrix_transposed", FULL_MASK, tile.read_vector(i, 4))


def mma_bf16(
    c0: float32, c1: float32, c2: float32, c3: float32,
    a0: uint32, a1: uint32, a2: uint32, a3: uint32,
    b0: uint32, b1: uint32,
) -> tuple[float32, float32, float32, float32]:  # fmt: skip
    """``D = A B + C`` on the tensor cores: A 16 × 16, B 16 × 8, bfloat16; C, D float32.

    With g = lane / 4 and t = lane mod 4, a lane's words hold A[g, 2t:2t+2], A[g+8, …],
    A[g, 2t+8:2t+10], A[g+8, …], and B[2t:2t+2, g], B[2t+8:2t+10, g]; its floats
    C[g, 2t], C[g, 2t+1], C[g+8, 2t], C[g+8, 2t+1]. Source: PTX ISA,
    ``mma.sync.m16n8k16``.
    """
    return warp_operation(
        "mma_bf16", FULL_MASK, (c0, c1, c2, c3), (a0, a1, a2, a3), (b0, b1)
    )


# --- copies that do not wait --------------------------------------------------------


def copy_async16(tile: Any, i: int, source: Any, j: int) -> None:
    """Begin to copy 16 bytes of global memory, ``source[j:]``, to shared ``tile[i:]``.

    Both arrays have the same dtype; both addresses are multiples of 16 bytes. Nobody
    may touch the target before the copying thread has waited for its group
    (`wait_copies`) and a barrier has shown it to the others. Source: PTX ISA,
    ``cp.async.cg``.
    """
    copies_of(current()).begin(tile, i, source, j)


def commit_copies() -> None:
    """Close a group: the copies that this thread has begun since the last one."""
    copies_of(current()).commit()


def wait_copies(pending: int) -> None:
    """Wait until at most ``pending`` of this thread's groups are under way.

    pending is a constant. It orders nothing between threads: a barrier must follow.
    """
    copies_of(current()).wait(pending)
