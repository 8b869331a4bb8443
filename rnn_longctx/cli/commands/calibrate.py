"""`rnn-longctx calibrate`: a remedy's settings for a model and a length."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from rnn_longctx.cli.command import command
from rnn_longctx.cli.options import MODEL, ModelOptions, say_segment
from rnn_longctx.cli.output import fact, say, show
from rnn_longctx.errors import InputError


@command("calibrate")
def calibrate(
    model: Annotated[str, MODEL],
    mitigation: Annotated[str, typer.Option(help="rri, window, state-norm, state-norm:every=64, token-filter, ...")],
    target: Annotated[str, typer.Option(help="Tokens to be read, such as 32k.")],
    text: Annotated[str, typer.Option(help="Found on this; never what is to be evaluated.")] = "builtin",
    out: Annotated[Path, typer.Option(help="YAML file, for --mitigation FILE.")] = Path("remedy.yaml"),
    slices: Annotated[int, typer.Option(min=1, help="Of the text.")] = 4,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    options: ModelOptions = ModelOptions(),
) -> None:
    """Find a remedy's settings: the lowest loss at the target length that keeps the model's recall.

    Examples:
        rnn-longctx calibrate demo --mitigation rri --target 2k --slices 1
        rnn-longctx calibrate demo --mitigation a-winsor:share=0.1 --target 4k --out found.yaml
    """
    from rnn_longctx.config import parse_length
    from rnn_longctx.data import load_text
    from rnn_longctx.eval.search.calibrate import calibrate

    if not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise InputError(f"cannot write {out}: {'it is a folder' if out.is_dir() else 'its folder is not writable'}")
    lm, length = options.load(model), parse_length(target)
    say_segment(lm)
    remedy = calibrate(lm, mitigation, length, load_text(text), seed=seed, slices=slices, say=say)
    remedy.save(out)
    fact("remedy", str(remedy.remedy))
    fact("helps", remedy.helps)
    fact("file", str(out))
    show(f"{out}: {remedy.remedy}{'' if remedy.helps else ' (helps: false)'}")
