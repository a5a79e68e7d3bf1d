"""Chapter 2: judges of the MTP exercises.

For drafts, the law that comes out of every way they can go.
"""

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from minidsv3.mtp import numpy_ref as library

from ..judging import FORWARD, Rng, agree, differences, leaf, sizes
from ..oracles import AUTOGRAD, DIFFERENCES


def shifted(f: Callable, rng: Rng) -> None:
    """Each position by itself, counted from 1 as the report counts."""
    B, D, k, more = sizes(rng, 4)
    T = k + more
    ids, h = rng.integers(0, 99, (B, T + 1)), rng.normal(size=(B, T - k + 1, D))
    states, tokens, targets = f(h, ids, k)
    assert states.shape[1] == tokens.shape[1] == targets.shape[1] == T - k
    t = {i: ids[:, i - 1] for i in range(1, T + 2)}  # t_i
    for i in range(1, T - k + 1):
        agree(states[:, i - 1], h[:, i - 1], 0)
        agree(tokens[:, i - 1], t[i + k], 0)
        agree(targets[:, i - 1], t[i + k + 1], 0)
    agree(targets, library.targets(ids, k), 0)


# --- the entrance -----------------------------------------------------------------

ARGUMENTS = ("hnorm.weight", "enorm.weight", "eh_proj.weight")


def module(rng: Rng) -> list[np.ndarray]:
    """h, e, g_h, g_e, W of a module."""
    B, T, D = sizes(rng, 3, low=2)
    h, e = rng.normal(size=(B, T, D)), rng.normal(0, 0.1, (B, T, D))
    return [h, e, rng.normal(size=D), rng.normal(size=D), rng.normal(size=(D, 2 * D))]


def in_torch(h, e, g_h, g_e, W, eps: float) -> torch.Tensor:
    D = g_h.shape
    pair = [F.rms_norm(e, D, g_e, eps), F.rms_norm(h, D, g_h, eps)]
    return F.linear(torch.cat(pair, dim=-1), W)


def in_the_library(h, e, g_h, g_e, W, eps: float, dh_prime=None) -> tuple:
    """What the library's module hands to its block, and its gradients, if the block
    hands dh_prime back.
    """
    met = []

    def forward(params, x):
        met.append(x)
        return x, ()

    params = dict(zip(ARGUMENTS, (g_h, g_e, W), strict=True))
    params["shared_head.norm.weight"] = np.ones(len(g_h))
    block = library.Block(forward, lambda dx, saved: (dh_prime, {}))
    h_k, saved = library.mtp_forward(params, h, e, block, eps)
    if dh_prime is None:
        return met[0], ()
    dh, de, grads = library.mtp_backward(np.zeros_like(h_k), saved)
    return met[0], (dh, de, *(grads[name] for name in ARGUMENTS))


def entrance(f: Callable, rng: Rng) -> None:
    arrays, eps = module(rng), float(rng.choice([1e-6, 0.1]))
    ours = f(*arrays, eps)
    agree(ours, in_torch(*map(torch.tensor, arrays), eps).numpy(), FORWARD)
    agree(ours, in_the_library(*arrays, eps)[0], FORWARD)


def entrance_backward(f: Callable, rng: Rng) -> None:
    arrays, eps = module(rng), float(rng.choice([1e-3, 0.1]))
    dh_prime = rng.normal(size=arrays[0].shape)
    ours = f(dh_prime, *arrays, eps)
    leaves = [leaf(a) for a in arrays]
    theirs = torch.autograd.grad(in_torch(*leaves, eps), leaves, torch.tensor(dh_prime))
    agree(ours, [g.numpy() for g in theirs], AUTOGRAD)

    def forward(*arrays):
        return in_the_library(*arrays, eps)[0]

    agree(ours, differences(forward, dh_prime, *arrays), DIFFERENCES)
    agree(ours, in_the_library(*arrays, eps, dh_prime)[1], AUTOGRAD)


# --- what is shared ---------------------------------------------------------------


