"""One file a mixer, recurrent or attending. `MIXERS` finds them by name."""

from __future__ import annotations

from rnn_longctx.models.interface import Mixer
from rnn_longctx.registry import Registry

MIXERS: Registry[type[Mixer]] = Registry("mixer", "rnn_longctx.models.mixers")

# What people ask for by a name that no mixer has, and why there is none.
NO_MIXERS = {
    "linformer": "Linformer's projections mix all tokens of a sequence and have no causal form: for language take the "
    "mixer chunk-linformer, which reads completed chunks so"
}

__all__ = ["MIXERS", "NO_MIXERS"]
