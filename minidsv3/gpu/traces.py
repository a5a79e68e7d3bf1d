"""One warp of a launch, step by step: which lanes took part, with which values."""

import math
from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

from minidsv3.gpu.reports import SimulatorError
from minidsv3.gpu.threads import Dim3, Launch
from minidsv3.gpu.warps import WARP_SIZE
from minidsv3.gpu.watching import Event, Turn

MOST_EXACT = 2**53  # JavaScript's numbers hold integers up to here


@dataclass(frozen=True)
class Step:
    """What lanes of the warp did at once.

    function, line, text: where; expression: the piece of the line. op: "read", "write",
    "atomic", "syncthreads" or one of `warps.WARP_OPS`. space, array: of an access.
    mask: of a warp's operation. lanes: those that took part.

    Three values for each of the 32 lanes, None where there is none. indices: which
    element, within the view that was used. operands: what the lane hands in, for an
    operation of a warp a tuple; after a write or an atomic what is in memory. answers:
    what the lane gets, from an atomic what was there before. An access to several
    elements has a tuple of values, and the first one's index. offsets: how many bytes
    an access is from the beginning of its array; width: how many it takes.
    """

    function: str
    line: int
    text: str
    expression: str
    op: str
    space: str | None
    array: str | None
    mask: int | None
    lanes: tuple[int, ...]
    indices: tuple
    operands: tuple
    answers: tuple
    offsets: tuple = (None,) * WARP_SIZE
    width: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The same in dicts, lists, strings and numbers, see `Trace.as_dict`."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


@dataclass(frozen=True)
class Trace:
    """The steps of one warp. block is (x, y, z), threads how many lanes it has."""

    kernel: str
    block: tuple[int, int, int]
    warp: int
    threads: int
    steps: tuple[Step, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same, as JSON and JavaScript can hold it without losing a bit.

        Numbers that they lack become strings that JavaScript's Number, or BigInt,
        understands: "NaN", "Infinity", "-Infinity", and integers beyond 2**53.
        """
        plain = {name: _plain(getattr(self, name)) for name in ("kernel", "block")}
        plain |= {"warp": self.warp, "threads": self.threads}
        return plain | {"steps": [step.as_dict() for step in self.steps]}


class Tracer:
    """Listens to a `watching.Watch`, and keeps what one warp did."""

    def __init__(self, launch: Launch, block: Dim3, warp: int) -> None:
        self.kernel, self.block, self.warp = launch.kernel, block, warp
        size = launch.block.x * launch.block.y * launch.block.z
        inside = all(0 <= b < g for b, g in zip(block, launch.grid, strict=True))
        if not inside or not 0 <= warp < -(-size // WARP_SIZE):
            raise SimulatorError(
                f"trace names warp {warp} of block {tuple(block)}: the grid is "
                f"{tuple(launch.grid)}, and a block has {-(-size // WARP_SIZE)} warps, "
                "counted from 0."
            )
        self.threads = min(WARP_SIZE, size - WARP_SIZE * warp)
        self.lanes: list[list[Event]] = [[] for _ in range(self.threads)]

    def hear(self, event: Event) -> None:
        """Keep the event, if it is about our warp."""
        thread = event.thread
        warp = thread.block.warps[self.warp]
        if thread.warp is warp and thread.block.index == self.block:
            self.lanes[thread.lane].append(event)

    def trace(self) -> Trace:
        """What was heard, put in order."""
        steps = tuple(map(_step, in_steps(self.lanes)))
        return Trace(self.kernel, tuple(self.block), self.warp, self.threads, steps)


def in_steps(lanes: list[list[Event]]) -> list[list[Event]]:
    """The events of each lane in its order, made into steps: lanes of the same turn.

    A step waits until all its lanes have come to it; of several that could go on, the
    one that stands first in the program does. Where lanes wait for each other, having
    gone through the same lines in another order, those go alone that did theirs the
    fewest times: they are behind, so a loop's lanes are together at its next turn.
    """
    missing = Counter(event.turn for events in lanes for event in events)
    heads = [iter(events) for events in lanes]
    waiting: dict[Turn, list[Event]] = {}
    for head in heads:
        _advance(head, waiting)
    steps = []
    while waiting:
        complete = [t for t, events in waiting.items() if len(events) == missing[t]]
        if complete:
            turn = min(complete, key=lambda turn: turn.site.order)
        else:
            turn = min(waiting, key=lambda turn: (turn.time, turn.site.order))
        step = waiting.pop(turn)
        missing[turn] -= len(step)
        steps.append(sorted(step, key=lambda event: event.thread.lane))
        for event in step:
            _advance(heads[event.thread.lane], waiting)
    return steps


def _advance(head: Any, waiting: dict[Turn, list[Event]]) -> None:
    """A lane comes to its next event."""
    if event := next(head, None):
        waiting.setdefault(event.turn, []).append(event)


def _step(events: list[Event]) -> Step:
    turn, place = events[0].turn, events[0].turn.site.place
    of_lane = {event.thread.lane: event for event in events}
    values = (
        tuple(getattr(of_lane.get(lane), name, None) for lane in range(WARP_SIZE))
        for name in ("index", "operand", "answer", "offset")
    )
    return Step(
        place.function,
        place.line,
        place.text,
        turn.site.expression,
        turn.op,
        turn.space,
        turn.array,
        turn.mask,
        tuple(of_lane),
        *values,
        width=turn.width,
    )


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    if kind == "b":
        return bool(value)
    if isinstance(value, int) or kind in ("i", "u"):
        return int(value) if abs(int(value)) <= MOST_EXACT else str(int(value))
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else f"{'-' * (number < 0)}Infinity"
