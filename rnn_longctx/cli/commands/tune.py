"""`rnn-longctx tune`: a mixer's or a remedy's parameters, under a budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rnn_longctx.cli.command import command
from rnn_longctx.cli.options import MODEL_HELP, TEXTS, ModelOptions
from rnn_longctx.cli.output import fact, say, show, table, wrote
from rnn_longctx.errors import InputError

if TYPE_CHECKING:
    from rnn_longctx.eval.tune.held_out import Comparison


@command("tune")
def tune(
    what: Annotated[
        str, typer.Argument(metavar="CONFIG|MODEL", help=f"With --mixer: a config of compare. Else: {MODEL_HELP}")
    ],
    budget: Annotated[str, typer.Option(help="Time for the search and the comparison after it: 90s, 20m, 2h.")],
    mixer: Annotated[
        str | None, typer.Option(help="block-sparse, or block-sparse:top=4, of which top then stays as it is.")
    ] = None,
    mitigation: Annotated[str | None, typer.Option(help="rri, token-filter, state-norm:every=64, ...")] = None,
    memory: Annotated[str | None, typer.Option(help="The most that a trial's process may hold: 512m, 8g.")] = None,
    target: Annotated[str, typer.Option(help="Of a remedy: tokens to be read.")] = "16k",
    text: Annotated[str, typer.Option(help="Of a remedy: searched on.")] = "builtin",
    held_out: Annotated[str, typer.Option(help=f"Of a remedy: compared on. {TEXTS}")] = "stdlib",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the study.", show_default="runs/tune/NAME-OF-BOTH")
    ] = None,
    options: ModelOptions = ModelOptions(),
) -> None:
    """Find a mixer's or a remedy's parameters within a budget, and say whether they beat the default on held-out data.
    A search that was killed goes on where it stopped.

    Examples:
        rnn-longctx tune demo --mitigation rri --target 2k --budget 8m --memory 8g
        rnn-longctx tune configs/compare/planted.yaml --mixer block-sparse --budget 12m
    """
    from rnn_longctx.eval.tune import run_tune
    from rnn_longctx.eval.tune.budget import Budget, parse_memory, parse_time

    limits = Budget(parse_time(budget), None if memory is None else parse_memory(memory))
    if (mixer is None) == (mitigation is None):
        raise InputError("tune takes --mixer with a config of compare, or --mitigation with a model: one of them")
    problem: Any
    if mixer is not None:
        problem, name = _mixer(what, mixer, options.device)
    else:
        assert mitigation is not None
        problem, name = _remedy(what, mitigation, target, text, held_out, options)
    folder = out or Path("runs/tune") / name
    found = run_tune(problem, folder, limits, say)
    if found is not None:
        _show(found)
    wrote(folder, ["tune.db", "trials.csv", *(["held_out.csv", "tuned.yaml"] if found is not None else [])])


def _mixer(config: str, mixer: str, device: str) -> tuple[Any, str]:
    from rnn_longctx.config import load_yaml
    from rnn_longctx.eval.compare import CompareConfig
    from rnn_longctx.eval.tune import MixerProblem

    study = load_yaml(CompareConfig, config)
    study = replace(study, device=study.device if device == "auto" else device)
    return MixerProblem(study, mixer), f"{Path(config).stem}-{mixer.partition(':')[0]}"


def _remedy(model: str, mitigation: str, target: str, text: str, held_out: str, o: ModelOptions) -> tuple[Any, str]:
    from rnn_longctx.config import parse_length
    from rnn_longctx.eval.tune import RemedyProblem

    problem = RemedyProblem(
        model,
        mitigation,
        parse_length(target, "--target"),
        text,
        held_out,
        device=o.device,
        dtype=o.dtype,
        tokenizer=o.tokenizer,
        state_dtype=o.state_dtype,
        given_train_length=o.train_length,
    )
    return problem, f"{Path(model).name}-{mitigation.partition(':')[0]}"


def _show(found: Comparison) -> None:
    from rich.table import Table

    drawn = Table(title="Held-out data: means over seeds, and tuned - default with its 95% interval")
    for column in found.table:
        drawn.add_column(str(column), overflow="fold")
    for row in found.table.astype(object).where(found.table.notna(), "").to_dict("records"):
        drawn.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()))
    fact("verdict", found.verdict)
    table("held_out", found.table, drawn)
    show(found.verdict)
