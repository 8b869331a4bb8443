"""Small random checkpoints of every family, built from its config: under our policies as its own code reads them."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from adopted_families import (
    DELTA_FAMILIES,
    GIVEN_FAMILIES,
    MAMBA1,
    NEAR,
    POLICIES,
    RECURRENT,
    cached,
    cases,
    logits_of,
    put,
    random_ids,
    streamed,
)
from torch import nn

from rnn_longctx.errors import InputError
from rnn_longctx.measure.steps import measure_steps
from rnn_longctx.mitigations import active, mitigate
from rnn_longctx.models import checkpoint
from rnn_longctx.models.adopt.adopting import adopt
from rnn_longctx.recurrence.policy import PLAIN, ScanPolicy


def test_plain_is_bit_for_bit_theirs(model, family):
    ids = random_ids()
    before = logits_of(model, ids)
    adopted = adopt(model, time_step_limit_in_decode=False)
    assert len(adopted.mixers) == RECURRENT[family] and adopt(model) is adopted
    assert torch.equal(logits_of(model, ids), before)
    whole, cache = streamed(adopted, ids, [20])
    torch.testing.assert_close(whole, before, rtol=0, atol=1e-5)
    if family == "zamba2":  # whose own steps drop the limit of dt that its prompts respect
        adopt(model, time_step_limit_in_decode=True)
    cut, _ = streamed(adopted, ids, [7, 1, 9, 1, 1, 1])
    torch.testing.assert_close(cut, before, **NEAR)
    assert cache.position.tolist() == [20, 20] and len(cache.layers) == RECURRENT[family]
    for mixer in adopted.mixers:
        assert (mixer.heads, mixer.headdim, mixer.d_state) == SHAPES.get(family, (8, 8, 16)) and mixer.backend is None
        if mixer.bounded or family in GIVEN_FAMILIES:
            assert mixer.A is None
        else:
            A_log = getattr(mixer.module, "forget_gate", mixer.module).A_log.detach()
            assert torch.equal(mixer.A, -A_log.exp().squeeze())
        assert mixer.bounded == (family == "bailing_hybrid")


SHAPES = {
    **dict.fromkeys(MAMBA1, (64, 1, 4)),
    **dict.fromkeys(DELTA_FAMILIES, (4, 6, 8)),
    **dict.fromkeys(("kimi_linear", "bailing_hybrid", "minimax"), (4, 8, 8)),
    "recurrent_gemma": (32, 1, 1),
}


@torch.no_grad()
def test_a_policy_of_next_to_nothing_reads_as_theirs(model, family):
    """Our scan and step, with all that the library gives them, against the library's."""
    ids, mask = random_ids(), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    expected, padded = logits_of(model, ids), logits_of(model, ids, attention_mask=mask)
    if family == "recurrent_gemma":  # whose convolution reads padding
        padded[0, 6:] = logits_of(model, ids[:1, 6:])[0]
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
    put(adopt(model), ScanPolicy(gain=1 + 1e-7))
    torch.testing.assert_close(logits_of(model, ids), expected, **NEAR)
    torch.testing.assert_close(logits_of(model, ids, attention_mask=mask)[mask > 0], padded[mask > 0], **NEAR)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), tokens)


@torch.no_grad()
def test_bfloat16(model, family):
    ids = random_ids()
    adopted = adopt(model)
    put(adopted, POLICIES["cap every 7" if family in DELTA_FAMILIES else "window"])
    expected = logits_of(model, ids)
    model.to(torch.bfloat16)
    found, cache = streamed(adopted, ids, [9, 1, 10])
    assert found.dtype == torch.float32 and cache.layers[0].scan.state.dtype == torch.float32
    assert (found - expected).abs().mean() < 0.1 * expected.std()


