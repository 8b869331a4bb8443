"""Planted links over gap, noise and strength: what is found, in a table and on one page."""

from __future__ import annotations

import pandas as pd
import pytest
from rich.console import Console

from rnn_longctx.eval.show.compare import draw, tables
from rnn_longctx.eval.show.recovery import recovered
from rnn_longctx.eval.tables.compare import summarised
from rnn_longctx.tasks.planted import Planted

CHANCE = 1 / 16
SETTINGS = [(noise, strength) for noise in (0.0, 0.5, 0.9) for strength in (1.0, 0.4)]


def right(entry, noise, strength, depth):
    """Who finds all, and who finds near ones without noise and guesses elsewhere."""
    finds = entry == "all" or (noise == 0 and depth > 0.5)
    return strength if finds else CHANCE


@pytest.fixture
def frame() -> pd.DataFrame:
    rows = []
    for entry in ("all", "near"):
        key = {"entry": entry, "mixer": "m", "parameters": 9, "learning_rate": 1e-3, "train_length": 64, "seed": 0}
        key |= {"mitigation": "none", "text": "", "length": None, "depth": None, "samples": None, "note": ""}
        for noise, strength in SETTINGS:
            task = Planted(noise=noise, strength=strength).label
            rows.append(key | {"metric": "chance", "task": task, "value": CHANCE})
            for length in (32, 64, 128):  # what is beyond training, or shorter than the longest within, is not shown
                depths = [0.25, 0.75]
                values = [right(entry, noise, strength, d) if length == 64 else 0.0 for d in depths]
                of = key | {"task": task, "length": length}
                rows += [of | {"metric": "recovery", "depth": d, "value": v} for d, v in zip(depths, values)]
                rows.append(of | {"metric": "accuracy", "value": sum(values) / 2})
        rows.append(key | {"metric": "accuracy", "task": "induction", "length": 64, "value": 0.3})
    return summarised(rows, 64)


def test_shares_are_between_a_guess_and_what_can_be_known(frame):
    rows = recovered(frame)
    assert set(rows["length"]) == {64} and len(rows) == 2 * len(SETTINGS) * 2
    assert set(zip(rows["noise"], rows["strength"])) == set(SETTINGS)
    share = rows.set_index(["entry", "noise", "strength", "depth"])["share"]
    assert share["all"].tolist() == pytest.approx([1.0] * 12)
    for (noise, _, depth), value in share["near"].items():
        assert value == pytest.approx(float(noise == 0 and depth > 0.5))


def test_the_table_and_the_page(frame, tmp_path):
    console = Console(width=200)
    with console.capture() as printed:
        for piece in tables(frame):
            console.print(piece)
    text = printed.get()
    assert "Share of planted links found in 64 tokens, over all gaps (0: a guess)" in text
    table = text.partition("planted links found")[2].splitlines()
    near = next(line for line in table if line.startswith("near"))
    assert near.split()[1:] == ["0.50", "0.50", "0.00", "0.00", "0.00", "0.00"]
    names = {path.name for path in draw(frame, tmp_path)}
    assert {"recovery_grid.png", "recovery_grid.pdf"} <= names
    assert all((tmp_path / name).stat().st_size > 1000 for name in names)


def test_one_setting_is_no_grid(frame, tmp_path):
    one = frame[frame["task"].isin(["planted", "induction"])]
    assert recovered(one).empty and not any("grid" in path.name for path in draw(one, tmp_path))
