"""A monitor on tiny models: what it says of heads that never forget and of an input that changed; its files."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from monitored import (
    EVERY,
    FORGET,
    FORGET_NOT,
    LENGTH,
    RRI,
    calibrated,
    first,
    ids_of,
    model,
    text,
    watched,
)  # fmt: skip

import rnn_longctx
from rnn_longctx import CollapseMonitor, mitigate
from rnn_longctx.data import ByteTokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.probes.monitor.inputs import PASSAGE
from rnn_longctx.probes.monitor.judge import History


@pytest.mark.parametrize("rows", [1, 3])
def test_heads_that_never_forget(rows):
    lm = model()
    reports = watched(lm, calibrated(lm), ids_of(rows=rows))
    assert [r.position for r in reports] == list(range(EVERY, 1025, EVERY))
    assert all(r.status == "ok" for r in reports if r.position <= LENGTH)
    assert LENGTH < first(reports, "warning") < first(reports) < 1024
    last = reports[-1]
    assert last.status == "collapsed" and last.outside > 6 and last.worst >= last.heads[0][2] > 4
    assert {(layer, head) for layer, head, _ in last.heads} <= {(i, j) for i in range(3) for j in range(4)}


def test_ratios_are_norms_over_the_envelope():
    lm, ids = model(), ids_of(length=200)
    monitor = calibrated(lm)
    monitor.margins = [[float(v) for v in torch.rand(4) * 3 + 0.5] for _ in range(3)]
    report = watched(lm, monitor, ids)[-1]
    cache, logs = lm.new_cache(), []
    with torch.no_grad():
        for part in ids[:, :192].split(EVERY, 1):
            lm(part, cache)
            logs.append(torch.stack([c.scan.state[0].flatten(1).norm(dim=1) for c in cache.layers]).log())
    ratio = torch.stack(logs[-4:]).mean(0).exp() / torch.tensor(monitor.norms)
    outside = ratio > torch.tensor(monitor.margins)
    assert report.outside == int(outside.sum()) == len(report.heads) > 0
    for layer, head, value in report.heads:
        assert value == pytest.approx(float(ratio[layer, head]), rel=1e-4) and outside[layer, head]
    values = [value for *_, value in report.heads]
    assert values == sorted(values, reverse=True) and report.worst == values[0]
    layer, head, value = report.heads[0]
    heads = "1 head outside its" if report.outside == 1 else f"{report.outside} heads outside their"
    assert f"{heads} margins (layer {layer} head {head} at {value:.3g} times)" in str(report)


def test_healthy_heads_raise_no_alarm():
    """Heads never; of an input like the calibration's, a look in a thousand may lie beyond the limit of its shift."""
    lm = model(FORGET)
    statuses = [r.status for r in watched(lm, calibrated(lm), ids_of(length=30_000, rows=2))]
    assert set(statuses) <= {"ok", "drift"} and statuses.count("drift") < 0.01 * len(statuses)


@pytest.mark.parametrize("layer", [0, 2])
def test_a_state_that_is_not_finite(layer):
    lm, ids = model(FORGET), ids_of(length=96)
    cache, monitor = lm.new_cache(), calibrated(lm)
    with torch.no_grad(), monitor.on(lm, lambda report: None) as watch:
        lm(ids[:, :40], cache)
        lm.mixers[layer].in_proj.weight[64, 0] = torch.nan  # of the inputs x; before it are those of z
        lm(ids[:, 40:], cache)
    assert [r.status for r in watch.reports] == ["ok", "ok"] + ["collapsed"] * 4
    assert watch.reports[2].position == 48 and math.isinf(watch.reports[2].worst)
    assert watch.reports[2].heads[0][2] == math.inf and (layer == 0 or watch.reports[2].heads[0][0] == 2)


def lettered(A_init=FORGET):
    """A model that takes smaller steps for control characters than for letters."""
    lm = model(A_init)
    with torch.no_grad():
        rows = lm.mixers[0].in_proj.weight[-lm.mixers[0].heads :]
        lm.backbone.embedding.weight[:32] -= 0.2 * rows.sum(0) / rows.sum(0).norm()
    return lm


def test_another_input_is_drift():
    lm = lettered()
    monitor = calibrated(lm)
    assert {r.status for r in watched(lm, monitor, ids_of(length=2000))} == {"ok"}
    reports = watched(lm, monitor, torch.cat([ids_of(length=512), ids_of(0, 32, 512)], 1))
    assert all(r.status == "ok" and r.shift < 1 for r in reports if r.position <= 512)
    assert all(r.status == "drift" and r.shift > 1 for r in reports if r.position >= 512 + 4 * EVERY)


