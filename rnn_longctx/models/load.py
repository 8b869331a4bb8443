"""`rnn_longctx.load`: this library's own models, and decoders of transformers that it has retrofitted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rnn_longctx.models.checkpoint.load import load as load_own
from rnn_longctx.models.lm import LM
from rnn_longctx.models.retrofit.files import is_retrofitted, load_retrofitted

if TYPE_CHECKING:
    from rnn_longctx.models.retrofit.model import Retrofitted


def load(
    source: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    tokenizer: str | None = None,
    train_length: int | str | None = None,
) -> LM | Retrofitted:
    """Return a model in eval mode from a directory, a Hugging Face hub id, or "demo", "demo-long" or "demo-delta",
    which come with the package; a directory may be one that `rnn-longctx retrofit` wrote.

    Args:
        dtype: of the weights; None is float32. A_log, D and dt_bias stay float32 in a 16-bit model.
        tokenizer: instead of the checkpoint's own: a directory, a hub id or "bytes".
        train_length: tokens (2048, "2k"), where the checkpoint does not say or is wrong.
    Returns:
        The model, with name, train_length, tokenizer, provenance and calibration.
    Raises:
        InputError: no such checkpoint, an unsupported one, one that is damaged or does not fit its config, or
            weights that are not finite. An unreachable tokenizer raises when it is used, unless named here.
    """
    kind = load_retrofitted if is_retrofitted(source) else load_own
    return kind(source, device=device, dtype=dtype, tokenizer=tokenizer, train_length=train_length)
