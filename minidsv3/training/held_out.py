"""What every implementation's `evaluate` counts: bits per byte of held-out text."""

import math
from collections.abc import Callable, Iterator

import numpy as np

from minidsv3.corpus import BOUNDARY

Array = np.ndarray


def bits_per_byte(
    nats: Callable[[Array], float],
    tokens: Array,
    sequence_length: int,
    batch_size: int,
    n_bytes: int | None = None,
) -> float:
    """Bits per byte on ``tokens``, each but the first predicted once.

    ``nats(ids)`` is the mean loss of ids (b, t + 1), whose last t columns are the
    targets. The text is cut into windows of ``sequence_length`` targets. Each window
    starts without memory, so its first bytes are predicted from little, which costs a
    few percent. Boundaries are predicted too, and their bits count, but they are not
    bytes. n_bytes is how many bytes tokens[1:] stand for; None counts ids as bytes.
    Raises ValueError for lengths below 1 and for a text without a byte to predict,
    FloatingPointError for a loss that is not finite.
    """
    if n_bytes is None:
        n_bytes = int(np.count_nonzero(tokens[1:] != BOUNDARY))
    if n_bytes == 0 or min(sequence_length, batch_size) < 1:
        raise ValueError(
            f"evaluate: {len(tokens)} tokens with {n_bytes} bytes to predict, windows "
            f"of {sequence_length}, {batch_size} at a time: each must be at least 1"
        )
    windows = _windows(tokens, sequence_length, batch_size)
    total = sum(nats(ids) * ids[:, 1:].size for ids in windows)
    if not math.isfinite(total):
        raise FloatingPointError("evaluate: the loss on the text is not finite")
    return total / math.log(2) / n_bytes


def _windows(tokens: Array, length: int, batch_size: int) -> Iterator[Array]:
    """Consecutive windows (b, length + 1), one token shared; the rest comes last."""
    whole = (len(tokens) - 1) // length
    starts = np.arange(whole) * length
    for i in range(0, whole, batch_size):
        rows = starts[i : i + batch_size, None]
        yield tokens[rows + np.arange(length + 1)].astype(np.int64)
    rest = tokens[whole * length :]
    if len(rest) > 1:
        yield rest[None].astype(np.int64)
