from __future__ import annotations

import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from rnn_longctx.errors import InputError
from rnn_longctx.eval.results import COLUMNS, KEY, Results, canonical_key


def row(**more):
    base = {"model": "tiny", "mitigation": "none", "task": "lm", "length": 1024, "metric": "nats_per_token"}
    return base | {"value": random.random(), "n": 2, "samples": [random.random(), random.random()]} | more


def only_cell(directory):
    (path,) = (directory / "cells").glob("*.json")
    return path


def test_a_row_comes_back_exactly_and_replaces_its_elder(tmp_path):
    store = Results(tmp_path)
    new = row(depth=0.15000000000000002, batch=np.int64(4), samples=np.float64([0.1, 1 / 3]), value=math.nan)
    assert store.get(new) is None
    store.put(row(depth=0.15000000000000002, batch=4, value=1.0))
    store.put(new)
    got = Results(tmp_path).get({k: v for k, v in new.items() if k in KEY})
    assert got is not None and set(got) == set(COLUMNS)
    assert got["samples"] == [0.1, 1 / 3] and got["depth"] == 0.15000000000000002 and got["batch"] == 4
    assert math.isnan(got["value"]) and got["seed"] is None
    assert len(store.rows()) == 1


def test_samples_none_of_which_is_a_number_come_back(tmp_path):
    store = Results(tmp_path)
    store.put(row(value=math.nan, samples=[math.nan, math.nan]))
    store.gather()
    (samples,) = Results.read(tmp_path)["samples"]
    assert len(samples) == 2 and all(map(math.isnan, samples))


@pytest.mark.parametrize("column", KEY)
def test_every_key_column_tells_cells_apart(tmp_path, column):
    store = Results(tmp_path)
    store.put(row())
    other = row() | {column: {"length": 1025, "depth": 0.0, "batch": 1, "seed": 0}.get(column, "else")}
    assert store.get(other) is None
    store.put(other)
    assert len(store.rows()) == 2 and store.get(row()) is not None and store.get(other) is not None


def test_keys_are_exact_about_numbers_and_missing_values():
    same = [row(depth=d) for d in (None, math.nan, np.nan, pd.NA)]
    assert len({canonical_key(r) for r in same}) == 1
    assert canonical_key(row(depth=0)) == canonical_key(row(depth=-0.0)) == canonical_key(row(depth=0.0))
    assert canonical_key(row(depth=0.0)) != canonical_key(row(depth=None))
    assert canonical_key(row(depth=0.3)) != canonical_key(row(depth=0.1 + 0.2))
    assert canonical_key(row(length=1024.0)) == canonical_key(row(length=np.int32(1024)))
    assert canonical_key(row(value=1)) == canonical_key(row(value=2))


@pytest.mark.parametrize("bad", [{"lenght": 3}, {"length": 1.5}, {"model": 3}, {"value": "high"}])
def test_wrong_columns_and_kinds_are_refused(tmp_path, bad):
    with pytest.raises(ValueError) as error:
        Results(tmp_path).put(row(**bad))
    assert not isinstance(error.value, InputError)
    assert not list((tmp_path / "cells").iterdir())


def test_a_file_torn_anywhere_is_no_result(tmp_path, caplog):
    store, cell = Results(tmp_path), row()
    store.put(cell)
    path = only_cell(tmp_path)
    whole = path.read_bytes()
    for cut in [0, 1, len(whole) - 1, *random.sample(range(2, len(whole) - 1), 20)]:
        path.write_bytes(whole[:cut])
        assert store.get(cell) is None
    assert store.rows() == [] and len(store.frame()) == 0 and path.name in caplog.text
    store.put(cell)  # recomputed
    assert path.read_bytes() == whole


