"""The machine code of the first kernels keeps their promises, without a GPU.

Registers within a budget, nothing in memory that belongs into registers, loads and
stores as wide as claimed, and all of a row under way before the first is waited for.
Each check has a kernel that it refuses.
"""

import math
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy import float32, uint32, uint64

from minidsv3.gpu.compile import ARCHITECTURES, Compiled, compiled
from minidsv3.gpu.dialect import cuda
from minidsv3.gpu.intrinsics import load8, rsqrt, store8
from minidsv3.gpu.machine_code import instructions, loads_under_way
from minidsv3.gpu.reductions import block_sum
from minidsv3.gpu.roofline import H200, occupancy

sys.path.insert(0, str(Path(__file__).parents[2] / "book"))

import kernel_predictions as predictions  # noqa: E402
import rows  # noqa: E402

CASES = {f"{c.kernel}-{c.how}-{c.dtype}": c for c in predictions.cases()}
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
each_case = pytest.mark.parametrize("name", CASES)


@cache
def code_of(name: str, architecture: str) -> Compiled:
    case = CASES[name]
    return compiled(case.function, case.signature, architecture)


# --- registers ----------------------------------------------------------------------

BUDGETS = {  # registers for sm_80 and sm_90a, and blocks that then fit each
    # 128 and 256 threads: 32 registers let all 64 warps of a multiprocessor in
    ("rmsnorm", "plain"): ((32, 16), (32, 16)),
    ("add", "plain"): ((32, 8), (32, 8)),
    ("rope", "plain"): ((32, 16), (32, 16)),
    ("swiglu", "plain"): ((32, 8), (32, 8)),
    ("swiglu_backward", "plain"): ((32, 8), (32, 8)),
    ("cross_entropy", "plain"): ((32, 16), (32, 16)),
    ("cross_entropy_backward", "plain"): ((32, 16), (32, 16)),
    # four turns of a loop at once, each with its addresses: it is there for reading
    ("rmsnorm_backward", "plain"): ((72, 7), (56, 9)),
    # 32 numbers of the row and 32 of g or of the other summand; 224 threads. In float32
    # each takes a register, in bfloat16 two share one until they are needed.
    ("rmsnorm", "fast", "bfloat16"): ((72, 4), (72, 4)),
    ("rmsnorm", "fast", "float32"): ((128, 2), (128, 2)),
    ("add_rmsnorm", "fast", "bfloat16"): ((72, 4), (72, 4)),
    ("add_rmsnorm", "fast", "float32"): ((128, 2), (128, 2)),
    # three rows of 16 numbers, and 16 of g; 448 threads
    ("rmsnorm_backward", "fast", "bfloat16"): ((72, 2), (72, 2)),
    ("rmsnorm_backward", "fast", "float32"): ((128, 1), (128, 1)),
    ("rope", "fast"): ((32, 8), (32, 8)),
    ("swiglu", "fast"): ((32, 8), (32, 8)),
    ("swiglu_backward", "fast"): ((32, 8), (32, 8)),
    ("cross_entropy", "fast"): ((32, 4), (32, 4)),
    ("cross_entropy_backward", "fast"): ((32, 4), (32, 4)),
}


def beyond(code: Compiled, threads: int, budget: int, blocks: int) -> list[str]:
    """How a kernel is over its budget, or the budget not the last of its step."""
    wrong = []
    if code.registers > budget:
        wrong.append(f"{code.registers} registers, over {budget}")
    fits = occupancy(H200, budget, threads, code.shared)  # registers as on an A100
    if fits.blocks != blocks:
        wrong.append(f"{fits.blocks} blocks at {budget} registers, not {blocks}")
    more = occupancy(H200, budget + 1, threads, code.shared)
    if more.blocks == blocks:
        wrong.append(f"{budget} is not the last number with {blocks} blocks")
    return wrong


@each_architecture
@each_case
def test_registers_are_within_the_budget(name: str, architecture: str) -> None:
    case, code = CASES[name], code_of(name, architecture)
    at = list(ARCHITECTURES).index(architecture)
    both = BUDGETS.get((case.kernel, case.how))
    budget, blocks = (both or BUDGETS[case.kernel, case.how, case.dtype])[at]
    assert beyond(code, case.threads, budget, blocks) == []


@each_architecture
@each_case
def test_nothing_is_in_memory_that_belongs_into_registers(name, architecture) -> None:
    code = code_of(name, architecture)
    assert (code.stack, code.local, code.spills, code.doubles) == (0, 0, 0, 0)


def forgets_a_constant(x, y, n):
    t = uint64(cuda.threadIdx.x)
    y[t] = x[t] * 0.1  # Python's, so float64


