"""The drawing of a batch whose rows have lengths of their own: replayed, cell by cell.

The root of the drawing has the texts, the drafts and the verdicts; a prefill of padded
prompts, one pass and its verdict are done here on an array, and every cell, edge, arrow
and number must be what comes out. `test_port_drawings` looks at colours and letters.
"""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from minidsv3.primitives.cache import Cache

STATIC = Path(__file__).parents[1] / "book" / "_static"
DRAWING = ET.parse(STATIC / "ragged_cache.svg").getroot()
TEXTS, DRAFTS = (DRAWING.attrib[f"data-{its}"].split() for its in ("texts", "drafts"))
ACCEPTED = list(map(int, DRAWING.attrib["data-accepted"].split()))
S, PADDED = (int(DRAWING.attrib[f"data-{its}"]) for its in ("cells", "padded"))
B, BEFORE = len(TEXTS), [len(text) - 1 for text in TEXTS]  # the last is not read yet
AFTER = [n + 1 + kept for n, kept in zip(BEFORE, ACCEPTED, strict=True)]
LEFT, WIDTH = 30, 25  # of cell 0; of a cell


def elements(what: str) -> list[tuple[ET.Element, str]]:
    found = [(e, e.get(f"data-{what}")) for e in DRAWING.iter()]
    return [(e, value) for e, value in found if value is not None]


def places(element: ET.Element) -> list[float]:
    """The x of a path's corners, in cells from the left."""
    xs = re.findall(r"[MH]([\d.]+)", element.attrib["d"])
    return [(float(x) - LEFT) / WIDTH for x in xs]


def replay() -> tuple[np.ndarray, np.ndarray]:
    """What each cell is during the pass and after the verdict, (B, S) words."""
    written = np.full((B, S), "blank", dtype="<U8")
    written[:, :PADDED] = "rubbish"  # prompts as long as the longest, pads and all
    for b, n in enumerate(BEFORE):
        written[b, :n] = "kept"
        written[b, n : n + 2] = "last", "draft"
    after = written.copy()
    for b, n in enumerate(AFTER):
        after[b, after[b] == "draft"] = "refused"
        after[b, :n] = "kept"
    return written, after


def test_the_state_is_one_after_a_padded_prefill() -> None:
    assert max(BEFORE) == PADDED and min(BEFORE) < PADDED - 2
    assert set(ACCEPTED) == {0, 1} and max(AFTER) + 2 == S
    cache = Cache(S)  # the array of the library: it has room for the next pass too
    cache.extend(np.zeros((B, max(AFTER) + 2, 1)))
    assert cache.length == S


@pytest.mark.parametrize("when", ["pass", "after"])
def test_every_cell_is_what_it_is(when: str) -> None:
    true = replay()[when == "after"]
    drawn = np.full((B, S), "", dtype="<U8")
    order = list(DRAWING.iter())
    for cell, value in elements(when):
        b, s, kind = value.split()
        assert not drawn[int(b), int(s)]
        drawn[int(b), int(s)] = kind
        assert float(cell.attrib["x"]) == pytest.approx(LEFT + int(s) * WIDTH + 1.5)
        letters = TEXTS[int(b)] + DRAFTS[int(b)]
        if kind not in ("rubbish", "blank"):
            after = order[order.index(cell) + 1 :]
            text = next(e for e in after if e.tag.endswith("text"))
            assert "".join(text.itertext()) == letters[int(s)]
    assert drawn.tolist() == true.tolist()


@pytest.mark.parametrize(
    ("when", "ends"), [("pass", [n + 2 for n in BEFORE]), ("after", AFTER)]
)
def test_what_is_seen_ends_at_the_edge(when: str, ends: list[int]) -> None:
    ((edge, _),) = [pair for pair in elements("edges") if pair[1] == when]
    assert places(edge) == ends
    kinds = replay()[when == "after"]
    for b, n in enumerate(ends):  # nothing that is not to be seen lies left of it
        assert not set(kinds[b, :n]) & {"rubbish", "refused", "blank"}
        assert not set(kinds[b, n:]) & {"kept", "last", "draft"}


def test_arrows_lead_to_where_the_next_pass_writes() -> None:
    arrows = {int(b): places(e) for e, b in elements("arrow")}
    nexts = {int(b): places(e) for e, b in elements("next")}
    assert arrows.keys() == nexts.keys() == set(range(B))
    for b in range(B):
        assert arrows[b] == pytest.approx([BEFORE[b], AFTER[b]], abs=0.3)
        assert nexts[b] == pytest.approx([AFTER[b], AFTER[b] + 2], abs=0.2)
        if not ACCEPTED[b]:
            assert replay()[1][b, AFTER[b]] == "refused"  # written over next


def test_numbers_add_up() -> None:
    true = {
        "row-name": list(range(B)) * 2,
        "cell-name": list(range(S)) * 2,
        "kept": BEFORE * 2,
        "gain": [1 + kept for kept in ACCEPTED],
        "new": AFTER,
    }
    for what, wanted in true.items():
        assert [int("".join(e.itertext())) for e, _ in elements(what)] == wanted
