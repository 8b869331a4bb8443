from __future__ import annotations

import io
import math
import re

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from story_values import put

from rnn_longctx.eval.results import to_frame
from rnn_longctx.eval.show.terminal import conclusion, context_gain, summary, table, to_text
from rnn_longctx.eval.tables.leaderboard import leaderboard
from rnn_longctx.eval.tables.sheets import sheets, whole_sheets

CONTROLS = {"recompute:last=512", "reset:every=512,overlap=256"}


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


def test_one_slice_has_no_interval(story):
    story = story.assign(samples=[s[:1] for s in story["samples"]], n=1)
    text = to_text(story)
    assert "context gain" in text and "nan" not in text and "95% from" not in text
    assert "undecided (gain" in " ".join(text.split()) or "no remedy is best" in " ".join(text.split())
    alone = story[story["task"] == "lm"]
    assert re.search(r"whether it uses older context is undecided \(gain [+-]0\.\d+ on one slice\)", conclusion(alone))


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
