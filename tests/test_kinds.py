"""PyTorch and CUDA answers: small exercises of each kind, judged like all others.

Each answer of the tables below is an exercise of its own, so that one run judges all.
"""

import re
import sys
from textwrap import indent
from types import SimpleNamespace

import numpy as np
import pytest
from grader import kernels, spec
from grader.cell import Answer
from grader.source import exercises, find
from grader.spec import Launch
from grader.workers import judged

from minidsv3.gpu.simulator import cuda
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
from grader.spec import Case, Check, Launch, Limit, Wrong
from minidsv3.primitives.numpy_ref import silu_forward
x = np.random.default_rng(0).normal(size=64).astype(np.float32)
HINTS = ("one", "two", "three")
HALF = Wrong("half of it", "width = 32", "width = 16", "Begin with half of 64.")
APART = Limit("Reads far apart", "sectors", 8, 0, "read", "Side by side.")
MOVED = Wrong("moved", "x[t]", "x[(t + 1) % 64]", "Begin with a sector.")
ONCE = Limit("More than one reading", "bytes", 256, 0, "read")
BANKS = Limit("Banks in each other's way", "conflicts", 0)
TREE = Limit("Too many passes", "passes", 60)
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
            Launch(
                "64 numbers", (x, np.zeros(1, np.float32)), 1, 64, (1,),
                limits=(ONCE, APART, BANKS, TREE),
            ),
            Launch("64 others", (x - 3, np.zeros(1, np.float32)), 1, 64, (1,)),
        ],
        oracle=lambda a, out: np.array([a.sum()]), hints=HINTS, right=(),
        wrong=(HALF, MOVED),
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
        "\nYour function changes its argument `x`\n  It is an input",
    ),
    "an endless loop": (
        KERNEL.replace("width //= 2", "width += 0"),
        "No answer in time",
    ),
    "a NameError": (KERNEL.replace("t = cuda", "u = cuda"), "NameError"),
    "who comes first": (
        """\
    t = cuda.threadIdx.x
    shared = cuda.shared.array(64, "float32")
    shared[t] = x[t]
    cuda.syncthreads()
    if t > 0:
        cuda.atomic.add(shared, 0, x[t])
    cuda.syncthreads()
    if t == 0:
        out[0] = shared[0]
""",
        "The result depends on the order of the threads",
    ),
    "read twice": (
        KERNEL.replace("= x[t]", "= x[t] + 0 * x[t]"),
        "512 bytes asked for; 256 will do.\n    256 in line 5: shared[t] = x[t]",
    ),
    "read far apart": (
        KERNEL.replace("= x[t]", "= x[t % 8 * 8 + t // 8]"),
        "16 sectors of 32 bytes moved; 8 will do.",
    ),
    "a limit broken by another number": (
        KERNEL.replace("= x[t]", "= x[t % 8 * 8 + t // 8]"),
        "\nReads far apart\n  Side by side.\n",
    ),
    "a limit broken by the same number": (
        KERNEL.replace("= x[t]", "= x[(t + 65) % 64]"),
        "\nLooks like: moved\n  Begin with a sector.\n",
    ),
    "banks": (
        KERNEL.replace("(64, ", "(2048, ")
        .replace("shared[t + width]", "shared[32 * (t + width)]")
        .replace("shared[t]", "shared[32 * t]"),
        "Banks in each other's way",
    ),
    "one thread alone": (
        KERNEL.replace("while width > 0", "while width > 64").replace(
            "    if t == 0:",
            "    if t == 0:\n        for k in range(1, 64):\n"
            "            shared[0] += shared[k]",
        ),
        "Too many passes",
    ),
    "other names": (
        "def block_sum(a, b):\n" + KERNEL.replace("x[t]", "a[t]").replace("out", "b"),
        "passed",
    ),
    "other names, far apart": (
        "def block_sum(out, x):\n"
        + KERNEL.replace("x[t]", "out[t % 8 * 8 + t // 8]").replace("out[0]", "x[0]"),
        "Reads far apart",
    ),
    "wrong, and too much": (
        KERNEL.replace("= x[t]", "= x[t] + x[t]"),
        "And: more than one reading.",
    ),
    "the simulator imported": (
        "    from minidsv3.gpu.simulator import cuda\n" + KERNEL,
        "`minidsv3.gpu.simulator` is imported already",
    ),
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
        text = body if body.startswith("def") else f"{SIGNATURES[kind]}\n{body}"
        desk.answer(id_, text, "90_toys.ipynb")
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


def test_on_a_card_the_kernel_runs_too(monkeypatch):
    """There is none here: a stand-in launches in the simulator, and writes it down."""
    launched = []

    class Jitted:
        def __init__(self, kernel, worse=None):
            self.kernel, self.worse = kernel, worse

        def __getitem__(self, shape):
            grid, block, _, dynamic = shape

            def start(*args):
                launched.append((grid, block))
                if isinstance(self.worse, Exception):
                    raise self.worse
                kernels.simulator().launch(self.kernel, grid, block, *args)
                args[1][0] += self.worse or 0

            return start

    class Array(np.ndarray):
        def copy_to_host(self):
            return np.array(self)

    fake = SimpleNamespace(
        jit=Jitted, to_device=lambda a: a.copy().view(Array), is_available=lambda: True
    )
    monkeypatch.setitem(sys.modules, "numba", SimpleNamespace(cuda=fake))
    x = np.arange(64, dtype=np.float32)
    case = Launch("64", (x, np.zeros(1, np.float32)), 1, 64, (1,))
    check = spec.Check("toy.cuda.1", ("out",), list, ("", "", ""), (), ())

    def double(x, out):
        if cuda.threadIdx.x == 0:
            out[0] = 2 * x[3]

    def result(worse):
        return kernels.as_kernel(double, check, case, True, Jitted(double, worse))

    assert result(0) == 6 and launched == [(1, 64)]
    assert result(0.5) == 6.5  # the card's number is the one that is judged
    refused = result(TypeError("no such thing\n" + "a line\n" * 20))
    assert refused.headline == "It runs in the simulator, and not on the card"
    assert refused.report.startswith("TypeError: no such thing\na line\n")
    assert len(refused.report.splitlines()) == 6

    def racing(x, out):
        out[0] = cuda.threadIdx.x

    del launched[:]
    said = kernels.as_kernel(racing, check, case, True, Jitted(racing))
    assert said.headline == "A race between threads" and not launched


def test_whether_there_is_a_card(monkeypatch):
    fake = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True))
    monkeypatch.setitem(sys.modules, "numba", fake)
    for compiler in (True, False):
        kernels.on_a_card.cache_clear()
        monkeypatch.setattr("minidsv3.gpu.compile.available", lambda: compiler)  # noqa: B023
        assert kernels.on_a_card() is compiler
    kernels.on_a_card.cache_clear()


def test_a_named_mistake_still_says_where():
    id_ = "gpu.cuda.3"
    wrong = next(w for w in spec.find(id_).wrong if w.name.startswith("no barrier bef"))
    said = judged(Answer(id_, wrong.patched(find(id_).reference))).text()
    assert f"Looks like: {wrong.name}" in said
    assert "A race between threads\n" in said and "which thread 32 wrote" in said
    assert "scratch[thread] += scratch[thread + half]" in said


def test_every_launch_hides_no_barrier_in_a_single_warp():
    """One warp runs in step on many a card, and a missing barrier may not show."""
    for id_ in (i for i, e in exercises().items() if e.kind == "cuda"):
        blocks = [np.prod(case.block) for case in spec.find(id_).cases()]
        assert sum(threads >= 64 for threads in blocks) >= 3, id_
