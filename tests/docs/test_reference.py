"""The reference that the site makes from the code: what is public is in it, and what it is made of is whole."""

from __future__ import annotations

import pkgutil
import re
from dataclasses import fields

import command_line
import listings
import pages
import pytest
import python_api
from filling import GENERATED, MARK, filled, inside
from prose import attributes, docstring, escaped, markdown

import rnn_longctx
from rnn_longctx.cli.command import COMMANDS
from rnn_longctx.eval.bench.base import BENCHES
from rnn_longctx.eval.results import COLUMNS
from rnn_longctx.mitigations import REMEDIES
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.recurrence.interface import RECURRENCES
from rnn_longctx.tasks import TASKS

ENTRY = re.compile(r"^`+\{py:(?:class|function|data)\} ([\w.]+)", re.MULTILINE)


def headings(text):
    return set(re.findall(r"^## (.+)$", text, re.MULTILINE))


def test_every_public_name_is_in_the_reference():
    text = python_api.page()
    described = ENTRY.findall(text)
    assert len(described) == len(set(described))
    assert {f"rnn_longctx.{name}" for name in rnn_longctx.__all__} <= set(described)
    things = {id(pkgutil.resolve_name(name)) for name in described}
    for module in python_api.modules():
        for name in python_api.names(module):
            assert id(pkgutil.resolve_name(name)) in things, name


def test_packages_that_say_what_is_public_are_found():
    found = set(python_api.modules())
    assert {"rnn_longctx", "rnn_longctx.mitigations", "rnn_longctx.eval.compare", "rnn_longctx.testing.mixers"} <= found
    assert "rnn_longctx.eval.show.terminal" not in found and "rnn_longctx.cli" not in found


@pytest.mark.parametrize(
    ("mark", "names"),
    [
        ("remedies", REMEDIES),
        ("mixers", MIXERS),
        ("tasks", TASKS),
        ("recurrences", RECURRENCES),
        ("benches", BENCHES),
        ("command-line", COMMANDS),
    ],
)
def test_everything_registered_has_a_section(mark, names):
    assert set(names) <= headings(GENERATED[mark]())


def ours(registry):
    """Return the names of a registry that this library has put there: other tests put plug-ins beside them."""
    return [name for name, kind in registry.items() if kind.__module__.startswith("rnn_longctx.")]


def test_concepts_have_every_remedy_and_every_mixer():
    remedies = (pages.DOCS / "concepts" / "remedies.md").read_text()
    titles = set(", ".join(re.findall(r"^### (.+)$", remedies, re.MULTILINE)).split(", "))
    assert titles == set(ours(REMEDIES)) - {"none"}
    mixers = (pages.DOCS / "concepts" / "mixers.md").read_text()
    assert not [name for name in ours(MIXERS) if f"| `{name}` |" not in mixers]


def test_every_option_of_every_command_is_there():
    text = command_line.page()
    for command in command_line.commands().values():
        for parameter in command.params:
            if not getattr(parameter, "hidden", False) and parameter.opts[0].startswith("--"):
                assert f"`{parameter.opts[0]}`" in text


def test_columns_and_configs_are_whole():
    assert set(listings.COLUMNS) == set(COLUMNS)
    text = listings.configs()
    kinds = listings.kinds_of_configs()
    assert {"DataConfig", "MixedTask", "PassingConfig"} <= {kind.__name__ for kind in kinds["Training"]}
    for title, of in kinds.items():
        part = text.partition(f"## {title}\n")[2].partition("\n## ")[0]
        for kind in of:
            section = part.partition(f"### {kind.__name__}\n")[2].partition("\n### ")[0]
            for field in fields(kind):
                assert f"| `{field.name}` |" in section, (kind, field.name)


def test_marks_are_known_and_each_page_of_the_reference_has_one():
    marked = [mark for page in pages.PAGES for mark in MARK.findall(page.read_text())]
    assert sorted(marked) == sorted(GENERATED)
    assert filled("a\n\n<!-- generated: result-table -->\n").startswith("a\n\n| column |")


def test_docstrings_become_markdown():
    class Kind:
        """Hold a thing (a<b), `x<y>`.

        An equation:
            S_t = 1

        Attributes:
            one, two: of a kind,
                told at length.
            three: |x|.
        Raises:
            InputError: for `none`.
        """

    assert docstring(Kind) == (
        "Hold a thing (a\\<b), `x<y>`.\n\nAn equation:\n\n    S_t = 1\n\n\n**Attributes**\n\n"
        "- `one, two`: of a kind,\n  told at length.\n- `three`: |x|.\n\n**Raises**\n\n- `InputError`: for `none`."
    )
    both = "of a kind, told at length."
    assert attributes(Kind) == {"one": both, "two": both, "three": "|x|."}
    assert markdown("a\n    b") == "a\n\n    b" and escaped("<b>`<c>`") == "\\<b>`<c>`"


def test_links_out_of_docs_become_paths():
    text = "[rows](../../benchmarks/results/capacity), [x](a.md#b), [c](../../README.md), ![p](../../docs/no.png)"
    assert inside(text, pages.DOCS / "results") == (
        "rows (`benchmarks/results/capacity`), [x](a.md#b), c (`README.md`), ![p](../../docs/no.png)"
    )
