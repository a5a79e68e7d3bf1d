"""What chapter 10 needs on its page: bfloat16, sums of counts, a blind simulator."""

import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import ml_dtypes
import numpy as np

from minidsv3.config import Config
from minidsv3.gpu.races import Memory
from minidsv3.gpu.simulator import Stats, launch

Array = np.ndarray


# --- bfloat16 -------------------------------------------------------------------------


def bits(values: Array) -> Array:
    """Numbers rounded to bfloat16, as the uint16 that a kernel takes; same shape."""
    return np.asarray(values).astype(ml_dtypes.bfloat16).view(np.uint16)


def floats(found: Array) -> Array:
    """What those bits mean, in float32."""
    return found.view(ml_dtypes.bfloat16).astype(np.float32)


def error(found: Any, exact: Any) -> float:
    """How far apart, against the length of the exact one; arrays or tensors."""
    found, exact = np.asarray(found), np.asarray(exact)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def float64(*arrays: Array) -> list[Array]:
    """What several arrays of bits mean, in float64."""
    return [floats(array).astype(float) for array in arrays]


# --- counts ---------------------------------------------------------------------------


class Traffic(NamedTuple):
    """What warps asked of global memory."""

    requests: int
    bytes: int
    sectors: int


def traffic(stats: Stats) -> dict[str, Traffic]:
    """By what was done to which array: ``{"read x": …}``, in the order of the source.

    ValueError for a launch without ``count=True``.
    """
    if not stats.accesses:
        raise ValueError("nothing was counted: launch(..., count=True)")
    sums: dict[str, Traffic] = {}
    for a in stats.accesses:
        if a.space == "global":
            name = f"{a.kind} {a.array}"
            old = sums.get(name, Traffic(0, 0, 0))
            found = Traffic(a.requests, a.bytes, a.sectors)
            sums[name] = Traffic(*map(sum, zip(old, found, strict=True)))
    return sums


def total(stats: Stats) -> Traffic:
    """Of all arrays together."""
    return Traffic(*map(sum, zip(*traffic(stats).values(), strict=True)))


def passes(stats: Stats) -> int:
    """How often the launch went to the banks of shared memory."""
    return sum(a.passes for a in stats.accesses)  # 0 for global memory


def norm_widths(config: Config) -> list[int]:
    """The width of each RMSNorm that a token passes, without MTP modules."""
    block = [config.hidden_size, config.kv_lora_rank, config.hidden_size]
    if config.q_lora_rank:
        block.insert(1, config.q_lora_rank)
    return config.num_hidden_layers * block + [config.hidden_size]


# --- errors ---------------------------------------------------------------------------


def said(wrong: Exception, width: int = 72) -> str:
    """An error's message, its long lines broken; indented ones are source."""
    lines = str(wrong).splitlines()
    broken = [[n] if n[:1] == " " else textwrap.wrap(n, width) for n in lines]
    return "\n".join(line for part in broken for line in part)


@contextmanager
def looking_away() -> Iterator[None]:
    """A simulator that does not look for races, as most do not: for one section."""
    with mock.patch.object(Memory, "_order", return_value=None):
        yield


# --- launches -------------------------------------------------------------------------


def norm_backward(
    kernel: Callable[..., None], blocks: int, threads: int,
    dy: Array, x: Array, g: Array, r: Array, **how: bool,
) -> tuple[Array, Array, Stats]:  # fmt: skip
    """RMSNorm's gradient by a kernel: dx like x (rows, width), dg (width), the launch.

    The blocks' shares of dg are added up here.
    """
    rows, width = x.shape
    dx, partial = np.zeros_like(x), np.zeros((blocks, width), np.float32)
    arrays = dy.ravel(), x.ravel(), g, r, dx.ravel(), partial.ravel()
    numbers = np.uint32(rows), np.uint32(width), np.float32(1 / width)
    stats = launch(kernel, blocks, threads, *arrays, *numbers, **how)
    return dx, partial.sum(0), stats


def losses(
    kernel: Callable[..., None], threads: int, z: Array, targets: Array, **how: bool
) -> tuple[Array, tuple[Array, Array], Stats]:
    """Each row's cross-entropy by a kernel, what it saves, and the launch.

    Saved are each row's maximum and the logarithm of its sum above that.
    """
    found, highest, log_sums = np.zeros((3, len(z)), np.float32)
    arrays = z.ravel(), targets, found, highest, log_sums, np.uint32(z.shape[1])
    stats = launch(kernel, len(z), threads, *arrays, **how)
    return found, (highest, log_sums), stats