@each_architecture
def test_what_is_over_the_budget_is_seen(architecture: str) -> None:
    case = CASES["rmsnorm_backward-fast-bfloat16"]
    tight = compiled(case.function, case.signature, architecture, max_registers=40)
    assert tight.stack > 0 and tight.spills > 0
    assert compiled(forgets_a_constant, "f4[] f4[] u4", architecture).doubles > 0
    fast = code_of("swiglu-fast-bfloat16", architecture)
    assert beyond(fast, 256, 16, 8)[0].endswith(" registers, over 16")
    assert beyond(fast, 256, 31, 8) == ["31 is not the last number with 8 blocks"]
    assert beyond(fast, 256, 40, 7)[0] == "6 blocks at 40 registers, not 7"


# --- loads and stores ---------------------------------------------------------------


@dataclass(frozen=True)
class Moves:
    """16-byte loads and stores in the code, and narrower ones of single words.

    A loop that the compiler unrolls has them several times: turns.
    """

    loads: int
    stores: int
    narrow_loads: int = 0
    narrow_stores: int = 0
    looped_loads: int = 0
    looped_stores: int = 0


def vectors(case: predictions.Case) -> int:
    """Of 16 bytes, that a thread keeps of its row."""
    per = 16 // predictions.SIZES[case.dtype]
    return math.ceil(predictions.D / (per * case.threads))


def moves(case: predictions.Case) -> Moves:
    """What a fast kernel claims."""
    v, beside = vectors(case), 4 // predictions.SIZES[case.dtype]
    return {
        "rmsnorm": Moves(2 * v, v, narrow_stores=1),  # r
        "add_rmsnorm": Moves(3 * v, 2 * v, narrow_stores=1),
        "rmsnorm_backward": Moves(3 * v, v + beside * v, 1),
        "rope": Moves(beside, 0, looped_loads=1, looped_stores=1),
        "swiglu": Moves(2, 1),
        "swiglu_backward": Moves(3, 2),
        # the target and its logit; the maximum, the sum and the loss
        "cross_entropy": Moves(0, 0, 2, 3, looped_loads=1),
        "cross_entropy_backward": Moves(0, 0, 4, looped_loads=1, looped_stores=1),
    }[case.kernel]


def moved(code: Compiled) -> Counter:
    """How many loads and stores of how many bytes."""
    found = instructions(code.sass)
    return Counter((i.kind, i.width) for i in found if i.kind in ("LDG", "STG"))


def otherwise(claim: Moves, code: Compiled) -> list[str]:
    found, wrong = moved(code), []
    wide = {kind: found.pop((kind, 16), 0) for kind in ("LDG", "STG")}
    narrow = Counter()
    for (kind, _), number in found.items():
        narrow[kind] += number
    for kind, once, looped, words in (
        ("LDG", claim.loads, claim.looped_loads, claim.narrow_loads),
        ("STG", claim.stores, claim.looped_stores, claim.narrow_stores),
    ):
        turns, rest = divmod(wide[kind] - once, looped or 1)
        if rest or turns < bool(looped) or (turns > 0) != bool(looped):
            wrong.append(f"{kind}: {wide[kind]} of 16 bytes, {once} + {looped} a turn")
        if narrow[kind] != words:
            wrong.append(f"{kind}: {narrow[kind]} narrow ones, not {words}")
    return wrong


@each_architecture
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.how == "fast"])
def test_fast_kernels_move_16_bytes(name: str, architecture: str) -> None:
    assert otherwise(moves(CASES[name]), code_of(name, architecture)) == []


@each_architecture
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.how == "plain"])
def test_plain_kernels_move_a_number(name: str, architecture: str) -> None:
    sizes = {width for _, width in moved(code_of(name, architecture))}
    targets = {8} if CASES[name].kernel.startswith("cross_entropy") else set()
    words = {4, predictions.SIZES[CASES[name].dtype]}
    assert sizes - targets <= words


@each_architecture
def test_narrow_and_missing_loads_are_seen(architecture: str) -> None:
    plain = code_of("swiglu-plain-float32", architecture)
    assert otherwise(Moves(2, 1), plain) == [
        "LDG: 0 of 16 bytes, 2 + 0 a turn", "LDG: 2 narrow ones, not 0",
        "STG: 0 of 16 bytes, 1 + 0 a turn", "STG: 1 narrow ones, not 0",
    ]  # fmt: skip
    fast = code_of("swiglu-fast-float32", architecture)
    assert otherwise(Moves(3, 1), fast) == ["LDG: 2 of 16 bytes, 3 + 0 a turn"]
    assert otherwise(Moves(2, 0, looped_stores=2), fast) != []


