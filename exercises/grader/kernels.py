"""Calls of CUDA answers: in the simulator, in rising and in falling thread order.

With an NVIDIA card the kernel runs there as well. The simulator comes first: it says
what is wrong, where the card would give another number or hang.
"""

import copy
from collections.abc import Callable, Iterable
from functools import lru_cache
from types import ModuleType

import numpy as np

from grader.complaint import Complaint
from grader.spec import Check, Launch

ORDERS = ("rising", "falling")
FOUND = {
    "RaceError": "A race between threads",
    "BoundsError": "An index outside its array",
    "DivergenceError": "A barrier that not all threads reach",
    "UninitialisedError": "Memory read before anything was written to it",
}


@lru_cache(maxsize=1)
def simulator() -> ModuleType:
    """The library's simulator, imported once."""
    from minidsv3.gpu import simulator

    return simulator


def as_kernel(kernel: Callable, check: Check, case: Launch, first: bool) -> object:
    """Launch on copies of the arrays; the outputs are full of NaN before."""
    results = []
    for order in ORDERS:
        given = prepared(case)
        try:
            simulator().launch(
                kernel, case.grid, case.block, *given, order=order,
                dynamic_shared=case.dynamic_shared,
            )  # fmt: skip
        except simulator().SimulatorError as error:
            return Complaint(
                FOUND.get(type(error).__name__, "In the kernel"), str(error)
            )
        if said := changed(case, given):
            return said
        results.append(tuple(given[i] for i in case.outputs))
    first_order, second = results
    if not all(map(np.array_equal, first_order, second, [True] * len(second))):
        return Complaint(
            "The result depends on the order of the threads",
            "In falling order the kernel gives other numbers than in rising order.",
            first_order,
        )
    if on_a_card():
        return launched_there(kernel, case)
    return one_or_all(first_order)


def prepared(case: Launch) -> list:
    """Copies of the arguments; outputs hold NaN, or the lowest integer."""
    given = copy.deepcopy(list(case.args))
    for i in case.outputs:
        whole = given[i].dtype.kind in "iu"
        given[i].fill(np.iinfo(given[i].dtype).min if whole else np.nan)
    return given


def changed(case: Launch, given: list) -> Complaint | None:
    """An input that the kernel wrote to."""
    for i, (now, before) in enumerate(zip(given, case.args, strict=True)):
        if i in case.outputs or not isinstance(before, np.ndarray):
            continue
        if not np.array_equal(now, before, equal_nan=before.dtype.kind == "f"):
            return Complaint.mutated(i + 1, one_or_all(given[j] for j in case.outputs))
    return None


def on_a_card() -> bool:
    """Whether there is a card that Numba can use."""
    try:
        from numba import cuda
    except ImportError:
        return False
    return bool(cuda.is_available())


def launched_there(kernel: Callable, case: Launch) -> object:
    """The same launch on the card."""
    from numba import cuda

    given = [
        cuda.to_device(a) if isinstance(a, np.ndarray) else a for a in prepared(case)
    ]
    compiled = kernel if hasattr(kernel, "py_func") else cuda.jit(kernel)
    compiled[case.grid, case.block, 0, case.dynamic_shared](*given)
    return one_or_all(given[i].copy_to_host() for i in case.outputs)


def one_or_all(arrays: Iterable[np.ndarray]) -> object:
    """What a function would return: the one array, or a tuple of several."""
    results = tuple(arrays)
    return results if len(results) > 1 else results[0]
