"""Chapter 3, the router: affinities, groups, and the way back."""

from collections.abc import Callable, Sequence

import numpy as np
from grader.compare import WrongForm
from grader.spec import Case, Check, Wrong

from checks.draws import normal, rng


def the_best(K: int, closed: Sequence[int] = ()) -> Callable[[np.ndarray], np.ndarray]:
    """The K best experts that are not closed; of equal numbers the first wins."""

    def choose(choice: np.ndarray) -> np.ndarray:
        if np.ndim(choice) != 2:
            raise ValueError(
                "choose(...) takes all tokens at once, (N, E), "
                f"not an array of shape {np.shape(choice)}"
            )
        choice = np.array(choice)
        choice[:, list(closed)] = -np.inf
        return np.argsort(-choice, axis=1, kind="stable")[:, :K]

    return choose


def as_indices(function: Callable, *args: object) -> object:
    """Run an answer whose first or only result counts experts. Raises WrongForm."""
    value = function(*args)
    first = value[0] if isinstance(value, tuple | list) and len(value) else value
    if isinstance(first, np.ndarray) and first.dtype.kind in "fb":
        raise WrongForm(
            f"The experts are {first.dtype}. They are indices, so whole numbers: a "
            "float or a truth value cannot pick a row."
        )
    return value


# --- affinities, choice, gates -----------------------------------------------------


def tokens(
    N: int, D: int, E: int, K: int, lam: float, seed: int, level: float = 0.0,
    closed: Sequence[int] = (),
) -> Case:  # fmt: skip
    """Random tokens; ``level`` is added to every z."""
    u, W = normal(N, D, seed=seed), normal(E, D, seed=seed + 1, scale=0.8)
    u[:, 0], W[:, 0] = 1.0, W[:, 0] + level
    b = normal(E, seed=seed + 2, scale=0.3)
    label = f"{N} tokens, D={D}, {K} of {E} experts, lam={lam}"
    label += ", a group closed" * bool(closed)
    return Case(label, (u, W, b, lam, the_best(K, closed)))


