"""Whatever is kept of a model belongs to the function that it computed then: cells, snapshots, states, calibrations,
remedy files, monitors and what is on it. After a change nothing of it comes back without a word."""

import copy
import dataclasses
import logging
import sys

import pytest
import torch
import transformers as hf
from adopted_families import FAMILIES
from evaluated import make_model, value
from typer.testing import CliRunner

import rnn_longctx
from rnn_longctx import CollapseMonitor, adopt, evaluate, mitigate
from rnn_longctx.cli import app
from rnn_longctx.data import ByteTokenizer, Text
from rnn_longctx.errors import InputError
from rnn_longctx.eval.jobs.base import Measuring
from rnn_longctx.eval.jobs.loss import LossOverLength
from rnn_longctx.eval.results import Results
from rnn_longctx.eval.search.calibrate import calibrate
from rnn_longctx.measure.envelope import measure_envelope
from rnn_longctx.measure.steps import steps_of
from rnn_longctx.mitigations import active, handles_on
from rnn_longctx.models import checkpoint
from rnn_longctx.models.generate import prefill
from rnn_longctx.models.saved_state import load_state, save_state

TEXT = Text("made", bytes(torch.randint(32, 127, (20000,), generator=torch.Generator().manual_seed(1)).tolist()))
OTHER = Text("other", bytes(torch.randint(32, 127, (20000,), generator=torch.Generator().manual_seed(2)).tolist()))
LM = "lm:slices=2,tokens=0"


def own():
    return make_model()


def library():
    torch.manual_seed(0)
    config = FAMILIES["mamba2"]()
    config.vocab_size = 256
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    return adopt(model, name="theirs", tokenizer=ByteTokenizer(), train_length=64)


def norm_of(model):
    return model.backbone.norm_f if hasattr(model, "backbone") else model.model.backbone.norm_f


def in_place(model):
    norm_of(model).weight.data.mul_(0.1)  # raises no version counter


