"""The router one can move: what it shows is what a few lines of NumPy compute."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Page

from . import figure_page

pytestmark = figure_page.needs_chromium
SCRIPTS = ("router-desk", "router-group", "router-verdict")
RULES = ("none", "gates", "zero", "max", "softmax")
PRESETS = (
    "balanced",
    "one loud expert",
    "a bias brings one in",
    "all biases negative",
)
each_rule = pytest.mark.parametrize("rule", RULES)
STATE = """() => {
  const { s, b, choice, groupScores, kept, chosen, gates } =
    document.querySelector("router-desk");
  return { s, b, choice, groupScores, kept, chosen, gates };
}"""
SET = """([s, b, rule]) => {
  const desk = document.querySelector("router-desk");
  Object.assign(desk, { s, b, rule });
  desk.querySelector("select").value = rule;
  desk.draw();
}"""

WIDE = """() => [...document.querySelectorAll("router-desk, router-desk *")]
  .filter((x) => x.getBoundingClientRect().right > innerWidth || (x.localName !== "i" &&
    x.clientWidth && x.scrollWidth > x.clientWidth + 1))
  .map((x) => x.outerHTML)"""
SMALLEST = """() => Math.min(...[...document.querySelectorAll("router-desk *")]
  .filter((x) => x.children.length === 0 && x.textContent)
  .map((x) => parseFloat(getComputedStyle(x).fontSize)))"""

DRAWN = """() => [...document.querySelectorAll(".choices .column")].map((column) => {
  const box = column.getBoundingClientRect();
  const at = (y) => 2 * (box.bottom - y) / box.height - 0.5;
  const [bar, bias, line, grip] = [...column.children].map((x) =>
    x.getBoundingClientRect());
  const other = document.querySelector(`.biases [data-x="${column.dataset.x}"]`);
  const [below, own] = [other, other.lastElementChild].map((x) =>
    x.getBoundingClientRect());
  return { bar: at(bar.top), line: at((line.top + line.bottom) / 2),
    grip: at((grip.top + grip.bottom) / 2), low: at(bias.bottom), high: at(bias.top),
    b: (below.bottom - (own.top + own.bottom) / 2) / below.height - 0.5 };
})"""


@pytest.fixture(scope="module", params=[SCRIPTS, SCRIPTS[::-1]], ids=["a-z", "z-a"])
def opened(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Page]:
    """The figure, its scripts in either order, and the theme's sheet beside ours."""
    theme = importlib.util.find_spec("pydata_sphinx_theme")  # its sheet knows classes
    sheets = []
    if theme and theme.origin:
        folder = Path(theme.origin).parent / "theme/pydata_sphinx_theme/static/styles"
        sheets.append((folder / "pydata-sphinx-theme.css").as_uri())
    body = (
        "<style>* { box-sizing: border-box } body { margin: 0 16px }</style>"
        '<main class="bd-article"><router-desk><p>It moves.</p></router-desk></main>'
    )
    folder = tmp_path_factory.mktemp("desk")
    with figure_page.opened(folder, request.param, body, sheets, 1200) as page:
        yield page


@pytest.fixture
def page(opened: Page) -> Page:
    """The figure as it was at first."""
    opened.reload()
    opened.wait_for_selector("router-desk.ready")
    return opened


