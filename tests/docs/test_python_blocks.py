"""Python of README and docs: every block compiles, and those that are no fragments run, a page's in order."""

from __future__ import annotations

import pages
import pytest

BLOCKS = {page: blocks for page in pages.PAGES if (blocks := pages.python_blocks(page))}
WHOLE = {page: [text for about, text in blocks if not about] for page, blocks in BLOCKS.items()}


@pytest.mark.parametrize("page", BLOCKS, ids=pages.name)
def test_they_compile(page):
    for number, (about, text) in enumerate(BLOCKS[page]):
        assert about in ("", "fragment", 'title="test"'), f"block {number}: {about}"
        compile(text, f"{pages.name(page)}, block {number}", "exec")


RUN = [page for page, texts in WHOLE.items() if texts and not page.name.startswith("add-a-")]
SLOW = ("docs/guides/monitor.md",)  # it watches ten thousand tokens


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=pytest.mark.slow if pages.name(p) in SLOW else (), id=pages.name(p)) for p in RUN]
)
def test_they_run(page, tmp_path, monkeypatch):
    """(Pages that have one write a file have tests of their own: tests/docs/test_pages.py.)"""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "page"}
    for text in WHOLE[page]:
        exec(compile(text, pages.name(page), "exec"), namespace)
