"""Multi-head latent attention: both forms, their gradients, the cache and the border.

The judges share no line with the library: DeepSeek's formulas in torch (rotation by
complex numbers, both forms by einsum) and autograd, finite differences, and Hugging
Face transformers.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minidsv3 import checkpoints, parameters
from minidsv3.__main__ import main
from minidsv3.config import PLAIN, TINY, V3, Config, TrainConfig, Yarn
from minidsv3.generation import numpy_ref as generation
from minidsv3.mla import numpy_ref as mla
from minidsv3.model import block_numpy_ref as block
from minidsv3.model import numpy_ref as model
from minidsv3.primitives import numpy_ref as primitives
from minidsv3.primitives.attention_numpy_ref import Cache
from minidsv3.training import numpy_ref as training
from minidsv3.training import run_folder
from tests.oracles import (
    AUTOGRAD,
    DIFFERENCES,
    central_differences,
    check_pair,
    relative_error,
)
from tests.shapes import checked_shapes
from tests.test_cli import TRAIN
from tests.test_cli import text as a_text  # noqa: F401, a fixture
from tests.test_model import (
    fresh,
    ids,
    interleaved_to_half_split,
    rotary,
    torch_swiglu,
)
from tests.test_primitives import compositions, normal, rotation_for
from tests.test_speculation import check_greedy

FORMS = ("naive", "absorbed")
BASE = dataclasses.replace(  # widths that are all different
    PLAIN,
    vocab_size=11,
    hidden_size=10,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=3,
    qk_nope_head_dim=5,
    qk_rope_head_dim=4,
    v_head_dim=2,
    kv_lora_rank=6,
    q_lora_rank=7,
    max_position_embeddings=64,
)
STRETCH = Yarn(  # with rope_theta 100 it blends two of four pairs
    factor=8,
    original_max_position_embeddings=64,
    beta_fast=4,
    beta_slow=0.5,
    mscale=0.7,
    mscale_all_dim=0.7,
)
CONFIGS = {
    name: dataclasses.replace(BASE, **change)
    for name, change in {
        "all widths differ": {},
        "no latent of the queries": {"q_lora_rank": None},
        "one head": {"num_attention_heads": 1, "num_key_value_heads": 1},
        "d_R = d_h = d_v": {"qk_nope_head_dim": 4, "v_head_dim": 4},
        "d_R > d_h": {"qk_nope_head_dim": 1},
        "d_v > d_h": {"v_head_dim": 9},
        "a latent wider than all heads": {"kv_lora_rank": 25},
        "a latent of two numbers": {"kv_lora_rank": 2},
        "YaRN": {"rope_scaling": STRETCH, "rope_theta": 100.0, "qk_rope_head_dim": 8},
        "V3's ratios": {
            **{"qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 4},
            **{"kv_lora_rank": 16, "q_lora_rank": 48},
            **{"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 14},
        },
    }.items()
} | {"TINY": TINY}
YARN = CONFIGS["YaRN"]
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
each_form = pytest.mark.parametrize("form", FORMS)


def weights(config: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Of one layer: scores of a few units, gains away from 1."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.uniform(0.5, 1.5, shape)
        if len(shape) == 1
        else rng.normal(0, 1.2 / shape[1] ** 0.5, shape)
        for name, shape in parameters.mla_shapes(config).items()
    }


def layer(params, x, config: Config, form: str, cache=None, positions=None):
    """`mla_forward` at given positions, or at those that follow the cache's."""
    if positions is None:
        start = cache.length if cache else 0
        positions = np.arange(start, start + x.shape[1])
    rotation = primitives.rope_rotation(
        np.asarray(positions), primitives.rope_frequencies(config), x.dtype
    )
    return mla.mla_forward(params, x, config, rotation, cache, form == "absorbed")


# --- DeepSeek's formulas in torch ----------------------------------------------------


def turned(x: torch.Tensor, config: Config, positions=None) -> torch.Tensor:
    """Pairs as complex numbers (facts A.3): x (B, T, H, d_R)."""
    theta, _ = rotary(config)
    positions = torch.arange(x.shape[1]) if positions is None else positions
    angle = torch.as_tensor(positions)[..., None] * theta
    turn = torch.polar(torch.ones_like(angle), angle)[..., None, :]
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def torch_queries(w: dict, config: Config, x: torch.Tensor, positions=None):
    """q_C and q_R, (B, T, N_h, …)."""
    if config.q_lora_rank is None:
        q = x @ w["q_proj.weight"].T
    else:
        a = x @ w["q_a_proj.weight"].T
        c_Q = F.rms_norm(a, a.shape[-1:], w["q_a_layernorm.weight"], 1e-6)
        q = c_Q @ w["q_b_proj.weight"].T
    q = q.unflatten(-1, (config.num_attention_heads, -1))
    d_h = config.qk_nope_head_dim
    return q[..., :d_h], turned(q[..., d_h:], config, positions)


def torch_latents(w: dict, config: Config, x: torch.Tensor, positions=None):
    """c_KV (B, T, d_c) and k_R (B, T, d_R)."""
    kv, d_c = x @ w["kv_a_proj_with_mqa.weight"].T, config.kv_lora_rank
    c = F.rms_norm(kv[..., :d_c], (d_c,), w["kv_a_layernorm.weight"], 1e-6)
    return c, turned(kv[..., None, d_c:], config, positions)[:, :, 0]


def torch_scale(config: Config) -> float:
    """Facts A.4: m² over the root of the whole head's width."""
    return rotary(config)[1] * (config.qk_rope_head_dim / config.qk_head_dim) ** 0.5


