"""The report of a pilot."""

from __future__ import annotations

from pathlib import Path

from rnn_longctx.eval.show.page.parts import KINDS, Kind, Page


def page(path: Path) -> Page:
    return Page("Pilot", [], {})


KINDS.register(Kind("pilot", fits=lambda path: (path / "pilot.json").is_file(), page=page, over=("eval", "probe")))
