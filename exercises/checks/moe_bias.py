"""Chapter 3, balance: the biases, and how well they do."""

import numpy as np
from grader.spec import Case, Check, Wrong

from checks.draws import normal, rng


def step(N: int, E: int, K: int, gamma: float, seed: int, among: int = 0) -> Case:
    """A batch whose tokens like some experts better; b is not at 0 any more."""
    draws = rng(seed)
    liked = draws.normal(0, 1.5, E)
    liked[draws.permutation(E)[: E - among if among else 0]] -= 100
    noise = draws.gumbel(size=(N, E))
    experts = np.argsort(-(liked + noise), axis=-1)[:, :K]
    label = f"{N} tokens, {K} of {E} experts, gamma={gamma}"
    label += f", {E - among} of them idle" * bool(among)
    return Case(label, (normal(E, seed=seed + 1, scale=0.05), experts, gamma))


UPDATE = Check(
    "moe.7",
    returns=("b", "max_vio"),
    cases=lambda: [
        Case(
            "three tokens, two of five experts each",
            (
                np.array([0.2, 0.0, -0.1, 0.0, 0.3]),
                np.array([[0, 1], [0, 2], [1, 0]]),
                0.01,
            ),
        ),
        Case(
            "one expert has its share exactly",
            (
                np.array([0.0, 0.25, -0.5]),
                np.array([[0, 1], [1, 0], [0, 2]]),
                0.1,
            ),
        ),
        step(N=30, E=6, K=2, gamma=0.001, seed=10),
        step(N=17, E=9, K=3, gamma=0.02, seed=20, among=4),
        step(N=8, E=5, K=1, gamma=0.5, seed=30, among=1),
        step(N=1, E=4, K=2, gamma=0.01, seed=40),
        step(N=11, E=7, K=4, gamma=0.0, seed=50),
        Case(
            "all alike",
            (normal(4, seed=60), np.array([[0, 1], [2, 3], [3, 0], [1, 2]]), 0.1),
        ),
    ],
    hints=(
        "Whoever is visited too often must become less attractive. By how much it is "
        "too often does not matter.",
        "`np.bincount(experts.ravel(), minlength=len(b))` counts for every expert, the "
        "idle ones at the end too. `np.sign` is 0 at 0.",
        "With `counts` (E,) and `share = counts.mean()`: the biases are `b + gamma * "
        "np.sign(share - counts)`, MaxVio is `counts.max() / share - 1`.",
    ),
    wrong=(
        Wrong(
            "the wrong way round",
            "np.sign(share - counts)",
            "np.sign(counts - share)",
            "So the full ones get fuller. Who had more than the mean is to be chosen "
            "less: its bias falls.",
        ),
        Wrong(
            "by the size of the violation",
            "np.sign(share - counts)",
            "(share - counts)",
            "Only the side counts, not how far: each bias moves by gamma or not at "
            "all.",
        ),
        Wrong(
            "by the size, relative to the share",
            "np.sign(share - counts)",
            "(1 - counts / share)",
            "Only the side counts, not how far: each bias moves by gamma or not at "
            "all.",
        ),
        Wrong(
            "the full ones punished, the others left alone",
            "np.sign(share - counts)",
            "np.minimum(np.sign(share - counts), 0)",
            "Both sides move: an expert with less than its share becomes more "
            "attractive by gamma.",
        ),
        Wrong(
            "only the fullest and the emptiest",
            "np.sign(share - counts)",
            "((counts == counts.min()) * 1.0 - (counts == counts.max()))",
            "Every expert has its thermostat, not the two at the ends alone.",
        ),
        Wrong(
            "a step up where the share is met",
            "np.sign(share - counts)",
            "np.where(counts > share, -1, 1)",
            "Who has exactly the mean stays: the sign of 0 is 0.",
        ),
        Wrong(
            "a step down where the share is met",
            "np.sign(share - counts)",
            "np.where(counts < share, 1, -1)",
            "Who has exactly the mean stays: the sign of 0 is 0.",
        ),
        Wrong(
            "the mean over those that were visited",
            "share = counts.mean()",
            "share = counts[counts > 0].mean()",
            "Idle experts are part of the mean: N K visits over all E experts.",
        ),
        Wrong(
            "the median for the mean",
            "share = counts.mean()",
            "share = np.median(counts)",
            "The share is the mean over all E. A few full experts pull it up, and then "
            "more than half rise.",
        ),
        Wrong(
            "the share rounded",
            "share = counts.mean()",
            "share = round(counts.mean())",
            "The mean need not be a whole number. Rounded, it may be met by experts "
            "that are above it or below.",
        ),
        Wrong(
            "one visit a token",
            "share = counts.mean()",
            "share = len(experts) / len(b)",
            "A token visits K experts, so the mean is N K / E.",
        ),
        Wrong(
            "first choices alone",
            "np.bincount(experts.ravel(),",
            "np.bincount(experts[:, 0],",
            "An expert that is second or eighth has the token as well.",
        ),
        Wrong(
            "scaled instead of moved",
            "b + gamma * np.sign(share - counts)",
            "b * (1 + gamma * np.sign(share - counts))",
            "The step is added. A bias of 0, and all begin there, could not be scaled "
            "away from it.",
        ),
        Wrong(
            "the step without what was there",
            "return b + gamma",
            "return gamma",
            "The biases remember: each step is added to the old one.",
        ),
        Wrong(
            "the mean of the step subtracted",
            "b + gamma * np.sign(share - counts)",
            "b + gamma * (np.sign(share - counts) - np.sign(share - counts).mean())",
            "torchtitan does, and nobody is chosen differently for it; but the report "
            "says that each bias moves by gamma.",
        ),
        Wrong(
            "MaxVio without the 1 subtracted",
            "counts.max() / share - 1",
            "counts.max() / share",
            "At perfect balance MaxVio is 0: by how much the fullest exceeds its "
            "share.",
        ),
        Wrong(
            "the worst of both sides",
            "counts.max() / share - 1",
            "np.abs(counts / share - 1).max()",
            "Nobody waits for an expert that has little to do. MaxVio looks at the "
            "fullest only.",
        ),
        Wrong(
            "MaxVio as a number of tokens",
            "counts.max() / share - 1",
            "counts.max() - share",
            "It is relative to the share, so that batches of all sizes compare.",
        ),
        Wrong(
            "the last ones not counted",
            ", minlength=len(b)",
            "",
            "`np.bincount` ends with the highest index that occurs. With "
            "`minlength` it counts the idle experts behind it too.",
        ),
        Wrong(
            "the share rounded down",
            "counts.mean()",
            "counts.sum() // len(b)",
            "N K / E need not be a whole number. Rounded down, it leaves an expert "
            "alone that is just below the mean.",
        ),
    ),
    right=(
        "def update_bias(b, experts, gamma):\n"
        "    E = len(b)\n"
        "    c = (experts[..., None] == np.arange(E)).sum((0, 1))\n"
        "    mean = experts.size / E\n"
        "    new = b.copy()\n"
        "    new[c > mean] -= gamma\n"
        "    new[c < mean] += gamma\n"
        "    return new, (c.max() - mean) / mean\n",
        "def update_bias(b, experts, gamma):\n"
        "    load = [0] * len(b)\n"
        "    for row in experts:\n"
        "        for i in row:\n"
        "            load[i] += 1\n"
        "    mean = sum(load) / len(load)\n"
        "    step = [(x < mean) - (x > mean) for x in load]\n"
        "    new = (b + gamma * np.array(step)).astype(np.float32)\n"
        "    return [new, np.float32(max(load) / mean - 1)]\n",
    ),
)

CHECKS = [UPDATE]
