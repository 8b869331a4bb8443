"""A file holds what it held or all that was written, and a full disk is one line."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from rnn_longctx.errors import InputError, one_line
from rnn_longctx.files import replacing, write_atomic
from rnn_longctx.models.cache import Cache


def test_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, b"one")
    with pytest.raises(KeyError), replacing(path) as aside:
        aside.write_bytes(b"half of tw")
        raise KeyError("killed")
    assert path.read_bytes() == b"one" and os.listdir(tmp_path) == ["file"]
    with replacing(path) as aside:
        aside.write_bytes(b"two")
        assert path.read_bytes() == b"one" and aside.parent == tmp_path
    assert path.read_bytes() == b"two" and os.listdir(tmp_path) == ["file"]


def test_it_reaches_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append("fsync"))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    write_atomic(tmp_path / "file", b"one")
    assert order == ["fsync", "replace"]
    write_atomic(tmp_path / "file", b"two", sync=False)
    assert order == ["fsync", "replace", "replace"] and (tmp_path / "file").read_bytes() == b"two"


def test_saved_carries_reach_the_disk_and_a_failed_save_leaves_the_old(tmp_path, monkeypatch):
    path = tmp_path / "carries"
    Cache([], torch.tensor([3])).save(path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write .*carries: No space left on device"):
        Cache([], torch.tensor([4])).save(path)
    assert Cache.load(path).position.tolist() == [3] and os.listdir(tmp_path) == ["carries"]


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"one")
    monkeypatch.setattr(torch, "save", full)
    told = r"cannot write .*file: No space left on device; what was there before is untouched"
    with pytest.raises(InputError, match=told), replacing(path) as aside, aside.open("wb") as file:
        torch.save({}, file)
    with pytest.raises(InputError, match="No space left"), replacing(path):
        try:
            full()
        except OSError as error:
            raise RuntimeError("a writer's own words") from error
    with pytest.raises(InputError, match=r"cannot write .*: the writer failed"), replacing(path):
        raise RuntimeError("the writer\nfailed")
    assert path.read_bytes() == b"one" and os.listdir(tmp_path) == ["file"]
    with pytest.raises(InputError, match="No such file or directory"):
        write_atomic(tmp_path / "no" / "file", b"")


def test_an_error_on_one_line():
    assert one_line(ValueError("a\n  b")) == "a b" and one_line(ValueError()) == "ValueError"
    assert one_line(ValueError("x" * 200), 10) == "xxxxxxx..."
