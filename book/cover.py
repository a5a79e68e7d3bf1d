"""Draw the cover, the logo and the favicon: `python cover.py` in this folder.

Nothing on the cover is placed by taste. The lit dots are the outcome of DeepSeek-V3's
routing rule on random affinities, the towers have the cache's true proportions, and
every colour is a CSS variable with a fallback for places without the book's style
sheet, such as the README.
"""

from pathlib import Path

import numpy as np
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

HERE = Path(__file__).parent / "_static"
EXPERTS, GROUPS, KEPT, ACTIVE = 256, 8, 4, 8
SHARED = (439, 272)  # where the one expert sits that every token visits
MHA_CACHE, MLA_CACHE = 2 * 128 * 128, 512 + 64  # numbers per token and layer, V3
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
STYLE = """<style>
.minidsv3-cover { --ink: var(--fig-ink, #1c2127); --muted: var(--fig-muted, #6b7480);
  --faint: var(--fig-grid, #d9dee4); --blue: var(--fig-c1, #0f62a8);
  --lit: var(--mini-lit, #e08600); --word: var(--mini-lit-text, #8f5400);
  --sheet: var(--fig-paper, #ffffff); }
@media (prefers-color-scheme: dark) { .minidsv3-cover { --ink: var(--fig-ink, #e4e8ec);
  --muted: var(--fig-muted, #9aa4b0); --faint: var(--fig-grid, #323b46);
  --blue: var(--fig-c1, #63b3f2); --lit: var(--mini-lit, #ffb83d);
  --word: var(--mini-lit-text, #ffc766); --sheet: var(--fig-paper, #14181d); } }
.minidsv3-cover .name { font-size: 19px; fill: var(--ink); }
.minidsv3-cover .long, .minidsv3-cover .short { fill: var(--muted); }
.minidsv3-cover .short { display: none; }
@media (max-width: 520px) { .minidsv3-cover .name { font-size: 32px; }
  .minidsv3-cover .long { display: none; } .minidsv3-cover .short { display: inline; } }
</style>"""


