"""Text to ids and back: bytes, or the ``tokenizer.json`` that lies beside the weights.

Without such a file a model reads bytes, as `minidsv3.corpus` makes them. With one, the
library ``tokenizers`` reads it. Either way ids become bytes, not text: a token may end
in the middle of a character, and the next one may bring the rest.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from minidsv3 import corpus

FILE = "tokenizer.json"
SETTINGS = "tokenizer_config.json"


class TokenizerError(ValueError):
    """A tokenizer that is broken, or does not belong to its model."""


class Tokenizer(Protocol):
    """What generation needs of a tokenizer."""

    size: int  # rows that the embedding must have: the largest id, and one
    start: int | None  # the id that begins a document, if there is one

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text: int64 (N,). Raises UnicodeEncodeError for half a surrogate."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of ids (N,); ids that only mark something have none."""
        ...


class ByteTokenizer:
    """A byte is an id, and 256 marks the boundary of documents."""

    size = corpus.VOCAB_SIZE
    start: int | None = corpus.BOUNDARY

    def encode(self, text: str) -> np.ndarray:
        """The UTF-8 bytes of a text: int64 (N,)."""
        return corpus.encode(text).astype(np.int64)

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Ids (N,) as bytes; a boundary has none."""
        return bytes(i for i in np.asarray(ids).tolist() if i < corpus.BOUNDARY)


class FileTokenizer:
    """A byte-level BPE, as DeepSeek's, from a ``tokenizer.json``.

    ``tokenizer_config.json`` beside it may name the token that begins a document, and
    say whether every text gets it. Raises TokenizerError for a file that the library
    cannot read, or whose tokens are not made of bytes.
    """

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as FromFile

        try:
            self._inner = FromFile.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(f"{path} is no readable tokenizer: {error}") from error
        if "ByteLevel" not in str(json.loads(self._inner.to_str())["decoder"]):
            raise TokenizerError(
                f"{path}: its tokens are not made of bytes (decoder ByteLevel); only "
                "byte-level tokenizers, as DeepSeek's, are read"
            )
        words = self._inner.get_vocab(with_added_tokens=True)
        self.size = max(words.values(), default=-1) + 1
        added = self._inner.get_added_tokens_decoder()
        self._bytes = {
            i: _bytes_of(word) for word, i in words.items() if i not in added
        }
        for i, token in added.items():
            self._bytes[i] = b"" if token.special else token.content.encode()
        self.start, self._always = _start(path.with_name(SETTINGS), words)

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text: int64 (N,), with the start in front if the settings say so."""
        text.encode()  # half a surrogate: the library raises a TypeError
        ids = self._inner.encode(text).ids
        if self._always and ids[:1] != [self.start]:
            ids = [self.start, *ids]
        return np.array(ids, np.int64)

    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Ids (N,) as bytes; special tokens, and ids without a token, have none."""
        return b"".join(self._bytes.get(i, b"") for i in np.asarray(ids).tolist())


def load_tokenizer(
    folder: str | Path | None, vocab_size: int | None = None
) -> Tokenizer:
    """The tokenizer that lies in ``folder``; without one (or None) that of bytes.

    Raises TokenizerError for a broken file, and for a tokenizer with more ids than the
    ``vocab_size`` rows of the model.
    """
    path = None if folder is None else Path(folder) / FILE
    here = path is not None and path.is_file()
    tokenizer = FileTokenizer(path) if here else ByteTokenizer()
    if vocab_size is not None and tokenizer.size > vocab_size:
        what = (
            str(path) if here else f"{folder} holds no {FILE}, and its model of bytes"
        )
        raise TokenizerError(
            f"{what} needs {tokenizer.size} rows of the embedding, but vocab_size is "
            f"{vocab_size}; put the {FILE} of the model's own download beside it"
        )
    return tokenizer


def translated(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of `minidsv3.corpus` (N,) in another tokenizer's ids: int64 (M,).

    Each document is encoded by itself; its boundary becomes the token that begins one,
    or nothing.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return tokens
    begin = [] if tokenizer.start is None else [tokenizer.start]
    ids: list[int] = []
    for piece in np.split(tokens, np.flatnonzero(tokens == corpus.BOUNDARY)):
        if piece.size == 0:
            continue  # before the first boundary
        new = tokenizer.encode(corpus.decode(piece)).tolist()
        begins = piece[0] == corpus.BOUNDARY and new[:1] != begin
        ids += begin + new if begins else new
    return np.array(ids, np.int64)


def _start(path: Path, words: dict[str, int]) -> tuple[int | None, bool]:
    """The id that begins a document, if any, and whether every text gets it."""
    if not path.is_file():
        return None, False
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        token = settings.get("bos_token")
    except (OSError, ValueError, AttributeError) as error:
        raise TokenizerError(f"{path} cannot be read as JSON: {error!r}") from error
    if isinstance(token, dict):  # written out with its flags, as in DeepSeek's file
        token = token.get("content")
    start = words.get(token)
    return start, start is not None and settings.get("add_bos_token") is True


def _alphabet() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes with (GPT-2's table).

    A byte that prints is itself; the others follow in order from U+0100 on.
    """
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in prints]
    table = {chr(b): b for b in prints}
    return table | {chr(0x100 + n): b for n, b in enumerate(others)}


ALPHABET = _alphabet()


def _bytes_of(word: str) -> bytes:
    """The bytes of a token; one with other letters was added, and is text."""
    if all(letter in ALPHABET for letter in word):
        return bytes(ALPHABET[letter] for letter in word)
    return word.encode()
