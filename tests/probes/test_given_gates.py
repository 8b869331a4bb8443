"""Probes of layers that give their decays token by token, one a channel or one a head, beside attention: of none of
them does a probe know a line."""

import pytest
import torch

from rnn_longctx import CollapseMonitor, record
from rnn_longctx.data import ByteTokenizer, Text
from rnn_longctx.errors import InputError
from rnn_longctx.measure.envelope import envelope_of
from rnn_longctx.measure.steps import measure_steps
from rnn_longctx.models.config import ModelConfig
from rnn_longctx.models.lm import LM
from rnn_longctx.probes.attribution import attribute
from rnn_longctx.probes.probe import probe
from rnn_longctx.probes.retention import retention
from rnn_longctx.recurrence.policy import ScanPolicy

EVERY, LENGTH = 16, 64
MIXERS = ["gla:heads=2", "hgrn2:heads=2", "retnet:heads=2", "mamba3:d_state=4,headdim=32"]
OTHERS = ["mamba1:d_state=4", "performer:heads=2,features=8", "sumformer:width=8"]
# Contributions do not add up in these.
ERASING = [
    "rwkv7:headdim=16",
    "gated-deltanet:heads=1,head_dim=8,v_heads=2",
    "kda:heads=2,head_dim=8",
    "gdn2:heads=2,head_dim=8",
    "deltanet:heads=2",
]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def model(layers="gla:heads=2", dtype=torch.float64):
    lm = LM(ModelConfig(layers, d_model=32, n_layer=2)).to(dtype).eval()
    torch.nn.init.normal_(lm.backbone.embedding.weight)
    lm.name, lm.train_length, lm.tokenizer = "given", LENGTH, ByteTokenizer()
    return lm


def text():
    return Text("letters", bytes(torch.randint(97, 123, (4096,)).tolist()))


@torch.no_grad()
def readings(lm, ids):
    """What every layer's scan read of ids."""
    seen = []
    for mixer in lm.mixers:
        mixer.tap = seen.append
    lm(ids)
    for mixer in lm.mixers:
        mixer.tap = None
    return seen


@pytest.mark.parametrize("splits", [(100,), (7, 40, 1, 52)])
@pytest.mark.parametrize("mixer", [*MIXERS, *ERASING])
@torch.no_grad()
def test_traced(mixer, splits):
    lm, ids = model(mixer), torch.randint(256, (2, 100))
    lm.mixers[0].policy = ScanPolicy(mul=0.5, gain=0.25)
    cache = lm.new_cache()
    with record(lm, every=EVERY) as trace:
        for piece in ids.split(splits, 1):
            lm(piece, cache)
    assert all(mixer.tap is None and mixer.observer is None for mixer in lm.mixers)
    table = trace.table().set_index(["row", "layer", "head", "position"])
    assert trace.convolution().empty != hasattr(lm.mixers[0], "conv1d")
    for layer, reading in enumerate(readings(lm, ids)):
        log_decay = reading.gates.log_decay * (0.5 if layer == 0 else 1)  # (B, T, H, N) or (B, T, H)
        for position in range(EVERY, 100, EVERY):
            for row in range(2):
                for head in range(2):
                    seen = table.loc[(row, layer, head, position)]
                    total = log_decay[row, :position, head].sum(0)
                    assert seen["retention"] == pytest.approx(float(total.mean().exp()), rel=1e-6)
                    last = log_decay[row, position - EVERY : position, head]
                    assert seen["decay"] == pytest.approx(float(last.mean()), rel=1e-6)
                    scale = reading.gates.input_scale[row, position - EVERY : position, head].mean()
                    assert seen["input_scale"] == pytest.approx(float(scale) * (0.25 if layer == 0 else 1))
    assert len(retention(trace.table(), LENGTH)) == 4


def test_input_scales_are_known_from_the_next_look_on_in_a_stream_that_had_begun():
    lm, ids = model(), torch.randint(256, (1, 60))
    cache = lm.new_cache()
    with torch.no_grad():
        lm(ids[:, :10], cache)
        with record(lm, every=EVERY) as trace:
            lm(ids[:, 10:], cache)
    scales = trace.table().query("layer == 0 and head == 0")["input_scale"]
    assert scales.isna().tolist() == [True, False, False]


@pytest.mark.parametrize("segment", [7, 4096])
@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_contributions_sum_to_the_scans_output(mixer, segment):
    lm, ids, queries = model(mixer), torch.randint(256, (1, 43)), [0, 20, 42]
    lm.mixers[1].policy = ScanPolicy(mul=0.7, add=-0.01, gain=0.5)
    found = attribute(lm, ids, queries=queries, segment=segment)
    for layer, reading in enumerate(readings(lm, ids)):
        gates = reading.gates.worked_out(torch.float64, lm.mixers[layer].policy)
        x, B, C = (v[0] for v in (reading.inputs.x, reading.inputs.B, reading.inputs.C))
        S = torch.zeros(2, x.shape[-1], B.shape[-1], dtype=torch.float64)
        direction = torch.nn.functional.normalize(x, dim=-1)  # of nothing, 0
        for t in range(43):
            S = gates.log_decay[0, t].exp().view(2, 1, -1) * S + gates.input_scale[0, t][:, None, None] * (
                x[t][..., None] * B[t][:, None]
            )
            if t in queries:
                y = torch.einsum("hpn,hn->hp", S, C[t])
                values = found.values[layer, queries.index(t)]
                torch.testing.assert_close(torch.einsum("hs,shp->hp", values, direction), y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "mixer", [*MIXERS, *ERASING, "mamba1:d_state=4", "performer:heads=2,features=8", "sumformer:width=8"]
)
def test_probed_and_monitored_beside_attention(mixer):
    lm = model([mixer, "full-attention:heads=2"], torch.float32)
    seen = probe(lm, text(), 256, every=EVERY, calibration_text=text())
    assert (
        len(seen.heads) == lm.mixers[0].heads
        and seen.heads["horizon"].notna().all()
        and len(envelope_of(lm, LENGTH).peaks) == 1
    )
    monitor, ids = CollapseMonitor.calibrated(lm, text(), every=EVERY), torch.randint(97, 123, (1, 256))
    with monitor.on(lm, lambda report: None) as watch, torch.no_grad():
        lm(ids)
    assert len(watch.reports) == 256 // EVERY and watch.reports[-1].shift is not None


def test_what_needs_steps_says_so():
    with pytest.raises(InputError, match="given token by token"):
        measure_steps(model(), torch.randint(256, (1, 20)))
    lm = model("sliding-window:heads=2,window=16")
    ids = torch.randint(256, (1, 20))
    with pytest.raises(InputError, match="no recurrent layer"), record(lm):
        pass
    for call in (lambda: attribute(lm, ids), lambda: probe(lm, text(), 64, every=EVERY), lambda: envelope_of(lm, 64)):
        with pytest.raises(InputError, match="no recurrent layer"):
            call()
