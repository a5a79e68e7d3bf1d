"""The movable figure of what drafts gain: it agrees with rounds simulated here."""

import html
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Page

from . import figure_page

pytestmark = figure_page.needs_chromium
FIGURE = "draft-race"
PASSES = 10
GIVEN = [
    {"name": "one, measured", "a": 0.8934, "c": 0.3512, "e": 0.3, "measured": 1.13},
    {"name": "A & B", "k": 2, "a": 0.5, "c": 0.05, "e": 2.25},
]
STATE = """() => {
  const figure = document.querySelector("draft-race");
  const { now, even } = figure;
  return { ...now, even, tokens: figure.tokens(), time: figure.time() };
}"""
CASES = [  # k, a, c, e
    (1, 0.88, 0.03, 0.02),
    (1, 0.0, 0.0, 0.0),
    (1, 0.37, 0.52, 0.41),
    (1, 0.45, 0.25, 0.25),  # a little below break-even
    (2, 0.88, 0.03, 0.02),
    (2, 0.5, 0.2, 0.3),
    (3, 1.0, 0.0, 0.0),  # the most that can be written
    (3, 0.71, 0.11, 0.07),
    (3, 0.6, 1.0, 1.5),  # the longest round
]
every_case = pytest.mark.parametrize(("k", "a", "c", "e"), CASES)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The figure alone, without presets, with the theme's sheet beside ours."""
    theme = importlib.util.find_spec("pydata_sphinx_theme")
    sheets = []
    if theme and theme.origin:
        styles = Path(theme.origin).parent / "theme/pydata_sphinx_theme/static/styles"
        sheets.append((styles / "pydata-sphinx-theme.css").as_uri())
    body = (
        "<style>body { margin: 0 16px; background: var(--pst-color-background);"
        "color: var(--pst-color-text-base) }</style>"
        f'<main class="bd-article"><{FIGURE}><p>It moves.</p></{FIGURE}></main>'
    )
    folder = tmp_path_factory.mktemp("race")
    with figure_page.opened(folder, [FIGURE], body, sheets, 1200) as page:
        yield page


@pytest.fixture
def page(opened: Page) -> Page:
    """The figure as it was at first."""
    opened.set_viewport_size({"width": 390, "height": 1200})
    opened.reload()
    return opened


@pytest.fixture
def given(page: Page) -> Page:
    """The figure with presets of a page."""
    figure = f'<{FIGURE} presets="{html.escape(json.dumps(GIVEN))}"></{FIGURE}>'
    put_in = """(figure) => { document.querySelector("main").innerHTML = figure; }"""
    page.evaluate(put_in, figure)
    return page


def put(page: Page, k: int, a: float, c: float, e: float) -> None:
    """Press a number of drafts and move the sliders, as a reader does."""
    page.locator(f'{FIGURE} [name="k"][value="{k}"]').click()
    for name, value in {"a": a, "c": c, "e": e}.items():
        page.locator(f'{FIGURE} [name="{name}"]').fill(str(value))


def kept_drafts(k: int, a: float, rounds: int) -> np.ndarray:
    """Drafts kept in each of some rounds of chance, (rounds,): all up to a refusal."""
    verdicts = np.random.default_rng(0).random((rounds, k)) < a
    return np.cumprod(verdicts, axis=1).sum(axis=1)


def speed(k: int, a: float, c: float, e: float) -> float:
    return sum(a**i for i in range(k + 1)) / (1 + k * c + k * e)


def cards(page: Page) -> list[float]:
    return list(map(float, page.locator(f"{FIGURE} .numbers b").all_inner_texts()))


def said(page: Page) -> str:
    return page.locator(f"{FIGURE} .say").inner_text()


def style(page: Page, selector: str) -> dict[str, float]:
    """What an element's style attribute says, in shares of one."""
    text = page.locator(f"{FIGURE} {selector}").get_attribute("style") or ""
    return {key: float(n) / 100 for key, n in re.findall(r"(\w+): ([-\d.]+)%", text)}


# --- numbers ------------------------------------------------------------------------


