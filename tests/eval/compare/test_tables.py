"""Verdicts, gains and intervals on made tables, and how they are printed and drawn."""

from __future__ import annotations

import io
import math
import re
from itertools import product

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from rich.console import Console, Group

from rnn_longctx.errors import InputError
from rnn_longctx.eval.show.compare import _panel, draw, tables
from rnn_longctx.eval.show.page.kinds.compare import _states
from rnn_longctx.eval.stats import Interval, crossed, student
from rnn_longctx.eval.tables.compare import (
    COLUMNS,
    DRIFT,
    Judged,
    control,
    judge,
    judge_seeds,
    passes,
    read,
    summarised,
    write,
)

T = 512
LENGTHS = [512, 2048, 8192, 32768]
STORIES = {  # loss without a remedy, at the lengths; recomputing has 1.0
    "collapses": [1.0, 1.1, 2.9, 5.0],
    "drifts": [1.0, 1.0, 1.1, 1.3],
    "holds": [1.0, 0.97, 0.95, 0.94],
}


def rows(entry: str, losses: list[float], seed: int = 0, slices: int = 6, noise: float = 1e-3, **more) -> list[dict]:
    """What is measured of one cell: on fixed slices, some harder than others, with a little noise."""
    rng = np.random.default_rng()
    hard = np.linspace(-0.1, 0.1, slices)
    key = {"entry": entry, "mixer": entry, "parameters": 1000, "state": 64, "learning_rate": 1e-3, "train_length": T}
    key |= {"seed": seed, "note": "", "text": "stdlib", "task": "lm", "mitigation": "none"} | more
    measured = [key | {"metric": "loss_peak", "length": T, "value": 1.1, "samples": [1.1] * slices}]
    for length, loss in zip(LENGTHS, losses):
        for mitigation, value in (("none", loss), (f"recompute:last={T}", 1.0)):
            samples = list(value + hard + rng.normal(0, noise, slices))
            row = {"metric": "loss", "mitigation": mitigation, "length": length}
            measured.append(key | row | {"value": float(np.mean(samples)), "samples": samples})
    hits = [1.0, 0.0] * 10
    answers = {"metric": "accuracy", "task": "passkey", "text": "", "length": T, "value": 0.5, "samples": hits}
    return [*measured, key | answers]


def whole(frame: pd.DataFrame, metric: str, **where) -> pd.DataFrame:
    frame = frame[(frame["metric"] == metric) & frame["seed"].isna()]
    for column, value in where.items():
        frame = frame[frame[column] == value]
    return frame


@pytest.mark.parametrize("story", STORIES)
def test_verdicts(story):
    seeds = int(np.random.default_rng().integers(1, 4))
    frame = summarised([r for s in range(seeds) for r in rows("a", STORIES[story], s)], T)
    verdict = whole(frame, "verdict").iloc[0]
    assert verdict["task"] == story and verdict["note"].startswith(story) and verdict["seeds"] == seeds
    assert (verdict["length"] == 8192) if story != "holds" else pd.isna(verdict["length"])
    forget = frame.loc[frame["metric"] == "T_forget"].iloc[0]
    if story == "collapses":
        assert math.isnan(forget["value"]) and forget["note"] == "above 512 (the longest trained, which fails)"
    else:
        assert forget["value"] == 512 and "the shortest trained" in forget["note"]
    assert passes(rows("a", STORIES[story]), T) == (story != "collapses")


def test_a_gain_has_to_be_surely_below_the_margin():
    losses, again, length = {512: 1.0, 2048: 1.02}, {2048: 1.0}, 2048
    for high, kind in ((-DRIFT - 1e-6, "drifts"), (-DRIFT + 1e-6, "holds"), (math.nan, "holds"), (0.1, "holds")):
        assert judge(losses, None, {length: Interval(-0.02, -0.03, high, 4)}, again, T).kind == kind
    assert judge(losses, None, {512: Interval(-1.0, -1.1, -0.9, 4)}, {512: 1.0}, T).kind == "holds", "within T"
    assert judge({512: 1.0}, None, {}, {}, T).kind == "unknown"
    assert judge({512: math.nan, 2048: 1.0}, None, {}, {}, T).kind == "unknown"
    assert judge({512: 1.0, 2048: math.nan}, None, {}, {}, T)[:2] == ("collapses", 2048)
    assert judge({512: 1.0, 2048: 2.1}, 1.1, {}, {}, T).kind == "holds", "twice the peak, where it was measured"


