"""Mistakes in rotations, SwiGLU and cross-entropy, for `test_cuda_kernel_mistakes`.

Rows as in `kernel_mistakes`.
"""

from minidsv3.primitives import fast_cuda_kernels as F
from minidsv3.primitives import plain_cuda_kernels as P
from tests.kernel_mistakes import (
    FIRST_ONE,
    SCRATCH,
    STRIDE,
    Bounds,
    Misaligned,
    Numbers,
    Race,
)

ROPE, TURN = "rope_plain", "rope_fast"
EVEN, ODD = "even * cos - odd * sin", "even * sin + odd * cos"
PLACE = "h * head + head - rotary + uint32(2) * j"
COLUMN = "uint32(h) * head + head - rotary + column"
HEADS = "range(uint32(cuda.threadIdx.y), heads, uint32(cuda.blockDim.y))"
ROTATIONS = {
    "turned the other way": (
        P, ROPE, ROPE, Numbers, (EVEN, EVEN.replace("-", "+")),
        (ODD, "odd * cos - even * sin")),
    "no rotation but a mirror": (
        P, ROPE, ROPE, Numbers, (EVEN, EVEN.replace("-", "+"))),
    "the sign forgotten": (P, ROPE, ROPE, Numbers, ("sign * turns", "turns")),
    "the sign at the cosine too": (
        P, ROPE, ROPE, Numbers, ("= turns[turn],", "= sign * turns[turn],")),
    "pairs from two halves": (
        P, ROPE, ROPE, Numbers, (PLACE, "h * head + head - rotary + j"),
        ("load1(x, at + uint64(1))", "load1(x, at + uint64(half))"),
        ("store1(x, at + uint64(1),", "store1(x, at + uint64(half),")),
    "the first numbers of a head": (
        P, ROPE, ROPE, Numbers, (PLACE, "h * head + uint32(2) * j")),
    "heads as wide as what turns": (
        P, ROPE, ROPE, Numbers, (PLACE, PLACE.replace("h * head", "h * rotary"))),
    "tokens never begin anew": (P, ROPE, ROPE, Bounds, (" % period", "")),
    "every token at the first position": (
        P, ROPE, ROPE, Numbers,
         ("uint64(uint32(cuda.blockIdx.x) % period)", "uint64(0)")),
    "even read again, turned": (
        P, ROPE, ROPE, Numbers,
        ("store1(x, at + uint64(1), even", "store1(x, at + uint64(1), load1(x, at)")),
    "the first pair's angle for all": (
        P, ROPE, ROPE, Numbers, ("turn = row + uint64(uint32(2) * j)", "turn = row")),
    "angles first all cosines, then all sines": (
        P, ROPE, ROPE, Numbers, ("row + uint64(uint32(2) * j)", "row + uint64(j)"),
        ("turns[turn + uint64(1)]", "turns[turn + uint64(half)]")),
    "half of the pairs": (
        P, ROPE, ROPE, Numbers,
         ("heads * half, THREADS", "heads * half // 2, THREADS")),
    "turned the other way, eight at a time": (
        F, TURN, TURN, Numbers, ("sign * turn", "-sign * turn")),
    "the sign forgotten, eight at a time": (
        F, TURN, TURN, Numbers, ("sign * turn", "turn")),
    "pairs of neighbours' neighbours": (
        F, TURN, TURN, Numbers,
         ("= pairs[j], pairs[j + 1]", "= pairs[j // 2], pairs[j // 2 + 4]")),
    "even turned before odd is": (
        F, TURN, TURN, Numbers, ("pairs[j + 1] = even", "pairs[j + 1] = pairs[j]")),
    "all heads in each row of threads": (
        F, TURN, TURN, Race, (HEADS, HEADS.replace(", uint32(cuda.blockDim.y)", ""))),
    "the first numbers of a head, eight at a time": (
        F, TURN, TURN, Numbers, (COLUMN, "uint32(h) * head + column")),
    "one column for all": (
        F, TURN, TURN, Race, (COLUMN, COLUMN.replace(" + column", ""))),
    "the first angles for all": (
        F, TURN, TURN, Numbers, ("row + uint64(column), turn", "row, turn")),
    "tokens never begin anew, eight at a time": (
        F, TURN, TURN, Bounds, (" % period", "")),
}  # fmt: skip

