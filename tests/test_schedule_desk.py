"""The movable figure of schedules: rate and λ are the library's, step by step."""

import math
import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page

from minidsv3.config import TrainConfig
from minidsv3.mtp.numpy_ref import mtp_weight
from minidsv3.training.numpy_ref import learning_rate

from . import figure_page

pytestmark = figure_page.needs_chromium
FIGURE = "schedule-desk"
V3 = "DeepSeek-V3’s"
STATE = """() => {
  const { kind, step, steps, warmup, peak, floor, now }
    = document.querySelector("schedule-desk");
  return { kind, step, steps, warmup, peak, floor, now };
}"""
FUNCTION = """([name, steps, kind]) => steps.map((step) =>
  document.querySelector("schedule-desk")[name](step, kind))"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The figure alone."""
    figure = f"<{FIGURE}><p>It needs JavaScript.</p></{FIGURE}>"
    folder = tmp_path_factory.mktemp("schedule")
    with figure_page.opened(folder, [FIGURE], figure, height=1200) as page:
        yield page


@pytest.fixture
def page(opened: Page) -> Page:
    """The figure as it was at first."""
    opened.reload()
    return opened


def asked(page: Page, name: str, steps: list[int], kind: str = "") -> list[float]:
    return page.evaluate(FUNCTION, [name, steps, kind])


def put(page: Page, **indices: int) -> dict:
    """Move sliders to the given notches."""
    for name, index in indices.items():
        page.locator(f'{FIGURE} [name="{name}"]').fill(str(index))
    return page.evaluate(STATE)


def config(state: dict) -> TrainConfig:
    return TrainConfig(
        steps=state["steps"],
        warmup_steps=state["warmup"],
        learning_rate=state["peak"],
        min_learning_rate=state["floor"],
    )


def v3_rate(step: int, s: dict) -> float:
    """The report's stages (p. 23) over 14.8T tokens; the last is 7.3e-6 of 2.2e-4."""
    if step <= s["warmup"]:
        return s["peak"] * step / s["warmup"]
    tokens = 14.8 * step / s["steps"]
    if tokens <= 10:
        return s["peak"]
    if tokens <= 14.3:
        half = (1 + math.cos(math.pi * (tokens - 10) / 4.3)) / 2
        return s["floor"] + half * (s["peak"] - s["floor"])
    if tokens <= 14.3 + 0.333:
        return s["floor"]
    return min(s["floor"], s["peak"] * 7.3e-6 / 2.2e-4)


def number(text: str) -> float:
    """Read "8.79·10−4", "1,000", "8.88 T" or "0.3"."""
    found = re.match(r"([\d.,]+)(?:·10([−\d]+))?", text)
    assert found is not None, text
    power = int((found[2] or "0").replace("−", "-"))
    return float(found[1].replace(",", "")) * 10.0**power


def check(page: Page) -> dict:
    """The cards say what the functions give at the step that is shown."""
    state = page.evaluate(STATE)
    c, step = config(state), state["step"]
    rates = {"cosine": learning_rate(step, c), "stages": v3_rate(step, state)}
    own = rates.pop(state["kind"])
    gamma = 1e-3 if step - 1 < 14.3 / 14.8 * c.steps else 0
    shown = list(map(number, page.locator(f"{FIGURE} .numbers b").all_inner_texts()))
    wanted = [step, own, *rates.values(), mtp_weight(step, c), gamma]
    assert shown[:-1] == pytest.approx(wanted, rel=0.0051)
    assert shown[-1] == pytest.approx(14.8 * step / c.steps, abs=0.0051)
    say = page.locator(f"{FIGURE} .say").inner_text()
    early = int(re.findall(r"λ f\w+ after step ([\d,]+)", say)[0].replace(",", ""))
    weights = [mtp_weight(early + i, c) for i in (0, 1)]
    assert weights == [c.mtp_weight, c.mtp_weight_final]
    assert ("λ fell" in say) == (step > early)
    last = int(re.findall(r"γ \w+ 0 after step ([\d,]+)", say)[0].replace(",", ""))
    assert asked(page, "gamma", [last, last + 1]) == [1e-3, 0]
    assert ("γ became" in say) == (step > last)
    return state