def torch_attend(W_UKV, q_C, q_R, c, k_R, config: Config, form: str) -> torch.Tensor:
    """Facts A.2 and A.6: o (B, T, N_h, d_v)."""
    T, S = q_C.shape[1], c.shape[1]
    W = W_UKV.unflatten(0, (config.num_attention_heads, -1))
    W_UK, W_UV = W.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
    scores = torch.einsum("bthr,bsr->bhts", q_R, k_R)
    if form == "naive":
        k_C = torch.einsum("bsc,hdc->bshd", c, W_UK)
        scores = scores + torch.einsum("bthd,bshd->bhts", q_C, k_C)
    else:
        absorbed = torch.einsum("bthd,hdc->bthc", q_C, W_UK)
        scores = scores + torch.einsum("bthc,bsc->bhts", absorbed, c)
    future = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)
    P = (torch_scale(config) * scores).masked_fill(future, -math.inf).softmax(-1)
    if form == "naive":
        v = torch.einsum("bsc,hdc->bshd", c, W_UV)
        return torch.einsum("bhts,bshd->bthd", P, v)
    mixed = torch.einsum("bhts,bsc->bthc", P, c)
    return torch.einsum("bthc,hdc->bthd", mixed, W_UV)


def torch_layer(w, config: Config, x, form: str = "naive", positions=None):
    """The whole layer: x (B, T, D) -> (B, T, D)."""
    q = torch_queries(w, config, x, positions)
    kept = torch_latents(w, config, x, positions)
    o = torch_attend(w["kv_b_proj.weight"], *q, *kept, config, form)
    return o.flatten(2) @ w["o_proj.weight"].T


def as_tensors(params: dict) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(array) for name, array in params.items()}


# --- forward and backward ------------------------------------------------------------


def check_forward(config: Config = BASE, form: str = "naive") -> None:
    params, x = weights(config), normal(2, 6, config.hidden_size)
    y, _ = layer(params, x, config, form)
    expected = torch_layer(as_tensors(params), config, torch.tensor(x))
    assert relative_error(y, expected.numpy()) <= 1e-12


def numpy_pair(config: Config, form: str, T: int) -> tuple[Callable, Callable]:
    """The layer as a function of x and its weights: forward and backward."""
    names = list(parameters.mla_shapes(config))

    def forward(x: np.ndarray, *w: np.ndarray) -> tuple:
        return layer(dict(zip(names, w, strict=True)), x, config, form)

    def backward(dy: np.ndarray, saved: tuple) -> tuple:
        dx, grads = mla.mla_backward(dy, saved)
        assert sorted(grads) == sorted(names)
        return dx, *(grads[name] for name in names)

    return forward, backward


def check_gradients(
    config: Config = BASE,
    form: str = "naive",
    B: int = 2,
    T: int = 4,
    pair_of: Callable = numpy_pair,
    differences: bool = True,
) -> None:
    """x and every weight, against autograd of the same form and against differences."""
    params, x = weights(config), normal(B, T, config.hidden_size)

    def oracle(x: torch.Tensor, *w: torch.Tensor) -> torch.Tensor:
        return torch_layer(dict(zip(params, w, strict=True)), config, x, form)

    pair = pair_of(config, form, T)
    check_pair(*pair, [x, *params.values()], oracle, differences)


@each_form
@each_config
def test_the_layer_and_its_gradients(config: Config, form: str) -> None:
    check_gradients(config, form)


@each_form
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 1), (1, 7)])
def test_one_token_one_sequence(form: str, B: int, T: int) -> None:
    check_gradients(YARN, form, B, T)


def check_forms_agree(config: Config = BASE, B: int = 2, T: int = 6) -> None:
    """Outputs, dx and the gradient of every weight."""
    params, x = weights(config), normal(B, T, config.hidden_size)
    (y, saved), (y_absorbed, saved_absorbed) = (
        layer(params, x, config, form) for form in FORMS
    )
    assert relative_error(y_absorbed, y) <= 1e-12
    dy = normal(*y.shape, seed=1)
    dx, grads = mla.mla_backward(dy, saved)
    dx_absorbed, grads_absorbed = mla.mla_backward(dy, saved_absorbed)
    assert relative_error(dx_absorbed, dx) <= 1e-12
    for name, grad in grads.items():
        assert relative_error(grads_absorbed[name], grad) <= 1e-12, name


@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 1), (1, 9), (2, 6)])
@each_config
def test_naive_is_absorbed(config: Config, B: int, T: int) -> None:
    check_forms_agree(config, B, T)


@pytest.mark.parametrize("config", [BASE, CONFIGS["no latent of the queries"], YARN])
def test_the_pair_of_the_queries(config: Config) -> None:
    names = [name for name in parameters.mla_shapes(config) if name.startswith("q_")]
    params, d_h = weights(config), config.qk_nope_head_dim
    rotation = rotation_for(config, np.arange(3))

    def forward(x: np.ndarray, *w: np.ndarray) -> tuple:
        given = dict(zip(names, w, strict=True))
        q_C, q_R, saved = mla.queries_forward(given, x, config, rotation)
        return np.concatenate([q_C, q_R], axis=-1), saved

    def backward(dq: np.ndarray, saved: tuple) -> tuple:
        dx, grads = mla.queries_backward(dq[..., :d_h], dq[..., d_h:], saved)
        return dx, *(grads[name] for name in names)

    def oracle(x: torch.Tensor, *w: torch.Tensor) -> torch.Tensor:
        return torch.cat(torch_queries(dict(zip(names, w, strict=True)), config, x), -1)

    arrays = [normal(2, 3, config.hidden_size), *(params[name] for name in names)]
    check_pair(forward, backward, arrays, oracle)


