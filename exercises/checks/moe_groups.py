"""Chapter 3, the choice: groups first, then experts."""

from collections.abc import Callable

import numpy as np
from grader.compare import WrongForm
from grader.spec import Case, Check, Wrong

from checks.draws import normal, rng


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
            "So did DeepSeek-V2. Here its two best are added: 8 experts in at most 4 "
            "groups are two a group.",
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
            "a sort that mixes equals",
            'np.argsort(-score, axis=1, kind="stable")',
            "np.argsort(-score, axis=1)",
            'Unless it is told `kind="stable"`, argsort may leave equals in any order, '
            "and another machine in another.",
            (
                (
                    'return np.argsort(-choice, axis=1, kind="stable")',
                    "return np.argsort(-choice, axis=1)",
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
        Wrong(
            "of equals that of the better group",
            "    choice = np.where(is_open[:, :, None], grouped, "
            "-np.inf).reshape(N, E)\n"
            '    return np.argsort(-choice, axis=1, kind="stable")[:, :K]',
            "    opened = np.take_along_axis(grouped, best[:, :, None], "
            "axis=1).reshape(N, -1)\n"
            '    order = np.argsort(-opened, axis=1, kind="stable")[:, :K]\n'
            "    size = E // n_group\n"
            "    return np.take_along_axis(best, order // size, axis=1) * size + "
            "order % size",
            "You rank the open experts with those of the best group in front, so "
            "of equals its expert comes first. It should be the lower index, in "
            "whatever group.",
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

CHECKS = [CHOOSE]
