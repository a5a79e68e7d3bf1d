"""A page that holds a movable figure and nothing else, in a browser, on a telephone."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

BOOK = Path(__file__).parents[1] / "book"
STATIC = BOOK / "_static"
sys.path.insert(0, str(BOOK / "_check"))

import browser  # noqa: E402

needs_chromium = pytest.mark.skipif(
    browser.chromium() is None, reason="no Chromium: set $CHROMIUM"
)


@contextmanager
def opened(
    folder: Path,
    scripts: Sequence[str],
    body: str,
    sheets: Sequence[str] = (),
    height: int = 1000,
) -> Iterator[Page]:
    """Open ``body`` with the scripts of the book, each loaded twice as pages do.

    sheets are addresses of style sheets before the book's own. Errors of the page and
    lines on its console fail the test that opened it.
    """
    links = [*sheets, (STATIC / "minidsv3.css").as_uri()]
    loads = [(STATIC / f"{name}.js").as_uri() for name in scripts]
    path = folder / "page.html"
    path.write_text(
        '<!doctype html><html lang="en" data-theme="light"><meta charset="utf-8">'
        + "".join(f'<link rel="stylesheet" href="{link}">' for link in links)
        + "".join(f'<script src="{load}"></script>' for load in loads) * 2
        + body,
        encoding="utf-8",
    )
    with sync_playwright() as play:
        chromium = play.chromium.launch(
            executable_path=browser.chromium(), args=browser.FLAGS
        )
        page = chromium.new_page(
            viewport={"width": 390, "height": height}, reduced_motion="reduce"
        )
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text))
        page.goto(path.as_uri())
        yield page
        chromium.close()
    assert not errors
