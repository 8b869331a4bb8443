"""Remedies at inference time, one file each; `mitigate` puts one on a model and takes it off again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rnn_longctx.config import parse_length
from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.a_floor import AFloor
from rnn_longctx.mitigations.a_scale import AScale
from rnn_longctx.mitigations.a_winsor import AWinsor
from rnn_longctx.mitigations.base import NotApplicable, Plan, Remedy
from rnn_longctx.mitigations.chunk_select import ChunkSelect
from rnn_longctx.mitigations.controls import Recompute, Reset
from rnn_longctx.mitigations.decimate import Decimate
from rnn_longctx.mitigations.delta_scale import DeltaScale
from rnn_longctx.mitigations.hybrid import AttentionWindow, ResetRecurrence
from rnn_longctx.mitigations.noise_start import NoiseStart
from rnn_longctx.mitigations.none import Nothing
from rnn_longctx.mitigations.rri import RRI
from rnn_longctx.mitigations.state_norm import StateNorm
from rnn_longctx.mitigations.stored import Stored
from rnn_longctx.mitigations.stored_start import StoredStart
from rnn_longctx.mitigations.token_filter import TokenFilter
from rnn_longctx.mitigations.window import Window
from rnn_longctx.models.adopt.adopting import Adopted, adopted, as_language_model
from rnn_longctx.models.adopt.wrapped import innermost
from rnn_longctx.models.checkpoint import checkpoint
from rnn_longctx.models.lm import Mamba2LM
from rnn_longctx.recurrence.policy import PLAIN, ScanPolicy
from rnn_longctx.spec import parse

if TYPE_CHECKING:
    from torch import nn

    from rnn_longctx.data import Text

__all__ = ["REMEDIES", "Handle", "NotApplicable", "Plan", "Remedy", "active", "diagnostics", "fold", "handles_on",
           "mitigate", "parse_remedy", "standard"]  # fmt: skip

REMEDIES: dict[str, type[Remedy]] = {
    r.name: r
    for r in (
        Nothing, StateNorm, RRI, Window, DeltaScale, AScale, AWinsor, AFloor, TokenFilter, Decimate, ChunkSelect,
        NoiseStart, StoredStart, Reset, Recompute, AttentionWindow, ResetRecurrence,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Composite(Remedy):
    """`a+b`: both, in that order. Affine parts compose, all caps apply, the smaller window wins."""

    parts: tuple[Remedy, ...] = ()

    def __post_init__(self) -> None:
        named, seen = [str(p) for p in self.parts], dict[type[Remedy], str]()
        if twice := next((name for name in named if named.count(name) > 1), None):
            raise InputError(f"{'+'.join(named)}: {twice} is composed with itself")
        restarting = [str(p) for p in self.parts if p.control]
        if len(restarting) > 1:
            raise InputError(f"{' and '.join(restarting)} cannot be combined: both say when to start again")
        starting = [str(p) for p in self.parts if isinstance(p, NoiseStart | StoredStart)]
        if len(starting) > 1:
            raise InputError(f"{' and '.join(starting)} cannot be combined: both say what rows start from")
        for part, name in zip(self.parts, named):
            told = part.found.remedy.partition(":")[0] if isinstance(part, Stored) else part.name
            kind = REMEDIES.get(told, type(part))
            if not kind.adds and (first := seen.setdefault(kind, name)) != name:
                raise InputError(f"{first} and {name} cannot be combined: give one {kind.name}")

    @property
    def per_length(self) -> bool:  # type: ignore[override]
        return any(p.per_length for p in self.parts)

    def plan(self, model: Mamba2LM, target_length: int | None = None, text: Text | None = None) -> Plan:
        return combine([p.plan(model, target_length, text) for p in self.parts], model)

    def __str__(self) -> str:
        return "+".join(map(str, self.parts))


def parse_remedy(text: str | Remedy) -> Remedy:
    """A remedy from `name:key=value,...`, from a file that `calibrate` wrote, or several from `a+b`.

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
    pieces = text.split(",")
    if any(piece.strip().partition(":")[0] in REMEDIES for piece in pieces[1:]):
        joined = pieces[0] + "".join(
            ("+" if p.strip().partition(":")[0] in REMEDIES else ",") + p.strip() for p in pieces[1:]
        )
        raise InputError(f"{text!r}: + composes remedies, as in {joined}; to measure them apart, name each by itself")
    parts = [part for one in text.split("+") for part in _parts(_one(one.strip()))]
    return Composite(tuple(parts)) if len(parts) > 1 else parts[0] if parts else Nothing()


def _parts(remedy: Remedy) -> tuple[Remedy, ...]:
    """What a remedy is composed of; nothing of `none`."""
    return remedy.parts if isinstance(remedy, Composite) else () if isinstance(remedy, Nothing) else (remedy,)


def _one(text: str) -> Remedy:
    if text.partition("@")[0].endswith((".yaml", ".yml")):
        return Stored.read(text)
    return parse(text, REMEDIES, "mitigation")