@every_case
def test_numbers_are_those_of_random_rounds(page: Page, k, a, c, e) -> None:
    put(page, k, a, c, e)
    rounds = 200_000
    tokens = 1 + kept_drafts(k, a, rounds)
    error = tokens.std() / rounds**0.5
    state = page.evaluate(STATE)
    assert state["k"] == k
    assert state["tokens"] == pytest.approx(tokens.mean(), abs=5 * error + 1e-9)
    assert state["time"] == pytest.approx(1 + k * (c + e))
    wanted = [speed(k, a, c, e), state["tokens"], state["time"]]
    assert cards(page) == pytest.approx(wanted, abs=0.0051)


@every_case
def test_break_even_is_a_root(page: Page, k, a, c, e) -> None:
    put(page, k, a, c, e)
    even, s = page.evaluate(STATE)["even"], speed(k, a, c, e)
    loses = page.locator(f"{FIGURE}.loses").count()
    assert loses == (s < 1)
    assert ("loses" in said(page)) == (s < 0.995)
    assert ("Drafting gains" in said(page)) == (s >= 1.005)
    roots = np.roots([1.0] * k + [-k * (c + e)])
    real = [r.real for r in roots if abs(r.imag) < 1e-9 and -1e-9 <= r.real <= 1]
    mark = page.locator(f"{FIGURE} .even")
    if not real:
        assert c + e > 1 and even is None or np.isnan(even)
        assert "if every draft were kept" in said(page) and mark.is_hidden()
        return
    assert even == pytest.approx(real[0], abs=1.1e-4)
    assert f"more than {100 * even:.0f} %" in said(page)
    place = style(page, ".plot .even")
    assert place["left"] == pytest.approx(even, abs=1e-5)
    assert place["bottom"] == pytest.approx(style(page, ".plot .s1")["bottom"])


def test_at_break_even_nothing_is_gained(page: Page) -> None:
    put(page, 1, 0.5, 0.2, 0.3)
    assert cards(page)[0] == 1 and "nothing is gained" in said(page)


def test_a_better_k_is_named(page: Page) -> None:
    put(page, 1, 0.8, 0.1, 0.1)
    of = {k: speed(k, 0.8, 0.1, 0.1) for k in (1, 2, 3)}
    best = max(of, key=lambda k: of[k])
    assert best == 3 and f"With k = 3: {of[3]:.2f}, if later drafts" in said(page)
    put(page, best, 0.8, 0.1, 0.1)
    assert "k =" not in said(page)
    put(page, 3, 0.6, 0.2, 0.2)  # fewer ask nothing of later drafts
    assert f"With k = 1: {speed(1, 0.6, 0.2, 0.2):.2f}." in said(page)
    put(page, 3, 0.3, 0.5, 0.5)  # all lose
    assert "k =" not in said(page)


# --- what is drawn ------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("a", [0.0, 0.29, 0.5, 0.87, 1.0])
def test_the_even_pattern_has_the_shares_of_chance(
    page: Page, k: int, a: float
) -> None:
    put(page, k, a, 0.1, 0.1)
    ask = """(passes) => document.querySelector("draft-race").race(passes)"""
    rounds = page.evaluate(ask, 20_000)
    kept = np.array([one["kept"] for one in rounds])
    assert len(kept) >= 20_000 / (1 + 0.2 * k)
    for i in range(k + 1):  # how often at least i are kept
        assert (kept >= i).mean() == pytest.approx(a**i, abs=2e-3)
        short = abs((kept[:50] >= i).mean() - a**i)
        assert short <= (i + 0.5) / 50  # and evenly so


@every_case
def test_boxes_stand_on_the_time_axis(page: Page, k, a, c, e) -> None:
    put(page, k, a, c, e)
    time = 1 + k * (c + e)
    for line, kinds, each in (
        (".plain", ["pass"], 1.0),
        (".drafted", ["draft"] * k + ["pass"] + ["extra"] * k, time),
    ):
        drawn = page.evaluate(
            """(line) => [...document.querySelectorAll(`draft-race ${line} i`)].map(
              (one) => [one.className, parseFloat(one.style.left),
                parseFloat(one.style.width)])""",
            line,
        )
        rounds = int(np.ceil(PASSES / each - 1e-9))
        assert [kind for kind, *_ in drawn] == kinds * rounds
        x, width = 0.0, {"draft": c, "pass": 1.0, "extra": e}
        for kind, left, wide in drawn:
            assert left / 100 * PASSES == pytest.approx(x, abs=1e-3)
            assert wide / 100 * PASSES == pytest.approx(width[kind], abs=1e-3)
            x += width[kind]
        assert x >= PASSES - 1e-6


