"""What a remedy is: something that turns a model into one `ScanPolicy` a layer, or that changes how its reader reads.

A remedy is one file in this folder, named like it (`state_norm.py` for "state-norm"), and nothing else names it:

    @REMEDIES.register
    @dataclass(frozen=True)
    class ForgetFaster(Remedy):
        name = "forget-faster"
        needs = frozenset({Need.RECURRENCE})
        factor: float = 1.5

        def plan(self, model, target_length=None, text=None):
            return Plan(same_everywhere(model, ScanPolicy(mul=self.factor)))

One that lives elsewhere is registered by `rnn_longctx.plugins.register`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rnn_longctx.errors import InputError
from rnn_longctx.models.interface import LanguageModel, Reader, erases
from rnn_longctx.recurrence.policy import PLAIN, ScanPolicy
from rnn_longctx.registry import Registry
from rnn_longctx.spec import canonical

if TYPE_CHECKING:
    from rnn_longctx.data import Text
    from rnn_longctx.measure.calibration import Calibration
    from rnn_longctx.models.restart import Restart
    from rnn_longctx.models.rotary import Yarn

REMEDIES: Registry[type[Remedy]] = Registry("mitigation", "rnn_longctx.mitigations")


class NotApplicable(InputError):
    """The model lacks what the remedy needs."""


class Need(Enum):
    """What a remedy needs of a model, or of the call that puts it on; they are checked in this order."""

    RECURRENCE = "a recurrent layer"
    STEPS = "one step size a head and token, as Mamba-2 has"
    RATES = "one A a head, as Mamba-2 has"
    ERASING = "a recurrence that erases, as the delta rule does"
    ATTENTION = "layers that attend, beside the recurrent ones"
    NO_ATTENTION = "no layer that attends, for it would need the tokens that the remedy drops between layers"
    ROTARY = "layers of full attention with rotary positions, of this library"
    KEYS = "layers that show their keys and queries, as this library's own do"
    TRAIN_LENGTH = "the length that the model was trained on"
    TARGET_LENGTH = "the length that is to be read"


@dataclass(frozen=True)
class Plan:
    """A remedy worked out for one model.

    Attributes:
        policies: one for every recurrent layer.
        restart: the reader's control, or None.
        reader: how a prompt is read where that is not token after token, or None.
        scaling: of rotary positions in full attention, or None.
        calibrations: what it was calibrated on.
        weights: the model's `weights_hash`, where the plan follows from the weights.
    """

    policies: tuple[ScanPolicy, ...]
    restart: Restart | None = None
    reader: Reader | None = None
    scaling: Yarn | None = None
    calibrations: tuple[Calibration, ...] = ()
    weights: str | None = None

    @property
    def calibration(self) -> str | None:
        """What it was calibrated on, as a result's key says it; None if on nothing."""
        return "; ".join(map(str, self.calibrations)) or None


@dataclass(frozen=True)
class Remedy:
    """Base of the remedies. One file each; the fields of the dataclass are its parameters.

    Attributes:
        name: as on the command line.
        needs: what a model must have; without it, `mitigate` raises NotApplicable and says what is missing.
        control: True for those that every remedy is judged against.
        adds: True where two settings of it act one upon the other: factors multiply, every cap holds. Elsewhere one of
            two would go unnoticed (the larger window, the earlier start), or do what neither says (a second floor
            under A raises what the first has raised), and they are not composed.
        starts: True where it says what rows start from, which one remedy alone can.
        diagnoses: True where it belongs to the controls that tell which part of a hybrid fails: "all" names them last,
            and an evaluation adds them by itself where a hybrid is read beyond its training length.
        per_length: True where the policies depend on the target length, so that every length is its own pass.
        foldable: how `fold` calls it among the remedies that can be put into weights; empty for one that cannot.
        search: how `calibrate` searches its parameters: over `grid` ("grid"; "quantile" where they are quantiles of
            what was measured on the text), and by SPSA from the best of the grid on ("spsa"). None: not at all.
        examples: settings that the contract (`rnn_longctx.testing.remedies`) holds it to beside the usual ones; needed
            where a parameter has no default and `usual` names no setting.
        one_a_layer: the parameter that takes one value for every layer, written a/b/..., which SPSA moves.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()
    control: ClassVar[bool] = False
    adds: ClassVar[bool] = False
    starts: ClassVar[bool] = False
    diagnoses: ClassVar[bool] = False
    per_length: ClassVar[bool] = False
    foldable: ClassVar[str] = ""
    search: ClassVar[Literal["grid", "quantile", "spsa"] | None] = None
    one_a_layer: ClassVar[str] = ""
    examples: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def usual(cls, train_length: int | None) -> list[str]:
        """Return the settings that "all" measures: its published or plainest ones.

        Without an override it is the bare name, or nothing where a parameter has no default, or where it needs the
        training length and that is not known (None).
        """
        required = any(f.default is MISSING and f.default_factory is MISSING for f in fields(cls))
        unknown = train_length is None and Need.TRAIN_LENGTH in cls.needs
        return [] if required or unknown else [cls.name]

    @classmethod
    def grid(cls, train_length: int, fixed: Mapping[str, str]) -> dict[str, list[Any]]:
        """Return the values that `calibrate` tries of each parameter; all combinations of them are measured.

        Args:
            train_length: in tokens.
            fixed: the parameters that stay as the caller gave them, as text.
        """
        return {}

    @property
    def parts(self) -> tuple[Remedy, ...]:
        """The remedies that this one is composed of: itself alone, unless it is a composition, or `none`."""
        return (self,)

    @property
    def kind(self) -> type[Remedy]:
        """The class of which a second setting may not be composed with this one (see `adds`)."""
        return type(self)

    @property
    def forgets(self) -> bool:
        """Whether `one_a_layer` is a factor on decays, at most 1: SPSA then moves what is forgotten, 1 - factor."""
        return False

    def plan(self, model: LanguageModel, target_length: int | None = None, text: Text | None = None) -> Plan:
        """Work the remedy out for a model that has what it needs (see `planned`).

        Args:
            target_length: tokens the model is to read, where the remedy depends on it.
            text: what to calibrate on; None takes the calibration kept with the checkpoint, or else the builtin text.
        Raises:
            NotApplicable: the model lacks what the remedy needs.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        return canonical(self.name, self)


