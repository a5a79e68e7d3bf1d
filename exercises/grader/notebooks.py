"""The learner's notebooks: which cell answers which exercise.

An answer is known by its cell's first line and by nothing else, so it survives copying,
renaming and Colab. A cell that still holds the stub is no answer.
"""

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

from grader.source import EXERCISES, exercises, identity


class NotebookError(ValueError):
    """A notebook that cannot be read; says what to do."""


@dataclass(frozen=True)
class Place:
    """An answer cell: where it is and what it holds."""

    id: str
    path: Path
    number: int  # counts all cells of the notebook, from 1
    text: str

    @property
    def where(self) -> str:
        """For people: ``03_moe.ipynb, cell 5``."""
        return f"{self.path.name}, cell {self.number}"

    @property
    def is_todo(self) -> bool:
        """Whether the stub stands here, or nothing that is known."""
        known = exercises().get(self.id)
        return known is not None and known.is_stub(self.text)


@dataclass(frozen=True)
class Notebook:
    """One notebook file as saved."""

    path: Path
    cells: tuple[str, ...]  # the code cells' text; others are ""
    places: tuple[Place, ...] = field(default=())


def paths(folder: Path = EXERCISES) -> list[Path]:
    """The notebooks of a folder, in order."""
    return sorted(folder.glob("*.ipynb"))


def read(path: Path) -> Notebook:
    """One notebook. Raises NotebookError if it is damaged."""
    try:
        text = path.read_text(encoding="utf-8")
        saved = nbformat.reads(text, as_version=4)
        cells = [
            plain(cell.source) if cell.cell_type == "code" else ""
            for cell in saved.cells
        ]
    except (OSError, UnicodeDecodeError, nbformat.reader.NotJSONError) as error:
        raise NotebookError(_damaged(path, error)) from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise NotebookError(_damaged(path, error)) from None
    places = [
        Place(id_, path, number, cell)
        for number, cell in enumerate(cells, start=1)
        if (id_ := identity(cell)) is not None
    ]
    return Notebook(path, tuple(cells), tuple(places))


def plain(text: str) -> str:
    """Text with line ends as Python has them, whatever system saved it."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _damaged(path: Path, error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:80]
    return (
        f"{path.name} cannot be read as a notebook ({first}).\n"
        "If Jupyter has it open, save it again. Otherwise move the file away, then:\n"
        "python exercises update    (writes a new one; your file is not touched)"
    )


def one_place(places: Iterable[Place]) -> Place | list[Place]:
    """The one answer among several cells with the same id; all, if they contradict.

    Stubs are no answers, and a copy is no contradiction.
    """
    places = list(places)
    answers = [place for place in places if not place.is_todo]
    if not answers:
        return places[0]
    first = answers[0]
    if all(place.text.strip() == first.text.strip() for place in answers):
        return first
    return answers


def defines(cell: str, name: str) -> bool:
    """Whether a cell gives a name a value at its top level."""
    try:
        tree = ast.parse(cell)
    except SyntaxError:
        return False
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name == name:
                return True
        elif isinstance(node, ast.Import | ast.ImportFrom):
            if any(name == (a.asname or a.name.partition(".")[0]) for a in node.names):
                return True
        elif any(
            isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Store)
            for n in ast.walk(node)
        ):
            return True
    return False


def elsewhere(name: str, cells: Iterable[str], own: str, numbering: str) -> str:
    """What to say of a name that the answer uses and another cell defines, or ""."""
    for number, cell in enumerate(cells, start=1):
        if cell.strip() != own.strip() and defines(cell, name):
            return (
                f"`{name}` is defined in {numbering.format(number)}. The grader runs "
                "the answer's cell alone: move it there."
            )
    return ""
