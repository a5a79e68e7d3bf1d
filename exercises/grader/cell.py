"""A learner's cell: read, executed alone, and explained where it fails."""

import __future__

import ast
import contextlib
import linecache
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from grader.compare import WrongForm
from grader.complaint import NO_ANSWER, TimeUp
from grader.source import Exercise, bare_tree, defined_names, find

# What holds the answers, and what answers a NumPy exercise in one call.
LIBRARY = ("minidsv3", "solutions", "checks", "grader")
FOR_KERNELS = tuple(
    f"minidsv3.gpu.{name}"
    for name in ("simulator", "dialect", "intrinsics", "reductions")
)
READY_MADE = ("torch", "scipy", "jax", "tensorflow", "transformers", "sklearn")


@dataclass(frozen=True)
class Answer:
    """A cell to be judged, and the learner's other answers that it is run with."""

    id: str
    text: str
    parts: Mapping[str, str] = field(default_factory=dict)


class Fault(Exception):
    """Why an answer fails, found before or while it ran."""

    def __init__(self, headline: str, advice: str = "", **more: str) -> None:
        super().__init__(headline)
        self.headline, self.advice, self.more = headline, advice, more


def parsed(text: str, exercise: Exercise) -> ast.Module:
    """The cell's syntax tree. Raises Fault where there is none, or no own function."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise Fault(*_syntax(text, error)) from None
    if exercise.name not in defined_names(tree):
        raise Fault(*_not_written(tree, exercise))
    refuse_other_than_given(tree, exercise)
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            refuse_import(name, exercise)
    return tree


def refuse_other_than_given(tree: ast.Module, exercise: Exercise) -> None:
    """Raise Fault where a function that is given whole has become another one."""
    stub, reference = (
        {node.name: bare_tree(ast.unparse(node)) for node in ast.parse(text).body
         if isinstance(node, ast.FunctionDef)}
        for text in (exercise.stub, exercise.reference)
    )  # fmt: skip
    for node in tree.body:
        name = getattr(node, "name", "")
        if stub.get(name) != reference.get(name) or name not in stub:
            continue
        if bare_tree(ast.unparse(node)) != stub[name]:
            raise Fault(
                f"`{name}` is given, and here it is another one",
                "What you write must do with it as it is. Undo the change, or let "
                f"`python exercises reset {exercise.id}` bring back the cell; it keeps "
                "your answer.",
            )


def refuse_import(name: str, exercise: Exercise) -> None:
    """Raise Fault where a module holds the answer already made."""
    top = name.partition(".")[0]
    if exercise.kind == "cuda" and name in FOR_KERNELS:
        raise Fault(
            f"`{name}` is imported already",
            "The notebook's first cell does that, and whoever judges it runs that cell "
            "first. Take the line out of this one.",
        )
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
    kind = "class" if f"\nclass {name}" in exercise.stub else "def"
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
                f"It is imported or assigned. Write `{kind} {name}(...)` yourself, in "
                "this cell.",
            )
    there = f"; it defines `{found[-1]}`" if found else ""
    what = "class" if kind == "class" else "function"
    return (
        f"No `{name}` in the cell",
        f"The cell must define a {what} with the name `{name}`{there}.",
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


# --- in words ---------------------------------------------------------------------


def explained(error: BaseException) -> tuple[str, str]:
    """An exception in an answer: what, and in which line of the cell."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _own(f.filename)]
    place = ""
    if frames:
        last = frames[-1]
        place = f"line {last.lineno} of {last.filename.strip('<>')}: `{last.line}`"
    if isinstance(error, SystemExit):
        return "The cell calls exit()", f"It would end Jupyter's kernel too. {place}"
    if isinstance(error, TimeUp):
        return NO_ANSWER, f"It was in {place or 'a call'}"
    if isinstance(error, MemoryError):
        return "Out of memory", f"{str(error) or 'The case is tiny'}; {place}"
    if isinstance(error, ImportError) and (name := _library(error)):
        return (
            f"Borrowed from {name}",
            f"The answer is to be written in this cell; `{name}` has it ready-made.",
        )
    if isinstance(error, WrongForm):
        return str(error), ""
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
