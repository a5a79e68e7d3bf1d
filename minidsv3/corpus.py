"""Text to bytes to batches: what the models of the book learn from.

A token is a byte, 0–255. Id 256, `BOUNDARY`, stands before, between and after
documents, so a vocabulary has 257 rows. Without a path, `load_corpus` reads Python
itself: modules of the standard library that everyone has, and the language reference
behind ``help()``. Nothing is downloaded and nothing is cached on disk.

Some files are held out to measure on. A file goes to its side by a hash of its name, so
the split is the same on every machine. Files that share most of their lines go
together, for a held-out copy of a training file would measure memory.
"""

import hashlib
import platform
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

BOUNDARY = 256
VOCAB_SIZE = 257

# Modules of Python 3.11 that later versions and slim Linux packages have too. Left out:
# tests, generated tables (token, locale, html.entities), jokes and what needs a screen.
STANDARD_LIBRARY = """
_collections_abc _compression _markupbase _pydecimal _pyio _strptime _threading_local
_weakrefset abc argparse ast asyncio base64 bdb bisect bz2 cProfile calendar cmd code
codecs codeop collections colorsys compileall concurrent configparser contextlib copy
copyreg csv ctypes dataclasses datetime dbm decimal difflib dis doctest email enum
filecmp fileinput fnmatch fractions ftplib functools genericpath getopt getpass gettext
glob graphlib gzip hashlib heapq hmac html http imaplib importlib inspect io ipaddress
json linecache logging lzma mailbox mimetypes modulefinder multiprocessing netrc ntpath
nturl2path numbers operator optparse os pathlib pdb pickle pickletools pkgutil platform
plistlib poplib posixpath pprint profile pstats pty py_compile pyclbr pydoc queue quopri
random re reprlib rlcompleter runpy sched secrets selectors shelve shlex shutil signal
site smtplib socket socketserver sqlite3 ssl stat statistics string struct subprocess
symtable sysconfig tabnanny tarfile tempfile textwrap threading timeit tokenize tomllib
trace traceback tracemalloc tty types typing unittest urllib uuid warnings wave weakref
webbrowser wsgiref xml xmlrpc zipapp zipfile zipimport zoneinfo
"""
LEFT_OUT = {"test", "tests", "__pycache__", "entities.py"}


class CorpusError(ValueError):
    """Text that cannot be used. The message says which, where and what to do."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Two token arrays and where they come from. Published figures name the `sha256`.

    `train` and `held_out` are read-only uint16 arrays (N,) of ids 0…256.
    """

    name: str
    train: np.ndarray = field(repr=False)  # (N_train,)
    held_out: np.ndarray = field(repr=False)  # (N_held_out,)
    files_train: tuple[str, ...] = field(repr=False)
    files_held_out: tuple[str, ...] = field(repr=False)
    files_skipped: tuple[str, ...]  # binary files of a folder
    sha256: str  # of both arrays: changes with the text and with the split


def load_corpus(path: str | Path | None = None, held_out: float = 0.1) -> Corpus:
    """Read a text file, a folder of them or, without a path, Python's library.

    About `held_out` of the files are kept apart. A single file is not split by files:
    its last part, from a line's start, is held out. In a folder, hidden and empty files
    are passed over, and binary ones are named in `files_skipped`. Line ends become
    ``\\n``. Raises `CorpusError`: no such path, an empty or binary file, a folder
    without text, a share outside (0, 1), or a side that would have nothing.
    """
    if not isinstance(held_out, float) or not 0 < held_out < 1:
        raise CorpusError(f"held_out = {held_out!r}: must be between 0 and 1")
    if path is None:
        name = f"standard library of Python {platform.python_version()}"
        documents, skipped = _standard_library(), ()
    else:
        name = Path(path).resolve().name
        documents, skipped = _documents(Path(path))
    if len(documents) == 1:
        train, held = _split_one(documents, held_out)
    else:
        train, held = _split_by_file(documents, held_out)
    tokens = [_tokens(side.values()) for side in (train, held)]
    digest = hashlib.sha256(b"".join(t.astype("<u2").tobytes() for t in tokens))
    return Corpus(name, *tokens, tuple(train), tuple(held), skipped, digest.hexdigest())


def batch(
    tokens: np.ndarray, batch_size: int, length: int, seed: int, step: int
) -> np.ndarray:
    """Cut `batch_size` windows at random: int64 (B, T + 1), with T = `length`.

    The first T ids of a row are read, the last T are their targets. The result depends
    on nothing but the arguments, so training that resumes at a step needs no memory of
    the steps before. Raises `CorpusError` if the tokens are fewer than T + 1.
    """
    if len(tokens) < length + 1:
        raise CorpusError(
            f"the text has {len(tokens)} tokens, but a window of length {length} needs "
            f"{length + 1}: take more text or a shorter sequence"
        )
    rng = np.random.default_rng([seed, step])
    starts = rng.integers(0, len(tokens) - length, size=batch_size)  # (B,)
    return tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64)


def encode(text: str) -> np.ndarray:
    """The UTF-8 bytes of a text as ids: uint16 (N,). No boundary is added."""
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16)


def decode(ids: Sequence[int] | np.ndarray) -> str:
    """The text of ids (N,). A boundary shows as nothing, broken UTF-8 as ``�``.

    A model writes bytes, so it may write half a character. Raises `CorpusError` for an
    id outside 0…256.
    """
    ids = np.asarray(ids, dtype=np.int64)
    outside = ids[(ids < 0) | (ids > BOUNDARY)]
    if outside.size:
        raise CorpusError(f"id {outside[0]} is no byte and no boundary: allowed 0…256")
    return ids[ids != BOUNDARY].astype(np.uint8).tobytes().decode("utf-8", "replace")


