from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from rnn_longctx.config import counted, format_length, from_dict, load_yaml, parse_length, parse_lengths, to_dict
from rnn_longctx.errors import InputError


@dataclass(frozen=True)
class Inner:
    rate: float = 1e-3
    limits: tuple[float, float] = (0.0, math.inf)
    kind: Literal["cosine", "wsd"] = "cosine"

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise InputError(f"rate: must not be negative, got {self.rate}")


@dataclass
class Outer:
    name: str
    steps: int = 10
    amp: bool | Literal["auto"] = "auto"
    lengths: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    cap: int | None = None
    folder: Path = Path("runs")
    inner: Inner = field(default_factory=Inner)
    more: dict[str, float] = field(default_factory=dict)
    anything: Any = None


def test_every_type_is_read() -> None:
    given = {
        "name": "a",
        "steps": "64k",
        "amp": True,
        "lengths": [256, "1k"],
        "texts": "one,file",
        "cap": None,
        "folder": "x/y",
        "inner": {"rate": "3e-3", "limits": [0, "inf"], "kind": "wsd"},
        "more": {"a": 1},
        "anything": [1, {"b": 2}],
    }
    made = from_dict(Outer, given)
    inner = Inner(3e-3, (0.0, math.inf), "wsd")
    assert made == Outer(
        "a", 65536, True, [256, 1024], ["one,file"], None, Path("x/y"), inner, {"a": 1.0}, [1, {"b": 2}]
    )
    assert isinstance(made.more["a"], float) and isinstance(made.inner.limits, tuple)
    assert from_dict(Outer, {"name": "a", "lengths": "256, 1k,1m"}).lengths == [256, 1024, 2**20]
    assert from_dict(Outer, to_dict(made)) == made


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"name": "a", "stesp": 1}, ['"stesp"', 'did you mean "steps"']),
        ({"name": "a", "inner": {"ratr": 1}}, ['"inner.ratr"', '"rate"']),
        ({"steps": 3}, ['missing key "name"', "str"]),
        ({"name": "a", "steps": 1.5}, ["steps", "int", "1.5"]),
        ({"name": "a", "steps": True}, ["steps", "int", "bool"]),
        ({"name": "a", "steps": "many"}, ["steps", "int", "many"]),
        ({"name": "a", "inner": {"rate": "fast"}}, ["inner.rate", "float", "fast"]),
        ({"name": "a", "inner": {"rate": False}}, ["inner.rate", "float", "bool"]),
        ({"name": "a", "inner": {"limits": [1, 2, 3]}}, ["inner.limits", "list of 2"]),
        ({"name": "a", "inner": {"kind": "cosin"}}, ["inner.kind", "cosin", 'did you mean "cosine"']),
        ({"name": "a", "inner": 3}, ["inner", "mapping", "3"]),
        ({"name": "a", "inner": {"rate": -1}}, ["inner.rate", "negative"]),
        ({"name": "a", "amp": "yes"}, ["amp", "bool or 'auto'", "yes"]),
        ({"name": "a", "lengths": [256, "x"]}, ["lengths[1]", "int", "x"]),
        ({"name": 3}, ["name", "str", "int 3"]),
        ({"name": None}, ["name", "str", "null"]),
    ],
)
def test_mistakes_are_one_line_naming_key_and_file(given: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        from_dict(Outer, given, where="some.yaml")
    message = str(error.value)
    assert message.startswith("some.yaml: ") and "\n" not in message
    assert all(word in message for word in words), message


def test_yaml_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("name: a\ninner:\n  rate: 3e-3\n")
    made = load_yaml(Outer, file, ["inner.kind=wsd", "lengths=256,4k", "more.x=2", "amp=false", "name=rri:a=1,b=2"])
    assert made.inner == Inner(3e-3, kind="wsd")
    assert (made.lengths, made.more, made.amp, made.name) == ([256, 4096], {"x": 2.0}, False, "rri:a=1,b=2")


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("- 1\n- 2\n", [], ["mapping"]),
        ("name: [\n", [], ["not valid YAML"]),
        ("name: a\n", ["steps"], ["key=value", "steps"]),
        ("name: a\n", ["name.x=1"], ["name.x=1", "not a group"]),
        ("name: a\n", ["steps=[1"], ["not a YAML value"]),
        ("name: a\n", ["inner.rat=1"], ["inner.rat"]),
        ("", [], ["missing key"]),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, overrides: list[str], words: list[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        load_yaml(Outer, file, overrides)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_missing_file() -> None:
    with pytest.raises(InputError, match=r"cannot read config nowhere\.yaml"):
        load_yaml(Outer, "nowhere.yaml")


def test_lengths() -> None:
    assert [parse_length(t) for t in ("256", "64k", "64K", " 1m ", 17)] == [256, 65536, 65536, 2**20, 17]
    assert parse_lengths("256,1k,4k") == [256, 1024, 4096]
    assert format_length(65536) == "64K" and format_length(2**20) == "1M" and format_length(1000) == "1000"
    for _ in range(50):
        length = random.randrange(1, 1 << random.randrange(1, 30))
        assert parse_length(format_length(length)) == length


@pytest.mark.parametrize("bad", ["0", "-5", "", "k", "1.5k", "1kk", "ten", "1e3", "٣", 0, -1, True, 2.5])
def test_bad_lengths(bad: Any) -> None:
    with pytest.raises(InputError, match="length"):
        parse_length(bad)
    with pytest.raises(InputError):
        parse_lengths([256, bad])


def test_numbers_of_things() -> None:
    assert [counted(n, "head") for n in (0, 1, 2)] == ["0 heads", "1 head", "2 heads"]
    assert [counted(n, "policy", "policies") for n in (1, 3)] == ["1 policy", "3 policies"]


def test_no_lengths() -> None:
    for empty in ("", [], None, 3.5):
        with pytest.raises(InputError):
            parse_lengths(empty)


def test_a_config_of_something_else() -> None:
    from rnn_longctx.eval import EvalConfig
    from rnn_longctx.train.config import TrainConfig

    configs = Path(__file__).parents[1] / "configs"
    for kind, file in ((EvalConfig, "train/demo.yaml"), (TrainConfig, "eval/demo.yaml")):
        with pytest.raises(InputError, match=r"is a config of something else .* unknown here"):
            load_yaml(kind, configs / file)


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "configs" / "eval").glob("*.yaml")))
def test_shipped_evaluation_configs_name_what_there_is(file: Path) -> None:
    from rnn_longctx.eval import EvalConfig, parse_task
    from rnn_longctx.mitigations import parse_remedy

    config = load_yaml(EvalConfig, file)
    assert all(map(parse_task, config.tasks))
    named = [str(parse_remedy(name)) for name in config.mitigations if name != "all"]
    assert len(set(named)) == len(named)


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "configs" / "train").rglob("*.yaml")))
def test_shipped_training_configs_load(file: Path) -> None:
    from rnn_longctx.train.config import TrainConfig

    config = load_yaml(TrainConfig, file)
    assert from_dict(TrainConfig, to_dict(config)) == config


