"""Chapter 6: judges of the PyTorch exercises.

Token by token and head by head, in other words; autograd of those for the gradients,
torch's own optimiser for the step. Rounding, names and memory are looked at besides.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from minidsv3.mtp import torch_port as mtp_library

from ..judging import FORWARD, Rng, agree, leaf, sizes
from ..oracles import AUTOGRAD
from .moe import balance_in_torch, choices, expected, in_torch, mixed_in_torch


def normal(rng: Rng, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.tensor(rng.normal(0, scale, shape))


def arrays(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    return tuple(t.detach().numpy() for t in tensors)


def same(ours: Tensor, theirs: Tensor, leaves: list[Tensor], rng: Rng) -> None:
    """The same results, and of both the same gradients."""
    agree(arrays(ours), arrays(theirs), FORWARD)
    dy = normal(rng, *ours.shape)
    grads = [
        torch.autograd.grad(
            y, leaves, dy, allow_unused=True, materialize_grads=True, retain_graph=True
        )
        for y in (ours, theirs)
    ]
    agree(arrays(*grads[0]), arrays(*grads[1]), AUTOGRAD)


# --- MLA ------------------------------------------------------------------------------


def turned(x: Tensor, phi: Tensor) -> Tensor:
    """Every pair as a complex number: x (..., T, d_R), phi (T, d_R/2)."""
    z = torch.complex(x[..., ::2], x[..., 1::2]) * torch.exp(1j * phi)
    return torch.view_as_real(z).reshape(x.shape)


def rotate(f: Callable, rng: Rng) -> None:
    B, H, T, pairs = sizes(rng, 4, low=2)
    phi = normal(rng, T, pairs, scale=3)
    rotation = torch.stack([phi.cos(), phi.sin()])
    x = leaf(rng.normal(size=(B, T, H, 2 * pairs)))
    view = x.transpose(1, 2)
    same(f(view, rotation), turned(view, phi), [x], rng)
    torch.autograd.gradcheck(lambda x: f(x.transpose(1, 2), rotation), [x])
    shared = normal(rng, 1, 1, T, 2 * pairs)
    before = shared.clone()
    f(shared.expand(B, H, -1, -1), rotation)
    assert torch.equal(shared, before)
    many = normal(rng, 9, 9, T, 2 * pairs).bfloat16()
    y = f(many, rotation.float())
    assert y.dtype == torch.bfloat16
    ideal = turned(many.double(), phi).bfloat16()
    assert (y == ideal).double().mean() > 0.97


def naive(q_C, q_R, kept, W_UKV, scale: float) -> Tensor:
    """Head by head, query by query."""
    (_, N_h, T, d_h), d_c, S = q_C.shape, W_UKV.shape[1], kept.shape[1]
    o = []
    for W, content, position in zip(
        W_UKV.chunk(N_h), q_C.unbind(1), q_R.unbind(1), strict=True
    ):
        c, k_R = kept[..., :d_c], kept[..., d_c:]
        k, v = c @ W[:d_h].T, c @ W[d_h:].T
        rows = []
        for t in range(T):
            past = slice(0, S - T + t + 1)
            s = (k[:, past] * content[:, t, None]).sum(-1)
            s = scale * (s + (k_R[:, past] * position[:, t, None]).sum(-1))
            rows.append((s.softmax(-1)[..., None] * v[:, past]).sum(1))
        o.append(torch.stack(rows, 1))
    return torch.stack(o, 1)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that was made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            self.size = max(self.size, one.numel() if isinstance(one, Tensor) else 0)
        return made


def attend_absorbed(f: Callable, rng: Rng) -> None:
    B, T, past, N_h, d_h, d_R, d_v, d_c = sizes(rng, 8, low=1, high=5)
    S, scale = T + past, float(rng.uniform(0.1, 1))
    tensors = [
        leaf(rng.normal(size=shape))
        for shape in (
            (B, N_h, T, d_h), (B, N_h, T, d_R), (B, S, d_c + d_R),
            (N_h * (d_h + d_v), d_c),
        )
    ]  # fmt: skip
    same(f(*tensors, scale), naive(*tensors, scale), tensors, rng)
    shapes = (1, 3, 1, 8), (1, 3, 1, 2), (1, 50, 3), (3 * 16, 1)
    tensors = [normal(rng, *shape) for shape in shapes]
    with Largest() as seen:
        f(*tensors, scale)
    assert seen.size <= 3 * 50 * 3, "a key or a value for each head"


def attention(p: dict, x: Tensor, phi: Tensor, widths: tuple[int, ...]) -> Tensor:
    _, N_h, d_h, _, d_v, d_c, d_cq = widths

    def norm(x: Tensor, name: str) -> Tensor:
        size = x.pow(2).mean(-1, keepdim=True) + 1e-6
        return p[f"{name}_layernorm.weight"] * x / size.sqrt()

    c_Q = norm(x @ p["q_a_proj.weight"].T, "q_a")
    kept = x @ p["kv_a_proj_with_mqa.weight"].T
    kept = torch.cat([norm(kept[..., :d_c], "kv_a"), turned(kept[..., d_c:], phi)], -1)
    q = torch.stack([c_Q @ W.T for W in p["q_b_proj.weight"].chunk(N_h)], 1)
    scale = q.shape[-1] ** -0.5
    q_R = turned(q[..., d_h:], phi)
    o = naive(q[..., :d_h], q_R, kept, p["kv_b_proj.weight"], scale)
    return torch.cat(o.unbind(1), -1) @ p["o_proj.weight"].T


def latent_attention(f: Callable, rng: Rng) -> None:
    B, T = sizes(rng, 2, low=2, high=5)
    D, N_h, d_h, half, d_v, d_c, d_cq = widths = sizes(rng, 7, low=2, high=5)
    d_R = widths[3] = 2 * half
    shapes = {
        "q_a_proj": (d_cq, D), "q_a_layernorm": (d_cq,),
        "q_b_proj": (N_h * (d_h + d_R), d_cq), "kv_a_proj_with_mqa": (d_c + d_R, D),
        "kv_a_layernorm": (d_c,), "kv_b_proj": (N_h * (d_h + d_v), d_c),
        "o_proj": (D, N_h * d_v),
    }  # fmt: skip
    params = {f"{name}.weight": normal(rng, *shapes[name]) for name in shapes}
    module = f(*widths).double()
    module.load_state_dict(params)
    mine = dict(module.named_parameters())
    assert set(mine) == set(params)
    phi = normal(rng, T, half, scale=3)
    rotation = torch.stack([phi.cos(), phi.sin()])
    for size in (1.0, 1e-3):  # eps counts in the second
        x = leaf(rng.normal(0, size, (B, T, D)))
        y, theirs = module(x, rotation), attention(mine, x, phi, tuple(widths))
        same(y, theirs, [x, *mine.values()], rng)


# --- MoE ------------------------------------------------------------------------------


def route(f: Callable, rng: Rng) -> None:
    N, D, n_group, size = sizes(rng, 4, low=2, high=6)
    kept, lam = int(rng.integers(1, n_group)), float(rng.uniform(1.5, 9))
    E = n_group * size
    K = int(rng.integers(2, kept * size + 1))
    u, W, b = rng.normal(size=(N, D)), rng.normal(size=(E, D)), rng.normal(-1, 0.5, E)
    leaves = [leaf(a) for a in (u, W, b)]
    asked = K, n_group, kept, lam
    experts, gates, s = f(*leaves, *asked)
    choice = torch.sigmoid(F.linear(*leaves[:2])).detach().numpy() + b
    rows = [expected(row, K, n_group, kept) for row in choice.tolist()]
    assert experts.tolist() == rows
    theirs = in_torch(*leaves[:2], np.array(rows), lam)
    for ours, other in zip((gates, s), theirs, strict=True):
        same(ours, other, leaves, rng)
    for kind in (torch.float32, torch.bfloat16):
        narrow = [
            leaves[0].detach().to(kind),
            *(a.detach().float() for a in leaves[1:]),
        ]
        with torch.autocast("cpu", torch.bfloat16):
            found = f(*narrow, *asked)
        wide = f(*(a.double() for a in narrow), *asked)
        assert all(a.dtype == torch.float32 for a in found[1:])
        assert torch.equal(found[0], wide[0])
        for ours, other in zip(found[1:], wide[1:], strict=True):
            agree(arrays(ours.double()), arrays(other), 1e-6)


def experts(f: Callable, rng: Rng) -> None:
    N, D, width, E = sizes(rng, 4, low=2, high=6)
    K = int(rng.integers(1, E + 1))
    names, gates = choices(rng, N, E, K)
    shapes = (E, width, D), (E, width, D), (E, D, width)
    given = [rng.normal(size=(N, D)), gates, *(rng.normal(size=s) for s in shapes)]
    leaves = [leaf(a) for a in given]
    segments = [
        (i, *map(torch.tensor, np.nonzero(names == i)))
        for i in rng.permutation(E).tolist() if i in names
    ]  # fmt: skip
    y = f.apply(*leaves, segments)
    theirs = mixed_in_torch(leaves[0], names, *leaves[1:])
    with FlopCounterMode(display=False) as counter:
        ours = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    assert counter.get_total_flops() <= 6 * 2 * names.size * D * width
    idle = sorted(set(range(E)) - set(names.ravel().tolist()))
    assert not any(dW[idle].any() for dW in ours[2:])
    same(y, theirs, leaves, rng)


def balance(f: Callable, rng: Rng) -> None:
    B, T, E = sizes(rng, 3, low=3, high=7)
    K, N = int(rng.integers(2, E)), 4 * E
    module = nn.Sequential(f(E))
    name = "0.e_score_correction_bias"
    assert not [*module.parameters()]
    assert set(module.state_dict()) == set(dict(module.named_buffers())) == {name}
    assert not module.state_dict()[name].any()
    held = module.double().state_dict()[name]
    assert held.dtype == torch.float64
    start = rng.normal(size=E)
    module.load_state_dict({name: torch.tensor(start)})
    names = rng.permuted(np.tile(np.arange(E - 1), (N, 1)), axis=1)[:, : K - 1]
    gamma, b = float(rng.uniform(0.1, 1)), start.copy()
    for chosen in (names, np.tile(np.arange(E), (2, 1)), np.array([[0, 0, 1]])):
        module[0].update(torch.tensor(chosen), gamma)
        for i in range(E):
            excess = int((chosen == i).sum()) * E - chosen.size
            b[i] -= gamma * ((excess > 0) - (excess < 0))
    agree(arrays(held), b, FORWARD)
    z = rng.normal(size=(B, T, E)) + 2 * rng.normal(size=(B, 1, E))
    s = leaf(1 / (1 + np.exp(-z)))
    same(module[0].loss(s, K), balance_in_torch(s, K, 1.0), [s], rng)


# --- MTP ------------------------------------------------------------------------------


class Toy(nn.Module):
    """A block with two parts, of which one looks back."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(D)
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(D, D)})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp["up_proj"](self.input_layernorm(x.cumsum(1))).sin()


