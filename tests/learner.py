"""A learner at work: a copy of the exercises, answers typed into it, commands run."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from grader import build
from grader.notebooks import identity
from grader.source import find

ROOT = Path(__file__).parents[1]
CHAPTER = "01_transformer.ipynb"
ALL = tuple(source.stem for source in build.sources())


def solved(id_: str) -> str:
    """The reference as a learner's cell."""
    return find(id_).reference


class Desk:
    """A folder with fresh exercises, as after a clone.

    With chapter 1 alone, unless more is asked for: how many exercises the book has is
    not the point of most tests.
    """

    def __init__(self, root: Path, chapters: Sequence[str] = (ALL[0],)) -> None:
        self.root, self.exercises = root, root / "exercises"
        skip = shutil.ignore_patterns("backups", "*.ipynb", "__pycache__", ".*")
        shutil.copytree(ROOT / "exercises", self.exercises, ignore=skip)
        (root / "solutions").mkdir()
        shutil.copy(ROOT / "pyproject.toml", root)
        for source in build.sources():
            if source.stem in chapters:
                shutil.copy(source, root / "solutions")
                made = build.written(build.notebook(source))
                self.path(f"{source.stem}.ipynb").write_text(made, encoding="utf-8")
            else:
                self.forget(f"{source.stem}.ipynb")

    def forget(self, name: str) -> None:
        """Take a notebook's rows out of the table of exercises."""
        readme = self.exercises / "README.md"
        lines = readme.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if not line.endswith(f"| `{name}` |\n")]
        readme.write_text("".join(kept), encoding="utf-8")

    def path(self, name: str = CHAPTER) -> Path:
        return self.exercises / name

    def read(self, name: str = CHAPTER) -> nbformat.NotebookNode:
        return nbformat.read(self.path(name), as_version=4)

    def write(self, notebook: nbformat.NotebookNode, name: str = CHAPTER) -> None:
        nbformat.write(notebook, self.path(name))

    def answer(self, id_: str, text: str, name: str = CHAPTER) -> None:
        """Type an answer; the identity line is put in front if it is not there."""
        if identity(text) is None:
            text = f"# exercise: {id_}\n{text}"
        notebook = self.read(name)
        for cell in notebook.cells:
            if cell.cell_type == "code" and identity(cell.source) == id_:
                cell.source = text
        self.write(notebook, name)

    def add_cell(self, text: str, at: int, name: str = CHAPTER) -> None:
        notebook = self.read(name)
        notebook.cells.insert(at, nbformat.v4.new_code_cell(text))
        self.write(notebook, name)

    def text_of(self, id_: str, name: str = CHAPTER) -> str | None:
        cells = [c.source for c in self.read(name).cells if c.cell_type == "code"]
        return next((text for text in cells if identity(text) == id_), None)

    def command(self, *words: str) -> subprocess.CompletedProcess:
        """``python exercises …``."""
        return self._run([sys.executable, "exercises", *words], self.root)

    def grade(self, *words: str, where: Path | None = None) -> tuple[int, str]:
        """``pytest exercises/``: exit status, and output without what varies."""
        target = [] if any(".ipynb" in w for w in words) else [str(self.exercises)]
        line = [sys.executable, "-m", "pytest", *target, *words]
        ran = self._run(line, where or self.root)
        return ran.returncode, steady(ran.stdout + ran.stderr)

    def _run(self, line: list[str], where: Path) -> subprocess.CompletedProcess:
        env = os.environ | {"COLUMNS": "80", "PYTEST_ADDOPTS": "-p no:cacheprovider"}
        return subprocess.run(
            line, cwd=where, capture_output=True, text=True, timeout=120, env=env
        )


def steady(text: str) -> str:
    """Output without times, so that it can be compared to the letter."""
    text = re.sub(r"in \d+\.\d+s", "in 0.00s", text)
    text = re.sub(r"saved .* ago \(..:..:..\)", "saved 0 s ago (12:00:00)", text)
    lines = [re.sub(r"^=+ (.*?) =+$", r"= \1 =", line) for line in text.splitlines()]
    lines = [re.sub(r"^_+ (.*?) _+$", r"_ \1 _", line) for line in lines]
    return "\n".join(line.rstrip() for line in lines).strip()
