"""FP8 in blocks, against torch's cast and a plain double loop; and mistakes in it."""

import math
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minidsv3 import fp8, parameters
from minidsv3.config import MINI, V3
from tests.planting import plant

HALF_STEP = 2**-4  # of 3 bits behind the leading one, relative to the number
HALF_LEAST = 2**-10  # of the numbers below 2⁻⁶, which are multiples of 2⁻⁹
ROUNDED = 4 * np.finfo(np.float32).eps  # of the scale, the quotient and the product
# ragged both ways, one number, exact, as kv_a_proj_with_mqa, and the report's tiles
SHAPES = [(129, 127), (1, 1), (256, 128), (576, 300), (5, 700), (3, 257)]
BLOCKS = [fp8.BLOCK, fp8.TILE, (3, 5)]
each_form = pytest.mark.parametrize("power_of_two", [False, True], ids=["any", "ue8m0"])


def matrix(shape: tuple, seed: int = 0) -> np.ndarray:
    """Numbers of many sizes, so that a block's scale is not its neighbour's."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-5, 3, size=shape[0])[:, None]
    return (rng.normal(size=shape) * sizes).astype(np.float32)


def blocks(shape: tuple, block: tuple) -> Iterator[tuple[int, int, tuple]]:
    for i in range(math.ceil(shape[0] / block[0])):
        for j in range(math.ceil(shape[1] / block[1])):
            yield i, j, (slice(i * block[0], (i + 1) * block[0]),
                         slice(j * block[1], (j + 1) * block[1]))  # fmt: skip


def by_loop(W: np.ndarray, block: tuple, power_of_two: bool) -> tuple[dict, dict]:
    """Each block by itself, in torch: its scale, and its bytes."""
    scales, bytes_ = {}, {}
    for i, j, place in blocks(W.shape, block):
        one = torch.tensor(np.ascontiguousarray(W[place]))
        s = one.abs().max() / 448
        if power_of_two:
            s = 2.0 ** torch.ceil(torch.log2(s.double())).float()
        scales[i, j] = float(s)
        q = (one / s).clamp(-448, 448).to(torch.float8_e4m3fn)
        bytes_[i, j] = q.view(torch.uint8).numpy()
    return scales, bytes_


def check_against_loop() -> None:
    for shape in SHAPES:
        for block in BLOCKS:
            for power_of_two in (False, True):
                W = matrix(shape)
                q, scale_inv = fp8.quantise(W, block, power_of_two)
                scales, bytes_ = by_loop(W, block, power_of_two)
                assert (q.shape, q.dtype) == (shape, ml_dtypes.float8_e4m3fn)
                assert scale_inv.dtype == np.float32
                rows, columns = block
                count = math.ceil(shape[0] / rows), math.ceil(shape[1] / columns)
                assert scale_inv.shape == count == fp8.scale_shape(shape, block)
                for i, j, place in blocks(shape, block):
                    assert scale_inv[i, j] == np.float32(scales[i, j])
                    np.testing.assert_array_equal(q[place].view(np.uint8), bytes_[i, j])


def check_round_trip(power_of_two: bool = False, block: tuple = fp8.BLOCK) -> None:
    """No number is further off than half the distance to its neighbour in FP8."""
    for shape in SHAPES:
        W = matrix(shape)
        q, scale_inv = fp8.quantise(W, block, power_of_two)
        back = fp8.dequantise(q, scale_inv, block=block)
        assert back.dtype == np.float32
        for i, j, place in blocks(shape, block):
            bound = np.maximum(abs(W[place]) * HALF_STEP, scale_inv[i, j] * HALF_LEAST)
            assert (abs(back[place] - W[place]) <= bound * (1 + ROUNDED)).all()


def check_again() -> None:
    """What has been through FP8 goes through it unchanged, but for a float32's end."""
    for block in BLOCKS:
        q, scale_inv = fp8.quantise(matrix((129, 257)), block)
        again, scales = fp8.quantise(fp8.dequantise(q, scale_inv, block=block), block)
        np.testing.assert_array_equal(again.view(np.uint8), q.view(np.uint8))
        np.testing.assert_allclose(scales, scale_inv, rtol=2**-22)