def mtp_module(f: Callable, rng: Rng) -> None:
    B, T, D, V = sizes(rng, 4, low=2)
    eps = float(rng.choice([1e-3, 0.3]))
    embed, head = nn.Embedding(V, D).double(), nn.Linear(D, V, bias=False).double()
    block = Toy(D).double()
    ours = f(D, block, embed, head, eps).double()
    around = Toy(D).double()
    theirs = mtp_library.MTPModule(D, eps, lambda_block(around)).double()
    params = {n: normal(rng, *w.shape) for n, w in theirs.state_dict().items()}
    ours.load_state_dict(params)
    theirs.load_state_dict(params)
    with torch.no_grad():  # after both were made: a copy would not know
        embed.weight.normal_(0, 0.1)
        head.weight.normal_()
    h, tokens = (
        leaf(rng.normal(size=(B, T, D))),
        torch.tensor(rng.integers(0, V, (B, T))),
    )
    state, logits = ours(h, tokens)
    other, _ = theirs(h, embed(tokens))
    agree(arrays(state, logits), arrays(other, head(other)), FORWARD)
    dh, dlogits = normal(rng, B, T, D), normal(rng, B, T, V)
    shared = [h, embed.weight, head.weight]
    for (s, z), module in (((state, logits), ours), ((other, head(other)), theirs)):
        named = dict(module.named_parameters())
        weights = [*shared, *(named[name] for name in sorted(params))]
        grads = torch.autograd.grad([s, z], weights, [dh, dlogits])
        if module is ours:
            mine = grads
    agree(arrays(*mine), arrays(*grads), AUTOGRAD)


