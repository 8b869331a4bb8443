"""The ranking of remedies against their controls."""

import numpy as np
import pandas as pd
import pytest
import torch
from evaluated import make_model

from rnn_longctx.data import Text
from rnn_longctx.eval import evaluate
from rnn_longctx.eval.show.ranking import board_tables
from rnn_longctx.eval.tables.leaderboard import leaderboard

TEXT = Text("made", bytes(torch.randint(32, 127, (9000,), generator=torch.Generator().manual_seed(1)).tolist()))


def test_leaderboard():
    """Loss surely below every control's, recall surely above theirs, and the rest."""
    rng, rows = np.random.default_rng(0), []

    def put(mitigation, task, metric, length, samples):
        rows.append(
            {
                "model": "m",
                "weights_hash": "h",
                "mitigation": mitigation,
                "calibration": None,
                "task": task,
                "text": "t" if task == "lm" else None,
                "text_hash": "x" if task == "lm" else None,
                "tokenizer": "bytes",
                "length": length,
                "depth": None,
                "metric": metric,
                "batch": 1,
                "dtype": "float32",
                "backend": "torch",
                "device": "cpu",
                "seed": 0,
                "value": np.mean(samples),
                "stderr": 0.0,
                "n": len(samples),
                "samples": list(samples),
                "train_length": 32,
                "seconds": 1.0,
                "tokens_per_second": 50.0 if mitigation == "rri" else 100.0,
                "peak_bytes": 10,
                "first_token_seconds": 0.5 if mitigation == "decimate" else 2.0,
            }
        )

    hard = rng.normal(0, 0.5, 24)
    for name, loss in (
        ("none", 4.0),
        ("rri", 1.0),
        ("a-winsor", 2.2),
        ("reset:every=8", 2.0),
        ("recompute:last=8", 1.5),
    ):
        put(name, "lm", "nats_per_token", 32, 1.0 + (name == "rri") * 0.1 + hard)
        put(name, "lm", "nats_per_token", 128, loss + hard + rng.normal(0, 0.05, 24))
        put(name, "passkey", "accuracy", 128, [1.0] * 20 if name == "a-winsor" else [0.0] * 20)
    put("decimate", "passkey", "accuracy", 128, [1.0] * 20)
    board = leaderboard(pd.DataFrame(rows))
    at = board[board["length"] == 128].set_index("mitigation")
    assert at.loc["rri", "wins"] == "loss" and at.loc["a-winsor", "wins"] == "passkey" and at.loc["none", "wins"] == ""
    assert at.loc["rri", "gain"] == pytest.approx(0.5, abs=0.05) and at.loc["rri", "speed"] == 0.5
    assert at.loc["rri", "change_short"] == pytest.approx(0.1) and at.index[0] == "rri"
    assert at.loc["decimate", "wins"] == "passkey" and np.isnan(at.loc["decimate", "loss"])
    assert at.loc["decimate", "speed"] == 4  # in reading prompts, since it reads no text
    assert at.loc["reset:every=8", "control"] and not at.loc["rri", "control"]

    for row in rows:
        if row["mitigation"] == "reset:every=8":
            row |= {"value": float("nan"), "samples": [float("nan")] * row["n"]}
        row["device"] = "gpu"
    frame = pd.DataFrame(rows)
    at = leaderboard(frame).query("length == 128").set_index("mitigation")
    assert at.loc["rri", "gain"] == pytest.approx(0.5, abs=0.05)  # over the control that did not blow up
    assert at.loc["rri", "wins"] == "loss"  # which it beats as well
    _, grid, _ = board_tables(frame)
    assert [column.header for column in grid.columns][-3:] == ["speed", "memory", "wins"]
    names, wins = ([str(cell) for cell in grid.columns[i]._cells] for i in (0, -1))
    assert dict(zip(names, wins))["rri"] == "loss" and dict(zip(names, wins))["none"] == ""

    other = frame.assign(dtype="bfloat16", tokens_per_second=frame["tokens_per_second"] ** 2)
    for both in ([frame, other], [other, frame]):
        at = leaderboard(whole := pd.concat(both, ignore_index=True)).query("length == 128 and mitigation == 'rri'")
        assert dict(zip(at["model"], at["speed"])) == {"m [dtype=float32]": 0.5, "m [dtype=bfloat16]": 0.25}
        assert len(board_tables(whole)) == 2 * len(board_tables(frame))


def test_remedies_that_read_a_prompt_have_no_loss(tmp_path):
    (tmp_path / "t.txt").write_bytes(TEXT.data)
    frame = evaluate(
        make_model(),
        [150, 300],
        ["lm:slices=2,tokens=1", "words:n=2"],
        ["none", "decimate"],
        text=str(tmp_path / "t.txt"),
    )
    assert set(frame[frame["task"] == "lm"]["mitigation"]) == {"none"}
    assert any(m.startswith("decimate") for m in frame[frame["task"] == "words"]["mitigation"])