@every_case
def test_what_is_written_is_counted_and_spelt(page: Page, k, a, c, e) -> None:
    put(page, k, a, c, e)
    tallies = page.locator(f"{FIGURE} .race .head b").all_inner_texts()
    texts = page.locator(f"{FIGURE} code").all_inner_texts()
    time = 1 + k * (c + e)
    for line, drafts, each, tally, text in zip(
        (".plain", ".drafted"), (0, k), (1.0, time), tallies, texts, strict=True
    ):
        outs = page.evaluate(
            """(line) => [...document.querySelectorAll(`draft-race ${line} .out`)].map(
              (out) => [parseFloat(out.style.right), [...out.children].map((one) =>
                [one.className, one.textContent])])""",
            line,
        )
        assert len(outs) == int(PASSES / each + 1e-9)  # finished rounds only
        spelt, total = "", 0
        for n, (right, letters) in enumerate(outs):
            kinds = [kind for kind, _ in letters]
            kept = kinds.count("kept")
            refused = ["refused"] * (kept < drafts)
            assert kinds == ["kept"] * kept + refused + ["own"]
            end = PASSES * (1 - right / 100)
            assert end == pytest.approx((n + 1) * each, abs=1e-3)
            spelt += "".join(t for kind, t in letters if kind != "refused")
            total += kept + 1
        assert tally == f"{total} token{'s' * (total != 1)}"
        assert text == spelt and len(text) == total
        expected = len(outs) * sum(a**i for i in range(drafts + 1))
        assert abs(total - expected) < 2
    label = page.locator(f"{FIGURE} .race").get_attribute("aria-label") or ""
    assert all(tally in label for tally in tallies)


@every_case
def test_curves_go_through_the_formula(page: Page, k, a, c, e) -> None:
    put(page, k, a, c, e)
    top = 1 / style(page, ".plot .s1")["bottom"]
    assert top == pytest.approx(round(top), abs=1e-3) and top >= 2
    assert top + 1e-3 >= max(speed(i, 1, c, e) for i in (1, 2, 3))
    paths = page.locator(f"{FIGURE} path")
    for i in range(3):
        points = re.split("[ML]", paths.nth(i).get_attribute("d") or "")[1:]
        x, y = np.array([p.split() for p in points], float).T
        assert x[0] == 0 and x[-1] == 1 and len(x) > 40
        assert (1 - y) * top == pytest.approx(speed(i + 1, x, c, e), abs=2e-3)
        assert ("own" in (paths.nth(i).get_attribute("class") or "")) == (i + 1 == k)
    here = style(page, ".plot .here")
    assert here["left"] == pytest.approx(a)
    assert here["bottom"] * top == pytest.approx(speed(k, a, c, e), abs=1e-3)
    assert page.locator(f"{FIGURE} .clock").is_hidden()


# --- presets, keys, looks -----------------------------------------------------------


def test_without_presets_it_has_its_own(page: Page) -> None:
    buttons = page.get_by_role("group", name="numbers to start from").locator("button")
    fates = []
    for i in range(buttons.count()):
        buttons.nth(i).click()
        assert buttons.nth(i).get_attribute("aria-pressed") == "true"
        assert page.locator(f'{FIGURE} [aria-pressed="true"]').count() == 2  # and k
        fates.append(cards(page)[0] > 1)
    assert len(fates) >= 3 and set(fates) == {True, False}


def test_presets_of_a_page_are_kept_exact(given: Page) -> None:
    buttons = given.get_by_role("group", name="numbers to start from").locator("button")
    assert buttons.all_inner_texts() == [one["name"] for one in GIVEN]
    assert buttons.nth(0).get_attribute("aria-pressed") == "true"
    for i in (1, 0):
        given.locator(f'{FIGURE} [name="k"][value="3"]').click()
        buttons.nth(i).click()
        state, wanted = given.evaluate(STATE), {"k": 1, **GIVEN[i]}
        assert {n: state[n] for n in "kace"} == {n: wanted[n] for n in "kace"}
        exact = speed(*(float(wanted[n]) if n != "k" else wanted[n] for n in "kace"))
        assert cards(given)[0] == pytest.approx(exact, abs=0.0051)
        values = {n: given.locator(f'{FIGURE} [name="{n}"]') for n in "ace"}
        assert {n: float(one.input_value()) for n, one in values.items()} == {
            n: pytest.approx(wanted[n], abs=0.0051) for n in "ace"
        }  # a slider reaches what a page has measured
    top = 1 / style(given, ".plot .s1")["bottom"]
    clock = style(given, ".plot .clock")
    assert clock["left"] == pytest.approx(0.8934)
    assert clock["bottom"] * top == pytest.approx(1.13, abs=1e-3)
    assert "Measured: 1.13" in said(given)
    values["a"].press("ArrowLeft")
    assert "Measured" not in said(given) and given.locator(".clock").is_hidden()
    assert given.locator('[name="preset"][aria-pressed="true"]').count() == 0


