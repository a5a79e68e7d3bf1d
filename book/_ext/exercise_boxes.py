"""A box for each exercise, made of what the notebook and the grader read too.

``{graded} lm.1 lm.2`` on a page becomes a box for each: title, task, the cell that is
to be filled, the three hints, the commands. None of it stands in the book's sources, so
none of it can drift: the task comes from ``solutions/``, the hints from
``exercises/checks/``. ``{ref}`ex-lm-1``` links to a box.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("solutions/*.py", "exercises/checks/*.py", "exercises/grader/*.py")
BOX = """\
::::::{{admonition}} Exercise {id} · {title}
:class: graded

{task}

:::::{{div}} folds
{folds}
:::::
::::::
"""
CELL = """\
```python
{stub}
```

In `exercises/{notebook}.ipynb` (`make lab`): run the cell, then `check("{id}")`.
In the terminal: `{command}`
"""
FOLD = """\
::::{{dropdown}} {title}
{text}
::::
"""
IN_NOTEBOOK = """\
**Exercise {id} · {title}.** In `exercises/{notebook}.ipynb`, or
`{command}`.
"""


@contextmanager
def grader_on_path() -> Iterator[None]:
    """Make ``grader`` and ``checks`` importable, and only for as long as needed."""
    folder = str(ROOT / "exercises")
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


@dataclass(frozen=True)
class Box:
    """What the book says of an exercise."""

    id: str
    title: str
    task: str
    stub: str
    notebook: str
    hints: tuple[tuple[str, str], ...]  # (title, text)

    @classmethod
    def of(cls, id_: str) -> "Box":
        """The box of an exercise. Raises LookupError that says what is missing."""
        with grader_on_path():
            from grader import live, source, spec

            try:
                found, hints = source.find(id_), spec.find(id_).hints
            except KeyError as error:
                raise LookupError(error.args[0]) from None
            except (source.SourceError, spec.SpecError) as error:
                raise LookupError(str(error)) from error
        code = [n for n in found.stub.splitlines() if not source.HEADER.match(n)]
        titles = [f"Hint {n}: {text}" for n, text in enumerate(live.LEVELS, 1)]
        return cls(
            id_, found.title, found.task, "\n".join(code), found.notebook,
            tuple(zip(titles, hints, strict=True)),
        )  # fmt: skip

    @property
    def anchor(self) -> str:
        """The name to which text can link."""
        return "ex-" + self.id.replace(".", "-")

    @property
    def fields(self) -> dict[str, str]:
        """What the templates call by name."""
        command = f"pytest exercises/{self.notebook}.ipynb::{self.id}"
        return vars(self) | {"command": command}

    def myst(self) -> str:
        """The box as the source of a page would have it."""
        cell = ("Write it", CELL.format(**self.fields))
        folds = [FOLD.format(title=a, text=b) for a, b in (cell, *self.hints)]
        return BOX.format(**self.fields | {"folds": "".join(folds)})

    def in_notebook(self) -> str:
        """One line in place of the box, where a page is taken away as a notebook."""
        return IN_NOTEBOOK.format(**self.fields)


class Graded(SphinxDirective):
    """``{graded}`` with one or more exercises; any that does not exist is an error."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Generate MyST text and have it parsed where the directive stands."""
        for path in (path for one in SOURCES for path in ROOT.glob(one)):
            self.env.note_dependency(str(path))
        holder = nodes.Element()
        for id_ in self.arguments[0].split():
            try:
                box = Box.of(id_)
            except LookupError as error:
                self.env.note_reread()  # a source yet to be written may mend it
                raise self.error(f"{self.env.docname}: {error}") from error
            text = StringList(box.myst().splitlines(), f"exercise {id_}")
            self.state.nested_parse(text, self.content_offset, holder)
            holder[-1]["ids"].append(box.anchor)
            self.env.get_domain("std").note_hyperlink_target(
                box.anchor, self.env.docname, box.anchor, f"Exercise {id_}"
            )
        return holder.children


def setup(app: Sphinx) -> dict[str, Any]:
    """Make the directive known to every page."""
    app.add_directive("graded", Graded)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