def lambda_block(block: nn.Module) -> nn.Module:
    """The library's module wants blocks that answer a pair."""
    inner = block.forward
    block.forward = lambda x: (inner(x), None)
    return block


def mtp_loss(f: Callable, rng: Rng) -> None:
    """Place by place, counted from 1 as the report counts."""
    B, V, D, n, more = sizes(rng, 5, low=2, high=5)
    n -= 2  # none, too
    T, lam = n + more, float(rng.uniform(0.3, 2))
    ids = torch.tensor(rng.integers(0, V, (B, T + 1)))
    h = leaf(rng.normal(size=(B, T, D)))
    table, W = (leaf(rng.normal(size=(V, D))) for _ in range(2))
    matrices = [leaf(rng.normal(size=(2 * D, D))) for _ in range(n)]

    def module(M: Tensor) -> Callable:
        def ask(h: Tensor, e: Tensor) -> Tensor:
            assert h.shape == e.shape
            return torch.sin(torch.cat([h, e], -1) @ M)

        return ask

    modules = [module(M) for M in matrices]
    ours = f(h, ids, lambda i: table[i], lambda h: h @ W.T, modules, lam)
    t = {i: ids[:, i - 1] for i in range(1, T + 2)}
    state = {i: h[:, i - 1] for i in range(1, T + 1)}
    losses = []
    for k in range(n + 1):
        if k:
            last = modules[k - 1]
            state = {i: last(state[i], table[t[i + k]]) for i in range(1, T - k + 1)}
        each = [
            -(z @ W.T).log_softmax(-1)[torch.arange(B), t[i + k + 1]].mean()
            for i, z in state.items()
        ]
        assert len(each) == T - k
        losses.append(sum(each) / len(each))
    theirs = losses[0] + lam / max(n, 1) * sum(losses[1:])
    same(ours, theirs, [h, table, W, *matrices], rng)


