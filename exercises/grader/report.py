"""How far the learner is, and where to go on."""

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from grader.source import exercises
from grader.verdict import FAILED, PASSED

WIDTH = 30


def bar(passed: int, total: int) -> str:
    """``[#####-----] 2/4 passed``."""
    full = WIDTH * passed // max(total, 1)
    return f"[{'#' * full}{'-' * (WIDTH - full)}] {passed}/{total} passed"


def next_one(states: Mapping[str, str], waiting: Mapping[str, str]) -> str | None:
    """The first failed exercise, else the first that is not passed, in book order; if
    all are, the one after the last of them.
    """
    book = list(exercises())
    order = [id_ for id_ in book if id_ in states and id_ not in waiting]
    for id_ in [i for i in order if states[i] == FAILED] + order:
        if states[id_] != PASSED:
            return id_
    last = max((book.index(id_) for id_ in order), default=-1)
    behind = [id_ for id_ in book[last + 1 :] if id_ not in states]
    return behind[0] if behind else None


def age(path: Path) -> str:
    """``01_x.ipynb: graded as saved 2 s ago (12:35:35)``."""
    saved = path.stat().st_mtime
    clock = datetime.fromtimestamp(saved).strftime("%H:%M:%S")
    return f"{path.name}: graded as saved {ago(time.time() - saved)} ago ({clock})"


def ago(seconds: float) -> str:
    """A time span in the unit that suits it."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def footer(
    states: Mapping[str, str],
    places: Mapping[str, str],
    saved: Sequence[Path],
    waiting: Mapping[str, str],
) -> list[str]:
    """The lines below a run: progress, what was graded, what waits, what is next."""
    passed = sum(state == PASSED for state in states.values())
    lines = [bar(passed, len(states))]
    if saved:
        lines.append(age(max(saved, key=lambda path: path.stat().st_mtime)))
    lines += [f"{id_}: {why}" for id_, why in waiting.items()]
    id_ = next_one(states, waiting)
    if id_ is not None:
        line = f"next: {id_}" + (f", {places[id_]}" if id_ in places else "")
        lines.append(f"{line}    hint: python exercises hint {id_}")
    elif passed == len(exercises()):
        lines.append("All of them. The solutions are in solutions/, to compare.")
    return lines
