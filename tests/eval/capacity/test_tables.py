"""From tables to findings, points, figures and advice: synthetic families whose T_forget and T_recall are known."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from rnn_longctx.errors import InputError
from rnn_longctx.eval.capacity import advise, draw, models, tables
from rnn_longctx.eval.capacity import fits as fitting
from rnn_longctx.eval.capacity.figures import growth
from rnn_longctx.eval.capacity.recall import search
from rnn_longctx.eval.results import COLUMNS, Results, to_frame
from rnn_longctx.eval.stats import wilson

LIMIT = 1 << 16
STATES = [100_000, 200_000, 400_000, 800_000, 1_600_000]


def t_forget(state: int) -> float:
    """Tokens, by a line."""
    return 1024 * (0.2 + 2 * state / 1e6)


def t_recall(state: int) -> float:
    return 1024 * (3 * math.exp(1.2 * state / 1e6) - 2)


class Family:
    """Rows of a study, written at once (a study's own cells are a file each)."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.lines: list[dict] = []

    def put(self, name: str, task: str, metric: str, length: int, samples, **more) -> None:
        samples = [float(x) for x in samples]
        self.rows.append(dict.fromkeys(COLUMNS) | {
            "model": name, "weights_hash": "0", "mitigation": "none", "task": task, "text": task, "tokenizer": "bytes",
            "length": length, "metric": metric, "batch": 8, "dtype": "float32", "backend": "torch", "device": "cpu",
            "seed": 0, "value": float(np.mean(samples)), "stderr": 0.01, "n": len(samples), "samples": samples, **more,
        })  # fmt: skip

    def add(self, state: int, train: int, seed: int, forgets: bool, edge: float) -> None:
        """A model that recalls up to `edge` tokens."""
        name = f"s{state}-T{train}-s{seed}"
        self.lines.append(dict.fromkeys(models.COLUMNS) | {
            "model": name, "weights_hash": "0", "shape": f"s{state}", "task": "text", "train_length": train,
            "train_seed": seed, "parameters": 5 * state + 1000, "scan_state_elements": state - 100, "n_layer": 4,
            "conv_state_elements": 100, "state_elements": state,
        })  # fmt: skip
        self.put(name, "lm", "nats_per_token_peak", train, [1.0, 1.2], train_length=train)
        length = train
        while length <= LIMIT:
            loss = 1.0 if forgets or length < 8 * train else 5.0
            speed = 1e9 / state
            self.put(name, "lm", "nats_per_token", length, [loss] * 2, train_length=train, tokens_per_second=speed)
            length *= 2
        step = search(lambda n, k: (k if n <= edge else 0, k), lambda n: n > 30, 512, LIMIT, 0.95, 90)
        for length, (right, asked) in step.items():
            answers = [1.0] * right + [0.0] * (asked - right)
            for depth in range(10):
                self.put(name, "passkey", "accuracy", length, answers[depth::10], train_length=train,
                         depth=(depth + 0.5) / 10)  # fmt: skip
            self.put(name, "passkey", "accuracy", length, answers, train_length=train)

    def write(self, folder) -> None:
        to_frame(self.rows).to_parquet(folder / "results.parquet")
        pd.DataFrame(self.lines, columns=list(models.COLUMNS)).to_csv(folder / "models.csv", index=False)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder, family = tmp_path_factory.mktemp("study"), Family()
    for state in STATES:
        for train in (256, 512, 1024, 2048, 4096):
            for seed in range(3):
                off = [0.97, 1, 1.3][seed]
                best = t_recall(state) if train == 1024 else t_recall(state) / 2
                family.add(state, train, seed, train >= t_forget(state) * off, best * off)
    for task in ("mqar", "forgetting-mqar"):
        for state in STATES:
            name = f"s{state}-{task}-s0"
            line = {"model": name, "weights_hash": "0", "shape": f"s{state}", "task": task, "state_elements": state}
            family.lines.append(dict.fromkeys(models.COLUMNS) | line)
            for pairs in (4, 16):
                family.put(name, f"{task}{pairs}", "accuracy", 4 * pairs, [0.25, 0.75])
    family.write(folder)
    return folder


def test_known_answers(study):
    found = tables.findings(*tables.read(study), 0.95)
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


def test_more_recall_than_the_samples_show(study):
    """90 of 90 right answers show 95%, and not 99%."""
    points = tables.points(tables.findings(*tables.read(study), 0.99))
    assert (points[points["quantity"] == "T_recall"]["bound"] == "below").all()
    with pytest.raises(InputError, match="too few points"):
        advise(4096, 0.99, study)


@pytest.mark.filterwarnings("error")
def test_figures_from_the_tables_alone(study, tmp_path):
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
    results, about = tables.read(tmp_path)
    deep = tables.by_depth(results, tables.points(tables.findings(results, about, 0.95)))
    assert len(set(deep["model"])) == len(STATES) and set(deep["train_length"]) == {1024}
    assert len(set(deep["depth"])) == 10


def test_advice(study):
    context = round(t_recall(1_000_000))
    found = advise(context, study=study)
    assert 0.8e6 < found.state < 1.25e6 and not any("extrapol" in w for w in found.warnings)
    assert 0 < found.low <= found.state <= found.high and "1 of 5 shapes recall as much" in str(found)
    assert found.train_length == pytest.approx(t_forget(1_000_000), rel=0.6)
    assert found.speed == pytest.approx(1e9 / found.state, rel=0.01)
    assert "MiB a stream" in str(found) and "tokens/s" in str(found)
    far = advise(1 << 20, study=study)
    assert far.state > STATES[-1] and far.speed is None
    assert any("extrapolates" in w for w in far.warnings) and "no shape is shown to recall as much" in str(far)


def test_advice_on_speed_is_of_one_device(study, tmp_path):
    """Some models were read on another device too, far faster."""
    results, about = tables.read(study)
    some = results[results["model"].str.contains("T512-|T1024-")]
    fast = some.assign(device="a GPU", tokens_per_second=1000 * some["tokens_per_second"])
    pd.concat([fast, results]).to_parquet(tmp_path / "results.parquet")
    about.to_csv(tmp_path / "models.csv", index=False)
    context = round(t_recall(1_000_000))
    found = advise(context, study=tmp_path)
    assert found.speed == pytest.approx(advise(context, study=study).speed) and found.device == "cpu"
    assert "tokens/s read on cpu" in str(found)


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


def test_no_advice_where_recall_does_not_grow(tmp_path):
    up_and_down = dict(zip(STATES, (4000, 9000, 3500, 9500, 4200)))
    grown(tmp_path, up_and_down.__getitem__)
    found = advise(4096, study=tmp_path)
    assert math.isnan(found.state) and found.train_length is None and found.speed is None
    assert str(found).startswith("no size follows for 4K tokens: what is recalled does not grow with the state")
    assert not any("extrapolates" in w for w in found.warnings)
    assert "measured: 3 of 5 shapes recall as much, by the median of seeds; the smallest, s200000, has 200K" in str(
        found
    )


def test_no_advice_where_recall_falls(tmp_path):
    grown(tmp_path, lambda state: 1024 * (20 - 10 * state / 1e6))
    found = advise(8192, study=tmp_path)
    assert math.isnan(found.state) and "falls" in found.source
    assert str(found).startswith("no size follows for 8K tokens") and "4 of 5 shapes" in str(found)


def grown(folder, edge=t_recall) -> Family:
    """A study of a model a state, trained at 1024 tokens, that recalls up to `edge` of its state."""
    family = Family()
    for state in STATES:
        family.add(state, 1024, 0, True, edge(state))
    family.write(folder)
    return family


def test_advice_says_what_its_fit_leaves_out(tmp_path):
    """The smallest of the models recalls to the limit, which no growing curve through the others does."""
    grown(tmp_path, lambda state: 1e9 if state == STATES[0] else t_recall(state))
    said = [w for w in advise(4096, study=tmp_path).warnings if "only as a bound" in w]
    assert len(said) == 1 and said[0].startswith("1 of 5 points") and said[0].endswith("contradicts 1 of them")
    draw(tmp_path, 0.95)
    table = pd.read_csv(tmp_path / "fits.csv")
    best = table[table["best"] & (table["axis"] == "state_elements")].iloc[0]
    assert (best["quantity"], best["bounds"], best["contradicts"]) == ("T_recall", 1, 1)


def test_advice_says_where_the_search_was_not_close(tmp_path):
    family = grown(tmp_path)
    assert not any("to a factor" in w for w in advise(4096, study=tmp_path).warnings)
    near = {f"s{state}-T1024-s0": range(round(t_recall(state) / 2), round(t_recall(state)) + 1) for state in STATES}
    family.rows = [r for r in family.rows if r["task"] == "lm" or r["length"] not in near[r["model"]]]
    family.write(tmp_path)
    assert any("known to a factor of" in w for w in advise(4096, study=tmp_path).warnings)


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


def test_t_forget_says_how_far_was_read(study):
    points = tables.points(tables.findings(*tables.read(study), 0.95))
    assert points[points["quantity"] == "T_forget"]["text"].str.endswith("; read to 64K").all()


def test_advice_without_a_fit_says_what_was_measured(tmp_path):
    """One shape bears no fit; it recalls enough by the middle one of its three seeds."""
    family = Family()
    for seed, edge in enumerate((3000, 9000, 5000)):
        family.add(STATES[0], 1024, seed, True, edge)
    family.write(tmp_path)
    said = r"too few points .* \(1 of 1 shapes .* the smallest, s100000, has 100K numbers \(391 KiB .* recalls 4608, "
    with pytest.raises(InputError, match=said + r"2816 to 8K by seed; 10,000 tokens/s read on cpu\)"):
        advise(4096, study=tmp_path)


def test_advice_takes_a_remedy_as_it_is_written_elsewhere(tmp_path):
    family = grown(tmp_path)
    for row in family.rows:
        row["mitigation"] = "rri:alpha=0.9999,beta=0.75"
    family.write(tmp_path)
    assert advise(4096, study=tmp_path, mitigation="rri").state > 0
    with pytest.raises(InputError, match=r"nothing measured under none; it has rri:alpha=0\.9999,beta=0\.75"):
        advise(4096, study=tmp_path)
    with pytest.raises(InputError, match='did you mean "state-norm"'):
        advise(4096, study=tmp_path, mitigation="state-nrm")


def test_advice_of_the_paper():
    found = advise(256 * 1024)
    assert found.state == pytest.approx(12.9e6, rel=0.02) and found.speed is None and len(found.warnings) == 2
    assert found.low < found.state <= found.high and "one carries it (256K tokens at 12.9M)" in str(found)
    assert found.train_length == pytest.approx(1024 * (5.172 * found.state / 1e6 - 4.469))
    assert "extrapolates" in str(advise(1 << 24)) and "extrapolates" in str(advise(128))
    assert "none follows, its fit is below 0" in str(advise(128))
    with pytest.raises(InputError, match=r"fits a recall of 0\.95 alone"):
        advise(4096, 0.9)
    with pytest.raises(InputError, match="lies between 0 and 1"):
        advise(4096, 1.5)


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
