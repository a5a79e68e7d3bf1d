# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Exercises to chapter 11 · Measuring
#
# Two small functions that are needed before anything is said of a kernel's speed: how
# many of its blocks a multiprocessor holds at a time, and what one launch takes when
# the clock cannot be read between two. Neither needs a GPU.

# %%
import numpy as np
from grader import check, check_all, hint

# %% [markdown]
# ## measure.1 · Who fits in
#
# A multiprocessor hides the time that memory takes by having other warps to go on with.
# It takes in whole blocks while it has room for all that they need. On an H100, by
# NVIDIA's `cuda_occupancy.h` for compute capability 9.0, three things run out:
#
# * It holds up to 64 warps, a warp being 32 threads.
# * It has 65,536 registers. A warp takes them for all its 32 threads at once, in units
#   of 256.
# * It has 233,472 bytes of shared memory. A block takes what it asks for and 1,024
#   bytes for the system, both together rounded up to a multiple of 128.
#
# A block has `threads` threads, a multiple of 128; a thread takes `registers`
# registers, at least one, and the block asks for `shared` bytes. (Smaller blocks meet
# further rules: there are no more than 32 at a time, and a multiprocessor consists of
# four parts with registers of their own.) Return how many blocks there are at a time,
# and the *occupancy*: the warps that are there as a part of the 64 that could be. Where
# not even one block fits, that is 0 and 0.0.


# %%
# exercise: measure.1
def resident(threads, registers, shared):
    """Blocks at a time and occupancy: three integers -> an integer, a number."""
    ### BEGIN SOLUTION
    warps = threads // 32
    of_a_warp = -(-32 * registers // 256) * 256
    of_a_block = -(-(shared + 1024) // 128) * 128
    blocks = min(64 // warps, 65_536 // of_a_warp // warps, 233_472 // of_a_block)
    return blocks, blocks * warps / 64
    ### END SOLUTION


# %% [markdown]
# ## measure.2 · What one launch takes
#
# A launch takes microseconds, and so does whatever reads the clock: the two cannot be
# told apart by timing one. So start n of them in a row and read the clock before and
# after. What the reading costs is there once, a launch n times,
#
# $$ t(n) = a + b\,n , $$
#
# and b is what one launch takes, whatever a is. `seconds[k]` holds several timings of
# `counts[k]` launches. Now and then something else runs in between; of the timings of
# one count take the median, which a few bad ones do not move. Through the K medians put
# the straight line with the least squared distances, all counts weighing the same.
#
# A launch moves `moved` bytes, and the memory can move `bandwidth` bytes a second.
# Return a, b, and the part of the bandwidth that a launch uses. It comes out above 1
# where the bytes came from a cache, or were counted wrongly: say so, do not hide it.


# %%
# exercise: measure.2
def per_launch(counts, seconds, moved, bandwidth):
    """The line through the timings: counts (K,), seconds (K, R), two numbers.

    -> seconds beside the launches, seconds a launch, part of the bandwidth.
    """
    ### BEGIN SOLUTION
    t = np.median(seconds, axis=1)  # (K,)
    n = counts - counts.mean()
    b = np.sum(n * t) / np.sum(n * n)
    a = t.mean() - b * counts.mean()
    return a, b, moved / b / bandwidth
    ### END SOLUTION


# %% [markdown]
# When both have passed, look at a kernel whose threads take more and more registers.
# **Predict** first: blocks have 256 threads and ask for 16 KB of shared memory. Which
# of its limits does it meet at 32 registers, and which at 128? Is there a number of
# registers at which one more costs a quarter of all warps?
#
# Below that, your line through timings of this machine's own memory: one number added
# to itself, and a million. How much of what a single timing of the small one says is
# the clock and the loop?

# %%
import time

from grader import passed


def trial(threads=256, shared=16 * 1024):
    """Registers and who is resident; then two additions, timed."""
    print("registers  blocks  occupancy")
    for registers in (32, 40, 41, 64, 65, 96, 128, 129, 168, 169, 255):
        blocks, occupancy = resident(threads, registers, shared)
        print(f"{registers:9}{blocks:8}{occupancy:11.0%}")
    print("\nnumbers     us a call   us beside it")
    counts = np.array([1, 2, 4, 8, 16])
    for size in (1, 1_000_000):
        x, y = np.ones(size), np.empty(size)
        seconds = np.array([[timed(n, x, y) for _ in range(9)] for n in counts])
        beside, each, _ = per_launch(counts, seconds, 3 * x.nbytes, 1e10)
        print(f"{size:<9}{1e6 * each:12.2f}{1e6 * beside:15.2f}")


def timed(n, x, y):
    """Seconds for n additions."""
    began = time.perf_counter()
    for _ in range(n):
        np.add(x, x, out=y)
    return time.perf_counter() - began


if passed("measure.1") and passed("measure.2"):
    trial()

# %% [markdown]
# ## How far you are

# %%
check_all()
