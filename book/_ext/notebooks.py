"""Each page that executes can be taken away as a notebook.

jupytext turns the page's source into an ``.ipynb`` without outputs, and the theme's
download menu offers it. Jupyter does not know Sphinx's ``literalinclude``, so each
listing is pasted into the notebook as what it stands for. A box of exercises becomes a
line for each: they have a notebook of their own.
"""

import ast
import re
from pathlib import Path
from typing import Any

import jupytext
from docutils import nodes
from exercise_boxes import Box
from sphinx.application import Sphinx

LISTING = re.compile(
    r"^(?P<fence>`{3,}|:{3,})\{literalinclude\} (?P<file>\S+)\n"
    r"(?P<options>(?::.*\n)*)(?P=fence)$",
    re.MULTILINE,
)
GRADED = re.compile(
    r"^(?P<fence>`{3,}|:{3,})\{graded\} (?P<ids>.+)\n(?P=fence)$", re.MULTILINE
)
PYOBJECT = re.compile(r"^:pyobject: (\S+)$", re.MULTILINE)


def definition(source: str, dotted_name: str) -> str:
    """Return the text of a function, class or method such as ``Config.to_json``.

    Raises ``LookupError`` when the source defines no such name.
    """
    node: ast.AST = ast.parse(source)
    for name in dotted_name.split("."):
        body = getattr(node, "body", [])
        found = [item for item in body if getattr(item, "name", None) == name]
        if not found:
            raise LookupError(f"no definition of {dotted_name}")
        node = found[0]
    first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
    return "\n".join(source.splitlines()[first - 1 : node.end_lineno])


def paste_listings(text: str, folder: Path) -> str:
    """Replace every ``literalinclude`` of ``text``, a page in ``folder``, by code."""

    def listing(match: re.Match[str]) -> str:
        source = (folder / match["file"]).read_text(encoding="utf-8")
        wanted = PYOBJECT.search(match["options"])
        code = definition(source, wanted[1]) if wanted else source.rstrip()
        return f"```python\n{code}\n```"

    return LISTING.sub(listing, text)


def name_exercises(text: str) -> str:
    """Replace every ``graded`` of ``text`` by where its exercises are to be found."""
    return GRADED.sub(
        lambda match: "\n".join(Box.of(i).in_notebook() for i in match["ids"].split()),
        text,
    )


def is_executed(app: Sphinx, page: str) -> bool:
    """Tell whether a page has the header that makes its cells run."""
    return "kernelspec" in app.env.metadata.get(page, {})


def offer_notebook(
    app: Sphinx, page: str, template: str, context: dict[str, Any], tree: nodes.Node
) -> None:
    """Write the notebook beside the page's source, where the theme links to it."""
    if not is_executed(app, page):
        return
    source = Path(app.env.doc2path(page))
    text = paste_listings(source.read_text(encoding="utf-8"), source.parent)
    text = name_exercises(text)
    target = Path(app.outdir) / "_sources" / f"{page}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    jupytext.write(jupytext.reads(text, fmt="md:myst"), target)
    context["ipynb_source"] = f"{page}.ipynb"


def setup(app: Sphinx) -> dict[str, Any]:
    """Run before the theme builds its menu from the page's context."""
    app.connect("html-page-context", offer_notebook, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
