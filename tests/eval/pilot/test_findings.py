"""What a pilot says of a table: of one that a collapsing model left, and of the same one changed."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import replace
from pathlib import Path

import adopted_families
import numpy as np
import pandas as pd
import pytest
import torch
import transformers

from rnn_longctx import load
from rnn_longctx.config import load_yaml
from rnn_longctx.eval.pilot.findings import (
    alike,
    collapse,
    comparison,
    context_gain,
    finalists,
    most_read,
    onset,
    ranked,
    reason,
    recall_rows,
)
from rnn_longctx.eval.pilot.recommend import _collapse_words, gain_words, lines, next_steps, recommend
from rnn_longctx.eval.stats import Interval
from rnn_longctx.models.checkpoint import save
from rnn_longctx.train import TrainConfig, spelled_out

ROOT = Path(__file__).parents[3]

ABOUT = {
    "model": "my model", "text": "my documents", "options": [], "tokenizer": "bytes", "train_length": 256,
    "given_train_length": None, "adopted": False, "foldable": [], "per_length": [],
}  # fmt: skip


def changed(frame, name, factor=1.0, add=0.0, metric="nats_per_token"):
    """The table with other values of one mitigation beyond the training length."""
    frame = frame.copy()
    rows = (frame["mitigation"] == name) & (frame["metric"] == metric) & (frame["length"] > 256)
    for i in frame.index[rows]:
        samples = [factor * s + add for s in frame.at[i, "samples"]]
        frame.at[i, "samples"], frame.at[i, "value"] = samples, float(np.mean(samples))
    return frame


def added(frame, other):
    return pd.concat([frame, other], ignore_index=True)


def test_where_and_how_often_it_collapses(story):
    found = collapse(story)
    assert found["length"] == 8192 and found["threshold"] == pytest.approx(1.82, abs=0.15)
    failing = {row["length"]: row["failing"] for row in found["lengths"]}
    assert failing[256] == failing[1024] == 0 and failing[65536] == 16
    rows = {row["length"]: row for row in found["lengths"]}
    losses = story[(story.mitigation == "none") & (story.length == 4096) & (story.metric == "nats_per_token")]
    assert rows[4096]["failing"] == sum(s > found["threshold"] for s in losses.iloc[0]["samples"])
    assert collapse(story[story.mitigation != "none"])["length"] is None


def measured(make, losses, recall, slices=4):
    """A table in which remedies, by name, have these differences of the loss from the control's, a slice each, and
    answer this share of passkeys."""
    frame = make(slices=slices)
    bare, as_remedy = frame[~frame.mitigation.isin(REMEDIES)], frame[frame.mitigation == "state-norm"]
    parts = [bare]
    for name, differences in losses.items():
        rows = as_remedy.assign(mitigation=name)
        for i in rows.index[(rows.metric == "nats_per_token") & (rows.length > 256)]:
            control = bare[(bare.mitigation == "recompute:last=512") & (bare.metric == "nats_per_token")]
            samples = control[control.length == rows.at[i, "length"]].iloc[0]["samples"]
            rows.at[i, "samples"] = [s + d for s, d in zip(samples, differences, strict=True)]
            rows.at[i, "value"] = float(np.mean(rows.at[i, "samples"]))
        for i in rows.index[rows.metric == "accuracy"]:
            n = len(rows.at[i, "samples"])
            right = round(n * recall.get(name, 1.0))
            rows.at[i, "samples"], rows.at[i, "value"] = [1.0] * right + [0.0] * (n - right), right / n
        parts.append(rows)
    return pd.concat(parts, ignore_index=True)


REMEDIES = ("state-norm", "rri:alpha=0.999,beta=0.75", "rri:alpha=0.99")
LOWEST = {"window:tokens=512": [-0.06, 0.02, -0.05, 0.01]}  # -0.02 in the mean
UNTOLD = {"a-floor": [0.05, -0.02, 0.03, 0.0]}  # 0.015: above it by 0.035 (-0.075 to 0.145), by more than 2% of 0.75
TOLD = {"a-floor": [-0.02, 0.06, -0.01, 0.05]}  # 0.02: above it by 0.04, on every slice
SURE = {"a-floor": [-0.052, 0.028, -0.042, 0.018]}  # above it by 0.008 on every slice, 1%


def names(rows):
    return [row.name for row in rows]


def test_what_is_not_told_apart_by_loss_is_decided_by_recall(make):
    """A difference of 5% within its own interval is none, nor is one of 1% that is sure; a sure one of 5% is."""
    recall = {"window:tokens=512": 0.5}
    for losses in (LOWEST | UNTOLD, LOWEST | SURE):
        compared = comparison(measured(make, losses, recall))
        assert compared.lowest.name == "window:tokens=512"
        assert names(alike(compared)) == names(ranked(compared)) == ["a-floor", "window:tokens=512"]
        assert reason(compared.lowest, alike(compared)) == "recalls less"
    compared = comparison(measured(make, LOWEST | TOLD, recall))
    assert names(alike(compared)) == ["window:tokens=512"]
    assert names(ranked(compared)) == ["window:tokens=512", "a-floor"]


def test_more_text_tells_apart_what_less_did_not(make):
    many = {name: 6 * differences for name, differences in (LOWEST | UNTOLD).items()}
    compared = comparison(measured(make, many, {"window:tokens=512": 0.5}, slices=24))
    assert names(alike(compared)) == ["window:tokens=512"]


def test_little_text_does_not_make_a_bad_loss_a_good_one(make):
    """Two stretches tell nothing apart, and yet what does not hold the loss is not as good as what does."""
    losses = {"window:tokens=512": [-0.01, 0.01], "token-filter+state-norm:every=64": [0.02, 0.4]}
    compared = comparison(measured(make, losses, {"window:tokens=512": 0.1}, slices=2))
    assert compared.row("token-filter+state-norm:every=64").above.low < 0
    assert names(alike(compared)) == ["window:tokens=512"]


def test_of_what_recalls_alike_the_cheaper_is_first_then_the_simpler(make):
    """By a quarter in cost, which a busy machine does not make; without recall too."""
    losses = LOWEST | SURE | {"a-floor+state-norm": SURE["a-floor"], "rri:alpha=0.998,beta=1": SURE["a-floor"]}
    frame = measured(make, losses, {})
    for table in (frame, frame[frame.metric != "accuracy"]):
        near = {"none": 1.0, "window:tokens=512": 1.2, "a-floor+state-norm": 1.1, "rri:alpha=0.998,beta=1": 0.95}
        compared = comparison(table, processor=near | {"a-floor": 1.2})
        order = ["a-floor", "window:tokens=512", "rri:alpha=0.998,beta=1", "a-floor+state-norm"]
        assert names(alike(compared)) == order
        reasons = [reason(row, alike(compared)) for row in alike(compared)[1:]]
        assert reasons == ["more numbers to set", "more numbers to set", "more parts"]
        compared = comparison(table, processor=near | {"a-floor": 1.3})
        assert names(alike(compared))[0] == "window:tokens=512" and names(alike(compared))[-1] == "a-floor"
        assert reason(compared.row("a-floor"), alike(compared)) == "costs more"


def test_what_forgets_makes_nothing_look_dear(make):
    """Costs are compared among those that recall alike."""
    compared = comparison(
        measured(make, LOWEST | SURE, {"window:tokens=512": 0.5}),
        processor={"none": 1.0, "window:tokens=512": 0.2, "a-floor": 1.0},
    )
    assert alike(compared)[0].name == "a-floor"


def test_what_collapses_or_has_no_number_is_not_first(story):
    lower = changed(story, "state-norm", add=-0.2)
    assert ranked(comparison(lower))[0].name == "state-norm"
    assert ranked(comparison(story))[-1].name == "rri:alpha=0.99"
    broken = changed(story, "state-norm", factor=np.inf)
    assert "state-norm" not in names(ranked(comparison(broken)))


def test_the_recommendation_says_what_it_cannot_tell_apart(make):
    words = " ".join(recommend(measured(make, LOWEST | UNTOLD, {"window:tokens=512": 0.5}), ABOUT).words)
    assert "The losses of 2 remedies are not told apart there" in words
    assert re.search(r"a-floor \(0\.\d+\), window:tokens=512 \(0\.\d+; recalls less\)\. Of them the one", words)
    words = " ".join(recommend(measured(make, LOWEST | TOLD, {}), ABOUT).words)
    assert "Use window:tokens=512" in words and "not told apart" not in words


def test_finalists_do_not_raise_the_loss(story):
    names = ["state-norm", "rri:alpha=0.999,beta=0.75", "rri:alpha=0.99"]
    assert set(finalists(story, names)) == set(names) and len(finalists(story, names, most=2)) == 2
    assert finalists(changed(story, "state-norm", factor=9), names) == ["rri:alpha=0.999,beta=0.75", "rri:alpha=0.99"]
    assert finalists(story[story.mitigation != "none"], names) == []


def test_those_measured_on_more_text_are_compared_on_all_of_it(make):
    few, many = make(slices=4), make(slices=12)
    final = ["none", "recompute:last=512", "state-norm"]
    both = many[many.mitigation.isin(final)].pipe(added, few[~few.mitigation.isin(final)])
    compared = comparison(most_read(both))
    assert {row.name for row in compared.rows} == set(final) and {row.n for row in compared.rows} == {12}
    assert {row.n for row in comparison(both).rows} == {4}
    alone = many[many.mitigation.isin(final[:2])].pipe(added, few[~few.mitigation.isin(final[:2])])
    assert len(comparison(most_read(alone)).rows) == len(comparison(few).rows)  # no remedy was, so all are


def test_a_remedy_is_recommended_with_its_doubts(story):
    found = recommend(changed(story, "state-norm", add=0.02), ABOUT)
    assert found.kind == "remedy" and found.remedy == "rri:alpha=0.999,beta=0.75"
    words = " ".join(found.words)
    assert "collapses at 8K tokens" in words and "16 of 16 stretches" in words and "Use rri:alpha=0.999" in words
    assert any("surely below" in doubt for doubt in found.uncertainty)
    assert any("Nothing is known beyond 64K" in doubt for doubt in found.uncertainty)
    assert "mitigate(model, 'rri:alpha=0.999,beta=0.75')" in found.python
    assert found.command.startswith("rnn-longctx generate 'my model' --mitigation rri:alpha=0.999,beta=0.75 --prompt -")


def test_the_last_tokens_where_nothing_gains_over_them(story):
    frame = story
    for name in ("state-norm", "rri:alpha=0.999,beta=0.75", "rri:alpha=0.99"):
        frame = changed(frame, name, factor=0, metric="accuracy")
    found = recommend(frame, ABOUT)
    assert found.kind == "last tokens" and "last 256 tokens only" in " ".join(found.words)
    assert "recompute:last=256" in found.python and found.next_steps


def test_next_steps_where_no_remedy_suffices(story):
    frame = story
    for name in ("state-norm", "rri:alpha=0.999,beta=0.75", "rri:alpha=0.99"):
        frame = changed(frame, name, factor=1.5)
    found = recommend(frame, ABOUT)
    assert found.kind == "insufficient" and "No remedy that was measured suffices" in " ".join(found.words)
    commands = [command for _, command in found.next_steps]
    assert commands[0].startswith("rnn-longctx train configs/train/continual.yaml --set 'model=my model'")
    assert any("capacity advise --context 2k" in command for command in commands)


def test_a_model_that_does_not_collapse_is_left_as_it_is(story):
    flat = story[story.mitigation != "none"].pipe(
        added, story[story.mitigation == "state-norm"].assign(mitigation="none")
    )
    found = recommend(flat, ABOUT)
    assert found.kind == "none needed" and found.remedy is None and "does not collapse up to 64K" in found.words[0]
    assert found.words[1].startswith("Use it as it is")
    near = recommend(flat, ABOUT | {"train_length": 2048}).words[1]
    assert near.startswith("Up to 64K tokens use it as it is") and "not far" in near and "name more time" in near
    assert "mitigate" not in found.python and "--mitigation" not in found.command


def test_stretches_that_fail_before_their_mean_does_are_named():
    fall = {"length": 256, "peak": 2.0, "lengths": []}
    for length, failing in ((32, 0), (64, 0), (128, 1), (256, 3)):
        fall["lengths"].append({"length": length, "loss": 3.0, "slices": 4, "failing": failing})
    ends = "3 of 4 stretches of text fail by themselves; at 128 1 of 4 stretches already did."
    assert _collapse_words(fall).endswith(ends), "a document of 128 may fail where the mean does not"
    near = _collapse_words(fall | {"length": None, "lengths": fall["lengths"][:3]})
    assert near.endswith("up to 128 tokens, the longest measured; at 128 1 of 4 stretches already did.")


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.01, 0.03, "reading everything gains 0.020 nats a token over recompute:last=512 (95% +0.010 to +0.030)"),
        (-0.03, -0.01, "reading everything loses 0.020 nats a token against recompute:last=512"),
        (-0.01, 0.05, "reading everything gains nothing that can be told from zero (+0.020 nats a token) over"),
        (math.nan, math.nan, "one stretch has no interval"),
    ],
)
def test_what_reading_everything_gains_in_words(story, low, high, words):
    compared = comparison(story)
    gain = Interval(math.copysign(0.02, low + high), low, high, 8)
    row = replace(compared.row("state-norm"), gain=gain)
    assert words in gain_words(row, compared)


def test_too_little_is_not_decided(story):
    bare = story[story.mitigation == "none"]
    assert recommend(bare, ABOUT).kind == "undecided" and "collapses at 8K" in recommend(bare, ABOUT).words[0]
    assert recommend(story[story.length <= 256], ABOUT).kind == "undecided"
    assert recommend(story[:0], ABOUT).kind == "undecided"
    without_controls = story[~story.mitigation.str.startswith("re")]
    assert recommend(without_controls, ABOUT).kind == "undecided"


def test_doubts_name_what_looked_better_on_less_text(make):
    few, many = changed(make(slices=4), "state-norm", add=-0.3), make(slices=12)
    names = ["none", "recompute:last=512", "rri:alpha=0.999,beta=0.75"]
    both = many[many.mitigation.isin(names)].pipe(added, few[few.mitigation == "state-norm"])
    doubts = recommend(both, ABOUT).uncertainty
    assert any(doubt.startswith("state-norm had a lower loss") for doubt in doubts)
    short = story_up_to(make(), 4096)
    assert any("before the model collapses" in doubt for doubt in recommend(short, ABOUT).uncertainty)


def story_up_to(frame, length):
    return frame[(frame.mitigation == "none") | (frame.length <= length)]


def test_context_gain_and_recall(story):
    gains = context_gain(story, ["none", "state-norm", "not there"])
    assert {row["name"] for row in gains} == {"none", "state-norm"} and min(row["length"] for row in gains) == 512
    last = [row for row in gains if row["name"] == "none"][-1]
    assert last["high"] < -4 and last["n"] == 16
    right = {(row["name"], row["length"]): row["right"] for row in recall_rows(story)}
    assert right["none", 256] == 1 and right["none", 65536] == 0


def test_onset_of_a_probe():
    heads = pd.DataFrame(
        {"layer": [0, 1], "head": [3, 2], "onset": [512.0, np.nan], "ratio": [9.0, 1.0], "retained": 0.5}
    )
    found = onset({"length": 4096, "verdict": "words"}, heads)
    assert found["length"] == 512 and found["left"] == 1 and found["worst"][0]["head"] == 3
    assert onset(None, None) is None


@pytest.mark.parametrize(
    "remedy", ["a-floor", pytest.param("token-filter+state-norm:every=64", marks=pytest.mark.slow)]
)
def test_the_lines_run(remedy, tmp_path, monkeypatch):
    """The lines of Python do what they say, but for the number of tokens."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "document.txt").write_text("import os\n")
    about = ABOUT | {"model": "demo", "foldable": ["a-floor"], "per_length": ["token-filter"]}
    python, command = lines(about, remedy, 1024)
    assert ("target_length=1024" in python) == ("token-filter" in remedy) and "max_new_tokens=200" in python
    assert command == f"rnn-longctx generate demo --mitigation {remedy} --prompt - < document.txt"
    names: dict[str, object] = {}
    exec(python.replace("max_new_tokens=200", "max_new_tokens=2"), names)
    assert names["new"].shape == (1, 2)
    assert (tmp_path / "mended" / "config.json").exists() == (remedy == "a-floor")


