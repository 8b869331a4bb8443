"""One browser for all tests of pages, and a page of every kind of folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from report_folders import FOLDERS
from report_visits import Visit

from rnn_longctx.eval.show.page.page import write_page
from rnn_longctx.eval.show.page.parts import page_of


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
        browser = driver.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        )
        yield browser
        browser.close()


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
