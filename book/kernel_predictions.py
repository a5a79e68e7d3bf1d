"""What each kernel's machine code and its bytes promise, before any GPU has run it.

    python book/kernel_predictions.py

``kernel_predictions.csv``: a row for each first kernel, plain and fast, in bfloat16 and
float32, on the shape of its target. registers, shared (bytes a block) and what a thread
loads before it waits are read from the machine code for sm_90a; blocks and occupancy
follow (`gpu.roofline.occupancy`); under_way is the most bytes that one multiprocessor
waits for at a time, and reachable the part of an H200's bandwidth that this can fill if
a load takes `gpu.roofline.LATENCY`, which is an assumption, and nobody waits for
stores. The floors are the least microseconds by bytes, operations and special
functions. Nothing is timed.

Needs the ``cuda`` extra, and no GPU.
"""

import argparse
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from itertools import product

from rows import Row, write
from tqdm import tqdm

from minidsv3.gpu.compile import Compiled, compiled
from minidsv3.gpu.machine_code import loads_under_way
from minidsv3.gpu.roofline import H100, H200, floor, occupancy, reachable
from minidsv3.primitives import cuda_kernels as wrappers
from minidsv3.primitives import fast_cuda_kernels as fast
from minidsv3.primitives import plain_cuda_kernels as plain
from minidsv3.primitives import work_of_cuda_kernels as work
from minidsv3.primitives.work_of_cuda_kernels import BFLOAT16, FLOAT32, VECTOR, Job

TOKENS, D = 65_536, 7_168
HEADS, ROTARY = 128, 64
GATED = 32_768 * 2_048  # numbers of gate, and of up
LOSS_ROWS, V = 4_096, 129_280
SIZES = {"bfloat16": BFLOAT16, "float32": FLOAT32}
WORDS = {"bfloat16": "u2[]", "float32": "f4[]"}
SIGNATURES = {
    "rmsnorm": "x x x f4[] u4 f4 f4",
    "add": "x x x u8",
    "add_rmsnorm": "x x x x x f4[] u4 f4 f4",
    "rmsnorm_backward": "x x x f4[] x f4[] u4 u4 f4",
    "rope": "x f4[] u4 u4 u4 u4 f4",
    "swiglu": "x x x u8",
    "swiglu_backward": "x x x x x u8",
    "cross_entropy": "x i8[] f4[] f4[] f4[] u4",
    "cross_entropy_backward": "x i8[] f4[] f4[] f4[] u4",
}
SHAPES = {
    **dict.fromkeys(("rmsnorm", "add", "add_rmsnorm"), f"{TOKENS} x {D}"),
    "rmsnorm_backward": f"{TOKENS} x {D}",
    "rope": f"{TOKENS} x {HEADS} x {ROTARY}",
    **dict.fromkeys(("swiglu", "swiglu_backward"), "32768 x 2048"),
    **dict.fromkeys(("cross_entropy", "cross_entropy_backward"), f"{LOSS_ROWS} x {V}"),
}


@dataclass(frozen=True)
class Case:
    """A kernel as its wrapper launches it on the shape of its target.

    how: "plain" or "fast". threads: of a block.
    """

    kernel: str
    how: str
    dtype: str
    function: Callable[..., None]
    threads: int
    job: Job

    @property
    def signature(self) -> str:
        """What `compiled` takes."""
        words = SIGNATURES[self.kernel].split()
        if (self.kernel, self.how) == ("rope", "fast"):
            words.insert(2, "u4")  # how many tokens
        return " ".join(WORDS[self.dtype] if w == "x" else w for w in words)

    @property
    def shape(self) -> str:
        """As the table has it: 65536 x 7168."""
        return SHAPES[self.kernel]


