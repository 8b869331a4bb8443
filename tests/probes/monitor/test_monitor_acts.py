"""A monitor on tiny models, ours and of transformers: what it does where they collapse."""

import dataclasses
import warnings

import pytest
import torch
from monitored import EVERY, LENGTH, NEAR, RRI, SHORT, first, ids_of, text, transformer, watched  # fmt: skip

import rnn_longctx
from rnn_longctx import CollapseError, CollapseMonitor, adopt, generate, mitigate
from rnn_longctx.errors import InputError


def test_warnings_and_errors(lost):
    lm, monitor, ids, position = lost
    with warnings.catch_warnings(record=True) as caught, torch.no_grad(), monitor.on(lm) as watch:
        warnings.simplefilter("always")
        plain = lm(ids)
    assert [str(w.message).split(":")[0] for w in caught] == [
        f"tiny at position {first(watch.reports, 'warning')}", f"tiny at position {position}"
    ]  # fmt: skip
    assert [r.action for r in watch.reports].count("warn") == 2
    with torch.no_grad():
        assert torch.allclose(lm(ids), plain, rtol=0, atol=1e-3)  # (cut at other places, states of a hundred)
    assert all(m.observer is None for m in lm.mixers) and lm.reading_hook is None
    with torch.no_grad(), pytest.raises(CollapseError) as error, monitor.on(lm, "raise"):
        lm(ids)
    assert error.value.position == position and error.value.heads[0][2] > 2
    called = []
    with torch.no_grad(), monitor.on(lm, called.append) as watch:
        lm(ids[:, :100])
    assert called == watch.reports and len(called) == 6


@pytest.mark.parametrize("remedy", [RRI, "state-norm:every=16"])
@torch.no_grad()
def test_a_remedy_in_flight(lost, remedy):
    lm, monitor, ids, position = lost
    for segments in (1024, 100):
        with monitor.on(lm, f"mitigate:{remedy}") as watch:
            found = torch.cat(list(lm.stream(ids, segment=segments)), 1)
            assert rnn_longctx.mitigations.active(lm)[0] == remedy
        cache = lm.new_cache()
        parts = [lm(ids[:, :position], cache)]
        with mitigate(lm, remedy):
            parts.append(lm(ids[:, position:], cache))
        torch.testing.assert_close(found, torch.cat(parts, 1), rtol=0, atol=1e-4)
        assert [(r.position, r.action) for r in watch.reports if r.action] == [(position, f"mitigate:{remedy}")]
    assert watch.reports[-1].worst < 4 and rnn_longctx.mitigations.active(lm)[0] == "none"


