"""Chapter 9, a round of drafts in a batch whose rows advance on their own."""

from collections.abc import Callable

import numpy as np
from grader.compare import WrongForm
from grader.spec import Case, Check, Wrong

from checks.draws import normal, rng

NAMES = ("settled", "lengths", "row", "states", "tokens")


def as_arrays(function: Callable, *args: object) -> object:
    """Lists become arrays; ids, lengths and rows are whole numbers, or WrongForm."""
    value = function(*args)
    if not isinstance(value, tuple | list) or len(value) != len(NAMES):
        return value
    arrays = []
    for name, one in zip(NAMES, value, strict=True):
        try:
            array = np.array(one) if isinstance(one, list | tuple) else one
        except ValueError:
            raise WrongForm(f"The rows of `{name}` are not equally long.") from None
        arrays.append(array)
        kind = getattr(getattr(array, "dtype", None), "kind", "")
        if name != "states" and kind in ("f", "b"):
            raise WrongForm(
                f"`{name}` holds {array.dtype}; whole numbers belong there."
            )
    return tuple(arrays)


def batch(kept: str, D: int, seed: int, V: int = 6) -> Case:
    """Rows with a draft kept (k), refused (r), or refused and right for the place
    behind it (b).
    """
    draws, B = rng(seed), len(kept)
    best = draws.integers(0, V, (B, 2))
    best[:, 1] = (best[:, 0] + draws.integers(1, V, B)) % V
    other = (best[:, 0] + draws.integers(1, V, B)) % V
    kinds = np.array([*kept])
    draft = np.select([kinds == "k", kinds == "b"], [best[:, 0], best[:, 1]], other)
    lengths = draws.integers(0, 40, B)
    words = {"k": "kept", "r": "refused", "b": "refused"}
    label = f"drafts {', '.join(words[k] for k in kept)}"
    return Case(label, (draft, best, normal(B, 2, D, seed=seed + 50), lengths))


KEPT = "draft == best[:, 0]"
SETTLED = "np.stack([best[:, 0], np.where(kept, best[:, 1], -1)], axis=1)"
PAIRS = "np.nonzero(settled >= 0)"
LENGTHS = "lengths + 1 + kept"
STATES = "h[row, which]"
TOKENS = "settled[row, which]"