# --- reading ----------------------------------------------------------------------


def _standard_library() -> dict[str, bytes]:
    """The listed modules' sources and the topics of ``help()``, by relative name."""
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_path("stdlib"))
    found = {}
    for module in STANDARD_LIBRARY.split():
        for file in (root / f"{module}.py", *(root / module).rglob("*.py")):
            parts = file.relative_to(root).parts
            if file.is_file() and LEFT_OUT.isdisjoint(parts):
                found["/".join(parts)] = _read(file)
    if not found:
        raise CorpusError(
            f"this Python keeps no sources in {root}: name a text file or a folder"
        )
    found |= {f"topics/{name}": text.encode() for name, text in topics.items()}
    return {name: found[name] for name in sorted(found) if found[name].strip()}


def _documents(path: Path) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The documents at `path`, by name, and the names of files that are no text."""
    if path.is_file():
        content = _read(path)
        if not content.strip():
            raise CorpusError(f"{path} is empty: there is nothing to learn from")
        return {path.name: content}, ()
    if not path.is_dir():
        raise CorpusError(f"{path} does not exist: name a text file or a folder")
    found, skipped = {}, []
    for name, file in sorted(_visible_files(path)):
        try:
            content = _read(file)
        except CorpusError:
            skipped.append(name)
        else:
            if content.strip():
                found[name] = content
    if not found:
        raise CorpusError(f"the folder {path} has no text in it")
    return found, tuple(skipped)


def _visible_files(folder: Path) -> Iterator[tuple[str, Path]]:
    for file in folder.rglob("*"):
        name = file.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
        if file.is_file() and not hidden:
            yield name, file


def _read(file: Path) -> bytes:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CorpusError(f"{file} cannot be read: {error.strerror}") from error
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{file} is not UTF-8 text: byte {error.start} is "
            f"0x{content[error.start]:02x}. Convert it to UTF-8 first"
        ) from error
    if (zero := content.find(0)) >= 0:
        raise CorpusError(f"{file} is binary, not text: byte {zero} is 0")
    return content.replace(b"\r\n", b"\n")


# --- splitting --------------------------------------------------------------------


def _split_one(documents: dict[str, bytes], held_out: float) -> tuple[dict, dict]:
    """Cut the only document at a line's start, `held_out` of it from the end."""
    [(name, content)] = documents.items()
    cut = max(1, round(len(content) * (1 - held_out)))
    line_start = content.rfind(b"\n", 0, cut) + 1
    if line_start * 2 > cut:  # else the line is so long that it must be cut
        cut = line_start
    while cut < len(content) and content[cut] & 0xC0 == 0x80:
        cut += 1  # not inside a character
    head, tail = content[:cut], content[cut:]
    if not head.strip() or not tail.strip():
        raise CorpusError(
            f"{name} is too short to hold out {held_out:g} of it: it has "
            f"{len(content)} bytes"
        )
    return {name: head}, {f"{name} (end)": tail}


def _split_by_file(documents: dict[str, bytes], held_out: float) -> tuple[dict, dict]:
    """Send each family of near-duplicates to one side, by a hash of its first name."""
    families = sorted(_families(documents), key=lambda names: _fraction(names[0]))
    if len(families) < 2:
        raise CorpusError(
            f"nothing can be held out: the {len(documents)} files are near-duplicates "
            "of each other"
        )
    count = sum(_fraction(names[0]) < held_out for names in families)
    count = min(max(count, 1), len(families) - 1)  # with few files, one each side
    held_names = {name for names in families[:count] for name in names}
    train = {n: text for n, text in documents.items() if n not in held_names}
    return train, {n: documents[n] for n in documents if n in held_names}


def _fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, evenly spread."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]) / 2**48


def _families(documents: dict[str, bytes], alike: float = 0.5) -> list[list[str]]:
    """Group documents that share lines: `alike` of the shorter one's, or more.

    A document joins every family that it shares so much with, and so unites them. Lines
    of more than eight families (a licence) are passed over: they would cost a
    comparison of all with all and say little about descent.
    """
    members: dict[int, list[str]] = {}
    lines: dict[int, set[bytes]] = {}
    homes: dict[bytes, set[int]] = defaultdict(set)  # line -> families that have it
    for new, (name, content) in enumerate(documents.items()):
        members[new], lines[new] = [name], _telling_lines(content)
        shared = Counter(
            family
            for line in lines[new]
            if len(homes[line]) <= 8
            for family in homes[line]
        )
        size = len(lines[new])
        for family, count in shared.items():
            if count >= alike * min(size, len(lines[family])):
                members[new] += members.pop(family)
                lines[new] |= (merged := lines.pop(family))
                for line in merged:
                    homes[line].remove(family)
        for line in lines[new]:
            homes[line].add(new)
    return [sorted(names) for names in members.values()]


def _telling_lines(content: bytes) -> set[bytes]:
    """The distinct lines of 20 bytes or more, or all as one if every line is short.

    Blanks do not count: a copy that is indented otherwise is a copy.
    """
    lines = [b" ".join(line.split()) for line in content.splitlines()]
    return {line for line in lines if len(line) >= 20} or {b" ".join(lines)}


def _tokens(contents: Iterator[bytes]) -> np.ndarray:
    """Join documents, a boundary before, between and after them: uint16 (N,)."""
    boundary = np.array([BOUNDARY], np.uint16)
    pieces = [boundary]
    for content in contents:
        pieces += [np.frombuffer(content, np.uint8), boundary]
    tokens = np.concatenate(pieces, dtype=np.uint16)  # (N,)
    tokens.setflags(write=False)
    return tokens
