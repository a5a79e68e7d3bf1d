"""A trunk and a module to draft with: tiny, with caches that must be kept honest.

What the trunk says next depends on every token that its cache holds. The module knows
what the trunk would say, and says it most of the time, as long as it has been fed every
settled pair once and in order; after that it talks nonsense, as a module would.
"""

from collections.abc import Callable, Sequence

import numpy as np

PRIME = 10007
ENOUGH = 100  # passes, for texts of some twenty tokens


def following(code: int, token: int) -> int:
    """The number that stands for a text, after one more token."""
    return (31 * code + token + 7) % PRIME


class Speaker:
    """Laws that follow from the number of a text; ``greedy`` ones are sure."""

    def __init__(self, V: int, seed: int, greedy: bool) -> None:
        self.V, self.seed, self.greedy = V, seed, greedy

    def law(self, code: int, other: int = 0) -> np.ndarray:
        """What comes after a text, (V,); ``other`` laws have nothing to do with it."""
        z = np.random.default_rng([self.seed, other, code]).normal(0, 1.5, self.V)
        if self.greedy:
            return np.eye(self.V)[z.argmax()]
        return np.exp(z) / np.exp(z).sum()

    def checked(self, tokens: Sequence[int]) -> list[int]:
        """The tokens as whole numbers. Raises ValueError if they are no row of ids."""
        row = np.asarray(tokens)
        if row.ndim != 1 or row.dtype.kind not in "iu" or not row.size:
            raise ValueError(f"expected a row of ids, got {tokens!r}")
        if row.min() < 0 or row.max() >= self.V:
            raise ValueError(f"there is no such id among 0 to {self.V - 1}: {tokens!r}")
        return row.tolist()


class Trunk(Speaker):
    """Counts its passes. A state is the text's number and its length."""

    def __init__(self, V: int, seed: int, greedy: bool = True) -> None:
        super().__init__(V, seed, greedy)
        self.codes = [1]  # one more than there are tokens
        self.passes = 0

    @property
    def length(self) -> int:
        """How many tokens the cache holds."""
        return len(self.codes) - 1

    def crop(self, length: int) -> None:
        """Forget what lies beyond a length. Raises ValueError."""
        if not 0 <= length <= self.length:
            raise ValueError(f"crop({length}) of a cache that holds {self.length}")
        del self.codes[length + 1 :]

    def __call__(self, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Read on: states (L, 2) and laws (L, V). Raises ValueError."""
        tokens = self.checked(tokens)
        if self.passes and len(tokens) > 2:
            raise ValueError(
                f"trunk(...) of {len(tokens)} tokens: after the prompt a pass reads "
                "two at the most; the cache has the rest"
            )
        if self.passes == ENOUGH:
            raise ValueError(f"trunk(...) asked {ENOUGH} times: does the loop end?")
        self.passes += 1
        start = len(self.codes)
        for token in tokens:
            self.codes.append(following(self.codes[-1], token))
        read = [(code, place) for place, code in enumerate(self.codes)][start:]
        laws = [self.law(code) for code, _ in read]
        return np.array(read, float), np.array(laws)


class Module(Speaker):
    """Right in about ``skill`` of ten places, if it is fed as it should be."""

    def __init__(self, V: int, seed: int, greedy: bool = True, skill: int = 6) -> None:
        super().__init__(V, seed, greedy)
        self.skill, self.honest = skill, True
        self.due: tuple[int, int] | None = None

    def __call__(self, states: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
        """Read pairs: laws (L, V). Raises ValueError."""
        tokens = self.checked(tokens)
        if len(states) != len(tokens):
            raise ValueError(
                f"module(...) of {len(states)} states and {len(tokens)} tokens: it "
                "reads pairs"
            )
        return np.array(
            [
                self.after(int(state[0]), int(state[1]), token)
                for state, token in zip(states, tokens, strict=True)
            ]
        )

    def after(self, code: int, place: int, token: int) -> np.ndarray:
        """The law behind one more pair."""
        fits = place == 1 if self.due is None else (code, place) == self.due
        self.honest = self.honest and fits
        code = following(code, token)
        self.due = code, place + 1
        if not self.honest:
            return self.law(code, other=2)
        if self.greedy:
            return self.law(code, other=code % 10 >= self.skill)
        return 0.6 * self.law(code) + 0.4 * self.law(code, other=1)


def drawing(level: float) -> Callable[[np.ndarray], int]:
    """Draw by one and the same number: the first token to bring the sum above it."""

    def draw(law: np.ndarray) -> int:
        law = np.asarray(law)
        if law.ndim != 1 or abs(law.sum() - 1) > 1e-4:
            raise ValueError(f"draw(...) takes one law, (V,), that sums to 1: {law}")
        return int(np.argmax(law.cumsum() > level))

    return draw


def chance_of(u: float) -> Callable[[], float]:
    """A uniform number that is always the same."""
    return lambda: u
