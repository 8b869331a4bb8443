"""Remedies on adopted models that are more than a policy: controls, calibrated ones, ways to read a prompt."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from adopted_families import FAMILIES, MAMBA1, NEAR, VOCAB, logits_of, random_ids, streamed
from torch import nn
from transformers import AutoModelForCausalLM

import rnn_longctx
from rnn_longctx.data import ByteTokenizer, Text, tokens
from rnn_longctx.errors import InputError
from rnn_longctx.measure.envelope import measure_envelope
from rnn_longctx.measure.steps import measure_steps
from rnn_longctx.mitigations import NotApplicable, active, handles_on, mitigate
from rnn_longctx.models import checkpoint
from rnn_longctx.models.adopt.adopting import adopt
from rnn_longctx.models.generate import generate, prefill


@torch.no_grad()
def test_controls(model):
    ids = random_ids(2, 20)
    with pytest.raises(NotApplicable, match=r"rnn_longctx.adopt\(model\)"):
        mitigate(model, "reset:every=6")
    assert active(model) == ("none", None)
    adopted = adopt(model)
    expected = [logits_of(model, ids[:, :6]), *(logits_of(model, ids[:, t - 2 : t + 6])[:, 2:] for t in (6, 12, 18))]
    with mitigate(adopted, "reset:every=6,overlap=2"):
        cut, cache = streamed(adopted, ids, [4, 9, 7])
        torch.testing.assert_close(cut, torch.cat(expected, 1), **NEAR)
        assert cache.position.tolist() == [20, 20]
        with pytest.raises(InputError, match="rows of equal lengths"):
            adopted(ids, mask=torch.arange(20) >= torch.tensor([[3], [0]]))
        assert generate(adopted, ids, 4).shape == (2, 4)
    assert torch.equal(generate(adopted, ids, 4), model.generate(ids, max_new_tokens=4, do_sample=False)[:, 20:])


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "remedy"),
    [("mamba2", "decimate:base=9"), ("mamba2", "rri+recompute:last=6"), ("mamba", "chunk-select:chunk=5,query=3"),
     ("bamba", "attention-window:tokens=6"), ("jamba", "reset:every=7"), ("zamba2", "chunk-select:chunk=5,query=3")],
)  # fmt: skip
def test_what_it_cannot_follow_its_own_forward_refuses(build, family, remedy):
    theirs, ids = build(family), random_ids(2, 17)
    ours, before = adopt(theirs, name="mine"), logits_of(theirs, ids)
    hooks = [len(m._forward_pre_hooks) for m in theirs.modules()]
    own = [lambda: theirs(ids), lambda: theirs.forward(ids), lambda: theirs.base_model(ids),
           lambda: theirs.base_model.forward(ids), lambda: theirs.generate(ids, max_new_tokens=2)]  # fmt: skip
    first = mitigate(ours, "a-scale:scale=1.5")
    with mitigate(ours, remedy):
        for call in own:
            with pytest.raises(InputError, match=rf"{remedy.partition('+')[0]}.* is on mine and is a way to read"):
                call()
        plain = generate(ours, ids, 3)  # ours goes on, and so does theirs with other remedies
        with pytest.raises(NotApplicable, match="way to read"):
            mitigate(theirs, remedy)
    scaled = logits_of(theirs, ids)
    assert plain.shape == (2, 3) and not torch.allclose(scaled, before)
    first.remove()
    assert torch.equal(logits_of(theirs, ids), before)
    assert len([call() for call in own]) == len(own)
    assert [len(m._forward_pre_hooks) for m in theirs.modules()] == hooks


@torch.no_grad()
def test_a_copy_has_the_remedy_and_loses_it_alone(build):
    theirs, ids = build("mamba2"), random_ids(2, 17)
    before = logits_of(theirs, ids)
    with mitigate(adopt(theirs), "rri+reset:every=6") as handle:
        twin = copy.deepcopy(theirs)
        with pytest.raises(InputError, match="is a way to read"):
            twin(ids)
        for each in handles_on(twin):
            each.remove()
        assert torch.equal(logits_of(twin, ids), before) and active(twin)[0] == "none"
        with pytest.raises(InputError, match="is a way to read"):
            theirs(ids)
        assert active(theirs)[0] == str(handle.remedy)
    assert torch.equal(logits_of(theirs, ids), before)


@torch.no_grad()
def test_probes_and_calibration(model):
    adopted = adopt(model, tokenizer=ByteTokenizer(), train_length=24, name="small")
    found = measure_envelope(adopted, random_ids(4, 24), "made", "0")
    assert (
        torch.tensor(found.peaks).shape == (len(adopted.mixers), 4, adopted.mixers[0].heads)
        and torch.tensor(found.peaks).min() > 1e-6
    )
    text = Text("made", bytes(torch.randint(32, VOCAB, (3000,)).tolist()))
    with mitigate(model, "state-norm:quantile=0.5", text=text):
        assert adopted.mixers[0].policy.caps
        assert model.generate(random_ids(), max_new_tokens=3).shape == (2, 23)
    ids = random_ids()
    losses = adopted.losses(adopted(ids[:, :-1]), ids[:, 1:])
    expected = nn.functional.cross_entropy(logits_of(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(losses.mean(), expected)
    assert len(adopted.weights_hash) == 16 and adopted.backend == "transformers"


def test_remedies_that_read_a_text_ask_for_what_that_takes(build):
    model = build("mamba2")
    with pytest.raises(NotApplicable, match="train_length= of load, or of adopt before"):
        mitigate(model, "state-norm")
    adopt(model, train_length=16)
    for remedy in ("state-norm", "token-filter"):
        with pytest.raises(InputError, match=r"no tokenizer; name one .*tokenizer= of load or adopt"):
            mitigate(model, remedy, target_length=64)
    adopt(model, tokenizer=ByteTokenizer())
    text = Text("made", bytes(torch.randint(32, VOCAB, (3000,)).tolist()))
    mitigate(model, "state-norm", text=text).remove()


def test_a_tokenizer_is_found_where_the_model_came_from(build, tmp_path):
    pytest.importorskip("lm_eval")
    from rnn_longctx.eval.harness.run import save_tokenizer

    build("mamba2", 256).save_pretrained(tmp_path)
    save_tokenizer(ByteTokenizer(), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    text = Text("made", bytes(torch.randint(32, VOCAB, (3000,)).tolist()))
    mitigate(model, "a-floor:tokens=20", text=text).remove()
    assert generate(model, "some words", 3).shape[0] == 1
    (tmp_path / "tokenizer.json").write_text("{}")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"cannot read tokenizer .*; name another with --tokenizer"):
        mitigate(again, "a-floor:tokens=20", text=text)


@torch.no_grad()
def test_remedies_that_need_more_than_a_scan(build):
    """A prompt can be read otherwise through this library's interface alone."""
    theirs = build("mamba2")
    ours = rnn_longctx.adopt(theirs, train_length=8)
    ids = random_ids(1, 30)
    with mitigate(ours, "chunk-select:chunk=7,query=4"):
        logits, _ = prefill(ours, ids)
    each = [ours.logits(ours(torch.cat([ids[:, max(0, e - 7) : e], ids[:, -4:]], 1)))[:, -1] for e in range(26, 0, -7)]
    entropies = [torch.distributions.Categorical(logits=v).entropy() for v in each]
    torch.testing.assert_close(logits, each[int(torch.cat(entropies).argmin())], **NEAR)
    for remedy in ("chunk-select", "decimate", "reset:every=8"):
        with pytest.raises(NotApplicable, match="is a way to read"):
            mitigate(theirs, remedy)
    for remedy in ("a-winsor:share=0.2", "delta-scale:scale=0.5", "noise-start:std=0.1"):
        with mitigate(theirs, remedy):
            changed = logits_of(theirs, ids)
        assert not torch.allclose(changed, logits_of(theirs, ids))


