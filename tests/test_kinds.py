"""PyTorch and CUDA answers: small exercises of each kind, judged like all others.

Each answer of the tables below is an exercise of its own, so that one run judges all.
"""

import re
from textwrap import indent

import pytest

from tests.learner import Desk

HEAD = """\
# %% [markdown]
# # Toys
# %%
import numpy as np
import torch
from minidsv3.gpu.simulator import cuda
from grader import check
"""
CELL = """\
# %% [markdown]
# ## {id} · A toy
# Write it.
# %%
# exercise: {id}
{signature}
    ### BEGIN SOLUTION
{body}
    ### END SOLUTION
"""
CHECKS = """\
import numpy as np
from grader.spec import Case, Check, Launch, Wrong
from minidsv3.primitives.numpy_ref import silu_forward
x = np.random.default_rng(0).normal(size=64).astype(np.float32)
HINTS = ("one", "two", "three")
HALF = Wrong("half of it", "width = 32", "width = 16", "Begin with half of 64.")
RELU = Wrong("relu", "x * torch.sigmoid(x)", "torch.relu(x)", "Smooth.")
CHECKS = [
    Check(
        f"toy.torch.{n}", ("y",),
        cases=lambda: [
            Case("three numbers", (np.array([0.5, -1.0, 2.0]),)),
            Case("far out", (np.array([-900.0, 900.0, 0.0]),)),
        ],
        oracle=lambda a: silu_forward(a)[0], hints=HINTS, wrong=(RELU,), right=(),
    )
    for n in range(30)
] + [
    Check(
        f"toy.cuda.{n}", ("out",),
        cases=lambda: [
            Launch("64 numbers", (x, np.zeros(1, np.float32)), 1, 64, (1,)),
            Launch("64 others", (x - 3, np.zeros(1, np.float32)), 1, 64, (1,)),
        ],
        oracle=lambda a, out: np.array([a.sum()]), hints=HINTS, wrong=(HALF,), right=(),
    )
    for n in range(30)
]
"""
SIGNATURES = {"torch": "def silu(x):", "cuda": "def block_sum(x, out):"}
SILU = "    return x * torch.sigmoid(x)"
KERNEL = """\
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
"""
TORCH = {
    "the reference": ("return x * torch.sigmoid(x)", "passed"),
    "float32": ("return (x.float() / (1 + torch.exp(-x.float())))", "gradcheck"),
    "another way": ("return torch.nn.functional.silu(x)", "passed"),
    "a misconception": ("return torch.relu(x)", "Looks like: relu"),
    "detached": ("return x.detach() * torch.sigmoid(x.detach())", "left torch's graph"),
    "half detached": ("return x.detach() * torch.sigmoid(x)", "The gradient is wrong"),
    "numpy": (
        "return torch.tensor(x.numpy() / (1 + np.exp(-x.numpy())))",
        "The answer works only without gradients",
    ),
    "in place": ("return x.mul_(torch.sigmoid(x))", "changes its argument `x`"),
    "None": ("x * torch.sigmoid(x)", "returns None"),
    "the library's": ("import minidsv3.primitives", "Borrowed from minidsv3"),
}
CUDA = {
    "the reference": (KERNEL, "passed"),
    "no barrier": (
        KERNEL.replace("    cuda.syncthreads()\n    w", "    w"),
        "A race between threads",
    ),
    "a barrier in an if": (
        KERNEL.replace("width]\n        cuda", "width]\n            cuda"),
        "A barrier that not all",
    ),
    "out of bounds": (KERNEL.replace("width = 32", "width = 64"), "An index outside"),
    "never written": (
        KERNEL.replace("    shared[t] = x[t]\n", ""),
        "Memory read before",
    ),
    "nothing written": (KERNEL.replace("out[0] =", "x_0 ="), "nan"),
    "a misconception": (KERNEL.replace("width = 32", "width = 16"), "Looks like: half"),
    "the input changed": (
        KERNEL + "    x[t] = 0.0\n",
        "\nYour function changes its argument `x`",
    ),
    "an endless loop": (
        KERNEL.replace("width //= 2", "width += 0"),
        "No answer in time",
    ),
    "a NameError": (KERNEL.replace("t = cuda", "u = cuda"), "NameError"),
    "the order": (
        "    out[0] = 0.0\n    if cuda.threadIdx.x == 0:\n        pass\n",
        "A race between threads",
    ),
}


REFERENCES = {"torch": SILU, "cuda": KERNEL.rstrip()}
ALL = {
    f"toy.{kind}.{n}": (kind, name, *row)
    for kind, table in (("torch", TORCH), ("cuda", CUDA))
    for n, (name, row) in enumerate(table.items())
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Desk:
    """The exercises with a chapter of toys in them."""
    made = Desk(tmp_path_factory.mktemp("toys"))
    cells = [
        CELL.format(id=id_, signature=SIGNATURES[kind], body=REFERENCES[kind])
        for id_, (kind, *_) in ALL.items()
    ]
    (made.root / "solutions/90_toys.py").write_text(HEAD + "".join(cells))
    (made.exercises / "checks/toy.py").write_text(CHECKS)
    workers = made.exercises / "grader/workers.py"
    workers.write_text(workers.read_text().replace("SECONDS = 10.0", "SECONDS = 4.0"))
    assert made.command("build").returncode == 0
    return made


@pytest.fixture(scope="module")
def said(desk) -> tuple[str, dict[str, str]]:
    """The fresh run, and after that what was said of each answer."""
    fresh = desk.grade("exercises/90_toys.ipynb")
    stub = desk.text_of("toy.cuda.0", "90_toys.ipynb")
    assert fresh[0] == 0 and stub.endswith(f"{SIGNATURES['cuda']}\n    ...")
    for id_, (kind, _, body, _) in ALL.items():
        body = body if kind == "cuda" else indent(body, "    ")
        desk.answer(id_, f"{SIGNATURES[kind]}\n{body}", "90_toys.ipynb")
    _, text = desk.grade("exercises/90_toys.ipynb")
    parts = re.split(r"^_ (toy\S+)  .* _$", text, flags=re.MULTILINE)
    return fresh[1], dict(zip(parts[1::2], parts[2::2], strict=True))


def test_stubs_of_each_kind(said):
    assert f"{len(ALL)} todo" in said[0]
    assert said[0].splitlines()[-3].endswith("passed    CUDA: simulator")


@pytest.mark.parametrize("id_", ALL, ids=[f"{a[0]} {a[1]}" for a in ALL.values()])
def test_an_answer(said, id_):
    message = ALL[id_][3]
    verdict = said[1].get(id_, "passed")
    assert message in verdict
    assert "Traceback" not in verdict
