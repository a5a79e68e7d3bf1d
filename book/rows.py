"""Rows of experiments over several seeds: ``book/results/*.csv``, and where from.

An experiment too long for the page is a command; its rows are committed, with the
command, the versions and the text as the first lines of the file.
"""

import csv
import platform
import shlex
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import numpy as np

from minidsv3 import corpus

RESULTS = Path(__file__).parent / "results"
WORDS = {
    *("arm", "engine", "kind", "kernel", "how", "dtype", "shape", "limited_by"),
    *("bound", "machine", "case", "architecture", "order"),
}  # columns that are no numbers

Row = dict[str, object]


def provenance(script: str, seeds: Sequence[int]) -> list[str]:
    """Where the rows come from, as the first lines of their files."""
    words = ["python", f"book/{script}", "--seeds", *map(str, seeds)]
    text = corpus.load_corpus()
    return [
        f"# {shlex.join(words)}",
        f"# {date.today()}, Python {platform.python_version()}, NumPy "
        f"{np.__version__}, {platform.machine()}, one thread",
        f"# {text.name}, sha256 {text.sha256[:12]}",
    ]


def read(table: str) -> list[dict[str, float | str]]:
    """The committed rows of a table, numbers as numbers."""
    lines = (RESULTS / f"{table}.csv").read_text(encoding="utf-8").splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return [{k: v if k in WORDS else float(v) for k, v in row.items()} for row in rows]


def write(table: str, rows: Sequence[Row], head: Sequence[str]) -> None:
    """A table under ``book/results/``, below the lines that say where it is from."""
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{table}.csv", "w", encoding="utf-8", newline="") as file:
        file.writelines(line + "\n" for line in head)
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            short = {k: f"{v:.6g}" for k, v in row.items() if isinstance(v, float)}
            writer.writerow(row | short)
