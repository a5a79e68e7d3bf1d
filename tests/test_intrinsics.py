"""The intrinsics' Python twins, each against an answer that is found another way.

bfloat16 against torch, functions against float64, tensor cores against a product of
matrices with the fragments laid out by NVIDIA's formulas, one element at a time.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from minidsv3.gpu import compile as gpu_compile
from minidsv3.gpu import intrinsics, tensor_cores
from minidsv3.gpu.compile import CompilerError, compiled
from minidsv3.gpu.intrinsics import (
    bits_of,
    exp2,
    float_of,
    high_of,
    log2,
    low_of,
    mma_bf16,
    pack2,
    reciprocal,
    rsqrt,
)
from minidsv3.gpu.simulator import DivergenceError, cuda, launch
from tests.intrinsic_kernels import elementwise, multiply, packed, unpacked

F32, U16, U32 = np.float32, np.uint16, np.uint32
NAN16 = 0x7FFF  # the one NaN that the hardware's rounding makes


# --- bfloat16 -----------------------------------------------------------------------


def torch_floats(bits: np.ndarray) -> np.ndarray:
    """What torch takes 16 bits for, as the bits of a float32."""
    tensor = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    return tensor.float().numpy().view(U32)


def torch_bits(values: np.ndarray) -> np.ndarray:
    """What torch rounds float32 to, with the hardware's NaN."""
    rounded = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16)
    return np.where(np.isnan(values), U16(NAN16), rounded.numpy().view(U16))


def floats_around_every_bfloat16() -> np.ndarray:
    """Of each upper half: itself, the halves between it and the next, and close by."""
    upper = np.arange(1 << 16, dtype=U32)[:, None] << U32(16)
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], U32)
    return (upper | lower).reshape(-1).view(F32)


def test_every_16_bits_mean_what_torch_says() -> None:
    bits = np.arange(1 << 16, dtype=U16)
    ours = np.array([float_of(b) for b in bits], F32)
    np.testing.assert_array_equal(ours.view(U32), torch_floats(bits))


def test_rounding_is_torchs_around_every_bfloat16() -> None:
    """Halfway cases, denormals, infinities and what becomes infinite among them."""
    values = floats_around_every_bfloat16()
    ours = np.fromiter(map(bits_of, values), U16, len(values))
    np.testing.assert_array_equal(ours, torch_bits(values))


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (0x3F800000, 0x3F80),  # 1
        (0x3F808000, 0x3F80),  # halfway, to even: down
        (0x3F818000, 0x3F82),  # halfway, to even: up
        (0x3F808001, 0x3F81),  # just above
        (0xBF818000, 0xBF82),  # the same below zero
        (0x7F7FFFFF, 0x7F80),  # the largest float32: infinity
        (0x7F7F7FFF, 0x7F7F),  # the largest that is not
        (0x7F800000, 0x7F80),
        (0xFF800000, 0xFF80),
        (0x7F800001, NAN16),  # a NaN whose upper half is infinity's
        (0xFFC00000, NAN16),
        (0x00000001, 0x0000),
        (0x80000001, 0x8000),
        (0x00018000, 0x0002),  # denormals are kept, and round as others do
        (0x007FFFFF, 0x0080),  # the largest of them becomes the smallest normal
    ],
)
def test_roundings_worked_by_hand(value, bits) -> None:
    number = U32(value).view(F32)
    assert bits_of(number) == bits
    assert isinstance(bits_of(number), U16)
    assert pack2(number, F32(0)) == bits
    assert pack2(F32(0), number) == bits << 16


def test_two_in_a_word_are_each_rounded_and_found_again() -> None:
    rng = np.random.default_rng(1)
    values = rng.choice(floats_around_every_bfloat16(), (20_000, 2))
    words = np.array([pack2(low, high) for low, high in values], U32)
    expected = torch_bits(values.reshape(-1)).reshape(-1, 2)
    np.testing.assert_array_equal(words & 0xFFFF, expected[:, 0])
    np.testing.assert_array_equal(words >> 16, expected[:, 1])
    again = np.array([(low_of(w), high_of(w)) for w in words], F32)
    np.testing.assert_array_equal(again.view(U32), torch_floats(expected))


