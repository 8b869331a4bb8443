"""A remedy from outside the package: its file is all that it takes."""

import copy
from dataclasses import dataclass

import pytest
import torch

import rnn_longctx
from rnn_longctx import InputError, evaluate, fold, mitigate
from rnn_longctx.config import parse_length
from rnn_longctx.eval.search.calibrate import calibrate
from rnn_longctx.mitigations import REMEDIES, NotApplicable, Plan, Remedy, active, parse_remedy, standard
from rnn_longctx.mitigations.base import same_everywhere
from rnn_longctx.plugins import load_plugin, register
from rnn_longctx.testing.remedies import calibration_text, check_remedy, own_model

TOY = '''
"""Forgets faster by a factor, and less of what comes late."""

from dataclasses import dataclass

import rnn_longctx
from rnn_longctx.errors import InputError
from rnn_longctx.mitigations import Plan, Remedy
from rnn_longctx.mitigations.base import Need, same_everywhere
from rnn_longctx.recurrence.policy import ScanPolicy


@rnn_longctx.register
@dataclass(frozen=True)
class Toy(Remedy):
    name = "toy-forget"
    needs = frozenset({Need.RECURRENCE, Need.TRAIN_LENGTH})
    search = "grid"
    factor: float = 1.5

    def __post_init__(self):
        if not self.factor > 0:
            raise InputError(f"toy-forget: factor must be above 0, got {self.factor:g}")

    @classmethod
    def grid(cls, train_length, fixed):
        return {"factor": [0.5, 1.0, 2.0]}

    def plan(self, model, target_length=None, text=None):
        return Plan(same_everywhere(model, ScanPolicy(mul=self.factor)))
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setattr(REMEDIES, "_known", dict(REMEDIES))  # all that are there, and what comes until the test ends
    path = tmp_path / "toy_remedy.py"
    path.write_text(TOY)
    torch.set_num_threads(1)
    return load_plugin(str(path)).Toy


def test_it_is_held_to_the_contract(toy):
    check_remedy("toy-forget:factor=0.8")
    check_remedy("toy-forget", kinds=["own"])


def test_a_remedy_that_is_applicable_to_nothing_is_not_held_to_anything(toy, monkeypatch):
    def plan(self, model, target_length=None, text=None):
        raise NotApplicable("toy-forget cannot be used at all")

    monkeypatch.setattr(toy, "plan", plan)
    with pytest.raises(AssertionError, match="applicable to no kind of model"):
        check_remedy("toy-forget", kinds=["own", "given gates"])


def test_it_is_parsed_composed_and_put_on(toy):
    assert parse_remedy("toy-forget") == toy() and str(toy(2.0)) == "toy-forget:factor=2"
    with pytest.raises(InputError, match='did you mean "toy-forget"'):
        parse_remedy("toy-forgt")
    with pytest.raises(InputError, match="toy-forget has no parameter 'facto'; did you mean \"factor\""):
        parse_remedy("toy-forget:facto=2")
    with pytest.raises(InputError, match="cannot be combined: give one toy-forget"):
        parse_remedy("toy-forget+toy-forget:factor=2")
    model = own_model()
    with mitigate(model, "rri:alpha=0.9,beta=0.5+toy-forget:factor=2"):
        policy = model.mixers[0].policy
        assert policy.mul == 2 and policy.gain == 0.5 and active(model)[0].endswith("+toy-forget:factor=2")
    model.train_length = None
    with pytest.raises(NotApplicable, match="toy-forget needs the training length"):
        mitigate(model, "toy-forget")


def test_it_is_evaluated_and_among_all(toy, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(torch.randint(97, 123, (4000,)).tolist()))
    frame = evaluate(own_model(), [64], ["lm:slices=1,tokens=0"], ["none", "toy-forget"], text=str(path))
    assert set(frame.mitigation) == {"none", "toy-forget:factor=1.5"}
    assert "toy-forget" in standard(32) and "toy-forget" not in standard(None)


def test_it_is_calibrated_and_not_folded(toy, tmp_path):
    model = own_model()
    model.train_length = 160
    found = calibrate(model, "toy-forget", parse_length("320", "target"), calibration_text(), slices=1, prompts=1)
    assert len(found.scores["tried"]) == 3 and found.method == "grid" and found.remedy.startswith("toy-forget:factor=")
    found.save(tmp_path / "toy.yaml")
    with pytest.raises(InputError, match="cannot be combined: give one toy-forget"):
        parse_remedy(f"{tmp_path / 'toy.yaml'}+toy-forget")
    with pytest.raises(InputError, match=r"toy-forget:factor=1\.5 cannot be folded into weights: a-floor, "):
        fold(copy.deepcopy(model), "toy-forget")


def test_what_is_registered():
    @dataclass(frozen=True)
    class Rival(Remedy):
        name = "rri"

        def plan(self, model, target_length=None, text=None):
            return Plan(same_everywhere(model))

    for thing, message in [
        (Rival, r"two mitigations are called 'rri': rnn_longctx\.mitigations\.rri\.RRI and .*Rival"),
        (Remedy, "has none"),
        (int, "none of a remedy"),
        ("rri", "none of a remedy"),
    ]:
        with pytest.raises(InputError, match=message):
            register(thing)
    assert REMEDIES["rri"].__name__ == "RRI" and rnn_longctx.register is register


def test_plugins_that_are_not_there(tmp_path, toy):
    assert load_plugin(str(tmp_path / "toy_remedy.py")).Toy is toy, "a file is read once"
    assert load_plugin("json").__name__ == "json"
    for name, message in [
        (str(tmp_path / "none.py"), "no such file"),
        ("no_such_module_at_all", "no module named 'no_such_module_at_all'"),
        ("no_such_module_at_all.inside", "no module named"),
        ("..", "no module named"),
    ]:
        with pytest.raises(InputError, match=message):
            load_plugin(name)
    (tmp_path / "needs.py").write_text("import no_such_module_at_all\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        load_plugin(str(tmp_path / "needs.py"))