def shared_gradients(f: Callable, rng: Rng) -> None:
    """A model whose states are its embeddings, mixed: autograd sees head and table.

    Depth k's state is made of the token that it looks up and of a constant, so that the
    gradient at the looked-up rows is known, and torch's whole loss knows no copies.
    """
    B, V, D, n, more = sizes(rng, 5, low=2, high=5)
    T, lam = n + more, float(rng.uniform(0.1, 2))
    ids = rng.integers(0, V, (B, T + 1))
    head, table = leaf(rng.normal(size=(V, D))), leaf(rng.normal(size=(V, D)))
    looked_up, states, losses = [], [], []
    for k in range(n + 1):
        rows = F.embedding(torch.tensor(ids[:, k:T]), table)  # (B, T-k, D)
        rows.retain_grad()
        looked_up.append(rows)
        states.append(torch.tanh(rows) + torch.tensor(rng.normal(size=D)))
        logits = F.linear(states[-1], head).flatten(0, 1)
        target = torch.tensor(ids[:, k + 1 :]).flatten()
        losses.append(F.cross_entropy(logits, target))
    (losses[0] + lam / n * sum(losses[1:])).backward()
    given = [s.detach().numpy() for s in states], [r.grad.numpy() for r in looked_up]
    ours = f(head.detach().numpy(), ids, *given, lam)
    agree(ours, [head.grad.numpy(), table.grad.numpy()], AUTOGRAD)


# --- drafts -----------------------------------------------------------------------


def laws(rng: Rng, N: int, V: int) -> np.ndarray:
    """Random laws; some tokens are impossible."""
    p = rng.dirichlet(np.ones(V), N) * (rng.random((N, V)) > 0.25)
    p[:, -1] += 0.05
    return p / p.sum(axis=1, keepdims=True)


def verdict(f: Callable, rng: Rng) -> None:
    """Through every draft and a fine comb of chances, the token's law must be p."""
    V, comb = int(rng.integers(2, 7)), 4000
    p, q = laws(rng, 2, V)
    out = np.zeros(V)
    for d in np.flatnonzero(q):
        kept = np.mean([f(p, q, d, (i + 0.5) / comb)[0] for i in range(comb)])
        assert abs(kept - min(1, p[d] / q[d])) <= 1 / comb
        law = f(p, q, d, 0.5)[1]
        agree(law, library.residual(p[None], q[None])[0], FORWARD)
        assert law.min() >= 0 and abs(law.sum() - 1) < 1e-12
        out += q[d] * (kept * np.eye(V)[d] + (1 - kept) * law)
    np.testing.assert_allclose(out, p, atol=2 / comb)
    for greedy in (np.eye(V)[0], p):
        same, law = f(greedy, greedy, int(greedy.argmax()), 0.999)
        assert same
        agree(law, greedy, FORWARD)


def speed_up(f: Callable, rng: Rng) -> None:
    """Against the sum over drafts, and against the clock of a simulated text."""
    N, V = sizes(rng, 2, low=2, high=7)
    p, q, c = laws(rng, N, V), laws(rng, N, V), float(rng.uniform(0.05, 1.5))
    kept = [
        sum(q[i, d] * min(1, p[i, d] / q[i, d]) for d in range(V) if q[i, d] > 0)
        for i in range(N)
    ]
    a, gain = f(p, q, c)
    assert abs(a - np.mean(kept)) < 1e-12
    rounds = 1000
    tokens, time = rounds * (1 + np.mean(kept)), rounds * (1 + c)
    assert abs(gain - tokens / time) < 1e-12


# --- the loop ---------------------------------------------------------------------


class Markov:
    """A trunk with one token of memory; its states are the tokens that it has read."""

    def __init__(self, table: np.ndarray) -> None:
        self.table, self.cache, self.passes = table, [], 0

    @property
    def length(self) -> int:
        return len(self.cache)

    def crop(self, length: int) -> None:
        del self.cache[length:]

    def __call__(self, tokens: Sequence[int]) -> tuple[list, np.ndarray]:
        self.passes += 1
        self.cache += [int(t) for t in tokens]
        states = [tuple(self.cache[:i]) for i in range(1, self.length + 1)]
        # with what lies before the last token, a stale cache is another text
        recent = states[-len(tokens) :]
        weights = [1 + sum(s[:-1]) % 3 for s in recent]
        rows = [self.table[w, s[-1]] for w, s in zip(weights, recent, strict=True)]
        return recent, np.array(rows)


class Reader:
    """A module that keeps what it was fed, to be looked at."""

    def __init__(self, table: np.ndarray) -> None:
        self.table, self.fed = table, []

    def __call__(self, states: Sequence[tuple], tokens: Sequence[int]) -> np.ndarray:
        self.fed += [(tuple(s), int(t)) for s, t in zip(states, tokens, strict=True)]
        return self.table[[int(t) for t in tokens]]


class Fork(Exception):
    """A choice that the path does not prescribe; holds the number of options."""


