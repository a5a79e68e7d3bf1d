"""The mechanisms in PyTorch: the cases, judges and tolerances of the NumPy references.

Gradients are those of autograd of formulas that share no line with the library
(`tests.torch_moe`, `tests.test_mla`), in float64. `test_torch_model` has the whole
model, `test_torch_training` the loop.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from minidsv3.config import PLAIN, Config
from minidsv3.mla.torch_port import LatentAttention
from minidsv3.model.torch_port import Block
from minidsv3.moe import numpy_ref as moe_ref
from minidsv3.moe import torch_port as moe
from minidsv3.mtp.torch_port import MTPModule
from minidsv3.primitives import attention_torch_port as att
from minidsv3.primitives import torch_port as primitives
from minidsv3.primitives.cache import Cache, RaggedCache
from tests import test_mla, test_moe
from tests.oracles import check_pair, relative_error
from tests.planting import plant
from tests.test_mla import each_config, each_form
from tests.test_moe import BROAD, GRADIENTS, LAYERS, ONE, Layer, layer, naive_choice
from tests.test_mtp import MODULE_KEYS, MTP, module_of, torch_module
from tests.test_primitives import (
    CORES,
    HEADS,
    compositions,
    naive_attention,
    normal,
    plain_attention,
    rope_by_hand,
)
from tests.torch_moe import BIAS, torch_balance
from tests.torch_ports import as_pair, filled, gradients, mla_pair, moe_pair
from tests.torch_ports import rotation_of as rotation_for

FLOAT32 = 2e-6  # relative: a dozen roundings of 6e-8 on the way
SAME = 1e-12  # float64: the same sums in another order


def check_port(module, oracle: Callable, inputs: list, *more, weights=None) -> None:
    """A module's answer and every gradient; oracle(*inputs, *weights) as tensors."""
    names = [name for name, _ in module.named_parameters()]
    arrays = [(weights or {}).get(n, normal(*module.get_parameter(n).shape, seed=5))
              for n in names]  # fmt: skip

    def function(*given: torch.Tensor) -> torch.Tensor:
        table = dict(zip(names, given[len(inputs) :], strict=True))
        y = functional_call(module, table, (*given[: len(inputs)], *more))
        return y[0] if isinstance(y, tuple) else y

    check_pair(*as_pair(function), [*inputs, *arrays], oracle, differences=False)


# --- primitives -----------------------------------------------------------------------


def check_rmsnorm(eps: float = 0.1, shape: tuple = (2, 3, 5)) -> None:
    oracle = lambda x, g: (  # noqa: E731
        g * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    )
    check_port(primitives.RMSNorm(shape[-1], eps), oracle, [normal(*shape)])


@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 3, 5), (3, 1)])
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rmsnorm(shape: tuple, eps: float) -> None:
    check_rmsnorm(eps, shape)


def check_half_precision_norm() -> None:
    """In float32 inside: a mean of squares of bfloat16 would lose all but 8 bits."""
    x = torch.tensor(normal(4, 300)).bfloat16()
    norm = primitives.RMSNorm(300, 1e-6).bfloat16()
    exact = F.rms_norm(x.double(), (300,), None, 1e-6)
    y = norm(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, exact.float().bfloat16())


def test_half_precision_is_normed_in_full() -> None:
    check_half_precision_norm()


def check_swiglu() -> None:
    def oracle(x, gate, up, down) -> torch.Tensor:
        a = x @ gate.T
        return (a * torch.sigmoid(a) * (x @ up.T)) @ down.T

    check_port(primitives.SwiGLU(4, 6), oracle, [normal(2, 3, 4)])


def test_swiglu() -> None:
    check_swiglu()


def check_rotate(positions: tuple = (5, 2, 40_000)) -> None:
    config = dataclasses.replace(PLAIN, qk_rope_head_dim=6)
    theta = 10_000.0 ** (-2 * np.arange(3) / 6)
    turn = rotation_for(config, np.array(positions))

    def oracle(x: torch.Tensor) -> torch.Tensor:
        turned = rope_by_hand(x.transpose(1, 2), np.array(positions), theta)
        return turned.transpose(1, 2)

    pair = as_pair(lambda x: primitives.rotate(x, turn))
    check_pair(*pair, [normal(2, 2, len(positions), 6)], oracle, differences=False)


@pytest.mark.parametrize("positions", [(0,), (7,), (0, 1, 2), (5, 2, 40_000)])
def test_rotate(positions: tuple) -> None:
    check_rotate(positions)


