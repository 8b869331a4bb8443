"""Remedies put into the weights: as when they are on the model, and for good."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM

import rnn_longctx
from rnn_longctx.data import ByteTokenizer, load_text
from rnn_longctx.errors import InputError
from rnn_longctx.mitigations import active, fold, mitigate
from rnn_longctx.models import checkpoint
from rnn_longctx.models.checkpoint import layouts
from rnn_longctx.models.checkpoint.weights import WEIGHTS
from rnn_longctx.recurrence.policy import PLAIN
from rnn_longctx.testing.remedies import calibration_text, model_of

FOLDED = [
    "a-floor",
    "a-floor:tokens=11",
    "a-winsor:share=0.3",
    "a-scale:scale=0.7/1.9/1.1",
    "a-scale:scale=1.3+a-floor",
]


@pytest.fixture
def model(model):
    """Of heads far below the floor and, in every layer, one far above it."""
    for mixer in model.mixers:
        mixer.A_log.data.uniform_(-7, 1)
        mixer.A_log.data[1] = 7.0
    return model


@torch.no_grad()
@pytest.mark.parametrize("name", FOLDED)
def test_folded_is_mitigated(model, made, name):
    ids = torch.randint(256, (2, 61))
    plain, old, before = model.logits(model(ids)), model.weights_hash, [m.A_log.clone() for m in model.mixers]
    with mitigate(model, name, text=made):
        expected = model.logits(model(ids))
        untouched = [torch.tensor(m.policy.mul, dtype=torch.float64).expand(4) == 1 for m in model.mixers]
    model.name, model.calibration = "it", {"peaks": []}
    model.provenance = {"from": "nowhere"}
    assert fold(model, name, made) is model
    assert active(model) == ("none", None) and all(m.policy == PLAIN for m in model.mixers)
    torch.testing.assert_close(model.logits(model(ids)), expected, rtol=0, atol=1e-12)
    assert (expected - plain).abs().max() > 1e-6
    for mixer, A_log, same in zip(model.mixers, before, untouched):
        assert torch.equal(mixer.A_log[same], A_log[same])
    assert model.name == f"it+{name}" and model.weights_hash != old and model.calibration is None
    (entry,) = model.provenance["folded"]
    assert (entry["mitigation"], entry["name"], entry["weights"]) == (name, "it", old) and model.provenance["from"]
    assert ("made" in str(entry["calibration"])) == ("a-floor" in name)


@torch.no_grad()
def test_folding_again_measures_the_model_as_it_now_is(model, made, tmp_path):
    fold(model, "a-floor:tokens=5", made)
    checkpoint.save(model, tmp_path / "once")
    once = rnn_longctx.load(tmp_path / "once", dtype="float64")
    with mitigate(once, "a-floor:tokens=3", text=made):
        expected = [torch.tensor(m.policy.mul, dtype=torch.float64) * m.A for m in once.mixers]
    fold(model, "a-floor:tokens=3", made)
    for mixer, A, first in zip(model.mixers, expected, once.mixers):
        torch.testing.assert_close(mixer.A, A, rtol=1e-12, atol=0)
        assert not torch.equal(mixer.A, first.A)
    assert [f["mitigation"] for f in model.provenance["folded"]] == ["a-floor:tokens=5", "a-floor:tokens=3"]


@torch.no_grad()
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_and_loaded(model, made, tmp_path, layout, dtype):
    """Ordinary weights: also for a library that knows nothing of remedies."""
    model.calibration = {"peaks": [], "length": 32, "text": "kept", "text_hash": "0"}
    checkpoint.save(model, tmp_path / "one", dtype=dtype, layout=layout, calibration=model.calibration)
    (weights,) = (f for name in WEIGHTS if (f := tmp_path / "one" / name).exists())
    file = weights.read_bytes()
    one = rnn_longctx.load(tmp_path / "one", dtype=dtype)
    old = one.weights_hash
    fold(one, "a-floor:tokens=12", load_text("builtin"))
    assert all(m.A_log.dtype == torch.float32 for m in one.mixers)
    assert weights.read_bytes() == file, "a mapped file is not written to"
    checkpoint.save(one, tmp_path / "two", layout=layout)
    two = rnn_longctx.load(tmp_path / "two", dtype=dtype)
    for a, b in zip(one.mixers, two.mixers):
        assert torch.equal(a.A_log, b.A_log)
    ids = torch.randint(256, (1, 40))
    assert torch.equal(one(ids), two(ids))
    assert two.weights_hash == one.weights_hash != old and two.calibration is None
    assert two.provenance["folded"] == json.loads(json.dumps(one.provenance["folded"]))
    assert two.provenance["folded"][0]["weights"] == old
    if layout == "transformers" and dtype == "float32":
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "two").eval()
        torch.testing.assert_close(theirs(ids).logits, one.logits(one(ids)), rtol=1e-3, atol=1e-4)


def test_a_rounded_decay_is_folded_in_float32(model, made):
    model.bfloat16()
    with mitigate(model, "a-floor:tokens=9", text=made):
        mul = [torch.tensor(m.policy.mul, dtype=torch.float64).expand(4) * m.A.double() for m in model.mixers]
    fold(model, "a-floor:tokens=9", made)
    for mixer, A in zip(model.mixers, mul):
        assert mixer.A_log.dtype == torch.float32
        torch.testing.assert_close(mixer.A.double(), A, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "name",
    [
        "none",
        "rri:alpha=0.9,beta=1.0",
        "rri:alpha=1.0,beta=1.0",
        "delta-scale:scale=0.5",
        "state-norm",
        "token-filter",
        "a-scale:scale=0.9,place=decay",
        "window:tokens=5",
        "reset:every=9",
        "decimate",
        "a-floor+state-norm",
    ],
)
def test_what_cannot_be_folded(model, name):
    before, identity = [m.A_log.clone() for m in model.mixers], (model.name, model.weights_hash, dict(model.provenance))
    with pytest.raises(InputError, match=r"cannot be folded .*a-floor, a-scale \(place=rate\) and a-winsor") as error:
        fold(model, name)
    assert "\n" not in str(error.value) and identity == (model.name, model.weights_hash, model.provenance)
    assert all(torch.equal(m.A_log, b) and m.policy == PLAIN for m, b in zip(model.mixers, before))


@pytest.mark.parametrize("remedy", ["a-floor", "a-winsor", "a-scale:scale=0.5", "state-norm"])
@pytest.mark.parametrize(
    ("mixer", "reason"),
    [
        ("gla:heads=2", "a gla layer makes its decays from the text"),
        ("retnet:heads=2", "a retnet layer has decays that are fixed"),
        ("sliding-window:heads=2,window=16", "own has no recurrence"),
    ],
)
def test_a_model_without_rates_is_refused_alike_whatever_the_remedy(mixer, reason, remedy):
    model = model_of(mixer)
    before = model.weights_hash
    with pytest.raises(InputError, match=f"{remedy}.* cannot be folded into weights: {reason}"):
        fold(model, remedy, calibration_text())
    assert model.weights_hash == before and model.name == "own"


def test_mistakes_of_a_fold(model, made):
    before = [m.A_log.clone() for m in model.mixers]
    with mitigate(model, "rri"), pytest.raises(InputError, match=r"is under rri:.* take it off before a-winsor"):
        fold(model, "a-winsor")
    with pytest.raises(InputError, match='did you mean "a-floor"'):
        fold(model, "a-flor")
    theirs = Mamba2ForCausalLM(
        Mamba2Config(
            hidden_size=16, vocab_size=256, num_heads=4, head_dim=8, state_size=4, n_groups=1, num_hidden_layers=1
        )
    )
    for other in (theirs, rnn_longctx.adopt(theirs, tokenizer=ByteTokenizer())):
        with pytest.raises(InputError, match=r"into weights: those that hold the rates of .* are another library's"):
            fold(other, "a-winsor")
    for other in (torch.compile(model), torch.nn.Linear(2, 2), "demo"):
        with pytest.raises(InputError, match=r"is no model of rnn_longctx\.load"):
            fold(other, "a-winsor")
    model.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(InputError, match="not finite"):
        rnn_longctx.fold(model, "a-winsor")
    assert all(torch.equal(m.A_log, b) for m, b in zip(model.mixers, before)) and not model.provenance
