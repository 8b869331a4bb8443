"""`rnn-longctx trace-key`: which heads hold a passkey, how long, and what loses it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from rnn_longctx.cli.command import command
from rnn_longctx.cli.options import MODEL, ModelOptions, option
from rnn_longctx.cli.output import fact, say, show, table, wrote


@dataclass(frozen=True)
class TraceKeyOptions:
    """What is read between key and question, and where the tables go."""

    gaps: Annotated[str, typer.Option(help="Tokens between key and question, as 1k,16k,64k.")] = "1k,16k,64k"
    n: Annotated[int, typer.Option(min=2, help="Keys, read side by side.")] = 10
    haystack: Annotated[str | None, option("A text as filler, as --text of eval.", "the paper's sentences")] = None
    reading: Annotated[str, typer.Option(help="Of the gap: plain; held (no head decays); frozen (no head writes).")] = (
        "plain"
    )
    heads: Annotated[bool, typer.Option(help="Try the heads one by one.")] = True
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("runs/trace-key")
    seed: Annotated[int, typer.Option(min=0, help="Of the keys; of a text, which slice.")] = 0


@command("trace-key")
def trace_key(
    model: Annotated[str, MODEL], tracing: TraceKeyOptions = TraceKeyOptions(), options: ModelOptions = ModelOptions()
) -> None:
    """Which heads hold a passkey while a model reads on, and whether decay, later writes or the reading lose it.

    Examples:
        rnn-longctx trace-key demo-long --gaps 1k,16k,64k
        rnn-longctx trace-key demo-long --gaps 1k,4k --haystack stdlib --no-heads
    """
    from rnn_longctx.config import parse_length
    from rnn_longctx.data import load_text
    from rnn_longctx.probes.key_trace import trace_key

    c = tracing
    gaps = [parse_length(gap, "--gaps") for gap in c.gaps.split(",")]
    haystack = None if c.haystack is None else load_text(c.haystack)
    lm = options.load(model)
    trace = trace_key(lm, gaps, c.n, haystack=haystack, reading=c.reading, each_head=c.heads, seed=c.seed, say=say)
    paths = trace.save(c.out)
    found, heads = trace.by_gap("right"), trace.heads()
    for name, title, rows in (("found", "share of the keys found", found), ("heads", "heads that matter most", heads)):
        if len(rows):
            text = rows.to_string(float_format=lambda value: f"{value:.3g}")
            table(name, rows.reset_index(), f"\n{title}\n{text}")
    fact("verdict", trace.verdict)
    show(f"\n{trace.verdict}")
    wrote(c.out, [path.name for path in paths])
