"""Open every page of the built book in a browser without network, and look.

    python book/_check/browser.py book/_build/html
    python book/_check/browser.py book/_build/html --screenshots shots

Sphinx does not notice bad TeX, a figure wider than a phone, or a font that comes from
another machine. This does: it opens each page at desktop and at phone width, light and
dark, and refuses every request that leaves the site's folder. It exits with 1 and names
page and reason when something is wrong. `page.js` says what is looked at in a page,
`links.py` what is looked at in the files.

The browser is the Chromium named by ``$CHROMIUM``, else one found on the path.
"""

import argparse
import asyncio
import os
import shutil
import sys
import time
from pathlib import Path

import links
from playwright.async_api import Browser, Page, Route, async_playwright

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
THEMES = ("light", "dark")
INSPECT = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
TYPESET = """async () => {
  await document.fonts.ready;
  if (!document.querySelector(".math")) return;
  const late = new Promise((_, no) => setTimeout(no, 30000, "MathJax is not there"));
  const done = async () => {
    const soon = (go) => setTimeout(go, 20);
    while (!window.MathJax?.startup?.promise) await new Promise(soon);
    await MathJax.startup.promise;
  };
  await Promise.race([done(), late]);
}"""  # noqa: E501

SETTLED = """async (theme) => {
  for (let frame = 0; frame < 30; frame++) {
    const shown = document.documentElement.dataset.theme;
    if (frame && (shown === undefined || shown === theme)) return;
    await new Promise(requestAnimationFrame);
  }
}"""

Fault = tuple[str, str]


def chromium() -> str | None:
    """Return the path of a Chromium or Chrome, or None when there is none."""
    wanted = os.environ.get("CHROMIUM", "chromium")
    names = (wanted, "chromium", "chromium-browser", "google-chrome", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Visit:
    """One page at one width: opened once, looked at in both themes."""

    def __init__(self, site: Path, path: Path, width: str) -> None:
        """Remember what to open; nothing happens yet."""
        self.site, self.path, self.width = site, path, width
        self.name = path.relative_to(site).as_posix()
        self.faults: list[Fault] = []

    def complain(self, reason: str) -> None:
        """Note a fault, once however often it shows."""
        if (self.name, reason) not in self.faults:
            self.faults.append((self.name, reason))

    async def refuse_outside(self, route: Route) -> None:
        """Let through what lies in the site's folder and nothing else."""
        address = route.request.url
        if address.startswith((self.site.as_uri() + "/", "data:", "blob:")):
            await route.continue_()
        else:
            self.complain(f"asks another machine for {address}")
            await route.abort()

    def listen(self, page: Page) -> None:
        """Turn the page's own complaints into faults."""
        page.on("pageerror", lambda error: self.complain(f"script error: {error}"))
        page.on(
            "console",
            lambda line: (
                line.type == "error"
                and "ERR_FAILED" not in line.text  # our own refusal, already noted
                and self.complain(f"console error: {line.text}")
            ),
        )

    async def look(self, browser: Browser, shots: Path | None) -> list[Fault]:
        """Open the page, inspect it in both themes, and return the faults."""
        size = dict(zip(("width", "height"), WIDTHS[self.width], strict=True))
        context = await browser.new_context(viewport=size, color_scheme=THEMES[0])
        await context.route("**/*", self.refuse_outside)
        page = await context.new_page()
        self.listen(page)
        try:
            await page.goto(self.path.as_uri())
            await page.evaluate(TYPESET)
            for theme in THEMES:
                await page.emulate_media(color_scheme=theme)
                await page.evaluate(SETTLED, theme)
                await self.inspect(page, theme, shots)
        except Exception as error:  # a page that cannot be opened is a fault too
            self.complain(f"cannot be opened: {error}")
        await context.close()
        return self.faults

    async def inspect(self, page: Page, theme: str, shots: Path | None) -> None:
        """Look at the page as it now is, and photograph it if asked."""
        where = {"width": self.width, "theme": theme}
        for reason in await page.evaluate(INSPECT, where):
            self.complain(reason)
        if shots:
            stem = self.name.removesuffix(".html").replace("/", "-")
            file = shots / f"{stem}.{self.width}.{theme}.png"
            await page.screenshot(path=file, full_page=True)


async def visit_all(visits: list[Visit], binary: str, shots: Path | None) -> None:
    """Make all visits in one browser, a few at a time."""
    turns = asyncio.Semaphore(min(4, os.cpu_count() or 1))

    async def take_turn(visit: Visit) -> None:
        async with turns:
            await visit.look(browser, shots)

    async with async_playwright() as play:
        browser = await play.chromium.launch(executable_path=binary, args=FLAGS)
        await asyncio.gather(*map(take_turn, visits))
        await browser.close()


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("site", type=Path, help="folder with the built HTML")
    parser.add_argument("--screenshots", type=Path, metavar="DIR")
    parser.add_argument("--pages", nargs="+", metavar="NAME", help="only these pages")
    return parser.parse_args()


def main() -> int:
    """Check the site; return 0 when nothing is wrong, 1 otherwise."""
    started = time.perf_counter()
    options = parse()
    site = options.site.resolve()
    pages = links.html_files(site)
    if options.pages:
        pages = [
            page for page in pages if page.relative_to(site).as_posix() in options.pages
        ]
    binary = chromium()
    if not pages or not binary:
        print("no pages to check" if not pages else "no Chromium: set $CHROMIUM")
        return 1
    if options.screenshots:
        options.screenshots.mkdir(parents=True, exist_ok=True)
    visits = [Visit(site, page, width) for page in pages for width in WIDTHS]
    asyncio.run(visit_all(visits, binary, options.screenshots))
    found = [
        *links.faults(site),
        *(fault for visit in visits for fault in visit.faults),
    ]
    for page, reason in dict.fromkeys(found):
        print(f"{page}: {reason}")
    seconds = time.perf_counter() - started
    print(f"{len(pages)} pages, {len(dict.fromkeys(found))} faults, {seconds:.0f} s")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
