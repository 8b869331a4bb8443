"""The pages of docs/: what they have one write is written, registered from outside the package, and run; what they name
is there."""

from __future__ import annotations

import pkgutil
import re
import sys

import pages
import pytest
import torch
from pages import ROOT

from rnn_longctx import evaluate, load, mitigate
from rnn_longctx.config import from_dict
from rnn_longctx.data import Text
from rnn_longctx.mitigations import REMEDIES
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.plugins import register
from rnn_longctx.recurrence.gates import ScanInputs
from rnn_longctx.recurrence.interface import RECURRENCES
from rnn_longctx.recurrence.ssd import SSD
from rnn_longctx.tasks import TASKS
from rnn_longctx.testing.mixers import check_mixer
from rnn_longctx.train import TrainConfig, train

FENCE = re.compile(r"^```python *([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TEXT = Text("page", b"def add(a, b):\n    return a + b\n\n\n" * 200)


def blocks(page: str) -> tuple[str, str]:
    """The file that a page has one write, and the test that it shows of it."""
    found = FENCE.findall((ROOT / "docs" / "develop" / f"add-a-{page}.md").read_text())
    assert [title for title, _ in found] == ["", 'title="test"'], f"{page}: one whole file, and one test"
    return found[0][1], found[1][1]


@pytest.fixture
def written(monkeypatch, tmp_path):
    """A function that writes a page's file, and runs the page's test, which imports it."""
    torch.set_num_threads(1)
    for registry in (REMEDIES, TASKS, MIXERS, RECURRENCES):  # all that are there, and what comes until the test ends
        monkeypatch.setattr(registry, "_known", dict(registry))
    before = set(sys.modules)

    def write(page: str) -> None:
        file, test = blocks(page)
        module = re.match(r"import (\w+) ", test)
        assert module, f"{page}: the test imports the file first"
        (tmp_path / f"{module[1]}.py").write_text(file)
        exec(compile(test, f"add-a-{page}.md", "exec"), {})

    monkeypatch.syspath_prepend(tmp_path)
    yield write
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_add_a_remedy(written):
    written("remedy")
    model = load("demo")
    frame = evaluate(model, [600], ["lm:slices=1,tokens=0"], ["none", "forget-faster:factor=2"], text=TEXT)
    values = frame[frame.length == 600].groupby("mitigation").value.first()
    assert set(values.index) == {"none", "forget-faster:factor=2"} and values.nunique() == 2
    with mitigate(model, "forget-faster+state-norm"):
        assert model.mixers[0].policy.mul == 1.5 and model.mixers[0].policy.caps


def test_add_a_task(written):
    written("task")
    frame = evaluate(load("demo"), [64, 128], ["say-again:n=4,copied=2"], text=TEXT)
    assert set(frame.task) == {"say-again"} and set(frame.n) == {4} and frame.value.between(0, 1).all()


def test_add_a_mixer(written, tmp_path):
    written("mixer")
    (tmp_path / "text.py").write_bytes(TEXT.data)
    settings = {
        "model": {"mixer": ["retention:heads=2", "sliding-window:window=8,heads=2"], "d_model": 32, "n_layer": 2},
        "data": {"text": [str(tmp_path / "text.py")], "passkey": {"fraction": 0.0}},
        "train_length": 32,
        "batch_size": 2,
        "steps": 2,
        "device": "cpu",
        "out": str(tmp_path / "run"),
    }
    model = load(str(train(from_dict(TrainConfig, settings))))
    assert model.train_length == 32 and len(model.mixers) == 1
    frame = evaluate(model, [64], ["lm:slices=1,tokens=0"], ["none", "window:tokens=16"], text=TEXT)
    assert frame.value.notna().all() and set(frame.mitigation) >= {"none", "window:tokens=16"}


def test_add_a_recurrence(written):
    """And a mixer of it, which is the mixer of the other page but for the recurrence that it names."""
    written("recurrence")
    assert set(RECURRENCES) == {"ssd", "delta", "gated-delta"} and RECURRENCES["ssd"] is SSD
    written("mixer")

    @register
    class Delta(MIXERS["retention"]):
        name, recurrence = "delta", RECURRENCES["gated-delta"]

        def inputs(self, u, carry, span):
            inputs, gates, rest = super().inputs(u, carry, span)
            return ScanInputs(inputs.x, torch.nn.functional.normalize(inputs.B, dim=-1), inputs.C), gates, rest

    check_mixer("delta:heads=2")


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_what_pages_name_is_there(page):
    """Files of this repository by their paths, and modules and names of the package."""
    prose = FENCE.sub("", page.read_text())
    paths = re.findall(
        r"(?<![\w./-])(?:rnn_longctx|mitigations|probes|eval|configs|tests|findings|benchmarks)/[\w./-]*\w", prose
    )
    assert not [path for path in paths if not (ROOT / path).exists()]
    for name in set(re.findall(r"\brnn_longctx(?:\.[A-Za-z]\w*)+", prose)):
        if not name.endswith((".py", ".json")):
            pkgutil.resolve_name(name)
