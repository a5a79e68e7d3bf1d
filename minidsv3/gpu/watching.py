"""Watch a launch: which instruction of which lane touched what, in which turn.

The simulator's threads are Python and run one after another, a GPU's warp runs one
instruction in 32 lanes at once. To put together again what a warp does at once, an
`Event` says by which instruction it was done, through which calls, and for the how
manyth time by this thread. `Turn` is the key: lanes of a warp with the same turn are
taken to act together. Exact where a warp stays together; under divergence it is an
approximation, for a GPU decides itself when lanes that went different ways meet again:
lanes that come to a line through different iterations of a loop count as together if
it is, for each, the same time.

Who is not watched pays nothing: the arrays of a watched launch are another class.
"""

from collections.abc import Callable
from types import CodeType
from typing import Any, NamedTuple

from minidsv3.gpu.memory import CheckedArray
from minidsv3.gpu.races import ATOMIC, READ, WRITE, plain_index
from minidsv3.gpu.reports import Place, call_key, call_path, place_of, source_of
from minidsv3.gpu.threads import Thread, current

KINDS = {READ: "read", WRITE: "write", ATOMIC: "atomic"}


class Site:
    """An instruction of a kernel and the calls that led there, innermost first."""

    __slots__ = ("calls",)

    def __init__(self, calls: tuple[tuple[CodeType, int], ...]) -> None:
        self.calls = calls

    @property
    def place(self) -> Place:
        """The line that it comes from."""
        return place_of(*self.calls[0])

    @property
    def expression(self) -> str:
        """The piece of the line that it comes from, like ``x[i + 1]``; may be empty."""
        return source_of(*self.calls[0])

    @property
    def order(self) -> tuple[int, ...]:
        """Where it stands in the program: a later instruction's is greater."""
        return tuple(instruction for _, instruction in reversed(self.calls))


class Turn(NamedTuple):
    """What lanes of a warp have in common when they act at once.

    op is "read", "write", "atomic", "syncthreads" or one of `warps.WARP_OPS`. space,
    array and width (in bytes) are those of an access, mask that of a warp's operation.
    time is how often the thread did the same before.
    """

    site: Site
    op: str
    space: str | None = None
    array: str | None = None
    width: int = 0
    mask: int | None = None
    time: int = 0


class Event(NamedTuple):
    """One thread's part in a turn.

    offset: how many bytes an access is from the beginning of its array, see
    `memory.beginning`; index: the element, within the view that was used. operand: what
    the thread hands in, or what is in memory after it wrote. answer: what it gets.
    """

    thread: Thread
    turn: Turn
    offset: int | None = None
    index: Any = None
    operand: Any = None
    answer: Any = None


class Watch:
    """Tells each listener of every event, in the order in which the threads ran."""

    def __init__(self, *listeners: Callable[[Event], None]) -> None:
        self.listeners = listeners
        self.by_frames: dict[tuple[int, ...], Site] = {}
        self.by_calls: dict[tuple, Site] = {}
        self.paths: list[tuple] = []
        self.times: dict[tuple[Thread, Turn], int] = {}

    def end_block(self) -> None:
        """Forget the threads of a block that is over."""
        self.times.clear()

    def access(
        self, kind: int, array: CheckedArray, index: Any, n: int = 1, got: Any = None
    ) -> None:
        """The running thread has read, written or updated n elements."""
        width, space = n * array.data.itemsize, array.memory.space
        turn = Turn(self._site(), KINDS[kind], space, array.root, width)
        put = None
        if kind != READ:
            data = array.data
            put = data[index] if n == 1 else tuple(data[index : index + n])
        offset = array.locate(index) - array.base
        self._tell(current(), turn, offset, plain_index(index), put, got)

    def meeting(self, op: str, mask: int | None, operands: Any, answer: Any) -> None:
        """The running thread has come through a barrier or an operation of its warp."""
        turn = Turn(self._site(), op, mask=mask)
        self._tell(current(), turn, None, None, operands, answer)

    def _tell(self, thread: Thread, turn: Turn, *rest: Any) -> None:
        time = self.times.get((thread, turn), 0)
        self.times[thread, turn] = time + 1
        event = Event(thread, turn._replace(time=time), *rest)
        for listener in self.listeners:
            listener(event)

    def _site(self) -> Site:
        """Where the running thread is."""
        key = call_key()
        site = self.by_frames.get(key)
        if site is None:
            path = call_path()
            self.paths.append(path)  # keeps the key's codes
            calls = tuple((code, _first(code, last)) for code, last in path)
            site = self.by_frames[key] = self.by_calls.setdefault(calls, Site(calls))
        return site


def _first(code: CodeType, instruction: int) -> int:
    """Where an instruction begins.

    When Python has made one fast, a frame's f_lasti points to the end of the room that
    the instruction keeps for that, which is filled with zeros.
    """
    while instruction > 0 and code.co_code[instruction] == 0:
        instruction -= 2
    return instruction


class WatchedArray(CheckedArray):
    """A checked array that also tells the launch's watch of each access."""

    __slots__ = ()

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if not isinstance(found, CheckedArray):
            current().block.launch.watch.access(READ, self, index, got=found)
        return found

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index, value)  # of a view, this comes here for each element
        if self.locate(index) is not None:
            current().block.launch.watch.access(WRITE, self, index)

    def update(self, index: Any, change: Callable[[Any], Any]) -> Any:
        """`CheckedArray.update`."""
        old = super().update(index, change)
        current().block.launch.watch.access(ATOMIC, self, index, got=old)
        return old

    def read_vector(self, i: int, n: int) -> tuple:
        """`CheckedArray.read_vector`."""
        found = super().read_vector(i, n)
        current().block.launch.watch.access(READ, self, i, n, found)
        return found

    def claim_vector(self, i: int, n: int) -> int:
        """`CheckedArray.claim_vector`: the copy counts where it is begun."""
        first = super().claim_vector(i, n)
        current().block.launch.watch.access(WRITE, self, first, n)
        return first

    def write_vector(self, i: int, values: Any) -> None:
        """`CheckedArray.write_vector`."""
        super().write_vector(i, values)
        current().block.launch.watch.access(WRITE, self, i, len(values))