@pytest.mark.parametrize(
    "notches",
    [
        {},
        {"steps": 0, "warmup": 0},
        {"steps": 3, "warmup": 10},  # all is warm-up
        {"steps": 2, "warmup": 1, "peak": 7, "share": 0},
        {"steps": 5, "warmup": 6, "peak": 0, "share": 7},
    ],
)
def test_every_step_is_the_librarys(page: Page, notches: dict[str, int]) -> None:
    state = put(page, **notches)
    c, steps = config(state), list(range(1, state["steps"] + 1))
    true = [learning_rate(step, c) for step in steps]
    assert asked(page, "rate", steps, "cosine") == pytest.approx(true, abs=1e-12)
    assert asked(page, "lambda", steps) == [mtp_weight(step, c) for step in steps]
    true = [v3_rate(step, state) for step in steps]
    assert asked(page, "rate", steps, "stages") == pytest.approx(true, abs=1e-12)
    check(page)


def test_it_starts_with_the_defaults(page: Page) -> None:
    c, state = TrainConfig(), page.evaluate(STATE)
    assert config(state).min_learning_rate == pytest.approx(c.min_learning_rate)
    assert (state["steps"], state["warmup"]) == (c.steps, c.warmup_steps)
    assert state["peak"] == c.learning_rate
    assert asked(page, "lambda", [1, c.steps]) == [c.mtp_weight, c.mtp_weight_final]
    assert asked(page, "gamma", [1]) == [c.bias_update_speed]


def test_deepseeks_run(page: Page) -> None:
    page.get_by_role("button", name=V3).click()
    state = check(page)
    steps = state["steps"]
    at = [round(share / 14.8 * steps) for share in (9.9, 14.31, 14.62, 14.7, 14.8)]
    rates = asked(page, "rate", [1000, 2000, *at], "stages")
    wanted = [1.1e-4, 2.2e-4, 2.2e-4, 2.2e-5, 2.2e-5, 7.3e-6, 7.3e-6]
    assert rates == pytest.approx(wanted)
    assert asked(page, "lambda", at) == [0.3, 0.1, 0.1, 0.1, 0.1]
    assert asked(page, "gamma", at) == [0.001, 0, 0, 0, 0]


def test_a_step_is_dragged(page: Page) -> None:
    box = page.locator(f"{FIGURE} .rate").bounding_box()
    assert box is not None
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, y)
    page.mouse.down()
    assert check(page)["step"] == pytest.approx(500, abs=3)
    for share, step in ((0.8, 800), (1.4, 1000), (-0.2, 1)):
        page.mouse.move(box["x"] + box["width"] * share, y, steps=3)
        assert check(page)["step"] == pytest.approx(step, abs=3)
    page.mouse.up()
    page.mouse.move(box["x"] + box["width"] / 2, y)
    assert check(page)["step"] == 1


def test_keys_move_the_step(page: Page) -> None:
    grip = page.locator(f"{FIGURE} .grip")
    for key, step in (("End", 1000), ("ArrowLeft", 999), ("PageDown", 899)):
        grip.press(key)
        assert check(page)["step"] == step
        assert grip.get_attribute("aria-valuenow") == str(step)
    grip.press("Home")
    assert check(page)["step"] == 1


@pytest.mark.parametrize("kind", ["cosine", "stages"])
def test_the_curve_is_drawn_through_the_numbers(page: Page, kind: str) -> None:
    page.locator(f'{FIGURE} [value="{kind}"]').click()
    state = check(page)
    path = page.locator(f"{FIGURE} .rate .own").get_attribute("d") or ""
    points = [tuple(map(float, p.split())) for p in re.split("[ML]", path)[1:]]
    assert len(points) > 300
    for x, y in points:
        step = x * state["steps"]
        true = v3_rate(step, state)
        if kind == "cosine":
            true = learning_rate(step, config(state))
        assert 1 - y == pytest.approx(true / state["peak"], abs=2e-3)
    dot = page.locator(f"{FIGURE} .rate i").get_attribute("style") or ""
    top = float(re.findall(r"[\d.]+", dot)[0])
    share = 100 * state["now"]["rate"] / state["peak"]
    assert 100 - top == pytest.approx(share, abs=1e-3)
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= page.viewport_size["width"]
