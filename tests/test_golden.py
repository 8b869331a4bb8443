"""Nothing that is computed may change while the code moves: see golden.py."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import golden

CLOSE = {"rel_tol": 2e-2, "abs_tol": 2e-3}  # on another processor: a collapsed model magnifies what it rounds


def differences(new: Any, old: Any, exact: bool, where: str = "") -> list[str]:
    """Places where two trees differ: to the last bit, or, on another machine, in floats beyond rounding."""
    if isinstance(old, dict) and isinstance(new, dict) and new.keys() == old.keys():
        return [d for k in old for d in differences(new[k], old[k], exact, f"{where}/{k}")]
    if isinstance(old, list) and isinstance(new, list) and len(new) == len(old):
        return [d for i, (a, b) in enumerate(zip(new, old)) for d in differences(a, b, exact, f"{where}/{i}")]
    if isinstance(old, float) and isinstance(new, float):
        same = new == old or (new != new and old != old) or (not exact and math.isclose(new, old, **CLOSE))
    else:
        same = new == old or (not exact and where.endswith("/bits"))
    return [] if same else [f"{where}: {new!r:.80} was {old!r:.80}"]


def test_nothing_has_changed() -> None:
    recorded = json.loads((Path(__file__).parent / "helpers" / "golden.json").read_text())
    exact = golden.machine() == recorded["machine"]
    new = golden.compute()
    if not exact:  # a rounding may turn one token or one answer, and with it what follows
        new, recorded["results"] = ({k: tree[k] for k in ("cells", "probed", "trained", "carried")}
                                    for tree in (new, recorded["results"]))  # fmt: skip
    assert not differences(new, recorded["results"], exact)


def test_a_difference_is_seen() -> None:
    old = {"a": [1.0, float("nan")], "b": {"bits": "x", "sum": 2.0}}
    assert not differences(old, old, True) and not differences(old, old, False)
    assert differences({"a": [1.0 + 2e-16 * 2, float("nan")], "b": old["b"]}, old, True)
    assert differences({"a": [1.5, float("nan")], "b": old["b"]}, old, False)
    assert len(differences({"a": [1.0], "b": {"bits": "y", "sum": 2.0}}, old, True)) == 2
