"""The site is built, with warnings as errors, and loads nothing from elsewhere."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser

import pages
import pytest

import rnn_longctx

pytest.importorskip("sphinx", reason="the site is built by Sphinx: pip install -e '.[docs]'")


LOADED = ("stylesheet", "preload", "modulepreload", "preconnect", "dns-prefetch", "icon")  # relations of links


class Loads(HTMLParser):
    """The addresses that a page loads when it is shown: scripts, styles, pictures, fonts; not where its links lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = dict(attrs)
        self.addresses += [of.get("src") or ""] if "src" in of else []
        self.addresses += [of.get("href") or ""] if tag == "link" and of.get("rel") in LOADED else []


@pytest.mark.slow
def test_the_site(tmp_path):
    from sphinx.cmd.build import build_main
    from sphinx.util.inventory import InventoryFile

    before = list(sys.path)
    try:
        line = ["-q", "-W", "--keep-going", "-E", "-b", "html", "-d", str(tmp_path / "trees")]
        assert build_main([*line, str(pages.DOCS), str(tmp_path / "site")]) == 0
    finally:
        sys.path[:] = before
    site = tmp_path / "site"
    built = {str(page.relative_to(site).with_suffix(".md")) for page in site.rglob("*.html")}
    assert {str(page.relative_to(pages.DOCS)) for page in pages.DOCS.rglob("*.md")} <= built
    for page in site.rglob("*.html"):
        far = [a for a in Loads(page.read_text()).addresses if re.match(r"(?:\w+:)?//", a)]
        assert not far, f"{page.relative_to(site)} loads {far}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", style.read_text()), style.name
    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    names = {name for kind, objects in inventory.data.items() if kind.startswith("py:") for name in objects}
    assert {f"rnn_longctx.{name}" for name in rnn_longctx.__all__} <= names
