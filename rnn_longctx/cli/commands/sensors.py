"""`rnn-longctx sensors`: logs of sensors, from file to alarm. Nothing here opens a connection."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from rnn_longctx.cli.command import command, flattened
from rnn_longctx.cli.options import Many, option
from rnn_longctx.cli.output import fact, say, show, speaker, table, wrote
from rnn_longctx.files import write_atomic
from rnn_longctx.plain import csv_text, plain_table

program = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Sensor logs: forecasts, alarms before failures, and what they rest on.",
)
command("sensors")(program)


def _command(name: str) -> Callable[[Any], Any]:
    """Register a function as `rnn-longctx sensors NAME`."""

    def register(run: Any) -> Any:
        program.command(name)(flattened(run))
        return run

    return register


SCHEDULE = "128:350,512:200,2048:150,8192:60"  # of rnn_longctx.sensors.fit, which loads torch
Log = Annotated[Path, typer.Argument(help="A log, CSV or Parquet: a column of times, and one a sensor.")]
RunFolder = Annotated[Path, typer.Argument(help="What `sensors fit` wrote.")]


@_command("make")
def make(
    out: Annotated[Path, typer.Argument(help="A new folder: plant.parquet, failures.csv, truth.csv.")],
    rows: Annotated[int, typer.Option(help="Of the log, a minute each.")] = 300_000,
    longest: Annotated[int, typer.Option(help="Rows from a cause to its sign, at most.")] = 100,
    every: Annotated[int, typer.Option(help="Rows from a sign to the next, on average.")] = 100,
    missing: Annotated[float, typer.Option(help="Share of the values that are lost.")] = 0.0,
    drift_at: Annotated[int | None, option("Row from which sensors drift.", "never")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Make the log of a plant whose failures have causes long before them, for a demo or a test.

    Examples:
        rnn-longctx sensors make runs/plant --rows 20000
    """
    from rnn_longctx.sensors.fit import new_folder
    from rnn_longctx.sensors.plants import Plant, make_plant

    folder = new_folder(out)
    made = make_plant(Plant(rows, longest, every=every, missing=missing, drift_at=drift_at, seed=seed))
    folder.mkdir(parents=True, exist_ok=True)
    made.log.to_parquet(folder / "plant.parquet", index=False)
    write_atomic(folder / "failures.csv", csv_text(made.events).encode())
    write_atomic(folder / "truth.csv", csv_text(made.truth).encode())
    wrote(folder, ["plant.parquet", "failures.csv", "truth.csv"], f"; {rows:,} rows, {len(made.events)} failures")


@_command("fit")
def fit(
    log: Log,
    time: Annotated[str, typer.Option(help="The column of times, in the events as well.")],
    sensors: Annotated[str, typer.Option(help="Columns, such as temp,vib.")],
    events: Annotated[Path, typer.Option(help="CSV or Parquet: a column of times, of failures.")],
    out: Annotated[Path, typer.Option(help="A new folder for the model.")],
    mixer: Annotated[Many, option("Of the layers behind the local one; again for more layers.", "two-stage")] = None,
    warning: Annotated[int, typer.Option(min=1, help="Rows before an event within which it is to be announced.")] = 12,
    schedule: Annotated[str | None, option("Rows of a window and updates, in turn.", SCHEDULE)] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Fit a model to a log and its events; the last 30% of the rows are held out for `sensors report`.

    Examples:
        rnn-longctx sensors fit plant.csv --time t --sensors temp,vib --events failures.csv --out runs/fit
    """
    from rnn_longctx.sensors.fit import FitConfig, new_folder
    from rnn_longctx.sensors.model import SensorConfig, for_sensors
    from rnn_longctx.sensors.runs import Source, fit_run

    folder = new_folder(out)
    source = Source(str(log), time, [name.strip() for name in sensors.split(",") if name.strip()], str(events))
    how = FitConfig(seed=seed) if schedule is None else FitConfig(schedule, seed=seed)
    mixers = [for_sensors(text) for text in mixer or ["two-stage"]]
    shape = SensorConfig(source.sensors, mixers, warning=warning, n_layer=1 + len(mixers))
    fit_run(source, shape, how, folder, speaker())
    wrote(folder, ["model.safetensors", "sensors.json"], f"; next: rnn-longctx sensors report {folder}")


@_command("report")
def report(
    run: RunFolder,
    log: Annotated[
        Path | None, typer.Argument(help="Another log of the same columns; if not given, the one fitted to.")
    ] = None,
    events: Annotated[Path | None, option("Of that log.", "none are known")] = None,
    out: Annotated[Path | None, option("A new folder.", "RUN/report")] = None,
) -> None:
    """Forecasts and alarms on the rows that were held out, or on another log: a page, pictures and alarms.jsonl.

    Examples:
        rnn-longctx sensors report runs/fit
        rnn-longctx sensors report runs/fit newer.csv --events newer_failures.csv --out runs/newer
    """
    from rnn_longctx.sensors.fit import Run, new_folder
    from rnn_longctx.sensors.runs import report_run

    fitted = Run.load(run)
    folder = new_folder(run / "report" if out is None else out)
    made = report_run(fitted, log, events, speaker())
    paths = made.save(folder, str(run))
    for line in [*(f"repaired: {text}" for text in made.log.repairs), *(f"noted: {text}" for text in made.log.notes)]:
        say(line)
    fact("lines", made.lines())
    show(*made.lines())
    wrote(folder, [path.name for path in paths])


@_command("adapt")
def adapt(
    run: RunFolder,
    log: Log,
    events: Annotated[Path, typer.Option(help="Of that log.")],
    out: Annotated[Path, typer.Option(help="A new folder for the adapted model.")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Follow a log piece by piece: score it, train on it, keep the update or undo it; with no updates beside it.

    Examples:
        rnn-longctx sensors adapt runs/fit newer.csv --events newer_failures.csv --out runs/adapted
    """
    from rnn_longctx.sensors.adapt import AdaptConfig
    from rnn_longctx.sensors.fit import Run, new_folder
    from rnn_longctx.sensors.runs import adapt_run

    fitted = Run.load(run)
    folder = new_folder(out)
    steps = adapt_run(fitted, log, events, folder, AdaptConfig(seed=seed), speaker())
    table("steps", steps, plain_table(steps).to_string(index=False, float_format=lambda value: f"{value:.3f}"))
    wrote(folder, ["model.safetensors", "sensors.json", "online.csv"])
