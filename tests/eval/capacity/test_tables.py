"""From tables to findings, points and figures: synthetic families whose T_forget and T_recall are known."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from known_family import LIMIT, STATES, Family, grown, t_forget, t_recall
from matplotlib.image import imread

from rnn_longctx.errors import InputError
from rnn_longctx.eval.capacity import advise, draw, models, tables
from rnn_longctx.eval.capacity import fits as fitting
from rnn_longctx.eval.capacity.figures import growth
from rnn_longctx.eval.results import Results
from rnn_longctx.eval.stats import wilson


def test_known_answers(findings):
    found = findings
    assert len(found) == 2 * 5 * 5 * 3
    one = found[(found["model"] == "s800000-T1024-s0")].set_index("quantity")
    assert one.loc["forgets", "fails"] == 8192 and "collapses at 8K" in one.loc["forgets", "text"]
    points = tables.points(found).set_index(["quantity", "state_elements"])
    assert len(points) == 2 * len(STATES)
    for state in STATES:
        forget, recall = points.loc["T_forget", state], points.loc["T_recall", state]
        grid = [256, 512, 1024, 2048, 4096]
        expected = min(n for n in grid if n >= t_forget(state))  # seeds of 0.97, 1 and 1.3: the middle one decides
        assert forget["value"] == expected
        assert forget["bound"] == ("" if expected > 256 else "below") and pd.isna(forget["train_length"])
        assert recall["train_length"] == 1024 and recall["models"] == 15 and recall["bound"] == ""
        assert recall["value"] <= t_recall(state) < 1.13 * recall["value"] + 1
        assert recall["low"] <= recall["value"] <= recall["high"]


def test_one_model_passes_or_not(tmp_path):
    family = Family()
    for seed, forgets in enumerate((True, False)):
        family.add(STATES[0], 512, seed, forgets, 0)
    for row in family.rows:
        if row["task"] == "lm":
            Results(tmp_path).put(row)
    for seed, forgets in enumerate((True, False)):
        name = f"s{STATES[0]}-T512-s{seed}"
        assert tables.passes(tmp_path, name, LIMIT, "lm") is forgets
        assert tables.passes(tmp_path, name, 2048, "lm"), "it fails from 4096 on"
        for limit, text in ((2 * LIMIT, "lm"), (LIMIT, "other")):
            with pytest.raises(InputError, match=r"was not measured"):
                tables.passes(tmp_path, name, limit, text)
        for row in [
            r for r in family.rows if r["task"] == "lm" and r["model"] == name
        ]:  # another text, another outcome
            worse = {"value": 9.0, "samples": [9.0] * 2} if forgets and row["length"] > 512 else {}
            Results(tmp_path).put(row | {"text": "other"} | worse)
        assert tables.passes(tmp_path, name, LIMIT, "lm") is forgets
        assert not tables.passes(tmp_path, name, LIMIT, "other")


def test_a_point_of_recall_is_of_the_lengths_with_the_most_seeds(tmp_path):
    family = Family()
    for train, edges in ((512, (3000, 9000, 5000)), (1024, (60_000,)), (2048, (2000, 2500, 50_000))):
        for seed, edge in enumerate(edges):
            family.add(STATES[0], train, seed, True, edge)
    family.write(tmp_path)
    points = tables.points(tables.findings(*tables.read(tmp_path), 0.95)).set_index("quantity")
    found = points.loc["T_recall"]
    assert (found["train_length"], found["seeds"], found["models"]) == (512, 3, 7)
    assert 4000 < found["value"] <= 5000 and found["low"] <= 3000 < 8000 < found["high"]


def test_checkpoints_are_no_family(tmp_path):
    """No T_forget of one training length, no fit through two points, and a line of words each; of two lengths there is
    one, and so there is of a family whose search ended after the longest."""
    family = Family()
    for state, edge, forgets in ((STATES[0], 1000, False), (STATES[1], 3000, True)):
        family.add(state, 512, 0, forgets, edge)
    family.write(tmp_path)
    assert "T_forget" in set(tables.points(tables.findings(*tables.read(tmp_path), 0.95))["quantity"])
    for line in family.lines:
        line["train_seed"] = None
    family.write(tmp_path)
    found = tables.findings(*tables.read(tmp_path), 0.95)
    points = tables.points(found)
    assert set(points["quantity"]) == {"T_recall"} and (points["bound"] == "").all() and len(fitting.table(points)) == 0
    first, second = tables.in_words(found)
    assert first.startswith("s100000, trained at 512, none: collapses at 4K (5.00 > 2 x 1.10); T_recall 960 (90/90; ")
    assert second.startswith("s200000, trained at 512, none: no collapse up to 64K; T_recall ")
    assert not [p for p in draw(tmp_path, 0.95) if p.name.startswith("T_forget")]
    family.add(STATES[0], 1024, 0, True, 1000)
    family.lines[-1]["train_seed"] = None
    family.write(tmp_path)
    points = tables.points(tables.findings(*tables.read(tmp_path), 0.95)).set_index("quantity")
    assert points.loc["T_forget", "text"].startswith("1K (fails at 512)")


def test_shapes_of_one_size_are_set_side_by_side():
    rng = np.random.default_rng()
    size = rng.uniform(1e5, 1e6)
    frame = pd.DataFrame({
        "mitigation": "none", "quantity": "T_recall", "shape": list("abcde"),
        "state_elements": [size, 1.3 * size, 1.05 * size, 2 * size, 1.08 * size],
        "value": [100, 7, 400, 9, 200], "bound": ["", "", "", "", "above"],
    })  # fmt: skip
    table = tables.same_size(frame)
    assert table[["shapes", "values", "spread"]].values.tolist() == [["a c", "100 400", 4.0]]
    assert len(tables.same_size(frame[frame["shape"] != "c"])) == 0


def test_a_study_that_did_not_reach_it(tmp_path):
    family = Family()
    for state in STATES[:3]:
        for train in (512, 1024):
            family.add(state, train, 0, False, 1e9)
    family.write(tmp_path)
    points = tables.points(tables.findings(*tables.read(tmp_path), 0.95))
    assert (
        set(points["bound"]) == {"above"}
        and points["text"].str.contains("at least 64K \\(the longest measured;|above 1K \\(").all()
    )
    assert set(points[points["quantity"] == "T_forget"]["value"]) == {1024}
    assert set(points[points["quantity"] == "T_recall"]["value"]) == {LIMIT}
    said = {"T_recall": "at least (the longest measured passes)", "T_forget": "above (the longest trained fails)"}
    for quantity, words in said.items():
        title = growth(points[points["quantity"] == quantity], quantity, "none").get_suptitle()
        assert title.endswith(f"not fitted (arrows): 3 {words}")
    names = {p.name for p in draw(tmp_path, 0.95)}
    assert names >= {"T_forget.png", "T_recall.png"} and "mqar.png" not in names
    with pytest.raises(InputError, match="too few points of T_recall"):
        advise(4096, study=tmp_path)


def test_more_recall_than_the_samples_show(tmp_path):
    """90 of 90 right answers show 95%, and not 99%."""
    grown(tmp_path)
    points = tables.points(tables.findings(*tables.read(tmp_path), 0.99))
    assert (points[points["quantity"] == "T_recall"]["bound"] == "below").all()
    with pytest.raises(InputError, match="too few points"):
        advise(4096, 0.99, tmp_path)


@pytest.mark.filterwarnings("error")
def test_figures_from_the_tables_alone(study, findings, tmp_path):
    for name in ("results.parquet", "models.csv"):
        (tmp_path / name).write_bytes((study / name).read_bytes())
    paths = draw(tmp_path, 0.95)
    drawn = {p.name for p in paths if p.suffix == ".png"}
    assert drawn == {"T_forget.png", "T_recall.png", "recall_by_depth.png", "mqar.png"}
    for path in paths:
        if path.suffix == ".png":
            assert imread(path)[..., :3].std() > 0.02
    table = pd.read_csv(tmp_path / "fits.csv")
    recall = table[(table["quantity"] == "T_recall") & (table["axis"] == "state_elements")].set_index("form")
    assert recall.loc["exponential", "r2"] > 0.99 and recall["best"].sum() == 1
    assert recall.loc["exponential", "k_low"] <= recall.loc["exponential", "k"] <= recall.loc["exponential", "k_high"]
    pairs = tables.associations(*tables.read(tmp_path))
    assert len(pairs) == 2 * 5 * 2 and set(pairs["value"]) == {0.5} and set(pairs["pairs"]) == {4, 16}
    written = pd.read_csv(tmp_path / "mqar.csv")
    assert (written["model"] == pairs["model"]).all() and written["low"].to_numpy() == pytest.approx(pairs["low"])
    results, _ = tables.read(tmp_path)
    deep = tables.by_depth(results, tables.points(findings))
    assert len(set(deep["model"])) == len(STATES) and set(deep["train_length"]) == {1024}
    assert len(set(deep["depth"])) == 10


def test_associations_are_never_certain():
    """Answers of a sequence hang together; the interval holds the truth about as often as it says, at 1 as well."""
    rng, sequences, pairs, held = np.random.default_rng(), 100, 8, 0
    for _ in range(60):
        family, truth = Family(), float(rng.choice([0.3, 0.9, 0.995]))
        family.lines.append(dict.fromkeys(models.COLUMNS) | {"model": "m", "weights_hash": "0", "task": "mqar"})
        right = (rng.random((sequences, pairs)) < truth).mean(1)
        right = np.where(rng.random(sequences) < 0.5, right, rng.random(sequences) < truth)
        stderr = float(right.std(ddof=1)) / math.sqrt(sequences)
        family.put("m", "mqar8", "accuracy", 32, right, stderr=stderr)
        family.put("m", "mqar4", "accuracy", 16, [1.0] * sequences, stderr=0.0)
        results, about = pd.DataFrame(family.rows), pd.DataFrame(family.lines, columns=list(models.COLUMNS))
        found = tables.associations(results, about).set_index("pairs")
        held += found.loc[8, "low"] <= truth <= found.loc[8, "high"]
        sure = found.loc[4]
        assert (sure["low"], sure["high"]) == (wilson(sequences, sequences).low, 1)
    assert held >= 50


def test_a_search_in_batches_of_two_sizes_is_one_search(tmp_path):
    """Begun with 8 side by side, ended with 4; and the loss on two devices."""
    family = grown(tmp_path)
    whole = tables.findings(*tables.read(tmp_path), 0.95)
    for row in [r for r in family.rows if r["task"] == "passkey" and r["length"] <= 1024]:
        family.rows.append(row | {"batch": 4, "device": "another"})
    for row in [r for r in family.rows if r["task"] == "lm" and r["length"] <= 4096]:
        family.rows.append(row | {"device": "another"})
    family.write(tmp_path)
    pd.testing.assert_frame_equal(tables.findings(*tables.read(tmp_path), 0.95), whole)


def test_a_loss_that_cannot_be_judged_has_not_held(tmp_path):
    family = Family()
    family.add(STATES[0], 1024, 0, True, 3000)
    family.rows = [r for r in family.rows if r["metric"] != "nats_per_token_peak" and r["length"] > 1024]
    family.write(tmp_path)
    found = tables.findings(*tables.read(tmp_path), 0.95).set_index("quantity")
    assert pd.isna(found.loc["forgets", "passes"]) and "not measured within" in found.loc["forgets", "text"]
    assert "T_forget" not in set(tables.points(tables.findings(*tables.read(tmp_path), 0.95))["quantity"])


def test_t_forget_says_how_far_was_read(findings):
    points = tables.points(findings)
    assert points[points["quantity"] == "T_forget"]["text"].str.endswith("; read to 64K").all()


def test_mistakes(tmp_path):
    with pytest.raises(InputError, match="evaluate first"):
        draw(tmp_path, 0.95)
    Results(tmp_path).gather()
    with pytest.raises(InputError, match=r"no models\.csv"):
        draw(tmp_path, 0.95)
    (tmp_path / "models.csv").write_text("model,shape\na,b\n")
    with pytest.raises(InputError, match=r"models\.csv"):
        draw(tmp_path, 0.95)
    assert len(models.gather(tmp_path)) == 0 and not [p for p in draw(tmp_path, 0.95) if p.suffix == ".png"]
