"""Threads, warps and blocks: who runs, who waits, and who has seen what.

A thread is a greenlet: a function that can be left in the middle and taken up again. It
runs alone until it meets a barrier or an operation of its warp, then the next one runs.
So a launch is deterministic, and what orders two threads is known exactly:

* every ``cuda.syncthreads()`` ends an epoch of its block: what was done in an earlier
  epoch happened before everything in this one;
* every ``cuda.syncwarp()`` shows its lanes what the others did so far: each lane's
  clock counts them, and each remembers the clock of every other it has seen. Shuffles
  and votes hand over values and order nothing else: CUDA's programming guide says that
  they imply no memory barrier;
* nothing orders two blocks.
"""

from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from minidsv3.gpu.reports import (
    DivergenceError,
    Place,
    SimulatorError,
    call_key,
    call_path,
    calls,
    raised_at,
    report,
    whereabouts,
)
from minidsv3.gpu.warps import WARP_OPS, WARP_SIZE, InactiveLaneError

NOTHING_SEEN = [-1] * WARP_SIZE
MEET_BARRIER = (
    "Every thread of a block must reach the same cuda.syncthreads(). Take it out of "
    "the `if`, and let idle threads skip the work instead of returning early."
)
MEET_WARP = (
    "The mask promises all its lanes, and a shuffle reads only from lanes in it. Call "
    "it where all of them come along, or name in the mask only those that do."
)


class Dim3(NamedTuple):
    """Three numbers along x, y and z, as CUDA counts threads and blocks."""

    x: int = 1
    y: int = 1
    z: int = 1

    def within(self, extent: "Dim3") -> str:
        """An index for people: only the axes along which there is more than one."""
        axes = 3 if extent.z > 1 else 2 if extent.y > 1 else 1
        return str(self.x) if axes == 1 else str(tuple(self[:axes]))

    def indices(self) -> list["Dim3"]:
        """Every index inside this extent, x fastest."""
        X, Y, Z = map(range, self)
        return [Dim3(x, y, z) for z in Z for y in Y for x in X]


def _traffic() -> dict[str, list[int]]:
    """Reads, writes and atomics of each kind of memory."""
    return {space: [0, 0, 0] for space in ("global", "shared", "local")}


@dataclass
class Launch:
    """What the blocks of one launch have in common, and what is counted on the way.

    array is what arrays are made of, and watch the `watching.Watch`, if there is one.
    copies says when asynchronous copies happen, see `minidsv3.gpu.copies`.
    """

    kernel: str
    entry: Callable[[], Any]
    grid: Dim3
    block: Dim3
    arranged: Callable[[list], list]
    dynamic_shared: int
    greenlet: type
    context: Context
    array: type
    watch: Any = None
    copies: str = "wait"
    barriers: int = 0
    warp_operations: int = 0
    requests: dict[tuple, tuple[Any, tuple]] = field(default_factory=dict)
    traffic: dict[str, list[int]] = field(default_factory=_traffic)


class Request(NamedTuple):
    """What a thread waits for: an operation, whose lanes, from which line."""

    op: str
    mask: int | None = None
    calls: tuple[Place, ...] = ()

    def __str__(self) -> str:
        return f"cuda.{self.op}() in line {self.calls[0].line}"


SECOND_LOOK = Request("second look")


