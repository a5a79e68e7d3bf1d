"""The maps of the mini model: every number in them is MINI's, every bar to scale.

The drawings say of each number where it comes from: ``data-shape`` names a parameter,
``data-expert`` one of the stacked ones, ``data-config`` fields of the config,
``data-count`` a prefix of parameters' names, ``data-block`` a block, ``data-place`` a
token's place. A number that says nothing fails.
"""

import math
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from minidsv3 import parameters
from minidsv3.config import MINI

STATIC = Path(__file__).parents[1] / "book" / "_static"
SHAPES = parameters.shapes(MINI)
SCALE = 0.7  # of the bars in mini_block.svg, per number
MAP = ET.parse(STATIC / "mini_map.svg").getroot()
BLOCK = ET.parse(STATIC / "mini_block.svg").getroot()
both = pytest.mark.parametrize("drawing", [MAP, BLOCK], ids=["map", "block"])


def numbers(element: ET.Element) -> list[float]:
    text = "".join(element.itertext()).replace(",", "")
    return [float(n) for n in re.findall(r"\d+(?:\.\d+)?", text)]


def fields(names: str) -> list[int]:
    return [getattr(MINI, name) for name in names.split()]


def joined(names: str) -> list[int]:
    depth, width = fields(names)
    return [depth, 2 * width]


def count(prefix: str) -> list[int]:
    return [sum(math.prod(s) for n, s in SHAPES.items() if n.startswith(prefix))]


def apart(text: str) -> list[float]:
    return [float(n) for n in text.replace(",", "").split()]


SAYS = {
    "data-shape": lambda name: list(SHAPES[name]),
    "data-expert": lambda name: list(SHAPES[name][1:]),
    "data-config": fields,
    "data-joined": joined,
    "data-count": count,
    "data-block": apart,
}


def undeclared(element: ET.Element) -> Iterator[str]:
    """The text of an element, without the parts that say where they come from."""
    if {*SAYS, "data-place"} & set(element.attrib):
        return
    yield element.text or ""
    for child in element:
        yield from undeclared(child)
        yield child.tail or ""


@both
def test_every_number_is_the_models(drawing: ET.Element) -> None:
    said = [
        (element, numbers(element), SAYS[key](value))
        for element in drawing.iter()
        for key, value in element.attrib.items()
        if key in SAYS
    ]
    assert len(said) > 25
    for element, drawn, true in said:
        assert drawn == true, ET.tostring(element, encoding="unicode")


@both
def test_no_number_hides(drawing: ET.Element) -> None:
    texts = drawing.findall(".//{*}text")
    assert len(texts) > 30
    for text in texts:
        assert not re.search(r"\d", "".join(undeclared(text)))


@both
def test_letters_stay_readable_on_a_phone(drawing: ET.Element) -> None:
    width = float(drawing.attrib["viewBox"].split()[2])
    sizes = [e.attrib["font-size"] for e in drawing.iter() if "font-size" in e.attrib]
    assert min(map(float, sizes)) * 360 / width >= 11


def test_the_map_has_every_block_once_and_its_parts() -> None:
    blocks = [
        int(e.attrib["data-block"]) for e in MAP.iter() if "data-block" in e.attrib
    ]
    total = MINI.num_hidden_layers + MINI.num_nextn_predict_layers
    assert sorted(blocks) == list(range(total))
    words = Counter("".join(text.itertext()) for text in MAP.findall(".//{*}text"))
    moe = sum(map(MINI.is_moe_layer, range(total)))
    assert words["MoE"] == moe and words["feed-forward"] == total - moe
    assert words["b ± γ"] == moe + 1  # and the legend
    assert words["32 + 16"] == total + 1
    drawn = {n for e in MAP.iter() for n in [e.attrib.get("data-count")] if n}
    assert drawn == {f"model.layers.{block}." for block in range(total)}


def test_vectors_are_drawn_to_scale() -> None:
    bars = [e.attrib for e in BLOCK.iter() if "data-long" in e.attrib]
    for bar in bars:
        true = SCALE * getattr(MINI, bar["data-long"])
        assert float(bar["width"]) == pytest.approx(true, abs=0.01)
    names = Counter(bar["data-long"] for bar in bars)
    assert names["qk_nope_head_dim"] == 2 * MINI.num_attention_heads  # q and k
    assert names["qk_rope_head_dim"] == MINI.num_attention_heads + 1  # k_R is shared


def test_the_router_opens_and_chooses_as_many_as_it_may() -> None:
    groups = [e.attrib for e in BLOCK.iter() if "data-group" in e.attrib]
    open_ = [g for g in groups if g["data-group"] == "open"]
    assert (len(groups), len(open_)) == (MINI.n_group, MINI.topk_group)
    chosen = [e.attrib for e in BLOCK.iter() if "data-chosen" in e.attrib]
    assert len(chosen) == MINI.num_experts_per_tok
    for tick in chosen:
        x = float(tick["x"]) + float(tick["width"]) / 2
        inside = [0 < x - float(g["x"]) < float(g["width"]) for g in open_]
        assert sum(inside) == 1
