"""Chapter 10, a transpose through shared memory: what is moved is counted."""

import numpy as np
from grader.spec import Check, Launch, Limit, Wrong

from checks.draws import normal

READS = "Reads of x that are mostly thrown away"
WRITES = "Writes to y into a sector each"
BANKS = "Lanes that wait for each other at a bank"
SECTORS = "Memory moves 32 bytes at a time: lanes side by side want neighbours."
APART = "Numbers that are a multiple of 32 apart in a tile are in one bank."


def matrix(rows: int, columns: int, tight: bool = False) -> Launch:
    """A matrix in as many tiles as it needs; tight: sectors and banks are counted."""
    x = normal(rows * columns, seed=rows + columns).astype(np.float32)
    label = f"{rows} rows, {columns} columns"
    sectors = 4 * rows * columns // 32
    limits = (
        Limit(READS, "sectors", sectors, 0, "read", SECTORS),
        Limit(WRITES, "sectors", sectors, 1, "write", SECTORS),
        Limit(BANKS, "conflicts", 0, why=APART),
    )
    args = (x, np.zeros_like(x), rows, columns)
    grid = (-(-columns // 32), -(-rows // 32))
    return Launch(label, args, grid, (32, 8), (1,), limits=limits if tight else ())


def expected(x, y, rows, columns):
    """NumPy's own."""
    return x.reshape(rows, columns).T.ravel()


TILE = "(32, 33)"
BARRIER = "    cuda.syncthreads()\n"
READ_GUARD = "if top + k < rows and left + lane < columns:"
READ = "tile[k, lane] = x[(top + k) * columns + left + lane]"
WRITE_GUARD = "if left + k < columns and top + lane < rows:"
WRITE = "y[(left + k) * rows + top + lane] = tile[lane, k]"
ROW_BY_ROW = "That is where x has its rows; those of y have `rows` numbers."

TRANSPOSE = Check(
    "gpu.cuda.2",
    returns=("y",),
    cases=lambda: [
        matrix(2, 3),
        matrix(32, 16, tight=True),
        matrix(40, 9),
        matrix(8, 64, tight=True),
    ],
    oracle=expected,
    hints=(
        "A block does two things with a barrier between them: it copies a piece of x "
        "as it is into the tile, and copies the tile turned over to y. In both, lanes "
        "side by side have addresses in global memory side by side.",
        "With `left = 32 * cuda.blockIdx.x`, `top = 32 * cuda.blockIdx.y` and k from "
        "`cuda.threadIdx.y` in steps of 8: read x at row top + k, column left + lane; "
        "write y at row left + k, column top + lane. Each has its own guard.",
        "`tile = cuda.shared.array((32, 33), float32)`; `tile[k, lane] = x[(top + k) * "
        "columns + left + lane]`; `cuda.syncthreads()`; `y[(left + k) * rows + top + "
        "lane] = tile[lane, k]`.",
    ),
    wrong=(
        Wrong(
            "a tile without padding",
            TILE,
            "(32, 32)",
            "Down a column of 32 numbers a row, all 32 lanes are in one bank and go "
            "one after the other. Rows of 33 put them into 32 banks.",
        ),
        Wrong(
            "a padding that is even",
            TILE,
            "(32, 34)",
            "34 and 32 have a divisor in common, so two lanes of a column still meet "
            "in each bank. Take 33.",
        ),
        Wrong(
            "turned over on the way out",
            WRITE,
            "y[(left + lane) * rows + top + k] = tile[k, lane]",
            "Lanes side by side write `rows` numbers apart, each into a sector of its "
            "own. Turn over in the tile: read its columns, write rows of y.",
            ((WRITE_GUARD, "if left + lane < columns and top + k < rows:"),),
        ),
        Wrong(
            "turned over on the way in",
            READ,
            "tile[lane, k] = x[(top + lane) * columns + left + k]",
            "Lanes side by side read `columns` numbers apart, and of each sector 4 "
            "bytes of 32 are used. Read rows of x.",
            ((READ_GUARD, "if top + lane < rows and left + k < columns:"),),
        ),
        Wrong(
            "no barrier",
            BARRIER,
            "",
            "A thread empties what others fill. Until all have filled the tile, nobody "
            "may read it.",
        ),
        Wrong(
            "idle threads return before the barrier",
            BARRIER,
            "    if left + lane >= columns:\n        return\n" + BARRIER,
            "They still have to come to the barrier, and they may have something to "
            "write: skip the work, not the way.",
        ),
        Wrong(
            "the tile copied as it was",
            WRITE,
            "y[(left + k) * rows + top + lane] = tile[k, lane]",
            "The tile goes to its new place, and inside it nothing is turned over: "
            "read tile[lane, k].",
        ),
        Wrong(
            "the tile turned over in its old place",
            WRITE,
            "y[(top + k) * rows + left + lane] = tile[lane, k]",
            "Each tile is transposed and put where it was. The block with first row "
            "`top` of x writes the first column `top` of y.",
        ),
        Wrong(
            "rows of y as long as those of x",
            WRITE,
            "y[(left + k) * columns + top + lane] = tile[lane, k]",
            ROW_BY_ROW,
        ),
        Wrong(
            "rows of x as long as those of y",
            READ,
            "tile[k, lane] = x[(top + k) * rows + left + lane]",
            "A row of x has `columns` numbers.",
        ),
        Wrong(
            "one guard for both",
            WRITE_GUARD,
            "if top + k < rows and left + lane < columns:",
            "Writing, the thread stands at another place: row left + k of y, column "
            "top + lane. Of the last tiles something is left out, or read unfilled.",
        ),
        Wrong(
            "no guard for reading",
            READ_GUARD,
            "if True:",
            "The last tiles stick out of the matrix.",
        ),
        Wrong(
            "no guard for writing",
            WRITE_GUARD,
            "if True:",
            "The last tiles stick out of the matrix.",
        ),
        Wrong(
            "blockIdx.x for the rows",
            "left, top = 32 * cuda.blockIdx.x, 32 * cuda.blockIdx.y",
            "left, top = 32 * cuda.blockIdx.y, 32 * cuda.blockIdx.x",
            "Block (i, j) has the tile whose first row is 32 j and whose first column "
            "is 32 i: x runs along the rows.",
        ),
        Wrong(
            "a quarter of the tile",
            "for k in range(cuda.threadIdx.y, 32, 8):\n        if left",
            "for k in range(cuda.threadIdx.y, 8, 8):\n        if left",
            "A block has 8 rows of threads and a tile 32 rows of numbers: four for "
            "each thread, filling and emptying.",
        ),
    ),
    right=(
        "def transpose(x, y, rows, columns):\n"
        "    tile = cuda.shared.array(32 * 33, float32)\n"
        "    row, column = 32 * cuda.blockIdx.y, 32 * cuda.blockIdx.x\n"
        "    i, j = cuda.threadIdx.x, cuda.threadIdx.y\n"
        "    for k in range(0, 32, 8):\n"
        "        r, c = row + j + k, column + i\n"
        "        if r < rows and c < columns:\n"
        "            tile[i * 33 + j + k] = x[r * columns + c]\n"
        "    cuda.syncthreads()\n"
        "    for k in range(0, 32, 8):\n"
        "        r, c = column + j + k, row + i\n"
        "        if r < columns and c < rows:\n"
        "            y[r * rows + c] = tile[(j + k) * 33 + i]\n",
        "def transpose(x, y, rows, columns):\n"
        "    tile = cuda.shared.array((32, 32), float32)\n"
        "    i, j = cuda.threadIdx.x, cuda.threadIdx.y\n"
        "    for k in range(j, 32, 8):  # the banks of row k begin k further on\n"
        "        r, c = 32 * cuda.blockIdx.y + k, 32 * cuda.blockIdx.x + i\n"
        "        if r < rows and c < columns:\n"
        "            tile[k, i ^ k] = x[r * columns + c]\n"
        "    cuda.syncthreads()\n"
        "    for k in range(j, 32, 8):\n"
        "        r, c = 32 * cuda.blockIdx.x + k, 32 * cuda.blockIdx.y + i\n"
        "        if r < columns and c < rows:\n"
        "            y[r * rows + c] = tile[i, k ^ i]\n",
        "def transpose(x, y, rows, columns):\n"
        "    tile = cuda.shared.array((32, 35), np.float32)\n"
        "    lane, first = cuda.threadIdx.x, cuda.threadIdx.y\n"
        "    column = cuda.blockIdx.x * 32 + lane\n"
        "    if column < columns:\n"
        "        for k in range(first, min(32, rows - 32 * cuda.blockIdx.y), 8):\n"
        "            place = (cuda.blockIdx.y * 32 + k) * columns + column\n"
        "            tile[k, lane] = x[place]\n"
        "    cuda.syncthreads()\n"
        "    row = cuda.blockIdx.y * 32 + lane\n"
        "    if row < rows:\n"
        "        for k in range(first, min(32, columns - 32 * cuda.blockIdx.x), 8):\n"
        "            y[(cuda.blockIdx.x * 32 + k) * rows + row] = tile[lane, k]\n",
    ),
)

CHECKS = [TRANSPOSE]
