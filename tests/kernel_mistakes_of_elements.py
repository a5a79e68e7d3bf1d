"""Mistakes in rotations, SwiGLU and cross-entropy, for `test_cuda_kernel_mistakes`.

Rows as in `kernel_mistakes`.
"""

from minidsv3.primitives import fast_cuda_kernels as F
from minidsv3.primitives import plain_cuda_kernels as P
from tests.kernel_mistakes import (
    FIRST_ONE,
    SCRATCH,
    Bounds,
    Misaligned,
    Numbers,
    Race,
)

ROPE, TURN = "rope_plain", "rope_fast"
EVEN, ODD = "even * cos - odd * sin", "even * sin + odd * cos"
PLACE = "h * head + head - rotary + uint32(2) * j"
COLUMN = "first + uint64(h) * uint64(head) + uint64(head - rotary) + column"
HEADS = "h += uint32(cuda.blockDim.y)"
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
    "turned the other way, in vectors": (
        F, TURN, TURN, Numbers, ("sign * turn", "-sign * turn")),
    "the sign forgotten, in vectors": (
        F, TURN, TURN, Numbers, ("sign * turn", "turn")),
    "pairs of neighbours' neighbours": (
        F, TURN, TURN, Numbers,
        ("= pairs[j], pairs[j + 1]", "= pairs[j // 2], pairs[j // 2 + per // 2]")),
    "even turned before odd is": (
        F, TURN, TURN, Numbers, ("pairs[j + 1] = even", "pairs[j + 1] = pairs[j]")),
    "all heads in each row of threads": (
        F, TURN, TURN, Race, (HEADS, "h += uint32(1)")),
    "the first numbers of a head, in vectors": (
        F, TURN, TURN, Numbers, (COLUMN, "first + uint64(h) * uint64(head) + column")),
    "heads as wide as what turns, in vectors": (
        F, TURN, TURN, Numbers, (COLUMN, COLUMN.replace("uint64(head) +",
                                                        "uint64(rotary) +"))),
    "one column for all": (
        F, TURN, TURN, Race, (COLUMN, COLUMN.replace(" + column", ""))),
    "the first angles for all": (
        F, TURN, TURN, Numbers, ("row + column, turn", "row, turn")),
    "tokens never begin anew, in vectors": (
        F, TURN, TURN, Bounds, (" % period", "")),
    "tokens beyond the last": (
        F, TURN, TURN, Bounds, ("if token < tokens", "if True")),
    "one token too many": (
        F, TURN, TURN, Bounds, ("token < tokens", "token <= tokens")),
    "a block's first token only": (
        F, TURN, TURN, Race, ("token += uint32(cuda.threadIdx.z)", "token += 0")),
    "a token a block": (
        F, TURN, TURN, Race, ("uint32(cuda.blockIdx.x) * uint32(cuda.blockDim.z)",
                              "uint32(cuda.blockIdx.x)")),
    "every token at the first position, in vectors": (
        F, TURN, TURN, Numbers, ("uint64(uint32(token) % period)", "uint64(0)")),
    "columns of eight, whatever they are": (
        F, TURN, TURN, Bounds, ("uint64(per) *", "uint64(8) *")),
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
    "no guard": (P, GATE, GATE, Bounds, ("if i < n", "if True")),
    "σ' without 1 - σ": (P, DGATE, DGATE, Numbers, (SLOPE, "s * (float32(1) + a)")),
    "σ for its slope": (P, DGATE, DGATE, Numbers, (SLOPE, "s")),
    "the gradients swapped": (
        P, DGATE, DGATE, Numbers, ("store1(dgate", "store1(dup_"),
        ("store1(dup,", "store1(dgate,"), ("store1(dup_", "store1(dup")),
    "above * a, which overflows": (
        P, DGATE, DGATE, Numbers, ("above * (a * s)", "above * a * s")),
    "no guard, backward": (P, DGATE, DGATE, Bounds, ("if i < n", "if True")),
    "a thread's vector at its own number, forward": (
        F, GATE8, GATE8, Misaligned, ("uint64(per) * flat", "flat")),
    "no guard, in vectors": (
        F, GATE8, GATE8, Bounds, ("if i < n", "if True")),
    "no gate's own factor, in vectors": (
        F, GATE8, GATE8, Numbers, ("a[e] * sigmoid", "sigmoid")),
    "eight numbers a thread, whatever they are": (
        F, GATE8, GATE8, Numbers, ("uint64(per) * flat", "uint64(8) * flat")),
    "a thread's vector at its own number, backward": (
        F, DGATE8, DGATE8, Misaligned, ("uint64(per) * flat", "flat")),
    "no guard, backward, in vectors": (
        F, DGATE8, DGATE8, Bounds, ("if i < n", "if True")),
    "the first block's numbers in all": (
        P, "flat_index", GATE, Race, ("uint64(cuda.blockIdx.x)", "uint64(0)")),
    "a overwritten before it is read": (
        F, DGATE8, DGATE8, Numbers, ("            s = sigmoid(a[e])\n",
                                     "            s = a[e] = sigmoid(a[e])\n")),
    "b without what comes from above": (
        F, DGATE8, DGATE8, Numbers, ("above[e] * b[e] * slope", "b[e] * slope")),
    "the gradients swapped, in vectors": (
        F, DGATE8, DGATE8, Numbers, ("(dgate, i, b,", "(dgate, i, a,"),
        ("(dup, i, a,", "(dup, i, b,")),
    "above * a, which overflows, in vectors": (
        F, DGATE8, DGATE8, Numbers, ("above[e] * (a[e] * s)", "above[e] * a[e] * s")),
}  # fmt: skip

