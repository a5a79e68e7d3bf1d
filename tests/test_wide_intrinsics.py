"""The twins that move eight elements or a matrix at a time, in the simulator."""

import numpy as np
import pytest

from minidsv3.gpu import tensor_cores
from minidsv3.gpu.intrinsics import (
    bits_of,
    float_of,
    ldmatrix4,
    ldmatrix4_transposed,
    load8,
)
from minidsv3.gpu.simulator import BoundsError, UninitialisedError, cuda, launch
from tests import intrinsic_kernels as kernels
from tests.test_intrinsics import torch_bits, torch_floats, whole_numbers

F32, U16, U32 = np.float32, np.uint16, np.uint32
each_pair = pytest.mark.parametrize(
    ("source", "target"), [(F32, F32), (F32, U16), (U16, F32), (U16, U16)]
)


@each_pair
@pytest.mark.parametrize(
    ("kernel", "n", "wide"),
    [(kernels.copied, 61, 1), (kernels.wide_load, 56, 8), (kernels.wide_store, 56, 8)],
)
def test_elements_come_and_go(kernel, n, wide, source, target) -> None:
    """The first n of both arrays' elements, rounded as torch does, and no others."""
    values = np.random.default_rng(2).normal(size=64).astype(F32)
    bits = torch_bits(values)
    x = values if source is F32 else bits
    widened = torch_floats(bits).view(F32)
    expected = bits if target is U16 else values if source is F32 else widened
    y = np.zeros(64, target)
    launch(kernel, -(-n // (4 * wide)), 4, x, y, n)
    np.testing.assert_array_equal(y[:n], expected[:n])
    assert not y[n:].any()


def past_the_end(x, y):
    values = cuda.local.array(8, F32)
    load8(x, 8 * cuda.grid(1), values, 0)
    y[cuda.grid(1)] = values[0]


@pytest.mark.parametrize("dtype", [F32, U16])
def test_the_last_of_eight_is_checked_too(dtype) -> None:
    with pytest.raises(BoundsError):
        launch(past_the_end, 1, 2, np.zeros(15, dtype), np.zeros(2, F32))


def half_written(x, y, n):
    values = cuda.local.array(8, F32)
    for k in range(4):
        values[k] = x[k]
    kernels.store8(y, 0, values, 0)


def test_a_store_of_what_nobody_wrote_is_seen() -> None:
    with pytest.raises(UninitialisedError):
        launch(half_written, 1, 1, np.zeros(8, F32), np.zeros(8, F32), 8)


@pytest.mark.parametrize(
    ("load", "transposed"), [(ldmatrix4, False), (ldmatrix4_transposed, True)]
)
def test_a_lane_names_a_row_and_gets_its_part_of_all(load, transposed) -> None:
    x = np.random.default_rng(3).integers(0, 1 << 32, 128, dtype=U32)
    y = np.zeros(128, U32)
    launch(kernels.spread(load), 1, 32, x, y)
    rows = {lane: (tuple(x[4 * lane : 4 * lane + 4]),) for lane in range(32)}
    expected = tensor_cores.ldmatrix(rows, transposed)
    assert {lane: tuple(y[lane::32]) for lane in range(32)} == expected


@pytest.mark.parametrize("order", ["rising", "falling", 1])
def test_a_product_by_way_of_shared_memory(order) -> None:
    A, B, _ = whole_numbers(6)
    d = np.zeros(128, F32)
    words = [(M.view(U32) >> 16).astype(U16).reshape(-1).view(U32) for M in (A, B)]
    launch(kernels.product, 1, 32, *words, d, order=order)
    np.testing.assert_array_equal(d.reshape(16, 8), A @ B)


def test_half_a_word_is_where_the_other_twins_put_it() -> None:
    """``load8`` of words seen as bfloat16: the lower half comes first."""
    x = np.array([1.5, -2.0] * 4, F32)
    bits = np.array([bits_of(v) for v in x], U16)
    y = np.zeros(8, F32)
    launch(kernels.wide_load, 1, 1, bits, y, 8)
    words = bits.view(U32)
    assert [float_of(words[0] & 0xFFFF), float_of(words[0] >> 16)] == [1.5, -2.0]
    np.testing.assert_array_equal(y, x)
