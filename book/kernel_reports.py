"""What a compiler made of small kernels: chapter 11, ``results/kernel_reports.csv``.

    python book/kernel_reports.py

A row for each case: registers, stack and spills, how often the instructions stand in
the machine code that the chapter speaks of, and the order of some of them. The kernels
here are variations, each with a mistake or a question in it; what they vary is in
`minidsv3.primitives`. Needs the ``cuda`` extra, and no GPU.
"""

import platform
from collections.abc import Callable
from datetime import date
from importlib import metadata
from itertools import groupby
from typing import Any, NamedTuple

from numpy import float32, uint32, uint64
from rows import Row, write

from minidsv3.gpu.compile import Compiled, compiled
from minidsv3.gpu.dialect import cuda
from minidsv3.gpu.intrinsics import load8, reciprocal, rsqrt, store8
from minidsv3.gpu.machine_code import instructions, loads_under_way
from minidsv3.gpu.reductions import block_sum
from minidsv3.primitives import fast_cuda_kernels as fast
from minidsv3.primitives import plain_cuda_kernels as plain

EIGHT = uint32(8)
NAMED = ("LDG", "FFMA", "BAR", "MUFU", "FMUL", "STG", "LDL", "STL")
"""Instructions whose order is told: loads, sums, barriers, products, stores, spills."""


# --- RMSNorms that are right, and not the library's -----------------------------------


def rmsnorm_guarded(
    x: Any, g: Any, y: Any, r: Any, width: uint32, inverse: float32, eps: float32
) -> None:
    """`numpy_ref.rmsnorm_forward` as one writes it first: load, use, next."""
    scratch = cuda.shared.array(32, float32)
    kept = cuda.local.array(32, float32)
    row = uint64(cuda.blockIdx.x) * uint64(width)
    squares = float32(0)
    for k in range(4):
        i = EIGHT * (uint32(cuda.threadIdx.x) + uint32(k) * uint32(cuda.blockDim.x))
        if i < width:
            load8(x, row + uint64(i), kept, 8 * k)
            for e in range(8):
                squares += kept[8 * k + e] * kept[8 * k + e]
    scale = rsqrt(block_sum(squares, scratch) * inverse + eps)
    scaled(g, y, r, row, width, scale, kept)


def rmsnorm_loads_first(
    x: Any, g: Any, y: Any, r: Any, width: uint32, inverse: float32, eps: float32
) -> None:
    """The same, but all loads stand before the first sum."""
    scratch = cuda.shared.array(32, float32)
    kept = cuda.local.array(32, float32)
    row = uint64(cuda.blockIdx.x) * uint64(width)
    for e in range(32):
        kept[e] = float32(0)
    for k in range(4):
        i = EIGHT * (uint32(cuda.threadIdx.x) + uint32(k) * uint32(cuda.blockDim.x))
        if i < width:
            load8(x, row + uint64(i), kept, 8 * k)
    squares = float32(0)
    for e in range(32):
        squares += kept[e] * kept[e]
    scale = rsqrt(block_sum(squares, scratch) * inverse + eps)
    scaled(g, y, r, row, width, scale, kept)


def scaled(
    g: Any, y: Any, r: Any, row: uint64, width: uint32, scale: float32, kept: Any
) -> None:
    """The second half of both: four vectors of a thread times r and the gain."""
    gains = cuda.local.array(8, float32)
    if cuda.threadIdx.x == 0:
        r[cuda.blockIdx.x] = scale
    for k in range(4):
        i = EIGHT * (uint32(cuda.threadIdx.x) + uint32(k) * uint32(cuda.blockDim.x))
        if i < width:
            load8(g, i, gains, 0)
            for e in range(8):
                kept[8 * k + e] *= scale * gains[e]
            store8(y, row + uint64(i), kept, 8 * k)


def rmsnorm_counted(
    x: Any, g: Any, y: Any, r: Any, width: uint32, inverse: float32, eps: float32,
    vectors: uint32,
) -> None:  # fmt: skip
    """`rmsnorm_loads_first` with the number of vectors an argument, at most four."""
    scratch = cuda.shared.array(32, float32)
    kept = cuda.local.array(32, float32)
    gains = cuda.local.array(8, float32)
    row = uint64(cuda.blockIdx.x) * uint64(width)
    first = EIGHT * uint32(cuda.threadIdx.x)
    step = EIGHT * uint32(cuda.blockDim.x)
    for e in range(32):
        kept[e] = float32(0)
    for k in range(vectors):
        i = first + uint32(k) * step
        if i < width:
            load8(x, row + uint64(i), kept, 8 * k)
    squares = float32(0)
    for e in range(EIGHT * vectors):
        squares += kept[e] * kept[e]
    scale = rsqrt(block_sum(squares, scratch) * inverse + eps)
    if cuda.threadIdx.x == 0:
        r[cuda.blockIdx.x] = scale
    for k in range(vectors):
        i = first + uint32(k) * step
        if i < width:
            load8(g, i, gains, 0)
            for e in range(8):
                kept[8 * k + e] *= scale * gains[e]
            store8(y, row + uint64(i), kept, 8 * k)


# --- one line each --------------------------------------------------------------------


