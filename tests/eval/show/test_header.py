"""What stands above a command's results."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from rnn_longctx.eval.show.terminal import header
from rnn_longctx.models.state_size import StateSize


def test_header_says_what_is_measured():
    console = Console(file=io.StringIO(), width=100)
    console.print(
        header("tiny", 2_913_408, StateSize({"scan": 393216, "conv": 13824}), 256, "cpu", "float32", "chunked")
    )
    out = console.file.getvalue()
    assert "2.9M parameters" in out and "407,040 elements (scan 393,216 + conv 13,824)" in out
    assert "256 tokens" in out and "cpu, float32, chunked" in out


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (StateSize({"scan": 3, "conv": 4}), "7 elements (scan 3 + conv 4)"),
        (StateSize({"scan": 3}, per_token=1234), "3 elements (scan 3), and 1,234 more with every token read"),
        (StateSize(windows={255: 512, 10: 3}), "up to 130,590 of the last tokens"),
        (
            StateSize(per_token=2, windows={3: 2}, chunks={64: 512}),
            "up to 6 of the last tokens, and 2 more with every token read, and 512 more with every 64 tokens",
        ),
        (StateSize(), "none"),
    ],
)
def test_the_header_says_what_is_kept_and_what_grows(state, said):
    console = Console(file=io.StringIO(), width=150)
    console.print(header("tiny", 10, state, None, "cpu", "float32", "torch"))
    assert re.search(rf"^state +{re.escape(said)} *$", console.file.getvalue(), re.MULTILINE)
