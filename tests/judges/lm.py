"""Chapter 1: judges of the transformer's exercises."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from minidsv3.config import TrainConfig
from minidsv3.primitives import attention_numpy_ref as attention
from minidsv3.primitives import numpy_ref as library
from minidsv3.training import numpy_ref as training

from ..judging import FORWARD, Rng, agree, differences, grads_of, leaf, sizes
from ..oracles import AUTOGRAD, DIFFERENCES, central_differences


def softmax(f: Callable, rng: Rng) -> None:
    x = rng.normal(0, 5, sizes(rng, 3, low=2))
    x[..., 1:] += rng.choice([0, 900, -np.inf], x[..., 1:].shape)
    x -= rng.choice([0, 2000], (*x.shape[:-1], 1))  # whole rows far below 0
    agree(f(x), torch.softmax(torch.tensor(x), -1).numpy(), FORWARD)


def causal_weights(f: Callable, rng: Rng) -> None:
    B, H, T, past = sizes(rng, 4)
    S = T + past
    scores = rng.normal(-3, 4, (B, H, T, S))
    scores += rng.choice([0, 2000], (B, H, T, S))
    seen = torch.tensor([[s <= past + t for s in range(S)] for t in range(T)])
    identity = torch.eye(S, dtype=torch.float64).expand(B, H, S, S)
    theirs = F.scaled_dot_product_attention(
        torch.tensor(scores), identity, identity, attn_mask=seen, scale=1.0
    )
    agree(f(scores), theirs.numpy(), FORWARD)
    keys = np.tile(np.eye(S)[:, None], (B, 1, 1, 1))  # (B, S, 1, S)
    o, _ = attention.causal_attention_forward(
        scores.transpose(0, 2, 1, 3), keys, keys, 1.0
    )
    agree(f(scores), o.transpose(0, 2, 1, 3), FORWARD)


def rope(f: Callable, rng: Rng) -> None:
    B, T, H, pairs = sizes(rng, 4, low=2)
    x, base = rng.normal(size=(B, T, H, 2 * pairs)), float(rng.uniform(5, 500))
    positions = rng.choice(np.arange(-300, 300), T, replace=False)
    for base_or_none, b in (((base,), base), ((), 10000.0)):
        theta = b ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
        angle = torch.outer(torch.tensor(positions), theta)  # (T, pairs)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        z = torch.view_as_complex(torch.tensor(x).unflatten(-1, (pairs, 2)))
        theirs = torch.view_as_real(z * turn).flatten(-2).numpy()
        ours = f(x, positions, *base_or_none)
        agree(ours, theirs, FORWARD)
        rotation = library.rope_rotation(positions, theta.numpy(), x.dtype)
        agree(ours, library.rope_forward(x, rotation)[0], FORWARD)


def cross_entropy(f: Callable, rng: Rng) -> None:
    B, T, V = sizes(rng, 3, low=2)
    logits, targets = rng.normal(0, 3, (B, T, V)), rng.integers(0, V, (B, T))
    z = leaf(logits)
    loss = F.cross_entropy(z.flatten(0, 1), torch.tensor(targets).flatten())
    ours = f(logits, targets)
    agree(ours, grads_of(loss, np.array(1.0), z), AUTOGRAD)
    value, saved = library.cross_entropy_forward(logits, targets)
    agree(np.array(value), loss.detach().numpy(), FORWARD)
    agree(ours, library.cross_entropy_backward(1.0, saved), AUTOGRAD)
    numeric = central_differences(
        lambda: library.cross_entropy_forward(logits, targets)[0], logits
    )
    agree(ours, numeric, DIFFERENCES)


def embedding(f: Callable, rng: Rng) -> None:
    B, T, D = sizes(rng, 3, low=2)
    V = B * T // 2 + 1  # fewer ids than positions: some repeat
    dy, ids, W = rng.normal(size=(B, T, D)), rng.integers(0, V, (B, T)), np.ones((V, D))
    table = leaf(W)
    ours = f(dy, ids, V)
    agree(ours, grads_of(F.embedding(torch.tensor(ids), table), dy, table), AUTOGRAD)
    agree(ours, library.embedding_backward(dy, (ids, (V, D))), AUTOGRAD)
    agree(ours, differences(lambda W: W[ids], dy, W), DIFFERENCES)


def rmsnorm(f: Callable, rng: Rng) -> None:
    B, T, D = sizes(rng, 3, low=2)
    dy, g = rng.normal(size=(B, T, D)), rng.normal(size=D)
    x, eps = rng.normal(0, 0.5, (B, T, D)), float(rng.choice([1e-3, 0.1]))
    t, gain = leaf(x), leaf(g)
    ours = f(dy, x, g, eps)
    agree(ours, grads_of(F.rms_norm(t, (D,), gain, eps), dy, t, gain), AUTOGRAD)

    def naive(x, g):
        return x * g / np.sqrt((x**2).sum(-1, keepdims=True) / D + eps)

    agree(ours, differences(naive, dy, x, g), DIFFERENCES)
    _, saved = library.rmsnorm_forward(x, g, eps)
    agree(ours, library.rmsnorm_backward(dy, saved), AUTOGRAD)


def softmax_backward(f: Callable, rng: Rng) -> None:
    S = rng.normal(0, 2, sizes(rng, 3, low=2))
    dP, scores = rng.normal(2, 1, S.shape), leaf(S)
    P = torch.softmax(scores, -1)
    ours = f(dP, P.detach().numpy())
    agree(ours, grads_of(P, dP, scores), AUTOGRAD)

    def naive(S):
        return np.exp(S) / np.exp(S).sum(-1, keepdims=True)

    agree(ours, differences(naive, dP, S), DIFFERENCES)


def attention_backward(f: Callable, rng: Rng) -> None:
    B, H, T, past, d, d_v = sizes(rng, 6, low=2, high=5)
    S, scale = T + past, float(rng.uniform(0.2, 1.5))
    do, q = rng.normal(size=(B, H, T, d_v)), rng.normal(size=(B, H, T, d))
    k, v = rng.normal(size=(B, S, d)), rng.normal(size=(B, S, d_v))
    seen = torch.ones(T, S).tril(past).bool()
    leaves = leaf(q), leaf(k), leaf(v)
    keys, values = (x[:, None].expand(-1, H, -1, -1) for x in leaves[1:])
    o = F.scaled_dot_product_attention(
        leaves[0], keys, values, attn_mask=seen, scale=scale
    )

    def weights(q, k):
        e = np.exp(scale * q @ k[:, None].swapaxes(-1, -2)) * seen.numpy()
        return e / e.sum(-1, keepdims=True)

    ours = f(do, q, k, v, weights(q, k), scale)
    agree(ours, grads_of(o, do, *leaves), AUTOGRAD)
    numeric = differences(lambda q, k, v: weights(q, k) @ v[:, None], do, q, k, v)
    agree(ours, numeric, DIFFERENCES)
    _, saved = attention.causal_attention_forward(
        q.swapaxes(1, 2), k[:, :, None], v[:, :, None], scale
    )
    dq, dk, dv = attention.causal_attention_backward(do.swapaxes(1, 2), saved)
    agree(ours, (dq.swapaxes(1, 2), dk[:, :, 0], dv[:, :, 0]), AUTOGRAD)


def swiglu(f: Callable, rng: Rng) -> None:
    dh, a, b = rng.normal(0, 2, (3, *sizes(rng, 3, low=2)))
    leaves = leaf(a), leaf(b)
    ours = f(dh, a, b)
    agree(ours, grads_of(F.silu(leaves[0]) * leaves[1], dh, *leaves), AUTOGRAD)

    def naive(a, b):
        return a * b / (1 + np.exp(-a))

    agree(ours, differences(naive, dh, a, b), DIFFERENCES)
    silu, saved = library.silu_forward(a)
    agree(ours, (library.silu_backward(dh * b, saved), dh * silu), AUTOGRAD)


def adamw(f: Callable, rng: Rng) -> None:
    """Five steps beside torch's: it shrinks w by rate * decay, then moves it."""
    N = int(rng.integers(2, 9))
    rate, beta1, beta2 = (float(n) for n in rng.uniform(0.01, 0.9, 3))
    named = {"beta1": beta1, "beta2": beta2, "eps": 1e-3, "decay": 0.3}
    defaults = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "decay": 0.1}
    for given, o in ((named, named), ({}, defaults)):
        w, m, v = rng.normal(0, 5, N), np.zeros(N), np.zeros(N)
        theirs = torch.nn.Parameter(torch.tensor(w))
        betas = o["beta1"], o["beta2"]
        optimizer = torch.optim.AdamW(
            [theirs], lr=rate, betas=betas, eps=o["eps"], weight_decay=o["decay"]
        )
        recipe = TrainConfig(
            learning_rate=rate, min_learning_rate=rate, warmup_steps=0,
            weight_decay=o["decay"], beta1=betas[0], beta2=betas[1], adam_eps=o["eps"],
        )  # fmt: skip
        state = training.new_state({"W.weight": w.copy()})
        for t in range(1, 6):
            g = rng.normal(size=N)
            w, m, v = f(w, g, m, v, t, rate, **given)
            theirs.grad = torch.tensor(g)
            optimizer.step()
            moments = optimizer.state[theirs]
            right = theirs.detach(), moments["exp_avg"], moments["exp_avg_sq"]
            agree((w, m, v), [x.numpy() for x in right], FORWARD)
            training.adamw_step(state, {"W.weight": g}, recipe)
            kept = state.params, state.m, state.v
            agree((w, m, v), [x["W.weight"] for x in kept], FORWARD)


