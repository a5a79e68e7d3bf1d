"""Independent judges of hand-written gradients: finite differences and autograd."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

AUTOGRAD = 1e-10  # relative, float64: both round in the last digits, no more
DIFFERENCES = 1e-6  # relative, float64: truncation of the central difference


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """‖ours − reference‖ / ‖reference‖; the plain norm where the reference is zero.

    A NaN on either side is infinitely wrong. Shapes must agree.
    """
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape, f"{ours.shape} is not {reference.shape}"
    error = np.linalg.norm((ours - reference).ravel())
    error /= np.linalg.norm(reference.ravel()) or 1.0
    return float(error) if np.isfinite(error) else float("inf")


def central_differences(
    f: Callable[[], float], x: np.ndarray, step: float = 1e-5
) -> np.ndarray:
    """Gradient of f() with respect to x, which is nudged in place, entry by entry."""
    gradient = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        kept = x[i]
        x[i] = kept + step
        above = f()
        x[i] = kept - step
        below = f()
        x[i] = kept
        gradient[i] = (above - below) / (2 * step)
    return gradient


def check_pair(
    forward: Callable,
    backward: Callable,
    arrays: Sequence[np.ndarray],
    oracle: Callable,
    differences: bool = True,
) -> None:
    """Hold a forward/backward pair against torch and against finite differences.

    Without the differences where another implementation has stood them already.

    forward(*arrays) -> (y, saved); backward(dy, saved) -> one gradient per array, in
    order; oracle(*tensors) -> y, written with torch's own operations.
    """
    y, saved = forward(*arrays)
    dy = np.random.default_rng(99).normal(size=np.shape(y))
    ours = backward(dy if dy.shape else float(dy), saved)
    ours = ours if isinstance(ours, tuple) else (ours,)
    assert len(ours) == len(arrays)

    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    y_oracle = oracle(*tensors)
    assert relative_error(y, y_oracle.detach().numpy()) <= 1e-12
    theirs = torch.autograd.grad(y_oracle, tensors, torch.tensor(dy))

    for i, array in enumerate(arrays):
        error = relative_error(ours[i], theirs[i].numpy())
        assert error <= AUTOGRAD, f"array {i}: {error:.1e} off autograd"
        if not differences:
            continue
        numeric = central_differences(lambda: np.sum(forward(*arrays)[0] * dy), array)
        error = relative_error(ours[i], numeric)
        # where the gradient nearly cancels, the difference quotient's own rounding
        # (1e-16 · |f| / step) is what is left
        floor = 1e-9 / max(np.linalg.norm(numeric), 1e-12)
        assert error <= max(DIFFERENCES, floor), f"array {i}: {error:.1e} off"
