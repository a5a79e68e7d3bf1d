"""How an answer is called: with NumPy arrays, with torch's tensors, as a kernel.

Each caller hands in copies and gives back the result. A `Complaint` in its place is a
fault that the result alone does not show: an input that was changed, a broken graph, a
race between threads.
"""

import copy
from collections.abc import Callable

import numpy as np

from grader import kernels, tensors
from grader.complaint import Complaint, TimeUp
from grader.spec import Case, Check

__all__ = ["Complaint", "TimeUp", "ready", "with_arrays"]


def with_arrays(function: Callable, check: Check, case: Case, first: bool) -> object:
    """Call on copies; afterwards the copies must still be what they were."""
    given, more = copy.deepcopy(case.args), copy.deepcopy(case.kwargs)
    value = kept(check.call(function, *given, **more))
    for number, (now, before) in enumerate(zip(given, case.args, strict=True), start=1):
        if not untouched(now, before):
            return Complaint.mutated(number, value)
    return value


def kept(value: object) -> object:
    """A result with arrays of its own, which no later call can change."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, tuple | list):
        items = [kept(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return type(value)({key: kept(item) for key, item in value.items()})
    return value


def untouched(now: object, before: object) -> bool:
    """Whether an argument, or a dictionary of them, is what it was."""
    if isinstance(before, dict):
        return now.keys() == before.keys() and all(
            untouched(now[key], before[key]) for key in before
        )
    if isinstance(before, np.ndarray):
        return now.shape == before.shape and np.array_equal(
            now, before, equal_nan=before.dtype.kind in "fc"
        )
    return True


def ready(kind: str, function: Callable) -> Callable:
    """The caller for one kind of exercise, with what it needs imported.

    The library is within reach here, and no longer when the answer runs.
    """
    if kind == "cuda":
        return kernels.caller(function)
    return tensors.with_tensors if kind == "torch" else with_arrays