def jobs(size: int, is_fast: bool) -> dict[str, Job]:
    """The work of each kernel at numbers of this size."""
    blocks = wrappers.BACKWARD_BLOCKS
    down = wrappers.ELEMENTWISE_THREADS // wrappers.WARP
    turned = (TOKENS, HEADS, ROTARY, TOKENS, size, down, is_fast)
    found = {
        "rmsnorm": work.rmsnorm(TOKENS, D, size, is_fast),
        "rmsnorm_backward": work.rmsnorm_backward(TOKENS, D, size, blocks, is_fast),
        "rope": work.rope(*turned),
        "swiglu": work.swiglu(GATED, size),
        "swiglu_backward": work.swiglu_backward(GATED, size),
        "cross_entropy": work.cross_entropy(LOSS_ROWS, V, size, is_fast),
        "cross_entropy_backward": work.cross_entropy_backward(LOSS_ROWS, V, size),
    }
    if is_fast:
        return found | {"add_rmsnorm": work.add_rmsnorm(TOKENS, D, size)}
    return found | {"add": work.add(TOKENS * D, size)}


def cases() -> list[Case]:
    """Every first kernel, plain and fast, in both dtypes."""
    found = []
    for how, dtype in product(("plain", "fast"), SIZES):
        per = VECTOR // SIZES[dtype]
        for kernel, job in jobs(SIZES[dtype], how == "fast").items():
            if how == "plain":
                elementwise = kernel in ("add", "swiglu", "swiglu_backward")
                threads = wrappers.ELEMENTWISE_THREADS if elementwise else plain.THREADS
                function = getattr(plain, f"{kernel}_plain")
            else:
                threads, function = _fast(kernel, per)
            found.append(Case(kernel, how, dtype, function, threads, job))
    return found


def _fast(kernel: str, per: int) -> tuple[int, Callable[..., None]]:
    """Threads of a block, and the kernel for so many numbers in 16 bytes."""
    make = getattr(fast, f"{kernel}_fast")
    if "norm" in kernel:
        back = kernel == "rmsnorm_backward"
        kept = wrappers.MOST_KEPT_BACKWARD if back else wrappers.MOST_KEPT
        threads, vectors = wrappers.row_plan(D, per, kept)
        return threads, make(vectors, per)
    loss = kernel.startswith("cross_entropy")
    threads = wrappers.LOSS_THREADS if loss else wrappers.ELEMENTWISE_THREADS
    return threads, make(per)


def row(case: Case, code: Compiled) -> Row:
    """One line of the table, from the kernel's machine code for sm_90a."""
    fits = occupancy(H200, code.registers, case.threads, code.shared)
    under_way = fits.blocks * case.threads * max(loads_under_way(code.sass))
    here, there = floor(H200, case.job.work), floor(H100, case.job.work)
    return {
        "kernel": case.kernel, "how": case.how, "dtype": case.dtype,
        "shape": case.shape, "bytes": case.job.bytes,
        "operations": int(case.job.operations), "special": int(case.job.special),
        "threads": case.threads, "registers": code.registers, "shared": code.shared,
        "blocks": fits.blocks, "occupancy": fits.fraction,
        "limited_by": fits.limited_by,
        "under_way": under_way,
        "reachable": reachable(H200, under_way, loads=case.job.loads),
        "floor_h200_us": 1e6 * here.seconds, "floor_h100_us": 1e6 * there.seconds,
        "bound": here.bound,
    }  # fmt: skip


def head() -> list[str]:
    """Where the rows come from."""
    tools = ("numba", "numba-cuda", "nvidia-cuda-nvcc", "nvidia-nvjitlink")
    said = ", ".join(f"{tool} {metadata.version(tool)}" for tool in tools)
    return [
        "# python book/kernel_predictions.py",
        f"# {date.today()}, Python {platform.python_version()}, {said}",
        "# predictions: machine code for sm_90a and arithmetic; nothing was timed",
    ]


def main() -> None:
    """Compile everything, write the table."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    found = [
        row(case, compiled(case.function, case.signature, "sm_90a"))
        for case in tqdm(cases())
    ]
    write("kernel_predictions", found, head())


if __name__ == "__main__":
    main()
