"""Tensors in one safetensors file: read whole, read by mapping, written whole.

A file starts with a header of names, types and shapes, and ends with the bytes. So
opening one costs its header, however large it is, and everything that can be wrong with
a file but its numbers is known before the first of them is read.
"""

import math
import mmap
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minidsv3.files import replacing

TYPES = {
    **{f"F{n}": np.dtype(f"f{n // 8}") for n in (16, 32, 64)},
    **{
        f"{k}{n}": np.dtype(f"{k.lower()}{n // 8}")
        for k in "IU"
        for n in (8, 16, 32, 64)
    },
    "BOOL": np.dtype(bool),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}


class CheckpointError(ValueError):
    """A file that is missing, broken, or does not belong to its config."""


class OpenFile:
    """A file that stays the same to its readers, though another takes its name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self.number)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its type and shape are known, its numbers not yet read."""

    file: OpenFile
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # byte in the file

    @property
    def path(self) -> Path:
        """The file it lies in."""
        return self.file.path

    def mapped(self) -> np.ndarray:
        """The tensor, read-only, as a window into the file: read when it is used.

        The window is closed with its last view, so that a program which copies one
        tensor after another never holds more than one of them twice.
        """
        count = math.prod(self.shape)
        if count == 0:
            return np.empty(self.shape, self.dtype)
        before = self.start % mmap.ALLOCATIONGRANULARITY
        window = mmap.mmap(
            self.file.number,
            before + count * self.dtype.itemsize,
            access=mmap.ACCESS_READ,
            offset=self.start - before,
        )
        return np.frombuffer(window, self.dtype, count, before).reshape(self.shape)


def open_tensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Every tensor of a file, unread, and the file's metadata.

    The library checks that the header is sound and that tensors fill the file without
    a gap. It gives no FP8 to NumPy (version 0.8), hence the mapping is our own. Raises
    CheckpointError, with the path, for a file that is broken, cut short or replaced at
    this moment, and for a type that NumPy does not have.
    """
    try:
        opened = OpenFile(path)
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            headers = {
                k: (s.get_dtype(), tuple(s.get_shape())) for k, s in slices.items()
            }
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}); it may be cut "
            "short: copy or download it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error}") from error
    status = os.fstat(opened.number)
    if not os.path.samestat(status, path.stat()):
        raise CheckpointError(f"{path} was replaced while it was opened; try again")
    stored, end = {}, status.st_size
    for name, (kind, shape) in reversed(headers.items()):  # the last ends with the file
        if kind not in TYPES:
            raise CheckpointError(
                f"{path}: {name} is of type {kind}, which is not read; known are "
                f"{', '.join(TYPES)}"
            )
        end -= math.prod(shape) * TYPES[kind].itemsize
        stored[name] = Stored(opened, TYPES[kind], shape, end)
    return stored, metadata


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a safetensors file, read, and its metadata.

    Raises CheckpointError as `open_tensors` does.
    """
    stored, metadata = open_tensors(path)
    return {name: tensor.mapped().copy() for name, tensor in stored.items()}, metadata


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file, whole or not at all.

    Raises CheckpointError, with the path, if there is no room for it.
    """
    with replacing(path) as beside:
        fill(beside, tensors, metadata)


def fill(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file in place; raises as `write_tensors` does."""
    whole = {name: np.ascontiguousarray(a) for name, a in tensors.items()}
    try:
        save_file(whole, path, dict(metadata))
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