@pytest.mark.parametrize("config", [BASE, YARN])
def test_the_pair_of_the_latents(config: Config) -> None:
    names = ["kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight"]
    params, rotation = weights(config), rotation_for(config, np.arange(3))

    def forward(x: np.ndarray, *w: np.ndarray) -> tuple:
        given = dict(zip(names, w, strict=True))
        return mla.latents_forward(given, x, config, rotation)

    def backward(dkept: np.ndarray, saved: tuple) -> tuple:
        dx, grads = mla.latents_backward(dkept, saved)
        return dx, *(grads[name] for name in names)

    def oracle(x: torch.Tensor, *w: torch.Tensor) -> torch.Tensor:
        return torch.cat(torch_latents(dict(zip(names, w, strict=True)), config, x), -1)

    arrays = [normal(2, 3, config.hidden_size), *(params[name] for name in names)]
    check_pair(forward, backward, arrays, oracle)


@each_form
@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 5), (3, 3), (2, 5)])
@pytest.mark.parametrize("config", [BASE, YARN])
def test_the_pairs_of_the_two_forms(config: Config, T: int, S: int, form: str) -> None:
    """Over a past too: fewer queries than latents."""
    N_h, d_c, d_R = (
        config.num_attention_heads,
        config.kv_lora_rank,
        config.qk_rope_head_dim,
    )
    arrays = [
        weights(config)["kv_b_proj.weight"],
        normal(2, T, N_h, config.qk_nope_head_dim),
        normal(2, T, N_h, d_R),
        normal(2, S, d_c + d_R),
    ]
    forward = {"naive": mla.naive_forward, "absorbed": mla.absorbed_forward}[form]
    backward = {"naive": mla.naive_backward, "absorbed": mla.absorbed_backward}[form]

    def oracle(W_UKV, q_C, q_R, kept) -> torch.Tensor:
        kept = kept.split([d_c, d_R], dim=-1)
        return torch_attend(W_UKV, q_C, q_R, *kept, config, form)

    check_pair(lambda *a: forward(*a, config), backward, arrays, oracle)


def test_its_comments_say_true_shapes() -> None:
    params, tokens = fresh(EVERYTHING), ids(3, 8, config=EVERYTHING)
    x, rotation = normal(3, 8, 10), rotation_for(BASE, np.arange(8))
    with checked_shapes(mla, block) as report:
        model.loss_and_grads(params, EVERYTHING, tokens, RECIPE)
        generation.generate(params, EVERYTHING, tokens, 3)
        _, saved = mla.mla_forward(weights(BASE), x, BASE, rotation, absorbed=True)
        mla.mla_backward(x, saved)
    missed = {s.first for s in report.unexercised if s.file == mla.__file__}
    assert not missed and len(report.exercised) >= 25


# --- transformers --------------------------------------------------------------------


def peer_config(config: Config):
    """transformers' config of the same model; without experts all layers are dense."""
    from transformers import DeepseekV3Config

    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling:
        rope |= {"rope_type": "yarn", **dataclasses.asdict(config.rope_scaling)}
    left_out = ("rope_scaling", "rope_theta", "first_k_dense_replace")
    L, dense = config.num_hidden_layers, config.first_k_dense_replace
    words = {k: v for k, v in dataclasses.asdict(config).items() if k not in left_out}
    if not config.uses_moe:
        words = {k: v for k, v in words.items() if v is not None or k == "q_lora_rank"}
    return DeepseekV3Config(
        **words,
        first_k_dense_replace=dense if config.uses_moe else L,
        rope_parameters=rope,
        attn_implementation="eager",
    )


def as_float32(params: dict) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float32) for name, array in params.items()}


def agree(ours: np.ndarray, theirs: torch.Tensor) -> None:
    theirs = theirs.detach().numpy()
    assert ours.dtype == theirs.dtype == np.float32
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


def peer_layer(params: dict, config: Config):
    """transformers' attention with these weights: a function of x and positions."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    words = peer_config(config)
    attention = theirs.DeepseekV3Attention(words, layer_idx=0).eval()
    attention.load_state_dict(as_tensors(params), strict=True)
    rope = theirs.DeepseekV3RotaryEmbedding(words)

    def attend(x: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        x, T = torch.tensor(x), x.shape[1]
        turn = rope(x, position_ids=torch.tensor(positions)[None])
        future = torch.full((T, T), -math.inf).triu(1)[None, None]
        return attention(x, attention_mask=future, position_embeddings=turn)[0]

    return attend


@each_form
@each_config
def test_the_layer_is_transformers_layer(config: Config, form: str) -> None:
    params = as_float32(weights(config))
    x, positions = normal(2, 9, config.hidden_size), np.arange(9) ** 2
    x = x.astype(np.float32)
    ours, _ = layer(params, x, config, form, positions=positions)
    agree(ours, peer_layer(params, config)(x, positions))


MODELS = {  # no experts: those are another chapter's
    name: config for name, config in CONFIGS.items() if name != "TINY"
}
each_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


@each_model
def test_the_model_is_transformers_model(config: Config) -> None:
    """Logits of a text, and of the same text read in pieces, each with its own cache.

    Its cached form makes all keys anew, ours absorbs.
    """
    from transformers import DeepseekV3ForCausalLM, DynamicCache

    params, tokens = as_float32(fresh(config)), ids(2, 12, config=config)
    peer = DeepseekV3ForCausalLM(peer_config(config)).eval()
    peer.load_state_dict(as_tensors(params), strict=True)
    with torch.no_grad():
        agree(
            model.forward(params, config, tokens)[0], peer(torch.tensor(tokens)).logits
        )
        caches, past = model.new_caches(config, 12), DynamicCache(config=peer.config)
        for piece in np.split(tokens, [5, 6, 9], axis=1):
            ours, _ = model.forward(params, config, piece, caches)
            agree(ours, peer(torch.tensor(piece), past_key_values=past).logits)


def test_yarn_of_the_released_model_is_transformers() -> None:
    """Facts A.4: 0.1 ln 40 + 1, squared; nothing is allocated."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    m = 0.1 * math.log(40) + 1
    assert m == pytest.approx(1.3688879, abs=5e-8)
    with torch.device("meta"):
        peer = DeepseekV3Attention(peer_config(V3), layer_idx=0)
    ours = primitives.softmax_scale(V3)
    assert ours == pytest.approx(peer.scaling, rel=1e-12)
    assert ours == pytest.approx(m * m / 192**0.5, rel=1e-12)


