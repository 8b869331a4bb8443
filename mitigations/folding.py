"""Remedies that scale the log-decay by a constant a head, put into the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.attach import active, handles_on, read_text, without_remedies
from rnn_longctx.mitigations.base import REMEDIES, Remedy, planned
from rnn_longctx.mitigations.compose import combine, parse_remedy
from rnn_longctx.models.adopt.adopting import adopted
from rnn_longctx.models.adopt.family import mixers_in
from rnn_longctx.models.adopt.mixer import AdoptedMixer
from rnn_longctx.models.adopt.model import Adopted
from rnn_longctx.models.adopt.wrapped import innermost
from rnn_longctx.models.checkpoint.weights import check_finite
from rnn_longctx.models.hashing import Identified
from rnn_longctx.models.interface import RecurrentMixer
from rnn_longctx.recurrence.policy import ScanPolicy

if TYPE_CHECKING:
    from rnn_longctx.data import Text


def fold(model: Any, remedy: str | Remedy, text: Text | str | Path | None = None) -> Any:
    """Put a remedy into the weights, in place, and return the model itself: A_log <- A_log + log(mul). For those that
    scale the log-decay by a constant a head and do nothing else: a-floor, a-winsor, a-scale (place=rate), and
    compositions of them. `copy.deepcopy(model)` first keeps the model as it was.

    The model is then another one, without any policy, and is saved as any other: its name and provenance ("folded":
    what, on which weights, calibrated on what) say so. What was calibrated on the old weights is dropped.

    Args:
        text: what to calibrate on, as of `mitigate`.
    Raises:
        InputError: another remedy; a model that is under one, has no rates among its weights, or is of another library;
            and see `mitigate`. The model is then as it was.
    """
    remedy = parse_remedy(remedy)
    if not (getattr(model, "foldable", False) and model.module is model):  # (a wrapper may pass attributes on)
        raise InputError(_not_ours(model, remedy))
    if handles_on(model):
        raise InputError(f"{model.name} is under {active(model)[0]}: take it off before {remedy} is folded in")
    if not model.mixers:
        raise InputError(f"{remedy} cannot be folded into weights: {model.name} has no recurrence")
    _check_rates({f"a {mixer.name} layer": mixer for mixer in model.mixers}, remedy)
    calibration_text = read_text(text)
    plans = []
    if all(single.foldable for single in remedy.parts):
        with without_remedies(model):
            plans = [planned(single, model, None, calibration_text) for single in remedy.parts]
    if not plans or any(policy != ScanPolicy(mul=policy.mul) for plan in plans for policy in plan.policies):
        *first, last = [kind.foldable for kind in REMEDIES.values() if kind.foldable]
        raise InputError(f"{remedy} cannot be folded into weights: {', '.join(first)} and {last} can")
    plan = combine(plans, model)
    entry = {"mitigation": str(remedy), "name": model.name, "weights": model.weights_hash}
    before = [(p, p.data) for p in model.parameters()]
    try:
        for mixer, policy in zip(model.mixers, plan.policies):
            factor = torch.as_tensor(policy.mul, dtype=torch.float64, device=model.device)
            mixer.scale_rates(factor)
        check_finite(dict(model.named_parameters()), model.name)
    except InputError:
        for parameter, data in before:
            parameter.data = data
        raise
    model.name, model.calibration = f"{model.name}+{remedy}", None
    folded = [*model.provenance.get("folded", []), entry | {"calibration": plan.calibration}]
    model.provenance = {**model.provenance, "folded": folded}
    return model


def _check_rates(layers: Mapping[str, RecurrentMixer], remedy: Remedy) -> None:
    """Raise InputError, the same whatever the remedy, where no weight of a layer scales its log-decays alone. layers:
    by what they are called."""
    for name, mixer in layers.items():
        if mixer.A is None:
            why = f"{name} {mixer.no_rates}, so that no weight of it scales log-decays alone"
            raise InputError(f"{remedy} cannot be folded into weights: {why}")


def _not_ours(model: Any, remedy: Remedy) -> str:
    """Return why a remedy is not folded into what is no model of this library's own. Raises InputError, as
    `_check_rates`, where that is how its layers decay."""
    mixers, kind = _foreign_mixers(model), type(model).__name__
    _check_rates({f"layer {mixer.name}": mixer for mixer in mixers}, remedy)
    if not mixers:
        return f"{kind} is no model of rnn_longctx.load: {remedy} is folded into those alone"
    return (
        f"{remedy} cannot be folded into weights: those that hold the rates of {kind} are another library's, and only "
        "those of rnn_longctx.load are written"
    )


def _foreign_mixers(model: Any) -> Sequence[AdoptedMixer]:
    """Return the recurrent layers of a model of another library, adopted or not; none of what is no such model."""
    if (known := model if isinstance(model, Adopted) else adopted(model)) is not None:
        return known.mixers
    inside = innermost(model)
    return mixers_in(inside)[1] if isinstance(inside, nn.Module) and not isinstance(inside, Identified) else ()
