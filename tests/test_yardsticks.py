"""The yardsticks against dictionaries, loops and the xz program's own library."""

import lzma
import math
from collections import Counter

import numpy as np
import pytest

from minidsv3 import yardsticks

TRAIN = np.array([256, *b"abracadabra banana", 256, *b"bandana", 256], np.uint16)
HELD = np.array([256, *b"a cab", 256, *b"nab!", 256], np.uint16)
N_BYTES = 9


def test_uniform() -> None:
    assert yardsticks.uniform(HELD) == pytest.approx(11 * math.log2(257) / N_BYTES)


def test_unigram_by_counting() -> None:
    counts = Counter(TRAIN.tolist())
    bits = sum(-math.log2((counts[t] + 1) / (len(TRAIN) + 257)) for t in HELD[1:])
    assert yardsticks.unigram(TRAIN, HELD) == pytest.approx(bits / N_BYTES)


def test_bigram_by_counting() -> None:
    counts = Counter(TRAIN.tolist())
    pairs = Counter(zip(TRAIN[:-1].tolist(), TRAIN[1:].tolist(), strict=True))
    starts = Counter(TRAIN[:-1].tolist())
    bits = 0.0
    for a, b in zip(HELD[:-1].tolist(), HELD[1:].tolist(), strict=True):
        share = (counts[b] + 1) / (len(TRAIN) + 257)
        bits -= math.log2((pairs[a, b] + share) / (starts[a] + 1))
    assert yardsticks.bigram(TRAIN, HELD) == pytest.approx(bits / N_BYTES)


def test_xz_alone_and_after_the_training_text() -> None:
    text = b"for i in range(10):\n    print(i * i)\n" * 50
    held = np.frombuffer(text, np.uint8).astype(np.uint16)
    alone = 8 * len(lzma.compress(text, preset=9)) / (len(text) - 1)
    assert yardsticks.xz(held) == pytest.approx(alone)
    noise = np.random.default_rng(0).integers(1, 256, 2000).astype(np.uint16)
    # after its own copy, noise costs a few bytes; alone it costs all of them
    assert yardsticks.xz(noise) > 8
    assert yardsticks.xz(noise, train=noise) < 0.5


def test_a_boundary_costs_but_is_no_byte() -> None:
    held = np.array([5, 256, 5], np.uint16)
    assert yardsticks.per_byte(10.0, held) == 10.0
