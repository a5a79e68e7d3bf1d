"""The mixture of experts: the router, the experts, the layer, the rule of balance.

The judges share no line with the library: torch with every expert for every token
(`tests.torch_moe`), finite differences, loops over tokens in plain Python, and Hugging
Face transformers' own layer. `test_moe_model` has the experts inside a model.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minidsv3.config import MINI, TINY, Config
from minidsv3.moe import numpy_ref as moe
from minidsv3.parameters import ParameterError, moe_shapes
from tests.oracles import check_pair, relative_error
from tests.shapes import checked_shapes
from tests.torch_moe import BIAS, torch_balance, torch_layer

SMALL = dataclasses.replace(TINY, hidden_size=6, moe_intermediate_size=5)
BROAD = dataclasses.replace(MINI, hidden_size=3, moe_intermediate_size=2)
SAME_SUMS = 1e-12  # relative, float64: the same sums in another order


class Layer(NamedTuple):
    """A layer to be tried, and what it is tried on."""

    config: Config
    params: dict[str, np.ndarray]
    u: np.ndarray  # (B, T, D)


def layer(
    config: Config = SMALL, B: int = 2, T: int = 4, seed: int = 0, bias: float = 0.0
) -> Layer:
    """Weights large enough that every path matters, biases scattered about ``bias``."""
    rng = np.random.default_rng(seed)
    params = {
        name: rng.normal(0, 0.8, shape) for name, shape in moe_shapes(config).items()
    }
    params[BIAS] = rng.normal(bias, 0.2, config.n_routed_experts)
    return Layer(config, params, rng.normal(size=(B, T, config.hidden_size)))


def routing(given: Layer) -> moe.Routing:
    rows = given.u.reshape(-1, given.config.hidden_size)
    return moe.route_forward(given.params, rows, given.config)[0]


def answer(given: Layer) -> np.ndarray:
    return moe.moe_forward(given.params, given.u, given.config)[0]


def rounded(given: Layer, dtype: type = np.float32) -> Layer:
    params = {name: a.astype(dtype) for name, a in given.params.items()}
    return Layer(given.config, params, given.u.astype(dtype))


# --- gradients ----------------------------------------------------------------------

ONE = {"n_group": 1, "topk_group": 1}
GRADIENTS = {  # changes of the config, then B, T and the level of the biases
    "TINY's experts": ({}, 2, 3, 0.0),
    "one token": ({}, 1, 1, 0.0),
    "several sequences of one token": ({}, 3, 1, 0.0),
    "no groups": (ONE, 2, 3, 0.0),
    "every group open": ({"topk_group": 4}, 2, 3, 0.0),
    "K = 1": ({"num_experts_per_tok": 1}, 2, 3, 0.0),
    "every expert chosen": (ONE | {"num_experts_per_tok": 8}, 1, 3, 0.0),
    "no shared expert": ({"n_shared_experts": 0}, 2, 3, 0.0),
    "two shared experts": ({"n_shared_experts": 2}, 2, 3, 0.0),
    "negative biases": ({}, 2, 3, -3.0),
}


def learned(given: Layer) -> list[str]:
    """The names of the weights that have a gradient."""
    return [name for name in given.params if name != BIAS]


def numpy_pair(given: Layer) -> tuple[Callable, Callable]:
    """The layer's answer and its balance loss, joined, as a function of u and weights.

    Forward and backward, for `check_pair`.
    """
    config, params, u = given
    names = learned(given)

    def forward(u: np.ndarray, *weights: np.ndarray) -> tuple:
        table = params | dict(zip(names, weights, strict=True))
        y, saved = moe.moe_forward(table, u, config)
        return np.append(y.ravel(), moe.balance_loss(saved)), saved

    def backward(dy: np.ndarray, saved: tuple) -> tuple:
        du, grads = moe.moe_backward(dy[:-1].reshape(u.shape), saved, dy[-1])
        assert sorted(grads) == sorted(names), "and the bias is not among them"
        return (du, *(grads[name] for name in names))

    return forward, backward


def check_gradients(
    given: Layer, pair_of: Callable = numpy_pair, differences: bool = True
) -> None:
    """u and every weight, for the layer's answer and its balance loss together."""
    config, params, u = given
    names = learned(given)

    def oracle(u: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        bias = {BIAS: torch.tensor(params[BIAS])}
        y, s = torch_layer(dict(zip(names, weights, strict=True)) | bias, config, u)
        balance = torch_balance(s, config.num_experts_per_tok)
        return torch.cat([y.flatten(), balance[None]])

    arrays = [u, *(params[name] for name in names)]
    check_pair(*pair_of(given), arrays, oracle, differences)


@pytest.mark.parametrize("case", GRADIENTS)
def test_every_gradient(case: str) -> None:
    changes, B, T, bias = GRADIENTS[case]
    check_gradients(layer(dataclasses.replace(SMALL, **changes), B, T, bias=bias))


def test_every_gradient_at_whole_breadth() -> None:
    """256 experts, 8 active, 4 of 8 groups: most experts have no token."""
    check_gradients(layer(dataclasses.replace(BROAD, moe_intermediate_size=1), 1, 2))


def without_tokens(i: int = 2) -> Layer:
    given = layer(dataclasses.replace(SMALL, **ONE), 2, 9)
    given.params[BIAS][i] = -50
    return given


def test_an_expert_without_tokens_has_zero_gradients() -> None:
    given = without_tokens()
    check_gradients(given)
    y, saved = moe.moe_forward(given.params, given.u, given.config)
    counts = moe.load(moe.routing(saved).experts, given.config.n_routed_experts)
    assert counts[2] == 0 and (np.delete(counts, 2) > 0).all()
    # memory that was freed a moment ago, full of numbers: not what an expert may keep
    for _ in range(3):
        del [np.full_like(given.params["experts.up_proj.weight"], 7) for _ in "123"][:]
        _, grads = moe.moe_backward(np.ones_like(y), saved)
        for kind in ("gate", "up", "down"):
            grad = grads[f"experts.{kind}_proj.weight"]
            assert not grad[2].any() and grad[3].any()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_with_one_expert_a_token_the_router_learns_nothing(dtype: type) -> None:
    """Not little: exactly nothing. Its share is 1, whatever its score."""
    config = dataclasses.replace(SMALL, num_experts_per_tok=1)
    given = rounded(layer(config, 2, 30), dtype)
    y, saved = moe.moe_forward(given.params, given.u, config)
    _, grads = moe.moe_backward(np.cos(y), saved)
    assert not grads["gate.weight"].any()
    _, grads = moe.moe_backward(np.cos(y), saved, dbalance=1e-4)
    assert grads["gate.weight"].any(axis=1).all(), "the balance loss reaches all"


def test_who_was_not_chosen_hears_nothing_of_the_task() -> None:
    given = layer(BROAD, 1, 5)
    y, saved = moe.moe_forward(given.params, given.u, BROAD)
    _, grads = moe.moe_backward(np.ones_like(y), saved)
    chosen = np.isin(np.arange(256), moe.routing(saved).experts)
    assert chosen.sum() < 50
    for name in ("gate.weight", "experts.up_proj.weight"):
        heard = grads[name].reshape(256, -1).any(axis=1)
        np.testing.assert_array_equal(heard, chosen)


def test_float32_stays_float32() -> None:
    given = rounded(layer())
    y, saved = moe.moe_forward(given.params, given.u, given.config)
    du, grads = moe.moe_backward(y, saved, dbalance=1e-4)
    assert {a.dtype for a in (y, du, *grads.values())} == {np.dtype(np.float32)}


# --- routing against a loop in plain Python -----------------------------------------


def naive_choice(choice: list[float], config: Config) -> list[int]:
    """The experts of one token, best first; of equals the one with the lower index."""
    each = len(choice) // config.n_group
    groups = [choice[m * each : (m + 1) * each] for m in range(config.n_group)]
    scores = [sum(sorted(group)[-2:]) for group in groups]
    ranked = sorted(range(config.n_group), key=lambda m: (-scores[m], m))
    is_open = ranked[: config.topk_group]
    allowed = [i for i in range(len(choice)) if i // each in is_open]
    best = sorted(allowed, key=lambda i: (-choice[i], i))
    return best[: config.num_experts_per_tok]


def naive_answer(given: Layer) -> np.ndarray:
    """The layer token by token and expert by expert: eqs. (12)–(16)."""
    config, p, u = given
    y = np.zeros_like(u)

    def ffn(kind: str, i: int | None, x: np.ndarray) -> np.ndarray:
        names = (f"{kind}.{part}_proj.weight" for part in ("gate", "up", "down"))
        W_gate, W_up, W_down = (p[n] if i is None else p[n][i] for n in names)
        a = W_gate @ x
        return W_down @ (a / (1 + np.exp(-a)) * (W_up @ x))

    for b, t in np.ndindex(u.shape[:2]):
        s = [1 / (1 + math.exp(-z)) for z in p["gate.weight"] @ u[b, t]]
        chosen = naive_choice([s[i] + p[BIAS][i] for i in range(len(s))], config)
        total = sum(s[i] for i in chosen)
        for i in chosen:
            gate = config.routed_scaling_factor * s[i] / total
            y[b, t] += gate * ffn("experts", i, u[b, t])
        if config.n_shared_experts:
            y[b, t] += ffn("shared_experts", None, u[b, t])
    return y


LAYERS = {
    "TINY's experts": layer(T=20),
    "no groups": layer(dataclasses.replace(SMALL, **ONE), T=20),
    "no shared expert": layer(dataclasses.replace(SMALL, n_shared_experts=0)),
    "two shared experts": layer(dataclasses.replace(SMALL, n_shared_experts=2)),
    "K = 1": layer(dataclasses.replace(SMALL, num_experts_per_tok=1)),
    "negative biases": layer(T=20, bias=-3.0),
    "an expert without tokens": without_tokens(),
    "one token": layer(B=1, T=1),
    "whole breadth": layer(BROAD, T=20),
    "whole breadth, negative biases": layer(BROAD, T=20, bias=-2.0),
}


@pytest.mark.parametrize("name", LAYERS)
def test_routing_is_that_of_a_loop_over_tokens(name: str) -> None:
    given = LAYERS[name]
    experts, gates, s = routing(given)
    for t, row in enumerate(s):
        expected = naive_choice((row + given.params[BIAS]).tolist(), given.config)
        assert experts[t].tolist() == expected
        shares = row[expected] / math.fsum(row[expected])
        assert gates[t] == pytest.approx(
            given.config.routed_scaling_factor * shares, rel=SAME_SUMS
        )


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_is_that_of_a_loop_over_tokens(name: str) -> None:
    given = LAYERS[name]
    assert relative_error(answer(given), naive_answer(given)) <= SAME_SUMS


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**32 - 1), st.sampled_from([SMALL, BROAD]), st.integers(1, 4))
def test_ties_go_to_the_lower_index(seed: int, config: Config, levels: int) -> None:
    """Scores on a coarse grid: experts tie, and groups do."""
    rng = np.random.default_rng(seed)
    choice = rng.integers(0, levels, (5, config.n_routed_experts)) / 8 - 0.25
    expected = [naive_choice(row.tolist(), config) for row in choice]
    assert moe.choose(choice, config).tolist() == expected


