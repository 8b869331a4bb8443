"""The exception that means: the input is wrong, and here is one line that says how; and the one of a monitor."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable
from typing import Any

_WARNED: dict[Any, Any] = {}  # what Python remembers of the warnings of `warn_once`


class InputError(ValueError):
    """Bad input from a person. The command line prints its message on one line and exits with code 2."""


class CollapseError(RuntimeError):
    """A model that a monitor watches has collapsed, and `raise` was asked for.

    Attributes:
        position: tokens read.
        heads: (layer, head, ratio of its state's norm to its envelope), the largest first.
    """

    def __init__(self, message: str, position: int, heads: tuple[tuple[int, int, float], ...]):
        super().__init__(message)
        self.position, self.heads = position, heads


def warn_once(text: str) -> None:
    """Warn of what surely is not meant, but can be done: the same words once a process, wherever they come from."""
    warnings.warn_explicit(text, RuntimeWarning, "rnn_longctx", 1, registry=_WARNED)


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: '; did you mean "lm"? (choices: lm, passkey)'."""
    options = sorted(choices)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.4) if len(name) > 1 else []
    hint = f'; did you mean "{close[0]}"?' if close else ""
    return f"{hint} (choices: {', '.join(options)})"


def one_line(error: BaseException, most: int = 160) -> str:
    """Return an error's text on one line, its kind where it has none, with dots in the place of what is longer."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."
