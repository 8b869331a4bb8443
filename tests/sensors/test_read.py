"""Damaged copies of one log: each is read as the log it is a copy of, and says what was repaired, or is refused."""

import numpy as np
import pandas as pd
import pytest

from rnn_longctx.errors import InputError
from rnn_longctx.sensors.model import Scales
from rnn_longctx.sensors.plants import SENSORS, Plant, make_plant
from rnn_longctx.sensors.read import labels, read_events, read_log
from rnn_longctx.sensors.units import in_known_units

NAMES = list(SENSORS)


@pytest.fixture(scope="module")
def made():
    return make_plant(Plant(rows=3000, longest=200, seed=int(np.random.default_rng().integers(2**31))))


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    return read(made.log, tmp_path_factory.mktemp("whole"))


def read(frame, folder, name="log.parquet", sensors=NAMES):
    path = folder / name
    frame.to_parquet(path, index=False) if path.suffix == ".parquet" else frame.to_csv(path, index=False)
    return read_log(path, "t", sensors)


def same(log, whole):
    assert (log.times == whole.times).all()
    np.testing.assert_allclose(log.values, whole.values, rtol=1e-12)


def test_a_whole_log_needs_no_repair(made, whole, tmp_path):
    assert not whole.repairs and whole.step == 60 and (whole.elapsed == 1).all()
    log = read(made.log, tmp_path, "log.csv")
    assert not log.repairs
    same(log, whole)


def test_a_shuffled_copy(made, whole, tmp_path):
    log = read(made.log.sample(frac=1, random_state=0), tmp_path)
    same(log, whole)
    assert len(log.repairs) == 1 and "out of order" in log.repairs[0]


def test_rows_that_are_there_twice(made, whole, tmp_path):
    again = made.log.iloc[[5, 5, 9]].copy()
    again.iloc[2, 1] += 2
    log = read(pd.concat([made.log, again]).sort_values("t", kind="stable"), tmp_path)
    expected = whole.values.copy()
    expected[9, 0] += 1
    np.testing.assert_allclose(log.values, expected)
    assert log.repairs == ["3 rows of a time that was there before merged; in 1 of them values differ: their mean"]


def test_a_copy_in_several_zones(made, whole, tmp_path):
    zones = ["Europe/Berlin" if n % 2 else "UTC" for n in range(len(made.log))]
    text = [t.tz_convert(zone).isoformat() for t, zone in zip(made.log.t, zones)]
    log = read(made.log.assign(t=text), tmp_path, "log.csv")
    same(log, whole)
    assert any("several zones (+00:00, +01:00)" in line for line in log.repairs)


@pytest.mark.parametrize(("order", "first"), [("%d/%m/%Y %H:%M:%S", "day"), ("%m/%d/%Y %H:%M:%S", "month")])
def test_dates_that_do_not_begin_with_the_year(made, whole, tmp_path, order, first):
    """Taken as the days beyond the twelfth say; refused where there is none, or days and months begin."""
    later = made.log.t + pd.Timedelta(days=11)  # from the 12th to the 14th
    log = read(made.log.assign(t=later.dt.strftime(order)), tmp_path, "log.csv")
    assert (log.times == whole.times + 11 * 24 * 3600 * 10**9).all()
    assert sum(f"taken as {first} first" in line for line in log.repairs) == 1
    with pytest.raises(InputError, match="do not say whether day or month comes first; write them as 2026-01-31"):
        read(made.log.assign(t=made.log.t.dt.strftime(order)), tmp_path, "unsaid.csv")
    mixed = later.dt.strftime(order).where(later.dt.day < 14, later.dt.strftime("%m/%d/%Y %H:%M:%S"))
    mixed = mixed.where(later.dt.day > 12, later.dt.strftime("13/01/2026 %H:%M:%S"))
    if first == "day":
        with pytest.raises(InputError, match="some begin with the day and some with the month"):
            read(made.log.assign(t=mixed), tmp_path, "mixed.csv")


@pytest.mark.parametrize("restored", [False, True])
def test_a_clock_that_was_set_back(made, whole, tmp_path, restored):
    times = made.log.t.copy()
    times[1000 : 2000 if restored else None] -= pd.Timedelta(hours=1)
    log = read(made.log.assign(t=times), tmp_path)
    same(log, whole)
    rows = 1000 if restored else 2000
    assert len(log.repairs) == 1 and f"set back by 3600 s at 2026-01-01 16:39: {rows} rows" in log.repairs[0]


def test_missing_values_and_missing_rows_are_kept_as_such(made, whole, tmp_path):
    rng = np.random.default_rng()
    lost = rng.random(made.log[NAMES].shape) < 0.2
    log = read(made.log.assign(**{n: made.log[n].mask(lost[:, i]) for i, n in enumerate(NAMES)}), tmp_path)
    there = ~lost.all(1)
    assert (np.isnan(log.values) == lost).all() and not log.repairs
    assert sum("are missing: kept as a mask" in line for line in log.notes) == len(NAMES) and there.any()
    gone = rng.random(3000) < 0.2
    gone[[0, -1]] = False
    log = read(made.log[~gone], tmp_path)
    assert (log.times == whole.times[~gone]).all() and "kept as elapsed time" in log.notes[0]
    assert log.elapsed.sum() == pytest.approx(3000)


def test_sensors_that_write_rows_of_their_own(made, whole, tmp_path):
    late = made.log.assign(t=made.log.t + pd.Timedelta(seconds=7))
    late[["temp", "vib"]] = np.nan
    early = made.log.copy()
    early[["press", "lot_a", "lot_b"]] = np.nan
    log = read(pd.concat([early, late]).sort_values("t"), tmp_path)
    same(log, whole)
    assert "3000 rows of sensors that write rows of their own joined" in log.repairs[0]


