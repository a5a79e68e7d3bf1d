"""Pages run in the Python that builds the book, whatever else is installed.

Jupyter looks for a kernel by its name, ``python3``, first among those that the reader
has ever registered: with luck that is another Python without minidsv3, without luck
one with an old copy of it. A description of our own, in front of the search path,
settles it. It also quietens ipykernel, which would otherwise warn at every page that
it talks to the builder, on this same machine, in plain text.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config

COMMAND = ["-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=ERROR"]


def use_own_python(app: Sphinx, config: Config) -> None:
    """Describe this Python as the kernel ``python3`` and let Jupyter find it first."""
    folder = Path(app.outdir).resolve().parent / ".jupyter"
    file = folder / "kernels/python3/kernel.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    kernel = {"argv": [sys.executable, *COMMAND], "language": "python"}
    file.write_text(json.dumps(kernel | {"display_name": "Python 3"}))
    known = os.environ.get("JUPYTER_PATH")
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [str(folder), known]))


def setup(app: Sphinx) -> dict[str, Any]:
    """Be ready before the first page is read."""
    app.connect("config-inited", use_own_python)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
