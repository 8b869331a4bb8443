"""A results folder that is there already: cells that are measured once, and what a killed sweep leaves behind."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time

import evaluated
import pytest
import torch
from evaluated import make_model, value

from rnn_longctx import evaluate
from rnn_longctx.eval import Measuring, Results
from rnn_longctx.eval.jobs.loss import LossOverLength
from rnn_longctx.eval.tables.sheets import sheets
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.lm import Mamba2LM


def test_finished_cells_are_not_measured_again(model, text, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    settings = {"text": text, "out": out}
    first = evaluate(
        model, [96, 128], ["lm:slices=2,tokens=0", "passkey:n=4,least=2"], ["none", "reset:every=32"], **settings
    )
    reads = []
    original = Mamba2LM.read
    monkeypatch.setattr(Mamba2LM, "read", lambda self, *a, **k: reads.append(1) or original(self, *a, **k))
    again = evaluate(
        model, [96, 128], ["lm:slices=2,tokens=0", "passkey:n=4,least=2"], ["none", "reset:every=32"], **settings
    )
    assert not reads and again.value.tolist() == first.value.tolist()
    evaluate(model, [96, 128, 256], ["lm:slices=2,tokens=0"], ["none"], **settings)
    assert reads


@pytest.mark.parametrize("name", ["run", "run/last", "run/best", "run/300"])
def test_cells_that_an_older_version_filed_under_a_folders_name_go_on(model, text, tmp_path, monkeypatch, caplog, name):
    """It called runs/run/last "last", and runs/run/model "model"."""
    out, task = str(tmp_path / "out"), ["lm:slices=2,tokens=0"]
    model.name = {"run": "model"}.get(name, name.rpartition("/")[2])
    first = evaluate(model, [96], task, ["none"], text=text, out=out)
    stranger = {"model": model.name, "weights_hash": "another", "length": 96, "metric": "nats_per_token"}
    Results(out).put(stranger)
    model.name = name
    monkeypatch.setattr(Mamba2LM, "read", None)  # nothing is read again
    again = evaluate(model, [96], task, ["none"], text=text, out=out)
    assert again.value.tolist() == first.value.tolist() and set(again.model) == {name}
    before = name.rpartition("/")[2] if "/" in name else "model"
    rows = Results(out).rows()
    assert len(rows) == len(first) + 1 and {r["weights_hash"] for r in rows if r["model"] == before} == {"another"}
    assert f"now filed under its name, {name}; they were under {before}" in caplog.text


def test_fewer_slices_or_prompts_are_a_part_of_what_is_stored(model, text, tmp_path):
    settings = {"text": text, "out": str(tmp_path / "out")}
    first = evaluate(model, [96, 128], ["lm:slices=3,tokens=0", "passkey:n=12,least=12"], **settings)
    again = evaluate(model, [96, 128], ["lm:slices=1,tokens=0", "passkey:n=4,least=4"], **settings)
    assert again.value.tolist() == first.value.tolist() and again.n.tolist() == first.n.tolist()


@pytest.mark.parametrize("change", ["weights", "text", "calibration", "seed", "slices"])
def test_other_inputs_never_reuse_a_cell(model, text, unseen, tmp_path, change):
    other_text = tmp_path / "text2" / "text.txt"  # the same name, other bytes
    other_text.parent.mkdir()
    other_text.write_bytes(bytes(torch.randint(32, 127, (6000,)).tolist()))
    out, task = str(tmp_path / "out"), "lm:slices=2,tokens=0"
    settings = {"mitigations": ["state-norm"], "calibration_text": unseen, "text": text}
    before = evaluate(model, [128], [task], out=out, **settings)
    changed = {
        "text": {"text": str(other_text)}, "calibration": {"calibration_text": str(other_text)}, "seed": {"seed": 1},
    }.get(change, {})  # fmt: skip
    if change == "weights":
        model = make_model(seed=1)
    if change == "slices":
        task = "lm:slices=3,tokens=0"
    after = evaluate(model, [128], [task], out=out, **{**settings, **changed})
    if change == "slices":
        assert value(after, 128, mitigation="state-norm").n == 3
    else:
        assert len(after) == (1 if change == "weights" else 2) * len(before)  # what is returned is of one model
        assert len(Results(out).frame()) == 2 * len(before)


KILLED = textwrap.dedent("""
    import sys
    import torch
    sys.path.insert(0, sys.argv[3])
    from evaluated import make_model
    import rnn_longctx.eval.run as run
    made = run.Measuring
    run.Measuring = lambda *a, **k: made(*a, **k, snapshot_seconds=0.0)
    run.SEGMENTS["cpu"] = 64
    run.evaluate(make_model(), [64, 512, 3000], ["lm:slices=1,tokens=0"], ["none", "state-norm", "window:tokens=50"],
                 text=sys.argv[1], calibration_text=sys.argv[4], out=sys.argv[2])
    print("finished")
