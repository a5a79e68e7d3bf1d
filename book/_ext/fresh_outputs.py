"""Executed outputs are thrown away as soon as anything they depend on changes.

jupyter-cache compares the cells of a page and nothing else. Change a function in
the library and the page goes on showing the numbers of the old one. So the cache
lives in a folder named after a hash of all that an output can depend on: the
library, the plotting helpers, style and drawings, committed results, and the versions
of Python and the packages. A change names a new folder, the pages run again, and the
old folder is deleted. Sphinx sees a changed setting and reads every page anew.
"""

import hashlib
import platform
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from docutils import nodes
from myst_nb.ext.glue.utils import PendingGlueReference
from sphinx.application import Sphinx
from sphinx.config import Config

SOURCES = (
    "minidsv3/**/*.py",
    "book/*.py",
    "book/*.mplstyle",
    "book/_static/*.svg",
    "book/results/*",
    "constraints.txt",
)
PACKAGES = ("numpy", "matplotlib")


def source_files(root: Path) -> Iterator[Path]:
    """Yield the files below ``root`` that outputs depend on, in a fixed order."""
    for pattern in SOURCES:
        yield from sorted(path for path in root.glob(pattern) if path.is_file())


def fingerprint(root: Path) -> str:
    """Return 16 hexadecimal digits that change with any source of the outputs.

    Names count as well as contents: a module that moves is a change.
    """
    digest = hashlib.sha256(platform.python_version().encode())
    for package in PACKAGES:
        digest.update(f"{package} {version(package)}".encode())
    for path in source_files(root):
        content = path.read_bytes()
        name = path.relative_to(root).as_posix()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def choose_cache(app: Sphinx, config: Config) -> None:
    """Set the cache folder for this build and delete those of earlier ones."""
    caches = Path(app.outdir).parent / ".jupyter_cache"
    current = caches / fingerprint(Path(app.srcdir).parent)
    for old in caches.glob("*"):
        if old != current:
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    config.nb_execution_cache_path = str(current)


def follow_glue(app: Sphinx, doctree: nodes.document) -> None:
    """Read a page again when a page changes from which it takes a number."""
    for reference in doctree.findall(PendingGlueReference):
        app.env.note_dependency(app.env.doc2path(reference.refdoc))


def setup(app: Sphinx) -> dict[str, Any]:
    """Choose the cache before myst-nb reads its settings."""
    app.connect("config-inited", choose_cache)
    app.connect("doctree-read", follow_glue)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
