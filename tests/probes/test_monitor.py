"""A monitor on tiny models: what it says of heads that never forget, of an input that changed, and what it does."""

import copy
import dataclasses
import json
import math
import warnings

import pytest
import torch
import transformers as hf

import rnn_longctx
from rnn_longctx import CollapseError, CollapseMonitor, adopt, generate, mitigate
from rnn_longctx.data import ByteTokenizer, Text
from rnn_longctx.errors import InputError
from rnn_longctx.models import Mamba2Config, Mamba2LM
from rnn_longctx.probes.inputs import PASSAGE
from rnn_longctx.probes.monitor import History

EVERY, LENGTH, SHORT = 16, 64, 32
FORGET_NOT, FORGET = (1e-6, 1e-5), (1.0, 16.0)
RRI = "rri:alpha=0.5,beta=1"
NEAR = {"rtol": 0, "atol": 1e-5}


def ids_of(low=97, high=123, length=1024, rows=1):
    return torch.randint(low, high, (rows, length))


def text(low=97, high=123):
    return Text("letters", bytes(torch.randint(low, high, (4096,)).tolist()))


def model(A_init=FORGET_NOT):
    shape = {"d_model": 32, "n_layer": 3, "headdim": 16, "d_state": 8, "dt_init": (0.05, 0.2)}
    lm = Mamba2LM(Mamba2Config(**shape, A_init=A_init)).eval()
    for mixer in lm.mixers:
        torch.nn.init.constant_(
            mixer.conv1d.bias, 0.5
        )  # inputs of a mean, so that a state without decay grows with them
    lm.train_length, lm.tokenizer, lm.name = LENGTH, ByteTokenizer(), "tiny"
    return lm


def calibrated(lm):
    return CollapseMonitor.calibrated(lm, text(), every=EVERY)