def standard(train: int | None) -> list[str]:
    """What `--mitigation all` measures: every remedy at its published or plainest setting, and the controls. Left out
    are `stored-start`, which needs a file, and those that need the training length where it is not known."""
    some = ["none", "rri", "rri:alpha=0.999,beta=1", "a-winsor", "a-scale:scale=1.5", "delta-scale:scale=0.7",
            "noise-start:std=0.1", "decimate", "chunk-select"]  # fmt: skip
    if train is None:
        return [*some, "recompute:last=512", "recompute:last=2048", "reset:every=512"]
    known = [
        "state-norm",
        "state-norm:every=64",
        f"window:tokens={train}",
        f"window:tokens={4 * train}",
        "token-filter",
        "a-floor",
    ]
    controls = [f"recompute:last={train // 2 * 2}", f"recompute:last={2 * train}", f"reset:every={train}"]
    return [*some, *known, *controls, *diagnostics(train)]


def diagnostics(train: int) -> list[str]:
    """The controls that tell which part of a hybrid fails beyond its training length."""
    return [f"attention-window:tokens={train // 2 * 2}", f"reset-recurrence:every={train}"]


class Handle:
    """A remedy on a model: `remove()` takes it off, and so does leaving a `with` block. text: what it was given to be
    calibrated on."""

    def __init__(self, model: Mamba2LM, remedy: Remedy, plan: Plan, text: Text | None = None):
        self.model, self.remedy, self.plan, self.text = model, remedy, plan, text

    def put(self) -> None:
        """Put this remedy on, as it was worked out; `mitigate` does, and after `remove` it may be done again, between
        any two tokens. Raises InputError where it cannot be combined with what is on the model."""
        if self in (handles := _handles(self.model)):
            return
        handles.append(self)
        try:
            _apply(self.model)
        except InputError:
            self.remove()
            raise

    def remove(self) -> None:
        """Take this remedy off; others on the model stay. Twice is no error."""
        handles = _handles(self.model)
        if self in handles:
            handles.remove(self)
            _apply(self.model)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()


def mitigate(model: Any, remedy: str | Remedy, *, target_length: int | str | None = None,
             text: Text | str | Path | None = None) -> Handle:  # fmt: skip
    """Put a remedy on a model, for all that it reads and generates from now on.

        with rnn_longctx.mitigate(model, "state-norm"):
            ...
        handle = rnn_longctx.mitigate(model, "rri:alpha=0.999,beta=0.75"); ...; handle.remove()

    A second remedy composes with the first, as `a+b` does. A model of another library is adopted
    (`rnn_longctx.adopt`), and follows the remedy in its own forward and generate; one that is a way to read (`reset`,
    `recompute`, `decimate`, `chunk-select`, `attention-window`) only our reading follows, and the own forward
    refuses. A copy of a model (`copy.deepcopy`) has what is on it: `for h in handles_on(copy): h.remove()`.

    Args:
        target_length: tokens to be read (4096, "4k"), for remedies that depend on it.
        text: what to calibrate on, or its name (`rnn_longctx.load_text`); None takes the calibration kept with the
            checkpoint, or else the builtin text. Not what is to be evaluated: that would flatter the remedy.
    Raises:
        InputError: no model, a text that is missing, and see `parse_remedy`; NotApplicable: the model lacks what the
            remedy needs.
    """
    from rnn_longctx.data import load_text

    remedy = parse_remedy(remedy)
    target_length = None if target_length is None else parse_length(target_length, "target_length")
    given, model = model, as_language_model(model)
    text = None if text is None else load_text(text)
    with _bare(model):
        handle = Handle(model, remedy, remedy.plan(model, target_length, text), text)
    if (handle.plan.restart or handle.plan.reader) and isinstance(model, Adopted) and model is not given:
        raise NotApplicable(
            f"{remedy} is a way to read, which {type(given).__name__} has of its own: put it on "
            "rnn_longctx.adopt(model), and read with rnn_longctx.generate or rnn_longctx.evaluate"
        )
    handle.put()
    return handle