HOSTILE = "a b'c\"d \U0001f40d\n"  # a name with a character that JSON writes as two


def test_the_lines_say_how_the_model_was_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "document.txt").write_text("import os\n")
    save(load("demo"), tmp_path / HOSTILE)
    words = ["--tokenizer", "bytes", "--train-length", "1k", "--state-dtype", "float64", "--device", "cpu"]
    words += ["--dtype", "bfloat16"]
    about = ABOUT | {"model": HOSTILE, "options": words, "given_train_length": 1024}
    python, command = lines(about, None, None)
    assert shlex.split(command.removesuffix(" < document.txt"))[2:] == [HOSTILE, *words, "--prompt", "-"]
    names: dict[str, object] = {}
    exec(python.replace("max_new_tokens=200", "max_new_tokens=2"), names)
    model = names["model"]
    assert next(model.parameters()).dtype == torch.bfloat16 and model.state_dtype == torch.float64
    assert model.train_length == 1024 and model.tokenizer.name == "bytes" and names["new"].shape == (1, 2)
    odd = lines(ABOUT | {"model": "m", "options": ["--tokenizer", "my tokenizer"]}, "a-floor", None)
    assert "tokenizer='my tokenizer'" in odd[0] and "--tokenizer 'my tokenizer' --mitigation" in odd[1]
    commands = [shlex.split(command) for _, command in next_steps(ABOUT | {"model": HOSTILE, "text": HOSTILE})]
    assert f"model={HOSTILE}" in commands[0] and HOSTILE in commands[2]