def a_step(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.randint(32, 127, (2, 33))
    model.losses(model(ids[:, :-1]), ids[:, 1:]).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def of_its_config(model):
    if hasattr(model, "backbone"):
        for mixer in model.mixers:
            mixer.config = dataclasses.replace(mixer.config, dt_limit=(0.0, 1e-4))
    else:
        for mixer in model.mixers:
            mixer.module.time_step_limit = (0.0, 1e-4)


def eps(model):
    norm = norm_of(model)
    name = "eps" if hasattr(norm, "eps") else "variance_epsilon"
    assert hasattr(norm, name)
    setattr(norm, name, 10.0)


EDITS = pytest.mark.parametrize("edit", [in_place, a_step, of_its_config, eps])
MODELS = pytest.mark.parametrize("build", [own, library])


@EDITS
@MODELS
def test_cells_are_of_the_model_as_it_is(build, edit, tmp_path):
    model = build()

    def measured(out):
        frame = evaluate(model, [128], LM, text=OTHER, out=str(tmp_path / out))
        assert set(frame.weights_hash) == {model.weights_hash}  # a table is never of two models of one name
        return value(frame, 128)

    first = measured("a").value
    edit(model)
    assert measured("a").value == measured("fresh").value != first
    kept = Results(tmp_path / "a").frame().query("metric == 'nats_per_token' and length == 128")
    assert len(kept) == 2 and first in set(kept.value)


def test_an_edit_taken_back_finds_its_cells(tmp_path):
    model = own()
    first = evaluate(model, [128], LM, text=OTHER, out=str(tmp_path))
    before = norm_of(model).weight.detach().clone()
    in_place(model)
    evaluate(model, [128], LM, text=OTHER, out=str(tmp_path))
    norm_of(model).weight.data.copy_(before)
    norm_of(model).forward = None  # cannot be read
    again = evaluate(model, [128], LM, text=OTHER, out=str(tmp_path))
    assert set(first.value) == set(again.value) < set(Results(tmp_path).frame().value)


def test_a_snapshot_of_an_unfinished_stream_is_not_gone_on_from(tmp_path):
    model, results = own(), Results(tmp_path / "a")
    rows = LossOverLength(slices=2, tokens=0).run(Measuring(model, text=OTHER, batch=2, results=results), [128])
    next(rows)
    rows.close()  # read, and not all rows are written: the snapshot stays
    assert list((tmp_path / "a" / "snapshots").iterdir())
    in_place(model)
    again, fresh = (evaluate(model, [128], LM, text=OTHER, batch=2, out=str(tmp_path / out)) for out in ("a", "b"))
    now = model.weights_hash
    assert value(again[again.weights_hash == now], 128).value == value(fresh, 128).value


@EDITS
@MODELS
@torch.no_grad()
def test_states_remedies_and_monitors_of_before_are_told(build, edit, tmp_path, caplog, monkeypatch):
    objective = sys.modules[calibrate.__module__].Objective
    monkeypatch.setattr(objective, "loss", lambda self, remedy: float(remedy == "none"))
    monkeypatch.setattr(objective, "recall", lambda self, remedy: {"passkey@64": 1.0})
    model, state, remedy, kept = build(), tmp_path / "state", str(tmp_path / "remedy.yaml"), tmp_path / "monitor"
    save_state(state, prefill(model, torch.randint(32, 127, (1, 40)))[1], model)
    calibrate(model, "rri", 128, TEXT).save(remedy)
    monitor = CollapseMonitor.calibrated(model, TEXT, every=16)
    monitor.save(kept)

    def use():
        load_state(state, model)
        mitigate(model, f"stored-start:file={state}").remove()
        CollapseMonitor.load(kept, model)
        with monitor.on(model):
            pass
        with caplog.at_level(logging.WARNING):
            mitigate(model, remedy).remove()

    use()
    assert not caplog.records
    before = model.weights_hash
    with torch.enable_grad():
        edit(model)
    whose = rf"{before}.* {model.weights_hash}"
    for guard in (lambda: load_state(state, model), lambda: mitigate(model, f"stored-start:file={state}"),
                  lambda: CollapseMonitor.load(kept, model), lambda: monitor.on(model).__enter__(),
                  lambda: monitor.recalibrate(model, TEXT)):  # fmt: skip
        with pytest.raises(InputError, match=whose):
            guard()
    mitigate(model, remedy).remove()
    (said,) = [r.getMessage() for r in caplog.records]
    assert before in said and model.weights_hash in said


@torch.no_grad()
def test_a_watch_is_told_at_the_next_stream():
    model, ids = own(), torch.randint(32, 127, (1, 40))
    monitor = CollapseMonitor.calibrated(model, TEXT, every=16)
    with monitor.on(model, lambda report: None):
        prefill(model, ids)
        in_place(model)
        with pytest.raises(InputError, match="not of tiny"):
            prefill(model, ids)


@EDITS
@pytest.mark.parametrize("remedy", ["state-norm", "a-floor", "token-filter", "a-winsor:share=0.4"])
def test_a_remedy_is_worked_out_anew(edit, remedy, tmp_path):
    """Memos hold as long as the model does: as a model that was never measured says."""
    model = own()
    mitigate(model, remedy, target_length=128, text=TEXT).remove()
    model.mixers[0].A_log.data.sub_(1.0)
    edit(model)
    fresh = copy.deepcopy(model)
    vars(fresh).pop("_measured", None)
    plans = [mitigate(m, remedy, target_length=128, text=TEXT).plan for m in (model, fresh)]
    assert plans[0] == plans[1]


def test_a_remedy_of_before_is_named_as_such(tmp_path):
    """One that is on while the weights change stays on, and its cells are not those of one worked out on them."""
    model = own()
    handle = mitigate(model, "a-floor:tokens=20", text=TEXT)
    fresh_label = active(model)[1]
    before = model.weights_hash
    model.mixers[0].A_log.data.sub_(2.0)
    assert active(model)[1] == f"{fresh_label}, worked out on {before}"
    old = evaluate(model, [128], LM, text=OTHER, out=str(tmp_path))
    handle.remove()
    new = evaluate(model, [128], LM, "a-floor:tokens=20", text=OTHER, calibration_text=TEXT, out=str(tmp_path))
    new = new[new.calibration == fresh_label]
    name = "a-floor:tokens=20"
    assert value(new, 128, mitigation=name).value != value(old, 128, mitigation=name).value
    with mitigate(model, "rri"):  # reads nothing of a model
        in_place(model)
        assert active(model) == (handles_on(model)[0].remedy.__str__(), None)


@EDITS
def test_the_calibration_of_a_checkpoint_goes_with_its_weights(edit, tmp_path):
    model = own()
    ids = torch.randint(32, 127, (4, 64))
    checkpoint.save(model, tmp_path, calibration=measure_envelope(model, ids, "held out", "00").to_dict())
    model = rnn_longctx.load(tmp_path, train_length=64)
    model.tokenizer = ByteTokenizer()
    with mitigate(model, "state-norm") as handle:
        assert handle.plan.calibration.startswith("held out 00")
    first = model.calibration
    model.mixers[0].A_log.data = model.mixers[0].A_log.data.clone()  # a mapped file's
    for p in model.parameters():
        p.data = p.data.clone()
    assert model.calibration is first, "moved, not changed"
    edit(model)
    assert model.calibration is None
    with mitigate(model, "state-norm") as handle:
        assert handle.plan.calibration.startswith("builtin")


def test_the_shipped_calibration_is_the_demos():
    demo = rnn_longctx.load("demo")
    with mitigate(demo, "state-norm") as handle:
        assert handle.plan.calibration.startswith("site-packages (held out)")
    with mitigate(demo, "rri"):
        assert demo.calibration is not None


@MODELS
@pytest.mark.parametrize("remedy", ["state-norm", "a-floor", "token-filter", "none"])
def test_another_training_length_is_another_remedy(build, remedy, tmp_path):
    model = build()
    given = {"text": OTHER, "calibration_text": TEXT}
    evaluate(model, [128], LM, remedy, out=str(tmp_path / "a"), **given)
    model.train_length = 32
    again, fresh = (evaluate(model, [128], LM, remedy, out=str(tmp_path / out), **given) for out in ("a", "fresh"))
    label = fresh.calibration.iloc[0]
    again = again[again.calibration.isna() if label is None else again.calibration == label]
    name = fresh.mitigation.iloc[0]
    assert value(again, 128, mitigation=name).value == value(fresh, 128, mitigation=name).value
    assert label is None or "x 32" in label


def test_another_tokenizer_or_type_of_states_is_measured_anew():
    class Shifted(ByteTokenizer):
        name = "shifted"

        def encode_with_bytes(self, data):
            ids, sizes = super().encode_with_bytes(data)
            return (ids + 7) % 256, sizes

    model = own()
    first = steps_of(model, 64, TEXT)[0]
    assert steps_of(model, 64, TEXT)[0] is first
    model.tokenizer = Shifted()
    second = steps_of(model, 64, TEXT)[0]
    assert not torch.equal(first[0], second[0])
    model.use_state_dtype("bfloat16")
    assert steps_of(model, 64, TEXT)[0] is not second


def test_from_the_command_line(tmp_path):
    """A checkpoint whose weights were replaced, and one whose config was, are other models, by whatever name."""
    run, where, state = CliRunner().invoke, str(tmp_path / "it"), str(tmp_path / "s")
    (tmp_path / "t.txt").write_bytes(OTHER.data)
    model = own()
    checkpoint.save(model, where)
    measure = ["eval", where, "--lengths", "128", "--task", LM, "--text", str(tmp_path / "t.txt"), "--out"]
    generate = ["generate", where, "--prompt", "what is", "--max-new-tokens", "2"]

    def measured(out):
        assert run(app, [*measure, str(tmp_path / out)]).exit_code == 0
        frame = Results(tmp_path / out).frame()
        return value(frame[frame.weights_hash == rnn_longctx.load(where).weights_hash], 128).value

    found = [measured("a")]
    assert run(app, [*generate, "--save-state", state]).exit_code == 0
    assert run(app, [*generate, "--load-state", state]).exit_code == 0
    for change in (in_place, lambda m: setattr(m.config, "norm_eps", 10.0)):
        change(model)
        checkpoint.save(model, where)
        result = run(app, [*generate, "--load-state", state])
        assert isinstance(result.exception, InputError) and "was read by it" in str(result.exception)
        found.append(measured("a"))
        assert found[-1] == measured(f"fresh{len(found)}")
    assert len(set(found)) == 3
