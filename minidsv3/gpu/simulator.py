"""Launch a CUDA kernel without a GPU, and be told what is wrong with it::

    from minidsv3.gpu.simulator import cuda, launch

    def add(x, y, n):
        i = cuda.grid(1)
        if i < n:
            y[i] += x[i]

    launch(add, 4, 256, x, y, 1000)

Threads run one at a time and change places only at barriers and operations of a warp,
so the same launch does the same every time. What a GPU lets pass is an error here: a
race, even one that happened to end well, an index out of bounds, a barrier that not all
threads reach, a read of memory that nobody wrote.

It is stricter than CUDA where a learner is better off: a thread that has returned
counts as missing at a barrier, and a full mask needs all lanes that there are.

Where arithmetic differs from a GPU's: scalars are NumPy's and Python's, so float32
stays float32 beside a Python float (Numba computes float64), uint32 beside uint32 stays
and wraps (Numba computes uint64, so ``threadIdx.x - uint32(1)`` is -1 there), and an
int8 does not grow beside an int. Functions of ``math`` raise where a GPU gives infinity
or NaN. Shapes of shared and local arrays may be known only at run time, which Numba
refuses. A thread that spins until another does something spins for ever.
"""

import inspect
import operator
import random
import threading
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import numpy as np

from minidsv3.gpu.binding import numbas, rebound
from minidsv3.gpu.counts import Access, Counts, table
from minidsv3.gpu.dialect import cuda, warp_operation
from minidsv3.gpu.memory import CheckedArray, beginning
from minidsv3.gpu.races import Memory
from minidsv3.gpu.reports import (
    AlignmentError,
    BoundsError,
    DivergenceError,
    RaceError,
    SimulatorError,
    UninitialisedError,
)
from minidsv3.gpu.threads import Block, Dim3, Launch, running
from minidsv3.gpu.traces import Step, Trace, Tracer
from minidsv3.gpu.watching import Watch, WatchedArray

__all__ = [
    "Access",
    "AlignmentError",
    "BoundsError",
    "DivergenceError",
    "RaceError",
    "SimulatorError",
    "Stats",
    "Step",
    "Trace",
    "UninitialisedError",
    "cuda",
    "launch",
    "warp_operation",
]

MOST_THREADS, MOST_DEEP, MOST_BLOCKS_ACROSS = 1024, 64, 65535
"""Of a block; of it along z; of a grid along y and z (CUDA C++ Programming Guide)."""
# Held while threads run: there is one processor, and `threads.running` has it.
_RUNNING = threading.RLock()
Extent = int | tuple[int, ...]
Order = str | int


@dataclass(frozen=True)
class Stats:
    """What a launch did. A barrier or an operation of a warp counts once for all.

    Accesses are counted one a thread and instruction, so several elements that are read
    at once count once, and atomics of both memories together.
    """

    blocks: int
    threads: int
    barriers: int
    warp_operations: int
    global_reads: int
    global_writes: int
    shared_reads: int
    shared_writes: int
    atomics: int
    accesses: tuple[Access, ...] = ()
    trace: Trace | None = None

    def table(self) -> str:
        """The accesses, which count=True counts, as text for people."""
        return table(self.accesses)

    def __str__(self) -> str:
        return self.table() if self.accesses else repr(self)


def launch(
    kernel: Callable[..., None],
    grid: Extent,
    block: Extent,
    *args: Any,
    order: Order = "rising",
    dynamic_shared: int = 0,
    count: bool = False,
    trace: tuple[int | tuple[int, ...], int] | None = None,
    copies: str = "wait",
) -> Stats:
    """Run ``kernel(*args)`` in every thread of every block; arrays change in place.

    kernel is a plain function, or has one in ``.py_func``; Numba's cuda in it becomes
    ours. grid (how many blocks) and block (how many threads in each) are an integer or
    up to three. NumPy arrays among the arguments are global memory. order says who goes
    first, among blocks and among threads: "rising", "falling", or an integer, the seed
    of a random order; a correct kernel does not care. dynamic_shared is the number of
    bytes behind ``cuda.shared.array(0, dtype)``.

    copies says when asynchronous copies happen, at their "issue" or as late as may be,
    at the "wait" for them; a correct kernel does not care either.

    count=True also counts what each instruction asks of memory: `Stats.accesses`.
    trace=(block, warp) records what the lanes of that warp do, step by step:
    `Stats.trace`. Both take time. An array's memory begins at a multiple of 256 bytes,
    see `memory.beginning`.

    Raises a `SimulatorError` that says what is wrong and where. An exception of the
    kernel's own comes through as it is, with a note on who raised it and where. The
    arrays then hold what was written so far.
    """
    with _RUNNING:  # another host thread's launch ends first
        if running.thread is not None:
            raise SimulatorError("a kernel cannot launch another one")
    function = rebound(kernel, numbas(cuda))
    if not isinstance(function, FunctionType):
        raise SimulatorError(f"a kernel is a plain function, not {kernel!r}")
    run = Launch(
        kernel=function.__name__,
        entry=lambda: None,
        grid=_extent("grid", grid),
        block=_extent("block", block),
        arranged=_arrangement(order),
        dynamic_shared=operator.index(dynamic_shared),
        greenlet=_greenlet(),
        context=_silent(),
        array=WatchedArray if count or trace else CheckedArray,
        copies=_policy(copies),
    )
    _within_limits(run, grid, block)
    checked = _checked(function, args, run)
    run.entry = lambda: function(*checked)
    counts = Counts() if count else None
    tracer = _tracer(run, trace) if trace else None
    if counts or tracer:
        run.watch = Watch(*[each.hear for each in (counts, tracer) if each])
    indices, places = run.block.indices(), run.grid.indices()
    with _RUNNING:
        for index in run.arranged(places):
            Block(run, index, indices).run()
            if run.watch:
                run.watch.end_block()
            if counts:
                counts.end_block()
    return replace(
        _stats(run, len(places), len(indices)),
        accesses=counts.accesses() if counts else (),
        trace=tracer.trace() if tracer else None,
    )


