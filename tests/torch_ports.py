"""The PyTorch ports in the form of the NumPy references, for the same checkers."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from minidsv3.config import Config, TrainConfig
from minidsv3.mla.torch_port import LatentAttention
from minidsv3.model.torch_port import DeepSeekV3
from minidsv3.moe.torch_port import MoE, balance_loss
from minidsv3.primitives.torch_port import rope_rotation
from tests.test_moe import Layer, learned
from tests.torch_moe import BIAS


def as_pair(function: Callable) -> tuple[Callable, Callable]:
    """A function of tensors as forward and backward of arrays, for `check_pair`."""

    def forward(*arrays: np.ndarray) -> tuple:
        given = [torch.tensor(array, requires_grad=True) for array in arrays]
        y = function(*given)
        return y.detach().numpy(), (y, given)

    def backward(dy: np.ndarray, saved: tuple) -> tuple:
        y, given = saved
        grads = torch.autograd.grad(y, given, torch.as_tensor(dy, dtype=y.dtype))
        return tuple(grad.numpy() for grad in grads)

    return forward, backward


def rotation_of(config: Config, positions: np.ndarray) -> Tensor:
    """In float64."""
    like = torch.ones(1, dtype=torch.float64)
    return rope_rotation(torch.tensor(positions, dtype=torch.float64), config, like)


def mla_pair(config: Config, form: str, T: int) -> tuple[Callable, Callable]:
    """As `tests.test_mla.numpy_pair`."""
    module, rotation = LatentAttention(config), rotation_of(config, np.arange(T))
    names = [name for name, _ in module.named_parameters()]

    def layer(x: Tensor, *weights: Tensor) -> Tensor:
        table = dict(zip(names, weights, strict=True))
        return functional_call(module, table, (x, rotation, None, form == "absorbed"))

    return as_pair(layer)


def moe_pair(given: Layer) -> tuple[Callable, Callable]:
    """As `tests.test_moe.numpy_pair`."""
    config, params, u = given
    module, bias = MoE(config), {BIAS: torch.tensor(params[BIAS])}

    def layer(u: Tensor, *weights: Tensor) -> Tensor:
        table = dict(zip(learned(given), weights, strict=True)) | bias
        y, routing = functional_call(module, table, (u,))
        s = routing.affinities.view(*u.shape[:2], -1)
        balance = balance_loss(s, config.num_experts_per_tok)
        return torch.cat([y.flatten(), balance[None]])

    return as_pair(layer)


def filled(module: nn.Module, params: Mapping[str, np.ndarray]) -> nn.Module:
    """The module with these parameters, copied, in their own precision."""
    state = {name: torch.tensor(array) for name, array in params.items()}
    module.load_state_dict(state, assign=True)
    return module


def port(params: Mapping[str, np.ndarray], config: Config) -> DeepSeekV3:
    """The model with these parameters."""
    with torch.device("meta"):
        module = DeepSeekV3(config)
    return filled(module, params)


def gradients(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: w.grad.numpy() for name, w in module.named_parameters()}


def loss_and_grads(
    params: Mapping, config: Config, ids: np.ndarray, train_config: TrainConfig
) -> tuple[dict, dict, dict]:
    """As `minidsv3.model.numpy_ref.loss_and_grads`."""
    module = port(params, config)
    losses, load = module.loss(torch.tensor(ids), train_config)
    losses["total"].backward()
    values = {name: loss.item() for name, loss in losses.items()}
    counts = {name: counts.numpy() for name, counts in load.items()}
    return values, gradients(module), {"load": counts} if counts else {}
