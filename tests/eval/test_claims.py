"""Measurements that processes of one folder share out: each is done once, whoever dies."""

from __future__ import annotations

import fcntl
import threading
import time
from pathlib import Path

import pytest
import torch

from rnn_longctx.devices import device_of_rank
from rnn_longctx.errors import InputError
from rnn_longctx.eval import claims
from rnn_longctx.eval.claims import Claims
from rnn_longctx.eval.progress import Progress


class Work:
    """Stands for a measurement of one cell, which is there once it is measured."""

    def __init__(self, tokens: int):
        self.id, self.name, self.tokens, self.stored = f"work{tokens}", f"none, lm at {tokens}", tokens, False

    def missing(self) -> list[int]:
        return [] if self.stored else [self.tokens]


class Rank:
    """Measures, and remembers in which order."""

    def __init__(self, folder: Path, rank: int = 0, fails: dict[int, str] | None = None):
        self.fails, self.order, self.said = fails or {}, [], []
        self.claims = Claims(folder, rank, time.time(), self.said.append)

    def measure(self, work: Work) -> None:
        self.order.append(work.tokens)
        if work.tokens in self.fails:
            raise InputError(self.fails[work.tokens])
        work.stored = True

    def share_out(self, works: list[Work]) -> None:
        self.claims.share_out(works, self.measure, Progress(False))


@pytest.fixture
def works() -> list[Work]:
    return [Work(tokens) for tokens in (1, 4, 2, 3)]


def test_the_dearest_first_and_nothing_is_left_behind(works, tmp_path):
    rank = Rank(tmp_path)
    rank.share_out(works)
    assert rank.order == [4, 3, 2, 1] and not rank.claims.missing and not list(rank.claims.folder.iterdir())


def test_several_at_once_measure_each_once(works, tmp_path):
    ranks = [Rank(tmp_path, i) for i in range(4)]
    works += [Work(tokens) for tokens in range(5, 100)]
    threads = [threading.Thread(target=rank.share_out, args=(works,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert sorted(tokens for rank in ranks for tokens in rank.order) == list(range(1, 100))


@pytest.mark.parametrize("stored", [False, True])
def test_what_another_holds_is_waited_for_and_taken_over_if_that_dies(works, tmp_path, stored):
    rank = Rank(tmp_path)
    other = (rank.claims.folder / works[1].id).open("a")
    fcntl.flock(other, fcntl.LOCK_EX)
    thread = threading.Thread(target=rank.share_out, args=(works,))
    thread.start()
    began = time.monotonic()
    while len(rank.order) < 3 and time.monotonic() - began < 30:
        time.sleep(0.01)
    assert rank.order == [3, 2, 1] and thread.is_alive()
    works[1].stored = stored
    other.close()  # as the system does for a dead process
    thread.join(30)
    assert not thread.is_alive() and rank.order == [3, 2, 1] + [4] * (not stored) and not rank.claims.missing


def test_what_is_wrong_with_one_is_said_and_it_is_not_tried_again(works, tmp_path):
    first = Rank(tmp_path, 1, {4: "the GPU is full"})
    second = Rank(tmp_path, 0)
    second.claims.began = first.claims.began
    first.share_out(works)
    second.share_out(works)
    assert first.order == [4, 3, 2, 1] and second.order == []
    assert first.said == ["rank 1: none, lm at 4: the GPU is full"] and not second.said
    assert second.claims.missing == "1 cell is missing: none, lm at 4 (the GPU is full)"
    again = Rank(tmp_path)
    again.share_out(works)
    assert again.order == [4] and not again.claims.missing, "another run tries again"
    assert not list(again.claims.folder.iterdir())


@pytest.mark.parametrize(("tries", "order"), [(1, [3, 2, 1, 4]), (2, [3, 2, 1])])
def test_what_processes_died_of_is_tried_last_and_twice_at_most(works, tmp_path, tries, order):
    rank = Rank(tmp_path)
    for began in [*[0.0] * 5, *[time.time() + 1] * tries]:  # of an earlier run, and of this one
        with (rank.claims.folder / works[1].id).open("a") as file:
            file.write(f"{began!r} \n")
    rank.share_out(works)
    assert rank.order == order
    assert rank.claims.missing == ("" if tries == 1 else "1 cell is missing: none, lm at 4 (its process died)")


def test_the_line_about_what_is_missing_names_some(tmp_path):
    works = [Work(tokens) for tokens in range(1, 6)]
    rank = Rank(tmp_path, fails={w.tokens: "no" for w in works})
    rank.share_out(works)
    some = "; ".join(f"none, lm at {n} (no)" for n in (5, 4, 3))
    assert rank.claims.missing == f"5 cells are missing: {some}; 2 more"


def test_a_file_system_without_locks_is_refused(works, tmp_path, monkeypatch):
    def lacking(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(claims.fcntl, "flock", lacking)
    with pytest.raises(InputError, match=r"file system lacks \(Operation not supported\); set another --out"):
        Rank(tmp_path).share_out(works)


def test_a_rank_has_a_gpu_of_its_own(monkeypatch):
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [device_of_rank(name) for name in ("auto", "cpu", "cuda")] == ["cpu", "cpu", "cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_of_rank(name) for name in ("auto", "cpu", "cuda")] == ["cuda:1", "cpu", "cuda:1"]
    assert current == [1, 1]
    with pytest.raises(InputError, match="expected auto, cpu or cuda for 8 ranks, got 'cuda:1'"):
        device_of_rank("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="rank 5 has no GPU of its own, here 1 GPU: begin as many ranks as GPUs"):
        device_of_rank("auto")
