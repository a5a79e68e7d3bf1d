"""How long a learner waits: a warm check of each exercise, a fresh run of them all.

The bar of the design: under 50 ms a check with NumPy or PyTorch, 500 ms with CUDA,
under five seconds for a fresh `pytest exercises/`.
"""

import subprocess
import sys
import time

import pytest
from grader.cell import Answer
from grader.source import exercises, find
from grader.workers import judged

from tests.learner import ROOT


@pytest.mark.parametrize("id_", exercises())
def test_a_warm_check(id_: str) -> None:
    parts = {part: find(part).reference for part in find(id_).assembles}
    answer = Answer(id_, find(id_).reference, parts)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        assert judged(answer).state == "passed"
        times.append(time.perf_counter() - began)
    print(f"\n{id_:8} right answer {1e3 * min(times[1:]):5.0f} ms")


def test_a_fresh_run() -> None:
    began = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "exercises", "-q"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    print(f"\nfresh run of all exercises {time.perf_counter() - began:.1f} s")
