"""The main job on a small model: what lm and passkey mean, and what a killed sweep leaves behind."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from rnn_longctx import evaluate
from rnn_longctx.data import ByteTokenizer, load_text, passkey_batch, tokens
from rnn_longctx.errors import InputError
from rnn_longctx.eval import Context, Results, Task, parse_task
from rnn_longctx.eval import run as run_module
from rnn_longctx.eval.lm import LanguageModel
from rnn_longctx.eval.sheets import sheets
from rnn_longctx.mitigations import REMEDIES, Plan, Remedy
from rnn_longctx.mitigations.base import same_everywhere
from rnn_longctx.models import Cache, Mamba2Config, Mamba2LM
from rnn_longctx.ssd import ScanPolicy


def make_model(seed=0):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = Mamba2LM(Mamba2Config(d_model=32, n_layer=2, headdim=16, d_state=8, A_init=(1e-3, 1.0), A_log_uniform=True))
    model.train_length, model.tokenizer, model.name, model.weights_hash = (
        64,
        ByteTokenizer(),
        "tiny",
        f"seed{seed}",
    )
    return model.eval()


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(torch.randint(32, 127, (6000,)).tolist()))
    return str(path)


@pytest.fixture
def unseen(tmp_path):
    """To calibrate on: what is evaluated is refused for that."""
    path = tmp_path / "unseen.txt"
    path.write_bytes(bytes(torch.randint(32, 127, (6000,)).tolist()))
    return str(path)


def value(frame, length, metric="nats_per_token", mitigation="none", **where):
    rows = frame[(frame.length == length) & (frame.metric == metric) & (frame.mitigation == mitigation)]
    assert len(rows) == 1, rows
    return rows.iloc[0]


def test_lm_is_the_mean_over_the_second_half_of_fixed_slices(model, text):
    frame = evaluate(model, [64, 100, 401], ["lm:slices=3,tokens=1000"], text=text)
    whole = load_text(text)
    for length in (64, 100, 401):
        n = max(3, 1000 // length)
        expected = []
        for i in range(n):
            ids = torch.from_numpy(tokens(whole, ByteTokenizer(), i, length + 1)[0])[None]
            with torch.no_grad():
                losses = model.losses(model(ids[:, :-1]), ids[:, 1:])[0]
            expected.append(losses[length // 2 :].double().mean().item())
        row = value(frame, length)
        assert row.n == n and row.samples == pytest.approx(expected, abs=1e-5)
        assert row.value == pytest.approx(np.mean(expected), abs=1e-5)
        assert value(frame, length, "nats_per_byte").value == pytest.approx(row.value)
    quarter = value(frame, 64, "nats_per_token_peak")
    assert quarter.value >= value(frame, 64).value - 1e-6 and quarter.n == 15


def test_a_length_does_not_depend_on_the_others(model, text):
    alone = evaluate(model, [100], ["lm:slices=2,tokens=400"], text=text)
    among = evaluate(model, [64, 100, 256, 1000], ["lm:slices=2,tokens=400"], text=text, batch=1)
    assert value(alone, 100).samples == pytest.approx(value(among, 100).samples, abs=1e-5)


def test_several_remedies_and_the_one_already_on(model, text):
    from rnn_longctx import mitigate

    with mitigate(model, "rri:alpha=0.9,beta=0.5"):
        inside = evaluate(model, [64, 128], ["lm:slices=2,tokens=0"], text=text)
    both = evaluate(
        model,
        [64, 128],
        ["lm:slices=2,tokens=0"],
        ["none", "rri:alpha=0.9,beta=0.5", "rri:beta=0.5,alpha=0.9"],
        text=text,
    )
    assert set(both.mitigation) == {"none", "rri:alpha=0.9,beta=0.5"}
    mine = value(inside, 128, mitigation="rri:alpha=0.9,beta=0.5")
    assert mine.value == pytest.approx(value(both, 128, mitigation="rri:alpha=0.9,beta=0.5").value, abs=1e-6)
    assert mine.value != value(both, 128).value


def test_passkey_counts_exact_answers(model, monkeypatch):
    """A model that says the key of even prompts only is right half of the time, at every depth it is right at."""
    from rnn_longctx.eval import passkey as module

    prompts = {p.ids.tobytes(): (i, p) for i, p in enumerate(passkey_batch(ByteTokenizer(), 128, 20, 0))}

    def said(context, some):
        found = [prompts[p.ids.tobytes()] for p in some]
        return [p.answer + "." if i % 2 == 0 else "12" + p.answer for i, p in found], (0.1, 0.01)

    monkeypatch.setattr(module, "_answer", said)
    frame = evaluate(model, [128], ["passkey:n=20"])
    whole = frame[frame.depth.isna()].iloc[0]
    assert (whole.value, whole.n) == (0.5, 20) and whole.samples == [1.0, 0.0] * 10
    depths = frame[frame.depth.notna()].set_index("depth").value
    assert list(depths.index) == pytest.approx([0.05 + 0.1 * i for i in range(10)])
    assert set(depths) == {0.0, 1.0}


def test_passkey_generates_greedily_from_the_prompt(model):
    from rnn_longctx.eval.passkey import _answer

    prompts = passkey_batch(ByteTokenizer(), 150, 4, 3)
    answers, _ = _answer(Context(model), prompts)
    for prompt, answer in zip(prompts, answers):
        ids = torch.from_numpy(prompt.ids)[None]
        with torch.no_grad():
            for _ in range(6):
                ids = torch.cat([ids, model.logits(model(ids)[:, -1:]).argmax(-1)], 1)
        assert ByteTokenizer().decode(ids[0, 150:]).strip() == answer


def test_finished_cells_are_not_measured_again(model, text, tmp_path, monkeypatch):
    out = str(tmp_path / "out")
    settings = {"text": text, "out": out}
    first = evaluate(
        model,
        [96, 128],
        ["lm:slices=2,tokens=0", "passkey:n=4,least=2"],
        ["none", "reset:every=32"],
        **settings,
    )
    reads = []
    original = Mamba2LM.read
    monkeypatch.setattr(Mamba2LM, "read", lambda self, *a, **k: reads.append(1) or original(self, *a, **k))
    again = evaluate(
        model,
        [96, 128],
        ["lm:slices=2,tokens=0", "passkey:n=4,least=2"],
        ["none", "reset:every=32"],
        **settings,
    )
    assert not reads and again.value.tolist() == first.value.tolist()
    evaluate(model, [96, 128, 256], ["lm:slices=2,tokens=0"], ["none"], **settings)
    assert reads


@pytest.mark.parametrize("change", ["weights", "text", "calibration", "seed", "slices"])
def test_other_inputs_never_reuse_a_cell(model, text, unseen, tmp_path, change):
    other_text = tmp_path / "text2" / "text.txt"  # the same name, other bytes
    other_text.parent.mkdir()
    other_text.write_bytes(bytes(torch.randint(32, 127, (6000,)).tolist()))
    out, task = str(tmp_path / "out"), "lm:slices=2,tokens=0"
    settings = {"mitigations": ["state-norm"], "calibration_text": unseen, "text": text}
    before = evaluate(model, [128], [task], out=out, **settings)
    changed = {
        "text": {"text": str(other_text)}, "calibration": {"calibration_text": str(other_text)}, "seed": {"seed": 1},
    }.get(change, {})  # fmt: skip
    if change == "weights":
        model = make_model(seed=1)
    if change == "slices":
        task = "lm:slices=3,tokens=0"
    after = evaluate(model, [128], [task], out=out, **{**settings, **changed})
    if change == "slices":
        assert value(after, 128, mitigation="state-norm").n == 3
    else:
        assert len(after) == 2 * len(before)


def test_a_remedy_that_depends_on_the_length_gets_a_pass_per_length(model, text, monkeypatch):
    class ByLength(Remedy):
        name = "by-length"
        per_length = True

        def plan(self, model, target_length=None, text=None):
            return Plan(same_everywhere(model, ScanPolicy(gain=1.0 / target_length)))

    monkeypatch.setitem(REMEDIES, "by-length", ByLength)
    frame = evaluate(model, [64, 128], ["lm:slices=2,tokens=0"], ["by-length"], text=text)
    for length in (64, 128):
        for mixer in model.mixers:
            mixer.policy = ScanPolicy(gain=1.0 / length)
        ids = torch.from_numpy(tokens(load_text(text), ByteTokenizer(), 0, length + 1)[0])[None]
        with torch.no_grad():
            loss = model.losses(model(ids[:, :-1]), ids[:, 1:])[0, length // 2 :].mean().item()
        assert value(frame, length, mitigation="by-length").samples[0] == pytest.approx(loss, abs=1e-5)


def test_bad_input_is_refused_before_anything_is_read(model, text, tmp_path, monkeypatch):
    monkeypatch.setattr(Mamba2LM, "read", lambda *a, **k: pytest.fail("the model was read"))
    for arguments, message in [
        (([10_000], ["lm"]), "has 6000 bytes"),
        (([0], ["lm"]), "length"),
        (("64,-5", ["lm"]), "length"),
        (([64], ["ml"]), 'did you mean "lm"'),
        (([64], ["lm:slice=3"]), 'did you mean "slices"'),
        (([64], ["passkey"]), "at least"),
        (([128], ["lm"], ["state-nrm"]), 'did you mean "state-norm"'),
    ]:
        with pytest.raises(InputError, match=message):
            evaluate(model, *arguments, text=text)
    with pytest.raises(InputError, match="no text at"):
        evaluate(model, [64], ["lm"], text=str(tmp_path / "nowhere"))
    monkeypatch.undo()
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match="cannot write"):
        evaluate(model, [64], ["lm"], text=text, out=str(blocked / "x"))


KILLED = textwrap.dedent("""
    import sys
    import torch
    sys.path.insert(0, sys.argv[3])
    from test_evaluate import make_model
    from rnn_longctx.eval.task import Context
    import rnn_longctx.eval.run as run
    made = run.Context
    run.Context = lambda *a, **k: made(*a, **k, snapshot_seconds=0.0)
    run.SEGMENTS["cpu"] = 64
    run.evaluate(make_model(), [64, 512, 3000], ["lm:slices=1,tokens=0"], ["none", "state-norm", "window:tokens=50"],
                 text=sys.argv[1], calibration_text=sys.argv[4], out=sys.argv[2])
    print("finished")
