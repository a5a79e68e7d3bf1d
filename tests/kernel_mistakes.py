"""Mistakes in reductions and in RMSNorm, for `test_cuda_kernel_mistakes`.

A row: the module, the function that is changed, the kernel whose cases then run, what
they end in, and the lines, right and wrong.
"""

from minidsv3.gpu import reductions as R
from minidsv3.gpu.simulator import (
    AlignmentError,
    BoundsError,
    DivergenceError,
    RaceError,
    UninitialisedError,
)
from minidsv3.primitives import fast_cuda_kernels as F
from minidsv3.primitives import plain_cuda_kernels as P

Bounds, Race, Numbers = BoundsError, RaceError, AssertionError
Diverged, Unwritten, Misaligned = DivergenceError, UninitialisedError, AlignmentError

ADD = "            scratch[thread] += scratch[thread + active]\n"
BARRIER = "        cuda.syncthreads()\n"
LAST = "    cuda.syncthreads()  # nobody may fill scratch anew before all have read\n"
FILL = "    scratch[thread] = x\n    cuda.syncthreads()\n"
HEAD, TREES = "active = THREADS // 2", "over_trees"
TREE = {
    "no barrier after filling": (P, "tree_sum", TREES, Race, (FILL, FILL[:24])),
    "no barrier in a round": (P, "tree_sum", TREES, Race, (ADD + BARRIER, ADD)),
    "no barrier before scratch is used again": (P, "tree_sum", TREES, Race, (LAST, "")),
    "a barrier for those who add": (
        P, "tree_sum", TREES, Race, (ADD + BARRIER, ADD + "    " + BARRIER)),
    "a barrier for half of the block": (
        P, "tree_sum", TREES, Diverged, (LAST, "    if thread < 64:\n    " + LAST)),
    "a round too many": (P, "tree_sum", TREES, Bounds, (HEAD, "active = THREADS")),
    "a round too few": (
        P, "tree_sum", TREES, Numbers, ("while active > 0", "while active > 1")),
    "half of the block only": (P, "tree_sum", TREES, Numbers, (HEAD, HEAD[:-1] + "4")),
    "the smallest": (P, "tree_max", TREES, Numbers, ("max(scratch", "min(scratch")),
    "everyone adds": (
        P, "tree_sum", TREES, Bounds, ("if thread < active", "if thread < THREADS")),
}  # fmt: skip

FIRST = "    if thread & uint32(31) == uint32(0):\n"
LEFT = "scratch[thread >> uint32(5)] = x\n"
BLOCKS, WARPS = "over_blocks", "over_warps"
TOTAL = "    total = float32(0)\n"
LOOP = "    for warp in range(uint32(cuda.blockDim.x) >> uint32(5)):\n        total"
REDUCED = {
    "no barrier after the warps' sums": (
        R, "block_sum", BLOCKS, Race, ("    cuda.syncthreads()\n" + TOTAL, TOTAL)),
    "no barrier before scratch is used again": (
        R, "block_sum", BLOCKS, Race,
        ("+= scratch[warp]\n    cuda.syncthreads()", "+= scratch[warp]")),
    "no barrier after the warps' maxima": (
        R, "block_max", BLOCKS, Race,
        ("    cuda.syncthreads()\n    largest", "    largest")),
    "maxima: no barrier before scratch is used again": (
        R, "block_max", BLOCKS, Race,
        ("scratch[warp])\n    cuda.syncthreads()", "scratch[warp])")),
    "every lane writes its warp's sum": (
        R, "block_sum", BLOCKS, Race, (FIRST, "    if True:\n")),
    "only the first thread writes its warp's sum": (
        R, "block_sum", BLOCKS, Unwritten, (FIRST, "    if thread == 0:\n")),
    "all places of scratch read": (
        R, "block_sum", BLOCKS, Unwritten, (LOOP, LOOP.replace(
            "uint32(cuda.blockDim.x) >> uint32(5)", "32"))),
    "the last warp left out": (
        R, "block_sum", BLOCKS, Numbers,
         (LOOP, LOOP.replace(">> uint32(5)", "- 1 >> uint32(5)"))),
    "warps of 16": (
        R, "block_sum", BLOCKS, Race, (LEFT, LEFT.replace("5", "6"))),
    "a place for each thread": (
        R, "block_sum", BLOCKS, Bounds, (LEFT, "scratch[thread] = x\n")),
    "a maximum from zero": (
        R, "block_max", BLOCKS, Numbers, ("largest = LOWEST", "largest = float32(0)")),
    "sums of 16 lanes": (R, "warp_sum", WARPS, Numbers, ("(16, 8,", "(8,")),
    "maxima of neighbours left out": (
        R, "warp_max", WARPS, Numbers, ("2, 1)", "2)")),
    "a lane counted twice": (R, "warp_sum", WARPS, Numbers, ("16, 8", "16, 16")),
    "a sum in the first lane only": (
        R, "warp_sum", WARPS, Numbers, ("shfl_xor_sync", "shfl_down_sync")),
    "half of the lanes in the mask": (
        R, "warp_sum", WARPS, Diverged, ("FULL_MASK", "0xFFFF")),
    "only the lanes that have something exchange": (
        R, "warp_sum", WARPS, Diverged, ("        x +=", "        if x > 0: x +=")),
}  # fmt: skip

