"""The movable figure of block scales: its eight bits are those of `minidsv3.fp8`."""

import re
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest
from playwright.sync_api import Page

from minidsv3 import fp8

from . import figure_page

pytestmark = figure_page.needs_chromium
FIGURE = "fp8-dial"
BLOCKS = {"tensor": (1, 12), "block": (1, 4)}
STATE = """() => {
  const { kind, picked, weights, scales, stored, held, steps, mean, flushed, grid }
    = document.querySelector("fp8-dial");
  return { kind, picked, weights, scales, stored, held, steps, mean, flushed, grid };
}"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The figure alone."""
    figure = f"<{FIGURE}><p>It needs JavaScript.</p></{FIGURE}>"
    folder = tmp_path_factory.mktemp("fp8")
    with figure_page.opened(folder, [FIGURE], figure) as page:
        yield page


@pytest.fixture
def page(opened: Page) -> Page:
    """The figure as it was at first."""
    opened.reload()
    return opened


def outlier(page: Page, step: int) -> None:
    """Move the slider to a step, as its user does."""
    page.locator(f"{FIGURE} input").fill(str(step))


def number(text: str) -> float:
    """Read "0.0213", "4,290", "−0.00007" or "± 0.5 %"."""
    found = re.search(r"[−\d.,]+", text)
    assert found is not None, text
    value = float(found[0].replace("−", "-").replace(",", ""))
    return value / 100 if "%" in text else value


def near(value: float) -> object:
    return pytest.approx(value, rel=0.0051)  # three digits are shown


def check(page: Page) -> dict:
    """Scale, stored and held numbers are the library's, bit for bit; cards say them."""
    state = page.evaluate(STATE)
    w = np.array(state["weights"], np.float32)[None]
    block = BLOCKS[state["kind"]]
    q, scales = fp8.quantise(w, block)
    held = fp8.dequantise(q, scales, block=block)[0]
    assert state["scales"] == scales[0].repeat(block[1]).tolist()
    assert state["stored"] == q[0].astype(float).tolist()
    assert state["held"] == held.tolist()
    wrong = np.abs(held.astype(float) - w[0]) / np.abs(w[0])
    others = np.delete(wrong, 5)
    assert state["mean"] == pytest.approx(others.mean())
    assert state["flushed"] == (q == 0).sum()
    i = state["picked"]
    shown = list(map(number, page.locator(f"{FIGURE} .numbers b").all_inner_texts()))
    assert shown[0] == near(state["scales"][i]) and shown[1] == near(state["stored"][i])
    assert shown[2] == near(state["steps"][i])
    assert shown[3:5] == pytest.approx([wrong[i], others.mean()], rel=0.06, abs=1e-4)
    assert shown[5] == state["flushed"]
    words = page.locator(f"{FIGURE} .weights button").all_inner_texts()
    for text, weight, share, code in zip(words, w[0], wrong, q[0], strict=True):
        first, second = text.split("\n")
        assert number(first) == near(weight)
        assert ("becomes 0" in second) == (code == 0)
        if code:
            assert number(second) == pytest.approx(share, rel=0.06, abs=1e-4)
    return state


def test_the_grid_is_every_finite_number(page: Page) -> None:
    true = fp8.VALUES[np.isfinite(fp8.VALUES)]
    assert len(true) == 254 and len(set(true)) == 253  # zero has two signs
    assert page.evaluate(STATE)["grid"] == sorted(set(true[true >= 0].tolist()))


