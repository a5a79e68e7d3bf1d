"""Copies that run beside their thread: what ``cp.async`` may do, and when it is seen.

A copy is begun, its group is committed, and some time before the wait ends the bytes
are there. A GPU does not say when. The simulator does it at one of the two ends,
``launch(..., copies="issue")`` or ``"wait"``, and a correct kernel cannot tell which.
In between the target belongs to the copy: whoever touches it gets a RaceError. Source:
PTX ISA, Asynchronous copy.
"""

from typing import NamedTuple

from minidsv3.gpu.memory import CheckedArray
from minidsv3.gpu.reports import SimulatorError, report
from minidsv3.gpu.threads import Thread

WIDTH = 16  # bytes


class Copy(NamedTuple):
    """One copy under way, to ``tile[i:]`` from ``source[j:]``."""

    tile: CheckedArray
    i: int
    source: CheckedArray
    j: int
    values: tuple


class Copies:
    """The copies of one thread, in groups; the last group is still open."""

    def __init__(self, thread: Thread) -> None:
        self.thread = thread
        self.at_issue = thread.block.launch.copies == "issue"
        self.groups: list[list[Copy]] = [[]]

    def begin(self, tile: CheckedArray, i: int, source: CheckedArray, j: int) -> None:
        """Read the source, and claim the target until the copy is waited for."""
        ends = source.memory.space, tile.memory.space
        if ends != ("global", "shared") or tile.dtype != source.dtype:
            raise report(
                SimulatorError,
                self.thread,
                f"copies {source.dtype} of {ends[0]} memory to {tile.dtype} of "
                f"{ends[1]} memory.",
                "copy_async16 goes from global to shared memory, between equal dtypes.",
            )
        n = WIDTH // tile.dtype.itemsize
        values = source.read_vector(j, n)
        i = tile.claim_vector(i, n)
        if self.at_issue:
            tile.data[i : i + n] = values
        self.groups[-1].append(Copy(tile, i, source, int(j), values))

    def commit(self) -> None:
        """Close the open group."""
        self.groups.append([])

    def wait(self, pending: int) -> None:
        """Finish groups, oldest first, until at most ``pending`` closed ones are left.

        What arrives is what the source holds now or held at issue, by the policy.
        """
        if pending < 0:
            raise report(
                SimulatorError,
                self.thread,
                f"waits until {pending} groups are under way.",
                "That number is 0 or more.",
            )
        while len(self.groups) - 1 > pending:
            for tile, i, source, j, values in self.groups.pop(0):
                n = len(values)
                if not self.at_issue:
                    values = source.data[j : j + n]
                tile.arrive_vector(i, values)


def copies_of(thread: Thread) -> Copies:
    """The thread's copies, from the first time somebody asks."""
    if thread.copies is None:
        thread.copies = Copies(thread)
    return thread.copies
