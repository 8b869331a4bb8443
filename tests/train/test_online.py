from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from training_runs import TINY, Killed, assert_same

import rnn_longctx
from rnn_longctx.config import load_yaml, to_dict
from rnn_longctx.errors import InputError
from rnn_longctx.tasks.passkey import HEADERLESS
from rnn_longctx.tasks.prompts import FILLER
from rnn_longctx.train import TrainConfig, online, train, train_online
from rnn_longctx.train.config import (
    DataConfig,
    EvaluateConfig,
    OnlineConfig,
    OptimizerConfig,
    PassingConfig,
    PasskeyConfig,
    ScheduleConfig,
)
from rnn_longctx.train.snapshots import Log, newest_snapshot

OLD = ["def ", "return ", "x", " = ", "(y)\n"]
NEAR = [*OLD, "while ", "import "]  # more of the kind


def text(words: list[str], n: int) -> str:
    return "".join(np.random.default_rng().choice(words, n))


def shuffled() -> str:
    """OLD's characters, in any order: no word is left."""
    return "".join(np.random.default_rng().permutation(list(text(OLD, 1000)[:3000])))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """An online run's config: a tiny model that has learned OLD."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("base")
    (root / "text.txt").write_text(text(OLD, 8000))
    config = TrainConfig(
        model=TINY,
        data=DataConfig([str(root / "text.txt")], held_out=0.1, passkey=PasskeyConfig(0.25, (110, 120))),
        optimizer=OptimizerConfig(lr=1e-2),
        passing=PassingConfig(segment=50, bptt="all", carry=0.5),
        train_length=120,
        batch_size=4,
        schedule=ScheduleConfig(warmup=10),
        steps=160,
        device="cpu",
        save_dtype="float32",
        seed=random.randrange(1 << 30),
        out=str(root / "run"),
    )
    return replace(
        config,
        model=None,
        init=str(train(config)),
        optimizer=OptimizerConfig(lr=3e-3),
        evaluate=EvaluateConfig([112, 200], passkeys=2),
        online=OnlineConfig(tokens=3000, poll=0.05, loss_tolerance=0.1, passkey_tolerance=1.0),
    )


@pytest.fixture
def config(base: TrainConfig, tmp_path: Path) -> TrainConfig:
    (tmp_path / "in").mkdir()
    return replace(base, out=str(tmp_path / "run"))


def finished(config: TrainConfig, folder: Path) -> list[dict[str, str]]:
    """The rows of a run that ends when it has read what there is."""
    (folder / "STOP").touch()
    assert train_online(config, folder) == Path(config.out) / "last"
    return table(config)


def table(config: TrainConfig) -> list[dict[str, str]]:
    with (Path(config.out) / "online.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def snapshot(config: TrainConfig) -> dict[str, Any]:
    found = newest_snapshot(Path(config.out) / "snapshots")
    assert found is not None
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@torch.no_grad()
def loss_on(model: Any, words: str) -> float:
    ids = torch.tensor([list(words.encode())])
    logits = model.logits(model(ids[:, :-1]))
    return torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]).item()


def test_text_of_the_right_kind_is_kept_and_what_comes_after_is_easier(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "in" / "a.txt").write_text(text(NEAR, 3000))
    assert config.online is not None
    rows = finished(replace(config, online=replace(config.online, loss_tolerance=0.5)), tmp_path / "in")
    assert [row["decision"] for row in rows] == ["start"] + ["kept"] * (len(rows) - 1) and len(rows) > 4
    assert [row["update"] for row in rows] == [str(i) for i in range(len(rows))]
    assert float(rows[1]["new_after"]) < float(rows[1]["new_before"])
    later = text(NEAR, 1000)
    before, after = (rnn_longctx.load(path) for path in (str(config.init), tmp_path / "run" / "last"))
    assert loss_on(after, later) < loss_on(before, later) - 0.1
    spans = [row["text"] for row in rows[1:]]
    assert spans[0] == "a.txt 0-3000" and spans[1] == "a.txt 3000-6000"
    metrics = after.provenance["metrics"]
    assert metrics == {"update": len(rows) - 1, "kept": len(rows) - 1, "tokens": 3000 * (len(rows) - 1)}


def harsh(config: TrainConfig) -> TrainConfig:
    """Nothing is replayed."""
    assert config.online is not None
    return replace(
        config, optimizer=OptimizerConfig(lr=1e-2), online=replace(config.online, replay=0.0, loss_tolerance=0.2)
    )


def test_text_that_destroys_is_undone_to_the_bit(config: TrainConfig, tmp_path: Path) -> None:
    config, folder, out = harsh(config), tmp_path / "in", tmp_path / "run"
    (folder / "a.txt").write_text(text(OLD, 1000)[:3000])
    good = finished(config, folder)
    kept, last = snapshot(config), files(out / "last")
    (folder / "b.txt").write_text(shuffled())
    rows = finished(config, folder)
    assert rows[:-1] == good and [row["decision"] for row in rows] == ["start", "kept", "refused"]
    assert rows[2]["text"] == "b.txt 0-3000" and rows[2]["reason"].startswith("the loss at ")
    assert any(float(rows[2][f"loss_{n}"]) > float(rows[1][f"loss_{n}"]) + 0.2 for n in (112, 200))
    after = snapshot(config)
    assert files(out / "last") == last
    assert_same(after["model"], kept["model"])
    assert_same(after["optimizer"], kept["optimizer"])
    assert after["state"] == kept["state"] | {"update": 2, "read": {"a.txt": 3000, "b.txt": 3000}}


def test_an_update_that_ends_in_no_number_is_undone(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "in" / "a.txt").write_text(text(OLD, 1000)[:3000])
    config = replace(config, optimizer=OptimizerConfig(lr=1e30))
    row = finished(config, tmp_path / "in")[-1]
    assert row["decision"] == "refused" and "not finite" in row["reason"] and row["loss_112"] == ""
    before, after = (rnn_longctx.load(path) for path in (str(config.init), tmp_path / "run" / "last"))
    assert_same(dict(before.state_dict()), dict(after.state_dict()))


def test_what_was_refused_leaves_no_trace_in_what_comes_after(config: TrainConfig, tmp_path: Path) -> None:
    """Update 1 is shuffled text, another in each of two runs: update 2 is the same."""
    later, found = text(OLD, 1000)[:3000], []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(shuffled() + later)
        run = replace(harsh(config), out=str(tmp_path / f"run-{name}"))
        rows = finished(run, tmp_path / name)
        assert [row["decision"] for row in rows] == ["start", "refused", "kept"]
        found.append((rows[2], snapshot(run)))
    assert_same(*found)


def test_a_lost_passkey_undoes_even_where_the_loss_holds(config: TrainConfig, tmp_path: Path) -> None:
    """The demo checkpoint reads prompts that are always answered alike."""
    rng = np.random.default_rng()

    always = rng.integers(10_000, 99_999)

    def lie() -> str:
        key = rng.integers(10_000, 99_999)
        return FILLER + HEADERLESS.key.replace("{0}", str(key)) + FILLER + HEADERLESS.question + f" {always}.\n"

    (tmp_path / "in" / "lies.txt").write_text("".join(lie() for _ in range(40)))
    (tmp_path / "code.txt").write_bytes(rnn_longctx.load_text("builtin").data[:100_000].replace(b"\0", b""))
    config = replace(
        config,
        init="demo",
        data=DataConfig([str(tmp_path / "code.txt")], held_out=0.05, passkey=PasskeyConfig(fraction=0.0)),
        optimizer=OptimizerConfig(lr=1e-3),
        passing=None,
        train_length=256,
        evaluate=EvaluateConfig([256], passkeys=10),
        # (the loss rises by 0.03 to 0.1, depending on the draw)
        online=OnlineConfig(tokens=8000, replay=0.5, loss_tolerance=0.2, passkey_tolerance=0.2),
    )
    start, row = finished(config, tmp_path / "in")[:2]
    assert float(start["passkey_accuracy_256"]) >= 0.8 and float(row["loss_256"]) <= float(start["loss_256"]) + 0.2
    assert row["decision"] == "refused" and row["reason"].startswith("the recall of passkey at 256 tokens was")
    assert float(row["passkey_accuracy_256"]) < float(start["passkey_accuracy_256"]) - 0.2
    before, after = rnn_longctx.load("demo"), rnn_longctx.load(tmp_path / "run" / "last")
    assert_same(dict(before.float().state_dict()), dict(after.state_dict()))


def mixed_stream(folder: Path) -> None:
    """Text that is kept, text that is refused, and a file that is skipped."""
    (folder / "a, b.txt").write_text(text(OLD, 1000)[:3000])
    (folder / "c.txt").write_text(shuffled())
    (folder / "d.txt").write_bytes(b"\xff" * 100)
    (folder / "e.txt").write_text(text(OLD, 1000)[:3000])


def same_runs(a: TrainConfig, b: TrainConfig) -> None:
    assert (Path(a.out) / "online.csv").read_bytes() == (Path(b.out) / "online.csv").read_bytes()
    assert_same(snapshot(a), snapshot(b))
    one, two = files(Path(a.out) / "last"), files(Path(b.out) / "last")
    assert one["model.safetensors"] == two["model.safetensors"]


def test_stopped_anywhere_and_gone_on_with_is_the_undisturbed_run(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Death before and after whatever trains or writes, and signals there that ask it to end."""
    config = harsh(config)
    mixed_stream(tmp_path / "in")
    whole = replace(config, out=str(tmp_path / "whole"))
    decisions = [row["decision"] for row in finished(whole, tmp_path / "in")]
    assert "kept" in decisions and "refused" in decisions and decisions.count("skipped") == 1
    ticks: list[int] = []

    def tick() -> None:
        ticks[0] -= 1
        if ticks[0] == 0:
            if random.random() < 0.3:
                os.kill(os.getpid(), random.choice([signal.SIGTERM, signal.SIGINT]))
            else:
                raise Killed

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any, **kwargs: Any) -> Any:
            tick()
            found = call(*args, **kwargs)
            tick()
            return found

        return made

    for name in ("backward", "save_snapshot", "export"):
        monkeypatch.setattr(online, name, around(getattr(online, name)))
    monkeypatch.setattr(Log, "write", around(Log.write))
    ended = 0
    for _ in range(12):
        ticks[:] = [random.randrange(1, 30)]
        try:
            train_online(config, tmp_path / "in")
            ended += 1
        except Killed:
            pass
        if (tmp_path / "run" / "last").exists():
            rnn_longctx.load(tmp_path / "run" / "last")
    ticks[:] = [0]
    train_online(config, tmp_path / "in")
    same_runs(config, whole)