def test_rounding_is_that_of_ml_dtypes(page: Page) -> None:
    values = fp8.VALUES[np.isfinite(fp8.VALUES)]
    middles = np.convolve(np.sort(values), [0.5, 0.5], "valid").astype(np.float32)
    rng = np.random.default_rng(0)
    wide = rng.normal(size=2000) * 2.0 ** rng.integers(-14, 8, 2000)
    asked = np.concatenate(
        [values, middles, np.nextafter(middles, 500), np.nextafter(middles, -500), wide]
    ).clip(-448, 448)
    asked = asked.astype(np.float32)
    got = page.evaluate(
        """(all) => all.map(document.querySelector("fp8-dial").e4m3)""", asked.tolist()
    )
    assert got == asked.astype(ml_dtypes.float8_e4m3fn).astype(float).tolist()


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("step", [0, 1, 37, 60, 80, 90])
def test_numbers_are_the_librarys(page: Page, kind: str, step: int) -> None:
    page.locator(f'{FIGURE} [value="{kind}"]').click()
    outlier(page, step)
    for i in (0, 5, 7, 11):
        page.locator(f"{FIGURE} .weights button").nth(i).click()
        state = check(page)
        assert state["picked"] == i and state["kind"] == kind


def test_steps_are_distances_to_the_next_number(page: Page) -> None:
    outlier(page, 70)
    state = check(page)
    grid = np.array(state["grid"])
    for q, s, step in zip(
        state["stored"], state["scales"], state["steps"], strict=True
    ):
        gaps = np.diff(grid)[max(0, np.searchsorted(grid, abs(q)) - 1) :][:2]
        assert any(step / s == pytest.approx(gap) for gap in gaps)


def test_an_outlier_takes_from_others_only_what_shares_its_scale(page: Page) -> None:
    before = check(page)
    outlier(page, 80)
    worse = check(page)
    assert before["flushed"] == 0 and worse["flushed"] >= 3
    assert worse["mean"] > 10 * before["mean"]
    page.locator(f'{FIGURE} [value="block"]').click()
    saved = check(page)
    assert saved["flushed"] == 0
    assert saved["scales"][8] == before["weights"][10] / np.float32(448)
    hurt = np.abs(np.divide(saved["held"], saved["weights"]) - 1) > 1 / 16
    assert set(np.flatnonzero(hurt)) <= {4, 6, 7}  # of the outlier's own block


def test_keys_move_the_outlier_and_what_is_lost_is_said(page: Page) -> None:
    slider = page.locator(f"{FIGURE} input")
    slider.focus()
    slider.press("End")
    state = check(page)
    assert state["weights"][5] == pytest.approx(0.03 * 10**4.5)
    assert slider.get_attribute("aria-valuetext") == "949"
    assert "it is gone" in page.locator(f"{FIGURE} .say").inner_text()
    slider.press("Home")
    assert check(page)["weights"][5] == np.float32(0.03)


@pytest.mark.parametrize("step", [0, 80])
def test_what_is_drawn_lies_where_it_should(page: Page, step: int) -> None:
    """Dots on the logarithmic lines and in the lens; nothing leaves the figure."""
    outlier(page, step)
    state = page.evaluate(STATE)
    drawn = page.evaluate(
        """() => ["true", "held"].map((its) => [...document.querySelectorAll(
          `fp8-dial .line .${its}`)].map((dot) => parseFloat(dot.style.left)))"""
    )
    for places, values in zip(drawn, (state["weights"], state["held"]), strict=True):
        for place, value in zip(places, values, strict=True):
            where = (np.log2(abs(value)) + 20) / 0.3 if value else 0
            assert place == pytest.approx(where, abs=0.01)
    ends = page.evaluate(
        """() => [...document.querySelectorAll("fp8-dial .line .zero")].map((one) =>
          parseFloat(one.style.width))"""
    )
    for end, s in zip(ends, state["scales"][::4], strict=True):
        least = np.float32(2.0**-10)  # and all below is rounded to zero
        assert least.astype(fp8.FP8) == 0 != np.nextafter(least, 1).astype(fp8.FP8)
        where = (np.log2(least * s) + 20) / 0.3
        assert end == pytest.approx(max(0, where), abs=0.01)
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= page.viewport_size["width"]
    labels = page.evaluate(
        """() => [...document.querySelectorAll("fp8-dial .lens u span")].map((one) => {
          const { left, right, top } = one.getBoundingClientRect();
          return [left, right, top]; })"""
    )
    for row in {top for *_, top in labels}:
        ends = sorted(label[:2] for label in labels if label[2] == row)
        for (_, right), (left, _) in zip(ends, ends[1:], strict=False):
            assert right < left
