"""A pilot of a tiny model: what it writes, and how it goes on."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from piloted import begun, files, questions

from rnn_longctx.data import Text
from rnn_longctx.errors import InputError
from rnn_longctx.eval.pilot.steps import Sizes
from rnn_longctx.eval.pilot.write import write_pilot
from rnn_longctx.tasks.passkey import Passkey

SIZES = Sizes((32, 64, 128), (32, 64, 128, 256), (32, 64, 128, 256), 2, 2, 3, 3)


def test_a_whole_pilot_and_nothing_of_the_text_in_it(model, document, tmp_path):
    said = []
    task = questions(tmp_path)
    pilot = begun(model, document, tmp_path / "out", say=said.append, tasks=(task,), price=60.0, lengths=(32, 128, 256))
    _, estimate = pilot.estimate()
    pilot.measure(SIZES)
    content, advice = write_pilot(pilot, estimate)
    written = files(tmp_path / "out")
    assert {"results.csv", "results.parquet", "pilot.json", "report.html"} <= {path.name for path in written}
    for path, data in written.items():
        assert b"Wexcombe" not in data and b"heron" not in data, path
    assert content == json.loads((tmp_path / "out" / "pilot.json").read_text())
    assert content["estimate"]["price"] == pytest.approx(content["estimate"]["seconds"] / 60)
    rows = pd.read_csv(tmp_path / "out" / "results.csv")
    bare = rows[(rows.mitigation == "none") & (rows.metric == "nats_per_token")]
    assert set(bare.length) == {32, 64, 128, 256} and content["collapse"]["lengths"][-1]["length"] == 256
    assert {"a-floor", "window:tokens=64", "recompute:last=64", "reset:every=64,overlap=32"} <= set(rows.mitigation)
    assert {"qa-q", "qa-q-without-document"} <= set(rows.task) and "answer_nats_per_token" in set(rows.metric)
    assert content["compared"]["length"] == 256 and content["screened"]["length"] == 128
    assert len(content["screened"]["rows"]) > len(content["compared"]["rows"]) > 3
    assert content["onset"]["heads"] == 8 and content["text"]["documents"] == 10
    assert "qa-q" in content["above_without_document"] and advice.words
    assert not content["not_measured"] and all("predicted" in step for step in content["steps"].values())
    assert any("3 slices" in step for step in content["steps"])  # the best again, on more text
    page = (tmp_path / "out" / "report.html").read_text()
    assert advice.words[0][:30] in page and "Where and how often it collapses" in page


def test_text_is_shown_where_the_person_wants_it(model, document, tmp_path):
    pilot = begun(model, document, tmp_path / "out", tasks=(questions(tmp_path),), with_text=True)
    _, estimate = pilot.estimate()
    _, advice = write_pilot(pilot, estimate)  # of nothing, too
    assert advice.kind == "undecided" and advice.python == ""
    assert "Wexcombe" in (tmp_path / "out" / "pilot.json").read_text()
    assert "Wexcombe" in (tmp_path / "out" / "report.html").read_text()


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.mark.parametrize("at", [1, 12])
def test_a_killed_pilot_repeats_nothing(model, document, tmp_path, at):
    out, first, second = tmp_path / "out", [], []

    def say(line):
        first.append(line)
        if len(first) > at:
            raise Killed

    pilot = begun(model, document, out, say=say, tasks=(Passkey(),), lengths=(32, 64, 256))
    with pytest.raises(Killed):
        pilot.estimate()
        pilot.measure(SIZES_OF_FIVE)
    before = files(out / "cells")
    spent = json.loads((out / "pilot_state.json").read_text())["spent"]
    again = begun(model, document, out, say=second.append, tasks=(Passkey(),), lengths=(32, 64, 256))
    assert again.ledger.before == spent > 0
    again.estimate()
    again.measure(SIZES_OF_FIVE)
    assert {path: files(out / "cells")[path] for path in before} == before
    done, more = (
        [line.split("] ")[1].split(", about")[0] for line in lines if "] " in line] for lines in (first, second)
    )
    assert not set(done[:-1]) & set(more) and done[-1] == more[0]
    assert f"{len(before)} cells had been measured before" in second[-1]
    third = []
    begun(model, document, out, say=third.append, tasks=(Passkey(),), lengths=(32, 64, 256)).measure(SIZES_OF_FIVE)
    assert [line for line in third if "] " in line] == []


SIZES_OF_FIVE = Sizes((32, 64, 256), (32, 64, 256), (32, 64, 256), 2, 3, 2, 3)


def test_another_text_begins_anew(model, document, tmp_path):
    first = begun(model, document, tmp_path / "out")
    first.estimate()
    other = begun(model, Text("dir:letters", document.data[::-1]), tmp_path / "out")
    assert other.ledger.before == 0 and other.frame().empty and not other.ledger.steps


def test_texts_and_models_that_cannot_be_piloted(model, document, tmp_path):
    short = Text("file:short.txt", document.data[:200])
    with pytest.raises(InputError, match=r"text file:short.txt has 200 tokens; .* two stretches of 128 tokens: .* 258"):
        begun(model, short, tmp_path / "out")
    with pytest.raises(InputError, match="reads 8K tokens: give it at least 8193"):
        begun(model, document, tmp_path / "out", lengths=(8192,))
    with pytest.raises(InputError, match="--lengths: a pilot asks what happens beyond the training length, 64"):
        begun(model, document, tmp_path / "out", lengths=(32, 64))
    with pytest.raises(InputError, match=r"passkey: not every prompt fits into 65 tokens: .* takes at least"):
        begun(model, document, tmp_path / "out", lengths=(65,), tasks=(Passkey(),))
    with pytest.raises(InputError, match="does not say its training length: give --train-length"):
        model.train_length = None
        begun(model, document, tmp_path / "out")


def test_a_model_without_a_recurrence_is_told_what_can_be_done(document, tmp_path):
    from rnn_longctx.models.config import ModelConfig
    from rnn_longctx.models.lm import LM

    attention = LM(ModelConfig(mixer="full-attention:heads=2", d_model=32, n_layer=1)).eval()
    attention.train_length, attention.name = 64, "attention"
    with pytest.raises(InputError, match=r"attention has no recurrent layer.*rnn-longctx eval.*rnn-longctx retrofit"):
        begun(attention, document, tmp_path / "out")


def test_the_report_of_hostile_names(model, document, tmp_path):
    name = "dir:<script>alert(1)</script> [red]\x1b[31m"
    pilot = begun(model, Text(name, document.data), tmp_path / "out")
    _, estimate = pilot.estimate()
    write_pilot(pilot, estimate)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>alert(1)" not in page and "\x1b" not in page