def test_angles_far_out_are_exact_in_float32() -> None:
    far = torch.tensor([163_839.0], dtype=torch.float64)
    config = dataclasses.replace(PLAIN, qk_rope_head_dim=2)
    for like in (torch.float32, torch.bfloat16):
        turn = primitives.rope_rotation(far, config, torch.ones(1, dtype=like))
        assert turn.dtype == torch.float32
        expected = [math.cos(163_839), math.sin(163_839)]
        assert turn.flatten().tolist() == pytest.approx(expected, abs=1e-7)


def test_angles_are_made_under_any_default_device() -> None:
    """Where numbers exist: a default device is a wish for new tensors, no more."""
    positions, like = torch.arange(3.0).double(), torch.ones(1)
    expected = primitives.rope_rotation(positions, PLAIN, like)
    with torch.device("meta"):
        turn = primitives.rope_rotation(positions, PLAIN, like)
    assert torch.equal(turn, expected)


# --- attention ------------------------------------------------------------------------


def check_core(shape: tuple) -> None:
    """As `test_primitives.test_attention_core`, with the heads in front."""
    B, T, S, N_h, N_kv, d_k, d_v = shape
    mask = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)

    def oracle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.repeat_interleave(N_h // N_kv, dim=1) for x in (k, v))
        scores = (0.7 * q @ k.mT).masked_fill(mask, -torch.inf)
        return scores.softmax(-1) @ v

    arrays = [normal(B, N_h, T, d_k), normal(B, N_kv, S, d_k), normal(B, N_kv, S, d_v)]
    pair = as_pair(lambda q, k, v: att.causal_attention(q, k, v, 0.7))
    check_pair(*pair, arrays, oracle, differences=False)


@pytest.mark.parametrize("shape", CORES)
def test_attention_core(shape: tuple) -> None:
    check_core(shape)


def check_chunks() -> None:
    """Around a chunk's end: its last query must read up to itself, and no further."""
    for T in (2, att.CHUNK - 1, att.CHUNK, att.CHUNK + 1, 2 * att.CHUNK + 3):
        check_core((2, T, T, 1, 1, 3, 2))
    check_core((1, att.CHUNK + 1, att.CHUNK + 4, 2, 1, 2, 3))


def test_attention_in_chunks() -> None:
    check_chunks()


@contextmanager
def chunks_of(n: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(att.attention_in_chunks.__globals__, "CHUNK", n)
        yield


PASTS = [(T, S) for T in (1, 2, 3, 4, 7, 8) for S in (T, T + 1, T + 3, T + 9)]


def check_later_chunks(groups=(4, 2, 1)) -> None:
    """T of S positions, in chunks that T fills or not, with keys for several heads."""
    with chunks_of(3):
        for N_kv in groups:
            for T, S in PASTS:
                check_core((2, T, S, 4, N_kv, 3, 2))
                q, k = normal(2, T, 4, 3), normal(2, S, N_kv, 3)
                v = normal(2, S, N_kv, 2, seed=1)
                given = (torch.tensor(a).transpose(1, 2) for a in (q, k, v))
                o = att.attention_in_chunks(*given, 0.7).transpose(1, 2)
                expected = naive_attention(q, k, v, 0.7)
                assert relative_error(o.numpy(), expected) <= SAME, (N_kv, T, S)


def test_later_chunks_and_keys_for_several_heads() -> None:
    check_later_chunks()


@pytest.mark.parametrize("N_kv", [4, 2, 1])
@pytest.mark.parametrize(("T", "S"), [(5, 5), (4, 7)])
def test_gradients_in_chunks_by_differences(N_kv: int, T: int, S: int) -> None:
    q, k, v = (
        torch.tensor(normal(*shape), requires_grad=True)
        for shape in ((1, 4, T, 2), (1, N_kv, S, 2), (1, N_kv, S, 3))
    )
    with chunks_of(2):
        attend = lambda *given: att.attention_in_chunks(*given, 0.7)  # noqa: E731
        assert torch.autograd.gradcheck(attend, (q, k, v))


ELSEWHERE = ('q.device.type == "cpu"', 'q.device.type == "none"')


def test_what_other_devices_run(monkeypatch) -> None:
    """Torch's own function, with the same answers: computed on the processor here."""
    plant(monkeypatch, att, ELSEWHERE)
    for shape in CORES:
        check_core(shape)
    for heads in HEADS:
        test_cached_plain_attention_for_every_chunking(heads)
    for T, S in PASTS[:12]:
        check_core((2, T, S, 4, 2, 3, 2))
    check_square_visible()


def check_visible(N_kv: int = 2) -> None:
    """Who sees whom, said for each text; whatever is hidden is not felt."""
    B, T, S, N_h = 3, 2, 5, 4
    q, k, v = normal(B, N_h, T, 3), normal(B, N_kv, S, 3), normal(B, N_kv, S, 2)
    for visible in (
        np.arange(S) <= np.array([[0, 1], [2, 3], [3, 4]])[..., None],
        np.random.default_rng(0).random((B, T, S)) < 0.5,
        np.ones((B, T, S), bool),
    ):
        visible[..., 0] = True
        expected = np.zeros((B, N_h, T, 2))
        for b, h, t in np.ndindex(B, N_h, T):
            seen, g = np.flatnonzero(visible[b, t]), h * N_kv // N_h
            w = np.exp(0.7 * k[b, g, seen] @ q[b, h, t])
            expected[b, h, t] = w @ v[b, g, seen] / w.sum()
        for hidden in (0.0, 1e30):
            far = (~visible.any(axis=1))[:, None, :, None] * hidden
            given = (torch.tensor(a) for a in (q, k + far, v + far))
            o = att.causal_attention(*given, 0.7, visible)
            assert relative_error(o.numpy(), expected) <= SAME


@pytest.mark.parametrize("N_kv", [4, 2, 1])
def test_attention_to_what_is_visible(N_kv: int) -> None:
    check_visible(N_kv)


def check_square_visible() -> None:
    """As many queries as keys, and yet not all of them in a row."""
    q = torch.tensor(normal(2, 1, 3, 4))
    for visible in (np.eye(3, dtype=bool), np.ones((3, 3), bool)):
        o = att.causal_attention(q, q, q, 1.0, np.stack([visible] * 2))
        scores = (q @ q.mT).masked_fill(~torch.tensor(visible), -torch.inf)
        expected = scores.softmax(-1) @ q
        assert relative_error(o.numpy(), expected.numpy()) <= SAME


def test_what_is_visible_goes_before_the_causal_mask() -> None:
    check_square_visible()


def check_rows_of_positions() -> None:
    """Each text at its own places, the same for all of its heads."""
    config = dataclasses.replace(PLAIN, qk_rope_head_dim=6)
    x = torch.tensor(normal(2, 3, 4, 6))
    positions = np.array([[5, 2, 40_000, 7], [0, 1, 2, 3]])
    y = primitives.rotate(x, rotation_for(config, positions))
    for b, row in enumerate(positions):
        alone = primitives.rotate(x[b : b + 1], rotation_for(config, row))
        assert torch.equal(y[b : b + 1], alone)


def test_rotate_by_positions_of_each_text() -> None:
    check_rows_of_positions()


def check_plain_attention(heads: tuple = (4, 2), positions: tuple = (4, 11, 12)):
    config, weights = plain_attention(*heads)
    theta = 10_000.0 ** (-2 * np.arange(2) / 4)

    def oracle(x: torch.Tensor, W_q, W_k, W_v, W_o) -> torch.Tensor:
        B, T, _ = x.shape
        q = rope_by_hand((x @ W_q.T).reshape(B, T, heads[0], -1), positions, theta)
        k = rope_by_hand((x @ W_k.T).reshape(B, T, heads[1], -1), positions, theta)
        v = (x @ W_v.T).reshape(B, T, heads[1], -1)
        k, v = (a.repeat_interleave(heads[0] // heads[1], dim=2) for a in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / 2
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        P = scores.masked_fill(future, -torch.inf).softmax(-1)
        return torch.einsum("bhts,bshd->bthd", P, v).flatten(2) @ W_o.T

    turn = rotation_for(config, np.array(positions))
    x = normal(2, len(positions), 5)
    check_port(att.PlainAttention(config), oracle, [x], turn, weights=weights)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("positions", [(0,), (0, 1, 2), (4, 11, 12)])
def test_plain_attention(heads: tuple, positions: tuple) -> None:
    check_plain_attention(heads, positions)


@torch.no_grad()
def check_cached(module, config: Config, width: int, *form) -> None:
    """Every split of six positions; what follows a first chunk in the form given."""
    x = torch.tensor(normal(2, 6, width))
    full = module(x, rotation_for(config, np.arange(6)))
    for chunks in compositions(6):
        cache, parts = Cache(6), []
        for n in chunks:
            now = np.arange(cache.length, cache.length + n)
            turn = rotation_for(config, now)
            parts.append(module(x[:, now[0] : now[-1] + 1], turn, cache, *form))
        pieces = torch.cat(parts, dim=1)
        assert relative_error(pieces.numpy(), full.numpy()) <= SAME, chunks


@pytest.mark.parametrize("heads", HEADS)
def test_cached_plain_attention_for_every_chunking(heads: tuple) -> None:
    config, weights = plain_attention(*heads)
    check_cached(filled(att.PlainAttention(config), weights), config, 5)


# --- MLA ------------------------------------------------------------------------------


def check_mla(config: Config = test_mla.BASE, form: str = "naive", B=2, T=4) -> None:
    test_mla.check_gradients(config, form, B, T, mla_pair, differences=False)


@each_form
@each_config
def test_mla_and_its_gradients(config: Config, form: str) -> None:
    check_mla(config, form)


@each_form
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 1), (1, 7)])
def test_mla_of_one_token_or_sequence(form: str, B: int, T: int) -> None:
    check_mla(test_mla.YARN, form, B, T)


def latent_attention(config: Config) -> LatentAttention:
    return filled(LatentAttention(config), test_mla.weights(config))


def check_cached_mla(config: Config = test_mla.BASE, form: str = "absorbed") -> None:
    module = latent_attention(config)
    check_cached(module, config, config.hidden_size, form == "absorbed")


@each_form
@each_config
def test_cached_mla_for_every_chunking(config: Config, form: str) -> None:
    check_cached_mla(config, form)


@torch.no_grad()
def check_remembered(module, config: Config, width: int, asked: set[str]) -> None:
    """What a whole pass leaves in the cache, bit for bit, by these submodules alone."""
    x, called = torch.tensor(normal(2, 9, width)), []
    whole, quiet = RaggedCache(9), RaggedCache(9)
    hooks = [
        part.register_forward_hook(lambda *a, name=name: called.append(name))
        for name, part in module.named_modules()
        if name
    ]
    for n, now in enumerate((slice(0, 3), slice(3, 4), slice(4, 6), slice(6, 8))):
        if n == 3:  # texts of different lengths
            for cache in (whole, quiet):
                cache.settle(np.array([5, 2]))
        turn = rotation_for(config, whole.positions(now.stop - now.start))
        answer = module(x[:, now], turn, whole)
        assert torch.is_tensor(answer if not isinstance(answer, tuple) else answer[0])
        called.clear()
        assert module.remember(x[:, now], turn, quiet) is None
        assert set(called) == asked
        assert quiet.length == whole.length
        for ours, expected in zip(quiet.arrays, whole.arrays, strict=True):
            assert torch.equal(ours, expected)
    for hook in hooks:
        hook.remove()


def check_remembering_plain(heads: tuple = (4, 2)) -> None:
    config, weights = plain_attention(*heads)
    module = filled(att.PlainAttention(config), weights)
    check_remembered(module, config, 5, {"k_proj", "v_proj"})


@pytest.mark.parametrize("heads", HEADS)
def test_plain_attention_remembers_without_an_answer(heads: tuple) -> None:
    check_remembering_plain(heads)


def check_remembering_mla(config: Config = test_mla.BASE) -> None:
    asked = {"kv_a_proj_with_mqa", "kv_a_layernorm"}
    check_remembered(latent_attention(config), config, config.hidden_size, asked)


@each_config
def test_mla_remembers_without_an_answer(config: Config) -> None:
    check_remembering_mla(config)


def check_remembering_block(config: Config = test_mla.BASE) -> None:
    block = Block(config, sparse=False).double()
    for n, weight in enumerate(block.parameters()):
        weight.data = torch.tensor(normal(*weight.shape, seed=n)) / 2
    kept = ("kv_a_proj_with_mqa", "kv_a_layernorm")
    if not config.uses_mla:
        kept = ("k_proj", "v_proj")
    asked = {"input_layernorm", *(f"self_attn.{name}" for name in kept)}
    check_remembered(block, config, config.hidden_size, asked)


def test_a_block_remembers_without_an_answer() -> None:
    check_remembering_block()
    check_remembering_block(plain_attention(4, 2)[0])


@torch.no_grad()
def check_kept(config: Config = test_mla.BASE) -> None:
    """d_c + d_R numbers: the latent after its norm, the key after its rotation."""
    x, cache = normal(2, 6, config.hidden_size), Cache(6)
    module, turn = latent_attention(config), rotation_for(config, np.arange(6))
    for now in (slice(0, 4), slice(4, 5), slice(5, 6)):
        module(torch.tensor(x[:, now]), turn[:, now], cache, True)
    w = test_mla.as_tensors(test_mla.weights(config))
    expected = torch.cat(test_mla.torch_latents(w, config, torch.tensor(x)), -1)
    [kept] = cache._arrays
    assert cache.nbytes == kept.nbytes == expected.nbytes
    assert relative_error(kept.numpy(), expected.numpy()) <= SAME


@pytest.mark.parametrize("config", [test_mla.BASE, test_mla.YARN])
def test_what_mla_keeps(config: Config) -> None:
    check_kept(config)


@torch.no_grad()
def check_latent_eps() -> None:
    config = dataclasses.replace(test_mla.BASE, rms_norm_eps=1e-2)
    x = torch.tensor(normal(2, 6, config.hidden_size, scale=0.01))
    w = test_mla.as_tensors(test_mla.weights(config))
    expected = test_mla.torch_layer(w, config, x)
    y = latent_attention(config)(x, rotation_for(config, np.arange(6)))
    assert relative_error(y.numpy(), expected.numpy()) <= SAME


def test_the_norms_of_the_latents_have_their_own_eps() -> None:
    check_latent_eps()


# --- experts --------------------------------------------------------------------------


def check_moe(given: Layer) -> None:
    test_moe.check_gradients(given, moe_pair, differences=False)


@pytest.mark.parametrize("case", GRADIENTS)
def test_moe_and_every_gradient(case: str) -> None:
    changes, B, T, bias = GRADIENTS[case]
    config = dataclasses.replace(test_moe.SMALL, **changes)
    check_moe(layer(config, B, T, bias=bias))


def test_moe_at_whole_breadth() -> None:
    check_moe(layer(dataclasses.replace(BROAD, moe_intermediate_size=1), 1, 2))


def room(given: Layer) -> moe.MoE:
    return filled(moe.MoE(given.config), given.params)


@torch.no_grad()
def routing(given: Layer) -> moe.Routing:
    return room(given).gate(torch.tensor(given.u).flatten(0, 1))


def check_an_expert_without_tokens() -> None:
    """Its gradients are zero, exactly, whatever the memory held before."""
    given = test_moe.without_tokens()
    check_moe(given)
    for _ in range(3):
        module = room(given)
        stack = module.experts.up_proj.weight
        del [torch.full_like(stack, 7) for _ in "123"][:]
        y, routed = module(torch.tensor(given.u))
        y.sum().backward()
        assert moe.load(routed.experts, 8)[2] == 0
        for name, grad in gradients(module.experts).items():
            assert not grad[2].any() and grad[3].any(), name


def test_an_expert_without_tokens() -> None:
    check_an_expert_without_tokens()


def test_experts_hear_of_every_input() -> None:
    """torch's own finite differences of the hand-written backward pass."""
    given = layer(test_moe.SMALL, 1, 5)
    routed, u = routing(given), torch.tensor(given.u[0], requires_grad=True)
    stacks = [torch.tensor(given.params[f"experts.{k}_proj.weight"], requires_grad=True)
              for k in ("gate", "up", "down")]  # fmt: skip
    laid = moe.lay_out(routed.experts, 8)
    gates = routed.gates.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *a: moe.Experts.apply(*a, laid),
        (u, gates, *stacks),
        raise_exception=False,
    )


