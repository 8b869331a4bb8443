"""One trial in a process of its own: `python -m rnn_longctx.eval.tune.trial OUT SETTING` measures a setting (or goes on
where it was killed), and says in result.json what came of it and how much memory the process has held."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from rnn_longctx.errors import InputError
from rnn_longctx.eval.pool import end_with_parent
from rnn_longctx.eval.tune.budget import own_peak
from rnn_longctx.eval.tune.mixer import MixerProblem
from rnn_longctx.eval.tune.problem import PROBLEM, Problem, folder_of
from rnn_longctx.eval.tune.remedy import RemedyProblem
from rnn_longctx.files import write_atomic
from rnn_longctx.plugins import load_handed_on
from rnn_longctx.train.team import training_device

RESULT = "result.json"


def load_problem(out: Path) -> Problem:
    described = json.loads((out / PROBLEM).read_text())
    kinds: dict[str, Any] = {kind.kind: kind for kind in (MixerProblem, RemedyProblem)}
    return kinds[described["kind"]].of(described)


def run_trial(out: Path, setting: str) -> None:
    problem, folder = load_problem(out), folder_of(out, setting)
    outcome = problem.measure(setting, folder)
    device: torch.device = training_device(problem.device)
    result = {"setting": setting, **vars(outcome), "peak_bytes": own_peak(device)}
    write_atomic(folder / RESULT, json.dumps(result).encode())


if __name__ == "__main__":
    end_with_parent()
    try:
        load_handed_on()
        run_trial(Path(sys.argv[1]), sys.argv[2])
    except InputError as error:
        sys.exit(f"{error}")
