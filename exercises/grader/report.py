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


def next_one(states: Mapping[str, str]) -> str | None:
    """The first failed exercise, else the first that is not passed, in book order."""
    order = [id_ for id_ in exercises() if id_ in states]
    for wanted in (FAILED, None):
        for id_ in order:
            if states[id_] == wanted or (wanted is None and states[id_] != PASSED):
                return id_
    return None


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
    states: Mapping[str, str], places: Mapping[str, str], saved: Sequence[Path]
) -> list[str]:
    """The lines below a run: progress, what was graded, what is next."""
    passed = sum(state == PASSED for state in states.values())
    lines = [bar(passed, len(states))]
    if saved:
        lines.append(age(max(saved, key=lambda path: path.stat().st_mtime)))
    id_ = next_one(states)
    if id_ is None:
        lines.append("All of them. The solutions are in solutions/, to compare.")
    else:
        line = f"next: {id_}"
        if id_ in places:
            line += f", {places[id_]}"
        lines.append(f"{line}    hint: python exercises hint {id_}")
    return lines
