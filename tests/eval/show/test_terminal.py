from __future__ import annotations

import io
import math
import re

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from rnn_longctx.eval.results import to_frame
from rnn_longctx.eval.show.plots import plot_all
from rnn_longctx.eval.show.terminal import conclusion, context_gain, summary, table, to_text
from rnn_longctx.eval.tables.leaderboard import leaderboard
from rnn_longctx.eval.tables.sheets import sheets, whole_sheets

CONTROLS = {"recompute:last=512", "reset:every=512,overlap=256"}


def put(frame, value, **where):
    """Set the value and every sample of the rows that match; the mean of a row is then its value."""
    rows = np.logical_and.reduce([frame[c] == v for c, v in where.items()])
    assert rows.any()
    for i in frame.index[rows]:
        frame.at[i, "samples"] = [float(value)] * len(frame.at[i, "samples"])
    frame.loc[rows, "value"] = value


@pytest.mark.parametrize("width", [80, 100, 110, 140])
def test_text_keeps_its_width_and_loses_nothing(story, width):
    text = to_text(story, width)
    lines = text.splitlines()
    assert text.isascii() and "\x1b" not in text
    assert max(map(len, lines)) <= width and lines == [line.rstrip() for line in lines]
    loss = story[(story["task"] == "lm") & (story["metric"] == "nats_per_token")]
    for name, rows in loss.groupby("mitigation"):
        shown = " ".join(line for line in lines if line.strip().startswith(f"{name} ") or width < 100)
        for value in rows["value"]:  # below 100 columns long names fold
            assert f" {value:.3f}" in shown, (name, value)
    head = next(line for line in lines if line.startswith("mitigation"))
    assert width < 110 or all(f" {k}" in head for k in ("256", "512", "1K", "64K"))  # one table is enough
    assert "n = 16 slices" in text and "n = 100 prompts" in text


def test_columns_line_up_and_controls_are_set_apart(story):
    lines = to_text(story).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("mitigation"))
    block = lines[start : lines.index("", start)]
    names = [line.split()[0] for line in block if not line.startswith("-")]
    assert names[1] == "none" and names.index("controls:") > names.index("state-norm")
    assert set(names[names.index("controls:") + 1 :]) == CONTROLS
    values = [line for line in block if re.search(r"\d\.\d{3} ", line)]
    ends = {
        tuple(m.end() for m in re.finditer(r"\d\.\d{3}\b", line.replace("alpha=0.999", "x" * 11))) for line in values
    }
    assert len(values) == 6 and len(ends) == 1 and len(next(iter(ends))) == 9


def test_sample_counts_go_into_the_header_where_they_differ(story):
    story.loc[story["length"] == 65536, "n"] = 4
    story.loc[(story["length"] == 32768) & (story["mitigation"] == "none"), "n"] = 12
    text = to_text(story)
    assert "n = 16 slices" not in text
    assert "n=4 " in text and "n=12 " in text and "n=16" in text


def test_cells_of_one_length_are_set_side_by_side_on_what_all_have(make):
    """Runs into one folder asked for other numbers of slices and prompts: slices, and prompts from ten on, are a fixed
    sequence; four prompts stand at other depths than the first four of a hundred."""
    frame = make(lengths=[256, 512])
    cut = {("lm", 512): 3, ("passkey", 512): 25, ("passkey", 256): 4}
    for (task, length), n in cut.items():
        rows = (frame["task"] == task) & (frame["length"] == length) & (frame["mitigation"] == "none")
        for i in frame.index[rows & frame["depth"].isna() & (frame["metric"] != "nats_per_token_peak")]:
            samples = frame.at[i, "samples"][:n]
            frame.at[i, "samples"], frame.at[i, "n"], frame.at[i, "value"] = samples, n, np.mean(samples)
    loss, recall = sheets(frame)
    whole = frame[(frame["metric"] == "nats_per_token") & (frame["mitigation"] == "state-norm")].set_index("length")
    at = loss.cells["state-norm"]
    assert at[512].value == pytest.approx(np.mean(whole.loc[512, "samples"][:3])) and at[512].n == 3
    assert at[256].n == 16 and loss.cut == {512: 16} and recall.cut == {512: 100}
    assert {row[512].n for row in recall.cells.values()} == {25} and recall.cells["state-norm"][256].n == 100
    counts = [recall.depths["state-norm"][512, d].n for d in np.arange(0.05, 1, 0.1).round(2)]
    assert counts == [3] * 5 + [2] * 5
    text = to_text(frame)
    assert "At 512: only the first 3 of 16 slices, which all rows have." in text
    assert "At 512: only the first 25 of 100 prompts, which all rows have." in text
    assert "At 256: rows of 4 to 100 prompts do not compare." in text
    assert {row[512].n for row in whole_sheets(frame)[0].cells.values()} == {3, 16}