def test_equal_scores_choose_the_first_of_the_first_groups() -> None:
    given = layer(BROAD, 1, 3)
    given.params["gate.weight"][:] = 0
    given.params[BIAS][:] = 0
    experts, gates, s = routing(given)
    assert experts.tolist() == [list(range(8))] * 3
    assert (s == 0.5).all() and (gates == 2.5 / 8).all()
    given.params[BIAS][:32] = -1  # the first machine is out, and the second next
    assert routing(given).experts.tolist() == [list(range(32, 40))] * 3


def test_scores_that_vanish_are_no_error() -> None:
    """All sigmoids underflow in float32: gates 0, no 0/0."""
    given = rounded(layer(BROAD, 1, 2))
    given.params["gate.weight"][:] = -1e3
    with np.errstate(under="ignore"):
        _, gates, s = routing(given._replace(u=np.ones_like(given.u)))
    assert not s.any() and not gates.any()


# --- transformers -------------------------------------------------------------------


def peer(given: Layer) -> torch.nn.Module:
    """transformers' layer with our weights; it joins gate and up of an expert."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config, p, _ = given
    names = [f.name for f in dataclasses.fields(config) if f.name != "rope_scaling"]
    theirs = DeepseekV3Config(**{n: getattr(config, n) for n in names})
    theirs._experts_implementation = "eager"
    room = DeepseekV3MoE(theirs)
    state = {k: torch.tensor(a) for k, a in p.items() if ".gate_" not in k}
    gate, up = (p[f"experts.{kind}_proj.weight"] for kind in ("gate", "up"))
    state["experts.gate_up_proj"] = torch.tensor(np.concatenate([gate, up], axis=1))
    state["experts.down_proj"] = state.pop("experts.down_proj.weight")
    del state["experts.up_proj.weight"]
    name = "shared_experts.gate_proj.weight"
    room.load_state_dict(state | {name: torch.tensor(p[name])}, strict=True)
    return room.eval()


def margins(given: Layer) -> np.ndarray:
    """How far each token is from another choice, of experts or of groups (N,)."""
    config = given.config
    choice = routing(given).affinities + given.params[BIAS]
    groups = np.sort(choice.reshape(len(choice), config.n_group, -1), axis=-1)
    scores = groups[..., -2:].sum(axis=-1)
    ranked, kept = np.sort(scores, axis=-1)[:, ::-1], config.topk_group
    last_open = ranked[:, [kept - 1]]
    inside = np.where((scores >= last_open)[..., None], groups, -np.inf)
    ranked_experts = np.sort(inside.reshape(choice.shape), axis=-1)[:, ::-1]
    K = config.num_experts_per_tok
    margin = ranked_experts[:, K - 1] - ranked_experts[:, K]
    if kept < config.n_group:
        margin = np.minimum(margin, ranked[:, kept - 1] - ranked[:, kept])
    return margin


PEERS = {
    "TINY's experts": layer(T=400),
    "no groups": layer(dataclasses.replace(SMALL, **ONE), T=400),
    "two shared experts": layer(dataclasses.replace(SMALL, n_shared_experts=2), T=400),
    "whole breadth": layer(dataclasses.replace(BROAD, hidden_size=20), T=400),
    "whole breadth, negative biases": layer(BROAD, T=400, bias=-2.0),
}


@torch.no_grad()
@pytest.mark.parametrize("name", PEERS)
def test_router_and_layer_are_transformers_own(name: str) -> None:
    given = rounded(PEERS[name])
    theirs, clear = peer(given), margins(given) > 1e-5
    assert clear.mean() > 0.95
    _, gates, experts = theirs.gate(torch.tensor(given.u))
    order = experts.sort(dim=-1).indices
    experts, gates = experts.gather(1, order).numpy(), gates.gather(1, order).numpy()
    ours = routing(given)
    order = ours.experts.argsort(axis=-1)
    np.testing.assert_array_equal(
        np.take_along_axis(ours.experts, order, -1)[clear], experts[clear]
    )
    np.testing.assert_allclose(
        np.take_along_axis(ours.gates, order, -1)[clear], gates[clear], rtol=1e-5
    )
    y = answer(given)
    expected = theirs(torch.tensor(given.u)).numpy()
    same = clear.reshape(y.shape[:2])
    assert np.abs((y - expected)[same]).max() <= 1e-5 * np.abs(expected).max()


def changed_by_precision(tokens: int = 2048) -> float:
    """Share of tokens that a float32 router sends elsewhere than exact scores would."""
    config = dataclasses.replace(MINI, moe_intermediate_size=2)
    given = layer(config, 1, tokens)
    p = given.params
    p["gate.weight"] /= 8  # scores spread over (0, 1), as in a trained router
    p[BIAS][:] = 0
    choice = 1 / (1 + np.exp(-given.u[0] @ p["gate.weight"].T))
    exact = [sorted(naive_choice(row, config)) for row in choice.tolist()]
    chosen = np.sort(routing(rounded(given)).experts, axis=-1)
    return float((chosen != exact).any(axis=-1).mean())


def test_float32_chooses_like_float64() -> None:
    assert changed_by_precision() <= 1e-3


def test_half_precision_scores_in_full() -> None:
    """u in float16: the scores are formed in float32, as the report keeps them."""
    given = rounded(layer(BROAD, 1, 64))
    half = given.u.astype(np.float16)
    _, gates, s = routing(given._replace(u=half))
    assert s.dtype == gates.dtype == np.float32
    full = routing(given._replace(u=half.astype(np.float32)))
    np.testing.assert_array_equal(s, full.affinities)


# --- properties ---------------------------------------------------------------------


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Any layer that a config allows, in small."""
    groups, each = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    kept = draw(st.integers(1, groups))
    config = dataclasses.replace(
        SMALL,
        n_routed_experts=groups * each,
        n_group=groups,
        topk_group=kept,
        num_experts_per_tok=draw(st.integers(1, min(6, kept * each))),
        n_shared_experts=draw(st.integers(0, 2)),
        routed_scaling_factor=draw(st.floats(0.5, 16)),
    )
    B, T, seed = (draw(st.integers(*limits)) for limits in ((1, 3), (1, 4), (0, 10**9)))
    return layer(config, B, T, seed, bias=draw(st.floats(-2, 2)))


