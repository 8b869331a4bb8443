"""What docs/guides/sensors.md says, measured: each part appends to a table of its own in --out.

python benchmarks/sensors.py fit --out runs/sensors        # a log with short lags; a model a mixer
python benchmarks/sensors.py lags --out runs/sensors       # average precision by lag, on a log with lags to 100K rows
python benchmarks/sensors.py cost --out runs/sensors       # seconds and memory of reading, by length
python benchmarks/sensors.py copies --out runs/sensors     # damaged copies of a log
python benchmarks/sensors.py seeds --out runs/sensors --mixers two-stage --seeds 3 4 5 6 7 8    # fits of other seeds
python benchmarks/sensors.py drift --out runs/sensors      # after a drift, with online updates and without
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from rnn_longctx.errors import InputError
from rnn_longctx.probes.links import held
from rnn_longctx.sensors.explain import alarm_links
from rnn_longctx.sensors.fit import FitConfig, Run, rows_of_log
from rnn_longctx.sensors.model import SensorConfig, SensorModel, for_sensors
from rnn_longctx.sensors.plants import SENSORS, STRIKE, Made, Plant, make_plant
from rnn_longctx.sensors.read import Log, labels
from rnn_longctx.sensors.runs import Source, adapt_run, fit_run, report_run
from rnn_longctx.sensors.score import average_precision, read_rows

MIXERS = ("two-stage", "full-attention", "sliding-window")
FIT = Plant(rows=300_000, longest=100)
LONG = Plant(rows=220_000, longest=100_000, every=400, seed=1)
MIDDLE = Plant(rows=40_000, longest=16_000, every=200, seed=2)
LAGS = (32, 128, 1000, 4000, 16_000, 40_000, 100_001)


def write(made: Made, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made.log.to_parquet(folder / "plant.parquet", index=False)
    made.events.to_csv(folder / "failures.csv", index=False)
    return folder


def source(folder: Path) -> Source:
    return Source(str(folder / "plant.parquet"), "t", list(SENSORS), str(folder / "failures.csv"))


def fit(out: Path, mixers: list[str], schedule: str) -> None:
    folder = write(make_plant(FIT), out / "plant")
    for mixer in mixers:
        began = time.process_time()
        shape = SensorConfig(list(SENSORS), [for_sensors(mixer)])
        run = fit_run(source(folder), shape, FitConfig(schedule), out / mixer, print)
        row = {"mixer": mixer, "cpu_seconds": round(time.process_time() - began), "threshold": run.threshold}
        append(out / "fit.csv", [row])


def seeds(out: Path, mixers: list[str], schedule: str, numbers: list[int]) -> None:
    """Fit with other seeds: average precision on the log with lags to 16,000 rows, beside what dips alone say."""
    folder, made = write(make_plant(FIT), out / "plant"), make_plant(MIDDLE)
    log, before = in_memory(made)
    for mixer in mixers:
        for seed in numbers:
            began = time.process_time()
            shape = SensorConfig(list(SENSORS), [for_sensors(mixer)])
            to = out / f"{mixer}-seed-{seed}"
            model = fit_run(source(folder), shape, FitConfig(schedule, seed=seed), to, print).model
            seconds = round(time.process_time() - began)
            logits = read_rows(model, rows_of_log(model.scales, log)).logits
            *_, whole = by_lag(made.truth, logits, before)
            row = {"mixer": mixer, "schedule": schedule, "seed": seed, "cpu_seconds": seconds}
            append(out / "seeds.csv", [row | {name: whole[name] for name in ("average_precision", "dips_alone")}])


def lags(out: Path, mixers: list[str]) -> None:
    for name, plant in (("middle", MIDDLE), ("long", LONG)):
        made = make_plant(plant)
        log, before = in_memory(made)
        for mixer in mixers:
            run = Run.load(out / mixer)
            model, seed = run.model, run.source["fit"]["seed"]
            began = time.process_time()
            logits = read_rows(model, rows_of_log(model.scales, log)).logits
            seconds = time.process_time() - began
            found = strikes_held(model, log, made.truth)
            append(
                out / "lags.csv",
                [
                    {
                        "log": name,
                        "mixer": mixer,
                        "seed": seed,
                        "rows": len(before),
                        "cpu_seconds": round(seconds, 1),
                        **row,
                        **found(row),
                    }
                    for row in by_lag(made.truth, logits, before)
                ],
            )


def by_lag(truth: pd.DataFrame, logits: np.ndarray, before: np.ndarray) -> Iterator[dict]:
    """Average precision of the rows of dips whose lag is in a range, among all rows that are in no dip."""
    dips = {row.dip: slice(row.dip, row.dip + Plant.warning) for row in truth.itertuples()}
    quiet = np.ones(len(before), bool)
    for at in dips.values():
        quiet[at] = False
    for low, high in [*zip(LAGS, LAGS[1:]), (LAGS[0], LAGS[-1])]:
        some = truth[(truth.lag >= low) & (truth.lag < high)]
        chosen = quiet.copy()
        for dip in some.dip:
            chosen[dips[dip]] = True
        if len(some) >= 10:
            row = {"low": low, "high": high, "dips": len(some)}
            seen = truth.dip.isin(some.dip)
            # (who knows dips and nothing else: one score for all of their rows)
            blind = np.zeros(len(before))
            for dip in some.dip:
                blind[dips[dip]] = 1
            row["average_precision"] = average_precision(logits[chosen], before[chosen])
            yield row | {
                "dips_alone": average_precision(blind[chosen], before[chosen]),
                "damaged": truth.damaged[seen].mean(),
            }


def strikes_held(model: SensorModel, log: Log, truth: pd.DataFrame) -> Callable[[dict], dict]:
    """In how many of (at most 20 a range) dips the chosen blocks hold the strike, and in how many by chance."""
    ranges = [truth[(truth.lag >= low) & (truth.lag < high)] for low, high in zip(LAGS, LAGS[1:])]
    some = pd.concat([one.iloc[:: max(1, len(one) // 20)] for one in ranges])
    at = {int(r.dip) + Plant.warning - 1: tuple(range(r.strike, r.strike + STRIKE)) for r in some.itertuples()}
    lags = {int(r.dip) + Plant.warning - 1: r.lag for r in some.itertuples()}
    table = alarm_links(model, log, list(at))
    if table is None:
        return lambda row: {}
    found = held(table, at)

    def of(row: dict) -> dict:
        here = found[found["query"].map(lags).between(row["low"], row["high"] - 1)]
        return {"held": here["held"].mean(), "held_by_chance": here["chance"].mean()}

    return of


def in_memory(made: Made) -> tuple[Log, np.ndarray]:
    def nanoseconds(times: pd.Series) -> np.ndarray:
        return times.astype("datetime64[ns, UTC]").astype("int64").to_numpy()

    log = Log("made", nanoseconds(made.log.t), made.log[list(SENSORS)].to_numpy(), list(SENSORS), True)
    return log, labels(log, nanoseconds(made.events.t), Plant.warning)


def cost(out: Path, mixers: list[str], lengths: list[int]) -> None:
    for length in lengths:
        for mixer in mixers:
            for way in ("stream", "call"):
                line = [sys.executable, __file__, "one", "--out", str(out), "--mixers", mixer, "--lengths", str(length)]
                subprocess.run([*line, "--schedule", way], check=True)


def one(out: Path, mixer: str, length: int, way: str) -> None:
    """One mixer reads so many vectors, as a stream of segments of 4096 or in one call; the layer alone, in a process of
    its own."""
    config = SensorConfig(list(SENSORS), [for_sensors(mixer)])
    torch.manual_seed(0)
    from rnn_longctx.models.lm import LM

    layer = LM(config.shape()).layers[1].mixer
    from rnn_longctx.recurrence.span import Span

    vectors = torch.randn(1, length, config.d_model)
    segment = 4096 if way == "stream" else length
    with torch.no_grad():
        layer(vectors[:, :256], None, Span(shared={}))
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began, carry = time.process_time(), None
        for at in range(0, length, segment):
            _, carry = layer(vectors[:, at : at + segment], carry, Span(shared={}))
        seconds = time.process_time() - began
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024
    append(out / "cost.csv", [{"mixer": mixer, "way": way, "length": length, "cpu_seconds": seconds, "peak_mib": peak}])


def copies(out: Path, mixers: list[str]) -> None:
    made = make_plant(Plant(rows=16_000, longest=2000, every=100, seed=3))
    clock = made.log.t.copy()
    clock[8000:] -= pd.Timedelta(hours=2)
    rng = np.random.default_rng(0)
    names = list(SENSORS)
    logs = {
        "as it is": made.log,
        "shuffled": made.log.sample(frac=1, random_state=0),
        "20% of the values missing": made.log.assign(**made.log[names].mask(rng.random((16_000, len(names))) < 0.2)),
        "20% of the rows missing": made.log[rng.random(16_000) >= 0.2],
        "clock set back 2 h half way": made.log.assign(t=clock),
        "clock 2 h slow throughout": made.log.assign(t=made.log.t - pd.Timedelta(hours=2)),
        "written in another zone": made.log.assign(
            t=made.log.t.dt.tz_convert("Asia/Tokyo").map(lambda t: t.isoformat())
        ),
        "no zone, events with one": made.log.assign(t=made.log.t.dt.tz_localize(None)),
        "temp in degrees F": made.log.assign(temp=made.log.temp * 1.8 + 32),
        "press in psi": made.log.assign(press=made.log.press * 14.503774),
        "temp in a unit of its own": made.log.assign(temp=made.log.temp * 7 + 900),
    }
    for mixer in mixers:
        for name, log in logs.items():
            folder = write(Made(log, made.events, made.truth), out / "copy")
            row = {"mixer": mixer, "copy": name}
            try:
                run = Run.load(out / mixer)
                report = report_run(run, folder / "plant.parquet", folder / "failures.csv")
                row |= {
                    "average_precision": report.figures["average_precision"],
                    "repairs": "; ".join(report.log.repairs),
                }
                row |= {"clock": report.figures["clock"]}
                row |= {"notes": "; ".join(report.log.notes)}
            except InputError as error:
                row |= {"refused": str(error).replace(str(folder), "")}
            append(out / "copies.csv", [row])


def drift(out: Path, mixers: list[str]) -> None:
    folder = write(
        make_plant(Plant(rows=40_960, longest=128, drift_at=8192, drift_over=4096, seed=4)), out / "drifting"
    )
    for mixer in mixers:
        run, to = Run.load(out / mixer), out / f"{mixer}-adapted"
        table = adapt_run(run, folder / "plant.parquet", folder / "failures.csv", to, say=print)
        append(out / "drift.csv", table.assign(mixer=mixer).to_dict("records"))


def append(path: Path, rows: list[dict]) -> None:
    table = pd.DataFrame(rows)
    print(table.to_string(index=False), flush=True)
    if path.exists():
        table = pd.concat([pd.read_csv(path), table])
    table.to_csv(path, index=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["fit", "seeds", "lags", "cost", "one", "copies", "drift"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS))
    parser.add_argument("--schedule", default=FitConfig.schedule)
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16384, 32768, 65536, 98304])
    parser.add_argument("--seeds", nargs="+", type=int, default=[3, 4, 5, 6, 7, 8])
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part == "fit":
        fit(args.out, args.mixers, args.schedule)
    elif args.part == "seeds":
        seeds(args.out, args.mixers, args.schedule, args.seeds)
    elif args.part == "one":
        one(args.out, args.mixers[0], args.lengths[0], args.schedule)
    elif args.part == "cost":
        cost(args.out, args.mixers, args.lengths)
    else:
        {"lags": lags, "copies": copies, "drift": drift}[args.part](args.out, args.mixers)


if __name__ == "__main__":
    main()