def test_the_released_layer_has_187_million_parameters() -> None:
    """Facts D.1, and V2-Lite's kind without a latent of the queries."""
    sizes = {k: math.prod(s) for k, s in parameters.mla_shapes(V3).items()}
    assert sum(sizes.values()) == 187_107_328
    assert sizes["kv_b_proj.weight"] == 16_777_216
    light = parameters.mla_shapes(dataclasses.replace(V3, q_lora_rank=None))
    assert light["q_proj.weight"] == (128 * 192, 7168)


# --- what depends on what ------------------------------------------------------------


@each_form
def test_no_position_sees_the_future(form: str) -> None:
    params, x = weights(BASE), normal(1, 8, BASE.hidden_size)
    before, _ = layer(params, x, BASE, form)
    for j in range(8):
        changed = x.copy()
        changed[0, j] += 1
        moved = np.abs(layer(params, changed, BASE, form)[0] - before)[0].max(axis=-1)
        assert (moved[:j] <= 1e-12).all() and (moved[j:] > 1e-6).all(), j


@each_form
@pytest.mark.parametrize("config", [BASE, YARN], ids=["plain", "YaRN"])
@pytest.mark.parametrize("positions", [np.arange(6), np.array([0, 1, 5, 7, 20, 21])])
def test_only_distances_matter(config: Config, positions, form: str) -> None:
    params, x = weights(config), normal(2, 6, config.hidden_size)

    def at(positions: np.ndarray) -> np.ndarray:
        return layer(params, x, config, form, positions=positions)[0]

    here = at(positions)
    for shift in (1, 37, 20_000):
        # an angle of 20,000 radians is known to 4e-12 in float64
        assert relative_error(at(positions + shift), here) <= 1e-10
    for other in (2 * positions, -positions):
        assert relative_error(at(other), here) > 1e-2


@each_form
def test_each_sequence_may_have_its_own_positions(form: str) -> None:
    params, x = weights(BASE), normal(2, 3, BASE.hidden_size)
    positions = np.array([[0, 1, 2], [4, 9, 11]])
    together, _ = layer(params, x, BASE, form, positions=positions)
    for row in (0, 1):
        w, own = as_tensors(params), torch.tensor(positions[row])
        alone = torch_layer(w, BASE, torch.tensor(x[row : row + 1]), form, own)
        assert relative_error(together[row : row + 1], alone.numpy()) <= 1e-12


@each_form
def test_enormous_scores_in_float32(form: str) -> None:
    """Of 10,000 and more: every query reads the one key that float64 says."""
    params, x = weights(BASE), normal(2, 8, BASE.hidden_size)
    params["q_b_proj.weight"] *= 1e4
    exact, saved = layer(params, x, BASE, "naive")
    q, k, _, P, scale, _ = saved[2][1]
    assert np.median(np.abs(scale * q @ k.swapaxes(-1, -2))) > 1e4
    assert (P.max(axis=-1) > 1 - 1e-9).all()  # no close call that rounding may decide
    y, saved = layer(as_float32(params), x.astype(np.float32), BASE, form)
    assert relative_error(y, exact) <= 1e-5
    dx, grads = mla.mla_backward(np.ones_like(y), saved)
    for array in (y, dx, *grads.values()):
        assert np.isfinite(array).all() and array.dtype == np.float32


# --- pairs, norms, temperature -------------------------------------------------------


def half_split(params: dict, config: Config) -> dict:
    """Rows of the rotated parts reordered, so that pair j is (j, j + d_R/2)."""
    d_h, d_c, N_h = (
        config.qk_nope_head_dim,
        config.kv_lora_rank,
        config.num_attention_heads,
    )
    params = {name: array.copy() for name, array in params.items()}
    W_KVA, W_QB = params["kv_a_proj_with_mqa.weight"], params["q_b_proj.weight"]
    W_KVA[d_c:] = interleaved_to_half_split(W_KVA[d_c:], 1)
    rows = W_QB.reshape(N_h, config.qk_head_dim, -1)
    for head in rows:
        head[d_h:] = interleaved_to_half_split(head[d_h:], 1)
    return params


@each_form
def test_pairs_are_neighbours(form: str, monkeypatch) -> None:
    """A rotation of halves is another function; with rows reordered once, the same."""
    params, x = weights(YARN), normal(2, 6, YARN.hidden_size)
    y, _ = layer(params, x, YARN, form)

    def rotate_halves(x: np.ndarray, rotation: np.ndarray) -> tuple:
        a, b = np.split(x, 2, axis=-1)
        turned = (a + 1j * b) * rotation[..., None, :]
        return np.concatenate([turned.real, turned.imag], axis=-1), None

    monkeypatch.setattr(mla, "rope_forward", rotate_halves)
    assert relative_error(layer(params, x, YARN, form)[0], y) > 0.1
    assert relative_error(layer(half_split(params, YARN), x, YARN, form)[0], y) <= 1e-12


def check_latent_eps() -> None:
    """1e-6 in both norms of the latents, whatever the config's is (facts A.2)."""
    config = dataclasses.replace(BASE, rms_norm_eps=1e-2)
    params, x = weights(config), normal(2, 6, config.hidden_size, scale=0.01)
    expected = torch_layer(as_tensors(params), config, torch.tensor(x)).numpy()
    for form in FORMS:
        assert relative_error(layer(params, x, config, form)[0], expected) <= 1e-12


