"""Chapter 10, the sum over a block: a tree in shared memory, called twice."""

import numpy as np
from grader.source import find
from grader.spec import Check, Launch, Limit, Wrong

from checks.draws import normal

GIVEN = "\n\ndef statistics" + find("gpu.cuda.3").stub.partition("def statistics")[2]
SERIAL = "Shared memory asked as often as one thread would"
HALVES = "Half of the threads can add at the same time, then half of those."


def rows_of(width: int, rows: int, block: int, most: int | None = None) -> Launch:
    """Rows and threads; most: how many passes over the banks are let through."""
    x = normal(rows * width, seed=width).astype(np.float32)
    label = f"{rows} row{'s' * (rows > 1)} of {width} numbers, {block} threads"
    limits = (Limit(SERIAL, "passes", most, why=HALVES),) if most else ()
    results = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
    return Launch(label, (x, *results, width), rows, block, (1, 2), limits=limits)


def expected(x, mean, variance, width):
    """In float64, by NumPy."""
    rows = x.reshape(-1, width).astype(float)
    return rows.mean(axis=1), rows.var(axis=1)


STORE = "    scratch[thread] = value\n    cuda.syncthreads()\n"
HALVE = "half = (active + 1) // 2"
TAKE = "if thread < active - half:"
ADD = "            scratch[thread] += scratch[thread + half]\n"
ROUND = ADD + "        cuda.syncthreads()\n"
LAST = "    answer = scratch[0]\n    cuda.syncthreads()"

