"""Text that others wrote (names of models, files, texts and tasks), made harmless: for a terminal, which obeys escape
sequences, and for CSV files, in which a spreadsheet runs what begins like a formula.

Both are decided here and nowhere else, and documented in docs/command-line.md.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

FORMULA = ("=", "+", "-", "@")  # how a cell begins that a spreadsheet runs
GUARD = "'"  # a spreadsheet shows what follows as text


def plain(text: str, lines: bool = False) -> str:
    """Return a text in which nothing steers a terminal: characters that control it, that reorder what is shown
    (bidirectional marks) or that are no characters (halves of surrogate pairs) are spelled out, as in `\\x1b`.

    Args:
        lines: whether line breaks and tabs stay, of a text of several lines; a name has one.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if _harmless(c, lines) else c.encode("unicode_escape").decode("ascii") for c in text)


def plain_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table whose texts, and names of columns, are `plain`."""
    return _mapped(frame, lambda value: plain(value) if isinstance(value, str) else value)


def csv_text(frame: pd.DataFrame, **how: Any) -> str:
    """Return a table as CSV without its index, its texts `guarded`. how: more for `pandas.DataFrame.to_csv`."""
    return _mapped(frame, guarded).to_csv(index=False, lineterminator="\n", **how)


def guarded(value: Any) -> Any:
    """Return a text as it stands in a CSV file: `plain`, and with an apostrophe before what a spreadsheet would run
    as a formula. A number in words, such as -0.5, is none; what is no text stays."""
    if not isinstance(value, str):
        return value
    text = plain(value)
    return GUARD + text if _formula(text.lstrip(GUARD)) else text


def unguarded(text: str) -> str:
    """Return the text that `guarded` wrote, without its apostrophe."""
    return text[len(GUARD) :] if text.startswith(GUARD) and _formula(text.lstrip(GUARD)) else text


def _formula(text: str) -> bool:
    if len(text) < 2 or not text.startswith(FORMULA):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False


def _harmless(character: str, lines: bool) -> bool:
    if character in "\n\t":
        return lines
    # Cc controls, Cf formats such as the marks that turn a line around, Cs halves of pairs, Zl and Zp break lines
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or character in "\u200c\u200d"


def _mapped(frame: pd.DataFrame, change: Callable[[Any], Any]) -> pd.DataFrame:
    """Return a table with every value that is no number, and every name of a column, changed."""
    from pandas.api.types import is_numeric_dtype

    changed = frame.copy()
    for i, (_, column) in enumerate(frame.items()):
        if not is_numeric_dtype(column.dtype):
            changed.isetitem(i, column.map(change, na_action="ignore").array)
    return changed.set_axis([change(name) for name in frame.columns], axis=1)