def test_words_in_a_kernel() -> None:
    x = np.linspace(-3, 3, 90, dtype=F32)
    words, again = np.zeros(45, U32), np.zeros(90, F32)
    launch(packed, 2, 32, x, words, 45)
    launch(unpacked, 2, 32, words, again, 45)
    np.testing.assert_array_equal(again, torch.from_numpy(x).bfloat16().float())


# --- functions ----------------------------------------------------------------------


def ulps(ours: np.ndarray, exact: np.ndarray) -> float:
    """The largest error, in units of the last place of the exact float32."""
    assert ours.dtype == F32 and exact.dtype == np.float64
    return float((np.abs(ours - exact) / np.spacing(exact.astype(F32))).max())


positive = np.exp2(np.random.default_rng(2).uniform(-126, 126, 20_000)).astype(F32)
exponents = np.random.default_rng(3).uniform(-125, 127, 20_000).astype(F32)
both = np.concatenate([positive[::2], -positive[1::2]])
FUNCTIONS = {
    "exp2": (exp2, exponents, np.exp2, 2),
    "log2": (log2, positive, np.log2, 2),
    "rsqrt": (rsqrt, positive, lambda x: 1 / np.sqrt(x), 2),
    "reciprocal": (reciprocal, both, lambda x: 1 / x, 1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_to_the_last_places(name) -> None:
    twin, x, exact, most = FUNCTIONS[name]
    y = np.zeros_like(x)
    launch(elementwise(twin), len(x) // 32, 32, x, y, len(x))
    assert ulps(y, exact(x.astype(np.float64))) <= most


INF, NAN = np.inf, np.nan
LEAST, TINY = 2.0**-126, 1e-40  # the smallest normal number; one that is not
LARGEST_TINY = LEAST * (1 - 2.0**-23)
AT_THE_ENDS = [
    (exp2, [0.0, -0.0, 1.0, -1.0, 10.0, 127.0, INF, -INF, 128.0, -200.0, NAN,
            TINY, -TINY, -126.0, -126.5, -130.0, -149.0],
     [1.0, 1.0, 2.0, 0.5, 1024.0, 2.0**127, INF, 0.0, INF, 0.0, NAN,
      1.0, 1.0, LEAST, 0.0, 0.0, 0.0]),
    (log2, [1.0, 2.0, 0.5, 1024.0, 0.0, -0.0, INF, -INF, -1.0, NAN,
            TINY, -TINY, LARGEST_TINY, -LARGEST_TINY, LEAST],
     [0.0, 1.0, -1.0, 10.0, -INF, -INF, INF, NAN, NAN, NAN,
      -INF, -INF, -INF, -INF, -126.0]),
    (rsqrt, [1.0, 4.0, 0.0, -0.0, INF, -1.0, NAN,
             TINY, -TINY, LARGEST_TINY, -LARGEST_TINY, LEAST],
     [1.0, 0.5, INF, -INF, 0.0, NAN, NAN, INF, -INF, INF, -INF, 2.0**63]),
    (reciprocal, [1.0, -4.0, 0.0, -0.0, INF, -INF, NAN, TINY, -TINY, LARGEST_TINY,
                  -LARGEST_TINY, LEAST, 2.0**126, 3e38, -3e38],
     [1.0, -0.25, INF, -INF, 0.0, -0.0, NAN, INF, -INF, INF,
      -INF, 2.0**126, LEAST, 0.0, -0.0]),
]  # fmt: skip


@pytest.mark.parametrize(("twin", "x", "expected"), AT_THE_ENDS)
def test_functions_at_the_ends(twin, x, expected) -> None:
    """A sign of zero counts: NVIDIA's tables give it.

    What is too small to be normal counts as zero and becomes zero, its sign kept: .ftz.
    """
    x, expected = np.array(x, F32), np.array(expected, F32)
    y = np.zeros_like(x)
    launch(elementwise(twin), 1, 32, x, y, len(x))
    np.testing.assert_array_equal(y, expected)
    numbers = ~np.isnan(expected)
    assert (np.signbit(y) == np.signbit(expected))[numbers].all()


# --- tensor cores -------------------------------------------------------------------
# PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": element i of a
# fragment, as its formulas say it.


def place_in_A(lane: int, i: int) -> tuple[int, int]:
    group, in_group = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    column = in_group * 2 + (i & 1) + (0 if i < 4 else 8)
    return row, column


def place_in_B(lane: int, i: int) -> tuple[int, int]:
    group, in_group = lane >> 2, lane % 4
    return in_group * 2 + (i & 1) + (0 if i < 2 else 8), group


def place_in_C(lane: int, i: int) -> tuple[int, int]:
    group, in_group = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), in_group * 2 + (i & 1)


def upper_half(value: float) -> int:
    """The bits of a number that is a bfloat16."""
    bits = int(F32(value).view(U32))
    assert bits & 0xFFFF == 0
    return bits >> 16


def words_of(matrix: np.ndarray, place: Callable, words: int) -> np.ndarray:
    """Fragments of bfloat16 as `multiply` reads them: word k of lane t at t + 32 k."""
    out = np.zeros(32 * words, U32)
    for lane, k in itertools.product(range(32), range(words)):
        low = upper_half(matrix[place(lane, 2 * k)])
        high = upper_half(matrix[place(lane, 2 * k + 1)])
        out[lane + 32 * k] = high << 16 | low
    return out


def floats_of(matrix: np.ndarray) -> np.ndarray:
    out = np.zeros(128, F32)
    for lane, k in itertools.product(range(32), range(4)):
        out[lane + 32 * k] = matrix[place_in_C(lane, k)]
    return out


def matrix_of(fragments: np.ndarray) -> np.ndarray:
    out = np.full((16, 8), np.nan, F32)
    for lane, k in itertools.product(range(32), range(4)):
        out[place_in_C(lane, k)] = fragments[lane + 32 * k]
    return out


def multiplied(kernel: Callable, A: np.ndarray, B: np.ndarray, C: np.ndarray):
    """A kernel's ``A B + C``."""
    d = np.zeros(128, F32)
    a, b, c = words_of(A, place_in_A, 4), words_of(B, place_in_B, 2), floats_of(C)
    launch(kernel, 1, 32, a, b, c, d)
    return matrix_of(d)


def whole_numbers(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A, B and C whose product is exact in float32, in whatever order."""
    rng = np.random.default_rng(seed)
    return tuple(
        rng.integers(-9, 10, shape).astype(F32)
        for shape in ((16, 16), (16, 8), (16, 8))
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_tensor_core_multiplies_matrices(seed) -> None:
    A, B, C = whole_numbers(seed)
    expected = A.astype(int) @ B.astype(int) + C.astype(int)
    np.testing.assert_array_equal(multiplied(multiply(mma_bf16), A, B, C), expected)


def test_the_tensor_core_adds_in_float32() -> None:
    rng = np.random.default_rng(5)
    A, B = (
        torch.from_numpy(rng.normal(size=shape)).bfloat16().float().numpy()
        for shape in ((16, 16), (16, 8))
    )
    C = rng.normal(size=(16, 8)).astype(F32)
    exact = A.astype(float) @ B.astype(float) + C
    most = 17 * 2**-24 * (abs(A).astype(float) @ abs(B) + abs(C))  # 17 roundings
    assert (abs(multiplied(multiply(mma_bf16), A, B, C) - exact) <= most).all()


def swapped(*order: int) -> Callable:
    """A product whose author has mistaken the order of its ten words."""

    def mma(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1):
        given = (c0, c1, c2, c3, a0, a1, a2, a3, b0, b1)
        return mma_bf16(*(given[k] for k in order))

    return mma


def swapped_result(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1):
    d0, d1, d2, d3 = mma_bf16(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1)
    return d0, d2, d1, d3


def halves_swapped(c0, c1, c2, c3, a0, a1, a2, a3, b0, b1):
    turned = (int(b0) << 16 & 0xFFFFFFFF) | int(b0) >> 16
    return mma_bf16(c0, c1, c2, c3, a0, a1, a2, a3, U32(turned), b1)


MISTAKES = {
    "a1 and a2": swapped(0, 1, 2, 3, 4, 6, 5, 7, 8, 9),
    "a0 and a3": swapped(0, 1, 2, 3, 7, 5, 6, 4, 8, 9),
    "b0 and b1": swapped(0, 1, 2, 3, 4, 5, 6, 7, 9, 8),
    "c1 and c2": swapped(0, 2, 1, 3, 4, 5, 6, 7, 8, 9),
    "d1 and d2": swapped_result,
    "the halves of b0": halves_swapped,
}


@pytest.mark.parametrize("name", MISTAKES)
def test_words_in_the_wrong_order_are_seen(name) -> None:
    A, B, C = whole_numbers(0)
    assert (multiplied(multiply(MISTAKES[name]), A, B, C) != A @ B + C).any()


def test_all_lanes_multiply_or_none() -> None:
    def kernel(a, d):
        t = cuda.threadIdx.x
        if t < 31:
            d[t] = mma_bf16(0.0, 0.0, 0.0, 0.0, a[t], a[t], a[t], a[t], a[t], a[t])[0]

    with pytest.raises(DivergenceError, match="mma_bf16"):
        launch(kernel, 1, 32, np.zeros(32, U32), np.zeros(32, F32))


# --- ldmatrix -----------------------------------------------------------------------


def four_matrices() -> np.ndarray:
    """(4, 8, 8): 256 different 16-bit numbers."""
    rng = np.random.default_rng(7)
    return rng.permutation(1 << 16)[:256].astype(U16).reshape(4, 8, 8)


def rows_by_lane(matrices: np.ndarray) -> dict[int, tuple]:
    """Lane 8 m + r hands in row r of matrix m, in four words."""
    lanes = {}
    for m, r in itertools.product(range(4), range(8)):
        row = [int(x) for x in matrices[m, r]]
        words = tuple(U32(row[2 * k + 1] << 16 | row[2 * k]) for k in range(4))
        lanes[8 * m + r] = (words,)
    return lanes


def spread_by_hand(matrices: np.ndarray, transposed: bool) -> Iterator[tuple[int, int]]:
    """Lane, and its words: PTX ISA, ldmatrix, "fragment layout"."""
    for lane in range(32):
        words = []
        for m in range(4):
            pair = [(lane // 4, 2 * (lane % 4)), (lane // 4, 2 * (lane % 4) + 1)]
            if transposed:
                pair = [(column, row) for row, column in pair]
            low, high = (int(matrices[m][place]) for place in pair)
            words.append(high << 16 | low)
        yield lane, tuple(words)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_spreads_four_matrices(transposed) -> None:
    matrices = four_matrices()
    answers = tensor_cores.ldmatrix(rows_by_lane(matrices), transposed)
    assert answers == dict(spread_by_hand(matrices, transposed))
    assert answers != dict(spread_by_hand(matrices, not transposed))


@pytest.mark.parametrize("transposed", [True, False])
def test_the_second_matrix_comes_transposed(transposed) -> None:
    """A's fragments are pairs in a row and B's in a column, so B's load transposes."""
    A, B, _ = whole_numbers(8)
    halves = (A.view(U32) >> 16).astype(U16), (B.view(U32) >> 16).astype(U16)
    quarters = [halves[0][r : r + 8, c : c + 8] for c in (0, 8) for r in (0, 8)]
    a = tensor_cores.ldmatrix(rows_by_lane(np.array(quarters)))
    both = [halves[1][:8], halves[1][8:]] * 2
    b = tensor_cores.ldmatrix(rows_by_lane(np.array(both)), transposed)
    zeros = (F32(0),) * 4
    lanes = {lane: (zeros, a[lane], b[lane][:2]) for lane in range(32)}
    D = np.zeros((16, 8), F32)
    for lane, values in tensor_cores.mma_bf16(lanes).items():
        for k in range(4):
            D[place_in_C(lane, k)] = values[k]
    assert (D == A @ B).all() == transposed


# --- without the compiler -----------------------------------------------------------


def test_compiling_without_numba_cuda_is_explained(monkeypatch) -> None:
    def missing(name):
        raise gpu_compile.metadata.PackageNotFoundError(name)

    gpu_compile._numba_cuda.cache_clear()
    monkeypatch.setattr(gpu_compile.metadata, "version", missing)
    with pytest.raises(CompilerError) as caught:
        compiled(elementwise(exp2), "f4[] f4[] i4")
    gpu_compile._numba_cuda.cache_clear()
    for words in ("pip install 'minidsv3[cuda]'", "minidsv3.gpu.simulator"):
        assert words in str(caught.value)


def test_a_power_of_e_by_a_power_of_two() -> None:
    x = np.linspace(-20, 20, 101, dtype=F32)
    ours = np.array([exp2(v * intrinsics.LOG2_E) for v in x], F32)
    np.testing.assert_allclose(ours, np.exp(x.astype(float)), rtol=3e-6)
