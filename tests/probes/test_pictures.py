"""The pictures of a probe, and its command line."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import rnn_longctx
from rnn_longctx import cli
from rnn_longctx.data import ByteTokenizer
from rnn_longctx.errors import InputError
from rnn_longctx.loggers import scalars
from rnn_longctx.models.checkpoint.save import save
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.probes.pictures import draw, ratios
from rnn_longctx.probes.probe import Probe, probe, scalar_rows


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    lm = Mamba2LM(Mamba2Config(d_model=16, n_layer=2, headdim=16, d_state=8, A_init=(1e-6, 1e-5), dt_init=(0.05, 0.1)))
    lm.train_length, lm.tokenizer = 64, ByteTokenizer()
    save(lm.eval(), tmp_path / "sick")
    (tmp_path / "t.txt").write_bytes(bytes(np.random.default_rng(0).integers(32, 127, 4000).tolist()))
    return tmp_path


def test_ratios_are_norms_over_the_envelope(checkpoint):
    text = rnn_longctx.load_text(checkpoint / "t.txt")
    found = probe(rnn_longctx.load(checkpoint / "sick"), text, 256, every=32, slices=2, calibration_text=text)
    one = ratios(found).set_index(["layer", "head", "position"])
    mean = found.trace[(found.trace["layer"] == 1) & (found.trace["head"] == 0)].groupby("position")["norm"].mean()
    assert one.loc[(1, 0, 128), "ratio"] == pytest.approx(mean[128] / found.envelope[1][0])


def test_a_state_that_is_not_finite_is_beyond_its_range(checkpoint):
    """In the pictures and in a log: dark and counted, not a gap."""
    text = rnn_longctx.load_text(checkpoint / "t.txt")
    found = probe(rnn_longctx.load(checkpoint / "sick"), text, 128, every=32, calibration_text=text)
    gone = found.trace.assign(norm=found.trace["norm"].where(found.trace["position"] < 100))
    found = Probe(found.about, gone, found.losses, found.heads, found.envelope)
    assert np.isinf(ratios(found).query("position == 128")["ratio"]).all()
    last = dict(scalar_rows(found))[128]
    assert last["heads_beyond"] == len(found.heads) and last["largest_ratio"] == np.inf


@pytest.mark.parametrize("worst", ["nan", "healthy"])
def test_every_probe_can_be_drawn(checkpoint, worst):
    """States that are not finite, and heads none of which left its range."""
    text = rnn_longctx.load_text(checkpoint / "t.txt")
    found = probe(rnn_longctx.load(checkpoint / "sick"), text, 128, every=32, calibration_text=text, remember=True)
    if worst == "nan":
        trace = found.trace.assign(norm=found.trace["norm"].where(found.trace["position"] < 100))
        found = Probe(found.about, trace, found.losses, found.heads, found.envelope, None, found.remembrance)
    else:
        heads = found.heads.assign(onset=float("nan"))
        found = Probe(found.about, found.trace, found.losses, heads, found.envelope)
    paths = draw(found, checkpoint)
    assert {p.name for p in paths} >= {"sheet.png", "heads.png", "norms.png", "retention.png", "loss.png"}
    assert ("remembrance.png" in {p.name for p in paths}) == (worst == "nan")
    for path in paths:
        assert len(np.unique(np.asarray(Image.open(path)))) > 20  # something is on it


def test_command_line(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint)
    sick, common = str(checkpoint / "sick"), ["--text", "t.txt", "--every", "32", "--device", "cpu"]
    one = CliRunner().invoke(cli.app, ["probe", sick, "--length", "512", "--prove", "--out", "one", *common])
    assert one.exit_code == 0, one.output
    assert "leave their range" in one.output and "recovers" in one.output
    assert json.loads((checkpoint / "one" / "probe.json").read_text())["ablation"]["length"] == 512
    two = CliRunner().invoke(cli.app, ["probe", sick, sick, "--length", "512", "--out", "two", *common])
    assert two.exit_code == 0, two.output
    table = pd.read_csv(checkpoint / "two" / "models.csv")
    assert len(table) == 2 and (table["accused"] >= 2).all() and (table["train_length"] == 64).all()


@pytest.mark.parametrize(("more", "message"), [
    (["--length", "16"], "16 tokens are fewer than one look every 32"),
    (["--length", "256", "--prompt", "textt"], "unknown prompt 'textt'"),
    (["--length", "1m"], "was asked for"),
    (["--length", "256", "--every", "0"], "--every is a positive whole number"),
    (["--length", "256", "--mitigation", "rrj"], "unknown mitigation"),
])  # fmt: skip
def test_bad_input_is_one_line(checkpoint, monkeypatch, more, message, capsys):
    monkeypatch.chdir(checkpoint)
    monkeypatch.setattr("sys.argv", ["rnn-longctx", "probe", "sick", "--text", "t.txt", "--every", "32", *more])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and message in said and "\n" not in said


def test_scalars_go_to_tensorboard_or_wandb(checkpoint, monkeypatch):
    """Stand-ins for the two libraries, which need not be installed."""
    seen = []

    class Writer:
        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            seen.append("closed")

        def add_scalar(self, key, value, step):
            seen.append((key, value, step))

        def log(self, values, step):
            seen.extend((k, v, step) for k, v in values.items())

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=Writer))
    text = rnn_longctx.load_text(checkpoint / "t.txt")
    found = probe(rnn_longctx.load(checkpoint / "sick"), text, 128, every=32, calibration_text=text)
    for kind in ("tensorboard", "wandb"):
        seen.clear()
        with scalars([kind], checkpoint, "x") as write:
            for position, values in scalar_rows(found):
                write(values, position)
        assert seen[-1] == "closed" and {s[2] for s in seen[:-1]} == {32, 64, 96, 128}
        at = {s[0]: s[1] for s in seen[:-1] if s[2] == 96}
        assert at["loss"] == pytest.approx(found.losses["loss"][2]) and {"norm/layer1", "heads_beyond"} <= set(at)
        assert at["largest_ratio"] == pytest.approx(ratios(found).query("position == 96")["ratio"].max())
    monkeypatch.setitem(sys.modules, "wandb", None)
    for kind, message in (("wandb", "wandb is not installed"), ("tensorbord", 'did you mean "tensorboard"')):
        with pytest.raises(InputError, match=message), scalars([kind], checkpoint, "x"):
            pass
