"""The twins that move several elements or a matrix at a time, in the simulator."""

import numpy as np
import pytest

from minidsv3.gpu import tensor_cores
from minidsv3.gpu.intrinsics import (
    bits_of,
    float_of,
    ldmatrix4,
    ldmatrix4_transposed,
    load4,
    load8,
    store4,
    store8,
)
from minidsv3.gpu.simulator import (
    AlignmentError,
    BoundsError,
    UninitialisedError,
    cuda,
    launch,
)
from tests import intrinsic_kernels as kernels
from tests.test_intrinsics import torch_bits, torch_floats, whole_numbers

F32, U16, U32 = np.float32, np.uint16, np.uint32
each_pair = pytest.mark.parametrize(
    ("source", "target"), [(F32, F32), (F32, U16), (U16, F32), (U16, U16)]
)


@each_pair
@pytest.mark.parametrize(
    ("kernel", "n", "wide"),
    [(kernels.copied, 61, 1), (kernels.wide_load, 56, 8), (kernels.wide_store, 56, 8),
     (kernels.load_of_four, 60, 4), (kernels.store_of_four, 52, 4)],
)  # fmt: skip
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


def past_the_end(load, n):
    def kernel(x, y):
        values = cuda.local.array(n, F32)
        load(x, n * cuda.grid(1), values, 0)
        y[cuda.grid(1)] = values[0]

    return kernel


@pytest.mark.parametrize("dtype", [F32, U16])
@pytest.mark.parametrize(("load", "n"), [(load4, 4), (load8, 8)])
def test_the_last_of_several_is_checked_too(load, n, dtype) -> None:
    kernel = past_the_end(load, n)
    launch(kernel, 1, 2, np.zeros(2 * n, dtype), np.zeros(2, F32))
    with pytest.raises(BoundsError):
        launch(kernel, 1, 2, np.zeros(2 * n - 1, dtype), np.zeros(2, F32))


def beside(load):
    def kernel(x, i):
        load(x, i, cuda.local.array(8, F32), 0)

    return kernel


@pytest.mark.parametrize(
    ("load", "dtype", "good", "bad"),
    [(load8, U16, 8, 4), (load8, F32, 8, 2), (load4, F32, 4, 2), (load4, U16, 4, 2)],
)
def test_an_index_between_multiples_is_seen(load, dtype, good, bad) -> None:
    launch(beside(load), 1, 1, np.zeros(32, dtype), good)
    with pytest.raises(AlignmentError):
        launch(beside(load), 1, 1, np.zeros(32, dtype), bad)


@pytest.mark.parametrize("like", [F32, U16])
def test_rounding_to_an_arrays_numbers_is_storing_and_loading(like) -> None:
    """Ties and what becomes infinite among them; float32 stays as it is."""
    x = np.array([1.0, 1.00390625, 1.01171875, 3.4e38, -0.1, 1e-40, 0.0], F32)
    expected = x if like is F32 else torch_floats(torch_bits(x)).view(F32)
    y = np.zeros_like(x)
    launch(kernels.rounded, 1, 7, x, y, np.zeros(1, like), len(x))
    np.testing.assert_array_equal(y.view(U32), expected.view(U32))


def half_written(store, n):
    def kernel(x, y):
        values = cuda.local.array(n, F32)
        for k in range(n // 2):
            values[k] = x[k]
        store(y, 0, values, 0)

    return kernel


@pytest.mark.parametrize(("store", "n"), [(store4, 4), (store8, 8)])
def test_a_store_of_what_nobody_wrote_is_seen(store, n) -> None:
    with pytest.raises(UninitialisedError):
        launch(half_written(store, n), 1, 1, np.zeros(8, F32), np.zeros(8, F32))


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
