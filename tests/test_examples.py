"""The scripts of examples/ run, and say what they promise."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
import transformers

from rnn_longctx.mitigations import REMEDIES

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def example(monkeypatch, tmp_path):
    """A function that imports a script, in a folder of its own; what it registers is gone after the test."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(REMEDIES, "_known", dict(REMEDIES))

    def load(name: str):
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    verbosity = transformers.logging.get_verbosity()
    yield load
    transformers.logging.set_verbosity(verbosity)
    assert not list(tmp_path.iterdir()), "an example leaves files where it is run"


def by_remedy(losses):
    return losses.pivot_table(index="mitigation", columns="length", values="value")


def test_my_transformers_model(example, capsys):
    same, losses = example("my_transformers_model").main()
    table = by_remedy(losses)
    assert same and set(table.index) == {"none", "state-norm", "recompute:last=64"}
    assert table.notna().all(axis=None) and table.columns.tolist() == [64, 256, 1024]
    assert "wrote 20 tokens" in capsys.readouterr().out


@pytest.mark.slow
def test_find_and_mend(example):
    found, table = example("find_and_mend").main()
    assert found.heads["onset"].notna().sum() >= 10 and found.ablation.recovered >= 0.8
    assert max(found.ablation.others) < 0.5, "heads that are not accused recover as much"
    losses = by_remedy(table[table["metric"] == "nats_per_token"])[8192]
    assert losses["a-floor"] < 1.1 * losses["recompute:last=512"] < losses["none"]


def test_find_and_mend_over_less(example, capsys):
    found, table = example("find_and_mend").main(length="768", slices=1, prompts=2)
    assert len(found.heads) == 64 and len(found.losses) == 3
    losses = by_remedy(table[table["metric"] == "nats_per_token"])
    assert len(losses) == 4 and losses.notna().all(axis=None)
    assert "no collapse up to 1K" in capsys.readouterr().out


def test_my_remedy(example):
    script = example("my_remedy")
    losses = by_remedy(script.main(kinds=("own", "attention alone", "adopted Mamba-2"), length="1k"))
    assert len(losses) == 4 and losses.notna().all(axis=None)
    assert script.HalfLife(100).plan(example_model()).policies[0].add == pytest.approx(math.log(0.5) / 100)


def example_model():
    from rnn_longctx.testing.remedies import own_model

    return own_model()


@pytest.mark.slow
def test_my_remedy_on_every_kind_of_model(example):
    losses = by_remedy(example("my_remedy").main())[4096]
    assert losses["half-life:tokens=500"] < losses["none"]


def test_watch_a_stream(example, capsys):
    seen = example("watch_a_stream").main("5k")
    warned, mended = (seen[action] for action in ("warn", "rollback:state-norm:every=64"))
    assert "collapsed" in {report.status for report in warned[0]}
    assert mended[0][-1].status == "ok" and mended[1] < warned[1]
    assert capsys.readouterr().out.count("writes") == 2


def test_the_page_names_every_script():
    page = (ROOT / "docs" / "examples.md").read_text()
    assert len(SCRIPTS) >= 4
    for script in SCRIPTS:
        assert f"examples/{script.name}" in page
        assert f"python examples/{script.name}" in script.read_text(), f"{script.name} does not say how it is run"
