"""`rnn-longctx capacity`: of checkpoints there are, of a family that it trains, from tables alone, and as advice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rnn_longctx.cli.command import command, flattened
from rnn_longctx.cli.options import Device, Dtype, Many, Tokenizer, TrainLength, load_model, say_segment
from rnn_longctx.cli.output import fact, say, show, table, wrote
from rnn_longctx.errors import InputError
from rnn_longctx.plain import plain_table

RECALL = 0.95


class _ModelsFirst(TyperGroup):
    """`capacity MODEL ...` stands for `capacity measure MODEL ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["measure", *args]
        return super().parse_args(ctx, args)


capacity = typer.Typer(
    cls=_ModelsFirst,
    no_args_is_help=True,
    help="How much a state holds: the training length from which a model forgets (T_forget), the context it recalls "
    "(T_recall). `capacity MODEL ...` is `capacity measure MODEL ...`.",
)
command("capacity")(capacity)


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured, how exactly, and where the tables go."""

    limit: Annotated[str, typer.Option(help="The longest context, in tokens.")] = "1m"
    needle: Annotated[
        Many, typer.Option(help="passkey, words, multikey:keys=2, passkey:haystack=TEXT,template=FILE; again for more.")
    ] = None
    mitigation: Annotated[Many, typer.Option(help="none, state-norm, a+b; again for more.")] = None
    recall: Annotated[float, typer.Option(help="Accuracy that T_recall asks for.")] = RECALL
    width: Annotated[float, typer.Option(help="Of an accuracy's interval: says how many prompts a length takes.")] = (
        0.06
    )
    slices: Annotated[int, typer.Option(min=1, help="Of the text, read to the limit.")] = 4
    text: Annotated[str, typer.Option(help="stdlib, a file, a directory, hf:dataset[:split[:column]].")] = "stdlib"
    out: Annotated[Path, typer.Option(help="Folder for tables and figures.")] = Path("runs/capacity")
    batch: Annotated[int, typer.Option(min=1, help="The most streams read side by side.")] = 32
    seed: Annotated[int, typer.Option(min=0)] = 0
    train_length: TrainLength = None
    tokenizer: Tokenizer = None
    device: Device = "auto"
    dtype: Dtype = "float32"


def measure(
    model: Annotated[list[str], typer.Argument(help='"demo", a directory, or a hub id; several to compare.')],
    options: MeasureOptions = MeasureOptions(),
) -> None:
    """Of checkpoints: whether they forget, and how far they recall, with every remedy asked for.

    Examples:
        rnn-longctx capacity measure demo --limit 4k --mitigation none --mitigation state-norm
        rnn-longctx capacity demo demo-long --limit 64k
    """
    from rnn_longctx.config import parse_length
    from rnn_longctx.eval.capacity import MeasureConfig, check, measure, models
    from rnn_longctx.eval.results import Results

    c = options
    settings = MeasureConfig(
        limit=parse_length(c.limit),
        slices=c.slices,
        needles=c.needle or ["passkey"],
        recall=c.recall,
        width=c.width,
        mitigations=c.mitigation or ["none"],
        text=c.text,
        batch=c.batch,
        seed=c.seed,
    )
    results = Results(c.out)
    length = None if c.train_length is None else parse_length(c.train_length)

    def load(name: str) -> Any:
        return load_model(name, c.device, c.dtype, c.tokenizer, length, None)

    for name in model[1:]:  # a mistake in the last shows before the first is measured
        check(load(name), settings)
    for name in model:
        lm = load(name)
        say_segment(lm)
        measure(lm, settings, c.out, say, shape=models.shape_of(c.out, lm))
        models.gather(c.out)  # so that what there is can be drawn while the next is measured
        results.gather()
    _report(c.out, c.recall)


capacity.command("measure")(flattened(measure))


def train(
    config: Annotated[Path, typer.Argument(help="YAML file, such as configs/capacity/small.yaml.")],
    set: Annotated[Many, typer.Option("--set", help="Override one key: measure.limit=64k; again for more.")] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Cells (models) trained at once.")] = 1,
) -> None:
    """Of a family: train what the search asks for, measure, fit and plot; a killed study goes on.

    Examples:
        rnn-longctx capacity train configs/capacity/small.yaml --parallel 8
        rnn-longctx capacity train configs/capacity/small.yaml --set measure.limit=64k
    """
    from rnn_longctx.config import load_yaml
    from rnn_longctx.eval.capacity import CapacityConfig, run_study

    study = load_yaml(CapacityConfig, config, set or [])
    _report(run_study(study, parallel, say), study.measure.recall)


capacity.command("train")(flattened(train))


def plot(
    directory: Annotated[Path, typer.Argument(help="A folder with results.csv and models.csv.")],
    recall: Annotated[float, typer.Option(help="Accuracy that T_recall asks for.")] = RECALL,
) -> None:
    """Findings, fits and figures again, from the tables alone.

    Examples:
        rnn-longctx capacity plot runs/capacity
    """
    _report(directory, recall)


capacity.command("plot")(flattened(plot))


def advise(
    context: Annotated[str, typer.Option(help="Tokens to recall over, such as 256k.")],
    recall: Annotated[float, typer.Option(help="Accuracy asked for.")] = RECALL,
    study: Annotated[Path | None, typer.Option(help="A study's folder; without one the paper's fits.")] = None,
    mitigation: Annotated[str, typer.Option(help="As the study measured it.")] = "none",
) -> None:
    """The state that a context needs, with its interval, memory and speed, and why not to trust it.

    Examples:
        rnn-longctx capacity advise --context 256k
        rnn-longctx capacity advise --context 64k --study runs/capacity --recall 0.9
    """
    from rnn_longctx.config import parse_length
    from rnn_longctx.eval.capacity import advise

    advice = str(advise(parse_length(context), recall, study, mitigation))
    fact("advice", advice)
    show(advice)


capacity.command("advise")(flattened(advise))


def _report(directory: Path, recall: float) -> None:
    """Draw the figures, and print what they say: of a family its points and fits, of single checkpoints a line each.
    The rest stays in the files."""
    import pandas as pd

    from rnn_longctx.eval.capacity import bound, draw, tables

    if not 0 < recall < 1:
        raise InputError(f"recall lies between 0 and 1, got {recall}")
    paths = draw(directory, recall)
    shown = {
        "points": f"shape state_elements {bound.COLUMN} mitigation quantity train_length models text",
        "fits": "mitigation quantity form points bounds contradicts curve r2 r2_loo aic carrier best",
        "same_size": "mitigation quantity state_elements shapes values spread",
    }
    findings = tables.findings(*tables.read(directory), recall)
    family = findings.drop_duplicates(["shape", "model", "weights_hash"])["shape"].duplicated().any()
    for name, columns in shown.items():
        file = directory / f"{name}.csv"
        frame = pd.read_csv(file) if file in paths and file.stat().st_size > 1 else pd.DataFrame()
        if len(frame):
            table(name, frame)
        if len(frame) and family:
            frame = frame[frame["axis"] == "state_elements"] if name == "fits" else frame
            for column in {"train_length", bound.COLUMN} & set(frame):
                frame[column] = frame[column].map(lambda n: "-" if pd.isna(n) else f"{n:.0f}")
            lines = plain_table(frame[columns.split()])
            show(f"\n{name}", lines.to_string(index=False, na_rep="-", float_format=lambda v: f"{v:.4g}"))
    table("findings", findings)
    if len(findings) and not family:
        show("\n" + "\n".join(tables.in_words(findings)))
    elif len(findings):
        show(f"\n{bound.WORDS}")
    say()
    wrote(directory, [p.name for p in paths])
