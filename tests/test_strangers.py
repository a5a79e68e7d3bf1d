"""Answers beside those in the checks: three in four of them wrong.

Those to chapter 1 were written from the text of the notebook alone, by somebody who had
not seen the checks; those to chapters 3, 4, 6, 9 and 10 by whoever had written the
checks, and there (but for 10) the ones that end each file by somebody who had seen the
text alone, too. All were to deceive the judge, or go wrong in the ways that learners
do. In ``strangers/`` each has a name; a wrong one is never accepted, and with ``named``
it is told that misconception. The right ones look unlike the references, and all are
accepted, on their own and as parts of the exercise that assembles them.
"""

import tomllib
from pathlib import Path

import pytest
from grader import spec
from grader.cell import Answer
from grader.source import exercises, find
from grader.verdict import FAILED, PASSED, Verdict
from grader.workers import judged

STRANGERS = {
    path.stem: tomllib.loads(path.read_text(encoding="utf-8"))
    for path in sorted(Path(__file__).with_name("strangers").glob("*.toml"))
}
WRONG = [(i, name) for i in STRANGERS for name in STRANGERS[i]["wrong"]]
RIGHT = [(i, name) for i in STRANGERS for name in STRANGERS[i]["right"]]
WHOLE = [i for i in STRANGERS if find(i).assembles]  # made of answers to others
PARTS = [
    (whole, part, name)
    for whole in WHOLE for part, name in RIGHT if part in find(whole).assembles
]  # fmt: skip
LISTED = [
    (whole, part, number)
    for whole in WHOLE for part in find(whole).assembles
    for number in range(len(spec.find(part).right))
]  # fmt: skip


def answer(id_: str, kind: str, name: str) -> str:
    """The text of an answer; of lm.11 the files hold what follows the given lines."""
    found = STRANGERS[id_][kind][name]
    text = found.get("text") or patched(id_, found["replace"])
    if id_ == "lm.11":
        given, _, _ = find(id_).stub.rpartition("    grads = {}\n")
        return given + text
    return f"# exercise: {id_}\n{text}"


def patched(id_: str, pairs: list[list[str]]) -> str:
    """The first right answer to an exercise, with a few strings replaced."""
    text = next(iter(STRANGERS[id_]["right"].values()))["text"]
    for old, new in pairs:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def verdict(id_: str, text: str, **own: str) -> Verdict:
    """The judge's word, with references for parts but for those of one's own."""
    parts = {part: find(part).reference for part in find(id_).assembles}
    return judged(Answer(id_, text, parts | own))


def test_there_are_enough_of_them_and_every_exercise_has_some():
    chapters = {find(i).notebook for i in STRANGERS}
    assert set(STRANGERS) == {
        i for i, e in exercises().items() if e.notebook in chapters
    }
    for chapter in chapters:
        wrong, right = (
            sum(find(i).notebook == chapter for i, _ in kind) for kind in (WRONG, RIGHT)
        )
        assert wrong >= 60 and right >= 15, chapter


def test_every_name_is_that_of_a_misconception():
    for id_, entries in STRANGERS.items():
        known = {wrong.name for wrong in spec.find(id_).wrong}
        asked = {entry.get("named") for entry in entries["wrong"].values()} - {None}
        assert asked <= known, id_


@pytest.mark.parametrize(("id_", "name"), WRONG)
def test_a_wrong_answer_is_refused_and_named(id_, name):
    said = verdict(id_, answer(id_, "wrong", name))
    assert said.state == FAILED
    if named := STRANGERS[id_]["wrong"][name].get("named"):
        likeness, _, its_name = said.headline.partition(": ")
        assert its_name == named, said.text()
        assert likeness in ("Looks like", "On this case it looks like")


@pytest.mark.parametrize(("id_", "name"), RIGHT)
def test_a_right_answer_is_accepted(id_, name):
    said = verdict(id_, answer(id_, "right", name))
    assert said.state == PASSED, said.text()


@pytest.mark.parametrize(("whole", "part", "name"), PARTS)
def test_a_right_answer_is_a_part_of_the_whole(whole, part, name):
    own = {part: answer(part, "right", name)}
    said = verdict(whole, find(whole).reference, **own)
    assert said.state == PASSED, said.text()


@pytest.mark.parametrize(("whole", "part", "number"), LISTED)
def test_what_the_checks_call_right_is_a_part_of_the_whole(whole, part, number):
    own = {part: f"# exercise: {part}\n{spec.find(part).right[number]}"}
    said = verdict(whole, find(whole).reference, **own)
    assert said.state == PASSED, said.text()


@pytest.mark.parametrize("whole", WHOLE)
@pytest.mark.parametrize("end", [0, -1])
def test_unusual_parts_agree_with_each_other(whole, end):
    own = {i: list(STRANGERS[i]["right"])[end] for i in find(whole).assembles}
    texts = {i: answer(i, "right", name) for i, name in own.items()}
    said = verdict(whole, find(whole).reference, **texts)
    assert said.state == PASSED, said.text()
