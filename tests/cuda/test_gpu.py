"""For whoever has an NVIDIA card: every arm of the benchmark computes the same there.

``make test-cuda`` runs them where torch finds one; then compute-sanitizer, as the page
Using this book says.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "book"))

import kernel_speed as speed  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA card here"),
]
WIDTHS = {  # rows, and rows of 16 bytes and odd ones
    "rope": [(5, 3, 64), (5, 3, 6)],
    "cross_entropy": [(7, 129_280), (7, 1_001), (1, 8)],
    "cross_entropy_backward": [(7, 129_280), (7, 1_001), (1, 8)],
}
CASES = [
    (kernel, shape, dtype)
    for kernel in speed.FORMULAS
    for shape in WIDTHS.get(kernel, [(600, 7_168), (3, 1_016), (3, 77), (1, 8)])
    for dtype in speed.SIZES
]


@pytest.mark.parametrize(("kernel", "shape", "dtype"), CASES)
def test_ours_agree_with_float64(kernel: str, shape: tuple, dtype: str) -> None:
    given = speed.inputs(kernel, shape, dtype, "cuda")
    arms = speed.calls(kernel, ("plain", "fast"))
    speed.refuse_wrong(kernel, dtype, speed.errors(kernel, arms, given))


@pytest.mark.parametrize("kernel", speed.FORMULAS)
def test_all_arms_of_the_benchmark_agree(kernel: str) -> None:
    pytest.importorskip("triton")
    shape = (8, *speed.DIMENSIONS[kernel][1:])
    given = speed.inputs(kernel, shape, "bfloat16", "cuda")
    found = speed.errors(kernel, speed.calls(kernel), given)
    speed.refuse_wrong(kernel, "bfloat16", found)


def test_a_kernel_is_captured_in_a_graph() -> None:
    given = speed.inputs("swiglu", (64, 512), "bfloat16", "cuda")
    call = speed.OURS["swiglu"]
    call(given)  # compiled and loaded before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (h,) = call(given)
    given["gate"].add_(1)
    graph.replay()
    (expected,) = speed.FORMULAS["swiglu"](given)
    torch.testing.assert_close(h, expected, rtol=2e-2, atol=1e-2)
