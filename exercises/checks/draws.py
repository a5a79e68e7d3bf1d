"""Numbers for the cases, the same in every run."""

import numpy as np


def rng(seed: int = 0) -> np.random.Generator:
    """A generator of its own for each seed."""
    return np.random.default_rng(seed)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Normal numbers of a shape."""
    return rng(seed).normal(0, scale, shape)


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    """Rows that sum to one, some entries zero, as attention has them."""
    e = np.exp(normal(*shape, seed=seed, scale=2.0))
    e[..., 1:] *= rng(seed + 1).random(e[..., 1:].shape) > 0.2
    return e / e.sum(axis=-1, keepdims=True)
