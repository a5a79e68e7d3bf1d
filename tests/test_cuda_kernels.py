"""The first kernels in the simulator: exact to the rounding, whoever goes first.

The judge is `numpy_ref` in float64, number by number; `kernel_cases` has the sizes and
the bounds. A kernel may be right by luck in one order of its threads, so there are
three (two where there is much to do), and the results must have the same bits.
"""

import numpy as np
import pytest

from minidsv3.primitives import fast_cuda_kernels, plain_cuda_kernels
from tests import kernel_cases, kernel_jobs
from tests.kernel_cases_of_elements import rope
from tests.kernel_jobs import BF16, F32, ORDERS, Job, assert_near, encoded, simulated
from tests.reduction_cases import SCOPE, reduction_cases

CASES = kernel_cases.all_cases() + reduction_cases()
ROOM = 24
"""Elements behind each array that a kernel is handed and may not touch, and a multiple
of 8, so that wide accesses reach them."""


def check(job: Job, scope: dict = SCOPE) -> None:
    """The right numbers, the same in all orders, and nothing else touched."""
    first = job.check(simulated(ORDERS[0]), scope)
    large = max(array.size for array in job.arrays.values()) > 1000 or (
        np.prod(job.block) > 200
    )
    for order in ORDERS[1 : 2 if large else 3]:
        other = job.check(simulated(order), scope, room=ROOM)
        for name, result in first.items():
            np.testing.assert_array_equal(other[name], result, f"{name}, {order}")


@pytest.mark.parametrize("job", CASES, ids=str)
def test_kernels_agree_with_numpy(job: Job) -> None:
    check(job)


@pytest.mark.parametrize("job", kernel_cases.of_v3(), ids=str)
def test_a_row_of_all_words_of_v3(job: Job) -> None:
    job.check(simulated("rising"))


def test_every_kernel_has_cases_of_both_dtypes() -> None:
    kernels = {
        name
        for module in (plain_cuda_kernels, fast_cuda_kernels)
        for name, value in vars(module).items()
        if name.endswith(("_plain", "_fast")) and value.__module__ == module.__name__
    }
    assert len(kernels) == 16
    for kernel in kernels:
        of_it = [job for job in CASES if job.kernel == kernel]
        kinds = {next(iter(job.arrays.values())).dtype for job in of_it}
        assert kinds == {np.dtype(np.float32), np.dtype(np.uint16)}, kernel


# --- the judge ----------------------------------------------------------------------


def test_the_judge_sees_one_bit_of_bfloat16() -> None:
    exact = np.array([1.0, 1.003, -2.49, 3e-39])
    right = encoded(exact, BF16)
    assert_near("y", right, exact, np.zeros(4))
    for i in range(4):
        for step in (1, -1):
            wrong = right.copy()
            wrong[i] = int(wrong[i]) + step
            with pytest.raises(AssertionError, match=rf"y\[{i}\] is .*1 of 4 are"):
                assert_near("y", wrong, exact, np.zeros(4))


def test_the_judge_sees_truncation_to_bfloat16() -> None:
    exact = np.array([1 + 0.75 / 128])
    truncated = (exact.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    with pytest.raises(AssertionError, match="1 of 1 are wrong"):
        assert_near("y", truncated, exact, np.zeros(1))


def test_the_judge_sees_what_is_no_number() -> None:
    for got, exact in ((np.nan, 1), (np.inf, 1), (1, np.nan), (np.inf, -np.inf)):
        with pytest.raises(AssertionError, match="1 of 1 are wrong"):
            assert_near("y", encoded([got], F32), np.array([exact]), np.ones(1))
    both = np.array([np.nan, np.inf, -np.inf])
    assert_near("y", encoded(both, F32), both, np.zeros(3))


@pytest.mark.parametrize("at", [-1, 8])
def test_the_judge_sees_a_write_beside_an_array(at: int) -> None:
    job = kernel_cases.add(8, BF16)

    def careless(kernel, grid, block, *args):
        simulated("rising")(kernel, grid, block, *args)
        args[2].base[kernel_jobs.GUARD + at] = 0

    with pytest.raises(AssertionError, match="total: written outside"):
        job.check(careless)


def test_the_judge_sees_a_change_of_what_is_only_read() -> None:
    job = kernel_cases.add(8)

    def careless(kernel, grid, block, *args):
        simulated("rising")(kernel, grid, block, *args)
        args[0][3] = 7

    with pytest.raises(AssertionError, match="x: 1 changed"):
        job.check(careless)


def test_the_judge_sees_a_change_of_the_part_that_does_not_turn() -> None:
    job = rope(1, 1, 1, 10, 6, dead=3)

    def careless(kernel, grid, block, *args):
        simulated("rising")(kernel, grid, block, *args)
        args[0][3] *= 1 + 2**-20

    with pytest.raises(AssertionError, match="x: 1 changed"):
        job.check(careless)
