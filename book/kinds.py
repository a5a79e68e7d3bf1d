"""What each byte of Python text is: keyword, name, number, docstring, white space, …

Python's own tokenizer says it, so nothing here knows the language.
"""

import io
import keyword
import tokenize

import numpy as np

from minidsv3.corpus import BOUNDARY

KINDS = ("white space", "name", "keyword", "operator", "number", "string",
         "docstring", "comment")  # fmt: skip
_OF_TYPE = {
    tokenize.NAME: "name",
    tokenize.OP: "operator",
    tokenize.NUMBER: "number",
    tokenize.STRING: "string",
    tokenize.COMMENT: "comment",
}
_LINE_STARTS = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
_SILENT = {tokenize.NL, tokenize.COMMENT}


def kinds(tokens: np.ndarray) -> np.ndarray:
    """The index in KINDS of each token of a text, (N,); -1 where it is no Python.

    A file cut off at either end of ``tokens``, prose, and boundaries between files get
    -1. A docstring is a string that is a statement of its own.
    """
    found = np.full(len(tokens), -1)
    ends = np.flatnonzero(tokens == BOUNDARY)
    for start, end in zip(ends[:-1] + 1, ends[1:], strict=True):
        document = bytes(tokens[start:end].astype(np.uint8))
        try:
            found[start:end] = _of_file(document)
        except (SyntaxError, tokenize.TokenError, UnicodeDecodeError):
            continue
    return found


def _of_file(document: bytes) -> np.ndarray:
    """The kinds of the bytes of one file. Raises as `tokenize` does."""
    found = np.full(len(document), KINDS.index("white space"))
    lines = document.splitlines(keepends=True)
    starts = np.cumsum([0, *map(len, lines)])

    def offset(row: int, column: int) -> int:
        """Bytes before a place that tokenize counts in lines and characters."""
        text = lines[row - 1].decode() if row <= len(lines) else ""
        return int(starts[row - 1]) + len(text[:column].encode())

    before = tokenize.ENCODING
    for token in tokenize.tokenize(io.BytesIO(document).readline):
        kind = _OF_TYPE.get(token.type)
        if kind == "name" and keyword.iskeyword(token.string):
            kind = "keyword"
        if kind == "string" and before in _LINE_STARTS:
            kind = "docstring"
        if kind:
            found[offset(*token.start) : offset(*token.end)] = KINDS.index(kind)
        if token.type not in _SILENT:
            before = token.type
    return found