def test_the_norms_of_the_latents_have_their_own_eps() -> None:
    check_latent_eps()
    config = dataclasses.replace(BASE, rms_norm_eps=1e-2)
    params = as_float32(weights(config))
    x = normal(2, 6, config.hidden_size, scale=0.01).astype(np.float32)
    agree(
        layer(params, x, config, "naive")[0],
        peer_layer(params, config)(x, np.arange(6)),
    )


def scores_of(params: dict, config: Config, x: np.ndarray, form: str) -> np.ndarray:
    """log P of each head and query, but for a constant: the last key against the first.

    Positions are turned as without YaRN, whatever the config says.
    """
    plain = dataclasses.replace(config, rope_scaling=None)
    rotation = rotation_for(plain, np.arange(6))
    _, saved = mla.mla_forward(params, x, config, rotation, None, form == "absorbed")
    P = saved[2][form == "naive"][3].reshape(2, config.num_attention_heads, 6, 6)
    return np.log(P[:, :, -1, -1] / P[:, :, -1, 0])


def check_temperature(form: str = "naive") -> None:
    """m² multiplies the score's both parts, each by itself and together."""
    m = 0.07 * math.log(8) + 1
    cold = dataclasses.replace(YARN, rope_scaling=None)
    d_c, d_h = YARN.kv_lora_rank, YARN.qk_nope_head_dim
    x = normal(2, 6, YARN.hidden_size)
    for part in ("content", "position", "both"):
        params = weights(YARN)
        if part == "content":
            params["kv_a_proj_with_mqa.weight"][d_c:] = 0
        if part == "position":
            params["kv_b_proj.weight"].reshape(3, -1, d_c)[:, :d_h] = 0
        plain, stretched = (scores_of(params, c, x, form) for c in (cold, YARN))
        assert np.abs(plain).min() > 1e-3
        np.testing.assert_allclose(stretched / plain, m * m, rtol=1e-9, err_msg=part)


@each_form
def test_the_temperature_multiplies_the_whole_score(form: str) -> None:
    check_temperature(form)


# --- the cache -----------------------------------------------------------------------


def check_cached_layer(config: Config = BASE, form: str = "absorbed") -> None:
    """Every split of six positions into chunks; a chunk of any size in either form."""
    params, x = weights(config), normal(2, 6, config.hidden_size)
    full, _ = layer(params, x, config, "naive")
    for chunks in compositions(6):
        cache, parts = Cache(6), []
        for n in chunks:
            piece = x[:, cache.length : cache.length + n]
            y, saved = layer(params, piece, config, form, cache)
            assert saved is None
            parts.append(y)
        assert relative_error(np.concatenate(parts, axis=1), full) <= 1e-12, chunks


@each_form
@each_config
def test_cached_is_uncached_for_every_chunking(config: Config, form: str) -> None:
    check_cached_layer(config, form)


def read_in_pieces(params, config: Config, tokens, chunks: list[int]) -> np.ndarray:
    caches, parts, start = model.new_caches(config, tokens.shape[1]), [], 0
    for n in chunks:
        piece = tokens[:, start : start + n]
        parts.append(model.forward(params, config, piece, caches)[0])
        start += n
    return np.concatenate(parts, axis=1)


def check_cached_model(config: Config = BASE) -> None:
    """Every split again: naive for the first chunk, absorbed for the others."""
    params, tokens = fresh(config), ids(2, 6, config=config)
    full, _ = model.forward(params, config, tokens)
    for chunks in compositions(6):
        pieces = read_in_pieces(params, config, tokens, chunks)
        np.testing.assert_allclose(pieces, full, rtol=0, atol=1e-12, err_msg=chunks)


@each_model
def test_cached_logits_are_uncached_logits(config: Config) -> None:
    check_cached_model(config)


@pytest.mark.parametrize("length", range(6))
def test_what_was_cropped_was_never_there(length: int) -> None:
    params, tokens = fresh(BASE), ids(2, 9)
    drafts = ids(2, 6, seed=1)
    caches = model.new_caches(BASE, 9)
    model.forward(params, BASE, np.append(tokens[:, :length], drafts, 1)[:, :6], caches)
    for cache in caches:
        cache.crop(length)
    after, _ = model.forward(params, BASE, tokens[:, length:], caches)
    full, _ = model.forward(params, BASE, tokens)
    np.testing.assert_allclose(after, full[:, length:], rtol=0, atol=1e-12)


def kept_arrays(cache: Cache) -> list[np.ndarray]:
    """Every array that the cache holds, however it is called."""
    held = [v if isinstance(v, tuple) else (v,) for v in vars(cache).values()]
    return [a for a in itertools.chain(*held) if isinstance(a, np.ndarray)]


def count_kept(config: Config, dtype: type, B: int = 2, T: int = 3) -> float:
    """Numbers a token and layer that are kept of a text, counted in the caches.

    Each has room for exactly the text, so what it holds is what it needs.
    """
    params = {k: a.astype(dtype) for k, a in fresh(config).items()}
    caches = model.new_caches(config, T + 1)
    tokens = ids(B, T + 1, config=config)
    for piece in (tokens[:, :T], tokens[:, T:]):
        model.forward(params, config, piece, caches)
    held = [array for cache in caches for array in kept_arrays(cache)]
    assert {array.dtype for array in held} == {np.dtype(dtype)}
    assert sum(cache.nbytes for cache in caches) == sum(a.nbytes for a in held)
    return sum(array.size for array in held) / (B * (T + 1)) / len(caches)


def check_kept_numbers(config: Config = BASE) -> None:
    for dtype in (np.float32, np.float64):
        kept = count_kept(config, dtype)
        assert kept == config.kv_lora_rank + config.qk_rope_head_dim


