"""The figure that steps through a warp: its data by hand, and what a reader does."""

import html
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Page

from minidsv3.gpu import reductions
from minidsv3.gpu.intrinsics import load4
from minidsv3.gpu.reductions import block_sum
from minidsv3.gpu.simulator import cuda, launch

from . import figure_page
from .test_draft_race import CONTRASTS
from .test_simulator import line_of

sys.path.insert(0, str(figure_page.BOOK))
import gpu_stepper  # noqa: E402

FIGURE = "warp-stepper"
SCRIPTS = ["warp-lanes", "warp-memory", FIGURE]
FULL = 0xFFFFFFFF


def summed(x, y):
    """Not shown."""
    t = cuda.threadIdx.x
    value = x[t]  # load
    for distance in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(FULL, value, distance)  # exchange
    if t < 16:
        y[2 * t] = value  # half
    cuda.syncthreads()
    y[2 * t + 1] = value  # strided


def far(x):
    tile = cuda.shared.array((32, 32), np.float32, alignment=16)
    t = cuda.threadIdx.x
    kept = cuda.local.array(1, np.float32)
    kept[0] = x[32 * t]
    tile[t, 3] = kept[0]
    cuda.syncwarp()
    tile[3, t] = kept[0]
    cuda.syncwarp()
    tile[t % 2, 3]
    at_once(tile[3], t)


def at_once(row, t):
    row.read_vector(4 * (t % 8), 4)


def asks(x):
    t = cuda.threadIdx.x
    cuda.shfl_down_sync(FULL, t, 1)
    cuda.shfl_up_sync(FULL, t, 2)
    cuda.shfl_sync(FULL, t, 35)
    cuda.shfl_sync(FULL, t, 31 - t)
    cuda.ballot_sync(FULL, t < 4)
    cuda.any_sync(FULL, t == 40)
    if t == 5:
        cuda.atomic.add(x, 0, 2)
    cuda.all_sync(FULL, t < 32)


def by_blocks(x):
    scratch = cuda.shared.array(32, np.float32)
    block_sum(x[cuda.threadIdx.x], scratch)


def traced(kernel: Callable, *arrays: np.ndarray, block: int = 32, **how: Any):
    return launch(kernel, 1, block, *arrays, trace=(0, 0), **how).trace


def of_sums():
    return traced(summed, np.arange(32, dtype=np.float32), np.zeros(64, np.float32))


def of_far():
    return traced(far, np.arange(1024, dtype=np.float32))


def of_asks():
    return traced(asks, np.zeros(1, np.int32))


# --- what is worked out here ----------------------------------------------------------


def test_five_exchanges_give_the_sum_to_all() -> None:
    steps = gpu_stepper.as_data(summed, of_sums())["steps"]
    assert steps[0]["gets"] == [*range(32)] and steps[0]["from"] is None
    shuffles = steps[1:6]
    for step, bits in zip(shuffles, (16, 8, 4, 2, 1), strict=True):
        assert step["from"] == [lane ^ bits for lane in range(32)]
        assert step["gets"] == [step["gives"][lane ^ bits] for lane in range(32)]
        assert f"xor {bits} exchange" in step["say"] and "All 32" in step["say"]
    last = shuffles[-1]
    sums = [a + b for a, b in zip(last["gives"], last["gets"], strict=True)]
    assert sums == [496] * 32
    assert steps[6]["gives"] == [496] * 16 + [None] * 16
    assert steps[8]["gives"] == [496] * 32


def test_sectors_that_one_knows_by_hand() -> None:
    steps = gpu_stepper.as_data(summed, of_sums())["steps"]
    assert [steps[i]["sectors"] for i in (0, 6, 8)] == [4, 4, 8]
    assert "4 sectors of 32 bytes, every byte is of use" in steps[0]["say"]
    assert "Lanes 0 to 15 write 4 bytes each of y" in steps[6]["say"]
    assert "64 of 128 bytes are of use" in steps[6]["say"]
    assert "8 sectors of 32 bytes, 128 of 256 bytes are of use" in steps[8]["say"]
    assert steps[8]["offsets"] == [8 * lane + 4 for lane in range(32)]
    assert steps[8]["width"] == 4
    data = gpu_stepper.as_data(far, of_far())["steps"][0]
    assert data["sectors"] == 32 and "128 of 1024 bytes" in data["say"]