# --- all of a row is under way together ---------------------------------------------

FIRST_WAIT = {  # bytes a thread has under way where it first waits for its row
    ("rmsnorm", "bfloat16"): 64,  # all it keeps: 32 numbers
    ("rmsnorm", "float32"): 128,
    ("add_rmsnorm", "bfloat16"): 128,  # of both summands
    ("add_rmsnorm", "float32"): 48,  # of 256: the compiler saves registers
    ("rmsnorm_backward", "bfloat16"): 52,  # of 68, 16 numbers of dy and x and one r
    ("rmsnorm_backward", "float32"): 132,
    ("swiglu", "bfloat16"): 32,
    ("swiglu", "float32"): 32,
    ("swiglu_backward", "bfloat16"): 48,
    ("swiglu_backward", "float32"): 48,
}


@each_architecture
@pytest.mark.parametrize(("kernel", "dtype"), FIRST_WAIT)
def test_a_row_is_under_way_before_it_is_waited_for(kernel, dtype, architecture):
    code = code_of(f"{kernel}-fast-{dtype}", architecture)
    assert loads_under_way(code.sass)[0] >= FIRST_WAIT[kernel, dtype]


def order(code: Compiled, *kinds: str) -> list[tuple[str, int]]:
    """Which of these kinds stand in the code, in order, equal neighbours counted."""
    runs: list[tuple[str, int]] = []
    for each in instructions(code.sass):
        if each.kind in kinds:
            last, number = runs[-1] if runs else ("", 0)
            runs[-1:] = (
                [(last, number + 1)]
                if last == each.kind
                else [*runs[-1:], (each.kind, 1)]
            )
    return runs


def loaded_before_squares(code: Compiled) -> tuple[int, int]:
    """Loads before the first multiplication, and multiplications for the sum."""
    runs = order(code, "LDG", "FFMA", "SHFL")
    before = [kind for kind, _ in runs].index("SHFL")
    squares = sum(number for kind, number in runs[:before] if kind == "FFMA")
    return runs[0][1] if runs[0][0] == "LDG" else 0, squares


@each_architecture
def test_rmsnorm_loads_all_then_adds_all(architecture: str) -> None:
    """Four loads of x at least, before the first of the 32 squares; g may be there."""
    code = code_of("rmsnorm-fast-bfloat16", architecture)
    loads, squares = loaded_before_squares(code)
    assert loads >= 4 and squares == 32


def waits_for_each(x, g, y, r, width, inverse, eps):
    """RMSNorm as one writes it first: each vector's squares beside its load."""
    scratch = cuda.shared.array(32, float32)
    kept = cuda.local.array(32, float32)
    gains = cuda.local.array(8, float32)
    row = uint64(cuda.blockIdx.x) * uint64(width)
    first = uint32(8) * uint32(cuda.threadIdx.x)
    step = uint32(8) * uint32(cuda.blockDim.x)
    squares = float32(0)
    for k in range(4):
        i = first + uint32(k) * step
        if i < width:
            load8(x, row + uint64(i), kept, 8 * k)
            for e in range(8):
                squares += kept[8 * k + e] * kept[8 * k + e]
    scale = rsqrt(block_sum(squares, scratch) * inverse + eps)
    if cuda.threadIdx.x == 0:
        r[cuda.blockIdx.x] = scale
    for k in range(4):
        i = first + uint32(k) * step
        if i < width:
            load8(g, i, gains, 0)
            for e in range(8):
                kept[8 * k + e] *= scale * gains[e]
            store8(y, row + uint64(i), kept, 8 * k)


@each_architecture
def test_loads_that_wait_for_each_other_are_seen(architecture: str) -> None:
    signature = CASES["rmsnorm-fast-bfloat16"].signature
    code = compiled(waits_for_each, signature, architecture)
    assert max(loads_under_way(code.sass)) < 64
    assert loaded_before_squares(code) == (1, 32)


# --- special functions, exchanges, barriers -----------------------------------------


@dataclass(frozen=True)
class Counts:
    """rsqrt; exp2 and reciprocal a number; shuffles; barriers."""

    rsqrt: int = 0
    exp2: int = 0
    reciprocal: int = 0
    shuffles: int = 0
    barriers: int = 0


