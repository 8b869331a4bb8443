"""Contributions against the scan's own outputs in float64, and against the sum written out."""

import math

import pytest
import torch
import transformers
from streams import reference_scan

from rnn_longctx import mitigate
from rnn_longctx.errors import InputError
from rnn_longctx.measure.steps import measure_steps
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.base import Recurrent
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.probes.attribution import attribute
from rnn_longctx.recurrence.policy import Cap, ScanPolicy

VOCAB = 47


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@torch.no_grad()
def model(dtype=torch.float64, **more):
    shape = {"d_model": 24, "n_layer": 2, "headdim": 6, "d_state": 5, "ngroups": 2, "vocab_size": VOCAB} | more
    lm = Mamba2LM(Mamba2Config(**shape, A_init=(0.005, 1.0), dt_init=(0.01, 1.0), A_log_uniform=True))
    for mixer in lm.mixers:
        mixer.D.normal_()
    torch.nn.init.normal_(lm.backbone.embedding.weight)
    return lm.to(dtype).eval()


def policies(lm, kind):
    """A policy a layer, other values in every head."""
    heads = lm.config.nheads
    if kind == "plain":
        return [ScanPolicy()] * 2
    if kind == "gates":
        return [
            ScanPolicy(mul=torch.rand(heads) + 0.5, add=-torch.rand(heads) / 9, gain=torch.rand(heads) + 0.1)
            for _ in range(2)
        ]
    steps = measure_steps(lm, torch.randint(VOCAB, (1, 80)))
    filters = [dt[0].quantile(0.4, dim=0) * (torch.arange(heads) % 3 > 0) for dt in steps]  # some heads drop nothing
    return [ScanPolicy(min_dt=g, gain=0.7) for g in filters]


@torch.no_grad()
def scans(lm, ids, monkeypatch):
    """What every layer's scan was given, and the policy it was given with."""
    seen, recurrence = [], Recurrent.recurrence

    class Spy:
        @staticmethod
        def scan(inputs, gates, span, **settings):
            limits = {"dt_bias": gates.dt_bias, "dt_limit": gates.dt_limit, "policy": settings["policy"]}
            seen.append(((inputs.x, gates.dt, gates.A, inputs.B, inputs.C), limits))
            return recurrence.scan(inputs, gates, span, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Recurrent, "recurrence", Spy)
        lm(ids)
    return seen


@pytest.mark.parametrize("kind", ["plain", "gates", "filter"])
@pytest.mark.parametrize("segment", [1, 7, 4096])
def test_contributions_sum_to_the_scans_output(kind, segment, monkeypatch):
    lm, ids, queries = model(dt_limit=(0.02, 1.5)), torch.randint(VOCAB, (1, 43)), [0, 20, 21, 42]
    for mixer, policy in zip(lm.mixers, policies(lm, kind)):
        mixer.policy = policy
    found = attribute(lm, ids, queries=queries, segment=segment)
    assert found.queries == tuple(queries) and found.values.dtype == torch.float64
    assert found.values.shape == (2, 4, lm.config.nheads, 43)
    for i, (inputs, settings) in enumerate(scans(lm, ids, monkeypatch)):
        y, _, _ = reference_scan(*inputs, **settings)  # without D
        x = inputs[0][0].transpose(0, 1)  # (H, T, P)
        direction = x / x.norm(dim=-1, keepdim=True)
        for j, q in enumerate(queries):
            summed = torch.einsum("hs,hsp->hp", found.values[i, j], direction)
            torch.testing.assert_close(summed, y[0, q], rtol=1e-9, atol=1e-12)
    assert not any(m._forward_hooks for m in lm.modules()) and all(m.tap is None for m in lm.mixers)


@pytest.mark.parametrize("kind", ["gates", "filter"])
def test_one_term_written_out(kind, monkeypatch):
    lm, ids = model(), torch.randint(VOCAB, (1, 31))
    for mixer, policy in zip(lm.mixers, policies(lm, kind)):
        mixer.policy = policy
    table = attribute(lm, ids, segment=8).table(layer=1).set_index(["head", "token"])
    (x, dt, A, B, C), settings = scans(lm, ids, monkeypatch)[1]
    p, heads, dropped = settings["policy"], lm.config.nheads, 0

    def of(value, h):
        return value if isinstance(value, float) else value[h]

    for h in range(heads):
        g, terms = h // (heads // 2), []
        for s in range(31):
            left, scale = 0.0, 0.0
            for u in range(s, 31):
                step = math.log1p(math.exp(float(dt[0, u, h]) + float(settings["dt_bias"].detach()[h])))
                if step < of(p.min_dt, h):
                    dropped += u == s
                elif u == s:
                    scale = of(p.gain, h) * step
                else:
                    left += of(p.mul, h) * step * float(A.detach()[h]) + of(p.add, h)
            terms.append(math.exp(left) * scale * float(C[0, 30, g] @ B[0, s, g]) * float(x[0, s, h].norm()))
        total = sum(map(abs, terms))
        for s, term in enumerate(terms):
            assert table.loc[(h, s), "contribution"] == pytest.approx(term, rel=1e-9, abs=1e-300)
            assert table.loc[(h, s), "share"] == pytest.approx(abs(term) / total, rel=1e-9, abs=1e-300)
    assert (dropped > 20) == (kind == "filter")


