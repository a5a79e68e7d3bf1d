"""One answer, judged. This runs in a process of its own (see ``workers.py``).

Expected results are computed before any line of the answer runs. The answer's cell is
executed alone, with the notebook's imports and what ``needs`` or ``assembles`` hands
in. If a result is wrong, the misconceptions are tried: an answer that equals one of
them on all cases is told its name.
"""

import ast
import contextlib
import copy
import inspect
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from grader import calls, spec
from grader.cell import (
    Answer,
    Fault,
    explained,
    library_locked,
    load,
    parsed,
    reference_function,
    unknown,
)
from grader.compare import (
    Tolerance,
    WithGradients,
    WrongForm,
    as_tuple,
    fault,
    same,
    shown,
)
from grader.complaint import ARGUMENT
from grader.source import Exercise, find
from grader.tensors import NOTE
from grader.verdict import FAILED, PASSED, STUB, TODO, Verdict, wrapped

PRINT_LIMIT = 20_000  # characters kept of what an answer prints


@dataclass(frozen=True)
class Raised:
    """A call that ended in an exception instead of a result."""

    error: BaseException


@dataclass(frozen=True)
class Outcome:
    """What one case came to: a result, `Raised` or a `Complaint`; and its prints."""

    value: object
    printed: str


class Printed(io.StringIO):
    """Keeps the beginning of what is printed; ten megabytes cost nothing."""

    lost = 0  # lines beyond what is kept

    def write(self, text: str) -> int:
        """Take the text, keep it while there is room."""
        room = max(PRINT_LIMIT - self.tell(), 0)
        super().write(text[:room])
        self.lost += text.count("\n", room)
        return len(text)

    def cut(self) -> str:
        """What was printed since the last cut."""
        text = self.getvalue() + "\n" * self.lost
        self.seek(0)
        self.truncate()
        self.lost = 0
        return text


def grade(answer: Answer, progress: Callable[[str], None] = print) -> Verdict:
    """The verdict on one answer. ``progress`` is told which case begins."""
    exercise, check = find(answer.id), spec.find(answer.id)
    if exercise.is_stub(answer.text):
        return Verdict(answer.id, TODO, STUB)
    cases = check.cases()
    expected = expectations(exercise, check, cases)
    printed = Printed()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            tree = parsed(answer.text, exercise)
            function = load(answer, exercise, tree)
            outcomes = run(function, check, exercise.kind, cases, progress, printed.cut)
        with np.errstate(all="ignore"):
            judge(outcomes, expected, exercise, check, cases)
    except Fault as wrong:
        more = {"printed": printed.cut(), **wrong.more}
        return Verdict(answer.id, FAILED, wrong.headline, wrong.advice, **more)
    way = f"one way to write it: {exercise.solution_path}, {exercise.name}"
    return Verdict(answer.id, PASSED, notes=(way,))


# --- the calls --------------------------------------------------------------------


def expectations(
    exercise: Exercise, check: spec.Check, cases: Sequence[spec.Case]
) -> list[tuple]:
    """The right results of every case, one array for each name."""
    function = check.oracle or reference_function(exercise)
    called = check.oracle or partial(check.call, function)
    with np.errstate(all="ignore"):
        right = [
            called(*copy.deepcopy(case.args), **copy.deepcopy(case.kwargs))
            for case in cases
        ]
    results = [
        as_tuple(value, check.results(case))
        for value, case in zip(right, cases, strict=True)
    ]
    if None in results:
        raise spec.SpecError(f"{check.id}: the reference does not give {check.returns}")
    return results