def elementwise(line: Callable[[float32, float32], float32]) -> Callable[..., None]:
    """A kernel that applies a device function to two numbers, a thread an element."""

    def one_line(a: Any, b: Any, y: Any, n: uint32) -> None:
        i = uint64(cuda.blockIdx.x) * uint64(cuda.blockDim.x) + uint64(cuda.threadIdx.x)
        if i < uint64(n):
            y[i] = line(a[i], b[i])

    return one_line


def half(a: float32, b: float32) -> float32:
    """All in float32."""
    return a * float32(0.5) + b


def half_of_python(a: float32, b: float32) -> float32:
    """Python's 0.5 is a float64, and so is what it is multiplied with."""
    return a * 0.5 + b


def only_half_of_python(a: float32, b: float32) -> float32:
    """The same slip, without the sum."""
    return a * 0.5


def tenth_of_python(a: float32, b: float32) -> float32:
    """The same slip with a constant that no float32 is equal to."""
    return a * 0.1


def quotient(a: float32, b: float32) -> float32:
    """Rounded correctly."""
    return a / b


def times_reciprocal(a: float32, b: float32) -> float32:
    """To within two units in the last place."""
    return a * reciprocal(b)


def bins(x: Any, y: Any, n: uint32) -> None:
    """How many of a thread's 16 numbers end in each of eight bit patterns."""
    i = uint64(cuda.blockIdx.x) * uint64(cuda.blockDim.x) + uint64(cuda.threadIdx.x)
    counts = cuda.local.array(8, float32)
    if i < uint64(n):
        for e in range(8):
            counts[e] = float32(0)
        for k in range(16):
            counts[x[uint64(16) * i + uint64(k)] & uint32(7)] += float32(1)
        for e in range(8):
            y[uint64(8) * i + uint64(e)] = counts[e]


def picked(x: Any, which: Any, y: Any, n: uint32) -> None:
    """One of a thread's eight numbers, chosen at run time."""
    i = uint64(cuda.blockIdx.x) * uint64(cuda.blockDim.x) + uint64(cuda.threadIdx.x)
    eight = cuda.local.array(8, float32)
    if i < uint64(n):
        load8(x, EIGHT * i, eight, 0)
        y[i] = eight[which[i] & uint32(7)]


# --- the rows -------------------------------------------------------------------------


class Case(NamedTuple):
    """A kernel, and how it is compiled."""

    kernel: Callable[..., None]
    signature: str
    max_registers: int | None = None


def norm(dtype: str) -> str:
    """The signature of a kernel like `rmsnorm_fast` for this dtype."""
    return f"{dtype}[] {dtype}[] {dtype}[] f4[] u4 f4 f4"


LINE, BF16, F32 = "f4[] f4[] f4[] u4", "u2", "f4"
CASES = {
    "library": Case(fast.rmsnorm_fast(4, 8), norm(BF16)),
    "loads first": Case(rmsnorm_loads_first, norm(BF16)),
    "guarded": Case(rmsnorm_guarded, norm(BF16)),
    "guarded, float32": Case(rmsnorm_guarded, norm(F32)),
    "32 registers": Case(rmsnorm_loads_first, norm(BF16), 32),
    "counted": Case(rmsnorm_counted, norm(BF16) + " u4"),
    "plain": Case(plain.rmsnorm_plain, norm(BF16)),
    "picked": Case(picked, "f4[] u4[] f4[] u4"),
    "bins": Case(bins, "u4[] f4[] u4"),
    "a * float32(0.5) + b": Case(elementwise(half), LINE),
    "a * 0.5 + b": Case(elementwise(half_of_python), LINE),
    "a * 0.5": Case(elementwise(only_half_of_python), LINE),
    "a * 0.1": Case(elementwise(tenth_of_python), LINE),
    "a / b": Case(elementwise(quotient), LINE),
    "a * reciprocal(b)": Case(elementwise(times_reciprocal), LINE),
}  # fmt: skip
ARCHITECTURES = ("sm_80", "sm_90a")


def order(sass: str) -> str:
    """The named instructions as they stand in the code, equal neighbours counted."""
    kinds = (each.kind for each in instructions(sass) if each.guard != "!PT")
    runs = groupby(kind for kind in kinds if kind in NAMED)
    counted = ((kind, len(list(run))) for kind, run in runs)
    return " ".join(f"{kind}*{n}" if n > 1 else kind for kind, n in counted)


def row(name: str, architecture: str) -> Row:
    """One case, compiled."""
    kernel, signature, most = CASES[name]
    code: Compiled = compiled(kernel, signature, architecture, max_registers=most)
    return {
        "case": name,
        "architecture": architecture,
        "registers": code.registers,
        "stack": code.stack,
        "spills": code.spills,
        "shared": code.shared,
        "instructions": sum(code.instructions.values()) - code.count("NOP"),
        "loads": code.count("LDG"),
        "loads16": code.having("LDG", "128"),
        "under_way": max(loads_under_way(code.sass)),
        "compares": code.count("ISETP"),
        "branches": code.count("BRA"),
        "doubles": code.doubles,
        "order": order(code.sass),
    }


def main() -> None:
    """Compile all and write the table."""
    versions = ", ".join(
        f"{name} {metadata.version(name)}"
        for name in ("numba", "numba-cuda", "nvidia-nvjitlink")
    )
    head = [
        "# python book/kernel_reports.py",
        f"# {date.today()}, Python {platform.python_version()}, {versions}",
    ]
    write(
        "kernel_reports", [row(name, a) for name in CASES for a in ARCHITECTURES], head
    )


if __name__ == "__main__":
    main()
