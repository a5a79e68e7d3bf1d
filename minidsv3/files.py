"""Files that are replaced whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Hand out a name beside ``path`` to write to; at the end it takes that place.

    Whatever interrupts the writing, ``path`` holds the old file or the new one, never a
    half, and nothing is left beside it unless the process is killed. The folder is made
    if it is not there. Raises OSError as the file system does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())  # else a power cut may leave an empty file
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
