"""Drawings: those of the PyTorch chapters one by one, and what all must be.

As in `test_mini_map`, the drawings say of each number and name where it comes from, and
a number that says nothing fails. Here `lay_out`, the tables of shapes and the code
itself are asked for the truth.
"""

import ast
import inspect
import math
import re
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minidsv3 import checkpoints, fp8, parameters
from minidsv3.config import MINI, V3
from minidsv3.moe import numpy_ref as moe_numpy
from minidsv3.moe import torch_port
from minidsv3.primitives import numpy_ref as primitives
from minidsv3.primitives import torch_port as torch_primitives

from . import figure_page

STATIC = Path(__file__).parents[1] / "book" / "_static"
NAMES = ("slabs", "port_map", "checkpoint_layout", "ragged_cache", "gpu_map",
         "coalescing")  # fmt: skip
DRAWINGS = [ET.parse(STATIC / f"{name}.svg").getroot() for name in NAMES]
SLABS, PORT, LAYOUT, *_ = DRAWINGS  # the others have files of their own
every = pytest.mark.parametrize("drawing", DRAWINGS, ids=NAMES)


def words(element: ET.Element) -> str:
    return "".join(element.itertext())


def numbers(element: ET.Element) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", words(element))]


def said(drawing: ET.Element, what: str) -> Iterator[tuple[ET.Element, str]]:
    """Elements with ``data-what``, and its value."""
    for element in drawing.iter():
        value = element.get(f"data-{what}")
        if value is not None:
            yield element, value


# --- all of them --------------------------------------------------------------------


def undeclared(element: ET.Element) -> Iterator[str]:
    if any(name.startswith("data-") for name in element.attrib):
        return
    yield element.text or ""
    for child in element:
        yield from undeclared(child)
        yield child.tail or ""


@every
def test_no_number_hides(drawing: ET.Element) -> None:
    texts = drawing.findall(".//{*}text")
    assert len(texts) > 15
    for text in texts:
        assert not re.search(r"\d", "".join(undeclared(text))), words(text)


@every
def test_letters_stay_readable_on_a_phone(drawing: ET.Element) -> None:
    width = float(drawing.attrib["viewBox"].split()[2])
    sizes = [e.attrib["font-size"] for e in drawing.iter() if "font-size" in e.attrib]
    assert min(map(float, sizes)) * 360 / width >= 11


@pytest.mark.parametrize("name", NAMES)
def test_every_colour_follows_the_theme(name: str) -> None:
    text = (STATIC / f"{name}.svg").read_text(encoding="utf-8")
    colours = re.findall(r'(?:fill|stroke)="([^"]+)"', text)
    assert all(c == "none" or c.startswith("var(--") for c in colours)
    css = (STATIC / "minidsv3.css").read_text(encoding="utf-8")
    assert all(f"{name}:" in css for name in re.findall(r"var\((--[\w-]+)", text))


@figure_page.needs_chromium
@pytest.mark.parametrize("name", NAMES)
def test_words_stay_inside_and_apart(name: str, tmp_path: Path) -> None:
    text = (STATIC / f"{name}.svg").read_text(encoding="utf-8")
    with figure_page.opened(tmp_path, [], text) as page:
        view, boxes = page.evaluate(
            """() => {
              const svg = document.querySelector("svg");
              return [svg.viewBox.baseVal.width, [...svg.querySelectorAll("text")].map(
                (one) => {
                  const { x, y, width, height } = one.getBBox();
                  return [x, y + height * 0.2, x + width, y + height * 0.8];
                })];
            }"""
        )
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert left >= 0 and right <= view
        for other in boxes[:i]:
            apart = right <= other[0] or other[2] <= left
            assert apart or bottom <= other[1] or other[3] <= top, (boxes[i], other)


# --- the slabs ----------------------------------------------------------------------


E, SLAB = 8, int(SLABS.attrib["data-slab"])
ROUTING = [
    [int(e) for e in pair.split()] for pair in SLABS.attrib["data-routing"].split(",")
]
LOADS = [sum(e in pair for pair in ROUTING) for e in range(E)]


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch_port.Layout]:
    """Where `lay_out` puts the drawing's pairs: in slabs of one, of SLAB, of all."""
    layouts = {}
    for way, size in (("one", 1), ("slabs", SLAB), ("all", E)):
        monkeypatch.setattr(torch_port, "SLAB", size)
        layouts[way] = torch_port.lay_out(torch.tensor(ROUTING), E)
    return layouts