@each_model
def test_a_latent_and_a_key_are_kept_of_each_token(config: Config) -> None:
    check_kept_numbers(config)


def test_576_numbers_of_v3_are_kept_where_plain_attention_keeps_32768() -> None:
    """Facts A.5, of a narrow model with V3's heads."""
    heads = ("num_attention_heads", "num_key_value_heads", "qk_nope_head_dim",
             "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")  # fmt: skip
    narrow = dataclasses.replace(
        BASE,
        **{name: getattr(V3, name) for name in heads},
        num_hidden_layers=1,
        q_lora_rank=2,
    )
    assert count_kept(narrow, np.float32, B=1, T=1) == 576
    plain = dataclasses.replace(
        narrow,
        kv_lora_rank=None,
        q_lora_rank=None,
        qk_nope_head_dim=0,
        qk_rope_head_dim=128,
    )
    assert count_kept(plain, np.float32, B=1, T=1) == 32_768


def check_what_is_kept(config: Config = BASE) -> None:
    """The latent after its norm and the key after its rotation, of every position."""
    params, x = weights(config), normal(2, 6, config.hidden_size)
    cache = Cache(6)
    for piece in (x[:, :4], x[:, 4:5], x[:, 5:]):
        layer(params, piece, config, "absorbed", cache)
    [kept] = kept_arrays(cache)
    expected = torch_latents(as_tensors(params), config, torch.tensor(x))
    assert relative_error(kept, torch.cat(expected, -1).numpy()) <= 1e-12


@pytest.mark.parametrize("config", [BASE, YARN])
def test_the_normed_latent_and_the_rotated_key_are_kept(config: Config) -> None:
    check_what_is_kept(config)


# --- what a step costs ---------------------------------------------------------------


class Counted(np.ndarray):
    """An array that counts the multiplications of the matrix products it takes part in.

    What is computed from it counts too.
    """

    __array_priority__ = 1.0
    products = 0

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        plain = [np.asarray(a) if isinstance(a, Counted) else a for a in inputs]
        if out is not None:
            kwargs["out"] = tuple(np.asarray(a) for a in out)
        result = getattr(ufunc, method)(*plain, **kwargs)
        if ufunc is np.matmul:
            Counted.products += result.size * plain[0].shape[-1]
        return result.view(Counted) if isinstance(result, np.ndarray) else result


def products_of(config: Config, past: int, new: int, form: str | None = None) -> int:
    """Multiplications of a step that reads ``new`` tokens after ``past`` others.

    In the form that the block chooses, or in a given one.
    """
    params = {k: a.view(Counted) for k, a in weights(config).items()}
    x, cache = normal(1, past + new, config.hidden_size), Cache(past + new)
    if past:
        layer(params, x[:, :past], config, "naive", cache)
    rotation = rotation_for(config, np.arange(past, past + new))
    Counted.products = 0
    if form is None:
        block.attend_forward(params, x[:, past:], config, rotation, cache)
    else:
        layer(params, x[:, past:], config, form, cache)
    return Counted.products


def computed_products(config: Config, past: int, new: int, form: str) -> int:
    """Facts A.7, in multiplications: S new tokens, N keys."""
    sizes = {k: math.prod(s) for k, s in parameters.mla_shapes(config).items()}
    up = sizes.pop("kv_b_proj.weight")
    common = sum(n for name, n in sizes.items() if "norm" not in name)
    S, N, N_h = new, past + new, config.num_attention_heads
    d_h, d_R, d_c = (
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.kv_lora_rank,
    )
    if form == "naive":
        return S * common + N * up + S * N * N_h * (d_h + d_R + config.v_head_dim)
    return S * common + S * up + S * N * N_h * (d_c + d_R + d_c)


def check_cost_of_decoding(config: Config = BASE) -> None:
    """No key of the past is made again: the absorbed form's products, and no other."""
    for past, new in ((6, 1), (40, 1), (40, 3)):
        expected = computed_products(config, past, new, "absorbed")
        assert products_of(config, past, new) == expected


def check_the_choice_of_form() -> None:
    """Naive for a prompt, absorbed for what continues it, be it a token or more."""
    steps = {(0, 6): "naive", (6, 1): "absorbed", (6, 4): "absorbed"}
    for step, form in steps.items():
        assert products_of(BASE, *step) == computed_products(BASE, *step, form)


def test_the_block_chooses_the_form() -> None:
    check_the_choice_of_form()


@each_model
def test_a_step_costs_what_the_formulas_say(config: Config) -> None:
    check_cost_of_decoding(config)
    for form in FORMS:
        for past, new in ((0, 1), (0, 5), (6, 1), (40, 3)):
            expected = computed_products(config, past, new, form)
            assert products_of(config, past, new, form) == expected


# --- the whole model -----------------------------------------------------------------

EVERYTHING = dataclasses.replace(  # MLA, experts and a module, small enough for all
    BASE,
    hidden_size=6,
    intermediate_size=5,
    num_attention_heads=2,
    num_key_value_heads=2,
    qk_nope_head_dim=3,
    v_head_dim=7,
    kv_lora_rank=9,
    q_lora_rank=8,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=3,
    n_group=2,
    topk_group=1,
    routed_scaling_factor=2.5,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
)
RECIPE = TrainConfig(mtp_weight=0.7, balance_weight=0.5)


