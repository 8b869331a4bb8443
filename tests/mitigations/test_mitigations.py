"""Remedies as a person writes them: parsing, composition, putting on and taking off, and what they do to a model."""

import math

import pytest
import torch

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations import REMEDIES, active, fold, mitigate, parse_remedy
from rnn_longctx.mitigations.base import NotApplicable
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.generate import generate, prefill
from rnn_longctx.models.restart import Restart
from rnn_longctx.recurrence.policy import PLAIN, Cap, ScanPolicy


@pytest.mark.parametrize(
    "text",
    [
        "none",
        "state-norm",
        "state-norm:every=256",
        "rri:alpha=0.999,beta=0.75",
        "window:tokens=100",
        "reset:every=512",
        "reset:every=512,overlap=64",
        "recompute:last=512",
        "delta-scale:scale=0.5",
        "delta-scale:scale=0.5/1.25",
        "a-scale:scale=0.9,place=decay",
        "a-winsor:share=0.08",
        "a-floor",
        "a-floor:tokens=500",
        "token-filter:theta=0.01",
        "decimate:base=100,beta=0.5,first=1",
        "chunk-select:chunk=100,query=9",
        "lamb:tokens=100,query=9",
        "noise-start:std=0.1,seed=3",
        "stored-start:file=here.state",
        "rri:alpha=0.9,beta=1.0+state-norm",
        "rri:alpha=0.9,beta=1.0+rri+state-norm:every=64,quantile=0.5+state-norm",
    ],
)
def test_canonical_text_reads_back(text):
    remedy = parse_remedy(text)
    again = parse_remedy(str(remedy))
    assert str(again) == str(remedy)
    assert str(parse_remedy("rri:beta=0.75,alpha=0.999")) == "rri:alpha=0.999,beta=0.75"
    assert str(parse_remedy("window:tokens=1k")) == "window:tokens=1024"
    assert parse_remedy("none+none") == parse_remedy("none") and parse_remedy("none+rri") == parse_remedy("rri")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rrj", "unknown mitigation 'rrj'; did you mean \"rri\""),
        ("rri:alfa=0.9", "no parameter 'alfa'; did you mean \"alpha\""),
        ("rri:alpha=1.1", r"alpha must lie in \(0, 1\]"),
        ("rri:alpha=x", "alpha"),
        ("rri:alpha", "not key=value"),
        ("rri:alpha=0.9,beta=1,alpha=0.8", "alpha is given twice"),
        ("window:tokens=9223372036854775808", "tokens is out of range, got 9223372036854775808"),
        ("noise-start:std=1+rri+stored-start:file=x", "noise-start:std=1 and stored-start:file=x .* rows start from"),
        ("rri:alpha=2", "^mitigation 'rri:alpha=2': alpha must lie"),
        ("all", "stands for every remedy"),
        ("rri,state-norm", r"\+ composes remedies, as in rri\+state-norm;"),
        ("rri:alpha=0.9,beta=1, window:tokens=3", r"as in rri:alpha=0.9,beta=1\+window:tokens=3;"),
        ("rri+state-norm+rri", "rri:alpha=0.9999,beta=0.75 is composed with itself"),
        ("window:tokens=5+rri+window:tokens=9", "window:tokens=5 and window:tokens=9 cannot be combined"),
        ("a-floor+a-floor:tokens=9", "a-floor and a-floor:tokens=9 cannot be combined: give one a-floor"),
        ("a-winsor+a-winsor:share=0.1", "cannot be combined"),
        ("token-filter+token-filter:theta=0.1", "cannot be combined"),
        ("noise-start:std=1+noise-start:std=2", "cannot be combined"),
        ("chunk-select+chunk-select:chunk=9", "cannot be combined"),
        ("rri:beta=-1", "beta must be above 0"),
        ("window", "window needs tokens"),
        ("window:tokens=0", "tokens"),
        ("state-norm:every=0", "every"),
        ("state-norm:quantile=1.5", "quantile"),
        ("reset:every=5,overlap=6", "overlap must lie between 0 and"),
        ("recompute:last=7", "even number"),
        ("none:x=1", "it has none"),
        ("delta-scale:scale=0", "must be above 0"),
        ("delta-scale:scale=1/x", "one a layer"),
        ("a-scale:scale=1.1,place=decay", "at most 1"),
        ("a-scale:scale=1.1,place=log", "rate or decay"),
        ("a-winsor:share=0.5", r"share must lie in \[0, 0.5\)"),
        ("a-floor:tokens=0", "tokens must be at least 1"),
        ("a-floor:tokens=1.5", "tokens"),
        ("token-filter:theta=1", "theta"),
        ("decimate:beta=0", "beta"),
        ("chunk-select:chunk=0", "at least 1 token"),
        ("noise-start:std=-1", "std"),
        ("missing.yaml", "cannot read"),
        ("reset:every=5+recompute:last=8", "cannot be combined"),
    ],
)
def test_bad_remedies_are_one_clear_line(text, message):
    with pytest.raises(InputError, match=message) as error:
        parse_remedy(text)
    assert "\n" not in str(error.value)