LOSS, DLOSS = "cross_entropy_plain", "cross_entropy_backward_plain"
ONLINE, DLOSS8 = "cross_entropy_fast", "cross_entropy_backward_fast"
INSIDE = "if 0 <= target < width"
OUTSIDE = "if target < 0 or target >= width"
SUM = "log_sum = log2(total) * LN_2"
ASIDE = "((z - largest) - log_sum) * LOG2_E"
ASIDE8 = "((z[e] - largest) - log_sum) * LOG2_E"
HOT = "uint32(i) + uint32(e) == hot"
RESCALE = "total *= exp2((before - largest) * LOG2_E)"
TOGETHER = "total * exp2((largest - top) * LOG2_E)"
FROM_LOWEST = "largest, total = LOWEST"
FORWARD8 = "i += uint64(per) * uint64(cuda.blockDim.x)"
START8 = "i = uint64(per) * uint64(cuda.threadIdx.x)"
LOSSES = {
    "a maximum from zero": (
        P, LOSS, LOSS, Numbers, ("largest = LOWEST", "largest = float32(0)")),
    "no maximum subtracted": (
        P, LOSS, LOSS, Numbers, (
            "largest = tree_max(largest", "largest = float32(0) * tree_max(largest")),
    "each thread's own maximum": (
        P, LOSS, LOSS, Numbers, ("largest = tree_max", "tree_max")),
    "the maximum not added back": (
        P, LOSS, LOSS, Numbers, ("loss = largest - load1", "loss = -load1")),
    "the maximum and the log-sum in one number, which loses digits": (
        P, LOSS, LOSS, Numbers,
        ("loss = largest - load1(logits, row + uint64(target)) + log_sum",
         "loss = (largest + log_sum) - load1(logits, row + uint64(target))")),
    "the maximum in the log-sum": (P, LOSS, LOSS, Numbers, (SUM, SUM + " + largest")),
    "maximum and log-sum swapped": (
        P, LOSS, LOSS, Numbers, ("= largest, log_sum", "= log_sum, largest")),
    "log2 for log": (P, LOSS, LOSS, Numbers, (" * LN_2", "")),
    "2^z for e^z": (P, LOSS, LOSS, Numbers, (" * LOG2_E", "")),
    "the maximum subtracted after the product, which loses digits": (
        P, LOSS, LOSS, Numbers,
        ("exp2((load1(logits, row + uint64(i)) - largest) * LOG2_E)",
         "exp2(load1(logits, row + uint64(i)) * LOG2_E - largest * LOG2_E)")),
    "no look at the target": (P, LOSS, LOSS, Bounds, (INSIDE, "if True")),
    "a target one too far": (
        P, LOSS, LOSS, Numbers, (INSIDE, "if 0 <= target <= width")),
    "a target below zero": (P, LOSS, LOSS, Bounds, (INSIDE, "if target < width")),
    "a target of 32 bits": (
        P, LOSS, LOSS, Numbers, (INSIDE, "if 0 <= target and uint32(target) < width"),
        ("uint64(target)", "uint64(uint32(target))")),
    "the first row's target": (
        P, LOSS, LOSS, Numbers, ("targets[cuda.blockIdx.x]", "targets[0]")),
    "the loss's sign": (
        P, LOSS, LOSS, Numbers,
        ("loss = largest - load1(logits, row + uint64(target)) + log_sum",
         "loss = load1(logits, row + uint64(target)) - largest - log_sum")),
    "the loss written by all": (P, LOSS, LOSS, Race, (FIRST_ONE, "if True:")),
    "a loss of 0 where there is no target": (
        P, LOSS, LOSS, Numbers, ("loss = NAN", "loss = float32(0)")),
    "one-hot at the next word": (
        P, DLOSS, DLOSS, Numbers, ("if i == target", "if i == target + 1")),
    "one-hot in every row's first place": (
        P, DLOSS, DLOSS, Numbers, ("if i == target", "if i == 0")),
    "one-hot not weighed": (
        P, DLOSS, DLOSS, Numbers, ("p -= float32(1)", "p -= float32(1) / dloss")),
    "the first row's weight": (
        P, DLOSS, DLOSS, Numbers, ("dlosses[cuda.blockIdx.x]", "dlosses[0]")),
    "no weight": (P, DLOSS, DLOSS, Numbers, ("p * dloss)", "p)")),
    "p not normalised": (P, DLOSS, DLOSS, Numbers, (ASIDE, "(z - largest) * LOG2_E")),
    "no maximum in p": (P, DLOSS, DLOSS, Numbers, (ASIDE, "(z - log_sum) * LOG2_E")),
    "the maximum's and the log-sum's sum subtracted, which loses digits": (
        P, DLOSS, DLOSS, Numbers, (ASIDE, "(z - (largest + log_sum)) * LOG2_E")),
    "2^z in the gradient": (P, DLOSS, DLOSS, Numbers, (ASIDE, ASIDE[:-9])),
    "the first row's log-sum": (
        P, DLOSS, DLOSS, Numbers, ("log_sums[cuda.blockIdx.x]", "log_sums[0]")),
    "the first row's maximum": (
        P, DLOSS, DLOSS, Numbers, ("highest[cuda.blockIdx.x]", "highest[0]")),
    "a gradient without a target": (P, DLOSS, DLOSS, Numbers, (OUTSIDE, "if False")),
    "a gradient for a target below zero": (
        P, DLOSS, DLOSS, Numbers, (OUTSIDE, "if target >= width")),
    "a gradient for a target one too far": (
        P, DLOSS, DLOSS, Numbers, (OUTSIDE, "if target < 0 or target > width")),
    "a gradient of zero without a target": (
        P, DLOSS, DLOSS, Numbers, ("dloss = NAN", "dloss = float32(0)")),
    "the sum not rescaled": (F, ONLINE, ONLINE, Numbers, (RESCALE, "pass")),
    "the sum rescaled the other way": (
        F, ONLINE, ONLINE, Numbers, (RESCALE, RESCALE.replace(
            "before - largest", "largest - before"))),
    "the sum rescaled by a power of two": (
        F, ONLINE, ONLINE, Numbers, (RESCALE, RESCALE.replace(" * LOG2_E", ""))),
    "before is now": (
        F, ONLINE, ONLINE, Numbers,
        ("            before = largest\n", ""),
         (RESCALE, "before = largest\n            " + RESCALE)),
    "the threads' sums not rescaled": (F, ONLINE, ONLINE, Numbers, (TOGETHER, "total")),
    "the threads' sums rescaled the other way": (
        F, ONLINE, ONLINE, Numbers, (TOGETHER, TOGETHER.replace(
            "largest - top", "top - largest"))),
    "a running maximum from zero": (
        F, ONLINE, ONLINE, Numbers, (FROM_LOWEST, "largest, total = float32(0)")),
    "a running maximum from -inf": (
        F, ONLINE, ONLINE, Numbers,
         (FROM_LOWEST, "largest, total = float32('-inf')")),
    "log2 for log, in vectors": (
        F, ONLINE, ONLINE, Numbers, (" * LN_2", "")),
    "the maximum in the log-sum, in vectors": (
        F, ONLINE, ONLINE, Numbers, (SUM, SUM + " + top")),
    "the loss from a sum that loses digits, in vectors": (
        F, ONLINE, ONLINE, Numbers,
        ("loss = top - load1(logits, row + uint64(target)) + log_sum",
         "loss = (top + log_sum) - load1(logits, row + uint64(target))")),
    "2^z for e^z, in vectors": (
        F, ONLINE, ONLINE, Numbers, ("(z[e] - largest) * LOG2_E", "(z[e] - largest)")),
    "the maximum of the first of a vector": (
        F, ONLINE, ONLINE, Numbers, ("max(largest, z[e])", "max(largest, z[0])")),
    "a warp's maximum": (
        F, ONLINE, ONLINE, Numbers,
         ("block_max(largest, scratch)", "R.warp_max(largest)")),
    "no look at the target, in vectors": (
        F, ONLINE, ONLINE, Bounds, (INSIDE, "if True")),
    "a thread's vector at its own number": (
        F, ONLINE, ONLINE, Misaligned, (START8, "i = uint64(cuda.threadIdx.x)")),
    "steps of eight, whatever they are, forward": (
        F, ONLINE, ONLINE, Numbers, (FORWARD8, FORWARD8.replace("per", "8"))),
    "scratch of 31": (F, ONLINE, ONLINE, Bounds, SCRATCH),
    "one-hot in every vector": (
        F, DLOSS8, DLOSS8, Numbers, (HOT, "uint32(e) == hot % uint32(per)")),
    "one-hot at the vector's first": (
        F, DLOSS8, DLOSS8, Numbers, (HOT, "uint32(i) == hot")),
    "one-hot after the weight": (
        F, DLOSS8, DLOSS8, Numbers,
         ("z[e] -= float32(1)", "z[e] -= float32(1) / dloss")),
    "no one-hot": (F, DLOSS8, DLOSS8, Numbers, (HOT, "False")),
    "steps of half a block": (
        F, DLOSS8, DLOSS8, Race, (FORWARD8, FORWARD8.replace("per", "per // 2"))),
    "rows that overlap": (
        F, DLOSS8, DLOSS8, Race, ("row = uint64(cuda.blockIdx.x) * uint64(width)",
                                  "row = uint64(cuda.blockIdx.x) * uint64(8)")),
    "p not normalised, in vectors": (
        F, DLOSS8, DLOSS8, Numbers, (ASIDE8, "(z[e] - largest) * LOG2_E")),
    "the maximum's and the log-sum's sum subtracted, in vectors": (
        F, DLOSS8, DLOSS8, Numbers, (ASIDE8, "(z[e] - (largest + log_sum)) * LOG2_E")),
    "a gradient without a target, in vectors": (
        F, DLOSS8, DLOSS8, Numbers, (OUTSIDE, "if False")),
    "a gradient for a target below zero, in vectors": (
        F, DLOSS8, DLOSS8, Numbers, (OUTSIDE, "if target >= width")),
    "a target of 32 bits in the gradient": (
        F, DLOSS8, DLOSS8, Numbers, (OUTSIDE, "if target < 0 or hot >= width")),
}  # fmt: skip

ELEMENTS = [ROTATIONS, GATES, LOSSES]
