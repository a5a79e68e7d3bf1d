"""The exercises in JupyterLab, as a learner meets them: typed, run, saved, judged.

A browser without a window types into the page and reads what the page shows; nothing is
asked of the kernel behind its back. Each verdict is photographed into `tmp_path`.
"""

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from grader.source import exercises
from playwright.async_api import Error as PlaywrightError
from playwright.async_api import Locator, Page, Route, async_playwright, expect

from tests.learner import CHAPTER, ROOT, Desk

sys.path.insert(0, str(ROOT / "book" / "_check"))

import browser  # noqa: E402

LIMIT = 240  # seconds for everything, so that nothing hangs: it takes about twenty
WAIT = 60_000  # milliseconds for one thing to appear, on a busy machine
TOKEN = "a-learner"
WRONG = "return np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True)"
RIGHT = """\
e = np.exp(x - x.max(axis=-1, keepdims=True))
return e / e.sum(axis=-1, keepdims=True)"""
UNSAVED = "Not saved yet"
# The learner saves, not the clock; and nobody asks jupyter.org for its news.
SETTINGS = {
    "docmanager-extension/plugin": {"autosave": False},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        browser.chromium() is None,
        reason="no Chromium on the path: install one or set $CHROMIUM",
    ),
]


# --- the server --------------------------------------------------------------------


def configured(home: Path) -> dict[str, str]:
    """An environment in which Jupyter finds our settings and kernel, and no others."""
    for plugin, settings in SETTINGS.items():
        file = home / "config/lab/user-settings/@jupyterlab" / plugin
        file = file.with_name(f"{file.name}.jupyterlab-settings")
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(settings))
    kernel = home / "data/kernels/python3/kernel.json"
    kernel.parent.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "Python 3", "language": "python"}
    kernel.write_text(json.dumps(spec))
    ours = {
        "JUPYTER_CONFIG_DIR": home / "config",
        "JUPYTER_DATA_DIR": home / "data",
        "JUPYTER_RUNTIME_DIR": home / "runtime",
        "IPYTHONDIR": home / "ipython",
        "JUPYTER_PREFER_ENV_PATH": 0,
    }
    others = {k: v for k, v in os.environ.items() if not k.startswith("JUPYTER")}
    return others | {name: str(value) for name, value in ours.items()}


@contextlib.asynccontextmanager
async def jupyterlab(desk: Desk, home: Path) -> AsyncIterator[str]:
    """What `make lab` starts, on any free port; gives the notebook's address."""
    line = [
        sys.executable, "-m", "jupyterlab", "exercises", "--no-browser",
        "--ip=127.0.0.1", "--port=0", "--allow-root",
        f"--IdentityProvider.token={TOKEN}", "--LabApp.extension_manager=readonly",
    ]  # fmt: skip
    env, log = configured(home), home / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            line, cwd=desk.root, env=env, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        known = home / f"runtime/jpserver-{server.pid}.json"
        while not known.exists() or not known.read_text().endswith("}"):
            assert server.poll() is None, log.read_text()
            await asyncio.sleep(0.05)
        yield f"{json.loads(known.read_text())['url']}lab/tree/{CHAPTER}?token={TOKEN}"
    finally:
        server.terminate()  # it ends its kernels, then itself
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


# --- the learner -------------------------------------------------------------------


@contextlib.asynccontextmanager
async def opened(address: str, shots: Path) -> AsyncIterator[Page]:
    """The notebook, once its kernel is ready, in a browser that reaches nothing else.

    What goes wrong from here on is photographed.
    """
    strays: list[str] = []

    async def refuse_outside(route: Route) -> None:
        if route.request.url.startswith(address.partition("lab/tree/")[0]):
            await route.continue_()
        else:
            strays.append(route.request.url)
            await route.abort()

    async with (
        async_playwright() as play,
        await play.chromium.launch(
            executable_path=browser.chromium(),
            args=[*browser.FLAGS, "--no-proxy-server"],
            timeout=WAIT,
        ) as chromium,
    ):
        page = await chromium.new_page(viewport={"width": 1280, "height": 1200})
        await page.route(re.compile("^(?!data:|blob:)"), refuse_outside)
        try:
            await page.goto(address, timeout=WAIT)
            ready = page.locator("#jp-main-statusbar", has_text="Python 3 | Idle")
            await ready.wait_for(timeout=WAIT)
            yield page
        except BaseException:
            with contextlib.suppress(PlaywrightError):
                await page.screenshot(path=shots / "gone wrong.png", timeout=5000)
            raise
    assert not strays, f"asked other machines for {strays}"