def test_a_key_said_twice(tmp_path):
    """snowflakedb/ArcticTraining#85, yaml/pyyaml#165: of two values PyYAML takes the last, without a word."""
    file = tmp_path / "c.yaml"
    for text in ("name: a\nsteps: 1\nsteps: 2\n", "name: a\ninner:\n  rate: 1\n  rate: 2\n"):
        file.write_text(text)
        with pytest.raises(InputError, match=r"c.yaml is not valid YAML: .*'(steps|rate)' is there twice") as caught:
            load_yaml(Outer, file)
        assert "line" in str(caught.value)
    file.write_text("name: a\nmore: &base {rate: 1.0}\ninner:\n  <<: *base\n  rate: 2.0\n")
    found = load_yaml(Outer, file)  # what a merge brings may be overridden
    assert found.more == {"rate": 1.0} and found.inner.rate == 2.0


@pytest.mark.parametrize("path", ["hello there " * 40, "a\0b", "x/" + "y" * 256, 5])
def test_what_can_be_no_path_is_said(path):
    """Text in the place of its file's name, which the system would refuse in its own words."""
    from rnn_longctx import load, load_text
    from rnn_longctx.config import home_path
    from rnn_longctx.data import load_tokenizer

    for read in (home_path, load, load_text, load_tokenizer):
        with pytest.raises(InputError) as error:
            read(path)
        assert len(str(error.value)) < 200 and "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"(a path was expected|expected a path)"):
        home_path(path)
