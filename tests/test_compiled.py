"""The compiled loops of decoding, each against NumPy's products or a loop over tokens.

Every answer is computed again in float64 from the same numbers. `test_sessions` has
the loops inside a model, `test_compiled_mistakes` what these checks see.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numba
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minidsv3.config import TINY, Config
from minidsv3.generation import cpu_kernels as kernels
from minidsv3.mla import numpy_ref as mla
from minidsv3.moe import numpy_ref as moe
from minidsv3.mtp import numpy_ref as mtp
from minidsv3.primitives.numpy_ref import (
    rmsnorm_forward,
    rope_forward,
    rope_frequencies,
    rope_rotation,
    softmax_scale,
    swiglu_forward,
)
from tests import test_mla, test_moe
from tests.oracles import relative_error
from tests.planting import plant_loops
from tests.test_moe import BROAD, LAYERS, ONE, SMALL, Layer, layer, margins, rounded
from tests.test_primitives import normal
from tests.torch_moe import BIAS

F64, F32 = np.float64, np.float32
TOLERANCE = {
    F64: 1e-12,  # the same sums in another order
    F32: 2e-6,  # relative: a dozen roundings of 6e-8 on the way
}
EPS = 0.1  # of norms: large enough to be felt
each_dtype = pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])


def numbers(*shape: int, dtype: type = F64, seed: int = 0) -> np.ndarray:
    return normal(*shape, seed=seed).astype(dtype)


def exact(*arrays: np.ndarray) -> list[np.ndarray]:
    return [array.astype(F64) for array in arrays]


def agree(ours: np.ndarray, expected: np.ndarray, *where: object) -> None:
    """In the tolerance of our own precision; expected is float64."""
    assert expected.dtype == F64
    error = relative_error(ours, expected)
    assert error <= TOLERANCE[ours.dtype.type], (error, *where)


# --- rows -----------------------------------------------------------------------------


def check_linear(
    dtype: type = F64, Ns=range(1, 10), Os=range(1, 10), widths=(1, 7)
) -> None:
    """Every remainder of four rows of W and of two of x, alone and added."""
    for N, O, I in np.ndindex(len(Ns), len(Os), len(widths)):  # noqa: E741
        N, O, I = Ns[N], Os[O], widths[I]  # noqa: E741
        x, W = numbers(N, I, dtype=dtype), numbers(O, I, dtype=dtype, seed=1)
        y = np.full((N, O), np.nan, dtype)
        kernels.linear(x, W, y, False, W[:0])
        wide_x, wide_W = exact(x, W)
        agree(y, wide_x @ wide_W.T, N, O, I)
        before = numbers(N, O, dtype=dtype, seed=2)
        y = before.copy()
        kernels.linear(x, W, y, True, W[:0])
        agree(y, before.astype(F64) + wide_x @ wide_W.T, N, O, I)


@each_dtype
def test_linear_for_every_remainder(dtype: type) -> None:
    check_linear(dtype)


@each_dtype
def test_long_rows(dtype: type) -> None:
    """A lane of the processor sums its share: rounding does not grow with the row."""
    check_linear(dtype, Ns=(1, 2, 3), Os=(4, 5), widths=(4099,))


def check_ahead(dtype: type = F64, Os=(1, 4, 7, 12), Is=(1, 3, 40)) -> None:
    """What comes next may have any size: no bit of the answer changes."""
    for N in (1, 2, 3):
        for O, I in ((O, I) for O in Os for I in Is):  # noqa: E741
            x, W = numbers(N, I, dtype=dtype), numbers(O, I, dtype=dtype, seed=1)
            answers = []
            for shape in ((0, I), (1, 1), (O, I), (2, 1), (3 * O, 2 * I), (0, 0)):
                y = np.full((N, O), np.nan, dtype)
                kernels.linear(x, W, y, False, numbers(*shape, dtype=dtype, seed=2))
                answers.append(y)
            for y in answers[1:]:
                np.testing.assert_array_equal(y, answers[0])


@each_dtype
def test_what_comes_next_changes_nothing(dtype: type) -> None:
    check_ahead(dtype)


@contextmanager
def fetching() -> Iterator[list[int]]:
    """The addresses that loops ask for, where they run as plain Python."""
    places: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(kernels.linear.__globals__, "_fetch", places.append)
        yield places


def check_fetched() -> None:
    """As much as is multiplied, each byte's line once, nothing behind the end."""
    for dtype, O, I in itertools.product((F64, F32), (3, 4, 9, 12), (1, 5, 24)):  # noqa: E741
        x, W = numbers(2, I, dtype=dtype), numbers(O, I, dtype=dtype, seed=1)
        for shape in ((0, I), (1, 1), (5, I), (O, I), (O, 3 * I)):
            ahead, y = numbers(*shape, dtype=dtype), np.empty((2, O), dtype)
            with fetching() as places:
                kernels.linear(x, W, y, False, ahead)
            at = np.array(places, int) - ahead.ctypes.data
            pace = 4 * I * W.itemsize  # bytes of four rows
            end = min(O // 4 * pace, ahead.nbytes)
            assert (np.diff(at) > 0).all() and (at >= 0).all() and (at < end).all()
            asked = at[:, None] + np.arange(kernels.LINE)  # (lines, bytes)
            assert np.isin(np.arange(end), asked).all(), "some byte is not fetched"
            assert len(at) <= O // 4 * -(-pace // kernels.LINE)


def test_what_comes_next_is_fetched(monkeypatch) -> None:
    plant_loops(monkeypatch, kernels)
    check_fetched()


def check_norm(dtype: type = F64) -> None:
    """Into another array, in place, and into columns of a wider one."""
    x, g = numbers(3, 5, dtype=dtype), numbers(5, dtype=dtype, seed=1)
    expected, _ = rmsnorm_forward(*exact(x, g), EPS)
    y = np.full_like(x, np.nan)
    kernels.rmsnorm(x, g, EPS, y)
    agree(y, expected)
    wide = numbers(3, 9, dtype=dtype, seed=2)
    before = wide.copy()
    wide[:, 2:7] = x
    kernels.rmsnorm(wide[:, 2:7], g, EPS, wide[:, 2:7])
    agree(np.ascontiguousarray(wide[:, 2:7]), expected)
    np.testing.assert_array_equal(np.delete(wide, range(2, 7), 1),
                                  np.delete(before, range(2, 7), 1))  # fmt: skip
    kernels.rmsnorm(x, g, EPS, x)
    agree(x, expected)


@each_dtype
def test_norm(dtype: type) -> None:
    check_norm(dtype)


@each_dtype
def test_the_gate_of_swiglu(dtype: type) -> None:
    """Far out as well: no overflow becomes NaN."""
    far = np.array([-1000.0, -100.0, -1.0, 0.0, 1.0, 100.0, 1000.0])
    b, y = numbers(7, 1, dtype=dtype), np.zeros((1, 7), dtype)
    with np.errstate(over="ignore"):
        expected = 0.5 * far / (1 + np.exp(-far)) * b[:, 0]
    gate, one = far.astype(dtype)[:, None], np.ones((1, 1), dtype)
    kernels.swiglu(one, gate, b, np.eye(7, dtype=dtype), dtype(0.5), y, gate[:0])
    agree(y[0], expected)


def angles_of(config: Config, positions: np.ndarray, dtype: type) -> np.ndarray:
    """Cosines and sines as the kernels want them: (T, 2, d_R/2)."""
    turns = rope_rotation(positions, rope_frequencies(config), F64)
    return np.stack([turns.real, turns.imag], axis=1).astype(dtype)


def check_turn(dtype: type = F64, d_R: int = 6) -> None:
    config = dataclasses.replace(TINY, qk_rope_head_dim=d_R)
    for position in (0, 1, 40_000):
        x = numbers(d_R, dtype=dtype)
        here = np.array([position])
        rotation = rope_rotation(here, rope_frequencies(config), F64)
        expected, _ = rope_forward(x.astype(F64)[None, None, None], rotation)
        kernels.turn(x, angles_of(config, here, dtype)[0], dtype(0.3))
        agree(x, 0.3 * expected[0, 0, 0], position)


@each_dtype
@pytest.mark.parametrize("d_R", [2, 6, 64])
def test_turn(dtype: type, d_R: int) -> None:
    check_turn(dtype, d_R)


# --- attention ------------------------------------------------------------------------


def queries(config: Config, w: dict, nothing: np.ndarray) -> tuple:
    """The weights of the queries, in the kernel's order."""
    if config.q_lora_rank is None:
        return nothing[None, :0], nothing[:0], w["q_proj.weight"]
    return tuple(w[f"{n}.weight"] for n in ("q_a_proj", "q_a_layernorm", "q_b_proj"))


def check_project(
    config: Config = test_mla.BASE, dtype: type = F64, T: int = 2, starts=(4, 0, 7)
) -> None:
    """Texts of different lengths; the cache elsewhere is not touched."""
    c, B = config, len(starts)
    w = {k: a.astype(dtype) for k, a in test_mla.weights(c).items()}
    x, g = numbers(B * T, c.hidden_size, dtype=dtype), numbers(
        c.hidden_size, dtype=dtype, seed=1
    )  # fmt: skip
    width = c.kv_lora_rank + c.qk_rope_head_dim
    cache = numbers(B, 12, width, dtype=dtype, seed=2)
    before, given = cache.copy(), x.copy()
    q = np.full((B * T, c.num_attention_heads, width), np.nan, dtype)
    kernels.project(
        x, np.array(starts), cache, angles_of(c, np.arange(12), dtype),
        c.qk_nope_head_dim, softmax_scale(c), EPS, mla.LATENT_EPS, g,
        *queries(c, w, x[0]), w["kv_a_proj_with_mqa.weight"],
        w["kv_a_layernorm.weight"], w["kv_b_proj.weight"], q,
    )  # fmt: skip
    np.testing.assert_array_equal(x, given)
    expected_q, expected_kept = expected_project(c, w, x, g, starts)
    agree(q.reshape(B, T, -1), expected_q.reshape(B, T, -1))
    for b, start in enumerate(starts):
        now = slice(start, start + T)
        agree(np.ascontiguousarray(cache[b, now]), expected_kept[b])
        np.testing.assert_array_equal(np.delete(cache[b], now, 0),
                                      np.delete(before[b], now, 0))  # fmt: skip


def expected_project(c: Config, w: dict, x, g, starts) -> tuple:
    """Absorbed queries (B, T, N_h, d_c + d_R) and what is kept (B, T, d_c + d_R)."""
    w = {k: a.astype(F64) for k, a in w.items()}
    u, _ = rmsnorm_forward(*exact(x, g), EPS)
    u = u.reshape(len(starts), -1, c.hidden_size)
    W = w["kv_b_proj.weight"].reshape(c.num_attention_heads, -1, c.kv_lora_rank)
    q, kept = [], []
    for text, start in zip(u, starts, strict=True):
        positions = np.arange(start, start + len(text))
        rotation = rope_rotation(positions, rope_frequencies(c), F64)
        q_C, q_R, _ = mla.queries_forward(w, text[None], c, rotation)
        latent = np.einsum("thi,hij->thj", q_C[0], W[:, : c.qk_nope_head_dim])
        q.append(softmax_scale(c) * np.concatenate([latent, q_R[0]], axis=-1))
        kept.append(mla.latents_forward(w, text[None], c, rotation)[0][0])
    return np.array(q), np.array(kept)


@each_dtype
@test_mla.each_config
def test_project(config: Config, dtype: type) -> None:
    for T in (1, 2, 3):
        check_project(config, dtype, T)
    check_project(config, dtype, 1, (0,))


SHIFTS = (  # T, S, starts
    *((1, 9, (8, 3)), (3, 9, (2, 6)), (2, 2, (0, 0)), (2, 3, (1,))),
    *((1, S, (S - 1, S // 2)) for S in range(1, 41)),
    *((2, S, (S - 2, S // 3)) for S in (15, 16, 17, 18, 31, 32, 33, 34, 40)),
)


def check_shift() -> None:
    """As a softmax that is not divided yet; whatever stands in the future is gone."""
    for T, S, starts in SHIFTS:
        scores = 50 * normal(len(starts), T, 2, S)
        scores[0] -= 900  # below zero, all of them
        expected = np.zeros_like(scores)
        for b, t, h in np.ndindex(scores.shape[:3]):
            seen = starts[b] + t + 1
            row = scores[b, t, h]
            expected[b, t, h, :seen] = np.exp(row[:seen] - max(row[:seen]))
            row[seen:] = (np.nan, np.inf, 1e300)[h]
        kernels.shift(scores, np.array(starts))
        np.testing.assert_allclose(np.exp(scores), expected, rtol=1e-12, atol=0)


def test_shift() -> None:
    check_shift()


def test_nan_that_is_seen_stays() -> None:
    for seen in (3, 16, 37):
        for s in range(seen):
            scores = np.zeros((1, 1, 1, seen + 1))
            scores[..., s] = np.nan
            kernels.shift(scores, np.array([seen - 1]))
            assert np.isnan(np.exp(scores)).any()
            cache = np.ones((1, seen + 1, 3))
            cache[0, s] = np.nan
            sums, latents = np.zeros((1, 1)), np.zeros((1, 1, 2))
            start = np.array([seen - 1])
            kernels.attend(np.ones((1, 1, 3)), start, cache, sums, latents)
            assert np.isnan(sums).all() and np.isnan(latents).all()
        scores = np.full((1, 1, 1, seen), np.inf)
        kernels.shift(scores, np.array([seen - 1]))
        assert np.isnan(scores).all()


def check_the_largest() -> None:
    """In every lane, in the rows behind them, and once only: a row forgets the last."""
    for S in (1, 5, 16, 17, 35):
        scores = np.zeros((1, 1, S, S)) - 1
        for h in range(S):  # each head lower than the one before
            scores[0, 0, h] -= 10 * h
            scores[0, 0, h, h] += 5
        before = scores.copy()
        kernels.shift(scores, np.array([S - 1]))
        np.testing.assert_array_equal(scores, before - before.max(-1, keepdims=True))


def test_the_largest_is_found_wherever_it_stands() -> None:
    check_the_largest()


def check_output(config: Config = test_mla.BASE, dtype: type = F64) -> None:
    N, S, c = 3, 6, config
    N_h, d_h, d_v = c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim
    w = test_mla.weights(c)
    W_UKV, W_O = (w[f"{n}.weight"].astype(dtype) for n in ("kv_b_proj", "o_proj"))
    x = numbers(N, c.hidden_size, dtype=dtype)
    weights = np.exp(numbers(N, N_h, S, dtype=dtype))
    kept = numbers(N, S, c.kv_lora_rank, dtype=dtype, seed=3)
    latents = np.einsum("nhs,nsc->nhc", weights, kept)
    P = weights.astype(F64) / weights.astype(F64).sum(-1, keepdims=True)
    v = np.einsum("nsc,hvc->nshv", *exact(kept, W_UKV.reshape(N_h, d_h + d_v, -1)))
    o = np.einsum("nhs,nshv->nhv", P, v[..., d_h:]).reshape(N, -1)
    expected = x.astype(F64) + o @ W_O.astype(F64).T
    kernels.output(x, weights.sum(-1), latents, d_h, W_UKV, W_O)
    agree(x, expected)


@each_dtype
@test_mla.each_config
def test_output(config: Config, dtype: type) -> None:
    check_output(config, dtype)


def weighed(q: np.ndarray, kept: np.ndarray, starts, d_c: int) -> tuple:
    """One query and one head at a time, in float64: sums (N, N_h), latents."""
    (N, N_h, _), T = q.shape, len(q) // len(starts)
    sums, latents = np.zeros((N, N_h)), np.zeros((N, N_h, d_c))
    for n, h in np.ndindex(N, N_h):
        b, t = divmod(n, T)
        seen = kept[b, : starts[b] + t + 1].astype(F64)
        scores = [float(row @ q[n, h].astype(F64)) for row in seen]
        for score, row in zip(scores, seen, strict=True):
            weight = np.exp(score - max(scores))
            sums[n, h] += weight
            latents[n, h] += weight * row[:d_c]
    return sums, latents


def check_attend(dtype: type = F64, size: float = 0.4) -> None:
    """Every remainder of four keys; what stands behind a text is not read."""
    shapes = [(1, (n,)) for n in range(9)]
    for T, starts in (*shapes, (1, (4, 0, 7)), (2, (3, 0, 8)), (3, (11, 6))):
        B, N_h, w, d_c = len(starts), 2, 5, 3
        q = numbers(B * T, N_h, w, dtype=dtype)
        q *= dtype(size)
        cache = numbers(B, 16, w, dtype=dtype, seed=1)
        for b, start in enumerate(starts):
            cache[b, start + T :] = np.nan
        sums = np.full((B * T, N_h), np.nan, dtype)
        latents = np.full((B * T, N_h, d_c), np.nan, dtype)
        kernels.attend(q, np.array(starts), cache, sums, latents)
        expected_sums, expected = weighed(q, cache, starts, d_c)
        agree(sums, expected_sums, T, starts)
        agree(latents, expected, T, starts)


@each_dtype
def test_attend(dtype: type) -> None:
    check_attend(dtype)


def test_scores_far_apart_do_not_overflow() -> None:
    check_attend(F64, 500.0)


def check_weigh(dtype: type = F64) -> None:
    """Remainders of four; the array may hold more rows, and more of each."""
    for S, d_c in itertools.product(range(1, 11), (1, 4, 7)):
        weights = np.abs(numbers(S, dtype=dtype))
        kept = numbers(S + 2, d_c + 3, dtype=dtype, seed=1)
        kept[S:], kept[:, d_c:] = np.nan, np.nan
        latent = np.full(d_c, np.nan, dtype)
        kernels.weigh(weights, kept, latent)
        expected = np.zeros(d_c)
        for weight, row in zip(*exact(weights, kept[:S, :d_c]), strict=True):
            expected += weight * row
        agree(latent, expected, S, d_c)


@each_dtype
def test_weigh(dtype: type) -> None:
    check_weigh(dtype)


def layer_of(config: Config, dtype: type, N: int) -> tuple:
    """Stream, norm, sizes and weights of `attention`, in the kernel's order."""
    c, w = config, {k: a.astype(dtype) for k, a in test_mla.weights(config).items()}
    x = numbers(N, c.hidden_size, dtype=dtype)
    g = numbers(c.hidden_size, dtype=dtype, seed=1)
    sizes = (c.qk_nope_head_dim, softmax_scale(c), EPS, mla.LATENT_EPS)
    project = (
        *(*sizes, g, *queries(c, w, x[0]), w["kv_a_proj_with_mqa.weight"]),
        *(w["kv_a_layernorm.weight"], w["kv_b_proj.weight"]),
    )
    return w, x, g, project


def check_attention(
    config: Config = test_mla.BASE, dtype: type = F64, T: int = 2, starts=(4, 0, 7)
) -> None:
    """The whole layer: against loops, and against the way with NumPy's products."""
    c, N = config, len(starts) * T
    w, x, g, project = layer_of(c, dtype, N)
    W_UKV, W_O = w["kv_b_proj.weight"], w["o_proj.weight"]
    N_h, d_h, d_c = c.num_attention_heads, c.qk_nope_head_dim, c.kv_lora_rank
    capacity = max(starts) + T + 1
    angles = angles_of(c, np.arange(capacity), dtype)
    cache = numbers(len(starts), capacity, d_c + c.qk_rope_head_dim, dtype=dtype)
    expected_q, kept = expected_project(c, w, x, g, starts)
    full = cache.astype(F64)
    for b, start in enumerate(starts):
        full[b, start : start + T] = kept[b]
    q = expected_q.reshape(N, N_h, -1)
    sums, latents = weighed(q, full, starts, d_c)
    W_UV = W_UKV.reshape(N_h, -1, d_c)[:, d_h:].astype(F64)
    o = np.einsum("nhc,hvc->nhv", latents / sums[..., None], W_UV)
    expected = x.astype(F64) + o.reshape(N, -1) @ W_O.astype(F64).T

    other, other_cache, starts = x.copy(), cache.copy(), np.array(starts)
    kernels.attention(x, starts, cache, angles, *project, W_O)
    agree(x, expected)
    agree(cache, full)
    q = np.empty(q.shape, dtype)
    kernels.project(other, starts, other_cache, angles, *project, q)
    seen = other_cache[:, : max(starts) + T]
    weights = q.reshape(len(starts), -1, q.shape[-1]) @ seen.swapaxes(1, 2)
    kernels.shift(weights.reshape(len(starts), T, N_h, -1), starts)
    np.exp(weights, out=weights)
    sums = weights.sum(-1).reshape(N, N_h)
    latents = (weights @ seen[..., :d_c]).reshape(N, N_h, d_c)
    kernels.output(other, sums, latents, d_h, W_UKV, W_O)
    agree(other, expected)
    agree(other_cache, full)


@each_dtype
@test_mla.each_config
def test_attention(config: Config, dtype: type) -> None:
    for T in (1, 2, 3):
        check_attention(config, dtype, T)
    check_attention(config, dtype, 1, (0,))


@each_dtype
def test_attention_far_behind_a_long_past(dtype: type) -> None:
    check_attention(test_mla.BASE, dtype, 2, (250, 1, 131))
    check_attention(test_mla.YARN, dtype, 1, (700,))


# --- feed-forward ---------------------------------------------------------------------


def check_dense(dtype: type = F64, N: int = 3, D: int = 6, I: int = 7) -> None:  # noqa: E741
    x, g = numbers(N, D, dtype=dtype), numbers(D, dtype=dtype, seed=1)
    W = [numbers(*shape, dtype=dtype, seed=2) for shape in ((I, D), (I, D), (D, I))]
    W[1] *= 2
    names = [f"{part}_proj.weight" for part in ("gate", "up", "down")]
    u, _ = rmsnorm_forward(*exact(x, g), EPS)
    y, _ = swiglu_forward(dict(zip(names, exact(*W), strict=True)), u)
    expected = x.astype(F64) + y
    kernels.dense(x, EPS, g, *W)
    agree(x, expected)


@each_dtype
@pytest.mark.parametrize("N", [1, 2, 3, 4])
def test_dense(dtype: type, N: int) -> None:
    check_dense(dtype, N)


def router(given: Layer) -> tuple:
    """What the kernel reads after the norm's gain, in its order."""
    c, p, _ = given
    none = np.empty((0, 0), p[BIAS].dtype)
    parts = [f"{part}_proj.weight" for part in ("gate", "up", "down")]
    return (
        *(p["gate.weight"], p[BIAS], c.n_group, c.topk_group, c.num_experts_per_tok),
        float(c.routed_scaling_factor),
        *(p[f"experts.{part}"] for part in parts),
        *(p.get(f"shared_experts.{part}", none) for part in parts),
    )


def run_experts(given: Layer) -> np.ndarray:
    """The layer on the stream u itself, (N, D), with a norm before it."""
    x = given.u.reshape(-1, given.config.hidden_size).copy()
    g = numbers(given.config.hidden_size, dtype=x.dtype.type, seed=1)
    kernels.experts(x, EPS, g, *router(given))
    return x


def normed(given: Layer) -> Layer:
    """What the router reads in `run_experts`, in float64."""
    wide = rounded(given, F64)
    x = wide.u.reshape(1, -1, given.config.hidden_size)
    g = numbers(given.config.hidden_size, dtype=given.u.dtype.type, seed=1)
    return wide._replace(u=rmsnorm_forward(x, g.astype(F64), EPS)[0])


def check_experts(given: Layer, answer: Callable = test_moe.answer) -> None:
    expected = given.u.astype(F64) + answer(normed(given)).reshape(given.u.shape)
    agree(run_experts(given).reshape(given.u.shape), expected)


def check_who_comes_next() -> None:
    """While one expert is at work, the gate of the next is fetched, and no other's."""
    given = layer(dataclasses.replace(SMALL, hidden_size=8), 1, 3)
    gates, wide = given.params["experts.gate_proj.weight"], normed(given)
    scores = 1 / (1 + np.exp(-(wide.u[0] @ wide.params["gate.weight"].T)))
    chosen = moe.choose(scores + wide.params[BIAS], given.config).ravel().tolist()
    with fetching() as places:
        run_experts(given)
    whose = [(place - gates.ctypes.data) // gates[0].nbytes for place in places]
    whose = [e for e in whose if 0 <= e < len(gates)]
    lines = whose.count(chosen[1]) // chosen.count(chosen[1])
    order = [*chosen, chosen[-1]]  # the first one's while the shared expert is at work
    assert lines and whose == [e for e in order for _ in range(lines)]


def test_who_comes_next_is_fetched(monkeypatch) -> None:
    plant_loops(monkeypatch, kernels)
    check_who_comes_next()


REMAINDERS = {
    f"{E} experts": dataclasses.replace(
        SMALL, n_routed_experts=E, n_group=G, topk_group=2, num_experts_per_tok=K
    )
    for E, G, K in ((6, 3, 4), (9, 3, 5), (15, 5, 2), (10, 2, 3))
} | {"7 experts": dataclasses.replace(SMALL, **ONE, n_routed_experts=7)}
MORE = LAYERS | {name: layer(config, T=20) for name, config in REMAINDERS.items()}


@pytest.mark.parametrize("name", MORE)
def test_experts_are_those_of_a_loop_over_tokens(name: str) -> None:
    check_experts(MORE[name], test_moe.naive_answer)
    check_experts(MORE[name])


@pytest.mark.parametrize("name", MORE)
def test_experts_in_float32(name: str) -> None:
    """Where no router has a close call: rounding must not decide."""
    given = rounded(MORE[name])
    rows = given.u.reshape(1, -1, given.config.hidden_size)
    K, E = given.config.num_experts_per_tok, given.config.n_routed_experts
    if K < E:
        rows = rows[:, margins(normed(given)) > 1e-5]
    assert rows.shape[1] > given.u.shape[0] * given.u.shape[1] // 2
    check_experts(given._replace(u=rows))


def ties(config: Config = SMALL, N: int = 9) -> Layer:
    """Some experts and groups the same, biases too: many scores are equal."""
    given = layer(config, 1, N)
    half = config.n_routed_experts // 2
    for name in ("gate.weight", BIAS):
        given.params[name][half:] = given.params[name][:half]
        given.params[name][1] = given.params[name][0]
    return given


def check_ties(config: Config = SMALL) -> None:
    check_experts(ties(config), test_moe.naive_answer)


@pytest.mark.parametrize("config", [SMALL, BROAD], ids=["SMALL", "BROAD"])
def test_ties_of_experts_and_groups(config: Config) -> None:
    check_ties(config)
    check_ties(dataclasses.replace(config, **ONE))


@each_dtype
def test_logits_far_apart_are_no_error(dtype: type) -> None:
    """Scores of 0 and 1, and scores that all vanish: gates 0, no 0/0."""
    given = rounded(layer(), dtype)
    given.params["gate.weight"][:] *= 1e4
    assert np.isfinite(run_experts(given)).all()
    given = rounded(layer(dataclasses.replace(SMALL, n_shared_experts=0)), dtype)
    given.params["gate.weight"][:] = -1e5
    given = given._replace(u=np.abs(given.u))
    x = given.u.reshape(-1, 6).copy()
    kernels.experts(x, EPS, np.ones(6, dtype), *router(given))
    np.testing.assert_array_equal(x, given.u.reshape(-1, 6))


def route(s: np.ndarray, bias: np.ndarray, config: Config) -> tuple:
    """The kernel's choice and gates for one token; s (E,) become scores."""
    K = config.num_experts_per_tok
    chosen, gates = np.empty(K, np.int64), np.empty(K, s.dtype)
    factor = float(config.routed_scaling_factor)
    kernels.route(s, bias, config.n_group, config.topk_group, factor, chosen, gates)
    return chosen.tolist(), gates


def check_not_finite(dtype: type = F64) -> None:
    """In the logit or bias of an expert that nobody would choose, too."""
    for bad in (np.nan, np.inf, -np.inf):
        for e in (0, 3, 7):
            for place in range(2):
                logits = np.linspace(1, -1, 8).astype(dtype)
                bias = np.zeros(8, dtype)
                (logits, bias)[place][e] = bad
                _, gates = route(logits, bias, SMALL)
                assert np.isnan(gates).all(), (bad, e, place)


@each_dtype
def test_what_is_not_finite_is_not_silent(dtype: type) -> None:
    check_not_finite(dtype)


def test_a_router_that_is_not_finite_spoils_its_tokens() -> None:
    for bad in (np.nan, np.inf):
        for name in ("gate.weight", BIAS):
            given = layer(dataclasses.replace(SMALL, **ONE), 1, 9)
            given.params[name][5] = bad
            assert np.isnan(run_experts(given)).all(), (bad, name)


def check_route(seed: int = 0, config: Config = SMALL, levels: int = 3, bias=-0.25):
    """Logits and biases on a coarse grid: the choice of `choose`, and of a loop."""
    rng = np.random.default_rng(seed)
    E = config.n_routed_experts
    for dtype in (F64, F32):
        s = (rng.integers(0, levels, E) / 2 - 0.5).astype(dtype)
        b = (rng.integers(0, levels, E) / 8 + bias).astype(dtype)
        chosen, gates = route(s, b, config)
        np.testing.assert_array_equal(chosen, moe.choose((s + b)[None], config)[0])
        if dtype is F64:  # in float32 the sums of two groups tie sooner
            assert chosen == test_moe.naive_choice((s + b).tolist(), config)
        shares = s[chosen].astype(F64) / s[chosen].astype(F64).sum()
        agree(gates, config.routed_scaling_factor * shares)


@settings(deadline=None, max_examples=300)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([SMALL, BROAD, *REMAINDERS.values()]),
    st.sampled_from([1, 2, 4, 10**6]),
    st.sampled_from([0.0, -3.0]),
)
@example(0, BROAD, 1, 0.0)
def test_the_choice_is_that_of_the_reference(
    seed: int, config: Config, levels: int, bias: float
) -> None:
    check_route(seed, config, levels, bias)


# --- the ends -------------------------------------------------------------------------


def check_head(dtype: type = F64, N: int = 3, V: int = 11) -> None:
    x, g = numbers(N, 5, dtype=dtype), numbers(5, dtype=dtype, seed=1)
    W, before = numbers(V, 5, dtype=dtype, seed=2), x.copy()
    h, logits = np.full_like(x, np.nan), np.full((N, V), np.nan, dtype)
    expected, _ = rmsnorm_forward(*exact(x, g), EPS)
    kernels.head(x, g, EPS, W, h, logits)
    agree(h, expected)
    agree(logits, expected @ W.astype(F64).T)
    np.testing.assert_array_equal(x, before)


@each_dtype
def test_head(dtype: type) -> None:
    check_head(dtype)
    check_head(dtype, 1, 12)


def check_entrance(dtype: type = F64, N: int = 3) -> None:
    """Eq. (21), with a block behind it that does nothing, and no last norm."""
    D = 5
    h, e = numbers(N, D, dtype=dtype), numbers(N, D, dtype=dtype, seed=1)
    g_e, g_h = numbers(D, dtype=dtype, seed=2), numbers(D, dtype=dtype, seed=3)
    W = numbers(D, 2 * D, dtype=dtype)
    seen = []
    block = mtp.Block(lambda params, x: (seen.append(x) or x, ()), None)
    names = ("enorm.weight", "hnorm.weight", "eh_proj.weight")
    params = dict(zip(names, exact(g_e, g_h, W), strict=True))
    params["shared_head.norm.weight"] = np.ones(D)
    mtp.mtp_forward(params, *exact(h[None], e[None]), block, EPS)
    x = np.full((N, D), np.nan, dtype)
    kernels.entrance(h, e, EPS, g_e, g_h, W, x)
    agree(x, seen[0][0])


@each_dtype
def test_entrance(dtype: type) -> None:
    check_entrance(dtype)
    check_entrance(dtype, 4)


# --- the compiler ---------------------------------------------------------------------


def check_nowhere_to_write(monkeypatch) -> None:
    """A package folder that belongs to another, and no home: compiled all the same."""
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])

    def double(x: float) -> float:
        return 2 * x

    with pytest.raises(RuntimeError, match="no locator available"):
        numba.njit(cache=True)(double)
    function = kernels._compiled(double)
    assert function(3.0) == 6.0 and function.signatures


def test_without_a_place_for_machine_code_it_is_compiled_anew(monkeypatch) -> None:
    check_nowhere_to_write(monkeypatch)


def check_options(function) -> None:
    options = function.targetoptions
    assert options["fastmath"] == {"reassoc", "contract", "nsz"}, "NaN stays NaN"
    assert options["error_model"] == "numpy", "1/0 is no exception in a kernel"


def test_every_kernel_is_compiled_alike() -> None:
    ours = [f for f in vars(kernels).values() if hasattr(f, "py_func")]
    assert len(ours) >= 15
    for function in ours:
        check_options(function)
