"""``pytest exercises/``: every answer cell of every notebook is one test.

An untouched stub is ``todo``: nothing of it runs, and it is neither red nor green.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from grader import kernels, notebooks, report
from grader.gradebook import cell_gone, contradiction, unheard_of, verdict_on
from grader.notebooks import Notebook, NotebookError, Place
from grader.source import EXERCISES, exercises
from grader.verdict import FAILED, TODO, Verdict

STATUS = {TODO: ("todo", "-", "TODO")}


class Wrong(Exception):
    """An answer that failed; its verdict is all that is shown."""


class AnswerItem(pytest.Item):
    """One exercise. ``places`` are the cells that claim to answer it."""

    def __init__(self, *, places: list[Place], verdict: Verdict | None = None, **kw):
        super().__init__(**kw)
        self.places, self.verdict = places, verdict
        self.add_marker("exercise")

    def runtest(self) -> None:
        """Judge, and note what the summary needs."""
        verdict = self.verdict or self.judge()
        self.user_properties += [
            ("exercise", verdict.id),
            ("state", verdict.state),
            ("where", self.where),
            ("waits", "" if verdict.state != TODO else verdict.headline),
        ]
        if verdict.state == TODO:
            pytest.skip(verdict.headline or "not answered yet")
        if verdict.state == FAILED:
            raise Wrong(verdict.body())

    def judge(self) -> Verdict:
        """The verdict on the one answer among the cells."""
        book = self.config.stash[BOOK]
        place = notebooks.one_place(self.places)
        if isinstance(place, list):
            return contradiction(self.name, place)
        return verdict_on(self.name, place.text, book.answers, book.cells(place.path))

    @property
    def where(self) -> str:
        """Notebook and cell, for people."""
        return self.places[0].where if self.places else self.path.name

    def repr_failure(self, excinfo):
        """The verdict's words; a traceback only if the grader itself broke."""
        if isinstance(excinfo.value, Wrong):
            return str(excinfo.value)
        return super().repr_failure(excinfo)

    def reportinfo(self):
        """The headline of a failure."""
        return self.path, None, f"{self.name}  ({self.where})"


class Book:
    """All notebooks that are collected in this run."""

    def __init__(self) -> None:
        self.notebooks: dict[Path, Notebook] = {}

    @property
    def answers(self) -> dict[str, str]:
        """The learner's answers by id, for exercises that assemble others."""
        found: dict[str, list[Place]] = {}
        for path in notebooks.paths():
            for place in self.read(path):
                found.setdefault(place.id, []).append(place)
        chosen = {id_: notebooks.one_place(p) for id_, p in found.items()}
        return {i: p.text for i, p in chosen.items() if isinstance(p, Place)}

    def read(self, path: Path) -> tuple[Place, ...]:
        """The answer cells of a notebook; none if it is damaged."""
        if path not in self.notebooks:
            try:
                self.notebooks[path] = notebooks.read(path)
            except NotebookError:
                return ()
        return self.notebooks[path].places

    def cells(self, path: Path) -> tuple[str, ...]:
        """All code cells of a notebook that was read."""
        return self.notebooks[path].cells


BOOK = pytest.StashKey[Book]()
SHORT = pytest.StashKey[bool]()


class NotebookFile(pytest.File):
    """One notebook, with an item for each exercise."""

    def collect(self) -> Iterator[AnswerItem]:
        """An item for each exercise; one that fails if the file is damaged."""
        try:
            notebook = notebooks.read(self.path)
        except NotebookError as error:
            verdict = Verdict(self.path.name, FAILED, str(error))
            yield AnswerItem.from_parent(
                self, name=self.path.name, places=[], verdict=verdict
            )
            return
        self.config.stash[BOOK].notebooks[self.path] = notebook
        table = exercises()
        places: dict[str, list[Place]] = {}
        for place in notebook.places:
            places.setdefault(place.id, []).append(place)
        for id_ in self.expected(places, table):
            verdict = None
            if id_ not in places:
                verdict = cell_gone(id_, notebook.cells)
            elif id_ not in table:
                verdict = unheard_of(id_)
            yield AnswerItem.from_parent(
                self, name=id_, places=places.get(id_, []), verdict=verdict
            )

    def expected(self, places: dict, table: dict) -> list[str]:
        """What is here, and what belongs here and stands in no notebook."""
        here = [id_ for id_, e in table.items() if e.notebook == self.path.stem]
        others = {
            place.id
            for path in notebooks.paths(self.path.parent)
            for place in self.config.stash[BOOK].read(path)
        }
        missing = [id_ for id_ in here if id_ not in places and id_ not in others]
        order = {id_: n for n, id_ in enumerate(table)}
        return sorted([*places, *missing], key=lambda i: order.get(i, len(order)))


def pytest_configure(config) -> None:
    """Little above the results, unless more was asked for."""
    config.addinivalue_line("markers", "exercise: an answer cell of a notebook")
    config.stash[BOOK] = Book()
    only_these = all(
        Path(arg.split("::")[0]).resolve().is_relative_to(EXERCISES)
        for arg in config.args
    )
    if only_these and config.option.verbose <= 0:
        config.option.no_header = True
        config.option.reportchars = ""
    config.stash[SHORT] = only_these and config.option.verbose == 0
    if config.stash[SHORT]:
        config.option.verbose = -1  # no headline, no count: the last line has both


def pytest_sessionstart(session) -> None:
    """A line for each notebook all the same."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and session.config.stash[SHORT]:
        reporter.showfspath = True


def pytest_collect_file(file_path: Path, parent):
    """The notebooks beside this file, whatever they are called."""
    if file_path.suffix == ".ipynb" and file_path.parent == EXERCISES:
        return NotebookFile.from_parent(parent, path=file_path)


def pytest_collection_modifyitems(items: list) -> None:
    """An exercise that stands in two notebooks is one test, with all its cells."""
    first: dict[str, AnswerItem] = {}
    for item in [i for i in items if isinstance(i, AnswerItem)]:
        if item.name in first:
            first[item.name].places += item.places
            items.remove(item)
        else:
            first[item.name] = item


def properties(test_report) -> dict[str, str]:
    """What `AnswerItem.runtest` noted, also of a run in another process."""
    return dict(getattr(test_report, "user_properties", ()))


def pytest_report_teststatus(report):
    """An untouched stub under its own word."""
    if report.when == "call" and properties(report).get("state") in STATUS:
        return STATUS[properties(report)["state"]]


def pytest_terminal_summary(terminalreporter) -> None:
    """Progress over the exercises of this run, and the next one."""
    runs = [
        properties(r)
        for reports in terminalreporter.stats.values()
        for r in reports
        if getattr(r, "when", "") == "call" and "exercise" in properties(r)
    ]
    if not runs:
        return
    states = {r["exercise"]: r["state"] for r in runs}
    places = {r["exercise"]: r["where"] for r in runs}
    touched = {r["where"].split(",")[0] for r in runs if r["state"] != TODO}
    saved = [p for p in notebooks.paths() if p.name in touched]
    waiting = {r["exercise"]: r["waits"] for r in runs if "waits for" in r["waits"]}
    lines = report.footer(states, places, saved, waiting)
    if kernels_judged := [s for id_, s in states.items() if ".cuda." in id_]:
        ran = set(kernels_judged) != {TODO} and kernels.on_a_card()
        lines[0] += f"    CUDA: simulator{' and GPU' * ran}"
    terminalreporter.ensure_newline()
    terminalreporter.section("progress")
    for line in lines:
        terminalreporter.write_line(line)
