"""The ``cuda`` object: what a kernel may say, as Numba spells it."""

import dis
import operator
from collections.abc import Callable
from functools import lru_cache
from math import prod
from types import CodeType
from typing import Any, NoReturn

import numpy as np

from minidsv3.gpu.memory import CheckedArray
from minidsv3.gpu.races import Memory
from minidsv3.gpu.reports import (
    DivergenceError,
    SimulatorError,
    kernel_frame,
    place_of,
    report,
)
from minidsv3.gpu.threads import Block, Dim3, current
from minidsv3.gpu.warps import FULL_MASK, WARP_SIZE

MOST_SHARED = 227 * 1024
"""Bytes of a block (CUDA C++ Programming Guide, Compute Capability 9.0)."""
Shape = int | tuple[int, ...]
Number = int | float | np.number


def warp_operation(op: str, mask: int, *operands: Any) -> Any:
    """Take part in an operation of `warps.WARP_OPS`, and return this lane's answer.

    mask has a bit for each lane that takes part. Raises DivergenceError for a lane that
    is not in its own mask, or if not all of them come to this line.
    """
    thread, mask = current(), int(mask) & FULL_MASK
    if not mask >> thread.lane & 1:
        raise report(
            DivergenceError,
            thread,
            f"lane {thread.lane} calls cuda.{op}() with the mask {mask:#010x}, "
            "which does not name it.",
            "Bit i of a mask is lane i, and the calling lane must be among them.",
        )
    return thread.warp_operation(op, mask, operands)


# --- arrays of a block and of a thread ----------------------------------------------


class _Shared:
    """``cuda.shared``: memory that the threads of a block share."""

    def array(
        self, shape: Shape, dtype: Any, alignment: int | None = None
    ) -> CheckedArray:
        """This line's array, one for the whole block. Undefined until written.

        Shape 0 means the dynamic shared memory: all the bytes that the launch asked
        for, the same ones at every call, seen as a one-dimensional array. The array
        begins at a multiple of ``alignment`` bytes, and without it of its dtype's size:
        accesses of 16 bytes need 16.
        """
        block, frame = current().block, kernel_frame()
        shape, dtype = _shape(shape), _dtype(dtype)
        site = (frame.f_code, frame.f_lasti)
        array = block.shared.get(site)
        if array is None:
            make = _dynamic if shape == (0,) else _poisoned
            data, memory = make(block, shape, dtype)
            promised = _alignment(alignment, dtype)
            memory.alignment = max(memory.alignment, promised)
            make = block.launch.array
            array = block.shared[site] = make(data, _variable(site), memory)
        if array.dtype != dtype or shape not in ((0,), array.shape):
            _refuse(
                f"asks here for {shape} of {dtype}, and another thread did for "
                f"{array.shape} of {array.dtype}.",
                "It is one array for the whole block: its shape is a constant.",
            )
        return array


class _Local:
    """``cuda.local``: a thread's own arrays, in registers if the compiler can."""

    def array(
        self, shape: Shape, dtype: Any, alignment: int | None = None
    ) -> CheckedArray:
        """An array that only this thread sees. Undefined until written."""
        block, frame = current().block, kernel_frame()
        name = _variable((frame.f_code, frame.f_lasti), "local")
        data, memory = _poisoned(block, _shape(shape), _dtype(dtype), "local")
        return block.launch.array(data, name, memory)


def _refuse(what: str, advice: str) -> NoReturn:
    raise report(SimulatorError, current(), what, advice)


def _shape(shape: Shape) -> tuple[int, ...]:
    """A shape as a tuple. Zero is good for dynamic shared memory alone."""
    lengths = shape if isinstance(shape, tuple) else (shape,)
    whole = all(isinstance(n, int | np.integer) for n in lengths) and lengths != ()
    if not whole or (min(lengths) < 1 and lengths != (0,)):
        advice = "A shape is one positive integer, or a tuple of them."
        _refuse(f"asks for an array of shape {shape!r}.", advice)
    return lengths


def _alignment(alignment: int | None, dtype: np.dtype) -> int:
    """What an array's beginning is a multiple of, in bytes, by Numba's rules."""
    if alignment is None:
        return dtype.itemsize
    whole = isinstance(alignment, int) and alignment > 0
    if not whole or alignment % 8 or alignment & (alignment - 1):
        advice = "It is a power of two, 8 or more, like 16."
        _refuse(f"asks for an array with alignment={alignment!r}.", advice)
    return alignment


