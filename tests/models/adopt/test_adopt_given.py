"""Families of transformers whose gates are given to the scan, MiniMax and RecurrentGemma: what holds of both."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from adopted_families import GIVEN_FAMILIES, NEAR, POLICIES, VOCAB, cached, logits_of, put, random_ids
from torch import Tensor

import rnn_longctx
from rnn_longctx.data import ByteTokenizer, Text
from rnn_longctx.errors import InputError
from rnn_longctx.mitigations import NotApplicable, fold, mitigate
from rnn_longctx.models.adopt.adopting import adopt, adopted, load_any
from rnn_longctx.models.adopt.cache import cache_name
from rnn_longctx.recurrence.gates import Gates, ScanInputs
from rnn_longctx.recurrence.policy import Cap, ScanPolicy
from rnn_longctx.recurrence.ssd import reference

EXACT = {
    "rri": ScanPolicy(add=-0.05, gain=0.75),
    "a-scale": ScanPolicy(mul=0.6),
    "capped every token": ScanPolicy(caps=(Cap(0.4),)),
    "capped every 64": ScanPolicy(caps=(Cap(0.2, 64),)),
    "window": ScanPolicy(window=30),
    "reset": ScanPolicy(reset=50),
}
TEXT = Text("made", bytes(torch.randint(32, VOCAB, (4000,)).tolist()))


@pytest.fixture(params=GIVEN_FAMILIES)
def family(request):
    return request.param


# What the first recurrent layer scans, worked out in float64 of what its projections give; the factor (B, T, channels)
# that its outputs are multiplied by; and their product as it is.
Read = tuple[ScanInputs, Gates, Tensor | float, Tensor]


@torch.no_grad()
def read_by_first(model, family, ids: Tensor) -> Read:
    mixer = adopt(model).mixers[0]
    seen: dict[str, Tensor] = {}
    projections, behind = PLACES[family]
    modules = [getattr(mixer.module, name) for name in projections]
    hooks = [
        m.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out.double()}))
        for name, m in zip(projections, modules)
    ]
    after = getattr(mixer.module, behind)
    hooks.append(after.register_forward_pre_hook(lambda module, args: seen.update({"": args[0]})))
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return DEFINITIONS[family](mixer, seen)


def lightning_attention(mixer, seen: dict[str, Tensor]) -> Read:
    heads = F.silu(seen["qkv_proj"]).unflatten(-1, (mixer.heads, -1))
    q, k, v = heads.split(mixer.headdim, -1)
    log_decay = -mixer.module.slope_rate.double().flatten().expand(*heads.shape[:2], -1)
    return ScanInputs(v, k, q), Gates(log_decay, torch.ones_like(log_decay)), 1.0, seen[""]


def rg_lru(mixer, seen: dict[str, Tensor]) -> Read:
    block, length = copy.deepcopy(mixer.module).double(), seen["linear_x"].shape[1]
    x = block.conv_1d(seen["linear_x"].transpose(1, 2))[..., :length].transpose(1, 2)
    lru, heads = block.rg_lru, x.unflatten(-1, (block.rg_lru.num_attention_heads, -1))
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
    ones = x.new_ones(*x.shape[:2], 1, 1)
    return ScanInputs((x * i)[..., None], ones, ones), Gates(log_decay, scale), block.act_fn(seen["linear_y"]), seen[""]


DEFINITIONS = {"minimax": lightning_attention, "recurrent_gemma": rg_lru}
PLACES = {"minimax": (["qkv_proj"], "norm"), "recurrent_gemma": (["linear_x", "linear_y"], "linear_out")}


@torch.no_grad()
@pytest.mark.parametrize("policy", EXACT.values(), ids=EXACT.keys())
def test_a_layer_under_a_policy_is_the_definition(model, family, policy):
    """On what the library's own forward gives the layer, in float64; outputs, states and sums of log-decays."""
    ours, ids = adopt(model), random_ids(1, 140)
    inputs, gates, factor, plain = read_by_first(model, family, ids)
    y = reference.scan(inputs, gates)[0].flatten(2)
    torch.testing.assert_close((y * factor).float(), plain, rtol=1e-4, atol=1e-5)
    y, state, total = reference.scan(inputs, gates, policy=policy)
    expected = (y.flatten(2) * factor).float()
    assert (expected - plain).abs().max() > 1e-3
    put(ours, policy)
    torch.testing.assert_close(read_by_first(model, family, ids)[3], expected, rtol=1e-4, atol=1e-5)
    cache = ours.new_cache()
    for part in ids.split([70, 1, 64, 5], 1):
        ours(part, cache)
    scan = cache.layers[0].scan
    torch.testing.assert_close(scan.state, state.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scan.log_decay, total, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_factor_on_the_rate_is_one_on_log_decays(model, family):
    """Of layers whose rates themselves are scaled, read by the library's own forward: as a-scale in MiniMax. In
    RecurrentGemma what is written hangs on the rate, too, which a-scale leaves as it was."""
    ids, scaled = random_ids(), copy.deepcopy(model)
    for mixer in adopt(copy.deepcopy(model)).mixers:
        module = scaled.get_submodule(mixer.name)
        if family == "minimax":
            module.slope_rate *= 1.5
            for name, factors in zip(
                ("query_decay", "key_decay", "diagonal_decay"), module.decay_factors(module.slope_rate)
            ):
                getattr(module, name).copy_(factors)
        else:
            rate = 1.5 * F.softplus(module.rg_lru.recurrent_param)
            module.rg_lru.recurrent_param.copy_(rate.expm1().log())
    expected = logits_of(scaled, ids)
    assert (expected - logits_of(model, ids)).abs().max() > 1e-3
    with mitigate(model, "a-scale:scale=1.5") as handle:
        assert all(policy == ScanPolicy(mul=1.5) for policy in handle.plan.policies)
        off = (logits_of(model, ids) - expected).abs().max()
    assert (off <= NEAR["atol"]) if family == "minimax" else (off > 1e-3)


@torch.no_grad()
def test_a_cache_is_copied_and_pickled(model, family):
    put(adopt(model), POLICIES["cap every 7"])
    ids = random_ids(2, 20)
    if family == "minimax":
        _, cache = cached(model, ids[:, :9])
    else:  # whose output does not say its cache
        model(ids[:, :9], use_cache=True, cache=(cache := hf.DynamicCache(config=model.config)))
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    expected, *others = (model(ids[:, 9:], **{cache_name(model): c}).logits for c in (cache, *copies))
    assert all(torch.equal(logits, expected) for logits in others)
    assert all(isinstance(each, type(cache)) for each in copies)


def test_what_does_not_apply_is_one_line(model, family):
    with pytest.raises(InputError, match=f"cannot be folded .*: layer model.* {WHY[family]}.*, so that no weight"):
        fold(model, "a-scale:scale=1.5")
    assert adopted(model) is None, "a look at its layers adopts no model"
    ours = adopt(model, tokenizer=ByteTokenizer(), train_length=16, name="small")
    refused = {
        "a-floor:tokens=9": f"reads one step a head, as Mamba-2 has: a layer of small {WHY[family]}",
        "a-winsor:share=0.3": f"needs one A a head.*: a layer of small {WHY[family]}",
        "token-filter": "reads one step a head",
        "decimate": "one step a head|drops tokens between layers",
        "erase:scale=0.5": "needs a recurrence that erases",
    }
    for remedy, why in refused.items():
        with pytest.raises(NotApplicable, match=why) as error:
            mitigate(ours, remedy, target_length=64, text=TEXT)
        assert "\n" not in str(error.value)
    assert all(mixer.policy == ScanPolicy() for mixer in ours.mixers)


WHY = {"minimax": "has decays that are fixed", "recurrent_gemma": "ties what it writes to its decays"}


def test_a_checkpoint_is_evaluated_and_told_apart(build, family, tmp_path):
    theirs = build(family, 256)
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
    if family == "minimax":  # (RecurrentGemma's attention sees no more than a window as it is)
        assert frame[frame.length == 96].groupby("mitigation").value.mean()[["none", *alone]].nunique() == 3