def test_most_seeds_decide_on_collapse():
    def collapse(length):
        return Judged("collapses", length, "")

    holds, drifts = Judged("holds", None, "holds up to 1K"), Judged("drifts", 1024, "drifts from 1K on")
    assert judge_seeds([collapse(1024), collapse(4096), holds], drifts)[:2] == ("collapses", 4096)
    assert judge_seeds([collapse(1024), collapse(4096), collapse(2048)], drifts)[1] == 2048, "where most have"
    one = judge_seeds([collapse(1024), holds, holds], drifts)
    assert one.kind == "drifts" and "1 of 3 seeds collapse" in one.text
    assert judge_seeds([collapse(1024), holds], holds).kind == "holds", "half is not most"
    assert judge_seeds([holds, holds, holds], collapse(1024)).kind == "holds"
    assert judge_seeds([Judged("unknown", None, "no number"), holds], holds).kind == "unknown"


def test_gains_are_paired_and_rows_of_all_seeds_have_intervals():
    frame = summarised([r for s in range(3) for r in rows("a", STORIES["holds"], s)], T)
    gain = whole(frame, "gain", length=8192, mitigation="none").iloc[0]
    assert gain["value"] == pytest.approx(0.05, abs=5e-3) and gain["low"] > 0, "what is hard about a slice cancels"
    loss = whole(frame, "loss", length=8192, mitigation="none").iloc[0]
    assert loss["high"] - loss["low"] > 5 * (gain["high"] - gain["low"]) and (loss["seeds"], loss["n"]) == (3, 6)
    each = frame[(frame["metric"] == "loss") & (frame["length"] == 8192) & (frame["mitigation"] == "none")]
    assert loss["value"] == pytest.approx(each[each["seed"].notna()]["value"].mean())
    recall = whole(frame, "accuracy").iloc[0]
    assert recall["low"] < 0.35 and recall["high"] > 0.65, "20 answers, of which half are right"
    assert list(frame.columns) == list(COLUMNS)
    without = summarised([r for r in rows("a", STORIES["drifts"]) if r["mitigation"] == "none"], T)
    assert whole(without, "gain").empty and whole(without, "verdict").iloc[0]["task"] == "holds"


@pytest.mark.parametrize("story", STORIES)
def test_a_control_that_reads_more_is_measured_and_no_measure(story):
    """Remedies may stand beside `recompute:last=2T`, on fewer slices; the gain is that over the last T tokens, so are
    verdicts, and so is the dashed line of the picture."""
    measured = [r for s in range(2) for r in rows("a", STORIES[story], s)]
    further = [
        r
        | {
            "mitigation": f"recompute:last={2 * T}",
            "value": r["value"] - 0.4,
            "samples": [v - 0.4 for v in r["samples"][:4]],
        }
        for r in measured
        if r["mitigation"] == control(T) and r["length"] > T
    ]
    frame, alone = summarised(measured + further, T), summarised(measured, T)
    for metric in ("gain", "verdict"):
        pair = [whole(one, metric, mitigation="none").reset_index(drop=True) for one in (frame, alone)]
        pd.testing.assert_frame_equal(*pair)
    losses = frame[frame["metric"] == "loss"]
    panel = Figure().subplots()
    _panel(panel, losses[losses["task"] == "lm"])
    (dashed,) = [line for line in panel.lines if line.get_linestyle() == "--"]
    assert list(dashed.get_xdata()) == LENGTHS and dashed.get_ydata() == pytest.approx([1.0] * 4, abs=0.01)


def test_crossed_intervals():
    rng = np.random.default_rng()
    values = list(rng.normal(size=8))
    plain = crossed([values])
    half = student(7) * np.std(values, ddof=1) / 8**0.5
    assert plain == pytest.approx((np.mean(values), np.mean(values) - half, np.mean(values) + half, 8))
    assert crossed([[v] for v in values])[:3] == pytest.approx(plain[:3])
    assert crossed([[1.0, 1.0], [1.0, 1.0]])[:3] == (1.0, 1.0, 1.0)
    assert math.isnan(crossed([[1.0]]).low) and math.isnan(crossed([[1.0, math.inf]]).low)
    with pytest.raises(ValueError, match="as many samples of every seed"):
        crossed([[1.0], [1.0, 2.0]])
    covered = 0
    for _ in range(200):  # seeds and slices both drawn: the mean of all, 0, is in the interval
        x = rng.normal(size=(3, 1)) + rng.normal(size=(1, 6)) + 0.3 * rng.normal(size=(3, 6))
        _, low, high, _ = crossed(x.tolist())
        covered += low <= 0 <= high
    assert covered >= 175


