"""The book's sources, its extensions, and the browser that looks at its pages."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml

ROOT = Path(__file__).parent.parent
BOOK = ROOT / "book"
for _folder in ("_ext", "_check"):
    sys.path.insert(0, str(BOOK / _folder))

import browser  # noqa: E402
import fresh_outputs  # noqa: E402
import links  # noqa: E402
import notebooks  # noqa: E402
import offline  # noqa: E402

PAGES = sorted(
    page
    for page in BOOK.rglob("*.md")
    if not any(part.startswith(("_", ".")) for part in page.relative_to(BOOK).parts)
)
CELL = re.compile(r"^```\{code-cell\}.*\n((?s:.*?))^```$", re.MULTILINE)
HEADER = {
    "jupytext": {
        "text_representation": {
            "extension": ".md",
            "format_name": "myst",
            "format_version": 0.13,
            "jupytext_version": "1.19.6",
        }
    },
    "kernelspec": {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    },
}
each_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(BOOK).as_posix()
)


# --- the sources -----------------------------------------------------------------


def toc_files(node: object) -> Iterator[str]:
    """Every page that a piece of `_toc.yml` names."""
    if isinstance(node, list):
        for item in node:
            yield from toc_files(item)
    elif isinstance(node, dict):
        yield from (node[key] for key in ("root", "file") if key in node)
        for value in node.values():
            yield from toc_files(value)


def test_toc_names_every_page_once():
    listed = list(toc_files(yaml.safe_load((BOOK / "_toc.yml").read_text())))
    assert sorted(listed) == sorted(
        page.relative_to(BOOK).with_suffix("").as_posix() for page in PAGES
    )


@each_page
def test_listings_exist(page):
    """Nothing is typed twice: each listing names a file and a definition in it."""
    text = page.read_text(encoding="utf-8")
    assert text.count("{literalinclude}") == len(notebooks.LISTING.findall(text))
    pasted = notebooks.paste_listings(text, page.parent)  # raises when one is missing
    assert "{literalinclude}" not in pasted


@each_page
def test_executed_pages_have_the_full_header(page):
    text = page.read_text(encoding="utf-8")
    if not CELL.search(text):
        assert "kernelspec" not in text
        return
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert front, "no header: the cells would not run"
    written = yaml.safe_load(front[1])
    assert {key: written.get(key) for key in HEADER} == HEADER


def glued_names(page: Path) -> list[str]:
    """Patterns of the keys that the page's cells give to `glue`."""
    names = []
    for cell in CELL.findall(page.read_text(encoding="utf-8")):
        code = re.sub(r"\A((?s:---\n.*?\n---\n)|(:.*\n)+)", "", cell)
        for node in ast.walk(ast.parse(re.sub(r"^[%!].*$", "", code, flags=re.M))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "glue":
                names.append(key_pattern(node.args[0]))
    return names


def key_pattern(key: ast.expr) -> str:
    """A regular expression for a key, whose computed parts may be anything."""
    if isinstance(key, ast.Constant):
        return re.escape(str(key.value))
    if isinstance(key, ast.JoinedStr):
        return "".join(
            re.escape(part.value) if isinstance(part, ast.Constant) else ".+"
            for part in key.values
        )
    return ".+"


USED = re.compile(r"\{glue(?::text|:md|:any)?\}`(?:([^`:]+)::)?([^`:]+)(?::[^`]*)?`")


@each_page
def test_every_number_in_prose_is_computed(page):
    text = page.read_text(encoding="utf-8")
    used = [
        *USED.findall(text),
        *(("", k) for k in re.findall(r"\{glue:figure\} (\S+)", text)),
    ]
    assert text.count("{glue") == len(used)
    for other, key in used:
        home = page.parent / other if other else page
        assert any(re.fullmatch(name, key) for name in glued_names(home)), key


def git(*arguments: str) -> str:
    """What git says in the repository."""
    command = ["git", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_committed_outputs():
    """The committed version counts: a learner's own notebooks may have outputs."""
    for name in git("ls-files", "*.ipynb").splitlines():
        for cell in nbformat.reads(git("show", f":{name}"), as_version=4).cells:
            assert not cell.get("outputs"), name
            assert cell.get("execution_count") is None, name


def public_modules() -> list[str]:
    """Dotted names of what the library offers; a module without text offers nothing."""
    names = []
    for path in sorted((ROOT / "minidsv3").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if path.stat().st_size and not any(part.startswith("_") for part in parts):
            names.append(".".join(parts))
    return names


COMPILERS_OWN = "minidsv3.gpu.ptx"
"""Imports numba-cuda, which the book is built without: a page names its source."""


def test_every_public_module_is_in_the_api_pages():
    text = "\n".join(page.read_text() for page in (BOOK / "api").glob("*.md"))
    entries = re.findall(r"^\.\. automodule:: (\S+)$", text, re.MULTILINE)
    assert sorted(entries) == [m for m in public_modules() if m != COMPILERS_OWN]
    assert "`minidsv3/gpu/ptx.py`" in text


# --- the extensions --------------------------------------------------------------


@pytest.fixture
def sources(tmp_path):
    """A repository in miniature: one module, one page's helpers."""
    for name in ("minidsv3/room/numpy_ref.py", "book/figures.py", "constraints.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    return tmp_path


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "minidsv3/room/numpy_ref.py").write_text("x = 2\n"),
        lambda root: (root / "minidsv3/new.py").write_text(""),
        lambda root: (root / "book/figures.py").unlink(),
        lambda root: (root / "minidsv3/room").rename(root / "minidsv3/hall"),
        lambda root: (root / "constraints.txt").write_text("numpy==2\n"),
    ],
    ids=["edit", "new file", "deletion", "renaming", "other versions"],
)
def test_fingerprint_changes_with_every_source(sources, change):
    before = fresh_outputs.fingerprint(sources)
    assert fresh_outputs.fingerprint(sources) == before
    change(sources)
    assert fresh_outputs.fingerprint(sources) != before


def test_fingerprint_ignores_the_pages(sources):
    """jupyter-cache knows about cells; prose needs no new run."""
    before = fresh_outputs.fingerprint(sources)
    (sources / "book/page.md").write_text("# Page\n")
    assert fresh_outputs.fingerprint(sources) == before


def test_stale_caches_are_deleted(sources):
    outdir = sources / "book/_build/html"
    app = SimpleNamespace(outdir=str(outdir), srcdir=str(sources / "book"))
    config = SimpleNamespace()
    kept = []
    for text in ("x = 1\n", "x = 2\n", "x = 2\n"):
        (sources / "minidsv3/room/numpy_ref.py").write_text(text)
        fresh_outputs.choose_cache(app, config)
        current = Path(config.nb_execution_cache_path)
        kept.append(current.exists())
        current.mkdir(parents=True, exist_ok=True)
    assert kept == [False, False, True]
    assert list((sources / "book/_build/.jupyter_cache").iterdir()) == [current]


CODE = '''import numpy as np

@decorate
class Room:
    def first(self):
        return 1

    @property
    def second(self):
        """Two."""
        return 2

def after(x):
    return x
'''


def test_definition_is_cut_with_its_decorators():
    assert notebooks.definition(CODE, "after") == "def after(x):\n    return x"
    assert notebooks.definition(CODE, "Room").startswith("@decorate\nclass Room:")
    assert notebooks.definition(CODE, "Room.second").splitlines()[0] == "    @property"
    with pytest.raises(LookupError, match=r"Room\.third"):
        notebooks.definition(CODE, "Room.third")


def test_listings_are_pasted_into_notebooks(tmp_path):
    (tmp_path / "room.py").write_text(CODE)
    page = (
        "# Page\n\n```{literalinclude} room.py\n:pyobject: after\n:name: lst\n```\n\n"
        "::::{literalinclude} room.py\n::::\n\nEnd.\n"
    )
    text = notebooks.paste_listings(page, tmp_path)
    assert "```python\ndef after(x):\n    return x\n```" in text
    assert text.count("import numpy") == 1
    assert text.endswith("End.\n")
    with pytest.raises(LookupError):
        notebooks.paste_listings(page.replace("after", "before"), tmp_path)


# --- a small book, built twice ---------------------------------------------------

PAGE = """
# Page

The value is {glue:text}`value:.2f`, and $x^2$ is mathematics.

```{literalinclude} ../minidsv3/room.py
:pyobject: value
```

```{code-cell} ipython3
from minidsv3.room import value
from myst_nb import glue
glue("value", value(), display=False)
```

```{code-cell} ipython3
---
mystnb:
  figure: {name: fig-one, caption: "One box, $x$."}
---
from IPython.display import HTML
HTML('<svg role="img" aria-label="a box" width="9" height="9"><path d="M0 0h9"/></svg>')
```

See {numref}`fig-one`.
"""


@pytest.fixture(scope="module")
def small_book(tmp_path_factory):
    """The book's own configuration and extensions around one page."""
    root = tmp_path_factory.mktemp("small")
    book = root / "book"
    for folder in ("_ext", "_static"):
        shutil.copytree(BOOK / folder, book / folder)
    shutil.copy(BOOK / "_config.yml", book)
    (root / "minidsv3").mkdir()
    (root / "minidsv3/__init__.py").touch()  # or the real library would win
    (root / "kernels/python3").mkdir(parents=True)  # a kernel that cannot work
    (root / "kernels/python3/kernel.json").write_text(
        '{"argv": ["false"], "language": "python", "display_name": "Python 3"}'
    )
    (book / "references.bib").touch()
    (book / "_toc.yml").write_text(
        "format: jb-book\nroot: index\nparts:\n"
        "  - numbered: true\n    chapters: [{file: page}, {file: other}]\n"
    )
    (book / "index.md").write_text("# Home\n")
    (book / "other.md").write_text("# Other\n\n{glue:text}`page.md::value:.1f`\n")
    (book / "page.md").write_text(f"---\n{yaml.dump(HEADER)}---\n{PAGE}")
    return root


def build(root: Path, value: float) -> Path:
    """Build the small book around a library that returns `value`."""
    (root / "minidsv3/room.py").write_text(f"def value():\n    return {value}\n")
    command = [Path(sys.executable).with_name("jupyter-book"), "build", "book"]
    run = subprocess.run(
        [*command, "-W", "-n"],
        cwd=root, capture_output=True, text=True, timeout=300,
        env=os.environ
        | {"PYTHONPATH": str(root), "JUPYTER_DATA_DIR": str(root)}
        | {"JUPYTER_PREFER_ENV_PATH": "0"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return root / "book/_build/html"


@pytest.mark.slow
def test_a_change_in_the_library_reaches_the_page(small_book):
    site = build(small_book, 1.25)
    assert ">1.25<" in (site / "page.html").read_text()
    caches = list((small_book / "book/_build/.jupyter_cache").iterdir())
    build(small_book, 7.75)
    assert ">7.75<" in (site / "page.html").read_text()
    assert ">7.8<" in (site / "other.html").read_text()
    assert list((small_book / "book/_build/.jupyter_cache").iterdir()) != caches
    page = small_book / "book/page.md"
    page.write_text(
        page.read_text().replace("value(), display", "2 * value(), display")
    )
    build(small_book, 7.75)
    assert ">15.5<" in (site / "other.html").read_text()

    html = (site / "page.html").read_text()
    assert "Fig. 1.1" in html
    assert "thebe" not in html
    assert not list(links.faults(site))
    assert (site / "_static" / offline.MATHJAX).stat().st_size > 1e6

    assert 'href="_sources/page.ipynb"' in html
    notebook = nbformat.read(site / "_sources/page.ipynb", as_version=4)
    assert "return 7.75" in notebook.cells[0].source
    assert not any(cell.get("outputs") for cell in notebook.cells)


# --- the browser check -----------------------------------------------------------

needs_chromium = pytest.mark.skipif(
    browser.chromium() is None,
    reason="no Chromium on the path: install one or set $CHROMIUM",
)


def write_site(folder: Path, bodies: dict[str, str]) -> None:
    """Write pages with the book's own MathJax and the book's settings for it."""
    config = yaml.safe_load((BOOK / "_config.yml").read_text())["sphinx"]["config"]
    mathjax = folder / "_static" / offline.MATHJAX
    mathjax.parent.mkdir(parents=True)
    mathjax.symlink_to(offline.mathjax_file())
    for name, body in bodies.items():
        (folder / f"{name}.html").write_text(
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<script>MathJax = {json.dumps(config['mathjax3_config'])}</script>"
            f'<script defer src="_static/{offline.MATHJAX}"></script></head>'
            f"<body>{body}</body></html>"
        )


def check(folder: Path, bodies: dict[str, str]) -> tuple[int, str]:
    """Run the check on these pages; return its exit status and what it says."""
    write_site(folder, bodies)
    run = subprocess.run(
        [sys.executable, BOOK / "_check/browser.py", folder],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return run.returncode, run.stdout + run.stderr


MATHS = '<span class="math">\\({}\\)</span>'
GOOD = (
    MATHS.format(r"\frac{1}{2}")
    + '<h1 id="here">Page</h1><a href="#here">up</a>'
    + '<svg role="img" aria-label="a line" width="80" height="20">'
    + '<text y="15" fill="#333">words</text></svg>'
)
FAULTS = {
    "unbalanced": (MATHS.format(r"\frac{1"), "2 formulas, but 1 drawn"),
    "double": (MATHS.format("x^2^3"), "bad TeX: Double exponent"),
    "undefined": (MATHS.format(r"\nosuchmacro x"), "bad TeX: Undefined control"),
    "unprocessed": ('<span class="math">x</span>', "2 formulas, but 1 drawn"),
    "script": ('<script src="https://example.org/a.js"></script>', "asks another mach"),
    "image": ('<img alt="a" src="http://example.org/a.png">', "asks another machine"),
    "fetched": (
        "<script>fetch('https://example.org/late').catch(() => 0)</script>",
        "asks another machine for https://example.org/late",
    ),
    "font": (
        "<style>@font-face{font-family:a;src:url(//example.org/a.woff)}</style>",
        "asks another machine",
    ),
    "wide": ('<div style="width:500px">wide</div>', "wider than the phone"),
    "unnamed_image": ('<img src="data:image/svg+xml,<svg/>">', "without alt text"),
    "unnamed_svg": ('<svg role="img"></svg>', "aria-label"),
    "console": ("<script>console.error('oh no')</script>", "console error: oh no"),
    "exception": ("<script>undefinedName()</script>", "script error"),
    "dead_file": ('<a href="nowhere.html">x</a>', "dead link: nowhere.html"),
    "dead_anchor": ('<a href="#nowhere">x</a>', "dead link: #nowhere"),
    "element": ("<no-element></no-element>", "<no-element> is nowhere defined"),
    "pale": (
        '<svg role="img" aria-label="a b" width="80" height="20">'
        '<text y="15" fill="#999">words</text></svg>',
        "contrast 2.8",
    ),
    "cut_off": (
        '<div class="math" style="overflow:hidden">\\[' + "x+" * 80 + "y\\]</div>",
        "formula cut off at phone width",
    ),
}  # fmt: skip


@needs_chromium
def test_browser_accepts_a_good_page(tmp_path):
    status, words = check(tmp_path, {"good": GOOD})
    assert status == 0, words
    assert "1 pages, 0 faults" in words


@needs_chromium
@pytest.mark.parametrize("fault", ["undefined", "script"])
def test_one_fault_is_enough_to_fail(tmp_path, fault):
    status, words = check(tmp_path, {"good": GOOD, fault: GOOD + FAULTS[fault][0]})
    assert status == 1, words
    assert "good.html" not in words


@pytest.fixture(scope="module")
def verdict(tmp_path_factory):
    """What the check says of a site on which each page has a fault of its own."""
    bodies = {name: GOOD + body for name, (body, _) in FAULTS.items()}
    return check(tmp_path_factory.mktemp("faulty"), bodies)[1]


@needs_chromium
@pytest.mark.parametrize("fault", FAULTS)
def test_browser_names_page_and_reason(verdict, fault):
    lines = [line for line in verdict.splitlines() if line.startswith(f"{fault}.html")]
    assert any(FAULTS[fault][1] in line for line in lines), verdict
