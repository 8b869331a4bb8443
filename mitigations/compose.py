"""Remedies as text: one, or several composed with +, from names and parameters or from a file of `calibrate`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.base import REMEDIES, Plan, Remedy, planned
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.recurrence.policy import PLAIN, ScanPolicy
from rnn_longctx.spec import parse

if TYPE_CHECKING:
    from rnn_longctx.data import Text


@dataclass(frozen=True)
class Composite(Remedy):
    """`a+b`: both, in that order. Affine parts compose, all caps apply, the smaller window wins."""

    parts: tuple[Remedy, ...] = ()

    def __post_init__(self) -> None:
        names = [str(remedy) for remedy in self.parts]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InputError(f"{'+'.join(names)}: {twice} is composed with itself")
        if len(controls := [str(remedy) for remedy in self.parts if remedy.control]) > 1:
            raise InputError(f"{' and '.join(controls)} cannot be combined: both say when to start again")
        if len(starts := [str(remedy) for remedy in self.parts if remedy.starts]) > 1:
            raise InputError(f"{' and '.join(starts)} cannot be combined: both say what rows start from")
        seen: dict[type[Remedy], str] = {}
        for remedy, name in zip(self.parts, names):
            kind = remedy.kind
            if not kind.adds and (first := seen.setdefault(kind, name)) != name:
                raise InputError(f"{first} and {name} cannot be combined: give one {kind.name}")

    @property
    def per_length(self) -> bool:  # type: ignore[override]
        return any(remedy.per_length for remedy in self.parts)

    def plan(self, model: LanguageModel, target_length: int | None = None, text: Text | None = None) -> Plan:
        return combine([planned(remedy, model, target_length, text) for remedy in self.parts], model)

    def __str__(self) -> str:
        return "+".join(map(str, self.parts))


def parse_remedy(text: str | Remedy) -> Remedy:
    """Return a remedy from `name:key=value,...`, from a file that `calibrate` wrote, or several from `a+b`.

    Raises InputError: unknown names and parameters (with the nearest one), values out of range, a composition that
    means nothing (two controls; a norm cap with a window; a remedy with itself, or with another setting of its own
    unless `Remedy.adds`), what is neither text nor a remedy.
    """
    if isinstance(text, Remedy):
        return text
    if not isinstance(text, str):
        several = "several are composed with +, as in a-floor+state-norm"
        raise InputError(f"a remedy is a string such as none or state-norm, {several}; got {text!r:.80}")
    if text.strip() == "all":
        raise InputError('"all" stands for every remedy in evaluate and rnn-longctx eval alone: name one here')
    first, *pieces = [piece.strip() for piece in text.split(",")]
    if any(map(_begins_remedy, pieces)):
        joined = first + "".join(("+" if _begins_remedy(piece) else ",") + piece for piece in pieces)
        raise InputError(f"{text!r}: + composes remedies, as in {joined}; to measure them apart, name each by itself")
    remedies = [_parse_one(name.strip()) for name in text.split("+")]
    parts = tuple(single for remedy in remedies for single in remedy.parts)
    return Composite(parts) if len(parts) > 1 else parts[0] if parts else remedies[0]


def combine(plans: list[Plan], model: LanguageModel) -> Plan:
    """Return plans for one model, one after the other. InputError if two say how a prompt is read."""
    restarts = [plan.restart for plan in plans if plan.restart]
    if len(restarts) > 1:
        raise InputError(f"{' and '.join(map(str, restarts))} cannot be combined")
    readers = [plan.reader for plan in plans if plan.reader]
    if len(readers) > 1 or (readers and restarts):
        ways = "decimate, chunk-select, lamb, reset, recompute"
        raise InputError(f"of the ways to read a prompt ({ways}) one can be taken")
    policies = [reduce(ScanPolicy.then, layer, PLAIN) for layer in zip(*(plan.policies for plan in plans))]
    return Plan(
        tuple(policies) or (PLAIN,) * len(model.mixers),
        restart=restarts[0] if restarts else None,
        reader=readers[0] if readers else None,
        scaling=next((plan.scaling for plan in plans if plan.scaling), None),
        calibrations=tuple(calibration for plan in plans for calibration in plan.calibrations),
        weights=next((plan.weights for plan in plans if plan.weights), None),
    )


def _begins_remedy(piece: str) -> bool:
    name = piece.partition(":")[0]
    return "=" not in name and name in REMEDIES  # (a parameter is no name: to look it up would read every file)


def _parse_one(text: str) -> Remedy:
    if text.partition("@")[0].endswith((".yaml", ".yml")):
        from rnn_longctx.mitigations.calibrated import CalibratedRemedy

        return CalibratedRemedy.read(text)
    return parse(text, REMEDIES, "mitigation")
