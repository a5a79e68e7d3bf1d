"""Each intrinsic on a GPU against its Python twin.

Skipped where there is no NVIDIA card, and failed where there is one that Numba does not
find. Whatever numba-cuda is installed is used: the head of the report names it.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numba import cuda

from minidsv3.gpu import tensor_cores
from minidsv3.gpu.compile import for_numba
from minidsv3.gpu.intrinsics import (
    bits_of,
    exp2,
    float_of,
    high_of,
    ldmatrix4,
    ldmatrix4_transposed,
    log2,
    low_of,
    mma_bf16,
    pack2,
    reciprocal,
    rsqrt,
)
from tests import intrinsic_kernels as kernels
from tests.intrinsic_kernels import elementwise, multiply, spread
from tests.test_intrinsics import (
    AT_THE_ENDS,
    FUNCTIONS,
    floats_around_every_bfloat16,
    floats_of,
    matrix_of,
    place_in_A,
    place_in_B,
    whole_numbers,
    words_of,
)

F32, U16, U32 = np.float32, np.uint16, np.uint32
APPROXIMATE = 2.0**-22  # PTX ISA: the largest relative error of ex2, rsqrt, rcp, lg2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Grid size"),  # of one block, as is meant
]


@pytest.fixture(autouse=True)
def card() -> None:
    """A card, or the reason why there is none."""
    if cuda.is_available():
        return
    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")
    if driver:
        pytest.fail(
            f"an NVIDIA driver, but Numba does not find it: {cuda.cuda_error()}"
        )
    pytest.skip("needs an NVIDIA card, and there is no driver of one here")


def run(kernel: Callable, grid: int, block: int, *args) -> None:
    """Launch a kernel; arrays among the arguments change in place."""
    there = [cuda.to_device(a) if isinstance(a, np.ndarray) else a for a in args]
    cuda.jit(for_numba(kernel))[grid, block](*there)
    cuda.synchronize()
    for here, array in zip(args, there, strict=True):
        if isinstance(here, np.ndarray):
            array.copy_to_host(here)


def mapped(function: Callable, x: np.ndarray, dtype: type) -> np.ndarray:
    """An intrinsic of every element."""
    y = np.zeros(len(x), dtype)
    run(elementwise(function), -(-len(x) // 256), 256, x, y, len(x))
    return y


# --- bfloat16 -----------------------------------------------------------------------


def test_every_bfloat16_is_widened() -> None:
    bits = np.arange(1 << 16, dtype=U16)
    expected = np.array([float_of(b) for b in bits], F32)
    ours = mapped(float_of, bits, F32)
    np.testing.assert_array_equal(ours.view(U32), expected.view(U32))


def test_rounding_is_the_twins_around_every_bfloat16() -> None:
    values = floats_around_every_bfloat16()
    expected = np.fromiter(map(bits_of, values), U16, len(values))
    np.testing.assert_array_equal(mapped(bits_of, values, U16), expected)


def test_two_in_a_word() -> None:
    rng = np.random.default_rng(1)
    x = rng.choice(floats_around_every_bfloat16(), 2 * 4096)
    words, again = np.zeros(4096, U32), np.zeros(2 * 4096, F32)
    run(kernels.packed, 16, 256, x, words, 4096)
    expected = np.array([pack2(x[2 * i], x[2 * i + 1]) for i in range(4096)], U32)
    np.testing.assert_array_equal(words, expected)
    run(kernels.unpacked, 16, 256, words, again, 4096)
    halves = np.array([(low_of(w), high_of(w)) for w in words], F32).reshape(-1)
    np.testing.assert_array_equal(again.view(U32), halves.view(U32))


# --- functions ----------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_near_the_exact_ones(name) -> None:
    function, x, exact, _ = FUNCTIONS[name]
    ours = mapped(function, x, F32)
    near_one = APPROXIMATE if name == "log2" else 0  # there its error is absolute
    np.testing.assert_allclose(
        ours, exact(x.astype(float)), rtol=APPROXIMATE, atol=near_one
    )


@pytest.mark.parametrize(("function", "x", "expected"), AT_THE_ENDS)
def test_functions_at_the_ends(function, x, expected) -> None:
    expected = np.array(expected, F32)
    ours = mapped(function, np.array(x, F32), F32)
    at_one = APPROXIMATE if function is log2 else 0
    np.testing.assert_allclose(ours, expected, rtol=APPROXIMATE, atol=at_one)
    numbers = ~np.isnan(expected)
    if function is log2:
        numbers &= expected != 0
    assert (np.signbit(ours) == np.signbit(expected))[numbers].all()


@pytest.mark.parametrize("function", [exp2, log2, rsqrt, reciprocal])
def test_denormals_are_zero_as_to_the_twin(function) -> None:
    """``.ftz``, of either sign; the bits are compared."""
    bits = np.random.default_rng(8).integers(1, 1 << 23, 2000, dtype=U32)
    tiny = np.concatenate([bits, bits | U32(1 << 31)]).view(F32)
    with np.errstate(divide="ignore"):
        expected = np.array([function(x) for x in tiny], F32)
    assert len(set(expected.tolist())) <= 2  # 1, or infinities
    ours = mapped(function, tiny, F32)
    np.testing.assert_array_equal(ours.view(U32), expected.view(U32))


@pytest.mark.parametrize(
    ("function", "x"),
    [(exp2, np.linspace(-149.9, -126.1, 500)),
     (reciprocal, np.exp2(np.linspace(126.1, 127.9, 500))),
     (reciprocal, -np.exp2(np.linspace(126.1, 127.9, 500)))],
)  # fmt: skip
def test_results_that_would_be_denormal_are_zero_as_the_twins(function, x) -> None:
    x = x.astype(F32)
    ours, expected = mapped(function, x, F32), np.array([function(v) for v in x], F32)
    assert not expected.any()
    np.testing.assert_array_equal(ours.view(U32), expected.view(U32))


# --- elements -----------------------------------------------------------------------

each_pair = pytest.mark.parametrize(
    ("source", "target"), [(F32, F32), (F32, U16), (U16, F32), (U16, U16)]
)


@each_pair
@pytest.mark.parametrize(
    ("kernel", "n", "wide"),
    [
        (kernels.copied, 1003, 1),
        (kernels.wide_load, 1000, 8),
        (kernels.wide_store, 1000, 8),
        (kernels.load_of_four, 1004, 4),
        (kernels.store_of_four, 1004, 4),
    ],
)
def test_elements_come_and_go(kernel, n, wide, source, target) -> None:
    """The first n of both arrays' elements, and no others."""
    values = np.random.default_rng(2).normal(size=1024).astype(F32)
    bits = np.array([bits_of(v) for v in values], U16)
    x = values if source is F32 else bits
    rounded = np.array([float_of(b) for b in bits], F32)
    expected = bits if target is U16 else values if source is F32 else rounded
    y = np.zeros(1024, target)
    run(kernel, -(-n // (32 * wide)), 32, x, y, n)
    np.testing.assert_array_equal(y[:n], expected[:n])
    assert not y[n:].any()


@pytest.mark.parametrize("like", [F32, U16])
def test_rounding_to_an_arrays_numbers_is_the_twins(like) -> None:
    x = np.random.default_rng(9).choice(floats_around_every_bfloat16(), 4096)
    room, y = np.zeros(1, like), np.zeros_like(x)
    run(kernels.rounded, 16, 256, x, y, room, len(x))
    expected = x if like is F32 else np.array([float_of(bits_of(v)) for v in x], F32)
    np.testing.assert_array_equal(y.view(U32), expected.view(U32))


# --- a warp's operations ------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "transposed"), [(ldmatrix4, False), (ldmatrix4_transposed, True)]
)
def test_matrices_are_spread_as_by_the_twin(load, transposed) -> None:
    x = np.random.default_rng(3).integers(0, 1 << 32, 128, dtype=U32)
    y = np.zeros(128, U32)
    run(spread(load), 1, 32, x, y)
    rows = {lane: (tuple(x[4 * lane : 4 * lane + 4]),) for lane in range(32)}
    expected = tensor_cores.ldmatrix(rows, transposed)
    ours = {lane: tuple(y[lane::32]) for lane in range(32)}
    assert ours == expected


def multiplied(A: np.ndarray, B: np.ndarray, C: np.ndarray):
    """``A B + C`` by the GPU, and by the twin from the same fragments."""
    a, b, c = words_of(A, place_in_A, 4), words_of(B, place_in_B, 2), floats_of(C)
    d, twin = np.zeros(128, F32), np.zeros(128, F32)
    run(multiply(mma_bf16), 1, 32, a, b, c, d)
    lanes = {t: (tuple(c[t::32]), tuple(a[t::32]), tuple(b[t::32])) for t in range(32)}
    for lane, values in tensor_cores.mma_bf16(lanes).items():
        twin[lane::32] = values
    return matrix_of(d), matrix_of(twin)


def test_the_tensor_core_multiplies_as_its_twin() -> None:
    A, B, C = whole_numbers(4)
    ours, twin = multiplied(A, B, C)
    np.testing.assert_array_equal(ours, twin)
    np.testing.assert_array_equal(ours, A @ B + C)


def test_the_tensor_core_adds_in_float32() -> None:
    """In an order of its own, and with roundings of which little is told."""
    rng = np.random.default_rng(5)

    def numbers(*shape):
        drawn = rng.normal(size=shape).astype(F32)
        return (drawn.view(U32) & U32(0xFFFF0000)).view(F32)

    A, B, C = numbers(16, 16), numbers(16, 8), rng.normal(size=(16, 8)).astype(F32)
    ours, twin = multiplied(A, B, C)
    size = abs(A) @ abs(B) + abs(C)
    assert (abs(ours - twin) <= 2.0**-19 * size).all()  # bfloat16 would be 2**-8


def test_a_product_by_way_of_shared_memory() -> None:
    A, B, _ = whole_numbers(6)
    d = np.zeros(128, F32)
    words = [(M.view(U32) >> 16).astype(U16).reshape(-1).view(U32) for M in (A, B)]
    run(kernels.product, 1, 32, *words, d)
    np.testing.assert_array_equal(d.reshape(16, 8), A @ B)


# --- copies that do not wait --------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "rows"), [(kernels.copied_aside, 1), (kernels.copied_in_stages, 2)]
)
def test_copies_arrive_before_the_wait_ends(kernel, rows) -> None:
    x = np.random.default_rng(7).integers(0, 1 << 32, 128 * rows, dtype=U32)
    y = np.zeros_like(x)
    run(kernel, 1, 32, x, y)
    np.testing.assert_array_equal(y.reshape(rows, 128), x.reshape(rows, 128)[:, ::-1])
