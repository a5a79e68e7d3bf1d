"""Calls of CUDA answers: in the simulator, in several orders of the threads.

With an NVIDIA card the kernel runs there as well. The simulator comes first: it says
what is wrong, where the card would give another number or hang.
"""

import copy
import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import numpy as np

from grader.complaint import Complaint
from grader.spec import Check, Launch, Limit

ORDERS = ("rising", "falling", 1)  # the last is the seed of an order by lot
FOUND = {
    "AlignmentError": "An address that a wide access cannot have",
    "BoundsError": "An index outside its array",
    "DivergenceError": "A barrier that not all threads reach",
    "RaceError": "A race between threads",
    "UninitialisedError": "Memory read before anything was written to it",
}
INPUT = (
    "It is an input, and other kernels still need it. Write to the results alone, and "
    "keep what you need in between in a variable or in shared memory."
)
UNITS = {
    "bytes": ("global", "bytes asked for"),
    "sectors": ("global", "sectors of 32 bytes moved"),
    "passes": ("shared", "passes over the banks of shared memory"),
    "conflicts": ("shared", "passes lost to bank conflicts"),
}


@lru_cache(maxsize=1)
def simulator() -> ModuleType:
    """The library's simulator, imported once."""
    from minidsv3.gpu import simulator

    return simulator


def caller(kernel: Callable) -> Callable:
    """`as_kernel` for this kernel, translated for the card if there is one.

    To be called while the library is within reach, which it is not in `as_kernel`.
    """
    simulator()
    return partial(as_kernel, there=for_the_card(kernel) if on_a_card() else None)


def as_kernel(
    kernel: Callable, check: Check, case: Launch, first: bool, there: Any = None
) -> object:
    """Launch on copies of the arrays; the outputs are full of NaN before."""
    results = []
    for order in ORDERS:
        given = prepared(case)
        try:
            stats = simulator().launch(
                kernel, case.grid, case.block, *given, order=order,
                dynamic_shared=case.dynamic_shared,
                count=bool(case.limits) and not results,
            )  # fmt: skip
        except simulator().SimulatorError as error:
            headline = FOUND.get(type(error).__name__, "In the kernel")
            where = error.block, error.thread, error.others, error.index
            return Complaint(headline, "", report=str(error), where=where)
        if said := changed(case, given):
            return said
        results.append(tuple(given[i] for i in case.outputs))
        if not results[1:]:
            counted = stats
        elif not all(map(same_bits, results[0], results[-1])):
            return Complaint(
                "The result depends on the order of the threads",
                "In another order of the threads the kernel gives other numbers. Sums "
                "of floats must be added up in an order that is always the same.",
                one_or_all(results[0]),
            )
    if said := beyond(case, counted, kernel):
        limit, report, number = said
        return Complaint(
            limit.headline, limit.why, one_or_all(results[0]), last=True,
            report=report, where=(number,),
        )  # fmt: skip
    if there is not None:
        return launched_there(there, case)
    return one_or_all(results[0])


def prepared(case: Launch) -> list:
    """Copies of the arguments; outputs hold NaN, or the lowest integer."""
    given = copy.deepcopy(list(case.args))
    for i in case.outputs:
        whole = given[i].dtype.kind in "iu"
        given[i].fill(np.iinfo(given[i].dtype).min if whole else np.nan)
    return given


def same_bits(one: np.ndarray, two: np.ndarray) -> bool:
    """Whether two results agree to the last digit, NaN with NaN."""
    return np.array_equal(one, two, equal_nan=one.dtype.kind == "f")


def changed(case: Launch, given: list) -> Complaint | None:
    """An input that the kernel wrote to."""
    for i, (now, before) in enumerate(zip(given, case.args, strict=True)):
        if i in case.outputs or not isinstance(before, np.ndarray):
            continue
        if not np.array_equal(now, before, equal_nan=before.dtype.kind == "f"):
            value = one_or_all(given[j] for j in case.outputs)
            return replace(Complaint.mutated(i + 1, value), advice=INPUT)
    return None


def beyond(case: Launch, stats: Any, kernel: Callable) -> tuple[Limit, str, int] | None:
    """The first limit that a launch broke, what was counted, and how many."""
    names = [*inspect.signature(getattr(kernel, "py_func", kernel)).parameters]
    for limit in case.limits:
        found = [
            access
            for access in stats.accesses
            if access.space == UNITS[limit.counted][0]
            and limit.kind in ("", access.kind)
            and (limit.array is None or access.array == names[limit.array])
        ]
        number = sum(getattr(access, limit.counted) for access in found)
        if number > limit.most:
            lines = [
                f"  {getattr(a, limit.counted)} in line {a.line}: {a.text}"
                for a in found
                if getattr(a, limit.counted)
            ]
            said = f"{number} {UNITS[limit.counted][1]}; {limit.most} will do."
            return limit, "\n".join([said, *lines]), number
    return None


# --- on a card ----------------------------------------------------------------------


@lru_cache(maxsize=1)
def on_a_card() -> bool:
    """Whether there is a card that our compiler can build kernels for."""
    from minidsv3.gpu import compile as compiler

    if not compiler.available():
        return False
    from numba import cuda

    return bool(cuda.is_available())


def for_the_card(kernel: Callable) -> Any:
    """The kernel for Numba, whether it speaks our ``cuda`` or Numba's own."""
    from numba import cuda

    from minidsv3.gpu.compile import for_numba

    return cuda.jit(for_numba(kernel))


def launched_there(kernel: Any, case: Launch) -> object:
    """The same launch on the card."""
    from numba import cuda

    try:
        given = [
            cuda.to_device(a) if isinstance(a, np.ndarray) else a
            for a in prepared(case)
        ]
        kernel[case.grid, case.block, 0, case.dynamic_shared](*given)
        return one_or_all(given[i].copy_to_host() for i in case.outputs)
    except Exception as error:  # it may be anything of Numba's or the driver's
        said = str(error).strip().splitlines() or [""]
        return Complaint(
            "It runs in the simulator, and not on the card",
            "Numba compiles less than Python can do: no lists, no strings, and shapes "
            "of shared and local arrays that are constants.",
            report=f"{type(error).__name__}: " + "\n".join(said[:6]),
        )


def one_or_all(arrays: Iterable[np.ndarray]) -> object:
    """What a function would return: the one array, or a tuple of several."""
    results = tuple(arrays)
    return results if len(results) > 1 else results[0]