GATE, DGATE = "swiglu_plain", "swiglu_backward_plain"
GATE8, DGATE8 = "swiglu_fast", "swiglu_backward_fast"
GATED = "a * sigmoid(a) * load1(up, i)"
SLOPE = "s * (float32(1) + a * (float32(1) - s))"
GATES = {
    "gate and up swapped": (
        P, GATE, GATE, Numbers, ("a = load1(gate, i)", "a = load1(up, i)"),
        (GATED, GATED.replace("up", "gate"))),
    "no gate's own factor": (P, GATE, GATE, Numbers, (GATED, GATED[4:])),
    "σ of -a": (P, "sigmoid", GATE, Numbers, ("exp2(-a", "exp2(a")),
    "2^-a for e^-a": (P, "sigmoid", GATE, Numbers, (" * LOG2_E", "")),
    "σ from e^a: infinity over infinity": (
        P, "sigmoid", GATE, Numbers,
        ("reciprocal(float32(1) + exp2(-a * LOG2_E))",
         "exp2(a * LOG2_E) * reciprocal(float32(1) + exp2(a * LOG2_E))")),
    "no guard": (P, GATE, GATE, Bounds, ("if i < uint64(n)", "if True")),
    "σ' without 1 - σ": (P, DGATE, DGATE, Numbers, (SLOPE, "s * (float32(1) + a)")),
    "σ for its slope": (P, DGATE, DGATE, Numbers, (SLOPE, "s")),
    "the gradients swapped": (
        P, DGATE, DGATE, Numbers, ("store1(dgate", "store1(dup_"),
        ("store1(dup,", "store1(dgate,"), ("store1(dup_", "store1(dup")),
    "above * a, which overflows": (
        P, DGATE, DGATE, Numbers, ("above * (a * s)", "above * a * s")),
    "no guard, backward": (P, DGATE, DGATE, Bounds, ("if i < uint64(n)", "if True")),
    "a thread's eight at its own number": (
        F, GATE8, GATE8, Misaligned, ("uint64(8) * thread", "thread")),
    "no guard, eight at a time": (
        F, GATE8, GATE8, Bounds, ("if i < uint64(n)", "if True")),
    "no gate's own factor, eight at a time": (
        F, GATE8, GATE8, Numbers, ("a[e] * sigmoid", "sigmoid")),
    "a overwritten before it is read": (
        F, DGATE8, DGATE8, Numbers, ("            s = sigmoid(a[e])\n",
                                     "            s = a[e] = sigmoid(a[e])\n")),
    "b without what comes from above": (
        F, DGATE8, DGATE8, Numbers, ("above[e] * b[e] * slope", "b[e] * slope")),
    "the gradients swapped, eight at a time": (
        F, DGATE8, DGATE8, Numbers, ("(dgate, i, b,", "(dgate, i, a,"),
        ("(dup, i, a,", "(dup, i, b,")),
    "above * a, which overflows, eight at a time": (
        F, DGATE8, DGATE8, Numbers, ("above[e] * (a[e] * s)", "above[e] * a[e] * s")),
}  # fmt: skip

