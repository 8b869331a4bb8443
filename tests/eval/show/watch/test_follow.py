"""A log that grows, is cut, is rotated, or ends within a line; and what is kept of it."""

from __future__ import annotations

import csv
import json
import os
import tracemalloc

import numpy as np
import pytest
from report_folders import monitor_line

from rnn_longctx.errors import InputError
from rnn_longctx.eval.show.watch.follow import LONGEST, POINTS, Follow, Points
from rnn_longctx.eval.show.watch.sources import EVENTS, MonitorSource, TrainSource, source_of


@pytest.fixture
def file(tmp_path):
    return tmp_path / "log.jsonl"


def append(file, text: str) -> None:
    with file.open("a") as f:
        f.write(text)


def test_a_line_waits_for_its_end(file):
    follow = Follow(file)
    assert not list(follow.lines()), "it is not there yet"
    append(file, "one\ntw")
    assert list(follow.lines()) == ["one"]
    assert not list(follow.lines())
    append(file, "o\n\nthree\n")
    assert list(follow.lines()) == ["two", "", "three"]
    append(file, "é")
    whole = "é\n".encode()
    with file.open("ab") as f:
        f.write(whole[:1])
    assert not list(follow.lines())
    with file.open("ab") as f:
        f.write(whole[1:])
    assert list(follow.lines()) == ["éé"]


def test_a_file_that_is_cut_or_written_anew_is_read_again(file):
    follow = Follow(file)
    append(file, "one\ntwo\n")
    assert len(list(follow.lines())) == 2
    file.write_text("new\n")  # shorter, in place
    assert list(follow.lines()) == ["new"] and follow.era == 1
    file.write_text("other, and longer\n")
    assert list(follow.lines()) == ["other, and longer"] and follow.era == 2


def test_a_rotation_loses_no_line(file):
    follow = Follow(file)
    append(file, "one\n")
    assert list(follow.lines()) == ["one"]
    append(file, "two\n")
    os.rename(file, file.with_suffix(".1"))
    assert list(follow.lines()) == ["two"], "of the old file"
    append(file.with_suffix(".1"), "three\n")
    append(file, "four\n")
    assert list(follow.lines()) == ["three", "four"] and follow.era == 0
    file.unlink()
    assert not list(follow.lines())
    append(file, "five\n")
    assert list(follow.lines()) == ["five"]


def test_a_line_without_end_takes_no_memory(file):
    follow = Follow(file)
    append(file, "x" * (20 * LONGEST))
    tracemalloc.start()
    assert not list(follow.lines())
    assert tracemalloc.get_traced_memory()[1] < 8 * LONGEST
    tracemalloc.stop()
    append(file, "x\nnext\n")
    assert list(follow.lines()) == ["next"]


