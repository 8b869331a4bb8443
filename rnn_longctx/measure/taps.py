"""Look at what the scans of a model read: the inputs and gates of its recurrent layers, call by call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from rnn_longctx.models.interface import LanguageModel, RecurrentMixer
from rnn_longctx.models.mixer_reading import MixerReading, Tap
from rnn_longctx.recurrence.gates import AnyGates


def taps_everywhere(model: LanguageModel) -> bool:
    """Return whether every recurrent layer can be tapped: this library's own can, an adopted one's scan has its
    library's shape."""
    return all(mixer.tappable for mixer in model.mixers)


@contextmanager
def tapping(mixers: Sequence[RecurrentMixer], taps: Sequence[Tap]) -> Iterator[None]:
    """Call each tap with every `MixerReading` of its mixer inside the block, after the taps that are there already."""
    before = [mixer.tap for mixer in mixers]
    try:
        for mixer, tap in zip(mixers, taps, strict=True):
            mixer.tap = tap if mixer.tap is None else _both(mixer.tap, tap)
        yield
    finally:
        for mixer, tap_before in zip(mixers, before, strict=True):
            mixer.tap = tap_before


def _both(first: Tap, second: Tap) -> Tap:
    def tap(reading: MixerReading) -> AnyGates | None:
        gates = first(reading) or reading.gates
        return second(replace(reading, gates=gates)) or gates

    return tap
