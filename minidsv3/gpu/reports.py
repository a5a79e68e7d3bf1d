"""What can be wrong with a kernel, said so that its author can mend it."""

import linecache
import os
import sys
from types import CodeType, FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from minidsv3.gpu.threads import Thread

KERNEL_MATTER = "reductions.py"
"""In this folder, but part of kernels: device functions, seen line by line."""
HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")


class SimulatorError(Exception):
    """A kernel, or a launch of it, that a GPU would not carry out as it is meant.

    The message is for people. For programs, each fact of it is an attribute, None where
    it does not apply; a block and a thread are (x, y, z).

    kernel: the launched function's name. function, file, line, text: where it happened,
    in the kernel or in a device function. block, thread: who did it. others: further
    threads that have part in it, of the block other_block; other_line: what they did.
    array, index: which element, under the kernel's own name for the array.
    """

    kernel: str | None = None
    function: str | None = None
    file: str | None = None
    line: int | None = None
    text: str | None = None
    block: tuple[int, int, int] | None = None
    thread: tuple[int, int, int] | None = None
    others: tuple[tuple[int, int, int], ...] = ()
    other_block: tuple[int, int, int] | None = None
    other_line: int | None = None
    array: str | None = None
    index: int | tuple | None = None

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        for name, fact in facts.items():
            setattr(self, name, fact)


class RaceError(SimulatorError):
    """Two threads touch one element, one of them writes, and nothing orders the two."""


class BoundsError(SimulatorError):
    """An index outside the array, or the wrong number of indices."""


class AlignmentError(SimulatorError):
    """An access to several elements at once, at an address it cannot have."""


class DivergenceError(SimulatorError):
    """A barrier, or an operation of a warp, that not all it waits for will reach."""


class UninitialisedError(SimulatorError):
    """A shared or local element that is read before anything was written to it."""


class Place(NamedTuple):
    """A line of a kernel or of a device function."""

    function: str
    file: str
    line: int

    @property
    def text(self) -> str:
        """The source of the line; empty where there is none to be had."""
        linecache.checkcache(self.file)
        return linecache.getline(self.file, self.line).strip()


class _Ours(dict[str, bool]):
    """Whether a file is the simulator's, looked up once each: every access asks."""

    def __missing__(self, file: str) -> bool:
        self[file] = file.startswith(HERE) and not file.endswith(KERNEL_MATTER)
        return self[file]


ours = _Ours()


def kernel_frame(depth: int = 1) -> FrameType:
    """The innermost frame that is not the simulator's: the kernel's, or a function's.

    ``depth`` is where to start looking, counted from the caller: 1 is its own caller.
    """
    frame = sys._getframe(depth + 1)
    while ours[frame.f_code.co_filename]:
        frame = frame.f_back
    return frame


def calls() -> tuple[Place, ...]:
    """Where the running thread is, from the innermost function out to the kernel."""
    frame, places = kernel_frame(), []
    while not ours[(code := frame.f_code).co_filename]:
        places.append(Place(code.co_name, code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return tuple(places)


def call_path() -> tuple[tuple[CodeType, int], ...]:
    """Like `calls`, but code and instruction (a frame's f_lasti)."""
    frame, path = kernel_frame(), []
    while not ours[(code := frame.f_code).co_filename]:
        path.append((code, frame.f_lasti))
        frame = frame.f_back
    return tuple(path)


def call_key() -> tuple[int, ...]:
    """What tells one `call_path` from another, quickly, as long as its codes live."""
    frame, key = kernel_frame(), []
    while not ours[(code := frame.f_code).co_filename]:
        key += id(code), frame.f_lasti
        frame = frame.f_back
    return tuple(key)


def place_of(code: CodeType, instruction: int) -> Place:
    """The line that an instruction (a frame's f_lasti) of a function comes from."""
    for start, end, line in code.co_lines():
        if start <= instruction < end and line is not None:
            return Place(code.co_name, code.co_filename, line)
    return Place(code.co_name, code.co_filename, code.co_firstlineno)


def source_of(code: CodeType, instruction: int) -> str:
    """The piece of a line that an instruction comes from; empty if it is not known."""
    positions = [*code.co_positions()]
    line, last, start, end = positions[instruction // 2]
    if start is None or end is None or line != last:
        return ""
    linecache.checkcache(code.co_filename)
    text = linecache.getline(code.co_filename, line).encode()  # counted in bytes
    return text[start:end].decode()


def raised_at(trace: TracebackType) -> Place:
    """The innermost line outside the simulator that an exception came through."""
    places = []
    while trace:
        code = trace.tb_frame.f_code
        places.append(Place(code.co_name, code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    return [p for p in places if not ours[p.file]][-1]


def report(
    kind: type[SimulatorError],
    thread: "Thread",
    what: str,
    advice: str,
    place: Place | None = None,
    **facts: Any,
) -> SimulatorError:
    """The error that says: this thread, at this line, did this; do that instead.

    Without a place it is where the thread stands now.
    """
    place = place or calls()[0]
    text = place.text
    lines = [f"{whereabouts(thread, place)}: {what}", *[f"    {text}"] * bool(text)]
    return kind(
        "\n".join([*lines, advice]),
        **place._asdict(),
        text=text or None,
        kernel=thread.block.launch.kernel,
        block=tuple(thread.block.index),
        thread=tuple(thread.index),
        **facts,
    )


def whereabouts(thread: "Thread", place: Place) -> str:
    """A line, a block and a thread, as every message names them."""
    kernel = thread.block.launch.kernel
    function = "" if place.function == kernel else f" in {place.function},"
    return (
        f"kernel {kernel},{function} line {place.line}, "
        f"block {thread.block}, thread {thread}"
    )
