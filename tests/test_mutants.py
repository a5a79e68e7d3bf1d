"""Mutants of every reference: would the judge notice one wrong sign in an answer?

cosmic-ray changes one operator, number or keyword of a reference at a time; the judge
must fail each mutant. One that computes what the reference computes is listed in
equivalent_mutants.toml, with the reason. An answer cell is mutated whole, the lines of
lm.11 and gpu.cuda.3 that are given to the learner too, and so are default values.

Every core operator of cosmic-ray is used but VariableReplacer and VariableInserter:
they must be told which variables, and put in random numbers. A mutant that Python
cannot read, such as ``** not 0.5``, is none.
"""

import ast
import contextlib
import itertools
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

sys.path.insert(0, str(Path(__file__).parents[1] / "exercises"))

from grader import judge, spec, workers  # noqa: E402
from grader.cell import Answer  # noqa: E402
from grader.source import exercises, find  # noqa: E402
from grader.verdict import FAILED, PASSED  # noqa: E402

EQUIVALENT = tomllib.loads(
    Path(__file__).with_name("equivalent_mutants.toml").read_text(encoding="utf-8")
)
SECONDS = 5.0  # for one mutant: judging takes milliseconds, so that longer is a loop
START = 120.0  # for a process that is new, on a machine that is busy


@dataclass(frozen=True)
class Mutant:
    """A changed reference: what changed it, its text, and the line before and after."""

    operator: str
    text: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.before}\n  became {self.after}\n  by {self.operator}"


@cache
def operators() -> dict[str, Callable]:
    """The operators that need no arguments, by name."""
    table = {name: plugins.get_operator(name) for name in plugins.operator_names()}
    return {name: made for name, made in table.items() if not made.arguments()}


def mutants(text: str) -> Iterator[Mutant]:
    """Every operator at every place where it applies: one change a mutant."""
    nodes = list(ast_nodes(get_ast(text)))
    for name, operator in operators().items():
        places = sum(len(list(operator().mutation_positions(node))) for node in nodes)
        for occurrence in range(places):
            changed = mutate_code(text, operator(), occurrence)
            if readable(changed):
                yield Mutant(name, changed, *changed_line(text, changed))


def readable(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def changed_line(text: str, changed: str) -> tuple[str, str]:
    """The first line that differs, before and after, without comments."""
    lines = itertools.zip_longest(text.splitlines(), changed.splitlines(), fillvalue="")
    before, after = next((old, new) for old, new in lines if old != new)
    return before.partition("  #")[0].strip(), after.partition("  #")[0].strip()


# --- the judge --------------------------------------------------------------------


def states_here(answers: Sequence[Answer]) -> Iterator[str]:
    """The judge's verdicts, in this process. Nothing names a wrong answer: that takes
    half of the time and is not asked for here.
    """
    find_check = spec.find
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spec, "find", lambda id_: replace(find_check(id_), wrong=()))
        for answer in answers:
            yield judge.grade(answer, lambda label: None).state


def states(answers: Sequence[Answer]) -> list[str]:
    """The same, in a process that is given up for a new one if it loops or crashes.

    Such a mutant has failed. `workers.judged` takes a process for each answer, and four
    times as long.
    """
    workers.warm_up()
    known: list[str] = []
    while len(known) < len(answers):
        with process_that_judges(answers[len(known) :]) as ours:
            known += received(ours)
        if len(known) < len(answers):
            known.append(FAILED)
    return known


@contextlib.contextmanager
def process_that_judges(answers: Sequence[Answer]) -> Iterator[Connection]:
    ours, theirs = workers.CONTEXT.Pipe(duplex=False)
    process = workers.CONTEXT.Process(target=_work, args=(theirs, answers), daemon=True)
    with workers.surroundings(), workers.no_main():
        process.start()
    theirs.close()
    try:
        yield ours
    finally:
        process.kill()
        process.join()
        ours.close()


def received(ours: Connection) -> Iterator[str]:
    """The states that come in time. Raises what the judge itself raised."""
    if not ours.poll(START) or ours.recv() != "ready":
        raise RuntimeError("the process that judges did not start")
    with contextlib.suppress(EOFError):
        while ours.poll(SECONDS):
            message = ours.recv()
            if isinstance(message, Exception):
                raise message
            yield message


def _work(theirs: Connection, answers: Sequence[Answer]) -> None:
    workers._silence()
    if find(answers[0].id).kind != "cuda":
        workers._limit_memory(workers.MEMORY)
    theirs.send("ready")
    try:
        for state in states_here(answers):
            theirs.send(state)
    except Exception as error:  # ours, not the mutant's: to be seen
        theirs.send(RuntimeError(f"the judge itself failed: {error!r}"))


# --- the verdict ------------------------------------------------------------------


