"""Remedies on a model: `mitigate` puts one on, its handle takes it off again.

The handles lie on the model itself, in the attribute that HANDLES names, so that a copy or a pickle of the model has
what is on it. (The digest of its weights passes that attribute by: `rnn_longctx.models.hashing`.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnn_longctx.config import parse_length
from rnn_longctx.errors import InputError
from rnn_longctx.mitigations.base import NotApplicable, Plan, Remedy, planned
from rnn_longctx.mitigations.compose import Composite, combine, parse_remedy
from rnn_longctx.models.adopt.adopting import adopted, as_language_model
from rnn_longctx.models.adopt.wrapped import innermost
from rnn_longctx.models.interface import LanguageModel
from rnn_longctx.recurrence.policy import PLAIN

if TYPE_CHECKING:
    from torch import nn

    from rnn_longctx.data import Text

HANDLES = "_remedies"  # the attribute of a model that lists the handles of what is on it, in order


class Handle:
    """A remedy on a model: `remove()` takes it off, and so does leaving a `with` block.

    Attributes:
        plan: the remedy worked out for this model.
        text: what it was given to be calibrated on, or None.
    """

    def __init__(self, model: LanguageModel, remedy: Remedy, plan: Plan, text: Text | None = None):
        self.model, self.remedy, self.plan, self.text = model, remedy, plan, text

    def __repr__(self) -> str:
        return f"<{self.remedy} on {self.model.name}: {'on' if self in _handles(self.model) else 'off'}>"

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


def mitigate(
    model: Any, remedy: str | Remedy, *, target_length: int | str | None = None, text: Text | str | Path | None = None
) -> Handle:
    """Put a remedy on a model, for all that it reads and generates from now on.

        with rnn_longctx.mitigate(model, "state-norm"):
            ...
        handle = rnn_longctx.mitigate(model, "rri:alpha=0.999,beta=0.75"); ...; handle.remove()

    A second remedy composes with the first, as `a+b` does. A model of another library is adopted
    (`rnn_longctx.adopt`), and follows the remedy in its own forward and generate; one that is a way to read (`reset`,
    `recompute`, `decimate`, `chunk-select`, `lamb`, `attention-window`) only our reading follows, and the own forward
    refuses. A copy of a model (`copy.deepcopy`) has what is on it: `for h in handles_on(copy): h.remove()`.

    Args:
        target_length: tokens to be read (4096, "4k"), for remedies that depend on it.
        text: what to calibrate on, or its name (`rnn_longctx.load_text`); None takes the calibration kept with the
            checkpoint, or else the builtin text. Not what is to be evaluated: that would flatter the remedy.
    Raises:
        InputError: no model, a text that is missing, and see `parse_remedy`; NotApplicable: the model lacks what the
            remedy needs.
    """
    remedy = parse_remedy(remedy)
    target_length = None if target_length is None else parse_length(target_length, "target_length")
    lm: LanguageModel = as_language_model(model)
    calibration_text = read_text(text)
    with without_remedies(lm):
        handle = Handle(lm, remedy, planned(remedy, lm, target_length, calibration_text), calibration_text)
    if (handle.plan.restart or handle.plan.reader) and lm.own_forward and lm is not model:
        raise NotApplicable(
            f"{remedy} is a way to read, which {type(model).__name__} has of its own: put it on "
            "rnn_longctx.adopt(model), and read with rnn_longctx.generate or rnn_longctx.evaluate"
        )
    handle.put()
    return handle


def active(model: LanguageModel | nn.Module, now: str | None = None) -> tuple[str, str | None]:
    """Return the canonical text of what is on a model, `none` if nothing is, and what it was calibrated on: with the
    weights that it was worked out on, where the model has others by now. now: the model's `weights_hash`, where it is
    known."""
    handles = [handle for handle in handles_on(model) if handle.remedy.parts]
    if now is None and any(handle.plan.weights for handle in handles):
        now = as_language_model(model).weights_hash
    labels = []
    for plan in (handle.plan for handle in handles):
        former = None if plan.weights in (None, now) else f"worked out on {plan.weights}"
        labels.append(", ".join(filter(None, (plan.calibration, former))))
    return "+".join(str(handle.remedy) for handle in handles) or "none", "; ".join(filter(None, labels)) or None


def handles_on(model: LanguageModel | nn.Module) -> list[Handle]:
    """Return the remedies on a model, in the order in which they were put on."""
    return list(vars(adopted(model) or innermost(model)).get(HANDLES, []))


@contextmanager
def without_remedies(model: LanguageModel) -> Iterator[None]:
    """The model without its remedies within the block, for as long as one is being calibrated."""
    try:
        _set(model, Plan((PLAIN,) * len(model.mixers)))
        yield
    finally:
        _apply(model)


def read_text(text: Text | str | Path | None) -> Text | None:
    """Return a text by its name (`rnn_longctx.load_text`), or None for none."""
    if text is None:
        return None
    from rnn_longctx.data import load_text

    return load_text(text)


def _handles(model: LanguageModel) -> list[Handle]:
    return vars(model).setdefault(HANDLES, [])


def _apply(model: LanguageModel) -> None:
    handles = _handles(model)
    Composite(tuple(single for handle in handles for single in handle.remedy.parts))  # refuses what `a+b` does
    _set(model, combine([handle.plan for handle in handles], model))
    ways = [str(handle.remedy) for handle in handles if handle.plan.restart or handle.plan.reader]
    model.refuse_own("+".join(ways))


def _set(model: LanguageModel, plan: Plan) -> None:
    for mixer, policy in zip(model.mixers, plan.policies):
        mixer.policy = policy
    for layer in model.rotary:
        layer.yarn = plan.scaling
    model.restart = plan.restart
    model.reader = plan.reader
