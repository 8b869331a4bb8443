"""The most pairs that the bits of a state hold: exact numbers, and where they stand in tables and figures."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd
import torch
from typer.testing import CliRunner

from rnn_longctx import cli
from rnn_longctx.eval.capacity import bound, models, tables
from rnn_longctx.eval.capacity.figures import growth, mqar
from rnn_longctx.eval.results import COLUMNS, to_frame
from rnn_longctx.models.state_size import StateSize


def model(size, vocab_size=256, dtype=torch.float32):
    return SimpleNamespace(state_size=lambda: size, vocab_size=vocab_size, dtype=dtype)


def test_bits_of_the_state_over_bits_of_a_pair():
    assert bound.most_pairs(1000, 256) == 4000  # 32,000 bits, 8 a pair
    assert bound.most_pairs(1000, 256, 16) == 2000
    assert bound.most_pairs(1000, 2) == 32_000
    assert bound.most_pairs(1, 2**33) == 0, "a pair takes more bits than there are"
    assert bound.most_pairs(100, 1000) == 321  # 3,200 over 9.9658
    assert bound.most_pairs(1000, 1) is None


def test_of_a_model():
    size = StateSize({"scan": 900, "conv": 100})
    assert bound.of_model(model(size)) == 4000
    assert bound.of_model(model(size, dtype=torch.float64)) == 8000
    assert bound.of_model(model(size, dtype=torch.bfloat16)) == 4000  # its scan keeps float32
    assert bound.of_model(model(size, 512), "mqar") == 4000  # half of the ids are values
    assert bound.of_model(model(size, 512), "forgetting-mqar") == 4000
    assert bound.of_model(model(StateSize({"scan": 900}, windows={10: 6, 4: 10}))) == 4000, "full windows"
    assert bound.of_model(model(StateSize({"scan": 900}, per_token=2))) is None, "no bound: it grows with the length"


def line(name, **more):
    about = {"model": name, "weights_hash": "0", "shape": "s", "task": "text", "state_elements": 1000, "n_layer": 2}
    return dict.fromkeys(models.COLUMNS) | about | {bound.COLUMN: 4000} | more


def test_it_stands_in_tables_and_figures():
    found = pd.DataFrame([
        line("a", state_elements=s, most_pairs=4 * s) | {
            "mitigation": "none", "quantity": "T_recall", "shape": f"s{s}", "passes": 2048, "fails": 4096,
            "text": "2K", "train_seed": 0, "train_length": 512,
        } for s in (1000, 2000)
    ])  # fmt: skip
    points = tables.points(found)
    assert points[bound.COLUMN].tolist() == [4000, 8000]
    near, far = growth(points, "T_recall", "none").axes
    (drawn,) = [curve for curve in far.lines if str(curve.get_label()).startswith(bound.LABEL)]
    assert list(drawn.get_ydata()) == [4000 / 1024, 8000 / 1024] and drawn.get_label().endswith(
        "in K pairs, not tokens"
    )
    assert far.get_ylim()[1] > 8000 / 1024, "the line is in the picture"
    assert not any(str(curve.get_label()).startswith(bound.LABEL) for curve in near.lines)
    answers = pd.DataFrame(
        [line("a", task="mqar") | {"pairs": n, "value": 0.5, "low": 0.4, "high": 0.6} for n in (4, 8)]
    )
    assert mqar(answers).axes[0].get_title(loc="left").endswith("at most 4K pairs*")
    _, far = growth(points.assign(most_pairs=pd.NA), "T_recall", "none").axes
    assert not any(str(curve.get_label()).startswith(bound.LABEL) for curve in far.lines), "it is not known"


def test_a_table_without_the_column_is_read(tmp_path):
    frame = pd.DataFrame([line("a")]).drop(columns=bound.COLUMN)
    frame.to_csv(tmp_path / "models.csv", index=False)
    assert models.read(tmp_path)[bound.COLUMN].isna().all()
    pd.DataFrame([line("a")]).to_csv(tmp_path / "models.csv", index=False)
    assert models.read(tmp_path)[bound.COLUMN].tolist() == [4000]


def measured(folder, *names):
    """A folder with the losses of models of one shape, without a remedy and with one."""
    rows = [
        dict.fromkeys(COLUMNS) | {
            "model": name, "weights_hash": "0", "mitigation": remedy, "task": "lm", "text": "t", "length": length,
            "metric": metric, "batch": 1, "dtype": "float32", "backend": "torch", "device": "cpu", "seed": 0,
            "tokenizer": "bytes", "value": 1.0, "stderr": 0.1, "n": 2, "samples": [1.0, 1.0], "train_length": 512,
        }
        for name in names for remedy in ("none", "window:tokens=64")
        for metric in ("nats_per_token", "nats_per_token_peak") for length in (512, 1024)
    ]  # fmt: skip
    to_frame(rows).to_parquet(folder / "results.parquet")
    pd.DataFrame([line(name) for name in names]).to_csv(folder / "models.csv", index=False)


def test_it_is_of_a_model_without_a_remedy(tmp_path):
    """A window carries its inputs beside the state."""
    measured(tmp_path, "a")
    lines = tables.findings(*tables.read(tmp_path), 0.95).set_index("mitigation")
    assert lines.loc["none", bound.COLUMN] == 4000 and pd.isna(lines.loc["window:tokens=64", bound.COLUMN])


def test_the_command_says_what_it_is_where_it_prints_it(tmp_path, monkeypatch):
    """Of a family; single checkpoints have lines of their own, without it."""
    points = tmp_path / "points.csv"
    monkeypatch.setattr("rnn_longctx.eval.capacity.draw", lambda *what: [points])
    shown = ["shape", "state_elements", "mitigation", "quantity", "train_length", "models", "text"]
    pd.DataFrame([dict.fromkeys(shown) | {"shape": "s", bound.COLUMN: 4000}]).to_csv(points, index=False)
    for names in (("a", "b"), ("a",)):
        measured(tmp_path, *names)
        printed = CliRunner().invoke(cli.app, ["capacity", "plot", str(tmp_path)]).output
        assert (bound.WORDS in printed) == (" 4000 " in printed) == (len(names) == 2), printed