@pytest.mark.parametrize("tokenizer", ["bytes", "my tokenizer"])
@pytest.mark.parametrize("train_length", [64, 512, 2048, 4096])
def test_the_next_step_is_a_training_that_begins(tokenizer, train_length):
    """With the model's own tokenizer, and with what the config has for 16K tokens cut to fewer."""
    (_, train), *_ = next_steps(ABOUT | {"tokenizer": tokenizer, "train_length": train_length})
    _, _, file, _, *settings = shlex.split(train)
    config = load_yaml(TrainConfig, ROOT / file, spelled_out(settings))
    assert config.data.tokenizer == tokenizer and config.init == "my model"
    assert config.longest == 8 * train_length == max(config.data.passkey.lengths)


def test_the_lines_of_a_model_of_another_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(adopted_families.COMMON, "vocab_size", 256)
    (tmp_path / "document.txt").write_text("import os\n")
    theirs = transformers.AutoModelForCausalLM.from_config(adopted_families.FAMILIES["mamba2"]())
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "its folder")
    words = ["--tokenizer", "bytes", "--state-dtype", "bfloat16", "--device", "cpu"]
    about = ABOUT | {"model": "its folder", "options": words, "adopted": True, "given_train_length": 64}
    for dtype in ("float32", "float64"):
        python, _ = lines(about | {"options": [*words, *(["--dtype", dtype] * (dtype != "float32"))]}, None, None)
        names: dict[str, object] = {}
        exec(python.replace("max_new_tokens=200", "max_new_tokens=2"), names)
        model = names["model"]
        assert next(model.parameters()).dtype == getattr(torch, dtype) and model.state_dtype == torch.bfloat16
        assert model.train_length == 64 and model.tokenizer.name == "bytes" and names["new"].shape == (1, 2)
