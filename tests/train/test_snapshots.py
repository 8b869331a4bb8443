from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rnn_longctx.errors import InputError
from rnn_longctx.files import replacing, write_atomic
from rnn_longctx.train.snapshots import COLUMNS, Log, changed, claim_folder, held, newest_snapshot, save_snapshot

CPU = torch.device("cpu")


def test_the_newest_two_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    assert newest_snapshot(tmp_path, CPU) is None
    for step in (5, 10, 1000):
        save_snapshot(tmp_path, step, {"state": {"step": step}})
    assert [f.name for f in sorted(tmp_path.iterdir())] == ["step-00000010.pt", "step-00001000.pt"]
    assert newest_snapshot(tmp_path, CPU) == {"state": {"step": 1000}}


def test_a_damaged_snapshot_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (5, 10):
        save_snapshot(tmp_path, step, {"x": torch.randn(1000), "step": step})
    newest = tmp_path / "step-00000010.pt"
    whole = newest.read_bytes()
    newest.write_bytes(whole[: random.randrange(len(whole) - 1)])
    found = newest_snapshot(tmp_path, CPU)
    assert found is not None and found["step"] == 5
    assert "trying an older one" in capsys.readouterr().out


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with pytest.raises(InputError, match=f"cannot write {path}: disk full"), replacing(path) as aside:
        aside.write_bytes(b"ne")
        raise OSError("disk full")
    assert path.read_bytes() == b"old"
    assert newest_snapshot(tmp_path, CPU) is None, "what lies beside is no snapshot"


full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no device that is full")


@full
def test_a_full_disk_leaves_the_last_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Really full: what is written aside goes to a device without room."""
    save_snapshot(tmp_path, 5, {"x": torch.arange(5)})
    monkeypatch.setattr("rnn_longctx.files.uuid.uuid4", lambda: SimpleNamespace(hex="7"))
    (tmp_path / ".step-00000010.pt.7.tmp").symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"cannot write .*step-00000010\.pt: No space left on device") as error:
        save_snapshot(tmp_path, 10, {"x": torch.randn(100_000)})
    assert "\n" not in str(error.value) and error.value.__suppress_context__
    assert [f.name for f in tmp_path.iterdir()] == ["step-00000005.pt"], "nothing half written takes what room is left"
    found = newest_snapshot(tmp_path)
    assert found is not None and torch.equal(found["x"], torch.arange(5))


def test_a_log_of_an_older_version_goes_on(tmp_path: Path) -> None:
    """Its accuracies were called passkey, as the loss of the answers was in what a run said."""
    path = tmp_path / "log.csv"
    path.write_text("step,passkey,passkey_512,passkey_loss\n1,0.5,0.25,2.0\n")
    names = ["step", "passkey_accuracy", "passkey_accuracy_512", "passkey_loss"]
    log = Log(path, 1, names)
    log.write(dict(zip(names, (2, 0.75, 0.5, 1.0))))
    log.close()
    assert path.read_text() == f"{','.join(names)}\n1,0.5,0.25,2.0\n2,0.75,0.5,1\n"


@full
def test_a_log_on_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    log = Log(path, 0)
    log._file.close()
    log._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(InputError, match=r"cannot write .*log\.csv: No space left on device"):
        log.write(dict.fromkeys(COLUMNS, 1.5) | {"step": 1})
    log.close()  # with a row that still cannot be written: no second error


def test_a_folder_belongs_to_one_config(tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = {"model": {"d_model": 8, "dt_limit": [0.0, float("inf")]}, "steps": 5}
    claim_folder(out, {**config, "steps": 3})
    claim_folder(out, config)  # the run of 3 steps never began
    (out / "log.csv").touch()
    claim_folder(out, config)
    claim_folder(out, {**config, "reset": False, "min": 0})  # what an older version did not write, and is off
    with pytest.raises(InputError, match=r"another config \(model\.d_model was 8, is 9\)") as error:
        claim_folder(out, config | {"model": {"d_model": 9, "dt_limit": [0.0, float("inf")]}})
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"seed was None, is 1"):
        claim_folder(out, config | {"seed": 1})


def test_settings_of_an_older_version_are_the_same_where_what_is_new_is_off():
    before = {
        "mix": [{"task": "passkey", "lengths": [0, 8]}, {"task": "mqar", "lengths": [8, 8]}],
        "probe": {"every": 2},
    }
    now = json.loads(json.dumps(before))
    now["mix"][1] |= {"draw": None, "in_text": False}
    now["probe"]["remedies"] = []
    assert not changed(before, now) and not changed(now, before)
    for differs in (
        {"mix": [now["mix"][0], now["mix"][1] | {"in_text": True}]},
        {"mix": now["mix"][:1]},
        {"mix": now["mix"][::-1]},
        {"mix": [now["mix"][0] | {"lengths": [0, 8, 0]}, now["mix"][1]]},
        {"probe": {"every": 2, "remedies": ["rri"]}},
    ):
        assert changed(before, now | differs), differs
    assert changed(before, now | {"mix": now["mix"][:1]}) == "mix was a list of 2, is a list of 1"
    for one, other in ((None, []), (None, 0.0), (1, None), ([{}], []), ({"0": {"a": 1}}, [{"a": 1}])):
        assert changed({"mix": one}, {"mix": other}), "off is not nothing said where both versions know the setting"


def test_one_process_at_a_time_and_what_a_killed_one_left_is_removed(tmp_path: Path) -> None:
    def lay() -> list[Path]:
        left = [tmp_path / p for p in (".last.7.tmp", "steps/.5.7.tmp", "snapshots/.step-00000009.pt.7.tmp")]
        for path in left[:2]:
            path.mkdir(parents=True)
            (path / "config.json").touch()
        left[2].touch()
        return left

    save_snapshot(tmp_path / "snapshots", 5, {"step": 5})
    left = lay()
    with held(tmp_path):
        assert not any(path.exists() for path in left)
        left = lay()  # another run's, as far as anyone can know
        with pytest.raises(InputError, match="out: another process trains in") as error, held(tmp_path):
            pass
        assert "\n" not in str(error.value) and all(path.exists() for path in left)
    with held(tmp_path):
        assert newest_snapshot(tmp_path / "snapshots") == {"step": 5}


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("flock")

    monkeypatch.setattr("rnn_longctx.train.snapshots.FileLock.acquire", refuse)
    left = tmp_path / ".log.csv.7.tmp"
    left.touch()
    with held(tmp_path), held(tmp_path):
        assert left.exists(), "it may be that of a run at work"


def test_the_log_is_cut_back_to_the_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"

    def rows(step: int, new: list[int], torn: str = "") -> list[str]:
        log = Log(path, step)
        for k in new:
            log.write(dict.fromkeys(COLUMNS, k + 0.5) | {"step": k})
        log.close()
        with path.open("a") as file:
            file.write(torn)
        return [line.split(",")[0] for line in path.read_text().splitlines()[1:]]

    rows(0, [10, 20, 30], torn="40,1.5,2")
    assert rows(20, [30, 40]) == ["10", "20", "30", "40"]
    assert rows(0, [10]) == ["10"], "a run from the beginning starts a new log"
    assert path.read_text().splitlines()[0] == ",".join(COLUMNS)
