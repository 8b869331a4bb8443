"""The one exception that means: the input is wrong, and here is one line that says how."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from a person. The command line prints its message on one line and exits with code 2."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Suffix for an unknown-name message: ``'; did you mean "lm"? (choices: lm, passkey)'``."""
    options = sorted(choices)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.4)
    hint = f'; did you mean "{close[0]}"?' if close else ""
    return f"{hint} (choices: {', '.join(options)})"