def run(
    function: Callable,
    check: spec.Check,
    kind: str,
    cases: Sequence[spec.Case],
    progress: Callable[[str], None],
    printed: Callable[[], str] = str,
    begin: int = 1,
) -> list[Outcome]:
    """The outcome of each case, up to the one that ran out of time.

    begin: which case the first one is, where only some of them are run.
    """
    outcomes = []
    caller = calls.ready(kind, function)
    with library_locked(), np.errstate(all="ignore"):
        for number, case in enumerate(cases, start=begin):
            progress(f"case {number} of {len(cases)}: {case.label}")
            value: object
            try:
                value = caller(function, check, case, first=number == 1)
            except (Exception, SystemExit, KeyboardInterrupt, calls.TimeUp) as error:
                value = Raised(error)
            outcomes.append(Outcome(value, printed()))
            if isinstance(value, Raised) and isinstance(value.error, calls.TimeUp):
                break
    return outcomes


def judge(
    outcomes: list[Outcome],
    expected: list[tuple],
    exercise: Exercise,
    check: spec.Check,
    cases: Sequence[spec.Case],
) -> None:
    """Raise Fault if an outcome is wrong: the misconception's name, or what is seen."""
    tolerance = check.tolerance
    for number, (outcome, right, case) in enumerate(
        zip(outcomes, expected, cases, strict=False), start=1
    ):
        said, more = _complaint(outcome.value, right, check, tolerance)
        if said is None:
            continue
        about = argument(outcome.value, exercise, check)
        said = said.replace(ARGUMENT, about)
        if "notes" in more:
            more["notes"] = tuple(n.replace(ARGUMENT, about) for n in more["notes"])
        headline, _, seen = said.partition("\n")
        advice = more.pop("advice", "")
        likeness, named = misconception(outcomes, exercise, check, cases, number)
        if named is not None:
            many = len(check.results(case)) > 1  # which of them is it about?
            if many or not seen or _report(outcome.value):
                seen = f"{headline}\n{seen}".rstrip("\n")
            headline, advice = f"{likeness}: {named.name}", named.why
        where = f"case {number} of {len(cases)}: {case.label}"
        lines = [arguments(case, exercise, check, tiny=number > 1), seen]
        detail = "\n".join([where, *(_indented(text) for text in lines if text)])
        raise Fault(headline, advice, detail=detail, printed=outcome.printed, **more)


def _complaint(
    outcome: object, right: tuple, check: spec.Check, tolerance: Tolerance
) -> tuple[str | None, dict]:
    if isinstance(outcome, Raised):
        headline, advice = explained(outcome.error)
        return headline, {"advice": advice, **unknown(outcome.error)}
    if isinstance(outcome, calls.Complaint):
        said = _wrong(outcome.value, right, check, tolerance) if outcome.last else None
        if _is_gradient(said, outcome.value, check):
            return said, {"notes": (NOTE,)}
        if said:
            return said, {"notes": (f"And: {outcome.headline[0].lower()}"
                                    f"{outcome.headline[1:]}.",)}  # fmt: skip
        said = f"{outcome.headline}\n{wrapped(outcome.report)}".rstrip("\n")
        return said, {"advice": outcome.advice}
    said = _wrong(outcome, right, check, tolerance)
    return said, {"notes": (NOTE,)} if _is_gradient(said, outcome, check) else {}


def _wrong(
    value: object, right: tuple, check: spec.Check, tolerance: Tolerance
) -> str | None:
    names = _names(value, check)
    return fault(value, right[: len(names)], names, tolerance)


def _names(value: object, check: spec.Check) -> tuple[str, ...]:
    """What a value holds: an answer may have failed before it had gradients."""
    further = check.gradients if isinstance(value, WithGradients) else ()
    return (*check.returns, *further)


def _is_gradient(said: str | None, value: object, check: spec.Check) -> bool:
    """Whether a fault is that of a gradient."""
    if said is None or not isinstance(value, WithGradients):
        return False
    return any(said.startswith((f"{d}:", f"{d}[")) for d in check.gradients)