def test_points_are_thinned_and_peaks_stay():
    points, rng = Points(), np.random.default_rng()
    many = 5 * POINTS
    peak = int(rng.integers(many // 4, many // 2))
    for i in range(many):
        points.add(i, (1000.0 if i == peak else float(rng.random()), None))
    assert points.count == many and len(points.kept) <= POINTS
    assert [p.x for p in points.kept] == sorted(p.x for p in points.kept)
    assert any(p.x == peak for p in points.kept), "the highest of all"
    assert [p.number for p in points.since(many - 100)] == list(range(many - 99, many + 1))
    assert points.since(many) == [] and points.since(0) == points.kept


def test_a_monitor_is_counted_report_by_report(file):
    source = MonitorSource(file)
    assert source.verdict() == ["No report yet."]
    for k in range(90):
        append(file, monitor_line(k, 90))
        if k % 7 == 0:
            source.read()
    append(file, "not json\n{}\n")
    source.read()
    assert source.points.count == 90 and source.status == "collapsed" and source.read_tokens == 90 * 256
    assert source.verdict()[1] == "Of 90 reports: 30 ok, 30 warning, 30 collapsed."
    assert [cells[:3] for _, cells in source.events] == [
        ["7,936", "warning", "warn"], ["15,616", "collapsed", "warn"]
    ]  # fmt: skip
    append(file, monitor_line(0))  # another stream
    source.read()
    assert source.status == "ok" and source.read_tokens == 91 * 256 and len(source.events) == 2
    file.write_text(monitor_line(0) + monitor_line(1))
    source.read()
    assert source.points.count == 2 and not source.events and source.follow.era == 1


def test_events_are_bounded(file):
    source = MonitorSource(file)
    append(file, "".join(monitor_line(k, 120, action="a") for _ in range(EVENTS) for k in (0, 40, 80)))
    source.read()
    assert len(source.events) == EVENTS and source.events[-1][0] == source.points.count


def test_a_training_log_is_followed_by_its_head(tmp_path):
    file = tmp_path / "log.csv"
    source = source_of(tmp_path)
    assert isinstance(source, TrainSource)
    append(file, "step,tokens,lr,loss,passkey_loss\n10,99,0.1,3.5,nan\n20,99,0.1,2.")
    source.read()
    assert source.points.count == 1 and source.points.kept[0].values[:2] == (3.5, None)
    append(file, "5,1\n30,99,0.1,2.0,1,7\n40,99,0.1,1.5,1\n")
    source.read()
    assert [p.x for p in source.points.kept] == [10, 20, 40], "a row of another width is none"
    assert source.verdict()[1].startswith("The loss is 2.500 nats per token, the mean of the last 3 rows")
    assert source.verdict()[2:] == ["1 line could not be read."]


@pytest.mark.parametrize("name, digits", [("worst", 400), ("position", 400), ("position", 20)])
def test_a_line_that_cannot_be_read_loses_no_other(file, name, digits):
    """It is passed over, and counted."""
    strange = json.dumps(json.loads(monitor_line(1)) | {name: 10**digits})
    source = MonitorSource(file)
    append(file, "".join([monitor_line(0), f"{strange}\n\nno json\n", monitor_line(1), monitor_line(2)]))
    source.read()
    assert source.points.count == 3 and source.words()[0] == "0.7 at 768, at most 0.7"
    assert source.verdict()[-1] == "2 lines could not be read."
    file.write_text("")
    source.read()
    assert source.verdict() == ["No report yet."]


def test_a_field_that_no_csv_has_loses_no_row(tmp_path, request):
    """Python's csv refuses a field of more than 131,072 characters, unless told otherwise, as training does."""
    before = csv.field_size_limit(131_072)
    request.addfinalizer(lambda: csv.field_size_limit(before))
    source = source_of(tmp_path)
    append(tmp_path / "log.csv", f"step,tokens,loss\n1,9,3.5\n2,18,{'1' * 131_073}\n3,27,2.5\n")
    source.read()
    assert [p.x for p in source.points.kept] == [1, 3] and source.verdict()[-1] == "1 line could not be read."


def test_a_ratio_that_is_not_finite_is_the_furthest(file):
    source = MonitorSource(file)
    infinite = json.dumps(json.loads(monitor_line(119)) | {"worst": None})
    append(file, monitor_line(0) + infinite + "\n")
    source.read()
    assert source.words()[0] == source.words()[3] == "not finite at 30,720, at most not finite"
    assert source.events[-1][1][4] == "not finite"


def test_an_error_in_a_line_ends_no_poll(file, monkeypatch):
    source, add = MonitorSource(file), MonitorSource.add

    def fails(self, line):
        if "fails" in line:
            raise OverflowError
        add(self, line)

    monkeypatch.setattr(MonitorSource, "add", fails)
    append(file, monitor_line(0) + "fails\n" + monitor_line(1))
    source.read()
    assert source.points.count == 2 and source.verdict()[-1] == "1 line could not be read."


def test_what_cannot_be_followed_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be followed"):
        source_of(tmp_path / "results.parquet")
