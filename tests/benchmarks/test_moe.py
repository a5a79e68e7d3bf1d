"""The MoE layer: NumPy beside torch's grouped_mm, and what more experts cost.

Everything in float32 on one batch of 2,048 tokens, forward and backward, taking turns;
best times. grouped_mm runs on a CPU too (torch 2.13), and has a backward there.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minidsv3.config import MINI, Config
from minidsv3.moe import numpy_ref as moe
from minidsv3.parameters import moe_shapes
from tests.benchmarks.test_plain import seconds, side_by_side
from tests.oracles import relative_error
from tests.test_moe import Layer, peer
from tests.torch_moe import BIAS

TOKENS = 2048
LAYER = dataclasses.replace(MINI, hidden_size=256, moe_intermediate_size=64)
WEIGHTS = [f"{kind}_proj.weight" for kind in ("gate", "up", "down")]


def layer(config: Config) -> Layer:
    rng = np.random.default_rng(0)
    params = {
        name: rng.normal(0, 0.02, shape).astype(np.float32)
        for name, shape in moe_shapes(config).items()
    }
    u = rng.normal(size=(1, TOKENS, config.hidden_size))
    return Layer(config, params, u.astype(np.float32))


def forward_and_backward(given: Layer, dy: np.ndarray) -> tuple:
    y, saved = moe.moe_forward(given.params, given.u, given.config)
    return y, *moe.moe_backward(dy, saved)


# --- beside torch ---------------------------------------------------------------------


def swiglu(w: dict, x: torch.Tensor) -> torch.Tensor:
    gate, up, down = (w[name] for name in WEIGHTS)
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def grouped(w: dict, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Each expert's rows of x (P, D), which lie one after another: three products."""
    ends = counts.cumsum(0).to(torch.int32)

    def product(x: torch.Tensor, kind: str) -> torch.Tensor:
        W = w[f"experts.{kind}_proj.weight"].transpose(1, 2)
        return F.grouped_mm(x, W, offs=ends)

    return product(F.silu(product(x, "gate")) * product(x, "up"), "down")


