"""What users of other tools reported in public, tried here on adopted models; each test names the report."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
import transformers as hf
from adopted_families import FAMILIES, NEAR, followed, logits_of, random_ids

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations import active, handles_on, mitigate
from rnn_longctx.models.adopt.adopting import adopt

REMEDIES = ["none", "rri:alpha=0.7,beta=0.5", "window:tokens=5"]
CHUNK = {"mamba2": "chunk_size", "zamba2": "chunk_size", "nemotron_h": "chunk_size", "bamba": "mamba_chunk_size",
         "falcon_h1": "mamba_chunk_size", "granitemoehybrid": "mamba_chunk_size"}  # fmt: skip


@pytest.fixture
def model(family):
    torch.set_num_threads(1)
    return hf.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()


@torch.no_grad()
def test_padding_of_a_batch_of_one(model, family):
    """huggingface/transformers#46773: linear-attention models left the mask out where a batch has one row."""
    adopted, ids, more = adopt(model), random_ids(1, 12), random_ids(1, 4)
    padded, mask = torch.cat([torch.zeros(1, 5, dtype=torch.int64), ids], 1), (torch.arange(17) >= 5)[None]
    with mitigate(adopted, followed(family, random.choice(REMEDIES))):
        one, two = adopted.new_cache(), adopted.new_cache()
        torch.testing.assert_close(adopted(padded, one, mask)[:, 5:], adopted(ids, two), **NEAR)
        torch.testing.assert_close(adopted(more, one), adopted(more, two), **NEAR)
        masked = logits_of(model, padded, attention_mask=mask.long())[:, 5:]
        torch.testing.assert_close(masked, logits_of(model, ids), **NEAR)


@torch.no_grad()
def test_a_row_of_padding_alone_has_read_nothing(model):
    """pytorch/pytorch#103749, unslothai/unsloth#9848: a row that attends to nothing is NaN, and spreads."""
    adopted, ids, more = adopt(model), random_ids(3, 12), random_ids(3, 6)
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[0], mask[1, :5] = False, False
    cache = adopted.new_cache()
    hidden = adopted(ids, cache, mask)
    assert bool(hidden.isfinite().all()) and cache.position.tolist() == [0, 7, 12]
    torch.testing.assert_close(hidden[1:2, 5:], adopted(ids[1:2, 5:]), **NEAR)
    torch.testing.assert_close(adopted(more, cache)[:1], adopted(more[:1]), **NEAR)


@torch.no_grad()
def test_prompts_shorter_than_the_convolution(model, family):
    """huggingface/transformers#28094 (its conv_state of a short prompt), state-spaces/mamba#641 (cut against whole)."""
    adopted, ids = adopt(model), random_ids(2, 9)
    with mitigate(adopted, followed(family, random.choice(REMEDIES))):
        whole = adopted(ids)
        for first in range(1, 6):
            cache = adopted.new_cache()
            parts = [adopted(part, cache) for part in ids.split([first, *[1] * (9 - first)], 1)]
            torch.testing.assert_close(torch.cat(parts, 1), whole, **NEAR)


@pytest.mark.parametrize("family", CHUNK)
def test_the_config_s_chunk_is_no_part_of_the_function(family):
    """vllm-project/vllm#57278: states taken at a chunk's end were wrong where blocks were no multiple of it."""
    ids, state, found = random_ids(1, 37), None, []
    for chunk in (4, 16, 256):
        config = FAMILIES[family]()
        setattr(config, CHUNK[family], chunk)
        model = hf.AutoModelForCausalLM.from_config(config).eval()
        state = model.state_dict() if state is None else state
        model.load_state_dict(state)
        found.append(logits_of(model, ids))
        with mitigate(model, REMEDIES[1]):
            found.append(logits_of(model, ids))
    for plain, mitigated in zip(found[::2], found[1::2]):
        torch.testing.assert_close(plain, found[0], **NEAR)
        assert torch.equal(mitigated, found[1])


@torch.no_grad()
def test_a_cache_that_a_broken_call_left_half_moved_is_refused(model):
    """sgl-project/sglang#30986. The library's cache moves on layer by layer, so what is left is no state at all."""
    adopted, ids = adopt(model), random_ids(1, 30)
    cache, fresh = adopted.new_cache(), adopted.new_cache()
    adopted(ids[:, :10], cache)
    before = cache.clone()
    expected = adopted(ids[:, 10:20], cache.clone())

    def breaks(*_):
        raise KeyboardInterrupt

    hook = adopted.mixers[-1].module.register_forward_pre_hook(breaks)
    for each in (cache, fresh):
        with pytest.raises(KeyboardInterrupt):
            adopted(ids[:, 10:20], each)
    hook.remove()
    with pytest.raises(InputError, match="a call on this cache broke off"):
        adopted(ids[:, 10:20], cache)
    with pytest.raises(InputError, match="a call on this cache broke off"):
        adopted(ids[:, 10:20], cache.clone())
    assert torch.equal(adopted(ids[:, 10:20], before), expected)
    assert torch.equal(adopted(ids[:, 10:20], fresh), adopted(ids[:, 10:20]))
    cache.layers = []  # dropped, it is a new one
    assert torch.equal(adopted(ids[:, 10:20], cache), adopted(ids[:, 10:20]))


def test_training_goes_on_after_measuring(model):
    """state-spaces/s4#169, Dao-AILab/flash-attention#299: what inference mode had made was kept, and broke backward."""
    ids, twin = random_ids(2, 20), copy.deepcopy(model)
    adopted = adopt(model)
    with torch.inference_mode(), mitigate(model, REMEDIES[1]):
        model(ids)
        adopted(ids)
    for one in (model, twin):
        one(ids, labels=ids).loss.backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), name


def test_checkpointed_layers_have_the_same_gradients_under_a_remedy(model):
    """huggingface/peft#3477: what is put on a model must stay on while backward computes its layers again."""
    ids, found = random_ids(2, 20), []
    model.train()
    for checkpointed in (False, True):
        model.zero_grad()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with mitigate(model, REMEDIES[1]):
            model(ids, labels=ids).loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 0 and all(map(torch.equal, *found))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own_remedies(model, copied):
    """huggingface/accelerate#1835: a copy went on calling the model it was copied from."""
    ids = random_ids(2, 20)
    plain = logits_of(model, ids)
    with mitigate(model, REMEDIES[1]):
        inside, twin = logits_of(model, ids), copied(model)
    assert not torch.equal(inside, plain) and torch.equal(logits_of(model, ids), plain)
    assert torch.equal(logits_of(twin, ids), inside) and active(twin)[0].startswith("rri")
    for handle in handles_on(twin):
        handle.remove()
    assert torch.equal(logits_of(twin, ids), plain)
