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
    graph: bool = field(default=True, kw_only=True)  # torch: look at gradients as well


@dataclass(frozen=True)
class Limit:
    """The most that a launch may ask of memory, and the headline if it asks more.

    counted: "sectors" or "bytes" of global memory, "passes" or "conflicts" of shared
    memory, as `minidsv3.gpu.counts` counts them. array: the position of the argument
    that it is about; None: all arrays there. kind: "read" or "write"; empty: both. why:
    what is said of it where no misconception has the same count.
    """

    headline: str
    counted: str
    most: int
    array: int | None = None
    kind: str = ""
    why: str = ""


@dataclass(frozen=True)
class Launch(Case):
    """One launch of a kernel: the arrays whose positions ``outputs`` names come back.

    They are handed to the kernel full of NaN (integers: of their lowest value). A right
    result is refused all the same if the launch breaks one of the ``limits``.
    """

    grid: int | tuple[int, ...]
    block: int | tuple[int, ...]
    outputs: tuple[int, ...]
    dynamic_shared: int = 0
    limits: tuple[Limit, ...] = ()


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
    where one of them may vanish. ``gradients``, of a torch exercise: further results,
    each with the place of the tensor that it belongs to, an argument's number or that
    and a key; the oracle gives them too, for what `tensors.arriving` sends back.
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
    gradients: Mapping[str, int | tuple[int, str]] = field(default_factory=dict)

    def results(self, case: Case) -> tuple[str, ...]:
        """The names of all that is compared on a case."""
        return (*self.returns, *(self.gradients if case.graph else ()))

    @property
    def tolerance(self) -> Tolerance:
        """How near is near enough."""
        return Tolerance(self.rtol, self.atol, self.exact_zeros, self.joint_scale)


def find(id_: str) -> Check:
    """The check of one exercise: that of ``moe.2`` is in a ``checks/moe*.py``, that of
    ``moe.torch.2`` there or in a ``checks/torch*.py``.

    Raises SpecError if there is none.
    """
    *names, _ = id_.split(".")
    for name in reversed(names):
        for path in sorted(CHECKS.glob(f"{name}*.py")):
            for check in importlib.import_module(f"checks.{path.stem}").CHECKS:
                if check.id == id_:
                    return check
    files = " or ".join(f"checks/{name}*.py" for name in names)
    raise SpecError(f"no {files} says anything of {id_}")
