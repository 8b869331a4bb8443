"""One file a mixer, recurrent or attending. `MIXERS` finds them by name."""

from __future__ import annotations

from typing import Any

from rnn_longctx.registry import Registry

# Classes as `rnn_longctx.models.interface.Mixer` describes them, with a `Config` and `of(config, model)`.
MIXERS: Registry[Any] = Registry("mixer", "rnn_longctx.models.mixers")

__all__ = ["MIXERS"]
