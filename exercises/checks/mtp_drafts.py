"""Chapter 2, drafts: whether one is kept, and what that is worth."""

from collections.abc import Callable

import numpy as np
from grader.spec import Case, Check, Wrong

from checks.draws import rng


def law(*shape: int, seed: int, sharp: float = 1.5) -> np.ndarray:
    """Random laws over the last axis."""
    e = np.exp(rng(seed).normal(0, sharp, shape))
    return e / e.sum(axis=-1, keepdims=True)


def cut(p: np.ndarray, *, to: int) -> np.ndarray:
    """A law as top-p leaves it: the most probable tokens, and zeros."""
    kept = np.where(p >= np.sort(p)[-to], p, 0.0)
    return kept / kept.sum()


def sure(V: int, token: int) -> np.ndarray:
    """The greedy law: one possible token."""
    return np.eye(V)[token]


def verdict_as_number(function: Callable, *args: object) -> object:
    """A truth value becomes 0 or 1, so that it can be compared as numbers are."""
    value = function(*args)
    if not (isinstance(value, tuple | list) and len(value) == 2):
        return value
    kept = value[0]
    if np.ndim(kept) == 0 and np.asarray(kept).dtype.kind == "b":
        kept = int(kept)
    return kept, value[1]


VERDICT = Check(
    "mtp.5",
    returns=("kept", "law"),
    call=verdict_as_number,
    cases=lambda: [
        Case(
            "a draft that q likes better than p",
            (
                np.array([0.4, 0.1, 0.3, 0.2]),
                np.array([0.1, 0.5, 0.1, 0.3]),
                1,
                0.5,
            ),
        ),
        Case(
            "the same laws, another draft",
            (
                np.array([0.4, 0.1, 0.3, 0.2]),
                np.array([0.1, 0.5, 0.1, 0.3]),
                3,
                0.5,
            ),
        ),
        Case("p likes it better, u near 1", (law(5, seed=1), law(5, seed=2), 2, 0.99)),
        Case("p and q agree", (law(4, seed=3), law(4, seed=3), 0, 0.7)),
        Case(
            "p's favourite, and q's even more",
            (np.array([0.2, 0.45, 0.35]), np.array([0.1, 0.8, 0.1]), 1, 0.6),
        ),
        Case("greedy, and they agree", (sure(5, 3), sure(5, 3), 3, 0.9)),
        Case("greedy, and they do not", (sure(5, 1), sure(5, 3), 3, 0.2)),
        Case("a sure draft, p unsure", (law(4, seed=4), sure(4, 2), 2, 0.5)),
        Case(
            "p never says it, u is 0",
            (cut(law(6, seed=5), to=3), law(6, seed=6), 0, 0.0),
        ),
        Case(
            "both laws cut to a few tokens",
            (cut(law(9, seed=7), to=4), cut(law(9, seed=8), to=5), 1, 0.3),
        ),
        Case("kept by a little", (np.array([0.3, 0.7]), np.array([0.5, 0.5]), 0, 0.59)),
        Case(
            "refused by a little", (np.array([0.3, 0.7]), np.array([0.5, 0.5]), 0, 0.61)
        ),
    ],
    hints=(
        "Draw p and q as bars on top of each other. The overlap is what drafts may "
        "bring. What of p is still missing? That, and nothing else, is made up for.",
        "`np.maximum(p - q, 0)` is (V,). It has to be divided by its sum, unless that "
        "is 0. The verdict is one comparison, and multiplied by q[d] it needs no "
        "division.",
        "`kept = u * q[d] < p[d]`; `beyond = np.maximum(p - q, 0.0)`; the law is "
        "`beyond / beyond.sum()` if `beyond.any()`, else `p`.",
    ),
    wrong=(
        Wrong(
            "after a refusal, drawn from p",
            "beyond / beyond.sum() if beyond.any() else p",
            "p",
            "What p and q both like had its chance as a draft; drawn from p it comes "
            "out too often. Draw from what p has beyond q.",
        ),
        Wrong(
            "the residual not normalised",
            "beyond / beyond.sum() if",
            "beyond if",
            "A law sums to one. What is left of p sums to the share of drafts that is "
            "refused.",
        ),
        Wrong(
            "the draft struck out of p",
            "np.maximum(p - q, 0.0)",
            "np.where(np.arange(len(p)) == d, 0.0, p)",
            "That is right only if q was sure of d. Else other drafts, too, have had "
            "their chance: take all of q away from p.",
        ),
        Wrong(
            "what q has beyond p",
            "np.maximum(p - q, 0.0)",
            "np.maximum(q - p, 0.0)",
            "That is what is refused. Made up for is what p has beyond q.",
        ),
        Wrong(
            "the difference without its sign",
            "np.maximum(p - q, 0.0)",
            "np.abs(p - q)",
            "Where q is above p, enough was drafted already: the residual is 0 there.",
        ),
        Wrong(
            "kept with probability p",
            "u * q[d] < p[d]",
            "u < p[d]",
            "q proposes d only with probability q_d. Kept with probability p_d, it "
            "would come out with the product of both.",
        ),
        Wrong(
            "p and q exchanged in the verdict",
            "u * q[d] < p[d]",
            "u * p[d] < q[d]",
            "The ratio is p over q: what the trunk likes better than the module is "
            "always kept.",
        ),
        Wrong(
            "kept only if p likes it at least as well",
            "u * q[d] < p[d]",
            "q[d] <= p[d]",
            "A draft that q likes twice as well as p is kept every other time: that is "
            "what u is for.",
        ),
        Wrong(
            "kept if it is p's favourite",
            "u * q[d] < p[d]",
            "d == p.argmax()",
            "That is the rule for greedy laws. Where tokens are drawn, compare u with "
            "p_d / q_d.",
        ),
        Wrong(
            "kept where u is above",
            "u * q[d] < p[d]",
            "u * q[d] > p[d]",
            "A uniform number is below r with probability r. The better p likes the "
            "draft, the easier it is kept.",
        ),
        Wrong(
            "0/0 where p and q agree",
            "beyond / beyond.sum() if beyond.any() else p",
            "beyond / beyond.sum()",
            "Where nothing remains there is nothing to normalise. No draft is refused "
            "there; return p.",
        ),
    ),
    right=(
        "def verdict(p, q, d, u):\n"
        "    left = p - np.minimum(p, q)\n"
        "    total = left.sum()\n"
        "    return u < p[d] / q[d], left / total if total > 0 else p.copy()\n",
        "def verdict(p, q, d, u):\n"
        "    left = [max(float(a) - float(b), 0.0) for a, b in zip(p, q)]\n"
        "    if sum(left) == 0:\n"
        "        left = p\n"
        "    kept = bool(u < min(1.0, p[d] / q[d]))\n"
        "    return kept, (np.array(left) / sum(left)).astype(np.float32)\n",
    ),
)

