"""Where text from data becomes part of a page: cleaned and escaped here, and nowhere else.

Names of models, texts, files and tasks may hold anything. In HTML and inside Plotly (which reads tags) they are
escaped; in the page's JSON no tag can end the script that holds it; control characters, which a terminal would obey,
and marks that turn the direction of writing become U+FFFD, as do halves of surrogate pairs, which no file can hold.
"""

from __future__ import annotations

import base64
import html
import json
import math
import numbers
import re
from typing import Any

import numpy as np
import pandas as pd

LONGEST = 10_000  # characters of one text; what is longer ends in dots
DIGITS = 7  # of the numbers of a figure
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_TEMPLATES = ("hovertemplate", "texttemplate")
_EXTRA = ("&lt;extra&gt;&lt;/extra&gt;", "<extra></extra>")  # of a template: no second box


def clean(text: Any) -> str:
    """Return a text without what is not to be seen, and not too long."""
    shown = _UNSEEN.sub("\ufffd", str(text).replace("\r\n", "\n"))
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…"


def escaped(text: Any) -> str:
    """Return a text for HTML, inside an element or a quoted attribute."""
    return html.escape(clean(text), quote=True)


def for_script(value: Any) -> str:
    """Return a value as JSON that a script element can hold."""
    dumped = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return dumped.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def for_plotly(value: Any, key: str = "") -> Any:
    """Return a Plotly figure's data or layout, or a piece of it, as JSON takes it: texts escaped, arrays as lists,
    numbers of DIGITS digits, None for those that are not finite."""
    if isinstance(value, dict):
        value = unpacked(value)
        return {k: for_plotly(v, k) for k, v in value.items() if not (key == "layout" and k == "template")}
    if isinstance(value, (list, tuple, np.ndarray, pd.Series, pd.Index)):
        return [for_plotly(v) for v in value]
    if isinstance(value, str):
        text = html.escape(clean(value), quote=False).replace("\n", "<br>")
        return text.replace(*_EXTRA) if key in _TEMPLATES else text
    return number(value, DIGITS)


def cell(value: Any) -> Any:
    """Return a value of a table as JSON takes it, with all of its digits."""
    if isinstance(value, (list, tuple, dict, np.ndarray)):
        return clean(value.tolist() if isinstance(value, np.ndarray) else value)
    return value if value is None else clean(value) if isinstance(value, str) else number(value)


def number(value: Any, digits: int | None = None) -> Any:
    """Return a number, truth value or None as JSON takes it; anything else as text."""
    if type(value) is int:  # (first what there is most of: asking for abstract kinds is slow)
        return value
    if value is None or value is pd.NA or value is pd.NaT:
        return None
    if type(value) is not float:
        if isinstance(value, (bool, np.bool_)):
            return bool(value)
        if isinstance(value, numbers.Integral):
            return int(value)
    if type(value) is float or isinstance(value, numbers.Real):
        as_float = float(value)
        if not math.isfinite(as_float):
            return None if digits or math.isnan(as_float) else str(as_float)
        return as_float if digits is None else float(f"{as_float:.{digits}g}")
    return clean(value)


def unpacked(piece: dict[str, Any]) -> dict[str, Any]:
    """Return a piece of a figure with its arrays as lists, also those that Plotly packed."""
    return {key: _listed(value) for key, value in piece.items()}


def _listed(value: Any) -> Any:
    if isinstance(value, dict) and "bdata" in value and "dtype" in value:
        values = np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"])
        shape = [int(n) for n in str(value["shape"]).split(",")] if "shape" in value else [-1]
        return values.reshape(shape).tolist()
    return list(value) if isinstance(value, (tuple, np.ndarray, pd.Series, pd.Index)) else value