def check_one_expert_a_token() -> None:
    """Its share is 1 whatever its score: the router hears rounding at most."""
    config = dataclasses.replace(test_moe.SMALL, num_experts_per_tok=1)
    module, u = room(layer(config, 2, 30)), torch.tensor(layer(config, 2, 30).u)
    y, _ = module(u)
    y.cos().sum().backward()
    grads = gradients(module)
    heard = np.abs(grads["gate.weight"]).max()
    assert heard <= 1e-14 * np.abs(grads["experts.up_proj.weight"]).max()


def test_with_one_expert_a_token_the_router_learns_nothing() -> None:
    check_one_expert_a_token()


def check_routing(given: Layer) -> None:
    """The loop's choice, NumPy's gates and loads."""
    ours, (experts, gates, s) = routing(given), test_moe.routing(given)
    for t, row in enumerate(s):
        chosen = naive_choice((row + given.params[BIAS]).tolist(), given.config)
        assert ours.experts[t].tolist() == chosen
    np.testing.assert_array_equal(ours.experts, experts)
    np.testing.assert_allclose(ours.gates, gates, rtol=SAME)
    np.testing.assert_allclose(ours.affinities, s, rtol=SAME)
    E = given.config.n_routed_experts
    load = moe.load(ours.experts, E)
    np.testing.assert_array_equal(load, moe_ref.load(experts, E))


