"""Every model, our own and every family that is adopted, is a `LanguageModel` with `RecurrentMixer`s: by its members
here, and for mypy, which holds the classes to it where they are returned as such (`as_language_model`, `load_any`)."""

from __future__ import annotations

import pytest
import torch
from adopted_families import FAMILIES

from rnn_longctx.errors import InputError
from rnn_longctx.models.adopt.adopting import adopt
from rnn_longctx.models.adopt.model import Adopted
from rnn_longctx.models.carries import StreamCache
from rnn_longctx.models.interface import LanguageModel, Layer, RecurrentMixer, ScanMixer, SteppedMixer, stepped_mixers
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.recurrence.gates import SteppedGates

OWN = Mamba2Config(d_model=16, n_layer=2, vocab_size=31, d_state=8, headdim=8)


def typed(model: Adopted | Mamba2LM) -> LanguageModel:
    """Return the model; mypy holds both classes to the protocols here, when it is run on this file."""
    language_model: LanguageModel = model
    mixers: list[RecurrentMixer] = list(model.mixers)
    cache: StreamCache = model.new_cache()
    assert mixers and not cache.layers
    return language_model


def typed_layers(model: Mamba2LM) -> tuple[list[Layer], list[ScanMixer]]:
    """Return what this library's own model has beside; mypy holds its classes to the protocols here."""
    layers: list[Layer] = list(model.layers)
    mixers: list[ScanMixer] = list(model.mixers)
    return layers, mixers


@pytest.fixture(params=["own", *FAMILIES])
def model(request, build) -> LanguageModel:
    return typed(Mamba2LM(OWN).eval() if request.param == "own" else adopt(build(request.param)))


def test_every_model_is_a_language_model(model):
    assert isinstance(model, LanguageModel)
    assert model.vocab_size > 0 and model.d_model > 0 and model.own_forward != model.foldable
    hidden = model(torch.zeros(1, 3, dtype=torch.int64))
    assert hidden.shape == (1, 3, model.d_model)
    assert model.logits(hidden).shape == (1, 3, model.vocab_size)


def test_every_mixer_is_recurrent(model):
    for mixer in model.mixers:
        assert isinstance(mixer, RecurrentMixer)
        if SteppedGates in mixer.recurrence.takes and mixer.A is not None:
            assert isinstance(mixer, SteppedMixer)  # (by its members: Mamba-1's have them, too)
            assert mixer.one_step_a_head == (mixer.A.shape == (mixer.heads,))
        else:
            assert not isinstance(mixer, SteppedMixer) and not mixer.one_step_a_head
    assert len(stepped_mixers(model)) in (0, len(model.mixers))


def test_layers_of_another_library_are_neither_tapped_nor_written(model):
    mixer = model.mixers[0]
    if not model.own_forward:
        layers, mixers = typed_layers(model)
        assert mixer.tappable and [layer.mixer for layer in layers] == mixers
        return
    mixer.tap = None
    with pytest.raises(InputError, match="cannot be tapped"):
        mixer.tap = print
    with pytest.raises(InputError, match="are not written"):
        mixer.scale_rates(torch.ones(mixer.heads))
    assert not mixer.tappable and mixer.tap is None


@torch.no_grad()
def test_a_cache_is_gone_back_to(model):
    ids, cache = torch.randint(1, 31, (2, 9)), model.new_cache()
    model(ids[:, :4], cache)
    snapshot = cache.snapshot()
    ahead = model(ids[:, 4:], cache)
    assert cache.position.tolist() == [9, 9]
    cache.restore(snapshot)
    assert cache.position.tolist() == [4, 4]
    assert torch.equal(model(ids[:, 4:], cache), ahead)


def test_state_size_counts_what_a_row_keeps(model):
    def kept(length: int) -> tuple[int, int]:
        cache = model.new_cache()
        model(torch.ones(1, length, dtype=torch.int64), cache)
        states = sum(c.scan.state.numel() for c in cache.layers)
        states += sum(c.conv[..., -taps:].numel() for c, taps in zip(cache.layers, conv_taps) if taps)
        layers = getattr(getattr(cache, "library", None), "layers", [])
        keys = [t for layer in layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
        return states, sum(t.numel() for t in keys if t is not None)

    convs = [m.conv if model.own_forward else getattr(m, "conv1d", None) for m in model.mixers]
    conv_taps = [0 if conv is None else conv.kernel_size[0] - 1 for conv in convs]
    size = model.state_size()
    (states, attention), (_, longer) = kept(5), kept(9)
    assert states == sum(size.fixed.values()) and longer == size.total(9) - states
    assert size.total(5) == states + attention and model.attends == (attention > 0)


def test_only_what_reads_layer_by_layer_says_so(model):
    layers = model.layer_by_layer()
    if layers is None:
        assert model.own_forward
        return
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        tokens = layers.embed(ids)
        for i in range(len(model.mixers)):
            tokens = layers.enter(i, tokens)
            assert layers.normed(i, tokens).shape == (2, 6, model.d_model)
            tokens = layers.leave(i, tokens)
        hidden, cache = layers.finish(tokens, 6)
        torch.testing.assert_close(hidden, model(ids)[:, -1])
        following = torch.tensor([[3], [4]])
        torch.testing.assert_close(model(following, cache), model(torch.cat([ids, following], 1))[:, -1:])


def test_a_way_to_read_is_refused_by_the_own_forward_alone(model):
    ids = torch.ones(1, 3, dtype=torch.int64)
    model.refuse_own("reset:every=2")
    try:
        if model.own_forward:
            with pytest.raises(ValueError, match="reset:every=2 is on"):
                model.module(ids)
        model(ids)
    finally:
        model.refuse_own("")
    model.module(ids)
