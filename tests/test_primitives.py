"""The primitives against torch, transformers, naive loops and finite differences."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minidsv3.config import PLAIN, V3
from minidsv3.primitives import attention_numpy_ref as att
from minidsv3.primitives import numpy_ref as ref
from tests.oracles import AUTOGRAD, central_differences, check_pair, relative_error


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape) * scale


# --- linear, embedding, norm ------------------------------------------------------


@pytest.mark.parametrize("lead", [(1,), (5,), (2, 1), (1, 3), (2, 3)])
def test_linear(lead: tuple) -> None:
    arrays = [normal(*lead, 4), normal(7, 4)]
    check_pair(ref.linear_forward, ref.linear_backward, arrays, F.linear)


def test_linear_names_the_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"last axis of x is 5.*\(7, 4\).*takes 4"):
        ref.linear_forward(normal(2, 5), normal(7, 4))


@pytest.mark.parametrize("ids", [[[3]], [[1, 1, 1]], [[0, 5, 0], [5, 2, 2]]])
def test_embedding_adds_up_repeated_ids(ids: list) -> None:
    ids = np.array(ids)
    check_pair(
        lambda W: ref.embedding_forward(ids, W),
        ref.embedding_backward,
        [normal(6, 3)],
        lambda W: F.embedding(torch.tensor(ids), W),
    )


@pytest.mark.parametrize("bad", [-1, 6])
def test_embedding_refuses_ids_outside_the_vocabulary(bad: int) -> None:
    with pytest.raises(ValueError, match=f"token id {bad} is outside.*0…5"):
        ref.embedding_forward(np.array([[0, bad]]), normal(6, 3))


@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 3, 5), (3, 1)])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rmsnorm(shape: tuple, eps: float) -> None:
    check_pair(
        lambda x, g: ref.rmsnorm_forward(x, g, eps),
        ref.rmsnorm_backward,
        [normal(*shape), normal(shape[-1], seed=1)],
        lambda x, g: F.rms_norm(x, (shape[-1],), g, eps),
    )


@pytest.mark.parametrize(
    "row", [np.zeros(4), np.full(4, 3.0), np.full(4, 1e-9), np.array([1e9, 0, 0, 0])]
)
def test_rmsnorm_on_rows_without_variance(row: np.ndarray) -> None:
    x, g, dy = row[None], normal(4, seed=1), normal(1, 4, seed=2)
    y, saved = ref.rmsnorm_forward(x, g, 1e-6)
    dx, dg = ref.rmsnorm_backward(dy, saved)
    tx = torch.tensor(x, requires_grad=True)
    tg = torch.tensor(g, requires_grad=True)
    expected = torch.autograd.grad(
        F.rms_norm(tx, (4,), tg, 1e-6), [tx, tg], torch.tensor(dy)
    )
    # a gradient that cancels to nothing is compared on the scale of what cancelled
    scale = max(np.abs(expected[0].numpy()).max(), np.abs(g * dy * saved[2]).max())
    assert np.abs(dx - expected[0].numpy()).max() <= 1e-10 * scale
    assert relative_error(dg, expected[1].numpy()) <= AUTOGRAD
    assert np.isfinite(y).all()


# --- rotary positions ---------------------------------------------------------------


def rope_by_hand(x: torch.Tensor, positions: np.ndarray, theta: np.ndarray):
    """Every position, head and pair in a loop, with the two lines of the paper."""
    B, T, H, d = x.shape
    positions = np.broadcast_to(positions, (B, T))
    rows = []
    for b in range(B):
        for t in range(T):
            for h in range(H):
                for j in range(d // 2):
                    angle = float(positions[b, t]) * float(theta[j])
                    c, s = math.cos(angle), math.sin(angle)
                    even, odd = x[b, t, h, 2 * j], x[b, t, h, 2 * j + 1]
                    rows += [even * c - odd * s, even * s + odd * c]
    return torch.stack(rows).reshape(B, T, H, d)


@pytest.mark.parametrize(
    "positions",
    [[0], [7], [0, 1, 2], [5, 2, 40_000], [[0, 1, 2], [9, 10, 300]], [-3, 0, 3]],
)
def test_rope(positions: list) -> None:
    positions = np.array(positions)
    theta = 10_000.0 ** (-2 * np.arange(3) / 6)
    rotation = ref.rope_rotation(positions, theta, np.float64)
    check_pair(
        lambda x: ref.rope_forward(x, rotation),
        ref.rope_backward,
        [normal(2, positions.shape[-1], 2, 6)],
        lambda x: rope_by_hand(x, positions, theta),
    )


def test_rope_scores_depend_on_distance_alone() -> None:
    theta = ref.rope_frequencies(PLAIN)
    q, k = normal(1, 1, 1, 32), normal(1, 1, 1, 32, seed=1)

    def score(m: int, n: int) -> float:
        turned = [
            ref.rope_forward(x, ref.rope_rotation(np.array([p]), theta, x.dtype))[0]
            for x, p in ((q, m), (k, n))
        ]
        return float(np.sum(turned[0] * turned[1]))

    assert score(3, 10) == pytest.approx(score(103, 110), abs=1e-12)
    assert abs(score(3, 10) - score(3, 11)) > 1e-3


def test_rope_keeps_float32_and_is_exact_far_out() -> None:
    theta = np.ones(1)
    far = 163_839
    rotation = ref.rope_rotation(np.array([far]), theta, np.float32)
    y, _ = ref.rope_forward(np.array([[[[1.0, 0.0]]]], np.float32), rotation)
    assert y.dtype == np.float32
    expected = [math.cos(far), math.sin(far)]
    np.testing.assert_allclose(y.ravel(), expected, atol=1e-7)


@pytest.mark.parametrize(
    ("x", "rotation"),
    [("float32", "float64"), ("float64", "float32"), ("float16", "float32"),
     ("int64", "float64")],
)  # fmt: skip
def test_rope_refuses_precisions_that_do_not_match(x: str, rotation: str) -> None:
    turn = ref.rope_rotation(np.arange(3), np.ones(2), np.dtype(rotation))
    with pytest.raises(ValueError, match=f"x is {x} and rotation complex"):
        ref.rope_forward(np.ones((1, 3, 1, 4), x), turn)


def test_rope_refuses_positions_that_do_not_match() -> None:
    rotation = ref.rope_rotation(np.arange(3), np.ones(2), np.float64)
    with pytest.raises(ValueError, match="one position per row"):
        ref.rope_forward(normal(1, 2, 1, 4), rotation)
    with pytest.raises(ValueError, match="6 / 2 angles"):
        ref.rope_forward(normal(1, 3, 1, 6), rotation)


def test_yarn_and_plain_frequencies_agree_with_transformers() -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        DeepseekV3RotaryEmbedding,
    )

    for yarn in (V3.rope_scaling, None):
        config = dataclasses.replace(V3, rope_scaling=yarn)
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        if yarn:
            rope |= {"rope_type": "yarn", **dataclasses.asdict(yarn)}
        peer = DeepseekV3RotaryEmbedding(
            DeepseekV3Config(rope_parameters=rope, max_position_embeddings=163840)
        )
        # their table is float32
        np.testing.assert_allclose(
            ref.rope_frequencies(config), peer.inv_freq.numpy(), rtol=3e-7
        )


def test_yarn_of_the_released_model() -> None:
    """Facts A.4: which pairs stay, which are blended, which are slowed 40-fold."""
    slow = ref.rope_frequencies(dataclasses.replace(V3, rope_scaling=None))
    ratio = slow / ref.rope_frequencies(V3)
    np.testing.assert_allclose(ratio[:11], 1, rtol=1e-12)
    assert ((ratio[11:23] > 1.01) & (ratio[11:23] < 39.9)).all()
    np.testing.assert_allclose(ratio[23:], 40, rtol=1e-12)
    assert ref.softmax_scale(V3) == pytest.approx(0.1352338, abs=5e-8)
    plain = dataclasses.replace(V3, rope_scaling=None)
    assert ref.softmax_scale(plain) == pytest.approx(192**-0.5, rel=1e-12)


# --- softmax and cross-entropy ------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (2, 1, 5)])
def test_softmax(shape: tuple) -> None:
    def forward(x: np.ndarray) -> tuple:
        P = ref.softmax(x)
        return P, P

    arrays = [normal(*shape, scale=3)]
    check_pair(forward, ref.softmax_backward, arrays, lambda x: x.softmax(-1))


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4, 1e300])
def test_softmax_of_large_scores(shift: float) -> None:
    x = np.array([[0.0, 1.0, -np.inf]]) + shift
    P = ref.softmax(x)
    assert np.isfinite(P).all() and P[0, 2] == 0
    assert P.sum() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("shape", [(1, 2), (4, 3), (2, 1, 5), (2, 3, 5)])
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_cross_entropy(shape: tuple, scale: float) -> None:
    targets = np.random.default_rng(3).integers(0, shape[-1], shape[:-1])
    check_pair(
        lambda z: ref.cross_entropy_forward(z, targets),
        ref.cross_entropy_backward,
        [normal(*shape, scale=scale)],
        lambda z: F.cross_entropy(z.flatten(0, -2), torch.tensor(targets).flatten()),
    )


def test_cross_entropy_of_a_hopeless_target_is_exact() -> None:
    loss, saved = ref.cross_entropy_forward(np.array([[0.0, 800.0]]), np.array([0]))
    assert loss == 800.0  # exp(-800) is 0 in float64: log of it would be infinite
    dz = ref.cross_entropy_backward(1.0, saved)
    np.testing.assert_array_equal(dz, [[-1.0, 1.0]])


def test_cross_entropy_of_huge_float32_logits() -> None:
    logits = np.array([[1e38, -1e38, 0.0]], np.float32)
    loss, saved = ref.cross_entropy_forward(logits, np.array([0]))
    dz = ref.cross_entropy_backward(1.0, saved)
    assert loss == 0.0 and dz.dtype == np.float32 and np.isfinite(dz).all()


def test_the_mean_loss_does_not_round_along_the_way() -> None:
    n = 30_001
    targets = np.zeros(n, int)
    loss, _ = ref.cross_entropy_forward(np.zeros((n, 2), np.float32), targets)
    assert loss == float(np.log(np.float32(2)))


@pytest.mark.parametrize(
    ("targets", "message"),
    [([0, 3], "target id 3"), ([-1, 0], "target id -1"), ([0], "2 rows.*1 targets")],
)
def test_cross_entropy_refuses_bad_targets(targets: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ref.cross_entropy_forward(normal(2, 3), np.array(targets))


def test_cross_entropy_refuses_no_targets() -> None:
    with pytest.raises(ValueError, match="no targets"):
        ref.cross_entropy_forward(np.zeros((0, 3)), np.zeros(0, int))


# --- the feed-forward ---------------------------------------------------------------


def test_silu_including_the_tails() -> None:
    x = np.array([[-700.0, -40, -1e-8, 0, 1e-8, 2, 40, 700]])
    y, saved = ref.silu_forward(x)
    tx = torch.tensor(x, requires_grad=True)
    np.testing.assert_allclose(y, F.silu(tx).detach().numpy(), rtol=1e-13)
    theirs = torch.autograd.grad(F.silu(tx).sum(), tx)[0].numpy()
    np.testing.assert_allclose(
        ref.silu_backward(np.ones_like(x), saved), theirs, rtol=1e-11
    )
    # the left tail against its expansion: tanh-based formulas return 0 here
    assert ref.sigmoid(np.array(-60.0)) == pytest.approx(math.exp(-60), rel=1e-13)


@pytest.mark.parametrize("lead", [(1,), (2, 3)])
def test_swiglu(lead: tuple) -> None:
    names = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]

    def forward(x: np.ndarray, *weights: np.ndarray) -> tuple:
        return ref.swiglu_forward(dict(zip(names, weights, strict=True)), x)

    def backward(dy: np.ndarray, saved: tuple) -> tuple:
        dx, grads = ref.swiglu_backward(dy, saved)
        assert sorted(grads) == sorted(names)
        return dx, *(grads[name] for name in names)

    check_pair(
        forward,
        backward,
        [normal(*lead, 3), normal(5, 3), normal(5, 3, seed=1), normal(3, 5)],
        lambda x, g, u, d: (F.silu(x @ g.T) * (x @ u.T)) @ d.T,
    )


# --- attention ----------------------------------------------------------------------

# B, T, S, N_h, N_kv, d_k, d_v: MHA, GQA, MQA, one token, a cached past, odd widths
CORES = [
    (1, 1, 1, 1, 1, 2, 2),
    (2, 4, 4, 3, 3, 4, 4),
    (2, 3, 3, 4, 2, 4, 5),
    (1, 5, 5, 6, 1, 2, 7),
    (2, 1, 6, 4, 2, 4, 3),
    (1, 3, 7, 2, 2, 3, 2),
]


def naive_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float):
    """Every batch, head and query in a loop; key head = query head // group size."""
    B, T, N_h, _ = q.shape
    S, N_kv = k.shape[1:3]
    o = np.zeros((B, T, N_h, v.shape[-1]))
    for b in range(B):
        for h in range(N_h):
            g = h // (N_h // N_kv)
            for t in range(T):
                seen = S - T + t + 1
                s = [scale * float(q[b, t, h] @ k[b, j, g]) for j in range(seen)]
                w = [math.exp(x - max(s)) for x in s]
                o[b, t, h] = sum(w[j] / sum(w) * v[b, j, g] for j in range(seen))
    return o


