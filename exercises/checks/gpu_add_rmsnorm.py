"""Chapter 10, RMSNorm and the residual addition before it, a block a row."""

import numpy as np
from grader.spec import Check, Launch, Limit, Wrong

from checks.draws import normal

APART = "Lanes that read far apart"
SECTORS = "Memory hands over 32 bytes at a time, and of these most are thrown away."
TWICE = "x and residual are read more than once"
ONCE = "Their sum is in `total`; a number that you need twice, keep in a variable."


def rows_of(width: int, rows: int, block: int, eps: float, scale: float = 1.0):
    """Rows of a hidden state."""
    x, residual = (
        normal(rows * width, seed=width + k, scale=scale).astype(np.float32)
        for k in (0, 1)
    )
    g = (1 + normal(width, seed=width + 2, scale=0.5)).astype(np.float32)
    label = f"{rows} row{'s' * (rows > 1)} of {width}, {block} threads, eps {eps:g}"
    limits = [Limit(TWICE, "bytes", 4 * rows * width, n, "read", ONCE) for n in (0, 1)]
    if width % 8 == 0:  # a row begins with a sector; load8 goes to each twice
        most = 2 * rows * width // 8
        limits += [Limit(APART, "sectors", most, n, "read", SECTORS) for n in (0, 1)]
        limits += [Limit(APART, "sectors", most, n, "write", SECTORS) for n in (3, 4)]
    args = (x, residual, g, np.zeros_like(x), np.zeros_like(x), width, np.float32(eps))
    return Launch(label, args, rows, block, (3, 4), limits=tuple(limits))


def expected(x, residual, g, total, y, width, eps):
    """In float64, by NumPy."""
    t = (x.astype(float) + residual).reshape(-1, width)
    scale = 1 / np.sqrt(np.mean(t**2, axis=1, keepdims=True) + float(eps))
    return t.ravel(), (g * t * scale).ravel()


SUM = "t = x[row + i] + residual[row + i]"
SQUARES = "squares += t * t"
SCALE = "scale = rsqrt(block_sum(squares, scratch) / float32(width) + eps)"
KEPT = "total[row + i] = t"
RESULT = "y[row + i] = g[i] * total[row + i] * scale"
FIRST = "for i in range(thread, width, cuda.blockDim.x):\n        t = "
SECOND = "for i in range(thread, width, cuda.blockDim.x):\n        y["

