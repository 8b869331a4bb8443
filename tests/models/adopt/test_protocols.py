"""Every model, our own and every family that is adopted, is a `LanguageModel` with `RecurrentMixer`s: by mypy, which
reads this file, and by its members."""

from __future__ import annotations

import pytest
import torch
from adopted_families import FAMILIES

from rnn_longctx.models.adopt.adopting import adopt
from rnn_longctx.models.adopt.model import Adopted
from rnn_longctx.models.interface import LanguageModel, RecurrentMixer, SteppedMixer
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config

OWN = Mamba2Config(d_model=16, n_layer=2, vocab_size=31, d_state=8, headdim=8)


def typed(model: Adopted | Mamba2LM) -> LanguageModel:
    """The model; mypy holds both classes to the protocol here."""
    language_model: LanguageModel = model
    mixers: list[RecurrentMixer] = list(model.mixers)
    assert mixers
    return language_model


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
        assert mixer.one_step_a_head == (mixer.A.ndim == 1)
        if mixer.one_step_a_head:
            assert isinstance(mixer, SteppedMixer) and mixer.A.shape == (mixer.heads,)


def test_state_size_counts_what_a_row_keeps(model):
    def kept(length: int) -> tuple[int, int]:
        cache = model.new_cache()
        model(torch.ones(1, length, dtype=torch.int64), cache)
        states = sum(c.scan.state.numel() + c.conv[..., -taps:].numel() for c, taps in zip(cache.layers, conv_taps))
        layers = getattr(getattr(cache, "library", None), "layers", [])
        keys = [t for layer in layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
        return states, sum(t.numel() for t in keys if t is not None)

    conv_taps = [(m if not model.own_forward else m.module).conv1d.kernel_size[0] - 1 for m in model.mixers]
    size = model.state_size()
    (states, attention), (_, longer) = kept(5), kept(9)
    assert states == sum(size.fixed.values()) and longer - attention == 4 * size.per_token
    assert attention == 5 * size.per_token and model.attends == (size.per_token > 0)
    assert size.total(5) == states + attention


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
