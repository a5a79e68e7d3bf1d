"""What chapter 10 counts and computes on its page, against numbers known by hand."""

import sys
from pathlib import Path

import numpy as np
import pytest

BOOK = Path(__file__).parents[1] / "book"
sys.path.insert(0, str(BOOK))

import gpu_page as page  # noqa: E402

from minidsv3.config import V3  # noqa: E402
from minidsv3.gpu.simulator import BoundsError, RaceError, cuda, launch  # noqa: E402
from minidsv3.primitives import fast_cuda_kernels as fast  # noqa: E402
from minidsv3.primitives import numpy_ref  # noqa: E402
from minidsv3.primitives import plain_cuda_kernels as plain  # noqa: E402

EPS = 1e-6


# --- bfloat16 -------------------------------------------------------------------------


def test_bits_are_the_upper_half_of_a_float32():
    values = np.array([[1.0, -2.5], [2.0**-126, 0.0]], np.float32)  # exact in bfloat16
    assert np.array_equal(page.bits(values), values.view(np.uint32) >> 16)
    assert np.array_equal(page.floats(page.bits(values)), values)
    (wide,) = page.float64(page.bits(values))
    assert wide.dtype == np.float64 and np.array_equal(wide, values)


def test_bits_round_to_the_even_one():
    assert page.floats(page.bits([1 + 2**-8, 1 + 3 * 2**-8])).tolist() == [1, 1 + 2**-6]


def test_error_is_relative():
    assert page.error(np.array([3.0, 4.5]), np.array([3.0, 4.0])) == pytest.approx(0.1)


# --- counts ---------------------------------------------------------------------------


def double(x, y):
    tile = cuda.shared.array(64, np.float32)
    i = cuda.threadIdx.x
    tile[i] = x[i]
    y[i] = tile[i] + x[i]


def test_traffic_by_hand():
    """Two warps: each reads x twice, in 4 sectors, and goes to the banks twice."""
    x, y = np.ones((2, 64), np.float32)
    stats = launch(double, 1, 64, x, y, count=True)
    assert page.traffic(stats) == {"read x": (4, 512, 16), "write y": (2, 256, 8)}
    assert page.total(stats) == (6, 768, 24)
    assert page.passes(stats) == 4


def test_traffic_needs_a_count():
    x, y = np.ones((2, 64), np.float32)
    with pytest.raises(ValueError, match="count=True"):
        page.traffic(launch(double, 1, 64, x, y))


def test_norms_of_deepseek_v3():
    widths = page.norm_widths(V3)
    assert len(widths) == 61 * 4 + 1
    assert sum(widths) == 61 * (7168 + 1536 + 512 + 7168) + 7168


# --- errors ---------------------------------------------------------------------------


def neighbours(x, out):
    part = cuda.shared.array(32, np.float32)
    i = cuda.threadIdx.x
    part[i] = x[i]
    out[i] = part[i - 1] if i else np.float32(0)


def test_looking_away_and_looking_again():
    x, out = np.arange(32, dtype=np.float32), np.zeros(32, np.float32)
    with page.looking_away():
        launch(neighbours, 1, 32, x, out)
    assert np.array_equal(out, np.maximum(x - 1, 0))
    with pytest.raises(RaceError):
        launch(neighbours, 1, 32, x, out)


def test_said_breaks_prose_and_keeps_source():
    with pytest.raises(BoundsError) as caught:
        launch(double, 1, 64, np.ones(8, np.float32), np.ones(64, np.float32))
    words, source = page.said(caught.value, 17), "    tile[i] = x[i]"  # longer
    lines = words.splitlines()
    assert words.split() == str(caught.value).split()
    assert source in lines and max(len(n) for n in lines if n != source) <= 17


# --- launches -------------------------------------------------------------------------


@pytest.mark.parametrize("quick", [False, True])
def test_norm_backward(quick):
    rng = np.random.default_rng(3)
    x, dy = rng.normal(size=(2, 5, 48)).astype(np.float32)
    g = rng.normal(1, 0.3, 48).astype(np.float32)
    exact = [a.astype(float) for a in (x, g, dy)]
    _, saved = numpy_ref.rmsnorm_forward(exact[0], exact[1], EPS)
    r = saved[2].ravel().astype(np.float32)
    kernel, threads = plain.rmsnorm_backward_plain, plain.THREADS
    if quick:
        kernel, threads = fast.rmsnorm_backward_fast(1, 4), 32
    dx, dg, stats = page.norm_backward(kernel, 2, threads, dy, x, g, r, count=True)
    expected = numpy_ref.rmsnorm_backward(exact[2], saved)
    assert page.error(dx, expected[0]) < 1e-6
    assert page.error(dg, expected[1]) < 1e-6
    assert page.traffic(stats)["write dx"].bytes == x.nbytes


@pytest.mark.parametrize("quick", [False, True])
def test_losses(quick):
    z = np.random.default_rng(4).normal(0, 3, (3, 256)).astype(np.float32)
    targets = np.array([0, 255, 7])
    kernel, threads = plain.cross_entropy_plain, plain.THREADS
    if quick:
        kernel, threads = fast.cross_entropy_fast(4), 32
    found, (highest, log_sums), _ = page.losses(kernel, threads, z, targets)
    wide = z.astype(float)
    expected = np.log(np.exp(wide).sum(1))
    assert np.array_equal(highest, z.max(1))
    assert np.allclose(log_sums, expected - wide.max(1), rtol=1e-6)
    assert np.allclose(found, expected - wide[range(3), targets], rtol=1e-6)
