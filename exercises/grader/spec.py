"""What a chapter says of its exercises beyond the source: see ``checks/``.

A misconception is a patch on the reference: ``old`` occurs in it exactly once and is
replaced by ``new``, so that it cannot drift away from the reference unnoticed.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKS = Path(__file__).parents[1] / "checks"
RTOL, ATOL = 1e-4, 1e-5  # float32 inside an answer is no mistake


class SpecError(ValueError):
    """A check that contradicts itself or the source."""


@dataclass(frozen=True)
class Case:
    """One call. The first case of an exercise is tiny, for it is printed."""

    label: str
    args: tuple


@dataclass(frozen=True)
class Launch(Case):
    """One launch of a kernel: the arrays whose positions ``outputs`` names come back.

    They are handed to the kernel full of NaN (integers: of their lowest value).
    """

    grid: int | tuple[int, ...]
    block: int | tuple[int, ...]
    outputs: tuple[int, ...]
    dynamic_shared: int = 0


@dataclass(frozen=True)
class Wrong:
    """A misconception: its name, the patch, and what to say of it."""

    name: str
    old: str
    new: str
    why: str

    def patched(self, reference: str) -> str:
        """The reference with this mistake in it. Raises SpecError if it drifted."""
        if (times := reference.count(self.old)) != 1:
            raise SpecError(
                f"wrong answer {self.name!r}: {self.old!r} occurs {times} times in the "
                "reference, must be once"
            )
        return reference.replace(self.old, self.new)


def call(function: Callable, *args: Any) -> Any:
    """How an answer is run, unless a check knows better."""
    return function(*args)


@dataclass(frozen=True)
class Check:
    """How the answers to one exercise are judged, and what helps.

    ``returns`` names the results; ``oracle`` gives the right ones for a case's
    arguments (None: the reference does); ``call`` runs an answer on them.
    """

    id: str
    returns: tuple[str, ...]
    cases: Callable[[], Sequence[Case]]
    hints: tuple[str, str, str]
    wrong: tuple[Wrong, ...]
    right: tuple[str, ...]
    oracle: Callable | None = None
    call: Callable = call
    rtol: float = RTOL
    atol: float = ATOL  # times the largest expected number


def find(id_: str) -> Check:
    """The check of one exercise: that of ``moe.2`` is in a ``checks/moe*.py``.

    Raises SpecError if there is none.
    """
    chapter = id_.partition(".")[0]
    for path in sorted(CHECKS.glob(f"{chapter}*.py")):
        for check in importlib.import_module(f"checks.{path.stem}").CHECKS:
            if check.id == id_:
                return check
    raise SpecError(f"no checks/{chapter}*.py says anything of {id_}")
