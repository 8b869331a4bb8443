"""Questions and prompts of a pilot: where they fit, how they are named, and those that cannot be made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from piloted import CANARY, begun, files, questions

from rnn_longctx.errors import InputError
from rnn_longctx.eval.pilot import run as pilot_run
from rnn_longctx.eval.pilot.run import Pilot
from rnn_longctx.eval.pilot.steps import RECALL, Sizes, Step, recall_job
from rnn_longctx.eval.pilot.write import write_pilot
from rnn_longctx.plain import plain
from rnn_longctx.tasks.passkey import Passkey
from rnn_longctx.tasks.qa import QuestionAnswering


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
    assert pilot.scope.tasks[task] == 256
    with pytest.raises(InputError, match=r"qa-q: not every prompt fits into 128 tokens: a question .* takes at least"):
        begun(model, document, tmp_path / "out", tasks=(task,), lengths=(64, 128))


def test_prompts_that_cannot_be_made_end_no_pilot(model, document, tmp_path, monkeypatch):
    """What was not foreseen is noted beside what was measured, and not tried again."""
    monkeypatch.setattr(Pilot, "_tasks", lambda self, *lengths: dict(zip(self.config.tasks, (64, 256))))
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
    assert set(begun(model, document, tmp_path / "out", tasks=both, lengths=(64, 256)).scope.tasks) == set(both)


def test_a_haystack_is_kept_by_its_name(model, document, tmp_path):
    (tmp_path / "hay.txt").write_bytes(document.data.replace(b"\0", b" "))
    task = Passkey(haystack=str(tmp_path / "hay.txt"))
    pilot = begun(model, document, tmp_path / "out", tasks=(task,), lengths=(64, 256))
    pilot.estimate()
    pilot.measure(Sizes((64, 256), (64, 256), (64, 256), 1, 1, 1, 1))
    assert "passkey-in-hay.txt" in set(pilot.frame()["task"])
    assert all(b"Wexcombe" not in data for data in files(tmp_path / "out").values())


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
