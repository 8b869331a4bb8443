"""What is registered from outside works, or one line says what it lacks; processes begun from here have it too."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from echo_task import Echo
from torch import nn

from rnn_longctx.errors import InputError
from rnn_longctx.eval.jobs.loss import LossOverLength
from rnn_longctx.eval.jobs.parsing import parse_task
from rnn_longctx.eval.jobs.recall import Counts
from rnn_longctx.mitigations import REMEDIES, Plan, Remedy
from rnn_longctx.mitigations.base import same_everywhere
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.models.mixers.base import Recurrent
from rnn_longctx.plugins import COUNTS, LOADED, load_plugin, register
from rnn_longctx.recurrence.backends import Backends
from rnn_longctx.recurrence.interface import RECURRENCES
from rnn_longctx.recurrence.ssd import SSD
from rnn_longctx.tasks import TASKS, Task


@pytest.fixture(autouse=True)
def _registries(monkeypatch):
    """All that are there, and what comes until the test ends."""
    for registry in (REMEDIES, TASKS, MIXERS, RECURRENCES):
        monkeypatch.setattr(registry, "_known", dict(registry))


def remedy(name="forgets", **members):
    def plan(self, model, target_length=None, text=None):
        return Plan(same_everywhere(model))

    return type("Made", (Remedy,), {"name": name, "plan": plan, **members})


def task(name="echoes", **members):
    return type("Made", (Echo,), {"name": name, **members})


def mixer(**members):
    return type("Made", (nn.Module,), {"name": "made", **members})


def test_what_works_is_registered():
    for registry, thing in [(REMEDIES, remedy()), (TASKS, task())]:
        thing = dataclass(frozen=True)(thing)
        assert register(thing) is thing and registry[thing.name] is thing
    rule = type("Rule", (), {"name": "rule", **{m: getattr(SSD, m) for m in ("follows", "takes", "backends")}})()
    rule.scan, rule.reference, rule.state, rule.unfollowed = SSD.scan, SSD.reference, SSD.state, SSD.unfollowed
    assert register(rule) is rule and RECURRENCES["rule"] is rule
    for registry in (REMEDIES, TASKS, MIXERS, RECURRENCES):
        for thing in registry.values():
            assert register(thing) is thing, "the package's own lack nothing"


@pytest.mark.parametrize("name", ["my:x", "a+b", "a,b", "a=b", "a b", "-a", "found.yaml", "a@b", "a/b", ""])
def test_names_that_no_command_line_can_take(name):
    for thing in (dataclass(frozen=True)(remedy(name)), dataclass(frozen=True)(task(name)), mixer(name=name)):
        nameless = "has none|lacks name, "
        with pytest.raises(InputError, match="letters, digits, - and _" if name else nameless):
            register(thing)


def test_names_that_stand_for_something_else():
    with pytest.raises(InputError, match='a remedy cannot be called "all"'):
        register(dataclass(frozen=True)(remedy("all")))
    with pytest.raises(InputError, match='a task cannot be called "lm"'):
        register(dataclass(frozen=True)(task("lm")))
    assert LossOverLength.name == "lm"


def test_parameters_are_those_of_a_dataclass_of_its_own():
    for thing in (remedy(__annotations__={"factor": float}, factor=1.0), task()):
        with pytest.raises(InputError, match=rf"{thing.name} must be a frozen dataclass: put @dataclass"):
            register(thing)


def test_methods_that_are_missing():
    @dataclass(frozen=True)
    class Idle(Remedy):
        name = "idle"

    @dataclass(frozen=True)
    class Silent(Task):
        name = "silent"

    for thing, lacks in [(Idle, "remedy idle lacks the method plan"), (Silent, "task silent lacks the method example")]:
        with pytest.raises(InputError, match=lacks):
            register(thing)


@pytest.mark.parametrize("parameter", [f.name for f in fields(Counts)])
def test_a_task_leaves_the_counts_their_names(parameter):
    made = dataclass(frozen=True)(task(__annotations__={parameter: int}, **{parameter: 1}))
    with pytest.raises(InputError, match=f"task echoes: {parameter} says how many examples"):
        register(made)
    assert {f.name for f in fields(Counts)} == set(COUNTS)
    TASKS.register(made)  # not by `register`: it is refused when it is asked for
    with pytest.raises(InputError, match=f"{parameter} says how many examples"):
        parse_task("echoes")


def test_mixers_that_lack_something():
    with pytest.raises(InputError, match="mixer made lacks Config, attends, of, new_carry, state_size, forward "):
        register(mixer())
    with pytest.raises(InputError, match="mixer made lacks Config, of, heads, headdim, d_state, inputs "):
        register(type("Made", (Recurrent,), {"name": "made"}))
    with pytest.raises(InputError, match="mixer Made lacks name, Config, of, heads, headdim, d_state, inputs "):
        register(type("Made", (Recurrent,), {}))
    with pytest.raises(InputError, match="its Config must be a dataclass"):
        register(type("Made", (MIXERS["gla"],), {"name": "made", "Config": dict}))


def test_recurrences_that_lack_something():
    rule = type("Rule", (), {"name": "rule", "backends": Backends(), "follows": frozenset()})
    with pytest.raises(InputError, match="recurrence rule lacks takes, scan, unfollowed, reference, state "):
        register(rule())
    with pytest.raises(InputError, match="none of a remedy"):  # the class, not an object of it
        register(rule)


def test_processes_that_are_begun_know_what_was_loaded(tmp_path, monkeypatch):
    path = tmp_path / "toy_note.py"
    path.write_text("print('loaded the file')\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    for name in ("toy_note.py", "json", "toy_note.py"):
        load_plugin(name)
    for name, error in [("broken.py", ZeroDivisionError), ("gone.py", InputError)]:
        with pytest.raises(error):
            load_plugin(name)
    for name in set(sys.modules) - before:
        if "toy_note" in name:
            del sys.modules[name]
    assert os.environ[LOADED].split("\n") == [str(path), "json"]
    command = [sys.executable, "-m", "rnn_longctx.eval.capacity.cell", str(tmp_path / "none"), "cell"]
    ended = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert ended.stdout == "loaded the file\n" and "none" in ended.stderr