def route(s: list[float], b: list[float], rule: str = "none") -> dict[str, Any]:
    """The router of section 2.1.2 for one token, or one of four mistakes."""
    affinity, bias = np.array(s), np.array(b)
    if rule == "softmax":
        logits = np.log(affinity) - np.log1p(-affinity)
        affinity = np.exp(logits) / np.exp(logits).sum()
    choice = (affinity + bias).round(9)
    pairs = np.sort(choice.reshape(4, 4), axis=1)[:, -2:]
    scores = pairs[:, 1] if rule == "max" else pairs.sum(axis=1).round(9)
    kept = np.sort(np.argsort(-scores, kind="stable")[:2])
    mask = np.isin(np.arange(16) // 4, kept)
    masked = np.where(mask, choice, 0.0 if rule == "zero" else -np.inf)
    chosen = np.argsort(-masked, kind="stable")[:4]
    weight = choice if rule == "gates" else affinity
    gates = np.zeros(16)
    gates[chosen] = 2.5 * weight[chosen] / weight[chosen].sum()
    return {
        "choice": choice, "groupScores": scores, "kept": kept, "chosen": chosen,
        "gates": gates,
    }  # fmt: skip


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def said(page: Page) -> str:
    return page.locator("router-desk .say").inner_text()


def check(page: Page, rule: str = "none") -> dict[str, Any]:
    """Fields and shown numbers agree with NumPy; returns the fields."""
    state = page.evaluate(STATE)
    wanted = route(state["s"], state["b"], rule)
    assert state["chosen"] == list(wanted["chosen"])
    assert state["kept"] == list(wanted["kept"])
    for name in ("choice", "groupScores", "gates"):
        assert state[name] == pytest.approx(list(wanted[name])), name
    assert sum(state["gates"]) == pytest.approx(2.5)

    cards = page.locator("router-group")
    titles = cards.locator(".title").all_inner_texts()
    assert ["open" in title for title in titles] == [
        g in state["kept"] for g in range(4)
    ]
    scores = [number(re.findall(r"−?\d+\.\d+", title)[-1]) for title in titles]
    assert scores == pytest.approx(state["groupScores"], abs=0.0051)
    lit = page.locator("router-group .names b.chosen").all_inner_texts()
    assert sorted(map(int, lit)) == sorted(state["chosen"])
    shown = page.locator("output[data-row=g]").all_inner_texts()
    for i, text in enumerate(shown):
        assert (text == "·") == (i not in state["chosen"])
        assert text == "·" or number(text) == pytest.approx(
            state["gates"][i], abs=0.0051
        )
    mixed = page.locator("router-desk .mix i").all_inner_texts()
    assert list(map(int, mixed)) == state["chosen"]
    assert page.locator("router-desk .sum b").inner_text() == "2.50"
    return state


def drag(page: Page, expert: int, name: str, up: float) -> None:
    grip = page.locator(f"router-group .column[data-x='{expert}'] [role=slider].{name}")
    box = grip.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x, y - up, steps=4)
    page.mouse.up()