""")


def test_kill_in_the_middle_and_run_again(text, unseen, tmp_path):
    """SIGKILL again and again: the sweep goes on from its snapshots, and ends with what one quiet run gives."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, text, str(out), os.path.dirname(evaluated.__file__), unseen]
    killed = 0

    def made() -> set:
        return {(p.name, p.stat().st_mtime_ns) for p in [*out.glob("cells/*.json"), *out.glob("snapshots/[!.]*")]}

    cells = set()
    for attempt in range(60):
        before = made()
        finished = [p for p in out.glob("cells/*.json") if '"nats_per_token"' in p.read_text()]
        cells |= {(p.name, p.stat().st_mtime_ns) for p in finished}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        while process.poll() is None:
            with contextlib.suppress(FileNotFoundError):  # a snapshot that was replaced in between
                present = made()
            if present - before and attempt < 4:
                time.sleep(0.05 * (attempt + 1))
                process.send_signal(signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.01)
        stdout, _ = process.communicate()
        if "finished" in (stdout or ""):
            break
    assert killed and "finished" in stdout
    assert cells <= made(), "a finished cell was written again"
    assert not [p for p in out.glob("snapshots/*") if not p.name.startswith(".")]
    assert len(list(out.glob("cells/*.json"))) == 3 * 3 * 2 + 3  # remedies, lengths, both units; peaks
    quiet = evaluate(
        make_model(),
        [64, 512, 3000],
        ["lm:slices=1,tokens=0"],
        ["none", "state-norm", "window:tokens=50"],
        text=text,
        calibration_text=unseen,
    )
    resumed = Results.read(out)
    for mitigation in ("none", "state-norm", "window:tokens=50"):
        for length in (64, 512, 3000):
            a, b = value(quiet, length, mitigation=mitigation), value(resumed, length, mitigation=mitigation)
            assert a.value == pytest.approx(b.value, abs=1e-5)


def test_a_kill_between_the_cells_of_a_length_loses_none(model, text, tmp_path):
    """Whatever cell was the last one written, the next run completes the rest, without reading a finished stream."""
    asked, task = [64, 512, 1000], LossOverLength(slices=1, tokens=0)
    for written in range(1, 7):
        results = Results(tmp_path / str(written))
        read = []

        def context(results=results, read=read):
            return Measuring(model, text=text, results=results, segment=100, snapshot_seconds=0.0, progress=read.append)

        rows = task.run(context(), asked)
        for _ in range(written):
            next(rows)
        rows.close()
        assert read.count(100) == 10
        list(task.run(context(), asked))
        assert read.count(100) == 10, "the stream was read again"
        found = {(row["length"], row["metric"]) for row in results.rows()}
        assert found == {(n, m) for n in asked for m in ("nats_per_token", "nats_per_byte")} | {
            (64, "nats_per_token_peak")
        }
        assert not list((tmp_path / str(written) / "snapshots").iterdir())


def test_another_training_length_moves_the_verdict_and_keeps_the_cells(model, text, tmp_path):
    settings = {"text": text, "out": str(tmp_path / "r")}
    first = evaluate(model, [128, 256], ["lm:slices=2,tokens=0"], **settings)
    model.train_length = 128
    second = evaluate(model, [128, 256], ["lm:slices=2,tokens=0"], **settings)
    assert set(first.train_length) == {64} and set(second.train_length) == {128}
    assert set(second[second.metric == "nats_per_token_peak"].length) == {64, 128}
    (sheet,) = sheets(second)
    assert sheet.train_length == 128
    assert sheet.peaks["none"] == value(second, 128, "nats_per_token_peak").value


def test_a_stream_goes_on_from_its_snapshot_and_torn_ones_are_ignored(model, text, tmp_path):
    results = Results(tmp_path / "out")
    task = LossOverLength(slices=1, tokens=0)
    read = []

    class Stop(Exception):
        pass

    def stop(tokens):
        read.append(tokens)
        if sum(read) > 500:
            raise Stop

    def context(progress):
        return Measuring(model, text=text, results=results, segment=100, snapshot_seconds=0.0, progress=progress)

    with pytest.raises(Stop):
        list(task.run(context(stop), [1000]))
    (snapshot,) = (tmp_path / "out" / "snapshots").iterdir()
    assert Cache.load(snapshot).position.tolist() == [500]
    read.clear()
    rows = list(task.run(context(read.append), [1000]))
    assert read[0] == 500 and sum(read) == 1000 and not snapshot.exists()
    expected = list(task.run(Measuring(model, text=text), [1000]))
    assert rows[0]["value"] == pytest.approx(expected[0]["value"], abs=1e-6)

    for cell in (tmp_path / "out" / "cells").iterdir():
        cell.unlink()
    snapshot.write_bytes(b"torn")
    read.clear()
    rows = list(task.run(context(read.append), [1000]))
    assert read[0] == 0 and rows[0]["value"] == pytest.approx(expected[0]["value"], abs=1e-6)


def test_a_snapshot_of_fewer_lengths_has_no_losses_of_the_others(model, text, tmp_path):
    """128 is measured between two lengths whose marks are its own, and whose stream left its losses out."""

    class Stop(Exception):
        pass

    def stop(tokens):
        read.append(tokens)
        if sum(read) >= 400:
            raise Stop

    def context(progress):
        results = Results(tmp_path / "out")
        return Measuring(model, text=text, results=results, segment=50, snapshot_seconds=0.0, progress=progress)

    read, task, asked = [], LossOverLength(slices=1, tokens=0), [64, 128, 256, 512]
    with pytest.raises(Stop):
        list(task.run(context(stop), [64, 256, 512]))
    read.clear()
    resumed = list(task.run(context(read.append), asked))
    assert read[0] == 0 and sum(read) == 512
    quiet = list(task.run(Measuring(model, text=text), asked))
    assert [row["value"] for row in resumed] == pytest.approx([row["value"] for row in quiet], abs=1e-6)