def fold(model: Mamba2LM, remedy: str | Remedy, text: Text | str | Path | None = None) -> Mamba2LM:
    """Put a remedy into the weights, in place, and return the model itself: A_log <- A_log + log(mul). For those that
    scale the log-decay by a constant a head and do nothing else: a-floor, a-winsor, a-scale (place=rate), and
    compositions of them. `copy.deepcopy(model)` first keeps the model as it was.

    The model is then another one, without any policy, and is saved as any other: its name and provenance ("folded":
    what, on which weights, calibrated on what) say so. What was calibrated on the old weights is dropped.

    Args:
        text: what to calibrate on, as of `mitigate`.
    Raises:
        InputError: another remedy, a model that is under one, or one of another library; and see `mitigate`. The model
            is then as it was.
    """
    from rnn_longctx.data import load_text

    remedy = parse_remedy(remedy)
    if not isinstance(model, Mamba2LM):
        raise InputError(f"{type(model).__name__} is no model of rnn_longctx.load: {remedy} is folded into those alone")
    if handles_on(model):
        raise InputError(f"{model.name} is under {active(model)[0]}: take it off before {remedy} is folded in")
    parts = _parts(remedy)
    text, device = None if text is None else load_text(text), model.device
    with _bare(model):
        known = all(isinstance(part, AFloor | AWinsor | AScale) for part in parts)
        plans = [part.plan(model, None, text) for part in parts] if known else []
    if not plans or any(policy != ScanPolicy(mul=policy.mul) for plan in plans for policy in plan.policies):
        raise InputError(f"{remedy} cannot be folded into weights: a-floor, a-winsor and a-scale (place=rate) can")
    plan = combine(plans, model)
    entry = {"mitigation": str(remedy), "name": model.name, "weights": model.weights_hash}
    before = [mixer.A_log.data for mixer in model.mixers]
    for mixer, A_log, policy in zip(model.mixers, before, plan.policies):
        log = torch.as_tensor(policy.mul, dtype=torch.float64, device=device).log()
        # at least float32, as a checkpoint keeps it; a new tensor, for the old one may be a mapped file's
        mixer.A_log.data = (A_log.double() + log).to(torch.promote_types(A_log.dtype, torch.float32))
    try:
        checkpoint.check_finite(dict(model.named_parameters()), model.name)
    except InputError:
        for mixer, A_log in zip(model.mixers, before):
            mixer.A_log.data = A_log
        raise
    model.name, model.calibration = f"{model.name}+{remedy}", None
    folded = [*model.provenance.get("folded", []), entry | {"calibration": plan.calibration}]
    model.provenance = {**model.provenance, "folded": folded}
    return model


def active(model: Mamba2LM | Adopted | nn.Module, now: str | None = None) -> tuple[str, str | None]:
    """The canonical text of what is on a model, `none` if nothing is, and what it was calibrated on: with the weights
    that it was worked out on, where the model has others by now. now: the model's `weights_hash`, where it is known."""
    handles = [h for h in handles_on(model) if not isinstance(h.remedy, Nothing)]
    if now is None and any(h.plan.weights for h in handles):
        now = as_language_model(model).weights_hash
    old = [f"worked out on {h.plan.weights}" if h.plan.weights not in (None, now) else None for h in handles]
    on = [", ".join(filter(None, (h.plan.calibration, was))) for h, was in zip(handles, old)]
    calibration = "; ".join(filter(None, on))
    return "+".join(str(h.remedy) for h in handles) or "none", calibration or None


def handles_on(model: Mamba2LM | Adopted | nn.Module) -> list[Handle]:
    """The remedies on a model, in the order in which they were put on."""
    return list((adopted(model) or innermost(model)).__dict__.get("_remedies", []))


def combine(plans: list[Plan], model: Mamba2LM) -> Plan:
    """Plans for one model, one after the other. InputError if two say how a prompt is read."""
    restarts = [p.restart for p in plans if p.restart]
    if len(restarts) > 1:
        raise InputError(f"{' and '.join(map(str, restarts))} cannot be combined")
    readers = [p.reader for p in plans if p.reader]
    if len(readers) > 1 or (readers and restarts):
        raise InputError("of the ways to read a prompt (decimate, chunk-select, reset, recompute) one can be taken")
    policies = [reduce(ScanPolicy.then, layer, PLAIN) for layer in zip(*(p.policies for p in plans))]
    calibration = "; ".join(p.calibration for p in plans if p.calibration) or None
    policies = policies or [PLAIN] * len(model.mixers)
    documents = frozenset[str]().union(*(p.documents for p in plans))
    reader = readers[0] if readers else None
    weights = next((p.weights for p in plans if p.weights), None)
    return Plan(tuple(policies), restarts[0] if restarts else None, calibration, reader, documents, weights)


class _bare:
    """The model without its remedies, for as long as one is being calibrated."""

    def __init__(self, model: Mamba2LM):
        self.model = model

    def __enter__(self) -> None:
        _set(self.model, Plan((PLAIN,) * len(self.model.mixers)))

    def __exit__(self, *error: Any) -> None:
        _apply(self.model)


def _handles(model: Mamba2LM) -> list[Handle]:
    return model.__dict__.setdefault("_remedies", [])


def _apply(model: Mamba2LM) -> None:
    handles = _handles(model)
    Composite(tuple(part for h in handles for part in _parts(h.remedy)))  # refuses what `a+b` does
    _set(model, combine([h.plan for h in handles], model))
    if isinstance(model, Adopted):
        model.refuse_own("+".join(str(h.remedy) for h in handles if h.plan.restart or h.plan.reader))


def _set(model: Mamba2LM, plan: Plan) -> None:
    for mixer, policy in zip(model.mixers, plan.policies):
        mixer.policy = policy
    model.restart = plan.restart
    model.reader = plan.reader