LOSS, DLOSS = "cross_entropy_plain", "cross_entropy_backward_plain"
ONLINE, DLOSS8 = "cross_entropy_fast", "cross_entropy_backward_fast"
INSIDE = "if 0 <= target < width"
HOT = "uint32(i) + uint32(e) == target"
RESCALE = "total *= exp2(before - largest)"
TOGETHER = "total * exp2(largest - highest)"
FROM_LOWEST = "largest, total = LOWEST"
LOSSES = {
    "a maximum from zero": (  # the sum is zero, whose log Python refuses
        P, LOSS, LOSS, ValueError, ("largest = LOWEST", "largest = float32(0)")),
    "no maximum subtracted": (
        P, LOSS, LOSS, ValueError, (
            "largest = tree_max(largest", "largest = float32(0) * tree_max(largest")),
    "each thread's own maximum": (
        P, LOSS, LOSS, Numbers, ("largest = tree_max", "tree_max")),
    "the maximum not added back": (
        P, LOSS, LOSS, Numbers, ("largest + math.log(total)", "math.log(total)")),
    "log2 for log": (P, LOSS, LOSS, Numbers, ("math.log(total)", "math.log2(total)")),
    "2^z for e^z": (P, LOSS, LOSS, Numbers, (" * LOG2_E", "")),
    "no look at the target": (P, LOSS, LOSS, Bounds, (INSIDE, "if True")),
    "a target one too far": (
        P, LOSS, LOSS, Numbers, (INSIDE, "if 0 <= target <= width")),
    "a target below zero": (P, LOSS, LOSS, Bounds, (INSIDE, "if target < width")),
    "the first row's target": (
        P, LOSS, LOSS, Numbers, ("targets[cuda.blockIdx.x]", "targets[0]")),
    "the loss's sign": (P, LOSS, LOSS, Numbers, ("log_sum - z", "z - log_sum")),
    "the loss written by all": (P, LOSS, LOSS, Race, (FIRST_ONE, "if True:")),
    "a loss of 0 where there is no target": (
        P, LOSS, LOSS, Numbers, ("float32(math.nan)", "float32(0)")),
    "one-hot at the next word": (
        P, DLOSS, DLOSS, Numbers, ("if i == target", "if i == target + 1")),
    "one-hot in every row's first place": (
        P, DLOSS, DLOSS, Numbers, ("if i == target", "if i == 0")),
    "one-hot not weighed": (
        P, DLOSS, DLOSS, Numbers, ("p -= float32(1)", "p -= float32(1) / dloss")),
    "the first row's weight": (
        P, DLOSS, DLOSS, Numbers, ("dlosses[cuda.blockIdx.x]", "dlosses[0]")),
    "no weight": (P, DLOSS, DLOSS, Numbers, ("p * dloss)", "p)")),
    "p not normalised": (P, DLOSS, DLOSS, Numbers, (" - log_sum)", ")")),
    "the sum not rescaled": (F, ONLINE, ONLINE, Numbers, (RESCALE, "pass")),
    "the sum rescaled the other way": (
        F, ONLINE, ONLINE, Numbers, (RESCALE, "total *= exp2(largest - before)")),
    "before is now": (
        F, ONLINE, ONLINE, Numbers,
        ("        before = largest\n", ""),
         (RESCALE, "before = largest\n        " + RESCALE)),
    "the threads' sums not rescaled": (F, ONLINE, ONLINE, Numbers, (TOGETHER, "total")),
    "the threads' sums rescaled the other way": (
        F, ONLINE, ONLINE, Numbers, (TOGETHER, "total * exp2(highest - largest)")),
    "a running maximum from zero": (
        F, ONLINE, ONLINE, ValueError, (FROM_LOWEST, "largest, total = float32(0)")),
    "a running maximum from -inf": (
        F, ONLINE, ONLINE, Numbers,
         (FROM_LOWEST, "largest, total = -float32(math.inf)")),
    "the maximum left in base 2": (
        F, ONLINE, ONLINE, Numbers, ("highest * LN_2", "highest")),
    "2^z for e^z, eight at a time": (
        F, ONLINE, ONLINE, Numbers, ("z[e] *= LOG2_E", "z[e] *= float32(1)")),
    "the maximum of the first of eight": (
        F, ONLINE, ONLINE, Numbers, ("max(largest, z[e])", "max(largest, z[0])")),
    "a warp's maximum": (
        F, ONLINE, ONLINE, Numbers,
         ("block_max(largest, scratch)", "R.warp_max(largest)")),
    "no look at the target, eight at a time": (
        F, ONLINE, ONLINE, Bounds, (INSIDE, "if True")),
    "a thread's eight at its own number": (
        F, ONLINE, ONLINE, Misaligned, ("range(EIGHT * uint32(", "range(uint32(")),
    "scratch of 31": (F, ONLINE, ONLINE, Bounds, SCRATCH),
    "one-hot in every vector": (
        F, DLOSS8, DLOSS8, Numbers, (HOT, "uint32(e) == target % EIGHT")),
    "one-hot at the vector's first": (
        F, DLOSS8, DLOSS8, Numbers, (HOT, "uint32(i) == target")),
    "one-hot after the weight": (
        F, DLOSS8, DLOSS8, Numbers,
         ("z[e] -= float32(1)", "z[e] -= float32(1) / dloss")),
    "no one-hot": (F, DLOSS8, DLOSS8, Numbers, (HOT, "False")),
    "steps of half a block": (
        F, DLOSS8, DLOSS8, Race, (STRIDE, STRIDE.replace("EIGHT", "uint32(4)"))),
    "rows that overlap": (
        F, DLOSS8, DLOSS8, Race, ("row = uint64(cuda.blockIdx.x) * uint64(width)",
                                  "row = uint64(cuda.blockIdx.x) * uint64(8)")),
}  # fmt: skip

ELEMENTS = [ROTATIONS, GATES, LOSSES]
