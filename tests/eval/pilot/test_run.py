"""A pilot of a tiny model: what it writes, its budget, and how it goes on."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from evaluated import make_model

from rnn_longctx.data import Text
from rnn_longctx.errors import InputError
from rnn_longctx.eval.pilot import run as pilot_run
from rnn_longctx.eval.pilot.estimate import RESERVE, SAFETY
from rnn_longctx.eval.pilot.run import Pilot, PilotConfig, TimeIsUp
from rnn_longctx.eval.pilot.steps import HEADS, RECALL, Sizes, Step, first_steps, other_steps, recall_job
from rnn_longctx.eval.pilot.write import write_pilot
from rnn_longctx.plain import plain
from rnn_longctx.progress import silent
from rnn_longctx.tasks.passkey import Passkey
from rnn_longctx.tasks.qa import QuestionAnswering

CANARY = "the heron nests at Wexcombe"
SIZES = Sizes((32, 64, 128), (32, 64, 128, 256), (32, 64, 128, 256), 2, 2, 3, 3)


@pytest.fixture(autouse=True)
def few_others(monkeypatch):
    """Of the remedies that come last a few are enough here."""
    monkeypatch.setattr(pilot_run, "other_steps", lambda *asked: other_steps(*asked)[:4])


@pytest.fixture
def document():
    letters = torch.randint(97, 122, (4000,)).tolist()
    return Text(
        "dir:letters", b"\0".join(bytes(letters[i : i + 400]) + f" {CANARY} ".encode() for i in range(0, 4000, 400))
    )


@pytest.fixture
def model(seed):
    return make_model(seed)


def begun(model, document, out, budget=1e6, say=silent, **more):
    config = PilotConfig("tiny", "letters/", str(out), budget, **more)
    return Pilot(model, document, config, time.monotonic(), say)


def questions(tmp_path):
    record = {
        "document": f"It is said that {CANARY}.",
        "question": "Where does the heron nest?",
        "answer": "at Wexcombe",
    }
    (tmp_path / "q.jsonl").write_text("\n".join([json.dumps(record)] * 3))
    return QuestionAnswering(str(tmp_path / "q.jsonl"))


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_whole_pilot_and_nothing_of_the_text_in_it(model, document, tmp_path):
    said = []
    task = questions(tmp_path)
    pilot = begun(model, document, tmp_path / "out", say=said.append, tasks=(task,), price=60.0, lengths=(32, 128, 256))
    _, estimate = pilot.estimate()
    pilot.measure(SIZES)
    content, found = write_pilot(pilot, estimate)
    written = files(tmp_path / "out")
    assert {"results.csv", "results.parquet", "pilot.json", "report.html"} <= {path.name for path in written}
    for path, data in written.items():
        assert b"Wexcombe" not in data and b"heron" not in data, path
    assert content == json.loads((tmp_path / "out" / "pilot.json").read_text())
    assert content["estimate"]["price"] == pytest.approx(content["estimate"]["seconds"] / 60)
    rows = pd.read_csv(tmp_path / "out" / "results.csv")
    bare = rows[(rows.mitigation == "none") & (rows.metric == "nats_per_token")]
    assert set(bare.length) == {32, 64, 128, 256} and content["collapse"]["lengths"][-1]["length"] == 256
    assert {"a-floor", "window:tokens=64", "recompute:last=64", "reset:every=64,overlap=32"} <= set(rows.mitigation)
    assert {"qa-q", "qa-q-without-document"} <= set(rows.task) and "answer_nats_per_token" in set(rows.metric)
    assert content["compared"]["length"] == 256 and content["screened"]["length"] == 128
    assert len(content["screened"]["rows"]) > len(content["compared"]["rows"]) > 3
    assert content["onset"]["heads"] == 8 and content["text"]["documents"] == 10
    assert "qa-q" in content["above_without_document"] and found.words
    assert not content["not_measured"] and all("predicted" in step for step in content["steps"].values())
    assert any("3 slices" in step for step in content["steps"])  # the best again, on more text
    page = (tmp_path / "out" / "report.html").read_text()
    assert found.words[0][:30] in page and "Where and how often it collapses" in page


def test_text_is_shown_where_the_person_wants_it(model, document, tmp_path):
    pilot = begun(model, document, tmp_path / "out", tasks=(questions(tmp_path),), with_text=True)
    _, estimate = pilot.estimate()
    _, found = write_pilot(pilot, estimate)  # of nothing, too
    assert found.kind == "undecided" and found.python == ""
    assert "Wexcombe" in (tmp_path / "out" / "pilot.json").read_text()
    assert "Wexcombe" in (tmp_path / "out" / "report.html").read_text()


def long_question_last(tmp_path, seed=0, n=8, words=30):
    """Questions of which the one that is asked last takes so many words more."""
    order = np.random.default_rng([seed]).permutation(n)
    last = int(order[-1])
    records = [
        {
            "document": f"It is said that {CANARY}.",
            "question": "Where?" + " where?" * words * (i == last),
            "answer": "at",
        }
        for i in range(n)
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, records)))
    return QuestionAnswering(str(tmp_path / "q.jsonl"))


def test_questions_are_asked_where_the_longest_of_them_fits(model, document, tmp_path):
    task = long_question_last(tmp_path)
    pilot = begun(model, document, tmp_path / "out", tasks=(task,), lengths=(64, 256, 512))
    assert pilot.tasks[task] == 256
    with pytest.raises(InputError, match=r"qa-q: not every prompt fits into 128 tokens: a question .* takes at least"):
        begun(model, document, tmp_path / "out", tasks=(task,), lengths=(64, 128))


def test_prompts_that_cannot_be_made_end_no_pilot(model, document, tmp_path, monkeypatch):
    """What was not foreseen is noted beside what was measured, and not tried again."""
    monkeypatch.setattr(Pilot, "_tasks", lambda self: dict(zip(self.config.tasks, (64, 256))))
    monkeypatch.setattr(pilot_run, "other_steps", lambda *asked: [])
    task, said = long_question_last(tmp_path), []
    sizes = Sizes((64, 256), (64, 256), (64, 256), 2, 8, 2, 8)
    for _ in range(2):
        said.clear()
        pilot = begun(model, document, tmp_path / "out", say=said.append, tasks=(task, Passkey()), lengths=(64, 256))
        _, estimate = pilot.estimate()
        pilot.measure(sizes)
        content, _ = write_pilot(pilot, estimate)
        left = {row["step"]: row["why"] for row in content["not_measured"]}
        assert "none: qa-q up to 256, 8 prompts" in left and all("takes at least" in why for why in left.values())
        assert "a-floor: qa-q up to 256, 8 prompts" in left and "a-floor" not in content["not_applicable"]
        assert "none" not in content["not_applicable"] and (tmp_path / "out" / "report.html").exists()
        rows = pilot.frame()
        assert {"none", "a-floor"} <= set(rows[rows["task"] == "passkey"]["mitigation"])
    assert [line for line in said if "] " in line] == []


def test_questions_without_their_documents_are_found_again(model, document, tmp_path):
    """Asked by themselves, their results are what the folder has of them, and they are not asked again."""
    task = replace(questions(tmp_path), document=False)
    sizes = Sizes((64, 256), (64, 256), (64, 256), 1, 1, 1, 1)
    for reused in (False, True):
        pilot = begun(model, document, tmp_path / "out", tasks=(task,), lengths=(64, 256))
        pilot.estimate()
        step = Step(RECALL, "none", recall_job(task, 1), (64, 256))
        assert pilot._is_stored(step) == reused
        pilot.measure(sizes)
        assert "qa-q-without-document" in set(pilot.frame()["task"])


def test_two_tasks_of_one_name_are_refused(model, document, tmp_path):
    tasks = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        tasks.append(questions(tmp_path / folder))
    with pytest.raises(InputError, match=r"qa:file=.*a/q.jsonl and qa:file=.*b/q.jsonl would both be called qa-q: "):
        begun(model, document, tmp_path / "out", tasks=tuple(tasks))
    both = (tasks[0], replace(tasks[0], document=False))  # the second is asked beside the first in any case
    assert set(begun(model, document, tmp_path / "out", tasks=both, lengths=(64, 256)).tasks) == set(both)


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.mark.parametrize("at", [1, 12])
def test_a_killed_pilot_repeats_nothing(model, document, tmp_path, at):
    out, first, second = tmp_path / "out", [], []

    def say(line):
        first.append(line)
        if len(first) > at:
            raise Killed

    pilot = begun(model, document, out, say=say, tasks=(Passkey(),), lengths=(32, 64, 256))
    with pytest.raises(Killed):
        pilot.estimate()
        pilot.measure(SIZES_OF_FIVE)
    before = files(out / "cells")
    spent = json.loads((out / "pilot_state.json").read_text())["spent"]
    again = begun(model, document, out, say=second.append, tasks=(Passkey(),), lengths=(32, 64, 256))
    assert again.ledger.before == spent > 0
    again.estimate()
    again.measure(SIZES_OF_FIVE)
    assert {path: files(out / "cells")[path] for path in before} == before
    done, more = (
        [line.split("] ")[1].split(", about")[0] for line in lines if "] " in line] for lines in (first, second)
    )
    assert not set(done[:-1]) & set(more) and done[-1] == more[0]
    assert f"{len(before)} cells had been measured before" in second[-1]
    third = []
    begun(model, document, out, say=third.append, tasks=(Passkey(),), lengths=(32, 64, 256)).measure(SIZES_OF_FIVE)
    assert [line for line in third if "] " in line] == []


SIZES_OF_FIVE = Sizes((32, 64, 256), (32, 64, 256), (32, 64, 256), 2, 3, 2, 3)


def test_another_text_begins_anew(model, document, tmp_path):
    first = begun(model, document, tmp_path / "out")
    first.estimate()
    other = begun(model, Text("dir:letters", document.data[::-1]), tmp_path / "out")
    assert other.ledger.before == 0 and other.frame().empty and not other.ledger.steps


@pytest.mark.parametrize("slowness", [0.5, 1.2, 5.0])
def test_a_budget_is_kept(model, document, tmp_path, monkeypatch, slowness):
    """By a clock that moves with the steps alone, each so many times as slow as predicted, and looked at ten times."""
    now = [0.0]
    monkeypatch.setattr(pilot_run.time, "monotonic", lambda: now[0])
    config = PilotConfig("tiny", "letters/", str(tmp_path / "out"), 120.0, tasks=(Passkey(),), lengths=(64, 256, 512))
    pilot = Pilot(model, document, config, 0.0, silent)
    pilot.speeds.reading, pilot.speeds.token = {"none": 100.0, "recompute:last=64": 70.0}, 0.1
    begun_steps = []

    def read(step, predicted):
        begun_steps.append((step.name, pilot.ledger.spent, predicted))
        for _ in range(10):
            now[0] += slowness * predicted / 10
            pilot._advance(1)

    monkeypatch.setattr(pilot, "_read", read)
    monkeypatch.setattr(pilot, "_probe", lambda step: read(step, pilot.predictor.seconds(step)))
    sizes = Sizes((64, 256, 512), (64, 256, 512), (64, 256, 512), 2, 5, 4, 10)
    pilot.measure(sizes)
    piece = slowness * max(predicted for *_, predicted in begun_steps) / 10
    assert pilot.ledger.spent <= 120 - RESERVE + (piece if slowness > SAFETY else 0) and pilot.not_measured
    assert all(spent + SAFETY * predicted + RESERVE <= 120 for _, spent, predicted in begun_steps)
    assert begun_steps[0][0].startswith("none: loss") and begun_steps[1][0].startswith("recompute")
    named = {step["step"] for step in pilot.not_measured}
    cut = named & {name for name, *_ in begun_steps}
    assert len(cut) == (slowness > SAFETY) and all(cut <= {begun_steps[-1][0]} for _ in cut)
    assert all(pilot.ledger.steps[name]["outcome"] == "stopped" for name in cut)


def test_an_estimate_measures_nothing(model, document, tmp_path):
    sizes, estimate = begun(model, document, tmp_path / "out", tasks=(Passkey(),)).estimate()
    assert files(tmp_path / "out" / "cells") == {}
    assert estimate.seconds > 0 and estimate.peak_bytes > 0 and estimate.price is None
    assert estimate.stages[0]["stage"] == "loss without a remedy"
    first = estimate.stages[0]
    assert first["steps"] == first["begun"] == 1 and first["tokens"] >= sizes.slices * sizes.plain[-1]
    assert sizes.longest <= len(document) // 2


def test_a_budget_for_nothing_says_what_it_would_take(model, document, tmp_path):
    pilot = begun(model, document, tmp_path / "out", budget=0.5)
    sizes, _ = pilot.estimate()
    with pytest.raises(InputError, match=r"a budget of 0 s is too small for anything: .* give --budget \d+s or more"):
        pilot.measure(sizes)
    assert files(tmp_path / "out" / "cells") == {}


def test_texts_and_models_that_cannot_be_piloted(model, document, tmp_path):
    short = Text("file:short.txt", document.data[:200])
    with pytest.raises(InputError, match=r"text file:short.txt has 200 tokens; .* two stretches of 128 tokens: .* 258"):
        begun(model, short, tmp_path / "out")
    with pytest.raises(InputError, match="reads 8K tokens: give it at least 8193"):
        begun(model, document, tmp_path / "out", lengths=(8192,))
    with pytest.raises(InputError, match="--lengths: a pilot asks what happens beyond the training length, 64"):
        begun(model, document, tmp_path / "out", lengths=(32, 64))
    with pytest.raises(InputError, match=r"passkey: not every prompt fits into 65 tokens: .* takes at least"):
        begun(model, document, tmp_path / "out", lengths=(65,), tasks=(Passkey(),))
    with pytest.raises(InputError, match="does not say its training length: give --train-length"):
        model.train_length = None
        begun(model, document, tmp_path / "out")


def test_a_model_without_a_recurrence_is_told_what_can_be_done(document, tmp_path):
    from rnn_longctx.models.config import ModelConfig
    from rnn_longctx.models.lm import LM

    attention = LM(ModelConfig(mixer="full-attention:heads=2", d_model=32, n_layer=1)).eval()
    attention.train_length, attention.name = 64, "attention"
    with pytest.raises(InputError, match=r"attention has no recurrent layer.*rnn-longctx eval.*rnn-longctx retrofit"):
        begun(attention, document, tmp_path / "out")


def test_the_report_of_hostile_names(model, document, tmp_path):
    name = "dir:<script>alert(1)</script> [red]\x1b[31m"
    pilot = begun(model, Text(name, document.data), tmp_path / "out")
    _, estimate = pilot.estimate()
    write_pilot(pilot, estimate)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>alert(1)" not in page and "\x1b" not in page


def test_a_haystack_is_kept_by_its_name(model, document, tmp_path):
    (tmp_path / "hay.txt").write_bytes(document.data.replace(b"\0", b" "))
    task = Passkey(haystack=str(tmp_path / "hay.txt"))
    pilot = begun(model, document, tmp_path / "out", tasks=(task,), lengths=(64, 256))
    pilot.estimate()
    pilot.measure(Sizes((64, 256), (64, 256), (64, 256), 1, 1, 1, 1))
    assert "passkey-in-hay.txt" in set(pilot.frame()["task"])
    assert all(b"Wexcombe" not in data for data in files(tmp_path / "out").values())


def test_the_best_are_read_further_where_time_is_left(model, document, tmp_path):
    """What was thought slow before it began, and is not: the finals go as far as the text does."""
    pilot = begun(model, document, tmp_path / "out")
    pilot.estimate()
    pilot.measure(Sizes((32, 64, 128), (32, 64, 128), (32, 64, 128), 2, 1, 2, 1))
    rows = pilot.frame()
    longest = rows[rows["metric"] == "nats_per_token"].groupby("mitigation")["length"].max()
    assert len(pilot.ledger.finalists) == 3 and longest["none"] == longest["recompute:last=64"] == 2048
    assert all(longest[name] == 2048 for name in pilot.ledger.finalists) and (longest == 128).any()
    again = begun(model, document, tmp_path / "out")
    sizes, _ = again.estimate()
    assert sizes.final[-1] == 2048


def test_a_slow_remedy_leaves_the_finals(model, document, tmp_path, monkeypatch):
    """One step that takes 100 seconds and is stopped: the best are read on, and it is not begun as if it took less."""
    real, later, said = time.monotonic, [0.0], []
    monkeypatch.setattr(pilot_run.time, "monotonic", lambda: real() + later[0])
    read = Pilot._read

    def slow(self, step, predicted):
        if step.remedy == "window:tokens=64":
            later[0] += 100
            raise TimeIsUp
        read(self, step, predicted)

    monkeypatch.setattr(Pilot, "_read", slow)
    sizes = Sizes((64, 256), (64, 256), (64, 256), 2, 1, 3, 1)
    pilot = begun(model, document, tmp_path / "out", lengths=(64, 256))
    pilot.estimate()
    pilot.measure(sizes)
    name = "window:tokens=64: loss up to 256, 2 slices"
    assert pilot.ledger.steps[name]["outcome"] == "stopped" and name in {row["step"] for row in pilot.not_measured}
    assert len(pilot.ledger.finalists) == 3 and any("3 slices" in step for step in pilot.ledger.steps)
    again = begun(model, document, tmp_path / "out", pilot.ledger.spent + 120, said.append, lengths=(64, 256))
    assert again.predictor.seconds(next(s for s in first_steps(sizes, 64, {}) if s.name == name)) >= 200
    again.measure(sizes)
    assert name in {row["step"] for row in again.not_measured} and not any(name in line for line in said)


def test_no_best_are_chosen_without_their_rivals(model, document, tmp_path, monkeypatch):
    read = Pilot._read

    def slow(self, step, predicted):
        if step.remedy.startswith("recompute"):
            raise TimeIsUp
        read(self, step, predicted)

    monkeypatch.setattr(Pilot, "_read", slow)
    pilot = begun(model, document, tmp_path / "out", lengths=(64, 256))
    pilot.estimate()
    pilot.measure(Sizes((64, 256), (64, 256), (64, 256), 2, 1, 3, 1))
    assert pilot.ledger.finalists is None and not any("3 slices" in step for step in pilot.ledger.steps)


def test_a_larger_budget_chooses_its_own_best(model, document, tmp_path):
    pilot = begun(model, document, tmp_path / "out", lengths=(64, 256))
    pilot.estimate()
    pilot.measure(Sizes((64, 256), (64, 256), (64, 256), 2, 1, 2, 1))
    pilot.ledger.finalists = ["state-norm:every=64"]  # as a smaller budget may have chosen
    pilot.ledger.save()
    again = begun(model, document, tmp_path / "out", lengths=(64, 256))
    again.estimate()
    assert again.ledger.finalists == ["state-norm:every=64"]  # of the same budget they stay
    larger = begun(model, document, tmp_path / "out", 2e6, lengths=(64, 256))
    larger.estimate()
    larger.measure(Sizes((64, 256), (64, 256), (64, 256), 2, 1, 2, 1))
    assert larger.ledger.finalists is not None and len(larger.ledger.finalists) == 3


@pytest.mark.parametrize("name", ["q\x1b[31m", "a\nb", "x\u202ey"])
def test_questions_of_a_file_with_an_odd_name(model, document, tmp_path, name):
    """Results hold such names spelled out, and are found all the same."""
    task = QuestionAnswering(str(Path(questions(tmp_path).file).rename(tmp_path / f"{name}.jsonl")))
    for reused in (False, True):
        pilot = begun(model, document, tmp_path / "out", tasks=(task,), lengths=(64, 256))
        pilot.estimate()
        assert pilot._is_stored(Step(RECALL, "none", recall_job(task, 1), (64, 256))) == reused
        list(recall_job(task, 1).run(pilot.measuring, [64, 256]))
    assert set(pilot.frame()["task"]) == {plain(task.label)} != {task.label}


def test_the_probe_is_stopped_as_any_step(model, document, tmp_path, monkeypatch):
    """The clock is looked at after each segment that it reads, and two are all that there is time for."""
    from rnn_longctx.measure import stream

    monkeypatch.setitem(stream.SEGMENTS, "cpu", 64)
    config = PilotConfig("tiny", "letters/", str(tmp_path / "out"), 1e6, lengths=(64, 256, 1024))
    pilot = Pilot(model, document, config, time.monotonic(), silent)
    pilot.estimate()
    looked, advance = [], pilot.measuring.progress

    def progress(tokens):
        looked.append(tokens)
        if len(looked) == 2:
            pilot.latest = 0.0
        advance(tokens)

    pilot.measuring.progress = progress
    step = Step(HEADS, "none", None, (1024,))
    pilot._measure(step)
    assert looked == [64, 64] and pilot.ledger.steps[step.name]["outcome"] == "stopped"
    assert not (tmp_path / "out" / "probe").exists() and not pilot._is_stored(step)
    pilot.measuring.progress = advance
    pilot._measure(step)
    assert pilot._is_stored(step)


@pytest.mark.parametrize("longest", [{"plain": (64, 256, 1024)}, {"final": (64, 256, 1024)}, {"lengths": (64, 1024)}])
def test_memory_is_that_of_the_longest_length(model, document, tmp_path, monkeypatch, longest):
    """By a cache of attention that takes a byte a token and row, and a process that has held nothing yet."""
    monkeypatch.setattr(pilot_run, "own_peak", lambda device: 0)
    monkeypatch.setattr(Pilot, "_growth", lambda self, length, rows: float(length * rows))
    sizes = replace(Sizes((64, 256), (64, 256), (64, 256), 2, 1, 3, 1), **longest)
    monkeypatch.setattr(pilot_run, "choose", lambda *asked: sizes)
    _, estimate = begun(model, document, tmp_path / "out", lengths=(64, 256)).estimate()
    assert estimate.peak_bytes == 3 * 1024
