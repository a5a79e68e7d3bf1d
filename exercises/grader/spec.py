"""What a chapter says of its exercises beyond the source: see ``checks/``.

A misconception is a patch on the reference: ``old`` occurs in it exactly once and is
replaced by ``new``, so that it cannot drift away from the reference unnoticed.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grader.compare import Tolerance

CHECKS = Path(__file__).parents[1] / "checks"
RTOL, ATOL = 1e-4, 1e-5  # float32 inside an answer is no mistake


class SpecError(ValueError):
    """A check that contradicts itself or the source."""


@dataclass(frozen=True)
class Case:
    """One call. The first case of an exercise is tiny, for it is printed."""

    label: str
    args: tuple
    kwargs: Mapping[str, Any] = field(default_factory=dict, kw_only=True)


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
    more: tuple[tuple[str, str], ...] = ()  # the same mistake, made elsewhere too

    def patched(self, reference: str) -> str:
        """The reference with this mistake in it. Raises SpecError if it drifted."""
        for old, new in ((self.old, self.new), *self.more):
            if (times := reference.count(old)) != 1:
                raise SpecError(
                    f"wrong answer {self.name!r}: {old!r} occurs {times} times in the "
                    "reference, must be once"
                )
            reference = reference.replace(old, new)
        return reference


def call(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """How an answer is run, unless a check knows better."""
    return function(*args, **kwargs)


@dataclass(frozen=True)
class Check:
    """How the answers to one exercise are judged, and what helps.

    ``returns`` names the results; ``oracle`` gives the right ones for a case's
    arguments (None: the reference does); ``call`` runs an answer on them, and may raise
    `compare.WrongForm`. ``exact_zeros``: what is zero must be zero, not nearly.
    ``joint_scale``: small is measured against the largest number of all results, for
    where one of them may vanish.
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
    exact_zeros: bool = False
    joint_scale: bool = False

    @property
    def tolerance(self) -> Tolerance:
        """How near is near enough."""
        return Tolerance(self.rtol, self.atol, self.exact_zeros, self.joint_scale)


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
