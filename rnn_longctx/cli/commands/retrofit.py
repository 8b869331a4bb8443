"""`rnn-longctx retrofit`: a transformers decoder whose attention is replaced, and taught by the decoder that it was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from rnn_longctx.cli.command import command
from rnn_longctx.cli.options import Device, Many, option


@dataclass(frozen=True)
class WhichOptions:
    """What is replaced."""

    mixer: Annotated[
        str,
        typer.Option(help="block-sparse, two-stage, longnet, mamba2 or gated-deltanet, with settings after a colon."),
    ]
    layers: Annotated[str, typer.Option(help="Such as 0,2-5, from 0 on.")] = "all"
    heads: Annotated[str, typer.Option(help="Of queries in each of these layers; the others stay full.")] = "all"


@command("retrofit")
def retrofit(
    model: Annotated[str, typer.Argument(help="A decoder of transformers: a directory or a Hugging Face hub id.")],
    which: WhichOptions,
    out: Annotated[Path, typer.Option(help="A new folder, which eval and generate take.")],
    tokenizer: Annotated[str | None, option('"bytes", a directory, or a hub id.', "the model's")] = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of new weights and of what is drawn from the text.")] = 0,
) -> None:
    """Replace the attention of a decoder, in chosen layers and heads, and teach it to do what the full one did."""
    from rnn_longctx.devices import device_of
    from rnn_longctx.models.retrofit.files import check_new, load_retrofitted, save_retrofitted
    from rnn_longctx.models.retrofit.plan import convert, plan_of
    from rnn_longctx.models.retrofit.model import Retrofitted

    check_new(out)
    lm = load_retrofitted(model, device=device_of(device), tokenizer=tokenizer)
    plan = plan_of(lm.model, which.mixer, which.layers, which.heads)
    convert(lm.model, plan, seed)
    made = Retrofitted(lm.model)
    made.name, made.tokenizer, made.train_length = out.name, lm.tokenizer, lm.train_length
    save_retrofitted(made, plan, out)
    typer.echo(f"saved {out}")