def test_what_is_no_number(made, tmp_path):
    frame = made.log.astype({"temp": object})
    frame.loc[[3, 4], "temp"] = ["bad", "inf"]
    log = read(frame, tmp_path, "log.csv")
    assert np.isnan(log.values[[3, 4], 0]).all() and "temp: 2 values no finite number" in log.repairs[0]


def test_a_drift_and_outliers_are_noted_and_left(made, tmp_path):
    frame = made.log.copy()
    frame["temp"] += np.linspace(0, 30, len(frame))
    frame.loc[7, "vib"] = 1e6
    log = read(frame, tmp_path)
    assert not log.repairs and log.values[7, 1] == 1e6
    assert any(line.startswith("temp: drift") for line in log.notes)
    assert any(line.startswith("vib: 1 outlier") for line in log.notes)


@pytest.mark.parametrize(
    ("sensor", "factor", "shift", "text"),
    [
        ("temp", 1.8, 32, "degrees F"),
        ("temp", 1, 273.15, "kelvin"),
        ("press", 14.503774, 0, "psi"),
        ("vib", 1 / 25.4, 0, "in/s"),
    ],
)
def test_a_copy_in_another_unit(made, whole, tmp_path, sensor, factor, shift, text):
    log = read(made.log.assign(**{sensor: made.log[sensor] * factor + shift}), tmp_path)
    back = in_known_units(log, Scales.of(whole.values))
    np.testing.assert_allclose(back.values, whole.values, rtol=1e-6)
    assert len(back.repairs) == 1 and back.repairs[0].startswith(f"{sensor}: {text}")


def test_a_unit_that_nobody_knows_is_refused_and_a_drift_is_not(made, whole, tmp_path):
    scales = Scales.of(whole.values)
    with pytest.raises(InputError, match="no change of unit known here explains it"):
        in_known_units(read(made.log.assign(temp=made.log.temp * 7 + 900), tmp_path), scales)
    drifted = read(made.log.assign(temp=made.log.temp + 20), tmp_path)
    assert not in_known_units(drifted, scales).repairs


def test_events(made, whole, tmp_path):
    made.events.to_csv(tmp_path / "events.csv", index=False)
    events, repairs = read_events(tmp_path / "events.csv", "t", whole)
    before = labels(whole, events, 12)
    expected = np.zeros(3000, bool)
    for row in made.truth[made.truth.damaged].itertuples():
        expected[row.dip : row.dip + 12] = True
    assert (before == expected).all() and not repairs
    outside = pd.concat([made.events, made.events + pd.Timedelta(days=400)])
    outside.to_csv(tmp_path / "events.csv", index=False)
    again, repairs = read_events(tmp_path / "events.csv", "t", whole)
    assert (again == events).all() and f"{len(events)} events outside the log" in repairs[0]


def refused(tmp_path, text, match, sensors=("a",), time="t", name="x.csv"):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=match) as error:
        read_log(tmp_path / name, time, list(sensors))
    assert "\n" not in str(error.value)


def test_bad_input_is_one_line(tmp_path, whole, made):
    refused(tmp_path, "", "the file is empty")
    refused(tmp_path, "t,a\n", "a header and no rows")
    refused(tmp_path, "when,a\n1,2\n", "no column 't'")
    refused(tmp_path, "t,ab\n1,2\n", "no column 'abc'; did you mean \"ab\"", ["abc"])
    refused(tmp_path, "t,a,a\n1,2,3\n", "there are 2 columns 'a'")
    refused(tmp_path, "t,a\n1,2\n", "'a' is named twice", ["a", "a"])
    refused(tmp_path, "t,a\n1,2\n", "'t' is the time", ["a", "t"])
    refused(tmp_path, "t,a\n1,2\n", "none is named", [])
    refused(tmp_path, "t,a\n" + "".join(f"{n},5\n" for n in range(9)), "every sensor is constant or empty")
    refused(tmp_path, "t,a\n" + "".join(f"{n},\n" for n in range(9)), "every sensor is constant or empty")
    refused(tmp_path, "t,a\n" + "".join(f"{n},on\n" for n in range(9)), "holds no numbers")
    refused(tmp_path, "t,a\nyesterday,1\ntoday,2\nnow,5\n", "times cannot be read")
    refused(tmp_path, "t,a\n2026-01-01T00:00:00Z,1\n2026-01-01T00:01:00,2\n", "1 of 2 times say their zone")
    refused(tmp_path, "t,a\n1,1\n1,2\n", "1 row of different times are no log")
    with pytest.raises(InputError, match="cannot read"):
        read_log(tmp_path / "none.csv", "t", ["a"])
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(InputError, match="cannot read"):
        read_log(tmp_path / "bad.parquet", "t", ["a"])
    for text, match in (
        ("2031-01-01T00:00:00Z", "none of its 1 event lies within"),
        ("2026-01-01T00:10:00", "do not say"),
    ):
        (tmp_path / "events.csv").write_text(f"t\n{text}\n")
        with pytest.raises(InputError, match=match):
            read_events(tmp_path / "events.csv", "t", whole)


def test_a_sensor_that_never_changes_is_left_out(made, tmp_path):
    log = read(made.log.assign(press=1.0), tmp_path)
    assert "press" not in log.sensors and log.repairs == ["left out, being constant or empty: press"]