def test_banks_that_one_knows_by_hand() -> None:
    steps = gpu_stepper.as_data(far, of_far())["steps"]
    assert [step["space"] for step in steps] == [
        "global", "shared", None, "shared", None, "shared", "shared",
    ]  # fmt: skip
    passes = [step["passes"] for step in steps if step["space"] == "shared"]
    assert passes == [32, 1, 2, 4]
    assert "32 passes over the 32 banks where 1 would do" in steps[1]["say"]
    assert "1 pass over the 32 banks, no conflict" in steps[3]["say"]
    assert "wait for each other" in steps[2]["say"]
    assert "All 32 lanes, in at_once, read 16 bytes each" in steps[6]["say"]
    assert "4 passes over the 32 banks, no conflict" in steps[6]["say"]
    assert steps[6]["gets"][8] == [0, 32, 64, 96]
    assert steps[5]["indices"][1] == [1, 3]
    assert steps[6]["indices"] is None  # they count within the row, not in tile


def test_who_gives_and_what_is_asked() -> None:
    steps = gpu_stepper.as_data(asks, of_asks())["steps"]
    down, up, one, turned, ballot, some, alone, every = steps
    assert down["from"] == [*range(1, 32), 31] and "lane n + 1" in down["say"]
    assert up["from"] == [0, 1, *range(30)] and "lane n − 2" in up["say"]
    assert one["from"] == [3] * 32 and "value of lane 3" in one["say"]
    assert turned["from"] == [*range(31, -1, -1)] and "names" in turned["say"]
    assert ballot["gives"] == [True] * 4 + [False] * 28
    assert "0x0000000f" in ballot["say"]
    assert some["say"].endswith("any of them: no.")
    assert every["say"].endswith("all of them: yes.")
    assert alone["lanes"] == [5] and (alone["gives"][5], alone["gets"][5]) == (2, 0)
    assert alone["say"].startswith("Lane 5 alone updates atomically 4 bytes of x")


def test_the_source_is_the_kernels() -> None:
    data = gpu_stepper.as_data(summed, of_sums())
    (source,) = data["sources"]
    text = dict(source["lines"])
    assert text[line_of(summed, "# load")] == "    value = x[t]  # load"
    assert not any("Not shown" in line for line in text.values())
    marks = ["load"] + ["exchange"] * 5 + ["half", "syncthreads", "strided"]
    for step, mark in zip(data["steps"], marks, strict=True):
        assert mark in text[step["line"]]
    kernel, called = gpu_stepper.as_data(far, of_far())["sources"]
    assert (kernel["name"], called["name"]) == ("far", "at_once")
    assert called["lines"][0] == [
        line_of(at_once, "def at_once"),
        "def at_once(row, t):",
    ]
    assert len(called["lines"]) == 2


def test_a_librarys_sum_shows_its_own_lines() -> None:
    trace = traced(by_blocks, np.ones(64, np.float32), block=64)
    data = gpu_stepper.as_data(by_blocks, trace)
    names = [one["name"] for one in data["sources"]]
    assert sorted(names) == ["block_sum", "by_blocks", "warp_sum"]
    shuffled = line_of(reductions.warp_sum, "shfl_xor_sync")
    assert [step["line"] for step in data["steps"]].count(shuffled) == 5


def by_fours(x):
    into = cuda.local.array(4, np.float32)
    load4(x, 4 * cuda.threadIdx.x, into, 0)


def test_an_intrinsic_is_at_its_callers_line() -> None:
    data = gpu_stepper.as_data(by_fours, traced(by_fours, np.ones(128, np.float32)))
    assert [one["name"] for one in data["sources"]] == ["by_fours"]
    assert {step["line"] for step in data["steps"]} == {line_of(by_fours, "load4(x")}


def test_bits_are_read_as_bfloat16() -> None:
    x = np.full(64, 0x3FC0, np.uint16)  # 1.5
    data = gpu_stepper.as_data(bits, traced(bits, x))
    assert data["steps"][0]["gets"] == [1.5] * 32


def bits(x):
    x[cuda.threadIdx.x]


