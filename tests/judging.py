"""What the judges of the exercises' references share.

A judge draws shapes and values of its own, calls an answer, and holds it against
something that shares no line with it. Each chapter's are in `tests.judges`.
"""

from collections.abc import Callable

import numpy as np
import torch

from .oracles import central_differences, relative_error

FORWARD = 1e-12  # relative, float64: the same sums in another order
Rng = np.random.Generator


def sizes(rng: Rng, how_many: int, low: int = 1, high: int = 6) -> list[int]:
    return [int(n) for n in rng.integers(low, high, how_many)]


def leaf(array: np.ndarray) -> torch.Tensor:
    return torch.tensor(array, requires_grad=True)


def grads_of(y: torch.Tensor, dy: np.ndarray, *leaves: torch.Tensor) -> list:
    return [g.numpy() for g in torch.autograd.grad(y, leaves, torch.tensor(dy))]


def agree(ours: object, theirs: object, tolerance: float) -> None:
    """Hold one or several arrays against as many."""
    ours = ours if isinstance(ours, tuple) else (ours,)
    theirs = theirs if isinstance(theirs, tuple | list) else [theirs]
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        error = relative_error(one, other)
        # what cancels to nothing has no digits to agree in
        assert error <= tolerance or np.abs(one - other).max(initial=0) <= 1e-15, (
            f"result {number} is {error:.1e} off, allowed is {tolerance:.0e}"
        )


def differences(f: Callable[..., np.ndarray], dy: np.ndarray, *arrays) -> list:
    """Central differences of sum(f(*arrays) * dy) with respect to each array."""
    return [central_differences(lambda: np.sum(f(*arrays) * dy), x) for x in arrays]
