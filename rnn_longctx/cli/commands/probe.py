"""`rnn-longctx probe`: which heads leave the range of their training, when, and whether that costs the loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from rnn_longctx.cli.command import command
from rnn_longctx.cli.options import TEXTS, Many, ModelOptions, about, option
from rnn_longctx.cli.output import fact, head, say, show, table, talks, wrote
from rnn_longctx.files import write_atomic
from rnn_longctx.plain import csv_text, plain_table


@dataclass(frozen=True)
class ProbeOptions:
    """What is read, how it is looked at, and where the tables go."""

    length: Annotated[str, typer.Option(help="Tokens to be read, such as 64k.")] = "32k"
    prompt: Annotated[str, typer.Option(help="text, newline or passkey.")] = "text"
    every: Annotated[str, typer.Option(help="Tokens between two looks at the states.")] = "256"
    text: Annotated[str, typer.Option(help=TEXTS)] = "stdlib"
    slices: Annotated[int, typer.Option(min=1, help="Rows read side by side.")] = 1
    prove: Annotated[bool, typer.Option(help="Cap the accused heads alone, then others; measure the loss.")] = False
    remember: Annotated[bool, typer.Option(help="Effective remembrance too: reads three times as much.")] = False
    log: Annotated[Many, option("tensorboard or wandb, where installed; again for both.", "neither")] = None
    mitigation: Annotated[str, typer.Option(help="Watch the model with a remedy on it.")] = "none"
    out: Annotated[Path, typer.Option(help="Folder for the tables and pictures.")] = Path("runs/probe")
    seed: Annotated[int, typer.Option(min=0)] = 0


@command("probe")
def probe(
    model: Annotated[
        list[str], typer.Argument(help='"demo", "demo-long", "demo-delta", a directory or hub id; several to compare.')
    ],
    probing: ProbeOptions = ProbeOptions(),
    options: ModelOptions = ModelOptions(),
) -> None:
    """Which heads of a model leave the range of their training, when, and whether that is what costs the loss.

    Examples:
        rnn-longctx probe demo --length 32k --slices 4 --prove --remember
        rnn-longctx probe demo demo-long --length 8k
    """
    import pandas as pd

    from rnn_longctx import mitigate
    from rnn_longctx.config import parse_length
    from rnn_longctx.data import load_text
    from rnn_longctx.loggers import scalars
    from rnn_longctx.mitigations import parse_remedy
    from rnn_longctx.probes.pictures import draw
    from rnn_longctx.probes.probe import probe, scalar_rows

    c = probing
    length, remedy, text = parse_length(c.length), parse_remedy(c.mitigation), load_text(c.text)
    rows, verdicts = [], {}
    for i, name in enumerate(model):
        lm = options.load(name)
        head(about(lm, options.dtype))
        folder = c.out if len(model) == 1 else c.out / f"{i}-{lm.name}"
        with mitigate(lm, remedy, target_length=length):
            result = probe(
                lm,
                text,
                length,
                prompt=c.prompt,
                every=parse_length(c.every, "--every"),
                slices=c.slices,
                seed=c.seed,
                prove=c.prove,
                remember=c.remember,
                say=say,
            )
        paths = [*result.save(folder), *draw(result, folder)]
        with scalars(c.log or [], folder, lm.name) as write:
            for position, values in scalar_rows(result):
                write(values, position)
        last = [str(result.ablation)] if result.ablation else []  # the rest of the verdict was said on the way
        show(*(last if talks() else [result.verdict]))
        table(f"heads of {name}", result.heads)
        table(f"losses of {name}", result.losses)
        wrote(folder, [p.name for p in paths])
        rows.append({"model": name, **result.summary()})
        verdicts[name] = result.verdict
    fact("verdicts", verdicts)
    frame, shown = pd.DataFrame(rows), []
    if len(model) > 1:
        write_atomic(c.out / "models.csv", csv_text(frame).encode())
        shown = [plain_table(frame).to_string(index=False, na_rep="-", float_format=lambda v: f"{v:.4g}")]
    table("models", frame, *shown)