ROUTE = Check(
    "moe.1",
    returns=("experts", "gates", "s"),
    call=as_indices,
    cases=lambda: [
        Case(
            "one token, two of three experts",
            (
                np.array([[1.0, -1.0]]),
                np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 1.0]]),
                np.array([-0.5, 0.1, 0.2]),
                2.5,
                the_best(2),
            ),
        ),
        tokens(N=5, D=4, E=7, K=3, lam=2.5, seed=10),
        tokens(N=4, D=3, E=5, K=1, lam=1.5, seed=20),
        tokens(N=3, D=6, E=4, K=4, lam=1.0, seed=30),
        tokens(N=6, D=2, E=9, K=2, lam=16.0, seed=40, level=-26.0),
        tokens(N=1, D=5, E=6, K=3, lam=2.5, seed=50, level=4.0),
        tokens(N=5, D=3, E=6, K=2, lam=2.5, seed=60, closed=(2, 3)),
    ],
    hints=(
        "Three lines, three kinds of numbers: the affinities of all, the indices of "
        "the chosen, the affinities of the chosen. The bias occurs in one of them.",
        "`s` is (N, E), from `u @ W.T`. `choose(s + b)` gives indices (N, K); "
        "`np.take_along_axis(s, experts, axis=1)` picks the affinities that belong "
        "to them, (N, K).",
        "With these as `chosen`, the gates are `lam * chosen / chosen.sum(axis=1, "
        "keepdims=True)`. Return `experts, gates, s`.",
    ),
    wrong=(
        Wrong(
            "gates from the biased scores",
            "np.take_along_axis(s, experts",
            "np.take_along_axis(s + b, experts",
            "The bias decides who is chosen, and nothing else. How much an answer "
            "counts is a matter of s alone.",
        ),
        Wrong(
            "the bias only below the fraction",
            "lam * chosen / chosen.sum(",
            "lam * chosen / np.take_along_axis(s + b, experts, axis=1).sum(",
            "The sum below the fraction is over the s of the chosen, without bias, so "
            "that the gates of a token sum to lam.",
        ),
        Wrong(
            "a softmax over the experts",
            "1 / (1 + np.exp(-u @ W.T))",
            "np.exp(u @ W.T)\n    s = s / s.sum(axis=1, keepdims=True)",
            "In a softmax the experts compete, and each row sums to 1. DeepSeek-V3 "
            "scores each expert by itself, with a sigmoid.",
        ),
        Wrong(
            "a softmax over the chosen",
            "gates = lam * chosen / chosen.sum(axis=1, keepdims=True)",
            "chosen = np.exp(np.take_along_axis(u @ W.T, experts, axis=1))\n"
            "    gates = lam * chosen / chosen.sum(axis=1, keepdims=True)",
            "A softmax takes exponentials of z. The gates are shares of the "
            "affinities, which have been through their sigmoid.",
        ),
        Wrong(
            "a softmax of the affinities",
            "gates = lam * chosen / chosen.sum(axis=1, keepdims=True)",
            "chosen = np.exp(chosen)\n"
            "    gates = lam * chosen / chosen.sum(axis=1, keepdims=True)",
            "The affinities are positive already: divide each by their sum, without "
            "another exponential.",
        ),
        Wrong(
            "the bias inside the sigmoid",
            "np.exp(-u @ W.T)",
            "np.exp(-u @ W.T - b)",
            "The bias is added to s, behind the sigmoid, and only for the choice. "
            "Within, it changes the gates too.",
            (("choose(s + b)", "choose(s)"),),
        ),
        Wrong(
            "chosen by z + b",
            "choose(s + b)",
            "choose(u @ W.T + b)",
            "The bias is held against numbers between 0 and 1: it is added to the "
            "affinity, not to what goes into the sigmoid.",
        ),
        Wrong(
            "chosen without the bias",
            "choose(s + b)",
            "choose(s)",
            "Then the bias does nothing at all. The choice is by s + b.",
        ),
        Wrong(
            "the K best, whatever `choose` says",
            "experts = choose(s + b)",
            "experts = np.argsort(-(s + b), axis=1)[:, : choose(s + b).shape[1]]",
            "`choose` knows which groups are closed. Its experts are the answer.",
        ),
        Wrong(
            "the bias subtracted",
            "choose(s + b)",
            "choose(s - b)",
            "An expert with a high bias is chosen more often: s + b.",
        ),
        Wrong(
            "shares of all experts",
            "chosen.sum(",
            "s.sum(",
            "The gates of a token sum to lam. Only the chosen ones share it.",
        ),
        Wrong(
            "not divided by the sum",
            "lam * chosen / chosen.sum(axis=1, keepdims=True)",
            "lam * chosen",
            "A gate is a share: each affinity is divided by the sum over the chosen, "
            "then multiplied by lam.",
        ),
        Wrong(
            "lam forgotten",
            "lam * chosen",
            "chosen",
            "The gates of a token sum to lam, 2.5 in DeepSeek-V3. That number stands "
            "only in its config file.",
        ),
        Wrong(
            "something added below the fraction",
            ".sum(axis=1, keepdims=True)",
            ".sum(axis=1, keepdims=True) + 1e-6\n    gates = lam * chosen / total",
            "Affinities of 1e-12 are good for shares. What is added to their sum must "
            "be far smaller than any of them, 1e-20 in transformers, or nothing.",
            (("gates = lam * chosen / chosen", "total = chosen"),),
        ),
        Wrong(
            "the biased scores handed on",
            "return experts, gates, s",
            "return experts, gates, s + b",
            "Returned are the affinities, s. The balance loss reads them, and the "
            "report counts there without bias.",
        ),
    ),
    right=(
        "def route(u, W, b, lam, choose):\n"
        "    z = np.einsum('nd,ed->ne', u, W)\n"
        "    s = 0.5 * (1 + np.tanh(z / 2)) if z.min() > -10 else np.where(\n"
        "        z > 0, 1 / (1 + np.exp(-z)), np.exp(z) / (1 + np.exp(z)))\n"
        "    experts = choose(b + s)\n"
        "    gates = np.zeros(experts.shape)\n"
        "    for n, row in enumerate(experts):\n"
        "        gates[n] = lam * s[n, row] / (sum(s[n, row]) + 1e-20)\n"
        "    return experts, gates, s\n",
        "def route(u, W, b, lam, choose):\n"
        "    u, W, b = (np.asarray(a, np.float32) for a in (u, W, b))\n"
        "    s = 1 / (1 + np.exp(-(u @ W.T)))\n"
        "    experts = choose(s + b)\n"
        "    rows = np.arange(len(u))[:, None]\n"
        "    gates = s[rows, experts]\n"
        "    gates = gates / gates.sum(1)[:, None] * lam\n"
        "    return [experts, gates, s]\n",
    ),
)

