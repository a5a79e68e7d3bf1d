# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Exercises to chapter 10 · A GPU in an afternoon
#
# Six kernels, none of them longer than a screen. You need no GPU. The grader runs them
# in the book's simulator, one thread after the other: once in rising order, once in
# falling order, and once in an order drawn by lot. It reports what a GPU lets pass: two
# threads that touch one number with nothing between them, an index outside its array, a
# barrier that some threads never reach, shared memory that is read before anybody wrote
# to it. Where there is a card, the kernel runs there as well.
#
# A kernel is a plain function, without a decorator, and returns nothing. Arrays have
# one axis; the rows of a matrix lie one behind the other. All numbers are float32, all
# sizes Python integers. Results are compared to four digits: a float32 has seven, and
# each order of adding costs others of them. On a GPU a float32 divided by an integer is
# a float64, and slow: `/ float32(width)`. Where readings are counted, every `x[i]` that
# you write is one: keep what you need again in a variable. Before the launch the
# results are full of NaN: where one is left, nobody wrote, or somebody added to what
# stood there.
#
# To run a kernel by hand: `launch(axpy, 2, 64, float32(3), x, y, z, len(x))` starts 2
# blocks of 64 threads on NumPy arrays.

# %%
import math

import numpy as np
from grader import check, check_all, hint
from numpy import float32, uint32

from minidsv3.gpu.intrinsics import exp2, load8, rsqrt, store8
from minidsv3.gpu.reductions import block_sum
from minidsv3.gpu.simulator import cuda, launch

# %% [markdown]
# ## gpu.cuda.1 · However many threads there are
#
# For the first n numbers of three arrays,
#
# $$ z_i = a\,x_i + y_i . $$
#
# The grid may have fewer threads than there are numbers, or more, and the kernel must
# not care. So a thread takes its own number, and then every further one at a distance
# of as many as the whole grid has threads, while there are any: a *grid-stride loop*.
# Neighbouring threads then ask for neighbouring numbers at the same time, which memory
# hands over 32 bytes at a time. A thread that takes a stretch for itself computes the
# same, and moves up to eight times as many bytes; sectors are counted.
#
# The arrays may be longer than n, and what lies behind is not yours to write. n may be
# 0.


# %%
# exercise: gpu.cuda.1
def axpy(a, x, y, z, n):
    """z = a x + y for the first n numbers: a a number, x, y, z (n or more,)."""
    ### BEGIN SOLUTION
    for i in range(cuda.grid(1), n, cuda.gridsize(1)):
        z[i] = a * x[i] + y[i]
    ### END SOLUTION


# %% [markdown]
# ## gpu.cuda.2 · Turned over in a tile
#
# `x` holds a matrix of `rows` by `columns`, row by row. Write its transpose to `y`:
# `columns` rows of `rows` numbers. Whoever reads along the rows of `x` writes down the
# columns of `y`, each number into a sector of its own, and whoever writes along the
# rows reads down the columns.
#
# A block gets out of this with a tile of 32 by 32 numbers in shared memory, where
# nothing is far. It fills the tile along the rows of `x`, waits, and empties it along
# the rows of `y`. There is one more trap. Shared memory has 32 banks, and the numbers
# of a column 32 apart are all in one: 32 lanes that read down a column wait for each
# other. In a tile with rows of 33 numbers they do not.
#
# Blocks have 32 × 8 threads, x by y, so each thread takes four numbers. Block (i, j)
# has the tile whose first row is 32 j and whose first column is 32 i. The last tiles
# stick out. Sectors and bank conflicts are counted: what is moved must be all of use,
# reading and writing, and no lane may wait for another.


# %%
# exercise: gpu.cuda.2
def transpose(x, y, rows, columns):
    """The transpose of a matrix: x (rows * columns,) -> y (columns * rows,)."""
    ### BEGIN SOLUTION
    tile = cuda.shared.array((32, 33), float32)
    left, top = 32 * cuda.blockIdx.x, 32 * cuda.blockIdx.y
    lane = cuda.threadIdx.x
    for k in range(cuda.threadIdx.y, 32, 8):
        if top + k < rows and left + lane < columns:
            tile[k, lane] = x[(top + k) * columns + left + lane]
    cuda.syncthreads()
    for k in range(cuda.threadIdx.y, 32, 8):
        if left + k < columns and top + lane < rows:
            y[(left + k) * rows + top + lane] = tile[lane, k]
    ### END SOLUTION