def _greenlet() -> type:
    try:
        from greenlet import greenlet
    except ImportError as error:
        raise ImportError(
            "the CUDA simulator runs its threads on greenlet: pip install greenlet"
        ) from error
    return greenlet


def _extent(what: str, size: Extent) -> Dim3:
    """A grid or a block in three numbers."""
    sizes = size if isinstance(size, tuple | list) else (size,)
    try:
        extent = Dim3(*map(operator.index, sizes))
    except TypeError:
        extent = Dim3(0)
    if min(extent) < 1 or not sizes:
        raise SimulatorError(
            f"{what} is {size!r}: it must be a positive integer or up to three of them"
        )
    return extent


def _within_limits(run: Launch, grid: Extent, block: Extent) -> None:
    """Raise SimulatorError for a launch that is larger than a GPU takes."""
    x, y, z = run.block
    if x * y * z > MOST_THREADS:
        raise SimulatorError(
            f"block is {block}: a block has at most {MOST_THREADS} threads. "
            "Launch more blocks instead."
        )
    if z > MOST_DEEP:
        raise SimulatorError(
            f"block is {block}: along z a block has at most {MOST_DEEP} threads. Let "
            "the longest axis be x."
        )
    if max(run.grid.y, run.grid.z) > MOST_BLOCKS_ACROSS:
        raise SimulatorError(
            f"grid is {grid}: along y and z there are at most "
            f"{MOST_BLOCKS_ACROSS} blocks. Let the longest axis be x."
        )


def _tracer(run: Launch, trace: Any) -> Tracer:
    """Who records the warp that ``trace=(block, warp)`` names."""
    try:
        block, warp = trace
        index = block if isinstance(block, tuple | list) else (block,)
        index = [*map(operator.index, index)] + [0] * (3 - len(index))
        return Tracer(run, Dim3(*index), operator.index(warp))
    except (TypeError, ValueError):
        raise SimulatorError(
            f"trace is {trace!r}: it must be (block, warp), a block's index, an "
            "integer or up to three of them, and a warp's number in it"
        ) from None


def _policy(copies: str) -> str:
    if copies not in ("issue", "wait"):
        raise SimulatorError(f'copies is {copies!r}: it must be "issue" or "wait"')
    return copies


def _arrangement(order: Order) -> Callable[[list], list]:
    """A function that puts blocks, or threads that are ready, in the order they go."""
    if order == "rising":
        return list
    if order == "falling":
        return lambda ready: ready[::-1]
    if not isinstance(order, int):
        raise SimulatorError(
            f'order is {order!r}: it must be "rising", "falling" or a seed, an integer'
        )
    generator = random.Random(order)
    return lambda ready: generator.sample(ready, len(ready))


def _checked(function: FunctionType, args: tuple, run: Launch) -> list:
    """The arguments, with arrays that are checked and know their parameters' names."""
    signature = inspect.signature(function)
    try:
        signature.bind(*args)
    except TypeError as error:
        raise SimulatorError(
            f"kernel {run.kernel}{signature} got {len(args)} arguments: {error}",
            kernel=run.kernel,
        ) from None
    names = [*signature.parameters]
    names += names[-1:] * (len(args) - len(names))  # *args share theirs
    memory = Memory("global", run.traffic["global"], None)
    return [
        run.array(arg, name, memory, beginning(arg))
        if isinstance(arg, np.ndarray)
        else arg
        for name, arg in zip(names, args, strict=False)
    ]


def _silent() -> Context:
    """Where threads run: a GPU overflows and divides by zero without a word."""
    with np.errstate(all="ignore"):
        return copy_context()


def _stats(run: Launch, blocks: int, threads: int) -> Stats:
    reads, writes, atomics = run.traffic["global"]
    shared_reads, shared_writes, shared_atomics = run.traffic["shared"]
    return Stats(
        blocks=blocks,
        threads=blocks * threads,
        barriers=run.barriers,
        warp_operations=run.warp_operations,
        global_reads=reads,
        global_writes=writes,
        shared_reads=shared_reads,
        shared_writes=shared_writes,
        atomics=atomics + shared_atomics,
    )
