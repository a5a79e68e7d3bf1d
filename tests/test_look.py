"""The book's look: figures fit both themes, and the cover says what is true."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BOOK = Path(__file__).parents[1] / "book"
STATIC = BOOK / "_static"


def load(name: str) -> ModuleType:
    """Import a module of the book's folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"book_{name}", BOOK / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    """The plotting functions, without a window."""
    import matplotlib

    matplotlib.use("Agg")
    return load("figures")


def draw(
    figures: ModuleType, slope: float = 1.0, alt: str = "A line that rises."
) -> str:
    fig, ax = figures.plt.subplots()
    ax.plot(np.arange(5), slope * np.arange(5), marker="o", label="a line")
    ax.fill_between([0, 4], 0, 1, color=figures.GREEN, alpha=0.2)
    figures.label_lines(ax)
    try:
        return figures.svg(fig, alt)
    finally:
        figures.plt.close(fig)


@pytest.mark.parametrize("alt", ["", "loss curve"])
def test_a_figure_without_words_is_refused(figures: ModuleType, alt: str) -> None:
    with pytest.raises(ValueError, match="say in a sentence"):
        draw(figures, alt=alt)


def test_same_data_same_bytes(figures: ModuleType) -> None:
    assert draw(figures) == draw(figures)


def test_two_figures_share_no_id(figures: ModuleType) -> None:
    first, second = draw(figures), draw(figures, slope=2.0)
    ids = [re.findall(r'\bid="([^"]+)"', text) for text in (first, second)]
    assert ids[0] and not set(ids[0]) & set(ids[1])
    for text, own in zip((first, second), ids, strict=True):
        used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)
        assert {a or b for a, b in used} <= set(own)


def test_every_colour_follows_the_theme(figures: ModuleType) -> None:
    text = draw(figures)
    outside = re.sub(r"var\([^()]*\)", "", text)
    assert not re.findall(r"(?:fill|stroke): #\w+", outside)
    assert "<style" not in text  # Matplotlib's would style the whole page


def test_the_style_sheet_has_every_variable_in_both_themes(figures: ModuleType) -> None:
    used = set(re.findall(r"var\((--[\w-]+)", draw(figures) + str(figures._VARIABLES)))
    css = (STATIC / "minidsv3.css").read_text(encoding="utf-8")
    light, dark = css.split("@media screen", 1)
    for name in sorted(used):
        assert f"{name}:" in light, f"{name} has no light value"
        assert f"{name}:" in dark, f"{name} has no dark value"


def test_loupe_refuses_a_matrix_of_another_text(figures: ModuleType) -> None:
    with pytest.raises(ValueError, match="T=3"):
        figures.loupe([1, 2, 3], np.zeros((2, 4, 4)))


def test_the_cover_is_drawn_by_its_script_and_true() -> None:
    cover = load("cover")
    assert (STATIC / "cover.svg").read_text(encoding="utf-8") == cover.cover()
    scores, kept, chosen = cover.route(seed=160)
    assert len(scores) == 256 and len(kept) == 4 and len(set(chosen)) == 8
    assert set(chosen // 32) <= set(kept)
    dots = re.findall(r"<circle [^>]*/>", "".join(cover.experts()))
    glow = [d for d in dots if 'opacity=".22"' in d]
    assert len(glow) == 8
    assert len(dots) == 256 + len(glow) + 1  # and the shared expert


@pytest.mark.parametrize("script", sorted(STATIC.glob("*.js")), ids=lambda p: p.stem)
def test_elements_are_defined_once_and_load_nothing(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert f'if (customElements.get("{script.stem}")) return;' in text
    assert not re.search(r"https?://|import\s|fetch\(", text)
    assert len(text.splitlines()) < 200


def test_progress_passes_everything_on_and_draws_where_it_is_told(
    figures: ModuleType, tmp_path: Path, monkeypatch, capfd
) -> None:
    screen = tmp_path / "screen"
    for name, shown in ((str(screen), ""), ("", ""), (None, "3/3")):
        monkeypatch.delenv("MINIDSV3_TERMINAL", raising=False)
        if name is not None:
            monkeypatch.setenv("MINIDSV3_TERMINAL", name)
        assert list(figures.progress(iter("abc"), total=3)) == ["a", "b", "c"]
        said = capfd.readouterr()
        assert said.out == "" and shown in said.err and bool(said.err) == bool(shown)
    assert "3/3" in screen.read_text()


def test_surprise_shades_each_byte_by_its_cost(figures: ModuleType, capsys) -> None:
    shown: list = []
    figures.display = shown.append
    figures.surprise([97, 60, 10, 200], [0.0, 4.0, 8.0, 80.0])
    text = shown[0].data
    shares = [int(x) for x in re.findall(r"(\d+)%, transparent", text)]
    assert shares[0] == 0 and shares[1] * 2 == pytest.approx(shares[2], abs=1)
    assert shares[2] == shares[3]
    assert "&lt;" in text and text.count("\n") == 1 and "4.0 bits" in text
    with pytest.raises(ValueError, match="1 ids and 2 costs"):
        figures.surprise([97], [1.0, 2.0])