SPEED_UP = Check(
    "mtp.6",
    returns=("a", "gain"),
    cases=lambda: [
        Case(
            "two places, a draft for half a pass",
            (
                np.array([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]]),
                np.array([[0.8, 0.0, 0.2], [0.3, 0.1, 0.6]]),
                0.5,
            ),
        ),
        Case(
            "seven places, 1/61 of a pass",
            (law(7, 5, seed=1), law(7, 5, seed=2), 1 / 61),
        ),
        Case(
            "one place, drafts for nothing", (law(1, 9, seed=3), law(1, 9, seed=4), 0.0)
        ),
        Case("the same laws", (law(3, 4, seed=5), law(3, 4, seed=5), 0.25)),
        Case(
            "greedy: right twice of three times, and dear",
            (np.eye(4)[[0, 1, 2]], np.eye(4)[[0, 1, 3]], 1.5),
        ),
    ],
    hints=(
        "q times the smaller of 1 and p/q: multiply it out for p above q, then for p "
        "below q. What is it in both cases?",
        "`np.minimum(p, q)` is (N, V). Its sum over the tokens is the chance at one "
        "place, (N,); their mean is a.",
        "`a = np.minimum(p, q).sum(axis=-1).mean()`. A round yields `1 + a` tokens and "
        "takes as long as `1 + c` passes.",
    ),
    wrong=(
        Wrong(
            "the chance that two draws agree",
            "np.minimum(p, q)",
            "(p * q)",
            "A draft is not held against a second draw of the trunk's. It is kept with "
            "min(1, p/q): much more often.",
        ),
        Wrong(
            "the overlap of the mean laws",
            "np.minimum(p, q).sum(axis=-1).mean()",
            "np.minimum(p.mean(axis=0), q.mean(axis=0)).sum()",
            "Two laws may agree on average and at no single place. Take the overlap at "
            "each place, then the mean.",
        ),
        Wrong(
            "how often both have the same favourite",
            "np.minimum(p, q).sum(axis=-1).mean()",
            "(p.argmax(axis=-1) == q.argmax(axis=-1)).mean()",
            "That is the greedy case. When tokens are drawn, more than the favourites "
            "count.",
        ),
        Wrong(
            "the whole difference instead of half of it",
            "np.minimum(p, q).sum(axis=-1).mean()",
            "1 - np.abs(p - q).sum(axis=-1).mean()",
            "What p has too much, q has too little: the sum of |p - q| has it twice.",
        ),
        Wrong(
            "the mean over the tokens too",
            ".sum(axis=-1).mean()",
            ".mean()",
            "Over the tokens of one place it is a sum, the mass that both laws share.",
        ),
        Wrong(
            "drafts without end",
            "(1 + a) / (1 + c)",
            "1 / (1 - a) / (1 + c)",
            "1 + a + a^2 + ... is for a module that drafts on and on. This one drafts "
            "one token a pass.",
        ),
        Wrong(
            "only kept drafts are paid for",
            "(1 + a) / (1 + c)",
            "(1 + a) / (1 + a * c)",
            "A refused draft has cost as much as a kept one.",
        ),
        Wrong(
            "a pass over two tokens paid twice",
            "(1 + a) / (1 + c)",
            "(1 + a) / (2 + c)",
            "The weights are read once for both tokens; that is where the time goes.",
        ),
        Wrong(
            "the cost subtracted",
            "(1 + a) / (1 + c)",
            "1 + a - c",
            "A round yields 1 + a tokens in 1 + c passes: speed is the quotient.",
        ),
    ),
    right=(
        "def speed_up(p, q, c):\n"
        "    a = 1 - 0.5 * np.abs(p - q).sum(-1).mean()\n"
        "    return float(a), float(a + 1) / (c + 1)\n",
        "def speed_up(p, q, c):\n"
        "    kept = 0.0\n"
        "    for row, other in zip(p, q):\n"
        "        for x, y in zip(row, other):\n"
        "            kept += y * min(1, x / y) if y > 0 else 0\n"
        "    a = np.float32(kept / len(p))\n"
        "    return [a, 1 / (1 + c) + a / (1 + c)]\n",
    ),
)

CHECKS = [VERDICT, SPEED_UP]
