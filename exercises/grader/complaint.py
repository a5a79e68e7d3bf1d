"""What can be wrong with a call besides its result."""

from dataclasses import dataclass

ARGUMENT = "argument <name>"  # known where the exercise is
NO_ANSWER = "No answer in time: an endless loop?"


class TimeUp(BaseException):
    """The time limit, raised inside the answer so that its line is known."""


@dataclass(frozen=True)
class Complaint:
    """A fault of a call. ``last``: it is told only if the value itself is right.

    report: what was observed, in full. where: the facts of it by which one mistake is
    told from another under the same headline.
    """

    headline: str
    advice: str
    value: object = None
    last: bool = False
    argument: int = 0  # counted from 1, if it is about one
    report: str = ""
    where: tuple = ()

    @classmethod
    def mutated(cls, number: int, value: object) -> "Complaint":
        """An argument was written to."""
        return cls(
            f"Your function changes its {ARGUMENT}",
            "Whoever called it still needs that array. `x -= ...`, `x[...] = ...` and "
            "`out=x` write into it; make a new array.",
            value,
            last=True,
            argument=number,
        )
