"""A model whose forward was edited from outside, by hooks or in the object, is told from the one without."""

import functools
import types

import pytest
import torch
import transformers as hf
from adopted_families import _mamba2
from torch import nn

import rnn_longctx
from rnn_longctx import adopt
from rnn_longctx.errors import InputError
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config

SCALE = 2.0


def own():
    torch.manual_seed(0)
    return Mamba2LM(Mamba2Config(d_model=32, n_layer=1, vocab_size=256, d_state=16, headdim=16))


def _steer(vector):
    return lambda module, args, out: out + vector


def _times(scale, module, args, out):
    return out * scale


def _watch(seen):
    def look(module, args, out):
        seen.append(out)

    return look


class _Steers:
    def __init__(self, by):
        self.by = by

    def __call__(self, module, args, out):
        return out + self.by


def test_each_hook_is_told_and_goes_with_it():
    model = own()
    before = model.weights_hash
    hooks = [_steer(torch.zeros(32)), _steer(torch.ones(32)), functools.partial(_times, 2.0),
             functools.partial(_times, 3.0), _Steers(1.0), _Steers(2.0), _Steers(torch.ones(32)),
             lambda module, args, out: out * 2, lambda module, args, out: out * 3]  # fmt: skip
    hashes = []
    for hook in hooks:
        handle = model.backbone.embedding.register_forward_hook(hook)
        hashes += [model.weights_hash]
        assert model.weights_hash == hashes[-1]
        handle.remove()
        assert model.weights_hash == before
    handle = model.backbone.embedding.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    hashes.append(model.weights_hash)
    handle.remove()
    handle = model.lm_head.register_forward_hook(hooks[1])
    hashes.append(model.weights_hash)
    assert len({before, *hashes}) == len(hashes) + 1


def test_what_a_hook_reads_is_told(monkeypatch):
    """A tensor of its closure that is edited in place, and a global; not what a hook that only watches collects."""
    model, vector, seen = own(), torch.ones(32), []
    handle = model.backbone.embedding.register_forward_hook(_steer(vector))
    before = model.weights_hash
    vector.mul_(2)
    assert model.weights_hash != before
    handle.remove()
    model.backbone.embedding.register_forward_hook(lambda module, args, out: out * SCALE)
    before = model.weights_hash
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert model.weights_hash != before
    model.backbone.embedding.register_forward_hook(_watch(seen))
    before = model.weights_hash
    model(torch.zeros(1, 8, dtype=torch.int64))
    assert seen and model.weights_hash == before


def test_a_forward_replaced_in_the_object_is_told():
    model = own()
    before, norm = model.weights_hash, model.backbone.norm_f
    plain = norm.forward
    norm.forward = types.MethodType(lambda self, x: plain(x) * 2, norm)
    assert model.weights_hash != before
    norm.forward = plain  # as it was, though it lies in the object now
    assert model.weights_hash == before


def test_the_hooks_of_this_library_and_of_others_models_are_no_part(tmp_path):
    theirs = hf.AutoModelForCausalLM.from_config(_mamba2()).eval()
    model = adopt(theirs)
    before, ids = model.weights_hash, torch.ones(1, 8, dtype=torch.int64)
    with rnn_longctx.mitigate(model, "recompute:last=64"):  # which refuses the model's own forward by hooks
        assert model.weights_hash == before
    theirs(ids, output_hidden_states=True)
    assert model.weights_hash == before
    theirs.backbone.layers[0].register_forward_hook(lambda module, args, out: out)
    assert model.weights_hash != before


def test_stored_cells_are_not_of_a_model_that_is_steered(tmp_path):
    model, tasks = own(), ["lm:slices=1,tokens=0"]
    model.tokenizer = rnn_longctx.load("demo").tokenizer
    text = rnn_longctx.load_text("builtin")
    measure = functools.partial(rnn_longctx.evaluate, model, [64], tasks, text=text)
    plain = measure(out=str(tmp_path / "one"))
    model.backbone.embedding.register_forward_hook(_steer(torch.linspace(-3, 3, 32)))
    fresh = measure()
    kept = measure(out=str(tmp_path / "one"))
    (now,) = set(fresh["weights_hash"])
    stored = kept[kept["weights_hash"] == now]["value"].tolist()
    assert stored == fresh["value"].tolist() != plain["value"].tolist()


def test_a_module_with_no_hooks_says_nothing():
    from rnn_longctx.models.patches import patches

    assert list(patches(nn.Linear(2, 2))) == []


def test_a_hook_on_the_last_product_of_a_layer_sees_it_whole(monkeypatch):
    """Whatever a scan would leave to be scaled after it."""
    from rnn_longctx.models.norm import RMSNorm

    model, asked = own(), []
    gate = RMSNorm.gate
    monkeypatch.setattr(RMSNorm, "gate", lambda self, z: asked.append(1) or gate(self, z))
    ids = torch.zeros(1, 8, dtype=torch.int64)
    model(ids)
    assert asked
    asked.clear()
    model.mixers[0].out_proj.register_forward_hook(lambda module, args, out: out + 1)
    model(ids)
    assert not asked


def test_a_hook_on_a_whole_model_of_another_library_is_refused():
    """Reading calls its parts, and would pass the hook by; one on a layer is called."""
    theirs, ids = hf.AutoModelForCausalLM.from_config(_mamba2()).eval(), torch.ones(1, 8, dtype=torch.int64)
    plain = rnn_longctx.generate(theirs, ids, 5)
    handle = theirs.register_forward_hook(lambda module, args, out: out)
    with pytest.raises(InputError, match="hook on the whole model"):
        rnn_longctx.generate(theirs, ids, 5)
    handle.remove()
    assert torch.equal(rnn_longctx.generate(theirs, ids, 5), plain)
    theirs.backbone.layers[0].register_forward_hook(_watch(seen := []))
    assert torch.equal(rnn_longctx.generate(theirs, ids, 5), plain) and seen