def test_every_gradient_of_the_whole_agrees_with_differences() -> None:
    """Of each parameter, along four random directions."""
    params, tokens = fresh(EVERYTHING), ids(2, 6, config=EVERYTHING)
    _, grads, _ = model.loss_and_grads(params, EVERYTHING, tokens, RECIPE)
    learned = {k: a for k, a in params.items() if not k.endswith("bias")}
    assert sorted(grads) == sorted(learned)
    for name, array in learned.items():
        directions = normal(4, *array.shape) / array.size**0.5
        t = np.zeros(len(directions))

        def loss(name=name, array=array, directions=directions, t=t) -> float:
            moved = params | {name: array + np.tensordot(t, directions, 1)}
            return model.loss_and_grads(moved, EVERYTHING, tokens, RECIPE)[0]["total"]

        numeric = central_differences(loss, t, 1e-6)
        ours = np.tensordot(directions, grads[name], array.ndim)
        error = np.linalg.norm(ours - numeric)
        # the quotient's own rounding: 1e-16 / 1e-6 a direction
        assert error <= DIFFERENCES * np.linalg.norm(numeric) + 1e-9, name


def torch_block(
    w: dict, config: Config, x: torch.Tensor, feed: Callable = torch_swiglu
) -> torch.Tensor:
    """A block whose attention is MLA."""

    def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, x.shape[-1:], gain, config.rms_norm_eps)

    u = norm(x, w["input_layernorm.weight"])
    x = x + torch_layer(parameters.cut(w, "self_attn."), config, u)
    return x + feed(w, config, norm(x, w["post_attention_layernorm.weight"]))


def torch_model(p: dict, config: Config, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a model of such blocks, (B, T, V)."""
    x = F.embedding(tokens, p["model.embed_tokens.weight"])
    for n in range(config.num_hidden_layers):
        x = torch_block(parameters.cut(p, f"model.layers.{n}."), config, x)
    h = F.rms_norm(x, x.shape[-1:], p["model.norm.weight"], config.rms_norm_eps)
    return h @ p["lm_head.weight"].T


@each_model
def test_every_gradient_of_a_dense_model_agrees_with_autograd(config: Config) -> None:
    params, tokens = fresh(config), ids(2, 8, config=config)
    losses, grads, _ = model.loss_and_grads(params, config, tokens, RECIPE)
    p = {k: torch.tensor(a, requires_grad=True) for k, a in params.items()}
    t = torch.tensor(tokens)
    logits = torch_model(p, config, t[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), t[:, 1:].flatten())
    loss.backward()
    assert losses["total"] == pytest.approx(loss.item(), rel=1e-12)
    for name, grad in grads.items():
        assert relative_error(grad, p[name].grad.numpy()) <= AUTOGRAD, name


def test_no_logit_sees_the_future() -> None:
    params, tokens = fresh(EVERYTHING), ids(1, 8)
    before, _ = model.forward(params, EVERYTHING, tokens)
    for j in range(8):
        changed = tokens.copy()
        changed[0, j] = (changed[0, j] + 1) % 11
        moved = np.abs(model.forward(params, EVERYTHING, changed)[0] - before)[0]
        assert (moved[:j] <= 1e-12).all()
        assert (moved[j:].max(axis=-1) > 1e-9).all()


def test_float32_stays_float32() -> None:
    params = as_float32(fresh(EVERYTHING))
    _, grads, _ = model.loss_and_grads(params, EVERYTHING, ids(), RECIPE)
    assert {g.dtype for g in grads.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("B", [1, 2])
def test_drafts_over_latents_leave_the_greedy_text(B: int) -> None:
    """The caches are cropped after a rejection; the module has a latent cache too."""
    params = parameters.initialise(EVERYTHING, 0, 0.5, np.float64)
    drafts, accepted = check_greedy(params, B, how_many=25, config=EVERYTHING)
    assert drafts > 300 and 10 < accepted < drafts / 2  # both branches have run


def test_everything_cached_is_uncached() -> None:
    check_cached_model(EVERYTHING)


def test_cached_drafts_are_uncached_drafts() -> None:
    params, tokens = fresh(EVERYTHING), ids(2, 7)
    _, saved = model.forward(params, EVERYTHING, tokens)
    h, pairs = model.hidden_states(saved)[:, :-1], tokens[:, 1:]
    whole = model.new_mtp_cache(EVERYTHING, 6)
    full = model.mtp_step(params, EVERYTHING, h, pairs, whole)
    for chunks in compositions(6):
        cache, parts, ends = model.new_mtp_cache(EVERYTHING, 6), [], np.cumsum(chunks)
        for n, end in zip(chunks, ends, strict=True):
            now = slice(end - n, end)
            given = h[:, now], pairs[:, now], cache
            parts.append(model.mtp_step(params, EVERYTHING, *given))
        np.testing.assert_allclose(np.concatenate(parts, 1), full, rtol=0, atol=1e-12)


def test_a_resumed_run_is_the_unbroken_run(tmp_path) -> None:
    """Through the file: latents' norms, both projections, moments, router biases."""
    recipe = TrainConfig(steps=8, batch_size=2, sequence_length=9, warmup_steps=2)
    text = np.random.default_rng(0).integers(0, 11, 500).astype(np.uint16)

    def start() -> training.TrainState:
        return training.new_state(parameters.initialise(EVERYTHING, 0, 0.1))

    whole, broken = start(), start()
    losses = [r.losses for r in training.train(whole, EVERYTHING, recipe, text)]
    for record in itertools.islice(training.train(broken, EVERYTHING, recipe, text), 3):
        run_folder.append_log(tmp_path, record)
    run_folder.save(tmp_path, broken, EVERYTHING, recipe, "text")
    resumed = run_folder.resume(tmp_path, EVERYTHING, recipe, "text")
    again = [r.losses for r in training.train(resumed, EVERYTHING, recipe, text)]
    assert again == losses[3:]
    for name, array in whole.params.items():
        np.testing.assert_array_equal(resumed.params[name], array, err_msg=name)


SIZES = ("kv_lora_rank=6 q_lora_rank=10 qk_nope_head_dim=5 qk_rope_head_dim=4 "
         "v_head_dim=7")  # fmt: skip


def test_the_commands_train_and_write(tmp_path, a_text, capfdbinary) -> None:  # noqa: F811
    out = str(tmp_path / "run")
    sizes = [word for pair in SIZES.split() for word in ("--set", pair)]
    asked = [*TRAIN, *sizes, "--mtp", "1", "--text", str(a_text), "--out", out]
    assert main([*asked, "--steps", "4"]) == 0
    config, params = checkpoints.load(out)
    assert config.kv_lora_rank == 6 and config.qk_nope_head_dim == 5
    assert params["model.layers.1.self_attn.kv_b_proj.weight"].shape == (4 * 12, 6)
    assert main(["evaluate", "--model", out, "--text", str(a_text)]) == 0
    capfdbinary.readouterr()
    asked = ["generate", "--model", out, "--prompt", "line", "--temperature", "0"]
    assert main([*asked, "--max-new-tokens", "40"]) == 0
    speculative = capfdbinary.readouterr().out
    assert main([*asked, "--max-new-tokens", "40", "--no-speculative"]) == 0
    assert capfdbinary.readouterr().out == speculative
    assert speculative.startswith(b"line") and len(speculative) > 8


# --- the border ----------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", parameters.mla_shapes(BASE))
def test_the_parameter_that_is_not_finite_is_named(name: str, bad: float) -> None:
    """In a block of the trunk, cached or not, and in the MTP module's."""
    config = dataclasses.replace(BASE, num_nextn_predict_layers=1)
    for n in (1, 2):
        params, caches = fresh(config), model.new_caches(config, 9)
        params[f"model.layers.{n}.self_attn.{name}"].flat[3] = bad
        message = f"layers.{n}.self_attn.{name} holds NaN"
        with np.errstate(all="ignore"):
            for given in (None, caches) if n == 1 else ():
                with pytest.raises(FloatingPointError, match=message):
                    model.forward(params, config, ids(), given)
            with pytest.raises(FloatingPointError, match=message):
                model.loss_and_grads(params, config, ids(), RECIPE)


@each_form
def test_parameters_of_another_layer_are_refused(form: str) -> None:
    x = normal(1, 2, BASE.hidden_size)
    params = weights(BASE)
    del params["kv_a_layernorm.weight"]
    params["k_proj.weight"] = np.ones((4, 10))
    message = "missing kv_a_layernorm.weight, not expected k_proj.weight"
    with pytest.raises(parameters.ParameterError, match=message):
        layer(params, x, BASE, form)
    for name in weights(BASE):
        params = weights(BASE)
        params[name] = np.append(params[name], params[name][:1], axis=0)
        with pytest.raises(parameters.ParameterError, match=f"{name} has shape"):
            layer(params, x, BASE, form)
    with pytest.raises(parameters.ParameterError, match=r"missing q_proj.*q_a_proj"):
        layer(weights(BASE), x, CONFIGS["no latent of the queries"], form)
    with pytest.raises(ValueError, match="last axis of x is 9"):
        layer(weights(BASE), x[..., :9], BASE, form)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[0, 11]], "token id 11 is outside the vocabulary 0…10"),
        ([[-1, 0]], "token id -1 is outside"),
        ([[0.5]], "must be integers"),
        ([[0] * 65], "65 positions asked for, but max_position_embeddings is 64"),
    ],
)
def test_bad_ids_are_refused_and_leave_the_caches(tokens: list, message: str) -> None:
    params, caches = fresh(BASE), model.new_caches(BASE, 64)
    for given in (None, caches):
        with pytest.raises(ValueError, match=message):
            model.forward(params, BASE, np.array(tokens), given)
    assert [cache.length for cache in caches] == [0, 0]


