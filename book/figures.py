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
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from tqdm import tqdm

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
HERE = Path(__file__).parent
plt.style.use(HERE / "style.mplstyle")


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
    label = _label(alt)
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
        f'<svg {label} viewBox="{view[0][9:-1]}" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink" stroke-linejoin="round" '
        'stroke-linecap="butt" style="display:block; width:100%; height:auto; '
        f'max-width:{1.72 * float(view[1]):.0f}px; margin:auto">{inside}'
    )


def drawing(name: str, alt: str) -> None:
    """Display a hand-made SVG of `_static/` inline, no wider than its viewBox.

    `alt` as in `show`. The file names the CSS variables itself; its ids get a hash, as
    in `svg`. FileNotFoundError names the drawings there are.
    """
    label, path = _label(alt), HERE / "_static" / name
    if not path.is_file():
        there = ", ".join(sorted(other.name for other in path.parent.glob("*.svg")))
        raise FileNotFoundError(f"no drawing {name!r} in book/_static, only {there}")
    text = re.sub(r"<!--.*?-->", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    key = "d" + hashlib.sha256((alt + text).encode()).hexdigest()[:8]
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", text)
    opening, inside = text[text.index("<svg ") + 5 :].split(">", 1)
    opening = re.sub(r'\b(class|role|aria-label)="[^"]*"\s*', "", opening).strip()
    view = re.search(r'viewBox="\S+ \S+ (\S+) \S+"', opening)
    if view is None:
        raise ValueError(f"{name} has no viewBox, so it cannot be scaled")
    style = "display:block; width:100%; height:auto; margin:auto; max-width"
    inside = re.sub(r"\s*\n\s*", "\n", inside)
    display(HTML(f'<svg {label} {opening} style="{style}:{view[1]}px">{inside}'))


def _label(alt: str) -> str:
    if len(alt.split()) < 3:
        raise ValueError(f"alt={alt!r}: say in a sentence what the figure shows")
    return f'class="minidsv3-figure" role="img" aria-label="{html.escape(alt)}"'


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


def surprise(ids: Sequence[int], bits: Sequence[float], most: float = 8.0) -> None:
    """Display bytes as text, shaded by cost: nothing → pale, `most` → dark.

    `ids` and `bits` have equal length T. The cost stands in each byte's title, so that
    hovering tells it. ValueError if the lengths differ.
    """
    if len(ids) != len(bits):
        raise ValueError(f"{len(ids)} ids and {len(bits)} costs: give one cost an id")
    cells = []
    for i, cost in zip(map(int, ids), map(float, bits), strict=True):
        char = "⏎" if i == 10 else chr(i) if 32 <= i < 127 else "▯"
        share = 75 * min(cost / most, 1.0)
        shade = f"color-mix(in srgb, {_VARIABLES[ORANGE]} {share:.0f}%, transparent)"
        cells.append(
            f'<span style="background:{shade}" title="{cost:.1f} bits">'
            f"{html.escape(char)}</span>" + ("\n" if i == 10 else "")
        )
    display(HTML(f'<pre class="surprise">{"".join(cells)}</pre>'))


Item = TypeVar("Item")


def progress(items: Iterable[Item], total: int) -> Iterator[Item]:
    """Pass `items` through and show how far they are: in a notebook below the cell.

    While the book is built a cell's output is part of the page, so the bar then goes to
    the terminal that ``$MINIDSV3_TERMINAL`` names (`make book` sets it), or nowhere.
    """
    terminal = os.environ.get("MINIDSV3_TERMINAL")
    if terminal is None:
        yield from tqdm(items, total=total)
        return
    with open(terminal or os.devnull, "w") as screen:
        yield from tqdm(items, total=total, file=screen)
