"""The step sizes dt that a model takes on a text, within its training length: how fast its heads forget and write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rnn_longctx.models.precision import computes_as

if TYPE_CHECKING:
    from rnn_longctx.data import Text
    from rnn_longctx.models import Mamba2LM

SLICES = 8


@torch.inference_mode()
def measure_steps(model: Mamba2LM, ids: Tensor) -> list[Tensor]:
    """dt (slices, T, H) float32 of every recurrent layer, after softplus and clamp, on ids (slices, T)."""
    found: list[Tensor] = []

    def note(mixer: Any) -> Any:
        return lambda module, inputs, projected: found.append(mixer.steps(projected).float().cpu())

    hooks = [mixer.in_proj.register_forward_hook(note(mixer)) for mixer in model.mixers]
    try:
        model(ids.to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def steps_of(model: Mamba2LM, length: int, text: Text | None = None) -> tuple[list[Tensor], str]:
    """`measure_steps` on slices of a text (None: the builtin one), remembered; and what it was measured on.
    Raises InputError if the text is too short."""
    from rnn_longctx.data import load_text, tokens

    text = text or load_text("builtin")
    known = model.__dict__.setdefault("_steps", {})
    if (key := (length, text.hash, computes_as(model))) not in known:
        ids = torch.stack([torch.from_numpy(tokens(text, model.tokenizer, i, length)[0]) for i in range(SLICES)])
        known[key] = measure_steps(model, ids)
    return known[key], f"{text.name} {text.hash}, {SLICES} x {length}"