def test_a_small_change_that_lasts_is_drift():
    """Too small for a few looks; a passage of them lies far from all that were calibrated on."""
    monitor = calibrated(lettered())
    norm, mean, std = (torch.tensor(v).double().flatten() for v in (monitor.norms, monitor.gate_mean, monitor.gate_std))
    moved, history, looks = mean + 0.9 * monitor.gate_limits[-1] * std, History(), []
    for i in range(PASSAGE):
        history.add(EVERY * (i + 1), norm[None], moved.exp()[None])
        looks.append(monitor.judge(EVERY * (i + 1), history))
    assert all(r.status == "ok" and r.shift < 1 for r in looks[:-1])
    assert looks[-1].status == "drift"
    known = dataclasses.replace(monitor, passages=[*monitor.passages, moved.tolist()])
    assert known.judge(EVERY * PASSAGE, history).status == "ok"


def test_no_state_moves_the_shift_and_a_gross_one_is_a_collapse_under_it():
    lm, ids = lettered(FORGET_NOT), ids_of(0, 32, 6000)
    monitor = calibrated(lm)
    reports = watched(lm, monitor, ids)
    assert [r.status for r in reports][4] == "drift" and reports[-1].status == "collapsed" and reports[-1].shift > 1
    with mitigate(lm, "rri:alpha=1,beta=0.01"):
        again = watched(lm, monitor, ids)
    assert {r.status for r in again[4:]} == {"drift"}
    assert [r.shift for r in again] == pytest.approx([r.shift for r in reports], rel=1e-3)
    with mitigate(lm, RRI):  # whose rate leaves nothing of these heads' in float32
        assert {r.shift for r in watched(lm, monitor, ids)} == {None}
    after = watched(lm, monitor, torch.cat([ids_of(length=512), ids], 1))
    assert all(r.status == "collapsed" for r in after if r.position >= 512)  # what was one before is no drift


def test_recalibration_is_bounded_and_undone(lost):
    lm, monitor, ids, position = lost
    before, norms = copy.deepcopy(monitor), torch.tensor(monitor.norms)
    with torch.no_grad(), monitor.on(lm, lambda report: None) as watch:
        lm(ids)
        for _ in range(3):
            monitor.recalibrate(lm, watch)
        with pytest.raises(InputError, match="being watched"):
            monitor.recalibrate(lm, text())
    moved = torch.tensor(monitor.norms)
    assert (moved <= 2.001 * norms).all() and (moved > 1.9 * norms).any() and (moved >= norms).all()
    assert first(watched(lm, monitor, ids)) > position
    for _ in range(3):
        monitor.undo()
    assert monitor == before
    with pytest.raises(InputError, match="nothing to undo"):
        monitor.undo()

    lm = lettered()
    monitor, other = calibrated(lm), ids_of(0, 32, 1024)
    monitor.recalibrate(lm, text(0, 32))
    assert {r.status for r in watched(lm, monitor, other)} == {"ok"}
    monitor.undo()
    assert watched(lm, monitor, other)[-1].status == "drift"


def test_texts_by_name_and_lengths_as_elsewhere(tmp_path):
    lm, source = lettered(), text(0, 32)
    (tmp_path / "other.txt").write_bytes(source.data)
    monitors = [CollapseMonitor.calibrated(lm, t, "64", every=EVERY)
                for t in (tmp_path / "other.txt", str(tmp_path / "other.txt"))]  # fmt: skip
    assert monitors[0] == monitors[1] and monitors[0].length == 64
    monitor = calibrated(lm)
    monitor.recalibrate(lm, tmp_path / "other.txt")
    assert monitor.gate_mean == monitors[0].gate_mean


# --- files


