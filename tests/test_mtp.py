"""Multi-token prediction: the module, the chain, the losses, and what it must not do.

The judges share no line with the library: torch's operations and autograd, finite
differences, a naive loop over positions, and Hugging Face transformers' own MTP layer.
"""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minidsv3 import parameters
from minidsv3.config import Config, TrainConfig
from minidsv3.model import numpy_ref as model
from minidsv3.mtp import numpy_ref as mtp
from tests.oracles import (
    AUTOGRAD,
    DIFFERENCES,
    central_differences,
    check_pair,
    relative_error,
)
from tests.test_model import (
    LAYER_KEYS,
    SMALL,
    fresh,
    ids,
    torch_block,
    torch_trunk,
)

MTP = {D: dataclasses.replace(SMALL, num_nextn_predict_layers=D) for D in (0, 1, 2, 3)}
RECIPE = TrainConfig(mtp_weight=0.7)  # no weight that hides: 1 would forgive λ² for λ
MODULE_KEYS = [
    *("enorm.weight", "hnorm.weight", "eh_proj.weight"),
    *LAYER_KEYS,
    "shared_head.norm.weight",
]


# --- the module and the model in torch ----------------------------------------------


def norm(x: torch.Tensor, gain: torch.Tensor, config: Config = SMALL) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], gain, config.rms_norm_eps)


def torch_module(w: dict, config: Config, h: torch.Tensor, e: torch.Tensor):
    """Facts C.1, in the order of the released weights: two halves of eh_proj."""
    D = config.hidden_size
    of_e, of_h = w["eh_proj.weight"][:, :D], w["eh_proj.weight"][:, D:]
    x = norm(e, w["enorm.weight"]) @ of_e.T + norm(h, w["hnorm.weight"]) @ of_h.T
    return norm(torch_block(w, config, x), w["shared_head.norm.weight"])


def torch_losses(p: dict, config: Config, tokens: np.ndarray) -> list[torch.Tensor]:
    """Main and further losses, by a double loop over sequences and positions.

    Positions are counted from 1, as the report counts them.
    """
    B, T = tokens.shape[0], tokens.shape[1] - 1
    losses = []
    h = torch_trunk(p, config, torch.tensor(tokens[:, :-1]))
    for k in range(config.num_nextn_predict_layers + 1):
        if k > 0:
            prefix = f"model.layers.{config.num_hidden_layers + k - 1}."
            w = {key: p[prefix + key] for key in MODULE_KEYS}
            rows = [
                [p["model.embed_tokens.weight"][tokens[b, i + k - 1]]
                 for i in range(1, T - k + 1)]
                for b in range(B)
            ]  # fmt: skip
            e = torch.stack([torch.stack(row) for row in rows])
            h = torch_module(w, config, h[:, : T - k], e)
        total = torch.zeros((), dtype=torch.float64)
        for b in range(B):
            for i in range(1, T - k + 1):
                z = p["lm_head.weight"] @ h[b, i - 1]
                target = tokens[b, i + k]  # t_{i+k+1}: ids are stored from 0
                total = total - torch.log_softmax(z, 0)[target]
        losses.append(total / (B * (T - k)))
    return losses


def as_tensors(params: dict) -> dict:
    return {k: torch.tensor(a, requires_grad=True) for k, a in params.items()}


SHORT_AND_LONG = [(1, 1, 2), (1, 3, 5), (2, 1, 3), (2, 2, 6), (3, 2, 4)]  # D, B, T


@pytest.mark.parametrize(("D", "B", "T"), SHORT_AND_LONG)
def test_losses_and_every_gradient_agree_with_autograd(D: int, B: int, T: int) -> None:
    config = MTP[D]
    params, tokens = fresh(config), ids(B, T + 1)
    losses, grads, stats = model.loss_and_grads(params, config, tokens, RECIPE)
    p = as_tensors(params)
    main, *further = torch_losses(p, config, tokens)
    total = main + RECIPE.mtp_weight / D * sum(further)
    total.backward()
    assert list(losses) == ["main", *(f"mtp_{k + 1}" for k in range(D)), "total"]
    expected = [main, *further, total]
    for (name, ours), theirs in zip(losses.items(), expected, strict=True):
        assert ours == pytest.approx(theirs.item(), rel=1e-12), name
    assert sorted(grads) == sorted(params) and stats == {}
    for name, g in grads.items():
        assert relative_error(g, p[name].grad.numpy()) <= AUTOGRAD, name


@pytest.mark.parametrize("D", [1, 2])
def test_every_gradient_agrees_with_differences(D: int) -> None:
    config = MTP[D]
    params, tokens = fresh(config), ids(2, D + 3)
    _, grads, _ = model.loss_and_grads(params, config, tokens, RECIPE)

    def loss() -> float:
        logits, saved = model.forward(params, config, tokens[:, :-1])
        z = logits - logits.max(-1, keepdims=True)
        log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
        main = -np.take_along_axis(log_p, tokens[:, 1:, None], -1).mean()
        h = model.hidden_states(saved)
        further, _ = model.mtp_losses(params, config, tokens, h)
        return float(main + RECIPE.mtp_weight * np.mean(further))

    for name, array in params.items():
        numeric = central_differences(loss, array, 1e-6)
        error = np.linalg.norm(grads[name] - numeric)
        # the quotient's own rounding: 1e-16 / 1e-6 an entry
        floor = 1e-9 * array.size**0.5
        assert error <= DIFFERENCES * np.linalg.norm(numeric) + floor, name


def module_of(config: Config, seed: int = 0) -> dict:
    prefix = f"model.layers.{config.num_hidden_layers}."
    return parameters.cut(fresh(config, seed), prefix)


def plain_block(config: Config = SMALL) -> mtp.Block:
    return model._mtp_block(config, np.dtype(np.float64))


@pytest.mark.parametrize("T", [1, 4])
def test_the_module_alone(T: int) -> None:
    """Forward, dh, de and every weight, against autograd and differences."""
    config, names = MTP[1], MODULE_KEYS
    params = module_of(config)
    rng = np.random.default_rng(1)
    h, e = rng.normal(size=(2, 2, T, config.hidden_size))

    def forward(h: np.ndarray, e: np.ndarray, *weights: np.ndarray) -> tuple:
        table = dict(zip(names, weights, strict=True))
        return mtp.mtp_forward(table, h, e, plain_block(), config.rms_norm_eps)

    def backward(dh_k: np.ndarray, saved: tuple) -> tuple:
        dh, de, grads = mtp.mtp_backward(dh_k, saved)
        assert sorted(grads) == sorted(names)
        return (dh, de, *(grads[name] for name in names))

    def oracle(h: torch.Tensor, e: torch.Tensor, *weights: torch.Tensor):
        return torch_module(dict(zip(names, weights, strict=True)), config, h, e)

    check_pair(forward, backward, [h, e, *(params[n] for n in names)], oracle)
