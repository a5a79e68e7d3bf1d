"""Operations of a warp: 32 lanes hand in their values, and each gets an answer.

`WARP_OPS` is the table of them. An operation is a function of what the lanes that take
part gave, ``{lane: operands}``, and returns ``{lane: answer}``. To add one, add a line
and call it from the kernel's side with `dialect.warp_operation`. It need not check who
takes part: that was done before it is called.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from minidsv3.gpu.tensor_cores import ldmatrix, mma_bf16

WARP_SIZE = 32
FULL_MASK = 0xFFFFFFFF

Lanes = dict[int, tuple]
Answers = dict[int, Any]


class InactiveLaneError(LookupError):
    """A lane asked for the value of a lane that takes no part."""

    def __init__(self, reader: int, source: int) -> None:
        super().__init__(reader, source)
        self.reader, self.source = reader, source


def _shuffle(source: Callable[[int, int], int]) -> Callable[[Lanes], Answers]:
    """Each lane reads the value of another, ``source(lane, operand)``.

    A source outside the warp means that a lane keeps its own value, as on a GPU.
    """

    def shuffle(lanes: Lanes) -> Answers:
        answers = {}
        for lane, (own, operand) in lanes.items():
            other = source(lane, int(operand))
            if 0 <= other < WARP_SIZE and other not in lanes:
                raise InactiveLaneError(lane, other)
            answers[lane] = lanes[other][0] if other in lanes else own
        return answers

    return shuffle


def _vote(count: Callable[[Lanes], Any]) -> Callable[[Lanes], Answers]:
    """All lanes get the same answer, a function of everybody's predicate."""
    return lambda lanes: dict.fromkeys(lanes, count(lanes))


def _ballot(lanes: Lanes) -> int:
    """Bit i is set if lane i's predicate is true."""
    return sum(1 << lane for lane, (predicate,) in lanes.items() if predicate)


WARP_OPS: dict[str, Callable[[Lanes], Answers]] = {
    "syncwarp": _vote(lambda lanes: None),
    "shfl_sync": _shuffle(lambda lane, source: source % WARP_SIZE),
    "shfl_xor_sync": _shuffle(lambda lane, bits: lane ^ bits),
    "shfl_up_sync": _shuffle(lambda lane, delta: lane - delta),
    "shfl_down_sync": _shuffle(lambda lane, delta: lane + delta),
    "ballot_sync": _vote(_ballot),
    "any_sync": _vote(lambda lanes: _ballot(lanes) != 0),
    "all_sync": _vote(lambda lanes: all(predicate for (predicate,) in lanes.values())),
    "ldmatrix": ldmatrix,
    "ldmatrix_transposed": partial(ldmatrix, transposed=True),
    "mma_bf16": mma_bf16,
}
