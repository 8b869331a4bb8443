"""What only reads tables loads no torch, and the names of the package are those of its modules."""

from __future__ import annotations

import subprocess
import sys

import pytest

import rnn_longctx.eval

LIGHT = [
    "rnn_longctx.eval.tables.sheets",
    "rnn_longctx.eval.tables.leaderboard",
    "rnn_longctx.eval.show.plots",
    "rnn_longctx.eval.show.terminal",
    "rnn_longctx.eval.show.page.page",
    "rnn_longctx.eval.show.page.kinds.probe",
    "rnn_longctx.eval.show.page.kinds.capacity",
    "rnn_longctx.eval.show.watch.server",
    "rnn_longctx.eval.results",
    "rnn_longctx.cli",
]


def loaded_by(statement: str) -> set[str]:
    """The modules that a fresh interpreter holds after a statement."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_tables_and_pictures_load_no_torch() -> None:
    modules = loaded_by("import " + ", ".join(LIGHT))
    assert set(LIGHT) < modules and not modules & {"torch", "transformers"}
    modules = loaded_by("from rnn_longctx.eval import evaluate; import rnn_longctx.eval.compare.cell")
    assert "torch" in modules, "it would be seen"
    assert not modules & {"torch._dynamo", "triton", "transformers"}, "they take seconds, of every cell"


def test_every_name_is_there() -> None:
    for name in rnn_longctx.eval.__all__:
        assert getattr(rnn_longctx.eval, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'evaluat'"):
        rnn_longctx.eval.evaluat  # noqa: B018
    assert set(rnn_longctx.eval.__all__) == set(rnn_longctx.eval._WHERE)