@pytest.mark.parametrize("name", LAYERS)
def test_routing_is_that_of_a_loop_and_numpys(name: str) -> None:
    check_routing(LAYERS[name])


def check_layer(given: Layer) -> None:
    with torch.no_grad():
        y, _ = room(given)(torch.tensor(given.u))
    assert relative_error(y.numpy(), test_moe.naive_answer(given)) <= SAME


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_is_that_of_a_loop_over_tokens(name: str) -> None:
    check_layer(LAYERS[name])


def check_ties(seed: int, config: Config, levels: int, dtype=torch.float64) -> None:
    """Scores on a coarse grid, negative ones too: experts tie, and groups do."""
    rng = np.random.default_rng(seed)
    choice = rng.integers(0, levels, (5, config.n_routed_experts)) / 8 - 0.25
    expected = [naive_choice(row.tolist(), config) for row in choice]
    scores, K = torch.tensor(choice, dtype=dtype), config.num_experts_per_tok
    assert moe.choose(scores, config).tolist() == expected
    np.testing.assert_array_equal(moe.top_anywhere(scores, K), moe_ref.top(choice, K))


def check_some_ties() -> None:
    for seed in range(20):
        check_ties(seed, (test_moe.SMALL, BROAD)[seed % 2], 1 + seed % 4)


