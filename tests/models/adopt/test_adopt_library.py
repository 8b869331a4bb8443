"""What transformers itself gets wrong, once a model is adopted: the same with and without a remedy, and right."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from adopted_families import ATTENTION, COMMON, MAMBA, MAMBA1, NEAR, POLICIES, cached, put, random_ids, streamed
from torch import nn

import rnn_longctx
from rnn_longctx.data import ByteTokenizer, Text
from rnn_longctx.mitigations import NotApplicable, mitigate
from rnn_longctx.models.adopt.adopting import adopt
from rnn_longctx.models.generate import generate
from rnn_longctx.recurrence.policy import PLAIN

NEXT_TO_NOTHING = "rri:alpha=0.9999999,beta=1"  # our scan runs


@torch.no_grad()
@pytest.mark.parametrize("remedy", ["none", NEXT_TO_NOTHING])
@pytest.mark.parametrize("family", MAMBA1)
def test_a_cached_chunk_goes_on_from_the_state(build, family, remedy):
    """Whose scan drops the state there, so that a remedy would look better for that alone."""
    model, ids = build(family), random_ids(2, 20)
    whole, _ = cached(model, ids)
    first, cache = cached(model, ids[:, :9])
    wrong, _ = cached(model, ids[:, 9:], cache)
    assert (wrong - whole[:, 9:]).abs().max() > 10 * NEAR["atol"]  # not adopted, it is not ours to change
    adopt(model)
    with mitigate(model, remedy):
        parts, cache = [], None
        for part in ids.split([9, 1, 6, 4], 1):
            logits, cache = cached(model, part, cache)
            parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **NEAR)
    torch.testing.assert_close(parts[0], first, **NEAR)


@torch.no_grad()
def test_chunked_prefill_generates_what_one_pass_does(build):
    model, ids = build("jamba"), random_ids(2, 40)
    adopt(model)
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **settings)
    for chunk in (7, 8, 39):
        for remedy in ("none", NEXT_TO_NOTHING):
            with mitigate(model, remedy):
                assert torch.equal(model.generate(ids, prefill_chunk_size=chunk, **settings), expected)
    assert torch.equal(
        model.generate(ids, prefill_chunk_size=7, cache_implementation="static", **settings), expected
    )  # (a remedy refuses a static cache)


def test_gradients_through_a_cached_chunk(build):
    model, ids = build("jamba"), random_ids(2, 20)
    adopt(model)
    gradients = []
    for cuts in ([20], [9, 11]):
        model.zero_grad()
        cache, total = None, 0.0
        for part in ids.split(cuts, 1):
            logits, cache = cached(model, part, cache)
            total = total + logits.logsumexp(-1).sum()
        total.backward()
        gradients.append([p.grad.clone() for n, p in model.named_parameters() if "A_log" in n or "in_proj" in n])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "several": {"do_sample": True, "num_return_sequences": 3, "temperature": 0.8},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "no cache": {"use_cache": False},
    "padded": {"padding": 5},
    "scores": {"output_scores": True, "return_dict_in_generate": True},
}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_its_own_generate_is_the_same_under_a_remedy_that_changes_nothing(model, way):
    settings, ids = dict(WAYS[way]), random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, : settings.pop("padding", 0)] = 0
    adopt(model)
    said = []
    for remedy in ("none", NEXT_TO_NOTHING):
        with mitigate(model, remedy):
            torch.manual_seed(0)
            out = model.generate(ids, attention_mask=mask, max_new_tokens=6, **{"do_sample": False} | settings)
            said.append(out if isinstance(out, torch.Tensor) else out.sequences)
    assert torch.equal(*said)


def _all_recurrent(family):
    if family == "bamba":
        return hf.BambaConfig(**COMMON, **ATTENTION, **MAMBA, num_hidden_layers=3, attn_layer_indices=[])
    if family == "nemotron_h":
        return hf.NemotronHConfig(
            **COMMON, **ATTENTION, head_dim=8, mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=16, n_groups=1,
            chunk_size=8, layers_block_type=["mamba", "mlp", "mamba"], mlp_hidden_act="relu2", time_step_min=1e-6,
        )  # fmt: skip
    if family == "granitemoehybrid":
        return hf.GraniteMoeHybridConfig(
            **COMMON, **ATTENTION, **MAMBA, num_hidden_layers=2, layer_types=["mamba"] * 2, num_local_experts=0,
            num_experts_per_tok=0, shared_intermediate_size=48, logits_scaling=2.0,
        )  # fmt: skip
    if family == "zamba2":
        return hf.Zamba2Config(
            **COMMON, **ATTENTION, num_hidden_layers=2, n_mamba_heads=8, mamba_headdim=8, mamba_d_state=16,
            mamba_ngroups=1, mamba_expand=2, chunk_size=8, hybrid_layer_ids=[], layers_block_type=["mamba"] * 2,
            num_mem_blocks=1, adapter_rank=4, attention_head_dim=16, time_step_min=1e-6,
        )  # fmt: skip
    return hf.JambaConfig(
        **COMMON, **ATTENTION, num_hidden_layers=2, attn_layer_period=9, attn_layer_offset=8, num_experts=1,
        expert_layer_period=9, expert_layer_offset=8, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("family", ["bamba", "nemotron_h", "granitemoehybrid", "zamba2", "jamba"])
def test_a_hybrid_whose_layers_are_all_recurrent_is_read(randomise, family):
    """Its own cached forward ends in a ValueError (transformers 5.24), its forward without a cache does not."""
    config = _all_recurrent(family)
    config.vocab_size = 256
    model, ids = randomise(hf.AutoModelForCausalLM.from_config(config)).eval(), random_ids(2, 20)
    for m in model.modules():
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, std=m.in_features**-0.5)
    ours = adopt(model, tokenizer=ByteTokenizer(), train_length=16)
    ours.tokenizer.eos_id = None  # no answer ends early
    assert not ours.attends
    for policy in (PLAIN, POLICIES["cap every 7"]):
        put(ours, policy)
        whole = model(ids, use_cache=False).logits.float()
        assert whole.std() > 0.01
        found, cache = streamed(ours, ids, [7, 1, 12])
        torch.testing.assert_close(found, whole, **NEAR)
        mask = torch.ones(2, 20, dtype=torch.bool)
        mask[0, :6] = False
        padded = ours.logits(ours(ids, ours.new_cache(), mask))
        torch.testing.assert_close(padded[0, 6:], model(ids[:1, 6:], use_cache=False).logits[0].float(), **NEAR)
        twin = copy.deepcopy(cache)
        torch.testing.assert_close(ours(ids[:, :3], twin), ours(ids[:, :3], cache), rtol=0, atol=0)
        new = generate(model, ids, 3)
        best = model(torch.cat([ids, new], 1), use_cache=False).logits[:, 19:-1]
        assert (best.max(-1).values - best.gather(2, new[..., None])[..., 0]).max() < 1e-4
    put(ours, PLAIN)
    text = Text("made", bytes(torch.randint(97, 123, (4000,)).tolist()))
    frame = rnn_longctx.evaluate(ours, [16, 40], "lm:slices=2", ["none", "reset:every=8"], text=text)
    assert set(frame["mitigation"]) == {"none", "reset:every=8"} and frame["value"].notna().all()
    for remedy in ("attention-window:tokens=6", "decimate"):
        with pytest.raises(NotApplicable):
            mitigate(ours, remedy)
