"""What can be seen in the files of a site without opening them in a browser.

Two questions: does a page ask another machine for anything it needs to be shown, and
does each link inside the site lead somewhere?
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED_RELATIONS = {
    "stylesheet", "icon", "preload", "modulepreload", "prefetch", "preconnect",
    "dns-prefetch", "manifest", "apple-touch-icon",
}  # fmt: skip
LOADING = {
    "script": ("src",), "img": ("src", "srcset"), "iframe": ("src",),
    "source": ("src", "srcset"), "video": ("src", "poster"), "audio": ("src",),
    "embed": ("src",), "object": ("data",), "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"), "track": ("src",), "input": ("src",),
}  # fmt: skip
OUTSIDE = re.compile(r"(?:https?:|wss?:|ftp:)?//", re.IGNORECASE)
STYLE_ADDRESS = re.compile(
    r"""url\(\s*['"]?((?:https?:)?//[^'")\s]+)|@import\s+['"]((?:https?:)?//[^'"]+)""",
    re.IGNORECASE,
)


@dataclass
class Page(HTMLParser):
    """The addresses and anchors of one HTML file."""

    path: Path
    loads: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Read the file at once: a `Page` is complete when it exists."""
        super().__init__()
        self._in_style = False
        self.feed(self.path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Sort the addresses of one tag into loaded ones and links."""
        values = {name: value for name, value in attrs if value}
        self.anchors.update(values[name] for name in ("id", "name") if name in values)
        self._in_style = tag == "style"
        self.loads += [values[name] for name in LOADING.get(tag, ()) if name in values]
        self.loads += style_addresses(values.get("style", ""))
        if tag == "link" and LOADED_RELATIONS & set(values.get("rel", "").split()):
            self.loads.append(values.get("href", ""))
        if tag == "a" and "href" in values:
            self.links.append(values["href"])

    def handle_data(self, data: str) -> None:
        """Look for addresses in a ``<style>`` element."""
        if self._in_style:
            self.loads += style_addresses(data)

    def handle_endtag(self, tag: str) -> None:
        """Leave the ``<style>`` element."""
        self._in_style = False


def style_addresses(css: str) -> list[str]:
    """Return the addresses on other machines that a style sheet would load."""
    return [first or second for first, second in STYLE_ADDRESS.findall(css)]


def html_files(site: Path) -> list[Path]:
    """Return the pages of a site, without the theme's own fragments."""
    pages = sorted(site.rglob("*.html"))
    return [page for page in pages if "_static" not in page.relative_to(site).parts]


def dead(link: str, page: Page, pages: dict[Path, Page]) -> bool:
    """Tell whether a link inside the site leads to no file or no anchor."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return False
    target = (page.path.parent / unquote(parts.path)).resolve()
    target = page.path.resolve() if not parts.path else target
    if not target.exists():
        return True
    anchor = unquote(parts.fragment)
    return bool(anchor) and target in pages and anchor not in pages[target].anchors


def faults(site: Path) -> Iterator[tuple[str, str]]:
    """Yield (page, reason) for each outside address and each dead link."""
    pages = {path.resolve(): Page(path) for path in html_files(site)}
    for page in pages.values():
        name = page.path.relative_to(site).as_posix()
        for address in dict.fromkeys(page.loads):
            if OUTSIDE.match(address):
                yield name, f"asks another machine for {address}"
            elif dead(address, page, pages):
                yield name, f"needs a file that is not there: {address}"
        for link in dict.fromkeys(page.links):
            if dead(link, page, pages):
                yield name, f"dead link: {link}"
    for sheet in sorted(site.rglob("*.css")):
        for address in style_addresses(sheet.read_text(encoding="utf-8")):
            yield sheet.relative_to(site).as_posix(), f"asks another machine: {address}"
