"""Reading prompts: side by side, a chunk at a time, into caches of one array a layer.

Shorter prompts are filled up behind. No token looks to the right, so the filling
changes nothing before it, and what it left in the caches is written over.
"""

from typing import Any, Protocol

import numpy as np

from minidsv3.primitives.cache import Cache

Array = np.ndarray
States = Any  # hidden states: an array, or a tensor that stays where it is


class Reader(Protocol):
    """A model that reads many tokens at once."""

    def read(self, ids: Array, caches: list[Cache]) -> States:
        """Hidden states after the final norm: ids (B, T) -> (B, T, D)."""
        ...

    def read_pairs(self, h: States, ids: Array, cache: Cache) -> None:
        """Leave pairs in the cache of module 1: h (B, T, D), ids (B, T)."""
        ...

    def logits(self, h: States) -> Array:
        """The head: h (..., D) -> (..., V)."""
        ...

    def stack(self, rows: list[States]) -> States:
        """States (D,) of B texts as one array (B, 1, D)."""
        ...


class PrefilledSession:
    """What sessions with one cache array for all texts have in common."""

    def __init__(
        self,
        reader: Reader,
        caches: list[Cache],
        module_cache: Cache | None,
        chunk: int,
    ) -> None:
        self.reader, self.chunk = reader, chunk
        self.caches, self.module_cache = caches, module_cache
        self.lengths: Array = np.array([], int)  # (B,) tokens read
        self.h: States = None  # hidden states of the last step, (B, T, D)

    def prefill(self, ids: Array, lengths: Array) -> Array:
        """Read ids (B, T), filled up behind: logits (B, V) after each text's last.

        Module 1 reads its pairs on the way: state i with token i + 1, as far as there
        is one. The pair of the last state waits for the first new token.
        """
        last: dict[int, States] = {}
        for start in range(0, ids.shape[1], self.chunk):
            part = ids[:, start : start + self.chunk]
            h = self.reader.read(part, self.caches)
            after = ids[:, start + 1 : start + 1 + part.shape[1]]
            if self.module_cache is not None and after.size:
                self.reader.read_pairs(h[:, : after.shape[1]], after, self.module_cache)
            for b, length in enumerate(lengths.tolist()):
                if start < length <= start + part.shape[1]:
                    last[b] = h[b, length - 1 - start] + 0  # a view would keep h
        self.h = self.reader.stack([last[b] for b in range(len(lengths))])
        self.lengths = lengths
        return self.reader.logits(self.h[:, 0])

    def select(self, texts: Array) -> None:
        """Go on with these texts alone."""
        self.lengths, self.h = self.lengths[texts], self.h[texts]
