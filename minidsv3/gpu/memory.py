"""Arrays that check every access: is it one element, inside, aligned?

Whether it races is `races.Memory`'s to say.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from minidsv3.gpu.races import (
    ATOMIC,
    READ,
    VERBS,
    WRITE,
    Memory,
    address_of,
    plain_index,
)
from minidsv3.gpu.reports import AlignmentError, BoundsError, SimulatorError, report
from minidsv3.gpu.threads import current

INTEGERS = {int, *(np.dtype(f"{sign}{n}").type for sign in "iu" for n in (1, 2, 4, 8))}
WIDTHS = (1, 2, 4, 8, 16)  # bytes that one instruction can load or store


def beginning(data: np.ndarray) -> int:
    """Where the memory begins that an array is a view of, or its own.

    A GPU's allocator would have put this at a multiple of 256 bytes: "any address of a
    variable residing in global memory or returned by one of the memory allocation
    routines from the driver or runtime API is always aligned to at least 256 bytes"
    (CUDA C++ Programming Guide, Device Memory Accesses). NumPy promises less, so
    alignment counts from here: ``x[1:]`` lies one element beside it, on a GPU as here.
    """
    while isinstance(data.base, np.ndarray):
        data = data.base
    return address_of(data)


class CheckedArray:
    """An array as a kernel sees it: indexing, views, and what describes it.

    Reading gives a NumPy scalar of the array's dtype, writing converts to it, as
    storing to memory does: 3.9 becomes 3 and integers wrap.
    """

    __slots__ = ("address", "axes", "base", "data", "memory", "name", "root")

    def __init__(
        self,
        data: np.ndarray,
        name: str,
        memory: Memory,
        base: int | None = None,
        root: str | None = None,
    ) -> None:
        """base is where the whole begins that data is a piece of, root its name."""
        self.data, self.name, self.memory = data, name, memory
        self.address = address_of(data)
        self.base, self.root = self.address if base is None else base, root or name
        self.axes = tuple(zip(data.shape, data.strides, strict=True))

    shape = property(lambda self: self.data.shape)
    strides = property(lambda self: self.data.strides)
    size = property(lambda self: self.data.size)
    ndim = property(lambda self: self.data.ndim)
    dtype = property(lambda self: self.data.dtype)

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        return f"<{self.memory.space} array {self.name}, {self.shape}, {self.dtype}>"

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        address = self.locate(index)
        if address is None:
            return self._view(index)
        self.memory.touch(READ, self, address, index)
        return self.data[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        address = self.locate(index)
        if address is None:
            self._fill(index, value)
            return
        self.memory.touch(WRITE, self, address, index)
        self._store(index, value)

    def update(self, index: Any, change: Callable[[Any], Any]) -> Any:
        """One atomic step: replace an element by ``change(old)`` and return the old."""
        address = self.locate(index)
        if address is None:
            raise self._out_of_bounds(index, "is not a single element")
        self.memory.touch(ATOMIC, self, address, index)
        old = self.data[index]
        self._store(index, change(old))
        return old

    def read_vector(self, i: int, n: int) -> tuple:
        """The n elements from i on, in one access of n times the itemsize in bytes.

        For what is one load on a GPU. "Global memory instructions support reading or
        writing words of size equal to 1, 2, 4, 8, or 16 bytes", and the address must be
        a multiple of that size (CUDA C++ Programming Guide, Device Memory Accesses).
        Addresses count from the beginning of the whole array, see `beginning`.

        Raises AlignmentError, BoundsError if any of the n is outside, SimulatorError if
        there is no such instruction, and whatever reading the elements one by one does.
        """
        i = self._touch_vector(READ, i, n)
        return tuple(self.data[i : i + n])

    def write_vector(self, i: int, values: Sequence[Any]) -> None:
        """Store the values from i on, in one access. See `read_vector`."""
        i = self._touch_vector(WRITE, i, len(values))
        for place, value in enumerate(values, i):
            self._store(place, value)

    def _touch_vector(self, kind: int, i: int, n: int) -> int:
        """Check and remember one access to several elements; i as Python's integer."""
        first, address = self._vector(kind, i, n)
        self.memory.touch_vector(kind, self, address, first, n)
        return first

    def claim_vector(self, i: int, n: int) -> int:
        """A copy begins that will write n elements from i on: see `copies`.

        Until it arrives they are poisoned, and nobody may touch them.
        """
        first, address = self._vector(WRITE, i, n)
        self.memory.claim(self, address, first, n)
        self.data[first : first + n].view(np.uint8).fill(0xFF)
        return first

    def arrive_vector(self, i: int, values: Sequence[Any]) -> None:
        """The copy that claimed elements from i on is done, and this is in them."""
        address = self.address + i * self.data.itemsize
        self.memory.release(self, address, len(values))
        self.memory.touch_vector(WRITE, self, address, i, len(values))
        self.data[i : i + len(values)] = values

    def _vector(self, kind: int, i: int, n: int) -> tuple[int, int]:
        """Where n elements from i on begin, as index and address, if one may."""
        first = i if type(i) is int else self._integer(i)
        size = n * self.data.itemsize
        if size not in WIDTHS or self.data.strides != (self.data.itemsize,):
            raise self._no_vector(first, n)
        if not 0 <= first <= len(self.data) - n:
            raise self._out_of_bounds(slice(first, first + n))
        address = self.address + first * self.data.itemsize
        if (address - self.base) % size:
            raise self._misaligned(kind, first, n)
        if size > self.memory.alignment:
            raise self._unpromised(kind, first, n)
        return first, address

    def _no_vector(self, i: int, n: int) -> SimulatorError:
        return report(
            SimulatorError,
            current(),
            f"{self.name} has the shape {self.shape}, strides of {self.strides} bytes "
            f"and {self.dtype}: {n} of it from {i} on are no one access.",
            "One access takes 1, 2, 4, 8 or 16 bytes of neighbours along one axis.",
            array=self.name,
            index=i,
        )

    def _misaligned(self, kind: int, i: int, n: int) -> AlignmentError:
        size, offset = n * self.dtype.itemsize, i * self.dtype.itemsize
        offset += self.address - self.base
        return report(
            AlignmentError,
            current(),
            f"{VERBS[kind][0]} {self.element(slice(i, i + n))} at once, {size} bytes "
            f"from byte {offset} of {self.root} on.",
            f"A {size}-byte {('load', 'store')[kind]} needs an address that is a "
            f"multiple of {size}: begin at a multiple of {n} elements, in an array and "
            "in rows whose lengths are multiples of it too.",
            array=self.name,
            index=i,
        )

    def _unpromised(self, kind: int, i: int, n: int) -> AlignmentError:
        size, promised = n * self.dtype.itemsize, self.memory.alignment
        return report(
            AlignmentError,
            current(),
            f"{VERBS[kind][0]} {self.element(slice(i, i + n))} at once, {size} bytes "
            f"of {self.memory.space} memory that begins at a multiple of {promised}.",
            f"Ask for cuda.shared.array(..., alignment={size}): without it the "
            "compiler may put the array anywhere that suits one element.",
            array=self.name,
            index=i,
        )

    def _store(self, index: Any, value: Any) -> None:
        try:
            self.data[index] = value
        except OverflowError:  # NumPy refuses a Python integer that does not fit
            size = self.dtype.itemsize
            wrapped = np.array(int(value) % (1 << 8 * size), f"u{size}")
            self.data[index] = wrapped.astype(self.dtype)

    def element(self, index: Any) -> str:
        """An element as the kernel would write it: ``tile[3, 5]``."""
        return f"{self.name}[{_written(index)}]"

    def locate(self, index: Any) -> int | None:
        """The address of an element; None if the index means a view."""
        if type(index) in INTEGERS and len(self.axes) == 1:  # the short way for most
            n, stride = self.axes[0]
            if 0 <= (i := int(index)) < n:
                return self.address + i * stride
            raise self._out_of_bounds(index)
        indices = index if type(index) is tuple else (index,)
        if len(indices) != len(self.axes):
            return self._check_view(indices)
        address = self.address
        for i, (n, stride) in zip(indices, self.axes, strict=True):
            if type(i) in INTEGERS:
                i = int(i)
            else:
                if isinstance(i, slice) or i is Ellipsis:
                    return self._check_view(indices)
                i = self._integer(i)
            if not 0 <= i < n:
                raise self._out_of_bounds(index)
            address += i * stride
        return address

    def _check_view(self, indices: tuple) -> None:
        """Bounds of an index that means a view: it has slices, or too few numbers."""
        given = [i for i in indices if i is not Ellipsis]
        if len(given) > self.ndim:
            raise self._out_of_bounds(indices, "has too many indices")
        front = indices.index(Ellipsis) if len(given) < len(indices) else len(given)
        lengths = self.shape[:front] + self.shape[self.ndim - len(given) + front :]
        for i, n in zip(given, lengths, strict=False):
            if isinstance(i, slice):
                ends = [self._integer(e) for e in (i.start, i.stop) if e is not None]
                inside = all(0 <= end <= n for end in ends)
            else:
                inside = 0 <= self._integer(i) < n
            if not inside:
                raise self._out_of_bounds(indices)

    def _integer(self, i: Any) -> int:
        try:
            return operator.index(i)
        except TypeError:
            raise report(
                SimulatorError,
                current(),
                f"{self.name} is indexed by {i!r}, which is not an integer.",
                "Divide indices with //, and turn a float into one with int().",
                array=self.name,
            ) from None

    def _out_of_bounds(self, index: Any, wrong: str = "") -> BoundsError:
        given = index if isinstance(index, tuple) else (index,)
        advice = "Guard the access: on a GPU it reads or destroys somebody else's data."
        if wrong:
            advice = "Give one index for each axis, or slices to mean many elements."
        elif any(isinstance(i, int | np.integer) and i < 0 for i in given):
            advice = f"Here a negative index does not count from the end. {advice}"
        wrong = wrong or "is out of bounds"
        return report(
            BoundsError,
            current(),
            f"{self.element(index)} {wrong}: {self.name} has the shape {self.shape}.",
            advice,
            array=self.name,
            index=plain_index(index),
        )

    def _view(self, index: Any) -> "CheckedArray":
        name = self.element(index)
        return type(self)(self.data[index], name, self.memory, self.base, self.root)

    def _fill(self, index: Any, value: Any) -> None:
        """Store into each element of a view. Axes left out by oversight are no view."""
        given = index if isinstance(index, tuple) else (index,)
        if not any(isinstance(i, slice) or i is Ellipsis for i in given):
            raise self._out_of_bounds(index, "is not a single element")
        view = self._view(index)
        for place in np.ndindex(view.shape):
            view[place] = value[place] if isinstance(value, CheckedArray) else value


def _written(index: Any) -> str:
    """An index as one writes it: ``3, 2:5``."""
    if isinstance(index, tuple):
        return ", ".join(map(_written, index))
    if isinstance(index, slice):
        parts = [index.start, index.stop, *[index.step] * (index.step is not None)]
        return ":".join("" if part is None else str(part) for part in parts)
    return "..." if index is Ellipsis else str(index)