def test_verdicts_use_one_threshold_the_bare_models(story):
    found = summary(story).query("task == 'lm'").set_index("mitigation")
    peak = story[(story["metric"] == "nats_per_token_peak") & (story["mitigation"] == "none")]["value"].item()
    losses = story[(story["metric"] == "nats_per_token") & (story["mitigation"] == "none")].set_index("length")["value"]
    first = min(k for k, loss in losses.items() if k > 256 and loss > 2 * peak)
    assert found.loc["none", "first_failing"] == first
    assert found["first_failing"].drop("none").isna().all()
    assert found.loc["none", "verdict"] in conclusion(story)
    # a remedy that harms at short lengths does not thereby pass at long ones
    put(story, 9.0, mitigation="state-norm", metric="nats_per_token_peak")
    put(story, 2 * peak + 0.01, mitigation="state-norm", metric="nats_per_token", length=65536)
    found = summary(story).query("task == 'lm'").set_index("mitigation")
    assert found.loc["state-norm", "first_failing"] == 65536


def test_context_gain_is_the_paired_difference_of_samples(story):
    gains = context_gain(story)
    assert set(gains["control"]) == {"recompute:last=512"}
    assert not set(gains["mitigation"]) & CONTROLS and len(gains) == 4 * 9
    loss = story[story["metric"] == "nats_per_token"].set_index(["mitigation", "length"])["samples"]
    for row in gains.itertuples():
        d = np.subtract(loss["recompute:last=512", row.length], loss[row.mitigation, row.length])
        assert row.gain == pytest.approx(d.mean()) and row.low < row.gain < row.high and row.n == 16
        assert row.high - row.low < 8 * np.std(d) / 4  # pairs: the slices' own spread is ten times this


def test_context_gain_pairs_the_slices_both_have(story):
    rows = (story["mitigation"] == "state-norm") & (story["metric"] == "nats_per_token") & (story["length"] == 1024)
    i = story.index[rows][0]
    story.at[i, "samples"] = story.at[i, "samples"][:5]
    gains = context_gain(story).set_index(["mitigation", "length"])
    assert gains.loc[("state-norm", 1024), "n"] == 5
    story.at[i, "samples"] = None
    assert ("state-norm", 1024) not in context_gain(story).set_index(["mitigation", "length"]).index
    assert to_text(story)