@pytest.mark.parametrize("cut", [1024, 100, "inside"])
@torch.no_grad()
def test_rollback(lost, cut):
    lm, monitor, ids, position = lost
    reports = watched(lm, monitor, ids)
    healthy = max(r.position for r in reports if r.status == "ok" and r.position < first(reports, "warning"))
    assert healthy < position
    sizes = [(healthy + position) // 2] * (cut == "inside")
    parts = ids.split([*sizes, 1024 - sum(sizes)] if cut == "inside" else cut, 1)
    cache = lm.new_cache()
    with monitor.on(lm, f"rollback:{RRI}") as watch:
        found = [lm(part, cache) for part in parts]
    by_hand = lm.new_cache()
    wanted = [lm(ids[:, :healthy], by_hand)]
    with mitigate(lm, RRI):
        wanted.append(lm(ids[:, healthy:], by_hand))
    plain, wanted, t = lm(ids), torch.cat(wanted, 1), 0
    for part, out in zip(parts, found):  # calls before that in which it came are as they were
        u = t + part.shape[1]
        torch.testing.assert_close(out, (plain if u < position else wanted)[:, t:u], **NEAR)
        t = u
    assert int(cache.position[0]) == 1024
    torch.testing.assert_close(cache.layers[2].scan.state, by_hand.layers[2].scan.state, rtol=0, atol=1e-4)
    assert [r.position for r in watch.reports] == list(range(EVERY, 1025, EVERY))
    assert [(r.position, r.action) for r in watch.reports if r.action] == [(position, f"rollback:{RRI}")]


@torch.no_grad()
def test_fallback(lost):
    lm, monitor, ids, position = lost
    ids = ids[:, : position + 40]
    cache = lm.new_cache()
    with monitor.on(lm, "fallback:truncate") as watch:
        found = lm(ids, cache)
    plain, fresh = lm(ids), lm(ids[:, position - LENGTH :])
    torch.testing.assert_close(found[:, position - LENGTH :], fresh, **NEAR)
    torch.testing.assert_close(found[:, : position - LENGTH], plain[:, : position - LENGTH], **NEAR)
    assert int(cache.position[0]) == LENGTH + 40
    assert [(r.position, r.action) for r in watch.reports if r.action] == [(position, "fallback:truncate")]
    assert [r.position for r in watch.reports][-2:] == [position + 16, position + 32]
    assert watch.status == "ok"


@torch.no_grad()
def test_a_fallback_of_ones_own(lost):
    lm, monitor, ids, position = lost
    ids, head, asked = ids[:, : position + 20], ids_of(length=10), []

    def note(report, last):
        asked.append((report, last))
        return torch.cat([head, last[:, -20:]], 1)

    with monitor.on(lm, "fallback", fallback=note):
        found = lm(ids)
    fresh = lm(torch.cat([head, ids[:, position - 20 :]], 1))
    torch.testing.assert_close(found[:, position - 20 :], fresh[:, 10:], **NEAR)
    assert asked[0][0].position == position and torch.equal(asked[0][1], ids[:, position - LENGTH : position])
    with monitor.on(lm, "fallback", fallback=lambda report, last: None):
        torch.testing.assert_close(lm(ids), lm(ids), **NEAR)


def test_in_generation(lost):
    lm, monitor, ids, position = lost
    monitor = dataclasses.replace(monitor, gate_limits=[1e9] * 4, passages=[])  # what it writes is no other input
    prompt, more, lm.tokenizer.eos_id = ids[:, : position - 7], 160, None
    with monitor.on(lm, f"mitigate:{RRI}") as watch:
        new = generate(lm, prompt, more)
    assert any(r.position == position for r in watch.reports)
    acted = next(r.position for r in watch.reports if r.action)
    whole = torch.cat([prompt, new], 1)[:, :-1]
    with torch.no_grad():
        cache = lm.new_cache()
        lm(whole[:, :acted], cache)
        with mitigate(lm, RRI):
            wanted = lm.logits(lm(whole[:, acted:], cache)).argmax(-1)
    assert torch.equal(new[:, acted - prompt.shape[1] + 1 :], wanted[:, :])


@pytest.mark.parametrize("action", [f"rollback:{RRI}", "fallback:truncate", f"mitigate:{RRI}"])
def test_in_a_conversation(lost, action):
    """What an action does to the cache in the middle of an answer is there at the next turn."""
    lm, monitor, ids, position = lost
    monitor, lm.tokenizer.eos_id = dataclasses.replace(monitor, gate_limits=[1e9] * 4, passages=[]), None
    cache, parts = lm.new_cache(), []
    with monitor.on(lm, action) as watch:
        for prompt in (ids[:, : position - 7], ids[:, :5]):
            parts += [prompt, generate(lm, prompt, 20, cache=cache)]
    assert any(r.action == action for r in watch.reports)
    again = lm.new_cache()
    with torch.no_grad(), monitor.on(lm, action):
        for part in parts:  # as it was read, but for the cuts
            lm(part, again)
    for a, b in zip(cache.layers, again.layers):
        torch.testing.assert_close(a.scan.state, b.scan.state, rtol=1e-3, atol=1e-3)
    assert torch.equal(cache.position, again.position)


# --- models of transformers


@pytest.mark.parametrize("family", ["mamba2", "bamba", "mamba"])
def test_adopted(family):
    lm, ids = transformer(family), ids_of(length=300)
    with torch.no_grad():
        before = lm(ids).logits
    monitor = CollapseMonitor.calibrated(lm, text(), every=EVERY)
    with torch.no_grad(), monitor.on(lm, lambda report: None) as watch:
        lm(ids)
    assert [r.position for r in watch.reports] == list(range(EVERY, 301, EVERY))
    assert watch.reports[1].status == "ok" and watch.status == "collapsed"
    with torch.no_grad():
        assert torch.equal(lm(ids).logits, before)  # nothing of it is left
    ours = adopt(lm)
    with torch.no_grad():
        streamed = watched(ours, monitor, ids)
        position = first(streamed)
        assert [r.position for r in streamed] == [r.position for r in watch.reports]
        with monitor.on(ours, "fallback:truncate"):
            found = ours(ids[:, : position + 9])
        fresh = ours(ids[:, position - SHORT : position + 9])
        torch.testing.assert_close(found[:, -9 - SHORT :], fresh, rtol=0, atol=1e-4)
        with monitor.on(ours, f"rollback:{RRI}") as watch:
            found = ours(ids[:, : position + 9])
        healthy = max(r.position for r in streamed if r.status == "ok" and r.position < position)
        cache = ours.new_cache()
        ours(ids[:, :healthy], cache)
        with mitigate(ours, RRI):
            wanted = ours(ids[:, healthy : position + 9], cache)
        torch.testing.assert_close(found[:, healthy:], wanted, rtol=0, atol=1e-4)


@torch.no_grad()
def test_in_the_librarys_own_generate():
    for _ in range(10):  # a model that goes on with one token over and over may stay healthy
        lm, prompt = transformer(), ids_of(length=20)
        monitor = CollapseMonitor.calibrated(lm, text(), every=EVERY)
        with monitor.on(lm, f"mitigate:{RRI}") as watch:
            found = lm.generate(prompt, max_new_tokens=400, do_sample=False)
        if any(r.action for r in watch.reports):
            break
    position = next(r.position for r in watch.reports if r.action)
    assert SHORT < position < 400 and len(watch.reports) == 419 // EVERY
    cache, ours = adopt(lm).new_cache(), adopt(lm)
    ours(found[:, :position], cache)
    with mitigate(ours, RRI):
        wanted = ours.logits(ours(found[:, position:-1], cache)).argmax(-1)
    assert torch.equal(found[:, position + 1 :], wanted)
    with pytest.raises(InputError, match="reads tokens again"), monitor.on(lm, f"rollback:{RRI}"):
        pass
    with pytest.raises(InputError, match="read by this library"), monitor.on(ours, f"rollback:{RRI}"):
        lm.generate(prompt, max_new_tokens=30, do_sample=False)
    assert torch.equal(lm.generate(prompt, max_new_tokens=5), found[:, :25])
