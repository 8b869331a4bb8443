"""Two folders of results or of comparisons side by side: cells that meet, what differs of them, and what surely
changed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from report_folders import FOLDERS

from rnn_longctx import cli
from rnn_longctx.errors import InputError
from rnn_longctx.eval.harness import run as harness
from rnn_longctx.eval.results import Results
from rnn_longctx.eval.show.runs import in_words
from rnn_longctx.eval.stats import crossed, paired_bootstrap
from rnn_longctx.eval.tables import compare, growth
from rnn_longctx.eval.tables.runs import Changes, compare_runs, read_run
from rnn_longctx.plain import csv_text

ROOT = Path(__file__).parents[3]

SHARED = {"model": "tiny", "weights_hash": "aaaa", "mitigation": "none", "task": "lm", "text": "t", "text_hash": "tt",
          "tokenizer": "bytes", "length": 512, "metric": "nats_per_token", "batch": 8, "dtype": "float32",
          "backend": "torch", "device": "cpu", "seed": 0, "train_length": 512, "version": "0.1.0"}  # fmt: skip


def cell(samples=(1.0, 1.1, 0.9, 1.0), **more):
    samples = [float(s) for s in samples]
    return SHARED | {"value": sum(samples) / len(samples), "n": len(samples), "samples": samples} | more


def folder(path, *cells, **about):
    store = Results(path)
    for row in cells:
        store.put(row)
    store.gather()
    if about:
        store.note_run(about)
    return path


@pytest.fixture
def changes(tmp_path):
    """changes(cells of A, cells of B) -> what changed."""

    def of(a, b) -> Changes:
        return compare_runs(read_run(folder(tmp_path / "a", *a)), read_run(folder(tmp_path / "b", *b)))

    return of


def only(changes: Changes) -> dict:
    assert len(changes.only_a) == len(changes.only_b) == 0
    (row,) = changes.cells.to_dict("records")
    return row


def test_cells_with_one_key_are_paired_by_slice(changes):
    hard = np.random.default_rng().normal(0, 1, 30)
    before, after = hard + 0.1, hard
    row = only(changes([cell(before, length=k) for k in (512,)], [cell(after)]))
    expected = paired_bootstrap(after, before)
    assert (row["change"], row["low"], row["high"], row["n"]) == tuple(expected)
    assert row["verdict"] == "better" and not row["differs"], "slices differ far more than the change"
    assert row["a"] == pytest.approx(before.mean()) and row["b"] == pytest.approx(after.mean())


@pytest.mark.parametrize(
    ("metric", "task", "step", "verdict"),
    [
        ("nats_per_token", "lm", 0.5, "worse"),
        ("nats_per_byte", "lm", -0.5, "better"),
        ("accuracy", "passkey", 0.5, "better"),
        ("accuracy", "passkey", -0.5, "worse"),
        ("score", "mine", 0.5, "higher"),
        ("score", "mine", -0.5, "lower"),
        ("score", "mine", 0.0, "same"),
    ],
)
def test_what_is_better_depends_on_the_metric(changes, metric, task, step, verdict):
    samples = np.random.default_rng().normal(1, 0.01, 12)
    what = {"metric": metric, "task": task}
    row = only(changes([cell(samples, **what)], [cell(samples + step, **what)]))
    assert row["verdict"] == verdict


def test_a_difference_that_its_noise_explains_is_unclear(changes):
    row = only(changes([cell([1.0, 2.0, 1.0, 2.0])], [cell([2.0, 1.0, 1.1, 2.0])]))
    assert row["verdict"] == "unclear" and row["low"] < 0 < row["high"]


def test_one_sample_has_no_interval(changes):
    row = only(changes([cell([1.0])], [cell([3.0])]))
    assert row["verdict"] == "one sample" and row["change"] == 2.0 and math.isnan(row["low"])


def test_a_loss_that_is_no_number_is_worse(changes):
    finite, nan = cell(), cell([math.nan] * 4, value=math.nan)
    assert only(changes([finite], [nan]))["verdict"] == "worse"
    assert only(changes([nan], [finite]))["verdict"] == "better"


def test_no_number_on_both_sides(changes):
    nan = cell([math.nan] * 4, value=math.nan)
    assert only(changes([nan], [nan | {"samples": [math.inf] * 4}]))["verdict"] == "no number"


def test_a_model_that_was_trained_again_meets_what_it_was(changes):
    """Also beside one that was not."""
    row = cell()
    found = changes([row, row | {"model": "other"}], [row | {"weights_hash": "bbbb"}, row | {"model": "other"}])
    assert len(found.cells) == 2 and found.only_a.empty and found.only_b.empty
    differs = dict(zip(found.cells["model"], found.cells["differs"]))
    assert differs == {"tiny": "weights_hash: aaaa to bbbb", "other": ""}


def test_another_model_or_remedy_is_set_against_it_where_each_has_one(changes):
    row, other = cell(), cell(model="large", weights_hash="cccc", mitigation="rri")
    found = only(changes([row], [other]))
    assert found["differs"] == "model: tiny to large; weights_hash: aaaa to cccc; mitigation: none to rri"


def test_remedies_of_folders_with_several_are_not_mixed_up(changes):
    found = changes([cell(), cell(mitigation="rri")], [cell(), cell(mitigation="state-norm")])
    assert found.cells["mitigation"].tolist() == ["none"]
    assert found.only_a["mitigation"].tolist() == ["rri"] and found.only_b["mitigation"].tolist() == ["state-norm"]


def test_what_names_two_cells_is_not_guessed(changes):
    found = changes([cell(batch=1), cell(batch=2)], [cell(batch=4)])
    assert found.cells.empty and len(found.only_a) == 2 and len(found.only_b) == 1


def test_lengths_of_one_run_alone_are_named(changes):
    found = changes([cell(), cell(length=1024)], [cell(), cell(length=2048)])
    assert found.only_a["length"].tolist() == [1024] and found.only_b["length"].tolist() == [2048]
    assert in_words(found).startswith("of 1 cell in both: ")


def test_another_text_is_not_paired(changes):
    row = only(changes([cell()], [cell([2.0, 2.1, 1.9, 2.0], text_hash="other")]))
    assert row["verdict"] == "not paired" and row["n"] == 0 and math.isnan(row["low"]) and row["change"] == 1.0
    assert row["differs"] == "text_hash: tt to other"


def test_other_numbers_of_slices_and_prompts(changes):
    """The first slices are the same tokens; of fewer than ten prompts the depths are others."""
    row = only(changes([cell([1, 2, 3, 4])], [cell([2, 3, 4.5])]))
    assert row["n"] == 3 and row["change"] == pytest.approx(3.5 / 3)


@pytest.mark.parametrize(("before", "n"), [(6, 0), (12, 12), (8, 8)])
def test_other_numbers_of_prompts(changes, before, n):
    what = {"metric": "accuracy", "task": "passkey"}
    after = 8 if before == 8 else 20
    row = only(changes([cell([1.0, 0.0] * (before // 2), **what)], [cell([1.0] * after, **what)]))
    assert row["n"] == n and (row["verdict"] == "not paired") == (n == 0)


def test_headers(tmp_path):
    about = {"device": "cpu", "versions": "torch 2.13"}
    a = folder(tmp_path / "a", cell(), command="rnn-longctx eval x --out a", **about)
    Results(a).note_run({"command": "rnn-longctx eval x --out a --task lm", **about})
    Results(a).note_run({"command": "rnn-longctx eval x --out a --task lm", **about})
    b = folder(tmp_path / "b", cell(version="0.2.0"), command="rnn-longctx eval y", **(about | {"versions": "torch 3"}))
    header = compare_runs(read_run(a), read_run(b)).header.set_index("what")
    assert set(header.index) == {"command", "versions", "version"}
    assert header.loc["command", "a"] == "rnn-longctx eval x --out a; rnn-longctx eval x --out a --task lm"
    assert tuple(header.loc["version"]) == ("0.1.0", "0.2.0")
    assert compare_runs(read_run(a), read_run(a)).header.empty


def test_a_folder_without_a_note_is_read_too(tmp_path):
    a, b = folder(tmp_path / "a", cell()), folder(tmp_path / "b", cell(), command="x")
    assert compare_runs(read_run(a), read_run(b)).header["what"].tolist() == ["command"]


def comparison(path, shift: float, outcome: str, steps: int):
    rows = []
    for seed, mean in ((0, 1.0), (1, 1.2)):
        row = dict.fromkeys(compare.COLUMNS) | {"entry": "gla", "mixer": "gla", "train_length": 512, "task": "lm"}
        row |= {"metric": "loss", "mitigation": "none", "text": "t", "length": 512, "seed": seed, "note": ""}
        samples = [mean + shift + 0.1 * i + 0.01 * shift * i * (seed + 1) for i in range(5)]
        rows.append(row | {"value": float(np.mean(samples)), "samples": samples, "seeds": 1})
    rows.append(rows[0] | {"seed": None, "seeds": 2, "samples": None, "value": 1.1 + shift})
    verdict = {"metric": "verdict", "task": outcome.split()[0], "note": outcome, "value": math.nan, "seed": None}
    rows.append(rows[0] | verdict | {"samples": None, "length": None if outcome.startswith("holds") else 4096})
    frame = pd.DataFrame(rows, columns=list(compare.COLUMNS))
    path.mkdir()
    compare.write(frame.astype(dict.fromkeys(compare.INTS, "Int64")), path)
    (path / "study.yaml").write_text(yaml.safe_dump({"train": {"steps": steps}, "entries": [{"name": "gla"}]}))
    return path


def test_comparisons_over_seeds_and_their_verdicts(tmp_path):
    a = comparison(tmp_path / "a", 0.0, "holds up to 4K", 100)
    b = comparison(tmp_path / "b", 0.5, "collapses at 4K", 200)
    changes = compare_runs(read_run(a), read_run(b))
    assert changes.only_a.empty and changes.only_b.empty
    by_metric = {row["metric"]: row for row in changes.cells.to_dict("records")}
    loss = by_metric["loss"]
    expected = crossed([[0.5 + 0.005 * i * (seed + 1) for i in range(5)] for seed in (0, 1)])
    assert loss["change"] == pytest.approx(expected.value) and loss["low"] == pytest.approx(expected.low)
    assert loss["verdict"] == "worse" and loss["model"] == "gla"
    said = by_metric["verdict"]
    assert (said["a"], said["b"], said["verdict"]) == ("holds up to 4K", "collapses at 4K", "changed")
    assert changes.header.to_dict("records") == [{"what": "train.steps", "a": "100", "b": "200"}]
    assert compare_runs(read_run(a), read_run(a)).count("same") == 2
    results = read_run(folder(tmp_path / "r", cell()))
    with pytest.raises(InputError, match="no cells in common"):
        compare_runs(read_run(a), results)


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rnn-longctx", "compare-runs", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return stopped.value.code, *capsys.readouterr()

    return call


def test_on_the_command_line(run, tmp_path):
    a = folder(tmp_path / "a", cell(), cell(length=1024), cell(length=2048, tokens_per_second=10.0))
    slower = cell([2.0, 2.1, 1.9, 2.05], length=2048, weights_hash="bbbb", tokens_per_second=5.0)
    b = folder(tmp_path / "b", cell(), slower)
    code, printed, said = run(a, b)
    assert code == 0 and not said
    assert "+1.0125" in printed and "weights_hash: aaaa to bbbb" in printed and "0.50 x" in printed
    assert "only in A: 1 cell" in printed and "only in B" not in printed
    assert printed.endswith("of 2 cells in both: 1 worse; 1 the same to the last digit\n")
    document = json.loads(run(a, b, "--json")[1])
    cells = document["tables"]["cells"]
    assert [row["verdict"] for row in cells] == ["same", "worse"] and cells[1]["speed"] == 0.5
    assert document["summary"].startswith("of 2 cells in both") and len(document["tables"]["only_a"]) == 1


def test_mistakes_are_one_line(run, tmp_path):
    a = folder(tmp_path / "a", cell())
    code, printed, said = run(a, tmp_path / "nowhere")
    assert code == 2 and not printed and "there is no folder" in said and said.count("\n") == 1
    (a / "runs.jsonl").write_text("not json\n")
    code, _, said = run(a, a)
    assert code == 2 and "cannot read" in said and "runs.jsonl" in said and said.count("\n") == 1


def test_growth_is_set_side_by_side_one_measurement_each(tmp_path):
    frame = pd.read_csv(ROOT / "benchmarks" / "results" / "growth_cpu.csv", keep_default_na=True)
    for name, factor in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        slower = frame.assign(note=frame["note"].fillna(""), seconds=frame["seconds"] * factor)
        growth.write(slower, tmp_path / name)
    changes = compare_runs(read_run(tmp_path / "a"), read_run(tmp_path / "b"))
    assert changes.only_a.empty and changes.only_b.empty and changes.header.empty
    seconds = changes.cells[changes.cells["metric"] == "seconds"]
    assert len(seconds) == frame["seconds"].notna().sum() and set(seconds["verdict"]) == {"one sample"}
    assert np.allclose(seconds["b"] / seconds["a"], 2)
    assert set(changes.cells[changes.cells["metric"] != "seconds"]["verdict"]) == {"same"}


def test_lm_eval_is_set_side_by_side_without_intervals(tmp_path):
    row = dict.fromkeys(harness.COLUMNS) | {"task": "lambada", "length": 4096, "metric": "acc", "model": "tiny"}
    row |= {"value": 0.5, "weights_hash": "0123", "mitigation": "none", "dtype": "float32", "seed": 0, "n": 20}
    for name, value in (("a", 0.5), ("b", 0.75)):
        (tmp_path / name).mkdir()
        rows = [row | {"value": value}, row | {"task": "wikitext", "length": None, "metric": "word_perplexity"}]
        (tmp_path / name / "lm_eval.csv").write_text(csv_text(pd.DataFrame(rows)))
    changes = compare_runs(read_run(tmp_path / "a"), read_run(tmp_path / "b"))
    assert changes.cells["task"].tolist() == ["lambada", "wikitext"] and set(changes.cells["verdict"]) == {"not paired"}
    assert changes.cells["change"].tolist() == [0.25, 0.0]
    (tmp_path / "a" / "lm_eval.csv").write_text("no,table\n1,2\n")
    with pytest.raises(InputError, match=r"cannot read .*lm_eval\.csv"):
        read_run(tmp_path / "a")


@pytest.mark.parametrize("kind", ["probe", "train"])
def test_folders_that_are_not_read_are_refused_with_those_that_are(kind, tmp_path):
    with pytest.raises(InputError, match=r"compare-runs reads folders that eval .* compare .* or lm-eval"):
        read_run(FOLDERS[kind](tmp_path / kind))


def test_chance_is_said_of_many_cells(changes):
    rng = np.random.default_rng()
    lengths = range(100, 140)
    found = changes(*([cell(rng.normal(1, 1, 8), length=n) for n in lengths] for _ in "ab"))
    assert "Of 40 that had not changed, about 2 would be called changed by chance" in in_words(found)


def test_it_loads_no_torch(tmp_path):
    a = folder(tmp_path / "a", cell())
    code = f"import sys; sys.argv = ['rnn-longctx', 'compare-runs', {str(a)!r}, {str(a)!r}, '--quiet']\n"
    code += "from rnn_longctx.cli import app; app(standalone_mode=False); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