# --- groups -----------------------------------------------------------------------


def scores(
    N: int, K: int, n_group: int, size: int, topk_group: int, seed: int, shift: float
) -> Case:
    """s + b, with biases that put most of them on one side of 0."""
    choice = rng(seed).random((N, n_group * size)) + shift
    choice += normal(n_group * size, seed=seed + 1, scale=0.2)
    label = f"{N} tokens, {topk_group} of {n_group} groups of {size}, K={K}"
    return Case(label, (choice, K, n_group, topk_group))


def ties(N: int, K: int, n_group: int, size: int, topk_group: int, seed: int) -> Case:
    """Few different numbers: equal experts, and equal groups."""
    choice = rng(seed).integers(-2, 3, (N, n_group * size)) / 4
    label = f"many equal numbers, {topk_group} of {n_group} groups of {size}, K={K}"
    return Case(label, (choice, K, n_group, topk_group))


CHOOSE = Check(
    "moe.2",
    returns=("experts",),
    call=as_indices,
    cases=lambda: [
        Case(
            "one token, one of two groups of four",
            (np.array([[0.9, 0.3, 0.3, 0.3, 0.6, 0.0, 0.7, 0.2]]), 3, 2, 1),
        ),
        Case(
            "negative scores: one open expert is worse than nothing",
            (np.array([[-0.9, -0.2, -0.6, -0.1, -0.7, -0.3]]), 3, 3, 2),
        ),
        scores(N=5, K=3, n_group=4, size=5, topk_group=2, seed=1, shift=0.0),
        scores(N=6, K=4, n_group=8, size=4, topk_group=4, seed=2, shift=-1.0),
        scores(N=4, K=1, n_group=3, size=3, topk_group=1, seed=3, shift=-0.5),
        scores(N=3, K=6, n_group=4, size=3, topk_group=2, seed=4, shift=-2.0),
        scores(N=3, K=2, n_group=1, size=7, topk_group=1, seed=5, shift=-0.3),
        scores(N=4, K=5, n_group=2, size=6, topk_group=2, seed=6, shift=0.2),
        scores(N=7, K=3, n_group=5, size=2, topk_group=3, seed=7, shift=-0.4),
        ties(N=6, K=4, n_group=4, size=3, topk_group=2, seed=8),
        ties(N=3, K=5, n_group=6, size=8, topk_group=3, seed=9),
    ],
    hints=(
        "First judge groups, then experts. A closed expert must not win whatever the "
        "open ones have, so give it a number below all others.",
        "`choice.reshape(N, n_group, E // n_group)` puts each group in a row. "
        "`np.sort(..., axis=-1)[..., -2:]` has its two best. `np.argsort(-x, axis=1, "
        'kind="stable")` ranks from the best on, and leaves equals in order.',
        "From the ranked groups' first `topk_group` make a truth value for each group, "
        "(N, n_group), with `np.put_along_axis`. `np.where(is_open[:, :, None], "
        "grouped, -np.inf)`, reshaped to (N, E), is ranked once more; the first K are "
        "the answer.",
    ),
    wrong=(
        Wrong(
            "a group as good as its best expert",
            "[..., -2:].sum(axis=-1)",
            "[..., -1]",
            "So did DeepSeek-V2. Here K / M experts of a group are expected, 8 / 4 = "
            "2, and the two best are added.",
        ),
        Wrong(
            "a group as good as all of its experts",
            "[..., -2:].sum(axis=-1)",
            ".sum(axis=-1)",
            "Only the two best of a group count. Those that nobody will choose say "
            "nothing for or against it.",
        ),
        Wrong(
            "a group as good as its K / M best",
            "[..., -2:]",
            "[..., -max(K // topk_group, 1) :]",
            "So the report puts it, and 8 / 4 is 2. The released code adds two "
            "whatever K and M are, and so do we.",
        ),
        Wrong(
            "closed experts at the lowest number",
            "-np.inf",
            "choice.min()",
            "Then the lowest open one has rivals, and of equals the lower index wins. "
            "Closed is minus infinity.",
        ),
        Wrong(
            "closed experts at 0",
            "-np.inf",
            "0.0",
            "With negative biases a 0 beats experts whose groups are open. DeepSeek's "
            "own demo had this. Closed is minus infinity.",
        ),
        Wrong(
            "the groups ignored",
            "np.where(is_open[:, :, None], grouped, -np.inf)",
            "grouped",
            "Those are the K best of all. Only experts of the best topk_group groups "
            "may be chosen.",
        ),
        Wrong(
            "every n-th expert in a group",
            "choice.reshape(N, n_group, E // n_group)",
            "choice.reshape(N, E // n_group, n_group).swapaxes(1, 2)",
            "Groups are neighbours: the first E / n_group experts are the first group.",
            ((".reshape(N, E)", ".swapaxes(1, 2).reshape(N, E)"),),
        ),
        Wrong(
            "the same groups for every token",
            "[..., -2:].sum(axis=-1)",
            "[..., -2:].sum(axis=-1)\n    score = score.sum(axis=0) + 0 * score",
            "Each token has its own open groups. One row has nothing to do with "
            "another.",
        ),
        Wrong(
            "the worst groups kept",
            "np.argsort(-score,",
            "np.argsort(score,",
            "argsort goes from small to large: the groups that stay open are its last.",
        ),
        Wrong(
            "of equals the higher index",
            'return np.argsort(-choice, axis=1, kind="stable")[:, :K]',
            'return np.argsort(choice, axis=1, kind="stable")[:, ::-1][:, :K]',
            "Turned round, a ranking turns equals round too. Rank the negative numbers "
            "instead: of equals, the lower index comes first.",
        ),
        Wrong(
            "of equal groups the higher",
            'np.argsort(-score, axis=1, kind="stable")[:, :topk_group]',
            'np.argsort(score, axis=1, kind="stable")[:, ::-1][:, :topk_group]',
            "Turned round, a ranking turns equals round too. Rank the negative scores "
            "instead: of equal groups, the lower one comes first.",
        ),
        Wrong(
            "of equal groups and equal experts the higher",
            'np.argsort(-score, axis=1, kind="stable")[:, :topk_group]',
            'np.argsort(score, axis=1, kind="stable")[:, ::-1][:, :topk_group]',
            "Turned round, a ranking turns equals round too. Rank the negative numbers "
            "instead: of equals, the lower index comes first.",
            (
                (
                    'return np.argsort(-choice, axis=1, kind="stable")[:, :K]',
                    'return np.argsort(choice, axis=1, kind="stable")[:, ::-1][:, :K]',
                ),
            ),
        ),
        Wrong(
            "the best last",
            'return np.argsort(-choice, axis=1, kind="stable")[:, :K]',
            'return np.argsort(-choice, axis=1, kind="stable")[:, :K][:, ::-1]',
            "The best of the chosen stands first.",
        ),
        Wrong(
            "the chosen in the order of their indices",
            'return np.argsort(-choice, axis=1, kind="stable")[:, :K]',
            'best = np.argsort(-choice, axis=1, kind="stable")[:, :K]\n'
            "    return np.sort(best, axis=1)",
            "They are the right ones. Asked for is the best first, not the lowest.",
        ),
        Wrong(
            "counted among the open experts only",
            'return np.argsort(-choice, axis=1, kind="stable")[:, :K]',
            'best = np.argsort(-choice, axis=1, kind="stable")[:, :K]\n'
            "    shut = np.cumsum(np.isneginf(choice), axis=1)\n"
            "    return best - np.take_along_axis(shut, best, axis=1)",
            "Where closed groups are cut out, what is left has other numbers. Return "
            "indices among all E.",
        ),
    ),
    right=(
        "def choose(choice, K, n_group, topk_group):\n"
        "    N, E = choice.shape\n"
        "    size, out = E // n_group, []\n"
        "    for row in choice.tolist():\n"
        "        parts = [row[g * size:(g + 1) * size] for g in range(n_group)]\n"
        "        total = [sum(sorted(part)[-2:]) for part in parts]\n"
        "        best = sorted(range(n_group), key=lambda g: -total[g])[:topk_group]\n"
        "        able = [i for i in range(E) if i // size in best]\n"
        "        out.append(sorted(able, key=lambda i: -row[i])[:K])\n"
        "    return np.array(out)\n",
        "def choose(choice, K, n_group, topk_group):\n"
        "    N, E = choice.shape\n"
        "    x = choice.astype(np.float32).reshape(N, n_group, -1)\n"
        "    size = x.shape[-1]\n"
        "    two = -np.partition(-x, 1, axis=-1)[..., :2]\n"
        "    score = two[..., 0] + two[..., 1]\n"
        "    rank = np.zeros((N, n_group), int)\n"
        "    for g in range(n_group):\n"
        "        better = score > score[:, [g]]\n"
        "        same = (score == score[:, [g]]) & (np.arange(n_group) < g)\n"
        "        rank[:, g] = (better | same).sum(-1)\n"
        "    mask = np.repeat(rank < topk_group, size, axis=1)\n"
        "    x = np.ma.masked_array(x.reshape(N, E), ~mask).filled(-np.inf)\n"
        "    best = np.empty((N, K), np.int32)\n"
        "    for k in range(K):\n"
        "        best[:, k] = x.argmax(axis=1)\n"
        "        x[np.arange(N), best[:, k]] = -np.inf\n"
        "    return best\n",
    ),
)