@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([test_moe.SMALL, BROAD]),
    st.integers(1, 4),
    st.sampled_from([torch.float64, torch.float32]),
)
def test_ties_go_to_the_lower_index(seed, config, levels, dtype) -> None:
    check_ties(seed, config, levels, dtype)


def test_scores_that_vanish_are_no_error() -> None:
    given = test_moe.rounded(layer(BROAD, 1, 2))
    given.params["gate.weight"][:] = -1e3
    module, u = room(given), torch.ones(1, 2, 3, requires_grad=True)
    y, routed = module(u)
    assert not routed.affinities.any() and not routed.gates.any()
    y.sum().backward()
    assert u.grad.isfinite().all()


def check_no_token_sees_another(given: Layer) -> None:
    """Nor through the rows that fill up a slab, which read token 0."""
    module = room(given)

    def answer(u: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.tensor(u))[0].numpy()

    y = answer(given.u)
    for place in [(0, 0), (-1, -1), (-1, 0)]:
        u = given.u.copy()
        u[place] = 100 * np.cos(3 * u[place])
        moved = np.abs(answer(u) - y).max(axis=-1)
        assert moved[place] > 1e-9
        moved[place] = 0
        assert moved.max() <= SAME


@settings(deadline=None, max_examples=40)
@example(layer(BROAD, 2, 20))
@given(test_moe.layers())
def test_no_token_sees_another(given: Layer) -> None:
    check_no_token_sees_another(given)
    check_routing(given)