def true_words(
    said: str, rule: str, made: dict[str, Any], right: dict[str, Any]
) -> None:
    """The sentence names the experts and groups that it should, and no others."""
    top = np.argsort(-right["choice"], kind="stable")[:4]
    lost = [i for i in top if i // 4 not in right["kept"]]
    came, left = (
        [i for i in one["chosen"] if i not in other["chosen"]]
        for one, other in ((made, right), (right, made))
    )
    named = {
        "none": [f"Expert {i} is the " for i in lost[:1]],
        "zero": [f"of expert {i}. A mask of −∞ beats nobody" for i in left[:1]],
        "max": [f"Group {g} is open" for g in made["kept"] if g not in right["kept"]][
            :1
        ],
        "softmax": [f"for expert{'s' * (len(left) > 1)} {i}" for i in left[:1]],
        "gates": [] if np.allclose(made["gates"], right["gates"]) else ["instead of"],
    }[rule]
    mark = {
        "none": "its group is closed", "zero": "yet chosen", "max": "is open for",
        "softmax": " in for ", "gates": "leaked in",
    }[rule]  # fmt: skip
    rounded = rule == "gates" and abs(made["gates"] - right["gates"]).max() < 0.01
    assert (mark in said) == bool(named) or rounded, said
    assert all(name in said for name in named) or rounded, said
    for i in came if mark in said and rule in ("zero", "max", "softmax") else []:
        assert re.search(rf"[Ee]xperts? [\d, and]*\b{i}\b", said), said


def states(many: int, seed: int) -> Iterator[tuple[list[float], list[float]]]:
    """Random faders: on a coarse grid, where ties are common; no bias, and negative."""
    rng = np.random.default_rng(seed)
    for n in range(many):
        step = 0.01 if n % 2 else 0.1
        s = rng.integers(1, round(1 / step), 16) * step
        b = rng.integers(-round(0.5 / step), round(0.5 / step) + 1, 16) * step
        if n % 5 == 0:  # every choice below 0
            s, b = s * 0.4, b - 0.5
        s, b = s.clip(0.01, 0.99), (b * (n % 3 > 0)).clip(-0.5, 0.5)
        yield s.round(2).tolist(), b.round(2).tolist()


@each_rule
def test_it_routes_as_numpy_does(page: Page, rule: str) -> None:
    words = set()
    for s, b in states(60, RULES.index(rule)):
        right = route(s, b)
        if rule == "gates" and abs(right["choice"][right["chosen"]].sum()) < 1e-6:
            continue  # nothing to divide by: see below
        page.evaluate(SET, [s, b, rule])
        check(page, rule)
        words.add(re.sub(r"[−\d.]+", "", said(page)))
        true_words(said(page), rule, route(s, b, rule), right)
        assert not re.search("undefined|NaN", said(page))
    assert len(words) > 1  # it says different things about different states


@each_rule
@pytest.mark.parametrize("preset", PRESETS)
def test_presets(page: Page, preset: str, rule: str) -> None:
    page.select_option("router-desk select", rule)
    page.get_by_role("button", name=preset).click()
    pressed = page.locator("router-desk [aria-pressed=true]")
    assert pressed.all_inner_texts() == [preset]
    check(page, rule)


def test_the_best_of_all_is_locked_out(page: Page) -> None:
    page.get_by_role("button", name="one loud expert").click()
    state = check(page)
    loud = state["choice"].index(max(state["choice"]))
    assert loud not in state["chosen"]
    own, rival = (
        state["groupScores"][loud // 4],
        min(state["groupScores"][g] for g in state["kept"]),
    )
    assert f"Expert {loud} is the best of all, but its group is closed" in said(page)
    assert f"add up to {own:.2f}, group 2’s to {rival:.2f}." in said(page)
    assert page.locator(".names b.lost").all_inner_texts() == [str(loud)]
    page.select_option("router-desk select", "max")
    assert loud in check(page, "max")["chosen"]
    assert f"Group {loud // 4} is open for the sake of one expert" in said(page)


def test_a_bias_moves_the_choice_and_no_gate(page: Page) -> None:
    before = check(page)
    page.get_by_role("button", name="a bias brings one in").click()
    state = check(page)
    (new,) = set(state["chosen"]) - set(before["chosen"])
    assert f"The bias brought expert {new} in" in said(page)
    sharing = sum(state["s"][i] for i in state["chosen"])
    assert state["gates"][new] == pytest.approx(2.5 * state["s"][new] / sharing)
    page.select_option("router-desk select", "gates")
    assert check(page, "gates")["gates"][new] > state["gates"][new] + 0.1
    assert f"the biases leaked in. Expert {new}’s gate is" in said(page)


def test_a_mask_of_zero_lets_a_closed_expert_in(page: Page) -> None:
    page.get_by_role("button", name="all biases negative").click()
    right = check(page)
    assert "closed groups stand at −∞" in said(page)
    page.select_option("router-desk select", "zero")
    state = check(page, "zero")
    (new,) = set(state["chosen"]) - set(right["chosen"])
    assert new // 4 not in state["kept"]
    assert f"Closed, and yet chosen: expert {new}." in said(page)
    page.get_by_role("button", name="balanced").click()
    assert "does no harm" in said(page)


def test_softmax_makes_the_experts_compete(page: Page) -> None:
    page.select_option("router-desk select", "softmax")
    before = check(page, "softmax")
    drag(page, 10, "s", 25)
    after = check(page, "softmax")
    assert after["choice"][0] < before["choice"][0]
    assert "sum to 1" in said(page)


def test_ties_go_to_the_lower_number(page: Page) -> None:
    # In floating point 0.1 + 0.2 > 0.3: it must be a tie all the same.
    s = [0.3, 0.3, 0.1, 0.3] + [0.3, 0.3, 0.1, 0.3] * 3
    page.evaluate(SET, [s, [0, 0, 0.2, 0] * 4, "none"])
    state = check(page)
    assert state["kept"] == [0, 1] and state["chosen"] == [0, 1, 2, 3]
    assert "tie" in said(page)


def test_no_gates_when_the_wrong_sum_is_zero(page: Page) -> None:
    page.evaluate(SET, [[0.5] * 16, [-0.5] * 16, "gates"])
    assert "nothing is divided by 0" in said(page)
    page.evaluate(SET, [[0.5] * 16, [-0.5] * 16, "none"])
    assert check(page)["gates"][0] == 0.625


@pytest.mark.parametrize(
    ("expert", "name", "up"),
    [(5, "s", 30), (0, "s", -25), (12, "b", 18), (10, "b", -22), (15, "s", 400)],
)
def test_drag(page: Page, expert: int, name: str, up: float) -> None:
    before = check(page)
    drag(page, expert, name, up)
    after = check(page)
    height = page.locator(
        f"[data-x='{expert}']:has(> [role=slider].{name})"
    ).first.bounding_box()
    assert height is not None
    moved = up / height["height"] * {"s": 2, "b": 1}[name]
    wanted = min(before[name][expert] + moved, {"s": 0.99, "b": 0.5}[name])
    assert after[name][expert] == pytest.approx(wanted, abs=0.02)  # a pixel
    for other in set(range(16)) - {expert}:
        assert after[name][other] == before[name][other]
    assert page.locator("router-desk [aria-pressed=true]").count() == 0


def test_keys_and_fields(page: Page) -> None:
    grip = page.get_by_role("slider", name="expert 6, affinity s")
    for key, value in (
        ("ArrowUp", 0.31),
        ("PageUp", 0.41),
        ("Home", 0.01),
        ("End", 0.99),
    ):
        grip.press(key)
        assert float(grip.get_attribute("aria-valuenow") or "nan") == value
        assert check(page)["s"][6] == value
    field = {
        n: page.locator(f"router-desk input[name={n}]") for n in ("expert", "s", "b")
    }
    grip.press("Enter")
    page.keyboard.type("0.37")
    assert check(page)["s"][6] == 0.37  # while one types
    field["b"].fill("-0.8")
    assert check(page)["b"][6] == -0.5
    field["b"].press("Tab")
    assert float(field["b"].input_value()) == -0.5  # the field says what was taken
    field["expert"].fill("13")
    assert float(field["s"].input_value()) == check(page)["s"][13]
    field["s"].fill("0.9")
    assert check(page)["s"][13] == 0.9 and 13 in check(page)["chosen"]
    field["expert"].fill("16")  # there is none
    field["s"].fill("")
    assert check(page)["s"][13] == 0.9


@pytest.mark.parametrize("width", [360, 390, 1200])
def test_it_fits(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 1200})
    for preset in PRESETS:
        page.get_by_role("button", name=preset).click()
        assert page.evaluate(WIDE) == []
        assert page.evaluate(SMALLEST) >= 11
    page.set_viewport_size({"width": 390, "height": 1200})


def test_bars_and_grips_stand_at_their_values(page: Page) -> None:
    page.get_by_role("button", name="all biases negative").click()
    state = check(page)
    drawn = page.evaluate(DRAWN)
    for i, levels in enumerate(drawn):
        s, b = state["s"][i], state["b"][i]
        wanted = {"bar": s, "grip": s, "line": s + b, "low": s + b, "high": s, "b": b}
        for name, value in wanted.items():
            assert levels[name] == pytest.approx(value, abs=0.03), (i, name)
    last = min(state["choice"][i] for i in state["chosen"])
    bars = page.evaluate(
        "[...document.querySelectorAll('.choices i.bar')].map((bar) => { const b = "
        "bar.parentElement.parentElement.getBoundingClientRect(); return 2 * (b.bottom "
        "- bar.getBoundingClientRect().bottom + 1) / b.height - 0.5; })"
    )
    assert bars == pytest.approx([last] * 4, abs=0.03)
