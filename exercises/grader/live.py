"""``check``, ``check_all``, ``passed`` and ``hint`` for the notebook.

What is judged is the cell as it was last run: its text is in Jupyter's own history. The
saved file is read too, for `pytest` will see that one.
"""

import contextlib
import sys
from collections.abc import Sequence
from textwrap import indent
from typing import Any

from grader import notebooks, report, spec
from grader.gradebook import unheard_of, verdict_on
from grader.notebooks import NotebookError, Place, plain
from grader.source import SourceError, exercises, find, identity
from grader.verdict import FAILED, PASSED, TODO, Verdict, wrapped
from grader.workers import warm_up

LEVELS = ("the idea", "the call and its shapes", "nearly the code")
UNSAVED = "Not saved yet: pytest would grade another version. Press Ctrl+S."


def check(id_: str) -> None:
    """Judge your answer as it was last run in this notebook, and print the verdict."""
    cells = history()
    answers = latest(cells)
    if id_ not in exercises():
        print(unheard_of(id_).text(colour=True))
        return
    if id_ not in answers:
        print(f"{id_}: run its cell first (the one that begins # exercise: {id_}).")
        return
    verdict = verdict_on(id_, answers[id_], {**saved_answers(), **answers}, cells)
    if verdict.state != TODO and not is_saved(id_, answers[id_]):
        verdict = verdict.noting(UNSAVED)
    if verdict.state == PASSED and (after := following(id_)):
        verdict = verdict.noting(f"next: {after}")
    if verdict.state == FAILED:
        verdict = verdict.noting(f'stuck?  hint("{id_}")')
    print(verdict.text(colour=True))


def passed(id_: str) -> bool:
    """Whether your answer, as it was last run in this notebook, passes."""
    cells = history()
    answers = latest(cells)
    if id_ not in answers:
        return False
    known = {**saved_answers(), **answers}
    return verdict_on(id_, answers[id_], known, cells).state == PASSED


def check_all() -> None:
    """Judge every answer that was run in this notebook; one line each, and a bar."""
    cells = history()
    answers = latest(cells)
    chapters = {find(id_).notebook for id_ in answers if id_ in exercises()}
    if not chapters:
        print("No answer cell was run in this notebook yet.")
        return
    known = {**saved_answers(), **answers}
    states = {}
    for id_, exercise in exercises().items():
        if exercise.notebook not in chapters:
            continue
        verdict = Verdict(id_, TODO)
        if id_ in answers:
            verdict = verdict_on(id_, answers[id_], known, cells)
        states[id_] = verdict.state
        headline = f"  {verdict.headline}" if verdict.headline else ""
        print(Verdict(id_, verdict.state).text(colour=True) + headline)
    print("\n".join(report.footer(states, {}, ())[:1]))


def hint(id_: str, level: int = 1) -> None:
    """Print a hint: 1 the idea, 2 the call and its shapes, 3 nearly the code."""
    print(hint_text(id_, level))


def hint_text(id_: str, level: int = 1) -> str:
    """The text of a hint. Raises ValueError for a level there is none of."""
    if id_ not in exercises():
        return unheard_of(id_).text()
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
    """The cells that were run in this kernel, oldest first. Empty outside Jupyter."""
    shell = in_notebook()
    return [plain(cell) for cell in shell.user_ns.get("In", ())] if shell else ()


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
