"""The command line as a person calls it, in this process."""

from __future__ import annotations

import sys

from rnn_longctx import cli


def called(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    """Return the exit code, and what is printed to stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["rnn-longctx", *words])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return code, *capsys.readouterr()
