"""What a comparison says of costs: energy, prices, training up to a score, reading and generating."""

from __future__ import annotations

import ctypes
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console

from rnn_longctx.config import load_yaml
from rnn_longctx.errors import InputError
from rnn_longctx.eval import energy
from rnn_longctx.eval.compare import CompareConfig, cell, growth, load_comparison, study, timing
from rnn_longctx.eval.compare.cell import folder_of, run_cell, spent
from rnn_longctx.eval.compare.config import ScoreConfig
from rnn_longctx.eval.compare.measures import CostsConfig
from rnn_longctx.eval.show import compare as show_compare
from rnn_longctx.eval.show import growth as show_growth
from rnn_longctx.eval.tables import compare as tables_compare
from rnn_longctx.eval.tables import growth as tables_growth
from rnn_longctx.train.snapshots import changed

CPU = torch.device("cpu")
CONFIG = """
shape: {d_model: 16, n_layer: 1, mlp: 0}
equal: null
entries:
  - {name: mamba2, mixer: "mamba2:headdim=8,d_state=8"}
  - {name: full, mixer: "full-attention:heads=2", longest: 64}
train:
  data: {text: [text.txt], held_out: 0.2, passkey: {fraction: 0}}
  train_length: 32
  batch_size: 4
  steps: 6
  log_every: 2
learning_rates: [1e-3]
seeds: 1
measure:
  loss: null
  recall: null
  probe: null
  remedies: null
  costs: {lengths: [32, 128], tokens: 3}
device: cpu
out: runs
"""


def package(folder: Path, name: str, joules: float, most: float = 1000.0) -> Path:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "energy_uj").write_text(f"{round(joules * 1e6)}\n")
    (folder / name / "max_energy_range_uj").write_text(f"{round(most * 1e6)}\n")
    return folder


def printed(pieces) -> str:
    console = Console(width=1000)
    with console.capture() as text:
        for piece in pieces:
            console.print(piece)
    return text.get()


def test_cpus_are_read_by_packages_and_over_the_end_of_a_counter(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "RAPL", tmp_path)
    assert math.isnan(energy.Meter(CPU).joules(9.0)), "nothing there"
    package(package(tmp_path, "intel-rapl:0", 990.0), "intel-rapl:1", 5.0)
    package(tmp_path, "intel-rapl:0:0", 1.0)  # a part of the first
    meter = energy.Meter(CPU)
    package(package(tmp_path, "intel-rapl:0", 7.0), "intel-rapl:1", 8.5)
    assert meter.joules(2.0) == pytest.approx(1000 - 990 + 7 + 3.5)
    assert math.isnan(meter.joules(0.1)), "too short for a counter that moves in steps"
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("")  # (as where it may not be read)
    assert math.isnan(energy.Meter(CPU).joules(2.0))


def test_a_gpu_is_read_by_its_name(monkeypatch):
    class Nvml:
        millijoules, names = 5000, []

        def nvmlInit_v2(self):
            return 0

        def nvmlDeviceGetHandleByUUID(self, name, handle):
            self.names.append(name)
            return 0

        def nvmlDeviceGetTotalEnergyConsumption(self, handle, count):
            ctypes.cast(count, ctypes.POINTER(ctypes.c_ulonglong))[0] = self.millijoules
            return 0

    nvml = Nvml()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("P", (), {"uuid": "12-ab"}))
    meter = energy.Meter(torch.device("cuda"))
    nvml.millijoules = 12500
    assert meter.joules(1.0) == 7.5 and nvml.names == [b"GPU-12-ab"]
    monkeypatch.setattr(Nvml, "nvmlDeviceGetTotalEnergyConsumption", lambda *_: 3)  # not supported
    assert math.isnan(energy.Meter(torch.device("cuda")).joules(1.0))


