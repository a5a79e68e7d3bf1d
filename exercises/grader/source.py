"""The one source of every exercise: ``solutions/*.py`` in percent format.

An answer cell begins with its identity, ``# exercise: lm.1``. Lines like it may follow:

``# needs: lm.1, lm.7``      the reference functions that the grader hands in
``# assembles: lm.1, lm.2``  the learner's own functions that it hands in
``# solution: minidsv3.primitives.numpy_ref.softmax``  the reference is that function

What stands between ``### BEGIN SOLUTION`` and ``### END SOLUTION`` is the reference; in
the learner's notebook ``return ...`` stands there. The markdown cell in front of the
answer cell is the task: its heading, its prose.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import jupytext

EXERCISES = Path(__file__).parents[1]
SOLUTIONS = EXERCISES.parent / "solutions"
IDENTITY = re.compile(r"\A\s*#\s*exercise:\s*([\w.]+)[ \t]*(?:\n|\Z)")
HEADER = re.compile(r"#\s*(exercise|needs|assembles|solution):\s*(.+)")
REGION = re.compile(
    r"^([ \t]*)### BEGIN SOLUTION\n(.*?)^[ \t]*### END SOLUTION\n?", re.M | re.S
)
PLACEHOLDER = "..."


class SourceError(ValueError):
    """A file in ``solutions/`` that does not keep the format; names file and cell."""


@dataclass(frozen=True)
class Cell:
    """One cell of the source: ``markdown`` or ``code``."""

    kind: str
    text: str


@dataclass(frozen=True)
class Exercise:
    """One answer cell with everything that belongs to it."""

    id: str
    notebook: str  # the stem that source, notebook and book page share
    title: str
    task: str  # markdown
    raw: str  # the cell as it stands in the source
    prelude: str  # the imports that the notebook's first code cell makes

    def header(self, key: str) -> tuple[str, ...]:
        """The ids that a header line such as ``# needs:`` lists."""
        found = [m[2] for m in map(HEADER.match, self.raw.splitlines()) if m]
        keys = [m[1] for m in map(HEADER.match, self.raw.splitlines()) if m]
        values = dict(zip(keys, found, strict=True)).get(key, "")
        return tuple(filter(None, re.split(r"[,\s]+", values)))

    @property
    def needs(self) -> tuple[str, ...]:
        """Exercises whose reference functions are handed in."""
        return self.header("needs")

    @property
    def assembles(self) -> tuple[str, ...]:
        """Exercises whose functions by the learner's own hand are handed in."""
        return self.header("assembles")

    @property
    def kind(self) -> str:
        """``numpy``, ``torch`` or ``cuda``: ``mtp.torch.1`` is a torch exercise."""
        return next((k for k in ("torch", "cuda") if k in self.id.split(".")), "numpy")

    @property
    def solution_path(self) -> str:
        """Where the reference can be read, from the repository's root."""
        library = self.header("solution")
        if library:
            return library[0].rpartition(".")[0].replace(".", "/") + ".py"
        return f"solutions/{self.notebook}.py"

    @cached_property
    def stub(self) -> str:
        """The learner's cell before it is answered."""
        lines = [n for n in self.raw.splitlines() if not n.startswith("# solution:")]
        return REGION.sub(_blank, "\n".join(lines) + "\n").rstrip("\n")

    @cached_property
    def reference(self) -> str:
        """The cell with the answer in it."""
        if library := self.header("solution"):
            body = library_body(library[0], ast.parse(self.stub).body[-1])
            return re.sub(
                r"^    return \.\.\.\Z", lambda _: body, self.stub, flags=re.M
            )
        return re.sub(r"^[ \t]*### (BEGIN|END) SOLUTION\n?", "", self.raw, flags=re.M)

    @cached_property
    def name(self) -> str:
        """What the answer cell must define: its last function or class."""
        names = defined_names(ast.parse(self.stub))
        if not names:
            raise SourceError(f"{self.notebook}: {self.id} defines no function")
        return names[-1]

    def is_stub(self, text: str) -> bool:
        """Whether a cell is still the stub, comments and docstrings aside."""
        try:
            return bare_tree(text) == bare_tree(self.stub)
        except SyntaxError:
            return False