""")


def test_kill_in_the_middle_and_run_again(text, unseen, tmp_path):
    """SIGKILL again and again: the sweep goes on from its snapshots, and ends with what one quiet run gives."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, text, str(out), os.path.dirname(__file__), unseen]
    killed = 0

    def made() -> set:
        return {(p.name, p.stat().st_mtime_ns) for p in [*out.glob("cells/*.json"), *out.glob("snapshots/[!.]*")]}

    cells = set()
    for attempt in range(60):
        before = made()
        finished = [p for p in out.glob("cells/*.json") if '"nats_per_token"' in p.read_text()]
        cells |= {(p.name, p.stat().st_mtime_ns) for p in finished}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        while process.poll() is None:
            with contextlib.suppress(FileNotFoundError):  # a snapshot that was replaced in between
                present = made()
            if present - before and attempt < 4:
                time.sleep(0.05 * (attempt + 1))
                process.send_signal(signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.01)
        stdout, _ = process.communicate()
        if "finished" in (stdout or ""):
            break
    assert killed and "finished" in stdout
    assert cells <= made(), "a finished cell was written again"
    assert not [p for p in out.glob("snapshots/*") if not p.name.startswith(".")]
    assert len(list(out.glob("cells/*.json"))) == 3 * 3 * 2 + 3  # remedies, lengths, both units; peaks
    quiet = evaluate(
        make_model(),
        [64, 512, 3000],
        ["lm:slices=1,tokens=0"],
        ["none", "state-norm", "window:tokens=50"],
        text=text,
        calibration_text=unseen,
    )
    resumed = Results.read(out)
    for mitigation in ("none", "state-norm", "window:tokens=50"):
        for length in (64, 512, 3000):
            a, b = value(quiet, length, mitigation=mitigation), value(resumed, length, mitigation=mitigation)
            assert a.value == pytest.approx(b.value, abs=1e-5)


