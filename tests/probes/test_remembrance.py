"""Effective remembrance against whole readings, row by row, and a case whose answer is known."""

import numpy as np
import pandas as pd
import pytest
import torch
import transformers

from rnn_longctx import mitigate
from rnn_longctx.errors import InputError
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.probes.remembrance import remembered, remembrance


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def model(**more):
    shape = {"d_model": 24, "n_layer": 2, "headdim": 8, "d_state": 7, "vocab_size": 31, "A_init": (0.01, 0.5)} | more
    lm = Mamba2LM(Mamba2Config(**shape, dt_init=(0.05, 1.0), tie_embeddings=False)).double().eval()
    for weight in (lm.backbone.embedding.weight, lm.lm_head.weight):  # what comes next depends on what was read
        torch.nn.init.normal_(weight, std=0.5)
    return lm


@torch.no_grad()
def expected(lm, ids, cuts):
    def q(row):
        return lm.logits(lm(row[None])[0, -1]).softmax(-1).numpy()

    return [np.abs(q(row[t:]) - q(row)).sum() / 2 for row in ids for t in cuts]


@pytest.mark.parametrize("remedy", ["none", "rri:alpha=0.9,beta=0.5", "window:tokens=9", "reset:every=8,overlap=3"])
@pytest.mark.parametrize("segment", [1, 20, 4096])
def test_against_whole_readings(remedy, segment):
    lm, ids, cuts = model(), torch.randint(31, (3, 43)), [40, 5, 17, 0, 42, 5]
    with mitigate(lm, remedy):
        found = remembrance(lm, ids, cuts, segment)
        wanted = expected(lm, ids, sorted(set(cuts)))
    assert list(found.columns) == ["row", "cut", "kept", "tv"]
    assert found["row"].tolist() == [i for i in range(3) for _ in range(5)]
    assert found["cut"].tolist() == [0, 5, 17, 40, 42] * 3 and (found["kept"] == 43 - found["cut"]).all()
    assert found["tv"].to_numpy() == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert found.query("cut == 42")["tv"].max() > 1e-2  # there is something to see


def test_default_cuts_leave_powers_of_two():
    for length, kept in ((2, [1]), (5, [4, 2, 1]), (8, [4, 2, 1]), (9, [8, 4, 2, 1])):
        assert remembrance(model(), torch.randint(31, (1, length)))["kept"].tolist() == kept


def test_a_window_is_what_one_layer_remembers():
    """One layer that holds its last 11 inputs, each made of 4 tokens, knows the last 14 tokens and no more."""
    lm, ids = model(n_layer=1), torch.randint(31, (2, 60))
    with mitigate(lm, "window:tokens=11"):
        frame = remembrance(lm, ids, range(30, 60))
    assert frame.query("kept >= 14")["tv"].max() < 1e-12 < frame.query("kept == 13")["tv"].min()
    assert remembered(frame, below=1e-12).to_dict() == {0: 14.0, 1: 14.0}


def test_adopted_models():
    config = transformers.Mamba2Config(
        vocab_size=31, hidden_size=16, num_hidden_layers=2, num_heads=4, head_dim=8, state_size=6, n_groups=1, expand=2
    )
    lm, ids = transformers.Mamba2ForCausalLM(config).eval(), torch.randint(31, (2, 21))
    found = remembrance(lm, ids, [4, 20])["tv"].to_numpy()
    with torch.no_grad():
        whole, *parts = (lm(ids[:, t:]).logits[:, -1].double().softmax(-1) for t in (0, 4, 20))
    wanted = torch.stack([(p - whole).abs().sum(-1) / 2 for p in parts], 1)
    assert found == pytest.approx(wanted.flatten().numpy(), rel=1e-3, abs=1e-7)


def test_remembered():
    def frame(tv, kept=(64, 16, 4, 1)):
        return pd.DataFrame({"row": 3, "cut": [100 - k for k in kept], "kept": kept, "tv": tv})

    for tv, wanted in (
        ([0.01, 0.04, 0.3, 0.9], 16),
        ([0.01, 0.2, 0.01, 0.9], 64),  # a dip is not remembering
        ([0.05, 0.01, 0.01, 0.01], float("inf")),  # below, not at
        ([0.0, 0.0, 0.0, 0.0], 1),
        ([0.01, float("nan"), 0.01, 0.01], 64),
    ):
        assert remembered(frame(tv).sample(frac=1)).to_dict() == {3: wanted}, tv
    assert remembered(frame([0.01, 0.2, 0.4, 0.9]), below=0.3).to_dict() == {3: 16}
    assert remembered(frame([0.0, 0.2, 0.4, 0.9], (100, 16, 4, 1))).to_dict() == {3: float("inf")}  # nothing cut off
    both = pd.concat([frame([0.01, 0.2, 0.4, 0.9]), frame([0.01, 0.01, 0.4, 0.9]).assign(row=1)])
    assert remembered(both).to_dict() == {1: 16, 3: 64}


def test_bad_input():
    lm, ids = model(), torch.randint(31, (2, 9))
    for arguments, message in (
        ((ids, [3, 9]), "expected 0 to 8, got 9"),
        ((ids, [-1]), "got -1"),
        ((ids, []), "at least one"),
        ((ids, 3), r"whole numbers of tokens, such as \[3\], got 3"),
        ((ids, [1.5]), "whole numbers"),
        ((ids, "12"), "whole numbers"),
        ((ids.float(),), "got float32"),
        ((ids + 31,), "lie in 0 to 30"),
        (("abc",), "must be a tensor .*, got str 'abc'"),
        ((ids[0],), r"\(B, T\)"),
        ((ids[:, :1],), "row of 2 tokens"),
        ((ids, None, 0), "segment"),
    ):
        with pytest.raises(InputError, match=message):
            remembrance(lm, *arguments)
    good = remembrance(lm, ids)
    for arguments, message in (
        ((good.drop(columns="tv"),), "'tv'"),
        ((good, 0.0), "threshold"),
        ((good, 1.5), "threshold"),
        ((good[:0],), "no cut"),
        ((remembrance(lm, ids, [0]),), "no cut"),
    ):
        with pytest.raises(InputError, match=message):
            remembered(*arguments)
