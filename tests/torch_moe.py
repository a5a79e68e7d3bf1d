"""The mixture of experts in torch's own operations: every expert for every token.

No sorting, no gathering, no segments: a choice is a mask, and whoever was not chosen
counts with gate 0. Slow, and it shares nothing with the library.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from minidsv3.config import Config
from tests.test_model import torch_block, torch_swiglu

BIAS = "gate.e_score_correction_bias"


def best_mask(scores: torch.Tensor, k: int) -> torch.Tensor:
    """True for the k best of the last axis; of equals the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)


def torch_choice(scores: torch.Tensor, config: Config) -> torch.Tensor:
    """Which experts are chosen, from s + b: a mask of the same shape (N, E)."""
    groups = scores.unflatten(-1, (config.n_group, -1))
    of_group = groups.sort(dim=-1, descending=True).values[..., :2].sum(-1)
    is_open = best_mask(of_group, config.topk_group)[..., None].expand_as(groups)
    inside = torch.where(is_open, groups, float("-inf")).flatten(-2)
    return best_mask(inside, config.num_experts_per_tok)


def torch_layer(
    w: dict, config: Config, u: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's answer (B, T, D) and the affinities (B, T, E)."""
    s = torch.sigmoid(u @ w["gate.weight"].T)
    with torch.no_grad():
        chosen = torch_choice((s + w[BIAS]).flatten(0, 1), config).view(s.shape)
    kept = torch.where(chosen, s, 0.0)
    gates = config.routed_scaling_factor * kept / kept.sum(-1, keepdim=True)
    a = torch.einsum("btd,eid->btei", u, w["experts.gate_proj.weight"])
    b = torch.einsum("btd,eid->btei", u, w["experts.up_proj.weight"])
    o = torch.einsum("btei,edi->bted", F.silu(a) * b, w["experts.down_proj.weight"])
    y = torch.einsum("bte,bted->btd", gates, o)
    if config.n_shared_experts:
        shared = [f"{kind}_proj.weight" for kind in ("gate", "up", "down")]
        mlp = {f"mlp.{name}": w[f"shared_experts.{name}"] for name in shared}
        y = y + torch_swiglu(mlp, config, u)
    return y, s


def torch_balance(s: torch.Tensor, K: int) -> torch.Tensor:
    """Eqs. (17)–(20), sequence by sequence and expert by expert: s (B, T, E)."""
    B, T, E = s.shape
    total = torch.zeros((), dtype=s.dtype)
    for sequence in s:
        for i in range(E):
            f_i, P_i = 0.0, torch.zeros((), dtype=s.dtype)
            for s_t in sequence:
                ahead = (s_t > s_t[i]) | ((s_t == s_t[i]) & (torch.arange(E) < i))
                f_i += E / (K * T) * (int(ahead.sum()) < K)
                P_i = P_i + s_t[i] / s_t.sum() / T
            total = total + f_i * P_i
    return total / B


def block_with_experts(balances: list, around: Callable = torch_block) -> Callable:
    """A block whose feed-forward has experts where its parameters have a router.

    ``around`` is the block with its attention, which is handed the feed-forward. The
    balance loss of each layer of experts is appended to ``balances``.
    """

    def feed(w: dict, config: Config, u: torch.Tensor) -> torch.Tensor:
        if "mlp.gate.weight" not in w:
            return torch_swiglu(w, config, u)
        inner = {k.removeprefix("mlp."): a for k, a in w.items()}
        y, s = torch_layer(inner, config, u)
        balances.append(torch_balance(s, config.num_experts_per_tok))
        return y

    def block(w: dict, config: Config, x: torch.Tensor) -> torch.Tensor:
        return around(w, config, x, feed)

    return block
