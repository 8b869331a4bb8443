"""What is tuned: the parameters that a mixer's or a remedy's own dataclass says may be (`rnn_longctx.spec.tuned`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from rnn_longctx.errors import InputError, nearest
from rnn_longctx.spec import Over, Range, arguments, build, canonical, tunable


@dataclass(frozen=True)
class Space:
    """The settings of one mixer or remedy among which the best is searched.

    Attributes:
        name: of the mixer or remedy.
        default: its dataclass as it is without tuning; parameters that are not tuned stay as they are there.
        over: what each parameter is tuned over; the default's value is always in it.
    """

    name: str
    default: Any
    over: dict[str, Over]

    @classmethod
    def of(cls, what: str, text: str, kinds: Mapping[str, Any], default: str | None = None) -> Space:
        """Return the space of `name`, or of `name:key=value,...`, whose parameters that are given stay as they are.

        Args:
            what: "mixer" or "mitigation", for messages.
            kinds: the dataclasses of parameters by names.
            default: the text of the setting that the others are set against, but for what `text` gives. None: the
                defaults of the dataclass.
        Raises:
            InputError: an unknown name or parameter; nothing is left to tune; a parameter without a default.
        """
        name = text.strip().partition(":")[0]
        if name not in kinds:
            raise InputError(f"unknown {what} {name!r}{nearest(name, kinds)}")
        kind = kinds[name]
        given = arguments(text, fields(kind), what) if ":" in text else {}
        over = {key: values for key, values in tunable(kind).items() if key not in given}
        if not over:
            raise InputError(_nothing(what, name, kinds, fixed=bool(tunable(kind))))
        start = build(kind, arguments(default or name, fields(kind), what) | given, text, what)
        return cls(name, start, {key: _with(values, getattr(start, key)) for key, values in over.items()})

    @property
    def default_text(self) -> str:
        return canonical(self.name, self.default)

    @property
    def size(self) -> float:
        """How many settings there are, refused ones among them; infinity where a parameter has a range."""
        return math.prod(math.inf if isinstance(over, Range) else len(over) for over in self.over.values())

    def text(self, values: Mapping[str, Any]) -> str:
        """Return the setting of some values. Raises InputError where the dataclass refuses them together."""
        return canonical(self.name, replace(self.default, **values))

    def described(self) -> dict[str, Any]:
        """Return what is searched over as plain values, by which a study is told from another."""
        return {key: vars(over) if isinstance(over, Range) else list(over) for key, over in self.over.items()}

    def suggest(self, trial: Any) -> dict[str, Any]:
        """Return the values of an Optuna trial. Values to choose from are in an order that matters, so that a trial
        holds the place of one and not the value."""
        values: dict[str, Any] = {}
        for key, over in self.over.items():
            if not isinstance(over, Range):
                values[key] = over[trial.suggest_int(key, 0, len(over) - 1)]
            elif over.scale == "near-one":
                away = trial.suggest_float(key, 1 - over.high, 1 - over.low, log=True)
                values[key] = round(1 - float(f"{away:.3g}"), 9)
            else:
                values[key] = float(f"{trial.suggest_float(key, over.low, over.high, log=over.scale == 'log'):.3g}")
        return values

    def params(self) -> dict[str, float]:
        """Return what `suggest` reads the default from."""
        params: dict[str, float] = {}
        for key, over in self.over.items():
            value = getattr(self.default, key)
            if isinstance(over, Range):
                params[key] = 1 - value if over.scale == "near-one" else value
            else:
                params[key] = over.index(value)
        return params


def _with(over: Over, value: Any) -> Over:
    """Return what a parameter is tuned over with its default in it."""
    if not isinstance(over, Range):
        return over if value in over else tuple(sorted({*over, value}, key=lambda v: (isinstance(v, str), v)))
    if not isinstance(value, int | float):  # such as one a layer
        raise InputError(f"tuned is one number, and the default is {value!r}")
    return replace(over, low=min(over.low, value), high=max(over.high, value))


def _nothing(what: str, name: str, kinds: Mapping[str, Any], fixed: bool) -> str:
    if fixed:
        return f"{what} {name}: nothing is left to tune, all that may be is given"
    others = [other for other in kinds if tunable(kinds[other])]
    return f"{what} {name} has nothing to tune; these have: {', '.join(others)}"