def test_the_table_is_written_read_printed_and_drawn(tmp_path):
    cells = [r for name, seed in product(STORIES, range(2)) for r in rows(name, STORIES[name], seed)]
    reason = {"metric": "not_applicable", "mitigation": "window", "note": "no window there", "samples": []}
    key = {k: cells[0][k] for k in ("entry", "mixer", "parameters", "learning_rate", "train_length", "seed")}
    cells.append(key | reason)
    bare = [r for r in rows("holds", STORIES["holds"]) if (r["metric"], r["mitigation"]) == ("loss", "none")]
    cells += [r | {"mitigation": "state-norm"} for r in bare]
    frame = summarised(cells, T)
    write(frame, tmp_path)
    again = read(tmp_path)
    pd.testing.assert_frame_equal(again.drop(columns="samples"), frame.drop(columns="samples"), check_dtype=False)
    assert pd.read_csv(tmp_path / "compare.csv")["metric"].tolist() == frame["metric"].tolist()
    console = Console(file=io.StringIO(), width=160, color_system=None)
    console.print(Group(*tables(again)))
    printed = console.file.getvalue()
    for words in ("collapses at 8K (2 of 2 seeds)", "drifts from 8K on", "holds up to 32K", "state-norm", "1,000"):
        assert words in printed
    assert "window (collapses): no window there" in printed and "in most seeds" in " ".join(printed.split())
    assert [p.name for p in draw(again, tmp_path)] == ["compare.png", "compare.pdf"]
    assert (tmp_path / "compare.png").stat().st_size > 5000
    with pytest.raises(InputError, match="cannot read"):
        read(tmp_path / "nowhere")


def test_remedies_are_compared_on_the_slices_that_all_have():
    """A remedy is measured on fewer slices than the model alone, the first ones of the same; of all seeds, or none."""
    cells = [r for seed in range(2) for r in rows("a", STORIES["drifts"], seed, noise=0)]
    bare = [r for r in cells if r["mitigation"] == "none" and r["metric"] in ("loss", "accuracy")]
    for row in bare:
        first = row["samples"][:3] if row["metric"] == "loss" else [1.0, 0.0, 0.0, 0.0]
        cells.append(row | {"mitigation": "state-norm", "samples": first, "value": float(np.mean(first))})
        if row["seed"] == 0:  # refused by the other
            cells.append(cells[-1] | {"mitigation": "rri"})
    out = Console(file=io.StringIO(), width=200, color_system=None)
    out.print(Group(*tables(summarised(cells, T))))
    printed = out.file.getvalue()
    assert "Remedies: nats per token, the first 3 slices" in printed
    loss, answers = printed.split("Remedies: ")[1:]
    expected = 1.3 + np.mean([-0.1, -0.06, -0.02])
    for name, value in (("none", expected), (f"recompute:last={T}", expected - 0.3), ("state-norm", expected)):
        assert re.search(rf"{name} +{value:.3f}", loss), (name, value, loss)
    assert re.search(r"none +0\.500", answers) and re.search(r"state-norm +0\.250", answers)
    assert re.search(r"rri *$", loss, re.MULTILINE) and re.search(r"rri *$", answers, re.MULTILINE)


def test_a_search_for_t_forget():
    cells = rows("a", STORIES["collapses"])
    for length, story in ((1024, "collapses"), (4096, "holds")):
        cells += [r for r in rows("a", STORIES[story], train_length=length) if r["metric"] != "loss_peak"]
    forget = summarised(cells, T).query("metric == 'T_forget'").iloc[0]
    assert forget["value"] == 4096 and forget["note"] == "4K (fails at 1K)"


