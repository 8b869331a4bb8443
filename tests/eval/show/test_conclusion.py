"""What is concluded of a table of results, in words."""

import math
import re

import pandas as pd
import pytest
from story_values import put

from rnn_longctx.eval.show.plots import plot_all
from rnn_longctx.eval.show.terminal import conclusion, context_gain, summary, to_text
from rnn_longctx.eval.tables.leaderboard import leaderboard

CONTROLS = {"recompute:last=512", "reset:every=512,overlap=256"}


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
