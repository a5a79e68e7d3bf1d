"""Figures that belong to the page: right in light and dark mode, on paper and phone.

Importing this module switches Matplotlib to the book's style. `show` puts a figure on
the page as inline SVG whose colours are CSS variables (defined in
`_static/minidsv3.css`); where those do not exist, as in a bare notebook, each
variable falls back to a colour that reads on white and on black.

    fig, ax = plt.subplots()
    ax.plot(steps, losses, label="held out")
    figures.label_lines(ax)
    figures.show(fig, alt="Loss against step: falls from 8 to 3.1 bits, then flattens.")
"""

import hashlib
import html
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#1c2127", "#6b7480", "#d9dee4", "#fdfdfc"
BLUE, ORANGE, GREEN, PURPLE, GOLD, GREY = PALETTE = (
    "#0f62a8", "#d1560a", "#0b8263", "#a2478c", "#a97600", "#5f6975",
)  # fmt: skip
_FALLBACK = dict(zip(PALETTE, ("#2f86cf", "#e06a1f", "#1a9e7b", "#bd66a8", "#b88a1c",
                               "#808a96"), strict=True))  # fmt: skip
_VARIABLES = {
    INK: "var(--fig-ink, currentColor)",
    MUTED: "var(--fig-muted, #808a96)",
    GRID: "var(--fig-grid, #808a9644)",
    PAPER: "var(--fig-paper, Canvas)",
} | {c: f"var(--fig-c{i}, {_FALLBACK[c]})" for i, c in enumerate(PALETTE, 1)}
_SHADES = LinearSegmentedColormap.from_list("shades", [(BLUE, 0.0), (BLUE, 1.0)], 40)
matplotlib.colormaps.register(_SHADES, force=True)  # nothing → blue, any background
plt.style.use(Path(__file__).with_name("style.mplstyle"))


def show(fig: Figure, alt: str) -> None:
    """Display `fig` as inline SVG and close it, so that no backend shows it twice.

    `alt` says in a sentence or two what a reader who cannot see the figure must know;
    it becomes the figure's `aria-label`. ValueError if it is missing.
    """
    markup = svg(fig, alt)
    plt.close(fig)
    display(HTML(markup))


def svg(fig: Figure, alt: str) -> str:
    """`fig` as an `<svg>` element: themed, scalable, the same bytes for the same data.

    Ids carry a hash of the drawing, so two figures on one page never share one.
    """
    if len(alt.split()) < 3:
        raise ValueError(f"alt={alt!r}: say in a sentence what the figure shows")
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "minidsv3", "svg.fonttype": "path"}):
        fig.savefig(buffer, format="svg", metadata={"Date": None})
    # Drop the metadata, and a style for `*` that would reach out into the page.
    unwanted = r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->"
    body = re.sub(unwanted, "", buffer.getvalue(), flags=re.DOTALL)
    body = re.sub(r"(\d\d\.\d\d)\d+", r"\1", body[body.index("<svg") :])
    view = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', body)
    assert view is not None  # Matplotlib always writes one
    key = "f" + hashlib.sha256((alt + body).encode()).hexdigest()[:8]
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", body)
    body = re.sub("|".join(_VARIABLES), lambda m: _VARIABLES[m[0]], body)
    inside = re.sub(r"\s*\n\s*", "\n", body[body.index(">") + 1 :])
    return (
        f'<svg class="minidsv3-figure" role="img" aria-label="{html.escape(alt)}" '
        f'viewBox="{view[0][9:-1]}" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink" stroke-linejoin="round" '
        'stroke-linecap="butt" style="display:block; width:100%; height:auto; '
        f'max-width:{1.72 * float(view[1]):.0f}px; margin:auto">{inside}'
    )


def drawing(name: str, alt: str) -> None:
    """Display the hand-made drawing `_static/<name>` as inline SVG, no wider than drawn.

    It must take its colours from the same CSS variables. `alt` as in `show`: ValueError
    if it is missing. FileNotFoundError if there is no such drawing.
    """
    if len(alt.split()) < 3:
        raise ValueError(f"alt={alt!r}: say in a sentence what the drawing shows")
    path = Path(__file__).parent / "_static" / name
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in path.parent.glob("*.svg")))
        raise FileNotFoundError(f"no drawing {name!r} in book/_static, only {there}")
    body = re.sub(r"<!--.*?-->", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    body = body[body.index("<svg") :]
    view = re.search(r'viewBox="([-\d.]+ [-\d.]+ ([\d.]+) [\d.]+)"', body)
    if view is None:
        raise ValueError(f"{name}: its <svg> has no viewBox, so it cannot be scaled")
    key = "d" + hashlib.sha256((alt + body).encode()).hexdigest()[:8]
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", body)
    inside = re.sub(r"\s*\n\s*", "\n", body[body.index(">") + 1 :])
    display(HTML(
        f'<svg class="minidsv3-figure" role="img" aria-label="{html.escape(alt)}" '
        f'viewBox="{view[1]}" xmlns="http://www.w3.org/2000/svg" '
        'style="display:block; width:100%; height:auto; '
        f'max-width:{float(view[2]):.0f}px; margin:auto">{inside}'
    ))  # fmt: skip


def label_lines(ax: Axes, gap: float = 0.075) -> None:
    """Write each labelled line's name at its right end, in its colour: no legend.

    Names closer than `gap` (a fraction of the axes' height) are pushed apart, upwards.
    """
    lines = [ln for ln in ax.get_lines() if not str(ln.get_label()).startswith("_")]
    ends = [ln.get_xydata()[-1] for ln in lines]
    ax.autoscale_view()
    to_axes = (ax.transData - ax.transAxes).transform
    floor = -np.inf
    for end, line in sorted(zip(ends, lines, strict=True), key=lambda e: e[0][1]):
        x, y = to_axes(end)
        floor = max(y, floor + gap)
        ax.annotate(
            str(line.get_label()), (x, y), (x + 0.015, floor), va="center",
            xycoords="axes fraction", color=line.get_color(), annotation_clip=False,
        )  # fmt: skip


def loupe(ids: Sequence[int], weights: np.ndarray, heads: Sequence[str] = ()) -> None:
    """Display the movable `<attention-loupe>`: which bytes does a byte read?

    `ids` are T byte ids (256 = boundary), `weights` (N_h, T, T) the softmax output,
    row = query. Names for the heads are optional. ValueError if the shapes disagree.
    """
    weights = np.asarray(weights)
    if weights.ndim != 3 or weights.shape[1:] != (len(ids), len(ids)):
        raise ValueError(f"weights {weights.shape}: expected (N_h, T, T), T={len(ids)}")
    data = {"ids": list(map(int, ids)), "heads": list(heads)}
    text = json.dumps(data | {"weights": np.round(weights, 4).tolist()})
    display(HTML(
        f'<attention-loupe><script type="application/json">{text}</script>'
        "<p>This figure moves: it needs JavaScript and the book's page.</p>"
        "</attention-loupe>"
    ))  # fmt: skip