def _dtype(dtype: Any) -> np.dtype:
    """The NumPy dtype of a NumPy or Numba type: Numba's print as their NumPy names."""
    known = isinstance(dtype, str | type | np.dtype)
    try:
        return np.dtype(dtype if known else str(dtype))
    except TypeError:
        advice = "Give a NumPy dtype like np.float32, or Numba's float32."
        _refuse(f"asks for an array of {dtype!r}, which is no dtype.", advice)


def _poisoned(
    block: Block, shape: tuple[int, ...], dtype: np.dtype, space: str = "shared"
) -> tuple[np.ndarray, Memory]:
    """Memory full of ones in every bit: NaN in floats, -1 in integers."""
    if space == "shared":
        block.shared_bytes += prod(shape) * dtype.itemsize
        if block.shared_bytes > MOST_SHARED:
            _refuse(
                f"asks for {block.shared_bytes} bytes of shared memory together.",
                f"A block has at most {MOST_SHARED} on an H100, fewer elsewhere.",
            )
    poison = bytearray(b"\xff" * (prod(shape) * dtype.itemsize))
    data = np.frombuffer(poison, dtype).reshape(shape)
    return data, Memory(space, block.launch.traffic[space], data)


def _dynamic(
    block: Block, shape: tuple[int, ...], dtype: np.dtype
) -> tuple[np.ndarray, Memory]:
    """The block's dynamic shared memory as an array of dtype."""
    size = block.launch.dynamic_shared
    if size < dtype.itemsize:
        _refuse(
            f"asks for dynamic shared memory, of which the launch gave {size} bytes.",
            "Say how many bytes: launch(..., dynamic_shared=4 * n).",
        )
    if "dynamic" not in block.shared:
        block.shared["dynamic"] = _poisoned(block, (size,), np.dtype(np.uint8))
    data, memory = block.shared["dynamic"]
    return data[: size - size % dtype.itemsize].view(dtype), memory


@lru_cache
def _variable(site: tuple[CodeType, int], space: str = "shared") -> str:
    """The variable that a call's value goes to at once, else where the call stands."""
    code, call = site
    then = next(step for step in dis.get_instructions(code) if step.offset > call)
    if then.opname.startswith("STORE_"):  # two steps in one have two names
        return then.argval[0] if isinstance(then.argval, tuple) else then.argval
    return f"{space} array of line {place_of(code, call).line}"


# --- atomics ------------------------------------------------------------------------

ATOMICS: dict[str, Callable[[Number, Number], Number]] = {
    "add": lambda old, value: old + value,
    "sub": lambda old, value: old - value,
    "max": lambda old, value: max(old, value),
    "min": lambda old, value: min(old, value),
    "exch": lambda old, value: value,
    "and_": lambda old, value: old & value,
    "or_": lambda old, value: old | value,
    "xor": lambda old, value: old ^ value,
    "inc": lambda old, value: old + 1 if old < value else 0,
    "dec": lambda old, value: old - 1 if 0 < old <= value else value,
}


class _Atomic:
    """``cuda.atomic``: read, change and write in one step that nobody can split.

    Those of `ATOMICS` are called as ``add(array, index, value)``. All return the value
    that was there before.
    """

    def __getattr__(self, name: str) -> Callable[..., Number]:
        if name not in ATOMICS:
            raise AttributeError(
                f"no cuda.atomic.{name}; there are {', '.join(ATOMICS)}"
            )
        return lambda array, index, value: self._update(
            array, index, lambda old: ATOMICS[name](old, _converted(value, array))
        )

    def cas(
        self, array: CheckedArray, index: Any, old: Number, value: Number
    ) -> Number:
        """Store value if the element equals old."""
        before = _converted(old, array)
        return self._update(array, index, lambda now: value if now == before else now)

    def compare_and_swap(
        self, array: CheckedArray, old: Number, value: Number
    ) -> Number:
        """`cas` on the first element."""
        return self.cas(array, 0, old, value)

    def _update(self, array: Any, index: Any, change: Callable) -> Number:
        if not isinstance(array, CheckedArray):
            raise TypeError(f"cuda.atomic changes an array, not {array!r}")
        return array.update(index, change)


def _converted(value: Any, array: CheckedArray) -> Number:
    return np.array(value).astype(array.dtype)[()]


# --- the object ---------------------------------------------------------------------


def _distance(n: Any) -> int:
    """How far a shuffle reads: 0 … 31, of anything else a GPU takes the lowest bits."""
    if not 0 <= n < WARP_SIZE:
        _refuse(f"shuffles over a distance of {n}.", "A warp has 32 lanes: 0 … 31.")
    return n


def _bits(x: Number) -> tuple[int, int]:
    """A number's bits, and how many there are: 32 for Python's own integers."""
    width = 8 * getattr(x, "itemsize", 4)
    return int(x) & ((1 << width) - 1), width