def check_exact_scales() -> None:
    """Powers of two do not round, so nothing at all changes the second time."""
    W = matrix((129, 257))
    W[0] = 448 * 2.0**-3  # a block whose scale is a power of two already
    q, scale_inv = fp8.quantise(W, fp8.TILE, power_of_two=True)
    assert (np.frexp(scale_inv)[0] == 0.5).all()
    assert scale_inv[0, 0] == 2.0**-3
    plain = fp8.quantise(W, fp8.TILE)[1]
    assert (plain <= scale_inv).all() and (scale_inv < 2 * plain).all()
    back = fp8.dequantise(q, scale_inv, block=fp8.TILE)
    np.testing.assert_array_equal(
        fp8.dequantise(*fp8.quantise(back, fp8.TILE, True), block=fp8.TILE), back
    )


def check_edges() -> None:
    """Zeros stay finite, tiny weights are not flushed, and the largest is no NaN."""
    W = np.zeros((200, 200), np.float32)
    q, scale_inv = fp8.quantise(W)
    assert np.isfinite(scale_inv).all() and (scale_inv > 0).all()
    np.testing.assert_array_equal(fp8.dequantise(q, scale_inv), W)

    small = matrix((130, 130)) * np.float32(1e-25)
    back = fp8.dequantise(*fp8.quantise(small))
    assert np.linalg.norm(back - small) < HALF_STEP * np.linalg.norm(small)

    for peak in (448.0, 449.0, 464.0, 1e-3, 3e38, *np.geomspace(1, 2, 999)):
        for power_of_two in (False, True):
            W = np.full((1, 2), peak, np.float32) * np.float32([1, -1])
            back = fp8.dequantise(*fp8.quantise(W, power_of_two=power_of_two))
            np.testing.assert_allclose(back, W, rtol=HALF_STEP)


def check_names() -> None:
    """Which matrices of V3 are in FP8, by the report's list of what is kept."""
    names = {name for name in parameters.shapes(V3) if fp8.is_quantised(name)}
    kept = parameters.shapes(V3).keys() - names
    ends = {name.partition(".layers.")[2].partition(".")[2] for name in kept}
    assert ends == {
        *("", "input_layernorm.weight", "post_attention_layernorm.weight"),
        *("self_attn.q_a_layernorm.weight", "self_attn.kv_a_layernorm.weight"),
        *("mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
        *("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"),
    }
    assert "model.layers.61.mlp.experts.gate_proj.weight" in names
    assert fp8.is_quantised("model.layers.3.mlp.experts.255.down_proj.weight")
    assert fp8.is_quantised("model.layers.0.self_attn.q_proj.weight")
    copies = ("embed_tokens.weight", "shared_head.head.weight")
    assert not any(fp8.is_quantised(f"model.layers.61.{name}") for name in copies)
    assert not fp8.is_quantised("model.layers.3.mlp.gate_proj.weight_scale_inv")


CHECKS = [check_against_loop, check_round_trip, check_again, check_exact_scales,
          check_edges, check_names]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
def test_blocks(check: Callable) -> None:
    check()


@each_form
@pytest.mark.parametrize("block", BLOCKS)
def test_the_error_is_half_a_step(power_of_two: bool, block: tuple) -> None:
    check_round_trip(power_of_two, block)


SIDE = st.integers(1, 40)


@given(st.tuples(SIDE, SIDE), st.tuples(SIDE, SIDE), st.booleans(), st.integers(0, 99))
def test_any_block_of_any_matrix(shape, block, power_of_two: bool, seed: int) -> None:
    W = matrix(shape, seed)
    q, scale_inv = fp8.quantise(W, block, power_of_two)
    scales, bytes_ = by_loop(W, block, power_of_two)
    for i, j, place in blocks(shape, block):
        assert scale_inv[i, j] == np.float32(scales[i, j])
        np.testing.assert_array_equal(q[place].view(np.uint8), bytes_[i, j])
    back = fp8.dequantise(q, scale_inv, block=block)
    for i, j, place in blocks(shape, block):
        bound = np.maximum(abs(W[place]) * HALF_STEP, scale_inv[i, j] * HALF_LEAST)
        assert (abs(back[place] - W[place]) <= bound * (1 + ROUNDED)).all()


def test_every_byte_means_what_torch_says() -> None:
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)[None]
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ours = fp8.dequantise(every, np.ones((1, 2), np.float32))
    np.testing.assert_array_equal(ours[0], theirs.numpy())