def test_the_conclusion_tells_attention_from_the_recurrence(story):
    attention, recurrence = "attention-window:tokens=256", "reset-recurrence:every=256"
    renamed = {"recompute:last=512": attention, "reset:every=512,overlap=256": recurrence}
    frame = story[(story["task"] == "lm") & (story["mitigation"].isin(["none", *renamed]))].reset_index(drop=True)
    frame["mitigation"] = frame["mitigation"].replace(renamed)
    for name, last in (("none", 4.0), (attention, 1.75), (recurrence, 4.3)):
        put(frame, 1.0, mitigation=name, metric="nats_per_token", length=256)
        put(frame, last, mitigation=name, metric="nats_per_token", length=65536)
    said = conclusion(frame)
    assert "at 64K the hybrid's loss is 3.000 above that at 256: " in said
    assert f"{attention} recovers 75% (95% 75% to 75%), {recurrence} recovers -10% (95% -10% to -10%)" in said
    assert said.endswith(", which points at attention.") and "best remedy" not in said
    assert attention in to_text(frame) and "controls:" in to_text(frame)

    put(frame, 3.0, mitigation=recurrence, metric="nats_per_token", length=65536)
    assert conclusion(frame).endswith("which points at attention and the recurrence.")
    put(frame, 3.9, mitigation=recurrence, metric="nats_per_token", length=65536)
    put(frame, 3.9, mitigation=attention, metric="nats_per_token", length=65536)
    assert conclusion(frame).endswith("which points at neither alone.")  # 3% of it is no failure
    one = frame[frame["mitigation"] != recurrence]
    assert conclusion(one).endswith("the recurrence's share was not measured.")
    assert "hybrid" not in conclusion(frame[frame["mitigation"] == "none"])
    single = frame.assign(samples=[s[:1] for s in frame["samples"]])
    assert f"{attention} recovers 3%, " in conclusion(single) and "nan" not in conclusion(single)
    assert conclusion(single).endswith("; which part fails is undecided.") and "points at" not in conclusion(single)
    beyond = frame[frame["length"] > 256]
    assert "which part of the hybrid fails was not measured" in conclusion(beyond)
    for last in (0.9, 1.0001):  # what rises by 0.000 does not rise
        put(frame, last, mitigation="none", metric="nats_per_token", length=65536)
        assert "no part of the hybrid is seen to fail" in conclusion(frame)


def test_wide_intervals_decide_nothing_of_a_hybrid(story):
    attention, recurrence = "attention-window:tokens=256", "reset-recurrence:every=256"
    renamed = {"recompute:last=512": attention, "reset:every=512,overlap=256": recurrence}
    frame = story[(story["task"] == "lm") & (story["mitigation"].isin(["none", *renamed]))].reset_index(drop=True)
    frame["mitigation"] = frame["mitigation"].replace(renamed)
    for name, last in (("none", 4.0), (attention, 2.5), (recurrence, 4.1)):
        put(frame, 1.0, mitigation=name, metric="nats_per_token", length=256)
        put(frame, last, mitigation=name, metric="nats_per_token", length=65536)
    assert conclusion(frame).endswith("which points at attention.")

    def widen(name, spread):
        found = frame.copy()
        (i,) = found.index[(found["mitigation"] == name) & (found["length"] == 65536)]
        found.at[i, "samples"] = [v + spread * (-1) ** k for k, v in enumerate(found.at[i, "samples"])]
        return conclusion(found)

    said = widen(attention, 4.0)  # 16 slices, +-4: 50% +- 70%
    assert "95% -2" in said and said.endswith("; whether attention fails is undecided.") and "points at" not in said
    assert widen(attention, 0.5).endswith("which points at attention.")
    assert widen(recurrence, 4.0).endswith("points at attention; whether the recurrence fails is undecided.")
    assert widen("none", 9.0).endswith("; which part fails is undecided.")  # the rise itself is not sure