CLAIMS = {
    ("rmsnorm", "plain"): Counts(rsqrt=1, barriers=9),  # 7 halvings and two
    ("add", "plain"): Counts(),
    ("rmsnorm_backward", "plain"): Counts(barriers=9),
    ("rope", "plain"): Counts(),
    ("swiglu", "plain"): Counts(exp2=1, reciprocal=1),
    ("swiglu_backward", "plain"): Counts(exp2=1, reciprocal=1),
    ("cross_entropy", "plain"): Counts(exp2=1, barriers=18),
    ("cross_entropy_backward", "plain"): Counts(exp2=1),
    ("rmsnorm", "fast"): Counts(rsqrt=1, shuffles=5, barriers=2),
    ("add_rmsnorm", "fast"): Counts(rsqrt=1, shuffles=5, barriers=2),
    ("rmsnorm_backward", "fast"): Counts(shuffles=5, barriers=2),
    ("rope", "fast"): Counts(),
    ("swiglu", "fast"): Counts(exp2=1, reciprocal=1),
    ("swiglu_backward", "fast"): Counts(exp2=1, reciprocal=1),
    ("cross_entropy", "fast"): Counts(exp2=1, shuffles=10, barriers=4),
    ("cross_entropy_backward", "fast"): Counts(exp2=1),
}


@each_architecture
@each_case
def test_specials_exchanges_and_barriers(name: str, architecture: str) -> None:
    """exp2 is at least once for each number of a vector: loops stand there repeatedly.

    Divisions of integers, in loops over rows and heads, take reciprocals of their own.
    """
    case, code = CASES[name], code_of(name, architecture)
    claim = CLAIMS[case.kernel, case.how]
    per = 16 // predictions.SIZES[case.dtype] if case.how == "fast" else 1
    assert code.count("MUFU.RSQ") == claim.rsqrt
    assert code.count("SHFL") == claim.shuffles
    assert code.count("BAR") == claim.barriers
    exp2, looped = code.count("MUFU.EX2"), "cross_entropy" in case.kernel
    assert exp2 >= claim.exp2 * per if looped else exp2 == claim.exp2 * per
    if "swiglu" in case.kernel:
        assert code.count("MUFU.RCP") == per


@each_architecture
def test_operations_of_straight_code(architecture: str) -> None:
    """In SwiGLU's code, which has no loop, all that its job counts, FMA as two."""
    for kernel in ("swiglu", "swiglu_backward"):
        for dtype, how in (("float32", "plain"), ("float32", "fast")):
            case = CASES[f"{kernel}-{how}-{dtype}"]
            code = code_of(f"{kernel}-{how}-{dtype}", architecture)
            per = 4 if how == "fast" else 1
            done = code.count("FADD", "FMUL") + 2 * code.count("FFMA")
            assert done == case.job.operations / predictions.GATED * per
            assert code.count("MUFU") == case.job.special / predictions.GATED * per


# --- the table of the book ----------------------------------------------------------


def test_the_table_is_what_the_kernels_are() -> None:
    committed = rows.read("kernel_predictions")
    found = [predictions.row(c, code_of(n, "sm_90a")) for n, c in CASES.items()]
    assert len(committed) == len(found)
    for said, now in zip(committed, found, strict=True):
        assert said.keys() == now.keys()
        for column, value in now.items():
            if isinstance(value, str):
                assert said[column] == value, (now, column)
            else:
                assert said[column] == pytest.approx(value, rel=1e-5), (now, column)


def test_cases_are_launched_as_the_wrappers_launch_them(monkeypatch) -> None:
    """Kernel and block of each operator at a small height of the same width."""
    import torch

    from minidsv3.primitives import cuda_kernels as wrappers

    seen = {}

    def instead(kernel, grid, block, *args):
        seen[kernel] = math.prod(block) if isinstance(block, tuple) else block

    monkeypatch.setattr(wrappers, "launch", instead)
    for dtype in (torch.bfloat16, torch.float32):
        x, g = torch.zeros(2, predictions.D, dtype=dtype), None
        g = x[0].clone()
        wrappers.rmsnorm(x, g, 0.0)
        wrappers.add_rmsnorm(x, x, g, 0.0)
        wrappers._rmsnorm_backward(x, x, g, torch.zeros(2))
        heads = torch.zeros(1, 1, predictions.HEADS, predictions.ROTARY, dtype=dtype)
        wrappers.rotate_(heads, torch.zeros(2, 1, predictions.ROTARY // 2))
        wrappers.swiglu(x, x)
        wrappers._swiglu_backward(x, x, x)
        logits = torch.zeros(1, predictions.V, dtype=dtype)
        targets = torch.zeros(1, dtype=torch.int64)
        wrappers._cross_entropy(logits, targets)
        wrappers._cross_entropy_backward_(
            logits, targets, *[torch.zeros(1) for _ in range(3)]
        )
    fast = {c.function: c.threads for c in CASES.values() if c.how == "fast"}
    assert seen == fast
    assert len(fast) == 2 * 8 and np.all([t % 32 == 0 for t in fast.values()])