def test_an_edited_or_renamed_file_is_no_result(tmp_path):
    store, cell = Results(tmp_path), row(value=0.75)
    store.put(cell)
    path = only_cell(tmp_path)
    text = path.read_text()
    path.write_text(text.replace("0.75", "0.65"))
    assert store.get(cell) is None
    path.write_text(text.replace('"n": 2', '"n": 20'))
    assert store.get(cell) is None
    path.write_text(json.dumps(json.loads(text)))  # laid out differently, the same content
    assert store.get(cell) is not None
    path.write_text(text)
    path.rename(path.with_name("0" * 32 + ".json"))
    assert store.rows() == []
    for junk in ("[]", "{}", '{"row": 1, "checksum": 2}', "null", '{"row": [], "checksum": ""}'):
        path.write_text(junk)
        assert store.get(cell) is None


def test_a_write_that_fails_leaves_the_old_cell(tmp_path, monkeypatch):
    store = Results(tmp_path)
    store.put(row(value=1.0))

    def fail(*_):
        raise OSError(28, "No space left on device")

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch, pytest.raises(InputError, match="No space left"):
            patch.setattr(os, name, fail)
            store.put(row(value=2.0))
        cell = store.get(row())
        assert cell is not None and cell["value"] == 1.0
        assert len(store.rows()) == 1  # what was left half-written is not seen


def test_stale_temporary_files_go_and_fresh_ones_stay(tmp_path):
    Results(tmp_path)
    old, fresh = tmp_path / "cells" / ".a.json.1.tmp", tmp_path / "cells" / ".b.json.2.tmp"
    for path in (old, fresh):
        path.write_text("{")
    os.utime(old, (time.time() - 7200,) * 2)
    Results(tmp_path)
    assert fresh.exists() and not old.exists()


WRITER = """
import sys
from rnn_longctx.eval.results import Results
store, i = Results(sys.argv[1]), 0
while True:  # few keys, so that cells are overwritten
    store.put({"model": "m", "length": i % 2 + 1, "value": i, "samples": [i + k / 7 for k in range(50_000)]})
    i += 1
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_writers_leave_only_whole_cells(tmp_path, caplog):
    """The kill strikes while a file is seen growing: a plain write_bytes is caught nearly always."""
    cells = tmp_path / "cells"
    Results(tmp_path)
    for least in (1, 2):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
        try:
            started, deadline, full = time.time(), time.time() + 60, 500_000
            while writer.poll() is None and time.time() < deadline:
                names = os.listdir(cells)
                whole = [n for n in names if n.endswith(".json") and os.stat(cells / n).st_size > full]
                growing = len(names) > len(whole)
                if growing and len(whole) >= least and os.stat(cells / whole[0]).st_mtime > started:
                    break
            assert writer.poll() is None and time.time() < deadline
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        found = Results(tmp_path).rows()
        assert least <= len(found) <= 2 and not caplog.records
        assert all(r["samples"] == [r["value"] + k / 7 for k in range(50_000)] for r in found)
        for left in cells.glob(".*.tmp"):  # a fresh one is left alone, it may be another process's
            left.unlink()


def test_the_table_is_the_same_from_cells_parquet_and_csv(tmp_path):
    store = Results(tmp_path)
    cells = [row(length=length, depth=d, task=t) for length in (512, 64) for d in (None, 0.1 + 0.2) for t in "ab"]
    cells += [row(text='comma, "quote"\nand line', samples=None, value=math.inf), row(model=None, value=math.nan)]
    cells += [row(seed=2**53 + 1, samples=[math.inf, 1e-300, 0.1 + 0.2], version="None")]
    random.shuffle(cells)
    for cell in cells:
        store.put(cell)
    gathered = store.gather()
    assert list(gathered.columns) == list(COLUMNS) and len(gathered) == len(cells)
    pd.testing.assert_frame_equal(Results.read(tmp_path), gathered, check_exact=True)
    (tmp_path / "results.parquet").unlink()
    pd.testing.assert_frame_equal(Results.read(tmp_path), gathered, check_exact=True)
    pd.testing.assert_frame_equal(store.frame(), gathered, check_exact=True)
    assert gathered["seed"].max() == 2**53 + 1
    lengths = gathered[gathered["task"] == "a"]["length"].tolist()
    assert lengths == sorted(lengths) and gathered["model"][0] is None


def test_an_empty_table_can_be_gathered_and_read(tmp_path):
    gathered = Results(tmp_path).gather()
    assert len(gathered) == 0
    pd.testing.assert_frame_equal(Results.read(tmp_path), gathered)


def test_a_parquet_row_of_samples_is_a_list_column(tmp_path):
    store = Results(tmp_path)
    store.put(row(samples=[1.0, 2.0]))
    store.gather()
    raw = pd.read_parquet(tmp_path / "results.parquet")
    assert list(raw["samples"][0]) == [1.0, 2.0]
    assert json.loads(pd.read_csv(tmp_path / "results.csv")["samples"][0]) == [1.0, 2.0]


def test_a_sample_that_is_not_a_number_survives(tmp_path):
    store = Results(tmp_path)
    store.put(row(samples=[1.0, math.nan]))
    store.gather()
    for _ in range(2):
        first, second = Results.read(tmp_path)["samples"][0]
        assert first == 1.0 and math.isnan(second)
        (tmp_path / "results.parquet").unlink(missing_ok=True)


def test_unwritable_directories_are_refused_in_one_line(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    places = [file, file / "below"]
    if hasattr(os, "geteuid") and os.geteuid() != 0:
        places.append(tmp_path / "sealed")
        places[-1].mkdir(mode=0o500)
    for place in places:
        with pytest.raises(InputError) as error:
            Results(place)
        assert "\n" not in str(error.value) and str(place) in str(error.value)


def test_the_probe_really_writes(tmp_path, monkeypatch):
    """A full disk lets mkdir pass and a write fail."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        Results(tmp_path)


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(InputError, match="evaluate first"):
        Results.read(tmp_path)
    (tmp_path / "results.parquet").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"results\.parquet") as error:
        Results.read(tmp_path)
    assert "\n" not in str(error.value)


