"""Bits per byte without a network: what a trained model has to beat.

Each takes token arrays (N,) with ids 0…256 as `minidsv3.corpus` makes them and counts
as `minidsv3.training.numpy_ref.evaluate` does: every held-out token but the first is
paid for, and the bill is divided by the number of bytes among them.
"""

import lzma
import math

import numpy as np

from minidsv3.corpus import BOUNDARY, VOCAB_SIZE

Array = np.ndarray


def per_byte(bits: float, held_out: Array) -> float:
    """Divide a bill in bits by the number of bytes that were predicted."""
    return float(bits) / int(np.count_nonzero(held_out[1:] != BOUNDARY))


def uniform(held_out: Array) -> float:
    """Every id equally likely: log2(257) bits a token, whatever came before."""
    return per_byte((len(held_out) - 1) * math.log2(VOCAB_SIZE), held_out)


def unigram(train: Array, held_out: Array) -> float:
    """Each id as often as in the training text; one added count, so none is free of
    charge or impossible.
    """
    law = _frequencies(train)
    return per_byte(-np.log2(law[held_out[1:]]).sum(), held_out)


def bigram(train: Array, held_out: Array) -> float:
    """Each id as often as it followed the one before it in the training text.

    To each row of pairs one count is added, shared out by how frequent each id is, so
    that a pair which never occurred is not impossible.
    """
    pairs = np.zeros((VOCAB_SIZE, VOCAB_SIZE))
    np.add.at(pairs, (train[:-1], train[1:]), 1)
    smooth = pairs + _frequencies(train)
    law = smooth / smooth.sum(axis=1, keepdims=True)  # (V, V)
    return per_byte(-np.log2(law[held_out[:-1], held_out[1:]]).sum(), held_out)


def xz(held_out: Array, train: Array | None = None) -> float:
    """``xz -9`` on the held-out text; with ``train``, what it adds after that text.

    A boundary is written as a zero byte, which no text contains.
    """
    data = _as_bytes(held_out)
    if train is None:
        return per_byte(8 * _xz_size(data), held_out)
    before = _as_bytes(train)
    return per_byte(8 * (_xz_size(before + data) - _xz_size(before)), held_out)


def _frequencies(tokens: Array) -> Array:
    counts = np.bincount(tokens, minlength=VOCAB_SIZE) + 1.0
    return counts / counts.sum()


def _as_bytes(tokens: Array) -> bytes:
    return np.where(tokens == BOUNDARY, 0, tokens).astype(np.uint8).tobytes()


def _xz_size(data: bytes) -> int:
    return len(lzma.compress(data, preset=9))