def test_numbers_are_those_of_lay_out(ways: dict) -> None:
    layout, pairs = ways["slabs"], sum(LOADS)
    true = {
        "tokens": [len(ROUTING)],
        "K": [len(ROUTING[0])],
        "pairs": [pairs],
        "slab": [SLAB],
        "idle": layout.idle.tolist(),
    }
    for way, (slabs, _, token, _) in ways.items():
        true[f"products {way}"] = [len(slabs)]
        true[f"rows-of {way}"] = [len(token)]
        true[f"empty {way}"] = [len(token) - pairs]
    true |= {f"expert {e}": [e] for e in range(E)}
    true |= {f"load {e}": [n] for e, n in enumerate(LOADS)}
    busy = torch.cat([slab.experts for slab in layout.slabs]).tolist()
    true |= {f"rank {k}": [e] for k, e in enumerate(busy)}
    for j, slab in enumerate(layout.slabs):
        true[f"rows {j}"] = [slab.rows.start, slab.rows.stop - 1]
        true[f"batch {j}"] = [len(slab.experts), slab.height]
        true[f"matrices {j}"] = [len(slab.experts)]
    drawn = list(said(SLABS, "says"))
    for element, what in drawn:
        assert numbers(element) == true[what], what
    assert {what for _, what in drawn} == true.keys()


def test_the_idle_expert_gets_zeros(ways: dict) -> None:
    layout, ones = ways["slabs"], torch.ones(len(ways["slabs"].token), 1)
    dW = torch_port.grouped_dW(ones, ones, torch.ones(E, 1, 1), layout)
    zero = [e for e in range(E) if not dW[e].any()]
    assert [numbers(e) for e, what in said(SLABS, "says") if what == "idle"] == [zero]


def test_every_cell_of_the_slabs_is_a_row(ways: dict) -> None:
    layout = ways["slabs"]
    cells = {int(row): e for e, row in said(SLABS, "row")}
    assert sorted(cells) == list(range(len(layout.token)))
    taken = layout.place.flatten().tolist()
    for row, cell in cells.items():
        assert ("data-filler" in cell.attrib) == (row not in taken)
        if row in taken:
            assert int(cell.attrib["data-token"]) == layout.token[row]
    for slab in layout.slabs:  # a column an expert, in the order of the loads
        columns = {float(cells[r].attrib["x"]) for r in range(*slab.rows.indices(99))}
        assert len(columns) == len(slab.experts)
        for first in range(slab.rows.start, slab.rows.stop, slab.height):
            column = [cells[first + i].attrib["x"] for i in range(slab.height)]
            assert len(set(column)) == 1
    counted = [tuple(map(int, pair.split())) for _, pair in said(SLABS, "pair")]
    assert sorted(counted) == sorted(
        (t, e) for t, pair in enumerate(ROUTING) for e in pair
    )


def test_cells_bear_the_letters_of_their_tokens() -> None:
    elements = list(SLABS.iter())
    for cell, letter in zip(elements, elements[1:], strict=False):
        token = cell.get("data-token") or cell.get("data-pair") or cell.get("data-back")
        if token is not None:
            assert words(letter) == SLABS.attrib["data-tokens"][int(token.split()[0])]


@pytest.mark.parametrize("way", ["one", "slabs", "all"])
def test_the_three_ways_have_their_rows(ways: dict, way: str) -> None:
    kinds = [kind for _, kind in said(SLABS, way)]
    assert kinds.count("row") == sum(LOADS)
    assert kinds.count("filler") == len(ways[way].token) - sum(LOADS)


# --- the two models -----------------------------------------------------------------


def test_the_dict_has_these_names_and_shapes() -> None:
    letters = {
        "D": MINI.hidden_size,
        "E": MINI.n_routed_experts,
        "I": MINI.moe_intermediate_size,
        "V": MINI.vocab_size,
    }
    table = parameters.shapes(MINI)
    prefix = "".join(value for _, value in said(PORT, "prefix"))
    for element, key in said(PORT, "key"):
        assert key in table and key in (words(element), prefix + words(element))
    for element, key in said(PORT, "shape"):
        axes = words(element).strip("()").split(", ")
        assert tuple(letters[axis] for axis in axes) == table[key]