def planned(remedy: Remedy, model: LanguageModel, target_length: int | None = None, text: Text | None = None) -> Plan:
    """Work a remedy out for a model, after a look at what it needs. Arguments and errors are those of `Remedy.plan`;
    NotApplicable, too, where a policy means nothing to the recurrence of its layer."""
    for need in Need:
        if need in remedy.needs and (reason := _lacks(need, remedy.name, model, target_length)):
            raise NotApplicable(reason)
    plan: Any = remedy.plan(model, target_length, text)
    if not isinstance(plan, Plan):
        raise InputError(f"{remedy.name}: plan gives a Plan, got {type(plan).__name__}")
    if len(plan.policies) != len(model.mixers):
        policies = f"{len(plan.policies)} polic{'y' if len(plan.policies) == 1 else 'ies'}"
        raise InputError(f"{remedy.name}: plan gives {policies}, {model.name} has {len(model.mixers)} recurrent layers")
    for mixer, policy in zip(model.mixers, plan.policies):
        if reason := mixer.recurrence.unfollowed(policy):
            raise NotApplicable(f"{remedy}: {reason}")
    return plan


def _lacks(need: Need, remedy: str, model: LanguageModel, target_length: int | None) -> str | None:
    """Return why a need is not met, or None if it is."""
    match need:
        case Need.RECURRENCE if not model.mixers:
            return f"{remedy} changes a recurrence, and {model.name} has none"
        case Need.STEPS if not _one_step_a_head(model):
            return f"{remedy} reads one step a head, as Mamba-2 has: {_gates(model)}"
        case Need.RATES if not _one_step_a_head(model):
            return f"{remedy} needs one A a head and one step, as Mamba-2 has: {_gates(model)}"
        case Need.ERASING if not any(map(erases, model.mixers)):
            return f"{remedy} needs a recurrence that erases, as the delta rule does: {model.name} has none"
        case Need.ATTENTION if not (model.attends and model.mixers):
            return f"{remedy} is for hybrids, and {model.name} has no {'attention' if model.mixers else 'recurrence'}"
        case Need.NO_ATTENTION if model.attends:
            return f"{remedy} drops tokens between layers, which attention in {model.name} needs"
        case Need.ROTARY if not model.rotary:
            return f"{remedy} scales the rotary positions of full attention, and {model.name} has none of this library"
        case Need.KEYS if not all(mixer.tappable for mixer in model.mixers):
            return f"{remedy} reads keys and queries, which an adopted model does not show: {model.name} is one"
        case Need.TRAIN_LENGTH:
            return _unknown_train_length(remedy, model)
        case Need.TARGET_LENGTH if target_length is None:
            return f"{remedy} needs the length to be read: give target_length"
    return None


def _one_step_a_head(model: LanguageModel) -> bool:
    return all(mixer.one_step_a_head for mixer in model.mixers)


def _gates(model: LanguageModel) -> str:
    """Return what the first layer without one step a head has, or does, instead."""
    mixer = next(mixer for mixer in model.mixers if not mixer.one_step_a_head)
    if mixer.A is None:
        return f"a layer of {model.name} {mixer.no_rates}"
    if mixer.A.ndim == 2:
        return f"{model.name} has Mamba-1's, one a channel"
    return f"a layer of {model.name} has steps that do not say how much is written"


def _unknown_train_length(remedy: str, model: LanguageModel) -> str | None:
    if model.train_length is not None:
        return None
    return (
        f"{remedy} needs the training length, which {model.name} does not say: give --train-length "
        "(in Python train_length= of load, or of adopt before the remedy)"
    )


def train_length(model: LanguageModel, remedy: str) -> int:
    """Return the model's training length. Raises NotApplicable, with how to give it, where it is not known."""
    if model.train_length is None:
        raise NotApplicable(_unknown_train_length(remedy, model))
    return model.train_length


def same_everywhere(model: LanguageModel, policy: ScanPolicy = PLAIN) -> tuple[ScanPolicy, ...]:
    """Return one policy for every recurrent layer of the model."""
    return (policy,) * len(model.mixers)


def above_zero(remedy: str, name: str, value: float | str) -> list[float]:
    """Return the numbers of `0.7` or `0.7/0.8/...`. Raises InputError where one is none, or not above 0."""
    try:
        numbers = [float(number) for number in str(value).split("/")]
    except ValueError:
        raise InputError(f"{remedy}: {name} is a number, or one a layer as in 0.7/0.8, got {value!r}") from None
    if not all(0 < number < float("inf") for number in numbers):
        raise InputError(f"{remedy}: {name} must be above 0, got {value}")
    return numbers


def per_layer(remedy: str, value: float | str, model: LanguageModel) -> list[float]:
    """Return one number for every recurrent layer of the model, from one for all or one for each (`above_zero`)."""
    numbers, layers = above_zero(remedy, "the value", value), len(model.mixers)
    if len(numbers) not in (1, layers):
        raise InputError(f"{remedy}: {len(numbers)} values are given, the model has {layers} recurrent layers")
    return numbers * layers if len(numbers) == 1 else numbers