SETTLE = Check(
    "gen.3",
    returns=NAMES,
    call=as_arrays,
    cases=lambda: [
        Case(
            "the first row's draft kept, the second's refused",
            (
                np.array([7, 4]),
                np.array([[7, 5], [3, 9]]),
                np.array([[[0.1], [0.2]], [[0.3], [0.4]]]),
                np.array([6, 2]),
            ),
        ),
        batch("rkkrk", D=3, seed=1),
        batch("kkk", D=2, seed=2),
        batch("rrrr", D=4, seed=3),
        batch("bkbrkkb", D=3, seed=4),
        batch("k", D=5, seed=5),
        batch("b", D=1, seed=6),
        Case(
            "ids that are 0, and texts that begin",
            (
                np.array([0, 1, 0, 2]),
                np.array([[0, 0], [0, 1], [2, 0], [2, 0]]),
                normal(4, 2, 3, seed=7),
                np.array([0, 0, 5, 1]),
            ),
        ),
    ],
    hints=(
        "If d is kept, it *is* the trunk's favourite after x_n. So what is the first "
        "settled token of a row, either way? Then count: afterwards both caches hold "
        "everything settled but the last token.",
        "`kept = draft == best[:, 0]` is (B,). Where it is False, the second token is "
        "-1: `np.where`. `np.nonzero` of a (B, 2) array of truth values lists its True "
        "places row by row: whose pair it is, and which of the row's two.",
        "`settled = np.stack([best[:, 0], np.where(kept, best[:, 1], -1)], axis=1)`, "
        "`row, which = np.nonzero(settled >= 0)`; then `lengths + 1 + kept`, `row`, "
        "`h[row, which]` and `settled[row, which]`.",
    ),
    wrong=(
        Wrong(
            "one refusal refuses for all",
            KEPT,
            "np.full(len(draft), (draft == best[:, 0]).all())",
            "So it is where rows share one length. Here each has its own, and a draft "
            "of one row says nothing about another.",
        ),
        Wrong(
            "one kept draft keeps all",
            KEPT,
            "np.full(len(draft), (draft == best[:, 0]).any())",
            "Each row's draft is judged by that row's favourite alone.",
        ),
        Wrong(
            "the draft held against the favourite behind it",
            KEPT,
            "draft == best[:, 1]",
            "d stands in the place after x_n, and best[:, 0] is about that place. "
            "best[:, 1] is about the next one.",
        ),
        Wrong(
            "kept if it is one of the two favourites",
            KEPT,
            "(draft[:, None] == best).any(axis=1)",
            "best[:, 1] is about the place behind d. Only best[:, 0] judges it.",
        ),
        Wrong(
            "a refused draft settled all the same",
            SETTLED,
            "np.stack([draft, np.where(kept, best[:, 1], -1)], axis=1)",
            "Where the draft is wrong the trunk's own favourite stands in its place: "
            "the text is the trunk's, whatever the module thinks.",
        ),
        Wrong(
            "the favourite behind a refused draft settled",
            SETTLED,
            "best.copy()",
            "It was computed behind a token that is not in the text. After a refusal "
            "there is one token.",
        ),
        Wrong(
            "every draft taken for kept",
            KEPT,
            "np.ones(len(draft), bool)",
            "Compare it with the trunk's favourite after x_n, row by row.",
        ),
        Wrong(
            "a kept draft brings no second token",
            SETTLED,
            "np.stack([best[:, 0], np.full(len(draft), -1)], axis=1)",
            "The trunk has read d, and best[:, 1] is what it says behind it. That "
            "second token is the whole gain.",
            ((LENGTHS, "lengths + 1 + 0 * kept"),),
        ),
        Wrong(
            "a kept draft settled alone, and left in the cache",
            SETTLED,
            "np.stack([best[:, 0], np.full(len(draft), -1)], axis=1)",
            "The trunk has read d, and best[:, 1] is what it says behind it. That "
            "second token is the whole gain.",
        ),
        Wrong(
            "a refused draft left in the cache",
            LENGTHS,
            "lengths + 2 + 0 * kept",
            "The pass wrote both, x_n and d. Where d was refused the cache keeps one "
            "of them, or the next pass attends to a token that is not in the text.",
        ),
        Wrong(
            "a kept draft forgotten by the cache",
            LENGTHS,
            "lengths + 1 + 0 * kept",
            "A kept draft has been read: its place in the cache is good, and the next "
            "pass begins behind it.",
        ),
        Wrong(
            "x_n forgotten by the cache",
            LENGTHS,
            "lengths + kept",
            "x_n was read in this pass, whatever became of d: lengths + 1 at the "
            "least.",
        ),
        Wrong(
            "x_n forgotten together with a refused draft",
            LENGTHS,
            "lengths + 2 * kept",
            "Only d has to go. x_n is settled, and it has been read.",
        ),
        Wrong(
            "the last settled token counted as read",
            LENGTHS,
            "lengths + 2 + kept",
            "The newest token has only been chosen. It is read in the next pass, and "
            "so far no cache holds it.",
        ),
        Wrong(
            "caches cropped alike in all rows",
            LENGTHS,
            "lengths + 1 + kept.all()",
            "The rows advance on their own: a row whose draft was kept keeps one place "
            "more.",
        ),
        Wrong(
            "the module fed with the newest pair alone",
            PAIRS,
            "np.arange(len(draft)), kept.astype(int)",
            "It wants every settled pair once, in order. After a kept draft there are "
            "two; a gap stays in its cache for ever.",
        ),
        Wrong(
            "the module fed with the first pair alone",
            PAIRS,
            "np.arange(len(draft)), np.zeros(len(draft), int)",
            "After a kept draft there are two: h_n with d, and h_(n+1) with the token "
            "behind it.",
        ),
        Wrong(
            "two pairs of every row",
            PAIRS,
            "np.nonzero(settled >= -1)",
            "After a refusal there is one settled token and so one pair. -1 is no "
            "token.",
        ),
        Wrong(
            "nothing fed after a refusal",
            PAIRS,
            "np.nonzero((settled >= 0) & kept[:, None])",
            "The trunk's own token is settled like any other: the module reads it, "
            "next to h_n.",
        ),
        Wrong(
            "the state of a refused draft",
            STATES,
            "h[row, which | ~kept[row]]",
            "h_(n+1) has read the draft that fell. The token that replaced it stands "
            "behind x_n, and goes with h_n.",
        ),
        Wrong(
            "h_n twice",
            STATES,
            "h[row, 0 * which]",
            "The token behind a kept draft goes with the state that has read the "
            "draft, h_(n+1).",
        ),
        Wrong(
            "the module told the draft instead of what was settled",
            TOKENS,
            "np.where(which == 0, draft[row], settled[row, which])",
            "It must never read a draft that fell: it forgets nothing. The pair's "
            "token is the settled one.",
        ),
        Wrong(
            "all first pairs, then all second",
            PAIRS,
            "np.nonzero((settled >= 0).T)[::-1]",
            "One row's pairs stand together, in order: the last of them is that "
            "which drafts.",
        ),
        Wrong(
            "id 0 taken for no token",
            PAIRS,
            "np.nonzero(settled > 0)",
            "Ids begin with 0. What is no token is -1.",
        ),
        Wrong(
            "0 where there is no second",
            SETTLED,
            "np.stack([best[:, 0], np.where(kept, best[:, 1], 0)], axis=1)",
            "0 is a token. Where there is none, -1 is asked for.",
            ((PAIRS, "np.nonzero(np.stack([kept | True, kept], axis=1))"),),
        ),
    ),
    right=(
        "def settle(draft, best, h, lengths):\n"
        "    settled, after, row, states, tokens = [], [], [], [], []\n"
        "    for b, d in enumerate(draft):\n"
        "        new = [d, best[b, 1]] if d == best[b, 0] else [best[b, 0]]\n"
        "        settled.append(new + [-1] * (2 - len(new)))\n"
        "        after.append(lengths[b] + len(new))\n"
        "        for state, token in zip(h[b], new):\n"
        "            row.append(b)\n"
        "            states.append(state)\n"
        "            tokens.append(token)\n"
        "    states = np.array(states)\n"
        "    return np.array(settled), np.array(after), row, states, tokens\n",
        "def settle(draft, best, h, lengths):\n"
        "    B, _, D = h.shape\n"
        "    settled = best.copy()\n"
        "    settled[best[:, 0] != draft, 1] = -1\n"
        "    pairs = (settled != -1).ravel()\n"
        "    after = lengths + pairs.reshape(B, 2).sum(axis=1)\n"
        "    row = np.repeat(np.arange(B), 2)[pairs]\n"
        "    flat = h.astype(np.float32).reshape(2 * B, D)\n"
        "    return [settled, after, row, flat[pairs], settled.ravel()[pairs]]\n",
        "def settle(draft, best, h, lengths):\n"
        "    wrong = np.flatnonzero(draft - best[:, 0])\n"
        "    both = np.arange(2 * len(draft))\n"
        "    left = np.delete(both, 2 * wrong + 1)\n"
        "    row, which = np.divmod(left, 2)\n"
        "    settled = np.full(best.shape, -1)\n"
        "    settled[row, which] = best[row, which]\n"
        "    end = lengths + np.bincount(row, minlength=len(draft))\n"
        "    return settled, end, row, h[row, which], best[row, which]\n",
    ),
)

CHECKS = [SETTLE]
