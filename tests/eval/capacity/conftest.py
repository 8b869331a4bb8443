"""A study of 75 models, with what follows from it worked out once."""

from __future__ import annotations

import pandas as pd
import pytest
from known_family import STATES, Family, t_forget, t_recall

from rnn_longctx.eval.capacity import models, tables


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    folder, family = tmp_path_factory.mktemp("study"), Family()
    for state in STATES:
        for train in (256, 512, 1024, 2048, 4096):
            for seed in range(3):
                off = [0.97, 1, 1.3][seed]
                best = t_recall(state) if train == 1024 else t_recall(state) / 2
                family.add(state, train, seed, train >= t_forget(state) * off, best * off)
    for task in ("mqar", "forgetting-mqar"):
        for state in STATES:
            name = f"s{state}-{task}-s0"
            line = {"model": name, "weights_hash": "0", "shape": f"s{state}", "task": task, "state_elements": state}
            family.lines.append(dict.fromkeys(models.COLUMNS) | line)
            for pairs in (4, 16):
                family.put(name, f"{task}{pairs}", "accuracy", 4 * pairs, [0.25, 0.75])
    family.write(folder)
    return folder


@pytest.fixture(scope="session")
def findings(study) -> pd.DataFrame:
    """What its models show at a recall of 0.95."""
    return tables.findings(*tables.read(study), 0.95)