def test_float32_under_a_remedy(monkeypatch):
    lm, ids = model(torch.float32), torch.randint(VOCAB, (1, 70))
    with mitigate(lm, "rri:alpha=0.98,beta=0.75"):
        found = attribute(lm, ids, segment=33)
        exact = attribute(lm.double(), ids)
    assert found.values.dtype == torch.float32
    torch.testing.assert_close(found.values.double(), exact.values, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("segment", [3, 10, 4096])
def test_the_top_and_the_totals(segment):
    lm, ids, queries = model(), torch.randint(VOCAB, (1, 37)), [2, 36]
    whole, top = (attribute(lm, ids, k, queries=queries, segment=segment) for k in (None, 6))
    assert top.values.shape == top.tokens.shape == (2, 2, lm.config.nheads, 6)
    size, order = whole.values.abs().sort(-1, descending=True)
    torch.testing.assert_close(top.values.abs(), size[..., :6])
    assert (top.tokens[:, 1] == order[:, 1, :, :6]).all()
    torch.testing.assert_close(whole.values.gather(-1, top.tokens), top.values)
    for found in (whole, top):  # of all tokens, kept or not
        torch.testing.assert_close(found.sums, whole.values.abs().sum(-1))
        torch.testing.assert_close(found.totals, whole.values.abs().sum(-2))
    table = top.table()
    assert list(table.columns) == ["layer", "query", "head", "token", "contribution", "share"]
    assert table.groupby(["layer", "query", "head"]).size().groupby("query").unique().map(list).to_dict() == {
        2: [3], 36: [6],  # no token after the query
    }  # fmt: skip
    both = table.merge(whole.table(), on=["layer", "query", "head", "token"])
    assert len(both) == len(table)
    for name in ("contribution", "share"):
        assert both[f"{name}_x"].to_numpy() == pytest.approx(both[f"{name}_y"].to_numpy())
    shares = whole.table().groupby(["layer", "query", "head"])["share"].sum()
    assert shares.to_numpy() == pytest.approx(1.0) and len(shares) == 2 * 2 * lm.config.nheads
    per_token, sizes = whole.per_token(1), whole.table(1).assign(size=lambda t: t["contribution"].abs())
    wanted = sizes.groupby(["query", "token"])["size"].sum()
    assert per_token.set_index(["query", "token"])["total"].to_numpy() == pytest.approx(wanted.to_numpy())
    assert per_token.groupby("query")["share"].sum().to_numpy() == pytest.approx(1.0)


def test_what_comes_after_and_before_the_query_does_not_matter():
    lm, ids = model(), torch.randint(VOCAB, (1, 50))
    early = attribute(lm, ids, queries=[17], segment=8)
    alone = attribute(lm, ids[:, :18])
    torch.testing.assert_close(early.values, alone.values)
    assert early.values.shape[-1] == 18


def test_bad_input():
    lm, ids = model(), torch.randint(VOCAB, (1, 12))
    for arguments, settings, message in (
        ((torch.randint(VOCAB, (2, 12)),), {}, r"\(1, T\)"),
        ((ids[:, :0],), {}, r"\(1, T\)"),
        ((ids, 0), {}, "top"),
        ((ids, "10"), {}, "top"),
        ((ids,), {"queries": [12]}, "from 0 to 11"),
        ((ids,), {"queries": [-1]}, "from 0 to 11"),
        ((ids,), {"queries": []}, "queries"),
        ((ids,), {"segment": 0}, "segment"),
    ):
        with pytest.raises(InputError, match=message):
            attribute(lm, *arguments, **settings)
    start = torch.zeros(lm.config.nheads, 6, 5)
    for policy in (ScanPolicy(caps=(Cap(1.0),)), ScanPolicy(window=4), ScanPolicy(reset=5), ScanPolicy(start=start)):
        lm.mixers[1].policy = policy
        with pytest.raises(InputError, match="gates alone"):
            attribute(lm, ids)
    lm.mixers[1].policy = ScanPolicy()
    with mitigate(lm, "recompute:last=8"), pytest.raises(InputError, match="control"):
        attribute(lm, ids)
    with pytest.raises(InputError, match="layer 2 is not there"):
        attribute(lm, ids).table(2)
    with pytest.raises(InputError, match="layer -1 is not there"):
        attribute(lm, ids).per_token(-1)
    config = transformers.Mamba2Config(
        vocab_size=31, hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, state_size=6, n_groups=1, expand=2
    )
    with pytest.raises(InputError, match="own models"):
        attribute(transformers.Mamba2ForCausalLM(config), ids)