def test_keys_move_everything(page: Page) -> None:
    reached = []
    page.locator(f"{FIGURE} button").first.focus()
    for _ in range(9):
        reached.append(page.evaluate("document.activeElement.name"))
        page.keyboard.press("Tab")
    assert reached == ["preset"] * 3 + ["k"] * 3 + ["a", "c", "e"]
    for name, words, most in (
        ("a", "a: drafts kept", 1),
        ("c", "c: cost of a draft", 1),
        ("e", "e: of a further token", 1.5),
    ):
        slider = page.get_by_role("slider", name=words, exact=True)
        for key, value in (("End", most), ("ArrowLeft", most - 0.01), ("Home", 0)):
            slider.press(key)
            assert page.evaluate(STATE)[name] == pytest.approx(value)
            text = f"{100 * value:.0f} %" if name == "a" else f"{value:.2f}"
            assert slider.get_attribute("aria-valuetext") == text
            assert page.locator(f"label:has([name={name}]) b").inner_text() == text
    two = page.get_by_role("group", name="drafts a round").get_by_text("2", exact=True)
    two.press("Enter")
    assert page.evaluate(STATE)["k"] == 2
    assert two.get_attribute("aria-pressed") == "true"


def test_no_request_leaves(page: Page) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    for case in CASES:
        put(page, *case)
    assert len(asked) >= 3 and all(url.startswith("file:") for url in asked)


CONTRASTS = """() => {
  const figure = document.querySelector("draft-race");
  const pen = document.createElement("canvas").getContext("2d", {
    willReadFrequently: true });
  const rgba = (colour) => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => colour.slice(0, 3).map((v) => v / 255).map((v) =>
    v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) =>
    sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const words = [...figure.querySelectorAll("*")].filter((one) => one.checkVisibility()
    && [...one.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
  return words.map((one) => {
    let ground = one;
    while (ground && rgba(getComputedStyle(ground).backgroundColor)[3] < 255)
      ground = ground.parentElement;
    const both = [getComputedStyle(one).color, ground
      ? getComputedStyle(ground).backgroundColor : "white"].map(rgba).map(light);
    return [one.textContent, (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05)];
  });
}"""
# Parts that hold words, and whether the words of two of them lie on each other.
CROWDED = """() => {
  const find = (some) => [...document.querySelectorAll(`draft-race ${some}`)];
  const box = (selector) => find(selector).map((one) => {
    const { left, right, top, bottom } = one.getBoundingClientRect();
    return { left, right, top: top + 2, bottom: bottom - 2 };
  });
  const faults = [];
  for (const selector of [".line .out", ".plot span", "button", ".fields b",
    ".numbers li", ".keys > span", ".ticks span"]) {
    const all = box(selector);
    all.forEach((a, i) => all.slice(0, i).forEach((b) => {
      if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom
          && b.top < a.bottom) faults.push(selector);
    }));
  }
  for (const one of find(":is(li, label, button, code, p, b)")) {
    const inline = getComputedStyle(one).display === "inline"; // has no clientWidth
    if (one.scrollWidth > one.clientWidth + 1 && !inline)
      faults.push(`${one.localName} ${one.textContent}`);
  }
  return faults;
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 380, 1280])
def test_it_fits_and_is_readable(page: Page, theme: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 1200})
    page.evaluate(
        "(theme) => { document.documentElement.dataset.theme = theme; }", theme
    )
    for case in CASES:
        put(page, *case)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CROWDED) == []
        pale = [pair for pair in page.evaluate(CONTRASTS) if pair[1] < 4.5]
        assert not pale
