"""The movable figure of speculative decoding: what it shows is what it computes."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page

from . import figure_page

pytestmark = figure_page.needs_chromium
STATE = """() => {
  const { p, q, law, counts } = document.querySelector("draft-judge");
  return { p, q, law, counts };
}"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The figure alone."""
    folder = tmp_path_factory.mktemp("judge")
    figure = "<draft-judge></draft-judge>"
    with figure_page.opened(folder, ["draft-judge"], figure) as page:
        yield page


@pytest.fixture
def page(opened: Page) -> Page:
    """The figure as it was at first."""
    opened.reload()
    return opened


def drag(page: Page, law: str, token: int, up: float) -> None:
    box = page.locator(f"draft-judge [role=slider].{law}").nth(token).bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x, y - up, steps=4)
    page.mouse.up()


def check(page: Page) -> dict[str, list[float]]:
    """Laws sum to 1, the numbers are true, and what comes out is p."""
    state = page.evaluate(STATE)
    p, q = state["p"], state["q"]
    assert sum(p) == pytest.approx(1) and sum(q) == pytest.approx(1)
    assert min(*p, *q) >= 0
    kept = sum(map(min, p, q))
    shown = page.locator("draft-judge output").all_inner_texts()
    numbers = [float(re.sub("[^0-9.]", "", text)) for text in shown]
    wanted = [100 * kept, 100 * (1 - kept), 100 * (1 - kept), 1 + kept]
    assert numbers == pytest.approx(wanted, abs=0.051)
    assert state["law"] == pytest.approx(p)
    return state


def bars(page: Page, part: str) -> list[float]:
    """Heights of one part of the lower chart's bars, as shares."""
    return page.evaluate(
        """(part) => {
          const judge = document.querySelector("draft-judge");
          const chart = judge.querySelector(".out");
          return [...chart.querySelectorAll(`.column ${part}`)].map((bar) =>
            bar.getBoundingClientRect().height / chart.clientHeight * judge.top);
        }""",
        part,
    )


def test_what_comes_out_is_p_whatever_is_dragged(page: Page) -> None:
    before = check(page)
    for law, token, up in (("q", 2, 60), ("p", 5, 50), ("p", 0, -300), ("q", 0, 300)):
        drag(page, law, token, up)
        after = check(page)
        assert (after[law][token] - before[law][token]) * up > 0
        drawn = map(sum, zip(bars(page, ".kept"), bars(page, ".again"), strict=True))
        assert list(drawn) == pytest.approx(after["p"], abs=0.004)
        before = after


def test_the_others_keep_their_ratios(page: Page) -> None:
    before = check(page)["q"]
    drag(page, "q", 2, 60)
    after = check(page)["q"]
    pairs = zip(before, after, strict=True)
    ratios = [new / old for i, (old, new) in enumerate(pairs) if i != 2]
    assert ratios == pytest.approx([ratios[0]] * 5)


def test_keys_move_a_law_and_a_certain_one_can_be_left(page: Page) -> None:
    grip = page.locator("draft-judge [role=slider].q").nth(1)
    for key, value in (("ArrowUp", 14), ("PageUp", 24), ("End", 100), ("Home", 0)):
        grip.press(key)
        assert float(grip.get_attribute("aria-valuenow") or "nan") == value
        state = check(page)
    assert state["q"] == pytest.approx([0.2, 0, 0.2, 0.2, 0.2, 0.2])


@pytest.mark.parametrize("preset", ["draft = model", "good draft", "bad draft"])
def test_draws_follow_p(page: Page, preset: str) -> None:
    page.get_by_role("button", name=preset).click()
    for _ in range(4):
        page.get_by_role("button", name="draw 1000").click()
    state = check(page)
    assert sum(state["counts"]) == 4000
    shares = [count / 4000 for count in state["counts"]]
    assert shares == pytest.approx(state["p"], abs=0.03)
    assert "not chance" not in page.locator("draft-judge .say").inner_text()


def test_the_mistake_is_seen_and_greedy_hides_it(page: Page) -> None:
    page.get_by_role("button", name="bad draft").click()
    page.get_by_role("switch").check()
    page.get_by_role("button", name="draw 1000").click()
    state = page.evaluate(STATE)
    assert abs(state["law"][0] - state["p"][0]) > 0.1
    assert [c / 1000 for c in state["counts"]] == pytest.approx(state["law"], abs=0.05)
    assert "not chance" in page.locator("draft-judge .say").inner_text()
    page.get_by_role("button", name="greedy").click()
    assert check(page)["law"] == pytest.approx([1, 0, 0, 0, 0, 0])
