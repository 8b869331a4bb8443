"""Pages without a browser: small enough whatever the tables hold, whole, and of the kind that the folder is."""

from __future__ import annotations

import json
import math
import shlex

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from report_folders import FOLDERS, eval_folder, monitor_line, monitor_log, probe_folder
from typer.testing import CliRunner

from rnn_longctx.cli.program import app
from rnn_longctx.errors import InputError
from rnn_longctx.eval.results import Results
from rnn_longctx.eval.show.page import figures
from rnn_longctx.eval.show.page.kinds import monitor
from rnn_longctx.eval.show.page.page import LIMIT, Renderer, rendered, shown, spread, thinned, write_page
from rnn_longctx.eval.show.page.parts import KINDS, Figure, Page, Section, Table, page_of
from rnn_longctx.mitigations import parse_remedy, standard


def all_figures(page: Page) -> list[Figure]:
    return [part for section in page.sections for part in section.parts if isinstance(part, Figure)]


@pytest.mark.parametrize("kind", sorted(FOLDERS))
def test_every_kind_of_folder_has_its_page(kind, tmp_path):
    path = FOLDERS[kind](tmp_path / kind)
    fitting = [k for k in KINDS.values() if k.fits(path)]
    assert [k.name for k in fitting if not any(k.name in other.over for other in fitting)] == [kind]
    page = page_of(path)
    assert page.verdict and all(line.endswith(".") for line in page.verdict)
    for figure in all_figures(page):
        assert len(figure.alternative) > 20 and any(c.isdigit() for c in figure.alternative), figure.title
        assert len(figure.frame), figure.title
        places = {place for switch in figure.switches for place in switch.traces}
        assert places <= set(range(len(figure.plot.data)))
    text = rendered(page)
    assert len(text.encode()) < 6_000_000 and text.count("<figure") == len(all_figures(page))
    assert 'http-equiv="Content-Security-Policy" content="default-src &#x27;none&#x27;' in text


def test_pages_say_what_the_tables_say(tmp_path):
    page = page_of(eval_folder(tmp_path / "eval"))
    assert any("collapses at 4K" in line for line in page.verdict) and any(
        "state-norm" in line for line in page.verdict
    )
    loss = all_figures(page)[0]
    rows = loss.frame.set_index(["mitigation", "length"])["value"]
    assert f"{rows['state-norm', 16384]:.3f} with state-norm" in loss.alternative
    assert (
        page.header["training length"] == "256"
        and "--mitigation state-norm" in page.header["a command that asks the same"]
    )
    page = page_of(probe_folder(tmp_path / "probe"))
    maps = all_figures(page)[0]
    assert maps.slider is not None and "1 of 12 heads" in maps.slider.steps[-1].words
    assert "layer 1 head 2, 32 times" in maps.slider.steps[-1].words and "0 of 12" in maps.slider.steps[0].words
    page = page_of(monitor_log(tmp_path / "m.jsonl", reports=90))
    assert page.verdict[0] == "Of 90 reports: 30 ok (33%), 30 warning (33%), 30 collapsed (33%)."
    assert any("First collapsed at 15,616 tokens" in line for line in page.verdict)


def with_names(folder, **names: str):
    """Rename tasks and texts of a folder's table."""
    table = folder / "results.parquet"
    frame = pd.read_parquet(table)
    for column, name in names.items():
        frame[column] = frame[column].replace({"passkey": name, "stdlib": name, "state-norm": name})
    frame.to_parquet(table, index=False)
    return folder


@pytest.mark.parametrize(
    "names",
    [
        {"task": "qa-q"},
        {"task": "multikey4"},
        {"text": "dir:letters"},
        {"mitigation": "my remedy.yaml"},
        {"mitigation": 'it\'s "mine"; ls'},
        {"mitigation": "état"},
    ],
)
def test_a_command_that_would_not_run_is_left_out(names, tmp_path):
    header = page_of(with_names(eval_folder(tmp_path / "eval"), **names)).header
    assert "a command that asks the same" not in header
    assert not any("rnn-longctx eval" in text for text in header.values())