def survivors(
    id_: str, judged: Callable[[Sequence[Answer]], Iterable[str]]
) -> list[Mutant]:
    """The mutants that are taken for right answers. The reference itself must be."""
    exercise = find(id_)
    parts = {part: find(part).reference for part in exercise.assembles}
    found = list(mutants(exercise.reference))
    assert found, f"{id_}: no operator applies, so this test says nothing of it"
    texts = [exercise.reference, *(mutant.text for mutant in found)]
    reference, *rest = judged([Answer(id_, text, parts) for text in texts])
    assert reference == PASSED, f"{id_}: the reference itself is {reference}"
    return [m for m, state in zip(found, rest, strict=True) if state != FAILED]


def complaints(alive: list[Mutant], equivalent: Mapping[str, str]) -> list[str]:
    """Survivors that nothing excuses, and excuses that no survivor needs."""
    unexplained = [
        f"survives: {mutant}" for mutant in alive if mutant.after not in equivalent
    ]
    needed = {mutant.after for mutant in alive}
    stale = [f"no such survivor: {line}" for line in equivalent if line not in needed]
    return unexplained + stale


@pytest.mark.slow
@pytest.mark.parametrize("id_", exercises())
def test_the_judge_notices_every_mutant(id_):
    said = complaints(survivors(id_, states), EQUIVALENT.get(id_, {}))
    assert not said, f"{id_}: add a case, or a reason\n" + "\n".join(said)


def test_every_excuse_has_its_exercise_and_a_reason():
    assert EQUIVALENT.keys() <= exercises().keys()
    for lines in EQUIVALENT.values():
        assert all(isinstance(why, str) and len(why) > 20 for why in lines.values())


# --- the machinery itself ---------------------------------------------------------


def weakened(id_: str, case: spec.Case, patch: pytest.MonkeyPatch) -> None:
    """Leave an exercise this one case, in the judge of this process."""
    check = spec.find(id_)
    weak = spec.Check(check.id, check.returns, lambda: [case], check.hints, (), ())
    patch.setattr(spec, "find", lambda asked: {id_: weak}[asked])


def test_a_weak_check_lets_mutants_live_and_each_is_named_by_its_line(monkeypatch):
    weakened("lm.2", spec.Case("one position", (np.ones((1, 1, 1, 1)),)), monkeypatch)
    alive = survivors("lm.2", states_here)
    said = complaints(alive, EQUIVALENT["lm.2"])
    assert len(said) == len(alive) - len(EQUIVALENT["lm.2"]) > 5
    assert (
        "survives: future = np.arange(S) > np.arange(S - T, S)[:, None]\n"
        "  became future = np.arange(S) < np.arange(S - T, S)[:, None]\n"
        "  by core/ReplaceComparisonOperator_Gt_Lt"
    ) in said


def test_an_excuse_that_nothing_needs_is_named():
    mutant = Mutant("core/X", "", "a = b + c", "a = b - c")
    excuse = {"a = b - c": "c is 0 in every call"}
    assert complaints([mutant], excuse) == []
    assert complaints([], excuse) == ["no such survivor: a = b - c"]


def test_each_mutant_changes_one_line():
    text = "def f(x, n=2):\n    y = -x + 1  # a + b\n    return y if n else not y\n"
    found = list(mutants(text))
    assert ("y = -x + 1", "y = -x - 1") in {(m.before, m.after) for m in found}
    assert len({m.text for m in found}) == len(found) > 15
    for mutant in found:
        pairs = zip(text.splitlines(), mutant.text.splitlines(), strict=True)
        assert sum(old != new for old, new in pairs) == 1
        assert ast.dump(ast.parse(mutant.text)) != ast.dump(ast.parse(text))


def test_a_mutant_that_loops_or_crashes_has_failed(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 2.0)
    right = find("lm.7").reference
    body = "def softmax_backward(dP, P):\n    "
    texts = [
        right, body + "while True: pass", right,
        body + "__import__('os')._exit(0)", body + "return P", right,
    ]  # fmt: skip
    assert states([Answer("lm.7", text) for text in texts]) == [
        PASSED, FAILED, PASSED, FAILED, FAILED, PASSED,
    ]  # fmt: skip


def test_a_judge_that_fails_itself_is_no_failed_mutant():
    answers = [Answer("lm.7", find("lm.7").reference), Answer("lm.99", "")]
    with pytest.raises(RuntimeError, match=r"the judge itself failed.*lm\.99"):
        states(answers)


def test_a_mutant_that_python_cannot_read_is_none():
    text = "y = x ** -0.5\n"
    assert not readable(text.replace("-", "not "))
    assert "core/ReplaceUnaryOperator_USub_Not" in operators()
    assert not any("not" in mutant.text for mutant in mutants(text))
