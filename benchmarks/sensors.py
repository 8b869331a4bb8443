"""What docs/guides/sensors.md says, measured: each part appends to a table of its own in --out.

python benchmarks/sensors.py fit --out runs/sensors        # a log with short lags; a model a mixer
python benchmarks/sensors.py cost --out runs/sensors       # seconds and memory of reading, by length, on a CPU
python benchmarks/sensors.py card --out runs/sensors --device cuda    # of one reading, forward and back, on a GPU
python benchmarks/sensors.py copies --out runs/sensors     # damaged copies of a log
python benchmarks/sensors.py reach --out runs/sensors --seeds 0 1 2 --device cuda    # fits of several seeds, by lag
python benchmarks/sensors.py drift --out runs/sensors      # after a drift, with online updates and without
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from rnn_longctx.errors import InputError
from rnn_longctx.eval.compare.timing import timed
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.lm import LM
from rnn_longctx.probes.links import held
from rnn_longctx.recurrence.span import Span
from rnn_longctx.sensors.explain import alarm_links
from rnn_longctx.sensors.fit import CONTEXT, FitConfig, Run, parts, rows_of_log
from rnn_longctx.sensors.fit import fit as fit_model
from rnn_longctx.sensors.model import SensorConfig, SensorModel, for_sensors
from rnn_longctx.sensors.plants import SENSORS, STEP, STRIKE, Made, Plant, make_plant
from rnn_longctx.sensors.read import Log, labels
from rnn_longctx.sensors.score import average_precision, events_caught, read_rows, threshold_at

if TYPE_CHECKING:
    from rnn_longctx.sensors.runs import Source

MIXERS = ("two-stage", "block-sparse", "full-attention", "sliding-window")
FIT = Plant(rows=300_000, longest=100)
LONG = Plant(rows=220_000, longest=100_000, every=400, seed=1)
MIDDLE = Plant(rows=40_000, longest=16_000, every=200, seed=2)
LOGS = {"middle": MIDDLE, "long": LONG}
LAGS = (32, 128, 1000, 4000, 16_000, 40_000, 100_001)


def write(made: Made, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made.log.to_parquet(folder / "plant.parquet", index=False)
    made.events.to_csv(folder / "failures.csv", index=False)
    return folder


def source(folder: Path) -> Source:
    from rnn_longctx.sensors.runs import Source  # (which draws: reach and card do without that)

    return Source(str(folder / "plant.parquet"), "t", list(SENSORS), str(folder / "failures.csv"))


def fit(out: Path, mixers: list[str], schedule: str) -> None:
    from rnn_longctx.sensors.runs import fit_run

    folder = write(make_plant(FIT), out / "plant")
    for mixer in mixers:
        began = time.process_time()
        shape = SensorConfig(list(SENSORS), [for_sensors(mixer)])
        run = fit_run(source(folder), shape, FitConfig(schedule), out / mixer, print)
        row = {"mixer": mixer, "cpu_seconds": round(time.process_time() - began), "threshold": run.threshold}
        append(out / "fit.csv", [row])


def reach(args: argparse.Namespace) -> None:
    """Fit every mixer from every seed, and read two logs that it was not fitted to: a row a range of lags."""
    log, before = in_memory(make_plant(FIT))
    others = {name: make_plant(LOGS[name]) for name in args.logs}
    print(f"{len(args.seeds) * len(args.mixers)} fits, {len(others)} logs each", flush=True)
    for seed in args.seeds:
        for mixer in args.mixers:
            began = time.perf_counter()
            shape = SensorConfig(list(SENSORS), [for_sensors(mixer)])
            model = fit_model(log, before, shape, FitConfig(args.schedule, seed=seed, device=args.device), print)
            row = {"mixer": mixer, "seed": seed, "device": args.device, "schedule": args.schedule}
            row["fit_seconds"] = round(time.perf_counter() - began, 1)
            threshold = threshold_of(model, log, before)
            for name, made in others.items():
                append(
                    args.out / "reach.csv", [row | {"log": name} | found for found in measured(model, made, threshold)]
                )


def threshold_of(model: SensorModel, log: Log, before: np.ndarray) -> float:
    """Return the threshold that `sensors fit` sets: on rows that were not fitted to, of the log that was."""
    setting = parts(len(before))[1]
    begin = setting.start - CONTEXT
    logits = read_rows(model, rows_of_log(model.scales, log)[begin : setting.stop]).logits[CONTEXT:]
    return threshold_at(logits, before[setting])


def measured(model: SensorModel, made: Made, threshold: float) -> list[dict]:
    """Return a row a range of lags: average precision, events caught and minutes ahead, false alarms, causes held."""
    log, before = in_memory(made)
    began = time.perf_counter()
    logits = read_rows(model, rows_of_log(model.scales, log)).logits
    row = {"rows": len(before), "read_seconds": round(time.perf_counter() - began, 2)}
    row["false_alarms"] = float((logits[~before] > threshold).mean())
    found, rows = strikes_held(model, log, made.truth), []
    for at in by_lag(made.truth, logits, before):
        some = made.truth[made.truth.damaged & (made.truth.lag >= at["low"]) & (made.truth.lag < at["high"])]
        failed = log.times[some.dip + Plant.warning]
        caught = events_caught(logits, log.times, failed, Plant.warning * STEP, threshold)
        lead = {"caught": caught["caught"].mean(), "minutes_ahead": caught["lead"].median() / 60}
        rows.append(row | at | lead | found(at))
    return rows


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
    layer = LM(config.shape()).layers[1].mixer
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


@dataclass(frozen=True)
class Layer:
    """A layer whose cost is measured."""

    d_model: int
    heads: int
    dtype: torch.dtype

    def mixers(self) -> Iterator[tuple[str, str]]:
        yield "full-attention", f"full-attention:heads={self.heads},positions=none"
        for name in ("two-stage", "block-sparse"):
            for block, top in ((16, 8), (64, 4)):
                settings = f"heads={self.heads},block={block},window={block},top={top},positions=none"
                settings += ",gate=0" if name == "block-sparse" else ""
                yield f"{name}, {top} blocks of {block}", f"{name}:{settings}"


LAYERS = (Layer(64, 1, torch.float32), Layer(64, 1, torch.bfloat16), Layer(512, 8, torch.bfloat16))


def card(args: argparse.Namespace) -> None:
    """Time one layer's reading of a row of vectors: in one call, in segments of 4096, and in one call with gradients of
    weights and inputs. Memory is the most that was held at once beyond weights and inputs."""
    cells = [(layer, length, *mixer) for length in args.lengths for layer in LAYERS for mixer in layer.mixers()]
    print(f"{3 * len(cells)} rows", flush=True)
    for layer, length, name, mixer in cells:
        torch.manual_seed(0)
        shape = ModelConfig([mixer], layer.d_model, 1, vocab_size=1)
        module = LM(shape).layers[0].mixer.to(args.device, layer.dtype)
        vectors = torch.randn(1, length, layer.d_model).to(args.device, layer.dtype)
        ways: dict[str, Callable[[], None]] = {
            "one call": partial(in_segments, module, vectors, length),
            "segments of 4096": partial(in_segments, module, vectors, 4096),
            "one call and back": partial(and_back, module, vectors),
        }
        for way, run in ways.items():
            row = {"d_model": layer.d_model, "heads": layer.heads, "dtype": str(layer.dtype).removeprefix("torch.")}
            row |= {"mixer": name, "way": way, "length": length, "device": args.device}
            try:
                taken, _ = timed(run, torch.device(args.device))
                row |= {"seconds": taken.seconds, "peak_mib": taken.peak_bytes / 2**20}
            except torch.OutOfMemoryError:
                row["note"] = "out of memory"
            module.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()  # (does nothing without a GPU)
            append(args.out / "card.csv", [row])


@torch.no_grad()
def in_segments(module: torch.nn.Module, vectors: torch.Tensor, segment: int) -> None:
    carry = None
    for at in range(0, vectors.shape[1], segment):
        _, carry = module(vectors[:, at : at + segment], carry, Span(shared={}))


def and_back(module: torch.nn.Module, vectors: torch.Tensor) -> None:
    inputs = vectors.detach().requires_grad_()
    y, _ = module(inputs, None, Span(shared={}))
    y.sum().backward()


def copies(out: Path, mixers: list[str]) -> None:
    from rnn_longctx.sensors.runs import report_run

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
    from rnn_longctx.sensors.runs import adapt_run

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
    parser.add_argument("part", choices=["fit", "reach", "cost", "one", "card", "copies", "drift"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS))
    parser.add_argument("--schedule", default=FitConfig.schedule)
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--logs", nargs="+", choices=list(LOGS), default=list(LOGS))
    parser.add_argument("--device", default="cpu", help="of reach and card")
    args = parser.parse_args()
    args.lengths = args.lengths or ([98304] if args.part == "card" else [4096, 16384, 32768, 65536, 98304])
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part == "fit":
        fit(args.out, args.mixers, args.schedule)
    elif args.part in ("reach", "card"):
        {"reach": reach, "card": card}[args.part](args)
    elif args.part == "one":
        one(args.out, args.mixers[0], args.lengths[0], args.schedule)
    elif args.part == "cost":
        cost(args.out, args.mixers, args.lengths)
    else:
        {"copies": copies, "drift": drift}[args.part](args.out, args.mixers)


if __name__ == "__main__":
    main()
