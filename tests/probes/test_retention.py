"""What is left of the first token, against the step sizes themselves."""

import math

import pandas as pd
import pytest
import torch

from rnn_longctx import mitigate, record
from rnn_longctx.errors import InputError
from rnn_longctx.measure.steps import measure_steps
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.probes.retention import retention
from rnn_longctx.recurrence.policy import ScanPolicy


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def model():
    shape = {"d_model": 32, "n_layer": 3, "headdim": 8, "d_state": 6, "A_init": (0.01, 20.0), "dt_init": (1e-3, 0.3)}
    return Mamba2LM(Mamba2Config(**shape, A_log_uniform=True)).eval()


@torch.no_grad()
def watched(lm, *streams, every=16):
    with record(lm, every=every) as trace:
        for ids in streams:
            lm(ids)
    return trace.table()


def test_against_step_sizes():
    lm, ids = model(), torch.randint(256, (3, 144))
    found = retention(watched(lm, ids), 48).set_index(["layer", "head"])
    assert list(found.columns) == ["at_train", "at_end", "end", "horizon", "class"]
    assert len(found) == 3 * lm.config.nheads and (found["end"] == 144).all()
    for i, (mixer, dt) in enumerate(zip(lm.mixers, measure_steps(lm, ids))):
        decay = dt.double() * mixer.A.detach().double()  # (rows, T, H)
        for h in range(mixer.heads):
            row, d = found.loc[(i, h)], decay[..., h]
            at_train = math.exp(d[:, :48].sum(1).mean())
            assert row["at_train"] == pytest.approx(at_train, rel=1e-4)
            assert row["at_end"] == pytest.approx(math.exp(d.sum(1).mean()), rel=1e-3, abs=1e-30)
            assert row["horizon"] == pytest.approx(-1 / float(d.mean()), rel=1e-4)
            assert row["class"] == ("global" if at_train > 0.05 else "local")
    other = retention(watched(lm, ids), 48, theta=float(found["at_train"].median()))
    assert (other["class"] == "global").sum() == len(found) // 2  # half the heads lie above the median


def test_streams_count_alike_and_may_have_begun_before():
    lm, ids = model(), torch.randint(256, (2, 96))
    both = retention(watched(lm, ids[:1], ids[1:, :64]), 32)
    one, other = (retention(watched(lm, part), 32) for part in (ids[:1], ids[1:, :64]))
    assert both["at_train"].to_numpy() == pytest.approx((one["at_train"] * other["at_train"]) ** 0.5, rel=1e-5)
    assert (both["end"] == 80).all()
    with torch.no_grad():
        cache = lm.new_cache()
        lm(ids[:1, :20], cache)
        with record(lm, every=16) as trace:
            lm(ids[:1, 20:], cache)
    late = retention(trace.table(), 32)
    assert late["at_train"].to_numpy() == pytest.approx(one["at_train"], rel=1e-5)
    assert late["horizon"].notna().all()


def test_between_two_looks():
    lm, ids = model(), torch.randint(256, (1, 64))
    table = watched(lm, ids)
    at32, at36, at48 = (retention(table, n)["at_train"] for n in (32, 36, 48))
    assert at36.to_numpy() == pytest.approx(at32**0.75 * at48**0.25, rel=1e-6)


def test_under_a_remedy_and_without_decay():
    lm, ids = model(), torch.randint(256, (1, 64))
    plain = retention(watched(lm, ids), 32)
    with mitigate(lm, "rri:alpha=0.9,beta=1"):
        found = retention(watched(lm, ids), 32)
    below = found["layer"] == 0  # further up the remedy changes the steps too
    assert found[below]["at_train"].to_numpy() == pytest.approx(plain[below]["at_train"] * 0.9**32, rel=1e-4)
    for mixer in lm.mixers:
        mixer.policy = ScanPolicy(min_dt=float("inf"))
    kept = retention(watched(lm, ids), 32)
    assert (kept["at_end"] == 1).all() and (kept["horizon"] > 1e9).all() and (kept["class"] == "global").all()


def test_a_retention_of_zero():
    table = pd.DataFrame({
        "stream": 0, "row": 0, "layer": 0, "head": 0, "position": [8, 16, 24], "retention": [1e-300, 0.0, 0.0],
        "decay": [-90.0, -90.0, -90.0],
    })  # fmt: skip
    for length in (12, 16, 20):
        row = retention(table, length).iloc[0]
        assert (row["at_train"], row["at_end"], row["class"]) == (0, 0, "local") and row["horizon"] == 1 / 90


def test_bad_input():
    lm, ids = model(), torch.randint(256, (1, 64))
    table = watched(lm, ids)
    for arguments, message in (
        ((table, 65), "up to 64 tokens, the training length is 65"),
        ((table, 15), "first looked at after 16 tokens"),
        ((watched(lm, ids, ids[:, :40]), 48), "stream 1 was looked at up to 32"),
        ((table, 0), "train_length"),
        ((table, None), "train_length"),
        ((ids, 32), "expected a table of record"),
        ((table, 32, 1.0), "theta"),
        ((table.drop(columns="decay"), 32), "'decay'"),
        ((watched(lm, ids[:, :9]), 8), "empty: record with an"),
        ((table[:0], 32), "empty"),
        ((table.assign(retention=float("nan")), 32), "not a number"),
    ):
        with pytest.raises(InputError, match=message):
            retention(*arguments)