def has_instead(family):
    """What a message says that a family without one step a head has."""
    if family in MAMBA1:
        return "Mamba-1's"
    return HAS_INSTEAD.get(family, "a layer of .* has steps that do not say how much is written")


HAS_INSTEAD = {
    "bailing_hybrid": "a layer of .* bounds its log-decays by a sigmoid",
    "minimax": "a layer of .* has decays that are fixed",
    "recurrent_gemma": "a layer of .* ties what it writes to its decays",
}


@torch.no_grad()
def test_token_filter(model, family):
    """The thresholds are those of the steps; below them a token leaves the state alone."""
    adopted = adopt(model, tokenizer=ByteTokenizer(), train_length=16)
    text = Text("made", bytes(torch.randint(32, VOCAB, (3000,)).tolist()))
    if not adopted.mixers[0].one_step_a_head:
        with pytest.raises(NotApplicable, match=f"token-filter reads one step a head.*{has_instead(family)}"):
            mitigate(adopted, "token-filter", target_length=64, text=text)
        return
    for mixer in adopted.mixers:
        mixer.module.A_log[0] = -9.0  # the first head sees far
    with mitigate(adopted, "token-filter:clamp=0", target_length=64, text=text) as handle:
        g = torch.tensor([p.min_dt for p in handle.plan.policies])
        assert "made" in handle.plan.calibration and (g[:, 0] > 0).all()
        ids = random_ids()
        filtered, found = logits_of(model, ids), measure_steps(adopted, ids)
        states = streamed(adopted, ids, [20])[1].layers
    assert not torch.allclose(filtered, logits_of(model, ids))
    first = states[0].scan.log_decay[:, 0]  # of the first layer's far head: from the steps that are kept
    kept = torch.where(found[0][..., 0] >= g[0, 0], found[0][..., 0], 0.0).sum(1)
    torch.testing.assert_close(first.float(), kept * adopted.mixers[0].A[0], rtol=1e-4, atol=1e-9)