def transformer(family="mamba2"):
    common = {"hidden_size": 32, "vocab_size": 256, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    mamba = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
    config = {
        "mamba2": lambda: hf.Mamba2Config(
            **common, num_heads=8, head_dim=8, state_size=16, n_groups=1, num_hidden_layers=2, chunk_size=8
        ),
        "bamba": lambda: hf.BambaConfig(**common, **attention, **mamba, num_hidden_layers=3, attn_layer_indices=[1]),
        "mamba": lambda: hf.MambaConfig(**common, state_size=4, num_hidden_layers=2, expand=2, time_step_rank=4),
    }[family]()
    lm = hf.AutoModelForCausalLM.from_config(config).eval()
    for module in lm.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if hasattr(module, "A_log"):
            torch.nn.init.constant_(module.A_log, math.log(1e-5))
            torch.nn.init.constant_(module.conv1d.bias, 0.5)  # as below
    lm.generation_config.eos_token_id = None
    adopt(lm, name="tiny", tokenizer=ByteTokenizer(), train_length=SHORT)
    return lm


@torch.no_grad()
def watched(lm, monitor, ids, **more):
    with monitor.on(lm, lambda report: None, **more) as watch:
        for _ in lm.stream(ids, segment=200):
            pass
    return watch.reports


def first(reports, status="collapsed"):
    return next(r.position for r in reports if r.status == status)


@pytest.fixture
def lost():
    """A model that collapses, its monitor, ids, and where."""
    lm, ids = model(), ids_of()
    monitor = calibrated(lm)
    return lm, monitor, ids, first(watched(lm, monitor, ids))


# --- what it says


@pytest.mark.parametrize("rows", [1, 3])
def test_heads_that_never_forget(rows):
    lm = model()
    reports = watched(lm, calibrated(lm), ids_of(rows=rows))
    assert [r.position for r in reports] == list(range(EVERY, 1025, EVERY))
    assert all(r.status == "ok" for r in reports if r.position <= LENGTH)
    assert LENGTH < first(reports, "warning") < first(reports) < 1024
    last = reports[-1]
    assert last.status == "collapsed" and last.outside > 6 and last.worst >= last.heads[0][2] > 4
    assert {(layer, head) for layer, head, _ in last.heads} <= {(i, j) for i in range(3) for j in range(4)}


def test_ratios_are_norms_over_the_envelope():
    lm, ids = model(), ids_of(length=200)
    monitor = calibrated(lm)
    monitor.margins = [[float(v) for v in torch.rand(4) * 3 + 0.5] for _ in range(3)]
    report = watched(lm, monitor, ids)[-1]
    cache, logs = lm.new_cache(), []
    with torch.no_grad():
        for part in ids[:, :192].split(EVERY, 1):
            lm(part, cache)
            logs.append(torch.stack([c.scan.state[0].flatten(1).norm(dim=1) for c in cache.layers]).log())
    ratio = torch.stack(logs[-4:]).mean(0).exp() / torch.tensor(monitor.norms)
    outside = ratio > torch.tensor(monitor.margins)
    assert report.outside == int(outside.sum()) == len(report.heads) > 0
    for layer, head, value in report.heads:
        assert value == pytest.approx(float(ratio[layer, head]), rel=1e-4) and outside[layer, head]
    values = [value for *_, value in report.heads]
    assert values == sorted(values, reverse=True) and report.worst == values[0]
    layer, head, value = report.heads[0]
    assert f"{report.outside} heads outside their margins (layer {layer} head {head} at {value:.3g} times)" in str(
        report
    )


def test_healthy_heads_raise_no_alarm():
    lm = model(FORGET)
    assert {r.status for r in watched(lm, calibrated(lm), ids_of(length=30_000, rows=2))} == {"ok"}


@pytest.mark.parametrize("layer", [0, 2])
def test_a_state_that_is_not_finite(layer):
    lm, ids = model(FORGET), ids_of(length=96)
    cache, monitor = lm.new_cache(), calibrated(lm)
    with torch.no_grad(), monitor.on(lm, lambda report: None) as watch:
        lm(ids[:, :40], cache)
        lm.mixers[layer].in_proj.weight[64, 0] = torch.nan  # of the inputs x; before it are those of z
        lm(ids[:, 40:], cache)
    assert [r.status for r in watch.reports] == ["ok", "ok"] + ["collapsed"] * 4
    assert watch.reports[2].position == 48 and math.isinf(watch.reports[2].worst)
    assert watch.reports[2].heads[0][2] == math.inf and (layer == 0 or watch.reports[2].heads[0][0] == 2)


def lettered(A_init=FORGET):
    """A model that takes smaller steps for control characters than for letters."""
    lm = model(A_init)
    with torch.no_grad():
        rows = lm.mixers[0].in_proj.weight[-lm.mixers[0].heads :]
        lm.backbone.embedding.weight[:32] -= 0.2 * rows.sum(0) / rows.sum(0).norm()
    return lm


def test_another_input_is_drift():
    lm = lettered()
    monitor = calibrated(lm)
    assert {r.status for r in watched(lm, monitor, ids_of(length=2000))} == {"ok"}
    reports = watched(lm, monitor, torch.cat([ids_of(length=512), ids_of(0, 32, 512)], 1))
    assert all(r.status == "ok" and r.shift < 1 for r in reports if r.position <= 512)
    assert all(r.status == "drift" and r.shift > 1 for r in reports if r.position >= 512 + 4 * EVERY)


def test_a_small_change_that_lasts_is_drift():
    """Too small for a few looks; a passage of them lies far from all that were calibrated on."""
    monitor = calibrated(lettered())
    norm, mean, std = (torch.tensor(v).double().flatten() for v in (monitor.norms, monitor.gate_mean, monitor.gate_std))
    moved, history, looks = mean + 0.9 * monitor.gate_limits[-1] * std, History(), []
    for i in range(PASSAGE):
        history.add(EVERY * (i + 1), norm[None], moved.exp()[None])
        looks.append(monitor.judge(EVERY * (i + 1), history))
    assert all(r.status == "ok" and r.shift < 1 for r in looks[:-1])
    assert looks[-1].status == "drift"
    known = dataclasses.replace(monitor, passages=[*monitor.passages, moved.tolist()])
    assert known.judge(EVERY * PASSAGE, history).status == "ok"


def test_no_state_moves_the_shift_and_a_gross_one_is_a_collapse_under_it():
    lm, ids = lettered(FORGET_NOT), ids_of(0, 32, 6000)
    monitor = calibrated(lm)
    reports = watched(lm, monitor, ids)
    assert [r.status for r in reports][4] == "drift" and reports[-1].status == "collapsed" and reports[-1].shift > 1
    with mitigate(lm, "rri:alpha=1,beta=0.01"):
        again = watched(lm, monitor, ids)
    assert {r.status for r in again[4:]} == {"drift"}
    assert [r.shift for r in again] == pytest.approx([r.shift for r in reports], rel=1e-3)
    with mitigate(lm, RRI):  # whose rate leaves nothing of these heads' in float32
        assert {r.shift for r in watched(lm, monitor, ids)} == {None}
    after = watched(lm, monitor, torch.cat([ids_of(length=512), ids], 1))
    assert all(r.status == "collapsed" for r in after if r.position >= 512)  # what was one before is no drift


def test_recalibration_is_bounded_and_undone(lost):
    lm, monitor, ids, position = lost
    before, norms = copy.deepcopy(monitor), torch.tensor(monitor.norms)
    with torch.no_grad(), monitor.on(lm, lambda report: None) as watch:
        lm(ids)
        for _ in range(3):
            monitor.recalibrate(lm, watch)
        with pytest.raises(InputError, match="being watched"):
            monitor.recalibrate(lm, text())
    moved = torch.tensor(monitor.norms)
    assert (moved <= 2.001 * norms).all() and (moved > 1.9 * norms).any() and (moved >= norms).all()
    assert first(watched(lm, monitor, ids)) > position
    for _ in range(3):
        monitor.undo()
    assert monitor == before
    with pytest.raises(InputError, match="nothing to undo"):
        monitor.undo()

    lm = lettered()
    monitor, other = calibrated(lm), ids_of(0, 32, 1024)
    monitor.recalibrate(lm, text(0, 32))
    assert {r.status for r in watched(lm, monitor, other)} == {"ok"}
    monitor.undo()
    assert watched(lm, monitor, other)[-1].status == "drift"


def test_texts_by_name_and_lengths_as_elsewhere(tmp_path):
    lm, source = lettered(), text(0, 32)
    (tmp_path / "other.txt").write_bytes(source.data)
    monitors = [CollapseMonitor.calibrated(lm, t, "64", every=EVERY)
                for t in (tmp_path / "other.txt", str(tmp_path / "other.txt"))]  # fmt: skip
    assert monitors[0] == monitors[1] and monitors[0].length == 64
    monitor = calibrated(lm)
    monitor.recalibrate(lm, tmp_path / "other.txt")
    assert monitor.gate_mean == monitors[0].gate_mean


# --- what it does


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
    assert all(m.observer is None for m in lm.mixers) and "read" not in vars(lm)
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
    prompt, more = ids[:, : position - 7], 160
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
    lm, prompt = transformer(), ids_of(length=20)
    monitor = CollapseMonitor.calibrated(lm, text(), every=EVERY)
    with monitor.on(lm, f"mitigate:{RRI}") as watch:
        found = lm.generate(prompt, max_new_tokens=400, do_sample=False)
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


# --- files


def test_saved_and_loaded(tmp_path):
    lm, ids = model(), ids_of()
    monitor = calibrated(lm)
    monitor.save(tmp_path / "monitor.json")
    again = CollapseMonitor.load(tmp_path / "monitor.json", lm)
    assert again == monitor and watched(lm, again, ids) == watched(lm, monitor, ids)
    other = model()
    with pytest.raises(InputError, match="not of tiny"):
        CollapseMonitor.load(tmp_path / "monitor.json", other)
    with pytest.raises(InputError, match="not of tiny"), monitor.on(other):
        pass
    with pytest.raises(InputError, match="cannot write"):
        monitor.save(tmp_path / "none" / "monitor.json")
    one_too_many = (tmp_path / "monitor.json").read_text().replace('"gate_mean": [', '"gate_mean": [1.0, ')
    for wrong in ("{", "[]", "{}", json.dumps({"kind": "collapse monitor", "version": 1}), one_too_many):
        (tmp_path / "wrong.json").write_text(wrong)
        with pytest.raises(InputError, match="not a saved monitor"):
            CollapseMonitor.load(tmp_path / "wrong.json", lm)


def test_the_log_and_the_metrics(lost, tmp_path):
    lm, monitor, ids, _ = lost
    log, metrics = tmp_path / "log.jsonl", tmp_path / "metrics.prom"
    with torch.no_grad(), monitor.on(lm, f"mitigate:{RRI}", log=log, prometheus=metrics) as watch:
        assert "rnn_longctx_monitor_position 0\n" in metrics.read_text()
        lm(ids)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["position"] for line in lines] == [r.position for r in watch.reports]
    assert [line["status"] for line in lines] == [r.status for r in watch.reports]
    assert all(set(line) == {"time", "position", "status", "heads", "outside", "worst", "shift", "action"}
               for line in lines)  # fmt: skip
    numbers = json.dumps(ids[0].tolist())[1:-1]
    assert ByteTokenizer().decode(ids[0, :16].tolist()) not in log.read_text() and numbers[:40] not in log.read_text()
    values = dict(line.split() for line in metrics.read_text().splitlines() if not line.startswith("#"))
    assert values["rnn_longctx_monitor_position"] == "1024"
    assert int(values["rnn_longctx_monitor_status"]) == ("ok", "warning", "drift", "collapsed").index(watch.status)
    assert float(values["rnn_longctx_monitor_worst_ratio"]) == pytest.approx(watch.reports[-1].worst, rel=1e-4)
    assert int(values["rnn_longctx_monitor_warnings_total"]) >= 2
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".tmp")]


