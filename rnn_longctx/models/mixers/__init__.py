"""One file a mixer, recurrent or attending. `MIXERS` finds them by name."""

from __future__ import annotations

from rnn_longctx.models.interface import Mixer
from rnn_longctx.registry import Registry

MIXERS: Registry[type[Mixer]] = Registry("mixer", "rnn_longctx.models.mixers")

__all__ = ["MIXERS"]