# %% [markdown]
# ## gpu.cuda.3 · Half of them add, then half of those
#
# The threads of a block have a number each, and want to know the sum. They lay them
# side by side into shared memory; then the front half adds what the back half has, then
# half of the front half, until one number is left. That takes as many rounds as the
# number of threads can be halved, and between two rounds everybody waits.
#
# Write `total`. The kernel below it is given and stays as it is. It calls `total` twice
# with the same `scratch`, for the mean of a row and for the mean of the squared
# distances from it,
#
# $$ \mu = \frac1W \sum_i x_i, \qquad v = \frac1W \sum_i (x_i - \mu)^2 . $$
#
# Every thread needs the sum, and the second call begins at once. A block has any number
# of threads from 1 to 256, and that need not be a power of two. One thread that adds up
# all the others is no answer: how often shared memory is asked is counted.


# %%
# exercise: gpu.cuda.3
def total(value, scratch):
    """The sum of value over the block, in every thread: scratch (256,) is shared."""
    ### BEGIN SOLUTION
    thread, active = cuda.threadIdx.x, cuda.blockDim.x
    scratch[thread] = value
    cuda.syncthreads()
    while active > 1:
        half = (active + 1) // 2  # of an odd number one is left over, and waits
        if thread < active - half:
            scratch[thread] += scratch[thread + half]
        cuda.syncthreads()
        active = half
    answer = scratch[0]
    cuda.syncthreads()  # until all have read it
    return answer
    ### END SOLUTION


def statistics(x, mean, variance, width):
    """Of each row: x (rows * width,) -> mean, variance (rows,); a block a row."""
    scratch = cuda.shared.array(256, float32)
    first, own = width * cuda.blockIdx.x, float32(0)
    for i in range(cuda.threadIdx.x, width, cuda.blockDim.x):
        own += x[first + i]
    center = total(own, scratch) / float32(width)
    own = float32(0)
    for i in range(cuda.threadIdx.x, width, cuda.blockDim.x):
        own += (x[first + i] - center) * (x[first + i] - center)
    spread = total(own, scratch) / float32(width)
    if cuda.threadIdx.x == 0:
        mean[cuda.blockIdx.x] = center
        variance[cuda.blockIdx.x] = spread


# %% [markdown]
# ## gpu.cuda.4 · The maximum that changes its mind
#
# A softmax needs of each row its largest number $m$ and the logarithm of a sum,
#
# $$ m = \max_i x_i, \qquad \ell = m + \log \sum_i e^{x_i - m} . $$
#
# Without $m$ the exponentials overflow, and so the row seems to have to be read twice.
# Once is enough. A lane keeps of what it has seen the pair $(m, s)$ with
# $s = \sum e^{x_i - m}$. Where a larger number comes, all that it has added so far
# shrinks by $e^{m_\text{old} - m_\text{new}}$. Two lanes put their pairs together in
# the same way: the larger $m$ holds, and each sum is brought to it first.
#
# Each *warp* takes a row: warp w of all warps of the grid takes row w, and there may be
# warps without one. The lanes put their pairs together by shuffles, in five steps,
# without shared memory. Rows may be shorter than 32 and longer; every row has at least
# one number, and numbers may be $-\infty$, but never all of a row. `x` must not be read
# twice, and lanes side by side read numbers side by side: bytes and sectors are
# counted. Use `math.exp` and `math.log`.


# %%
# exercise: gpu.cuda.4
def log_sum_exp(x, m, l, rows, width):
    """Maximum and log-sum-exp of each row: x (rows * width,) -> m, l (rows,)."""
    ### BEGIN SOLUTION
    row, lane = cuda.grid(1) // 32, cuda.threadIdx.x % 32
    if row >= rows:
        return  # the whole warp
    high, s = float32(-3.4e38), float32(0)  # lower than any, and finite
    for i in range(lane, width, 32):
        value = x[row * width + i]
        top = max(high, value)
        s = s * math.exp(high - top) + math.exp(value - top)
        high = top
    for distance in (16, 8, 4, 2, 1):
        other = cuda.shfl_xor_sync(0xFFFFFFFF, high, distance)
        theirs = cuda.shfl_xor_sync(0xFFFFFFFF, s, distance)
        top = max(high, other)
        s = s * math.exp(high - top) + theirs * math.exp(other - top)
        high = top
    if lane == 0:
        m[row] = high
        l[row] = high + math.log(s)
    ### END SOLUTION