# --- the way back ------------------------------------------------------------------


def arrived(
    N: int, D: int, E: int, K: int, lam: float, seed: int, level: float = 0.0
) -> Case:
    """What arrives at a router, with affinities that are those of u and W."""
    u, W = normal(N, D, seed=seed), normal(E, D, seed=seed + 1, scale=0.8)
    u[:, 0], W[:, 0] = 1.0, W[:, 0] + level
    s = 1 / (1 + np.exp(-u @ W.T))
    experts = np.argsort(normal(N, E, seed=seed + 2), axis=1)[:, :K]
    dgates = normal(N, K, seed=seed + 3)
    ds = normal(N, E, seed=seed + 4, scale=0.3) / s.mean()
    label = f"{N} tokens, D={D}, {K} of {E} experts, lam={lam}"
    return Case(label, (dgates, ds, u, W, experts, s, lam))


ROUTE_BACKWARD = Check(
    "moe.4",
    returns=("du", "dW"),
    cases=lambda: [
        Case(
            "one token, two of three experts, nothing from others",
            (
                np.array([[1.0, -1.0]]),
                np.zeros((1, 3)),
                np.array([[1.0, -1.0]]),
                np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 1.0]]),
                np.array([[1, 2]]),
                1 / (1 + np.exp([[-2.0, 0.0, 1.0]])),
                2.5,
            ),
        ),
        arrived(N=5, D=4, E=7, K=3, lam=2.5, seed=10),
        arrived(N=4, D=3, E=5, K=1, lam=1.5, seed=20),
        arrived(N=3, D=6, E=4, K=4, lam=1.0, seed=30),
        arrived(N=6, D=2, E=9, K=2, lam=16.0, seed=40, level=-26.0),
        arrived(N=1, D=5, E=6, K=3, lam=2.5, seed=50),
    ],
    hints=(
        "If all dgates of a token are equal, nothing may come out: the gates always "
        "sum to lam. What has to be subtracted for that?",
        "`chosen` (N, K) and `total` (N, 1) as on the way there. The mean is the sum "
        "of `chosen / total * dgates` over K, with `keepdims=True`. "
        "`np.put_along_axis(zeros, experts, values, axis=1)` brings (N, K) into (N, "
        "E).",
        "`lam / total * (dgates - mean)` goes to the chosen, the others have 0. Add "
        "`ds`, times `s * (1 - s)`: that is `dz` (N, E). Return `dz @ W` and `dz.T @ "
        "u`.",
    ),
    wrong=(
        Wrong(
            "the mean not subtracted",
            "(dgates - mean)",
            "dgates",
            "The sum below the fraction depends on each affinity too. What one gains "
            "the others lose, and that is the mean.",
        ),
        Wrong(
            "the plain mean over K",
            "np.sum(chosen / total * dgates, axis=1, keepdims=True)",
            "np.mean(dgates, axis=1, keepdims=True)",
            "The mean is weighed with the shares: an expert with a large gate has more "
            "to lose.",
        ),
        Wrong(
            "weighed with affinities instead of shares",
            "chosen / total * dgates",
            "chosen * dgates",
            "The weights of a mean sum to 1: the affinities are divided by their sum "
            "S.",
        ),
        Wrong(
            "weighed with the gates",
            "chosen / total * dgates",
            "lam * chosen / total * dgates",
            "The gates sum to lam, and a mean's weights to 1. Divide by lam, or take "
            "the shares s / S.",
        ),
        Wrong(
            "lam forgotten",
            "lam / total",
            "1 / total",
            "The gates were shares times lam, so their gradient is lam times as large.",
        ),
        Wrong(
            "not divided by the sum",
            "lam / total * (dgates",
            "lam * (dgates",
            "A share is s / S. By how much it moves if s moves, is one part in S.",
        ),
        Wrong(
            "the sum over all experts",
            "total = chosen.sum(",
            "total = s.sum(",
            "The shares are those among the chosen. S is the sum over K, not over E.",
        ),
        Wrong(
            "the sigmoid forgotten",
            "(dshares + ds) * s * (1 - s)",
            "dshares + ds",
            "Between the product and the affinity stands a sigmoid, whose slope is "
            "s (1 - s).",
        ),
        Wrong(
            "half of the sigmoid's slope",
            "* s * (1 - s)",
            "* s",
            "The slope of the sigmoid is s (1 - s): flat at both ends, where s is near "
            "0 and where it is near 1.",
        ),
        Wrong(
            "a softmax where the sigmoid was",
            "(dshares + ds) * s * (1 - s)",
            "dshares + ds\n    dz = s * (dz - np.sum(s * dz, axis=1, keepdims=True))",
            "That is the way back through a softmax over the experts. Each affinity "
            "went through a sigmoid of its own, with the slope s (1 - s).",
        ),
        Wrong(
            "the way through the sigmoid for the gates alone",
            "(dshares + ds) * s * (1 - s)",
            "dshares * s * (1 - s) + ds",
            "ds is a gradient of the affinities, like what comes from the gates. Both "
            "go through the sigmoid.",
        ),
        Wrong(
            "what others send back forgotten",
            "(dshares + ds)",
            "dshares",
            "The affinities were read twice, by the gates and by whoever sends ds. Two "
            "gradients add.",
        ),
        Wrong(
            "what others send back lost where an expert was chosen",
            "dshares = np.zeros(s.shape)",
            "dshares, ds = ds.copy(), 0.0",
            "A chosen expert hears from both, its gate and ds: add, do not overwrite.",
        ),
        Wrong(
            "the mean taken from all experts",
            "dz = (dshares + ds)",
            "others = np.ones(s.shape)\n"
            "    np.put_along_axis(others, experts, 0.0, axis=1)\n"
            "    dz = (dshares - lam / total * mean * others + ds)",
            "No gate depends on an expert that was not chosen. It hears nothing from "
            "the gates, not the mean either.",
        ),
        Wrong(
            "ranks taken for experts",
            "dshares, experts, lam / total",
            "dshares, np.argsort(experts, axis=1), lam / total",
            "The k-th gate of a token belongs to expert experts[t, k].",
        ),
        Wrong(
            "the mean over the tokens",
            "return dz @ W, dz.T @ u",
            "return dz @ W, dz.T @ u / len(u)",
            "Every token read the same W, so their gradients add. Where the loss is a "
            "mean, dgates holds that already.",
        ),
    ),
    right=(
        "def route_backward(dgates, ds, u, W, experts, s, lam):\n"
        "    dz = ds * s * (1 - s)\n"
        "    for n in range(len(u)):\n"
        "        e = experts[n]\n"
        "        p = s[n, e] / s[n, e].sum()\n"
        "        J = (np.eye(len(e)) - p[:, None]) * lam / s[n, e].sum()\n"
        "        dz[n, e] += J.T @ dgates[n] * s[n, e] * (1 - s[n, e])\n"
        "    return dz @ W, np.einsum('ne,nd->ed', dz, u)\n",
        "def route_backward(dgates, ds, u, W, experts, s, lam):\n"
        "    f = np.float32\n"
        "    dgates, ds, u, W, s = (a.astype(f) for a in (dgates, ds, u, W, s))\n"
        "    at = np.arange(len(u))[:, None], experts\n"
        "    hit = np.zeros(s.shape, f)\n"
        "    hit[at] = 1\n"
        "    share = s * hit / (s * hit).sum(-1, keepdims=True)\n"
        "    dg = np.zeros(s.shape, f)\n"
        "    dg[at] = dgates\n"
        "    dg = dg - hit * (share * dg).sum(-1, keepdims=True)\n"
        "    dz = f(lam) * share * (1 - s) * dg + ds * s * (1 - s)\n"
        "    return dz.dot(W), dz.T.dot(u)\n",
    ),
)

CHECKS = [ROUTE, CHOOSE, ROUTE_BACKWARD]
