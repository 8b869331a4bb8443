"""The pages of this repository as its tests read them: README, CONTRIBUTING and docs/, by CommonMark's rules."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
PROGRAMS = ("rnn-longctx", "python", "torchrun", "accelerate", "pytest", "make", "pip", "git", "source", "mkdir")
MARKDOWN = MarkdownIt("commonmark").enable("table")


@dataclass(frozen=True)
class Command:
    """A command of a page, on one line, without its comment."""

    page: str
    text: str
    named: bool = False  # in a sentence, where a part of a command may stand for it

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def name(page: Path) -> str:
    """Return a page's path in the repository."""
    return str(page.relative_to(ROOT))


def tokens(page: Path, kind: str) -> Iterator[Token]:
    """Yield the tokens of a kind, those inside of text too."""
    for token in MARKDOWN.parse(page.read_text()):
        for each in (token, *(token.children or ())):
            if each.type == kind:
                yield each


def commands(page: Path) -> Iterator[Command]:
    """Yield the commands of a page: lines of its blocks that begin with a program, and code in its text that does."""
    blocks = [*tokens(page, "code_block"), *(t for t in tokens(page, "fence") if not t.info.startswith("python"))]
    lines = [(line, False) for block in blocks for line in block.content.replace("\\\n", " ").splitlines()]
    lines += [(token.content, True) for token in tokens(page, "code_inline")]
    for line, named in lines:
        for part in line.partition(" # ")[0].split("&&"):
            text = " ".join(part.split())
            if text.split(" ")[0] in PROGRAMS and " " in text:
                yield Command(name(page), text, named)


def all_commands() -> list[Command]:
    """Return the commands of all pages, a page's in their order, each once a page."""
    return list(dict.fromkeys(command for page in PAGES for command in commands(page)))


def words(command: Command) -> list[str]:
    """Return the arguments of this project's command line, without what a shell does with them and without plugins
    (pages that have one write a plugin have tests of their own)."""
    text = re.sub(r" \[[A-Z]+ \.\.\.\]| [<>] \S+| \| .*", "", command.text)
    text = re.sub(r"^.* -m rnn_longctx\.train ", "rnn-longctx train ", text)
    text = re.sub(r"^.* -m rnn_longctx\.cli ", "rnn-longctx ", text)
    return shlex.split(re.sub(r" --plugin \S+", "", text))[1:]


def python_blocks(page: Path) -> list[tuple[str, str]]:
    """Return the Python blocks of a page: what stands behind "python" (fragment, title=...), and the text."""
    return [
        (token.info.partition(" ")[2], token.content)
        for token in tokens(page, "fence")
        if token.info.split(" ")[0] == "python"
    ]


def links(page: Path) -> Iterator[str]:
    """Yield where the links and pictures of a page lead."""
    for token in tokens(page, "link_open"):
        yield str(token.attrs["href"])
    for token in tokens(page, "image"):
        yield str(token.attrs["src"])


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MyST name them."""
    parsed = MARKDOWN.parse(text)
    titles = [parsed[i + 1].children or [] for i, token in enumerate(parsed) if token.type == "heading_open"]
    slugs: dict[str, int] = {}
    found = set()
    for title in titles:
        words = "".join(part.content for part in title if part.type in ("text", "code_inline"))
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        count = slugs.get(slug, 0)
        slugs[slug] = count + 1
        found.add(slug if count == 0 else f"{slug}-{count}")
    return found