def test_what_cannot_be_shown_is_said() -> None:
    with pytest.raises(ValueError, match="the trace is of summed, not of far"):
        gpu_stepper.stepper(far, of_sums())
    with pytest.raises(ValueError, match="the trace of idle has no step"):
        gpu_stepper.stepper(idle, traced(idle))


def idle():
    pass


def test_without_javascript_it_is_a_list() -> None:
    markup = gpu_stepper.stepper(summed, of_sums(), "See `x < y`.")
    data = gpu_stepper.as_data(summed, of_sums())
    listed = [html.unescape(one) for one in re.findall("<li>(.*?)</li>", markup)]
    assert listed == [step["say"] for step in data["steps"]] and len(listed) == 9
    assert "<figcaption>See <code>x &lt; y</code>.</figcaption>" in markup
    (embedded,) = re.findall('application/json">(.*?)</script>', markup)
    assert json.loads(embedded) == data


# --- what a reader does ---------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Four figures, with the theme's sheet beside ours."""
    theme = importlib.util.find_spec("pydata_sphinx_theme")
    sheets = []
    if theme and theme.origin:
        styles = Path(theme.origin).parent / "theme/pydata_sphinx_theme/static/styles"
        sheets.append((styles / "pydata-sphinx-theme.css").as_uri())
    figures = [(summed, of_sums()), (far, of_far()), (asks, of_asks())]
    figures.append((bits, traced(bits, np.arange(24, dtype=np.uint16), block=24)))
    body = (
        "<style>body { margin: 0 16px; background: var(--pst-color-background);"
        "color: var(--pst-color-text-base) }</style><main class='bd-article'>"
        + "".join(gpu_stepper.stepper(*one, "A caption.") for one in figures)
        + "</main>"
    )
    folder = tmp_path_factory.mktemp("warp")
    with figure_page.opened(folder, SCRIPTS, body, sheets) as page:
        yield page


@pytest.fixture
def page(opened: Page) -> Page:
    opened.set_viewport_size({"width": 390, "height": 1000})
    opened.reload()
    return opened


def asked(page: Page, some: str, which: int = 0):
    return page.locator(FIGURE).nth(which).locator(some)


def go(page: Page, which: int, at: int, lane: int = 0) -> None:
    ask = """([which, at, lane]) =>
      document.querySelectorAll("warp-stepper")[which].go({ at, lane })"""
    page.evaluate(ask, [which, at, lane])


def state(page: Page) -> tuple[str, str, str]:
    """Shown step, marked line and the sentence."""
    return (
        asked(page, ".act b").inner_text(),
        asked(page, "pre .here u").inner_text(),
        asked(page, ".say").inner_text(),
    )


def expected(at: int) -> tuple[str, str, str]:
    step = gpu_stepper.as_data(summed, of_sums())["steps"][at]
    return f"{at + 1} of 9", str(step["line"]), step["say"]


@figure_page.needs_chromium
def test_buttons_keys_and_slider_go_the_same_way(page: Page) -> None:
    def press(name: str):
        return page.get_by_role("button", name=f"{name} step").first

    assert state(page) == expected(0)
    press("back").click(force=True)  # as a reader would
    assert state(page) == expected(0)
    for _ in range(2):
        press("next").click()
    assert state(page) == expected(2)
    press("back").click()
    assert state(page) == expected(1)
    press("last").click()
    assert state(page) == expected(8)
    ask = """() => [...document.querySelectorAll("warp-stepper:first-of-type button")]
      .slice(0, 4).map((one) => one.ariaDisabled)"""
    assert page.evaluate(ask) == ["false", "false", "true", "true"]
    press("next").click(force=True)
    assert state(page) == expected(8)
    for key, at in (("ArrowLeft", 7), ("Home", 0), ("ArrowRight", 1), ("End", 8)):
        press("next").press(key)
        assert state(page) == expected(at)
    press("first").click()
    assert state(page) == expected(0)
    slider = page.get_by_role("slider", name="step", exact=True).first
    for key, at in (("ArrowRight", 1), ("ArrowRight", 2), ("End", 8), ("Home", 0)):
        slider.press(key)
        assert state(page) == expected(at)
        line = expected(at)[1]
        assert slider.get_attribute("aria-valuetext") == f"{at + 1} of 9, line {line}"
    slider.fill("4")
    assert state(page) == expected(4)