@pytest.fixture
def config(tmp_path, monkeypatch) -> CompareConfig:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("".join(np.random.default_rng().choice(["def ", "x", " = ", "(y)\n"], 3000)))
    Path("compare.yaml").write_text(CONFIG)
    monkeypatch.setattr(timing, "ENOUGH", 0.0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_yaml(CompareConfig, "compare.yaml")
    torch.set_num_threads(before)


def gathered(config: CompareConfig) -> pd.DataFrame:
    study._Cells(config, Path("runs"), ["mamba2", "full"]).gather()
    return tables_compare.read(Path("runs"))


def test_a_study_says_what_its_models_took(config, tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "RAPL", package(tmp_path / "rapl", "intel-rapl:0", 3.0))
    monkeypatch.setattr(energy, "LEAST_SECONDS", 0.0)
    for entry in config.entries:
        run_cell(config, config.replicas(entry.name, 1e-3)[0], Path("runs"))
    first = config.replicas("mamba2", 1e-3)[0]
    log = pd.read_csv(folder_of(Path("runs"), first) / "log.csv")
    assert log["step"].tolist() == [2, 4, 6]
    middle = float(log["loss"].iloc[:2].min())  # of the rows before the last
    at = log[log["loss"] <= middle].iloc[0]
    scored = replace(config, score=ScoreConfig(loss=middle), price=7200.0)
    assert spent(scored, first, Path("runs")) == {
        "train_tokens": 6 * 4 * 32,
        "train_seconds": log["seconds"].iloc[-1],
        "train_joules": 0.0,
        "score_tokens": at["tokens"],
        "score_seconds": at["seconds"],
    }
    frame = gathered(scored)
    of_seeds = frame[frame["seed"].notna()]
    mamba2, full = (of_seeds[of_seeds["entry"] == name] for name in ("mamba2", "full"))
    values = mamba2.set_index(["metric", "length"])["value"]
    for length in (32, 128):
        assert values["tokens_per_second", length] == pytest.approx(length / values["first_token_seconds", length])
        for name in ("first_token", "next_token"):
            assert values[f"{name}_cost", length] == pytest.approx(2 * values[f"{name}_seconds", length])
            assert values[f"{name}_joules", length] == 0.0
    assert values["peak_bytes", 128] > values["carry_bytes", 128] == values["carry_bytes", 32] > 0
    assert set(full["length"].dropna()) == {32}, "it is read no further"
    kept = full.set_index("metric").loc["carry_bytes", "value"]
    assert kept == 2 * 32 * 16 * 4 + 16 and (full["metric"] == "train_cost").any()  # and how many it holds, and where
    text = printed(show_compare.tables(frame))
    assert "to the score: tokens" in text and "next token, s" in text and "joules" in text
    never = gathered(replace(scored, score=ScoreConfig(loss=0.0, answer_loss=0.0), price=None))
    assert math.isinf(never.loc[never["metric"] == "score_seconds", "value"].iloc[0])
    assert not never["metric"].str.endswith("_cost").any() and "not reached" in printed(show_compare.tables(never))
    (folder_of(Path("runs"), first) / "log.csv").unlink()
    assert spent(scored, first, Path("runs")) == {}


def test_what_was_measured_before_there_were_costs_still_counts(config):
    """Neither a score nor a price, nor that there is a section `costs`, makes a cell another one."""
    old = replace(config, measure=replace(config.measure, costs=None))
    first = config.replicas("mamba2", 1e-3)[0]
    how = cell._measured_as(old, first)
    before = how | {"measure": {name: value for name, value in how["measure"].items() if name != "costs"}}
    assert not changed(before, how) and changed(before, cell._measured_as(config, first))
    assert cell._measured_as(replace(old, score=ScoreConfig(loss=1.0), price=2.0), first) == how


def test_what_is_no_price_or_score_is_refused(config):
    for bad, message in (
        (lambda: replace(config, price=-1.0), "price: expected that of an hour of the device, 0 or more, got -1.0"),
        (lambda: ScoreConfig(), "loss: expected one, an answer_loss, or both"),
        (lambda: CostsConfig(lengths=[64, 32]), "expected lengths in ascending order"),
        (lambda: CostsConfig(tokens=0), "tokens: expected at least 1, got 0"),
    ):
        with pytest.raises(InputError, match=message):
            bad()


def test_growth_has_joules_and_a_cost_and_reads_tables_without(config, tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "RAPL", package(tmp_path / "rapl", "intel-rapl:0", 3.0))
    Path("growth.yaml").write_text(
        "{measure: growth, shape: {d_model: 16}, lengths: [32, 64], out: g, device: cpu, price: 3600,"
        " entries: [{name: full, mixer: 'full-attention:heads=2'}]}"
    )
    grown = load_comparison("growth.yaml")
    monkeypatch.setattr(timing, "matrix_rate", lambda device, dtype: 1e9)
    growth.run_cell(grown, "full", Path("g"))
    for length in (32, 64):  # a file of an older version
        file = growth._file(Path("g"), "full", length)
        known = json.loads(file.read_bytes())
        if length == 32:
            known["rows"] = [{k: v for k, v in row.items() if k != "joules"} for row in known["rows"]]
        else:
            known["rows"] = [row | {"joules": 4.0} for row in known["rows"]]
        file.write_text(json.dumps(known))
    frame = growth._Cells(grown, Path("g"), ["full"]).gather()
    assert frame["cost"].tolist() == frame["seconds"].tolist()
    assert math.isnan(frame["joules"].iloc[0]) and frame["joules"].iloc[1] == 4.0
    assert "joules: of the whole device" in printed(show_growth.tables(tables_growth.read(Path("g"))))
    frame.drop(columns=["joules", "cost"]).to_parquet(Path("g") / tables_growth.FILE)
    older = tables_growth.read(Path("g"))
    assert older["cost"].isna().all() and "price" not in printed(show_growth.tables(older))
