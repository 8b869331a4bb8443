"""Which heads leave their range, what is said of it, and whether capping them proves it."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from rnn_longctx.data import ByteTokenizer, Text
from rnn_longctx.errors import InputError
from rnn_longctx.measure.envelope import envelope_of
from rnn_longctx.mitigations import mitigate
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.probes.ablation import ablate, capped
from rnn_longctx.probes.onset import accused, doubling, onsets, verdict
from rnn_longctx.probes.probe import probe

TEXT = Text("made", bytes(torch.randint(32, 127, (6000,), generator=torch.Generator().manual_seed(1)).tolist()))


def table(norms, every=10, retention=0.5):
    """norms: {(layer, head): a norm a look}"""
    rows = [
        {"stream": 0, "row": 0, "layer": k[0], "head": k[1], "position": every * (i + 1), "norm": v,
         "retention": retention}
        for k, values in norms.items() for i, v in enumerate(values)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def tiny(A_init=(1e-6, 1e-5), seed=0, **more):
    torch.manual_seed(seed)
    lm = Mamba2LM(
        Mamba2Config(d_model=16, n_layer=2, headdim=16, d_state=8, A_init=A_init, dt_init=(0.05, 0.1), **more)
    )
    lm.train_length, lm.tokenizer, lm.name = 64, ByteTokenizer(), "tiny"
    return lm.eval()


def test_a_head_leaves_its_range_where_it_does_not_come_back():
    found = onsets(table({(0, 0): [1, 4, 1, 4, 5], (0, 1): [1, 1, 1, 1, 1], (1, 0): [9, 9, 9, 9, 4]}), [[1, 1], [1]])
    assert accused(found) == [(0, 0), (1, 0)]
    at = found.set_index(["layer", "head"])
    assert at.loc[(0, 0), "onset"] == 40 and at.loc[(1, 0), "onset"] == 10 and np.isnan(at.loc[(0, 1), "onset"])
    assert at.loc[(1, 0), "worst"] == 9 and at.loc[(1, 0), "ratio"] == 4
    still = onsets(table({(0, 0): [1, 4, 4, 1]}), [[1]])
    assert accused(still) == [] and still["worst"][0] == 4


def test_a_state_that_is_not_finite_has_left():
    found = onsets(table({(0, 0): [1, 1, float("nan"), float("nan")], (0, 1): [1, 5, 5, 5]}), [[1, 1]])
    assert accused(found)[0] == (0, 0) and found["onset"][0] == 30
    with pytest.raises(InputError, match="shorter than the tokens between"):
        onsets(table({}), [[1]])


def test_the_verdict_in_words():
    norms = {(3, 1): [1] * 13 + [9] * 3, (3, 4): [1] * 13 + [8] * 3, (5, 0): [1] * 13 + [7] * 3, (5, 1): [1] * 16}
    found = onsets(table(norms, every=110, retention=0.98), [[1] * 5] * 6)
    losses = pd.DataFrame({"position": range(110, 1761, 110), "loss": [1.0] * 14 + [2.5] * 2})
    said = verdict(found, losses, 512)
    assert said == (
        "layer 3 heads 1, 4 and layer 5 head 0 leave their range at 1.5K tokens; first token retained up to 0.98 "
        "at the end; loss doubles at 1.61K"
    )
    healthy = verdict(onsets(table({(0, 0): [1, 1.2], (0, 1): [1, 1.4]}), [[1, 1]]), losses.head(4), 512)
    assert healthy == "no head of 2 leaves its range (the furthest stands at 1.4x); the loss does not double"
    alone = onsets(table({(0, 0): [1, 9]}).assign(retention=[0.9, 0.4]), [[1]])
    assert verdict(alone) == "layer 0 head 0 leaves its range at 20 tokens; first token retained 0.40 at the end"
    many = {(0, h): [1, 5 + h] for h in range(9)}
    assert "(the worst 6 of 9)" in verdict(onsets(table(many), [[1] * 9]))


def test_where_the_loss_doubles():
    def at(*values):
        return doubling(pd.DataFrame({"position": range(10, 10 * len(values) + 1, 10), "loss": values}), 20)

    assert at(1, 1, 3, 1, 3, 3) == 50 and at(1, 1, 1.9) is None and at(1, 3, 9) == 30


@pytest.mark.parametrize("blown", [np.nan, np.inf])
def test_a_loss_that_is_no_number_is_said_in_words(blown, monkeypatch):
    heads = onsets(table({(0, 0): [1, 1.2]}), [[1]])

    def said(*values):
        losses = pd.DataFrame({"position": range(10, 10 * len(values) + 1, 10), "loss": values})
        return verdict(heads, losses, 20).split("; ")[1:]

    assert said(1, 1, 3, blown, blown) == ["loss doubles at 30", "the loss is not a number from 40 on"]
    cannot = "within the training length, so whether it doubles cannot be said"
    for values, start in [((1, blown, 3, 9), 20), ((blown, 1, 1, 1), 10), ((blown,), 10)]:
        assert said(*values) == [f"the loss is not a number from {start} on, {cannot}"]
    monkeypatch.setattr("rnn_longctx.probes.ablation.tail_loss", lambda model, ids: torch.tensor([blown]))
    found = ablate(tiny(), torch.zeros(1, 9, dtype=torch.int64), [(0, 0)], [[1, 1]] * 2, 4)
    assert str(found) == "the loss is not a number at 8: what capping recovers cannot be said" and found.fewest == []


@torch.no_grad()
def test_an_envelope_is_not_measured_where_states_are_no_numbers():
    lm = tiny()
    lm.mixers[1].in_proj.weight[32, 0] = torch.nan
    for text in (TEXT, None):
        with pytest.raises(InputError, match=r"not finite within 64 tokens \(first in layer 1\): nothing .*float32"):
            envelope_of(lm, 64, text)


@torch.no_grad()
def test_only_the_accused_are_capped():
    lm, ids = tiny(), torch.randint(256, (1, 128))
    norms, plain = [[0.01] * lm.mixers[0].heads] * 2, lm.new_cache()
    lm(ids, plain)
    before = [m.policy for m in lm.mixers]
    with capped(lm, [(0, 1)], norms):
        cache = lm.new_cache()
        lm(ids, cache)
    assert [m.policy for m in lm.mixers] == before
    size = cache.layers[0].scan.state.flatten(-2).norm(dim=-1)[0]
    free = plain.layers[0].scan.state.flatten(-2).norm(dim=-1)[0]
    assert float(size[1]) == pytest.approx(0.01, rel=1e-4) and float(size[0]) == pytest.approx(float(free[0]), rel=1e-4)


def test_the_fewest_that_recover(monkeypatch):
    """Of four accused, all heads there are, the worst two carry 90% of the loss."""
    lm = tiny()
    ranked = [(0, 0), (1, 1), (0, 1), (1, 0)]
    weight = {(0, 0): 0.5, (1, 1): 0.4, (0, 1): 0.08, (1, 0): 0.02}
    now = {"heads": ()}

    class Capped:
        def __init__(self, model, heads, norms):
            self.heads = heads

        def __enter__(self):
            now["heads"] = tuple(self.heads)

        def __exit__(self, *error):
            now["heads"] = ()

    def loss(model, ids):
        if model.restart is not None:
            return torch.tensor([1.0])
        return torch.tensor([3.0 - 2.0 * sum(weight[h] for h in now["heads"])])

    monkeypatch.setattr("rnn_longctx.probes.ablation.capped", Capped)
    monkeypatch.setattr("rnn_longctx.probes.ablation.tail_loss", loss)
    lines = []
    found = ablate(lm, torch.zeros(1, 9, dtype=torch.int64), ranked, [[1, 1]] * 2, 4, say=lines.append)
    assert [line.partition(", capped")[0] for line in lines[1:]] == [
        "all 4 accused", "the worst 2 of the accused", "the worst 1 of the accused", "the 2 that are left"
    ]  # fmt: skip
    assert found.fewest == ranked[:2] and found.recovered == pytest.approx(0.9)
    assert found.others == pytest.approx([0.1]) and found.all_accused == pytest.approx(1.0)  # two are left: one draw
    assert "capping 2 heads recovers 90%" in str(found) and "as many drawn from the rest" in str(found)
    assert lm.restart is None
    weight.update({(1, 1): 0.2, (0, 1): 0.15, (1, 0): 0.15})
    fewer = ablate(lm, torch.zeros(1, 9, dtype=torch.int64), ranked, [[1, 1]] * 2, 4)
    assert len(fewer.fewest) == 3 and fewer.drawn == 1 and fewer.others == pytest.approx([0.15])
    assert "the 1 that are left recover 15%" in str(fewer)  # not as many, and not five times
    alone = ablate(lm, torch.zeros(1, 9, dtype=torch.int64), ranked[:1], [[1, 1]] * 2, 4)
    assert "capping 1 head recovers 50%" in str(alone)
    assert ablate(lm, torch.zeros(1, 9, dtype=torch.int64), [], [[1, 1]] * 2, 4).fewest == []


def test_nothing_lost_is_not_recovered(monkeypatch):
    lm, ids = tiny(), torch.zeros(1, 9, dtype=torch.int64)
    monkeypatch.setattr(
        "rnn_longctx.probes.ablation.tail_loss", lambda model, ids: torch.tensor([1.0 + (model.restart is not None)])
    )
    found = ablate(lm, ids, [(0, 0), (1, 1)], [[1, 1]] * 2, 4)
    assert found.fewest == [] and str(found).startswith("nothing is lost at 8 that capping could recover (1.000 ")


def test_probe_of_a_model_that_never_forgets_and_of_one_that_does(tmp_path):
    sick = probe(tiny(), TEXT, 2048, every=32, calibration_text=TEXT, prove=True)
    assert len(accused(sick.heads)) == 4 and sick.heads["retained"].min() > 0.9
    assert sick.trace["position"].max() == 2048 and len(sick.losses) == 64
    healthy = probe(tiny((4.0, 16.0)), TEXT, 2048, every=32, calibration_text=TEXT)
    assert accused(healthy.heads) == [] and "no head of 4 leaves" in healthy.verdict
    paths = sick.save(tmp_path / "p")
    assert all(p.is_file() for p in paths)
    kept = json.loads((tmp_path / "p" / "probe.json").read_text())
    assert kept["verdict"] == sick.verdict and kept["ablation"]["length"] == 2048 and kept["text"] == "made"
    assert len(pd.read_parquet(paths[0])) == 4 * 64


@torch.no_grad()
def test_probe_of_a_model_whose_states_are_not_finite(monkeypatch):
    """Reported as out of range from the first look on, its layer and those above; below it as ever. (The envelope is of
    before: this stands for states that are finite within the training length.)"""
    lm = tiny()
    before = envelope_of(lm, 64, TEXT)
    monkeypatch.setattr("rnn_longctx.probes.probe.envelope_of", lambda *_: before)
    lm.mixers[1].in_proj.weight[32, 0] = torch.nan  # of the inputs x; before it are those of z
    found = probe(lm, TEXT, 512, every=32, calibration_text=TEXT)
    heads = found.heads.set_index(["layer", "head"])
    assert heads.loc[(1, 0), "onset"] == 32 and heads.loc[(1, 0), "ratio"] == np.inf
    assert heads.loc[0, "horizon"].notna().all() and "doubles at" not in found.verdict
    assert (
        "the loss is not a number from 32 on, within the training length, so whether it doubles cannot" in found.verdict
    )
    lm.mixers[0].in_proj.weight[-1, 0] = torch.nan  # of dt: its decays are no numbers either
    found = probe(lm, TEXT, 512, every=32, calibration_text=TEXT)
    assert len(accused(found.heads)) >= 3 and len(found.heads) == 4


def test_remembrance_is_of_the_prompt(monkeypatch):
    """Also where the accused were proved on text."""
    seen = []
    monkeypatch.setattr("rnn_longctx.probes.probe.remembrance", lambda model, ids: seen.append(ids))
    for prove in (False, True):
        probe(tiny(), TEXT, 256, prompt="newline", every=64, calibration_text=TEXT, prove=prove, remember=True)
    assert torch.equal(*seen)


@pytest.mark.parametrize("prompt", ["newline", "passkey"])
def test_other_prompts(prompt):
    found = probe(tiny(), TEXT, 512, prompt=prompt, every=64, slices=2, calibration_text=TEXT)
    assert found.trace["row"].nunique() == 2 and found.about["prompt"] == prompt


def test_bad_input(tmp_path):
    lm = tiny()
    for arguments, message in (
        ((100, {"every": 256}), "100 tokens are fewer than one look"),
        ((512, {"prompt": "newlines"}), "unknown prompt 'newlines'; did you mean \"newline\""),
        ((10**6, {}), "made has 6000 bytes; a slice of 1000001 was asked for"),
        ((512, {"slices": 0}), "at least 1 row"),
    ):
        with pytest.raises(InputError, match=message):
            probe(lm, TEXT, arguments[0], calibration_text=TEXT, **arguments[1])
    with mitigate(lm, "decimate"), pytest.raises(InputError, match="a remedy for prompts changes nothing"):
        probe(lm, TEXT, 512, calibration_text=TEXT)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        probe(lm, TEXT, 256, calibration_text=TEXT).save(tmp_path / "file")
    lm.train_length = None
    with pytest.raises(InputError, match="give --train-length"):
        probe(lm, TEXT, 512)
