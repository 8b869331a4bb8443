"""What a recurrent layer's projections give, and one call of it as it is watched or changed before its scan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from rnn_longctx.models.carries import Carry
from rnn_longctx.recurrence.gates import AnyGates, ScanInputs
from rnn_longctx.recurrence.span import Span


class Rest(NamedTuple):
    """What a layer's projections give beside the inputs of its scan.

    Attributes:
        z: (B, T, H * P), what gates the output.
        conv: (B, channels, d_conv - 1), the convolution's last inputs, for the carry.
        convolved: (B, T, channels), what the convolution read; zero at padding.
        bonus: (B, T, H * P), what a token adds to its own output beside the scan, after the output's norm.
        angle: (B, H, ·) float64, what the carry holds of the angles that keys were turned by.
        largest: (B, H, N), what the carry holds of the largest exponents of keys.
        token: (B, T, d_model), what the layer read.
    """

    z: Tensor | None = None
    conv: Tensor | None = None
    convolved: Tensor | None = None
    bonus: Tensor | None = None
    angle: Tensor | None = None
    largest: Tensor | None = None
    token: Tensor | None = None


@dataclass(frozen=True, eq=False)
class MixerReading:
    """One call of a recurrent layer, as its `tap` gets it before the scan.

    Attributes:
        inputs: x (B, T, H, P), B and C (B, T, G, N), as the scan reads them (after convolutions and activations).
        gates: given, or to be worked out; `gates.worked_out(dtype, policy)` gives numbers (B, T, H).
        span: padding, documents and positions of the call.
        carry: the layer's carry before the call, or None where its stream begins.
        rest: what else the projections gave, such as what the convolution read.
    """

    inputs: ScanInputs
    gates: AnyGates
    span: Span
    carry: Carry | None
    rest: Rest


Tap = Callable[[MixerReading], AnyGates | None]  # the gates for the scan to read, or None for those of the layer
