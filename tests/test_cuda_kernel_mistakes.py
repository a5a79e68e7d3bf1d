"""Mistakes planted in the first kernels: the simulator or the comparison sees each.

A row names the mistake, the module and the function with the lines that make it, the
kernel whose cases then run, and what they end in: an error of the simulator, or
AssertionError where the numbers are wrong, or somebody else's changed. The cases are
those of `test_cuda_kernels`, which pass on the right kernels, in one order only: what
the simulator says does not depend on luck.
"""

from collections import defaultdict
from types import FunctionType

import pytest

from minidsv3.gpu import reductions as R
from tests.kernel_cases import all_cases
from tests.kernel_jobs import KERNELS, Job, simulated
from tests.kernel_mistakes import ROWS, M
from tests.kernel_mistakes_of_elements import ELEMENTS
from tests.planting import changed_in
from tests.reduction_cases import REDUCTIONS, SCOPE, reduction_cases

CASES = defaultdict(list)
for job in all_cases() + reduction_cases():
    CASES[job.kernel].append(job)

MISTAKES = [
    pytest.param(*row[:4], row[4:], id=f"{row[1]}: {name}")
    for group in ROWS + ELEMENTS
    for name, row in group.items()
]


@pytest.mark.parametrize(("module", "function", "kernel", "error", "lines"), MISTAKES)
def test_mistakes_are_seen(module, function, kernel, error, lines) -> None:
    wrong = changed_in(module, function, *lines)
    wrong["R"] = R  # for lines that call one of the warp's reductions
    kernels = {
        name: FunctionType(k.__code__, {**k.__globals__, **wrong}, name)
        for name, k in REDUCTIONS.items()
    }
    scope = {**KERNELS, **wrong, **kernels}
    with pytest.raises(error):
        run_all(CASES[kernel], scope)


def run_all(cases: list[Job], scope: dict) -> None:
    for case in cases:
        case.check(simulated("rising"), scope)


def test_every_kernel_and_reduction_has_mistakes() -> None:
    changed_ones = {row.values[1] for row in MISTAKES}
    functions = {job.kernel for job in all_cases()}
    reductions = {"tree_sum", "tree_max", "warp_sum", "warp_max"}
    reductions |= {"block_sum", "block_max"}
    assert changed_ones == functions | reductions | {"sigmoid", "flat_index", M}
    assert SCOPE.keys() >= functions
