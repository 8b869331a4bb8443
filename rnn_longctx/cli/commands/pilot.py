"""`rnn-longctx pilot`: what a model does on a person's own documents, and what to use, within a time."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from rnn_longctx.cli.command import command
from rnn_longctx.cli.options import MODEL, TEXTS, Many, ModelOptions, about, option
from rnn_longctx.cli.output import fact, head, show, speaker, table, wrote


def process_seconds() -> float:
    """Return the seconds since this process began, where the system says so: starting Python counts as well."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


@command("pilot")
def pilot(
    model: Annotated[str, MODEL],
    text: Annotated[str, typer.Option(help=TEXTS)],
    budget: Annotated[str, typer.Option(help="Time that may be taken, of all runs into --out: 90s, 10m, 2h.")] = "10m",
    out: Annotated[Path, typer.Option(help="Folder for the tables and the report.")] = Path("runs/pilot"),
    estimate: Annotated[bool, typer.Option(help="Say what it would take, and stop.")] = False,
    price: Annotated[float | None, option("Of an hour of this machine, in any money.", "none")] = None,
    task: Annotated[Many, option("qa:FILE.jsonl, your own questions; passkey, ...; again for more.", "passkey")] = None,
    lengths: Annotated[str | None, option("Tokens: 512,1k,4k.", "doublings of the training length")] = None,
    with_text: Annotated[bool, typer.Option(help="Let text, questions and answers stand in what is written.")] = False,
    options: ModelOptions = ModelOptions(),
) -> None:
    """Where a model collapses on your own documents, which remedy to use, and how to use it, within a time.
    Killed and run again, it begins the step that was killed again, and repeats nothing else.

    Examples:
        rnn-longctx pilot demo --text stdlib --budget 5m
        rnn-longctx pilot demo --text stdlib --budget 10m --estimate --price 2.5
    """
    began = time.monotonic() - process_seconds()
    from rnn_longctx.config import parse_length, parse_lengths
    from rnn_longctx.eval.pilot.config import PilotConfig, option_words, parse_tasks
    from rnn_longctx.eval.pilot.write import estimate_table, summary, write_pilot
    from rnn_longctx.eval.tune.budget import parse_time

    config = PilotConfig(
        model=model,
        text=text,
        out=str(out),
        budget=parse_time(budget),
        lengths=None if lengths is None else tuple(parse_lengths(lengths)),
        tasks=parse_tasks(task),
        price=price,
        with_text=with_text,
        options=option_words(options),
        given_train_length=None if options.train_length is None else parse_length(options.train_length),
    )
    from rnn_longctx.data import load_text
    from rnn_longctx.eval.pilot.run import Pilot
    from rnn_longctx.models.modes import evaluating

    loaded = load_text(text)
    lm = options.load(model)
    head(about(lm, options.dtype))
    with evaluating(lm):
        run = Pilot(lm, loaded, config, began, speaker())
        sizes, expected = run.estimate()
        fact("estimated_seconds", expected.seconds)
        table("estimate", expected.stages, *estimate_table(expected, config.budget))
        if estimate:
            run.ledger.leave_out()
            run.leave_nothing()
            return
        run.measure(sizes)
        content, found = write_pilot(run, expected)
    fact("recommendation", {name: getattr(found, name) for name in ("words", "uncertainty", "python", "command")})
    table("compared", (content["compared"] or {}).get("rows", []), *summary(content, found))
    wrote(out, ["pilot.json", "results.parquet", "report.html"])
    show(f"open {out}/report.html")