@pytest.mark.parametrize("shape", CORES)
def test_attention_core(shape: tuple) -> None:
    B, T, S, N_h, N_kv, d_k, d_v = shape
    q, k, v = normal(B, T, N_h, d_k), normal(B, S, N_kv, d_k), normal(B, S, N_kv, d_v)
    scale = 0.7
    o, _ = att.causal_attention_forward(q, k, v, scale)
    assert relative_error(o, naive_attention(q, k, v, scale)) <= 1e-13

    mask = torch.tensor(np.tril(np.ones((T, S), bool), S - T))

    def oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(N_h // N_kv, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(
            1, 2
        )

    check_pair(
        lambda *a: att.causal_attention_forward(*a, scale),
        att.causal_attention_backward,
        [q, k, v],
        oracle,
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_attention_with_enormous_scores_stays_finite(dtype: type) -> None:
    q = normal(1, 4, 1, 2, scale=1e4).astype(dtype)
    o, saved = att.causal_attention_forward(q, q, q, 1.0)
    grads = att.causal_attention_backward(np.ones_like(o), saved)
    assert all(np.isfinite(g).all() and g.dtype == dtype for g in (o, *grads))


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [((1, 3, 2, 2), (1, 2, 2, 2), "3 queries over 2 keys"),
     ((1, 2, 3, 2), (1, 2, 2, 2), "3 query heads over 2"),
     ((2, 2, 2, 2), (1, 2, 2, 2), "must agree"),
     ((1, 2, 2, 3), (1, 2, 2, 2), "must agree")],
)  # fmt: skip
def test_attention_refuses(q: tuple, k: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        att.causal_attention_forward(normal(*q), normal(*k), normal(*k), 1.0)


HEADS = [(4, 4), (4, 2), (4, 1), (1, 1)]  # MHA, GQA, MQA, one head


def plain_attention(N_h: int, N_kv: int) -> tuple:
    config = dataclasses.replace(
        PLAIN,
        hidden_size=5,
        num_attention_heads=N_h,
        num_key_value_heads=N_kv,
        qk_rope_head_dim=4,
        v_head_dim=3,
    )
    weights = {
        "q_proj.weight": normal(N_h * 4, 5),
        "k_proj.weight": normal(N_kv * 4, 5, seed=1),
        "v_proj.weight": normal(N_kv * 3, 5, seed=2),
        "o_proj.weight": normal(5, N_h * 3, seed=3),
    }
    return config, weights


def rotation_for(config, positions: np.ndarray) -> np.ndarray:
    return ref.rope_rotation(positions, ref.rope_frequencies(config), np.float64)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("positions", [[0], [0, 1, 2], [4, 11, 12]])
def test_attention_block_gradients(heads: tuple, positions: list) -> None:
    config, weights = plain_attention(*heads)
    theta = ref.rope_frequencies(config)
    rotation = rotation_for(config, np.array(positions))
    names = list(weights)

    def forward(x: np.ndarray, *w: np.ndarray) -> tuple:
        params = dict(zip(names, w, strict=True))
        return att.attention_forward(params, x, config, rotation)

    def backward(dy: np.ndarray, saved: tuple) -> tuple:
        dx, grads = att.attention_backward(dy, saved)
        assert sorted(grads) == sorted(names)
        return dx, *(grads[name] for name in names)

    def oracle(x: torch.Tensor, W_q, W_k, W_v, W_o) -> torch.Tensor:
        B, T, _ = x.shape
        q = rope_by_hand((x @ W_q.T).reshape(B, T, heads[0], -1), positions, theta)
        k = rope_by_hand((x @ W_k.T).reshape(B, T, heads[1], -1), positions, theta)
        v = (x @ W_v.T).reshape(B, T, heads[1], -1)
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return o.transpose(1, 2).flatten(2) @ W_o.T

    x = normal(2, len(positions), 5)
    check_pair(forward, backward, [x, *weights.values()], oracle)


# --- the cache ----------------------------------------------------------------------


def compositions(n: int) -> list[list[int]]:
    """Every way to cut n positions into chunks: 2^(n-1) of them."""
    if n == 0:
        return [[]]
    return [[k, *rest] for k in range(1, n + 1) for rest in compositions(n - k)]


@pytest.mark.parametrize("heads", HEADS)
def test_cached_attention_is_uncached_for_every_chunking(heads: tuple) -> None:
    config, weights = plain_attention(*heads)
    T = 6
    x = normal(2, T, 5)
    full, _ = att.attention_forward(
        weights, x, config, rotation_for(config, np.arange(T))
    )
    for chunks in compositions(T):
        cache, parts = att.Cache(T), []
        for n in chunks:
            positions = np.arange(cache.length, cache.length + n)
            piece = x[:, positions[0] : positions[-1] + 1]
            y, saved = att.attention_forward(
                weights, piece, config, rotation_for(config, positions), cache
            )
            assert saved is None
            parts.append(y)
        assert relative_error(np.concatenate(parts, axis=1), full) <= 1e-13, chunks


def test_cropped_cache_forgets_the_rejected_tail() -> None:
    cache = att.Cache(4)
    old, draft, new = normal(1, 2, 1, 3), normal(1, 2, 1, 3, seed=1), normal(1, 1, 1, 3)
    cache.extend(old)
    cache.extend(draft)
    cache.crop(2)
    (kept,) = cache.extend(new)
    np.testing.assert_array_equal(kept, np.concatenate([old, new], axis=1))


def test_cache_counts_its_bytes() -> None:
    cache = att.Cache(100)
    assert cache.nbytes == 0
    cache.extend(np.zeros((2, 3, 4, 5), np.float32), np.zeros((2, 3, 7), np.float64))
    assert cache.nbytes == 2 * 3 * 4 * 5 * 4 + 2 * 3 * 7 * 8


def test_full_cache_refuses_and_keeps_what_it_has() -> None:
    cache = att.Cache(3)
    cache.extend(np.zeros((1, 2, 1)))
    with pytest.raises(ValueError, match="2 positions are kept and 2 more.*made for 3"):
        cache.extend(np.ones((1, 2, 1)))
    assert cache.length == 2
    cache.extend(np.ones((1, 1, 1)))
    with pytest.raises(ValueError, match="cannot crop to 4, it holds 3"):
        cache.crop(4)
    with pytest.raises(ValueError, match="capacity is 0"):
        att.Cache(0)


# --- the judges themselves ----------------------------------------------------------


def test_central_differences_on_a_known_gradient() -> None:
    x = normal(3)
    gradient = central_differences(lambda: float(np.sum(x**3)), x)
    np.testing.assert_allclose(gradient, 3 * x**2, rtol=1e-8)


def test_check_pair_refuses_a_wrong_gradient() -> None:
    def wrong_backward(dy: np.ndarray, saved: tuple) -> tuple:
        dx, dW = ref.linear_backward(dy, saved)
        return dx, dW * (1 + 1e-8)

    with pytest.raises(AssertionError, match="off autograd"):
        check_pair(
            ref.linear_forward, wrong_backward, [normal(2, 3), normal(4, 3)], F.linear
        )


@pytest.mark.parametrize("heads", HEADS)
def test_attention_weights_are_what_the_values_were_mixed_with(heads: tuple) -> None:
    config, weights = plain_attention(*heads)
    x = normal(2, 4, 5)
    y, saved = att.attention_forward(
        weights, x, config, rotation_for(config, np.arange(4))
    )
    P = att.attention_weights(saved)
    assert P.shape == (2, heads[0], 4, 4)
    v = (x @ weights["v_proj.weight"].T).reshape(2, 4, heads[1], 3)
    v = np.repeat(v, heads[0] // heads[1], axis=2)
    o = np.einsum("bhts,bshd->bthd", P, v).reshape(2, 4, -1)
    assert relative_error(o @ weights["o_proj.weight"].T, y) <= 1e-13
