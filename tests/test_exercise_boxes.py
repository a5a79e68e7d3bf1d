"""The exercises in the book: each in its chapter, each as the grader has it."""

import html
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.test_book import BOOK, PAGES, ROOT, each_page, toc_files

sys.path.insert(0, str(BOOK / "_ext"))

import exercise_boxes  # noqa: E402
import notebooks  # noqa: E402

with exercise_boxes.grader_on_path():
    from grader import source, spec

each_exercise = pytest.mark.parametrize("id_", source.exercises())


def boxed(page: Path) -> list[str]:
    """The exercises that a page of the book asks for."""
    found = notebooks.GRADED.finditer(page.read_text(encoding="utf-8"))
    return [id_ for match in found for id_ in match["ids"].split()]


# --- the book's sources ----------------------------------------------------------


def test_every_exercise_is_boxed_once_in_order():
    toc = yaml.safe_load((BOOK / "_toc.yml").read_text())
    pages = [BOOK / f"{name}.md" for name in toc_files(toc)]
    assert [id_ for page in pages for id_ in boxed(page)] == [*source.exercises()]


@each_exercise
def test_a_box_is_on_a_page_of_its_own_chapter(id_):
    chapter = source.find(id_).notebook.partition("_")[0]
    (page,) = (page for page in PAGES if id_ in boxed(page))
    assert page.name.startswith(f"{chapter}_")


@each_page
def test_no_box_is_overlooked_where_a_page_becomes_a_notebook(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("{graded}") == len(notebooks.GRADED.findall(text))
    assert "{graded}" not in notebooks.name_exercises(text)


def test_a_notebook_says_where_the_exercises_are():
    page = "Before.\n\n```{graded} lm.1 lm.8\n```\n\nAfter.\n"
    text = notebooks.name_exercises(page)
    assert text.startswith("Before.\n\n**Exercise lm.1 · A softmax that survives")
    assert "\n\n**Exercise lm.8 · Attention, with one key head for all.**" in text
    assert "`exercises/01_transformer.ipynb`" in text
    assert text.count("`pytest exercises/01_transformer.ipynb::lm.8`") == 1
    assert text.endswith("\n\nAfter.\n")
    with pytest.raises(LookupError, match=r"no exercise 'lm\.99'"):
        notebooks.name_exercises(page.replace("lm.8", "lm.99"))


def test_the_grader_is_not_left_on_the_path():
    before = [*sys.path]
    exercise_boxes.Box.of("lm.1")
    with pytest.raises(LookupError):
        exercise_boxes.Box.of("lm.99")
    assert sys.path == before


# --- a book of one page ----------------------------------------------------------

CONF = """\
import sys
sys.path.insert(0, "_ext")
extensions = ["myst_parser", "sphinx_design", "exercise_boxes"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 1
smartquotes = False
html_theme = "basic"
"""


def write_book(root: Path, ids: str) -> Path:
    """A repository with the real exercises and a book of one page, which has boxes."""
    for name in ("exercises/grader", "exercises/checks", "solutions"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    (root / "book/_ext").mkdir(parents=True)
    shutil.copy(BOOK / "_ext/exercise_boxes.py", root / "book/_ext")
    (root / "book/conf.py").write_text(CONF)
    (root / "book/index.md").write_text(
        "# Home\n\nBegin with {ref}`ex-lm-1`.\n\n"
        f"```{{graded}} {ids}\n```\n\nEnd of page.\n"
    )
    return root


def build(root: Path) -> subprocess.CompletedProcess:
    """Build what has changed; a warning is a failure."""
    return subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", ".", "_build"],
        cwd=root / "book", capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def words(page: str) -> str:
    """What a page says, without its markup."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", page)).split())


def built(root: Path) -> str:
    """The page's HTML after a build without a warning."""
    run = build(root)
    assert run.returncode == 0, run.stdout + run.stderr
    return (root / "book/_build/index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Every exercise on one page, as HTML."""
    root = tmp_path_factory.mktemp("boxes")
    return built(write_book(root, " ".join(source.exercises())))


def prose(markdown: str) -> list[str]:
    """The pieces of a text between formulas, code and emphasis."""
    pieces = re.split(r"\$+[^$]*\$+|`+|\*+", markdown)
    return [" ".join(piece.split()) for piece in pieces if piece.strip()]


@each_exercise
def test_a_box_says_what_notebook_and_grader_say(page, id_):
    exercise = source.find(id_)
    anchor = "ex-" + id_.replace(".", "-")
    assert page.count(f'id="{anchor}"') == 1
    start = page.index(f'id="{anchor}"')
    box = page[start : page.find(' id="ex-', start + 1)]
    text = words(box)
    assert f"Exercise {id_} · {exercise.title}" in text
    for piece in prose(exercise.task):
        assert piece in text
    inline = len(re.findall(r"(?<!\$)\$[^$]+\$(?!\$)", exercise.task))
    assert box.count('class="math notranslate') >= inline
    body = exercise.stub[exercise.stub.index("def ") :]
    assert " ".join(body.split()) in text
    assert "# exercise:" not in text
    assert box.count("<details") == 4
    assert "<details open" not in box
    for level, hint in enumerate(spec.find(id_).hints, 1):
        assert f"Hint {level}: " in text
        for piece in prose(hint):
            assert piece in text
    for command in ("make lab", f'check("{id_}")'):
        assert command in text
    assert f"pytest exercises/{exercise.notebook}.ipynb::{id_}" in text


def test_text_can_link_to_a_box(page):
    assert re.search(r'href="#ex-lm-1">\s*<span[^>]*>Exercise lm.1</span></a>', page)


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_a_change_of_hint_or_task_reaches_the_page(tmp_path):
    root = write_book(tmp_path, "lm.1")
    assert "Which constant makes every exponent" in words(built(root))
    hints = root / "exercises/checks/lm_forward.py"
    replace(hints, "Which constant makes", "What a question: which makes")
    assert "What a question: which makes every exponent" in words(built(root))
    replace(root / "solutions/01_transformer.py", "survives 1000", "survives 2000")
    assert "Exercise lm.1 · A softmax that survives 2000" in words(built(root))


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [
        ("lm.1 lm.99", "index: there is no exercise 'lm.99'; there are lm.1, "),
        ("lm.2", "index: no checks/lm*.py says anything of lm.2"),
    ],
    ids=["no such exercise", "no hints"],
)
def test_what_is_missing_fails_the_build_and_is_named(tmp_path, ids, complaint):
    root = write_book(tmp_path, ids)
    checks = root / "exercises/checks/lm_forward.py"
    replace(checks, "CHECKS = [SOFTMAX, CAUSAL]", "CHECKS = [SOFTMAX]")
    run = build(root)
    assert run.returncode != 0
    assert re.search(r"book/index\.md:5: \w+: " + re.escape(complaint), run.stderr)
    assert "Traceback" not in run.stderr


def test_a_page_with_a_fault_is_read_again(tmp_path):
    """Else the next build would call it good: nothing on it has changed."""
    root = write_book(tmp_path, "lm.1 lm.99")
    assert build(root).returncode != 0
    assert build(root).returncode != 0
