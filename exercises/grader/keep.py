"""``reset`` and ``update``: fresh cells without the loss of a line.

Before a notebook is written, it is copied to ``exercises/backups/``.
"""

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import nbformat

from grader import build, notebooks
from grader.notebooks import NotebookError, Place, plain
from grader.source import EXERCISES, exercises, identity, sources
from minidsv3.files import replacing

BACKUPS = EXERCISES / "backups"
REOPEN = "If Jupyter has it open: File > Reload Notebook from Disk."
Saved = nbformat.NotebookNode


class KeepError(RuntimeError):
    """Something that was not done, and why. Nothing was changed."""


def replace(path: Path, text: str) -> None:
    """Write a file whole. Refuses to write over answers. Raises KeepError."""
    if path.suffix == ".ipynb" and path.exists():
        answered = [p.id for p in notebooks.read(path).places if not p.is_todo]
        if answered:
            raise KeepError(
                f"{path.name} holds answers ({', '.join(answered)}), so it is not "
                "written over. python exercises update keeps them."
            )
    _write(path, text)


def _write(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="\n")


def back_up(paths: list[Path]) -> Path:
    """Copy files to a new folder with the time in its name; return the folder."""
    stamp = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    folder = BACKUPS / f"{stamp}-{uuid.uuid4().hex[:4]}"
    folder.mkdir(parents=True)
    for path in paths:
        shutil.copy2(path, folder / path.name)
    return folder


# --- reset ------------------------------------------------------------------------


def reset(id_: str) -> str:
    """Put the stub of one exercise back; say what was done. Raises KeepError."""
    if id_ not in exercises():
        raise KeepError(f"there is no exercise {id_}; see exercises/README.md")
    exercise = exercises()[id_]
    path = EXERCISES / f"{exercise.notebook}.ipynb"
    if not path.exists():
        raise KeepError(f"{path.name} is not here: python exercises update writes it")
    notebooks.read(path)  # a damaged one is refused by name
    saved = nbformat.read(path, as_version=4)
    cells = [c for c in saved.cells if identity(plain(c.source)) == id_]
    if cells and all(exercise.is_stub(plain(cell.source)) for cell in cells):
        return f"{id_} is the stub already."
    for cell in cells:
        cell.source, cell.outputs, cell.execution_count = exercise.stub, [], None
    if not cells:
        _insert(saved, id_, exercise.stub)
    folder = back_up([path])
    _write(path, build.written(saved))
    said = f"{id_}: the stub is back in {path.name}; the notebook as it was is in\n"
    return f"{said}{folder / path.name}\n{REOPEN}"


def _insert(saved: Saved, id_: str, stub: str) -> None:
    """The answer cell was deleted: put it behind its task, or at the end."""
    task = f"{id_.replace('.', '-')}-task"
    ids = [cell.get("id") for cell in saved.cells]
    place = ids.index(task) + 1 if task in ids else len(ids)
    new = nbformat.v4.new_code_cell(stub, id=f"{id_.replace('.', '-')}-answer")
    saved.cells.insert(place, new)


# --- update -----------------------------------------------------------------------


def update(folder: str | None = None, pull: bool = False) -> str:
    """New notebooks with the answers and own cells of the old ones. Raises KeepError.

    ``folder`` holds the old ones, if they are not here.
    """
    old_home = Path(folder) if folder else EXERCISES
    if not old_home.is_dir() or (folder and not notebooks.paths(old_home)):
        raise KeepError(f"{old_home} holds no notebooks; name an exercises/ folder")
    backup = back_up(notebooks.paths()) if notebooks.paths() else None
    if pull:
        return _pull(backup)
    answers, lines = collect(old_home)
    for source in sources():
        new = build.notebook(source)
        old = _readable(old_home / f"{source.stem}.ipynb")
        _merge(old, new, answers)
        _write(EXERCISES / f"{source.stem}.ipynb", build.written(new))
    lines.append(f"notebooks written: {len(sources())}, answers put in: {len(answers)}")
    if backup:
        lines.append(f"As they were before: {backup}")
    return "\n".join([*lines, REOPEN])


