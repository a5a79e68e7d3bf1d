"""Chapter 3: judges of the MoE exercises.

Torch for the gradients, token by token where tokens are chosen, sorted and counted.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from minidsv3.moe import numpy_ref as library

from ..judging import FORWARD, Rng, agree, differences, leaf, sizes
from ..oracles import AUTOGRAD, DIFFERENCES

# --- the router -------------------------------------------------------------------


def router(rng: Rng) -> list[np.ndarray]:
    """u, W and b, the biases mostly negative."""
    N, D, E = sizes(rng, 3, low=2, high=7)
    return [
        rng.normal(size=(N, D)), rng.normal(size=(E, D)), rng.normal(-0.3, 0.4, E)
    ]  # fmt: skip


def best_of(numbers: Sequence[float], K: int) -> list[int]:
    """One after the other; of equals, the first."""
    left, found = dict(enumerate(numbers)), []
    for _ in range(K):
        found.append(max(left, key=lambda i: (left[i], -i)))
        del left[found[-1]]
    return found


def expected(row: Sequence[float], K: int, n_group: int, kept: int) -> list[int]:
    """The K best experts of the groups whose two best have the largest sums."""
    size = len(row) // n_group
    groups = [range(g * size, (g + 1) * size) for g in range(n_group)]
    scores = [sum(sorted(row[i] for i in group)[-2:]) for group in groups]
    able = sorted(i for g in best_of(scores, kept) for i in groups[g])
    return [able[i] for i in best_of([row[i] for i in able], K)]


def in_torch(u, W, experts: np.ndarray, lam: float) -> tuple:
    """Gates of given experts, and all affinities."""
    s = torch.sigmoid(F.linear(u, W))
    chosen = s.gather(1, torch.tensor(experts))
    return lam * F.normalize(chosen, p=1, dim=1), s


def route(f: Callable, rng: Rng) -> None:
    u, W, b = router(rng)
    n_group = 2 if len(W) in (4, 6) else 1
    K = int(rng.integers(1, len(W) // n_group + 1))
    lam, asked = float(rng.uniform(0.5, 16)), []

    def choose(choice: np.ndarray) -> np.ndarray:
        asked.append(choice.copy())
        return np.array([expected(row, K, n_group, 1) for row in choice.tolist()])

    experts, gates, s = f(u, W, b, lam, choose)
    theirs, all_of_them = in_torch(torch.tensor(u), torch.tensor(W), experts, lam)
    agree((gates, s), [theirs.numpy(), all_of_them.numpy()], FORWARD)
    (choice,) = asked
    agree(choice, all_of_them.numpy() + b, FORWARD)
    agree(gates.sum(axis=1), np.full(len(u), lam), FORWARD)
    params = {"gate.weight": W, library.BIAS: b}
    shape = SimpleNamespace(
        n_group=n_group, topk_group=1, num_experts_per_tok=K, routed_scaling_factor=lam
    )
    in_library, _ = library.route_forward(params, u, shape)
    assert np.array_equal(experts, in_library.experts)
    agree((gates, s), in_library[1:], FORWARD)


def choose(f: Callable, rng: Rng) -> None:
    """Few levels, so that equals are many; then none alike."""
    for levels in (3, 10**9):
        n_group, size = int(rng.integers(2, 6)), int(rng.integers(2, 5))
        kept = int(rng.integers(1, n_group))
        K = int(rng.integers(1, kept * size + 1))
        choice = rng.integers(-levels, levels // 2, (9, n_group * size)) / 2.0
        ours = f(choice, K, n_group, kept)
        for row, experts in zip(choice.tolist(), ours, strict=True):
            assert experts.tolist() == expected(row, K, n_group, kept)
        shape = SimpleNamespace(n_group=n_group, topk_group=kept, num_experts_per_tok=K)
        assert np.array_equal(ours, library.choose(choice, shape))


def route_backward(f: Callable, rng: Rng) -> None:
    u, W, _ = router(rng)
    (N, _), E = u.shape, len(W)
    K, lam = int(rng.integers(1, E + 1)), float(rng.uniform(0.5, 16))
    experts = rng.permuted(np.tile(np.arange(E), (N, 1)), axis=1)[:, :K]
    dgates, ds = rng.normal(size=(N, K)), rng.normal(size=(N, E))
    u_leaf, W_leaf = leaf(u), leaf(W)
    gates, s = in_torch(u_leaf, W_leaf, experts, lam)
    heard = (gates * torch.tensor(dgates)).sum() + (s * torch.tensor(ds)).sum()
    theirs = torch.autograd.grad(heard, [u_leaf, W_leaf])
    ours = f(dgates, ds, u, W, experts, s.detach().numpy(), lam)
    agree(ours, [g.numpy() for g in theirs], AUTOGRAD)

    def forward(u, W):
        gates, s = in_torch(torch.tensor(u), torch.tensor(W), experts, lam)
        return np.concatenate([gates.numpy(), s.numpy()], axis=1)

    both = np.concatenate([dgates, ds], axis=1)
    agree(ours, differences(forward, both, u, W), DIFFERENCES)


# --- the experts ------------------------------------------------------------------


def choices(rng: Rng, N: int, E: int, K: int) -> tuple[np.ndarray, np.ndarray]:
    """Experts, of whom one is left idle if K allows it, and gates."""
    busy = rng.permutation(E)[: max(K, E - 1)]
    experts = rng.permuted(np.tile(busy, (N, 1)), axis=1)[:, :K]
    return experts, rng.uniform(0.2, 2, (N, K))


def mix(f: Callable, rng: Rng) -> None:
    N, D, E = sizes(rng, 3, low=3, high=9)
    K = int(rng.integers(2, E))
    experts, gates = choices(rng, N, E, K)
    u, A = rng.normal(size=(N, D)), rng.normal(size=(E, D, D))
    calls: list[tuple[int, int]] = []

    def ffn(i: int, x: np.ndarray) -> np.ndarray:
        calls.append((int(i), len(x)))
        return np.sin(x @ A[i]) + i

    ours = f(u, experts, gates, ffn, E)
    theirs = np.zeros((N, D))
    for t in range(N):
        for k in range(K):
            theirs[t] += gates[t, k] * (np.sin(u[t] @ A[experts[t, k]]) + experts[t, k])
    agree(ours, theirs, FORWARD)
    assert sorted(calls) == sorted(Counter(experts.ravel().tolist()).items())


def expert_in_torch(x, W_gate, W_up, W_down) -> torch.Tensor:
    return F.linear(F.silu(F.linear(x, W_gate)) * F.linear(x, W_up), W_down)


def mixed_in_torch(u, experts: np.ndarray, gates, *stacks) -> torch.Tensor:
    """Token by token, each with the weights of its experts."""
    rows = []
    for t, names in enumerate(experts.tolist()):
        answers = [expert_in_torch(u[t], *(W[i] for W in stacks)) for i in names]
        rows.append(gates[t] @ torch.stack(answers))
    return torch.stack(rows)


def experts_backward(f: Callable, rng: Rng) -> None:
    N, D, width, E = sizes(rng, 4, low=2, high=6)
    K = int(rng.integers(1, E + 1))
    experts, gates = choices(rng, N, E, K)
    dy, u = rng.normal(size=(N, D)), rng.normal(size=(N, D))
    shapes = (E, width, D), (E, width, D), (E, D, width)
    stacks = [rng.normal(size=shape) for shape in shapes]
    ours = f(dy, u, experts, gates, *stacks)
    leaves = [leaf(a) for a in (u, gates, *stacks)]
    y = mixed_in_torch(leaves[0], experts, leaves[1], *leaves[2:])
    theirs = torch.autograd.grad(y, leaves, torch.tensor(dy))
    agree(ours, [g.numpy() for g in theirs], AUTOGRAD)
    idle = sorted(set(range(E)) - set(experts.ravel().tolist()))
    assert not any(dW[idle].any() for dW in ours[2:])


# --- balance ----------------------------------------------------------------------


def balance_in_torch(s, K: int, alpha: float) -> torch.Tensor:
    """Equations (17) to (20), sequence by sequence."""
    B, T, E = s.shape
    losses = []
    for sequence in s:
        chosen = Counter(sequence.detach().topk(K).indices.flatten().tolist())
        P = (sequence / sequence.sum(dim=1, keepdim=True)).mean(dim=0)
        losses.append(sum(E / (K * T) * chosen[i] * P[i] for i in range(E)))
    return alpha * torch.stack(losses).mean()


def balance(f: Callable, rng: Rng) -> None:
    B, T, E = sizes(rng, 3, low=2, high=7)
    K, alpha = int(rng.integers(2, E + 1)), float(rng.uniform(0.1, 3))
    z = rng.normal(size=(B, T, E)) + 2 * rng.normal(size=(B, 1, E))
    s = leaf(1 / (1 + np.exp(-z)))
    loss, ds = f(s.detach().numpy(), K, alpha)
    theirs = balance_in_torch(s, K, alpha)
    agree(np.array(loss), theirs.detach().numpy(), FORWARD)
    agree(ds, torch.autograd.grad(theirs, s)[0].numpy(), AUTOGRAD)
    in_library, saved = library.balance_forward(s.detach().numpy(), K)
    agree(np.array(loss), np.array(alpha * in_library), FORWARD)
    agree(ds, library.balance_backward(alpha, saved), AUTOGRAD)


def update_bias(f: Callable, rng: Rng) -> None:
    """One expert after the other, of a router that leans; and of four by hand."""
    N, E = sizes(rng, 2, low=4, high=12)
    K = int(rng.integers(2, E))
    liked = rng.normal(0, 2, E)
    leaning = np.argsort(liked + rng.gumbel(size=(N, E)), axis=1)[:, -K:]
    for experts in (leaning, np.array([[0, 1], [1, 0], [0, 2], [1, 3]])):
        b, gamma = rng.normal(size=E), float(rng.uniform(0.01, 1))
        ours, violation = f(b, experts, gamma)
        counts = Counter(experts.ravel().tolist())
        for i in range(E):
            excess = counts[i] * E - experts.size
            agree(ours[i], b[i] - gamma * ((excess > 0) - (excess < 0)), FORWARD)
        fullest = max(counts.values()) * E / experts.size
        assert abs(violation - (fullest - 1)) < 1e-12
        in_library = library.update_bias(b, library.load(experts, E), gamma)
        agree(ours, in_library, FORWARD)


# --- the layer --------------------------------------------------------------------

NAMES = ("W", "W_gate", "W_up", "W_down", "S_gate", "S_up", "S_down")


def layer(f: Callable, rng: Rng) -> None:
    """A whole layer in torch. Autograd knows of one u, read by three."""
    B, T, D, width, J = sizes(rng, 5, low=2, high=5)
    n_group, size, kept = int(rng.integers(3, 5)), int(rng.integers(2, 4)), 2
    E, K = n_group * size, int(rng.integers(2, 4))
    lam, alpha = float(rng.uniform(1.5, 3)), float(rng.uniform(0.5, 2))
    shapes = (
        (E, D), (E, width, D), (E, width, D), (E, D, width), (J, D), (J, D), (D, J),
    )  # fmt: skip
    params = {n: rng.normal(size=s) for n, s in zip(NAMES, shapes, strict=True)}
    params["b"] = rng.normal(-1, 0.5, E)
    u, dy = rng.normal(size=(2, B, T, D))

    x, *leaves = (leaf(a) for a in (u, *(params[n] for n in NAMES)))
    W, *stacks = leaves[:4]
    rows = x.flatten(0, 1)
    choice = torch.sigmoid(F.linear(rows, W)).detach().numpy() + params["b"]
    shape = SimpleNamespace(n_group=n_group, topk_group=kept, num_experts_per_tok=K)
    experts = library.choose(choice, shape)
    gates, s = in_torch(rows, W, experts, lam)
    routed = mixed_in_torch(rows, experts, gates, *stacks).reshape(B, T, D)
    y = routed + expert_in_torch(x, *leaves[4:])
    total = (y * torch.tensor(dy)).sum()
    total = total + balance_in_torch(s.reshape(B, T, E), K, alpha)
    theirs = torch.autograd.grad(total, [x, *leaves])

    ours, du, grads = f(params, u, dy, K, n_group, kept, lam, alpha)
    assert set(grads) == set(NAMES)
    agree(ours, y.detach().numpy(), FORWARD)
    ours = (du, *(grads[name] for name in NAMES))
    agree(ours, [g.numpy() for g in theirs], AUTOGRAD)


JUDGES: dict[str, Callable[[Callable, Rng], None]] = {
    "moe.1": route,
    "moe.2": choose,
    "moe.3": mix,
    "moe.4": route_backward,
    "moe.5": experts_backward,
    "moe.6": balance,
    "moe.7": update_bias,
    "moe.8": layer,
}
