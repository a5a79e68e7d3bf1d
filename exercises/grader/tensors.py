"""Calls of PyTorch answers: tensors in, arrays out, their gradients, and gradcheck."""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy

import numpy as np

from grader.compare import WithGradients, as_tuple
from grader.complaint import Complaint
from grader.spec import Case, Check

NOTE = (
    "The gradients are those that autograd finds if cos(1), cos(2), ... arrive at a\n"
    "result, row by row."
)


def arriving(shape: tuple[int, ...]) -> np.ndarray:
    """The gradient that arrives at a result of a shape: no two numbers alike."""
    return np.cos(np.arange(1.0, np.prod(shape, dtype=int) + 1)).reshape(shape)


def with_tensors(function: Callable, check: Check, case: Case, first: bool) -> object:
    """Call with tensors of the arrays' kind; then see what autograd makes of it.

    The results come back as arrays, to be held against NumPy's, and so do the gradients
    that the check names. On the tiny first case gradcheck nudges each number of each
    tensor and compares with what autograd says of the answer.
    """
    given = [as_tensor(a) for a in case.args]
    kept = [as_tensor(a) for a in case.args]
    value = as_arrays(check.call(function, *given))
    for number, (now, before) in enumerate(zip(given, kept, strict=True), start=1):
        if not same_tensors(now, before):
            return Complaint.mutated(number, value)
    named = as_tuple(value, check.returns)
    if named is None or not case.graph:
        return value
    if check.gradients:
        found = gradients(function, check, kept)
        if isinstance(found, tuple):
            return Complaint(*found, value, last=True)
        results = dict(zip(check.returns, named, strict=True))
        value = WithGradients(results | found)
    if first and (said := gradient_fault(function, check, kept)):
        return Complaint(*said, value, last=True)
    return value


def as_tensor(value: object) -> object:
    """An array as a tensor of its own, its axes in memory as they were.

    Anything else is copied.
    """
    import torch

    if isinstance(value, dict):
        return {key: as_tensor(v) for key, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(as_tensor(v) for v in value)
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value, order="K"))
    return value if callable(value) else deepcopy(value)


def same_tensors(now: object, before: object) -> bool:
    """Whether an argument, or whatever holds some, kept its numbers, NaN included."""
    import torch

    if isinstance(before, dict):
        return now.keys() == before.keys() and all(
            same_tensors(now[key], before[key]) for key in before
        )
    if isinstance(before, tuple | list):
        return len(now) == len(before) and all(map(same_tensors, now, before))
    if isinstance(before, torch.Tensor):
        return now.shape == before.shape and torch.equal(
            now.detach().nan_to_num(), before.detach().nan_to_num()
        )
    return True


def as_arrays(value: object) -> object:
    """Tensors as arrays, inside tuples, lists and dictionaries too."""
    import torch

    if isinstance(value, torch.Tensor):
        array = value.detach()
        array = array.float() if array.dtype == torch.bfloat16 else array
        return array.numpy().copy()
    if isinstance(value, tuple | list):
        return tuple(as_arrays(v) for v in value)
    if isinstance(value, dict):
        return type(value)({key: as_arrays(v) for key, v in value.items()})
    return value


# --- gradients --------------------------------------------------------------------


def leaves_of(check: Check, args: list) -> tuple[list, dict]:
    """The arguments with gradients wanted, and the tensors that want them, by name.

    They are those that the check names, or all that hold floats.
    """
    import torch

    def leaf(value: object, wanted: bool) -> object:
        return value.clone().requires_grad_() if wanted else value

    if not check.gradients:
        new = [
            leaf(a, isinstance(a, torch.Tensor) and a.is_floating_point()) for a in args
        ]
        named = {str(n): a for n, a in enumerate(new) if _wants(a)}
        return new, named
    new, named = [dict(a) if isinstance(a, dict) else a for a in args], {}
    for name, place in check.gradients.items():
        number, key = place if isinstance(place, tuple) else (place, None)
        holder, at = (new, number) if key is None else (new[number], key)
        named[name] = holder[at] = leaf(holder[at], wanted=True)
    return new, named


def _wants(value: object) -> bool:
    return getattr(value, "requires_grad", False) is True


def floats(value: object) -> Iterator:
    """The floating-point tensors of a result, in order."""
    import torch

    if isinstance(value, Mapping):
        value = tuple(value.values())
    for one in value if isinstance(value, tuple | list) else (value,):
        if isinstance(one, torch.Tensor) and one.is_floating_point():
            yield one


def gradients(
    function: Callable, check: Check, args: list
) -> dict[str, np.ndarray] | tuple[str, str]:
    """What autograd finds for each tensor that the check names, or what went wrong."""
    import torch

    new, leaves = leaves_of(check, args)
    try:
        results = [r for r in floats(check.call(function, *new)) if r.requires_grad]
        if not results:
            return CUT
        sent = [torch.from_numpy(arriving(tuple(r.shape))).to(r) for r in results]
        found = torch.autograd.grad(
            results, [*leaves.values()], sent, allow_unused=True, materialize_grads=True
        )
    except Exception as error:
        return _only_without(error)
    return {n: as_arrays(g) for n, g in zip(leaves, found, strict=True)}


CUT = (
    "The result has left torch's graph",
    "No gradient can flow back through it. `.detach()`, `.item()`, `.numpy()`, "
    "`torch.tensor(...)` of a tensor and `torch.no_grad()` cut the graph.",
)


def _only_without(error: Exception) -> tuple[str, str]:
    said = str(error).strip().splitlines() or [""]
    return (
        "The answer works only without gradients",
        f"Once its input wants a gradient, it ends in {type(error).__name__}: "
        f"{said[0]} Stay with torch's own operations; they build the graph.",
    )


def gradient_fault(
    function: Callable, check: Check, args: list
) -> tuple[str, str] | None:
    """What is wrong with the answer's gradient, or None. No floats in, no gradient."""
    import torch

    new, leaves = leaves_of(check, args)
    if check.gradients:  # all have been compared: no dictionaries of weights again
        places = check.gradients
        leaves = {n: x for n, x in leaves.items() if isinstance(places[n], int)}
    if not leaves:
        return None

    def differentiable(*_: object) -> tuple:
        return tuple(floats(check.call(function, *new)))

    try:
        graphed = any(result.requires_grad for result in differentiable())
    except Exception as error:
        return _only_without(error)
    if not graphed:
        return CUT
    try:
        torch.autograd.gradcheck(
            differentiable,
            tuple(leaves.values()),
            check_undefined_grad=False,
            fast_mode=bool(check.gradients),
        )
    except (RuntimeError, ValueError) as error:
        return (
            "The gradient is wrong though the result is right",
            "gradcheck nudged each number and saw another slope: "
            + str(error).strip().splitlines()[0][:200],
        )
    return None