def one_step(f: Callable, rng: Rng) -> None:
    """With torch's own optimiser, on weights that autograd is asked about before."""
    V, D, n = sizes(rng, 3, low=2, high=5)
    embed, head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)

    def part() -> nn.Module:
        made = nn.Module()
        made.head, made.embed = head, embed
        made.norm, made.eh_proj = nn.RMSNorm(D), nn.Linear(D, D, bias=False)
        return made.double()

    trunk, *modules = (part() for _ in range(n + 1))
    trunk.unused = nn.Linear(2, 2, bias=False).double()
    x, ids = normal(rng, 7, D), torch.tensor(rng.integers(0, V, 7))
    total = 0
    for one in (trunk, *modules):
        x = one.norm(one.eh_proj(x)) + embed(ids)
        total = total + 3 * head(x).sin().sum()
    weights = dict(nn.ModuleList([trunk, *modules]).named_parameters())
    used = {n: w for n, w in weights.items() if "unused" not in n}
    found = torch.autograd.grad(total, list(used.values()), retain_graph=True)
    grads = dict(zip(used, found, strict=True))
    norm = torch.cat([g.flatten() for g in grads.values()]).norm()
    clip = float(norm * rng.choice([0.4, 1.8]))
    decay, lr = float(rng.uniform(0.1, 0.9)), 0.3
    before = {name: w.detach().clone() for name, w in weights.items()}
    for name, weight in used.items():
        weight.grad = torch.ones_like(weight) if "unused" not in name else None
    said = f(
        trunk, modules, total, lambda groups: torch.optim.SGD(groups, lr), decay, clip
    )
    agree((float(said),), [float(norm)], 1e-9)
    for name, weight in weights.items():
        spared = "norm" in name or "embed" in name
        step = grads[name] * min(1, clip / norm) if name in grads else 0
        if name in grads and not spared:
            step = step + decay * before[name]
        agree(arrays(weight), arrays(before[name] - lr * step), 1e-5)


JUDGES: dict[str, Callable[[Callable, Rng], None]] = {
    "mla.torch.1": rotate,
    "mla.torch.2": attend_absorbed,
    "mla.torch.3": latent_attention,
    "moe.torch.1": route,
    "moe.torch.2": experts,
    "moe.torch.3": balance,
    "mtp.torch.1": mtp_module,
    "mtp.torch.2": mtp_loss,
    "mtp.torch.3": one_step,
}