def test_a_command_names_every_remedy_as_it_writes_itself(tmp_path):
    for i, remedy in enumerate(
        [*standard(256), "rri:alpha=0.998047,beta=1", "a-floor+state-norm:every=64", "a-scale:scale=0.0625/1/1/1"]
    ):
        remedy = str(parse_remedy(remedy))
        header = page_of(with_names(eval_folder(tmp_path / str(i)), mitigation=remedy)).header
        words = shlex.split(header["a command that asks the same"])
        assert words[words.index("--mitigation") :].count(remedy) == 1


def test_the_command_is_the_one_that_ran(tmp_path):
    folder = with_names(eval_folder(tmp_path / "eval"), task="qa-q", text="dir:letters")
    asked = "rnn-longctx eval small --task qa:file=q.jsonl --text 'my letters' --out run"
    store = Results(folder)
    store.note_run({"command": asked})
    assert page_of(folder).header["measured by"] == asked
    for command in ("measure.py", "rnn-longctx eval demo; other", "rnn-longctx eval 'demo", asked):
        store.note_run({"command": command, "device": "cpu"})
    with (folder / "runs.jsonl").open("a") as file:
        file.write('no json\n[]\n{"command": 1}\n{}\n')
    assert page_of(folder).header["measured by"] == asked, "the others are none, or more than one"
    for n in range(5):
        store.note_run({"command": f"rnn-longctx eval small --lengths {n}k"})
    header = page_of(folder).header
    assert header["measured by (the last of 6)"] == "rnn-longctx eval small --lengths 4k"
    assert not any("asks the same" in name for name in header)


def without(frame: pd.DataFrame, what: str) -> pd.DataFrame:
    """A table of results that lacks something that most have."""
    losses = frame["metric"] == "nats_per_token"
    if what == "training length":
        return frame.assign(train_length=None)
    if what == "lengths":
        return frame[frame["length"] == 1024]
    if what == "remedies":
        return frame[frame["mitigation"] == "none"]
    if what == "losses":
        return frame[~losses]
    if what == "answers":
        return frame[losses]
    if what == "numbers":
        bad = losses & (frame["length"] > 1024) & (frame["mitigation"] == "none")
        samples = [[math.nan] * 6 if is_bad else some for is_bad, some in zip(bad, frame["samples"])]
        return frame.assign(value=frame["value"].mask(bad), stderr=frame["stderr"].mask(bad), samples=samples)
    assert what == "rows"
    return frame.iloc[:0]


@pytest.mark.parametrize("what", ["training length", "lengths", "remedies", "losses", "answers", "numbers", "rows"])
def test_a_table_that_lacks_something_has_a_page(what, tmp_path):
    path = eval_folder(tmp_path / "eval")
    table = path / "results.parquet"
    without(pd.read_parquet(table), what).to_parquet(table, index=False)
    page = page_of(path)
    assert page.verdict and Renderer(100).page(page)


def test_runs_that_have_just_begun_have_a_page(tmp_path):
    (tmp_path / "log.csv").write_text("step,tokens,loss\n")
    assert page_of(tmp_path).verdict == ["Nothing is logged yet."]
    (tmp_path / "log.csv").write_text("step,tokens,loss,seconds\n1,2,nan,1\n2,4,3.0,2\n3,6,2")
    page = page_of(tmp_path)
    assert page.header["steps"] == "2" and "1 row of the log" in page.verdict[1] and Renderer(100).page(page)


EVAL, ONLINE = "step,length,loss\n", "update,decision,train_loss\n"


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("log.csv", "tokens,loss\n9,3.5\n", "it has no column step"),
        ("log.csv", "step,tokens,loss\nfirst,9,3.5\n", "first in its column step is no number"),
        ("log.csv", "step,tokens,loss\n1,many,3.5\n", "many in its column tokens is no number"),
        ("log.csv", "step,tokens,loss\n1,9,high\n2,9,3.0\n", "high in its column loss is no number"),
        ("log.csv", "step,tokens,loss\n,9,2.0\n", "its column step has rows without a number"),
        ("eval.csv", "step,loss\n1,3.5\n", "it has no column length"),
        ("eval.csv", "length,loss\n1,3.5\n", "it has no column step"),
        ("eval.csv", "step,length\n1,512\n", "it has no column loss"),
        ("eval.csv", f"{EVAL}1,512.5,3.5\n", "its column length has rows without a whole number above 0"),
        ("eval.csv", f"{EVAL}1,inf,3.5\n", "its column length has rows without a number"),
        ("eval.csv", f"{EVAL}1,512,high\n", "high in its column loss is no number"),
        ("online.csv", "update,train_loss\n1,3.5\n", "it has no column decision"),
        ("online.csv", "decision,train_loss\nkept,3.5\n", "it has no column update"),
        ("online.csv", f"{ONLINE}1,kept,high\n", "high in its column train_loss is no number"),
    ],
)
def test_a_log_that_lacks_a_column_or_its_numbers_is_one_line(name, text, said, tmp_path):
    (tmp_path / "log.csv").write_text("step,tokens,loss\n1,2,3.5\n")
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as refused:
        page_of(tmp_path)
    assert str(refused.value) == f"cannot read {tmp_path / name}: {said}"


