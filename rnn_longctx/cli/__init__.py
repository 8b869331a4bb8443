"""The command line: thin, it parses, calls and prints."""

from rnn_longctx.cli.program import app, main

__all__ = ["app", "main"]
