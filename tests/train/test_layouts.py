"""`save_layout`: what a run writes is loaded by the library it names, and here, as the model that was trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_runs import TINY, Killed, assert_same_run
from transformers import AutoModelForCausalLM

import rnn_longctx
from rnn_longctx.config import from_dict, to_dict
from rnn_longctx.errors import InputError
from rnn_longctx.models import checkpoint
from rnn_longctx.models.checkpoint.layouts import LAYOUTS, SIDE
from rnn_longctx.train import TrainConfig, train
from rnn_longctx.train.config import EvaluateConfig
from rnn_longctx.train.corpus import Batch, Corpus
from rnn_longctx.train.snapshots import newest_snapshot


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_model_of_a_run(config: TrainConfig, layout: str) -> None:
    c = replace(config, save_layout=layout, save_dtype="float32", export_every=5, steps=10,
                evaluate=EvaluateConfig([112], every=5, passkeys=1))  # fmt: skip
    train(c)
    out, ids = Path(c.out), torch.randint(256, (2, 70))
    weights = {"state-spaces": "pytorch_model.bin"}.get(layout, "model.safetensors")
    hashes = {}
    for name in ("last", "best", "model", "steps/5", "steps/10"):
        assert [f.name for f in (out / name).iterdir() if f.suffix in (".bin", ".safetensors")] == [weights]
        model = rnn_longctx.load(out / name)
        assert model.train_length == 120 and model.tokenizer.name == "bytes"
        assert model.provenance["recipe"]["save_layout"] == layout and "metrics" in model.provenance
        assert (model.calibration is None) == (name in ("last", "best"))
        hashes[name] = model.weights_hash
        if layout == "transformers":
            theirs, report = AutoModelForCausalLM.from_pretrained(out / name, output_loading_info=True)
            assert not any(report.values()), report
            with torch.no_grad():
                assert_near(theirs.eval()(ids).logits, model.logits(model(ids)))
        assert (out / name / SIDE).exists() == (layout == "state-spaces")  # what it is given: test_checkpoint.py
    assert hashes["last"] == hashes["model"] == hashes["steps/10"] != hashes["steps/5"]
    snapshot = newest_snapshot(out / "snapshots")
    assert snapshot is not None
    for key, weight in snapshot["model"].items():
        assert torch.equal(rnn_longctx.load(out / "last").state_dict()[key], weight), key


@pytest.mark.parametrize(("before", "after"), [("state-spaces", "transformers"), ("transformers", "state-spaces")])
def test_a_run_goes_on_in_another_layout(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                         before: str, after: str) -> None:  # fmt: skip
    config = replace(config, save_dtype="float32", evaluate=EvaluateConfig([112], every=4, passkeys=1))
    whole, batch = replace(config, out=str(tmp_path / "whole")), Corpus.batch
    train(whole)

    def killer(self: Corpus, c: TrainConfig, step: int) -> Batch:
        if step == 9:
            raise Killed
        return batch(self, c, step)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Corpus, "batch", killer)
        train(replace(config, save_layout=before))
    assert rnn_longctx.load(Path(config.out) / "last").provenance["metrics"]["step"] == 8
    again = replace(config, save_layout=after)
    train(again)
    assert_same_run(again, whole)
    for name in ("last", "model"):
        found, expected = (rnn_longctx.load(Path(c.out) / name) for c in (again, whole))
        assert found.weights_hash == expected.weights_hash
        assert found.provenance["metrics"] == expected.provenance["metrics"]
    last = Path(config.out) / "last"
    assert {(last / "model.safetensors").exists(), (last / "pytorch_model.bin").exists()} == {True, False}


def test_a_run_begins_from_any_layout(config: TrainConfig, tmp_path: Path) -> None:
    began = []
    for layout in LAYOUTS:
        first = train(replace(config, steps=2, save_layout=layout, out=str(tmp_path / layout)))
        began.append(train(replace(config, init=str(first), model=None, steps=2, out=f"{config.out}-{layout}")))
    assert len({rnn_longctx.load(path).weights_hash for path in began}) == 1


def test_what_a_layout_cannot_hold_is_refused_first(config: TrainConfig, tmp_path: Path) -> None:
    odd = replace(config, model=replace(TINY, norm_eps=1e-3), save_layout="state-spaces")
    nowhere = replace(odd, data=replace(odd.data, text=[str(tmp_path / "nowhere")]))  # no text has been looked for
    with pytest.raises(InputError, match=r"^save_layout: layout 'state-spaces' cannot hold norm_eps 0\.001") as error:
        train(nowhere)
    assert "\n" not in str(error.value) and not Path(config.out).exists()
    checkpoint.save(rnn_longctx.load(train(replace(odd, steps=1, save_layout="transformers"))), tmp_path / "odd")
    with pytest.raises(InputError, match="cannot hold norm_eps"):  # of a checkpoint to start from, too
        train(replace(nowhere, model=None, init=str(tmp_path / "odd"), out=str(tmp_path / "b")))
    with pytest.raises(InputError, match=r'save_layout.*did you mean "transformers"') as error:
        from_dict(TrainConfig, json.loads(json.dumps(to_dict(config))) | {"save_layout": "transformer"})
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"^save_layout: unknown layout 'transformer'; did you mean \"transformers\""):
        train(replace(nowhere, save_layout="transformer"))  # type: ignore[arg-type]