class Cuda:
    """Numba's ``cuda`` as far as a kernel uses it, for the thread that runs."""

    shared, local, atomic = _Shared(), _Local(), _Atomic()
    warpsize = WARP_SIZE

    @property
    def threadIdx(self) -> Dim3:
        """This thread's index in its block."""
        return current().index

    @property
    def blockIdx(self) -> Dim3:
        """This block's index in the grid."""
        return current().block.index

    @property
    def blockDim(self) -> Dim3:
        """How many threads a block has."""
        return current().block.launch.block

    @property
    def gridDim(self) -> Dim3:
        """How many blocks the grid has."""
        return current().block.launch.grid

    @property
    def laneid(self) -> int:
        """This thread's lane in its warp, 0 … 31."""
        return current().lane

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"the simulator has no cuda.{name}")

    def grid(self, ndim: int) -> int | tuple[int, ...]:
        """The thread's index in the whole grid, along ndim = 1, 2 or 3 axes."""
        if ndim == 1:  # what most kernels begin with
            thread = current()
            block = thread.block
            return block.index[0] * block.launch.block[0] + thread.index[0]
        return _axes(
            ndim,
            (
                block * size + thread
                for block, size, thread in zip(
                    self.blockIdx, self.blockDim, self.threadIdx, strict=True
                )
            ),
        )

    def gridsize(self, ndim: int) -> int | tuple[int, ...]:
        """How many threads the whole grid has along ndim = 1, 2 or 3 axes."""
        return _axes(ndim, map(operator.mul, self.gridDim, self.blockDim))

    def syncthreads(self) -> None:
        """Wait for all threads of the block; see from then on what they did before."""
        current().barrier()

    def syncwarp(self, mask: int = FULL_MASK) -> None:
        """Wait for the lanes in the mask; see from then on what they did before."""
        warp_operation("syncwarp", mask)

    def shfl_sync(self, mask: int, value: Any, source: int) -> Any:
        """The value of lane ``source``."""
        return warp_operation("shfl_sync", mask, value, source)

    def shfl_xor_sync(self, mask: int, value: Any, bits: int) -> Any:
        """The value of lane ``own ^ bits``."""
        return warp_operation("shfl_xor_sync", mask, value, _distance(bits))

    def shfl_up_sync(self, mask: int, value: Any, delta: int) -> Any:
        """The value of lane ``own - delta``; one's own in the first delta lanes."""
        return warp_operation("shfl_up_sync", mask, value, _distance(delta))

    def shfl_down_sync(self, mask: int, value: Any, delta: int) -> Any:
        """The value of lane ``own + delta``; one's own in the last delta lanes."""
        return warp_operation("shfl_down_sync", mask, value, _distance(delta))

    def ballot_sync(self, mask: int, predicate: Any) -> int:
        """A mask of the lanes whose predicate is true."""
        return warp_operation("ballot_sync", mask, predicate)

    def any_sync(self, mask: int, predicate: Any) -> bool:
        """Whether the predicate is true in any lane."""
        return warp_operation("any_sync", mask, predicate)

    def all_sync(self, mask: int, predicate: Any) -> bool:
        """Whether the predicate is true in all lanes."""
        return warp_operation("all_sync", mask, predicate)

    def threadfence(self) -> None:
        """Order this thread's writes for others to see. It waits for nobody.

        Here it does nothing, and so a flag that says "written" after a fence, though
        right on a GPU, is reported as the race that it is without.
        """

    def threadfence_block(self) -> None:
        """`threadfence` towards the threads of the block."""

    def popc(self, x: Number) -> int:
        """How many bits are set."""
        return _bits(x)[0].bit_count()

    def ffs(self, x: Number) -> int:
        """The lowest bit that is set, counted from 1; 0 if none is."""
        bits, _ = _bits(x)
        return (bits & -bits).bit_length()

    def clz(self, x: Number) -> int:
        """How many zeros stand before the highest bit that is set."""
        bits, width = _bits(x)
        return width - bits.bit_length()

    def fma(self, a: Number, b: Number, c: Number) -> Number:
        """``a * b + c``; a GPU rounds once, and here it is rounded twice."""
        return a * b + c

    def selp(self, condition: bool, a: Any, b: Any) -> Any:
        """a if the condition is true, else b; both are computed."""
        return a if condition else b


def _axes(ndim: int, values: Any) -> int | tuple[int, ...]:
    """The first ndim values: as a number if it is one, else as a tuple."""
    if ndim not in (1, 2, 3):
        raise ValueError(f"a grid has 1, 2 or 3 axes, not {ndim!r}")
    first = tuple(values)[:ndim]
    return first[0] if ndim == 1 else first


cuda = Cuda()