def for_any_layer(test):
    """Many small layers, and always one of 256 experts with 8 active."""
    tried = settings(deadline=None, max_examples=60)(given(layers())(test))
    return example(layer(BROAD, 2, 20))(tried)


@for_any_layer
def test_a_constant_added_to_all_biases_changes_nothing(given: Layer) -> None:
    before = routing(given)
    for constant in (-5.0, 0.7, 40.0):
        moved = given.params | {BIAS: given.params[BIAS] + constant}
        after = routing(given._replace(params=moved))
        np.testing.assert_array_equal(after.experts, before.experts)
        np.testing.assert_array_equal(after.gates, before.gates)


@for_any_layer
def test_the_gates_of_a_token_sum_to_the_scaling_factor(given: Layer) -> None:
    gates = routing(given).gates
    factor = given.config.routed_scaling_factor
    assert gates.sum(axis=-1) == pytest.approx(np.full(len(gates), factor))
    assert (gates > 0).all()


@for_any_layer
def test_biases_choose_and_never_weigh(given: Layer) -> None:
    """The gates are the chosen affinities in proportion; the affinities know no b."""
    experts, gates, s = routing(given)
    chosen = np.take_along_axis(s, experts, axis=-1)
    ratio = gates / chosen
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape))
    other = given.params | {BIAS: given.params[BIAS][::-1]}
    np.testing.assert_array_equal(routing(given._replace(params=other)).affinities, s)


