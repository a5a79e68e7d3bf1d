"""Chapter 9, a cache that texts of different lengths share: what may be seen."""

from collections.abc import Callable

import numpy as np
from grader.compare import WrongForm
from grader.spec import Case, Check, Wrong


def mask_as_numbers(function: Callable, *args: object) -> object:
    """Truth values become 0 and 1, to be compared as numbers are. Raises WrongForm."""
    mask = function(*args)
    if not isinstance(mask, np.ndarray):
        return mask
    if mask.dtype.kind != "b":
        raise WrongForm(
            f"The mask is {mask.dtype}. Return truth values, so that `~mask` and "
            "`scores[mask]` mean what they say."
        )
    return mask.astype(int)


def row(*lengths: int, T: int, S: int) -> Case:
    """Texts of these lengths."""
    label = f"lengths {', '.join(map(str, lengths))}; {T} new each, {S} places"
    return Case(label, (np.array(lengths), T, S))


PLACE = "lengths[:, None] + np.arange(T)"
LOOK = "np.arange(S) <= place[:, :, None]"

VISIBLE = Check(
    "gen.2",
    returns=("mask",),
    call=mask_as_numbers,
    cases=lambda: [
        row(1, 3, T=2, S=6),
        row(4, 0, 2, 7, T=2, S=12),
        row(5, 2, T=1, S=6),
        row(0, 0, T=3, S=5),
        row(3, 6, 1, T=4, S=10),
        row(2, T=3, S=5),
        row(6, T=2, S=11),
        row(3, 3, 3, 3, 3, T=2, S=7),
        row(0, 9, T=1, S=10),
    ],
    hints=(
        "A new token stands at a place of its own, and sees no place behind that. "
        "Which place is it? What lies behind the newest token then needs no word more.",
        "`lengths[:, None] + np.arange(T)` is (B, T): the place of each new token. "
        "Compare it with `np.arange(S)`, along an axis of its own.",
        "`place = lengths[:, None] + np.arange(T)`, and `np.arange(S) <= "
        "place[:, :, None]` is (B, T, S).",
    ),
    wrong=(
        Wrong(
            "the longest text's length for all",
            PLACE,
            "np.full((len(lengths), 1), lengths.max()) + np.arange(T)",
            "Where a text is shorter, its row holds rubbish up to there. Each row ends "
            "at its own length.",
        ),
        Wrong(
            "the shortest text's length for all",
            PLACE,
            "np.full((len(lengths), 1), lengths.min()) + np.arange(T)",
            "Then longer texts lose their last tokens, and their new tokens do not see "
            "themselves. Each row ends at its own length.",
        ),
        Wrong(
            "a token that does not see itself",
            LOOK,
            "np.arange(S) < place[:, :, None]",
            "A token reads its own key and value too, from the place where they were "
            "just written: <=.",
        ),
        Wrong(
            "one place too far",
            LOOK,
            "np.arange(S) <= place[:, :, None] + 1",
            "New token t stands at lengths + t. The place behind it is the future, or "
            "rubbish.",
        ),
        Wrong(
            "the new tokens see each other",
            PLACE,
            "lengths[:, None] + T - 1 + 0 * np.arange(T)",
            "The first of the new ones must not see the second: it would read the "
            "draft that it is to judge.",
        ),
        Wrong(
            "everything up to the newest token of the batch",
            PLACE,
            "lengths.max() + T - 1 + np.zeros((len(lengths), T), int)",
            "That is as far as anything was written. Each row ends at its own length, "
            "and each new token sees none behind it.",
        ),
        Wrong(
            "the whole cache",
            LOOK,
            "np.arange(S) <= S + place[:, :, None]",
            "Behind the newest token lies rubbish with a score like all the others. "
            "Only a mask keeps it from being read.",
        ),
        Wrong(
            "as if the texts filled the cache",
            PLACE,
            "S - T + np.arange(T) + 0 * lengths[:, None]",
            "`tril(S - T)` puts the new tokens in the last places. Here they stand "
            "behind what each row has kept; the room behind is not used yet.",
        ),
        Wrong(
            "as if nothing had been kept",
            PLACE,
            "np.arange(T) + 0 * lengths[:, None]",
            "That is the mask of a prompt. New token 0 stands at place lengths[b], "
            "behind all that was kept.",
        ),
        Wrong(
            "only what was kept",
            LOOK,
            "(np.arange(S) < lengths[:, None, None]) & (place[:, :, None] >= 0)",
            "The new tokens count too: each sees those before it, and itself.",
        ),
        Wrong(
            "only the new ones",
            LOOK,
            "(np.arange(S) <= place[:, :, None]) "
            "& (np.arange(S) >= lengths[:, None, None])",
            "What was kept is what the cache is for: the places from 0 on are seen.",
        ),
        Wrong(
            "what was kept, and itself",
            LOOK,
            "(np.arange(S) < lengths[:, None, None]) "
            "| (np.arange(S) == place[:, :, None])",
            "A new token sees the new ones before it as well.",
        ),
        Wrong(
            "True where it must not look",
            LOOK,
            "np.arange(S) > place[:, :, None]",
            "That is what is masked out. `True` is asked for where a token may look.",
        ),
        Wrong(
            "texts pushed to the right",
            LOOK,
            "(np.arange(S) <= lengths.max() + np.arange(T)[:, None]) "
            "& (np.arange(S) >= (lengths.max() - lengths)[:, None, None])",
            "So a batch is padded on the left, to end at the same place. Here each row "
            "begins at place 0 and ends where it ends.",
        ),
        Wrong(
            "the first text's mask for all",
            PLACE,
            "lengths[:1, None] + np.arange(T) + 0 * lengths[:, None]",
            "Every row has a length of its own.",
        ),
        Wrong(
            "one mask, without the rows",
            LOOK,
            "np.arange(S) <= place[0, :, None]",
            "(T, S) is enough while all texts are equally long. Here every row has its "
            "own: (B, T, S).",
        ),
        Wrong(
            "places and tokens exchanged",
            LOOK,
            "np.arange(S)[:, None] <= place[:, None]",
            "The new tokens are the middle axis, the places that they look at the "
            "last: (B, T, S).",
        ),
    ),
    right=(
        "def visible(lengths, T, S):\n"
        "    mask = np.zeros((len(lengths), T, S), dtype=bool)\n"
        "    for b, n in enumerate(lengths):\n"
        "        for t in range(T):\n"
        "            mask[b, t, : n + t + 1] = True\n"
        "    return mask\n",
        "def visible(lengths, T, S):\n"
        "    whole = np.tril(np.ones((S, S), bool))\n"
        "    return np.stack([whole[n : n + T] for n in lengths.tolist()])\n",
        "def visible(lengths, T, S):\n"
        "    b, t, s = np.indices((len(lengths), T, S), sparse=True)\n"
        "    return ~(s - t > lengths[b])\n",
    ),
)

CHECKS = [VISIBLE]
