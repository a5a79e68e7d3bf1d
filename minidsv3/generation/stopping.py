"""Where a text ends: at an id, or at a string, which tokens may bring in pieces."""

import operator
from collections.abc import Sequence

from minidsv3.config import Config
from minidsv3.tokenizer import ByteTokenizer, Tokenizer


class StopStrings:
    """Watches the bytes of one text for the first stop string.

    The first is the one complete first, so that it does not matter how tokens cut the
    text; of two that end together, the longer. `feed` answers what may be shown: never
    a byte of that string or behind it, and nothing is held back longer than it may
    still become one. Raises ValueError for an empty stop string: it would be found
    everywhere.
    """

    def __init__(self, strings: Sequence[str | bytes]) -> None:
        self._strings = [s.encode() if isinstance(s, str) else s for s in strings]
        if b"" in self._strings:
            raise ValueError("a stop string is empty: it would end every text at once")
        self._held = b""
        self.stopped = False

    def feed(self, piece: bytes) -> bytes:
        """Take the bytes of one token; return those that may be shown now."""
        if self.stopped:
            return b""
        text = self._held + piece
        places = [(text.find(s), s) for s in self._strings]
        found = [(at + len(s), at) for at, s in places if at >= 0]  # end, start
        if found:
            self.stopped, self._held = True, b""
            return text[: min(found)[1]]
        keep = max((_overlap(text, s) for s in self._strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> bytes:
        """What was held back, when no more tokens come."""
        held, self._held = self._held, b""
        return held


def _overlap(text: bytes, string: bytes) -> int:
    """Length of the longest end of text that begins string, and is not all of it."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)


def endings(
    stop: Sequence[str | bytes | int],
    tokenizer: Tokenizer | None,
    config: Config,
    B: int,
) -> list["Ending"]:
    """One `Ending` a text. Strings need a tokenizer, by default that of bytes.

    Raises ValueError for a stop that is no list, an entry that is neither a string nor
    an id of the vocabulary, an empty string, and strings for a model that does not read
    bytes where no tokenizer is given.
    """
    if not isinstance(stop, list | tuple | set):
        raise ValueError(f"stop is {stop!r}: give a list, [{stop!r}] for instance")
    strings = [s for s in stop if isinstance(s, str | bytes)]
    ids = {_id(s, config) for s in stop if not isinstance(s, str | bytes)}
    if strings and tokenizer is None:
        if config.vocab_size != ByteTokenizer.size:
            raise ValueError(
                f"stop holds strings, and the model's {config.vocab_size} ids are no "
                "bytes: give its tokenizer, load_tokenizer(folder)"
            )
        tokenizer = ByteTokenizer()
    return [Ending(ids, strings, tokenizer) for _ in range(B)]


def _id(entry: object, config: Config) -> int:
    """A stop that is no string as an id."""
    if isinstance(entry, bool) or not hasattr(entry, "__index__"):
        raise ValueError(f"stop holds {entry!r}: give strings and ids")
    if not 0 <= (one := operator.index(entry)) < config.vocab_size:
        raise ValueError(
            f"stop holds the id {one}, outside the vocabulary 0…{config.vocab_size - 1}"
        )
    return one


class Ending:
    """Decides for one text, token by token, whether it ends here."""

    def __init__(self, ids: set, strings: list, tokenizer: Tokenizer | None) -> None:
        self._ids, self._tokenizer = ids, tokenizer
        self._strings = StopStrings(strings) if strings else None

    def after(self, token: int) -> bool:
        """Whether this token is the last of its text."""
        if self._strings is not None:
            self._strings.feed(self._tokenizer.decode([token]))
            if self._strings.stopped:
                return True
        return token in self._ids