def collect(home: Path) -> tuple[dict[str, str], list[str]]:
    """The answers in a folder by id, and a line for each that is not taken."""
    found: dict[str, list[Place]] = {}
    lines = []
    for path in notebooks.paths(home):
        try:
            places = notebooks.read(path).places
        except NotebookError as error:
            lines.append(str(error).splitlines()[0] + ": left out")
            continue
        for place in places:
            found.setdefault(place.id, []).append(place)
    answers = {}
    for id_, places in found.items():
        chosen = notebooks.one_place(places)
        if isinstance(chosen, list):
            chosen = chosen[0]
            lines.append(f"{id_}: two answers; the one in {chosen.where} is taken")
        if not chosen.is_todo:
            answers[id_] = chosen.text
    return answers, lines


def _readable(path: Path) -> Saved | None:
    try:
        notebooks.read(path)
    except NotebookError:
        return None
    return nbformat.read(path, as_version=4)


def _merge(old: Saved | None, new: Saved, answers: dict[str, str]) -> None:
    """Put answers into a new notebook, and own cells behind the cell they followed."""
    for cell in new.cells:
        if cell.cell_type == "code" and (id_ := identity(cell.source)) in answers:
            cell.source = answers[id_]
    if old is None:
        return
    ids = {cell.id for cell in new.cells}
    behind: dict[str | None, list[Saved]] = {}
    anchor = None
    for cell in old.cells:
        if cell.get("id") in ids and cell.id != anchor:
            anchor = cell.id
        if _is_own(cell, answers):
            behind.setdefault(anchor, []).append(_fresh(cell, ids))
    new.cells = list(_woven(new.cells, behind))


def _is_own(cell: Saved, answers: dict[str, str]) -> bool:
    """Whether the learner wrote or changed a cell; answers are handled by id."""
    text = plain(cell.source)
    if not text.strip():
        return False
    id_ = identity(text) if cell.cell_type == "code" else None
    if id_ in exercises():
        return not exercises()[id_].is_stub(text) and text != answers.get(id_)
    return cell.metadata.get("minidsv3") != build.digest(text)


def _fresh(cell: Saved, taken: set[str]) -> Saved:
    """The cell under an id that the new notebook does not use."""
    if cell.get("id") in taken:
        cell.id = uuid.uuid4().hex[:8]
    cell.metadata.pop("minidsv3", None)
    return cell


def _woven(cells: list[Saved], behind: dict[str | None, list[Saved]]) -> Iterator:
    yield from behind.get(None, [])
    for cell in cells:
        yield cell
        yield from behind.get(cell.id, [])


def _pull(backup: Path | None) -> str:
    """git pull with the notebooks out of its way; then the rest in a fresh Python,
    for the grader may be another one by then.
    """
    root = EXERCISES.parent
    names = [str(path.relative_to(root)) for path in notebooks.paths()]
    tracked = _git("ls-files", "--", *names).splitlines() if names else []
    try:
        if tracked:
            _git("checkout", "--", *tracked)
        said = _git("pull", "--ff-only").strip()
    except KeepError:
        for path in backup.glob("*.ipynb") if backup else ():
            shutil.copy2(path, EXERCISES / path.name)
        raise
    again = [sys.executable, str(EXERCISES), "update"]
    again += ["--from", str(backup)] if backup else []
    ran = subprocess.run(again, capture_output=True, text=True)
    if ran.returncode:
        raise KeepError(f"pulled, but: {ran.stderr.strip()}\nYour answers: {backup}")
    return f"{said}\n{ran.stdout.strip()}"


def _git(*words: str) -> str:
    ran = subprocess.run(
        ["git", "-C", str(EXERCISES.parent), *words], capture_output=True, text=True,
        env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
    )  # fmt: skip
    if ran.returncode:
        raise KeepError(f"git {words[0]}: {ran.stderr.strip()}")
    return ran.stdout
