"""Everything a page loads lies beside it: the book works without a network.

Two parts of the usual set-up reach for another machine. MathJax comes from a
content network, and thebe (live cells on a remote server) writes the address of
its script into every page. This extension brings MathJax home and switches the
other off.

The package ``sphinx-mathjax-offline`` holds all of MathJax 3.2.2, 32 MB of it. One
file is enough: ``tex-svg.js`` reads TeX and draws paths, so it needs no fonts.
"""

from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util.fileutil import copy_asset

MATHJAX = "mathjax/tex-svg.js"


def mathjax_file() -> Path:
    """Return the MathJax script that pip installed.

    Raises ``PackageNotFoundError`` when ``sphinx-mathjax-offline`` is missing.
    The package's folder has hyphens in its name, so it cannot be imported.
    """
    package = distribution("sphinx-mathjax-offline")
    return Path(str(package.locate_file("sphinx-mathjax-offline"))) / "static" / MATHJAX


def use_local_mathjax(app: Sphinx, config: Config) -> None:
    """Point every page at the copy in ``_static``."""
    config.mathjax_path = MATHJAX


def forget_thebe(app: Sphinx, *_: Any) -> None:
    """Disconnect sphinx-thebe, which Jupyter Book loads whether wanted or not."""
    for listeners in app.events.listeners.values():
        for one in [*listeners]:
            if one.handler.__module__ == "sphinx_thebe":
                listeners.remove(one)
    sheets = app.registry.css_files
    sheets[:] = [sheet for sheet in sheets if "thebe" not in sheet[0]]


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    """Put the one file into the finished site."""
    if error is None and app.builder.format == "html":
        copy_asset(str(mathjax_file()), str(app.outdir / "_static" / "mathjax"))


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the three steps to the moments when they can work."""
    app.connect("config-inited", use_local_mathjax)
    app.connect("config-inited", forget_thebe)
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
