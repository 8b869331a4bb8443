"""Growth with the length: what is measured, resumed, fitted, refused and shown."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from rnn_longctx import cli
from rnn_longctx.config import load_yaml
from rnn_longctx.errors import InputError
from rnn_longctx.eval import pool
from rnn_longctx.eval.compare import CompareConfig, GrowthConfig, growth, load_comparison, run_growth, timing
from rnn_longctx.eval.tables.growth import cheaper_from, fit, read
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.kernels import choose
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.testing.mixers import D_MODEL, examples

PROCESS = growth.command
ROOT = Path(__file__).parents[3]
CONFIG = """
measure: growth
shape: {d_model: 16}
lengths: [32, 64, 128, 256]
reference: full
entries:
  - {name: full, mixer: "full-attention:heads=2"}
  - {name: longnet, mixer: "longnet:heads=2,segments=16/256,dilations=1/16"}
  - {name: mamba2, mixer: "mamba2:headdim=8,d_state=8", segment: 16}
device: cpu
out: runs
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Cells run in this process, a moment before the one that stands for them, and everything once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timing, "ENOUGH", 0.0)
    monkeypatch.setattr(timing, "matrix_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(pool, "_WAIT", 0.005)

    @torch.inference_mode()
    def command(name: str, study: Path) -> list[str]:
        try:
            growth.run_cell(load_yaml(GrowthConfig, study / growth.STUDY), name, study)
        except InputError as error:
            return [sys.executable, "-c", f"import sys; sys.exit({str(error)!r})"]
        return ["true"]

    monkeypatch.setattr(growth, "command", command)


@pytest.fixture
def config() -> GrowthConfig:
    Path("growth.yaml").write_text(CONFIG)
    loaded = load_comparison("growth.yaml")
    assert isinstance(loaded, GrowthConfig)
    return loaded


def test_a_row_a_length_and_how_they_grow(config):
    frame = read(run_growth(config, say=lambda _: None))
    assert len(frame) == 12 and set(frame["what"]) == {"forward"} and (frame["seconds"] > 0).all()
    full, longnet, mamba2 = (
        frame[frame["entry"] == name].set_index("length") for name in ("full", "longnet", "mamba2")
    )
    assert full["carry_bytes"].tolist() == [2 * 16 * 4 * n + 16 for n in (32, 64, 128, 256)]  # and where
    assert full["carry_bytes_exponent"].iloc[0] == pytest.approx(1, abs=0.01)
    assert full["peak_bytes_exponent"].iloc[0] == pytest.approx(1, abs=0.1)
    assert mamba2["carry_bytes_exponent"].iloc[0] == pytest.approx(0, abs=1e-9)
    assert mamba2["peak_bytes"].nunique() == 1, "a stream takes the memory of a segment"
    assert mamba2["segment"].tolist() == [16] * 4 and full["segment"].isna().all()
    assert full["operations"].tolist() == [8 * 16**2 * n + 4 * 16 * n * (n + 1) / 2 for n in (32, 64, 128, 256)]
    assert (full["times_reference"] == 1).all() and longnet["times_floor"].notna().all()
    assert longnet["carry_bytes_cheaper_from"].iloc[0] < 64 and mamba2["operations"].isna().all()
    assert (frame["fit_from"] == 64).all() and {"growth.csv", "growth.parquet"} <= {
        p.name for p in Path("runs").iterdir()
    }


def test_what_is_measured_is_not_measured_again(config, monkeypatch):
    said: list[str] = []
    run_growth(config, ["full"], said.append)
    assert said[-1] == "1 cell run"
    (Path("runs") / "cells" / "full" / "128.json").unlink()  # killed before it
    read_at = []
    rows_at = growth.rows_at
    monkeypatch.setattr(growth, "rows_at", lambda r, n, d: read_at.append((r.segment, n)) or rows_at(r, n, d))
    run_growth(config, say=said.append)
    assert read_at == [(None, 128), *((None, n) for n in config.lengths), *((16, n) for n in config.lengths)]
    run_growth(replace(config, lengths=[32, 512]), ["full"], said.append)
    assert read_at[9:] == [(None, 512)]
    run_growth(replace(config, segment=64), ["full"], said.append)
    assert read_at[10:] == [(64, n) for n in config.lengths], "in another way"
    Path("other").mkdir()
    Path("other/run.json").write_text(json.dumps({"train": {"steps": 1}}))
    Path("other/cells").mkdir()
    with pytest.raises(InputError, match="holds a run of another config"):
        run_growth(replace(config, out="other"), say=said.append)


def test_where_memory_ends_it_is_said_and_nothing_longer_is_tried(config, monkeypatch):
    timed = timing.timed

    def until(run, device):
        if run.__closure__ and any(c.cell_contents == 128 for c in run.__closure__ if isinstance(c.cell_contents, int)):
            raise torch.OutOfMemoryError("no memory")
        return timed(run, device)

    monkeypatch.setattr(timing, "timed", until)
    frame = read(run_growth(config, ["full"], say=lambda _: None))
    assert frame["length"].tolist() == [32, 64, 128] and frame["note"].tolist() == ["", "", "out of memory"]
    assert math.isnan(frame["seconds"].iloc[-1]) and math.isnan(frame["seconds_exponent"].iloc[0])
    said: list[str] = []
    run_growth(config, ["full"], said.append)
    assert said == ["0 cells run"]


def test_an_entry_that_fails_is_named_and_the_others_go_on(config, monkeypatch):
    rows_at = growth.rows_at

    def failing(r, length, device):
        if r.model.mixer.startswith("longnet") and length == 64:
            raise RuntimeError("no kernel\nfor this")
        return rows_at(r, length, device)

    monkeypatch.setattr(growth, "rows_at", failing)
    with pytest.raises(InputError, match="1 cell failed, the first of them longnet: 64 tokens: no kernel"):
        run_growth(config, say=lambda _: None)
    assert read(Path("runs")).groupby("entry").size().to_dict() == {"full": 4, "longnet": 1, "mamba2": 4}


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_every_mixer_can_be_read(name):
    """As on a GPU, in bfloat16: in one call and in segments."""
    model = ModelConfig(examples(name)[0], d_model=D_MODEL, n_layer=1)
    for segment in (None, 7):
        how = timing.ReadingConfig(model, "mixers", segment, 1)
        (row,) = timing._of_mixer(how, 20, torch.device("cpu"), torch.bfloat16)
        assert row["seconds"] > 0 and row["peak_bytes"] > 0 and row["carry_bytes"] > 0


@pytest.mark.gpu
@torch.inference_mode()
def test_on_a_gpu(monkeypatch):
    monkeypatch.setattr(choose, "FUSED_LAYERS", True)
    model = ModelConfig("longnet:heads=4,segments=64/1k,dilations=1/16", d_model=256, n_layer=1)
    how = timing.ReadingConfig(model, "mixers", None, 1)
    short, long = (next(timing.rows_at(how, length, torch.device("cuda"))) for length in (1024, 16384))
    assert short["dtype"] == "bfloat16" and not short["note"] and not long["note"]
    assert 8 * short["peak_bytes"] < long["peak_bytes"] < 20 * short["peak_bytes"]
    assert long["seconds"] > long["operations"] / 2e15 and long["carry_bytes"] == short["carry_bytes"]


def test_whole_models_prefill_and_decode(config):
    shape = replace(config.shape, n_layer=2, vocab_size=20, mlp=1)
    models = replace(config, what="models", shape=shape, lengths=[16, 64], tokens=2)
    frame = read(run_growth(models, ["full", "mamba2"], say=lambda _: None))
    assert frame.groupby(["entry", "what"]).size().tolist() == [2, 2, 2, 2]
    decode = frame[frame["what"] == "decode"].set_index(["entry", "length"])
    assert (decode["tokens_per_second"] == 1 / decode["seconds"]).all()
    carry = decode["carry_bytes"]
    assert carry["full", 64] > 3 * carry["full", 16] and carry["mamba2", 64] == carry["mamba2", 16]
    cheaper = decode["carry_bytes_cheaper_from"]["mamba2"].iloc[0]
    share = math.log(carry["mamba2", 64] / carry["full", 16]) / math.log(carry["full", 64] / carry["full", 16])
    assert cheaper == pytest.approx(max(16, 16 * 4**share))


def test_a_power_is_fitted_and_what_is_missed_is_said():
    power, factor = np.random.default_rng().uniform(0, 2), np.random.default_rng().uniform(1e-6, 1e6)
    lengths = [2**i for i in range(12, 21)]
    exponent, residual = fit({n: factor * n**power for n in lengths})
    assert exponent == pytest.approx(power, abs=1e-9) and residual < 1e-9
    off = {n: factor * n**power * math.exp(0.1 * (-1) ** i) for i, n in enumerate(lengths)}
    assert fit(off).residual == pytest.approx(0.1, abs=0.01)
    assert fit({4: 0.0, 8: math.nan, 16: 1.0}) == pytest.approx((math.nan, math.nan), nan_ok=True)


def test_where_one_becomes_cheaper():
    lengths = [2**i for i in range(10, 17)]
    square, line = {n: n**2.0 for n in lengths}, {n: 3000.0 * n for n in lengths}
    assert cheaper_from(line, square) == pytest.approx(3000)
    assert math.isnan(cheaper_from(square, line)) and math.isnan(cheaper_from(line, {}))
    assert cheaper_from({n: n for n in lengths[1:]}, square) == 2048, "wherever both are known"


MISTAKES = {
    "lengths: expected lengths in ascending order, got 64 after 128": {"lengths": [128, 64]},
    "an exponent takes at least two lengths, and there are fewer from 256 on": {"fit_from": 256},
    "no entry 'ful'": {"reference": "ful"},
    "entries: full is there twice": {"entries": [{"name": "full", "mixer": "gla"}] * 2},
    "entries[0] (a): mixer: unknown mixer 'gl'": {"entries": [{"name": "a", "mixer": "gl"}]},
    "entries[0] (a): what: mixers takes one mixer an entry, got 2": {
        "entries": [{"name": "a", "mixer": ["gla", "kda"]}],
    },
    "lengths: expected at least one length": {"lengths": []},
    "entries[0] (a): nothing is read: longest 16 is below all lengths": {
        "entries": [{"name": "a", "mixer": "gla", "longest": 16}], "reference": None,
    },
    "segment: expected at least 1 token, or whole, got 0": {"segment": 0},
    'unknown key "learning_rates"': {"learning_rates": [1e-3]},
}  # fmt: skip


@pytest.mark.parametrize("said", MISTAKES)
def test_mistakes_in_a_config_are_one_line(said):
    Path("wrong.yaml").write_text(yaml.safe_dump(yaml.safe_load(CONFIG) | MISTAKES[said]))
    with pytest.raises(InputError) as error:
        load_comparison("wrong.yaml")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_configs_that_come_with_the_package():
    folder = ROOT / "configs" / "compare"
    kinds = {
        name: type(load_comparison(folder / f"{name}.yaml"))
        for name in ("growth", "growth_models", "growth_cpu", "smoke")
    }
    growths = dict.fromkeys(("growth", "growth_models", "growth_cpu"), GrowthConfig)
    assert kinds == growths | {"smoke": CompareConfig}
    smoke = load_comparison(folder / "growth_smoke.yaml")
    assert isinstance(smoke, GrowthConfig) and smoke.device == "cpu"


def test_the_command(config, monkeypatch, capsys):
    """In processes, as a person would."""
    monkeypatch.setattr(growth, "command", PROCESS)
    small = yaml.safe_load(CONFIG) | {"lengths": [16, 32], "reference": None}
    Path("small.yaml").write_text(yaml.safe_dump(small))
    for options, code in ((["--jobs", "2"], 1), (["--only", "mamba2"], 0)):
        monkeypatch.setattr(sys, "argv", ["rnn-longctx", "compare", "small.yaml", *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed, said = capsys.readouterr()
        assert bool(stop.value.code) == bool(code), said
        assert ("jobs: what is timed runs by itself; expected 1, got 2" in said) == bool(code)
    assert "segments of 16" in printed and "exponent" in printed
    written = {path.name for path in Path("runs").iterdir()}
    assert written >= {f"growth.{kind}" for kind in ("parquet", "csv", "png", "pdf")}
