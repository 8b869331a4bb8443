"""`rnn-longctx train`: a model from a config, or from text as it arrives."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rnn_longctx.cli.command import command
from rnn_longctx.cli.options import Many
from rnn_longctx.cli.output import fact, problem, say, speaker
from rnn_longctx.ranks import rank


@command("train")
def train(
    config: Annotated[Path, typer.Argument(help="YAML file, such as configs/train/demo.yaml.")],
    set: Annotated[Many, typer.Option("--set", help="optimizer.lr=1e-3; model=a checkpoint; data=texts; ...")] = None,
    more: Annotated[Many, typer.Argument(metavar="KEY=VALUE", help="More of --set.")] = None,
    stream: Annotated[
        Path | None,
        typer.Option(
            help="A directory where text arrives: an update on it is kept while held-out loss and passkeys "
            "hold. Until a file STOP is there."
        ),
    ] = None,
) -> None:
    """Train a model, or go on where a killed run stopped.

    Over several GPUs: accelerate launch -m rnn_longctx.train CONFIG (or torchrun --nproc-per-node 8 -m ...).

    Examples:
        rnn-longctx train configs/train/demo.yaml
        rnn-longctx train configs/train/continual.yaml --set train_length=16k data=texts/
    """
    from rnn_longctx.config import load_yaml
    from rnn_longctx.train import TrainConfig, TrainingDiverged, spelled_out, train, train_online

    try:
        settings = load_yaml(TrainConfig, config, spelled_out([*(set or []), *(more or [])]))
        checkpoint = train(settings, speaker()) if stream is None else train_online(settings, stream, speaker())
        if rank() == 0:
            fact("checkpoint", str(checkpoint))
            say(f"saved {checkpoint}")
    except TrainingDiverged as error:
        problem(error)
        raise typer.Exit(1) from None
