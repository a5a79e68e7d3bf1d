"""Copies that run beside their thread: what ``cp.async`` may do, and when it is seen.

A copy is begun, its group is committed, and some time before the wait ends the bytes
are there. A GPU does not say when. The simulator does it at one of the two ends,
``launch(..., copies="issue")`` or ``"wait"``, and a correct kernel cannot tell which. In
between the target belongs to the copy: whoever touches it gets a RaceError.
"""

import operator
from typing import Any, NamedTuple

from minidsv3.gpu.memory import CheckedArray
from minidsv3.gpu.reports import RaceError, SimulatorError, report
from minidsv3.gpu.threads import Thread

WIDTH = 16  # bytes
POLICIES = ("wait", "issue")
STILL_COPYING = (
    "The copy may not have arrived. Commit its group, call wait_copies(), and put a "
    "cuda.syncthreads() after it before other threads look."
)


class Copy(NamedTuple):
    """One copy under way: 16 bytes for these elements of the target."""

    tile: CheckedArray
    i: int
    values: tuple
    source: CheckedArray
    j: int


class Copies:
    """The copies of one thread, in groups; the last group is still open."""

    def __init__(self, thread: Thread, at_issue: bool) -> None:
        self.thread, self.at_issue = thread, at_issue
        self.groups: list[list[Copy]] = [[]]

    def begin(self, tile: CheckedArray, i: int, source: CheckedArray, j: int) -> None:
        """Read the source, and claim the target until the copy is waited for."""
        i, j = operator.index(i), operator.index(j)
        if tile.dtype != source.dtype or tile.memory.space != "shared":
            raise report(
                SimulatorError,
                self.thread,
                f"copies {source.dtype} of {source.memory.space} memory to "
                f"{tile.dtype} of {tile.memory.space} memory.",
                "copy_async16 goes from global to shared memory, between equal dtypes.",
            )
        n = WIDTH // tile.dtype.itemsize
        values = source.read_vector(j, n)
        tile.write_vector(i, values if self.at_issue else (0,) * n)
        tile.memory.claim(tile, i, n, self.thread)
        self.groups[-1].append(Copy(tile, i, values, source, j))

    def commit(self) -> None:
        """Close the open group."""
        self.groups.append([])

    def wait(self, pending: int) -> None:
        """Finish groups, oldest first, until at most ``pending`` closed ones are left."""
        if pending < 0:
            raise report(
                SimulatorError,
                self.thread,
                f"waits for {pending} groups.",
                "The number of groups that may still be under way is 0 or more.",
            )
        while len(self.groups) - 1 > pending:
            for copy in self.groups.pop(0):
                n = len(copy.values)
                copy.tile.memory.release(copy.tile, copy.i, n)
                again = copy.source.read_vector(copy.j, n)
                copy.tile.write_vector(copy.i, copy.values if self.at_issue else again)


def still_copying(
    array: CheckedArray, index: Any, thread: Thread, by: Thread
) -> RaceError:
    """Somebody touches the target of a copy that nobody has waited for."""
    return report(
        RaceError,
        thread,
        f"touches {array.element(index)}, which a copy that thread {by} began is "
        "still writing.",
        STILL_COPYING,
        array=array.name,
        index=index,
        others=(tuple(by.index),),
        other_block=tuple(by.block.index),
    )
