"""``check``, ``check_all``, ``passed`` and ``hint`` for the notebook.

What is judged is the cell as it was last run: its text is in Jupyter's own history. The
saved file is read too, for `pytest` will see that one.
"""

import contextlib
import re
import sys
from collections.abc import Sequence
from textwrap import indent
from typing import Any

from grader import notebooks, report, spec
from grader.gradebook import unheard_of, verdict_on
from grader.notebooks import NotebookError, Place, plain
from grader.source import SourceError, exercises, find, identity
from grader.verdict import FAILED, PASSED, TODO, Verdict, state_shown, wrapped
from grader.workers import warm_up

LEVELS = ("the idea", "the call and its shapes", "nearly the code")
UNSAVED = (
    "Not saved yet, or not run since: run the cell, then press Ctrl+S.\n"
    "pytest grades what is saved."
)


def check(id_: str) -> None:
    """Judge your answer as it was last run in this notebook, and print the verdict."""
    if id_ not in exercises():
        print(unheard_of(id_).text(colour=True))
        return
    try:
        verdict = current_verdict(id_)
    except NotRun as reason:
        print(f"{id_}: {reason}")
        return
    except KeyboardInterrupt:
        print(f"{id_}: stopped.")
        return
    if verdict.state != TODO and not is_saved(id_, latest(history())[id_]):
        verdict = verdict.noting(UNSAVED)
    if verdict.state == PASSED and (after := following(id_)):
        verdict = verdict.noting(f"next: {after}")
    if verdict.state == FAILED:
        verdict = verdict.noting(f'stuck?  hint("{id_}")')
    print(verdict.text(colour=True))


class NotRun(Exception):
    """There is no answer to judge; says what to do."""


def current_verdict(id_: str) -> Verdict:
    """The verdict on the cell as it was last run. Raises NotRun."""
    cells = history()
    answers = latest(cells)
    if nameless := without_identity(id_, cells):
        raise NotRun(
            f"the cell run as [{nameless}] defines `{find(id_).name}`, but its first "
            f"line is not `# exercise: {id_}`. Put that line on top and run it again."
        )
    if id_ not in answers:
        raise NotRun(f"run its cell first (the one that begins # exercise: {id_}).")
    known = {**saved_answers(), **answers}
    return verdict_on(id_, answers[id_], known, cells, numbering="cell [{}]")


def without_identity(id_: str, cells: Sequence[str]) -> int | None:
    """Number of a later cell that defines the function and does not say whose it is."""
    name = find(id_).name
    for number in range(len(cells), 0, -1):
        cell = cells[number - 1]
        if identity(cell) == id_:
            return None
        if identity(cell) is None and re.search(rf"^(def|class) {name}\b", cell, re.M):
            return number
    return None


def passed(id_: str) -> bool:
    """Whether your answer, as it was last run in this notebook, passes."""
    try:
        return current_verdict(id_).state == PASSED
    except NotRun:
        return False


def check_all() -> None:
    """Judge every answer that was run in this notebook; one line each, and a bar."""
    ran = [id_ for id_ in latest(history()) if id_ in exercises()]
    chapters = {find(id_).notebook for id_ in ran}
    if not chapters:
        print("No answer cell was run in this notebook yet.")
        return
    states = {}
    for id_, exercise in exercises().items():
        if exercise.notebook not in chapters:
            continue
        try:
            verdict = current_verdict(id_)
        except NotRun as reason:
            verdict = Verdict(id_, TODO, str(reason).split(" (")[0])
        states[id_] = verdict.state
        said = verdict.headline if verdict.state != PASSED else exercise.title
        print(f"{state_shown(verdict.state, colour=True, width=6)}  {id_:8} {said}")
    print(report.bar(sum(s == PASSED for s in states.values()), len(states)))


def hint(id_: str, level: int = 1) -> None:
    """Print a hint: 1 the idea, 2 the call and its shapes, 3 nearly the code."""
    try:
        print(hint_text(id_, level))
    except ValueError as error:
        print(error)


def hint_text(id_: str, level: int = 1) -> str:
    """The text of a hint. Raises ValueError for a level there is none of."""
    if id_ not in exercises():
        said = unheard_of(id_)
        raise ValueError(
            f"{said.headline[0].lower()}{said.headline[1:]}. {said.advice}"
        )
    hints = spec.find(id_).hints
    if level not in range(1, len(hints) + 1):
        raise ValueError(f"level {level}: there are hints 1 to {len(hints)}")
    lines = [f"{id_}, hint {level} of {len(hints)}: {LEVELS[level - 1]}"]
    return "\n".join([*lines, indent(wrapped(hints[level - 1]), "  ")])


def following(id_: str) -> str | None:
    """The exercise after this one."""
    order = list(exercises())
    return next(iter(order[order.index(id_) + 1 :]), None)


def history() -> Sequence[str]:
    """The cells that were run in this kernel, as typed. Empty outside Jupyter."""
    shell = in_notebook()
    if not shell:
        return ()
    return [plain(cell) for cell in shell.history_manager.input_hist_raw[1:]]


def in_notebook() -> Any:
    """IPython's shell, or None where there is none."""
    return sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None


def latest(cells: Sequence[str]) -> dict[str, str]:
    """For each exercise the cell that was run last."""
    return {id_: cell for cell in cells if (id_ := identity(cell)) is not None}


def saved_places() -> dict[str, list[Place]]:
    """The answer cells of all saved notebooks; damaged ones are left out."""
    found: dict[str, list[Place]] = {}
    for path in notebooks.paths():
        try:
            places = notebooks.read(path).places
        except NotebookError:
            continue
        for place in places:
            found.setdefault(place.id, []).append(place)
    return found


def saved_answers() -> dict[str, str]:
    """The saved answer to each exercise, where there is exactly one."""
    chosen = {id_: notebooks.one_place(p) for id_, p in saved_places().items()}
    return {
        id_: place.text for id_, place in chosen.items() if isinstance(place, Place)
    }


def is_saved(id_: str, text: str) -> bool:
    """Whether some saved notebook holds this very answer."""
    places = saved_places().get(id_, [])
    return any(place.text.strip() == text.strip() for place in places)


if in_notebook():
    with contextlib.suppress(SourceError):  # said to whoever asks for an exercise
        warm_up()