def torch_layer(
    config: Config, w: dict, u: torch.Tensor, experts: Callable = grouped
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The layer as torch would have it: sort, the experts' products, index_add.

    Returns y (B, T, D), the affinities (N, E) and the load (E,).
    """
    rows = u.flatten(0, 1)
    s = torch.sigmoid(rows @ w["gate.weight"].T)
    with torch.no_grad():
        best = chosen(s + w[BIAS], config)
    shares = s.gather(1, best)
    gates = config.routed_scaling_factor * shares / shares.sum(-1, keepdim=True)
    order = best.flatten().argsort(stable=True)
    counts = torch.bincount(best.flatten(), minlength=config.n_routed_experts)
    tokens = order // config.num_experts_per_tok
    o = experts(w, rows[tokens], counts) * gates.flatten()[order, None]
    y = torch.zeros_like(rows).index_add(0, tokens, o)
    y = y + swiglu({name: w[f"shared_experts.{name}"] for name in WEIGHTS}, rows)
    return y.view_as(u), s, counts


def chosen(choice: torch.Tensor, config: Config) -> torch.Tensor:
    groups = choice.unflatten(-1, (config.n_group, -1))
    best = groups.topk(2).values.sum(-1).topk(config.topk_group).indices
    is_open = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(1, best, True)
    inside = groups.masked_fill(~is_open[..., None], float("-inf")).flatten(1)
    return inside.topk(config.num_experts_per_tok).indices


def torch_route(given: Layer) -> tuple[Callable, list]:
    w = {k: torch.tensor(a, requires_grad=k != BIAS) for k, a in given.params.items()}
    return lambda u: torch_layer(given.config, w, u)[0], [w[k] for k in w if k != BIAS]


def transformers_route(given: Layer) -> tuple[Callable, list]:
    room = peer(given)
    room.config._experts_implementation = "grouped_mm"
    return room, list(room.parameters())


def with_gradients(
    room: Callable, weights: list, given: Layer, dy: np.ndarray
) -> Callable:
    """A call that computes the layer's answer and all gradients in torch."""
    u, dy_torch = torch.tensor(given.u, requires_grad=True), torch.tensor(dy)

    def call() -> tuple:
        y = room(u)
        return y, torch.autograd.grad(y, [u, *weights], dy_torch)

    return call


@pytest.mark.parametrize("route", [torch_route, transformers_route])
def test_forward_and_backward_beside_grouped_mm(route: Callable) -> None:
    given = layer(LAYER)
    dy = np.random.default_rng(1).normal(size=given.u.shape).astype(np.float32)
    theirs = with_gradients(*route(given), given, dy)
    y, (du, *_) = theirs()
    ours = forward_and_backward(given, dy)
    assert relative_error(ours[0], y.detach().numpy()) <= 1e-4
    assert relative_error(ours[1], du.numpy()) <= 1e-3
    title = f"{route.__name__}, forward and backward"
    side_by_side(title, lambda: forward_and_backward(given, dy), theirs)


# --- more experts, as many active ---------------------------------------------------


def router(given: Layer, dgates: np.ndarray) -> tuple:
    """Scores, choice and gates, and back: three products of E rows a token."""
    rows = given.u[0]
    _, saved = moe.route_forward(given.params, rows, given.config)
    return moe.route_backward(dgates, saved)


def touch_once(given: Layer) -> float:
    """Read each expert once, and write a gradient for it once, into fresh memory."""
    experts = [given.params[f"experts.{name}"] for name in WEIGHTS]
    grads = [np.full_like(W, 1.0) for W in experts]
    return max(W.max() for W in experts) + len(grads)


def products(config: Config) -> int:
    """Multiplications of a token forward, all of which are done twice more backward."""
    router, active = config.n_routed_experts, config.num_experts_per_tok
    experts = (active + config.n_shared_experts) * config.moe_intermediate_size
    return config.hidden_size * (router + 3 * experts)


@pytest.mark.parametrize("width", [64, 256])
def test_the_cost_of_a_token_among_more_experts(width: int) -> None:
    """What grows beyond that reading and writing: the router, and smaller segments.

    Among narrow experts the router's own products grow most: its row count is E.
    """
    numbers = (64, 256, 1024)
    layer_of_width = dataclasses.replace(LAYER, moe_intermediate_size=width)
    configs = [dataclasses.replace(layer_of_width, n_routed_experts=E) for E in numbers]
    times = [costs(config) for config in configs]
    growth = [products(config) / products(configs[0]) for config in configs]
    layers, routers, once, peers = 1e6 / TOKENS * np.array(times).T  # µs a token
    print(f"\nexperts of width {width}: multiplications grow "
          + ", ".join(f"{g:4.2f} ×" for g in growth))  # fmt: skip
    print("µs a token: layer, router, reading and writing each expert once; what is")
    print("left without that; and without the router; torch's layer without that")
    beyond, beside = layers - once, peers - once
    without = beyond - routers
    for i, E in enumerate(numbers):
        print(f"{E:5} experts  {layers[i]:6.1f} {routers[i]:5.1f} {once[i]:5.1f}   "
              f"{beyond[i]:5.1f} = {beyond[i] / beyond[0]:4.2f} ×   "
              f"{without[i]:5.1f} = {without[i] / without[0]:4.2f} ×   torch "
              f"{beside[i]:5.1f} = {beside[i] / beside[0]:4.2f} ×")  # fmt: skip


def costs(config: Config) -> list[float]:
    """Best times of: layer, router, reading and writing, torch's layer."""
    given = layer(config)
    dy = given.u[:, ::-1].copy()
    dgates = dy[0, :, : config.num_experts_per_tok].copy()
    turns = [
        lambda: forward_and_backward(given, dy),
        lambda: router(given, dgates),
        lambda: touch_once(given),
        with_gradients(*torch_route(given), given, dy),
    ]
    times = [[seconds(turn) for turn in turns] for _ in range(10)]
    return np.min(times[1:], axis=0).tolist()