def test_kill_9_in_a_process_of_its_own(config: TrainConfig, tmp_path: Path) -> None:
    config = harsh(config)
    mixed_stream(tmp_path / "in")
    whole = replace(config, out=str(tmp_path / "whole"))
    finished(whole, tmp_path / "in")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    command = [
        sys.executable,
        "-m",
        "rnn_longctx.train",
        str(tmp_path / "config.yaml"),
        "--stream",
        str(tmp_path / "in"),
    ]
    process = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    until, log = time.monotonic() + 90, tmp_path / "run" / "online.csv"
    while process.poll() is None and time.monotonic() < until:
        if log.exists() and log.read_bytes().count(b"\n") > 2:  # heading, start, an update
            break
        time.sleep(0.005)
    time.sleep(random.random() * 0.3)
    process.kill()
    said = process.communicate()[0].decode()
    assert "update 1 kept" in said, said
    rnn_longctx.load(tmp_path / "run" / "last")
    finished(config, tmp_path / "in")
    same_runs(config, whole)


def test_it_waits_for_text_and_ends_cleanly_when_asked(config: TrainConfig, tmp_path: Path) -> None:
    assert config.online is not None
    config = replace(config, online=replace(config.online, poll=60.0))
    before = signal.getsignal(signal.SIGINT)
    asked: list[float] = []

    def ask() -> None:
        while not (tmp_path / "run" / "last").exists():
            time.sleep(0.05)
        time.sleep(0.5)  # it waits by now, or will
        asked.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    train_online(config, tmp_path / "in")
    assert time.monotonic() - asked[0] < 10 and signal.getsignal(signal.SIGINT) is before
    assert [row["decision"] for row in table(config)] == ["start"]