def library_body(dotted: str, wanted: ast.FunctionDef) -> str:
    """The lines of a library function below its docstring.

    Raises SourceError if its arguments are not those of the answer that it stands for.
    """
    module, _, name = dotted.rpartition(".")
    text = inspect.getsource(getattr(importlib.import_module(module), name))
    function = ast.parse(text).body[0]
    if ast.unparse(wanted.args) != ", ".join(a.arg for a in function.args.args):
        raise SourceError(f"{dotted} has other arguments than `{wanted.name}`")
    said = ast.get_docstring(function) is not None
    return "\n".join(text.rstrip("\n").splitlines()[function.body[said].lineno - 1 :])


def _blank(region: re.Match[str]) -> str:
    returns = re.search(rf"^{region[1]}return\b", region[2], re.M)  # a kernel does not
    return f"{region[1]}{'return ' if returns else ''}{PLACEHOLDER}\n"


def defined_names(tree: ast.Module) -> list[str]:
    """Functions and classes that a cell defines itself, a lambda with a name too."""
    names = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            names += [t.id for t in node.targets if isinstance(t, ast.Name)]
    return names


def bare_tree(text: str) -> str:
    """A cell's syntax tree as text, without comments and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            first = node.body[0] if node.body else None
            value = (
                getattr(first, "value", None) if isinstance(first, ast.Expr) else None
            )
            if isinstance(getattr(value, "value", None), str):
                del node.body[0]
    return ast.dump(tree)


def identity(text: str) -> str | None:
    """The exercise that a cell says it answers, or None."""
    found = IDENTITY.match(text)
    return found[1] if found else None


def cells(path: Path) -> list[Cell]:
    """The cells of one source file."""
    notebook = jupytext.reads(path.read_text(encoding="utf-8"), fmt="py:percent")
    return [Cell(c.cell_type, c.source) for c in notebook.cells if c.source.strip()]


def prelude_of(all_cells: list[Cell]) -> str:
    """The imports of a notebook's first code cell, without those of the grader."""
    first = next((cell.text for cell in all_cells if cell.kind == "code"), "")
    kept = [
        ast.unparse(node)
        for node in ast.parse(first).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        and getattr(node, "module", None) != "grader"
    ]
    return "\n".join(kept)


def read(path: Path) -> Iterator[Exercise]:
    """The exercises of one source file, in order. Raises SourceError."""
    all_cells = cells(path)
    prelude = prelude_of(all_cells)
    for before, cell in zip(all_cells, all_cells[1:], strict=False):
        if cell.kind != "code" or (id_ := identity(cell.text)) is None:
            continue
        heading, _, task = before.text.partition("\n")
        found = re.fullmatch(rf"## {re.escape(id_)} · (.+)", heading)
        if before.kind != "markdown" or not found:
            raise SourceError(
                f"{path.name}: in front of {id_} belongs a markdown cell whose first "
                f"line is '## {id_} · <title>', not {heading!r}"
            )
        yield Exercise(id_, path.stem, found[1], task.strip(), cell.text, prelude)


def sources() -> list[Path]:
    """The source files, in the order of the chapters."""
    return sorted(SOLUTIONS.glob("*.py"))


def exercises() -> dict[str, Exercise]:
    """Every exercise by id, in the order of the book. Raises SourceError."""
    stamp = tuple((path, path.stat().st_mtime_ns) for path in sources())
    if not stamp:
        raise SourceError(
            f"{SOLUTIONS} is missing or empty: the grader takes its right answers there"
        )
    return _exercises(stamp)


@lru_cache(maxsize=1)
def _exercises(stamp: tuple[tuple[Path, int], ...]) -> dict[str, Exercise]:
    table: dict[str, Exercise] = {}
    for path, _ in stamp:
        for exercise in read(path):
            if exercise.id in table:
                raise SourceError(f"{path.name}: {exercise.id} is there twice")
            table[exercise.id] = exercise
    return table


def find(id_: str) -> Exercise:
    """One exercise. Raises KeyError that lists what there is."""
    table = exercises()
    if id_ not in table:
        raise KeyError(f"there is no exercise {id_!r}; there are {', '.join(table)}")
    return table[id_]