def test_the_best_remedy_helps_and_remembers(story):
    """Of those below the loss without a remedy, the lowest that recalls as much."""
    remedies = ["state-norm", "rri:alpha=0.99", "rri:alpha=0.999,beta=0.75"]
    put(story, 1.0, metric="accuracy")
    for name, loss in zip(["none", *remedies], (1.0, 0.8, 0.7, 0.9)):
        put(story, loss, mitigation=name, metric="nats_per_token", length=65536)
    assert "best remedy at 64K is rri:alpha=0.99:" in conclusion(story) and "recalls" not in conclusion(story)

    put(story, 0.85, mitigation="rri:alpha=0.99", metric="accuracy", length=1024)
    assert (
        "best remedy at 64K is state-norm: its loss is 0.800, surely lower" in (said := conclusion(story))
        and "; rri:alpha=0.99 has the lowest loss, 0.700, but recalls less (passkey at 1K 0.85, 1.00 without a remedy)"
        in said
    )
    put(story, 0.92, mitigation="rri:alpha=0.99", metric="accuracy", length=1024)  # within the guard
    assert "best remedy at 64K is rri:alpha=0.99:" in conclusion(story)
    for name in ["none", *remedies]:
        put(story, 0.5, mitigation=name, metric="accuracy", length=2048)  # a control recalls more
    said = conclusion(story)
    assert (
        "no remedy is best at 64K: rri:alpha=0.99 has the lowest loss, 0.700, but recalls less (passkey at 2K 0.50, "
        "1.00 with" in said
    )
    assert "best remedy" not in said

    loss = story[story["task"] == "lm"].reset_index(drop=True)
    assert "best remedy at 64K is rri:alpha=0.99:" in conclusion(loss) and "recall was not measured" in conclusion(loss)
    for name in remedies:
        put(loss, 1.0, mitigation=name, metric="nats_per_token", length=65536)
    assert "no remedy has a loss below that without one at 64K" in conclusion(loss)
    put(loss, math.inf, mitigation="none", metric="nats_per_token", length=65536)
    assert "best remedy at 64K is" in conclusion(loss) and "not surely" not in conclusion(loss)
    put(loss, 1.0, mitigation="none", metric="nats_per_token", length=65536)
    rows = (loss["mitigation"] == "state-norm") & (loss["length"] == 65536)
    loss.at[loss.index[rows][0], "samples"] = [0.9 + 0.5 * (-1) ** k for k in range(16)]
    loss.loc[rows, "value"] = 0.9
    said = conclusion(loss)
    assert (
        "no remedy is surely better than none at 64K: state-norm has the lowest loss, 0.900, not surely lower" in said
    )
    assert re.search(r"without a remedy \(by 0\.100, 95% -0\.\d+ to 0\.\d+\)", said)
    assert "best remedy" not in said and "best remedy" not in conclusion(loss[loss["mitigation"] != "rri:alpha=0.99"])
    put(loss, 0.95, mitigation="rri:alpha=0.99", metric="nats_per_token", length=65536)  # more, but surely below
    assert "best remedy at 64K is rri:alpha=0.99: its loss is 0.950, surely lower" in conclusion(loss)
    assert "; state-norm has the lowest loss, 0.900, but is not surely better than none" in conclusion(loss)
    single = loss.assign(samples=[s[:1] for s in loss["samples"]], n=1)
    assert "no remedy is surely better than none at 64K: " in conclusion(single)
    assert "(by 0.050, one slice has no interval)" in conclusion(single[single["mitigation"] != "state-norm"])
    no_bare = loss[loss["mitigation"] != "none"]
    said = "no remedy is surely better than none at 64K, since the loss without one was not measured: state-norm has"
    assert said in conclusion(no_bare) and "best remedy" not in conclusion(no_bare)


def test_one_slice_has_no_interval(story):
    story = story.assign(samples=[s[:1] for s in story["samples"]], n=1)
    text = to_text(story)
    assert "context gain" in text and "nan" not in text and "95% from" not in text
    assert "undecided (gain" in " ".join(text.split()) or "no remedy is best" in " ".join(text.split())
    alone = story[story["task"] == "lm"]
    assert re.search(r"whether it uses older context is undecided \(gain [+-]0\.\d+ on one slice\)", conclusion(alone))


