"""Caches of adopted models: rows, padding, packed documents, and states kept in a file."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from adopted_families import NEAR, POLICIES, VOCAB, cached, cases, followed, logits_of, put, random_ids

from rnn_longctx import cli
from rnn_longctx.data import ByteTokenizer, Text
from rnn_longctx.errors import InputError
from rnn_longctx.mitigations import mitigate
from rnn_longctx.models.adopt.adopting import adopt
from rnn_longctx.models.adopt.families.mamba2 import _scan
from rnn_longctx.models.adopt.mixer import Call
from rnn_longctx.models.cache import Cache
from rnn_longctx.models.generate import generate, prefill
from rnn_longctx.models.saved_state import load_state, save_state
from rnn_longctx.recurrence.policy import PLAIN


@torch.no_grad()
@pytest.mark.parametrize(("family", "policy"), cases(POLICIES))
def test_left_padding_leaves_no_trace(model, policy):
    adopted = adopt(model, time_step_limit_in_decode=True)
    put(adopted, POLICIES[policy])
    ids, mask = random_ids(2, 21), torch.ones(2, 21, dtype=torch.bool)
    mask[1, :8] = False
    tokens = model.generate(ids, attention_mask=mask.long(), max_new_tokens=5, do_sample=False)
    cache, parts = adopted.new_cache(), []
    for part, kept in zip(ids.split([5, 12, 4], 1), mask.split([5, 12, 4], 1)):
        parts.append(adopted.logits(adopted(part, cache, kept)))
    assert cache.position.tolist() == [21, 13]
    for row in range(2):
        alone = ids[row : row + 1, mask[row]]
        expected = logits_of(model, alone)[0]
        torch.testing.assert_close(torch.cat(parts, 1)[row, mask[row]], expected, **NEAR)
        greedy = model.generate(alone, max_new_tokens=5, do_sample=False)
        assert torch.equal(greedy[0, -5:], tokens[row, -5:])


@torch.no_grad()
def test_a_cache_goes_where_its_rows_go(model):
    adopted = adopt(model)
    put(adopted, POLICIES["cap every 7"])
    ids, more = random_ids(3, 10), random_ids(3, 9)
    cache = adopted.new_cache()
    adopted(ids, cache)
    rows = torch.tensor([2, 0, 0])
    moved, cloned = cache.rows(rows), cache.clone()
    expected = adopted.logits(adopted(more, cache))
    torch.testing.assert_close(adopted.logits(adopted(more, cloned)), expected, rtol=0, atol=0)
    torch.testing.assert_close(adopted.logits(adopted(more[rows], moved)), expected[rows], **NEAR)
    assert moved.position.tolist() == [19, 19, 19]

    cache = adopted.new_cache()
    adopted(ids, cache)
    library = cache.library
    if not all(hasattr(layer, "batch_select_indices") for layer in library.layers):
        return  # layers without a mixer that this transformers cannot move
    library.batch_select_indices(torch.tensor([1, 2]))
    library.batch_repeat_interleave(2)
    cache.position, cache.padding = cache.position[[1, 1, 2, 2]], cache.padding[[1, 1, 2, 2]]
    torch.testing.assert_close(adopted.logits(adopted(more[[1, 1, 2, 2]], cache)), expected[[1, 1, 2, 2]], **NEAR)


@torch.no_grad()
def test_a_cache_can_be_reset(build):
    model = build("mamba2")
    put(adopt(model), POLICIES["cap every 7"])
    ids = random_ids(2, 10)
    first, cache = cached(model, ids)
    cache.reset()
    again, _ = cached(model, ids, cache)
    torch.testing.assert_close(again, first, rtol=0, atol=0)


@torch.no_grad()
def test_a_cache_from_before_the_remedy(build):
    model = build("mamba2")
    _, cache = cached(model, random_ids())
    with mitigate(model, "rri"):
        cached(model, random_ids(), copy.deepcopy(cache))  # needs no position
    with mitigate(model, "window:tokens=8"), pytest.raises(InputError, match="start a new cache"):
        cached(model, random_ids(), cache)
    adopted = adopt(model)  # which counts
    cache = adopted.new_cache()
    ids = random_ids(2, 20)
    adopted(ids[:, :10], cache)
    put(adopted, POLICIES["reset"])
    adopted(ids[:, 10:], cache)
    assert cache.position.tolist() == [20, 20]


@torch.no_grad()
def test_packed_sequences_begin_anew(build):
    """The library's own convolution keeps them apart with a kernel only, so the scan is asked directly."""
    mixer = adopt(build("mamba2")).mixers[0]
    mixer.policy = POLICIES["cap every 7"]
    seq_idx = torch.tensor([[0] * 9 + [1] * 11, [3] * 20])
    x, dt, B, C = (torch.randn(2, 20, *shape) for shape in ((8, 8), (8,), (1, 16), (1, 16)))
    call = Call(mixer, None, None)

    def read(*rows, seq_idx=None):
        return _scan(call, rows[0], rows[1], mixer.A, rows[2], rows[3], 8, seq_idx=seq_idx)

    y = read(x, dt, B, C, seq_idx=seq_idx)
    torch.testing.assert_close(y[:1, :9], read(*(t[:1, :9] for t in (x, dt, B, C))), **NEAR)
    torch.testing.assert_close(y[:1, 9:], read(*(t[:1, 9:] for t in (x, dt, B, C))), **NEAR)
    torch.testing.assert_close(y[1:], read(*(t[1:] for t in (x, dt, B, C))), **NEAR)


