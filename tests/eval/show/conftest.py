"""One browser for all tests of pages, and a page of every kind of folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from report_folders import FOLDERS

from rnn_longctx.eval.show.page.page import write_page
from rnn_longctx.eval.show.page.parts import page_of

SHOWN = "figure => document.getElementById(`${figure}-plot`)._fullData.map(trace => trace.visible === true)"


@pytest.fixture(scope="session")
def report_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the report of a kind of folder, written once."""
    made: dict[str, Path] = {}

    def report(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("reports")
            made[kind] = write_page(page_of(FOLDERS[kind](folder / kind)), folder / f"{kind}.html")
        return made[kind]

    return report


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium, the system's own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra dev)")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


class Visit:
    """A page in the browser, with what it asked for and complained of."""

    def __init__(self, tab):
        self.tab, self.requests, self.errors = tab, [], []
        tab.on("request", lambda request: self.requests.append(request.url))
        tab.on("console", lambda message: message.type in ("error", "warning") and self.errors.append(message.text))
        tab.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self, url: str):
        self.tab.goto(url)
        self.tab.wait_for_selector("html[data-drawn]", timeout=60_000)
        return self.tab

    def shown(self, figure: str) -> list[bool]:
        """Which traces of a figure are drawn."""
        return self.tab.evaluate(SHOWN, figure)

    def settled(self, figure: str, before: list[bool]) -> list[bool]:
        """What is shown once it is no longer what it was."""
        check = f"([figure, before]) => JSON.stringify(({SHOWN})(figure)) !== JSON.stringify(before)"
        self.tab.wait_for_function(check, arg=[figure, before], timeout=60_000)
        return self.shown(figure)


@pytest.fixture
def visit(chromium):
    """Gives a visit; its window is closed afterwards."""
    contexts = []

    def make(scheme: str = "light", width: int = 1100, height: int = 900) -> Visit:
        context = chromium.new_context(color_scheme=scheme, viewport={"width": width, "height": height})
        contexts.append(context)
        return Visit(context.new_page())

    yield make
    for context in contexts:
        context.close()