def misconception(
    outcomes: list[Outcome],
    exercise: Exercise,
    check: spec.Check,
    cases: Sequence[spec.Case],
    failed: int,
) -> tuple[str, spec.Wrong | None]:
    """The wrong answer that does on every case what this one does.

    Else the only one that does it on the first case that failed, for a mistake is often
    made in a way, or in company, that no list has.
    """
    here = []
    for wrong in check.wrong:
        function = reference_function(exercise, wrong.patched(exercise.reference))
        quietly = partial(run, function, check, exercise.kind, progress=lambda _: None)
        failing = cases[failed - 1 : failed]
        (one,) = quietly(failing, begin=failed)  # most are another mistake: be quick
        if not alike(outcomes[failed - 1].value, one.value, check, check.tolerance):
            continue
        theirs = quietly(cases)
        if len(theirs) != len(outcomes):
            continue
        equal = [
            alike(one.value, two.value, check, check.tolerance)
            for one, two in zip(outcomes, theirs, strict=True)
        ]
        if all(equal):
            return "Looks like", wrong
        if equal[failed - 1] and _tells(outcomes[failed - 1].value):
            here.append(wrong)
    return "On this case it looks like", here[0] if len(here) == 1 else None


def _tells(value: object) -> bool:
    """Whether a wrong result is particular enough to be known by one case alone."""
    if _is_failure(value) or value is ... or value is None:
        return False
    if isinstance(value, WithGradients):
        value = tuple(value.values())
    results = value if isinstance(value, tuple) else (value,)
    arrays = [r for r in results if isinstance(r, np.ndarray | np.generic)]
    return len(arrays) == len(results) and any(np.isfinite(a).any() for a in arrays)


def alike(one: object, two: object, check: spec.Check, tolerance: Tolerance) -> bool:
    """Whether two outcomes are the same: the same results, or the same failure."""
    if type(one) is not type(two) and (_is_failure(one) or _is_failure(two)):
        return False
    if isinstance(one, Raised):
        said = {str(e.error) for e in (one, two) if isinstance(e.error, WrongForm)}
        return type(one.error) is type(two.error) and len(said) < 2
    if isinstance(one, calls.Complaint):
        facts = [(c.headline, c.argument, c.where) for c in (one, two)]
        if facts[0] != facts[1]:
            return False
        one, two = one.value, two.value
    names = _names(one, check)
    return names == _names(two, check) and same(one, two, names, tolerance)


def _report(outcome: object) -> str:
    return outcome.report if isinstance(outcome, calls.Complaint) else ""


def _is_failure(outcome: object) -> bool:
    return isinstance(outcome, Raised | calls.Complaint)


# --- in words ---------------------------------------------------------------------


def arguments(
    case: spec.Case, exercise: Exercise, check: spec.Check, tiny: bool
) -> str:
    """The arguments of a case, if a few lines can show them; ``tiny``: very few."""
    lines, numbers = [], 0
    for name, value in zip(parameters(exercise, check), case.args, strict=False):
        if isinstance(value, np.ndarray | int | float):
            numbers += np.size(value)
            text = shown(value).replace("\n", "\n" + " " * 10)
            lines.append(f"{name:9} {text}")
    text = "\n".join(lines)
    return text if text.count("\n") < 12 and (numbers < 10 or not tiny) else ""


def argument(outcome: object, exercise: Exercise, check: spec.Check) -> str:
    """The name of the argument that a complaint is about."""
    number = getattr(outcome, "argument", 0)
    names = ["", *parameters(exercise, check)]
    known = 0 < number < len(names)
    return f"argument `{names[number]}`" if known else "argument"


def parameters(exercise: Exercise, check: spec.Check) -> list[str]:
    """The names of the arguments of a case: those of the function asked for.

    Or those of the check's own call, where that makes of them what it hands in.
    """
    own = list(inspect.signature(check.call).parameters.values())[1:]
    if exercise.kind == "torch" and all(p.kind is p.POSITIONAL_OR_KEYWORD for p in own):
        return [parameter.name for parameter in own]
    for node in ast.parse(exercise.stub).body:
        if isinstance(node, ast.FunctionDef) and node.name == exercise.name:
            return [argument.arg for argument in node.args.args]
    return []


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())
