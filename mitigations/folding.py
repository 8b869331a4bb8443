"""Remedies that scale the log-decay by a constant a head, put into the weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.attach import active, handles_on, read_text, without_remedies
from rnn_longctx.mitigations.base import REMEDIES, Remedy, planned
from rnn_longctx.mitigations.compose import combine, parse_remedy
from rnn_longctx.models.checkpoint.weights import check_finite
from rnn_longctx.models.interface import LanguageModel, ScanMixer
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
        raise InputError(f"{type(model).__name__} is no model of rnn_longctx.load: {remedy} is folded into those alone")
    if handles_on(model):
        raise InputError(f"{model.name} is under {active(model)[0]}: take it off before {remedy} is folded in")
    _check_rates(model, remedy)
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


def _check_rates(model: LanguageModel, remedy: Remedy) -> None:
    """Raise InputError, the same whatever the remedy, where no weight holds a rate of decay."""
    if not model.mixers:
        raise InputError(f"{remedy} cannot be folded into weights: {model.name} has no recurrence")
    mixers = cast(Sequence[ScanMixer], model.mixers)  # a foldable model is this library's
    if lacking := [mixer for mixer in mixers if mixer.A is None]:
        layer = f"a {lacking[0].name} layer {lacking[0].no_rates}"
        raise InputError(f"{remedy} cannot be folded into weights: {layer}, so that no weight of it holds a rate")
