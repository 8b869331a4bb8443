"""What a model of rows says, how that is scored, and what online updates keep."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from rnn_longctx.errors import InputError
from rnn_longctx.probes.links import held
from rnn_longctx.sensors.adapt import AdaptConfig, adapt
from rnn_longctx.sensors.explain import alarm_links, in_words
from rnn_longctx.sensors.fit import FitConfig, Run, Updates, fit, last_seen, parts, rows_of_log
from rnn_longctx.sensors.model import BINS, Scales, SensorConfig, SensorModel, for_sensors
from rnn_longctx.sensors.plants import SENSORS, Plant, make_plant
from rnn_longctx.sensors.read import Log, labels
from rnn_longctx.sensors.score import (
    average_precision,
    clock_shift,
    events_caught,
    read_rows,
    since_event,
    threshold_at,
)

NAMES = list(SENSORS)
MIXERS = ("two-stage", "full-attention", "gla:heads=2")


def made_log(rows=1500, **more):
    made = make_plant(Plant(rows=rows, longest=100, seed=int(np.random.default_rng().integers(2**31)), **more))
    times, events = (x.astype("datetime64[ns, UTC]").astype("int64").to_numpy() for x in (made.log.t, made.events.t))
    log = Log("made", times, made.log[NAMES].to_numpy(), NAMES, True)
    return log, labels(log, events, Plant.warning), made


def fresh(log, mixer="two-stage", **more):
    config = SensorConfig(NAMES, [for_sensors(mixer)], d_model=32, **more)
    return SensorModel(config, Scales.of(log.values)).eval()


@pytest.fixture(scope="module")
def log():
    return made_log(missing=0.1)[0]


@pytest.mark.parametrize("mixer", MIXERS)
def test_any_cut_of_a_stream_reads_the_same_and_the_future_is_not_seen(log, mixer):
    model = fresh(log, mixer).double()
    torch.nn.init.normal_(model.alarm.weight)
    rows = rows_of_log(model.scales, log)[:300].double()
    whole = read_rows(model, rows, segment=300).logits
    np.testing.assert_allclose(read_rows(model, rows, segment=37).logits, whole, atol=1e-9)
    rows[200:] = torch.nan
    rows[200:, -1] = 3
    changed = read_rows(model, rows, segment=300).logits
    assert np.abs(changed[:200] - whole[:200]).max() < 1e-9 < np.abs(changed[200:] - whole[200:]).max()


def test_a_fresh_model_is_the_persistence_forecast(log):
    model = fresh(log)
    table = read_rows(model, rows_of_log(model.scales, log), first=100).errors
    np.testing.assert_allclose(table["model"], table["persistence"], rtol=1e-5)
    values = model.scales.standard(log.values).astype(float)
    kept = pd.DataFrame(values).ffill().fillna(0).to_numpy()
    for row in table.itertuples():
        s, true = NAMES.index(row.sensor), values[100 + row.horizon :, NAMES.index(row.sensor)]
        assert row.n == (~np.isnan(true)).sum()
        assert row.persistence == pytest.approx(np.nanmean(np.abs(true - kept[100 : -row.horizon, s])), rel=1e-5)
        assert row.median == pytest.approx(np.nanmean(np.abs(true)), rel=1e-5)


def test_the_last_value_seen():
    nan = math.nan
    values = torch.tensor([[[nan, 1.0], [2.0, nan], [nan, nan], [4.0, 5.0]]])
    assert last_seen(values).tolist() == [[[0.0, 1.0], [2.0, 1.0], [2.0, 1.0], [4.0, 5.0]]]


def test_scales_give_few_values_a_bin_each():
    rng = np.random.default_rng()
    values = np.stack([rng.integers(0, BINS, 5000).astype(float), rng.normal(50, 7, 5000)], 1)
    scales = Scales.of(values)
    bins = np.searchsorted(scales.edges[0], values[:, 0])
    assert (bins == values[:, 0]).all()
    counts = np.bincount(np.searchsorted(scales.edges[1], values[:, 1]))
    assert len(counts) == BINS and counts.min() > 0.9 * 5000 / BINS - 1
    standard = scales.standard(values)
    assert abs(np.median(standard[:, 1])) < 1e-6 and standard[:, 1].std() == pytest.approx(1, abs=0.1)


def test_a_fresh_layer_compares_bins_and_not_what_the_linear_map_adds(log):
    model = fresh(log)
    mixer, linear = model.lm.layers[1].mixer, model.lm.backbone.embedding.linear
    queries, keys, _ = mixer.in_proj.weight.chunk(3)
    assert torch.equal(queries, keys) and queries.norm() > 1
    torch.testing.assert_close(queries @ linear.weight, torch.zeros(32, 6), atol=1e-5, rtol=0)


def test_a_fresh_layer_reads_a_lot_where_its_number_stood_and_not_its_own_neighbours():
    log, _, made = made_log(6000)
    model = fresh(log)
    rows = rows_of_log(model.scales, log)
    truth = made.truth[made.truth.dip > 128]
    ends = [int(dip) + 7 for dip in truth.dip]
    seen = []
    model.lm.layers[1].mixer.register_forward_pre_hook(lambda mixer, args: seen.append(args[0]))
    with torch.no_grad():
        model(torch.stack([rows[end - 128 : end] for end in ends]))
        queries, keys, _ = model.lm.layers[1].mixer.in_proj(seen[0]).chunk(3, -1)
        weights = (queries[:, -1:] @ keys.transpose(1, 2) / 32**0.5).softmax(-1)[:, 0]
    strikes = [end - int(strike) for end, strike in zip(ends, truth.strike)]
    read = np.mean([float(row[128 - ago : 140 - ago].sum()) for row, ago in zip(weights, strikes)])
    assert read > 3 * 12 / 128
    number = dict(zip(NAMES, model.scales.few))
    assert number == {"temp": False, "vib": False, "press": False, "lot_a": True, "lot_b": True}


def test_what_is_read_is_learned_before_where_to_read(log):
    model = fresh(log, "full-attention")
    rows, before = rows_of_log(model.scales, log), torch.zeros(len(log.times))
    before[::7] = 1
    updates = Updates(model, 0.1, 0, total=8)  # (the first of them leaves heads alone that are not zero)
    mixer = model.lm.layers[1].mixer

    def moved():
        start = mixer.in_proj.weight.detach().clone()
        updates.step([(rows, before, 4)], 64)
        change = (mixer.in_proj.weight.detach() - start).abs()
        return [float(part.max()) for part in change.chunk(3)]

    moved()
    queries, keys, values = moved()
    assert max(queries, keys) < 1e-4 < values  # (what is left of it is the decay of weights)
    queries, keys, values = moved()
    assert min(queries, keys, values) > 1e-4


def test_stages_of_the_usual_schedule_that_are_longer_than_the_log_are_left_out(monkeypatch):
    log, before, _ = made_log(1500)
    before[400:405] = True  # so short a log may have no failure in what is fitted to
    said = []
    monkeypatch.setattr(FitConfig, "schedule", "128:1,512:1,8192:1")
    fit(
        log,
        before,
        SensorConfig(NAMES, [for_sensors("two-stage")], d_model=32),
        FitConfig("128:1,512:1,8192:1"),
        said.append,
    )
    assert said[0] == "windows of 8192 are longer than the log, and left out"
    assert [line.split(":")[0] for line in said[2:]] == ["windows of 128", "windows of 512"]
    with pytest.raises(InputError, match="windows of 4096 rows"):
        fit(log, before, SensorConfig(NAMES, [for_sensors("two-stage")], d_model=32), FitConfig("128:1,4096:1"))


def test_average_precision_is_its_definition():
    rng = np.random.default_rng()
    scores, true = rng.integers(0, 8, 60).astype(float), rng.random(60) < 0.3
    true[0] = True
    levels = np.unique(scores)[::-1]
    recalls = [0.0, *((true & (scores >= x)).sum() / true.sum() for x in levels)]
    precisions = [true[scores >= x].mean() for x in levels]
    expected = sum(p * (b - a) for p, a, b in zip(precisions, recalls, recalls[1:]))
    assert average_precision(scores, true) == pytest.approx(expected)
    assert average_precision(true.astype(float), true) == 1
    assert average_precision(np.zeros(60), true) == pytest.approx(true.mean())
    assert math.isnan(average_precision(scores, np.zeros(60, bool)))


def test_thresholds_and_lead_times():
    rng = np.random.default_rng()
    scores, true = rng.normal(size=5000), rng.random(5000) < 0.1
    threshold = threshold_at(scores, true, 0.01)
    assert 0.008 < (scores[~true] > threshold).mean() <= 0.01
    with pytest.raises(InputError, match="no threshold"):
        threshold_at(scores, np.ones(5000, bool))
    times = np.arange(100) * 60 * 10**9
    above = np.zeros(100)
    above[[3, 40, 46, 47]] = 1
    events = times[[10, 50, 80]]
    caught = events_caught(above, times, events, 5 * 60, 0.5)
    assert caught["caught"].tolist() == [False, True, False] and caught["lead"][1] == 4 * 60
    assert since_event(times, events)[[9, 10, 12]].tolist() == [3.15e9, 0, 120]


def test_clocks_that_differ_are_seen_by_alarms():
    rng = np.random.default_rng()
    times = np.arange(5000) * 60 * 10**9
    rows = np.sort(rng.choice(np.arange(200, 4800), 40, replace=False))
    logits = np.full(5000, -6.0)
    for row in rows:
        logits[row - 12 : row] = 6
    for shift in (-3600, 0, 7200):
        assert clock_shift(logits, times, times[rows] + shift * 10**9, 720, 60, 14_400) == shift
    assert clock_shift(logits, times, times[rows[:4]] + 3600 * 10**9, 720, 60) == 0
    assert clock_shift(np.full(5000, -6.0), times, times[rows], 720, 60) == 0


def test_a_plant_is_what_it_says():
    _, before, made = made_log(4000)
    truth, values = made.truth, made.log
    assert len(truth) > 15 and (truth.dip - truth.strike == truth.lag).all() and truth.lag.between(32, 100).all()
    for row in truth.itertuples():
        lots = values.loc[[row.strike, row.dip], ["lot_a", "lot_b"]].to_numpy()
        assert (lots[0] == lots[1]).all() and before[row.dip : row.dip + 12].all() == row.damaged
        assert (values.press[row.strike : row.strike + 12].mean() > 12) == row.damaged
    assert before.sum() == 12 * truth.damaged.sum()
    again = make_plant(Plant(rows=4000, longest=100, seed=7))
    pd.testing.assert_frame_equal(again.log, make_plant(Plant(rows=4000, longest=100, seed=7)).log)
    with pytest.raises(InputError, match="at least twice the longest lag"):
        Plant(rows=100, longest=90)


def test_fitting_learns_what_a_window_holds_and_a_run_is_kept(tmp_path):
    log, before, _ = made_log(12000)  # of fewer rows the held-out ones have too few failures to tell
    config = SensorConfig(NAMES, [for_sensors("two-stage")], d_model=32)
    model = fit(log, before, config, FitConfig("64:120", lr=3e-3))
    rows = rows_of_log(model.scales, log)
    held_out = parts(len(log.times))[2]
    logits = read_rows(model, rows).logits
    assert average_precision(logits[held_out], before[held_out]) > 3 * before[held_out].mean()
    Run(model, 1.5, {"log": "x"}).save(tmp_path / "run")
    again = Run.load(tmp_path / "run")
    assert again.threshold == 1.5 and again.source == {"log": "x"}
    assert (read_rows(again.model, rows).logits == logits).all()


def test_links_are_said_in_words_of_the_log():
    log, _, made = made_log()
    model = fresh(log)
    row = made.truth.iloc[-1]
    table = alarm_links(model, log, [int(row.dip)])
    assert set(table["kind"]) == {"chosen"} and len(held(table, {int(row.dip): (int(row.strike),)})) == 1
    links = in_words(model, log, int(row.dip), table)
    assert len(links) == 3
    for link in links:
        assert log.times[row.dip] - link["lag_seconds"] * 10**9 in log.times and link["lag_rows"] > 0
        assert all(abs(one["deviations"]) >= 3 and one["sensor"] in NAMES for one in link["sensors"])
    around = table.assign(start=row.strike, stop=row.strike + 4).head(1)
    stands_out = {one["sensor"] for one in in_words(model, log, int(row.dip), around)[0]["sensors"]}
    assert {"vib", "press"} <= stands_out
    assert alarm_links(fresh(log, "full-attention"), log, [9]) is None


@pytest.mark.parametrize("lr", [1e-3, 1e30])
def test_an_update_is_kept_or_undone(lr):
    log = made_log(2000)[0]
    model, before = fresh(log), np.arange(2000) % 24 < 12  # both kinds of rows wherever it is measured
    rows, weights = rows_of_log(model.scales, log), {k: v.clone() for k, v in model.state_dict().items()}
    config = AdaptConfig(rows=600, context=100, window=64, passes=2, lr=lr)
    followed = adapt(model, (rows, before), (rows, before), config)
    assert len(followed.logits) == 2000 and (followed.logits[:600] == 0).all()  # scored before anything was learned
    decisions = set(followed.decisions["decision"])
    same = all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    if lr > 1:
        assert decisions == {"refused"} and same
    else:
        assert "kept" in decisions and not same
    with pytest.raises(InputError, match="needs more rows"):
        adapt(model, (rows[:100], before[:100]), (rows, before), config)
