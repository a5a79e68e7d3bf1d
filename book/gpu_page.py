"""What chapter 10 needs on its page: bfloat16, sums of counts, a simulator half blind."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import ml_dtypes
import numpy as np

from minidsv3.config import Config
from minidsv3.gpu.races import Memory
from minidsv3.gpu.simulator import Stats

Array = np.ndarray


# --- bfloat16 -------------------------------------------------------------------------


def bits(values: Array) -> Array:
    """Numbers rounded to bfloat16, as the uint16 that a kernel takes; same shape."""
    return np.asarray(values).astype(ml_dtypes.bfloat16).view(np.uint16)


def floats(found: Array) -> Array:
    """What those bits mean, in float32."""
    return found.view(ml_dtypes.bfloat16).astype(np.float32)


def error(found: Array, exact: Array) -> float:
    """How far apart, against the length of the exact one."""
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


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
    return sum(a.passes for a in stats.accesses if a.space == "shared")


def norm_widths(config: Config) -> list[int]:
    """The width of each RMSNorm that a token passes, without MTP modules."""
    block = [config.hidden_size, config.kv_lora_rank, config.hidden_size]
    if config.q_lora_rank:
        block.insert(1, config.q_lora_rank)
    return config.num_hidden_layers * block + [config.hidden_size]


# --- the rest -------------------------------------------------------------------------


@contextmanager
def looking_away() -> Iterator[None]:
    """A simulator that does not look for races, as most do not: for one section."""
    with mock.patch.object(Memory, "_order", lambda *_: None):
        yield