def test_right_padding_is_refused_under_a_policy(build):
    model = build("mamba2")
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, -3:] = 0
    with mitigate(model, "rri"), pytest.raises(InputError, match="left padding"):
        logits_of(model, random_ids(), attention_mask=mask)
    model.generation_config.pad_token_id = 0
    ids = random_ids().clamp(min=1)
    ids[0, 7] = 0  # transformers makes a mask of it
    with mitigate(model, "rri"):
        with pytest.raises(InputError, match=r"pass it attention_mask=torch\.ones_like\(ids\)"):
            model.generate(ids, max_new_tokens=2)
        model.generate(ids, max_new_tokens=2, attention_mask=torch.ones_like(ids))


@torch.no_grad()
@pytest.mark.parametrize("policy", [PLAIN, POLICIES["cap every 7"]], ids=["plain", "cap every 7"])
def test_packed_documents_are_read_as_if_alone(model, policy):
    adopted = adopt(model, time_step_limit_in_decode=True)
    put(adopted, policy)
    ids, reset = random_ids(2, 30), torch.zeros(2, 30, dtype=torch.bool)
    reset[0, [0, 9, 17]] = reset[1, 13] = True
    alone = [[logits_of(model, ids[0:1, a:b]) for a, b in ((0, 9), (9, 17), (17, 30))],
             [logits_of(model, ids[1:2, a:b]) for a, b in ((0, 13), (13, 30))]]  # fmt: skip
    expected = torch.cat([torch.cat(row, 1) for row in alone])
    for cuts in ([30], [11, 1, 10, 8]):
        cache, found = adopted.new_cache(), []
        for part, begins in zip(ids.split(cuts, 1), reset.split(cuts, 1)):
            found.append(adopted.logits(adopted(part, cache, reset=begins)))
        torch.testing.assert_close(torch.cat(found, 1), expected, **NEAR)
        assert cache.position.tolist() == [13, 17]
    assert (expected - logits_of(model, ids)).abs().max() > 1e-3
    mask = torch.arange(30) >= torch.tensor([[3], [0]])
    with pytest.raises(InputError, match="no padding and no control"):
        adopted(ids, mask=mask, reset=reset)


REMEDIES = ["none", "state-norm:quantile=0.5", "window:tokens=6", "reset:every=7,overlap=2"]


