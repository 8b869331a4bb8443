"""Every remedy that `--mitigation all` measures, on the mixers that no remedy knows a line of."""

from __future__ import annotations

import pytest
import torch

from rnn_longctx.mitigations import fold, mitigate, parse_remedy, standard
from rnn_longctx.mitigations.base import Need
from rnn_longctx.testing.remedies import TRAIN_LENGTH, check_cuts, check_on_and_off, is_applicable, model_of

RECURRENT = {Need.ATTENTION, Need.STEPS, Need.RATES, Need.ERASING}  # what models without one step a head lack
FIELDS = {
    "window": "a window",
    "a-scale": "a factor",
    "delta-scale": "a factor",
    "noise-start": "a start",
}  # of policies
LACKS = {
    "retnet:heads=2": RECURRENT,
    "hgrn2:heads=2": RECURRENT,
    "mamba1:d_state=4": RECURRENT,
    "mamba3:d_state=4,headdim=8": RECURRENT,
    "performer:heads=2,features=8": {*RECURRENT, "a factor", "a start"},
    "sumformer:width=8,hidden=8": RECURRENT,
    "gated-deltanet:heads=1,head_dim=8,v_heads=2": {*RECURRENT, "a window"} - {Need.ERASING},
    "kda:heads=2,head_dim=8": {*RECURRENT, "a window"} - {Need.ERASING},
    "gdn2:heads=2,head_dim=8": {*RECURRENT, "a window"} - {Need.ERASING},
    "deltanet:heads=2": {*RECURRENT, "a window"} - {Need.ERASING},
    "full-attention:heads=2": {*RECURRENT, Need.RECURRENCE, Need.NO_ATTENTION},
    "chunk-linformer:chunk=7,rank=3,heads=2": {*RECURRENT, Need.RECURRENCE, Need.NO_ATTENTION},
    "block-sparse:heads=2,block=7,window=7,top=2": {*RECURRENT, Need.RECURRENCE, Need.NO_ATTENTION},
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def models():
    return {mixer: model_of(mixer) for mixer in LACKS}


@pytest.mark.parametrize("mixer", LACKS)
@pytest.mark.parametrize("text", standard(TRAIN_LENGTH))
def test_a_remedy_on_a_mixer(text, mixer, models, seed):
    parts = parse_remedy(text).parts
    needs = frozenset().union(*(part.needs for part in parts), *({FIELDS[p.name]} for p in parts if p.name in FIELDS))
    lacks = LACKS[mixer] | (set() if mixer.startswith("full-attention") else {Need.ROTARY})
    assert is_applicable(text, models[mixer]) == (not needs & lacks)
    if not needs & lacks:
        check_on_and_off(text, models[mixer], seed)
        check_cuts(text, models[mixer], seed)


@torch.no_grad()
def test_rates_of_mamba1_take_a_fold(models):
    model, ids = model_of("mamba1:d_state=4"), torch.randint(256, (1, 50))
    with mitigate(model, "a-scale:scale=0.5"):
        expected = model(ids)
    fold(model, "a-scale:scale=0.5")
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-9)
    assert (models["mamba1:d_state=4"](ids) - expected).abs().max() > 1e-6