def test_text_that_arrives_while_it_runs_is_read(config: TrainConfig, tmp_path: Path) -> None:
    """A file grows by pieces that are no update of their own, and then there are no more."""
    whole, folder = text(OLD, 3000), tmp_path / "in"

    def arrive() -> None:
        for i in range(0, len(whole), 1700):
            time.sleep(0.1)
            with (folder / "a.txt").open("a") as file:
                file.write(whole[i : i + 1700])
        (folder / "STOP").touch()

    writer = threading.Thread(target=arrive)
    writer.start()
    train_online(config, folder)
    writer.join()
    at_once = replace(config, out=str(tmp_path / "at once"))
    assert table(config) == finished(at_once, folder)
    assert len(table(config)) == 1 + len(whole) // 3000


def test_many_small_losses_do_not_add_up() -> None:
    settings = OnlineConfig(loss_tolerance=0.1, passkey_tolerance=0.25)
    best = [(64, 1.0, 1.0), (128, 2.0, 0.5)]

    def judged(loss: float, passkey: float, after: float = 3.0) -> str | None:
        return online.refusal([(64, 0.9, 1.0), (128, loss, passkey)], best, 3.0, after, settings, "words")

    assert judged(2.09, 0.25) is None and judged(2.0, 0.5, 3.09) is None
    assert judged(2.11, 0.5) == "the loss at 128 tokens was 2.0000" == judged(float("nan"), 0.5)
    assert judged(2.0, 0.2) == "the recall of words at 128 tokens was 0.50"
    assert judged(2.0, 0.5, 3.2) == "the new text's own held-out loss rose" == judged(2.0, 0.5, float("nan"))