def test_bfloat16_comes_out_rounded_once() -> None:
    q, scale_inv = fp8.quantise(matrix((140, 150)))
    ours = fp8.dequantise(q, scale_inv, ml_dtypes.bfloat16)
    exact = torch.tensor(fp8.dequantise(q, scale_inv))
    np.testing.assert_array_equal(
        ours.view(np.int16), exact.bfloat16().view(torch.int16).numpy()
    )


def test_matrices_of_other_types_are_read_as_float32() -> None:
    W = matrix((20, 30)).astype(ml_dtypes.bfloat16)
    for other in (W, W.astype(np.float64), np.asfortranarray(W)):
        for ours, wanted in zip(fp8.quantise(other), fp8.quantise(W), strict=True):
            assert ours.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused(bad: float) -> None:
    W = matrix((200, 300))
    W[130, 260] = bad
    with pytest.raises(ValueError, match=r"block \(1, 2\) holds NaN or infinity"):
        fp8.quantise(W)


def test_scales_of_another_shape_are_refused() -> None:
    q, scale_inv = fp8.quantise(matrix((129, 300)))
    with pytest.raises(ValueError, match=r"has scales \(2, 3\), not \(3, 2\)"):
        fp8.dequantise(q, scale_inv.T)


def test_576_rows_have_five_scales() -> None:
    """Facts D.5: the matrix of the report with a ragged edge."""
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert fp8.scale_shape(parameters.shapes(V3)[name]) == (5, 56)
    assert fp8.is_quantised(name)
    assert any(fp8.is_quantised(name) for name in parameters.shapes(MINI))


# --- mistakes -------------------------------------------------------------------------

AMAX = "np.maximum.reduceat(np.abs(W), rows, axis=0)"
MISTAKES = {
    "the largest without its sign's": (AMAX, AMAX.replace("np.abs(W)", "W")),
    "the scale is 1 / s": ("W *= _spread", "W /= _spread"),
    "the range of E5M2": ("LARGEST = float(ml_dtypes.finfo(FP8).max)",
                          "LARGEST = 57344.0"),
    "no floor": ("np.maximum(amax / np.float32(LARGEST), np.float32(SMALLEST_SCALE))",
                 "amax / np.float32(LARGEST)"),
    "the floor of activations": ("SMALLEST_SCALE = float(np.finfo(np.float32).tiny)",
                                 "SMALLEST_SCALE = 1e-4 / 448"),
    "one scale for all": ("scale_inv = np.maximum(amax",
                          "scale_inv = np.maximum(amax.max() + 0 * amax"),
    "blocks turned": ("(rows, columns), (out, width) = block, shape",
                      "(columns, rows), (out, width) = block, shape"),
    "the last block has the scale of the one before": (
        "scales.repeat(rows, axis=0)[:out]",
        "scales[: max(1, out // rows)].repeat(rows, axis=0)[np.minimum("
        "np.arange(out), max(1, out // rows) * rows - 1)]"),
    "cut, not rounded": ("ratio.astype(FP8)", "(np.trunc(ratio * 8) / 8).astype(FP8)"),
    "powers of two rounded down": ("exponent - (mantissa == 0.5)", "exponent - 1"),
    "powers of two doubled": ("exponent - (mantissa == 0.5)", "exponent"),
    "the router too": ("(gate|up|down)_proj)", "(gate|up|down)_proj|mlp\\.gate)"),
    "the joining projection too": ("[qkvo]_proj|", "[qkvo]_proj|x)|(eh_proj|"),
    "not the shared expert": ("|shared_experts\\.)?", ")?"),
}  # fmt: skip


def all_checks() -> None:
    with np.errstate(all="ignore"):
        for check in CHECKS:
            check()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen(mistake: str, monkeypatch) -> None:
    plant(monkeypatch, fp8, MISTAKES[mistake])
    with pytest.raises((AssertionError, ValueError)):
        all_checks()
