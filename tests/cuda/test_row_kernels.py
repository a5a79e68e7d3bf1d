"""The widest rows that the fast kernels take can be launched: their registers suffice.

A block whose threads ask for more registers than a multiprocessor has is refused by the
driver, and no test on a processor would know.
"""

import pytest

from minidsv3.gpu.compile import ARCHITECTURES, compiled
from minidsv3.gpu.roofline import H200, occupancy
from minidsv3.primitives import fast_cuda_kernels as fast
from minidsv3.primitives.cuda_kernels import (
    MOST_KEPT,
    MOST_KEPT_BACKWARD,
    MOST_ROW_THREADS,
    row_plan,
)

REGISTERS = 65_536
"""Of a multiprocessor, and of a block at most, on 8.x and 9.0 (CUDA C++ Programming
Guide)."""
PER = {"f4": 4, "u2": 8}
NORMS = {
    "rmsnorm_fast": (MOST_KEPT, "{x} {g} {x} f4[] u4 f4 f4"),
    "add_rmsnorm_fast": (MOST_KEPT, "{x} {x} {g} {x} {x} f4[] u4 f4 f4"),
    "rmsnorm_backward_fast": (
        MOST_KEPT_BACKWARD,
        "{x} {x} {g} f4[] {x} f4[] u4 u4 f4",
    ),
}
KINDS = [("f4", "f4"), ("u2", "u2"), ("u2", "f4"), ("f4", "u2")]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("x", "g"), KINDS)
@pytest.mark.parametrize("name", NORMS)
def test_a_block_for_the_widest_row_can_be_launched(name, x, g, architecture) -> None:
    kept, signature = NORMS[name]
    per = PER[x]
    widest = MOST_ROW_THREADS * kept
    threads, vectors = row_plan(widest, per, kept)
    assert threads == MOST_ROW_THREADS and row_plan(widest + per, per, kept) is None
    kernel = getattr(fast, name)(vectors, per)
    code = compiled(kernel, signature.format(x=f"{x}[]", g=f"{g}[]"), architecture)
    given_out = -(-code.registers // 8) * 8  # the hardware gives them out by eights
    assert given_out * threads <= REGISTERS, f"{code.registers} registers"
    assert occupancy(H200, code.registers, threads, code.shared).blocks >= 1
    assert (code.stack, code.spills) == (0, 0)