@figure_page.needs_chromium
def test_the_sentence_is_said_when_it_changes(page: Page) -> None:
    say = asked(page, ".say")
    assert say.get_attribute("aria-live") == "polite"
    page.evaluate(
        """() => { window.said = 0; new MutationObserver(() => window.said++).observe(
          document.querySelector(".say"), { childList: true }); }"""
    )
    go(page, 0, 1)
    go(page, 0, 1, 7)  # another lane: nothing new to be said
    assert page.evaluate("window.said") == 1


@figure_page.needs_chromium
def test_cells_hold_the_values(page: Page) -> None:
    go(page, 0, 5)
    cells = asked(page, ".lane").all_inner_texts()
    # 31 * 16 in all: after four exchanges even lanes have 240, odd ones 256
    assert [cell.split() for cell in cells] == [
        [str(i), *(("240", "256") if i % 2 == 0 else ("256", "240"))] for i in range(32)
    ]
    go(page, 0, 6)
    out = asked(page, ".lane.out i").all_inner_texts()
    assert out == [str(i) for i in range(16, 32)]
    assert asked(page, ".lane.out b:visible").all_inner_texts() == [""] * 16
    go(page, 0, 0)
    ask = """() => [...document.querySelectorAll(".lane b:first-of-type")].map(
      (one) => parseFloat(one.nextSibling.style.getPropertyValue("--shade")))"""
    shades = page.evaluate(ask)[:32]
    assert shades == sorted(shades) and shades[0] < shades[31]


@figure_page.needs_chromium
def test_short_numbers(page: Page) -> None:
    ask = """(values) => {
      const lanes = document.querySelector("warp-lanes");
      const gives = Array.from({ length: 32 }, (_, i) => values[i] ?? null);
      const all = { gives, gets: null, lanes: [], from: null };
      lanes.show(all, 0, 32);
      return values.map((_, i) => lanes.cells[i].children[1].textContent);
    }"""
    wanted = {
        0: "0", 7: "7", -496: "−496", 1.5: "1.50", -2.204: "−2.2", 0.126: ".13",
        -0.05: "−.05", 12.34: "12.3", -12.34: "−12", 0.997: "1.00", 9.97: "10.0",
        123.4: "123", 99.7: "100", 3.2e5: "3.2e5", -3.2e5: "−3e5", 2e-5: "2e−5",
    }  # fmt: skip
    assert page.evaluate(ask, list(wanted)) == list(wanted.values())
    words = page.evaluate(ask, ["NaN", "-Infinity", True, False])
    assert words == ["NaN", "−∞", "yes", "no"]


@figure_page.needs_chromium
@pytest.mark.parametrize("width", [360, 1280])
def test_lines_lead_from_who_gives(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 1000})
    ask = """(which) => {
      const lanes = document.querySelectorAll("warp-lanes")[which];
      const box = (one) => one.getBoundingClientRect();
      const inside = (x, cell) => x > box(cell).left && x < box(cell).right;
      return [...lanes.querySelectorAll("g")].map((g) => {
        const [path, tip] = g.querySelectorAll("path");
        const start = path.getPointAtLength(0).x + box(lanes).x;
        const end = box(tip).x + box(tip).width / 2;
        const { from, to } = g.dataset;
        return [+from, +to, g.className.baseVal, inside(start, lanes.cells[from]),
          inside(end, lanes.cells[to]), box(path).top >= box(lanes).top - 1];
      });
    }"""
    go(page, 0, 3, lane=9)
    assert page.evaluate(ask, 0) == [
        [i ^ 4, i, "own" if i == 9 else "", True, True, True] for i in range(32)
    ]
    go(page, 0, 0)
    assert page.evaluate(ask, 0) == []
    go(page, 2, 0)  # down by one: the last lane keeps its own, and needs no line
    found = [[i + 1, i, "own" if i == 0 else "", True, True, True] for i in range(31)]
    assert page.evaluate(ask, 2) == found


