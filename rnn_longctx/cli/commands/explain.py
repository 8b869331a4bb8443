"""`rnn-longctx explain`: what a sparse model reads for a query token, and whether that holds the answer's source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rnn_longctx.cli.command import command
from rnn_longctx.cli.options import MODEL, TEXTS, ModelOptions, option
from rnn_longctx.cli.output import table, wrote
from rnn_longctx.errors import InputError
from rnn_longctx.plain import plain_table

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class ExplainOptions:
    """What is read, which tokens are asked about, and where tables and pictures go."""

    text: Annotated[str, typer.Option(help=TEXTS)] = "stdlib"
    at: Annotated[list[int] | None, option("A query token of the text, from 0 on; again for more.", "the last")] = None
    task: Annotated[
        str | None, option("Such as passkey: its answers are asked about, and their sources marked.", "the text")
    ] = None
    length: Annotated[str, typer.Option(help="Tokens of the text, or of an example.")] = "4000"
    n: Annotated[int, typer.Option(min=1, help="Examples of the task.")] = 20
    out: Annotated[Path, typer.Option(help="Folder for the tables and pictures.")] = Path("runs/explain")
    seed: Annotated[int, typer.Option(min=0, help="Of the examples; of a text, which slice.")] = 0


@command("explain")
def explain(
    model: Annotated[str, MODEL], explaining: ExplainOptions = ExplainOptions(), options: ModelOptions = ModelOptions()
) -> None:
    """Which links a sparse model kept: the tokens that each head reads, and whether they hold the answer's source.

    Examples:
        rnn-longctx explain runs/sparse --task passkey --length 4000
        rnn-longctx explain runs/sparse --text README.md --at 2000
    """
    from rnn_longctx.config import parse_length
    from rnn_longctx.data import load_text, tokens
    from rnn_longctx.probes.explain import explain_task, explain_text
    from rnn_longctx.probes.link_pictures import draw_explained
    from rnn_longctx.spec import parse
    from rnn_longctx.tasks import TASKS

    c, length = explaining, parse_length(explaining.length, "--length")
    if c.task is not None and c.at:
        raise InputError("--at is for a text: of a task, its answers are asked about; leave out --at or --task")
    task = None if c.task is None else parse(c.task, TASKS, "task")  # a misspelt name shows before anything is loaded
    lm = options.load(model)
    if task is None:
        explained = explain_text(lm, tokens(load_text(c.text), lm.tokenizer, c.seed, length)[0], c.at)
    else:
        explained = explain_task(lm, task, length, c.n, c.seed)
    if explained.shares is not None:
        _give("shares", "queries whose kept blocks, window and sinks hold the source", explained.shares)
    elif explained.links is not None:
        _give("links", "what each head reads", _lines(explained.links))
    if explained.reaches is not None:
        _give("reaches", "reach, in tokens, after each layer of LongNet", explained.reaches)
    paths = [*explained.save(c.out), *draw_explained(lm, explained, c.out)]
    wrote(c.out, [path.name for path in paths])


def _give(name: str, title: str, frame: pd.DataFrame) -> None:
    lines = plain_table(frame).to_string(index=False, float_format=lambda value: f"{value:.3g}")
    table(name, frame, f"{title}\n{lines}\n")


def _lines(links: pd.DataFrame) -> pd.DataFrame:
    """Return a row a query, layer and head: the tokens of its sinks, chosen blocks (the best first) and window."""
    import pandas as pd

    def stretches(some: pd.DataFrame) -> str:
        return " ".join(f"{start}-{stop - 1}" for start, stop in zip(some["start"], some["stop"])) or "-"

    rows = []
    for (query, layer, head), read in links.groupby(["query", "layer", "head"]):
        kinds = {kind: stretches(read[read["kind"] == kind]) for kind in ("sink", "chosen", "window")}
        rows.append({"query": query, "layer": layer, "head": head, **kinds})
    return pd.DataFrame(rows)