TOTAL = Check(
    "gpu.cuda.3",
    returns=("mean", "variance"),
    cases=lambda: [
        rows_of(6, rows=1, block=64),
        rows_of(70, rows=2, block=64),
        rows_of(150, rows=1, block=100),
        # A tree with every warp in nearly every round takes 154, one thread alone 270.
        rows_of(128, rows=1, block=128, most=200),
        rows_of(300, rows=1, block=256),
        rows_of(5, rows=1, block=3),
        rows_of(4, rows=2, block=1),
    ],
    oracle=expected,
    hints=(
        "Who writes into shared memory, and who reads it then? Each time that others "
        "read what a thread has written, all must have come by a barrier between. The "
        "last reading is that of the sum itself: who writes next?",
        "`scratch[thread] = value`, a barrier; then a loop in which `half = (active + "
        "1) // 2`, the threads below `active - half` add what stands `half` further, "
        "and all, idle or not, come to a barrier.",
        "`while active > 1:` … `if thread < active - half: scratch[thread] += "
        "scratch[thread + half]`; `cuda.syncthreads()` outside of the `if`; `active = "
        "half`. Then `answer = scratch[0]`, one barrier more, `return answer`.",
    ),
    wrong=(
        Wrong(
            "a barrier inside the if",
            ROUND,
            ADD + "            cuda.syncthreads()\n",
            "The idle threads never come to it, and the others wait. On a GPU it may "
            "hang or, worse, not. A barrier stands where all threads pass.",
        ),
        Wrong(
            "no barrier before the first round",
            STORE,
            "    scratch[thread] = value\n",
            "A thread adds what another has perhaps not laid down yet.",
        ),
        Wrong(
            "no barrier between two rounds",
            ROUND,
            ADD,
            "The next round reads what this one writes, in other threads.",
        ),
        Wrong(
            "no barrier after the last reading",
            LAST,
            "    answer = scratch[0]",
            "A quick thread begins the second sum and overwrites scratch[0] before a "
            "slow one has read the first. Whoever uses scratch again must wait.",
        ),
        Wrong(
            "as if the threads were a power of two",
            HALVE,
            "half = active // 2",
            "Of an odd number one is left over and nobody adds it. Round up, and let "
            "it wait.",
            ((TAKE, "if thread < half:"),),
        ),
        Wrong(
            "as if there were 256 threads",
            "active = cuda.threadIdx.x, cuda.blockDim.x",
            "active = cuda.threadIdx.x, 256",
            "scratch has room for 256, and a smaller block fills only its beginning. "
            "What stands behind was never written.",
        ),
        Wrong(
            "what is left taken for the whole block",
            TAKE,
            "if thread < half and thread + half < cuda.blockDim.x:",
            "Behind what is still active stand numbers that an earlier round has added "
            "already. The partner must be one of those that are left: thread + half < "
            "active.",
        ),
        Wrong(
            "the sum only in thread 0",
            LAST,
            "    answer = scratch[thread]\n    cuda.syncthreads()",
            "The other threads get what they themselves have added up. All of them "
            "go on with the mean: return scratch[0].",
        ),
        Wrong(
            "as many steps as there are threads",
            "    while active > 1:\n",
            "    if thread == 0:\n"
            "        for k in range(1, active):\n"
            "            scratch[0] += scratch[k]\n"
            "    cuda.syncthreads()\n"
            "    while active < 1:\n",
            "One thread adds up what all have, or each does for itself: shared memory "
            "is asked once for every thread of the block. The rounds of a tree are as "
            "many as the block can be halved.",
        ),
        Wrong(
            "an atomic sum",
            "    while active > 1:\n",
            "    if thread > 0:\n"
            "        cuda.atomic.add(scratch, 0, value)\n"
            "    cuda.syncthreads()\n"
            "    while active < 1:\n",
            "Nothing races, and the last digits depend on who comes first. Besides, "
            "atomics on one word go one after the other.",
        ),
        Wrong(
            "the maximum",
            "scratch[thread] += scratch[thread + half]",
            "scratch[thread] = max(scratch[thread], scratch[thread + half])",
            "Asked for is the sum.",
        ),
    ),
    right=(
        "def total(value, scratch):\n"
        "    t, n = cuda.threadIdx.x, cuda.blockDim.x\n"
        "    scratch[t] = value\n"
        "    step = 1\n"
        "    while step < n:\n"
        "        cuda.syncthreads()\n"
        "        if t % (2 * step) == 0 and t + step < n:\n"
        "            scratch[t] += scratch[t + step]\n"
        "        step *= 2\n"
        "    cuda.syncthreads()\n"
        "    found = scratch[0]\n"
        "    cuda.syncthreads()\n"
        "    return found\n" + GIVEN,
        "def total(value, scratch):\n"
        "    cuda.syncthreads()  # before, not behind: who reads last time has read\n"
        "    t, n = cuda.threadIdx.x, cuda.blockDim.x\n"
        "    scratch[t] = value\n"
        "    half = 128\n"
        "    while half > 0:\n"
        "        cuda.syncthreads()\n"
        "        if t < half and t + half < n:\n"
        "            scratch[t] += scratch[t + half]\n"
        "        half >>= 1\n"
        "    cuda.syncthreads()\n"
        "    return scratch[0]\n" + GIVEN,
        "def total(value, scratch):\n"
        "    t, n = cuda.threadIdx.x, cuda.blockDim.x\n"
        "    first = t - t % 32\n"
        "    lanes = min(32, n - first)  # the last warp may be a piece\n"
        "    mask = 0xFFFFFFFF if lanes == 32 else (1 << lanes) - 1\n"
        "    for distance in (16, 8, 4, 2, 1):\n"
        "        source = t % 32 + distance\n"
        "        there = min(source, lanes - 1)\n"
        "        other = cuda.shfl_sync(mask, value, there)\n"
        "        if source < lanes:\n"
        "            value += other\n"
        "    if t == first:\n"
        "        scratch[t // 32] = value\n"
        "    cuda.syncthreads()\n"
        "    answer = float32(0)\n"
        "    for warp in range((n + 31) // 32):\n"
        "        answer += scratch[warp]\n"
        "    cuda.syncthreads()\n"
        "    return answer\n" + GIVEN,
    ),
)

CHECKS = [TOTAL]
