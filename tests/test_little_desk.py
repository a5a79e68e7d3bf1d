"""The movable figure of bytes under way: it agrees with what Python counts."""

import html
import json
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page

from minidsv3.gpu import roofline
from minidsv3.gpu.roofline import H100, H200

from . import figure_page

pytestmark = figure_page.needs_chromium
FIGURE = "little-desk"
GIVEN = [
    {
        "name": "A & B", "registers": 48, "threads": 224, "shared": 128, "asked": 64,
        "reads": 2 / 3,
    },
    {
        "name": "one", "registers": 32, "threads": 256, "shared": 0, "asked": 2,
        "reads": 1,
    },
]  # fmt: skip
STATE = """() => {
  const { occupancy, flight } = document.querySelector("little-desk");
  return { ...occupancy, ...flight };
}"""
CASES = [  # registers, threads, shared (bytes), asked, latency (ns), machine, reads
    (48, 224, 128, 64, 700, 0, 1 / 2),
    (49, 224, 128, 64, 700, 0, 1 / 2),
    (56, 224, 128, 64, 700, 0, 2 / 3),
    (16, 32, 0, 2, 300, 1, 1),  # as many blocks as there may be
    (255, 1024, 0, 128, 1500, 0, 1),  # does not fit
    (24, 128, 512, 8, 700, 0, 1 / 2),
    (32, 1024, 0, 16, 710, 1, 1),
    (40, 96, 227 * 1024, 32, 900, 0, 2 / 3),  # one block for its shared memory
    (16, 32, 12 * 1024, 8, 700, 0, 1),  # the system's kilobyte decides
    (64, 160, 7 * 1024, 16, 450, 0, 1),
    (33, 736, 3968, 4, 1000, 1, 1 / 2),
]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The figure as the chapter has it, with presets and machines of this file."""
    machines = [{"name": m.name, "bandwidth": m.bandwidth} for m in (H200, H100)]
    given = {"presets": json.dumps(GIVEN), "machines": json.dumps(machines)}
    words = " ".join(f'{name}="{html.escape(text)}"' for name, text in given.items())
    body = f'<{FIGURE} {words} latency="700"><p>It moves.</p></{FIGURE}>'
    folder = tmp_path_factory.mktemp("desk")
    with figure_page.opened(folder, [FIGURE], body) as page:
        yield page


@pytest.fixture
def page(opened: Page) -> Page:
    """The figure as it was at first."""
    opened.set_viewport_size({"width": 390, "height": 1200})
    opened.reload()
    return opened


def put(
    page: Page, registers: int, threads: int, shared: int, asked: int, latency: int,
    machine: int, reads: float,
) -> None:  # fmt: skip
    """Move the sliders and press the buttons, as a reader does."""
    given = {
        "registers": registers, "threads": threads, "shared": shared / 1024,
        "latency": latency,
    }  # fmt: skip
    for name, value in given.items():
        page.locator(f'{FIGURE} input[name="{name}"]').fill(str(value))
    for name, value in {"asked": asked, "machine": machine, "reads": reads}.items():
        page.locator(f'{FIGURE} [name="{name}"][value="{value}"]').click()


def words(page: Page, selector: str) -> list[str]:
    return page.locator(FIGURE).locator(selector).all_inner_texts()


@pytest.mark.parametrize("case", CASES)
def test_it_counts_as_the_roofline_does(page: Page, case: tuple) -> None:
    put(page, *case)
    registers, threads, shared, asked, latency, machine, reads = case
    gpu = (H200, H100)[machine]
    fits = roofline.occupancy(gpu, registers, threads, shared)
    state = page.evaluate(STATE)
    assert (state["blocks"], state["warps"]) == (fits.blocks, fits.warps)
    assert state["limit"] == fits.limited_by
    needed = reads * roofline.in_flight(gpu, latency * 1e-9)
    assert state["needed"] == pytest.approx(needed)
    assert state["under"] == fits.blocks * threads * asked
    taken = page.locator(f"{FIGURE} .places i:is(.odd, .even)").count()
    assert taken == fits.warps
    share = state["under"] / state["needed"]
    assert words(page, ".numbers b") == [
        str(fits.blocks), str(fits.warps), f"{share:.2f} ×",
    ]  # fmt: skip
    waits = page.evaluate(
        "document.querySelector('little-desk').classList.contains('waits')"
    )
    assert waits == (share < 1)


def test_numbers_known_by_hand(page: Page) -> None:
    """48 registers: 10 warps in each of four parts, so five blocks of seven."""
    state = page.evaluate(STATE)
    assert (state["blocks"], state["warps"], state["limit"]) == (5, 35, "registers")
    assert state["under"] == 5 * 224 * 64
    assert state["needed"] == pytest.approx(4.3e12 * 700e-9 / 132 * 2 / 3)


def test_neighbouring_blocks_differ(page: Page) -> None:
    shades = page.evaluate(
        "[...document.querySelectorAll('little-desk .places i')].map(i => i.className)"
    )
    expected = [("even", "odd")[place // 7 % 2] for place in range(35)]
    assert shades == expected + [""] * 29


def test_the_bar_and_its_mark_are_to_scale(page: Page) -> None:
    for case in CASES[:4]:
        put(page, *case)
        state = page.evaluate(STATE)
        bar, mark = page.evaluate(
            """() => {
              const pipe = document.querySelector("little-desk .pipe");
              const find = (some) => pipe.querySelector(some);
              const box = pipe.getBoundingClientRect();
              return [find("i").getBoundingClientRect().right - box.left - 1,
                find("u").getBoundingClientRect().left - box.left + 0.5];
            }"""
        )
        assert bar / mark == pytest.approx(
            state["under"] / state["needed"], rel=0.05, abs=0.02
        )


def test_presets_are_set_and_shown(page: Page) -> None:
    assert words(page, ".presets button") == ["A & B", "one"]
    pressed = f'{FIGURE} .presets [aria-pressed="true"]'
    assert page.locator(pressed).inner_text() == "A & B"
    page.locator(f"{FIGURE} .presets button").nth(1).click()
    assert page.locator(pressed).inner_text() == "one"
    assert page.evaluate(STATE)["under"] == 2 * 2048
    page.locator(f'{FIGURE} input[name="registers"]').fill("33")
    assert page.locator(pressed).count() == 0


def test_what_it_says(page: Page) -> None:
    [said] = words(page, ".say")
    assert said.startswith("5 blocks of 7 warps; a further one would need more reg")
    assert "while 21 % of the threads wait" in said  # 15.2 of 71.7 KB
    put(page, *CASES[4])
    assert words(page, ".say") == [
        "Not one block fits: such a kernel cannot be started."
    ]
    page.locator(f"{FIGURE} .presets button").nth(1).click()
    put(page, 32, 256, 0, 2, 700, 0, 1)
    assert "memory is at most 17 % busy" in words(page, ".say")[0]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 390, 1280])
def test_it_fits(page: Page, theme: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 1200})
    page.evaluate(
        "(theme) => { document.documentElement.dataset.theme = theme; }", theme
    )
    for case in CASES:
        put(page, *case)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_style_sheet_closes_what_it_opens() -> None:
    """An open brace, left by a merge say, hides every rule that follows it."""
    sheet = (figure_page.STATIC / "minidsv3.css").read_text(encoding="utf-8")
    depth = 0
    for number, line in enumerate(sheet.splitlines(), 1):
        depth += line.count("{") - line.count("}")
        assert depth >= 0, number
        if line.startswith("@"):
            assert depth <= 1, f"line {number} opens inside another rule"
    assert depth == 0
