"""One answer, judged. This runs in a process of its own (see ``workers.py``).

Expected results are computed before any line of the answer runs. The answer's cell is
executed alone, with the notebook's imports and what ``needs`` or ``assembles`` hands
in. If a result is wrong, the misconceptions are tried: an answer that equals one of
them on all cases is told its name.
"""

import __future__

import ast
import contextlib
import copy
import io
import linecache
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from grader import calls, spec
from grader.compare import Tolerance, as_tuple, fault, same, shown
from grader.source import Exercise, defined_names, find
from grader.verdict import FAILED, PASSED, TODO, Verdict

# What holds the answers, and what answers a NumPy exercise in one call.
LIBRARY = ("minidsv3", "solutions", "checks", "grader")
READY_MADE = ("torch", "scipy", "jax", "tensorflow", "transformers", "sklearn")
PRINT_LIMIT = 20_000  # characters kept of what an answer prints


@dataclass(frozen=True)
class Answer:
    """A cell to be judged, and the learner's other answers that it is run with."""

    id: str
    text: str
    parts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Raised:
    """A call that ended in an exception instead of a result."""

    error: BaseException

    def alike(self, other: object) -> bool:
        """Whether another call ended in the same kind of exception."""
        return isinstance(other, Raised) and type(other.error) is type(self.error)


class Fault(Exception):
    """Why an answer fails, found before or while it ran."""

    def __init__(self, headline: str, advice: str = "", **more: str) -> None:
        super().__init__(headline)
        self.headline, self.advice, self.more = headline, advice, more


class Printed(io.StringIO):
    """Keeps the beginning of what is printed; ten megabytes cost nothing."""

    def write(self, text: str) -> int:
        """Take the text, keep it while there is room."""
        if (room := PRINT_LIMIT - self.tell()) > 0:
            super().write(text[:room])
        return len(text)


def grade(answer: Answer, progress: Callable[[str], None] = print) -> Verdict:
    """The verdict on one answer. ``progress`` is told which case begins."""
    exercise, check = find(answer.id), spec.find(answer.id)
    if exercise.is_stub(answer.text):
        return Verdict(answer.id, TODO)
    cases = check.cases()
    expected = expectations(exercise, check, cases)
    printed = Printed()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            tree = parsed(answer.text, exercise)
            function = load(answer, exercise, tree)
            outcomes = run(function, check, exercise.kind, cases, progress)
        judge(outcomes, expected, exercise, check, cases)
    except Fault as wrong:
        return Verdict(
            answer.id, FAILED, wrong.headline, wrong.advice,
            printed=printed.getvalue(), **wrong.more,
        )  # fmt: skip
    return Verdict(
        answer.id, PASSED, notes=(f"one way to write it: {exercise.solution_path}",)
    )


# --- the cell ---------------------------------------------------------------------


def parsed(text: str, exercise: Exercise) -> ast.Module:
    """The cell's syntax tree. Raises Fault where there is none, or no own function."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise Fault(*_syntax(text, error)) from None
    if exercise.name not in defined_names(tree):
        raise Fault(*_not_written(tree, exercise))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            refuse_import(name, exercise)
    return tree


def refuse_import(name: str, exercise: Exercise) -> None:
    """Raise Fault where a module holds the answer already made."""
    top = name.partition(".")[0]
    if top in LIBRARY:
        raise Fault(
            f"Borrowed from {top}",
            f"The answer is to be written in this cell; `{name}` has it ready-made.",
        )
    if top in READY_MADE and exercise.kind == "numpy":
        raise Fault(
            f"Borrowed from {top}", f"This exercise is NumPy by hand, without {top}."
        )


def _syntax(text: str, error: SyntaxError) -> tuple[str, str]:
    number = error.lineno or 1
    lines = text.splitlines() or [""]
    line = lines[min(number, len(lines)) - 1].strip()
    if line.startswith(("%", "!")):
        return (
            "A notebook command in the answer",
            f"Line {number}, `{line}`, is for Jupyter, not Python: give it a cell of "
            "its own.",
        )
    return "Python cannot read the cell", f"Line {number}: {error.msg}: `{line}`"


def _not_written(tree: ast.Module, exercise: Exercise) -> tuple[str, str]:
    name, found = exercise.name, defined_names(tree)
    for node in tree.body:
        assigned = isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == name for t in node.targets
        )
        imported = isinstance(node, ast.Import | ast.ImportFrom) and any(
            name == (alias.asname or alias.name) for alias in node.names
        )
        if assigned or imported:
            return (
                f"`{name}` is borrowed",
                f"It is another function under this name. Write `def {name}(...)` "
                "yourself, in this cell.",
            )
    there = f"; it defines `{found[-1]}`" if found else ""
    return (
        f"No `{name}` in the cell",
        f"The cell must define a function with the name `{name}`{there}.",
    )


def load(answer: Answer, exercise: Exercise, tree: ast.Module) -> Callable:
    """Execute the cell; return what it defines. Raises Fault."""
    space = namespace(exercise, answer.parts)
    file = remember(answer.id, answer.text)
    with library_locked():
        try:
            exec(compile(tree, file, "exec", dont_inherit=True), space)
        except BaseException as error:
            raise Fault(*explained(error), **unknown(error)) from None
    return space[exercise.name]


def remember(id_: str, text: str) -> str:
    """A file name under which tracebacks find the cell's lines."""
    file = f"<{id_}>"
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    return file


