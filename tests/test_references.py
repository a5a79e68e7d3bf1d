"""The references of the exercises against judges that share no line with them.

Everything is judged against these references, so nothing else may judge them but torch
(forwards in its own words, backwards by autograd, its optimiser), central differences
of a naive forward pass, naive loops, NumPy in float64 for the kernels, and the library
where it is not itself the reference. Shapes are drawn anew; none is a case of a check.
Each judge must also refuse every wrong answer that the checks list: that is how we know
that it looks.
"""

from collections.abc import Callable

import numpy as np
import pytest
from grader import spec
from grader.cell import reference_function
from grader.source import exercises, find

from minidsv3.gpu.simulator import SimulatorError

from .judges import gen, gpu, lm, measure, mini, mla, moe, mtp, torch_port

CHAPTERS = lm, mtp, moe, mla, mini, torch_port, gen, gpu, measure
JUDGES = {id_: judge for chapter in CHAPTERS for id_, judge in chapter.JUDGES.items()}
SEEDS = range(4)
# Torch says so itself, and so do the simulator and Python's math in a kernel.
REFUSED = AssertionError, ValueError, RuntimeError, SimulatorError, ArithmeticError
WRONG = [(id_, wrong) for id_ in JUDGES for wrong in spec.find(id_).wrong]


def test_every_reference_has_a_judge():
    assert list(exercises()) == list(JUDGES)


def hold(id_: str, function: Callable, seed: int) -> None:
    JUDGES[id_](function, np.random.default_rng([seed, *id_.encode()]))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("id_", JUDGES)
def test_reference(id_, seed):
    hold(id_, reference_function(find(id_)), seed)


@pytest.mark.parametrize(("id_", "wrong"), WRONG, ids=lambda x: getattr(x, "name", x))
def test_the_judge_refuses(id_, wrong):
    exercise = find(id_)
    function = reference_function(exercise, wrong.patched(exercise.reference))
    with np.errstate(all="ignore"), pytest.raises(REFUSED):
        any(hold(id_, function, seed) for seed in SEEDS)