SCALE = "rsqrt(tree_sum(squares, scratch) * inverse + eps)"
SCALED = "rsqrt(block_sum(squares, scratch) * inverse + eps)"
FIRST_ONE = "if cuda.threadIdx.x == 0:"
NORM, BACK = "rmsnorm_plain", "rmsnorm_backward_plain"
SHARED = "tree_sum(dot, scratch) * inverse * scale * scale"
STEP = "uint32(cuda.blockDim.x)"
PLAIN_NORM = {
    "a sum, no mean": (
        P, NORM, NORM, Numbers, (SCALE, SCALE.replace("* inverse ", ""))),
    "no eps": (P, NORM, NORM, Numbers, (SCALE, SCALE.replace(" + eps", ""))),
    "eps outside": (P, NORM, NORM, Numbers, (SCALE, SCALE[:-7] + ") + eps")),
    "eps in the mean": (
        P, NORM, NORM, Numbers, (SCALE, SCALE.replace("* inverse + eps", "+ eps")
                                 .replace("+ eps)", "* inverse + eps * inverse)"))),
    "a mean of magnitudes": (
        P, NORM, NORM, Numbers, ("value * value\n", "abs(value)\n")),
    "the mean subtracted": (
        P, NORM, NORM, Numbers,
        ("squares += value * value", "squares += value * value - value")),
    "r written by all": (P, NORM, NORM, Race, (FIRST_ONE, "if True:")),
    "r of the first row": (
        P, NORM, NORM, Race, ("r[cuda.blockIdx.x] = scale", "r[0] = scale")),
    "a block's width for a row's": (
        P, NORM, NORM, Bounds, ("uint64(cuda.blockIdx.x) * uint64(width)",
                                 "uint64(cuda.blockIdx.x) * uint64(THREADS)")),
    "the gain of the whole array": (
        P, NORM, NORM, Bounds, ("load1(g, uint64(i))", "load1(g, row + uint64(i))")),
    "no gain": (
        P, NORM, NORM, Numbers, ("value * load1(g, uint64(i))", "value")),
    "a gain of 1 + g": (
        P, NORM, NORM, Numbers,
        ("value * load1(g, uint64(i))", "value * (float32(1) + load1(g, uint64(i)))")),
    "y in the place of x": (
        P, NORM, NORM, Numbers, ("store1(y,", "store1(x,")),
    "scratch of 127": (P, NORM, NORM, Bounds, ("array(THREADS,", "array(127,")),
    "the last number of a row left out": (
        P, NORM, NORM, Numbers,
        ("width, THREADS):\n        value = load1(x, row + uint64(i)) * scale",
         "width - 1, THREADS):\n        value = load1(x, row + uint64(i)) * scale")),
    "one number too many": (
        P, NORM, NORM, Bounds,
        ("width, THREADS):\n        value = load1(x, row + uint64(i))\n",
         "width + 1, THREADS):\n        value = load1(x, row + uint64(i))\n")),
    "two threads at a number": (
        P, NORM, NORM, Race,
        ("width, THREADS):\n        value = load1(x, row + uint64(i)) * scale",
         "width, THREADS // 2):\n        value = load1(x, row + uint64(i)) * scale")),
    "r not cubed": (P, BACK, BACK, Numbers, (SHARED, SHARED[:-8])),
    "no mean in the gradient": (
        P, BACK, BACK, Numbers, (SHARED, SHARED.replace("* inverse ", ""))),
    "no gain in the dot": (
        P, BACK, BACK, Numbers, ("dot += load1(dy, at) * load1(g, uint64(i))",
                                 "dot += load1(dy, at)")),
    "what the shared r adds, added": (
        P, BACK, BACK, Numbers, ("dz - value * shared", "dz + value * shared")),
    "what the shared r adds, forgotten": (
        P, BACK, BACK, Numbers, ("dz - value * shared", "dz")),
    "dg without r": (
        P, BACK, BACK, Numbers, ("up * value * scale", "up * value")),
    "dg with the gain": (
        P, BACK, BACK, Numbers, ("up * value * scale", "dz * value * scale")),
    "dg of the last row only": (
        P, BACK, BACK, Numbers,
        ("partial[mine + uint64(i)] +=", "partial[mine + uint64(i)] =")),
    "dg not begun at zero": (
        P, BACK, BACK, Numbers,
         ("= float32(0)\n    for n", "+= float32(0)\n    for n")),
    "all rows in each block": (
        P, BACK, BACK, Race, (", rows, cuda.gridDim.x)", ", rows)")),
    "one share of dg for all blocks": (
        P, BACK, BACK, Race, ("mine = uint64(cuda.blockIdx.x)", "mine = uint64(0)")),
    "r of the block": (P, BACK, BACK, Numbers, ("r[n]", "r[cuda.blockIdx.x % rows]")),
    "an add without its guard": (
        P, "add_plain", "add_plain", Bounds, ("if i < n", "if True")),
    "an add of one too many": (
        P, "add_plain", "add_plain", Bounds, ("i < n", "i <= n")),
}  # fmt: skip