class Thread:
    """One thread of a block."""

    __slots__ = (
        "answer", "block", "clock", "copies", "greenlet", "index", "lane", "moment",
        "operands", "request", "seen", "warp",
    )  # fmt: skip

    def __init__(self, block: "Block", number: int, index: Dim3) -> None:
        launch = block.launch
        self.block, self.index, self.lane = block, index, number % WARP_SIZE
        self.warp: list[Thread] = []
        self.greenlet = launch.greenlet(launch.entry)
        self.greenlet.gr_context = launch.context.copy()
        self.request: Request | None = None
        self.operands, self.answer = (), None
        self.copies: Any = None
        self.clock, self.seen = 0, NOTHING_SEEN
        self.begin_stretch()

    def __str__(self) -> str:
        return self.index.within(self.block.launch.block)

    def begin_stretch(self) -> None:
        """From here on nobody has seen what the thread does, until they next meet."""
        self.moment: Moment = (self, self.block.epoch, self.clock)

    def barrier(self) -> None:
        """Wait for all threads of the block."""
        self._wait(self._request("syncthreads", None))
        if self.block.launch.watch:
            self.block.launch.watch.meeting("syncthreads", None, None, None)

    def warp_operation(self, op: str, mask: int, operands: tuple) -> Any:
        """Hand in operands, wait for the lanes in the mask, and take the answer."""
        self.operands = operands
        self._wait(self._request(op, mask))
        if self.block.launch.watch:
            self.block.launch.watch.meeting(op, mask, operands, self.answer)
        return self.answer

    def _request(self, op: str, mask: int | None) -> Request:
        """The request from where the thread is, made once for each such place."""
        key, made = (op, mask, call_key()), self.block.launch.requests
        if key not in made:
            made[key] = Request(op, mask, calls()), call_path()  # keeps the key's codes
        return made[key][0]

    def look_again(self) -> None:
        """Let the others do what they can do without this thread."""
        self._wait(SECOND_LOOK)

    def _wait(self, request: Request) -> None:
        self.request = request
        self.greenlet.parent.switch()

    def resume(self) -> None:
        """Run up to the next wait, or to the end. Errors come out of here."""
        running.thread, self.request = self, None
        try:
            returned = self.greenlet.switch()
        except SimulatorError:
            raise
        except Exception as error:
            place = raised_at(error.__traceback__)
            error.add_note(f"in {whereabouts(self, place)}: {place.text}")
            raise
        if self.greenlet.dead and returned is not None:
            raise SimulatorError(
                f"kernel {self.block.launch.kernel} returns {returned!r}: nobody is "
                "there to take it. A kernel writes its results into its arrays.",
                kernel=self.block.launch.kernel,
            )

    def kill(self) -> None:
        """Leave the kernel where it stands."""
        with suppress(Exception):  # the kernel's own `finally` may do anything
            self.greenlet.throw()


# A thread at a stretch of its life between two meetings: its epoch and its clock.
Moment = tuple[Thread, int, int]


def happened_before(past: Moment, thread: Thread) -> bool:
    """Whether the thread can rely on what was done at that moment being done."""
    doer, epoch, clock = past
    if doer is thread:
        return True
    if doer.block is not thread.block:
        return False
    if epoch < thread.block.epoch:
        return True
    return doer.warp is thread.warp and clock <= thread.seen[doer.lane]


class _Running:
    """The thread that has the processor. ``cuda.threadIdx`` is about this one."""

    thread: Thread | None = None


running = _Running()


def current() -> Thread:
    """The thread that runs. Raises SimulatorError outside a kernel."""
    if running.thread is None:
        raise SimulatorError(
            "cuda.* and a kernel's arrays are there only while a kernel runs. Start it "
            "with launch(kernel, grid, block, ...) instead of calling it."
        )
    return running.thread


