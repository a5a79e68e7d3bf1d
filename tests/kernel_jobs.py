"""One launch of a kernel and what must come of it, to be run anywhere.

A `Job` has the arrays as the kernel takes them and the exact results in float64. Its
``check(run)`` launches by whatever ``run(kernel, grid, block, *args)`` does to flat
NumPy arrays: the simulator in some order, or a GPU and a copy back.

Around every array lie numbers that are none, with a payload of their own, and nobody
may touch one: read, they spoil the result, written, they have other bits. With room > 0
the kernel is handed some of them at the end of its arrays, where no check of bounds
helps it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from minidsv3.gpu import simulator
from minidsv3.primitives import fast_cuda_kernels as fast
from minidsv3.primitives import plain_cuda_kernels as plain

Array = np.ndarray
Run = Callable[..., Any]
F32, BF16 = "float32", "bfloat16"
PLAIN_THREADS = 128  # the plain kernels' contract with whoever launches them
ORDERS = ["rising", "falling", 7]
KERNELS = {**vars(plain), **vars(fast)}

NAN = float("nan")
U = 2.0**-24
"""The largest relative error of one rounding to float32."""
SMALLEST = 2.0**-126
"""What a GPU may flush to zero: nothing smaller is a normal float32."""
GUARD = 128
"""Elements before and after each array: at least the 256 bytes of an allocation, so
that the array begins as aligned as one."""
PER = {F32: 4, BF16: 8}
"""Numbers in the 16 bytes of a fast kernel's accesses."""
NOBODYS = {
    np.dtype(np.float32): np.uint32(0x7FC12345),
    np.dtype(np.uint16): np.uint16(0x7FC1),
    np.dtype(np.int64): np.uint64(0x7FC1234512345),
}


def encoded(values: Any, kind: str) -> Array:
    """Numbers as a kernel takes them: float32, or the 16 bits of bfloat16; flat."""
    flat = np.ravel(np.asarray(values, np.float64)).astype(np.float32)
    return flat if kind == F32 else flat.astype(ml_dtypes.bfloat16).view(np.uint16)


def decoded(array: Array) -> Array:
    """What the numbers of an array mean, in float64, exactly."""
    bits = array.dtype == np.uint16
    return (array.view(ml_dtypes.bfloat16) if bits else array).astype(np.float64)


def rounded(values: Any, kind: str) -> Array:
    """The nearest numbers of a dtype, in float64, in the shape of values."""
    return decoded(encoded(values, kind)).reshape(np.shape(values))


def draw(*shape: int, kind: str = F32, size: float = 1, seed: int = 0) -> Array:
    """Normal numbers times a size, as the dtype has them, in float64."""
    rng = np.random.default_rng([seed, *shape])
    return rounded(size * rng.normal(size=shape), kind)


def blank(n: int, kind: str) -> Array:
    """An array nobody has written: numbers that are none."""
    return encoded(np.full(n, NAN), kind)


def assert_near(name: str, got: Array, exact: Array, error: Array) -> None:
    """Every number within its error; a bfloat16 within half a unit in its last place.

    error bounds what float32 arithmetic may have done, number by number. Storing as
    bfloat16 rounds once more, to the nearest: half of 2^(e-7), where 2^e is not above
    the smaller of the two. A norm of the difference would not see a result that is
    truncated, or rounded twice.
    """
    values, exact = decoded(got), np.ravel(exact)
    bound = np.broadcast_to(error, np.shape(exact)).ravel()
    if got.dtype == np.uint16:
        with np.errstate(divide="ignore"):
            smaller = np.minimum(np.abs(exact), np.abs(values))
            exponent = np.floor(np.log2(smaller))
        bound = bound + 0.5 * 2.0 ** (np.maximum(exponent, -126) - 7)
    same = (values == exact) | (np.isnan(values) & np.isnan(exact))
    with np.errstate(invalid="ignore"):
        wrong = ~(same | (np.abs(values - exact) <= bound))
    if wrong.any():
        i = int(np.argmax(wrong))
        raise AssertionError(
            f"{name}[{i}] is {values[i]!r}, exactly it is {exact[i]!r}, and the error "
            f"may be {bound[i]:.2g}; {wrong.sum()} of {wrong.size} are wrong"
        )


def simulated(order: Any) -> Run:
    """Run in the simulator, in this order."""
    return partial(simulator.launch, order=order)


@dataclass(frozen=True)
class Job:
    """A launch of the kernel of this name, or of what it makes of some constants.

    exact: the results in float64, error: how far from them float32 may be. kept: where
    in a result no bit may change. Arrays that are no results may not change at all.
    """

    name: str
    kernel: str
    grid: Any
    block: Any
    arrays: dict[str, Array]
    scalars: tuple
    exact: dict[str, Array]
    error: dict[str, Array]
    constants: tuple[int, ...] = ()
    kept: dict[str, Array] = field(default_factory=dict)

    def __str__(self) -> str:
        kinds = {a.dtype for a in self.arrays.values()}
        kind = "bf16" if np.dtype(np.uint16) in kinds else "f32"
        return f"{self.kernel}, {self.name}, {kind}"

    def function(self, scope: dict) -> Callable[..., None]:
        """The kernel among these."""
        found = scope[self.kernel]
        return found(*self.constants) if self.constants else found

    def check(self, run: Run, scope: dict = KERNELS, room: int = 0) -> dict[str, Array]:
        """Run it, compare everything, return the results."""
        buffers = {name: _guarded(array) for name, array in self.arrays.items()}
        handed = [
            buffers[name][GUARD : GUARD + array.size + room]
            for name, array in self.arrays.items()
        ]
        run(self.function(scope), self.grid, self.block, *handed, *self.scalars)
        results = {}
        for name, before in self.arrays.items():
            _untouched(name, buffers[name], GUARD, before.size)
            after = buffers[name][GUARD : GUARD + before.size]
            still = self.kept.get(name, np.full(before.size, name not in self.exact))
            changed = _bits(after)[still] != _bits(before)[still]
            assert not changed.any(), f"{name}: {changed.sum()} changed, and must not"
            if name in self.exact:
                live, exact = ~still, np.ravel(self.exact[name])
                error = np.broadcast_to(self.error[name], np.shape(self.exact[name]))
                assert_near(name, after[live], exact[live], error.ravel()[live])
                results[name] = _bits(after).copy()
        return results


def _bits(array: Array) -> Array:
    return array.view(f"u{array.itemsize}")


def _guarded(array: Array) -> Array:
    buffer = np.empty(array.size + 2 * GUARD, array.dtype)
    _bits(buffer)[:] = NOBODYS[array.dtype]
    buffer[GUARD : GUARD + array.size] = array
    return buffer


def _untouched(name: str, buffer: Array, before: int, size: int) -> None:
    around = np.delete(_bits(buffer), np.s_[before : before + size])
    assert (around == NOBODYS[buffer.dtype]).all(), f"{name}: written outside"