# --- bad input


@pytest.mark.parametrize(
    "action, message",
    [("wran", 'did you mean "warn"'), ("mitigate:", "unknown action"), ("mitigate:nothing-like-it", "mitigation"),
     ("mitigate:window:tokens=32", "mid-stream"), ("rollback:recompute:last=32", "mid-stream"),
     ("mitigate:noise-start:std=0.1", "mid-stream"), ("fallback", "unknown action"), ("fallback:more", "unknown")],
)  # fmt: skip
def test_actions_that_are_not(action, message):
    lm = model(FORGET)
    with pytest.raises(InputError, match=message), calibrated(lm).on(lm, action):
        pass
    assert all(m.observer is None for m in lm.mixers) and rnn_longctx.mitigations.active(lm)[0] == "none"


def test_bad_input(tmp_path):
    lm = model(FORGET)
    monitor = calibrated(lm)
    with pytest.raises(InputError, match="goes with the action"), monitor.on(lm, fallback=lambda report, ids: None):
        pass
    for name in ("log", "prometheus"):
        with pytest.raises(InputError, match="cannot write"), monitor.on(lm, **{name: tmp_path / "none" / "file"}):
            pass
    with mitigate(lm, "recompute:last=32"), pytest.raises(InputError, match="control"), monitor.on(lm):
        pass
    with monitor.on(lm), pytest.raises(InputError, match="watched already"), monitor.on(lm):
        pass
    with monitor.on(lm) as watch, pytest.raises(InputError, match="nothing was seen"):
        monitor.recalibrate(lm, watch)
    with monitor.on(lm, "fallback:truncate"), torch.no_grad(), pytest.raises(InputError, match="one position"):
        lm(ids_of(rows=2, length=10), mask=torch.tensor([[False] * 3 + [True] * 7, [True] * 10]))
    with pytest.raises(InputError, match="at least 1 token"):
        CollapseMonitor.calibrated(lm, text(), every=0)
    sick = model(FORGET)
    with torch.no_grad():
        sick.mixers[1].in_proj.weight[64, 0] = torch.nan
    with pytest.raises(InputError, match=r"not finite within 64 tokens \(first in layer 1\)"):
        calibrated(sick)
    lm.train_length = None
    with pytest.raises(InputError, match="training length"):
        CollapseMonitor.calibrated(lm, text())
