"""The step sizes dt that a model takes on a text, within its training length: how fast its heads forget and write."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.measure.calibration import Calibration
from rnn_longctx.measure.taps import tapping, taps_everywhere
from rnn_longctx.models.interface import LanguageModel, SteppedMixer
from rnn_longctx.models.mixer_reading import MixerReading, Tap
from rnn_longctx.models.modes import in_evaluation
from rnn_longctx.recurrence.gates import SteppedGates

if TYPE_CHECKING:
    from rnn_longctx.data import Text

SLICES = 8


@torch.inference_mode()
@in_evaluation
def measure_steps(model: LanguageModel, ids: Tensor) -> list[Tensor]:
    """Return dt (slices, T, H) float32 of every recurrent layer, after softplus and clamp, on ids (slices, T).

    Raises:
        InputError: a layer whose gates are given token by token, or whose steps are one a channel.
    """
    pieces: list[list[Tensor]] = [[] for _ in model.mixers]  # of each layer, one a call
    with _watching_steps(model, pieces):
        model(ids.to(model.device))
    return [torch.cat(some, 1) for some in pieces]


@contextmanager
def _watching_steps(model: LanguageModel, pieces: list[list[Tensor]]) -> Iterator[None]:
    if taps_everywhere(model):
        with tapping(model.mixers, [_steps_into(model, some) for some in pieces]):
            yield
        return
    mixers = cast(Sequence[SteppedMixer], model.mixers)  # (one that is none says so)
    hooks = [mixer.in_proj.register_forward_hook(_projected_into(mixer, p)) for mixer, p in zip(mixers, pieces)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _steps_into(model: LanguageModel, pieces: list[Tensor]) -> Tap:
    def tap(reading: MixerReading) -> None:
        gates = reading.gates
        if not isinstance(gates, SteppedGates):
            raise InputError(
                f"{model.name} has a layer whose gates are given token by token: there is no step dt in it"
            )
        kinds = [gates.dt.dtype, *([] if gates.dt_bias is None else [gates.dt_bias.dtype])]
        dtype = functools.reduce(torch.promote_types, kinds)  # of the layer, not of its scan: what was calibrated stays
        pieces.append(gates.worked_out(dtype).input_scale.float().cpu())

    return tap


def _projected_into(mixer: SteppedMixer, pieces: list[Tensor]) -> Callable[..., None]:
    return lambda module, inputs, projected: pieces.append(mixer.steps(projected).float().cpu())


def steps_of(model: LanguageModel, length: int, text: Text | None = None) -> tuple[list[Tensor], Calibration]:
    """Return `measure_steps` on slices of a text (None: the builtin one), remembered while the model is the same, and
    what it was measured on.

    Raises:
        InputError: a text that is too short, a layer that `measure_steps` refuses.
    """
    from rnn_longctx.data import load_text, tokens

    text = text or load_text("builtin")
    known = model.measured("steps")
    if (key := (length, text.hash)) not in known:
        ids = torch.stack([torch.from_numpy(tokens(text, model.tokenizer, i, length)[0]) for i in range(SLICES)])
        known[key] = measure_steps(model, ids)
    return known[key], Calibration(text.name, text.hash, SLICES, length)
