"""The CUDA exercises as machine code: the simulator takes more than Numba compiles."""

import numpy as np
import pytest
from grader import spec
from grader.cell import reference_function
from grader.source import exercises, find

from minidsv3.gpu.compile import compiled

IDS = [id_ for id_, exercise in exercises().items() if exercise.kind == "cuda"]
RIGHT = [(id_, n) for id_ in IDS for n in range(len(spec.find(id_).right))]


def code_of(id_: str, text: str | None = None):
    """The machine code of an answer, for the arguments of its first case."""
    args = spec.find(id_).cases()[0].args
    words = [
        f"{a.dtype.str[1:]}[]" if isinstance(a, np.ndarray)
        else "i8" if isinstance(a, int) else a.dtype.str[1:]
        for a in args
    ]  # fmt: skip
    return compiled(reference_function(find(id_), text), " ".join(words))


@pytest.mark.parametrize("id_", IDS)
def test_a_reference_stays_in_registers_and_in_float32(id_):
    code = code_of(id_)
    assert (code.stack, code.spills, code.doubles) == (0, 0, 0)


@pytest.mark.parametrize(("id_", "number"), RIGHT)
def test_what_the_checks_call_right_compiles(id_, number):
    assert code_of(id_, spec.find(id_).right[number]).spills == 0