def test_a_full_cache_keeps_what_it_has() -> None:
    params, tokens, caches = fresh(BASE), ids(2, 6), model.new_caches(BASE, 5)
    model.forward(params, BASE, tokens[:, :4], caches)
    before = [array.copy() for cache in caches for array in kept_arrays(cache)]
    with pytest.raises(ValueError, match="4 positions are kept and 2 more arrive"):
        model.forward(params, BASE, tokens[:, 4:], caches)
    assert [cache.length for cache in caches] == [4, 4]
    after = [array for cache in caches for array in kept_arrays(cache)]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one[:, :4], other[:, :4])
    logits, _ = model.forward(params, BASE, tokens[:, 4:5], caches)
    full, _ = model.forward(params, BASE, tokens[:, :5])
    np.testing.assert_allclose(logits, full[:, 4:], rtol=0, atol=1e-12)


STRANGERS = {
    "another width": (dataclasses.replace(BASE, kv_lora_rank=7), 2, np.float64),
    "plain attention": (
        dataclasses.replace(
            BASE, kv_lora_rank=None, q_lora_rank=None, qk_nope_head_dim=0
        ),
        *(2, np.float64),
    ),
    "a batch of one": (BASE, 1, np.float64),
    "another precision": (BASE, 2, np.float32),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_cache_of_another_model_is_refused(stranger: str) -> None:
    """A batch of one would be stretched and float64 rounded, both without a word."""
    config, B, dtype = STRANGERS[stranger]
    caches = model.new_caches(BASE, 6)
    model.forward(fresh(BASE), BASE, ids(2, 3), caches)
    params = {name: array.astype(dtype) for name, array in fresh(config).items()}
    with pytest.raises(ValueError, match="a cache is for one model and one batch"):
        model.forward(params, config, ids(B, 1), caches)
    assert [cache.length for cache in caches] == [3, 3]


def test_caches_that_were_not_cropped_alike() -> None:
    params, caches = fresh(BASE), model.new_caches(BASE, 6)
    model.forward(params, BASE, ids(2, 3), caches)
    caches[1].crop(2)
    with pytest.raises(ValueError, match="hold 3, 2 positions"):
        model.forward(params, BASE, ids(2, 1), caches)
