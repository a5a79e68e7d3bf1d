"""Chapter 10, maximum and log-sum-exp of a row in one reading, by shuffles."""

import numpy as np
from grader.spec import Check, Launch, Limit, Wrong

from checks.draws import normal

TWICE = "x is read more than once"
ONCE = "One lane reads each number, and once: what it needs again, it keeps."
APART = "Lanes that read far apart"
SECTORS = "Memory hands over 32 bytes at a time, and of these most are thrown away."
SHARED = "Shared memory where shuffles do"
INF = float("inf")
LOW = np.array([[-3e36, -2e36, -2e36], [-5.0, -INF, -4e34]])


def table(label: str, x: np.ndarray, grid: int, block: int = 64) -> Launch:
    """Rows of logits."""
    rows, width = x.shape
    limits = [
        Limit(SHARED, "passes", 0),
        Limit(TWICE, "bytes", 4 * x.size, 0, "read", ONCE),
    ]
    if width % 8 == 0:  # a row begins with a sector; load8 goes to each twice
        limits.append(Limit(APART, "sectors", 2 * x.size // 8, 0, "read", SECTORS))
    flat = x.astype(np.float32).ravel()
    results = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
    args = (flat, *results, rows, width)
    return Launch(label, args, grid, block, (1, 2), limits=tuple(limits))


def masked() -> np.ndarray:
    """Minus infinity at the beginning, at the end, everywhere but once."""
    x = normal(4, 72, seed=3)
    x[0, :40] = x[1, 20:] = -INF
    x[2, :] = -INF
    x[2, 37] = 1.5
    return x


def expected(x, m, l, rows, width):  # noqa: E741  the name of the formula
    """In float64, the maximum first."""
    x = x.reshape(rows, width).astype(float)
    high = x.max(axis=1)
    return high, high + np.log(np.exp(x - high[:, None]).sum(axis=1))


LOWEST = "float32(-3.4e38), float32(0)"
SEEN = "s = s * math.exp(high - top) + math.exp(value - top)"
LOOP_TOP = "        top = max(high, value)\n"
MERGE = "s = s * math.exp(high - top) + theirs * math.exp(other - top)"
OTHER = "other = cuda.shfl_xor_sync(0xFFFFFFFF, high, distance)"
THEIRS = "theirs = cuda.shfl_xor_sync(0xFFFFFFFF, s, distance)"
DISTANCES = "(16, 8, 4, 2, 1)"
ROW = "cuda.grid(1) // 32"
ANSWER = "l[row] = high + math.log(s)"

LOG_SUM_EXP = Check(
    "gpu.cuda.4",
    returns=("m", "l"),
    cases=lambda: [
        table("one row of three", np.array([[1.0, 3.0, 2.0]]), grid=1),
        table("3 rows of 40", normal(3, 40, seed=1, scale=3.0), grid=2),
        table("far below zero", normal(2, 33, seed=2, scale=9.0) - 2000, grid=1),
        table("far above, rising", np.linspace(900, 1000, 96)[None], grid=1),
        table("falling", np.linspace(50, -400, 64)[None].repeat(2, 0), grid=1),
        table("many minus infinities", masked(), grid=2, block=96),
        table("lower than one thinks", LOW, grid=1),
        table("a long row", normal(1, 1104, seed=4, scale=2.0), grid=1, block=32),
        table("one number", np.array([[-7.5], [0.25]]), grid=2),
    ],
    oracle=expected,
    hints=(
        "A pair stands for all the numbers it has seen. What is the pair of a single "
        "number x? Of nothing at all? And of two pairs put together? The last is the "
        "only thing you need to write.",
        "Begin with `high, s = float32(-3.4e38), float32(0)`: finite, so that high - "
        "top is a number. `cuda.shfl_xor_sync(0xFFFFFFFF, high, distance)` and the "
        "same of s, both before either changes, for distance 16, 8, 4, 2, 1.",
        "`top = max(high, other)`, `s = s * math.exp(high - top) + theirs * "
        "math.exp(other - top)`, `high = top`. For a number of its own a lane does the "
        "same with `value` in place of `other`, and 1 in place of `theirs`.",
    ),
    wrong=(
        Wrong(
            "nothing shrinks when a larger one comes",
            SEEN,
            "s = s + math.exp(value - top)",
            "What was added so far was measured against the old maximum. Multiply it "
            "by exp(old - new).",
        ),
        Wrong(
            "two lanes' sums simply added",
            MERGE,
            "s = s + theirs",
            "Each lane's sum is measured against its own maximum. Bring both to the "
            "larger one first.",
        ),
        Wrong(
            "only the own sum brought to the new maximum",
            MERGE,
            "s = s * math.exp(high - top) + theirs",
            "The other lane's sum is measured against the other lane's maximum: it "
            "shrinks by exp(other - top).",
        ),
        Wrong(
            "maxima added",
            "        top = max(high, other)\n",
            "        top = high + other\n",
            "Of two maxima the larger one is the maximum of both.",
        ),
        Wrong(
            "the search begins at minus infinity",
            LOWEST,
            "float32(-math.inf), float32(0)",
            "A lane that has seen no number, or only minus infinities, then subtracts "
            "infinity from infinity, which is no number. Begin at a finite one.",
        ),
        Wrong(
            "the search begins at 0",
            LOWEST,
            "float32(0), float32(0)",
            "In a row of negative numbers 0 is not among them, and far below zero "
            "every exponential vanishes against it.",
        ),
        Wrong(
            "the search begins at a number that a row may lie below",
            LOWEST,
            "float32(-1e30), float32(0)",
            "float32 goes down to -3.4e38, and so may a row.",
        ),
        Wrong(
            "a stretch for each lane",
            "    for i in range(lane, width, 32):\n",
            "    each = (width + 31) // 32\n"
            "    for i in range(lane * each, min(width, lane * each + each)):\n",
            "Each lane then reads from a sector of its own, 4 bytes of 32. Lanes side "
            "by side read numbers side by side.",
        ),
        Wrong(
            "only one partner",
            DISTANCES,
            "(16,)",
            "After one exchange a lane knows of two. Halve the distance down to 1.",
        ),
        Wrong(
            "one exchange too few",
            DISTANCES,
            "(16, 8, 4, 2)",
            "Even and odd lanes never hear of each other: the last distance is 1.",
        ),
        Wrong(
            "a mask of sixteen lanes",
            OTHER,
            "other = cuda.shfl_xor_sync(0xFFFF, high, distance)",
            "Every lane that calls must be named in the mask, and each reads from a "
            "lane that must be named too. Here that is all 32: 0xFFFFFFFF.",
        ),
        Wrong(
            "only lanes that have a number shuffle",
            "    for distance in (16, 8, 4, 2, 1):\n",
            "    for distance in (16, 8, 4, 2, 1) if lane < width else ():\n",
            "The mask promises 32 lanes. One that has nothing to say hands in the pair "
            "of nothing.",
        ),
        Wrong(
            "the sum exchanged after it has changed",
            OTHER + "\n        " + THEIRS + "\n        top = max(high, other)\n"
            "        " + MERGE + "\n        high = top\n",
            OTHER + "\n        top = max(high, other)\n"
            "        s = s * math.exp(high - top)\n        high = top\n        "
            + THEIRS
            + "\n        s = s + theirs * math.exp(other - top)\n",
            "The sum that comes over has been brought to the new maximum already, and "
            "here it shrinks once more. Exchange both halves of a pair, then change "
            "them.",
        ),
        Wrong(
            "a row for each block",
            ROW,
            "cuda.blockIdx.x",
            "All warps of the block work on the same row, and write the same place. "
            "Each warp has a row of its own.",
        ),
        Wrong(
            "a row for each thread",
            ROW,
            "cuda.grid(1)",
            "Then lanes of one warp put together pieces of different rows.",
        ),
        Wrong(
            "no guard for warps without a row",
            "if row >= rows:",
            "if row < 0:",
            "The grid may have more warps than there are rows.",
        ),
        Wrong(
            "the sum, not its logarithm with the maximum",
            ANSWER,
            "l[row] = math.log(s)",
            "s is measured against m. The logarithm of the whole sum is m + log s.",
        ),
        Wrong(
            "the row read twice",
            "    high, s = float32(-3.4e38), float32(0)  # lower than any, and finite\n"
            "    for i in range(lane, width, 32):\n"
            "        value = x[row * width + i]\n" + LOOP_TOP + "        " + SEEN + "\n"
            "        high = top\n",
            "    high, s = float32(-3.4e38), float32(0)\n"
            "    for i in range(lane, width, 32):\n"
            "        high = max(high, x[row * width + i])\n"
            "    for i in range(lane, width, 32):\n"
            "        s += math.exp(x[row * width + i] - high)\n",
            "First the maximum, then the sum: so the row comes from memory twice. Keep "
            "the pair up to date with each number instead.",
        ),
        Wrong(
            "no maximum at all",
            LOOP_TOP + "        " + SEEN + "\n        high = top\n",
            "        high = max(high, value)\n        s += math.exp(value)\n",
            "exp(900) is infinite in float32 and exp(-2000) is 0. Subtract the largest "
            "seen so far.",
            (
                (MERGE, "s = s + theirs"),
                (ANSWER, "l[row] = math.log(s)"),
            ),
        ),
    ),
    right=(
        "def together(m1, s1, m2, s2):\n"
        "    if m1 < m2:\n"
        "        return m2, s1 * exp2((m1 - m2) * float32(1.4426950408889634)) + s2\n"
        "    return m1, s1 + s2 * exp2((m2 - m1) * float32(1.4426950408889634))\n\n"
        "def log_sum_exp(x, m, l, rows, width):\n"
        "    warps = cuda.blockDim.x // 32\n"
        "    row = cuda.blockIdx.x * warps + cuda.threadIdx.x // 32\n"
        "    lane = cuda.threadIdx.x & 31\n"
        "    if row < rows:\n"
        "        high, total = float32(-1e38), float32(0)\n"
        "        i = lane\n"
        "        while i < width:\n"
        "            number = x[row * width + i]\n"
        "            high, total = together(high, total, number, float32(1))\n"
        "            i += 32\n"
        "        delta = 16\n"
        "        while delta:\n"
        "            m2 = cuda.shfl_down_sync(0xFFFFFFFF, high, delta)\n"
        "            s2 = cuda.shfl_down_sync(0xFFFFFFFF, total, delta)\n"
        "            high, total = together(high, total, m2, s2)\n"
        "            delta //= 2\n"
        "        if lane == 0:\n"
        "            m[row] = high\n"
        "            l[row] = math.log(total) + high\n",
        "def log_sum_exp(x, m, l, rows, width):\n"
        "    row = (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) >> 5\n"
        "    lane = cuda.laneid\n"
        "    high, s = float32(-3e38), float32(0)\n"
        "    if row < rows:\n"
        "        for i in range(row * width + lane, (row + 1) * width, 32):\n"
        "            number = x[i]\n"
        "            if number <= high:\n"
        "                s += math.exp(number - high)\n"
        "            else:\n"
        "                s = s * math.exp(high - number) + 1\n"
        "                high = number\n"
        "    top = high\n"
        "    for distance in (1, 2, 4, 8, 16):\n"
        "        top = max(top, cuda.shfl_xor_sync(0xFFFFFFFF, top, distance))\n"
        "    s *= math.exp(high - top)\n"
        "    for distance in (1, 2, 4, 8, 16):\n"
        "        s += cuda.shfl_xor_sync(0xFFFFFFFF, s, distance)\n"
        "    if lane == 31 and row < rows:\n"
        "        m[row], l[row] = top, top + math.log(s)\n",
    ),
)

CHECKS = [LOG_SUM_EXP]