LOAD = "load(array, row + uint64(i), into, per * k)"
LAST_VECTOR = "i = min(first + uint32(k) * step, width - uint32(per))"
BEYOND = "            if first + uint32(k) * step >= width:\n"
FORGET = "                    into[per * k + e] = float32(0)\n"
STORE = "            if i < width:\n"
GAIN = "load_row(g, uint64(0), width, gains)"
NORMALISED = "kept[e] = kept[e] * scale * gains[e]"
STEPS = "step = uint32(per) * uint32(cuda.blockDim.x)"
BEGIN = "first = uint32(per) * uint32(cuda.threadIdx.x)"
SCRATCH = ("array(32, float32)", "array(31, float32)")
DG = "dg[e] += up[e] * kept[e] * scale"
DSHARED = "block_sum(dot, scratch) * inverse * scale * scale"
N, A, B, M = "rmsnorm_fast", "add_rmsnorm_fast", "rmsnorm_backward_fast", "_row_moves"


def in_both(line: str, wrong: str) -> list[tuple[str, str]]:
    """Another step or beginning where a row is loaded and where it is stored."""
    loop = "        for k in range(vectors):\n            i = "
    both = [f"        {STEPS}\n        {BEGIN}\n{loop}{i}" for i in ("min", "first +")]
    return [(right, right.replace(line, wrong)) for right in both]