@pytest.mark.parametrize(("family", "policy"), cases(POLICIES))
def test_how_a_stream_is_cut_changes_nothing(model, policy):
    adopted = adopt(model, time_step_limit_in_decode=True)  # (so that a step is what a prompt is)
    ids = random_ids(2, 20)
    plain = logits_of(model, ids)
    put(adopted, POLICIES[policy])
    whole = logits_of(model, ids)
    assert (whole - plain).abs().max() > 1e-3, "the policy does nothing here"
    steps, _ = streamed(adopted, ids, [1] * 20)
    torch.testing.assert_close(steps, whole, **NEAR)
    cut, _ = streamed(adopted, ids, [3, 1, 7, 1, 5, 3])
    torch.testing.assert_close(cut, whole, **NEAR)


@torch.no_grad()
def test_rows_that_start_from_noise(model):
    adopted, ids, mask = (
        adopt(model, time_step_limit_in_decode=True),
        random_ids(2, 20),
        torch.ones(2, 20, dtype=torch.bool),
    )
    mask[1, :7] = False
    plain = logits_of(model, ids)
    with mitigate(model, "noise-start:std=0.5"):
        whole = logits_of(model, ids)
        assert (whole - plain).abs().max() > 1e-3
        for cuts in ([1] * 20, [3, 1, 7, 1, 5, 3]):
            torch.testing.assert_close(streamed(adopted, ids, cuts)[0], whole, **NEAR)
        padded = logits_of(model, ids, attention_mask=mask.long())
        torch.testing.assert_close(padded[1, 7:], logits_of(model, ids[1:, 7:])[0], **NEAR)
    assert torch.equal(logits_of(model, ids), plain)


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_mamba2_against_our_own_model(build, policy, tmp_path):
    theirs = build("mamba2")
    theirs.save_pretrained(tmp_path)
    ours, adopted = checkpoint.load(tmp_path), adopt(theirs)
    put(ours, policy)
    put(adopted, policy)
    ids = random_ids(2, 37)
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[1, :9] = False
    torch.testing.assert_close(logits_of(theirs, ids), ours.logits(ours(ids)), **NEAR)
    padded = logits_of(theirs, ids, attention_mask=mask.long())
    torch.testing.assert_close(padded[mask], ours.logits(ours(ids, mask=mask))[mask], **NEAR)
    cache, mine = adopted.new_cache(), ours.new_cache()
    for part in ids.split([11, 1, 20, 1, 4], 1):
        torch.testing.assert_close(adopted.logits(adopted(part, cache)), ours.logits(ours(part, mine)), **NEAR)
    for a, b in zip(cache.layers, mine.layers):
        if policy.window is None:
            torch.testing.assert_close(a.scan.state, b.scan.state, **NEAR)
        torch.testing.assert_close(a.scan.log_decay, b.scan.log_decay, **NEAR)


@torch.no_grad()
def test_on_and_off(model, family):
    second = "delta-scale:scale=0.7" if family in DELTA_FAMILIES else "window:tokens=4"
    ids = random_ids()
    logits, tokens = logits_of(model, ids), model.generate(ids, max_new_tokens=6, do_sample=False)
    names = dict(model.state_dict())
    adopt(model)  # (from then on ours stands before a Mamba-1 mixer, whose library drops the state of a cached chunk)
    forwards = [m.forward for m in model.modules()]
    with mitigate(model, "rri:alpha=0.9,beta=0.4"), mitigate(model, second) as handle:
        assert active(model)[0] == f"rri:alpha=0.9,beta=0.4+{second}"
        assert not torch.equal(logits_of(model, ids), logits)
        model.generate(ids, max_new_tokens=3, do_sample=False)
        handle.remove()
        assert not torch.equal(logits_of(model, ids), logits)
    assert [m.forward for m in model.modules()] == forwards
    assert torch.equal(logits_of(model, ids), logits)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), tokens)
    assert list(model.state_dict()) == list(names)
    assert active(model) == ("none", None)


@torch.no_grad()
@pytest.mark.parametrize(("family", "policy"), cases(["gates", "cap every 7", "window", "reset"]))
def test_generate_greedy_is_recomputation(model, policy):
    put(adopt(model, time_step_limit_in_decode=True), POLICIES[policy])
    ids = random_ids(2, 9)
    assert torch.equal(
        model.generate(ids, max_new_tokens=12, do_sample=False),
        model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False),
    )