def test_snapshots_have_a_folder(tmp_path):
    path = Results(tmp_path).snapshot_path("0123abcd")
    path.write_bytes(b"state")
    assert path.parent.parent == tmp_path and Results(tmp_path).rows() == []


LATER = ["state_dtype", "tokens_read", "plugins", "chance"]


def test_a_table_from_before_a_column_is_read_on(tmp_path):
    """`state_dtype`, `tokens_read`, `plugins` and `chance` came later: cells and tables without them are as good as new
    ones."""
    store = Results(tmp_path)
    store.put(row())
    cell = only_cell(tmp_path)
    old = {k: v for k, v in json.loads(cell.read_text())["row"].items() if k not in LATER}
    checksum = hashlib.sha256(json.dumps(old, sort_keys=True).encode()).hexdigest()
    key = json.dumps([old[c] for c in KEY if c not in LATER])
    assert cell.stem == hashlib.sha256(key.encode()).hexdigest()[:32]  # it was called so before
    cell.write_text(json.dumps({"checksum": checksum, "row": old}))
    assert store.get(row()) == old | dict.fromkeys(LATER) and len(store.rows()) == 1
    store.put(row(state_dtype="bfloat16", tokens_read=1000, plugins="ab12", chance=0.5))
    frame = store.gather()
    assert sorted(frame["state_dtype"].fillna("-")) == ["-", "bfloat16"]
    for name, write in (("results.parquet", "to_parquet"), ("results.csv", "to_csv")):
        for path in tmp_path.glob("results.*"):
            path.unlink()
        bare = frame[frame["state_dtype"].isna()].drop(columns=LATER)
        bare = bare.assign(samples=bare["samples"].map(json.dumps)) if name.endswith("csv") else bare
        getattr(bare, write)(tmp_path / name, index=False)
        assert Results.read(tmp_path)[LATER].isna().all(axis=None)
        assert len(Results.read(tmp_path)) == 1
