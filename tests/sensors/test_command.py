"""`rnn-longctx sensors`, from a made log to a report; one line and exit code 2 for bad input, nothing written over."""

import json
import socket
import sys

import pandas as pd
import pytest
import torch

from rnn_longctx import cli
from rnn_longctx.cli.commands.sensors import SCHEDULE
from rnn_longctx.sensors.fit import FitConfig

FIT = ["--time", "t", "--sensors", "temp,vib,press,lot_a,lot_b", "--schedule", "64:15"]


def call(*words):
    """Run the command line; return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rnn-longctx", "sensors", *map(str, words)])
        try:
            cli.main()
        except SystemExit as end:
            return end.code or 0
    return 0


def run(capsys, *words, code=0):
    assert call(*words) == code
    out, error = capsys.readouterr()
    return out if code == 0 else error


@pytest.fixture(scope="module")
def plant(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("plants") / "plant"
    assert call("make", folder, "--rows", "3000", "--longest", "100") == 0
    return folder


@pytest.fixture(scope="module")
def fitted(plant):
    log, events, out = (plant / name for name in ("plant.parquet", "failures.csv", "run"))
    assert call("fit", log, "--events", events, "--mixer", "two-stage", "--out", out, *FIT) == 0
    return plant / "run"


def test_from_file_to_alarm_without_a_connection(plant, fitted, capsys, monkeypatch):
    def refuse(*args, **more):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    out = run(capsys, "report", fitted)
    assert "average precision" in out and "forecast 8 rows ahead" in out
    files = {path.name for path in (fitted / "report").iterdir()}
    assert files == {"alarms.jsonl", "events.csv", "forecast.csv", "report.md", "alarms.png", "forecast.png"}
    alarms = [json.loads(line) for line in (fitted / "report" / "alarms.jsonl").read_text().splitlines()]
    first = pd.read_parquet(plant / "plant.parquet").t[2100]
    for alarm in alarms:
        assert pd.Timestamp(alarm["from"], tz="UTC") >= first
        assert (alarm["event"] is None) == (alarm["lead_seconds"] is None)
    assert alarms and any(link["sensors"] for alarm in alarms for link in alarm["links"])
    page = (fitted / "report" / "report.md").read_text()
    assert all(title in page for title in ("## The log", "## Alarms", "## Forecasts", "rows before ("))


def test_another_log_repaired_and_followed(plant, fitted, capsys, tmp_path):
    log = pd.read_parquet(plant / "plant.parquet").sample(frac=1, random_state=1)
    log.assign(temp=log.temp * 1.8 + 32).to_csv(tmp_path / "log.csv", index=False)
    out = run(capsys, "report", fitted, tmp_path / "log.csv", "--out", tmp_path / "said")
    assert "repaired: rows were out of order" in out and "repaired: temp: degrees F brought to degrees C" in out
    assert "average precision" not in out  # no events are known
    events = ["--events", plant / "failures.csv", "--out", tmp_path / "adapted"]
    message = run(capsys, "adapt", fitted, plant / "plant.parquet", *events, code=2)
    assert message.count("\n") == 1 and "it needs more rows" in message
    assert not (tmp_path / "adapted").exists()


def test_the_help_says_the_schedule():
    assert FitConfig.schedule == SCHEDULE


def test_bad_input_is_one_line_and_writes_nothing(plant, fitted, capsys, tmp_path):
    log, events = plant / "plant.parquet", ["--events", plant / "failures.csv"]
    frame = pd.read_parquet(log)
    frame.drop(columns="t").to_csv(tmp_path / "untimed.csv", index=False)
    frame.assign(**dict.fromkeys(frame.columns[1:], 1.0)).to_csv(tmp_path / "still.csv", index=False)
    pd.DataFrame({"t": ["2031-01-01T00:00:00Z"]}).to_csv(tmp_path / "late.csv", index=False)
    out, before = ["--out", tmp_path / "out"], sorted((fitted).rglob("*"))
    cases = [
        (["fit", tmp_path / "untimed.csv", *events, *FIT, *out], "no column 't'"),
        (["fit", tmp_path / "still.csv", *events, *FIT, *out], "every sensor is constant"),
        (["fit", log, "--events", tmp_path / "late.csv", *FIT, *out], "lies within the log"),
        (["fit", log, *events, *FIT[:2], "--sensors", "temp,vibb", *out], 'did you mean "vib"'),
        (["fit", log, *events, *FIT[:2], "--sensors", "temp,temp", *out], "named twice"),
        (["fit", log, *events, *FIT, "--mixer", "two-stag", *out], 'did you mean "two-stage"'),
        (["fit", log, *events, *FIT[:4], "--schedule", "64", *out], "schedule: expected"),
        (["fit", log, *events, *FIT[:4], "--schedule", "4k:3", *out], "need more than the 1800 rows"),
        (["fit", log, *events, *FIT, "--out", fitted], "exists already, and nothing is written over"),
        (["make", plant], "exists already"),
        (["make", tmp_path / "new", "--rows", "10"], "twice the longest lag"),
        (["report", tmp_path], "holds no fitted sensors"),
        (["report", fitted, "--events", plant / "failures.csv", *out], "give the log as well"),
        (["report", fitted, tmp_path / "still.csv", *out], "every sensor is constant"),
    ]
    for words, match in cases:
        message = run(capsys, *words, code=2)
        assert message.count("\n") == 1 and match in message, message
    assert not (tmp_path / "out").exists() and not (tmp_path / "new").exists()
    assert sorted(fitted.rglob("*")) == before