def test_saved_and_loaded(tmp_path):
    lm, ids = model(), ids_of()
    monitor = calibrated(lm)
    monitor.save(tmp_path / "monitor.json")
    again = CollapseMonitor.load(tmp_path / "monitor.json", lm)
    assert again == monitor and watched(lm, again, ids) == watched(lm, monitor, ids)
    other = model()
    with pytest.raises(InputError, match="not of tiny"):
        CollapseMonitor.load(tmp_path / "monitor.json", other)
    with pytest.raises(InputError, match="not of tiny"), monitor.on(other):
        pass
    with pytest.raises(InputError, match=r"nothing\.json: no such file$"):
        CollapseMonitor.load(tmp_path / "nothing.json", lm)
    with pytest.raises(InputError, match="cannot write"):
        monitor.save(tmp_path / "none" / "monitor.json")
    one_too_many = (tmp_path / "monitor.json").read_text().replace('"gate_mean": [', '"gate_mean": [1.0, ')
    for wrong in ("{", "[]", "{}", json.dumps({"kind": "collapse monitor", "version": 1}), one_too_many):
        (tmp_path / "wrong.json").write_text(wrong)
        with pytest.raises(InputError, match="not a saved monitor"):
            CollapseMonitor.load(tmp_path / "wrong.json", lm)


def test_the_log_and_the_metrics(lost, tmp_path):
    lm, monitor, ids, _ = lost
    log, metrics = tmp_path / "log.jsonl", tmp_path / "metrics.prom"
    with torch.no_grad(), monitor.on(lm, f"mitigate:{RRI}", log=log, prometheus=metrics) as watch:
        assert "rnn_longctx_monitor_position 0\n" in metrics.read_text()
        lm(ids)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["position"] for line in lines] == [r.position for r in watch.reports]
    assert [line["status"] for line in lines] == [r.status for r in watch.reports]
    assert all(set(line) == {"time", "position", "status", "heads", "outside", "worst", "shift", "action"}
               for line in lines)  # fmt: skip
    numbers = json.dumps(ids[0].tolist())[1:-1]
    assert ByteTokenizer().decode(ids[0, :16].tolist()) not in log.read_text() and numbers[:40] not in log.read_text()
    values = dict(line.split() for line in metrics.read_text().splitlines() if not line.startswith("#"))
    assert values["rnn_longctx_monitor_position"] == "1024"
    assert int(values["rnn_longctx_monitor_status"]) == ("ok", "warning", "drift", "collapsed").index(watch.status)
    assert float(values["rnn_longctx_monitor_worst_ratio"]) == pytest.approx(watch.reports[-1].worst, rel=1e-4)
    assert int(values["rnn_longctx_monitor_warnings_total"]) >= 2
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


# --- bad input


@pytest.mark.parametrize(
    "action, message",
    [("wran", 'did you mean "warn"'), ("mitigate:", "unknown action"), ("mitigate:nothing-like-it", "mitigation"),
     ("mitigate:window:tokens=32", "mid-stream"), ("rollback:recompute:last=32", "mid-stream"),
     ("mitigate:noise-start:std=0.1", "mid-stream"), ("fallback", "unknown action"), ("fallback:more", "unknown")],
)  # fmt: skip
def test_actions_that_are_not(action, message):
    lm = model(FORGET)
    with pytest.raises(InputError, match=message), calibrated(lm).on(lm, action):
        pass
    assert all(m.observer is None for m in lm.mixers) and rnn_longctx.mitigations.active(lm)[0] == "none"


def test_bad_input(tmp_path):
    lm = model(FORGET)
    monitor = calibrated(lm)
    with pytest.raises(InputError, match="goes with the action"), monitor.on(lm, fallback=lambda report, ids: None):
        pass
    for name in ("log", "prometheus"):
        with pytest.raises(InputError, match="cannot write"), monitor.on(lm, **{name: tmp_path / "none" / "file"}):
            pass
    with mitigate(lm, "recompute:last=32"), pytest.raises(InputError, match="control"), monitor.on(lm):
        pass
    with monitor.on(lm), pytest.raises(InputError, match="watched already"), monitor.on(lm):
        pass
    with monitor.on(lm) as watch, pytest.raises(InputError, match="nothing was seen"):
        monitor.recalibrate(lm, watch)
    with monitor.on(lm, "fallback:truncate"), torch.no_grad(), pytest.raises(InputError, match="one position"):
        lm(ids_of(rows=2, length=10), mask=torch.tensor([[False] * 3 + [True] * 7, [True] * 10]))
    with pytest.raises(InputError, match="every is a positive whole number"):
        CollapseMonitor.calibrated(lm, text(), every=0)
    sick = model(FORGET)
    with torch.no_grad():
        sick.mixers[1].in_proj.weight[64, 0] = torch.nan
    with pytest.raises(InputError, match=r"not finite within 64 tokens \(first in layer 1\)"):
        calibrated(sick)
    lm.train_length = None
    with pytest.raises(InputError, match="training length"):
        CollapseMonitor.calibrated(lm, text())
