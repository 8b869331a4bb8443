"""Docstrings as Markdown. They are nearly that as they are: code between backticks, equations indented, and lists of
attributes, arguments and errors under a word with a colon."""

from __future__ import annotations

import inspect
import re
from typing import Any

SECTION = re.compile(r"(Attributes|Args|Raises|Returns|Yields|Warns):$")
ITEM = re.compile(r"((?:\*{0,2}[\w./]+(?:, )?)+): +(.*)")


def docstring(thing: Any) -> str:
    """Return the docstring of a thing as Markdown, "" where it has none of its own."""
    text = vars(thing).get("__doc__") if isinstance(thing, type) else getattr(thing, "__doc__", None)
    if isinstance(thing, type) and text and text.startswith(f"{thing.__name__}("):  # a dataclass writes one for itself
        text = None
    return markdown(inspect.cleandoc(text)) if text else ""


def markdown(text: str) -> str:
    """Return the Markdown of a docstring that is cleaned of its indentation."""
    lines: list[str] = []
    inside = False  # in a section
    for line in text.splitlines():
        if SECTION.match(line):
            lines += ["", f"**{line[:-1]}**", ""]
            inside = True
        elif inside and line.startswith("    "):
            lines.append(_item(line[4:]))
        elif inside and line.strip():
            inside = False
            lines += ["", escaped(line)]
        elif line.startswith("    "):
            if lines and lines[-1] and not lines[-1].startswith("    "):
                lines.append("")
            lines.append(line)
        else:
            lines.append(escaped(line))
    return "\n".join(lines).strip("\n")


def _item(line: str) -> str:
    """Return a line of a section: the first of an item, or one that goes on."""
    if line.startswith("    "):
        return f"  {escaped(line.strip())}"
    if match := ITEM.match(line):
        return f"- `{match[1]}`: {escaped(match[2])}"
    return f"- {escaped(line)}"


def escaped(line: str) -> str:
    """Return a line of prose without what Markdown would take for HTML, and with the line's own backticks."""
    return "".join(part if i % 2 else part.replace("<", "\\<") for i, part in enumerate(re.split(r"(`[^`]*`)", line)))


def attributes(kind: type) -> dict[str, str]:
    """Return what a class's docstring says of each of its attributes, on one line each."""
    found: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in inspect.cleandoc(vars(kind).get("__doc__") or "").splitlines():
        if line in ("Attributes:", "Args:"):
            inside = True
        elif inside and line.strip() and not line.startswith("    "):
            inside = False
        elif inside and line.strip():
            match = ITEM.match(line[4:])
            if match and not line[4:].startswith(" "):
                names = match[1].split(", ")
                found |= dict.fromkeys(names, match[2])
            else:
                found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return {name: escaped(text) for name, text in found.items()}


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    cells = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
