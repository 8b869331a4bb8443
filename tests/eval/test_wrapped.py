"""What measures, probes and keeps states takes a model as it is given: of another library, and in a wrapper."""

import pytest
import torch
import transformers as hf
from adopted_families import _mamba2

import rnn_longctx
from rnn_longctx import adopt, generate
from rnn_longctx.errors import InputError
from rnn_longctx.measure.envelope import envelope_of
from rnn_longctx.models.saved_state import load_state, save_state
from rnn_longctx.probes.attribution import attribute
from rnn_longctx.probes.probe import probe


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    config = _mamba2()
    config.vocab_size = 256
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = None
    adopt(model, name="theirs", tokenizer="bytes", train_length=64)
    return model


@pytest.fixture(params=["as it is", "in a wrapper"])
def given(request, theirs):
    return theirs if request.param == "as it is" else torch.nn.Sequential(theirs)


def test_a_probe_and_an_envelope(given, theirs):
    text = rnn_longctx.load_text("builtin")
    of_it, expected = (probe(model, text, 128, every=32) for model in (given, adopt(theirs)))
    assert of_it.about == expected.about and of_it.losses.equals(expected.losses)
    assert envelope_of(given, 64, text).norms() == envelope_of(adopt(theirs), 64, text).norms()
    with pytest.raises(InputError, match="this library's own models"):
        attribute(given, torch.ones(1, 9, dtype=torch.int64))


def test_a_saved_state(given, theirs, tmp_path):
    cache = adopt(theirs).new_cache()
    generate(given, "import os\n", 4, cache=cache)
    save_state(tmp_path / "kept", cache, given)
    assert torch.equal(
        generate(given, "x", 5, cache=load_state(tmp_path / "kept", given)), generate(given, "x", 5, cache=cache)
    )


def test_lm_evals_tasks(given):
    pytest.importorskip("lm_eval")
    from rnn_longctx.eval.harness.run import HarnessConfig, lm_eval_table

    frame = lm_eval_table(given, HarnessConfig(["rnn_longctx_passkey"], [512], ["none", "recompute:last=128"], limit=1))
    assert set(frame["model"]) == {"theirs"} and frame["mitigation"].tolist() == ["none", "recompute:last=128"]