# --- the model of lm.11, in torch's words -----------------------------------------


def turned(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions 0, 1, 2, … over axis -2: x (..., T, d)."""
    T, d = x.shape[-2:]
    rates = [10000.0 ** (-2 * j / d) for j in range(d // 2)]
    angle = torch.arange(T)[:, None] * torch.tensor(rates, dtype=torch.float64)
    z = torch.view_as_complex(x.unflatten(-1, (d // 2, 2)).contiguous())
    return torch.view_as_real(z * torch.exp(1j * angle)).flatten(-2)


def one_block(p: dict, ids: torch.Tensor, H: int, eps: float) -> torch.Tensor:
    """The mean loss of a model of one block, with one key head."""
    past, targets = ids[:, :-1], ids[:, 1:]
    D = p["norm_1"].shape
    x = F.embedding(past, p["embed"])
    u = F.rms_norm(x, D, p["norm_1"], eps)
    q = turned(F.linear(u, p["W_q"]).unflatten(-1, (H, -1)).transpose(1, 2))
    k = turned(F.linear(u, p["W_k"]))[:, None].expand_as(q)
    v = F.linear(u, p["W_v"])[:, None].expand_as(q)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + F.linear(o.transpose(1, 2).flatten(2), p["W_o"])
    u = F.rms_norm(x, D, p["norm_2"], eps)
    h = F.silu(F.linear(u, p["W_gate"])) * F.linear(u, p["W_up"])
    x = x + F.linear(h, p["W_down"])
    return F.cross_entropy(F.linear(x, p["head"]).flatten(0, 1), targets.flatten())


def whole_model(f: Callable, rng: Rng) -> None:
    B, T, H = sizes(rng, 3, low=2, high=4)
    V, D, I, d = *sizes(rng, 3, low=3), 2 * int(rng.integers(1, 3))  # noqa: E741
    shapes = {
        "embed": (V, D), "norm_1": (D,), "W_q": (H * d, D), "W_k": (d, D),
        "W_v": (d, D), "W_o": (D, H * d), "norm_2": (D,), "W_gate": (I, D),
        "W_up": (I, D), "W_down": (D, I), "head": (V, D),
    }  # fmt: skip
    params = {name: rng.normal(0, 0.8, shape) for name, shape in shapes.items()}
    ids = rng.integers(0, V, (B, T + 1))
    eps = float(rng.choice([1e-6, 0.05]))
    leaves = {name: leaf(w) for name, w in params.items()}
    right = one_block(leaves, torch.tensor(ids), H, eps)
    loss, grads = f(params, ids, H, eps)
    assert grads.keys() == params.keys()
    agree(np.array(loss), right.detach().numpy(), FORWARD)
    for name, theirs in zip(
        leaves, grads_of(right, np.array(1.0), *leaves.values()), strict=True
    ):
        agree(grads[name], theirs, AUTOGRAD)
        numeric = central_differences(lambda: f(params, ids, H, eps)[0], params[name])
        agree(grads[name], numeric, DIFFERENCES)


JUDGES = {
    "lm.1": softmax,
    "lm.2": causal_weights,
    "lm.3": rope,
    "lm.4": cross_entropy,
    "lm.5": embedding,
    "lm.6": rmsnorm,
    "lm.7": softmax_backward,
    "lm.8": attention_backward,
    "lm.9": swiglu,
    "lm.10": adamw,
    "lm.11": whole_model,
}