class Path:
    """`draw` and `chance` along prescribed choices, and how probable those are.

    What the answer compares a chance with is not known here, so it is one of eight
    numbers: right for laws in eighths.
    """

    def __init__(self, *choices: int) -> None:
        self.choices, self.at, self.weight = choices, 0, 1.0

    def chosen(self, options: list[tuple]) -> object:
        if self.at == len(self.choices):
            raise Fork(len(options))
        value, share = options[self.choices[self.at]]
        self.at, self.weight = self.at + 1, self.weight * share
        return value

    def draw(self, law: np.ndarray) -> int:
        return self.chosen([(int(x), law[x]) for x in np.flatnonzero(law)])

    def chance(self) -> float:
        return self.chosen([((i + 0.5) / 8, 1 / 8) for i in range(8)])


def law_of_texts(f: Callable, table: np.ndarray, drafts: np.ndarray, n: int) -> tuple:
    """The probability of each text, through all that `draw` and `chance` may do, and
    the mean number of passes.
    """
    found, waiting, passes = {}, [()], 0.0
    while waiting:
        path, trunk = Path(*waiting.pop()), Markov(table)
        try:
            text = f(trunk, Reader(drafts), [1], n, path.draw, path.chance)
        except Fork as fork:
            waiting += [(*path.choices, i) for i in range(fork.args[0])]
            continue
        assert len(text) == n
        text = tuple(int(token) for token in text)
        found[text] = found.get(text, 0.0) + path.weight
        passes += path.weight * trunk.passes
    return found, passes


def passes_to_come(table: np.ndarray, drafts: np.ndarray, text: tuple, n: int) -> float:
    """How many on average, with n tokens missing: a kept draft brings two."""
    if n < 2:
        return n
    p, q = Markov(table)(text)[1][-1], drafts[text[-1]]
    mean = 1.0
    for x in range(len(p)):
        longer = (*text, x)
        mean += max(p[x] - q[x], 0) * passes_to_come(table, drafts, longer, n - 1)
        for y, share in enumerate(Markov(table)(longer)[1][-1]):
            two = passes_to_come(table, drafts, (*longer, y), n - 2)
            mean += min(p[x], q[x]) * share * two
    return mean


def write(f: Callable, rng: Rng) -> None:
    exact_law(f, rng)
    greedy_text(f, rng)


def exact_law(f: Callable, rng: Rng) -> None:
    """Every text as probable as the trunk alone would have it: laws in eighths."""
    eighths = [np.array(x) / 8 for x in ([4, 4], [1, 7], [6, 2], [2, 6], [5, 3])]
    table = np.array([[eighths[i] for i in rng.integers(0, 5, 2)] for _ in range(4)])
    drafts = np.array([[0.5, 0.5], [1.0, 0.0]])[rng.permutation(2)]
    n = 4
    found, passes = law_of_texts(f, table, drafts, n)
    first = Markov(table)([1])[1][-1]
    after = [passes_to_come(table, drafts, (1, x), n - 1) for x in range(2)]
    assert abs(passes - 1 - first @ after) < 1e-12
    for text in product(range(2), repeat=n):
        trunk, probability = Markov(table), 1.0
        _, laws = trunk([1])
        for token in text:
            probability *= laws[-1][token]
            _, laws = trunk([token])
        assert abs(found.get(text, 0.0) - probability) < 1e-12


def greedy_text(f: Callable, rng: Rng) -> None:
    """The text of one token a pass, in the passes it should take, on honest caches."""
    V, P, n = 5, int(rng.integers(1, 5)), int(rng.integers(12, 30))
    table = np.eye(V)[rng.integers(0, V, (4, V))]
    drafts = np.where(rng.random((V, 1)) < 0.5, table[1], np.eye(V)[::-1])
    prompt = rng.integers(0, V, P)
    alone = Markov(table)
    _, laws = alone(prompt)
    plain = [int(laws[-1].argmax())]
    while len(plain) < n:
        _, laws = alone(plain[-1:])
        plain.append(int(laws[-1].argmax()))
    trunk, module = Markov(table), Reader(drafts)
    text = f(trunk, module, prompt, n, lambda law: int(np.argmax(law)), lambda: 0.5)
    assert list(text) == plain
    whole = [*prompt.tolist(), *plain]
    passes, written = 1, 1
    while written < n:
        good = drafts[whole[P + written - 1]].argmax() == whole[P + written]
        written += 2 if good and written + 1 < n else 1
        passes += 1
    assert trunk.passes == passes
    for i, (state, token) in enumerate(module.fed):
        assert (state, token) == (tuple(whole[: i + 1]), whole[i + 1])


JUDGES = {
    "mtp.1": shifted,
    "mtp.2": entrance,
    "mtp.3": entrance_backward,
    "mtp.4": shared_gradients,
    "mtp.5": verdict,
    "mtp.6": speed_up,
    "mtp.7": write,
}