@figure_page.needs_chromium
def test_memory_is_drawn_as_it_is_counted(page: Page) -> None:
    def sectors() -> list[int]:
        boxes = asked(page, ".sector")
        return [int(one.get_attribute("data-sector")) for one in boxes.all()]

    assert sectors() == [0, 1, 2, 3]
    assert asked(page, ".sector i").count() == 32
    go(page, 0, 8, lane=31)
    assert sectors() == [*range(8)]
    own = asked(page, ".sector i.own")
    assert own.count() == 1
    assert own.get_attribute("style") == "left:87.500%;width:12.500%"  # byte 252
    assert "8 sectors of 32 bytes" in asked(page, "warp-memory p").inner_text()
    go(page, 0, 7)
    assert asked(page, "warp-memory .bar").inner_text() == "the block waits here"
    for at, passes, filled in ((1, 32, 32), (3, 1, 32), (5, 2, 2), (6, 4, 128)):
        go(page, 1, at, lane=1)
        assert asked(page, ".pass", 1).count() == passes
        assert asked(page, ".pass i[class]:not([class=''])", 1).count() == filled
        assert asked(page, ".pass i", 1).count() == 32 * passes


@figure_page.needs_chromium
def test_a_lane_can_be_picked(page: Page) -> None:
    slider = page.get_by_role("slider", name="lane", exact=True).first
    go(page, 0, 1)
    for key, words in (
        ("End", "Lane 31 gives 31 and gets 15, lane 15’s."),
        ("ArrowLeft", "Lane 30 gives 30 and gets 14, lane 14’s."),
    ):
        slider.press(key)
        assert asked(page, ".detail").inner_text() == words
        assert slider.get_attribute("aria-valuetext") == words
    asked(page, ".lane").nth(5).click()
    assert asked(page, ".lane.picked i").all_inner_texts() == ["5"]
    go(page, 0, 8, 5)
    assert asked(page, ".detail").inner_text() == "Lane 5, y[11], from byte 44 on: 496."
    go(page, 0, 6, 20)
    assert asked(page, ".detail").inner_text() == "Lane 20 takes no part."
    go(page, 1, 5, 1)
    assert "Lane 1, tile[1, 3], from byte 140" in asked(page, ".detail", 1).inner_text()
    go(page, 1, 6, 7)
    words = asked(page, ".detail", 1).inner_text()
    assert words == "Lane 7, 4 of tile, from byte 496 on: 896, 928, 960, 992."
    go(page, 3, 0, 30)
    assert "is not there" in asked(page, ".detail", 3).inner_text()
    assert asked(page, ".lane.none", 3).count() == 8


CROWDED = """() => {
  const faults = [];
  const all = [...document.querySelectorAll("warp-stepper *")];
  for (const one of all.filter((one) => one.matches(".lane b, .act, p, label, button")))
    if (one.scrollWidth > one.clientWidth + 1 && one.clientWidth) faults.push(
      `${one.className} ${one.textContent}`);
  return faults;
}"""


@figure_page.needs_chromium
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_and_is_readable(page: Page, theme: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 1000})
    page.evaluate(
        "(theme) => { document.documentElement.dataset.theme = theme; }", theme
    )
    for which, steps in enumerate((9, 7, 8, 1)):
        contrasts = CONTRASTS.replace("draft-race", f"{FIGURE}[data-now]")
        page.evaluate(
            """(which) => document.querySelectorAll("warp-stepper").forEach((one, i) =>
              one.toggleAttribute("data-now", i === which))""",
            which,
        )
        for at in range(steps):
            go(page, which, at)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(CROWDED) == []
            pairs = page.evaluate(contrasts)
            assert len(pairs) > 40 and not [pair for pair in pairs if pair[1] < 4.5]
            marked = page.evaluate(
                """() => { const pre = document.querySelector("[data-now] pre");
                  const a = pre.getBoundingClientRect();
                  const b = pre.querySelector(".here").getBoundingClientRect();
                  return b.top >= a.top - 1 && b.bottom <= a.bottom + 1; }"""
            )
            assert marked


@figure_page.needs_chromium
def test_nothing_moves_for_who_wants_no_motion(page: Page) -> None:
    ask = """() => getComputedStyle(document.querySelector(".lane b"))
      .transitionDuration.split(",").every((one) => parseFloat(one) === 0)"""
    assert page.evaluate(ask)
    page.emulate_media(reduced_motion="no-preference")
    assert not page.evaluate(ask)
    page.emulate_media(reduced_motion="reduce")