def test_logs_without_tokens_and_with_lengths_as_fractions_have_a_page(tmp_path):
    """A retrofit's log has no tokens; a table that was saved by another program may say 512.0."""
    (tmp_path / "log.csv").write_text("step,length,loss\n1,512,3.5\n2,512,3.0\n")
    (tmp_path / "eval.csv").write_text(f"{EVAL}2,512.0,3.1\n")
    page = page_of(tmp_path)
    assert page.header["steps"] == "2" and "tokens" not in page.header and Renderer(100).page(page)
    assert page.verdict[1] == "On held-out text at step 2: 512 loss 3.100."


def test_the_command_writes_one_file(tmp_path):
    folder = eval_folder(tmp_path / "run")
    elsewhere = tmp_path / "x" / "y.html"
    for arguments, written in (([], folder / "report.html"), (["--out", str(elsewhere)], elsewhere)):
        result = CliRunner().invoke(app, ["report", str(folder), *arguments])
        said = f"{written.parent}: {written.name}"
        assert result.exit_code == 0 and result.output.strip() == said and written.stat().st_size > 10**6
    log = monitor_log(tmp_path / "log.jsonl")
    result = CliRunner().invoke(app, ["report", str(log)])
    assert result.exit_code == 0 and (tmp_path / "log.html").exists()


def test_what_is_no_folder_of_results_is_refused(tmp_path):
    with pytest.raises(InputError, match="there is no"):
        page_of(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"nothing that a report can be made of: it knows folders of .*capacity.*eval"):
        page_of(tmp_path)
    (tmp_path / "empty.jsonl").write_text("not json\n")
    with pytest.raises(InputError, match="holds no report"):
        page_of(tmp_path / "empty.jsonl")
    broken = probe_folder(tmp_path / "probe")
    (broken / "probe.json").write_text("{")
    with pytest.raises(InputError, match="cannot read the probe"):
        page_of(broken)


@pytest.mark.parametrize("what", ["line", "maps", "table", "figures"])
def test_a_page_is_below_six_megabytes_whatever_it_holds(what):
    rng = np.random.default_rng()
    frame, parts = pd.DataFrame({"x": [1]}), []
    if what == "line":
        y = rng.normal(size=200_000)
        y[123_456] = 99.0
        parts = [Figure("f", go.Figure(go.Scatter(x=np.arange(200_000), y=y)), "a", pd.DataFrame({"y": y}))]
    elif what == "maps":
        parts = [Figure(f"{i}", go.Figure(go.Heatmap(z=rng.normal(size=(150, 150)))), "a", frame) for i in range(9)]
    elif what == "table":
        parts = [Table("t", pd.DataFrame({f"c{i}": ["x" * 1500] * 4000 for i in range(4)}))]
    else:
        line = go.Figure(go.Scatter(x=list(range(100)), y=rng.normal(size=100).tolist()))
        parts = [Figure(f"figure {i}", line, "words", pd.DataFrame({"y": range(100)})) for i in range(400)]
    text = rendered(Page("large", ["v"], {}, [Section("s", parts)]))
    assert len(text.encode()) <= LIMIT < 6_000_000
    if what == "line":
        assert "99.0" in text.partition('id="data"')[2], "the peak is still there"
    if what == "maps":
        assert "left out of a page that is too large" in text and text.count("<figure") > 0


