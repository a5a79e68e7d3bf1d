"""Notebooks out of ``solutions/*.py``, the same bytes every time.

python exercises build            write them, and the table in README.md
python exercises build --check    exit with 1 and say which one has drifted
"""

import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from grader.source import EXERCISES, Cell, cells, exercises, identity, read, sources

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
TABLE = re.compile(r"(<!-- table -->\n).*?(<!-- end of table -->)", re.DOTALL)


def notebook(source: Path, solved: bool = False) -> nbformat.NotebookNode:
    """The notebook of one source file: with stubs, or solved."""
    table = {exercise.id: exercise for exercise in read(source)}
    made = []
    for id_, cell in named(cells(source)):
        text = cell.text
        if (exercise := identity(text)) is not None and cell.kind == "code":
            chosen = table[exercise]
            text = chosen.reference if solved else chosen.stub
        new = new_markdown_cell if cell.kind == "markdown" else new_code_cell
        made.append(new(text, id=id_, metadata={"minidsv3": digest(text)}))
        if exercise is not None and cell.kind == "code":
            text = f'check("{exercise}")'
            check_id = id_.replace("answer", "check")
            made.append(
                new_code_cell(text, id=check_id, metadata={"minidsv3": digest(text)})
            )
    language = {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"}
    metadata = {"kernelspec": KERNEL, "language_info": language}
    return new_notebook(cells=made, metadata=metadata)


def named(all_cells: list[Cell]) -> Iterator[tuple[str, Cell]]:
    """Each cell with its id: after the exercise that it belongs to, or a number."""
    for number, cell in enumerate(all_cells):
        following = all_cells[number + 1] if number + 1 < len(all_cells) else None
        own = identity(cell.text) if cell.kind == "code" else None
        ahead = identity(following.text) if following else None
        if own:
            yield f"{own.replace('.', '-')}-answer", cell
        elif cell.kind == "markdown" and ahead:
            yield f"{ahead.replace('.', '-')}-task", cell
        else:
            yield f"cell-{number}", cell


def digest(text: str) -> str:
    """By which an update sees whether the learner changed a cell."""
    return f"{zlib.crc32(text.encode()):08x}"


def written(made: nbformat.NotebookNode) -> str:
    """The notebook as its file's text."""
    return nbformat.writes(made, indent=1) + "\n"


def table() -> str:
    """The table of ids and notebooks, in Markdown."""
    lines = ["| exercise | what you write | in |", "|---|---|---|"]
    for e in exercises().values():
        lines.append(f"| `{e.id}` | {e.title}: `{e.name}` | `{e.notebook}.ipynb` |")
    return "\n".join(lines) + "\n"


def outputs() -> dict[Path, str]:
    """Every generated file with the text it should have."""
    made = {EXERCISES / f"{s.stem}.ipynb": written(notebook(s)) for s in sources()}
    readme = EXERCISES / "README.md"
    old = readme.read_text(encoding="utf-8")
    made[readme] = TABLE.sub(lambda m: m[1] + table() + m[2], old)
    return made
