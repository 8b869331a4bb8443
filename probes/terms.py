"""What the outputs of the scans are sums of, read off a model's recurrent layers while it reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rnn_longctx.errors import InputError
from rnn_longctx.measure.taps import tapping, taps_everywhere
from rnn_longctx.models.interface import LanguageModel, erases
from rnn_longctx.models.mixer_reading import MixerReading, Tap
from rnn_longctx.models.modes import evaluating
from rnn_longctx.recurrence.policy import ScanPolicy


@dataclass(frozen=True)
class Terms:
    """What the terms of one layer are made of, over a segment of t tokens from `start` on. float32, or float64 for a
    float64 model.

    Attributes:
        log_decay: (t, H), or (t, H, N) where every channel of the state decays by itself.
        scale, size: (t, H), the input scales and ||x||.
        B, C: (t, G, N).
    """

    start: int
    log_decay: Tensor
    scale: Tensor
    size: Tensor
    B: Tensor
    C: Tensor

    @classmethod
    def of(cls, reading: MixerReading, policy: ScanPolicy, start: int) -> Terms:
        """The terms of one call on a single row, under the layer's policy."""
        inputs = reading.inputs
        dtype = torch.promote_types(inputs.x.dtype, torch.float32)  # as the scan reads it
        gates = reading.gates.worked_out(dtype, policy)
        size = inputs.x[0].to(dtype).norm(dim=-1)
        return cls(start, gates.log_decay[0], gates.input_scale[0], size, inputs.B[0].to(dtype), inputs.C[0].to(dtype))


def read_terms(model: LanguageModel, ids: Tensor, segment: int) -> Iterator[list[Terms]]:
    """Read ids (1, T) from a fresh cache; yield, after each segment, the Terms of every recurrent layer."""
    cache = model.new_cache()
    for start in range(0, ids.shape[1], segment):
        terms: list[Terms] = []

        def tap_of(mixer: Any, start: int = start, terms: list[Terms] = terms) -> Tap:
            return lambda reading: terms.append(Terms.of(reading, mixer.policy, start))

        # taps stand only while the model reads: a caller may drop this iterator half way
        with tapping(model.mixers, [tap_of(mixer) for mixer in model.mixers]), evaluating(model):
            model(ids[:, start : start + segment].to(model.device), cache)
        yield terms


def refuse(model: LanguageModel, ids: Tensor, segment: int) -> None:
    """Raise InputError where a model's outputs are no plain sum of terms, or the arguments are wrong."""
    if not taps_everywhere(model):
        raise InputError(
            f"contributions are read off this library's own models, {type(model).__name__} is none of them"
        )
    if not model.mixers:
        raise InputError(f"{model.name} has no recurrent layer: nothing is contributed to a state")
    if erasing := [mixer for mixer in model.mixers if erases(mixer)]:
        raise InputError(
            "contributions add up where a state only fades: a later token erases, in part, what an earlier one wrote "
            f"({erasing[0].recurrence.name} recurrence of {model.name})"
        )
    if not isinstance(ids, Tensor):
        raise InputError(f"ids must be a tensor (1, T) of whole numbers, got {type(ids).__name__} {ids!r:.60}")
    if ids.ndim != 2 or len(ids) != 1 or ids.shape[1] < 1:
        raise InputError(f"ids must be (1, T) with at least one token, got shape {tuple(ids.shape)}")
    if segment < 1:
        raise InputError(f"segment: expected at least 1 token, got {segment}")
    if model.restart is not None or model.reader is not None:
        raise InputError("contributions are those of tokens read one after the other: take the control or reader off")
    for p in (mixer.policy for mixer in model.mixers):
        if p != ScanPolicy(mul=p.mul, add=p.add, gain=p.gain, min_dt=p.min_dt):
            raise InputError(
                "contributions add up under policies of the gates alone: a cap, window, reset or start is on"
            )