def test_answers_alone_are_shown_beside_a_guess(tmp_path):
    """Of a comparison that measures no loss: a table and a panel a task."""
    made = [r for s in range(2) for r in rows("a", [], s) + rows("b", [], s) if r["metric"] == "accuracy"]
    longer = [r | {"length": 4 * T, "value": 0.25, "samples": [1.0, 0.0, 0.0, 0.0] * 5} for r in made]
    guesses = [r | {"metric": "chance", "length": None, "value": 0.0625, "samples": []} for r in made]
    frame = summarised([*made, *longer, *guesses], T)
    console = Console(file=io.StringIO(), width=120)
    console.print(Group(*tables(frame)))
    printed = console.file.getvalue()
    assert "passkey: share of answers that are right" in printed
    for line in (r"a +1,000 +0\.001 +0\.50 +0\.25", r"b +1,000 +0\.001 +0\.50 +0\.25", r"a guess +0\.062 +0\.062"):
        assert re.search(line, printed), line
    assert [path.name for path in draw(frame, tmp_path)] == ["compare.png", "compare.pdf"]
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("compare.png", "compare.pdf"))
    with_loss = summarised([*rows("a", STORIES["holds"]), *guesses], T)
    wide = Console(file=io.StringIO(), width=300)
    wide.print(Group(*tables(with_loss)))
    assert "passkey (a guess: 0.062)" in wide.file.getvalue()


def test_many_tasks_have_tables_and_a_page_of_their_own(tmp_path):
    made = rows("a", STORIES["holds"]) + rows("b", STORIES["drifts"])
    answers = [row for row in made if row["metric"] == "accuracy"]
    at = [row | {"metric": "recovery", "depth": depth, "value": 1 - depth} for row in answers for depth in (0.25, 0.75)]
    pages = {f"{name}.{kind}" for name in ("answers", "recovery") for kind in ("png", "pdf")}
    for tasks, files in ((2, set()), (3, pages)):
        frame = summarised(made + [row | {"task": f"t{i}"} for row in answers + at for i in range(1, tasks)], T)
        recovery = whole(frame, "recovery", entry="a", task="t1").set_index("depth")
        assert recovery["value"].to_dict() == {0.25: 0.5, 0.75: 0.5} and (recovery["low"] < 0.35).all()  # of samples
        out = io.StringIO()
        Console(file=out, width=200).print(Group(*tables(frame)))
        assert ("t1: share of answers that are right" in out.getvalue()) == bool(files)
        assert {path.name for path in draw(frame, tmp_path)} == {"compare.png", "compare.pdf", *files}


def test_states_under_a_remedy_stand_apart_from_those_as_trained(tmp_path):
    """In the terminal, on the page and drawn; where no remedy was on nothing is drawn."""
    about = {"heads": 8.0, "worst_ratio": 2.0}
    made = {"none": (1.0, 2.0, math.nan), "erase:scale=0,least=0": (5.0, 64.0, 768.0)}  # left, growth, onset
    cells = []
    for (remedy, (left, grown, onset)), seed in product(made.items(), range(2)):
        key = {k: v for k, v in rows("a", STORIES["holds"], seed)[0].items() if k not in ("value", "metric", "length")}
        key |= {"mitigation": remedy, "task": "probe", "samples": []}
        seen = about | {"heads_left": left, "onset": onset}
        cells += [key | {"metric": metric, "length": 4 * T, "value": value} for metric, value in seen.items()]
        for length, value in ((T, 1.0), (4 * T, grown + seed / 2)):
            of = {"length": length, "value": value}
            cells += [key | {"metric": metric} | of for metric in ("state_growth", "state_growth_max")]
    frame = summarised(cells, T)
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(Group(*tables(frame)))
    printed = console.file.getvalue()
    assert re.search(r"^a +1 of 8 +2\.25 at 2K ", printed, re.MULTILINE)
    assert re.search(r"^a, erase:scale=0,least=0 +5 of 8 +768 +64\.25 at 2K ", printed, re.MULTILINE)
    growth, heads = _states(frame)
    assert growth.alternative.startswith("Times: a 2.25 at 2K, a, erase:scale=0,least=0 64.25 at 2K.")
    assert heads.frame.set_index("entry")["heads that leave their range"].tolist() == [1.0, 5.0]
    assert [path.name for path in draw(frame, tmp_path)] == ["states.png", "states.pdf"]
    assert draw(frame[frame["mitigation"] == "none"], tmp_path) == []
