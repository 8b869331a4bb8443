"""What the site does to a page before it is read: it puts in what is made from the code, and it names files of the
repository, which the site does not hold, where the page links to them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_line
import listings
import python_api

DOCS = Path(__file__).resolve().parents[1]
MARK = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?://|#)([^)#\s]+)(?:#[^)\s]*)?\)")

GENERATED: dict[str, Callable[[], str]] = {
    "python": python_api.page,
    "command-line": command_line.page,
    "configs": listings.configs,
    "result-table": listings.result_table,
    "remedies": listings.remedies,
    "mixers": listings.mixers,
    "recurrences": listings.recurrences,
    "tasks": listings.tasks,
    "benches": listings.benches,
}


def filled(text: str) -> str:
    """Return a page with what its marks, `<!-- generated: mixers -->`, stand for."""
    return MARK.sub(lambda mark: GENERATED[mark[1]](), text)


def inside(text: str, folder: Path) -> str:
    """Return a page of a folder of docs/ whose links to files outside of docs/ have become their text and path."""

    def named(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / link[2]))
        if target.is_relative_to(DOCS) or not target.exists():
            return link[0]
        path = target.relative_to(DOCS.parent)
        return link[1] if link[1].strip("`") == path.name else f"{link[1]} (`{path}`)"

    return LINK.sub(named, text)


def _read(app: Any, page: str, source: list[str]) -> None:
    source[0] = inside(filled(source[0]), (DOCS / page).parent)


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("source-read", _read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
