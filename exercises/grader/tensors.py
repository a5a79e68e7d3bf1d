"""Calls of PyTorch answers: float64 tensors in, arrays out, and gradcheck."""

from collections.abc import Callable

import numpy as np

from grader.complaint import Complaint
from grader.spec import Case, Check


def with_tensors(function: Callable, check: Check, case: Case, first: bool) -> object:
    """Call with float64 tensors; on the tiny first case, check the gradient too.

    The results come back as arrays, to be held against NumPy's. gradcheck nudges each
    number of each tensor and compares with what autograd says of the answer.
    """
    import torch

    given = [as_tensor(a) for a in case.args]
    kept = [t.clone() if isinstance(t, torch.Tensor) else t for t in given]
    value = as_arrays(check.call(function, *given))
    for number, (now, before) in enumerate(zip(given, kept, strict=True), start=1):
        if isinstance(before, torch.Tensor) and not same_tensor(now, before):
            return Complaint.mutated(number, value)
    if first and (said := gradient_fault(function, check, kept)):
        return Complaint(*said, value, last=True)
    return value


def as_tensor(value: object) -> object:
    """An array as a tensor of float64 or int64; anything else as it is."""
    import torch

    if isinstance(value, dict):
        return {key: as_tensor(v) for key, v in value.items()}
    return torch.tensor(value) if isinstance(value, np.ndarray) else value


def same_tensor(now: object, before: object) -> bool:
    """Whether an argument kept its numbers, NaN included."""
    import torch

    return now.shape == before.shape and torch.equal(
        now.detach().nan_to_num(), before.detach().nan_to_num()
    )


def as_arrays(value: object) -> object:
    """Tensors as arrays, inside tuples, lists and dictionaries too."""
    import torch

    if isinstance(value, torch.Tensor):
        array = value.detach()
        return array.float().numpy() if array.dtype == torch.bfloat16 else array.numpy()
    if isinstance(value, tuple | list):
        return tuple(as_arrays(v) for v in value)
    if isinstance(value, dict):
        return type(value)({key: as_arrays(v) for key, v in value.items()})
    return value


def gradient_fault(
    function: Callable, check: Check, args: list
) -> tuple[str, str] | None:
    """What is wrong with the answer's gradient, or None. No floats in, no gradient."""
    import torch

    leaves = [
        a.clone().requires_grad_()
        if isinstance(a, torch.Tensor) and a.is_floating_point()
        else a
        for a in args
    ]
    wanted = [a for a in leaves if isinstance(a, torch.Tensor) and a.requires_grad]
    if not wanted:
        return None

    def differentiable(*_: object) -> tuple:
        value = check.call(function, *leaves)
        results = value if isinstance(value, tuple | list) else (value,)
        tensors = [r for r in results if isinstance(r, torch.Tensor)]
        return tuple(r for r in tensors if r.is_floating_point())

    try:
        graphed = any(result.requires_grad for result in differentiable())
    except Exception as error:
        return (
            "The answer works only without gradients",
            f"Once its input wants a gradient, it ends in {type(error).__name__}: "
            f"{error} Stay with torch's own operations; they build the graph.",
        )
    if not graphed:
        return (
            "The result has left torch's graph",
            "No gradient can flow back through it. `.detach()`, `.item()`, `.numpy()`, "
            "`torch.tensor(...)` of a tensor and `torch.no_grad()` cut the graph.",
        )
    try:
        torch.autograd.gradcheck(differentiable, wanted, check_undefined_grad=False)
    except (RuntimeError, ValueError) as error:
        return (
            "The gradient is wrong though the result is right",
            "gradcheck nudged each number and saw another slope: "
            + str(error).strip().splitlines()[0][:200],
        )
    return None
