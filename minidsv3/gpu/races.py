"""Memory: does an access race with another, was what it reads ever written?

An element is known by its address, so two names for the same memory, and views of it,
are checked together. Of every element is remembered who touched it since it was last
written, see `happened_before` for who may touch it next. Two shortcuts are taken:
accesses of different width meet only where they begin at the same address, and what a
launch did is forgotten when the next begins.
"""

from types import CodeType
from typing import TYPE_CHECKING, Any

import numpy as np

from minidsv3.gpu.reports import (
    RaceError,
    UninitialisedError,
    kernel_frame,
    place_of,
    report,
)
from minidsv3.gpu.threads import Moment, Thread, current, happened_before, running

if TYPE_CHECKING:
    from minidsv3.gpu.memory import CheckedArray

READ, WRITE, ATOMIC = 0, 1, 2
VERBS = (("reads", "read"), ("writes", "wrote"), ("updates", "updated"))
# What an access must be ordered against. Reads agree with reads, atomics with atomics.
CLASHES = ((WRITE, ATOMIC), (READ, WRITE, ATOMIC), (READ, WRITE))

Touch = tuple[Moment, CodeType, int]  # who and when, and the instruction
Crowd = dict[Thread, Touch]
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

STILL_COPIED = (
    "Who began the copy must commit its group and wait_copies() for it, and then a "
    "cuda.syncthreads() must show it to the others."
)


class Memory:
    """A stretch of memory: who touched which address, and what was ever written.

    space is "global", "shared" or "local". Global memory comes with its contents, the
    others are poisoned: reading what nobody wrote is an error. It surely begins at a
    multiple of ``alignment`` bytes.
    """

    def __init__(self, space: str, counts: list[int], data: np.ndarray | None) -> None:
        self.space, self.counts = space, counts
        self.cells: dict[int, list[Crowd]] = {}
        self.claims: dict[int, Thread] = {}
        self.alignment = {"global": 256, "shared": 1, "local": 16}[space]
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

    def claim(self, array: "CheckedArray", address: int, first: int, n: int) -> None:
        """A copy of the running thread will write n neighbours, nobody knows when."""
        thread, size = current(), array.data.itemsize
        frame = kernel_frame(3)
        access = (thread.moment, frame.f_code, frame.f_lasti)
        for k in range(n):
            self._order(WRITE, array, address + k * size, first + k, access)
        for k in range(n):
            self.claims[address + k * size] = thread
            self._initialise(WRITE, array, address + k * size, first + k)

    def release(self, array: "CheckedArray", address: int, n: int) -> None:
        """That copy has been waited for."""
        for k in range(n):
            self.claims.pop(address + k * array.data.itemsize, None)

    def _order(
        self, kind: int, array: "CheckedArray", address: int, index: Any, access: Touch
    ) -> None:
        """Is every earlier access that this one could clash with ordered before it?"""
        thread = access[0][0]
        if self.claims and address in self.claims:
            raise _still_copied(kind, array, index, self.claims[address])
        cell = self.cells.get(address)
        if cell is None:
            cell = self.cells[address] = [NOBODY, NOBODY, NOBODY]
            cell[kind] = {thread: access}
            return
        for other in CLASHES[kind]:
            for past in cell[other].values() if cell[other] else ():
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


def _join(crowd: Crowd, thread: Thread, access: Touch) -> None:
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
    kind: int, other_kind: int, past: Touch, array: "CheckedArray", index: Any
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


def _still_copied(
    kind: int, array: "CheckedArray", index: Any, copier: Thread
) -> RaceError:
    """Somebody touches the target of a copy that was not waited for."""
    return report(
        RaceError,
        current(),
        f"{VERBS[kind][0]} {array.element(index)}, which a copy that thread {copier} "
        "began is still writing.",
        STILL_COPIED,
        array=array.name,
        index=plain_index(index),
        others=(tuple(copier.index),),
        other_block=tuple(copier.block.index),
    )


def address_of(data: np.ndarray) -> int:
    """Where an array's first element lies."""
    return data.__array_interface__["data"][0]


def plain_index(index: Any) -> Any:
    """An index in Python's own integers."""
    if isinstance(index, tuple):
        return tuple(map(plain_index, index))
    return int(index) if isinstance(index, np.integer) else index