def test_a_kill_between_the_cells_of_a_length_loses_none(model, text, tmp_path):
    """Whatever cell was the last one written, the next run completes the rest, without reading a finished stream."""
    asked, task = [64, 512, 1000], LanguageModel(slices=1, tokens=0)
    for written in range(1, 7):
        results = Results(tmp_path / str(written))
        read = []

        def context(results=results, read=read):
            return Context(model, text=text, results=results, segment=100, snapshot_seconds=0.0, progress=read.append)

        rows = task.run(context(), asked)
        for _ in range(written):
            next(rows)
        rows.close()
        assert read.count(100) == 10
        list(task.run(context(), asked))
        assert read.count(100) == 10, "the stream was read again"
        found = {(row["length"], row["metric"]) for row in results.rows()}
        assert found == {(n, m) for n in asked for m in ("nats_per_token", "nats_per_byte")} | {
            (64, "nats_per_token_peak")
        }
        assert not list((tmp_path / str(written) / "snapshots").iterdir())


def test_another_training_length_moves_the_verdict_and_keeps_the_cells(model, text, tmp_path):
    settings = {"text": text, "out": str(tmp_path / "r")}
    first = evaluate(model, [128, 256], ["lm:slices=2,tokens=0"], **settings)
    model.train_length = 128
    second = evaluate(model, [128, 256], ["lm:slices=2,tokens=0"], **settings)
    assert set(first.train_length) == {64} and set(second.train_length) == {128}
    assert set(second[second.metric == "nats_per_token_peak"].length) == {64, 128}
    (sheet,) = sheets(second)
    assert sheet.train_length == 128
    assert sheet.peaks["none"] == value(second, 128, "nats_per_token_peak").value


