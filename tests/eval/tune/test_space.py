"""What may be tuned is said beside a mixer's or a remedy's parameters, and settings are read from there."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product

import pytest

from rnn_longctx.errors import InputError
from rnn_longctx.eval.tune.budget import memory_text, parse_memory, parse_time, peak_of, time_text
from rnn_longctx.eval.tune.space import Space
from rnn_longctx.mitigations import REMEDIES
from rnn_longctx.models.mixers import MIXERS
from rnn_longctx.spec import Range, parse, quiet, tunable, tuned


@dataclass(frozen=True)
class Knobs:
    heads: int = 2
    size: int = tuned(4, over=(1, 2, 8))
    rate: float = tuned(0.1, over=Range(1e-3, 1.0, "log"))
    share: float = tuned(0.9, over=Range(0.5, 0.999, "near-one"), quiet=True)
    note: str = quiet("")

    def __post_init__(self) -> None:
        if self.size == 8 and self.rate > 0.5:
            raise InputError("knobs: size 8 takes a rate of at most 0.5")


@dataclass(frozen=True)
class Plain:
    heads: int = 2


KINDS = {"knobs": Knobs, "plain": Plain}


class Drawn:
    """A trial whose parameters are given."""

    def __init__(self, **params: float):
        self.params = params

    def suggest_int(self, name: str, low: int, high: int) -> int:
        assert low <= self.params[name] <= high
        return int(self.params[name])

    def suggest_float(self, name: str, low: float, high: float, log: bool = False) -> float:
        assert low <= self.params[name] <= high and (not log or low > 0)
        return self.params[name]


def test_the_default_is_read_back_from_its_own_parameters():
    space = Space.of("mixer", "knobs", KINDS)
    assert space.over["size"] == (1, 2, 4, 8), "the default is among the values"
    assert space.size == math.inf and Space.of("mixer", "knobs:rate=0.1,share=0.9", KINDS).size == 4
    assert space.text(space.suggest(Drawn(**space.params()))) == space.default_text == "knobs:heads=2,size=4,rate=0.1"


def test_values_are_short_and_in_their_ranges():
    space = Space.of("mixer", "knobs", KINDS)
    assert space.suggest(Drawn(size=0, rate=0.0012345, share=0.0123456)) == {
        "size": 1,
        "rate": 0.00123,
        "share": 0.9877,
    }
    for end in (1e-3, 1.0):
        assert space.suggest(Drawn(size=0, rate=end, share=0.5))["rate"] == end


def test_what_is_given_stays():
    space = Space.of("mixer", "knobs:size=3,heads=4", KINDS)
    assert set(space.over) == {"rate", "share"}
    assert space.text({"rate": 0.2}) == "knobs:heads=4,size=3,rate=0.2"
    start = Space.of("mixer", "knobs:size=8", KINDS, "knobs:size=2,rate=0.3")
    assert start.default_text == "knobs:heads=2,size=8,rate=0.3"
    assert parse(start.default_text, KINDS, "mixer") == start.default


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("plain", "has nothing to tune; these have: knobs"),
        ("knob", "unknown mixer 'knob'; did you mean \"knobs\""),
        ("knobs:siz=2", "no parameter 'siz'"),
        ("knobs:size=1,rate=1,share=0.5", "nothing is left to tune"),
        ("knobs:size=two", "expected int"),
    ],
)
def test_what_cannot_be_tuned(text, words):
    with pytest.raises(InputError) as error:
        Space.of("mixer", text, KINDS)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("read", "texts"), [
    (parse_time, {"90s": 90, "20m": 1200, "1.5h": 5400}),
    (parse_memory, {"512m": 512 * 1024**2, "8G": 8 * 1024**3}),
])  # fmt: skip
def test_budgets(read, texts):
    assert {text: read(text) for text in texts} == texts
    for bad in ("", "20", "m", "0m", "-5m", "20x", "twenty", "5 5m", "1e3m", "٢m"):
        with pytest.raises(InputError, match="such as"):
            read(bad)


def test_sizes_and_times_are_read_easily():
    assert [time_text(s) for s in (45.4, 150, 9000)] == ["45 s", "2.5 min", "2.5 h"]
    assert [memory_text(b) for b in (300 * 1024**2, 3 * 1024**3)] == ["300 MB", "3.00 GB"]
    assert (peak_of() or 0) > 2**24


@pytest.mark.parametrize("name", [*MIXERS, *REMEDIES])
def test_every_range_holds_settings_that_can_be_had(name):
    """Each value by itself with some values of the others, at the least; ends of ranges, too."""
    kinds = {name: MIXERS[name].Config} if name in MIXERS else {name: REMEDIES[name]}
    over = tunable(kinds[name])
    if not over:
        return
    space = Space.of("mixer", name, kinds)
    values = {key: list(v) if not isinstance(v, Range) else [v.low, v.high] for key, v in space.over.items()}
    had = set()
    for chosen in product(*values.values()):
        setting = dict(zip(values, chosen))
        try:
            replace(space.default, **setting)
        except InputError:
            continue
        had |= set(setting.items())
    assert had == {(key, value) for key, many in values.items() for value in many}
    assert space.default_text == space.text({key: getattr(space.default, key) for key in over})