def test_policies(model, made):
    with mitigate(model, "rri:alpha=0.99,beta=0.5"):
        assert model.mixers[0].policy == ScanPolicy(add=math.log(0.99), gain=0.5)
    with mitigate(model, "recompute:last=64"):
        assert model.restart == Restart(32, 32) and model.mixers[0].policy == PLAIN
    with mitigate(model, "reset:every=64,overlap=3"):
        assert model.restart == Restart(64, 3)
    with mitigate(model, "state-norm:every=4", text=made) as handle:
        caps = model.mixers[1].policy.caps
        assert caps[0].every == 4 and len(caps[0].norm) == model.config.nheads
        assert "made" in handle.plan.calibration and active(model)[1] == handle.plan.calibration
    assert model.mixers[0].policy == PLAIN and model.restart is None


def test_what_cannot_be_combined_is_refused_and_leaves_the_model_alone(model, made):
    with pytest.raises(InputError, match="cannot be combined with a window"):
        mitigate(model, "state-norm+window:tokens=8", text=made)
    assert active(model) == ("none", None) and model.mixers[0].policy == PLAIN
    with mitigate(model, "window:tokens=8"), pytest.raises(InputError, match="window"):
        mitigate(model, "state-norm", text=made)
    with mitigate(model, "reset:every=8"), pytest.raises(InputError, match="cannot be combined"):
        mitigate(model, "recompute:last=8")
    for first, second in (("a-floor:tokens=9", "a-floor"), ("window:tokens=9", "window:tokens=8"), ("rri", "rri")):
        with mitigate(model, first, text=made) as handle:
            before = model.mixers[1].policy
            with pytest.raises(InputError, match=f"{second}.* (cannot be combined|composed with itself)"):
                mitigate(model, second, text=made)
            assert active(model)[0] == str(handle.remedy) and model.mixers[1].policy == before != PLAIN
    assert model.restart is None and model.mixers[1].policy == PLAIN


@pytest.mark.parametrize("put", [mitigate, fold])
def test_a_text_that_is_none_is_one_clear_line(model, put):
    for text in (3, [b"abc"]):
        with pytest.raises(InputError, match=r"a text is .*; got (int 3|list \[b'abc'\])$"):
            put(model, "a-floor", text=text)
    assert active(model) == ("none", None)


def test_handles_compose_and_come_off_in_any_order(model):
    ids = torch.randint(256, (1, 40))
    plain = model(ids)
    first, second = mitigate(model, "rri:alpha=0.9,beta=1.0"), mitigate(model, "rri:alpha=0.8,beta=0.5")
    assert active(model)[0] == "rri:alpha=0.9,beta=1+rri:alpha=0.8,beta=0.5"
    both = model(ids)
    with mitigate(model, "none"):
        assert torch.equal(model(ids), both)
    first.remove()
    assert model.mixers[0].policy == ScanPolicy(add=math.log(0.8), gain=0.5)
    first.remove()
    second.remove()
    assert torch.equal(model(ids), plain) and not torch.allclose(both, plain)
    composed = parse_remedy("rri:alpha=0.9,beta=1.0+rri:alpha=0.8,beta=0.5")
    with mitigate(model, composed):
        torch.testing.assert_close(model(ids), both)