# %% [markdown]
# ## gpu.cuda.5 · Add and normalise, in one go
#
# In front of each norm of a Transformer stands an addition: `x` is what a layer has
# found out, `residual` what was there before. Both results are needed, the sum and its
# RMSNorm,
#
# $$
# t_i = x_i + r_i, \qquad
# y_i = g_i\, \frac{t_i}{\sqrt{\frac1W \sum_j t_j^2 + \varepsilon}} .
# $$
#
# A block takes a row of `width` numbers, W in the formula; `width` need not be a
# multiple of the number of threads. Those are a multiple of 32, at most 512. Read `x`
# and `residual` once: the second time, what you need is in `total`. `block_sum(value,
# scratch)`, from the first cell, returns the sum over the block to every thread. It
# must be called by all of them, with `scratch = cuda.shared.array(32, float32)`. Bytes
# are counted, and sectors: threads side by side have numbers side by side.


# %%
# exercise: gpu.cuda.5
def add_rmsnorm(x, residual, g, total, y, width, eps):
    """x, residual (rows * width,), g (width,) -> total, y (rows * width,).

    eps is a number. As many blocks as there are rows.
    """
    ### BEGIN SOLUTION
    scratch = cuda.shared.array(32, float32)
    thread, row = cuda.threadIdx.x, width * cuda.blockIdx.x
    squares = float32(0)
    for i in range(thread, width, cuda.blockDim.x):
        t = x[row + i] + residual[row + i]
        total[row + i] = t
        squares += t * t
    scale = rsqrt(block_sum(squares, scratch) / float32(width) + eps)
    for i in range(thread, width, cuda.blockDim.x):
        y[row + i] = g[i] * total[row + i] * scale
    ### END SOLUTION


# %% [markdown]
# ## gpu.cuda.6 · The same bits every time
#
# On the way back through RMSNorm every row has something to say to the one gain that
# they share,
#
# $$ dg_j = \sum_n dy_{n,j}\, x_{n,j}\, \rho_n , $$
#
# where $\rho_n$ is the factor by which row n was scaled; `r` holds it. If each row had
# a block, all of them would add to one vector. `cuda.atomic.add` makes that safe, and
# makes the last digits depend on who comes first: floats do not add up to the same in
# every order. A training run could never be repeated.
#
# So give each block *columns* of its own, 32 of them: block b takes the columns from
# 32 b on, and the last block may have fewer. It has 32 × 8 threads, x by y. Lanes side
# by side read numbers side by side; the eight threads of a column share the rows, and
# at the end their eight sums are added up in an order that is always the same. In every
# order of the threads `dg` must have the same bits, and sectors are counted.


# %%
# exercise: gpu.cuda.6
def gain_gradient(dy, x, r, dg, rows, width):
    """The gradient of g: dy, x (rows * width,), r (rows,) -> dg (width,)."""
    ### BEGIN SOLUTION
    parts = cuda.shared.array((8, 32), float32)
    lane, share = cuda.threadIdx.x, cuda.threadIdx.y
    column = 32 * cuda.blockIdx.x + lane
    part = float32(0)
    if column < width:
        for n in range(share, rows, 8):
            part += dy[n * width + column] * x[n * width + column] * r[n]
    parts[share, lane] = part
    cuda.syncthreads()
    if share == 0 and column < width:
        for k in range(1, 8):
            part += parts[k, lane]
        dg[column] = part
    ### END SOLUTION


# %% [markdown]
# When gpu.cuda.2 has passed, put it beside a kernel that has the same results and no
# tile. **Predict** first. The matrix is 64 by 64, of 4 bytes a number: how many sectors
# of 32 bytes must be read at least, and how many written? How many does the plain
# kernel move? And if your tile had rows of 32 numbers instead of 33, where would you
# see it?

# %%
from grader import passed


def plain_transpose(x, y, rows, columns):
    """No tile: reads along the rows, and writes down the columns."""
    column = 32 * cuda.blockIdx.x + cuda.threadIdx.x
    for k in range(cuda.threadIdx.y, 32, 8):
        row = 32 * cuda.blockIdx.y + k
        y[column * rows + row] = x[row * columns + column]


def trial(size=64):
    """What the two ask of memory, line by line."""
    x, y = np.arange(size**2, dtype=float32), np.zeros(size**2, float32)
    for kernel in (plain_transpose, transpose):
        stats = launch(
            kernel, (size // 32, size // 32), (32, 8), x, y, size, size, count=True
        )
        print(f"{kernel.__name__}\n{stats.table()}\n")


if passed("gpu.cuda.2"):
    trial()

# %% [markdown]
# ## How far you are

# %%
check_all()
