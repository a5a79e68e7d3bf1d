"""Chapter 10, the gradient of RMSNorm's gain: many rows, one vector, the same bits."""

import numpy as np
from grader.spec import Check, Launch, Limit, Wrong

from checks.draws import normal

APART = "Lanes that read far apart"
SECTORS = "Memory hands over 32 bytes at a time, and of these most are thrown away."


def table(rows: int, width: int) -> Launch:
    """Gradients and inputs; a row of a multiple of 8 begins with a sector."""
    dy, x = (normal(rows * width, seed=rows + k).astype(np.float32) for k in (0, 1))
    r = (0.2 + normal(rows, seed=width) ** 2).astype(np.float32)
    limits = tuple(
        Limit(APART, "sectors", rows * width // 8, array, "read", SECTORS)
        for array in (0, 1)
        if width % 8 == 0
    )
    label = f"{rows} row{'s' * (rows > 1)}, {width} columns"
    args = (dy, x, r, np.zeros(width, np.float32), rows, width)
    return Launch(label, args, -(-width // 32), (32, 8), (3,), limits=limits)


def expected(dy, x, r, dg, rows, width):
    """In float64, by NumPy."""
    dy, x = (a.reshape(rows, width).astype(float) for a in (dy, x))
    return np.einsum("nj,nj,n->j", dy, x, r)


COLUMN = "column = 32 * cuda.blockIdx.x + lane"
GUARD = "    if column < width:\n"
SHARE = "for n in range(share, rows, 8):"
TERM = "part += dy[n * width + column] * x[n * width + column] * r[n]"
LAY = "    parts[share, lane] = part\n    cuda.syncthreads()\n"
LAST = """\
    if share == 0 and column < width:
        for k in range(1, 8):
            part += parts[k, lane]
        dg[column] = part
"""

GAIN_GRADIENT = Check(
    "gpu.cuda.6",
    returns=("dg",),
    cases=lambda: [
        table(3, 2),
        table(18, 40),
        table(9, 31),
    ],
    oracle=expected,
    hints=(
        "One thread per column would do, and read all rows one after the other. Eight "
        "do it in an eighth of the time, if each takes every eighth row. What is left "
        "then of each column, and who adds it up?",
        "`part` is a number of the thread's own: the sum over rows share, share + 8, "
        "… of its column. `parts = cuda.shared.array((8, 32), float32)` holds those of "
        "all, and after a barrier one of the eight threads adds up eight numbers.",
        "`parts[share, lane] = part`, `cuda.syncthreads()`, and then `if share == 0 "
        "and column < width:` add `parts[k, lane]` for k from 1 to 7 and write "
        "`dg[column]`.",
    ),
    wrong=(
        Wrong(
            "an atomic sum in shared memory",
            LAST,
            "    if share > 0:\n"
            "        cuda.atomic.add(parts, (0, lane), part)\n"
            "    cuda.syncthreads()\n"
            "    if share == 0 and column < width:\n"
            "        dg[column] = parts[0, lane]\n",
            "Nothing races, but who comes first decides about the last digits. Add the "
            "eight up in a fixed order.",
        ),
        Wrong(
            "added to what stands in dg",
            LAST,
            "    if column < width:\n        cuda.atomic.add(dg, column, part)\n",
            "Nobody has cleared dg. And where several threads add to one number, the "
            "order of the additions is that of the threads, atomic or not. Let one "
            "thread write each number.",
        ),
        Wrong(
            "eight threads write one number",
            LAST,
            "    if column < width:\n        dg[column] = part\n",
            "Each has an eighth of the rows, and the last one wins. One of them adds "
            "up all eight and writes; even of the same value one thread is to write.",
        ),
        Wrong(
            "no barrier before the eight are added up",
            LAY,
            "    parts[share, lane] = part\n",
            "The other seven may not have laid down theirs yet.",
        ),
        Wrong(
            "idle lanes return before the barrier",
            GUARD,
            "    if column >= width:\n        return\n    if column < width:\n",
            "The barrier waits for all threads of the block, also for those whose "
            "column does not exist.",
        ),
        Wrong(
            "a row for each block",
            SHARE,
            "for n in range(cuda.blockIdx.x, rows, cuda.gridDim.x):",
            "A block owns its columns, and nobody else writes there: all rows are its "
            "own as well, shared among eight threads.",
        ),
        Wrong(
            "every thread takes all rows",
            SHARE,
            "for n in range(rows):",
            "Then each column is added up eight times, eight times over.",
        ),
        Wrong(
            "neighbouring rows for a thread, rounded down",
            SHARE,
            "for n in range(share * (rows // 8), (share + 1) * (rows // 8)):",
            "What is left over by the division, nobody adds.",
        ),
        Wrong(
            "the lanes down the column",
            "lane, share = cuda.threadIdx.x, cuda.threadIdx.y",
            "lane = (cuda.threadIdx.x + 32 * cuda.threadIdx.y) // 8\n"
            "    share = cuda.threadIdx.x % 8",
            "The lanes of a warp then read eight rows, four numbers of each: a sector "
            "for 16 bytes. Let threadIdx.x run along the row.",
        ),
        Wrong(
            "the other rows forgotten",
            LAST,
            "    if share == 0 and column < width:\n        dg[column] = part\n",
            "Thread 0 of the eight has every eighth row. The other sums are in shared "
            "memory.",
        ),
        Wrong(
            "the first counted twice",
            LAST,
            LAST.replace("range(1, 8)", "range(8)"),
            "`part` already is what stands in parts[0, lane].",
        ),
        Wrong(
            "the last of the eight forgotten",
            LAST,
            LAST.replace("range(1, 8)", "range(1, 7)"),
            "There are eight shares, from 0 to 7.",
        ),
        Wrong(
            "one eighth of the columns",
            COLUMN,
            "column = 32 * 8 * cuda.blockIdx.x + lane",
            "A block has 256 threads and 32 columns: block b begins at 32 b.",
        ),
        Wrong(
            "x as it was, not scaled",
            TERM,
            "part += dy[n * width + column] * x[n * width + column]",
            "What g was multiplied with is the normalised x: x times the factor of "
            "its row.",
        ),
        Wrong(
            "without x",
            TERM,
            "part += dy[n * width + column] * r[n]",
            "The gradient of a factor is what arrives times the other factor: the "
            "normalised x.",
        ),
        Wrong(
            "divided by the factor",
            TERM,
            "part += dy[n * width + column] * x[n * width + column] / r[n]",
            "r holds the factor by which the row was multiplied, one over the root.",
        ),
        Wrong(
            "the factor squared",
            TERM,
            "part += dy[n * width + column] * x[n * width + column] * r[n] * r[n]",
            "x was scaled once.",
        ),
        Wrong(
            "a factor for each column",
            TERM,
            "part += dy[n * width + column] * x[n * width + column] * r[column]",
            "r has a number for each row.",
        ),
        Wrong(
            "the mean over the rows",
            LAST,
            LAST.replace("dg[column] = part", "dg[column] = part / rows"),
            "All rows' messages add; a mean is taken where the loss takes one.",
        ),
        Wrong(
            "the matrix column by column",
            TERM,
            "part += dy[column * rows + n] * x[column * rows + n] * r[n]",
            "The rows lie one behind the other: row n begins at n * width.",
        ),
    ),
    right=(
        "def gain_gradient(dy, x, r, dg, rows, width):\n"
        "    parts = cuda.shared.array(256, float32)\n"
        "    t = 32 * cuda.threadIdx.y + cuda.threadIdx.x\n"
        "    column = cuda.blockIdx.x * 32 + cuda.threadIdx.x\n"
        "    parts[t] = 0\n"
        "    n = cuda.threadIdx.y\n"
        "    while n < rows and column < width:\n"
        "        at = n * width + column\n"
        "        parts[t] += r[n] * x[at] * dy[at]\n"
        "        n += cuda.blockDim.y\n"
        "    half = 128\n"
        "    while half >= 32:\n"
        "        cuda.syncthreads()\n"
        "        if t < half:\n"
        "            parts[t] += parts[t + half]\n"
        "        half //= 2\n"
        "    if t < 32 and column < width:\n"
        "        dg[column] = parts[t]\n",
        "def gain_gradient(dy, x, r, dg, rows, width):\n"
        "    parts = cuda.shared.array((32, 9), float32)\n"
        "    column = cuda.blockIdx.x * 32 + cuda.threadIdx.x\n"
        "    first = rows * cuda.threadIdx.y // 8\n"
        "    own = float32(0)\n"
        "    for n in range(first, rows * (cuda.threadIdx.y + 1) // 8):\n"
        "        if column < width:\n"
        "            own += dy[n * width + column] * (x[n * width + column] * r[n])\n"
        "    parts[cuda.threadIdx.x, cuda.threadIdx.y] = own\n"
        "    cuda.syncthreads()\n"
        "    if cuda.threadIdx.y == 7 and column < width:\n"
        "        for k in range(7):\n"
        "            own += parts[cuda.threadIdx.x, k]\n"
        "        dg[column] = own\n",
        "def gain_gradient(dy, x, r, dg, rows, width):\n"
        "    column = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x\n"
        "    if cuda.threadIdx.y == 0 and column < width:\n"
        "        dg[column] = 0\n"
        "    for share in range(8):  # one after the other, at a barrier each\n"
        "        own = float32(0)\n"
        "        if cuda.threadIdx.y == share and column < width:\n"
        "            for n in range(share, rows, 8):\n"
        "                own += dy[n * width + column] * x[n * width + column] * r[n]\n"
        "        cuda.syncthreads()\n"
        "        if cuda.threadIdx.y == share and column < width:\n"
        "            dg[column] += own\n",
    ),
)

CHECKS = [GAIN_GRADIENT]