# --- slabs ----------------------------------------------------------------------------


@st.composite
def placements(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Which K of E experts N tokens chose: evenly, by a skewed lot, or all the same."""
    E, N = draw(st.integers(1, 70)), draw(st.integers(1, 40))
    K = draw(st.integers(1, min(E, 6)))
    rng = np.random.default_rng(draw(st.integers(0, 10**9)))
    skew = draw(st.sampled_from([0.0, 1.0, 4.0, 40.0]))
    scores = rng.normal(size=(N, E)) + skew * rng.normal(size=E)
    return torch.tensor(np.argsort(-scores, axis=-1)[:, :K].copy()), E


def check_layout(experts: torch.Tensor, E: int) -> None:
    """A row of its own for every pair, in its expert's part of its expert's slab.

    The slabs fill the array, fullest experts first, so many a slab; the others idle.
    """
    laid, (N, K) = moe.lay_out(experts, E), experts.shape
    place, loads = laid.place.flatten(), moe.load(experts, E)
    assert laid.place.shape == (N, K) and len(set(place.tolist())) == N * K
    assert laid.token[place].tolist() == np.repeat(np.arange(N), K).tolist()
    fillers = torch.ones(len(laid.token), dtype=torch.bool)
    fillers[place] = False
    assert not laid.token[fillers].any()
    owner, members = [], []
    for of_slab, rows, height in laid.slabs:
        assert rows == slice(len(owner), len(owner) + len(of_slab) * height)
        assert height == moe._rounded_up(int(loads[of_slab].max()))
        owner += [expert for expert in of_slab.tolist() for _ in range(height)]
        members += of_slab.tolist()
    assert len(owner) == len(laid.token)
    assert [owner[row] for row in place.tolist()] == experts.flatten().tolist()
    assert sorted(members) == loads.nonzero().flatten().tolist()
    assert sorted(members + laid.idle.tolist()) == list(range(E))
    assert (loads[members].diff() <= 0).all()
    whole, rest = divmod(len(members), moe.SLAB)
    assert [len(s.experts) for s in laid.slabs] == [moe.SLAB] * whole + [rest] * (
        rest > 0
    )


def check_some_layouts() -> None:
    rng = np.random.default_rng(0)
    for N, K, E in ((1, 1, 1), (1, 3, 40), (30, 4, 19), (50, 2, 16), (40, 3, 70)):
        scores = rng.normal(size=(N, E)) + rng.normal(size=E)
        check_layout(torch.tensor(np.argsort(-scores)[:, :K].copy()), E)
    check_layout(torch.full((9, 1), 20), 33)


@settings(deadline=None, max_examples=150)
@example((torch.full((40, 1), 17), 18))
@example((torch.tensor([[0]]), 1))
@given(placements())
def test_every_pair_has_a_row_of_its_own(placed: tuple) -> None:
    check_layout(*placed)


def check_grouped(experts: torch.Tensor, E: int) -> None:
    """The three products against a loop over pairs; poisoned fillers change none.

    In dW their dy is zero; their rows of y and dx are read by nobody.
    """
    laid, rng = moe.lay_out(experts, E), np.random.default_rng(1)
    rows, place = len(laid.token), laid.place.flatten()
    W, x, before = (torch.tensor(rng.normal(size=shape))
                    for shape in ((E, 2, 3), (rows, 3), (rows, 3)))  # fmt: skip
    dy = torch.zeros(rows, 2, dtype=torch.float64)
    dy[place] = torch.tensor(rng.normal(size=(len(place), 2)))
    y, dx = torch.zeros(len(place), 2).double(), before[place]
    dW = torch.zeros_like(W)
    for pair, expert in enumerate(experts.flatten().tolist()):
        row = place[pair]
        y[pair] = W[expert] @ x[row]
        dx[pair] += dy[row] @ W[expert]
        dW[expert] += torch.outer(dy[row], x[row])
    poisoned = x.clone()
    fillers = torch.ones(rows, dtype=torch.bool)
    fillers[place] = False
    poisoned[fillers] = 1e12
    for filled_up in (x, poisoned):
        dx_ours = moe.add_grouped_dx(before.clone(), dy, W, laid.slabs)[place]
        ours = (moe.grouped_linear(filled_up, W, laid.slabs)[place], dx_ours,
                moe.grouped_dW(dy, filled_up, W, laid))  # fmt: skip
        for one, other in zip(ours, (y, dx, dW), strict=True):
            assert relative_error(one.numpy(), other.numpy()) <= SAME


def check_some_products() -> None:
    rng = np.random.default_rng(0)
    for N, K, E in ((1, 1, 1), (1, 3, 40), (30, 4, 19), (40, 3, 70)):
        scores = rng.normal(size=(N, E)) + rng.normal(size=E)
        check_grouped(torch.tensor(np.argsort(-scores)[:, :K].copy()), E)


@settings(deadline=None, max_examples=80)
@example((torch.full((40, 1), 17), 18))
@given(placements())
def test_grouped_products_are_those_of_a_loop(placed: tuple) -> None:
    check_grouped(*placed)


def check_slabs_of_a_layer() -> None:
    """More experts than a slab holds, some of them idle, whole layer and gradients."""
    config = dataclasses.replace(
        test_moe.SMALL, **ONE, n_routed_experts=37, moe_intermediate_size=2
    )
    given = layer(config, 2, 20)
    given.params[BIAS][5:15] -= 50
    check_moe(given)


def test_a_layer_of_several_slabs() -> None:
    check_slabs_of_a_layer()


@given(st.integers(1, 2**40))
def test_heights_are_rounded_by_an_eighth_at_most(rows: int) -> None:
    height = moe._rounded_up(rows)
    assert rows <= height and 8 * (height - rows) <= rows
    assert moe._rounded_up(height) == height


def test_heights_are_eight_a_doubling() -> None:
    heights = {moe._rounded_up(rows) for rows in range(1024, 2048)}
    assert len(heights) == 8 + 1 and 2048 in heights


def check_padding(experts: torch.Tensor, E: int) -> None:
    """Exactly: rows ≤ 9/8 · Σ over slabs of experts · the slab's fullest.

    With balanced loads that is 9/8 of the pairs.
    """
    laid, loads = moe.lay_out(experts, E), moe.load(experts, E)
    without = sum(len(s.experts) * int(loads[s.experts].max()) for s in laid.slabs)
    assert experts.numel() <= without <= len(laid.token) <= 9 / 8 * without
    even = torch.arange(E).repeat(17)[:, None]
    assert len(moe.lay_out(even, E).token) == 18 * E <= 9 / 8 * len(even)


def check_some_paddings() -> None:
    rng = np.random.default_rng(0)
    for N, E in ((1, 1), (300, 40), (50, 16)):
        check_padding(torch.tensor(rng.integers(0, E, (N, 1))), E)


@settings(deadline=None, max_examples=80)
@given(placements())
def test_padding_is_an_eighth_and_the_spread_of_a_slab(placed: tuple) -> None:
    check_padding(*placed)


# --- the router's precision, its biases, the balance loss -----------------------------


def check_router_in_full() -> None:
    """Given the same u, autocast and bfloat16 weights change no choice and no type."""
    given = test_moe.rounded(layer(BROAD, 1, 300))
    half = torch.tensor(given.u).bfloat16()
    clear = test_moe.margins(given._replace(u=half.float().numpy())) > 1e-5
    assert clear.mean() > 0.95
    u = half.float().flatten(0, 1)
    with torch.no_grad():
        expected = room(given).gate(u)
        with torch.autocast("cpu", torch.bfloat16):
            ours = [room(given).gate(u), room(given).gate(half.flatten(0, 1))]
        ours.append(room(given).gate(half.flatten(0, 1)))
    for routed in ours:
        assert routed.affinities.dtype == routed.gates.dtype == torch.float32
        same = (routed.experts == expected.experts).all(-1).numpy()
        assert same[clear].all()
        error = relative_error(routed.affinities.numpy(), expected.affinities.numpy())
        assert error <= FLOAT32


def test_the_router_scores_in_full() -> None:
    check_router_in_full()


def check_wide_biases() -> None:
    """They move in steps of 0.001, which bfloat16 does not have around 1."""
    for convert in (lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to("cpu")):
        router = convert(room(test_moe.rounded(layer())).gate)
        assert router.e_score_correction_bias.dtype == torch.float32
    doubled = room(test_moe.rounded(layer())).gate.double()
    assert doubled.e_score_correction_bias.dtype == torch.float64
    assert room(layer()).gate.bfloat16().weight.dtype == torch.bfloat16
    assert room(layer()).gate.to("meta").e_score_correction_bias.is_meta


def test_router_biases_stay_wide() -> None:
    check_wide_biases()


def check_bias_rule(dtype: torch.dtype = torch.float64) -> None:
    """As the NumPy rule, bit for bit, and no gradient."""
    start = np.array([0.3, -0.2, 0.1, 0.0, 0.7])
    # the last has a mean that float32 cannot tell from a count
    for counts in ([1000, 4, 5, 3, 13], [2, 4, 3, 3, 3], [7] * 5, [20_000_001] + 4 * [
        20_000_000]):  # fmt: skip
        bias = torch.tensor(start, dtype=dtype)
        expected = moe_ref.update_bias(bias.numpy().copy(), np.array(counts), 0.001)
        moe.update_bias(bias, torch.tensor(counts), 0.001)
        np.testing.assert_array_equal(bias, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_bias_moves_as_numpys(dtype: torch.dtype) -> None:
    check_bias_rule(dtype)


def check_balance(B: int = 2, T: int = 3, E: int = 5, K: int = 2) -> None:
    s = np.random.default_rng(0).uniform(0.1, 0.9, (B, T, E))
    pair = as_pair(lambda s: moe.balance_loss(s, K))
    check_pair(*pair, [s], lambda s: torch_balance(s, K), differences=False)


@pytest.mark.parametrize("case", [(2, 3, 5, 2), (1, 1, 4, 1), (3, 2, 4, 3)])
def test_the_balance_loss_is_that_of_a_loop(case: tuple) -> None:
    check_balance(*case)


def test_float32_is_float64_rounded() -> None:
    """Where no choice is close: answers and every gradient."""
    given = LAYERS["whole breadth"]
    clear = test_moe.margins(given) > 1e-5
    given = given._replace(u=given.u.reshape(1, -1, 3)[:, clear])
    results = []
    for one in (given, test_moe.rounded(given)):
        module = room(one)
        y, _ = module(torch.tensor(one.u))
        y.sum().backward()
        results.append({"y": y.detach().numpy(), **gradients(module)})
    for name, exact in results[0].items():
        assert results[1][name].dtype == np.float32
        assert relative_error(results[1][name], exact) <= FLOAT32, name


# --- multi-token prediction -----------------------------------------------------------


def check_module(T: int = 4) -> None:
    """The module around a dense block, with the weights of `test_mtp`."""
    config = MTP[1]
    module = MTPModule(config.hidden_size, config.rms_norm_eps, Block(config, False))
    names = [name for name, _ in module.named_parameters()]
    assert names == MODULE_KEYS and not list(module.buffers())
    h, e = np.random.default_rng(1).normal(size=(2, 2, T, config.hidden_size))

    def oracle(h: torch.Tensor, e: torch.Tensor, *w: torch.Tensor) -> torch.Tensor:
        return torch_module(dict(zip(names, w, strict=True)), config, h, e)

    turn = rotation_for(config, np.arange(T))
    check_port(module, oracle, [h, e], turn, weights=module_of(config))


@pytest.mark.parametrize("T", [1, 4])
def test_the_mtp_module_alone(T: int) -> None:
    check_module(T)


def test_states_and_embeddings_of_two_shapes_are_refused() -> None:
    config = MTP[1]
    module = MTPModule(config.hidden_size, 1e-6, Block(config, False))
    with pytest.raises(ValueError, match=r"\(2, 3, 6\) and embeddings \(2, 4, 6\)"):
        module(torch.ones(2, 3, 6), torch.ones(2, 4, 6))
