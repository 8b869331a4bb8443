"""`rnn-longctx retrofit`: a transformers decoder whose attention is replaced, and taught by the decoder that it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from rnn_longctx.cli.command import command
from rnn_longctx.cli.options import Device, Many, option
from rnn_longctx.cli.output import fact, problem, say, table
from rnn_longctx.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from rnn_longctx.train.retrofit import Done


@dataclass(frozen=True)
class WhichOptions:
    """What is replaced."""

    mixer: Annotated[
        str, typer.Option(help="block-sparse, two-stage, longnet, mamba2, gated-deltanet; block-sparse:top=8,...")
    ]
    layers: Annotated[str, typer.Option(help="Such as 0,2-5, from 0 on.")] = "all"
    heads: Annotated[str, typer.Option(help="Heads of queries in each of these layers; others stay full.")] = "all"
    full_above: Annotated[
        float | None, option("Heads stay full of whose weight the mixer would miss more than this share.", "no head")
    ] = None


@dataclass(frozen=True)
class TeachingOptions:
    """How it is taught."""

    distill: Annotated[bool, typer.Option("--distill", help="By the full attention; else by the text alone.")] = False
    teacher: Annotated[str | None, option("Another decoder, of the same vocabulary.", "the model itself")] = None
    text: Annotated[Many, option("As of eval, but for stdlib; again for more.", "nothing is trained")] = None
    task: Annotated[Many, option("Mixed in, such as planted; again for more.", "none")] = None
    task_share: Annotated[float, typer.Option(min=0, max=1, help="Of the rows, where there is a text.")] = 0.5
    stages: Annotated[str, typer.Option(help="Tokens, one length after the other, such as 2k,8k,32k.")] = "2k"
    steps: Annotated[int, typer.Option(help="Updates of each stage; 0 trains nothing.")] = 200
    batch: Annotated[str, typer.Option(help="Tokens of an update; at least one row.")] = "8k"
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 1e-3
    losses: Annotated[
        str | None, option("Of gate, hidden, logits, lm.", "gate,hidden,logits; without --distill lm")
    ] = None
    trains: Annotated[str, typer.Option(help="new (weights alone), attention (of replaced layers), all.")] = "attention"


@command("retrofit")
def retrofit(
    model: Annotated[str, typer.Argument(help="A decoder of transformers: a directory or a Hugging Face hub id.")],
    which: WhichOptions,
    out: Annotated[str, typer.Option(help="A new folder, which eval and generate take.")],
    teaching: TeachingOptions = TeachingOptions(),
    tokenizer: Annotated[str | None, option('"bytes", a directory, or a hub id.', "the model's")] = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of new weights, and of what is drawn from the text.")] = 0,
) -> None:
    """Replace the attention of a transformers decoder, in chosen layers and heads, and teach it by the full one.

    Examples:
        rnn-longctx retrofit llama/ --mixer block-sparse --distill --text texts/ --out runs/sparse
        rnn-longctx retrofit llama/ --mixer mamba2 --layers 0,2-5 --text texts/ --out runs/mixed
    """
    from rnn_longctx.config import from_dict, parse_length
    from rnn_longctx.train.loop import TrainingDiverged
    from rnn_longctx.train.retrofit import RetrofitConfig
    from rnn_longctx.train.retrofit import retrofit as run

    t = teaching
    try:
        stages = [parse_length(length) for length in t.stages.split(",")]
    except InputError:
        raise InputError(f"--stages: expected lengths in tokens, as in 2k,8k,32k, got {t.stages!r}") from None
    taught = {
        **{"distill": t.distill, "teacher": t.teacher, "text": t.text or [], "tasks": t.task or []},
        **{"task_share": t.task_share, "stages": stages, "steps": t.steps, "batch": parse_length(t.batch, "--batch")},
        **{"lr": t.lr, "losses": [] if t.losses is None else t.losses.split(","), "trains": t.trains},
    }
    replaced = {"mixer": which.mixer, "layers": which.layers, "heads": which.heads, "full_above": which.full_above}
    rest = {"model": model, "out": out, "tokenizer": tokenizer, "device": device, "seed": seed}
    try:
        done = run(from_dict(RetrofitConfig, {**replaced, **taught, **rest}), say)
    except TrainingDiverged as error:
        problem(error)
        raise typer.Exit(1) from None
    if done.before:
        reach = _reach(done)
        table("reach", reach, "what each head reads, before and after\n" + reach.to_string(index=False))
    fact("checkpoint", out)
    say(f"saved {out}")


def _reach(done: Done) -> pd.DataFrame:
    """Return a table of how far heads read, before and after."""
    import pandas as pd

    mixers = {
        (layer, head): text.partition(":")[0]
        for layer, parts in done.plan.layers.items()
        for text, heads in parts
        for head in heads
    }
    rows = [
        {
            "layer": b.layer,
            "head": b.head,
            "mixer": mixers.get((b.layer, b.head), "full"),
            **{name: f"{getattr(b, name):.2f} {getattr(a, name):.2f}" for name in ("sink", "beyond", "missed")},
            "distance": f"{b.distance:.0f} {a.distance:.0f}",
        }
        for b, a in zip(done.before, done.after, strict=True)
    ]
    return pd.DataFrame(rows)