def test_the_conclusion_says_what_the_numbers_say(story):
    put(story, 0.75, mitigation="recompute:last=512", metric="nats_per_token")
    for name in ("state-norm", "rri:alpha=0.99", "rri:alpha=0.999,beta=0.75"):
        put(story, 0.90, mitigation=name, metric="nats_per_token")
    put(story, 0.72, mitigation="state-norm", metric="nats_per_token", length=65536)
    story.loc[story["metric"] == "accuracy", "value"] = 0.9
    put(story, 0.96, mitigation="none", metric="accuracy", length=512)
    put(story, 0.96, mitigation="state-norm", metric="accuracy", length=2048)
    put(story, 0.95, mitigation="rri:alpha=0.99", metric="accuracy", length=8192)  # not above
    put(story, 0.99, mitigation="recompute:last=512", metric="accuracy", length=65536)  # a control
    text = conclusion(story)
    assert "best remedy at 64K is state-norm: its loss is 0.720, the lowest, surely lower than without a remedy" in text
    assert ", 0.96x the loss of recompute:last=512; it uses" in text
    assert "; its recall of passkey at 64K is 0.90 (0.90 without a remedy); passkey accuracy" in text
    assert "it uses older context (gain +0.030, 95% +0.030 to +0.030)" in text
    assert "passkey accuracy above 0.95 up to 512 without a remedy, up to 2K with state-norm" in text
    assert "\n" not in text and text in " ".join(to_text(story).split())
    put(story, 0.78, mitigation="state-norm", metric="nats_per_token", length=65536)
    put(story, 0.9, mitigation="state-norm", metric="accuracy", length=2048)
    text = conclusion(story)
    assert "1.04x" in text and "shows no use of older context (gain -0.030" in text
    assert "up to 512 without a remedy, and no remedy reaches further" in text
    put(story, 0.97, mitigation="none", metric="accuracy", length=65536)
    assert "above 0.95 to at least 64K (the longest measured) without a remedy, and no" in conclusion(story)
    no_control = story[~story["mitigation"].isin(CONTROLS)]
    assert "not compared with recomputing" in conclusion(no_control) and len(context_gain(no_control)) == 0


def test_what_may_not_be_compared_is_on_separate_sheets(make):
    base = make(lengths=[256, 512], slices=3, per_depth=1)
    for column, other in (
        ("weights_hash", "ff"),
        ("text_hash", "ff"),
        ("dtype", "bfloat16"),
        ("seed", 7),
        ("device", "cuda"),
    ):
        second = base.copy()
        second[column] = other
        both = pd.concat([base, second], ignore_index=True)
        found = [s for s in sheets(both) if s.task == "lm"]
        assert len(found) == 2, column
        assert {s.where[column] for s in found} == {base[column].iloc[0], other}
        assert all(column in s.note for s in found) and f"{column}={other}" in to_text(both)
    assert len(sheets(base)) == 2 and not any(s.note for s in sheets(base))


def test_a_remedy_only_another_backend_supports_stays_in_the_table(story):
    story.loc[story["mitigation"] == "state-norm", "backend"] = "reference"
    story.loc[story["length"] == 65536, "batch"] = 1
    (sheet,) = (s for s in sheets(story) if s.task == "lm")
    assert len(sheet.cells) == 6 and sheet.where["backend"] is None


def test_two_calibrations_of_one_remedy_are_two_rows(story):
    again = story[story["mitigation"] == "state-norm"].copy()
    again["calibration"] = "builtin@12ab"
    text = to_text(pd.concat([story, again], ignore_index=True), 120)
    assert "state-norm [builtin@12ab]" in text and "state-norm [uncalibrated]" in text


def test_accuracy_over_all_depths_is_worked_out_where_it_is_missing(story):
    depths = story[(story["task"] == "lm") | story["depth"].notna()]
    (whole,) = (s for s in sheets(story) if s.task == "passkey")
    (pooled,) = (s for s in sheets(depths) if s.task == "passkey")
    for name, row in whole.cells.items():
        for length, cell in row.items():
            assert pooled.cells[name][length].value == pytest.approx(cell.value)
            assert pooled.cells[name][length].n == cell.n == 100


