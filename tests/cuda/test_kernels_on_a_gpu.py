"""The first kernels on an NVIDIA card: the cases of the simulator, launched there.

The judge is the same, `numpy_ref` in float64, number by number, with what nobody may
touch around every array. Twice the same launch must give the same bits.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from minidsv3.gpu.launch import launch
from minidsv3.primitives import cuda_kernels as ops
from tests import kernel_cases
from tests.kernel_jobs import GUARD, Job, Run

needs_a_card = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no NVIDIA card here"
)


def launched(device: str, kernel: Callable, grid: Any, block: Any, *args: Any) -> None:
    """Run a kernel of a `Job` on a device: what lies around its arrays goes along."""
    wholes = [
        (a.base, torch.from_numpy(a.base.copy()).to(device)) for a in arrays(args)
    ]
    pieces = iter(wholes)
    given = [
        next(pieces)[1][GUARD : GUARD + arg.size] if is_array(arg) else arg
        for arg in args
    ]
    launch(kernel, grid, block, *given)
    for before, after in wholes:
        before[:] = after.cpu().numpy()


def is_array(arg: Any) -> bool:
    return isinstance(arg, np.ndarray) and arg.ndim > 0


def arrays(args: tuple) -> list[np.ndarray]:
    return [arg for arg in args if is_array(arg)]


on_the_card: Run = partial(launched, "cuda")


@pytest.mark.gpu
@needs_a_card
@pytest.mark.parametrize(
    "job", [*kernel_cases.all_cases(), *kernel_cases.of_v3()], ids=str
)
def test_kernels_agree_with_numpy_there(job: Job) -> None:
    first, again = job.check(on_the_card), job.check(on_the_card)
    for name, result in first.items():
        np.testing.assert_array_equal(again[name], result, name)


@pytest.mark.parametrize("job", kernel_cases.all_cases()[::40], ids=str)
def test_what_is_handed_to_a_card_is_handed_whole(job: Job) -> None:
    """The same way on the processor, where `launch` simulates: arrays and guards."""
    job.check(partial(launched, "cpu"))


def normed_in_a_thread(device: str) -> torch.Tensor:
    """RMSNorm by a host thread in which torch has done nothing yet."""
    x, g = torch.ones(4, 64, device=device), torch.ones(64, device=device)
    ops.rmsnorm(x, g, 1e-6)  # compiled and loaded here
    got: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: got.append(ops.rmsnorm(x, g, 1e-6)))
    thread.start()
    thread.join()
    return got[0]


@pytest.mark.gpu
@needs_a_card
def test_a_new_host_thread_finds_the_context() -> None:
    torch.testing.assert_close(normed_in_a_thread("cuda").cpu(), torch.ones(4, 64))


@pytest.mark.gpu
@needs_a_card
def test_a_gradient_is_computed_in_autograds_thread() -> None:
    x = torch.randn(8, 64, device="cuda", dtype=torch.float64)
    g = torch.randn(64, device="cuda", dtype=torch.float64)
    ours, theirs = (x.to(t).requires_grad_() for t in (torch.float32, torch.float64))
    ops.rmsnorm(ours, g.float(), 1e-6).square().sum().backward()
    normed = torch.nn.functional.rms_norm(theirs, (64,), g, 1e-6)
    normed.square().sum().backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)
