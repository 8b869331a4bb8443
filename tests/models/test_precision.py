"""Switches of torch that change what a model computes are said wherever its numbers are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers as hf

from rnn_longctx import adopt, evaluate, mitigate
from rnn_longctx.data import ByteTokenizer, Text
from rnn_longctx.errors import InputError
from rnn_longctx.eval.results import Results
from rnn_longctx.eval.search.calibrate import calibrate
from rnn_longctx.measure.envelope import envelope_of
from rnn_longctx.measure.steps import steps_of
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.models.mixers.mamba2 import Mamba2Config
from rnn_longctx.models.precision import computes_as
from rnn_longctx.models.saved_state import load_state, save_state
from rnn_longctx.probes.probe import probe

TEXT = Text("made", bytes(torch.randint(32, 127, (4000,)).tolist()))
OTHER = Text("other", bytes(torch.randint(32, 127, (4000,)).tolist()))


@pytest.fixture
def model() -> Mamba2LM:
    torch.manual_seed(0)
    lm = Mamba2LM(Mamba2Config(d_model=32, n_layer=2, headdim=16, d_state=8)).eval()
    lm.train_length, lm.tokenizer, lm.name = 32, ByteTokenizer(), "tiny"
    return lm


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Products of float32 matrices rounded, as `torch.set_float32_matmul_precision` does it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def bf16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


SWITCHES: list[tuple[Callable, str]] = [
    (bf16, "bfloat16 autocast"),
    (lambda: products("high"), "float32 with tf32 products"),
]


def test_what_a_model_computes_in(model: Mamba2LM) -> None:
    assert computes_as(model) == "float32"
    for switch, said in SWITCHES:
        with switch():
            assert computes_as(model) == said
    with torch.autocast("cpu", enabled=False):
        assert computes_as(model) == "float32"
    model.bfloat16()
    with products("medium"):
        assert computes_as(model) == "bfloat16"
    with bf16():
        assert computes_as(model) == "bfloat16 autocast of bfloat16"


@pytest.mark.parametrize(("switch", "said"), SWITCHES)
def test_cells_measured_so_are_other_cells(model: Mamba2LM, switch: Callable, said: str, tmp_path: Path) -> None:
    what = (model, [128, 256], ["lm:slices=2,tokens=0", "passkey:n=2,least=2"], "none")
    plain = evaluate(*what, text=TEXT, out=tmp_path)
    with switch():
        there = evaluate(*what, text=TEXT, out=tmp_path)
        apart = evaluate(*what, text=TEXT)
    both = Results(tmp_path).frame()
    assert set(there["dtype"]) == {said}
    assert set(plain["dtype"]) == {"float32"} and set(apart["dtype"]) == {said}
    assert set(both["dtype"]) == {"float32", said} and len(both) == len(plain) + len(apart)
    assert sorted(both[both["dtype"] == said]["value"]) == sorted(apart["value"])
    again = evaluate(*what, text=TEXT, out=tmp_path)
    assert again[again["dtype"] == "float32"]["value"].tolist() == plain["value"].tolist()


def test_a_loss_under_autocast_is_another(model: Mamba2LM) -> None:
    what = (model, 64, "lm:slices=2,tokens=0", "none")
    with bf16():
        rounded = evaluate(*what, text=TEXT)
    assert rounded["value"].iloc[0] != evaluate(*what, text=TEXT)["value"].iloc[0]


@torch.no_grad()
def test_a_state_is_read_on_as_it_was_begun(model: Mamba2LM, tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 1, "vocab_size": 64}
    theirs = adopt(hf.Mamba2ForCausalLM(hf.Mamba2Config(**shape, num_hidden_layers=1)).eval())
    for lm in (model, theirs):
        cache, ids = lm.new_cache(), torch.randint(60, (1, 9))
        with bf16():
            lm(ids, cache)
            save_state(tmp_path / "s", cache, lm)
            load_state(tmp_path / "s", lm)
        with pytest.raises(InputError, match=r"was read in bfloat16 autocast, and .* computes in float32 now"):
            load_state(tmp_path / "s", lm)


def test_what_is_measured_of_a_model_is_not_remembered_for_the_other(model: Mamba2LM) -> None:
    with bf16():
        rounded = envelope_of(model, 32, TEXT), steps_of(model, 32, TEXT)[0]
    plain = envelope_of(model, 32, TEXT), steps_of(model, 32, TEXT)[0]
    assert rounded[0].peaks != plain[0].peaks
    assert not all(torch.equal(a.float(), b) for a, b in zip(rounded[1], plain[1]))
    with mitigate(model, "state-norm", text=TEXT) as handle:
        assert handle.plan.calibration == plain[0].label


def test_probes_and_calibrations_say_it(model: Mamba2LM) -> None:
    for switch, said in [*SWITCHES, (torch.no_grad, "float32")]:
        with switch():
            assert probe(model, TEXT, 64, every=16, calibration_text=OTHER).about["dtype"] == said
            model.train_length = 256  # which a prompt of the guard fits into
            assert calibrate(model, "a-winsor:share=0.1", 512, OTHER, slices=1, prompts=1).scores["dtype"] == said


def test_a_default_dtype_changes_no_number(model: Mamba2LM) -> None:
    what = (model, [32, 64], "lm:slices=2,tokens=0", ["none", "state-norm", "a-floor", "token-filter"])
    plain = evaluate(*what, text=TEXT, calibration_text=OTHER)["value"].tolist()
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            model.__dict__.pop("_measured", None)
            assert evaluate(*what, text=TEXT, calibration_text=OTHER)["value"].tolist() == plain
        finally:
            torch.set_default_dtype(torch.float32)
