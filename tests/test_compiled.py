"""The compiled loops of decoding, each against NumPy's products or a loop over tokens.

Every answer is computed again in float64 from the same numbers. `test_sessions` has
the loops inside a model, `test_compiled_mistakes` what these checks see.
"""

import dataclasses
from collections.abc import Callable

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
    far = [-1000.0, -100.0, -1.0, 0.0, 1.0, 100.0, 1000.0]
    a, b = np.array([far, far[::-1]], dtype), numbers(2, 7, dtype=dtype)
    with np.errstate(over="ignore"):
        expected = a.astype(F64) / (1 + np.exp(-a.astype(F64))) * b
    kernels.silu_times(a, b)
    agree(a, expected)


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


def check_shift() -> None:
    """As a softmax that is not divided yet; whatever stands in the future is gone."""
    for T, S, starts in ((1, 9, (8, 3)), (3, 9, (2, 6)), (2, 2, (0, 0)), (2, 3, (1,))):
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
    for s in range(3):
        scores = np.zeros((1, 1, 1, 4))
        scores[..., s] = np.nan
        kernels.shift(scores, np.array([2]))
        assert np.isnan(np.exp(scores)).any()
    scores = np.full((1, 1, 1, 2), np.inf)
    kernels.shift(scores, np.array([1]))
    assert np.isnan(scores).all()


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
