"""`rnn-longctx probe`: which heads leave the range of their training, when, and whether that costs the loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from rnn_longctx.cli.command import command
from rnn_longctx.cli.options import TEXTS, Many, ModelOptions, about, console_of_tables, option


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
        list[str], typer.Argument(help='"demo", "demo-long", a directory, or a hub id; several to compare.')
    ],
    probing: ProbeOptions = ProbeOptions(),
    options: ModelOptions = ModelOptions(),
) -> None:
    """Which heads of a model leave the range of their training, when, and whether that is what costs the loss."""
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
    rows = []
    for i, name in enumerate(model):
        lm = options.load(name)
        console_of_tables().print(about(lm, options.dtype))
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
                say=typer.echo,
            )
        paths = [*result.save(folder), *draw(result, folder)]
        with scalars(c.log or [], folder, lm.name) as write:
            for position, values in scalar_rows(result):
                write(values, position)
        if result.ablation:
            typer.echo(str(result.ablation))
        typer.echo(f"{folder}: {', '.join(p.name for p in paths)}")
        rows.append({"model": name, **result.summary()})
    if len(model) > 1:
        frame = pd.DataFrame(rows)
        frame.to_csv(c.out / "models.csv", index=False)
        typer.echo(frame.to_string(index=False, na_rep="-", float_format=lambda v: f"{v:.4g}"))
