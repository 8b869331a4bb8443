"""The tables of a search: trials.csv."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from rnn_longctx.files import write_atomic
from rnn_longctx.plain import csv_text

TRIALS = "trials.csv"


def trials(study: Any) -> pd.DataFrame:
    """Return a row a trial; suggestions that repeat an earlier setting are left out."""
    rows = []
    for t in study.trials:
        attrs = t.user_attrs
        if attrs.get("repeats") is not None:
            continue
        rows.append(
            {
                "trial": t.number,
                "setting": attrs.get("setting", ""),
                "state": "refused" if "refused" in t.constraints else t.state.name.lower(),
                "value": t.value if t.state.name == "COMPLETE" else None,
                "recall": attrs.get("recall"),
                **attrs.get("about", {}),
                "seconds": attrs.get("seconds"),
                "peak_bytes": attrs.get("peak_bytes"),
                "feasible": t.state.name == "COMPLETE" and all(v <= 0 for v in t.constraints.values()),
                "note": attrs.get("note", ""),
            }
        )
    return pd.DataFrame(rows)


def write_trials(study: Any, out: Path) -> None:
    write_atomic(out / TRIALS, csv_text(trials(study)).encode())