def namespace(exercise: Exercise, parts: Mapping[str, str]) -> dict:
    """What a cell finds when it runs: imports, needed references, the own parts."""
    space: dict = {"__name__": "answer"}
    exec(exercise.prelude, space)
    for needed in exercise.needs:
        other = find(needed)
        space[other.name] = reference_function(other)
    for part in exercise.assembles:
        other = find(part)
        if part in parts:
            own = namespace(other, {})
            exec(compile(parts[part], remember(part, parts[part]), "exec"), own)
            space[other.name] = own[other.name]
        else:
            space[other.name] = reference_function(other)
    return space


def reference_function(exercise: Exercise, text: str | None = None) -> Callable:
    """The reference of an exercise, or a patched one, as a function."""
    text = exercise.reference if text is None else text
    space = namespace(exercise, {})
    flags = __future__.annotations.compiler_flag
    exec(compile(text, f"<reference {exercise.id}>", "exec", flags), space)
    return space[exercise.name]


@contextlib.contextmanager
def library_locked() -> Iterator[None]:
    """While this holds, an import of the library fails, by whatever way it comes."""
    taken = [m for m in sys.modules if m.partition(".")[0] in LIBRARY]
    kept = {name: sys.modules.pop(name) for name in taken}
    sys.modules.update(dict.fromkeys(LIBRARY))  # None: "import of … halted"
    try:
        yield
    finally:
        for name in LIBRARY:
            sys.modules.pop(name, None)
        sys.modules.update(kept)


# --- the calls --------------------------------------------------------------------


def expectations(
    exercise: Exercise, check: spec.Check, cases: list[spec.Case]
) -> list[tuple]:
    """The right results of every case, one array for each name in ``returns``."""
    function = check.oracle or reference_function(exercise)
    called = check.oracle or partial(check.call, function)
    with np.errstate(all="ignore"):
        right = [called(*copy.deepcopy(case.args)) for case in cases]
    results = [as_tuple(value, check.returns) for value in right]
    if None in results:
        raise spec.SpecError(f"{check.id}: the reference does not give {check.returns}")
    return results


def run(
    function: Callable,
    check: spec.Check,
    kind: str,
    cases: list[spec.Case],
    progress: Callable[[str], None],
) -> list[object]:
    """The outcome of each case: a result, or `Raised`."""
    outcomes = []
    caller = calls.ready(kind)
    with library_locked(), np.errstate(all="ignore"):
        for number, case in enumerate(cases, start=1):
            progress(f"case {number} of {len(cases)}: {case.label}")
            try:
                outcomes.append(caller(function, check, case, first=number == 1))
            except (Exception, SystemExit, calls.TimeUp, KeyboardInterrupt) as error:
                outcomes.append(Raised(error))
                if isinstance(error, calls.TimeUp):
                    break
    return outcomes


def judge(
    outcomes: list, expected: list, exercise: Exercise, check: spec.Check, cases: list
) -> None:
    """Raise Fault if an outcome is wrong: the misconception's name, or what is seen."""
    tolerance = Tolerance(check.rtol, check.atol)
    for number, (outcome, right, case) in enumerate(
        zip(outcomes, expected, cases, strict=False), start=1
    ):
        said, more = _complaint(outcome, right, check, tolerance)
        if said is None:
            continue
        headline, _, detail = said.partition("\n")
        advice = more.pop("advice", "")
        where = f"case {number} of {len(cases)}: {case.label}"
        lines = [detail, arguments(case, exercise) if number == 1 else ""]
        detail = "\n".join([where, *(_indented(text) for text in lines if text)])
        if (named := misconception(outcomes, exercise, check, cases)) is not None:
            headline, advice = f"Looks like: {named.name}", named.why
        raise Fault(headline, advice, detail=detail, **more)