def test_functions_and_modules_are_there() -> None:
    drawn = [name for _, name in said(PORT, "function")]
    for name in drawn:
        assert callable(getattr(primitives, name, None) or getattr(moe_numpy, name))
    assert {f.replace("_backward", "_forward") for f in drawn} == {
        f for f in drawn if f.endswith("_forward")
    }
    for _, name in said(PORT, "module"):
        homes = torch_port, torch_primitives, torch.nn
        found = next(getattr(home, name) for home in homes if hasattr(home, name))
        own = issubclass(found, torch.autograd.Function)
        assert own == (name == "Experts")  # the one with a backward pass of its own
    ours = [
        name
        for name, one in vars(torch_port).items()
        if isinstance(one, type) and issubclass(one, torch.autograd.Function)
    ]
    assert ours == ["Experts"]
    assert [words(e) for e, _ in said(PORT, "file")] == [checkpoints.WEIGHTS]


def test_experts_save_what_is_drawn() -> None:
    source = textwrap.dedent(inspect.getsource(torch_port.Experts.forward))
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    (call,) = (c for c in calls if ast.unparse(c.func) == "ctx.save_for_backward")
    saved = ", ".join(ast.unparse(arg) for arg in call.args)
    drawn = " ".join(words(e) for e, _ in said(PORT, "saves"))
    assert drawn == saved.replace("W_gate, W_up, W_down", "W")  # a word for the three


# --- the checkpoint -----------------------------------------------------------------


@pytest.fixture(scope="module")
def in_file() -> dict[str, tuple[int, ...]]:
    """Every key of V3's files, scales apart, with its shape."""
    table = parameters.shapes(V3)
    keys = {
        one: shape[1:] if checkpoints.EXPERTS in name else shape
        for name, shape in table.items()
        for one in checkpoints._parts(name, shape)
    }
    return keys | {c: table[first] for c, first in checkpoints._copies(V3).items()}


def test_keys_shapes_and_scales_are_v3s(in_file: dict) -> None:
    drawn = list(said(LAYOUT, "key"))
    assert len(drawn) >= 12
    for element, key in drawn:
        assert key in in_file and key.removesuffix(".weight").endswith(words(element))
    stack = {name for _, name in said(LAYOUT, "stack")}
    for element, key in said(LAYOUT, "shape"):
        shape = parameters.shapes(V3)[key] if key in stack else in_file[key]
        assert tuple(numbers(element)) == shape
    for element, key in said(LAYOUT, "scale"):
        assert fp8.is_quantised(key)
        assert tuple(numbers(element)) == fp8.scale_shape(in_file[key])
    assert not any(fp8.is_quantised(key) for _, key in said(LAYOUT, "plain"))


def test_prefixes_are_the_layers() -> None:
    layers = [numbers(e) for e, _ in said(LAYOUT, "prefix")]
    assert layers == [[V3.first_k_dense_replace], [V3.num_hidden_layers]]
    keys = {key.split(".")[2] for _, key in said(LAYOUT, "key")}
    assert keys == {str(n) for (n,) in layers}


def test_the_module_is_drawn_whole_and_its_copies_named() -> None:
    module = f"model.layers.{V3.num_hidden_layers}."
    drawn = {key for _, key in said(LAYOUT, "key") if key.startswith(module)}
    own = {
        key
        for key in parameters.shapes(V3)
        if key.startswith(module) and ".self_attn." not in key and ".mlp." not in key
    }
    block = {f"{module}{norm}_layernorm.weight" for norm in ("input", "post_attention")}
    copies = checkpoints._copies(V3)
    assert drawn == (own - block) | copies.keys()
    for element, key in said(LAYOUT, "original"):
        assert f"{words(element)}.weight" == copies[key]
    assert len(list(said(LAYOUT, "original"))) == len(copies)


def test_the_half_full_block_is_half_full(in_file: dict) -> None:
    def number(what: str) -> int:
        ((element, _),) = said(LAYOUT, what)
        (drawn,) = numbers(element)
        return drawn

    shape = in_file["model.layers.3.self_attn.kv_a_proj_with_mqa.weight"]
    assert (number("rows"), number("columns")) == shape
    assert (number("down"), number("across")) == fp8.scale_shape(shape)
    blocks = {n for e, _ in said(LAYOUT, "block") for n in numbers(e)}
    assert blocks == set(fp8.BLOCK)
    assert math.fmod(shape[0] / fp8.BLOCK[0], 1) == 0.5


def test_files_are_named_as_released() -> None:
    files = [words(e) for e, _ in said(LAYOUT, "file")]
    assert files == ["config.json", checkpoints.INDEX]
    ((first, _),) = said(LAYOUT, "shard")
    assert words(first).startswith("model-00001-of-")
    ((one, _),) = said(LAYOUT, "one")
    assert tuple(numbers(one)) == (V3.moe_intermediate_size, V3.hidden_size)
