"""What makes torch fast on a processor: two settings of the whole process.

The command line sets them; the library's functions never do.
"""

import ctypes
import sys

import torch


def keep_freed_memory() -> None:
    """Ask Linux's C library not to hand freed memory back: it is needed again at once.

    A step frees and takes hundreds of megabytes. Each time, the system clears every
    page anew, which costs a tenth of the step and more (measured; the chapter on
    training has the table). Elsewhere nothing is done.
    """
    if sys.platform != "linux":
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # the names of mallopt(3)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 2**28)


def float32_through_onednn() -> bool:
    """Let oneDNN compute float32 products, if it computes them in float32.

    torch's own choice, MKL, runs at half speed on processors that are not Intel's.
    torch asks oneDNN only where products may be rounded to bfloat16, and oneDNN does so
    only on processors with matrix units (AMX). So the permission is given, it is looked
    at whether use is made of it, and then it is taken back. Returns whether it stays.
    """
    home = torch.backends.mkldnn
    if not home.is_available():
        return False
    before = home.matmul.fp32_precision
    home.matmul.fp32_precision = "bf16"
    if all(_is_float32(*shape) for shape in ((64, 64, 64), (256, 384, 512))):
        return True
    home.matmul.fp32_precision = before
    return False


def _is_float32(m: int, k: int, n: int) -> bool:
    """Whether a product of m × k and k × n is as exact as float32 can be."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(m, k, generator=generator)
    b = torch.randn(k, n, generator=generator)
    exact = a.double() @ b.double()
    error = ((a @ b).double() - exact).norm() / exact.norm()
    return error.item() < 1e-6  # bfloat16 would be wrong by 3e-3