def test_calibration_sees_the_bare_model(model, made):
    with mitigate(model, "state-norm", text=made) as handle:
        bare = handle.plan.policies
    model.__dict__.pop("_measured")
    with mitigate(model, "rri:alpha=0.5,beta=0.1"), mitigate(model, "state-norm", text=made) as handle:
        assert handle.plan.policies == bare


def test_a_kept_calibration_is_used_for_its_length_only(model, made):
    peaks = [[[float(i + 1)] * model.config.nheads] * 3 for i in range(3)]
    model.calibration = {"peaks": peaks, "length": 32, "text": "kept", "text_hash": "0"}
    with mitigate(model, "state-norm") as handle:
        assert handle.plan.policies[1].caps == (Cap((2.0,) * model.config.nheads, 1),)
        assert handle.plan.calibration.startswith("kept")
    model.calibration["peaks"] = [[[float(i)] * model.config.nheads for i in range(5)]] * 3
    for remedy, cap in (("state-norm", 4.0), ("state-norm:quantile=0.5", 2.0), ("state-norm:quantile=0.125", 0.5)):
        with mitigate(model, remedy):
            assert model.mixers[0].policy.caps == (Cap((cap,) * model.config.nheads, 1),)
    with mitigate(model, "state-norm", text=made) as handle:
        assert handle.plan.calibration.startswith("made")
    model.train_length = 64
    with mitigate(model, "state-norm") as handle:
        assert handle.plan.calibration.startswith("builtin")
    model.calibration = {"peaks": "x"}
    with pytest.raises(InputError, match="calibration"):
        mitigate(model, "state-norm")


def test_state_norm_keeps_norms_below_what_training_showed(model, made):
    ids = torch.randint(256, (2, 300))
    with mitigate(model, "state-norm", text=made):
        cache = Cache()
        for t in range(0, 300, 7):
            model(ids[:, t : t + 7], cache)
            for mixer, carry in zip(model.mixers, cache.layers):
                cap = torch.tensor(mixer.policy.caps[0].norm, dtype=torch.float64)
                assert (carry.scan.state.flatten(-2).norm(dim=-1) <= cap * (1 + 1e-9)).all()


def test_no_training_length_is_a_refusal(model):
    model.train_length = None
    with pytest.raises(NotApplicable, match="--train-length"):
        mitigate(model, "state-norm")


@pytest.mark.parametrize(
    "text",
    [
        "none",
        "state-norm",
        "state-norm:every=5",
        "rri",
        "window:tokens=9",
        "reset:every=10,overlap=3",
        "recompute:last=12",
        "rri:alpha=0.9,beta=0.9+reset:every=7",
    ],
)
def test_generation_follows_the_remedy_as_reading_does(model, text, made):
    """Greedy tokens from prefill and steps are those of reading everything again in one call."""
    ids, model.tokenizer.eos_id = torch.randint(256, (2, 37)), None  # so that answers go on
    with mitigate(model, text, text=made if "norm" in text else None):
        new = generate(model, ids, 25)
        for n in range(25):
            whole = model(torch.cat([ids, new[:, :n]], 1))
            assert torch.equal(model.logits(whole[:, -1]).argmax(-1), new[:, n])


@pytest.mark.parametrize("length", [1, 5, 10, 11, 20, 21, 37])
def test_prefill_under_a_control_reads_only_what_matters(model, length):
    ids = torch.randint(256, (3, length))
    for text in ("reset:every=10,overlap=4", "recompute:last=20", "reset:every=10"):
        with mitigate(model, text):
            cache = Cache()
            expected = model.logits(model(ids, cache)[:, -1])
            logits, short = prefill(model, ids)
            torch.testing.assert_close(logits, expected)
            assert torch.equal(short.position, cache.position)
            more = torch.randint(256, (3, 30))
            torch.testing.assert_close(model(more, short), model(more, cache))


def test_recompute_sees_between_half_and_all_of_its_tokens(model):
    ids = torch.randint(256, (1, 50))
    with mitigate(model, "recompute:last=16"):
        out = model(ids)
    for t in range(50):
        start = max(0, t // 8 * 8 - 8)
        torch.testing.assert_close(out[:, t], model(ids[:, start : t + 1])[:, -1])


def test_every_remedy_is_found_under_its_own_name():
    assert all(kind.name == name for name, kind in REMEDIES.items())