def test_losses_that_blew_up_are_shown_and_fail(story):
    for length, value in ((32768, math.inf), (65536, math.nan)):
        put(story, value, mitigation="rri:alpha=0.99", metric="nats_per_token", length=length)
    found = summary(story).query("task == 'lm'").set_index("mitigation")
    assert found.loc["rri:alpha=0.99", "first_failing"] == 32768
    line = next(line for line in to_text(story).splitlines() if line.startswith("rri:alpha=0.99 "))
    assert " inf " in line and " nan " in line and line.endswith("at 32K")
    assert "is rri:alpha=0.99:" not in conclusion(story)


@pytest.mark.parametrize("blown", [math.nan, math.inf])
def test_losses_that_are_no_numbers_are_said_in_words(story, blown, tmp_path):
    """Of a model that is broken within its training length nothing is said of collapse, and no such remedy is best."""
    story = story[story["task"] == "lm"].reset_index(drop=True)
    lengths = sorted(story["length"].unique())
    train = int(story["train_length"].iloc[0])
    remedy = "rri:alpha=0.999,beta=0.75"
    assert f"best remedy at 64K is {remedy}" in conclusion(story)
    for metric in ("nats_per_token", "nats_per_token_peak"):
        for length in (n for n in lengths if metric == "nats_per_token" or n == train):
            put(story, blown, mitigation="none", metric=metric, length=length)
    put(story, blown, mitigation=remedy, metric="nats_per_token", length=train)
    put(story, blown, mitigation="recompute:last=512", metric="nats_per_token", length=65536)
    said = conclusion(story)
    assert "already within the training length, so whether it collapses cannot be said" in said and "nan" not in said
    assert "collapses at" not in said and f"is {remedy}" not in said and f"{remedy} has" not in said
    assert (
        "best remedy at 64K is state-norm" in said and "not compared with recompute:last=512, whose loss is not" in said
    )
    found = summary(story).query("task == 'lm'").set_index("mitigation")
    assert pd.isna(found.loc["none", "first_failing"]) and "cannot be said" in found.loc["none", "verdict"]
    text = to_text(story)
    line = next(line for line in text.splitlines() if line.startswith("none "))
    assert line.endswith("no number") and "> 2 x" not in text
    assert all(path.stat().st_size for path in plot_all(story, tmp_path))
    board = leaderboard(story.assign(tokens_per_second=1.0))
    bare = board[(board["mitigation"] == "none") & (board["length"] == 65536)]
    assert set(bare["wins"]) == {"its loss is no number"}
    for name in (n for n in set(story["mitigation"]) if n not in CONTROLS):
        put(story, blown, mitigation=name, metric="nats_per_token", length=65536)
    assert "no remedy has a loss that is a number at 64K" in conclusion(story)
    assert plot_all(story, tmp_path)


def test_several_recompute_controls_each_have_a_table_and_the_best_one_judges(story):
    again = story[story["mitigation"] == "recompute:last=512"].replace("recompute:last=512", "recompute:last=256")
    both = pd.concat([story, again], ignore_index=True)
    both = both[both["task"] == "lm"].reset_index(drop=True)
    put(both, 0.70, mitigation="recompute:last=512", metric="nats_per_token", length=65536)
    put(both, 0.60, mitigation="recompute:last=256", metric="nats_per_token", length=65536)
    assert set(context_gain(both)["control"]) == {"recompute:last=256", "recompute:last=512"}
    assert set(summary(both).query("task == 'lm'")["against"]) == {"recompute:last=256"}
    assert "x the loss of recompute:last=256" in conclusion(both)
    assert to_text(both).count("context gain: loss of recompute:last=") == 2
    put(both, math.nan, mitigation="recompute:last=256", metric="nats_per_token", length=65536)
    assert "x the loss of recompute:last=512" in conclusion(both)


