"""Several ranks train as one does: in float64, so that what differs is order alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from ranks import Ranks
from safetensors.torch import load_file
from training_runs import TINY, Killed, assert_same, final, rows

import rnn_longctx
from rnn_longctx.config import to_dict
from rnn_longctx.errors import InputError
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.train import TrainConfig, starts, train
from rnn_longctx.train.config import EvaluateConfig, PassingConfig
from rnn_longctx.train.corpus import Corpus
from rnn_longctx.train.learner import Learner
from rnn_longctx.train.optimizer import make_optimizer
from rnn_longctx.train.team import Team

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "previous": {"passing": PassingConfig(50, 1, "previous", 0.5), "evaluate": EvaluateConfig([111], 5, 2)},
    "noise": {"passing": PassingConfig(37, "all", "noise")},
    "fitted-noise": {"passing": PassingConfig(60, 0, "fitted-noise")},
    "stages": {"passing": PassingConfig(40, 2, "previous", 1.0), "train_length": "112:3:8,120:3"},
}
WAYS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, accumulated": {"accumulate": 2},
    "fsdp": {"fsdp": True},
    "fsdp, accumulated": {"fsdp": True, "accumulate": 2},
    "sequence": {"sequence_parallel": 2},
    "sequence, accumulated": {"sequence_parallel": 2, "accumulate": 4},
    "sequence, fsdp": {"sequence_parallel": 2, "fsdp": True},
}
PAIRS = [("plain", "ddp"), ("plain", "fsdp"), ("plain", "sequence"), ("noise", "ddp, accumulated"),
         ("noise", "sequence"), ("fitted-noise", "fsdp, accumulated"), ("fitted-noise", "sequence, accumulated"),
         ("stages", "fsdp"), ("previous", "ddp, accumulated"), ("previous", "sequence, fsdp")]  # fmt: skip


@pytest.fixture(autouse=True)
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(starts, "FIT_EVERY", 2)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(__file__, 2, "gloo")
    yield ranks
    ranks.close()


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    return replace(config, steps=6, log_every=1, checkpoint_every=2)


# --- run on every rank


def train_here(device: torch.device, config: TrainConfig, kill: int | None = None) -> None:
    """kill: the step that no rank lives to see."""
    starts.FIT_EVERY = 2
    torch.set_default_dtype(torch.float64)
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    batch = Corpus.batch

    def killer(self: Corpus, c: TrainConfig, step: int) -> Any:
        if step == kill:
            raise Killed
        return batch(self, c, step)

    Corpus.batch = killer  # type: ignore[method-assign]
    try:
        with suppress(Killed):
            train(config)
    finally:
        Corpus.batch = batch  # type: ignore[method-assign]


def refused(device: torch.device, config: TrainConfig, words: str) -> None:
    with pytest.raises(InputError, match=words):
        train_here(device, config)


def check_sharded(device: torch.device, config: TrainConfig) -> None:
    """Each rank holds about half of every tensor; which of them decay is as before; the whole is what it was."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world)
    team, model = Team(config), Mamba2LM(TINY)
    model.mixers[0].in_proj.weight._no_weight_decay = True  # type: ignore[assignment]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    decayed = [len(group["params"]) for group in make_optimizer(model, config.optimizer).param_groups]
    team.spread(Learner(model))
    for name, p in model.named_parameters():
        assert p.to_local().numel() <= -(-p.shape[0] // 2) * p[0].numel() < before[name].numel(), name
    assert [len(group["params"]) for group in make_optimizer(model, config.optimizer).param_groups] == decayed
    whole = team.whole(model)
    if team.rank == 0:
        assert_same(dict(whole.state_dict()), before)
        assert whole.lm_head.weight is whole.backbone.embedding.weight


# --- the tests


def assert_close_runs(a: TrainConfig, b: TrainConfig) -> None:
    for one, two in zip(rows(a), rows(b), strict=True):
        for key in one.keys() - {"tokens_per_second", "seconds"}:
            assert one[key] == pytest.approx(two[key], rel=1e-5, nan_ok=True), (
                key
            )  # six digits are written, the last rounded
    ours, expected = final(a), final(b)
    assert ours["model"].keys() == expected["model"].keys()
    for name, weight in expected["model"].items():
        torch.testing.assert_close(ours["model"][name], weight, rtol=0, atol=1e-9, msg=name)
    moments = ours["optimizer"]["state"], expected["optimizer"]["state"]
    for i, state in moments[1].items():
        for key, value in state.items():
            torch.testing.assert_close(moments[0][i][key], value, rtol=1e-6, atol=1e-12)
    if expected.get("starts", {}).get("kept"):
        for pair, others in zip(ours["starts"]["kept"], expected["starts"]["kept"], strict=True):
            for one, other in zip(pair, others, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("mode", "way"), PAIRS)
def test_two_ranks_train_as_one(two: Ranks, config: TrainConfig, mode: str, way: str) -> None:
    one = replace(config, **MODES[mode], out=f"{config.out}-one")
    train(one)
    several = replace(one, **WAYS[way], out=config.out)
    two.run("train_here", several)
    assert_close_runs(several, one)
    whole, alone = (load_file(Path(c.out) / "model" / "model.safetensors") for c in (several, one))
    assert whole.keys() == alone.keys()
    for name, weight in alone.items():  # bfloat16: a last digit may turn over
        torch.testing.assert_close(whole[name], weight, rtol=0.01, atol=1e-6, msg=name)
    assert rnn_longctx.load(Path(several.out) / "model").train_length == several.longest


def test_another_number_of_ranks_goes_on(two: Ranks, config: TrainConfig) -> None:
    """Begun by one, continued by two in DDP, then sharded, then by two with halves of each sequence, then by one."""
    one = replace(config, **MODES["previous"], steps=10, out=f"{config.out}-one")
    train(one)
    run, batch = replace(one, out=config.out), Corpus.batch

    def killer(self: Corpus, c: TrainConfig, step: int) -> Any:
        if step == 3:
            raise Killed
        return batch(self, c, step)

    Corpus.batch = killer  # type: ignore[method-assign]
    with suppress(Killed):
        train(run)
    Corpus.batch = batch  # type: ignore[method-assign]
    for kill, way in ((5, "ddp"), (7, "fsdp"), (9, "sequence")):
        two.run("train_here", replace(run, **WAYS[way]), kill)
        assert rows(run)[-1]["step"] == kill
    train(run)
    assert_close_runs(run, one)


@pytest.mark.parametrize("mode", MODES)
def test_accumulated_gradients_are_those_of_the_batch(config: TrainConfig, mode: str) -> None:
    one = replace(config, **MODES[mode], out=f"{config.out}-one")
    train(one)
    for n in (2, 4):
        parts = replace(one, accumulate=n, out=f"{config.out}-{n}")
        train(parts)
        assert_close_runs(parts, one)


def test_what_does_not_divide_is_refused(two: Ranks, config: TrainConfig) -> None:
    with pytest.raises(InputError, match="batch_size: 4 rows do not divide by accumulate 3"):
        train(replace(config, accumulate=3))
    with pytest.raises(InputError, match="sequence_parallel: 2 does not divide the 1 ranks"):
        train(replace(config, sequence_parallel=2))
    for change, words in (
        ({"batch_size": 3}, "batch_size: 3 rows do not divide by 2 ranks times accumulate 1"),
        ({"train_length": "112:3,120:3:3"}, "train_length: 3 rows do not divide by 2 ranks times accumulate 1"),
        ({"sequence_parallel": 4}, "sequence_parallel: 4 does not divide the 2 ranks"),
        ({"device": "cuda:1"}, "device: expected auto, cpu or cuda for 2 ranks"),
        (
            {"sequence_parallel": 2, "passing": PassingConfig(23)},
            "sequence_parallel: a segment of 5 tokens over 2 ranks leaves fewer than 3 tokens a rank",
        ),
        (
            {"sequence_parallel": 2, "model": ModelConfig("full-attention:heads=2", 16, 1)},
            r"attention layers \(full-attention\) is not read over several ranks; set it to 1",
        ),
    ):
        two.run("refused", replace(config, **change), words)
    assert not Path(config.out).exists()


def test_a_sharded_model(two: Ranks, config: TrainConfig) -> None:
    two.run("check_sharded", replace(config, fsdp=True))


@pytest.mark.slow
def test_four_ranks_that_hold_sequences_in_pairs(config: TrainConfig) -> None:
    ranks = Ranks(__file__, 4, "gloo")
    try:
        for mode, way in (("previous", "sequence, fsdp"), ("fitted-noise", "sequence"), ("plain", "sequence")):
            one = replace(config, **MODES[mode], out=f"{config.out}-{mode}-one")
            train(one)
            several = replace(one, **WAYS[way], out=f"{config.out}-{mode}")
            ranks.run("train_here", several)
            assert_close_runs(several, one)
    finally:
        ranks.close()


# --- under launchers


def launched(launcher: list[str], config: TrainConfig, *words: str, code: str = "") -> tuple[int, str]:
    """Exit code and all that was said. code: run before, in every process."""
    file, script = Path(config.out).with_suffix(".yaml"), Path(config.out).with_suffix(".py")
    file.write_text(yaml.safe_dump(to_dict(config)))
    script.write_text(f"{code}\nimport runpy\nrunpy.run_module('rnn_longctx.train', run_name='__main__')\n")
    start = [str(script)] if code else ["-m", "rnn_longctx.train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", *launcher, *start, str(file), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    return done.returncode, done.stdout + done.stderr


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_accelerate_launch(config: TrainConfig) -> None:
    torch.set_default_dtype(torch.float32)
    one = replace(config, out=f"{config.out}-one")
    train(one)
    # with --cpu it starts one process, whatever the number
    accelerate = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    code, said = launched(accelerate, config, "--set", "steps=6", "sequence_parallel=2")
    assert code == 0, said
    assert said.count("step 6/6") == 1 and said.count(f"saved {config.out}/model") == 1, "rank 0 speaks"
    for ours, expected in zip(rows(config), rows(one), strict=True):
        for key in ("loss", "passkey_loss", "grad_norm", "state_norm"):
            assert ours[key] == pytest.approx(expected[key], rel=1e-4, nan_ok=True), key


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(("mode", "way"), [("plain", "ddp"), ("previous", "ddp, accumulated"), ("previous", "fsdp"),
                                           ("previous", "sequence")])  # fmt: skip
def test_two_gpus_train_as_one(config: TrainConfig, mode: str, way: str) -> None:
    """In float32, by the kernels, replayed where DDP is."""
    torch.set_default_dtype(torch.float32)
    one = replace(config, **MODES[mode], device="cuda", amp=False, steps=12, out=f"{config.out}-one")
    train(one)
    several = replace(one, **WAYS[way], out=config.out)
    code, said = launched(TORCHRUN, several)
    assert code == 0, said
    for ours, expected in zip(rows(several), rows(one), strict=True):
        for key in ("loss", "passkey_loss", "grad_norm", "state_norm"):
            assert ours[key] == pytest.approx(expected[key], rel=1e-2, nan_ok=True), key


@pytest.mark.slow
def test_a_mistake_that_rank_0_alone_sees_ends_all(config: TrainConfig) -> None:
    torch.set_default_dtype(torch.float32)
    train(config)
    began = time.monotonic()
    code, said = launched(TORCHRUN, config, "--set", "seed=7")
    assert code != 0 and time.monotonic() - began < 60
    lines = [line for line in said.splitlines() if line.startswith("rnn-longctx: ")]
    assert len(lines) == 1 and re.search(r"another config \(seed was \d+, is 7\)", lines[0]), said


@pytest.mark.slow
def test_a_rank_with_another_text_ends_all(config: TrainConfig) -> None:
    """As where machines have other versions of what is installed, or of a file."""
    other = (
        "import os\nfrom rnn_longctx.train import corpus\n"
        "load = corpus.load_text\n"
        "def loaded(spec):\n"
        "    text = load(spec)\n"
        "    return type(text)(text.name, text.data[int(os.environ['RANK']):])\n"
        "corpus.load_text = loaded\n"
    )
    code, said = launched(TORCHRUN, config, code=other)
    lines = [line for line in said.splitlines() if line.startswith("rnn-longctx: ")]
    assert code != 0 and len(lines) == 1 and "data.text: rank 1 reads file:" in lines[0], said
    assert not (Path(config.out) / "log.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_ends_all(config: TrainConfig, rank: int) -> None:
    """In the middle of a step, while the other waits for its gradients."""
    fail = (
        "import os\nfrom rnn_longctx.errors import InputError\nfrom rnn_longctx.train.corpus import Corpus\n"
        "batch = Corpus.batch\n"
        "def failing(self, config, step):\n"
        f"    if step == 3 and os.environ['RANK'] == '{rank}':\n"
        "        raise InputError('no more text')\n"
        "    return batch(self, config, step)\n"
        "Corpus.batch = failing\n"
    )
    began = time.monotonic()
    code, said = launched(TORCHRUN, config, code=fail)
    assert code != 0 and time.monotonic() - began < 60
    assert "rnn-longctx: no more text" in said.splitlines()
    assert sorted(p.name for p in (Path(config.out) / "snapshots").iterdir()) == ["step-00000002.pt"]
