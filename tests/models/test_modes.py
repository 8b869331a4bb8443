"""What measures, generates, probes or calibrates is without dropout, and leaves each module in the mode it was in."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from adopted_families import NEAR, random_ids
from torch import nn

from rnn_longctx import CollapseMonitor, evaluate, record
from rnn_longctx.data import ByteTokenizer, Text
from rnn_longctx.eval.search.calibrate import calibrate
from rnn_longctx.measure.envelope import measure_envelope
from rnn_longctx.measure.steps import measure_steps
from rnn_longctx.measure.stream import tail_loss
from rnn_longctx.mitigations import mitigate
from rnn_longctx.models.adopt.adopting import adopt
from rnn_longctx.models.generate import continuation, generate, prefill
from rnn_longctx.models.modes import evaluating
from rnn_longctx.probes.attribution import attribute
from rnn_longctx.probes.held import dropped_share
from rnn_longctx.probes.probe import probe
from rnn_longctx.probes.remembrance import remembrance
from rnn_longctx.tasks.passkey import Passkey
from rnn_longctx.train.evaluation import examples_of, held_out_loss, recall

TEXT = Text("made", bytes(np.random.default_rng(0).integers(97, 123, 20_000, dtype=np.uint8)))


class Dropping(nn.Linear):
    """A layer that is another one in training."""

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


def _dropping(model):
    for m in model.modules():
        if hasattr(m, "in_proj"):
            m.in_proj.__class__ = Dropping
    return model


def ours(make, build):
    model = _dropping(make(vocab_size=256))
    model.name, model.tokenizer, model.train_length = "tiny", ByteTokenizer(), 24
    return model


def theirs(make, build):
    model = _dropping(build("bamba", 256))
    adopt(model, tokenizer=ByteTokenizer(), train_length=24, name="tiny")
    model.config.attention_dropout = 0.5
    for m in model.modules():
        if hasattr(m, "attention_dropout"):
            m.attention_dropout = 0.5
    return model


def _reader(model):
    return model if hasattr(model, "mixers") else adopt(model)


def _policies(remedy):
    def read(model):
        with mitigate(model, remedy, target_length=64, text=TEXT) as handle:
            return repr(handle.plan.policies)

    return read


def _calibrated(model):
    _reader(model).train_length = 96  # a prompt of the guard fits
    return repr(calibrate(model, "state-norm", 200, TEXT, slices=1, prompts=1))


def _held_out(model):
    class Corpus:
        def validation(self, length, rows, most):
            yield torch.from_numpy(np.frombuffer(TEXT.data, np.uint8)[: 2 * (length + 1)].astype(np.int64)).view(2, -1)

    from contextlib import nullcontext

    return held_out_loss(_reader(model), Corpus(), 40, 2, nullcontext)


def _passkeys(model):
    from contextlib import nullcontext

    task, tokenizer = Passkey(), ByteTokenizer()
    return recall(_reader(model), task, examples_of(task, tokenizer, 128, 2, 0), tokenizer, 2, nullcontext)


def _harness(model):
    harness = pytest.importorskip("rnn_longctx.eval.harness.model")
    from lm_eval.api.instance import Instance

    lm = harness.HarnessLM(_reader(model))
    pairs = [Instance("loglikelihood", {}, ("a question", f" answer {i}"), i) for i in range(3)]
    asked = [Instance("generate_until", {}, ("a question", {"until": ["\n"], "max_gen_toks": 4}), 0)]
    return [lm.loglikelihood(pairs), lm.generate_until(asked)]


def _sampled(model):
    logits, cache = prefill(_reader(model), random_ids_of(30))
    tokens = continuation(_reader(model), logits, cache, 0.7, torch.Generator().manual_seed(0))
    return torch.stack([next(tokens) for _ in range(6)])


def random_ids_of(length, rows=2):
    return torch.from_numpy(np.frombuffer(TEXT.data, np.uint8)[: rows * length].astype(np.int64)).view(rows, length)


CALLS = {
    "generate": lambda m: generate(m, random_ids_of(20), 6),
    "prefill and continuation": _sampled,
    "evaluate": lambda m: evaluate(m, [24, 96], "lm:slices=2", ["none", "rri"], text=TEXT)["value"],
    "passkey": lambda m: evaluate(m, 128, "passkey:n=2", text=TEXT)["value"],
    "remembrance": lambda m: remembrance(m, random_ids_of(20))["tv"],
    "ablation": lambda m: tail_loss(_reader(m), random_ids_of(33)),
    "envelope": lambda m: measure_envelope(_reader(m), random_ids_of(24), "made", "0").peaks,
    "steps": lambda m: torch.stack(measure_steps(_reader(m), random_ids_of(24))),
    "monitor": lambda m: repr(vars(CollapseMonitor.calibrated(m, TEXT, every=8))),
    "state-norm": _policies("state-norm"),
    "a-floor": _policies("a-floor"),
    "token-filter": _policies("token-filter"),
    "probe": lambda m: probe(_reader(m), TEXT, 64, every=8, calibration_text=TEXT, prove=True).losses["loss"],
    "calibrate": _calibrated,
    "chunk-select": lambda m: _under(m, "chunk-select:chunk=9,query=3"),
    "recompute": lambda m: _under(m, "recompute:last=8"),
    "lm-eval": _harness,
    "held out": _held_out,
    "passkeys in training": _passkeys,
}
OURS = {
    "decimate": lambda m: _under(m, "decimate:base=9"),
    "lamb": lambda m: _under(m, "lamb:tokens=9,query=4"),
    "attribute": lambda m: attribute(m, random_ids_of(20, 1), segment=7).values,
    "dropped": lambda m: dropped_share(m, random_ids_of(64, 1), "token-filter", 128)["share"],
}


def _under(model, remedy):
    with mitigate(_reader(model), remedy):
        return prefill(_reader(model), random_ids_of(30))[0]


def _modes(model):
    return [(name, m.training) for name, m in model.named_modules()]


def _seeing(model, seen):
    """Note the mode of every layer that is called."""
    return [m.in_proj.register_forward_pre_hook(lambda m, _: seen.append(m.training)) for m in _reader(model).mixers]


def _half_trained(model):
    """In training, but for what a person has frozen in evaluation mode."""
    model.train()
    frozen = [m for name, m in model.named_modules() if name.endswith("layers.0")]
    assert frozen
    for m in frozen:
        m.eval()


CASES = [(made, name) for made in (ours, theirs) for name in CALLS] + [(ours, name) for name in OURS]


@pytest.mark.parametrize(("made", "call"), CASES, ids=[f"{made.__name__}-{name}" for made, name in CASES])
def test_nothing_is_measured_with_dropout_on(make, build, made, call, tmp_path):
    model = made(make, build)
    twin, call = copy.deepcopy(model).eval(), (CALLS | OURS)[call]
    _seeing(twin, [])  # (a model with hooks is another one than without)
    expected = call(twin)
    _half_trained(model)
    before, seen = _modes(model), []
    hooks = _seeing(model, seen)
    found = call(model)
    assert _modes(model) == before and model.training and seen and not any(seen)
    for hook in hooks:
        hook.remove()
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, pd.Series):
        np.testing.assert_array_equal(found.to_numpy(float), expected.to_numpy(float))
    else:
        assert found == expected
    # it would be another value otherwise
    ids = random_ids_of(20)
    raw = [_reader(m)(ids) for m in (model, twin)]
    assert (raw[0] - raw[1]).abs().max() > 1e-3


@pytest.mark.parametrize("made", [ours, theirs])
def test_the_mode_comes_back_after_an_exception(make, build, made):
    model = made(make, build)
    _half_trained(model)
    before, reader = _modes(model), _reader(model)

    def fails(*_):
        raise RuntimeError("in the middle")

    hook = reader.mixers[-1].in_proj.register_forward_hook(fails)
    calls = [
        lambda: generate(model, random_ids_of(9), 2),
        lambda: evaluate(model, 24, "lm:slices=2", text=TEXT),
        lambda: measure_steps(reader, random_ids_of(9)),
        lambda: mitigate(model, "a-floor", text=TEXT),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="in the middle"):
            call()
        assert _modes(model) == before
    hook.remove()
    assert generate(model, random_ids_of(9), 2).shape == (2, 2)


@pytest.mark.parametrize("made", [ours, theirs])
def test_between_two_tokens_the_model_is_as_it_was(make, build, made):
    model = made(make, build)
    _half_trained(model)
    before, reader = _modes(model), _reader(model)
    logits, cache = prefill(reader, random_ids_of(9))
    tokens = continuation(reader, logits, cache)
    for _ in range(3):
        next(tokens)
        assert _modes(model) == before
    model.eval()  # meanwhile, by its owner
    next(tokens)
    del tokens  # given up half way
    assert not any(training for _, training in _modes(model))


def test_modes_nest_and_modules_that_do_more_are_told():
    class Merging(nn.Module):  # as some adapters fold themselves in for evaluation
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model = nn.Sequential(Merging(), nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)))
    model[1][0].eval()
    before = _modes(model)
    with evaluating(model):
        assert not any(training for _, training in _modes(model)) and model[0].merged
        with evaluating(model):
            pass
        assert not any(training for _, training in _modes(model))
    assert _modes(model) == before and not model[0].merged
    with evaluating("no model"), evaluating(None):
        pass


def test_what_only_watches_leaves_the_mode_and_says_so(make, build):
    """A person's own calls are theirs."""
    model = theirs(make, build)
    monitor = CollapseMonitor.calibrated(model, TEXT, every=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with monitor.on(model, lambda report: None):
            pass
        with record(ours(make, build).train(), every=8):
            pass
    model.train()
    for watch in (lambda: monitor.on(model, lambda report: None), lambda: record(model, every=8)):
        with pytest.warns(RuntimeWarning, match=r"tiny is in training mode.* model\.eval\(\)") as told, watch():
            assert model.training
            generate(model, random_ids(), 2)
        assert len(told) == 1 and told[0].filename == __file__


@pytest.mark.parametrize("family", ["mamba2", "bamba"])
def test_dropout_of_an_adapter(build, family):
    peft = pytest.importorskip("peft")
    model, ids = build(family), random_ids(2, 14)
    adapter = peft.get_peft_model(model, peft.LoraConfig(target_modules=["in_proj"], lora_dropout=0.5))
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.3)
    adapter.eval()
    expected = prefill(adopt(adapter), ids)[0], generate(adapter, ids, 4)
    adapter.train()
    torch.testing.assert_close(prefill(adopt(adapter), ids)[0], expected[0], **NEAR)
    assert torch.equal(generate(adapter, ids, 4), expected[1]) and adapter.training
