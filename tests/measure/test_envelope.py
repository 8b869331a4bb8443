import torch

from rnn_longctx.data import ByteTokenizer, Text
from rnn_longctx.measure import envelope
from rnn_longctx.measure.envelope import EVERY, Envelope, envelope_of, measure_envelope
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config


def test_envelope_is_the_largest_norm_of_each_head():
    torch.set_num_threads(1)
    model = Mamba2LM(Mamba2Config(d_model=32, n_layer=2, headdim=16, d_state=8)).double().eval()
    ids = torch.randint(256, (5, 70))
    found = measure_envelope(model, ids, "some", "hash")
    expected = torch.zeros(2, 5, 4, dtype=torch.float64)
    ends = [*range(EVERY, 70, EVERY), 70]
    for i, row in enumerate(ids):
        for end in ends:
            cache = Cache()
            model(row[None, :end], cache)
            norms = torch.stack([c.scan.state[0].flatten(1).norm(dim=1) for c in cache.layers])
            expected[:, i] = torch.maximum(expected[:, i], norms)
    torch.testing.assert_close(torch.tensor(found.peaks, dtype=torch.float64), expected, rtol=1e-5, atol=0)
    for quantile, caps in ((1.0, expected.amax(1)), (0.0, expected.amin(1)), (0.5, expected.median(1).values)):
        torch.testing.assert_close(torch.tensor(found.norms(quantile), dtype=torch.float64), caps, rtol=1e-5, atol=0)
    assert (found.length, found.slices, found.label) == (70, 5, found.label)
    assert found.label.startswith("some hash, 5 x 70, ")
    assert Envelope.from_dict(found.to_dict()) == found


def test_a_long_stream_is_looked_at_so_many_times_and_no_more(monkeypatch):
    monkeypatch.setattr(envelope, "LOOKS", 3)
    model = Mamba2LM(Mamba2Config(d_model=32, n_layer=1, headdim=16, d_state=8)).double().eval()
    ids, calls = torch.randint(256, (2, 70)), []
    model.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    found = measure_envelope(model, ids, "some", "hash")
    assert calls == [24, 24, 22]
    norms = []
    for end in (24, 48, 70):
        cache = Cache()
        model(ids[:, :end], cache)
        norms.append(cache.layers[0].scan.state.flatten(2).norm(dim=-1))
    largest = torch.stack(norms).amax(0)
    torch.testing.assert_close(torch.tensor(found.peaks[0], dtype=torch.float64), largest, rtol=1e-5, atol=0)


def test_texts_have_envelopes_of_their_own():
    model = Mamba2LM(Mamba2Config(d_model=32, n_layer=1, headdim=16, d_state=8)).eval()
    model.tokenizer = ByteTokenizer()
    a, b = (Text(n, bytes(torch.randint(32, 120, (900,)).tolist())) for n in "ab")
    assert envelope_of(model, 64, a) != envelope_of(model, 64, b)
    assert envelope_of(model, 64, a) is envelope_of(model, 64, a)