def route(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Affinities s (256,), kept groups (4,) and chosen experts (8,), by V3's rule."""
    s = 1 / (1 + np.exp(-np.random.default_rng(seed).normal(-0.8, 1.1, EXPERTS)))
    grouped = s.reshape(GROUPS, -1)
    kept = np.sort(np.sort(grouped)[:, -2:].sum(axis=1).argsort()[-KEPT:])
    allowed = np.full_like(grouped, -np.inf)
    allowed[kept] = grouped[kept]
    return s, kept, allowed.ravel().argsort()[-ACTIVE:]


def dot(i: int) -> tuple[float, float]:
    """Centre of expert i: groups in two rows of four, 8 x 4 dots in each."""
    group, j = divmod(i, EXPERTS // GROUPS)
    row, column = divmod(j, 8)
    return (
        round(439 + 114 * (group % 4) + 12.4 * column, 1),
        94 + 80 * (group // 4) + 14 * row,
    )


def experts() -> list[str]:
    """The field of 256 dots, the frames of the kept groups, the rays to the chosen."""
    s, kept, chosen = route(seed=160)
    out = []
    for group in kept:
        x, y = dot(group * EXPERTS // GROUPS)
        out.append(
            f'<rect x="{x - 11}" y="{y - 11}" width="109" height="64" rx="9" '
            'fill="none" stroke="var(--muted)" stroke-width="1.3"/>'
        )
    rays = [(*dot(i), "--lit") for i in chosen] + [(*SHARED, "--blue")]
    for x, y, colour in rays:
        bend, rise = x - 0.35 * (x - 349), y + 0.3 * (318 - y)
        out.append(
            f'<path d="M349 318 C 349 {(310 + y) / 2:.0f}, {bend:.0f} {rise:.0f}, '
            f'{x} {y}" fill="none" stroke="var({colour})" stroke-width="1.2" '
            'opacity="0.6"/>'
        )
    x, y = SHARED
    out.append(f'<circle cx="{x}" cy="{y}" r="5.5" fill="var(--blue)"/>')
    for i in range(EXPERTS):
        x, y = dot(i)
        lit = i in chosen
        radius = 1.2 + 3.2 * s[i] + lit * 1.4
        fill = "var(--lit)" if lit else "var(--muted)"
        glow = f'<circle cx="{x}" cy="{y}" r="9" fill="{fill}" opacity=".22"/>' * lit
        opacity = "" if lit else ' opacity="0.5"'
        out.append(
            f'{glow}<circle cx="{x}" cy="{y}" r="{radius:.1f}" fill="{fill}"{opacity}/>'
        )
    return out


def towers(text: str, pitch: int) -> list[str]:
    """Per byte read so far: what MHA would cache, and what MLA does, to scale."""
    out = []
    height = 196
    for i in range(len(text)):
        x = 36 + pitch * i
        small = height * MLA_CACHE / MHA_CACHE
        out.append(
            f'<rect x="{x + 6}" y="{318 - height}" width="26" height="{height}" rx="3" '
            'fill="var(--blue)" fill-opacity="0.09" stroke="var(--faint)"/>'
            f'<rect x="{x + 6}" y="{318 - small:.2f}" width="26" height="{small:.2f}" '
            'fill="var(--blue)"/>'
        )
    return out


def cells(read: str, coming: str, pitch: int) -> list[str]:
    """The row of bytes: those read, the two predicted ones, and the arcs to them."""
    out = []
    for i, c in enumerate(read + coming + "   "):
        x = 36 + pitch * i
        known, guess = i < len(read), len(read) <= i < len(read + coming)
        stroke = "var(--muted)" if known else "var(--lit)" if guess else "var(--faint)"
        dash = "" if known or i == len(read) else ' stroke-dasharray="4 3"'
        out.append(
            f'<rect x="{x}" y="326" width="38" height="38" rx="6" fill="none" '
            f'stroke="{stroke}" stroke-width="1.5"{dash}/>'
            f'<text x="{x + 19}" y="352" text-anchor="middle" font-size="21" '
            f'font-family="ui-monospace, Menlo, Consolas, monospace" '
            f'fill="var({"--ink" if known else "--word"})">{c.replace(" ", "")}</text>'
        )
    start = 36 + pitch * (len(read) - 1) + 19
    for step, dash in ((1, ""), (2, ' stroke-dasharray="5 4"')):
        end = start + pitch * step
        deep = 366 + 30 * step
        out.append(
            f'<path d="M{start} 366 C {start} {deep}, {end} {deep}, {end} 371" '
            f'fill="none" stroke="var(--lit)" stroke-width="2.2"{dash}/>'
            f'<path d="M{end - 5} 375 L {end} 367 L {end + 5} 375" fill="none" '
            'stroke="var(--lit)" stroke-width="2.2"/>'
        )
    return out


def label(x: int, y: int, name: str, short: str, long: str) -> str:
    """A mechanism's name and what the picture shows of it: briefly on a phone."""
    return (
        f'<text class="name" x="{x}" y="{y}" font-family="{FONT}">'
        f'<tspan font-weight="700" fill="var(--ink)">{name}</tspan> '
        f'<tspan dx="4" class="short">{short}</tspan>'
        f'<tspan dx="4" class="long">{long}</tspan></text>'
    )


def note(x: int, y: int, text: str) -> str:
    """A smaller remark, left out on a phone."""
    return (
        f'<text class="long" font-size="15" x="{x}" y="{y}" font-family="{FONT}">'
        f"{text}</text>"
    )


def cover() -> str:
    """The cover as one SVG string (900 x 420)."""
    read, coming, pitch = "def relu", "(x", 42
    parts = [
        ('<svg class="minidsv3-cover" xmlns="http://www.w3.org/2000/svg" '
        'viewBox="0 0 900 420" role="img" aria-label="Bytes of Python are read. Above '
        "each stands a tall tower, the cache of ordinary attention, of which only a "
        "thin lit slice, the latent, is kept. The last byte sends rays to 8 lit dots "
        "of 256, all in 4 of 8 groups. Two arcs lead from it to the next byte and to "
        'the one after.">'),
        STYLE,
        '<rect class="sheet" width="900" height="420" rx="14" fill="var(--sheet)"/>',
        *towers(read, pitch), *experts(), *cells(read, coming, pitch),
        label(36, 50, "MLA", "576 : 32,768", "keeps 576 numbers, not 32,768"),
        note(36, 76, "per token and layer, drawn to scale"),
        label(427, 50, "MoE", "8 of 256", "8 of 256 experts, in 4 of 8 groups"),
        note(453, 277, "and one that every token visits"),
        label(480, 400, "MTP", "the next two", "the next byte, and the one after"),
        "</svg>\n",
    ]  # fmt: skip
    return "\n".join(parts)


def tile(width: int, inside: str) -> str:
    """A dark rounded tile, right on light and dark pages alike."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 64" role="img" '
        f'aria-label="minidsv3"><rect width="{width}" height="64" rx="12" '
        f'fill="#14243a"/>{inside}</svg>\n'
    )


def lights(n: int, lit: set[int], pitch: float, radius: float) -> str:
    """An n x n field of dots in the tile's left square, some of them lit."""
    first = 32 - pitch * (n - 1) / 2
    return "".join(
        f'<circle cx="{first + pitch * (i % n):g}" cy="{first + pitch * (i // n):g}" '
        f'r="{radius * (1.45 if i in lit else 1):.2f}" '
        f'fill="{"#ffb83d" if i in lit else "#58708f"}"/>'
        for i in range(n * n)
    )


def word(text: str, x: float, size: float) -> str:
    """The word as a path, so that it looks the same on every machine."""
    path = TextPath((0, 0), text, size, prop=FontProperties(family="DejaVu Sans Mono"))
    steps = []
    for points, code in path.iter_segments():
        where = " ".join(f"{v:.1f}" for v in points * np.resize([1, -1], len(points)))
        steps.append(
            {1: "M", 2: "L", 3: "Q", 4: "C"}.get(code, "Z") + where * int(code < 79)
        )
    return f'<path transform="translate({x} 40)" fill="#eef2f6" d="{"".join(steps)}"/>'


def write(name: str, text: str) -> None:
    """Write one drawing, with the same bytes on every system."""
    (HERE / name).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    chosen = set(route(seed=160)[2].tolist())
    logo = lights(16, chosen, 3.1, 0.95) + word("minidsv3", 68, 24)
    write("cover.svg", cover())
    write("logo.svg", tile(196, logo))
    write("favicon.svg", tile(64, lights(3, {0, 4, 8}, 17, 5)))
