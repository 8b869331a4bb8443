"""The step sizes dt that a model takes on a text, within its training length: how fast its heads forget and write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rnn_longctx.measure.calibration import Calibration
from rnn_longctx.models.modes import in_evaluation

if TYPE_CHECKING:
    from rnn_longctx.data import Text
    from rnn_longctx.models.lm import Mamba2LM

SLICES = 8


@torch.inference_mode()
@in_evaluation
def measure_steps(model: Mamba2LM, ids: Tensor) -> list[Tensor]:
    """dt (slices, T, H) float32 of every recurrent layer, after softplus and clamp, on ids (slices, T)."""
    parts: list[list[Tensor]] = [[] for _ in model.mixers]  # of each layer, a piece a call of its

    def note(layer: int, mixer: Any) -> Any:
        return lambda module, inputs, projected: parts[layer].append(mixer.steps(projected).float().cpu())

    hooks = [mixer.in_proj.register_forward_hook(note(i, mixer)) for i, mixer in enumerate(model.mixers)]
    try:
        model(ids.to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(pieces, 1) for pieces in parts]


def steps_of(model: Mamba2LM, length: int, text: Text | None = None) -> tuple[list[Tensor], Calibration]:
    """`measure_steps` on slices of a text (None: the builtin one), remembered while the model is the same; and
    what it was measured on. Raises InputError if the text is too short."""
    from rnn_longctx.data import load_text, tokens

    text = text or load_text("builtin")
    known = model.measured("steps")
    if (key := (length, text.hash)) not in known:
        ids = torch.stack([torch.from_numpy(tokens(text, model.tokenizer, i, length)[0]) for i in range(SLICES)])
        known[key] = measure_steps(model, ids)
    return known[key], Calibration(text.name, text.hash, SLICES, length)
