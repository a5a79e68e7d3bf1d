"""PyTorch and CUDA answers: small exercises of each kind, judged like all others."""

import pytest

from tests.learner import Desk

SOURCE = '''\
# %% [markdown]
# # Toys
# %%
import torch
from minidsv3.gpu.simulator import cuda
from grader import check
# %% [markdown]
# ## toy.torch.1 · A gate
# Write silu.
# %%
# exercise: toy.torch.1
def silu(x):
    """x (N,) -> (N,)."""
    ### BEGIN SOLUTION
    return x * torch.sigmoid(x)
    ### END SOLUTION
# %% [markdown]
# ## toy.cuda.1 · A sum by one block
# Add up x in shared memory.
# %%
# exercise: toy.cuda.1
def block_sum(x, out):
    """out[0] = sum of x (64,), by one block of 64 threads."""
    ### BEGIN SOLUTION
    t = cuda.threadIdx.x
    shared = cuda.shared.array(64, "float32")
    shared[t] = x[t]
    cuda.syncthreads()
    width = 32
    while width > 0:
        if t < width:
            shared[t] += shared[t + width]
        cuda.syncthreads()
        width //= 2
    if t == 0:
        out[0] = shared[0]
    ### END SOLUTION
'''
CHECKS = """\
import numpy as np
from grader.spec import Case, Check, Launch, Wrong
from minidsv3.primitives.numpy_ref import silu_forward
x = np.random.default_rng(0).normal(size=64).astype(np.float32)
CHECKS = [
    Check(
        "toy.torch.1", ("y",),
        cases=lambda: [
            Case("three numbers", (np.array([0.5, -1.0, 2.0]),)),
            Case("far out", (np.array([-900.0, 900.0, 0.0]),)),
        ],
        oracle=lambda a: silu_forward(a)[0],
        hints=("a product", "torch.sigmoid", "x * torch.sigmoid(x)"),
        wrong=(Wrong("relu", "x * torch.sigmoid(x)", "torch.relu(x)", "Smooth."),),
        right=(),
    ),
    Check(
        "toy.cuda.1", ("out",),
        cases=lambda: [
            Launch("64 numbers", (x, np.zeros(1, np.float32)), 1, 64, (1,)),
            Launch("64 others", (x - 3, np.zeros(1, np.float32)), 1, 64, (1,)),
        ],
        oracle=lambda a, out: np.array([a.sum()]),
        hints=("halves", "shared memory", "a loop over widths"),
        wrong=(
            Wrong("half of it", "width = 32", "width = 16", "Begin with half of 64."),
        ),
        right=(),
    ),
]
"""
REFERENCE = SOURCE.split("### BEGIN SOLUTION\n")
TORCH = {
    "passed": ("return x * torch.sigmoid(x)", "passed"),
    "float32": ("return (x.float() / (1 + torch.exp(-x.float())))", "gradcheck"),
    "another way": ("return torch.nn.functional.silu(x)", "passed"),
    "a misconception": ("return torch.relu(x)", "Looks like: relu"),
    "detached": ("return x.detach() * torch.sigmoid(x.detach())", "left torch's graph"),
    "half detached": ("return x.detach() * torch.sigmoid(x)", "The gradient is wrong"),
    "numpy": ("return torch.tensor(x.numpy() * 1.0)", "differ"),
    "in place": ("return x.mul_(torch.sigmoid(x))", "changes its argument 1"),
    "None": ("x * torch.sigmoid(x)", "returns None"),
    "the library's": ("import minidsv3.primitives", "Borrowed from minidsv3"),
}
KERNEL = SOURCE.split("### BEGIN SOLUTION\n")[2].split("    ### END")[0]
CUDA = {
    "passed": (KERNEL, "passed"),
    "no barrier": (KERNEL.replace("    cuda.syncthreads()\n    w", "    w"), "RaceError"),
    "a barrier in an if": (
        KERNEL.replace("+= shared[t + width]\n        cuda", "+= shared[t + width]\n            cuda"),  # noqa: E501
        "DivergenceError",
    ),
    "out of bounds": (KERNEL.replace("width = 32", "width = 64"), "BoundsError"),
    "never written": (KERNEL.replace("    shared[t] = x[t]\n", ""), "UninitialisedError"),
    "nothing written": (KERNEL.replace("out[0] =", "x_0 ="), "nan"),
    "a misconception": (KERNEL.replace("width = 32", "width = 16"), "Looks like: half"),
    "the input changed": (KERNEL + "    x[t] = 0.0\n", "changes its argument 1"),
    "an endless loop": (KERNEL.replace("width //= 2", "width += 0"), "No answer in time"),
    "a NameError": (KERNEL.replace("t = cuda", "u = cuda"), "NameError"),
    "the order": (
        "    out[0] = 0.0\n    if cuda.threadIdx.x == 0:\n        pass\n",
        "RaceError",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Desk:
    """The exercises with a chapter of toys in them."""
    made = Desk(tmp_path_factory.mktemp("toys"))
    (made.root / "solutions/90_toys.py").write_text(SOURCE)
    (made.exercises / "checks/toy.py").write_text(CHECKS)
    workers = made.exercises / "grader/workers.py"
    workers.write_text(workers.read_text().replace("SECONDS = 10.0", "SECONDS = 3.0"))
    assert made.command("build").returncode == 0
    return made


def grade(desk: Desk, id_: str, stub: str, body: str) -> str:
    desk.answer(id_, f"{stub}{body}", "90_toys.ipynb")
    return desk.grade(f"exercises/90_toys.ipynb::{id_}")[1]


def stated(said: str, message: str) -> bool:
    if message == "passed":
        return "= 1 passed in 0.00s =" in said
    return "= 1 failed in 0.00s =" in said and message in said


def test_stubs_of_each_kind(desk):
    assert desk.text_of("toy.torch.1", "90_toys.ipynb").endswith("    return ...")
    assert desk.text_of("toy.cuda.1", "90_toys.ipynb").endswith('threads."""\n    ...')
    status, said = desk.grade("exercises/90_toys.ipynb")
    assert status == 0 and "2 todo" in said
    assert said.splitlines()[-2].endswith("CUDA: simulator")


@pytest.mark.parametrize(("body", "message"), TORCH.values(), ids=TORCH)
def test_torch_answers(desk, body, message):
    said = grade(desk, "toy.torch.1", "def silu(x):\n    ", body)
    assert stated(said, message), said


@pytest.mark.parametrize(("body", "message"), CUDA.values(), ids=CUDA)
def test_cuda_answers(desk, body, message):
    said = grade(desk, "toy.cuda.1", "def block_sum(x, out):\n", body)
    assert stated(said, message), said
    assert "Traceback" not in said