def test_cost_columns_are_of_their_length(model, text):
    frame = evaluate(model, [64, 3000], ["lm:slices=1,tokens=0"], text=text)
    short, long = value(frame, 64), value(frame, 3000)
    assert 0 < short.seconds <= long.seconds and short.tokens_per_second == pytest.approx(64 / short.seconds)


def test_a_passkey_answer_is_read_whole(model, monkeypatch):
    """Digits may be cut into tokens anyhow; five right ones followed by a sixth are wrong."""
    from rnn_longctx.eval import passkey

    right = passkey.Passkey().right
    assert right("34847 and more", "34847") and not right("348471", "34847")
    assert not right("", "34847") and not right("x34847", "34847")
    assert passkey.Words().right("apple.", "apple") and not passkey.Words().right("apples", "apple")
    asked = []

    class Pairs(ByteTokenizer):  # repeated digits are one token, others several
        def encode(self, data):
            raw = data if isinstance(data, str) else data.decode()
            return super().encode("8" if raw.strip() == "88888" else raw)

    model.tokenizer = Pairs()
    read = passkey.continuation
    monkeypatch.setattr(passkey, "continuation", lambda *a: (asked.append(1) or t for t in read(*a)))
    evaluate(model, [200], ["passkey:n=1"])
    assert len(asked) >= 6


def test_a_stream_goes_on_from_its_snapshot_and_torn_ones_are_ignored(model, text, tmp_path):
    results = Results(tmp_path / "out")
    task = LanguageModel(slices=1, tokens=0)
    read = []

    class Stop(Exception):
        pass

    def stop(tokens):
        read.append(tokens)
        if sum(read) > 500:
            raise Stop

    def context(progress):
        return Context(model, text=text, results=results, segment=100, snapshot_seconds=0.0, progress=progress)

    with pytest.raises(Stop):
        list(task.run(context(stop), [1000]))
    (snapshot,) = (tmp_path / "out" / "snapshots").iterdir()
    assert Cache.load(snapshot).position.tolist() == [500]
    read.clear()
    rows = list(task.run(context(read.append), [1000]))
    assert read[0] == 500 and sum(read) == 1000 and not snapshot.exists()
    expected = list(task.run(Context(model, text=text), [1000]))
    assert rows[0]["value"] == pytest.approx(expected[0]["value"], abs=1e-6)

    for cell in (tmp_path / "out" / "cells").iterdir():
        cell.unlink()
    snapshot.write_bytes(b"torn")
    read.clear()
    rows = list(task.run(context(read.append), [1000]))
    assert read[0] == 0 and rows[0]["value"] == pytest.approx(expected[0]["value"], abs=1e-6)


def test_tasks_have_canonical_texts():
    assert str(parse_task("lm:slices=2")) == str(parse_task(str(parse_task("lm:slices=2"))))
    assert isinstance(parse_task("passkey:max=8k,n=7,least=1"), Task) and parse_task("passkey:max=8k").max == 8192
    assert set(run_module.TASKS) == {"lm", "passkey", "multikey", "words"}


def test_passkeys_in_another_haystack_and_wording(model, text, tmp_path):
    template = tmp_path / "plain.yaml"
    template.write_text('header: ""\nkey: "<{0}>"\nquestion: "Which?"\n')
    asked = ["passkey:n=2", f"passkey:n=2,haystack={text}", f"words:n=2,haystack={text},template={template}"]
    frame = evaluate(model, "120,150", asked, text=text, out=str(tmp_path / "r"))
    whole = frame[frame.depth.isna()]
    labels = sorted(whole.task.unique())
    assert len(whole) == 6 and labels[:2] == ["passkey", "passkey-in-text.txt"]
    assert labels[2].startswith("words-in-text.txt-as-plain-") and [s.task for s in sheets(frame)] == labels
    assert set(whole[whole.task != "passkey"].text_hash) == {load_text(text).hash}
    assert parse_task(f"multikey:haystack={text}").label == "multikey4-in-text.txt"
    for wrong, said in (("missing.yaml", "cannot read config"), (text, "is not valid YAML|expected a mapping")):
        with pytest.raises(InputError, match=said):
            parse_task(f"passkey:template={wrong}")