def test_of_many_settings_the_ranking_is_printed_and_the_words_come_last(story):
    one = story[(story["mitigation"] == "state-norm") & (story["task"] == "lm")]
    more = [one.assign(mitigation=f"rri:alpha=0.{k}") for k in (1, 2)]
    assert "wins" not in to_text(pd.concat([story, *more], ignore_index=True))
    more.append(one.assign(mitigation="rri:alpha=0.3"))
    text = to_text(to_frame(pd.concat([story, *more]).to_dict("records")))
    assert "context gain: " not in text and text.count(" wins") == 2
    assert text.index("gain over the best control") > text.index("passkey accuracy, ")
    assert "without a remedy:" in text[text.index("gain over the best control") :]


def test_a_remedy_composed_with_a_control_is_no_control(story):
    both = story[story.mitigation == "rri:alpha=0.99"].assign(mitigation="recompute:last=64+rri:alpha=0.99")
    (sheet, _) = sheets(pd.concat([story, both], ignore_index=True))
    assert sheet.recomputes() == ["recompute:last=512"]
    assert "recompute:last=64+rri:alpha=0.99" in sheet.remedies()


def test_depths_of_an_earlier_run_with_other_prompts_are_left_out(make):
    frame = make(lengths=[256, 512])
    at = frame[(frame.task == "passkey") & (frame.depth == 0.05) & (frame.length == 256)]
    (_, sheet) = sheets(pd.concat([frame, at.assign(depth=0.125)], ignore_index=True))
    assert {d for k, d in sheet.depths["none"] if k == 256} == {(i + 0.5) / 10 for i in range(10)}


def test_small_and_empty_tables(story):
    assert to_text(story.iloc[:0]).strip() == "no results yet" and conclusion(story.iloc[:0]) == ""
    assert len(summary(story.iloc[:0])) == 0 and len(context_gain(story.iloc[:0])) == 0
    one = story[(story["length"] == 1024) & (story["metric"] == "nats_per_token") & (story["mitigation"] == "none")]
    assert "not measured within the training length" in to_text(one)
    one = one.assign(train_length=pd.NA)
    assert "training length unknown" in to_text(one)
    other = story.assign(task="mmlu", metric="brier")
    assert to_text(other).strip() == "no results yet"


def test_terminal_output_marks_the_collapse(story):
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system="standard")
    for part in table(story, 120):
        console.print(part)
    out = console.file.getvalue()
    assert "\x1b[31m" in out and "\x1b[1m" in out


def test_states_of_other_precision_are_not_mixed(make):
    both = pd.concat([make(), make(seed=1, state_dtype="bfloat16")], ignore_index=True)
    notes = [s.note for s in sheets(both) if s.task == "lm"]
    assert sorted(notes) == ["state_dtype=None", "state_dtype=bfloat16"]
    assert len(sheets(make().drop(columns="state_dtype"))) == len(sheets(make()))


def test_no_verdict_names_a_length_that_was_not_read(make):
    """Of what was asked for at 4K, 2,610 tokens were read: what holds there, or fails, does so at 2610."""
    frame = make([256, 512, 1024, 2048, 4096], tokens_per_second=1.0, first_token_seconds=1.0)
    frame = frame[frame["mitigation"].isin(["none", "state-norm"])]
    put(frame, 9.0, mitigation="none", task="lm", metric="nats_per_token", length=4096)
    put(frame, 1.0, mitigation="state-norm", task="passkey", length=4096)
    bare = frame.assign(length=frame["length"].replace({4096: 2610})).drop(columns="tokens_read")
    frame = frame.assign(tokens_read=frame["length"].replace({4096: 2610}))
    words = conclusion(frame)
    assert (
        "collapses at 2610 (9.00 > 2 x" in words and "to at least 2610 (the longest measured) with state-norm" in words
    )
    assert "4K" not in words and "4096" not in words
    assert "At 2610: so many tokens were read where 4K were asked for." in to_text(frame)
    assert conclusion(bare) == words  # a table from before the column, of those lengths
    assert set(summary(frame)["length"]) == {2610} and summary(bare).equals(summary(frame))
    assert 2610 in set(leaderboard(frame)["length"]) and leaderboard(frame).equals(leaderboard(bare))
