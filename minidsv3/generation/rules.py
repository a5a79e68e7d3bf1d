"""What the next token is, given logits: greedy, or drawn; and who survives as a draft.

Both rules have three parts: a ``law`` for logits (B, V), ``draw`` for tokens (B,) of a
law, and ``judge`` for drafts: which are kept, and what stands in their place.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from minidsv3.generation.numpy_ref import next_token_law
from minidsv3.mtp.numpy_ref import accept
from minidsv3.primitives.numpy_ref import draw

Array = np.ndarray


class Uniforms:
    """Random numbers of [0, 1), a stream for each text; `random` takes one of each."""

    def __init__(self, seed: int | Sequence[int] | None, B: int) -> None:
        one = seed is None or hasattr(seed, "__index__")
        try:
            roots = [_spawned(seed, b) for b in range(B)] if one else list(seed)
            self._streams = [np.random.default_rng(root) for root in roots]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"seed is {seed!r}: give whole numbers from 0 on"
            ) from error
        if len(roots) != B:
            raise ValueError(f"{len(roots)} seeds for {B} texts: give one a text")

    def select(self, texts: Array) -> None:
        """Go on with these texts alone."""
        self._streams = [self._streams[b] for b in texts]

    def random(self, shape: tuple[int, ...] | int) -> Array:
        """One number a text, in the shape asked for."""
        return np.array([s.random() for s in self._streams]).reshape(shape)


def _spawned(seed: int | None, b: int) -> Any:
    """The b-th stream of a seed, which no other seed has; the first is its own."""
    return np.random.SeedSequence(seed, spawn_key=(b,)) if b else seed


class Given:
    """The same, of numbers that were drawn before."""

    def __init__(self, numbers: Array) -> None:
        self._numbers = numbers

    def random(self, shape: tuple[int, ...] | int) -> Array:
        """Those numbers, in the shape asked for."""
        return self._numbers.reshape(shape)


class Greedy:
    """Temperature 0: the law is not needed, only the place of the largest logit."""

    def law(self, logits: Array) -> Array:
        """The logits themselves stand for it."""
        return logits

    def draw(self, law: Array, numbers: "Uniforms | Given") -> Array:
        """The largest, the first of equal ones."""
        return law.argmax(axis=-1)

    def judge(
        self, p: Array, q: Array, draft: Array, numbers: "Uniforms | Given"
    ) -> tuple[Array, Array]:
        """A draft is kept if it is what the trunk says."""
        token = p.argmax(axis=-1)
        return token == draft, token


class Sampled:
    """Temperature above 0. Draft and model are cut down alike, which keeps the most."""

    def __init__(self, temperature: float, top_p: float) -> None:
        self._sampling = (temperature, top_p)

    def law(self, logits: Array) -> Array:
        """With temperature and top-p: float64 (B, V)."""
        return next_token_law(logits, *self._sampling)

    draw = staticmethod(draw)
    judge = staticmethod(accept)
