"""The movable figure of the cache: what it shows is counted a second time."""

import itertools
import math
import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page

from minidsv3.config import MINI, V3  # noqa: E402

from . import figure_page

pytestmark = figure_page.needs_chromium
GIB = 2**30
UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB", "ZiB"]
FIGURE = "cache-calculator"
STATE = """() => {
  const { kind, tokens, numbersPerToken, bytesPerToken, total, gpus, tokensPerGpu,
    timesSmaller, likeGroups, wrong } = document.querySelector("cache-calculator");
  return { kind, tokens, numbersPerToken, bytesPerToken, total, gpus, tokensPerGpu,
    timesSmaller, likeGroups, wrong };
}"""
SHAPES = (  # layers, heads, groups, d_h, d_v, d_c, d_R, bytes, conversations, step
    (61, 128, 8, 128, 128, 512, 64, 2, 1, 14),
    (3, 4, 2, 32, 24, 40, 16, 4, 5, 0),
    (27, 16, 16, 96, 128, 512, 80, 1, 300, 20),
    (1, 1, 1, 1, 2, 3, 5, 1, 1, 7),
    (1000, 1024, 1000, 16384, 16384, 16384, 16384, 4, 10000, 19),
)
NAMES = ("layers", "heads", "groups", "d_h", "d_v", "d_c", "d_R", "bytes")
BELIEFS = (
    "forget d_R",
    "forget the layers",
    "a rotated key per head",
    "cache the expanded keys and values",
)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The figure, twice."""
    figures = (
        f"<{FIGURE}></{FIGURE}>"
        f'<{FIGURE} preset="Qwen2.5-72B"><p>It needs JavaScript.</p></{FIGURE}>'
    )
    folder = tmp_path_factory.mktemp("cache")
    with figure_page.opened(folder, [FIGURE], figures) as page:
        yield page


@pytest.fixture
def page(opened: Page) -> Page:
    """The figure as it was at first."""
    opened.reload()
    return opened


def kept(kind: str, n_h: int, n_kv: int, d_h: int, d_v: int, d_c: int, d_R: int) -> int:
    """Numbers that one token leaves in one layer."""
    pairs = {"MHA": n_h, "GQA": min(n_kv, n_h), "MQA": 1}
    return d_c + d_R if kind == "MLA" else pairs[kind] * (d_h + d_v)


def put(page: Page, name: str, value: object) -> None:
    """Give one of the first figure's fields a value, as typing does."""
    field = page.locator(f'{FIGURE} >> nth=0 >> [name="{name}"]')
    if name == "bytes":
        field.select_option(str(value))
    else:
        field.fill(str(value))


def choose(page: Page, words: str) -> None:
    page.locator(FIGURE).first.locator(f'[value="{words}"]').click()


def words(page: Page, selector: str) -> list[str]:
    return page.locator(FIGURE).first.locator(selector).all_inner_texts()


def number(text: str) -> float:
    """Read "8.58 GiB", "1/56.9", "56.9 ×" or "70,272"."""
    found = re.match(r"(1/)?([\d.,e-]+)\s*(\w+)?", text)
    assert found is not None, text
    value = float(found[2].replace(",", ""))
    value *= 1024.0 ** UNITS.index(found[3]) if found[3] in UNITS else 1
    return 1 / value if found[1] else value


def rounded(value: float) -> object:
    return pytest.approx(value, rel=0.0051)  # three digits are shown


def check(page: Page) -> dict:
    """The cards and the sentence say what the public fields say."""
    state = page.evaluate(STATE)
    shown = [number(text) for text in words(page, ".numbers b")]
    exact = [state[k] for k in ("numbersPerToken", "bytesPerToken", "tokensPerGpu")]
    assert [shown[0], shown[1], shown[4]] == exact
    near = [state["total"], state["gpus"], 1 / state["timesSmaller"]]
    assert [shown[2], shown[3], shown[5]] == [rounded(value) for value in near]
    formula = words(page, ".numbers li")[0].splitlines()[-1].split("=")[-1]
    assert eval(formula.replace("×", "*")) == state["numbersPerToken"]
    return state