@torch.no_grad()
@pytest.mark.parametrize(("family", "policy"), cases(["cap every 7", "window"]))
def test_beam_search_is_recomputation(model, policy):
    put(adopt(model, time_step_limit_in_decode=True), POLICIES[policy])
    ids = random_ids(2, 9)
    given = {"max_new_tokens": 9, "num_beams": 3, "do_sample": False, "return_dict_in_generate": True,
             "output_scores": True, "num_return_sequences": 3}  # fmt: skip
    cached, again = model.generate(ids, **given), model.generate(ids, use_cache=False, **given)
    assert torch.equal(cached.sequences, again.sequences)
    torch.testing.assert_close(cached.sequences_scores, again.sequences_scores, **NEAR)


@torch.no_grad()
def test_two_models_of_one_family_and_a_copy(build):
    one, two = build("mamba2"), build("mamba2")
    ids = random_ids()
    plain = logits_of(two, ids)
    put(adopt(one), POLICIES["gates"])
    changed = logits_of(one, ids)
    assert torch.equal(logits_of(two, ids), plain)
    copied = copy.deepcopy(one)
    assert torch.equal(logits_of(copied, ids), changed)
    for p in copied.parameters():
        p.zero_()
    assert torch.equal(logits_of(one, ids), changed)  # the copy's forward is its own
    assert adopt(copied) is not adopt(one) and adopt(copied).model is copied


@torch.no_grad()
def test_the_limit_of_dt_in_steps(build):
    ids = random_ids(2, 12)

    def steps(model, cut):
        cache, parts = None, []
        for part in ids.split(cut, 1):
            logits, cache = cached(model, part, cache)
            parts.append(logits)
        return torch.cat(parts, 1)

    model = build("mamba2")
    for layer in model.backbone.layers:
        layer.mixer.time_step_limit = (0.3, 0.6)
    plain, nothing = steps(model, [6, *[1] * 6]), ScanPolicy(gain=1 + 1e-7)
    put(adopt(model), nothing)  # a policy, so that our step runs: it ignores the limit as theirs does
    torch.testing.assert_close(steps(model, [6, *[1] * 6]), plain, **NEAR)
    assert (plain - steps(model, [12])).abs().max() > 1e-3
    adopt(model, time_step_limit_in_decode=True)
    for policy in (nothing, PLAIN):
        put(adopt(model), policy)
        torch.testing.assert_close(steps(model, [6, *[1] * 6]), steps(model, [12]), **NEAR)


@torch.no_grad()
def test_threads_do_not_meet(build):
    """A model without a policy reads in one thread while one with a policy reads in another."""
    one, two = build("mamba2"), build("mamba2")
    ids = random_ids(2, 15)
    plain = logits_of(two, ids)
    put(adopt(one), POLICIES["window"])
    changed = logits_of(one, ids)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: logits_of((one, two)[i % 2], ids), range(16)))
    assert all(torch.equal(y, (changed, plain)[i % 2]) for i, y in enumerate(found))


@torch.no_grad()
def test_what_the_library_sees_of_a_window(build):
    model = build("mamba2")
    adopted, ids = adopt(model), random_ids(1, 12)
    put(adopted, ScanPolicy(window=4))
    cache = adopted.new_cache()
    for t in range(12):
        adopted(ids[:, t : t + 1], cache)
    states = [layer.recurrent_states[0] for layer in cache.library.layers]
    assert all(torch.equal(s, c.scan.state) for s, c in zip(states, cache.layers))
    # the first layer's inputs do not depend on the window: its state is that of the last 4 tokens alone
    first = adopted.new_cache()
    put(adopted, PLAIN)
    adopted(ids[:, :8], first)
    first.library.layers[0].recurrent_states[0].zero_()
    adopted(ids[:, 8:], first)
    torch.testing.assert_close(first.layers[0].scan.state, states[0], **NEAR)


def test_one_mixer_under_two_models_is_refused(build):
    model = build("mamba2")
    with mitigate(model, "rri"), pytest.raises(InputError, match="already, by way of another model"):
        mitigate(model.backbone, "rri")
    with mitigate(model.backbone, "rri"):
        pass


