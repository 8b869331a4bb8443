"""Advice on the size of a model from families whose T_forget and T_recall are known."""

from __future__ import annotations

import math

import pandas as pd
import pytest
from known_family import STATES, Family, grown, t_forget, t_recall

from rnn_longctx.errors import InputError
from rnn_longctx.eval.capacity import advise, draw, tables


def test_advice(study, tmp_path):
    context = round(t_recall(1_000_000))
    found = advise(context, study=study)
    assert 0.8e6 < found.state < 1.25e6 and not any("extrapol" in w for w in found.warnings)
    assert 0 < found.low <= found.state <= found.high and "1 of 5 shapes recall as much" in str(found)
    assert found.train_length == pytest.approx(t_forget(1_000_000), rel=0.6)
    assert found.speed == pytest.approx(1e9 / found.state, rel=0.01)
    assert "MiB a stream" in str(found) and "tokens/s" in str(found)
    grown(tmp_path)
    far = advise(1 << 20, study=tmp_path)
    assert far.state > STATES[-1] and far.speed is None
    assert any("extrapolates" in w for w in far.warnings) and "no shape is shown to recall as much" in str(far)


def test_advice_on_speed_is_of_one_device(tmp_path):
    """Some models were read on another device too, far faster."""
    grown(tmp_path)
    context = round(t_recall(1_000_000))
    alone = advise(context, study=tmp_path)
    results, _ = tables.read(tmp_path)
    some = results[results["model"].str.contains("s400000-|s800000-")]
    fast = some.assign(device="a GPU", tokens_per_second=1000 * some["tokens_per_second"])
    pd.concat([fast, results]).to_parquet(tmp_path / "results.parquet")
    found = advise(context, study=tmp_path)
    assert found.speed == pytest.approx(alone.speed) and found.device == "cpu"
    assert "tokens/s read on cpu" in str(found)


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