def bars(page: Page) -> list[tuple[float, float, float]]:
    """Length, size and factor of each bar that is to be seen; none runs into words."""
    rows = page.evaluate(
        """() => [...document.querySelectorAll("cache-calculator:first-of-type .bar")]
        .filter((bar) => bar.checkVisibility())
        .map((bar) => {
          const [size, factor] = bar.querySelectorAll("output *");
          const box = bar.querySelector("i").getBoundingClientRect();
          return [box.width, size.innerText, factor.innerText,
            size.getBoundingClientRect().left - box.right];
        })"""
    )
    assert min(row[3] for row in rows) > 0
    return [(long, number(big), number(factor)) for long, big, factor, _ in rows]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_figure_is_counted_again(page: Page, shape: tuple[int, ...]) -> None:
    *sizes, size, conversations, step = shape
    for name, value in zip(NAMES, [*sizes, size], strict=True):
        put(page, name, value)
    put(page, "conversations", conversations)
    put(page, "step", step)
    tokens = round(1024 * 2 ** (step / 2)) if step % 2 == 0 else 1536 * 2 ** (step // 2)
    layers, rest = sizes[0], sizes[1:]
    once = {kind: kept(kind, *rest) for kind in ("MHA", "GQA", "MQA", "MLA")}
    totals = {
        kind: n * layers * size * tokens * conversations for kind, n in once.items()
    }
    for kind, numbers in once.items():
        choose(page, kind)
        state = check(page)
        assert state["tokens"] == tokens
        assert state["numbersPerToken"] == numbers
        assert state["bytesPerToken"] == numbers * layers * size
        assert state["total"] == pytest.approx(totals[kind], rel=1e-12)
        assert state["gpus"] == pytest.approx(totals[kind] / (80 * GIB))
        assert state["tokensPerGpu"] == 80 * GIB // (numbers * layers * size)
        assert state["timesSmaller"] == pytest.approx(once["MHA"] / numbers)
        assert state["likeGroups"] == pytest.approx(numbers / (rest[2] + rest[3]))
        drawn = bars(page)
        assert len(drawn) == 4
        widest = max(long for long, *_ in drawn)
        for (long, big, factor), its in zip(drawn, totals.values(), strict=True):
            assert big == rounded(its)
            assert factor == rounded(its / totals[kind])
            true = widest * its / max(totals.values())
            assert long == pytest.approx(max(true, 2), abs=0.1)  # thin ones are 2 px


@pytest.mark.parametrize(
    ("preset", "kind", "numbers", "per_token", "like", "at_128k"),
    [
        ("DeepSeek-V3", "MLA", 576, 70_272, 2.25, 8.58),
        ("V3 if it were MHA", "MHA", 32_768, 3_997_696, 128, 488),
        ("LLaMA-3.1-405B", "GQA", 2_048, 516_096, 8, 63),
        ("Qwen2.5-72B", "GQA", 2_048, 327_680, 8, 40),
        ("the book’s small model", "MLA", 48, 576, 0.75, 0.0703),
    ],
)
def test_presets_give_the_published_figures(
    page: Page,
    preset: str,
    kind: str,
    numbers: int,
    per_token: int,
    like: float,
    at_128k: float,
) -> None:
    choose(page, preset)
    state = check(page)
    assert (state["kind"], state["tokens"]) == (kind, 131_072)
    assert state["numbersPerToken"] == numbers
    assert state["bytesPerToken"] == per_token
    assert state["likeGroups"] == like
    assert state["total"] / GIB == pytest.approx(at_128k, rel=0.001)
    pressed = page.locator(FIGURE).first.locator('.presets [aria-pressed="true"]')
    assert pressed.all_inner_texts() == [preset]
    put(page, "d_c", 511)
    assert pressed.count() == 0


def test_two_presets_are_our_configs(page: Page) -> None:
    for preset, config in (("DeepSeek-V3", V3), ("the book’s small model", MINI)):
        choose(page, preset)
        fields = {
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "d_h": config.qk_nope_head_dim,
            "d_v": config.v_head_dim,
            "d_c": config.kv_lora_rank,
            "d_R": config.qk_rope_head_dim,
        }
        for name, value in fields.items():
            field = page.locator(FIGURE).first.locator(f'[name="{name}"]')
            assert field.input_value() == str(value), name


def test_v3_is_57_times_smaller_and_the_sentence_says_so(page: Page) -> None:
    assert check(page)["timesSmaller"] == pytest.approx(56.9, abs=0.05)
    said = words(page, ".say")[0]
    assert "56.9 times less" in said and "8.58 GiB" in said and "10.7 %" in said
    long = [bar[0] for bar in bars(page)]
    assert long[0] > 40 * long[3] > 0
    choose(page, "MHA")
    assert "7 GPUs" in words(page, ".say")[0]
    choose(page, "MLA")
    put(page, "heads", 2)
    assert "nothing is saved" in words(page, ".say")[0]


@pytest.mark.parametrize("belief", BELIEFS)
def test_a_wrong_belief_stands_beside_the_right_figure(page: Page, belief: str) -> None:
    layers, n_h, _, d_h, d_v, d_c, d_R, size = 61, 128, 8, 128, 128, 512, 64, 2
    right = check(page)
    choose(page, belief)
    state = check(page)
    wrong = state.pop("wrong")
    assert right.pop("wrong") is None and state == right
    numbers = {
        "forget d_R": d_c,
        "forget the layers": d_c + d_R,
        "a rotated key per head": d_c + n_h * d_R,
        "cache the expanded keys and values": n_h * (d_h + d_R + d_v),
    }[belief]
    counted = 1 if belief == "forget the layers" else layers
    factor = numbers * counted / (576 * layers)
    assert wrong["numbers"] == numbers
    assert wrong["bytes"] == numbers * counted * size
    assert wrong["factor"] == pytest.approx(factor)
    assert wrong["total"] == pytest.approx(factor * right["total"])
    *_, mla, row = bars(page)
    assert row[1:] == (rounded(wrong["total"]), rounded(factor))
    assert row[0] == pytest.approx(max(mla[0] * factor, 2), rel=0.01)
    said = words(page, ".say")[0]
    assert number(said.split("cache would be ")[1]) == rounded(factor)
    assert belief == "forget the layers" or f"{numbers:,} numbers" in said
    choose(page, belief)
    assert len(bars(page)) == 4 and page.evaluate(STATE)["wrong"] is None


def test_what_can_be_believed_about_mla_only_goes_with_it(page: Page) -> None:
    for belief, kind in itertools.product(BELIEFS, ("GQA", "MHA")):
        choose(page, "MLA")
        choose(page, belief)
        choose(page, kind)
        about_all = belief == "forget the layers"
        assert (page.evaluate(STATE)["wrong"] is not None) == about_all
        button = page.locator(FIGURE).first.locator(f'[value="{belief}"]')
        assert button.is_enabled() == about_all
        if about_all:
            choose(page, belief)


@pytest.mark.parametrize("name", ["layers", "heads", "d_h", "d_R", "conversations"])
@pytest.mark.parametrize("typed", ["0", "-3", "2.5", "1e", "99999999", ""])
def test_what_cannot_be_counted_with_is_named(
    page: Page, name: str, typed: str
) -> None:
    field = page.locator(FIGURE).first.locator(f'[name="{name}"]')
    field.press("Control+a")
    field.press("Delete")
    page.keyboard.type(typed)
    assert field.get_attribute("aria-invalid") == "true"
    said = words(page, ".bad")[0]
    title = page.locator(FIGURE).first.locator(f"label:has([name={name}]) span")
    assert said.split(":")[0] in title.inner_text()
    assert "a whole number from 1 to" in said
    assert typed in said or typed == "1e"  # a browser does not tell what is no number
    stands = said.split("Until then ")[1].removesuffix(" counts.").replace(",", "")
    state = check(page)
    put(page, name, stands)
    assert check(page) == state
    assert words(page, ".bad") == [""]
    assert field.get_attribute("aria-invalid") == "false"


def test_letters_do_not_get_into_a_field(page: Page) -> None:
    before = check(page)
    field = page.locator(FIGURE).first.locator('[name="layers"]')
    field.focus()
    page.keyboard.type("many")
    assert check(page) == before


def test_more_groups_than_heads_count_as_the_heads(page: Page) -> None:
    choose(page, "GQA")
    put(page, "groups", 300)
    assert check(page)["numbersPerToken"] == 32_768
    assert "128 count" in words(page, ".bad")[0]
    put(page, "heads", 512)
    assert check(page)["numbersPerToken"] == 300 * 256
    assert words(page, ".bad") == [""]
    choose(page, "MLA")
    put(page, "heads", 4)
    assert words(page, ".bad") == [""]  # no concern of MLA's


def test_it_works_from_the_keyboard_alone(page: Page) -> None:
    figure = page.locator(FIGURE).first
    slider = figure.locator("[type=range]")
    slider.focus()
    expected = {"ArrowRight": 196_608, "End": 2**20, "ArrowLeft": 786_432, "Home": 1024}
    for key, tokens in expected.items():
        slider.press(key)
        assert check(page)["tokens"] == tokens
        assert f"{tokens:,} tokens" in words(page, ".context output")[0]
        assert f"{tokens:,} tokens" in (slider.get_attribute("aria-valuetext") or "")
    figure.locator(":checked[type=radio]").press("ArrowUp")
    assert check(page)["kind"] == "MQA"
    figure.locator('[name="layers"]').press("ArrowUp")
    assert check(page)["bytesPerToken"] == 256 * 62 * 2
    figure.locator(".presets button").last.press("Enter")
    assert check(page)["bytesPerToken"] == 576
    figure.locator(".beliefs button").nth(2).press("Space")
    assert page.evaluate(STATE)["wrong"]["numbers"] == 32 + 4 * 16


def test_two_figures_do_not_meddle(page: Page) -> None:
    other = page.locator(FIGURE).nth(1)
    before = other.inner_text()
    assert "It needs JavaScript" not in before
    assert other.evaluate("(it) => it.bytesPerToken") == 327_680
    choose(page, "MQA")
    put(page, "d_h", 99)
    assert other.inner_text() == before


def test_a_figure_that_is_moved_remembers(page: Page) -> None:
    put(page, "layers", 12)
    before = page.locator(FIGURE).first.inner_text()
    page.evaluate("document.body.append(document.querySelector('cache-calculator'))")
    moved = page.locator(FIGURE).last
    assert moved.inner_text() == before
    assert moved.locator("[name=layers]").input_value() == "12"


def test_lit_sizes_are_those_the_formula_reads(page: Page) -> None:
    reads = {
        "MHA": {"heads", "d_h", "d_v"},
        "GQA": {"groups", "d_h", "d_v"},
        "MQA": {"d_h", "d_v"},
        "MLA": {"d_c", "d_R"},
    }
    for kind, sizes in reads.items():
        choose(page, kind)
        lit = page.locator(FIGURE).first.locator(".counts input")
        names = {field.get_attribute("name") for field in lit.all()}
        assert names == sizes | {"layers", "conversations"}


@pytest.mark.parametrize("belief", BELIEFS)
def test_nothing_sticks_out_of_a_telephone(page: Page, belief: str) -> None:
    outside = """() => [...document.querySelectorAll("cache-calculator *")]
      .filter((one) => one.getBoundingClientRect().right >
        one.closest("cache-calculator").getBoundingClientRect().right - 10)
      .map((one) => one.outerHTML.slice(0, 80))"""
    choose(page, belief)
    for shape in (SHAPES[0], SHAPES[4]):
        *sizes, conversations, step = shape
        for name, value in zip(NAMES, sizes, strict=True):
            put(page, name, value)
        put(page, "conversations", conversations)
        put(page, "step", step)
        put(page, "layers", "")
        room = page.evaluate("document.documentElement.scrollWidth")
        assert room == 390 and page.evaluate(outside) == []
    assert math.isfinite(page.evaluate(STATE)["wrong"]["factor"])