def test_a_thinned_line_keeps_its_ends_and_peaks():
    rng = np.random.default_rng()
    y = rng.normal(size=5000).tolist()
    peak, low = (int(i) for i in rng.choice(4998, 2, replace=False) + 1)
    y[peak], y[low] = 50.0, -50.0
    y[0] = math.nan
    trace = thinned({"x": list(range(5000)), "y": y, "customdata": [str(i) for i in range(5000)], "name": "n"}, 100)
    assert len(trace["x"]) == len(trace["y"]) == len(trace["customdata"]) <= 100
    assert {0, 4999, peak, low} <= set(trace["x"]) and trace["x"] == sorted(trace["x"])
    assert all(str(x) == c for x, c in zip(trace["x"], trace["customdata"]))
    assert spread(10, 20) == list(range(10)) and spread(1000, 3) == [0, 500, 999]


def test_numbers_are_shown_to_four_digits():
    assert [shown(v) for v in (1.23456, 123456, 16370.2, None, math.nan, True, np.float64(0.1), "x")] == [
        *("1.235", "123,456", "16,370", "", "", "yes", "0.1", "x"),
    ]  # fmt: skip


def test_axes_of_lengths_say_k_and_m():
    axis = figures.lengths_axis([512, 4096, 2**20])
    assert axis["ticktext"] == ["512", "4K", "1M"] and axis["tickvals"] == [512, 4096, 2**20]
    axis = figures.lengths_axis([2**k for k in range(7, 21)])
    assert len(axis["ticktext"]) <= figures.TICKS and axis["ticktext"][-1] == "1M"


def test_a_log_of_two_streams_and_lines_that_are_no_reports():
    lines = [monitor_line(k) for k in range(3)] + ["", "[1]", '{"position": 1}', "{", monitor_line(0)]
    table, unread = monitor.reports(lines)
    assert table["stream"].tolist() == [1, 1, 1, 2] and unread == 3
    infinite = json.dumps({"position": 1, "status": "collapsed", "heads": [[0, 0, None]], "worst": None, "shift": None})
    assert monitor.report(infinite)["heads"] == [(0, 0, math.inf)]
    strange = json.dumps({"position": 1, "status": "ok", "heads": [[0, 0, "x"]]})
    for line in ("[" * 10**5, '{"position": 1e999, "status": "ok"}', strange):
        assert monitor.report(line) is None
    page = Page("m", monitor.verdict(table), {}, [Section("s", monitor.drawn(table))])
    assert Renderer(100).page(page)


@pytest.mark.parametrize(
    "name, digits", [("worst", 400), ("outside", 400), ("shift", 400), ("position", 400), ("position", 20)]
)
def test_numbers_that_no_monitor_writes_are_counted_as_no_report(name, digits, tmp_path):
    """JSON has whole numbers of any length, and a float or a table has not."""
    strange = json.dumps(json.loads(monitor_line(1)) | {name: 10**digits})
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join([monitor_line(0).strip(), strange, monitor_line(2)]))
    page = page_of(log)
    assert page.header["reports"] == "2" and page.header["lines that are no report"] == "1"
    assert Renderer(100).page(page)
    log.write_text(strange)
    with pytest.raises(InputError, match="holds no report"):
        page_of(log)


@pytest.mark.parametrize("some", [True, False])
def test_a_ratio_that_is_not_finite_has_its_mark_at_the_top(some, tmp_path):
    """The journal writes null for it: it is the worst collapse of all."""
    lines = [json.loads(monitor_line(k, 9)) for k in (range(9) if some else (8,))]
    lines[-1] |= {"worst": None, "heads": [[1, 2, None]]}
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(json.dumps(line) for line in lines))
    page = page_of(log)
    norm = all_figures(page)[0]
    mark = next(trace for trace in norm.plot.data if trace.name == "collapsed")
    assert mark.y[-1] > max((line["worst"] for line in lines[:-1]), default=1)
    assert mark.customdata[-1] == "stream 1, 2,304: not finite" and mark.hovertemplate == "%{customdata}"
    assert "not finite in 1 report, whose marks are at the top" in norm.alternative
    assert ("elsewhere it is at most 1.2" in norm.alternative) is some
    assert any("the furthest not finite." in line for line in page.verdict) is not some
    events = page.sections[1].parts[0].frame
    assert (events["worst"].iloc[-1] == "not finite") is not some  # (it begins no status, where there are some before)
    assert page.sections[-1].parts[0].frame["worst"].iloc[-1] == "not finite" and Renderer(100).page(page)


def test_a_page_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_page(Page("t", ["v"], {}, []), tmp_path / "file" / "page.html")