def test_training_takes_no_shortcut_and_has_gradients(build):
    model = build("mamba2").train()
    ids = random_ids()
    mitigate(model, "rri:alpha=0.9,beta=0.4")
    out = model(ids, labels=ids)
    torch.testing.assert_close(out.logits.detach(), logits_of(model.eval(), ids), **NEAR)
    out.loss.backward()
    assert all(m.module.A_log.grad.abs().sum() > 0 for m in adopt(model).mixers)


def test_policies_are_plain_after_all(build):
    adopted = adopt(build("bamba"))
    assert all(m.policy == PLAIN and "forward" not in m.module.__dict__ for m in adopted.mixers)


@torch.no_grad()
def test_steps_are_those_of_its_own_scan(model, family, monkeypatch):
    """What a mixer's forward hands to its scan, softplus and clamp done here. Families differ in what is before."""
    adopted, given = adopt(model), []
    if not adopted.mixers[0].one_step_a_head and family not in MAMBA1:
        assert not adopted.mixers[0].one_step_a_head and not hasattr(adopted.mixers[0], "steps")
        return
    if family in MAMBA1:
        with pytest.raises(InputError, match="mixer of Mamba-1"):
            adopted.mixers[0].steps(torch.randn(1, 2, 3))
        return
    for mixer in adopted.mixers:
        mixer.module.time_step_limit = (0.2, 0.9)
    scan = adopted.mixers[0].names["mamba2_chunk_scan"]

    def spy(x, dt, *rest, dt_bias, dt_limit, **named):
        given.append(nn.functional.softplus(dt + dt_bias).clamp(*dt_limit))
        return scan(x, dt, *rest, dt_bias=dt_bias, dt_limit=dt_limit, **named)

    monkeypatch.setitem(adopted.mixers[0].names, "mamba2_chunk_scan", spy)
    steps = measure_steps(adopted, random_ids())
    assert len(steps) == len(given) == RECURRENT[family]
    for found, expected in zip(steps, given):
        assert found.shape == (2, 20, 8) and ((found > 0.2) & (found < 0.9)).float().mean() > 0.05
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_states_of_fewer_bits(model, family):
    adopted, ids, sizes = adopt(model), random_ids(), [12, 1, 1, 1, 5]
    before, tokens = logits_of(model, ids), model.generate(ids, max_new_tokens=6, do_sample=False)
    entries = [m.module.forward for m in adopted.mixers]
    cut, _ = streamed(adopted, ids, sizes)
    adopted.use_state_dtype("float32")
    assert adopted.state_dtype is None and torch.equal(streamed(adopted, ids, sizes)[0], cut)

    put(adopted, POLICIES["gates"])
    plain, (cache, expected) = streamed(adopted, ids, sizes)[0], (adopted.new_cache(), [])
    for part in ids.split(sizes, 1):  # by hand
        expected.append(adopted.logits(adopted(part, cache)))
        for m in adopted.mixers:
            held = m.layer_of(cache.library).recurrent_states[0]
            held.copy_(held.to(torch.bfloat16))
    adopted.use_state_dtype("bfloat16")
    found, kept = streamed(adopted, ids, sizes)
    assert torch.equal(found, torch.cat(expected, 1)) and (found - plain).abs().max() > 1e-4
    assert all(torch.equal(a.scan.state.float(), b.scan.state) for a, b in zip(kept.layers, cache.layers))

    put(adopted, PLAIN)  # the library's own calls, without a remedy
    assert adopted.backend == "torch" and all(m.active for m in adopted.mixers)
    assert (streamed(adopted, ids, sizes)[0] - cut).abs().max() > 1e-4
    model.generate(ids, max_new_tokens=6, do_sample=False)
    with mitigate(model, "rri:alpha=0.9,beta=0.4" if family in DELTA_FAMILIES else "window:tokens=4"):
        again, _ = streamed(adopted, ids, sizes)
        whole = logits_of(model, ids)
        assert (again - whole).norm() < 0.03 * whole.norm()
    adopted.use_state_dtype(None)
    assert torch.equal(logits_of(model, ids), before) and [m.module.forward for m in adopted.mixers] == entries
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), tokens)
