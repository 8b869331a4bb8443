"""RecurrentGemma of transformers: its states in the stream's cache, padding and documents. See test_adopt_given."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import transformers as hf
from adopted_families import (
    GIVEN_FAMILIES,
    NEAR,
    POLICIES,
    generates_with_beams_and_padding,
    logits_of,
    put,
    random_ids,
)
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations import mitigate
from rnn_longctx.models.adopt.adopting import adopt
from rnn_longctx.recurrence.policy import PLAIN

pytestmark = pytest.mark.skipif("recurrent_gemma" not in GIVEN_FAMILIES, reason="an older transformers")
BOTH = pytest.mark.parametrize("policy", [PLAIN, POLICIES["window"]], ids=["plain", "window"])


@pytest.fixture
def family():
    return "recurrent_gemma"


@torch.no_grad()
@BOTH
def test_its_own_forward_goes_on_from_its_cache(model, policy):
    """With a remedy and without, whatever other streams the model reads: transformers (5.24) keeps one stream's states
    on the modules, and begins the convolution anew in a cached call of several tokens."""
    put(adopt(model), policy)
    ids, others = random_ids(2, 20), random_ids(3, 20)
    caches = [hf.DynamicCache(config=model.config) for _ in range(2)]
    wholes = [logits_of(model, some) for some in (ids, others)]
    parts: list[list[Tensor]] = [[], []]
    for both in zip(ids.split([7, 1, 9, 3], 1), others.split([7, 1, 9, 3], 1)):
        for i, part in enumerate(both):
            parts[i].append(model(part, cache=caches[i], use_cache=True).logits)
    for some, whole in zip(parts, wholes):
        torch.testing.assert_close(torch.cat(some, 1), whole, **NEAR)
    assert all(m.module.conv1d_state is None and m.module.rg_lru.recurrent_states is None for m in adopt(model).mixers)


@torch.no_grad()
@BOTH
def test_its_own_generate(model, policy):
    put(adopt(model), policy)
    generates_with_beams_and_padding(model)


@torch.no_grad()
@BOTH
def test_documents_packed_by_their_positions(model, policy):
    """Each is read as a row of its own; the library's convolution runs on from one into the next."""
    put(adopt(model), policy)
    ids, lengths = random_ids(1, 30), [9, 1, 20]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    alone = torch.cat([logits_of(model, document) for document in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(logits_of(model, ids, position_ids=positions), alone, **NEAR)


@torch.no_grad()
def test_its_own_block_reads_padding_and_ours_does_not(model):
    """transformers (5.24) hands a block the mask, at which it does not look: what a padded row says hangs on the id of
    its padding. That is why taking a remedy off does not bring such outputs back; all others it does, bit for bit."""
    ids, mask = random_ids(2, 14), torch.ones(2, 14, dtype=torch.long)
    mask[1, :5] = 0
    other = ids.where(mask.bool(), (ids + 1) % model.config.vocab_size)
    unpadded = logits_of(model, ids)
    alone = logits_of(model, ids[1:, 5:])[0]
    own, own_other = (logits_of(model, some, attention_mask=mask)[1, 5:] for some in (ids, other))
    assert (own - own_other).abs().max() > 1e-2 and (own - alone).abs().max() > 1e-2
    mitigate(model, "rri").remove()
    for some in (ids, other):
        torch.testing.assert_close(logits_of(model, some, attention_mask=mask)[1, 5:], alone, **NEAR)
    assert torch.equal(logits_of(model, ids), unpadded)


@torch.no_grad()
def test_right_padding_is_refused_under_a_policy(model):
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, -3:] = 0
    expected = logits_of(model, ids, attention_mask=mask)
    adopt(model)
    assert torch.equal(logits_of(model, ids, attention_mask=mask), expected)
    with mitigate(model, "rri"), pytest.raises(InputError, match="left padding"):
        logits_of(model, ids, attention_mask=mask)


def test_a_block_alone_is_refused(model):
    with pytest.raises(InputError, match=r"is a block alone: give the model"):
        adopt(copy.deepcopy(model.model.layers[0].temporal_block))


def test_an_older_transformers_is_refused_in_one_line(model, monkeypatch):
    """Its cache takes every layer for one of sliding attention (5.15)."""
    older = hf.DynamicCache(config=model.config)
    older.layers[:2] = [older.layers[2]] * 2
    monkeypatch.setattr(sys.modules["transformers"], "DynamicCache", lambda config: older)  # (not `hf`: it is lazy)
    with pytest.raises(InputError, match=r"needs a transformers whose cache has layers for its states: 5\.24") as error:
        adopt(model)
    assert "\n" not in str(error.value)


def test_published_shapes_are_worked_out_without_memory():
    with torch.device("meta"):
        adopted = adopt(
            hf.AutoModelForCausalLM.from_config(hf.RecurrentGemmaConfig(vocab_size=100, num_key_value_heads=1))
        )
    size = adopted.state_size()
    assert len(adopted.mixers) == 18 and {m.shape for m in adopted.mixers} == {(2560, 1, 1)}
    assert size.fixed == {"scan": 18 * 2560, "conv": 18 * 2560 * 3}
    assert size.windows == {2047: 8 * 2 * 256} and size.per_token == 0
