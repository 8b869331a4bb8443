"""What a remedy is: something that turns a model into one `ScanPolicy` a layer, or a control of its reader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rnn_longctx.errors import InputError
from rnn_longctx.models.lm import Reader
from rnn_longctx.models.restart import Restart
from rnn_longctx.recurrence.policy import PLAIN, ScanPolicy
from rnn_longctx.spec import canonical

if TYPE_CHECKING:
    from rnn_longctx.data import Text
    from rnn_longctx.models.lm import Mamba2LM


class NotApplicable(InputError):
    """The model lacks what the remedy needs."""


@dataclass(frozen=True)
class Plan:
    """A remedy worked out for one model: a policy a layer, a reader's control, what it was calibrated on, and how it
    reads a prompt where that is not token after token. documents: digests of those that a calibration kept in a file
    has seen (`rnn_longctx.eval.search.unseen`). weights: the model's `weights_hash`, where it follows from the weights.
    """

    policies: tuple[ScanPolicy, ...]
    restart: Restart | None = None
    calibration: str | None = None
    reader: Reader | None = None
    documents: frozenset[str] = frozenset()
    weights: str | None = None


@dataclass(frozen=True)
class Remedy:
    """Base of the remedies. One file each; the fields of the dataclass are its parameters.

    Attributes:
        name: as on the command line.
        control: True for the two that every remedy is judged against.
        adds: True where two settings of it act one upon the other: factors multiply, every cap holds. Elsewhere one of
            two would go unnoticed (the larger window, the earlier start), or do what neither says (a second floor
            under A raises what the first has raised), and they are not composed.
        per_length: True where the policies depend on the target length, so that every length is its own pass.
    """

    name: ClassVar[str]
    control: ClassVar[bool] = False
    adds: ClassVar[bool] = False
    per_length: ClassVar[bool] = False

    def plan(self, model: Mamba2LM, target_length: int | None = None, text: Text | None = None) -> Plan:
        """Work the remedy out for a model.

        Args:
            target_length: tokens the model is to read, where the remedy depends on it.
            text: what to calibrate on; None takes the calibration kept with the checkpoint, or else the builtin text.
        Raises:
            NotApplicable: the model lacks what the remedy needs.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        return canonical(self.name, self)


def same_everywhere(model: Mamba2LM, policy: ScanPolicy = PLAIN) -> tuple[ScanPolicy, ...]:
    return (policy,) * len(model.mixers)


def train_length(model: Mamba2LM, remedy: str) -> int:
    """The model's training length, or a refusal that says how to give it."""
    if model.train_length is None:
        raise NotApplicable(
            f"{remedy} needs the training length, which {model.name} does not say: give --train-length "
            "(train_length= of load or adopt in Python)"
        )
    return model.train_length


def one_step_a_head(model: Mamba2LM, remedy: str) -> None:
    """Refuse a model whose steps are not Mamba-2's, one a head from what `in_proj` gives."""
    if any(mixer.A.ndim > 1 for mixer in model.mixers):
        raise NotApplicable(f"{remedy} reads one step a head, as Mamba-2 has: {model.name} has Mamba-1's")


def above_zero(remedy: str, name: str, value: float | str) -> list[float]:
    """The numbers of `0.7` or `0.7/0.8/...`. Raises InputError where one is none, or not above 0."""
    try:
        numbers = [float(part) for part in str(value).split("/")]
    except ValueError:
        raise InputError(f"{remedy}: {name} is a number, or one a layer as in 0.7/0.8, got {value!r}") from None
    if not all(0 < number < float("inf") for number in numbers):
        raise InputError(f"{remedy}: {name} must be above 0, got {value}")
    return numbers


def per_layer(remedy: str, value: float | str, model: Mamba2LM) -> list[float]:
    """One number a layer of the model."""
    numbers, layers = above_zero(remedy, "the value", value), len(model.mixers)
    if len(numbers) not in (1, layers):
        raise InputError(f"{remedy}: {len(numbers)} values are given, the model has {layers} recurrent layers")
    return numbers * layers if len(numbers) == 1 else numbers