@torch.no_grad()
@pytest.mark.parametrize("remedy", REMEDIES)
def test_a_saved_state_is_gone_on_from(model, family, remedy, tmp_path):
    """In pieces, from the file, as at once; other weights and other remedies are refused."""
    remedy = followed(family, remedy)
    adopted = adopt(model, time_step_limit_in_decode=True, tokenizer=ByteTokenizer(), train_length=16, name="small")
    text = Text("made", bytes(torch.randint(32, VOCAB, (3000,)).tolist()))
    ids = random_ids(2, 30)
    with mitigate(adopted, remedy, text=text):
        expected = generate(adopted, ids, 5)
        _, cache = prefill(adopted, ids[:, :17])
        before = adopted.logits(adopted(ids[:, 17:], cache.clone()))
        save_state(tmp_path / "s", cache, adopted, remedy)
        again = load_state(tmp_path / "s", adopted)
        assert again.position.tolist() == [17, 17]
        for a, b in zip(again.layers, cache.layers, strict=True):
            torch.testing.assert_close((a.conv, a.scan.state), (b.conv, b.scan.state), rtol=0, atol=0)
        torch.testing.assert_close(adopted.logits(adopted(ids[:, 17:], again)), before, rtol=0, atol=1e-5)
        assert torch.equal(generate(adopted, ids[:, 17:], 5, cache=load_state(tmp_path / "s", adopted)), expected)
    how = "without a remedy, and one" if remedy == "none" else f"with the remedy {re.escape(remedy)}, and what"
    with mitigate(adopted, "rri"), pytest.raises(InputError, match=f"was read {how} is on now.*, or read the prompt"):
        load_state(tmp_path / "s", adopted)
    model.get_input_embeddings().weight[0, 0] += 1
    with pytest.raises(InputError, match="was read by small"):
        load_state(tmp_path / "s", adopted)


@torch.no_grad()
def test_a_saved_state_of_padded_rows_and_one_to_start_from(model, tmp_path):
    adopted = adopt(model)
    ids, more, mask = random_ids(2, 14), random_ids(2, 6), torch.arange(14) >= torch.tensor([[5], [0]])
    cache = adopted.new_cache()
    adopted(ids, cache, mask)
    save_state(tmp_path / "s", cache, adopted)
    again = load_state(tmp_path / "s", adopted)
    torch.testing.assert_close(adopted(more, again), adopted(more, cache), rtol=0, atol=1e-5)
    with mitigate(adopted, f"stored-start:file={tmp_path / 's'}"):
        started = [torch.tensor(mixer.policy.start) for mixer in adopted.mixers]
    cache = load_state(tmp_path / "s", adopted)
    torch.testing.assert_close(started, [carry.scan.state[0] for carry in cache.layers])


@torch.no_grad()
@pytest.mark.parametrize("family", ["mamba", "falcon_h1"])
def test_generate_from_a_saved_state_on_the_command_line(build, family, tmp_path, capsys):
    model = build(family, 256)
    model.save_pretrained(tmp_path / "kept")

    def said(*words):
        options = ["--tokenizer", "bytes", "--device", "cpu", "--max-new-tokens", "6"]
        cli.app(["generate", str(tmp_path / "kept"), *options, *words], standalone_mode=False)
        return capsys.readouterr().out

    one, two, three = (str(tmp_path / name) for name in "123")
    whole = said("--prompt", "!!##$$ %%&& ''((", "--save-state", one)
    said("--prompt", "!!##$$ %%&", "--save-state", two, "--max-new-tokens", "0")
    assert said("--prompt", "& ''((", "--load-state", two, "--save-state", three) == whole
    for a, b in zip(Cache.load(one).layers, Cache.load(three).layers, strict=True):
        at = a.scan.position.tolist()
        assert at == b.scan.position.tolist() and 16 < at[0] <= 22 and a.scan.state.abs().max() > 1e-3
        torch.testing.assert_close(a.scan.state, b.scan.state, **NEAR)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bamba", "falcon_h1", "zamba2", "jamba", "mamba2", "recurrent_gemma"])
def test_a_static_cache_is_read_right_or_refused(build, family):
    theirs, ids = build(family), random_ids(2, 9)
    told = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

    def logits(**more):
        return torch.stack(theirs.generate(ids, **told, **more).logits, 1)

    torch.testing.assert_close(logits(cache_implementation="static"), logits(), **NEAR)
    with mitigate(theirs, "rri:alpha=0.9,beta=0.8"):
        try:
            found = logits(cache_implementation="static")
        except InputError as error:
            assert family != "mamba2" and "generate without" in str(error)
        else:
            torch.testing.assert_close(found, logits(), **NEAR)
    torch.testing.assert_close(logits(cache_implementation="static"), logits(), **NEAR)