ADD_RMSNORM = Check(
    "gpu.cuda.5",
    returns=("total", "y"),
    cases=lambda: [
        rows_of(4, rows=1, block=64, eps=0.5),
        rows_of(72, rows=2, block=64, eps=1e-6),
        rows_of(200, rows=1, block=96, eps=0.1),
        rows_of(77, rows=2, block=64, eps=1e-5, scale=1e-3),
        rows_of(64, rows=3, block=64, eps=2.0, scale=30.0),
        rows_of(1100, rows=1, block=64, eps=1e-3),
        rows_of(40, rows=1, block=512, eps=1e-2),
    ],
    oracle=expected,
    hints=(
        "Two loops over the row, the threads side by side, and between them the one "
        "number that all need. What does the second loop find in `total`, and who "
        "wrote it there?",
        "First loop: the sum, kept in `total[row + i]`, and its square added to a "
        "number of the thread's own. Then `block_sum(squares, scratch)`, called by all "
        "threads, is the sum of squares over the row.",
        "`scale = rsqrt(block_sum(squares, scratch) / float32(width) + eps)`, and in "
        "the second loop `y[row + i] = g[i] * total[row + i] * scale`.",
    ),
    wrong=(
        Wrong(
            "eps outside the root",
            SCALE,
            "scale = 1 / (math.sqrt(block_sum(squares, scratch) / width) + eps)",
            "eps is added to the mean of the squares, inside the root.",
        ),
        Wrong(
            "no eps",
            SCALE,
            "scale = 1 / math.sqrt(block_sum(squares, scratch) / width)",
            "eps keeps tiny rows from being blown up. It is added to the mean of the "
            "squares.",
        ),
        Wrong(
            "a mean over the threads",
            SCALE,
            "scale = 1 / math.sqrt(block_sum(squares, scratch) / cuda.blockDim.x + "
            "eps)",
            "The block has added up `width` squares, however many threads it has.",
        ),
        Wrong(
            "the sum of the squares, not their mean",
            SCALE,
            "scale = 1 / math.sqrt(block_sum(squares, scratch) + eps)",
            "Divide by width: the M in RMS.",
        ),
        Wrong(
            "each thread's own squares",
            SCALE,
            "scale = 1 / math.sqrt(squares / width + eps)",
            "The threads have a part of the row each. block_sum puts the parts "
            "together.",
        ),
        Wrong(
            "no root",
            SCALE,
            "scale = 1 / (block_sum(squares, scratch) / width + eps)",
            "The norm divides by the root of the mean square.",
        ),
        Wrong(
            "the norm of x, not of the sum",
            SUM,
            "a = x[row + i]\n        t = a + residual[row + i]",
            "What goes on is the sum, and the sum is what must be of a known size.",
            ((SQUARES, "squares += a * a"),),
        ),
        Wrong(
            "the norm's size from residual",
            SUM,
            "a = residual[row + i]\n        t = x[row + i] + a",
            "The squares are those of x + residual.",
            ((SQUARES, "squares += a * a"),),
        ),
        Wrong(
            "x scaled instead of the sum",
            RESULT,
            "y[row + i] = g[i] * x[row + i] * scale",
            "What is normalised is the sum of both.",
        ),
        Wrong(
            "both read again",
            RESULT,
            "y[row + i] = g[i] * (x[row + i] + residual[row + i]) * scale",
            "The sum is in `total`, where this very thread has put it: one reading "
            "instead of two.",
        ),
        Wrong(
            "the absolute numbers",
            SQUARES,
            "squares += abs(t)",
            "RMS is the root of the mean of *squares*.",
        ),
        Wrong(
            "the mean taken off, as in LayerNorm",
            RESULT,
            "y[row + i] = g[i] * (total[row + i] - center) * scale",
            "RMSNorm leaves the mean where it is; that is what it saves.",
            (
                ("squares = float32(0)", "squares, own = float32(0), float32(0)"),
                (SQUARES, "squares += t * t\n        own += t"),
                (
                    SCALE,
                    "center = block_sum(own, scratch) / width\n    " + "scale = 1 / "
                    "math.sqrt(block_sum(squares, scratch) / width - center * center "
                    "+ eps)",
                ),
            ),
        ),
        Wrong(
            "the gain taken by the place in the matrix",
            RESULT,
            "y[row + i] = g[row + i] * total[row + i] * scale",
            "g has one number for each column, the same in every row: g[i].",
        ),
        Wrong(
            "no gain",
            RESULT,
            "y[row + i] = total[row + i] * scale",
            "Each column is multiplied by its g.",
        ),
        Wrong(
            "1 + g",
            RESULT,
            "y[row + i] = (1 + g[i]) * total[row + i] * scale",
            "Some models store g - 1. DeepSeek stores g.",
        ),
        Wrong(
            "only as many numbers as threads",
            FIRST,
            "for i in range(thread, min(width, cuda.blockDim.x)):\n        t = ",
            "The row may be longer than the block: each thread goes on in steps of "
            "blockDim.",
            (
                (
                    SECOND,
                    "for i in range(thread, min(width, cuda.blockDim.x)):\n        y[",
                ),
            ),
        ),
        Wrong(
            "a stretch for each thread",
            FIRST,
            "each = -(-width // cuda.blockDim.x)\n"
            "    for i in range(thread * each, min(width, thread * each + each)):\n"
            "        t = ",
            "Each thread then reads from a sector of its own, 4 bytes of 32. Threads "
            "side by side have numbers side by side.",
            (
                (
                    SECOND,
                    "for i in range(thread * each, min(width, thread * each + each)):\n"
                    "        y[",
                ),
            ),
        ),
        Wrong(
            "the sum over the block asked for in the loop",
            SQUARES,
            "squares += block_sum(t * t, scratch)",
            "Threads whose part of the row is shorter leave the loop earlier, and the "
            "barrier inside block_sum waits for them. Add up first, each for itself, "
            "and call it once.",
            ((SCALE, "scale = 1 / math.sqrt(squares / width + eps)"),),
        ),
        Wrong(
            "a scale that is read before it is there",
            SCALE,
            "square = block_sum(squares, scratch)\n"
            "    if thread == 0:\n"
            "        scratch[0] = 1 / math.sqrt(square / width + eps)\n"
            "    scale = scratch[0]",
            "One thread writes it and all read it, with nothing between. Let each "
            "compute it: block_sum tells every thread the sum. Or wait.",
        ),
        Wrong(
            "the scale known to thread 0 alone",
            SCALE,
            "square, scale = block_sum(squares, scratch), float32(0)\n"
            "    if thread == 0:\n"
            "        scale = 1 / math.sqrt(square / width + eps)",
            "A variable is the thread's own. All threads need the scale.",
        ),
        Wrong(
            "total is not written",
            KEPT,
            "y[row + i] = t",
            "Both are asked for: the sum goes on beside the norm, as what the next "
            "addition finds.",
            ((RESULT, "y[row + i] = g[i] * y[row + i] * scale"),),
        ),
        Wrong(
            "total holds the norm",
            RESULT,
            "y[row + i] = total[row + i] = g[i] * total[row + i] * scale",
            "`total` is the sum as it was, not normalised.",
        ),
        Wrong(
            "every block at the first row",
            "width * cuda.blockIdx.x",
            "0 * cuda.blockIdx.x",
            "Row r begins at width * r.",
        ),
    ),
    right=(
        "def add_rmsnorm(x, residual, g, total, y, width, eps):\n"
        "    scratch = cuda.shared.array(32, float32)\n"
        "    mean_square = float32(0)\n"
        "    begin, end = cuda.blockIdx.x * width, (cuda.blockIdx.x + 1) * width\n"
        "    i = begin + cuda.threadIdx.x\n"
        "    while i < end:\n"
        "        total[i] = x[i] + residual[i]\n"
        "        mean_square += total[i] ** 2 / width\n"
        "        i += cuda.blockDim.x\n"
        "    r = rsqrt(block_sum(mean_square, scratch) + eps)\n"
        "    for i in range(begin + cuda.threadIdx.x, end, cuda.blockDim.x):\n"
        "        y[i] = total[i] * r * g[i - begin]\n",
        "def add_rmsnorm(x, residual, g, total, y, width, eps):\n"
        "    parts = cuda.shared.array(1024, float32)\n"
        "    t, n = cuda.threadIdx.x, cuda.blockDim.x\n"
        "    row = cuda.blockIdx.x * width\n"
        "    parts[t] = 0\n"
        "    for i in range(t, width, n):\n"
        "        value = x[row + i] + residual[row + i]\n"
        "        parts[t] += value * value\n"
        "        total[row + i] = y[row + i] = value\n"
        "    cuda.syncthreads()\n"
        "    if t == 0:\n"
        "        for k in range(1, n):\n"
        "            parts[0] += parts[k]\n"
        "        parts[0] = math.sqrt(parts[0] / width + eps)\n"
        "    cuda.syncthreads()\n"
        "    for i in range(t, width, n):\n"
        "        y[row + i] = y[row + i] / parts[0] * g[i]\n",
        "def add_rmsnorm(x, residual, g, total, y, width, eps):\n"
        "    scratch = cuda.shared.array(32, float32)\n"
        "    a, b = cuda.local.array(8, float32), cuda.local.array(8, float32)\n"
        "    row, own = cuda.blockIdx.x * width, float32(0)\n"
        "    if width % 8 == 0:\n"
        "        for i in range(8 * cuda.threadIdx.x, width, 8 * cuda.blockDim.x):\n"
        "            load8(x, row + i, a, 0)\n"
        "            load8(residual, row + i, b, 0)\n"
        "            for e in range(8):\n"
        "                a[e] += b[e]\n"
        "                own += a[e] * a[e]\n"
        "            store8(total, row + i, a, 0)\n"
        "    else:\n"
        "        for i in range(cuda.threadIdx.x, width, cuda.blockDim.x):\n"
        "            total[row + i] = x[row + i] + residual[row + i]\n"
        "            own += total[row + i] * total[row + i]\n"
        "    scale = rsqrt(block_sum(own, scratch) / width + eps)\n"
        "    cuda.syncthreads()\n"
        "    for i in range(cuda.threadIdx.x, width, cuda.blockDim.x):\n"
        "        y[row + i] = g[i] * scale * total[row + i]\n",
    ),
)

CHECKS = [ADD_RMSNORM]
