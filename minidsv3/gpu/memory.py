"""Arrays that check every access: is it inside, is it written, does it race?

An element is known by its address, so two names for the same memory, and views of it,
are checked together. Of every element is remembered who touched it since it was last
written, see `happened_before` for who may touch it next. Two shortcuts are taken:
accesses of different width meet only where they begin at the same address, and what a
launch did is forgotten when the next begins.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from types import CodeType
from typing import Any

import numpy as np

from minidsv3.gpu.reports import (
    AlignmentError,
    BoundsError,
    RaceError,
    SimulatorError,
    UninitialisedError,
    kernel_frame,
    place_of,
    report,
)
from minidsv3.gpu.threads import Moment, Thread, current, happened_before, running

READ, WRITE, ATOMIC = 0, 1, 2
VERBS = (("reads", "read"), ("writes", "wrote"), ("updates", "updated"))
# What an access must be ordered against. Reads agree with reads, atomics with atomics.
CLASHES = ((WRITE, ATOMIC), (READ, WRITE, ATOMIC), (READ, WRITE))

WIDTHS = (1, 2, 4, 8, 16)  # bytes that one instruction can load or store

Access = tuple[Moment, CodeType, int]  # who and when, and the instruction
Crowd = dict[Thread, Access]
NOBODY: Crowd = {}

MEET_BLOCK = (
    "No barrier stands between the two, so either may come first. Put a "
    "cuda.syncthreads() between them, outside of any `if`; inside one warp a "
    "cuda.syncwarp() will do."
)
ONE_WRITER = (
    "Nothing orders the two, even if both write the same value. Give each element one "
    "thread that writes it, or use cuda.atomic, or put a cuda.syncthreads() between."
)
NO_BLOCK_ORDER = (
    "Blocks run in any order or at the same time, and no barrier reaches across. Use "
    "cuda.atomic, let one block own the element, or launch a second kernel."
)


class Memory:
    """A stretch of memory: who touched which address, and what was ever written.

    space is "global", "shared" or "local". Global memory comes with its contents, the
    others are poisoned: reading what nobody wrote is an error.
    """

    def __init__(self, space: str, counts: list[int], data: np.ndarray | None) -> None:
        self.space, self.counts = space, counts
        self.cells: dict[int, list[Crowd]] = {}
        self.origin = 0 if data is None else address_of(data)
        self.written = None if data is None else bytearray(data.nbytes)

    def touch(self, kind: int, array: "CheckedArray", address: int, index: Any) -> None:
        """Check and remember one access of the running thread."""
        thread = running.thread or current()
        self.counts[kind] += 1
        if self.written is not None:
            self._initialise(kind, array, address, index)
        if self.space != "local":  # nobody else can reach that
            frame = kernel_frame(2)
            access = (thread.moment, frame.f_code, frame.f_lasti)
            self._order(kind, array, address, index, access)

    def touch_vector(
        self, kind: int, array: "CheckedArray", address: int, first: int, n: int
    ) -> None:
        """`touch` of n neighbours in one access, from the element first on."""
        thread, size = running.thread or current(), array.data.itemsize
        self.counts[kind] += 1
        if self.written is not None:
            for k in range(n):
                self._initialise(kind, array, address + k * size, first + k)
        if self.space != "local":
            frame = kernel_frame(3)
            access = (thread.moment, frame.f_code, frame.f_lasti)
            for k in range(n):
                self._order(kind, array, address + k * size, first + k, access)

    def _order(
        self, kind: int, array: "CheckedArray", address: int, index: Any, access: Access
    ) -> None:
        """Is every earlier access that this one could clash with ordered before it?"""
        thread = access[0][0]
        cell = self.cells.get(address)
        if cell is None:
            cell = self.cells[address] = [NOBODY, NOBODY, NOBODY]
            cell[kind] = {thread: access}
            return
        for other in CLASHES[kind]:
            for past in cell[other].values():
                if not happened_before(past[0], thread):
                    raise _race(kind, other, past, array, index)
        if kind == WRITE:  # whoever is ordered after this is ordered after all before
            cell[:] = NOBODY, {thread: access}, NOBODY
        elif cell[kind]:
            _join(cell[kind], thread, access)
        else:
            cell[kind] = {thread: access}

    def _initialise(
        self, kind: int, array: "CheckedArray", address: int, index: Any
    ) -> None:
        """A write makes an element known, and only then may it be read."""
        start = address - self.origin
        end = start + array.dtype.itemsize
        if kind == WRITE:
            self.written[start:end] = b"\1" * (end - start)
            return
        if 0 not in self.written[start:end]:
            return
        thread = current()
        if self.space == "shared":
            # Another thread may be about to write it. Then a barrier is missing, and
            # the race will be found, whatever the order of the threads.
            thread.look_again()
        if 0 in self.written[start:end]:
            raise report(
                UninitialisedError,
                thread,
                f"reads {array.element(index)}, which nothing was written to yet.",
                f"A {self.space} array begins with whatever was there before: write "
                "every element that is read, zeros too.",
                array=array.name,
                index=plain_index(index),
            )


def _join(crowd: Crowd, thread: Thread, access: Access) -> None:
    """Keep, of accesses that agree, those that a later one could clash with.

    One from each of two blocks is enough: whoever writes then clashes with one of them.
    Within a block those before the last barrier are done with, and a single one of
    another warp stands for its whole warp.
    """
    first, last = next(iter(crowd)), next(reversed(crowd))
    if first.block is not last.block:
        return
    if last.block is thread.block and crowd[last][0][1] < thread.block.epoch:
        crowd.clear()
    elif last.warp is not thread.warp:
        kept = crowd[last]
        crowd.clear()
        crowd[last] = kept
    crowd[thread] = access


def _race(
    kind: int, other_kind: int, past: Access, array: "CheckedArray", index: Any
) -> RaceError:
    """The report of two accesses that nothing orders."""
    thread, other = current(), past[0][0]
    line = place_of(*past[1:]).line
    who, advice = f"thread {other}", MEET_BLOCK
    if other.block is not thread.block:
        who, advice = f"thread {other} of block {other.block}", NO_BLOCK_ORDER
    elif kind == other_kind == WRITE:
        advice = ONE_WRITER
    what = (
        f"{VERBS[kind][0]} {array.element(index)}, which {who} {VERBS[other_kind][1]}"
    )
    return report(
        RaceError,
        thread,
        f"{what} in line {line}.",
        advice,
        array=array.name,
        index=plain_index(index),
        others=(tuple(other.index),),
        other_block=tuple(other.block.index),
        other_line=line,
    )


def address_of(data: np.ndarray) -> int:
    """Where an array's first element lies."""
    return data.__array_interface__["data"][0]


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
        address = self._locate(index)
        if address is None:
            return self._view(index)
        self.memory.touch(READ, self, address, index)
        return self.data[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        address = self._locate(index)
        if address is None:
            self._fill(index, value)
            return
        self.memory.touch(WRITE, self, address, index)
        self._store(index, value)

    def update(self, index: Any, change: Callable[[Any], Any]) -> Any:
        """One atomic step: replace an element by ``change(old)`` and return the old."""
        address = self._locate(index)
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
        first = i if type(i) is int else self._integer(i)
        size = n * self.data.itemsize
        if size not in WIDTHS or self.data.strides != (self.data.itemsize,):
            raise self._no_vector(first, n)
        if not 0 <= first <= len(self.data) - n:
            raise self._out_of_bounds(slice(first, first + n))
        address = self.address + first * self.data.itemsize
        if (address - self.base) % size:
            raise self._misaligned(kind, first, n)
        self.memory.touch_vector(kind, self, address, first, n)
        return first

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

    def _locate(self, index: Any) -> int | None:
        """The address of an element; None if the index means a view."""
        indices = index if type(index) is tuple else (index,)
        if len(indices) != len(self.axes):
            return self._check_view(indices)
        address = self.address
        for i, (n, stride) in zip(indices, self.axes, strict=True):
            if type(i) is not int:
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


def plain_index(index: Any) -> Any:
    """An index in Python's own integers."""
    if isinstance(index, tuple):
        return tuple(map(plain_index, index))
    return int(index) if isinstance(index, np.integer) else index


def _written(index: Any) -> str:
    """An index as one writes it: ``3, 2:5``."""
    if isinstance(index, tuple):
        return ", ".join(map(_written, index))
    if isinstance(index, slice):
        parts = [index.start, index.stop, *[index.step] * (index.step is not None)]
        return ":".join("" if part is None else str(part) for part in parts)
    return "..." if index is Ellipsis else str(index)