class Learner:
    """Hands on the keyboard and eyes on the page."""

    def __init__(self, page: Page, shots: Path) -> None:
        self.page, self.shots, self.runs = page, shots, 0

    def cell(self, words: str) -> Locator:
        """The code cell in whose source these words stand."""
        source = self.page.locator(".cm-content", has_text=words)
        return self.page.locator(".jp-CodeCell", has=source).first

    async def enter(self, cell: Locator) -> None:
        """Click into a cell's source."""
        await cell.locator(".cm-content").click(timeout=WAIT)

    async def write(self, words: str, text: str) -> None:
        """Type over the last line of a cell, from behind its indent."""
        await self.enter(self.cell(words))
        await self.page.keyboard.press("Control+End")
        await self.page.keyboard.press("Shift+Home")
        await self.page.keyboard.type(text)

    async def run(self, words: str) -> Locator:
        """Shift+Enter; wait for the end of it; give the place of what is shown."""
        cell = self.cell(words)
        await self.enter(cell)
        await self.page.keyboard.press("Shift+Enter")
        self.runs += 1
        prompt = cell.locator(".jp-InputArea-prompt")
        await expect(prompt).to_have_text(f"[{self.runs}]:", timeout=WAIT)
        return cell.locator(".jp-Cell-outputArea")

    async def save(self) -> None:
        """Ctrl+S; wait until the tab's dot is gone."""
        tab = self.page.locator(".lm-TabBar-tab.jp-mod-current")
        await expect(tab).to_contain_class("jp-mod-dirty", timeout=WAIT)
        await self.page.keyboard.press("Control+s")
        await expect(tab).not_to_contain_class("jp-mod-dirty", timeout=WAIT)

    async def reads(self, shown: Locator, *words: str) -> str:
        """Wait for these words, take a picture under the first; give the whole text."""
        for some in words:
            await expect(shown).to_contain_text(some, timeout=WAIT)
        await self.page.screenshot(path=self.shots / f"{words[0]}.png", timeout=WAIT)
        return await shown.inner_text()


# --- the trial ---------------------------------------------------------------------


async def lesson(learner: Learner) -> None:
    """From the untouched stub over a wrong answer to the right one and a hint."""
    answer, verdict = "def softmax(x)", 'check("lm.1")'
    await learner.run("import numpy")
    await learner.run(answer)
    await learner.reads(await learner.run(verdict), "todo  lm.1")

    await learner.write(answer, WRONG)
    await learner.run(answer)
    shown = await learner.run(verdict)
    named = "Looks like: no maximum subtracted"
    await learner.reads(shown, "failed  lm.1", named, UNSAVED)

    await learner.write(answer, RIGHT)
    await learner.run(answer)
    await learner.save()
    text = await learner.reads(await learner.run(verdict), "passed  lm.1", "next: lm.2")
    assert UNSAVED not in text and "failed" not in text, text

    await learner.write(verdict, f'{verdict}\nhint("lm.2")')
    await learner.reads(await learner.run(verdict), "lm.2, hint 1 of 3", "passed")


def test_a_learner_in_jupyterlab(tmp_path):
    desk = Desk(tmp_path / "minidsv3")

    async def trial() -> None:
        async with (
            asyncio.timeout(LIMIT),
            jupyterlab(desk, tmp_path / "jupyter") as address,
            opened(address, tmp_path) as page,
        ):
            await lesson(Learner(page, tmp_path))

    asyncio.run(trial())
    status, words = desk.grade("-q")
    here = [e for e in exercises().values() if f"{e.notebook}.ipynb" == CHAPTER]
    assert status == 0 and f"1/{len(here)} passed" in words, words