def _complaint(
    outcome: object, right: tuple, check: spec.Check, tolerance: Tolerance
) -> tuple[str | None, dict]:
    if isinstance(outcome, Raised):
        headline, advice = explained(outcome.error)
        return headline, {"advice": advice, **unknown(outcome.error)}
    if isinstance(outcome, calls.Complaint):
        if outcome.last and (said := _wrong(outcome.value, right, check, tolerance)):
            return said, {}
        return outcome.headline, {"advice": outcome.advice}
    return _wrong(outcome, right, check, tolerance), {}


def _wrong(
    value: object, right: tuple, check: spec.Check, tolerance: Tolerance
) -> str | None:
    return fault(value, right, check.returns, tolerance)


def misconception(
    outcomes: list, exercise: Exercise, check: spec.Check, cases: list
) -> spec.Wrong | None:
    """The wrong answer that does on every case what this one does."""
    tolerance = Tolerance(check.rtol, check.atol)
    for wrong in check.wrong:
        function = reference_function(exercise, wrong.patched(exercise.reference))
        theirs = run(function, check, exercise.kind, cases, lambda label: None)
        if len(theirs) == len(outcomes) and all(
            alike(one, two, check, tolerance)
            for one, two in zip(outcomes, theirs, strict=True)
        ):
            return wrong
    return None


def alike(one: object, two: object, check: spec.Check, tolerance: Tolerance) -> bool:
    """Whether two outcomes are the same: the same results, or the same failure."""
    if isinstance(one, Raised):
        return one.alike(two)
    if isinstance(one, calls.Complaint) and isinstance(two, calls.Complaint):
        both = one.headline == two.headline
        return both and same(one.value, two.value, check.returns, tolerance)
    if isinstance(one, calls.Complaint) or isinstance(two, calls.Complaint | Raised):
        return False
    return same(one, two, check.returns, tolerance)


# --- in words ---------------------------------------------------------------------


def arguments(case: spec.Case, exercise: Exercise) -> str:
    """The arguments of a tiny case, as far as they can be shown in a few lines."""
    lines = []
    for name, value in zip(parameters(exercise), case.args, strict=False):
        if isinstance(value, np.ndarray | int | float):
            text = shown(value).replace("\n", "\n" + " " * 10)
            lines.append(f"{name:9} {text}")
    text = "\n".join(lines)
    return text if text.count("\n") < 12 else ""


def parameters(exercise: Exercise) -> list[str]:
    """The names of the arguments of the function that an exercise asks for."""
    for node in ast.parse(exercise.stub).body:
        if isinstance(node, ast.FunctionDef) and node.name == exercise.name:
            return [argument.arg for argument in node.args.args]
    return []


def explained(error: BaseException) -> tuple[str, str]:
    """An exception in an answer: what, and in which line of the cell."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _own(f.filename)]
    place = ""
    if frames:
        last = frames[-1]
        place = f"line {last.lineno} of {last.filename.strip('<>')}: `{last.line}`"
    if isinstance(error, SystemExit):
        return "The cell calls exit()", f"It would end Jupyter's kernel too. {place}"
    if isinstance(error, calls.TimeUp):
        return "No answer in time: an endless loop?", f"It was in {place or 'a call'}"
    if isinstance(error, MemoryError):
        return "Out of memory", f"{str(error) or 'The case is tiny'}; {place}"
    if isinstance(error, ImportError) and (name := _library(error)):
        return (
            f"Borrowed from {name}",
            f"The answer is to be written in this cell; `{name}` has it ready-made.",
        )
    if isinstance(error, RecursionError):
        return "The function calls itself without end", place
    return f"{type(error).__name__}: {error}", place


def unknown(error: BaseException) -> dict[str, str]:
    """The name that a NameError misses, for whoever knows the other cells."""
    name = getattr(error, "name", None) if isinstance(error, NameError) else None
    return {"unknown_name": name} if name else {}


def _own(file: str) -> bool:
    return file.startswith("<") and not file.startswith(("<frozen", "<reference"))


def _library(error: ImportError) -> str:
    top = (error.name or "").partition(".")[0]
    return top if top in LIBRARY else ""


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())
