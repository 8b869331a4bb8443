"""RecurrentGemma of transformers: its RG-LRU held to the scan's definition, and its states in the stream's cache."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from adopted_families import GIVEN_FAMILIES, NEAR, POLICIES, VOCAB, logits_of, put, random_ids
from torch import Tensor

import rnn_longctx
from rnn_longctx.data import ByteTokenizer, Text
from rnn_longctx.errors import InputError
from rnn_longctx.mitigations import NotApplicable, mitigate
from rnn_longctx.models.adopt.adopting import adopt, load_any
from rnn_longctx.recurrence.gates import Gates, ScanInputs
from rnn_longctx.recurrence.policy import PLAIN, Cap, ScanPolicy
from rnn_longctx.recurrence.ssd import reference

EXACT = {
    "rri": ScanPolicy(add=-0.05, gain=0.75),
    "delta-scale": ScanPolicy(mul=0.6),
    "capped every token": ScanPolicy(caps=(Cap(0.3),)),
    "capped every 64": ScanPolicy(caps=(Cap(0.2, 64),)),
    "window": ScanPolicy(window=30),
    "reset": ScanPolicy(reset=50),
}
pytestmark = pytest.mark.skipif("recurrent_gemma" not in GIVEN_FAMILIES, reason="an older transformers")
TEXT = Text("made", bytes(torch.randint(32, VOCAB, (4000,)).tolist()))
BOTH = pytest.mark.parametrize("policy", [PLAIN, POLICIES["window"]], ids=["plain", "window"])


@pytest.fixture
def family():
    return "recurrent_gemma"


@torch.no_grad()
def read_by_first(model, ids: Tensor) -> tuple[ScanInputs, Gates, Tensor, Tensor]:
    """What the first block scans, worked out in float64 of what it is given, the factor (B, T, H) of what it gives, and
    their product as it is."""
    block, seen = adopt(model).mixers[0].module, {}
    hooks = [
        getattr(block, name).register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
        for name in ("linear_x", "linear_y")
    ]
    hooks.append(block.linear_out.register_forward_pre_hook(lambda module, args: seen.update(product=args[0])))
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    double = copy.deepcopy(block).double()
    x = double.conv_1d(seen["linear_x"].double().transpose(1, 2))[..., : ids.shape[1]].transpose(1, 2)
    lru, heads = double.rg_lru, x.unflatten(-1, (block.rg_lru.num_attention_heads, -1))
    i, r = (
        (torch.einsum("bthi,hij->bthj", heads, weight) + bias).sigmoid().flatten(2)
        for weight, bias in (
            (lru.input_gate_weight, lru.input_gate_bias),
            (lru.recurrent_gate_weight, lru.recurrent_gate_bias),
        )
    )
    log_decay = -8 * r * F.softplus(lru.recurrent_param)
    scale = (1 - (2 * log_decay).exp()).sqrt()
    scale[:, 0] = 1
    ones = torch.ones(*ids.shape, 1, 1, dtype=torch.float64)
    inputs = ScanInputs((x * i)[..., None], ones, ones)
    return inputs, Gates(log_decay, scale), block.act_fn(seen["linear_y"].double()), seen["product"]


@torch.no_grad()
@pytest.mark.parametrize("policy", EXACT.values(), ids=EXACT.keys())
def test_a_block_under_a_policy_is_the_definition(model, policy):
    """On what the library's own forward gives the block, in float64; outputs, states and sums of log-decays."""
    adopted, ids = adopt(model), random_ids(2, 140)
    inputs, gates, factor, plain = read_by_first(model, ids)
    y = reference.scan(inputs, gates)[0][..., 0]
    torch.testing.assert_close((y * factor).float(), plain, rtol=1e-4, atol=1e-5)
    y, state, total = reference.scan(inputs, gates, policy=policy)
    expected = (y[..., 0] * factor).float()
    assert (expected - plain).abs().max() > 1e-3
    put(adopted, policy)
    torch.testing.assert_close(read_by_first(model, ids)[3], expected, rtol=1e-4, atol=1e-5)
    cache = adopted.new_cache()
    for part in ids.split([70, 1, 64, 5], 1):
        adopted(part, cache)
    scan = cache.layers[0].scan
    torch.testing.assert_close(scan.state, state.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scan.log_decay, total, rtol=1e-4, atol=1e-4)


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
    """Beams take their states with them, and padding leaves no trace."""
    put(adopt(model), policy)
    ids, mask = random_ids(2, 13), torch.ones(2, 13, dtype=torch.long)
    mask[1, :5] = 0
    told = {"max_new_tokens": 7, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    beams = {"num_beams": 3, "num_return_sequences": 3}
    found = model.generate(ids, attention_mask=mask, **told, **beams)
    again = model.generate(ids, attention_mask=mask, use_cache=False, **told, **beams)
    torch.testing.assert_close(found.sequences_scores, again.sequences_scores, **NEAR)
    assert torch.equal(found.sequences, again.sequences)
    greedy = model.generate(ids, attention_mask=mask, **told).sequences[1, -7:]
    assert torch.equal(greedy, model.generate(ids[1:, 5:], **told).sequences[0, -7:])


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
def test_right_padding_is_refused_under_a_policy(model):
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, -3:] = 0
    expected = logits_of(model, ids, attention_mask=mask)
    adopt(model)
    assert torch.equal(logits_of(model, ids, attention_mask=mask), expected)
    with mitigate(model, "rri"), pytest.raises(InputError, match="left padding"):
        logits_of(model, ids, attention_mask=mask)


@torch.no_grad()
def test_a_cache_is_copied_pickled_and_reset(model):
    put(adopt(model), POLICIES["cap every 7"])
    ids, cache = random_ids(2, 20), hf.DynamicCache(config=model.config)
    model(ids[:, :9], cache=cache, use_cache=True)
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    expected = model(ids[:, 9:], cache=cache, use_cache=True).logits
    for each in copies:
        assert torch.equal(model(ids[:, 9:], cache=each, use_cache=True).logits, expected)


def test_what_does_not_apply_is_one_line(model):
    adopted = adopt(model, tokenizer=ByteTokenizer(), train_length=16, name="small")
    refused = {
        "a-floor:tokens=9": "reads one step a head",
        "a-winsor:share=0.3": "needs one A a head",
        "token-filter": "reads one step a head",
        "decimate": "one step a head|drops tokens between layers",
        "erase:scale=0.5": "needs a recurrence that erases",
    }
    for remedy, why in refused.items():
        with pytest.raises(NotApplicable, match=why) as error:
            mitigate(adopted, remedy, target_length=64, text=TEXT)
        assert "\n" not in str(error.value)
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


def test_a_checkpoint_is_evaluated_and_told_apart(build, tmp_path):
    theirs = build("recurrent_gemma", 256)
    theirs.save_pretrained(tmp_path / "kept")
    model = load_any(tmp_path / "kept", tokenizer="bytes", train_length=32)
    ids = random_ids()
    torch.testing.assert_close(model.logits(model(ids)), logits_of(theirs, ids), **NEAR)
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.data)
    frame = rnn_longctx.evaluate(
        model, [32, 96], tasks=["lm:slices=2,tokens=0"], mitigations=["none", "state-norm"], text=str(path)
    )
    alone = {"attention-window:tokens=32", "reset-recurrence:every=32"}
    assert set(frame.mitigation) == {"none", "state-norm", *alone} and frame.value.notna().all()
