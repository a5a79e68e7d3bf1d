"""Chapter 5: judges of the block and of the whole model's losses.

Each reference faces the library's model, which others hold against transformers, and
the same once more in torch's words.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from minidsv3.config import TINY, Config, TrainConfig
from minidsv3.model import numpy_ref as model
from minidsv3.model.block_numpy_ref import block_forward, saved_experts
from minidsv3.moe import numpy_ref as experts_of
from minidsv3.parameters import shapes
from minidsv3.primitives import numpy_ref as primitives

from ..judging import FORWARD, Rng, agree, sizes
from . import mla, moe, mtp

KEYS = {
    "norm_1": "input_layernorm.weight",
    **{n: f"self_attn.{k}" for n, k in zip(mla.NAMES, mla.KEYS, strict=True)},
    "norm_2": "post_attention_layernorm.weight",
}
DENSE = {f"F_{k}": f"mlp.{k}_proj.weight" for k in ("gate", "up", "down")}
SPARSE = {
    "W": "mlp.gate.weight",
    "b": "mlp.gate.e_score_correction_bias",
    **{f"W_{k}": f"mlp.experts.{k}_proj.weight" for k in ("gate", "up", "down")},
    **{f"S_{k}": f"mlp.shared_experts.{k}_proj.weight" for k in ("gate", "up", "down")},
}
MODULE = {
    "g_h": "hnorm.weight", "g_e": "enorm.weight", "M": "eh_proj.weight",
    "norm": "shared_head.norm.weight",
}  # fmt: skip
EPS = (1e-6, 0.2)


def drawn(rng: Rng, L: int, dense: int, n: int) -> tuple[Config, dict, list[dict]]:
    """A config, its parameters by key, and those of each block by short name.

    A block's have both kinds of feed-forward; the library is given the one it uses.
    """
    (N_h, d_h, d_R, d_v, d_c), (D, d_cq, wide, narrow) = (
        mla.widths(rng), sizes(rng, 4, low=2),
    )  # fmt: skip
    n_group, size = int(rng.integers(3, 5)), int(rng.integers(2, 4))
    config = replace(
        TINY, vocab_size=6, hidden_size=D, intermediate_size=wide,
        num_hidden_layers=L, num_attention_heads=N_h, num_key_value_heads=N_h,
        qk_nope_head_dim=d_h, qk_rope_head_dim=d_R, v_head_dim=d_v, kv_lora_rank=d_c,
        q_lora_rank=d_cq, n_routed_experts=n_group * size, n_group=n_group,
        topk_group=2, num_experts_per_tok=int(rng.integers(2, 4)),
        moe_intermediate_size=narrow, first_k_dense_replace=dense,
        routed_scaling_factor=float(rng.uniform(1.5, 3)),
        num_nextn_predict_layers=n, rms_norm_eps=float(rng.choice(EPS)),
    )  # fmt: skip
    all_sparse = shapes(replace(config, first_k_dense_replace=0))
    all_dense = shapes(replace(config, first_k_dense_replace=L))
    keys = {**all_dense, **all_sparse}
    table = {key: rng.normal(size=shape) for key, shape in keys.items()}
    blocks = []
    for layer in range(L + n):
        prefix, names = f"model.layers.{layer}.", KEYS | SPARSE
        wide_one = (wide, D), (wide, D), (D, wide)
        own = {name: table[prefix + key] for name, key in names.items()}
        own["b"] -= 1.5
        for name, shape in zip(DENSE, wide_one, strict=True):
            own[name] = rng.normal(size=shape)
            if not config.is_moe_layer(layer):
                table[prefix + DENSE[name]] = own[name]
        blocks.append(own)
    return config, {key: table[key] for key in shapes(config)}, blocks


def block_in_torch(p: dict, x, layer: int, c: Config) -> tuple:
    """The stream, and the balance loss."""
    p, eps = {name: torch.tensor(w) for name, w in p.items()}, c.rms_norm_eps
    D, at = x.shape[2:], np.arange(x.shape[1])
    d = c.qk_nope_head_dim + c.qk_rope_head_dim
    u = F.rms_norm(x, D, p["norm_1"], eps)
    weights, heads = [p[name] for name in mla.NAMES], c.num_attention_heads
    x = x + mla.layer_in_torch(u, weights, at, heads, d**-0.5, 1e-6)
    u = F.rms_norm(x, D, p["norm_2"], eps)
    if layer < c.first_k_dense_replace:
        return x + moe.expert_in_torch(u, *(p[name] for name in DENSE)), 0.0
    rows, K = u.flatten(0, 1), c.num_experts_per_tok
    choice = torch.sigmoid(F.linear(rows, p["W"])) + p["b"]
    experts = np.array(
        [moe.expected(row, K, c.n_group, c.topk_group) for row in choice.tolist()]
    )
    gates, s = moe.in_torch(rows, p["W"], experts, c.routed_scaling_factor)
    stacks = p["W_gate"], p["W_up"], p["W_down"]
    y = moe.mixed_in_torch(rows, experts, gates, *stacks).reshape(u.shape)
    y = y + moe.expert_in_torch(u, p["S_gate"], p["S_up"], p["S_down"])
    s = s.reshape(*u.shape[:2], -1)
    return x + y, float(moe.balance_in_torch(s, K, 1.0))


def block(f: Callable, rng: Rng) -> None:
    """Every layer of a model whose first are dense, by its number."""
    B, T = sizes(rng, 2, low=2)
    config, params, blocks = drawn(rng, L=3, dense=2, n=0)
    x = 2 * rng.normal(size=(B, T, config.hidden_size))
    frequencies = primitives.rope_frequencies(config)
    rotation = primitives.rope_rotation(np.arange(T), frequencies, x.dtype)
    for layer, p in enumerate(blocks):
        y, load = f(p, x, layer, config, config.rms_norm_eps)
        theirs, load_there = block_in_torch(p, torch.tensor(x), layer, config)
        agree((y, np.array(load)), [theirs.numpy(), np.array(load_there)], 10 * FORWARD)
        prefix = f"model.layers.{layer}."
        own = {k.removeprefix(prefix): w for k, w in params.items() if prefix in k}
        in_library, saved = block_forward(own, x, config, rotation)
        experts = saved_experts(saved)
        load_there = 0.0 if experts is None else experts_of.balance_loss(experts)
        agree((y, np.array(load)), [in_library, np.array(load_there)], 10 * FORWARD)


def losses_in_torch(p: dict, ids: torch.Tensor, c: Config) -> tuple:
    """Main loss, each module's, and each block's balance."""
    t = {name: torch.tensor(p[name]) for name in ("embed", "norm", "head")}
    eps, D = c.rms_norm_eps, (c.hidden_size,)

    def nats(h, targets):
        return float(F.cross_entropy(F.linear(h, t["head"]).mT, targets))

    e, loads, further = F.embedding(ids, t["embed"]), [], []
    x = e[:, :-1]
    for layer, own in enumerate(p["blocks"]):
        x, load = block_in_torch(own, x, layer, c)
        loads.append(load)
    h = F.rms_norm(x, D, t["norm"], eps)
    main = nats(h, ids[:, 1:])
    for number, own in enumerate(p["modules"], start=len(p["blocks"])):
        k = number - len(p["blocks"]) + 1
        left = ids.shape[1] - 1 - k
        g_h, g_e, M, g = (torch.tensor(own[name]) for name in MODULE)
        told = e[:, k : k + left]
        x = mtp.in_torch(h[:, :left], told, g_h, g_e, M, eps)
        x, load = block_in_torch(own["block"], x, number, c)
        loads.append(load)
        h = F.rms_norm(x, D, g, eps)
        further.append(nats(h, ids[:, k + 1 :]))
    return main, further, loads


def losses(f: Callable, rng: Rng) -> None:
    """A model with two modules, some blocks dense or all."""
    B, more = sizes(rng, 2, low=2, high=4)
    L, n = int(rng.integers(1, 4)), 2
    config, params, blocks = drawn(rng, L, dense=int(rng.integers(1, L + 1)), n=n)
    lam, alpha = rng.uniform(0.3, 2, 2).tolist()
    ids = rng.integers(0, config.vocab_size, (B, n + more + 1))
    modules = [
        {name: params[f"model.layers.{L + k}.{key}"] for name, key in MODULE.items()}
        | {"block": blocks[L + k]}
        for k in range(n)
    ]
    p = {
        "embed": params["model.embed_tokens.weight"], "blocks": blocks[:L],
        "norm": params["model.norm.weight"], "head": params["lm_head.weight"],
        "modules": modules,
    }  # fmt: skip
    ours = [float(loss) for loss in f(p, ids, config, lam, alpha, config.rms_norm_eps)]
    main, further, loads = losses_in_torch(p, torch.tensor(ids), config)
    total = main + lam / n * sum(further) + alpha * sum(loads)
    theirs = [main, sum(further) / n, sum(loads), total]
    agree(np.array(ours), np.array(theirs), 100 * FORWARD)
    recipe = TrainConfig(mtp_weight=lam, balance_weight=alpha)
    found, _, _ = model.loss_and_grads(params, config, ids, recipe)
    theirs = [
        found["main"], (found["mtp_1"] + found["mtp_2"]) / n, found["balance"],
        found["total"],
    ]  # fmt: skip
    agree(np.array(ours), np.array(theirs), 100 * FORWARD)


JUDGES = {
    "mini.1": block,
    "mini.2": losses,
}
