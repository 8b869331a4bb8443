"""MiniMax of transformers: lightning attention held to the scan's definition, and a cache of its own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers as hf
from adopted_families import (
    FAMILIES,
    GIVEN_FAMILIES,
    NEAR,
    POLICIES,
    VOCAB,
    cached,
    logits_of,
    put,
    random_ids,
    streamed,
)
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
    "capped every token": ScanPolicy(caps=(Cap((0.6, 0.9, 1.2, 50.0)),)),
    "capped every 64": ScanPolicy(caps=(Cap(0.5, 64),)),
    "window": ScanPolicy(window=30),
    "reset": ScanPolicy(reset=50),
}
LINEAR, FULL = "linear_attention", "full_attention"
ORDERS = {
    "first": [LINEAR, FULL, LINEAR],
    "last": [FULL, LINEAR, LINEAR],
    "alone": [LINEAR, LINEAR],
}  # where the recurrent layers stand
TEXT = Text("made", bytes(torch.randint(32, VOCAB, (4000,)).tolist()))


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
def read_by_first(model, ids: Tensor) -> tuple[ScanInputs, Tensor]:
    """What the first layer makes of what it is given, in float64, and the outputs (B, T, H, V) that its norm reads."""
    mixer, qkv, outputs = adopt(model).mixers[0], [], []
    hooks = [
        mixer.module.qkv_proj.register_forward_hook(lambda module, args, out: qkv.append(out)),
        mixer.module.norm.register_forward_pre_hook(lambda module, args: outputs.append(args[0])),
    ]
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    heads = torch.nn.functional.silu(qkv[0].double()).unflatten(-1, (mixer.heads, -1))
    q, k, v = heads.split(mixer.headdim, -1)
    return ScanInputs(v, k, q), outputs[0].unflatten(-1, (mixer.heads, -1))


@torch.no_grad()
@pytest.mark.parametrize("policy", EXACT.values(), ids=EXACT.keys())
def test_a_layer_under_a_policy_is_the_definition(model, policy):
    """On what the library's own forward gives the layer, in float64; outputs, states and sums of log-decays."""
    adopted, ids = adopt(model), random_ids(2, 140)
    inputs, plain = read_by_first(model, ids)
    log_decay = -adopted.mixers[0].module.slope_rate.double().flatten().expand(2, 140, -1)
    gates = Gates(log_decay, torch.ones_like(log_decay))
    torch.testing.assert_close(reference.scan(inputs, gates)[0].float(), plain, rtol=1e-4, atol=1e-5)
    y, state, total = reference.scan(inputs, gates, policy=policy)
    assert (y.float() - plain).abs().max() > 1e-3
    put(adopted, policy)
    torch.testing.assert_close(read_by_first(model, ids)[1], y.float(), rtol=1e-4, atol=1e-5)
    cache = adopted.new_cache()
    for part in ids.split([70, 1, 64, 5], 1):
        adopted(part, cache)
    scan = cache.layers[0].scan
    torch.testing.assert_close(scan.state, state.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scan.log_decay, total, rtol=1e-4, atol=1e-4)


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
    """Beams take their states with them, padding leaves no trace, a prompt may be read in chunks."""
    put(adopt(ordered), policy)
    ids, mask = random_ids(2, 13), torch.ones(2, 13, dtype=torch.long)
    mask[1, :5] = 0
    told = {"max_new_tokens": 7, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    beams = {"num_beams": 3, "num_return_sequences": 3}
    found = ordered.generate(ids, attention_mask=mask, **told, **beams)
    again = ordered.generate(ids, attention_mask=mask, use_cache=False, **told, **beams)
    torch.testing.assert_close(found.sequences_scores, again.sequences_scores, **NEAR)
    assert torch.equal(found.sequences, again.sequences)
    greedy = ordered.generate(ids, attention_mask=mask, **told).sequences[1, -7:]
    assert torch.equal(greedy, ordered.generate(ids[1:, 5:], **told).sequences[0, -7:])


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
def test_a_cache_is_copied_and_pickled(model):
    put(adopt(model), POLICIES["cap every 7"])
    ids = random_ids(2, 20)
    _, cache = cached(model, ids[:, :9])
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    expected = cached(model, ids[:, 9:], cache)[0]
    for each in copies:
        assert isinstance(each, type(cache)) and torch.equal(cached(model, ids[:, 9:], each)[0], expected)


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
    assert all(mixer.policy == ScanPolicy() for mixer in adopted.mixers)


def test_published_shapes_are_worked_out_without_memory():
    with torch.device("meta"):
        adopted = adopt(hf.AutoModelForCausalLM.from_config(hf.MiniMaxConfig(num_local_experts=1)))
    c, size = adopted.config, adopted.state_size()
    layers = c.layer_types.count(LINEAR)
    assert len(adopted.mixers) == layers and {m.shape for m in adopted.mixers} == {(32, 128, 128)}
    assert size.fixed == {"scan": layers * 32 * 128 * 128, "conv": 0}
    assert size.per_token == (len(c.layer_types) - layers) * 2 * 8 * 128


def test_a_checkpoint_is_evaluated_and_told_apart(build, tmp_path):
    build("minimax", 256).save_pretrained(tmp_path / "kept")
    model = load_any(tmp_path / "kept", tokenizer="bytes", train_length=32)
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.data)
    frame = rnn_longctx.evaluate(
        model, [32, 96], tasks=["lm:slices=2,tokens=0"], mitigations=["none", "state-norm"], text=str(path)
    )
    alone = {"attention-window:tokens=32", "reset-recurrence:every=32"}
    assert set(frame.mitigation) == {"none", "state-norm", *alone} and frame.value.notna().all()
    beyond = frame[frame.length == 96].groupby("mitigation").value.mean()
    assert beyond[["none", *alone]].nunique() == 3
