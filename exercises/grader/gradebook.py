"""From saved notebooks to verdicts: the same for pytest, `check` and `check_all`."""

from collections.abc import Iterable, Mapping

from grader.cell import Answer
from grader.complaint import NO_ANSWER
from grader.notebooks import Place, elsewhere
from grader.source import Exercise, exercises, find
from grader.verdict import FAILED, PASSED, STUB, TODO, Verdict
from grader.workers import ENDED, judged


def verdict_on(
    id_: str,
    text: str,
    answers: Mapping[str, str],
    cells: Iterable[str] = (),
    numbering: str = "cell {}",
) -> Verdict:
    """Judge one cell. ``answers`` holds the learner's other cells, for `assembles`;
    ``cells`` all code cells, to find a helper that is defined in the wrong one.
    """
    exercise = find(id_)
    if exercise.is_stub(text):
        return Verdict(id_, TODO, STUB)
    if waiting := waits_for(exercise, answers):
        return waiting
    parts = {part: answers[part] for part in exercise.assembles}
    verdict = _remembered(id_, text, parts)
    if verdict.unknown_name:
        said = elsewhere(verdict.unknown_name, cells, text, numbering)
        if verdict.unknown_name in ("check", "check_all", "hint"):
            said = f"`{verdict.unknown_name}(...)` belongs into a cell of its own."
        verdict = verdict.noting(*[said] * bool(said))
    return verdict


def waits_for(exercise: Exercise, answers: Mapping[str, str]) -> Verdict | None:
    """An exercise that assembles others is no failure as long as one of them is."""
    open_ = []
    for part in exercise.assembles:
        text = answers.get(part)
        state = TODO if text is None else verdict_on(part, text, answers).state
        if state != PASSED:
            open_.append(f"{part} ({state})")
    if not open_:
        return None
    return Verdict(exercise.id, TODO, f"It waits for {', '.join(open_)}.")


def _remembered(id_: str, text: str, parts: dict[str, str]) -> Verdict:
    """The same text gets the same verdict, unless time or memory spoke."""
    key = (id_, text, *parts.items())
    if key not in _KNOWN:
        verdict = judged(Answer(id_, text, parts))
        if verdict.headline in (NO_ANSWER, ENDED):
            return verdict
        _KNOWN[key] = verdict
    return _KNOWN[key]


_KNOWN: dict[tuple, Verdict] = {}


def contradiction(id_: str, places: list[Place]) -> Verdict:
    """Two cells answer the same exercise differently."""
    where = " and ".join(place.where for place in places)
    return Verdict(
        id_, FAILED, "Two answers to one exercise",
        f"They stand in {where}, and they differ. Keep one; in the other, change the "
        "first line.",
    )  # fmt: skip


def unheard_of(id_: str) -> Verdict:
    """A cell with an identity that no exercise has."""
    chapters = {exercise.partition(".")[0] for exercise in exercises()}
    close = [e for e in exercises() if e.split(".")[0] == id_.split(".")[0]]
    known = ", ".join(close or [f"{c}.1 …" for c in sorted(chapters)])
    return Verdict(
        id_, FAILED, f"There is no exercise {id_}",
        f"There are {known}.",
    )  # fmt: skip


def cell_gone(id_: str, cells: Iterable[str]) -> Verdict:
    """An exercise whose answer cell is missing from its notebook."""
    line = f"# exercise: {id_}"
    if any(line in cell.splitlines() for cell in cells):
        return Verdict(
            id_, FAILED, "Its line is not the first",
            f"A cell holds `{line}`, with something above it. Move it to the top.",
        )  # fmt: skip
    return Verdict(
        id_, FAILED, "Its answer cell is gone",
        f"No cell begins with the line `{line}`. If you removed it, put it back; or: "
        f"python exercises reset {id_}",
    )  # fmt: skip