FAST_NORM = {
    "what lies beyond the row is kept": (
        F, M, N, Numbers, (BEYOND, "            if False:\n")),
    "what lies beyond the row is kept: dg and dx": (
        F, M, B, Numbers, (BEYOND, "            if False:\n")),
    "beyond the row, ones": (F, M, N, Numbers, (FORGET, FORGET.replace("(0)", "(1)"))),
    "the last vector forgotten, too": (
        F, M, N, Numbers,
        (BEYOND, BEYOND.replace(">= width", ">= width - uint32(per)"))),
    "only what lies beyond by more than a vector forgotten": (
        F, M, N, Numbers, (BEYOND, BEYOND.replace(">= width", "> width"))),
    "only the first number of a vector forgotten": (
        F, M, N, Numbers,
        ("                for e in range(per):\n" + FORGET,
         "                for e in range(1):\n" + FORGET)),
    "loads beyond the row": (
        F, M, N, Bounds, (LAST_VECTOR, "i = first + uint32(k) * step")),
    "the last vector begins at the row's end": (
        F, M, N, Bounds, (LAST_VECTOR, LAST_VECTOR.replace(" - uint32(per)", ""))),
    "the last vector begins at the row's last number": (
        F, M, N, Misaligned, (LAST_VECTOR, LAST_VECTOR.replace("(per))", "(1))"))),
    "eight numbers a vector, whatever they are": (
        F, M, N, Bounds, (LOAD, LOAD.replace("per * k", "8 * k"))),
    "every vector kept in the first place": (
        F, M, N, Unwritten, (LOAD, LOAD.replace("per * k", "0"))),
    "stores beyond the row": (F, M, N, Race, (STORE, "            if True:\n")),
    "stores of one vector too many": (
        F, M, N, Race, (STORE, STORE.replace("<", "<="))),
    "the first vector stored everywhere": (
        F, M, N, Numbers, ("values, per * k)", "values, 0)")),
    "steps of one warp": (
        F, M, N, Race, *in_both(STEPS, "step = uint32(per) * uint32(32)")),
    "steps of one number": (
        F, M, N, Race, *in_both(STEPS, "step = uint32(cuda.blockDim.x)")),
    "steps of four numbers, also where they are eight": (
        F, M, N, Race, *in_both(STEPS, STEPS.replace("per", "4"))),
    "a thread's vector at its own number": (
        F, M, N, Misaligned, *in_both(BEGIN, "first = uint32(cuda.threadIdx.x)")),
    "rows side by side in the wrong width": (
        F, N, N, Misaligned, ("uint64(cuda.blockIdx.x) * uint64(width)",
                              "uint64(cuda.blockIdx.x) * uint64(width - uint32(1))")),
    "scratch of 31": (F, N, N, Bounds, SCRATCH),
    "a sum, no mean": (F, N, N, Numbers, (SCALED, SCALED.replace("* inverse ", ""))),
    "no eps": (F, N, N, Numbers, (SCALED, SCALED.replace(" + eps", ""))),
    "eps outside": (F, N, N, Numbers, (SCALED, SCALED[:-7] + ") + eps")),
    "the mean of a warp": (
        F, N, N, Numbers, ("block_sum(squares, scratch)", "R.warp_sum(squares)")),
    "r written by all": (F, N, N, Race, (FIRST_ONE, "if True:")),
    "the gains of the whole array": (
        F, N, N, Bounds, (GAIN, GAIN.replace("uint64(0)", "row"))),
    "the first gains for all": (
        F, N, N, Numbers, (NORMALISED, NORMALISED.replace("gains[e]", "load1(g, e)"))),
    "the first gain of a thread": (
        F, N, N, Numbers, (NORMALISED, NORMALISED.replace("gains[e]", "gains[0]"))),
    "the norm of a sum that was not rounded": (
        F, A, A, Numbers,
         ("round_to(total, kept[e] + other[e])", "kept[e] + other[e]")),
    "the norm of x": (
        F, A, A, Numbers, ("squares += kept[e] * kept[e]",
                           "squares += (kept[e] - other[e]) * (kept[e] - other[e])")),
    "what lies beyond the row is kept, added": (
        F, M, A, Numbers, (BEYOND, "            if False:\n")),
    "the residual left out": (F, A, A, Numbers, ("kept[e] + other[e]", "kept[e]")),
    "the residual for the gain": (
        F, A, A, Numbers, ("        load_row(g, uint64(0), width, other)\n", "")),
    "the norm in total": (
        F, A, A, Numbers, ("store_row(y, row", "store_row(total, row")),
    "total after the norm": (
        F, A, A, Numbers, ("        store_row(total, row, width, kept)\n", ""),
        ("        store_row(y, row, width, kept)\n",
         "        store_row(y, row, width, kept)\n"
         "        store_row(total, row, width, kept)\n")),
    "scratch of 31, added": (F, A, A, Bounds, SCRATCH),
    "r not cubed, in vectors": (F, B, B, Numbers, (DSHARED, DSHARED[:-8])),
    "no mean in the gradient, in vectors": (
        F, B, B, Numbers, (DSHARED, DSHARED.replace("* inverse ", ""))),
    "dg with the gain, in vectors": (
        F, B, B, Numbers, (DG, DG.replace("scale", "scale * gains[e]"))),
    "dg without r, in vectors": (
        F, B, B, Numbers, (DG, DG.replace(" * scale", ""))),
    "dg of the last row only, in vectors": (
        F, B, B, Numbers, (DG, DG.replace("+=", "="))),
    "dg not begun at zero, in vectors": (
        F, B, B, Unwritten,
        ("        for e in range(size):\n            dg[e] = float32(0)\n", "")),
    "dg begun anew in each row": (
        F, B, B, Numbers,
        ("            dot = float32(0)\n            for e in range(size):\n",
         "            dot = float32(0)\n            for e in range(size):\n"
         "                dg[e] = float32(0)\n")),
    "the gain twice": (
        F, B, B, Numbers, ("scale * (up[e] -", "scale * (up[e] * gains[e] -")),
    "no gain, in vectors": (
        F, B, B, Numbers, ("up[e] *= gains[e]", "up[e] *= float32(1)")),
    "all rows in each block, in vectors": (
        F, B, B, Race, ("n += uint32(cuda.gridDim.x)", "n += uint32(1)")),
    "r of the block, in vectors": (
        F, B, B, Numbers, ("r[n]", "r[cuda.blockIdx.x % rows]")),
    "one share of dg for all, in vectors": (
        F, B, B, Race, ("partial, uint64(cuda.blockIdx.x)", "partial, uint64(0)")),
    "scratch of 31, backward": (F, B, B, Bounds, SCRATCH),
    "no guard at the end": (
        F, M, B, Bounds, (STORE, "            if True:\n")),
}  # fmt: skip

ROWS = [TREE, REDUCED, PLAIN_NORM, FAST_NORM]