class Block:
    """One block: its threads, its shared memory, and the order in which they run."""

    def __init__(self, launch: Launch, index: Dim3, indices: list[Dim3]) -> None:
        self.launch, self.index = launch, index
        self.epoch = 0
        self.shared: dict[Any, Any] = {}
        self.shared_bytes = 0
        self.threads = [Thread(self, n, i) for n, i in enumerate(indices)]
        starts = range(0, len(indices), WARP_SIZE)
        self.warps = [self.threads[start : start + WARP_SIZE] for start in starts]
        for warp in self.warps:
            for thread in warp:
                thread.warp = warp

    def __str__(self) -> str:
        return self.index.within(self.launch.grid)

    def run(self) -> None:
        """Run all threads to their ends, in rounds: each until it must wait."""
        ready = self.threads
        try:
            while ready:
                for thread in self.launch.arranged(ready):
                    thread.resume()
                ready = self._next_round()
        finally:
            running.thread = None
            for thread in self.threads:
                if not thread.greenlet.dead:
                    thread.kill()

    def _next_round(self) -> list[Thread]:
        """Who can go on, now that every thread waits or has finished."""
        groups = self._warp_groups()
        complete = [g for g in groups if not _missing(g)]
        for group in complete:
            self._exchange(group)
        if complete:
            return sum(complete, [])
        if doubting := [t for t in self.threads if t.request is SECOND_LOOK]:
            return doubting
        if groups:
            raise _diverged(groups[0], _missing(groups[0]), MEET_WARP)
        return self._pass_barrier()

    def _warp_groups(self) -> list[list[Thread]]:
        """Lanes that wait for each other: same warp, operation, mask and line."""
        groups: dict[tuple, list[Thread]] = {}
        for thread in self.threads:
            if thread.request and thread.request.mask is not None:
                key = (id(thread.warp), thread.request)
                groups.setdefault(key, []).append(thread)
        return list(groups.values())

    def _exchange(self, group: list[Thread]) -> None:
        """Carry out a warp's operation; after syncwarp its lanes see what all did."""
        self.launch.warp_operations += 1
        combine = WARP_OPS[group[0].request.op]
        try:
            answers = combine({t.lane: t.operands for t in group})
        except InactiveLaneError as error:
            raise _inactive(group, error.reader, error.source) from None
        for thread in group:
            thread.answer = answers[thread.lane]
        if group[0].request.op == "syncwarp":
            _show_each_other(group)

    def _pass_barrier(self) -> list[Thread]:
        """Begin the next epoch, if every thread waits at the same barrier."""
        waiting = [t for t in self.threads if t.request]
        if not waiting:
            return []
        here = [t for t in waiting if t.request == waiting[0].request]
        if elsewhere := [t for t in self.threads if t.request != waiting[0].request]:
            raise _diverged(here, elsewhere, MEET_BARRIER)
        self.launch.barriers += 1
        self.epoch += 1
        for thread in waiting:
            thread.begin_stretch()
        return waiting


def _show_each_other(group: list[Thread]) -> None:
    """From now on each lane of the group has seen what all of them did so far."""
    views = {id(t.seen): t.seen for t in group}.values()
    seen = [max(clocks) for clocks in zip(*views, strict=True)]
    for thread in group:
        seen[thread.lane] = thread.clock
    for thread in group:
        thread.seen = seen
        thread.clock += 1
        thread.begin_stretch()


def _missing(group: list[Thread]) -> list[Thread]:
    """Lanes that the mask of an operation names and that have not come to it."""
    come = sum(1 << thread.lane for thread in group)
    absent = group[0].request.mask & ~come
    return [t for t in group[0].warp if absent >> t.lane & 1]


def _diverged(
    here: list[Thread], elsewhere: list[Thread], advice: str
) -> DivergenceError:
    """Some wait, and the others will never come: where are those?"""
    places: dict[Request | None, list[Thread]] = {}
    for thread in elsewhere:
        places.setdefault(thread.request, []).append(thread)
    others = [_state(threads, request) for request, threads in places.items()]
    lines = [request.calls[0].line for request in places if request]
    return report(
        DivergenceError,
        here[0],
        f"{_state(here, here[0].request)}, {', '.join(others)}.",
        advice,
        place=here[0].request.calls[0],
        others=tuple(tuple(t.index) for t in elsewhere),
        other_block=tuple(here[0].block.index),
        other_line=lines[0] if lines else None,
    )


def _inactive(group: list[Thread], reader: int, source: int) -> DivergenceError:
    """A shuffle reads a lane that hands in nothing."""
    thread = next(t for t in group if t.lane == reader)
    warp, request = thread.warp, thread.request
    why = f"not in the mask {request.mask:#010x}"
    if source >= len(warp):
        why = f"not there: this warp has {len(warp)} threads"
    return report(
        DivergenceError,
        thread,
        f"lane {reader} reads by {request.op} from lane {source}, which is {why}.",
        MEET_WARP,
        place=request.calls[0],
        others=tuple(tuple(t.index) for t in warp if t.lane == source),
        other_block=tuple(thread.block.index),
    )


def _state(threads: list[Thread], request: Request | None) -> str:
    """What some threads do: three of them by name, and how many more."""
    names = ", ".join(str(thread) for thread in threads[:3])
    if len(threads) == 1:
        does = f"waits at {request}" if request else "has finished"
        return f"thread {names} {does}"
    more = f" and {len(threads) - 3} more" if len(threads) > 3 else ""
    return f"threads {names}{more} " + (
        f"wait at {request}" if request else "have finished"
    )
