"""MiniMax of transformers: a cache of its own, in every order of its layers. See test_adopt_given."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from adopted_families import (
    FAMILIES,
    GIVEN_FAMILIES,
    NEAR,
    POLICIES,
    cached,
    generates_with_beams_and_padding,
    logits_of,
    put,
    random_ids,
    streamed,
)

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations import mitigate
from rnn_longctx.models.adopt.adopting import adopt
from rnn_longctx.recurrence.policy import PLAIN

LINEAR, FULL = "linear_attention", "full_attention"
ORDERS = {
    "first": [LINEAR, FULL, LINEAR],
    "last": [FULL, LINEAR, LINEAR],
    "alone": [LINEAR, LINEAR],
}  # where the recurrent layers stand


@pytest.fixture
def family():
    return "minimax"


@pytest.fixture(params=ORDERS)
def ordered(request, build, monkeypatch):
    """A MiniMax whose layers stand in one of the orders."""
    config = GIVEN_FAMILIES["minimax"]()
    config.layer_types, config.num_hidden_layers = ORDERS[request.param], len(ORDERS[request.param])
    with monkeypatch.context() as changed:
        changed.setitem(FAMILIES, "minimax", lambda: config)
        return build("minimax")


@torch.no_grad()
@pytest.mark.parametrize("policy", [PLAIN, POLICIES["cap every 7"]], ids=["plain", "cap every 7"])
def test_its_own_forward_goes_on_from_its_cache(ordered, policy):
    """With a remedy and without: transformers (5.24) counts no tokens in a cache whose first layer is recurrent, so
    that several cached tokens, and padded rows, are read wrongly; and `reset` keeps the states."""
    ids = random_ids(2, 20)
    put(adopt(ordered), policy)
    whole, cache, parts = logits_of(ordered, ids), None, []
    for part in ids.split([7, 1, 9, 3], 1):
        logits, cache = cached(ordered, part, cache)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **NEAR)
    cache.reset()
    if not cache.get_seq_length():  # (in transformers 5.15 attention's keys stay, as zeros)
        torch.testing.assert_close(cached(ordered, ids, cache)[0], whole, **NEAR)


@torch.no_grad()
@pytest.mark.parametrize("policy", [PLAIN, POLICIES["window"]], ids=["plain", "window"])
def test_its_own_generate(ordered, policy):
    put(adopt(ordered), policy)
    generates_with_beams_and_padding(ordered)


@torch.no_grad()
def test_streams_in_every_order(ordered):
    adopted, ids, mask = adopt(ordered), random_ids(2, 20), torch.ones(2, 20, dtype=torch.bool)
    mask[1, :6] = False
    for policy in (PLAIN, POLICIES["gates"]):
        put(adopted, policy)
        whole = logits_of(ordered, ids)
        torch.testing.assert_close(streamed(adopted, ids, [4, 1, 12, 3])[0], whole, **NEAR)
        cache, parts = adopted.new_cache(), []
        for part, kept in zip(ids.split([8, 1, 11], 1), mask.split([8, 1, 11], 1)):
            parts.append(adopted.logits(adopted(part, cache, kept)))
        torch.testing.assert_close(torch.cat(parts, 1)[1, 6:], logits_of(ordered, ids[1:, 6:])[0], **NEAR)
    assert adopted.attends == (FULL in ordered.config.layer_types)


@torch.no_grad()
def test_a_cache_from_before_it_was_adopted(ordered):
    """It stays the library's, and no remedy goes on from it."""
    ids = random_ids(2, 20)
    _, cache = cached(ordered, ids[:, :12])
    expected = cached(ordered, ids[:, 12:13], copy.deepcopy(cache))[0]
    adopt(ordered)
    assert torch.equal(cached(ordered, ids[:, 12:13], copy.deepcopy(cache))[0], expected)
    with mitigate(ordered, "rri"), pytest.raises(InputError, match=r"before the model was adopted.*start a new cache"):
        cached(ordered, ids[:, 12:13], cache)


@torch.no_grad()
def test_in_bfloat16_a_remedy_comes_and_goes_in_mid_stream(model):
    """Our states are wider than the library's."""
    model.to(torch.bfloat16)
    adopted, ids, cache = adopt(model), random_ids(2, 20), None
    for i, part in enumerate(ids.split([6, 1, 5, 1, 7], 1)):
        put(adopted, POLICIES["gates"] if i % 2 else PLAIN)
        logits, cache = cached(model, part, cache)
        assert logits.isfinite().all()
        assert cache.layers[0].recurrent_states[0].dtype == (torch.float32 if i % 2 else torch.bfloat16)


def test_published_shapes_are_worked_out_without_memory():
    with torch.device("meta"):
        adopted = adopt(hf.AutoModelForCausalLM.from_config(hf.MiniMaxConfig(num_local_experts=1)))
    c, size = adopted.config, adopted.state_size()
    layers = c.layer_types.count(LINEAR)
    assert len(adopted.mixers) == layers and {m.shape for m in adopted.mixers} == {(32, 128, 128)}
    assert size.fixed == {"scan": layers * 32 * 128 * 128, "conv": 0}
    assert size.per_token == (len(c.layer_types) - layers) * 2 * 8 * 128