@torch.no_grad()
def test_a_floor(model, family):
    """Heads below it forget e in so many tokens on the average, the others as they did, and the model's own generate
    follows."""
    adopted = adopt(model, tokenizer=ByteTokenizer(), train_length=16)
    text = Text("made", bytes(torch.randint(32, VOCAB, (3000,)).tolist()))
    if not adopted.mixers[0].one_step_a_head:
        with pytest.raises(NotApplicable, match=f"a-floor reads one step a head.*{has_instead(family)}"):
            mitigate(adopted, "a-floor", text=text)
        return
    for mixer in adopted.mixers:
        mixer.module.A_log[0], mixer.module.A_log[1] = -9.0, 5.0
    ids = random_ids()
    plain, ours = logits_of(model, ids), measure_steps(adopted, ids)[0]
    with mitigate(model, "a-floor:tokens=1000000000", text=text):
        assert torch.equal(logits_of(model, ids), plain)
    with mitigate(model, "a-floor:tokens=7", text=text) as handle:
        told = torch.from_numpy(np.stack([tokens(text, adopted.tokenizer, i, 16)[0] for i in range(8)]))
        states = streamed(adopted, ids, [13, 1, 6])[1].layers
        changed = logits_of(model, ids)
        model.generate(ids, max_new_tokens=3)
    assert not torch.allclose(changed, plain)
    A, dt = adopted.mixers[0].A.double(), measure_steps(adopted, told)[0].double().flatten(0, 1)
    rate = torch.stack([max(-A[h], 1 / (7 * dt[:, h].mean())) for h in range(len(A))])
    assert rate[0] > -A[0] and rate[1] == -A[1] and handle.plan.policies[0].mul[1] == 1
    torch.testing.assert_close(states[0].scan.log_decay.double(), -ours.sum(1) * rate, rtol=1e-4, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("first", [0, 2])
def test_decimate_reads_as_our_own_model(build, first, tmp_path):
    theirs = build("mamba2")
    theirs.save_pretrained(tmp_path)
    ours, adopted = checkpoint.load(tmp_path), adopt(theirs)
    ids, more = random_ids(2, 40), random_ids(2, 5)
    remedy = f"decimate:base=12,first={first},least=3"
    with mitigate(adopted, remedy), mitigate(ours, remedy):
        for segment in (40, 7):
            logits, cache = prefill(adopted, ids, segment=segment)
            expected, own = prefill(ours, ids, segment=segment)
            torch.testing.assert_close(logits, expected, **NEAR)
        assert cache.position.tolist() == [40, 40]
        torch.testing.assert_close(adopted.logits(adopted(more, cache)), ours.logits(ours(more, own)), **NEAR)
    assert not torch.allclose(prefill(adopted, ids)[0], logits)


@pytest.mark.parametrize(("family", "why"), [("bamba", "drops tokens between layers"), ("mamba", "Mamba-1's")])
def test_decimate_needs_pure_mamba2(build, family, why):
    with pytest.raises(NotApplicable, match=why):
        mitigate(adopt(build(family)), "decimate")


@torch.no_grad()
def test_chunk_select_of_several_prompts(model):
    """Rows whose surest chunks differ in length go on side by side as each would alone."""
    adopted = adopt(model, time_step_limit_in_decode=True)
    with mitigate(adopted, "chunk-select:chunk=9,query=4"):
        for _ in range(20):
            ids = random_ids(3, 19)  # chunks of 9 and 6 tokens
            logits, cache = prefill(adopted, ids, segment=30)
            alone = [prefill(adopted, row[None], segment=30) for row in ids]
            if len({part.seen for _, part in alone}) > 1:
                break
        torch.testing.assert_close(logits, torch.cat([each for each, _ in alone]), **NEAR)
        assert cache.position.tolist() == [19] * 3
        for cut in (1, 5, 1):
            more = random_ids(3, cut)
            expected = [adopted(row[None], part) for row, (_, part) in zip(more, alone)]
            torch.testing.assert_close(adopted(more, cache), torch.cat(expected), **NEAR)
    assert len({part.seen for _, part in alone}) > 1


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("mamba2", "mamba", "falcon_mamba")])
def test_attention_of_every_hybrid_is_cropped(build, family):
    """As a banded mask does, which every one of them takes; see tests/mitigations/test_hybrid.py."""
    model, ids, at = build(family), random_ids(2, 26), torch.arange(26)
    seen = (at <= at[:, None]) & (at >= at[:, None] // 3 * 3 - 3)
    band = torch.zeros(2, 1, 26, 26).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = logits_of(
        model, ids, attention_mask={"full_attention": band, "sliding_attention": band, "linear_attention": None}
    )
    adopted = adopt(model, time_step_limit_in_decode=True)
    assert adopted.attends and (expected - logits_of(model, ids))[:, 6:].abs().max() > 1e-3
    with mitigate(adopted, "attention-window:tokens=6"):
        for cuts in ([26], [7, 1, 9, 1, 1, 7]):
            torch.testing.assert_close(streamed(adopted, ids, cuts)[0], expected, **NEAR)
