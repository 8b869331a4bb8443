"""Links of README and docs lead somewhere: to a file, and in it to a heading."""

from __future__ import annotations

import pages
import pytest
from filling import MARK, filled
from pages import ROOT


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_links_and_anchors_lead_somewhere(page):
    gone = [link for link in pages.links(page) if not leads(page, link)]
    assert not gone, f"{pages.name(page)}: nothing is there: {', '.join(gone)}"


def leads(page, link):
    if link.startswith(("https://", "http://", "mailto:")):
        return True
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists() or not target.is_relative_to(ROOT):
        return False
    return not anchor or anchor in anchors(target)


def anchors(page):
    text = page.read_text()
    return pages.anchors(filled(text) if MARK.search(text) else text)


def test_a_link_that_leads_nowhere_is_seen(tmp_path):
    page = pages.DOCS / "index.md"
    assert not leads(page, "no-such-page.md") and not leads(page, "develop/glossary.md#no-such-heading")
    assert leads(page, "develop/glossary.md#remedies")


def test_readme_is_short():
    """A person reads it in five minutes: what it would say beside that has a page."""
    words = [word for word in (ROOT / "README.md").read_text().split() if any(c.isalnum() for c in word)]
    assert len(words) <= 920


def test_no_page_names_a_machine():
    for page in pages.PAGES:
        text = page.read_text()
        assert not [path for path in ("/work/", "/home/", "/tmp/", "/root/") if path in text], pages.name(page)