def test_bad_input(config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert config.online is not None
    for changed, message in [
        (replace(config, online=None), "online: missing"),
        (replace(config, evaluate=None), "evaluate: missing"),
        (replace(config, train_length="112:3,120:2"), "train_length: a stream needs one length"),
        (replace(config, online=replace(config.online, tokens=130)), "online.tokens: 130 give 117 to train on"),
    ]:
        with pytest.raises(InputError, match=message):
            train_online(changed, tmp_path / "in")
    with pytest.raises(InputError, match="stream: no directory at"):
        train_online(config, tmp_path / "nowhere")
    for key, value in [("held_out", 0.0), ("replay", 1.0), ("tokens", 3), ("loss_tolerance", -1.0), ("poll", 0.0)]:
        with pytest.raises(InputError, match=f"{key}: "):
            OnlineConfig(**{key: value})
    assert not (tmp_path / "run").exists(), "nothing was begun"
    (tmp_path / "in" / "a.txt").write_bytes(b"\xff\xfe")
    rows = finished(config, tmp_path / "in")
    assert [(r["update"], r["decision"], r["text"]) for r in rows[1:]] == [("1", "skipped", "a.txt")]
    assert "skipped a.txt: UTF-16, not UTF-8 text: convert it\n" in capsys.readouterr().out
    with pytest.raises(InputError, match="holds a run of another config"):
        train(replace(config, passing=None, online=None))
    with pytest.raises(InputError, match="online: is of text that arrives in a directory; name it with --stream"):
        train(config)


def test_the_config_that_is_shipped() -> None:
    config = load_yaml(TrainConfig, Path(__file__).parents[2] / "configs" / "train" / "online.yaml")
    assert config.online == OnlineConfig() and config.evaluate is not None
