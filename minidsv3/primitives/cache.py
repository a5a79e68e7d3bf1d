"""The cache that decoding keeps, of NumPy's arrays or of torch's tensors."""

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = Any  # np.ndarray, or torch.Tensor, which this module does not import


class Cache:
    """The past that attention keeps: arrays that grow along axis 1 (time).

    Plain attention stores rotated keys and values, MLA its latent and its rotated key.
    Memory for ``capacity`` positions is taken once, at the first call of `extend`.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"cache: capacity is {capacity}, must be at least 1")
        self.capacity = capacity
        self.length = 0
        self._arrays: tuple[Array, ...] = ()

    def extend(self, *new: Array) -> tuple[Array, ...]:
        """Append ``new`` arrays (B, T, ...) and return all that is kept, (B, S, ...).

        The answers are views: valid until the next call. Raises ValueError when the
        cache is full or belongs to another model or batch, leaving it as it was.
        """
        end = self.length + new[0].shape[1]
        self._check_and_make_room(new)
        for kept, n in zip(self._arrays, new, strict=True):
            kept[:, self.length : end] = n
        self.length = end
        return tuple(kept[:, :end] for kept in self._arrays)

    def crop(self, length: int) -> None:
        """Forget every position from ``length`` on (a rejected draft, say)."""
        if not 0 <= length <= self.length:
            raise ValueError(
                f"cache: cannot crop to {length}, it holds {self.length} positions"
            )
        self.length = length

    def positions(self, T: int) -> np.ndarray:
        """Where T more tokens will stand: (T,)."""
        return np.arange(self.length, self.length + T)

    def visible(self, T: int) -> np.ndarray | None:
        """None: T new tokens are the last, and see all that `extend` returns up to
        themselves."""
        return None

    @property
    def arrays(self) -> tuple[Array, ...]:
        """What is kept and the room behind it, (B, capacity, ...); nothing at first."""
        return self._arrays

    @property
    def nbytes(self) -> int:
        """Bytes that the kept positions fill, counted from the arrays."""
        return sum(kept[:, : self.length].nbytes for kept in self._arrays)

    def _check_and_make_room(self, new: tuple[Array, ...]) -> None:
        T = new[0].shape[1]
        if self.length + T > self.capacity:
            raise ValueError(
                f"cache: {self.length} positions are kept and {T} more arrive, "
                f"but it was made for {self.capacity}"
            )
        if not self._arrays:
            self._arrays = tuple(self._room_for(n) for n in new)
        self._check_kind(new)

    def _room_for(self, n: Array) -> Array:
        """Zeros: what is hidden by a weight of 0 must not be NaN."""
        shape = (n.shape[0], self.capacity, *n.shape[2:])
        if isinstance(n, np.ndarray):
            return np.zeros(shape, n.dtype)
        return n.new_zeros(shape)  # a tensor, on its own device

    def _check_kind(self, new: tuple[Array, ...]) -> None:
        """Assignment would stretch a batch of one, and round float64 to float32."""
        kept, given = _kinds(self._arrays), _kinds(new)
        if kept != given:
            raise ValueError(
                f"cache: it keeps {kept} (batch, widths, precision), but {given} "
                "arrives; a cache is for one model and one batch"
            )


class RaggedCache(Cache):
    """The same for texts of different lengths: each row continues at its own end.

    After `settle`, `extend` writes behind each row's end and moves no end; the next
    `settle` says how much of it counts. What lies behind an end is rubbish that
    `visible` hides and later tokens write over.
    """

    lengths: np.ndarray | None = None  # (B,), once settled

    def settle(self, lengths: np.ndarray) -> None:
        """Each row holds so many positions: lengths (B,)."""
        self.lengths, self.length = lengths, int(lengths.max())

    def extend(self, *new: Array) -> tuple[Array, ...]:
        """Write ``new`` (B, T, ...) behind each row's end; all that any row holds.

        Raises as `Cache.extend` does, leaving everything as it was.
        """
        if self.lengths is None:
            return super().extend(*new)
        T = new[0].shape[1]
        self._check_and_make_room(new)
        rows, places = np.arange(len(self.lengths))[:, None], self.positions(T)
        for kept, n in zip(self._arrays, new, strict=True):
            kept[rows, places] = n
        return tuple(kept[:, : self.length + T] for kept in self._arrays)

    def positions(self, T: int) -> np.ndarray:
        """Where T more tokens of each row will stand: (T,), or (B, T) once settled."""
        if self.lengths is None:
            return super().positions(T)
        return self.lengths[:, None] + np.arange(T)

    def visible(self, T: int) -> np.ndarray | None:
        """What T new tokens of each row see of what `extend` returns: (B, T, S)."""
        if self.lengths is None:
            return None
        return np.arange(self.length + T) <= self.positions(T)[..., None]

    def select(self, rows: np.ndarray) -> None:
        """Keep these rows of the batch alone, and their ends."""
        if self.lengths is not None:
            self.settle(self.lengths[rows])
        self._arrays = tuple(kept[rows] for kept in self._arrays)


def common_length(caches: Sequence[Cache], layers: int) -> int:
    """Positions that the caches of all layers hold.

    Raises ValueError unless each layer has one, and all hold equally many.
    """
    if len(caches) != layers:
        raise ValueError(
            f"{len(caches)} caches for {layers} layers: give each one, as new_caches "
            "does"
        )
    lengths = [cache.length for cache in caches]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"the layers' caches hold {', '.join(map(str, lengths))} positions: extend "
            "and crop all alike"
        )
    return lengths[0]


def _kinds(arrays: tuple[Array, ...]) -> list[tuple]:
    """Batch, widths, precision and device of arrays, whatever their length."""
    return [
        (a.shape[0], *a.shape[2:], str(a.dtype), *(_device(a) or ())) for a in arrays
    ]


def _device(array: Array) -> tuple[str] | None:
    """Where a tensor lies; NumPy's arrays lie in one place."""
    return None if isinstance(array, np.ndarray) else (str(array.device),)
