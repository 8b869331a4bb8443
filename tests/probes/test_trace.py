"""What `record` sees, against float64 states read out at every boundary."""

import math

import pandas as pd
import pytest
import torch

import rnn_longctx
from rnn_longctx import mitigate, record
from rnn_longctx.errors import InputError
from rnn_longctx.models.generate import generate
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config

EVERY = 16


def model(seed=0, **more):
    torch.manual_seed(seed)
    shape = {"d_model": 32, "n_layer": 3, "headdim": 16, "d_state": 8, "A_init": (0.01, 4.0)} | more
    return Mamba2LM(Mamba2Config(**shape)).eval()


@torch.no_grad()
def expected(lm, ids, every=EVERY):
    """From float64 states by the sequential definition, read in steps of `every`."""
    lm, rows = lm.double(), []
    lm.use_backend("reference")
    cache, before = lm.new_cache(), 0.0
    for t in range(0, ids.shape[1] // every * every, every):
        lm(ids[:, t : t + every], cache)
        log_decay = torch.stack([c.scan.log_decay for c in cache.layers])  # (L, B, H)
        for i, carry in enumerate(cache.layers):
            S, mixer = carry.scan.state, lm.mixers[i]
            for b in range(len(ids)):
                for h in range(mixer.heads):
                    s, total = S[b, h], float(log_decay[i, b, h])
                    decay = (total - (0.0 if isinstance(before, float) else float(before[i, b, h]))) / every
                    rows.append({
                        "row": b, "layer": i, "head": h, "position": t + every, "mean": float(s.mean()),
                        "variance": float(s.var(correction=0)), "rms": float(s.square().mean().sqrt()),
                        "max": float(s.abs().max()), "norm": float(s.norm()), "retention": math.exp(total),
                        "decay": decay, "input_scale": decay / float(mixer.A[h]), "horizon": -1 / decay,
                    })  # fmt: skip
        before = log_decay
    return pd.DataFrame(rows).sort_values(["row", "layer", "head", "position"], ignore_index=True)


@pytest.mark.parametrize("splits", [(100,), (7, 40, 1, 52), (16, 16, 16, 16, 36)])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@torch.no_grad()
def test_statistics(backend, splits):
    lm, ids = model(), torch.randint(256, (2, 100))
    lm.use_backend(backend)
    cache, outputs = lm.new_cache(), []
    plain = lm(ids)
    with record(lm, every=EVERY) as trace:
        for part in ids.split(splits, 1):
            outputs.append(lm(part, cache))
    assert torch.allclose(torch.cat(outputs, 1), plain, atol=1e-5)
    assert all(m.observer is None for m in lm.mixers)
    found, wanted = trace.table(), expected(lm, ids)
    assert (found["stream"] == 0).all() and len(found) == len(wanted)
    for column in wanted:
        assert found[column].to_numpy() == pytest.approx(wanted[column].to_numpy(), rel=1e-4, abs=1e-7), column


@pytest.mark.parametrize("splits", [(50,), (3, 20, 1, 26)])
@torch.no_grad()
def test_the_convolution(splits):
    """At every look what the carry holds there."""
    lm, ids = model(), torch.randint(256, (2, 50))
    cache, other = lm.new_cache(), lm.new_cache()
    with record(lm, every=EVERY) as trace:
        for part in ids.split(splits, 1):
            lm(part, cache)
    found = trace.convolution().set_index(["row", "layer", "position"])
    assert len(found) == 2 * 3 * 3
    for t in range(0, 48, EVERY):
        lm(ids[:, t : t + EVERY], other)
        for layer, carry in enumerate(other.layers):
            for row, held in enumerate(carry.conv):
                one = found.loc[(row, layer, t + EVERY)]
                assert one["mean"] == pytest.approx(float(held.mean()), rel=1e-4, abs=1e-6)
                assert one["variance"] == pytest.approx(float(held.var(correction=0)), rel=1e-3)
                assert one["max"] == pytest.approx(float(held.abs().max()), rel=1e-5)
                assert one["norm"] == pytest.approx(float(held.norm()), rel=1e-4)
    assert not lm.mixers[0]._forward_pre_hooks and not lm.mixers[0].in_proj._forward_hooks


@torch.no_grad()
def test_in_decode_and_of_some_layers():
    lm, ids = model(), torch.randint(256, (1, 20))
    with record(lm, layers=[2], every=8) as trace:
        new = generate(lm, ids, 30)
    whole = torch.cat([ids, new], 1)
    found, wanted = trace.table(), expected(lm, whole, 8)
    wanted = wanted[wanted["layer"] == 2]
    assert (found["layer"] == 2).all() and found["position"].max() == 48
    both = found.merge(wanted, on=["row", "layer", "head", "position"])
    assert len(both) == len(found) and both["norm_x"].to_numpy() == pytest.approx(both["norm_y"].to_numpy(), rel=1e-4)


@torch.no_grad()
def test_medians_and_channels_on_request():
    lm, ids = model(), torch.randint(256, (1, 40))
    with record(lm, every=EVERY, whole=True) as trace:
        lm(ids)
    cache = lm.new_cache()
    lm(ids[:, :32], cache)
    at = trace.table().query("position == 32").set_index(["layer", "head"])
    for i, carry in enumerate(cache.layers):
        for h, s in enumerate(carry.scan.state[0]):
            assert at.loc[(i, h), "median"] == pytest.approx(float(s.median()), rel=1e-3, abs=1e-7)
            assert at.loc[(i, h), "channels"][0] == int(s.norm(dim=1).argmax())


@torch.no_grad()
def test_gates_under_a_policy_and_a_second_stream():
    """The mean input scale is dt's own, times the policy's gain; a new cache is a new stream."""
    lm, ids = model(), torch.randint(256, (1, 48))
    with record(lm, every=EVERY) as plain:
        lm(ids)
    with mitigate(lm, "rri:alpha=0.9,beta=0.5"), record(lm, layers=[0], every=EVERY) as trace:
        lm(ids)
        lm(ids[:, :EVERY])
    first, found = plain.table().query("layer == 0"), trace.table()
    again = found[found["stream"] == 0]
    assert again["input_scale"].to_numpy() == pytest.approx(0.5 * first["input_scale"].to_numpy(), rel=1e-4)
    assert again["decay"].to_numpy() == pytest.approx(first["decay"].to_numpy() + math.log(0.9), rel=1e-4)
    assert sorted(found["stream"].unique()) == [0, 1] and len(found[found["stream"] == 1]) == lm.config.nheads


def test_a_stream_that_had_begun():
    """Its first interval is not known, and says so."""
    lm, ids, cache = model(), torch.randint(256, (1, 64)), None
    with torch.no_grad():
        cache = lm.new_cache()
        lm(ids[:, :20], cache)
        with record(lm, every=EVERY) as trace:
            lm(ids[:, 20:], cache)
    first = trace.table().groupby("position")["decay"].apply(lambda v: v.isna().all())
    assert first.to_dict() == {32: True, 48: False, 64: False}


@torch.no_grad()
def test_a_stream_of_other_rows_that_had_begun():
    """It stands further than the stream before, and is not taken for it."""
    lm, ids = model(), torch.randint(256, (2, 32))
    cache = lm.new_cache()
    lm(ids[:1, :20], cache)
    lm(ids[:1], cache)
    with record(lm, every=EVERY) as trace:
        lm(ids)
        lm(ids[:1], cache)
    found = trace.table()
    assert sorted(found["stream"].unique()) == [0, 1]
    second = found[found["stream"] == 1].groupby("position")["decay"].apply(lambda v: v.isna().all())
    assert second.to_dict() == {64: True, 80: False}


@torch.no_grad()
def test_a_layer_named_twice_is_one():
    lm, ids = model(), torch.randint(256, (1, 32))
    with record(lm, layers=[1, 1], every=EVERY) as trace:
        lm(ids)
    assert len(trace.table()) == 2 * lm.config.nheads and len(trace.convolution()) == 2


def test_bad_input():
    lm = model()
    for arguments, message in (
        ({"layers": [3]}, "layer 3 is not there: the model has 3"),
        ({"layers": 2}, "expected whole numbers"),
        ({"layers": ["a"]}, "expected whole numbers"),
        ({"every": 0}, "every is a positive"),
        ({"every": 2.5}, "every is a positive"),
        ({"every": "k"}, "every is a positive"),
    ):
        with pytest.raises(InputError, match=message), record(lm, **arguments):
            pass
    with record(lm), pytest.raises(InputError, match="watched already"), record(lm):
        pass
    with record(lm, every=64) as trace, torch.no_grad():
        lm(torch.randint(256, (1, 10)))
    assert trace.table().empty and trace.convolution().empty
    few = trace
    with record(lm, every=5) as trace, torch.no_grad():
        lm(torch.randint(256, (1, 10)))
    assert list(few.table()) == list(trace.table()) and list(few.convolution()) == list(trace.convolution())
    with record(lm, every=4), pytest.raises(InputError, match="one position"), torch.no_grad():
        lm(torch.randint(256, (2, 10)), mask=torch.tensor([[False] * 3 + [True] * 7, [True] * 10]))


def test_it_is_public():
    assert rnn_longctx.record is record