@for_any_layer
def test_no_token_travels_to_more_machines_than_allowed(given: Layer) -> None:
    experts, config = routing(given).experts, given.config
    touched = moe.machines_touched(experts, config)
    each = config.n_routed_experts // config.n_group
    assert touched.tolist() == [len({i // each for i in row}) for row in experts]
    assert touched.max() <= config.topk_group
    assert all(len(set(row)) == config.num_experts_per_tok for row in experts)


@for_any_layer
def test_experts_may_change_places(given: Layer) -> None:
    """Within a group, and groups as a whole: with their weights, rows and biases."""
    config = given.config
    rng = np.random.default_rng(given.u.size)
    groups = np.arange(config.n_routed_experts).reshape(config.n_group, -1)
    old = rng.permuted(rng.permutation(groups), axis=1).ravel()  # new place -> old
    moved = {
        name: a[old] if name.startswith(("gate.", "experts.")) else a
        for name, a in given.params.items()
    }
    after = given._replace(params=moved)
    np.testing.assert_array_equal(old[routing(after).experts], routing(given).experts)
    np.testing.assert_allclose(routing(after).gates, routing(given).gates, rtol=1e-12)
    assert relative_error(answer(after), answer(given)) <= SAME_SUMS


@for_any_layer
def test_the_order_of_the_batch_does_not_matter(given: Layer) -> None:
    """Sequences in another order, positions backwards, everything in one row."""
    B, T, D = given.u.shape
    y = answer(given)
    for there in (
        lambda a: np.roll(a, 1, axis=0),
        lambda a: a[:, ::-1],
        lambda a: a.reshape(1, B * T, D),
        lambda a: a.reshape(B * T, 1, D),
    ):
        after = answer(given._replace(u=there(given.u)))
        np.testing.assert_allclose(after, there(y), rtol=0, atol=1e-12)


@for_any_layer
def test_no_token_sees_another(given: Layer) -> None:
    y = answer(given)
    for place in [(0, 0), (-1, -1), (-1, 0)]:
        u = given.u.copy()
        u[place] = np.cos(3 * u[place])
        moved = np.abs(answer(given._replace(u=u)) - y).max(axis=-1)
        assert moved[place] > 1e-9
        moved[place] = 0
        assert moved.max() <= 1e-12


@for_any_layer
def test_the_same_question_has_the_same_answer(given: Layer) -> None:
    kept = {name: a.copy() for name, a in given.params.items()}
    first = answer(given)
    np.testing.assert_array_equal(answer(given), first)
    for name, array in given.params.items():
        np.testing.assert_array_equal(array, kept[name], err_msg=name)


# --- sorting and grouping -----------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 300), st.integers(0, 99))
def test_pairs_are_sorted_by_expert(N: int, K: int, E: int, seed: int) -> None:
    experts = np.random.default_rng(seed).integers(0, E, (N, K))
    flat = experts.ravel().tolist()
    order = moe.sort_by_expert(experts, E)
    assert order.pairs.tolist() == sorted(range(N * K), key=lambda p: (flat[p], p))
    assert order.starts.tolist() == [sum(i < e for i in flat) for e in range(E + 1)]
    assert moe.load(experts, E).tolist() == [flat.count(e) for e in range(E)]


def test_more_experts_than_a_short_integer_counts() -> None:
    experts = np.array([[70_000, 3], [65_536 + 3, 3]])
    order = moe.sort_by_expert(experts, 70_001)
    assert order.pairs.tolist() == [1, 3, 2, 0]


@pytest.mark.parametrize("sizes", [[2, 0, 3], [0, 0, 4], [1, 0, 0], [1, 2, 3]])
def test_grouped_linear(sizes: list) -> None:
    rng = np.random.default_rng(0)
    x, W = rng.normal(size=(sum(sizes), 4)), rng.normal(size=(3, 2, 4))
    starts = np.cumsum([0, *sizes])

    def oracle(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
        rows = torch.repeat_interleave(W, torch.tensor(sizes), dim=0)
        return torch.einsum("poi,pi->po", rows, x)

    def forward(x: np.ndarray, W: np.ndarray) -> tuple:
        return moe.grouped_linear_forward(x, W, starts)

    check_pair(forward, moe.grouped_linear_backward, [x, W], oracle)


# --- the rule of the biases ---------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_bias_moves_against_the_load_by_its_speed(dtype: type) -> None:
    """Its direction counts, not its size; who has just the mean stays, bit for bit."""
    bias = np.array([0.3, -0.2, 0.1, 0.0, 0.7], dtype)
    counts = np.array([1000, 4, 5, 3, 13])  # the mean is 205
    after = moe.update_bias(bias, counts, 0.125)
    assert after.dtype == dtype
    expected = bias + np.array([-0.125, 0.125, 0.125, 0.125, 0.125], dtype)
    np.testing.assert_array_equal(after, expected)
    level = moe.update_bias(bias, np.array([2, 4, 3, 3, 3]), 0.125) - bias
    assert level == pytest.approx([0.125, -0.125, 0, 0, 0]) and not level[2:].any()
    np.testing.assert_array_equal(moe.update_bias(bias, np.full(5, 7), 0.125), bias)
    np.testing.assert_array_equal(moe.update_bias(bias, counts, 0.0), bias)


FREE = dataclasses.replace(SMALL, **ONE, n_routed_experts=64, num_experts_per_tok=6)


def violation(speed: float, steps: int) -> float:
    """MaxVio of a skewed router after steps of 4,096 tokens: 65,536 new ones, pooled.

    Scores are drawn, some experts favoured, and only the biases can make up for it.
    """
    rng = np.random.default_rng(0)
    skew = rng.normal(0, 0.5, 64).astype(np.float32)
    bias = np.zeros(64, np.float32)

    def counts(tokens: int) -> np.ndarray:
        z = rng.standard_normal((tokens, 64), dtype=np.float32) + skew
        return moe.load(moe.choose(1 / (1 + np.exp(-z)) + bias, FREE), 64)

    for _ in range(steps):
        bias = moe.update_bias(bias, counts(4096), speed)
    return moe.max_violation(sum(counts(4096) for _ in range(16)))


def test_the_controller_balances_a_skewed_router() -> None:
    assert violation(1e-3, 0) > 1.5
    assert violation(1e-3, 170) < 0.2


def test_a_hasty_controller_never_settles() -> None:
    assert min(violation(3e-2, steps) for steps in (60, 61)) > 0.2


def test_max_violation() -> None:
    assert moe.max_violation(np.array([2, 2, 2])) == 0
    assert moe.max_violation(np.array([3, 0, 0])) == 2
    assert moe.max_violation(np.array([5, 4, 3])) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="no token was counted"):
        moe.max_violation(np.zeros(4, int))


@pytest.mark.parametrize(("tokens", "floor"), [(2048, 0.37), (65_536, 0.06)])
def test_a_uniform_router_has_a_floor(tokens: int, floor: float) -> None:
    """It scatters by itself: 8 of 256 at random. So counts are pooled first."""
    rng = np.random.default_rng(0)
    violations = [
        moe.max_violation(
            moe.load(moe.top(rng.random((tokens, 256), dtype=np.float32), 8), 256)
        )
        for _ in range(20_480 // tokens + 1)
    ]
    assert np.mean(violations) == pytest.approx(floor, rel=0.15)


# --- the balance loss ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("B", "T", "E", "K"), [(2, 3, 5, 2), (1, 1, 4, 1), (3, 2, 4, 3)]
)
def test_the_balance_loss_is_that_of_a_loop(B: int, T: int, E: int, K: int) -> None:
    s = np.random.default_rng(0).uniform(0.1, 0.9, (B, T, E))

    def forward(s: np.ndarray) -> tuple:
        return moe.balance_forward(s, K)

    check_pair(forward, moe.balance_backward, [s], lambda s: torch_balance(s, K))


@pytest.mark.parametrize(("E", "K"), [(4, 1), (8, 3), (256, 8)])
def test_perfect_balance_costs_one(E: int, K: int) -> None:
    """As many tokens as experts, each a place further on: all are alike."""
    first = np.linspace(0.9, 0.1, E)
    s = np.stack([np.roll(first, t) for t in range(E)])[None]
    loss, _ = moe.balance_forward(s, K)
    assert loss == pytest.approx(1, abs=1e-15)
    collapsed, _ = moe.balance_forward(np.broadcast_to(first, s.shape), K)
    assert collapsed > 1.5


def test_the_balance_loss_is_taken_sequence_by_sequence() -> None:
    """Two lopsided sequences that make up for each other are still lopsided."""
    s = np.array([[[0.9, 0.1]] * 3, [[0.1, 0.9]] * 3])
    apart, _ = moe.balance_forward(s, 1)
    together, _ = moe.balance_forward(s.reshape(1, 6, 2), 1)
    assert apart == pytest.approx(1.8) and together == pytest.approx(1)


def test_neither_bias_nor_groups_enter_the_balance_loss() -> None:
    """Eq. (18) counts the K best affinities, wherever the tokens really went."""
    given = layer(T=12)
    open_wide = dataclasses.replace(given.config, **ONE)
    others = [given, given._replace(config=open_wide)]
    for level in (-1.0, 1.0):
        bias = np.linspace(level, -level, 8)
        others.append(given._replace(params=given.params | {BIAS: bias}))
    losses, went = set(), set()
    for config, params, u in others:
        _, saved = moe.moe_forward(params, u, config)
        losses.add(moe.balance_loss(saved))
        went.add(moe.routing(saved).experts.tobytes())
    assert len(losses) == 1 and len(went) == 4


# --- the border ---------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_route_nobody(bad: float) -> None:
    given = layer()
    for where in ("gate.weight", BIAS, "u"):
        params = {name: a.copy() for name, a in given.params.items()}
        u = given.u.copy()
        (u if where == "u" else params[where]).flat[3] = bad
        what = "inputs" if where == "u" else "scores"
        with (
            np.errstate(invalid="ignore"),
            pytest.raises(FloatingPointError, match=f"the {what} of a router are not"),
        ):
            moe.moe_forward(params, u, given.config)


@pytest.mark.parametrize("shape", [(8, 6), (2, 4, 5), (2, 0, 6), (0, 4, 6), (6,)])
def test_hidden_states_of_another_shape(shape: tuple) -> None:
    given = layer()
    with pytest.raises(ValueError, match=r"must be \(batch, time, 6\), no axis empty"):
        moe.moe_forward(given.params, np.ones(shape), given.config)


def test_parameters_of_another_layer() -> None:
    config, params, u = layer()
    name = "experts.up_proj.weight"
    with pytest.raises(
        ParameterError, match=rf"{name} has shape \(7, 5, 6\), .*\(8, 5"
    ):
        moe.moe_forward(params | {name: params[name][:7]}, u, config)
    lacking = {k: a for k, a in params.items() if k != BIAS}
    with pytest.raises(ParameterError, match=f"missing {BIAS}, not expected nothing"):
        moe.moe_forward(lacking, u, config)
    without = dataclasses.replace(config, n_shared_experts=0)
    with pytest.raises(ParameterError, match="not expected shared_experts.gate_proj"):
        moe.moe_forward(params, u, without)


@pytest.mark.parametrize("name", ["TINY's experts", "two shared experts"])
def test_the_room_says_true_shapes(name: str) -> None:
    given = LAYERS[name]
    with checked_shapes(moe) as report:
        y, saved = moe.moe_forward(given.params, given.u, given.config)
        moe.moe_backward(y, saved, dbalance=0.5)
        moe.machines_touched(routing(given).experts, given.config)
    assert not report.unexercised
