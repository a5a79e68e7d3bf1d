"""Chapter 10, a first kernel: the grid-stride loop."""

import numpy as np
from grader.spec import Check, Launch, Limit, Wrong

from checks.draws import normal

STRETCHES = "Neighbours do not read neighbours"
SECTORS = "Memory hands over 32 bytes at a time, and of these most are thrown away."


def launched(n: int, grid: int, block: int, behind: int = 0, tight: bool = True):
    """n numbers in arrays that go on behind them; tight: sectors are counted."""
    x, y = (normal(n + behind, seed=seed).astype(np.float32) for seed in (n, n + 1))
    label = f"{n} numbers" + f" of {n + behind}" * bool(behind)
    label += f", {grid} block{'s' * (grid > 1)} of {block} threads"
    sectors = 2 * -(-4 * n // 32)  # twice what is needed: load8 goes there twice
    limits = [
        Limit(STRETCHES, "sectors", sectors, array, kind, SECTORS)
        for array, kind in ((1, "read"), (2, "read"), (3, "write"))
    ]
    args = (np.float32(1.5), x, y, np.zeros_like(x), n)
    return Launch(label, args, grid, block, (3,), limits=tuple(limits * tight))


def expected(a, x, y, z, n):
    """The first n, and behind them what the launch began with."""
    z[:] = np.nan
    z[:n] = a * x[:n].astype(float) + y[:n]
    return z


LOOP = "for i in range(cuda.grid(1), n, cuda.gridsize(1)):"
STRIDE = "cuda.gridsize(1)"
START = "cuda.grid(1)"

AXPY = Check(
    "gpu.cuda.1",
    returns=("z",),
    cases=lambda: [
        launched(5, grid=1, block=64),
        launched(300, grid=2, block=64),
        launched(100, grid=4, block=64, behind=30),
        launched(128, grid=2, block=64, behind=1),
        launched(500, grid=3, block=50, tight=False),
        launched(1, grid=2, block=96, behind=5),
        launched(0, grid=1, block=64, behind=3),
    ],
    oracle=expected,
    hints=(
        "Which number is the thread's first? How far is its next one, if all threads "
        "of all blocks are to move on together? And where does it stop?",
        "`cuda.grid(1)` is the thread's number in the whole grid, `cuda.gridsize(1)` "
        "says how many there are. `range(first, n, step)` is a guard as well: it is "
        "empty where the first number is n or more.",
        "`for i in range(cuda.grid(1), n, cuda.gridsize(1)):` and in it `z[i] = a * "
        "x[i] + y[i]`.",
    ),
    wrong=(
        Wrong(
            "one number a thread",
            LOOP,
            "for i in range(cuda.grid(1), min(n, cuda.gridsize(1))):\n"
            "        if i != cuda.grid(1):\n            break",
            "With fewer threads than numbers the rest is never computed. Each thread "
            "goes on at a distance of as many as there are threads.",
        ),
        Wrong(
            "no guard",
            LOOP,
            "for i in range(cuda.grid(1), n + cuda.gridsize(1), cuda.gridsize(1)):",
            "The last round has more threads than numbers. A thread stops where its "
            "next number is n or more.",
        ),
        Wrong(
            "one too many",
            LOOP,
            "for i in range(cuda.grid(1), n + 1, cuda.gridsize(1)):",
            "n numbers are those from 0 to n - 1.",
        ),
        Wrong(
            "the length of the array instead of n",
            LOOP,
            "for i in range(cuda.grid(1), len(x), cuda.gridsize(1)):",
            "The arrays may be longer than n; what lies behind is not to be written.",
        ),
        Wrong(
            "a step of one block",
            STRIDE,
            "cuda.blockDim.x",
            "The other blocks take a block's length of numbers as well: several "
            "threads write one number. The step is the number of threads in the grid.",
        ),
        Wrong(
            "a step of as many as there are blocks",
            STRIDE,
            "cuda.gridDim.x",
            "gridDim counts blocks. The step is the number of threads in the grid.",
        ),
        Wrong(
            "every block begins at the front",
            START,
            "cuda.threadIdx.x",
            "threadIdx counts within the block, and so every block takes the same "
            "numbers. In the grid the thread's number is blockIdx.x * blockDim.x + "
            "threadIdx.x.",
        ),
        Wrong(
            "blocks and threads exchanged",
            START,
            "cuda.threadIdx.x * cuda.gridDim.x + cuda.blockIdx.x",
            "Every number is computed once, but the lanes of a warp are gridDim apart. "
            "Neighbours are the threads of one block: blockIdx.x * blockDim.x + "
            "threadIdx.x.",
        ),
        Wrong(
            "a stretch for each thread",
            LOOP,
            "each = -(-n // cuda.gridsize(1))\n"
            "    for i in range(cuda.grid(1) * each, min(n, cuda.grid(1) * each + "
            "each)):",
            "That is how processors share work. Here 32 lanes ask at the same time, "
            "and each would have a sector of its own for 4 bytes. Let neighbours take "
            "neighbours.",
        ),
        Wrong(
            "only numbers of whole rounds",
            LOOP,
            "for i in range(cuda.grid(1), n - n % cuda.gridsize(1), cuda.gridsize(1)):",
            "The last round has fewer numbers than threads, and its numbers count too.",
        ),
        Wrong(
            "zeros behind the n numbers",
            LOOP,
            "for i in range(cuda.grid(1), len(z), cuda.gridsize(1)):\n"
            "        if i >= n:\n            z[i] = float32(0)\n"
            "            continue",
            "What lies behind n belongs to somebody else: leave it as it is.",
        ),
        Wrong(
            "added to what stands in z",
            "z[i] = a",
            "z[i] += a",
            "Nobody has cleared z. The result takes the place of what stood there.",
        ),
        Wrong(
            "y forgotten",
            "a * x[i] + y[i]",
            "a * x[i]",
            "z is a times x, plus y.",
        ),
    ),
    right=(
        "def axpy(a, x, y, z, n):\n"
        "    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x\n"
        "    while i < n:\n"
        "        z[i] = y[i] + x[i] * a\n"
        "        i += cuda.blockDim.x * cuda.gridDim.x\n",
        "def axpy(a, x, y, z, n):\n"
        "    threads = cuda.gridsize(1)\n"
        "    for round in range((n + threads - 1) // threads):\n"
        "        i = round * threads + cuda.grid(1)\n"
        "        if i < n:\n"
        "            z[i] = cuda.fma(a, x[i], y[i])\n",
        "def element(a, b, c):\n"
        "    return a * b + c\n\n"
        "def axpy(a, x, y, z, n):\n"
        "    first = uint32(cuda.grid(1))\n"
        "    for i in range(first, uint32(n), uint32(cuda.gridsize(1))):\n"
        "        z[i] = element(a, x[i], y[i])\n",
    ),
)

CHECKS = [AXPY]
