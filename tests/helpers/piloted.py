"""Pilots of a tiny model on letters, with questions of one's own."""

from __future__ import annotations

import json
import time

from rnn_longctx.eval.pilot.config import PilotConfig
from rnn_longctx.eval.pilot.run import Pilot
from rnn_longctx.progress import silent
from rnn_longctx.tasks.qa import QuestionAnswering

CANARY = "the heron nests at Wexcombe"


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
